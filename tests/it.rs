//! Tests against real servers: `dev/stack up`, `eval "$(dev/stack env)"`, then `cargo test`.

mod compose;
mod generate;
mod setup;
