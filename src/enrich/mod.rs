//! The lookup fold and derived columns.

pub mod state;
