//! What the demo shows while it runs.

use std::collections::VecDeque;
use std::fmt::Write;
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;
use tokio::time::{Instant, timeout};
use tokio_postgres::Client;

use super::stage::Stage;
use crate::archive;
use crate::consume::board::{BoardView, plain};
use crate::consume::read_board;
use crate::metrics::Reading;
use crate::mock_external::Mock;
use crate::source::slot;
use crate::status::text::bytes;

/// Rates and latencies are those of so many readings, which is seconds.
const WINDOW: usize = 10;
/// Contents and devices on the view.
const TOP: usize = 5;
const DEVICES: usize = 6;
/// How long a server may take to answer; the view goes on without it.
const PATIENCE: Duration = Duration::from_millis(800);
const VISIBLE: &str = "falaj_consume_redis_commit_to_applied_seconds";

/// The figures, taken once a second.
pub(super) struct Figures<'a> {
    stage: &'a Stage,
    metrics: PrometheusHandle,
    mock: Mock,
    began: Instant,
    readings: VecDeque<(Instant, Reading)>,
    client: Option<Client>,
    slot: Option<String>,
    board: Option<BoardView>,
    batches: usize,
    first_visible: Option<f64>,
    told: bool,
}

impl<'a> Figures<'a> {
    pub(super) fn new(stage: &'a Stage, metrics: PrometheusHandle, mock: Mock, began: Instant) -> Self {
        let readings = VecDeque::from([(Instant::now(), Reading::default())]);
        let (client, slot, board) = (None, None, None);
        Self {
            stage,
            metrics,
            mock,
            began,
            readings,
            client,
            slot,
            board,
            batches: 0,
            first_visible: None,
            told: false,
        }
    }

    /// Asks everything anew. What does not answer in time is shown as it was.
    pub(super) async fn take(&mut self) {
        self.readings.push_back((Instant::now(), Reading::take(&self.metrics)));
        if self.readings.len() > WINDOW {
            self.readings.pop_front();
        }
        let stage = self.stage;
        let (board, slot) =
            tokio::join!(timeout(PATIENCE, read_board(&stage.world.config, TOP)), timeout(PATIENCE, self.slot()));
        if let Ok(Ok(board)) = board {
            self.board = Some(board);
        }
        match slot {
            Ok(Some(slot)) => self.slot = Some(slot),
            _ => self.client = None,
        }
        self.batches = archive::list(&stage.world.config.archive.dir).map_or(self.batches, |batches| batches.len());
        if self.first_visible.is_none() && self.board.as_ref().is_some_and(|board| !board.devices.is_empty()) {
            self.first_visible = Some(self.began.elapsed().as_secs_f64());
        }
    }

    /// Once, when the first event has become visible: the seconds since the start.
    pub(super) fn first_visible(&mut self) -> Option<f64> {
        let seconds = self.first_visible.filter(|_| !self.told)?;
        self.told = true;
        Some(seconds)
    }

    async fn slot(&mut self) -> Option<String> {
        if self.client.is_none() {
            self.client = self.stage.client().await.ok();
        }
        let client = self.client.as_ref()?;
        let found = slot::read(client, &self.stage.world.config.postgres.slot).await.ok()??;
        let server = slot::server_lsn(client).await.ok()?;
        let behind = bytes(server.0.saturating_sub(found.confirmed_flush_lsn.0));
        Some(format!("slot acknowledged to {}, {behind} behind the server's {server}", found.confirmed_flush_lsn))
    }

    fn now(&self) -> (&Reading, &Reading, f64) {
        let ((then, before), (at, now)) = (&self.readings[0], &self.readings[self.readings.len() - 1]);
        (before, now, at.duration_since(*then).as_secs_f64())
    }

    fn rate(&self) -> f64 {
        let (before, now, seconds) = self.now();
        let rows = "falaj_generate_rows_total";
        if seconds > 0.0 { (now.total(rows) - before.total(rows)) / seconds } else { 0.0 }
    }

    fn latency(&self, name: &str) -> String {
        let (before, now, _) = self.now();
        let quantile = |q| now.quantile_since(before, name, q).map(|seconds| seconds * 1000.0);
        match (quantile(0.5), quantile(0.99)) {
            (Some(p50), Some(p99)) => format!("p50 {p50:.0} ms, p99 {p99:.0} ms"),
            _ => "-".into(),
        }
    }

    fn lag(&self, sink: &str) -> String {
        let (_, now, _) = self.now();
        let lag = |name| now.labelled(name, "sink", sink);
        match (lag("falaj_produce_lag_seconds"), lag("falaj_produce_lag_bytes")) {
            (Some(seconds), Some(n)) => format!("{seconds:.1} s, {} behind", bytes(n as u64)),
            _ => "starting".into(),
        }
    }

    fn archive(&self) -> String {
        let (_, now, _) = self.now();
        let written = bytes(now.total("falaj_produce_archive_bytes_total") as u64);
        format!("{} batches, {written}", self.batches)
    }

    fn upload(&self) -> String {
        if self.stage.world.config.bigquery.project.is_none() {
            return "left out".into();
        }
        let (_, now, _) = self.now();
        let (jobs, rows) = (now.total("falaj_upload_jobs_total"), now.total("falaj_upload_rows_total"));
        format!("{jobs} load jobs, {rows} rows")
    }

    fn outside(&self) -> String {
        let (_, now, _) = self.now();
        let delivered = now.total("falaj_external_delivered_total");
        let retried = now.total("falaj_external_retries_total");
        format!("{delivered} delivered, {retried} retried, {} ids received", self.mock.received().counts().unique)
    }

    fn rows(&self) -> f64 {
        self.now().1.total("falaj_generate_rows_total")
    }

    /// One line, for a log.
    pub(super) fn line(&self) -> String {
        format!(
            "{:>5.0} s  {:.0} events/s, {} rows | kafka {} | redis {} | parquet {}; {} | bigquery {} | http {}",
            self.began.elapsed().as_secs_f64(),
            self.rate(),
            self.rows(),
            self.lag("kafka"),
            self.latency(VISIBLE),
            self.archive(),
            self.lag("archive"),
            self.upload(),
            self.outside(),
        )
    }

    /// The view of a terminal.
    pub(super) fn view(&self) -> String {
        let seconds = self.began.elapsed().as_secs();
        let mut text = String::from("\n");
        let mut line = |line: std::fmt::Arguments<'_>| {
            let _ = writeln!(text, "{line}");
        };
        let time = format!("{}:{:02}", seconds / 60, seconds % 60);
        line(format_args!("\x1b[1mfalaj demo\x1b[0m  {time}    Ctrl-C drains, counts and ends"));
        line(format_args!(""));
        line(format_args!(
            "Postgres   {:.0} events/s, {} rows; {}",
            self.rate(),
            self.rows(),
            self.slot.as_deref().unwrap_or("-")
        ));
        line(format_args!("Kafka      {}", self.lag("kafka")));
        line(format_args!("Redis      commit → visible {}", self.latency(VISIBLE)));
        line(format_args!("Parquet    {}; {}", self.archive(), self.lag("archive")));
        line(format_args!("BigQuery   {}", self.upload()));
        line(format_args!(
            "outside    {}; commit → delivered {}",
            self.outside(),
            self.latency("falaj_external_latency_seconds")
        ));
        line(format_args!(""));
        match &self.board {
            Some(board) => text.push_str(&ranking(board)),
            None => line(format_args!("the board is empty yet")),
        }
        text
    }
}

fn ranking(board: &BoardView) -> String {
    let mut text = String::from("last 10 minutes\n        seconds    events   users  title\n");
    for c in &board.top {
        let title = plain(c.title.as_deref().unwrap_or(&c.content_id));
        let _ = writeln!(text, "{:>15} {:>9} {:>7}  {title}", c.engagement_seconds, c.events, c.users);
    }
    for _ in board.top.len()..TOP {
        text.push('\n');
    }
    let device =
        |d: &crate::consume::board::Device| format!("{} {}", plain(d.device.as_deref().unwrap_or("(null)")), d.events);
    let devices: Vec<_> = board.devices.iter().take(DEVICES).map(device).collect();
    let _ = writeln!(text, "devices  {}", devices.join(" · "));
    let _ = writeln!(text, "left out: {} late, {} from the future", board.late_dropped, board.future_dropped);
    text
}
