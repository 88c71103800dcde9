//! Tests against real servers: addresses come from the `FALAJ_…` variables that `dev/stack env` prints.

mod upload;
