//! A partition of the board's topic while it is read: where Redis stands, how far was read, and what lies between.

use tracing::{info, warn};

use super::batch::Batch;
use super::event;
use super::input::{Place, Record};
use super::redis::Call;

/// Redis stands at `stored`; `batch` leads from there to `next`.
pub struct Part {
    /// The offset in Redis, if it has one.
    pub stored: Option<i64>,
    /// The next offset to read.
    pub next: i64,
    /// What the records between the two add to the board.
    pub batch: Batch,
}

impl Part {
    /// Reads on from where Redis stands, but nothing that is too old to count into the window.
    pub fn at(topic: &str, partition: i32, stored: Option<i64>, place: Place) -> Self {
        Self { stored, next: start(topic, partition, stored, place), batch: Batch::default() }
    }

    /// Adds a record, unless that was done before.
    ///
    /// # Errors
    /// What is wrong with a record that is no event. It is passed all the same: one must not hold the board up.
    pub fn take(&mut self, record: &Record<'_>) -> Result<(), String> {
        if record.offset() < self.next {
            return Ok(());
        }
        self.next = record.offset() + 1;
        if record.is_tombstone() {
            return Ok(());
        }
        if let Some(event) = event::parse(record.value())? {
            self.batch.add(&event);
        }
        Ok(())
    }

    /// What is to be applied.
    pub fn call<'a>(&'a self, partition: i32, generation: &'a str) -> Call<'a> {
        Call { generation, partition, from: self.stored, next: self.next, batch: &self.batch }
    }

    /// Records up to `end` that the board has not, marks of transactions among them.
    pub fn lag(&self, end: i64) -> i64 {
        (end - self.stored.unwrap_or(self.next)).max(0)
    }
}

/// Where the lag of a partition is shown, in records.
pub fn lag_gauge(partition: i32) -> metrics::Gauge {
    metrics::gauge!("falaj_consume_redis_lag_records", "partition" => partition.to_string())
}

/// The offset to read from.
fn start(topic: &str, partition: i32, stored: Option<i64>, place: Place) -> i64 {
    match stored {
        None => info!(topic, partition, from = place.needed, "building the board from the window's events"),
        Some(stored) if stored < place.first && place.needed == place.first => warn!(
            topic,
            partition,
            stored,
            first = place.first,
            "Kafka's retention has removed records of the window before they were counted: the board lacks them until \
             they have left the window; raise retention.ms of the topic"
        ),
        Some(_) => {}
    }
    stored.map_or(place.needed, |stored| stored.max(place.needed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_starts_where_redis_stands_but_never_before_what_the_window_needs() {
        let place = Place { first: 10, end: 100, needed: 40 };
        let start = |stored, place| Part::at("t", 0, stored, place).next;
        assert_eq!(start(None, place), 40);
        assert_eq!(start(Some(70), place), 70);
        assert_eq!(start(Some(20), place), 40);
        assert_eq!(start(Some(5), Place { needed: 10, ..place }), 10);
    }

    #[test]
    fn the_lag_is_what_redis_lacks_whatever_was_read() {
        let mut part = Part::at("t", 0, Some(70), Place { first: 10, end: 100, needed: 40 });
        part.next = 90;
        assert_eq!((part.lag(100), part.lag(60)), (30, 0));
    }
}
