//! The board as it is read and shown: `board`, `board --json`, /api/v1/board, and the report of `consume`.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;
use tracing::warn;

use super::batch::{WINDOW_BUCKETS, WINDOW_SECONDS, bucket_of};
use super::latency::{Latency, Report};
use super::redis::{ContentRow, DeviceRow, Store, nullable};
use crate::cli::Board;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::world::{World, print, print_on, redraw};

/// How often `consume` reports.
const REPORT_EVERY: Duration = Duration::from_secs(5);
/// How often `board --follow` reads.
const FOLLOW_EVERY: Duration = Duration::from_secs(1);
/// Contents and devices in a report.
const REPORT_TOP: usize = 10;
/// Longer titles and device names are cut in the table.
const MAX_TEXT: usize = 60;
/// How long a board is shown to others who ask for it.
const HELD: Duration = Duration::from_millis(200);

/// The last ten minutes at one moment. Serializes to the shape of `board --json`.
#[derive(Clone, Debug, Serialize)]
pub struct BoardView {
    /// The moment of reading, RFC 3339.
    pub as_of: String,
    /// Length of the window.
    pub window_seconds: i64,
    /// Contents by engagement seconds, then events, then id.
    pub top: Vec<Content>,
    /// Devices by events, then bytes; NULL last.
    pub devices: Vec<Device>,
    /// Events committed within the window that were too old at their commit.
    pub late_dropped: u64,
    /// Events committed within the window that lay too far ahead of their commit.
    pub future_dropped: u64,
}

/// One line of the ranking.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Content {
    /// From 1.
    pub rank: usize,
    /// Id of the content.
    pub content_id: String,
    /// Title as of the newest event.
    pub title: Option<String>,
    /// Kind as of the newest event.
    pub content_type: Option<String>,
    /// Sum over the window.
    pub engagement_seconds: Thousandths,
    /// Number of events.
    pub events: u64,
    /// Distinct users, by HyperLogLog (standard error 0.81 %).
    pub users: u64,
}

/// A device in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Its name, bytes as they came; NULL is a device of its own.
    pub device: Option<String>,
    /// Number of events.
    pub events: u64,
    /// Time of the latest event, RFC 3339.
    pub last_seen: String,
}

/// A sum in thousandths, written as an exact decimal number with three digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thousandths(pub i64);

impl std::fmt::Display for Thousandths {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sign = if self.0 < 0 { "-" } else { "" };
        let n = self.0.unsigned_abs();
        f.pad(&format!("{sign}{}.{:03}", n / 1000, n % 1000))
    }
}

impl Serialize for Thousandths {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        RawValue::from_string(self.to_string()).map_err(serde::ser::Error::custom)?.serialize(s)
    }
}

/// Prints the board once, or again and again.
///
/// # Errors
/// Redis unreachable for 30 s at the start, or refusing; stdout that cannot be written. Where nobody reads it any more, it ends.
pub async fn board(world: &World, args: &Board) -> Result<()> {
    let shown = follow(world, args).await;
    if args.follow { world.ended(shown) } else { shown }
}

async fn follow(world: &World, args: &Board) -> Result<()> {
    let store = Store::new(&world.config)?;
    let in_place = args.follow && !args.json;
    let mut view = world.at_start("redis", || read(&store, args.top)).await?;
    loop {
        let text = if args.json { json(&view)? + "\n" } else { table(&view, 0) };
        // A followed board stays in its place on a terminal.
        let write = move || if in_place { redraw(&text) } else { print_on(text) };
        if !world.show(write).await? || !args.follow || world.pause(FOLLOW_EVERY).await.is_err() {
            return Ok(());
        }
        view = world.for_ever("redis", || read(&store, args.top)).await?;
    }
}

/// Reads the board as of now with the best `top` contents.
///
/// # Errors
/// [`Error::Unreachable`] or [`Error::Refused`]; no retries.
pub async fn read_board(config: &Config, top: usize) -> Result<BoardView> {
    read(&Store::new(config)?, top).await
}

/// A board that many ask for: over one connection, and not read more often than anybody could see.
#[derive(Default)]
pub struct SharedBoard {
    store: Option<Store>,
    /// Since when, with how many contents at most, and what was found.
    held: Option<(Instant, usize, Result<BoardView>)>,
}

impl SharedBoard {
    /// The board with the best `top` contents, at most a fifth of a second old.
    ///
    /// # Errors
    /// As [`read_board`].
    pub async fn read(&mut self, config: &Config, top: usize) -> Result<BoardView> {
        let is_fresh = |(at, most, _): &(Instant, usize, _)| at.elapsed() < HELD && *most >= top;
        let held = match self.held.take().filter(is_fresh) {
            Some(held) => held,
            None => {
                let store = match self.store.take() {
                    Some(store) => store,
                    None => Store::new(config)?,
                };
                let found = read(self.store.insert(store), top).await;
                // Who has waited for an answer that never came need not wait for the next one.
                (Instant::now(), top, found)
            }
        };
        let mut found = self.held.insert(held).2.clone();
        if let Ok(view) = &mut found {
            view.top.truncate(top);
        }
        found
    }
}

async fn read(store: &Store, top: usize) -> Result<BoardView> {
    let as_of = Timestamp::now();
    let last = bucket_of(as_of.as_microsecond());
    let (contents, devices, late_dropped, future_dropped) = store.read(last - WINDOW_BUCKETS + 1, last, top).await?;
    Ok(BoardView {
        as_of: rfc3339(as_of),
        window_seconds: WINDOW_SECONDS,
        top: contents.into_iter().enumerate().map(|(i, row)| content(i + 1, row)).collect(),
        devices: order(devices)?,
        late_dropped,
        future_dropped,
    })
}

fn content(rank: usize, (content_id, millis, events, users, title, kind): ContentRow) -> Content {
    Content {
        rank,
        content_id,
        title: nullable(title),
        content_type: nullable(kind),
        engagement_seconds: Thousandths(millis),
        events,
        users,
    }
}

fn order(rows: Vec<DeviceRow>) -> Result<Vec<Device>> {
    let mut devices = rows
        .into_iter()
        .map(|(name, events, last)| {
            let last = Timestamp::from_microsecond(last).map_err(|e| Error::fatal("reading the board's devices", e))?;
            Ok(Device { device: nullable(name), events, last_seen: rfc3339(last) })
        })
        .collect::<Result<Vec<_>>>()?;
    devices.sort_by(|a, b| {
        let by_name = || (a.device.is_none(), &a.device).cmp(&(b.device.is_none(), &b.device));
        b.events.cmp(&a.events).then_with(by_name)
    });
    Ok(devices)
}

fn rfc3339(time: Timestamp) -> String {
    format!("{time:.6}")
}

/// The head of the board for people: its best contents, and the devices with the most events.
pub(crate) fn head(mut view: BoardView) -> String {
    let more_devices = shorten(&mut view);
    table(&view, more_devices)
}

/// Reports every few seconds what `consume` applied, for ever.
pub async fn report(store: &Store, latency: &Latency) -> Infallible {
    loop {
        tokio::time::sleep(REPORT_EVERY).await;
        report_once(store, latency).await;
    }
}

/// Prints the heads of board and devices, and the latency: a table on a terminal, else one JSON line.
pub async fn report_once(store: &Store, latency: &Latency) {
    #[derive(Serialize)]
    struct Line<'a> {
        #[serde(flatten)]
        report: &'a Report,
        board: &'a BoardView,
    }
    let printed = async {
        let mut view = read(store, REPORT_TOP).await?;
        let more_devices = shorten(&mut view);
        let report = latency.take();
        if std::io::stdout().is_terminal() {
            return print(&format!("{}{}\n", table(&view, more_devices), report_text(&report)));
        }
        print(&(json(&Line { report: &report, board: &view })? + "\n"))
    };
    // A report that cannot be made is no reason to stop what it reports on.
    if let Err(e) = printed.await {
        warn!(error = %e, "no report");
    }
}

/// Leaves the devices that a report shows, and says how many were left out: clients name their devices as they like, and
/// what comes every five seconds must not grow with that.
fn shorten(view: &mut BoardView) -> usize {
    let more = view.devices.len().saturating_sub(REPORT_TOP);
    view.devices.truncate(REPORT_TOP);
    more
}

fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::fatal("writing the board as JSON", e))
}

fn report_text(report: &Report) -> String {
    let mut text = format!("applied {} events", report.events);
    if let Some(l) = report.latency_ms {
        let _ = write!(
            text,
            "; commit → applied p50 {:.0} ms, p95 {:.0} ms, p99 {:.0} ms, max {:.0} ms",
            l.p50, l.p95, l.p99, l.max
        );
    }
    if report.malformed > 0 {
        let _ = write!(text, "; {} records were no events", report.malformed);
    }
    text + "\n"
}

/// Texts of unknown width and direction stand last in their line, where they cannot push a column.
fn table(view: &BoardView, more_devices: usize) -> String {
    let mut text = format!("last {} minutes, as of {}\n", WINDOW_SECONDS / 60, view.as_of);
    let _ = writeln!(text, "{:>4} {:>14} {:>9} {:>8}  {:<10}  title", "rank", "seconds", "events", "users", "type");
    for c in &view.top {
        let kind = plain(c.content_type.as_deref().unwrap_or("-"));
        let title = plain(c.title.as_deref().unwrap_or(&c.content_id));
        let Content { rank, engagement_seconds, events, users, .. } = c;
        let _ = writeln!(text, "{rank:>4} {engagement_seconds:>14} {events:>9} {users:>8}  {kind:<10}  {title}");
    }
    let _ = writeln!(text, "{:>9}  {:<15}  device", "events", "last seen");
    for d in &view.devices {
        let name = plain(d.device.as_deref().unwrap_or("(null)"));
        let time = d.last_seen.get(11..).unwrap_or(&d.last_seen);
        let _ = writeln!(text, "{:>9}  {time:<15}  {name}", d.events);
    }
    if more_devices > 0 {
        let _ = writeln!(text, "{:>9}  and {more_devices} more devices", "");
    }
    if view.late_dropped + view.future_dropped > 0 {
        let _ = writeln!(text, "left out: {} late, {} from the future", view.late_dropped, view.future_dropped);
    }
    text
}

/// What a terminal may get of a text that anyone may have written: no control characters, and not too much.
pub(crate) fn plain(text: &str) -> String {
    match text.char_indices().nth(MAX_TEXT) {
        Some((end, _)) => harmless(&text[..end]) + "…",
        None => harmless(text),
    }
}

/// The same of a text of any length.
pub(crate) fn harmless(text: &str) -> String {
    let mut plain = String::new();
    for c in text.chars() {
        match c {
            '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}' => plain.extend(c.escape_unicode()),
            c if c.is_control() => plain.extend(c.escape_default()),
            c => plain.push(c),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view() -> BoardView {
        let row = |id: &str, millis, title: &str| (id.to_owned(), millis, 2, 1, title.to_owned(), "=video".to_owned());
        BoardView {
            as_of: "2026-01-02T03:04:05.000000Z".into(),
            window_seconds: WINDOW_SECONDS,
            top: vec![content(1, row("a", 1_234_900, "=قناة الماء")), content(2, row("b", -900, ""))],
            devices: order(vec![
                (String::new(), 3, 0),
                ("=web-safari".into(), 3, 1),
                ("=web\u{2011}safari".into(), 3, 1),
                ("=ios".into(), 9, 1_500_000),
            ])
            .unwrap(),
            late_dropped: 1,
            future_dropped: 0,
        }
    }

    #[test]
    fn the_json_has_its_fixed_shape_and_exact_decimals() {
        assert_eq!(
            json(&view()).unwrap(),
            concat!(
                r#"{"as_of":"2026-01-02T03:04:05.000000Z","window_seconds":600,"top":["#,
                r#"{"rank":1,"content_id":"a","title":"قناة الماء","content_type":"video","engagement_seconds":1234.900,"events":2,"users":1},"#,
                r#"{"rank":2,"content_id":"b","title":null,"content_type":"video","engagement_seconds":-0.900,"events":2,"users":1}],"#,
                r#""devices":[{"device":"ios","events":9,"last_seen":"1970-01-01T00:00:01.500000Z"},"#,
                r#"{"device":"web-safari","events":3,"last_seen":"1970-01-01T00:00:00.000001Z"},"#,
                "{\"device\":\"web\u{2011}safari\",\"events\":3,\"last_seen\":\"1970-01-01T00:00:00.000001Z\"},",
                r#"{"device":null,"events":3,"last_seen":"1970-01-01T00:00:00.000000Z"}],"#,
                r#""late_dropped":1,"future_dropped":0}"#
            )
        );
    }

    #[test]
    fn the_table_keeps_its_columns_whatever_the_titles() {
        let text = table(&view(), 0);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[2], "   1       1234.900         2        1  video       قناة الماء");
        assert_eq!(lines[3], "   2         -0.900         2        1  video       b");
        assert_eq!(lines[8], "        3  00:00:00.000000Z  (null)");
        assert_eq!(lines[9], "left out: 1 late, 0 from the future");
    }

    #[test]
    fn a_report_shows_the_devices_with_the_most_events_and_how_many_more_there_are() {
        let rows = (0..25).map(|n| (format!("=device-{n:02}"), 100 - n, 0)).collect();
        let mut view = BoardView { devices: order(rows).unwrap(), ..view() };
        assert_eq!(shorten(&mut view), 15);
        let names: Vec<_> = view.devices.iter().filter_map(|d| d.device.clone()).collect();
        assert_eq!(names, (0..10).map(|n| format!("device-{n:02}")).collect::<Vec<_>>());
        assert!(table(&view, 15).contains("  device-09\n           and 15 more devices\n"), "{}", table(&view, 15));
        assert_eq!(shorten(&mut view), 0);
    }

    #[test]
    fn a_title_cannot_command_the_terminal() {
        assert_eq!(plain("a\u{1b}[2J\n\u{202e}b"), "a\\u{1b}[2J\\n\\u{202e}b");
        assert_eq!(plain(&"x".repeat(70)), "x".repeat(60) + "…");
    }
}
