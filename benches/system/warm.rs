//! The broker's JVM compiles its code while it works: the first readings into Kafka take twice the time of later ones.

use std::future::Future;
use std::ops::Range;

use anyhow::{Context, Result};

use crate::reader::Run;

/// Numbers of the readings, in the names that they have in the servers; as many as there may be.
const NUMBERS: Range<usize> = 900..910;
/// A reading is faster when its rate is this many times the other's.
const FASTER: f64 = 1.03;
/// So many in a row that are no faster are enough.
const ENOUGH: usize = 2;

/// Readings that are not counted, until the broker has got no faster for a while.
pub async fn up<F: Future<Output = Result<Run>>>(read: impl Fn(usize) -> F) -> Result<()> {
    let (mut fastest, mut no_faster) = (0.0, 0);
    for number in NUMBERS {
        let rate = read(number).await.context("warming up Kafka")?.rows_per_second;
        no_faster = if rate > FASTER * fastest { 0 } else { no_faster + 1 };
        fastest = rate.max(fastest);
        if no_faster == ENOUGH {
            break;
        }
    }
    Ok(())
}
