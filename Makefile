# The entry points. Each does its own set-up on a bare Debian 12 as root; as another user it says what is missing.
export PATH := $(HOME)/.cargo/bin:$(PATH)

.PHONY: help demo test test-all-pg check bench stack
help:
	@echo 'make demo [FOR=30s]    the whole system on this machine, in this terminal; with FOR unattended'
	@echo 'make test [ARGS=…]     all tests against real servers, started for them and removed again'
	@echo 'make test-all-pg [PG=…] the tests that depend on Postgres, against 14 to 18, or against PG="14 18"'
	@echo 'make check             format, lints, documentation, licences, container files, scripts'
	@echo 'make bench [QUICK=1]   figures against real servers of their own, and the bars that they have to hold'
	@echo 'make stack             the real servers alone (dev/stack env, dev/stack down)'

demo:
	@dev/setup build
	@dev/demo $(FOR)

test:
	@dev/setup build test
	@dev/test $(ARGS)

test-all-pg:
	@dev/setup build
	@dev/test-all-pg $(PG)

check:
	@dev/setup build check
	@dev/check

bench:
	@dev/setup build
	@QUICK=$(QUICK) PARTS=$(PARTS) dev/bench/run

stack:
	@dev/stack up
