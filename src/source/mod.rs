//! Postgres: how to reach it, the slot, the stream, the catalogue.

pub mod conn; //    where Postgres is; SQL sessions
pub mod slot; //    the slot and the catalogue, as SQL sees them
pub mod stream; //  the CopyBoth stream
pub mod wire; //    the replication connection
