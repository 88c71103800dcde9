//! The broker's JVM compiles its code while it works: the first readings into Kafka take twice the time of later ones, and
//! what many partitions or many tables need is compiled only when they come. And after a peer's JVM has ended, the memory that
//! it had has gone back to the machine's host: the next pages are slow until the same ones go round.

use std::future::Future;
use std::ops::Range;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::process::compiler_seconds;
use crate::reader::Run;
use crate::stack::Stack;

/// Numbers of the readings, in the names that they have in the servers; as many as there may be.
const NUMBERS: Range<usize> = 900..930;
/// A reading meanwhile the JVM's compilers worked less than this part of the time has found a warm broker.
const COMPILING: f64 = 0.1;
/// So many in a row are enough …
const ENOUGH: usize = 2;
/// … but memory takes longer: without it, readings right after the peers were a seventh slower than the others.
const LEAST: usize = 6;

/// Readings that are not counted, until the broker has compiled what they need.
pub async fn up<F: Future<Output = Result<Run>>>(stack: &Stack, read: impl Fn(usize) -> F) -> Result<()> {
    let compiled = || compiler_seconds(stack.servers.kafka).context("the broker is gone");
    let mut warm = 0;
    for number in NUMBERS {
        let (began, before) = (Instant::now(), compiled()?);
        read(number).await.context("warming up Kafka")?;
        let share = (compiled()? - before) / began.elapsed().as_secs_f64();
        warm = if share < COMPILING { warm + 1 } else { 0 };
        let readings = number - NUMBERS.start + 1;
        if warm >= ENOUGH && readings >= LEAST {
            eprintln!("bench     Kafka is warm after {readings} readings");
            return Ok(());
        }
    }
    eprintln!("bench     Kafka's JVM still compiles after {} readings", NUMBERS.len());
    Ok(())
}
