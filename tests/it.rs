//! Tests against real servers; their addresses come from the environment that `dev/stack env` prints.

mod board;
mod compose;
mod external;
mod generate;
mod mock_external;
mod setup;
mod upload;
