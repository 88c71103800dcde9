//! Tests against real servers: `dev/stack up`, `eval "$(dev/stack env)"`, then `cargo test`.

mod board;
mod external;
mod mock_external;
mod setup;
