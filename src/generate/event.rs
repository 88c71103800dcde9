//! One row of `engagement_events`, made from what a session's user does.

use std::fmt::Write as _;

use rand::Rng;
use rand::rngs::StdRng;
use uuid::Uuid;

use super::catalog::Catalog;
use super::hash;
use super::sessions::Session;

/// One row of `engagement_events`, without the id that Postgres gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Engagement {
    /// `None` in two of a hundred.
    pub content_id: Option<Uuid>,
    /// `None` for those who are not logged in.
    pub user_id: Option<Uuid>,
    /// `play`, `pause`, `finish`, `click`; rarely `None`.
    pub event_type: Option<&'static str>,
    /// Microseconds after the start of the load, by the client's clock: late, days late, or in the future.
    pub at: i64,
    /// `None` for clicks and for a quarter of the others; rarely 0 or negative.
    pub duration_ms: Option<i32>,
    /// The name as the client sends it.
    pub device: Option<&'static str>,
    /// JSON with nested and non-ASCII values.
    pub raw_payload: Option<String>,
}

const SECOND: f64 = 1e6;

/// The devices. Two clients write theirs almost alike: the second web-safari has U+2011, a non-breaking hyphen.
pub const DEVICES: [&str; 6] = ["ios", "android", "web-safari", "web\u{2011}safari", "web-chrome", "desktop"];

/// Chooses a device, by its index.
pub fn device(rng: &mut StdRng) -> u8 {
    match rng.random_range(0..100) {
        0..38 => 0,
        38..66 => 1,
        66..76 => 2,
        76..80 => 3,
        80..93 => 4,
        _ => 5,
    }
}

/// What a session's user does at `now` (microseconds after the start).
pub fn engagement(seed: u64, session: &Session, catalog: &Catalog, now: i64, rng: &mut StdRng) -> Engagement {
    let event_type = event_type(rng);
    let subject = session.subject.and_then(|index| catalog.subject(index));
    let known = keep(rng, 0.98, || subject).flatten();
    Engagement {
        content_id: known.map(|s| s.id),
        user_id: keep(rng, 0.97, || hash::uuid(seed, hash::USER, session.user.into())),
        event_type,
        at: client_clock(now, rng),
        duration_ms: duration_ms(event_type, subject.and_then(|s| s.length_seconds), rng),
        device: keep(rng, 0.98, || DEVICES[usize::from(session.device)]),
        raw_payload: if rng.random_bool(0.7) { Some(payload(session, rng)) } else { None },
    }
}

fn keep<T>(rng: &mut StdRng, share: f64, value: impl FnOnce() -> T) -> Option<T> {
    rng.random_bool(share).then(value)
}

fn event_type(rng: &mut StdRng) -> Option<&'static str> {
    match rng.random_range(0..1000) {
        0..5 => None,
        5..453 => Some("play"),
        453..702 => Some("pause"),
        702..901 => Some("click"),
        _ => Some("finish"),
    }
}

/// Nothing bounds a duration in the table: a few are 0, below a second, or negative, as broken clients send them.
fn duration_ms(event_type: Option<&str>, length_seconds: Option<i32>, rng: &mut StdRng) -> Option<i32> {
    if event_type == Some("click") || rng.random_bool(0.25) {
        return None;
    }
    let whole = f64::from(length_seconds.filter(|&s| s > 0).unwrap_or(600)) * 1000.0;
    let share = match event_type {
        Some("finish") => rng.random_range(0.9..1.05),
        _ => rng.random::<f64>().powi(2),
    };
    Some(match rng.random_range(0..1000) {
        0..3 => 0,
        3..5 => -rng.random_range(1..60_000),
        5..10 => rng.random_range(1..1000),
        _ => (whole * share).min(f64::from(i32::MAX)) as i32,
    })
}

/// Most events take a moment; some wait in the client for up to an hour, a few for days, and a few clocks are ahead.
fn client_clock(now: i64, rng: &mut StdRng) -> i64 {
    let late_seconds = match rng.random_range(0..1000) {
        0..860 => rng.random::<f64>() * 1.5,
        860..980 => (rng.random::<f64>() * 3600_f64.ln()).exp(),
        980..990 => rng.random_range(3600.0..86_400.0),
        990..995 => rng.random_range(86_400.0..6.0 * 86_400.0),
        995..998 => -rng.random_range(0.0..60.0),
        _ => -rng.random_range(61.0..86_400.0),
    };
    now - (late_seconds * SECOND) as i64
}

const CITIES: [&str; 8] = ["الرياض", "جدة", "دبي", "القاهرة", "München", "São Paulo", "東京", "O'Fallon \\\"north\\\""];

fn payload(session: &Session, rng: &mut StdRng) -> String {
    let mut json = String::with_capacity(128);
    let (version, city) = (rng.random_range(10..40), CITIES[rng.random_range(0..CITIES.len())]);
    let volume = rng.random_range(0..100);
    let written = match rng.random_range(0..10) {
        0 => {
            write!(json, r#"{{"seq":{},"tags":[],"geo":null,"note":"line\nbreak \u0641\u0644\u062c 🎧"}}"#, session.seq)
        }
        1..4 => write!(json, r#"{{"seq":{},"app":"5.{version}","retry":false}}"#, session.seq),
        _ => write!(
            json,
            r#"{{"seq":{},"app":{{"version":"5.{version}","volume":0.{volume:02}}},"geo":{{"city":"{city}"}},"tags":["صوت","ü"]}}"#,
            session.seq
        ),
    };
    debug_assert!(written.is_ok(), "writing to a string does not fail");
    json
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn the_mix_is_as_stated() {
        let mut rng = StdRng::seed_from_u64(5);
        let session = Session { user: 1, seq: 2, subject: None, device: 0 };
        let catalog = Catalog::new(Vec::new(), &mut rng);
        let rows: Vec<Engagement> = (0..100_000).map(|_| engagement(5, &session, &catalog, 0, &mut rng)).collect();
        let share =
            |f: &dyn Fn(&Engagement) -> bool| (rows.iter().filter(|r| f(r)).count() as f64 / 1000.0).round() as u32;
        let of = |kind: &'static str| share(&move |r| r.event_type == Some(kind));
        assert_eq!([of("play"), of("pause"), of("click"), of("finish")], [45, 25, 20, 10]);
        assert!(rows.iter().all(|r| r.event_type != Some("click") || r.duration_ms.is_none()));
        let null = share(&|r| r.event_type == Some("play") && r.duration_ms.is_none()) * 100 / of("play");
        assert!((20..=30).contains(&null), "{null} % of the plays have no duration");
        for some in [
            rows.iter().any(|r| r.at > 60_000_000),
            rows.iter().any(|r| r.at < -86_400_000_000),
            rows.iter().any(|r| r.duration_ms.is_some_and(|d| d < 0)),
            rows.iter().any(|r| r.user_id.is_none()),
            rows.iter().any(|r| r.device.is_none()),
        ] {
            assert!(some);
        }
    }

    #[test]
    fn payloads_are_json_and_the_two_safaris_differ() {
        let mut rng = StdRng::seed_from_u64(6);
        let session = Session { user: 1, seq: 2, subject: None, device: 0 };
        for _ in 0..1000 {
            let json = payload(&session, &mut rng);
            serde_json::from_str::<serde_json::Value>(&json).unwrap_or_else(|e| panic!("{json}: {e}"));
        }
        let devices: std::collections::BTreeSet<&str> =
            (0..1000).map(|_| DEVICES[usize::from(device(&mut rng))]).collect();
        assert!(devices.contains("web-safari") && devices.contains("web‑safari"));
        assert_eq!(devices.len(), 6);
    }
}
