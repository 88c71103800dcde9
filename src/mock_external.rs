//! The simulated outside system.
