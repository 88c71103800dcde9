//! The range that is asked for, against what is kept.

use std::time::Duration;

use tracing::warn;

use crate::cli;
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::playback::{self, Kept, Range};
use crate::source::conn::Conninfo;
use crate::source::slot;
use crate::world::World;

/// How long Postgres may take to say what the slot has; it is asked only for a message.
const PATIENCE: Duration = Duration::from_secs(3);

/// The range, both ends of which the archive holds.
///
/// # Errors
/// [`Error::Usage`] for a range that ends before it begins; [`Error::Refused`] for one that the archive does not hold.
pub(super) async fn resolve(world: &World, args: &cli::Replay) -> Result<Range> {
    if args.to.is_some_and(|to| to < args.from) {
        return Err(Error::Usage("replay: --to lies before --from".into()));
    }
    let kept = playback::kept(&world.config.archive.dir)?;
    match kept.as_ref().and_then(|kept| within(kept, args.from, args.to)) {
        Some(range) => {
            if kept.is_some_and(|kept| args.to == Some(kept.to)) {
                warn!("--to is where the archive ends: a transaction that commits exactly there is not in it yet");
            }
            Ok(range)
        }
        None => Err(refused(world, args, kept.as_ref()).await),
    }
}

/// The whole range or nothing: what is not there is never passed over in silence.
fn within(kept: &Kept, from: Lsn, to: Option<Lsn>) -> Option<Range> {
    let held = kept.from..=kept.to;
    let range = Range { from, to: to.unwrap_or(Lsn(kept.to.0.saturating_sub(1)).max(from)) };
    (held.contains(&from) && held.contains(&range.to)).then_some(range)
}

async fn refused(world: &World, args: &cli::Replay, kept: Option<&Kept>) -> Error {
    let dir = world.config.archive.dir.display();
    let asked = match args.to {
        Some(to) => format!("{} – {to}", args.from),
        None => args.from.to_string(),
    };
    let archive = match kept {
        Some(Kept { from, to, .. }) => format!("the archive {dir} holds commits from {from} to {to}"),
        None => format!("the archive {dir} holds nothing"),
    };
    let confirmed = tokio::time::timeout(PATIENCE, confirmed(world)).await.unwrap_or(None);
    let slot = match confirmed {
        Some(lsn) => format!("slot \"{}\" has them from {lsn} on", world.config.postgres.slot),
        None => format!("slot \"{}\" could not be asked, or is not there", world.config.postgres.slot),
    };
    let in_slot = confirmed.is_some_and(|lsn| lsn <= args.from);
    let fix = match kept {
        _ if in_slot => "falaj produce (it writes the range to the archive), then replay again".to_owned(),
        Some(Kept { from, to, .. }) => {
            format!("--from {} --to {to}, or falaj backfill for what is older", args.from.max(*from).min(*to))
        }
        None => "falaj produce with sink \"archive\", or falaj backfill for what is older".to_owned(),
    };
    Error::refused(
        "replay_range",
        format!("{asked} is asked for; {archive}; {slot}"),
        "a range that the archive holds",
        fix,
    )
}

/// What the slot has been acknowledged up to.
async fn confirmed(world: &World) -> Option<Lsn> {
    let config = &world.config.postgres;
    let client = Conninfo::parse(&config.url).ok()?.sql("falaj replay").await.ok()?;
    Some(slot::read(&client, &config.slot).await.ok()??.confirmed_flush_lsn)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lsn::SlotIdentity;

    #[test]
    fn a_range_is_held_whole_or_refused() {
        let slot = SlotIdentity { system_id: "7".into(), timeline: 1, slot: "s".into() };
        let kept = Kept { slot, from: Lsn(100), to: Lsn(200) };
        let range = |from, to| Some(Range { from: Lsn(from), to: Lsn(to) });
        assert_eq!(within(&kept, Lsn(100), Some(Lsn(200))), range(100, 200));
        assert_eq!(within(&kept, Lsn(150), None), range(150, 199));
        assert_eq!(within(&kept, Lsn(200), None), range(200, 200));
        for (from, to) in [(99, None), (201, None), (150, Some(Lsn(201))), (99, Some(Lsn(150)))] {
            assert_eq!(within(&kept, Lsn(from), to), None, "{from} {to:?}");
        }
    }
}
