//! Tests of the promises, against real servers: `eval "$(dev/stack env)"` first.

mod board;
