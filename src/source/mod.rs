//! Postgres: how to reach it, and the replication connection.

pub mod conn; //    where Postgres is; SQL sessions
pub mod wire; //    the replication connection
