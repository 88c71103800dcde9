//! Tests against real servers; their addresses come from the environment that `dev/stack env` prints.

mod backfill;
mod board;
mod compose;
mod crash;
mod docs;
mod e2e;
mod external;
mod face;
mod generate;
mod mock_external;
mod pitfalls;
mod produce;
mod refuse;
mod replay;
mod rig;
mod rows;
mod schema;
mod setup;
mod types;
mod upload;
mod verify;
mod versions;
