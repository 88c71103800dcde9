//! Tests against real servers; their addresses come from the environment that `dev/stack env` prints.

mod compose;
mod generate;
