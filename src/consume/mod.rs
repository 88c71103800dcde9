//! Kafka → Redis board, Kafka → outside HTTP system.
