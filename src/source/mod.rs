//! Postgres: the slot, the stream, the catalogue.

pub mod slot;
pub mod stream;
