//! Kafka → Redis board, Kafka → outside HTTP system.

pub mod external;
