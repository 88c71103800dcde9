//! Events as they stand in Kafka, and a second, plain way to count them.

use std::collections::{BTreeMap, BTreeSet};

use falaj::lsn::{Lsn, Position};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

const MICROS: i64 = 1_000_000;

#[derive(Clone, Debug)]
pub struct Ev {
    pub id: Position,
    pub op: &'static str,
    pub commit_ts: i64,
    pub event_ts: i64,
    pub content: Option<String>,
    pub user: Option<String>,
    pub device: Option<String>,
    pub title: Option<String>,
    pub millis: Option<i64>,
}

pub fn now() -> i64 {
    jiff::Timestamp::now().as_microsecond()
}

fn text(micros: i64) -> String {
    format!("{:.6}", jiff::Timestamp::from_microsecond(micros).unwrap())
}

impl Ev {
    /// An event of content `a` that is committed and happens now.
    pub fn now(number: u64) -> Self {
        let now = now();
        Self {
            id: Position { commit_lsn: Lsn(0x0100_0000 + number), ordinal: 0 },
            op: "c",
            commit_ts: now,
            event_ts: now,
            content: Some("a".into()),
            user: Some("user-1".into()),
            device: Some("ios".into()),
            title: Some("Title".into()),
            millis: Some(1000),
        }
    }

    pub fn key(&self) -> String {
        self.content.clone().unwrap_or_else(|| self.id.event_id())
    }

    pub fn json(&self) -> String {
        let seconds = self.millis.map_or("null".into(), |m| {
            format!("{}{}.{:03}", if m < 0 { "-" } else { "" }, m.abs() / 1000, m.abs() % 1000)
        });
        let head = json!({
            "id": self.id.ordinal, "content_id": self.content, "user_id": self.user, "event_type": "play",
            "event_ts": text(self.event_ts), "duration_ms": self.millis, "device": self.device, "raw_payload": null,
            "title": self.title, "content_type": "video", "length_seconds": 60, "engagement_pct": null,
            "_id": self.id.event_id(), "_op": self.op, "_table": "engagement_events",
            "_lsn": self.id.commit_lsn.to_string(), "_commit_ts": text(self.commit_ts),
        })
        .to_string();
        format!("{},\"engagement_seconds\":{seconds}}}", head.strip_suffix('}').unwrap())
    }
}

/// Events of all kinds, committed now, by their number.
pub struct Load {
    rng: StdRng,
    number: u64,
}

impl Load {
    pub fn new(seed: u64) -> Self {
        println!("seed {seed}");
        Self { rng: StdRng::seed_from_u64(seed), number: 0 }
    }

    pub fn events(&mut self, count: usize) -> Vec<Ev> {
        (0..count).map(|_| self.event()).collect()
    }

    fn event(&mut self) -> Ev {
        self.number += 1;
        let rng = &mut self.rng;
        // Skewed, so that some contents are hot and the last ones tie.
        let content = (40.0 * rng.random::<f64>().powi(3)) as u32;
        let age = match rng.random_range(0..100) {
            0..5 => rng.random_range(600 * MICROS + 1..4000 * MICROS),
            5..8 => -rng.random_range(60 * MICROS + 1..900 * MICROS),
            8..10 => -rng.random_range(0..60 * MICROS),
            10..50 => rng.random_range(0..600 * MICROS),
            _ => rng.random_range(0..3 * MICROS),
        };
        let commit_ts = now();
        let devices = ["ios", "android", "web-safari", "web\u{2011}safari", "دسكتوب \"x\"\n"];
        let pick = rng.random_range(0..devices.len() + 1);
        Ev {
            id: Position { commit_lsn: Lsn(0x0100_0000 + self.number / 3), ordinal: self.number % 3 },
            op: ["c", "c", "c", "c", "c", "c", "c", "u", "d", "r"][rng.random_range(0..10)],
            commit_ts,
            event_ts: commit_ts - age,
            content: rng.random_bool(0.9).then(|| format!("content-{content:02}")),
            user: rng.random_bool(0.9).then(|| format!("user-{:02}", rng.random_range(0..12))),
            device: devices.get(pick).map(|d| (*d).to_owned()),
            title: rng.random_bool(0.95).then(|| format!("عنوان {}", self.number / 50)),
            millis: rng.random_bool(0.7).then(|| rng.random_range(-500..900_000)),
        }
    }
}

/// The board over these events at the moment of `board`, counted without buckets of any kind.
pub fn expected(events: &[Ev], board: &Value) -> Value {
    let as_of: jiff::Timestamp = board["as_of"].as_str().unwrap().parse().unwrap();
    let last = as_of.as_microsecond().div_euclid(10 * MICROS);
    let in_window = |ts: i64| (last - 59..=last).contains(&ts.div_euclid(10 * MICROS));
    let (mut sums, mut devices) = (BTreeMap::<_, (i64, u64, BTreeSet<_>)>::new(), BTreeMap::<_, (u64, i64)>::new());
    let (mut newest, mut late, mut future) = (BTreeMap::new(), 0, 0);
    for e in events.iter().filter(|e| e.op == "c") {
        if let Some(content) = &e.content {
            let entry = newest.entry(content).or_insert(e);
            if e.id >= entry.id {
                *entry = e;
            }
        }
        let (is_late, is_future) = (e.event_ts < e.commit_ts - 600 * MICROS, e.event_ts > e.commit_ts + 60 * MICROS);
        late += u64::from(is_late && in_window(e.commit_ts));
        future += u64::from(is_future && in_window(e.commit_ts));
        if is_late || is_future || !in_window(e.event_ts) {
            continue;
        }
        if let Some(content) = &e.content {
            let sum = sums.entry(content).or_default();
            sum.0 += e.millis.unwrap_or(0);
            sum.1 += 1;
            sum.2.extend(&e.user);
        }
        let device = devices.entry((e.device.is_none(), &e.device)).or_default();
        *device = (device.0 + 1, device.1.max(e.event_ts));
    }
    let mut ranked: Vec<_> = sums.into_iter().collect();
    ranked.sort_by_key(|(id, (millis, events, _))| (-millis, -(*events as i64), *id));
    let top = ranked.iter().enumerate().map(|(i, (id, (millis, events, users)))| {
        json!({"rank": i + 1, "content_id": id, "title": newest[id].title, "content_type": "video",
            "engagement_seconds": *millis as f64 / 1000.0, "events": events, "users": users.len()})
    });
    let mut used: Vec<_> = devices.into_iter().collect();
    used.sort_by_key(|(name, (events, _))| (-(*events as i64), *name));
    let devices = used
        .iter()
        .map(|((_, name), (events, last))| json!({"device": name, "events": events, "last_seen": text(*last)}));
    json!({"as_of": board["as_of"], "window_seconds": 600, "top": top.collect::<Vec<_>>(),
        "devices": devices.collect::<Vec<_>>(), "late_dropped": late, "future_dropped": future})
}
