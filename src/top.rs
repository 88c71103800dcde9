//! `falaj top`: the status again and again, with rates and the head of the board. It asks the servers, no role of falaj.

use std::time::Duration;

use tokio::time::Instant;

use crate::consume::SharedBoard;
use crate::consume::board::head;
use crate::error::Result;
use crate::lsn::Lsn;
use crate::status::text::{bytes, one_line, text};
use crate::status::{self, Part, Reader, ReaderAt, Status};
use crate::world::{World, redraw};

/// Between two looks at the board.
const EVERY: Duration = Duration::from_secs(1);
/// Between two looks at everything: each of them connects to every server anew.
const STATUS_EVERY: Duration = Duration::from_secs(5);
/// Contents on the view.
const TOP: usize = 10;

/// Shows the view until the shutdown, or until nobody reads it any more. A server that is away is part of the view.
///
/// # Errors
/// stdout that cannot be written.
pub async fn run(world: &World) -> Result<()> {
    tokio::select! {
        ended = show(world) => ended,
        () = world.stop.cancelled() => Ok(()),
    }
}

async fn show(world: &World) -> Result<()> {
    let mut board = SharedBoard::default();
    let (mut parts, mut rates) = look(world, None).await;
    loop {
        if parts.0.elapsed() >= STATUS_EVERY {
            (parts, rates) = look(world, Some(parts)).await;
        }
        let mut view = format!("{}{rates}\n", text(&parts.1));
        if parts.1.board.is_some() {
            view += &match board.read(&world.config, TOP).await {
                Ok(ranking) => head(ranking),
                Err(e) => format!("ranking not known: {}\n", one_line(&e.to_string())),
            };
        }
        if !world.show(move || redraw(&view)).await? {
            return Ok(());
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// The status, when it was taken, and the line of rates since the one before.
async fn look(world: &World, before: Option<(Instant, Status)>) -> ((Instant, Status), String) {
    let status = status::gather(world).await;
    let now = Instant::now();
    let since = before.map(|(then, before)| rates(&before, &status, now.duration_since(then)));
    let rates = since.map(|rates| format!("{:<10} {rates}\n", "rates")).unwrap_or_default();
    ((now, status), rates)
}

/// How fast each part has moved between two looks; a part that is not known in both is left out.
fn rates(before: &Status, now: &Status, time: Duration) -> String {
    let seconds = time.as_secs_f64();
    let per_second = |moved: u64| (moved as f64 / seconds) as u64;
    let wal = |from: Lsn, to: Lsn| format!("{}/s of WAL", bytes(per_second(to.0.saturating_sub(from.0))));
    let mut told = Vec::new();
    if let (Part::Is(a), Part::Is(b)) = (&before.slot, &now.slot) {
        told.push(format!("server {}", wal(a.server_lsn, b.server_lsn)));
    }
    for (a, b) in before.sinks.iter().zip(&now.sinks) {
        if let (Part::Is(from), Part::Is(to)) = (&a.at, &b.at)
            && let (Some(from), Some(to)) = (from.position, to.position)
        {
            told.push(format!("{} {}", b.name, wal(from, to)));
        }
    }
    for (name, a, b) in [("board", &before.board, &now.board), ("external", &before.external, &now.external)] {
        if let (Some(Part::Is(from)), Some(Part::Is(to))) = (a, b) {
            told.push(format!("{name} {} offsets/s", per_second(passed(from, to))));
        }
    }
    if told.is_empty() { "not known".into() } else { told.join("; ") }
}

/// Offsets that a reader has passed where it had a place before. Those of transactions' marks count: records alone are not told
/// by Kafka.
fn passed(from: &Reader, to: &Reader) -> u64 {
    let moved = |(a, b): (&ReaderAt, &ReaderAt)| u64::try_from(b.offset? - a.offset?).ok();
    from.partitions.iter().zip(&to.partitions).filter_map(moved).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{Archive, Sink, SinkAt, Slot};

    fn status(lsn: u64, offset: i64, board: Option<&str>) -> Status {
        let at = |partition, offset| ReaderAt { partition, offset, end: 9000, lag_records: 0 };
        let reader = Reader {
            topic: "t".into(),
            partitions: vec![at(0, Some(offset)), at(1, (offset > 1000).then_some(7000))],
            lag_records: 0,
        };
        Status {
            as_of: "now".into(),
            pipeline: "p".into(),
            slot: Part::Is(Slot {
                name: "s".into(),
                server_lsn: Lsn(lsn),
                confirmed_flush_lsn: Lsn(0),
                active_pid: None,
                wal_status: None,
                lag_bytes: 0,
                retained_wal_bytes: None,
            }),
            sinks: vec![
                Sink {
                    name: "kafka",
                    at: Part::Is(SinkAt { position: Some(Lsn(lsn / 2)), partial: None, lag_bytes: None }),
                },
                Sink { name: "archive", at: Part::Is(SinkAt { position: None, partial: None, lag_bytes: None }) },
            ],
            archive: Part::Is(Archive { dir: "a".into(), batches: 0, last: None }),
            backfill: Part::Is(Vec::new()),
            board: Some(board.map_or(Part::Is(reader.clone()), |error| Part::Unknown { error: error.into() })),
            external: Some(Part::Is(reader)),
            upload: None,
        }
    }

    #[test]
    fn rates_are_of_what_is_known_in_both_looks() {
        let (before, after) = (status(1_000_000, 1000, None), status(5_000_000, 3000, None));
        let both = rates(&before, &after, Duration::from_secs(2));
        assert_eq!(
            both,
            "server 2.0 MB/s of WAL; kafka 1.0 MB/s of WAL; board 1000 offsets/s; external 1000 offsets/s"
        );
        let away = rates(&before, &status(1_000_000, 1000, Some("away")), Duration::from_secs(2));
        assert_eq!(away, "server 0 B/s of WAL; kafka 0 B/s of WAL; external 0 offsets/s");
    }
}
