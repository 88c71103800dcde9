//! What has to hold: a table. A new bar is a new line here.

use crate::plan::{HUNDRED, MANY, ONE, Reader};

/// A reader's median rate, divided by another's in the same run.
#[derive(Clone, Copy, Debug)]
pub struct Bar {
    /// Name of the workload.
    pub workload: &'static str,
    /// Whose rate.
    pub reader: Reader,
    /// The least that the ratio may be.
    pub least: f64,
    /// What it is divided by.
    pub to: Pace,
}

/// A rate that another is compared with.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// Of all rows.
    Of(Reader),
    /// Of the later half of the rows.
    WarmHalf(Reader),
}

const BASELINE: Pace = Pace::Of(Reader::Baseline);

const fn bar(workload: &'static str, reader: Reader, least: f64, to: Pace) -> Bar {
    Bar { workload, reader, least, to }
}

/// All ratios. That every sink of falaj holds every row once is asked of each run besides.
pub const BARS: [Bar; 13] = [
    bar(HUNDRED, Reader::Discard, 1.7, BASELINE),
    bar(ONE, Reader::Discard, 1.8, BASELINE),
    bar(MANY, Reader::Discard, 1.4, BASELINE),
    bar(HUNDRED, Reader::Kafka, 1.2, BASELINE),
    bar(ONE, Reader::Kafka, 1.8, BASELINE),
    bar(MANY, Reader::Kafka, 1.1, BASELINE),
    bar(HUNDRED, Reader::Archive, 1.4, BASELINE),
    bar(HUNDRED, Reader::Both, 1.0, BASELINE),
    bar(HUNDRED, Reader::Kafka, 1.25, Pace::Of(Reader::MqBridgeKafka)),
    bar(HUNDRED, Reader::Archive, 3.0, Pace::Of(Reader::MqBridgeParquet)),
    bar(HUNDRED, Reader::Kafka, 4.0, Pace::Of(Reader::Debezium)),
    bar(HUNDRED, Reader::Kafka, 2.4, Pace::WarmHalf(Reader::Debezium)),
    bar(HUNDRED, Reader::Kafka, 8.0, Pace::Of(Reader::DebeziumExactlyOnce)),
];

/// The most that `produce` may hold resident in any run of any workload, in MB (10⁶ bytes).
pub const PRODUCE_RSS_MB: f64 = 64.0;

impl Pace {
    /// Whose rate it is.
    pub fn reader(self) -> Reader {
        match self {
            Self::Of(reader) | Self::WarmHalf(reader) => reader,
        }
    }
}
