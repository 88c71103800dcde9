//! The throughput as Markdown: one table a workload.

use std::fmt::{Result, Write as _};

use crate::bars::Pace;
use crate::load::RowBytes;
use crate::plan::{HUNDRED, Reader, Workload};
use crate::reader::Run;
use crate::speed::Speed;

const HEAD: &str = "| reader | rows/s, median (min–max) | ratio | streaming, s | whole process, s | CPU s: client | walsender | broker | peak RSS, MB | in the sink |
|---|--:|--:|--:|--:|--:|--:|--:|--:|---|";

impl Speed {
    /// All tables.
    pub fn write(&self, out: &mut String) -> Result {
        self.workloads.iter().try_for_each(|(workload, bytes)| self.write_workload(out, workload, *bytes))
    }

    fn write_workload(&self, out: &mut String, workload: &Workload, bytes: RowBytes) -> Result {
        let Workload { name, rows, rounds, readers, peers, .. } = workload;
        let RowBytes { text, binary } = bytes;
        write!(
            out,
            "\n### {name}: {rows} rows, {text:.0} B a row in text, {binary:.0} B in binary; {rounds} round(s)"
        )?;
        let others = if peers.is_empty() { String::new() } else { format!(", {} of the peers", rounds.div_ceil(2)) };
        writeln!(out, "{others}\n\n{HEAD}")?;
        for reader in readers.iter().chain(*peers) {
            self.write_reader(out, name, *reader)?;
        }
        if *name == HUNDRED && !peers.is_empty() && !peers.contains(&Reader::Debezium) {
            writeln!(out, "\nDebezium is left out of the quick version: one run of it takes a minute.")?;
        }
        Ok(())
    }

    fn write_reader(&self, out: &mut String, workload: &str, reader: Reader) -> Result {
        if self.of(workload, reader).next().is_some() {
            self.write_figures(out, workload, reader)?;
        }
        match self.why_absent(reader) {
            Some(why) => writeln!(out, "| {reader} | not measured: {why} |||||||||"),
            None => Ok(()),
        }
    }

    fn write_figures(&self, out: &mut String, workload: &str, reader: Reader) -> Result {
        let median = |figure: &dyn Fn(&Run) -> Option<f64>| self.median(workload, reader, figure);
        let number = |figure: &dyn Fn(&Run) -> Option<f64>| median(figure).map_or("–".into(), |n| format!("{n:.2}"));
        let rates = || self.of(workload, reader).map(|run| run.rows_per_second / 1000.0);
        let (min, max) = (rates().fold(f64::MAX, f64::min), rates().fold(0.0, f64::max));
        let rate = self.rate(workload, Pace::Of(reader)).unwrap_or_default() / 1000.0;
        let broker = |run: &Run| reader.feeds_kafka().then_some(run.cpu.broker);
        let cells = [
            format!("{rate:.0}k ({min:.0}–{max:.0})"),
            self.beside_baseline(workload, Pace::Of(reader)),
            number(&|run| run.streaming.map(|streaming| streaming.seconds)),
            number(&|run| Some(run.whole_seconds)),
            number(&|run| Some(run.cpu.client)),
            number(&|run| Some(run.cpu.walsender)),
            number(&broker),
            format!("{:.0}", self.of(workload, reader).map(|run| run.peak_rss).max().unwrap_or(0) as f64 / 1e6),
            self.in_the_sinks(workload, reader),
        ];
        writeln!(out, "| {reader} | {} |", cells.join(" | "))?;
        match self.rate(workload, Pace::WarmHalf(reader)) {
            Some(warm) => {
                let ratio = self.beside_baseline(workload, Pace::WarmHalf(reader));
                writeln!(out, "| – its later half | {:.0}k | {ratio} | | | | | | | |", warm / 1000.0)
            }
            None => Ok(()),
        }
    }

    fn beside_baseline(&self, workload: &str, pace: Pace) -> String {
        self.ratio(workload, pace, Pace::Of(Reader::Baseline)).map_or("–".into(), |ratio| format!("{ratio:.2}"))
    }

    fn in_the_sinks(&self, workload: &str, reader: Reader) -> String {
        let mut wrong = self.of(workload, reader).filter(|run| !run.is_exact()).flat_map(|run| run.sinks.values());
        match wrong.next() {
            _ if self.of(workload, reader).all(|run| run.sinks.is_empty()) => "–".into(),
            None => "every row once".into(),
            Some(sink) => format!("**{} events, {} rows**", sink.events, sink.distinct),
        }
    }
}
