//! Seeded, realistic engagement load.
