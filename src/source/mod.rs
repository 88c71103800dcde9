//! Postgres: how to reach it, the slot, the stream, the catalogue.

pub mod catalog; // tables, before any Relation message has come
pub mod chunk; //   what the reading thread hands over
pub mod conn; //    where Postgres is; SQL sessions
mod pace;
pub mod pins; //    slots as bookmarks, and what they pin
pub mod slot; //    the slot and the catalogue, as SQL sees them
pub mod snapshot; // exported snapshots that belong to an LSN
pub mod stream; //  the CopyBoth stream
pub mod types; //   user-defined types, by what their values look like
pub mod wire; //    the replication connection
