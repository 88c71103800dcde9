//! What a run of records of one partition adds to the board: events → [`Batch`]. Pure: no clock, no IO.
//!
//! Redis costs a few microseconds for each key that is touched, so a batch is added up here before one script applies it.

use std::collections::{BTreeMap, HashMap};

use super::event::Event;

/// Width of a bucket in seconds of event time.
pub const BUCKET_SECONDS: i64 = 10;
/// Buckets of a window: the one that holds the moment of reading, and the 59 before it.
pub const WINDOW_BUCKETS: i64 = 60;
/// Length of the window in seconds.
pub const WINDOW_SECONDS: i64 = BUCKET_SECONDS * WINDOW_BUCKETS;
/// An event older than this at its commit, in seconds, is late: counted as such and left out.
pub const LATE_SECONDS: i64 = 600;
/// An event that lies further ahead of its commit, in seconds, is from the future: counted as such and left out.
pub const FUTURE_SECONDS: i64 = 60;
/// How long keys outlive the window, in seconds, so that a reader whose clock is behind still finds them.
const EXPIRY_SLACK: i64 = 120;

const MICROS: i64 = 1_000_000;

/// Counts to add to the board.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Batch {
    buckets: BTreeMap<i64, Bucket>,
    contents: HashMap<Box<str>, Newest>,
    /// Commit times in microseconds with their number of events, as they came.
    commits: Vec<(i64, u64)>,
    late: u64,
    future: u64,
}

/// What the batch adds to ten seconds: all but the two counters by event time, these by commit time.
#[derive(Debug, Default, PartialEq, Eq)]
struct Bucket {
    contents: HashMap<Box<str>, Tally>,
    devices: BTreeMap<Box<str>, Use>,
    /// Of events without a device.
    no_device: Option<Use>,
    late: u64,
    future: u64,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    millis: i64,
    events: u64,
    users: Texts,
}

/// Texts one behind the other: an allocation for each of them would cost more than all else that is done with it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Texts {
    all: String,
    ends: Vec<usize>,
}

#[derive(Debug, PartialEq, Eq)]
struct Use {
    events: u64,
    last: i64,
}

impl Default for Use {
    /// Never used.
    fn default() -> Self {
        Self { events: 0, last: i64::MIN }
    }
}

/// The newest event of a content, by position.
#[derive(Debug, PartialEq, Eq)]
struct Newest {
    id: String,
    title: Option<Box<str>>,
    content_type: Option<Box<str>>,
    /// Until when the title may be asked for, in seconds since 1970.
    expires: i64,
}

impl Batch {
    /// Adds one event. Whether it is late or from the future is decided by the event alone, so that a rebuild of
    /// the board decides alike; both are counted in the ten seconds of their *commit*, so that the counters slide
    /// with the window and a rebuild from Kafka finds the same numbers.
    pub fn add(&mut self, event: &Event<'_>) {
        self.count_commit(event.commit_ts);
        let age = event.commit_ts.saturating_sub(event.event_ts);
        let (late, future) = (age > LATE_SECONDS * MICROS, age < -FUTURE_SECONDS * MICROS);
        let at = bucket_of(if late || future { event.commit_ts } else { event.event_ts });
        self.note_title(event, expiry(at.max(bucket_of(event.commit_ts))));
        let bucket = self.buckets.entry(at).or_default();
        if late || future {
            bucket.late += u64::from(late);
            bucket.future += u64::from(future);
            self.late += u64::from(late);
            self.future += u64::from(future);
        } else {
            bucket.count(event);
        }
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.commits.is_empty()
    }

    /// Events added, with those that were left out.
    pub fn events(&self) -> u64 {
        self.commits.iter().map(|(_, n)| n).sum()
    }

    /// Late and future events among them.
    pub fn dropped(&self) -> (u64, u64) {
        (self.late, self.future)
    }

    /// Commit times in microseconds since 1970, each with its number of events.
    pub fn commits(&self) -> &[(i64, u64)] {
        &self.commits
    }

    /// Hands the batch to `arg` as the flat list of arguments that `apply.lua` reads.
    pub fn encode(&self, mut arg: impl FnMut(&[u8])) {
        let mut number = itoa::Buffer::new();
        let mut arg = |value: Arg<'_>| match value {
            Arg::Number(n) => arg(number.format(n).as_bytes()),
            Arg::Text(text) => arg(text.as_bytes()),
            Arg::Nullable(None) => arg(b""),
            Arg::Nullable(Some(text)) => arg(format!("={text}").as_bytes()),
        };
        arg(Arg::Number(self.contents.len() as i64));
        for (content, newest) in &self.contents {
            arg(Arg::Text(content));
            arg(Arg::Text(&newest.id));
            arg(Arg::Nullable(newest.title.as_deref()));
            arg(Arg::Nullable(newest.content_type.as_deref()));
            arg(Arg::Number(newest.expires));
        }
        arg(Arg::Number(self.buckets.len() as i64));
        for (at, bucket) in &self.buckets {
            arg(Arg::Number(*at));
            arg(Arg::Number(expiry(*at)));
            bucket.encode(&mut arg);
        }
    }

    fn count_commit(&mut self, commit_ts: i64) {
        match self.commits.last_mut() {
            Some((ts, n)) if *ts == commit_ts => *n += 1,
            _ => self.commits.push((commit_ts, 1)),
        }
    }

    fn note_title(&mut self, event: &Event<'_>, expires: i64) {
        let Some(content) = event.content_id.as_deref() else { return };
        match self.contents.get_mut(content) {
            None => {
                self.contents.insert(content.into(), Newest::of(event, expires));
            }
            Some(newest) => {
                newest.expires = newest.expires.max(expires);
                if *event.id > *newest.id {
                    newest.follow(event);
                }
            }
        }
    }
}

enum Arg<'a> {
    Number(i64),
    Text(&'a str),
    /// NULL is the empty text; anything else has an `=` before it.
    Nullable(Option<&'a str>),
}

impl Bucket {
    fn count(&mut self, event: &Event<'_>) {
        if let Some(content) = event.content_id.as_deref() {
            match self.contents.get_mut(content) {
                Some(tally) => tally.count(event),
                None => self.contents.entry(content.into()).or_default().count(event),
            }
        }
        match event.device.as_deref() {
            None => self.no_device.get_or_insert_default().count(event),
            Some(device) => match self.devices.get_mut(device) {
                Some(used) => used.count(event),
                None => self.devices.entry(device.into()).or_default().count(event),
            },
        }
    }

    fn encode(&self, arg: &mut impl FnMut(Arg<'_>)) {
        arg(Arg::Number(self.contents.len() as i64));
        for (content, tally) in &self.contents {
            arg(Arg::Text(content));
            arg(Arg::Number(tally.millis));
            arg(Arg::Number(tally.events as i64));
            arg(Arg::Number(tally.users.ends.len() as i64));
            tally.users.iter().for_each(|user| arg(Arg::Text(user)));
        }
        let named = self.devices.iter().map(|(device, used)| (Some(&**device), used));
        let devices = self.no_device.iter().map(|used| (None, used)).chain(named);
        arg(Arg::Number(devices.clone().count() as i64));
        for (device, used) in devices {
            arg(Arg::Nullable(device));
            arg(Arg::Number(used.events as i64));
            arg(Arg::Number(used.last));
        }
        arg(Arg::Number(self.late as i64));
        arg(Arg::Number(self.future as i64));
    }
}

impl Tally {
    fn count(&mut self, event: &Event<'_>) {
        self.millis = self.millis.saturating_add(event.millis);
        self.events += 1;
        if let Some(user) = event.user_id.as_deref() {
            self.users.push(user);
        }
    }
}

impl Use {
    fn count(&mut self, event: &Event<'_>) {
        self.events += 1;
        self.last = self.last.max(event.event_ts);
    }
}

impl Texts {
    fn push(&mut self, text: &str) {
        self.all.push_str(text);
        self.ends.push(self.all.len());
    }

    fn iter(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.all[start..end])
    }
}

impl Newest {
    /// Nearly every event is newer than the one before, and its title the same.
    fn follow(&mut self, event: &Event<'_>) {
        self.id.clear();
        self.id.push_str(&event.id);
        if self.title.as_deref() != event.title.as_deref() {
            self.title = event.title.as_deref().map(Into::into);
        }
        if self.content_type.as_deref() != event.content_type.as_deref() {
            self.content_type = event.content_type.as_deref().map(Into::into);
        }
    }

    fn of(event: &Event<'_>, expires: i64) -> Self {
        Self {
            id: event.id.as_ref().into(),
            title: event.title.as_deref().map(Into::into),
            content_type: event.content_type.as_deref().map(Into::into),
            expires,
        }
    }
}

/// The bucket of a time in microseconds since 1970.
pub fn bucket_of(micros: i64) -> i64 {
    micros.div_euclid(BUCKET_SECONDS * MICROS)
}

/// When the keys of a bucket may go, in seconds since 1970: an absolute time that no later event moves.
fn expiry(bucket: i64) -> i64 {
    (bucket + WINDOW_BUCKETS) * BUCKET_SECONDS + EXPIRY_SLACK
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: i64 = 1_800_000_005 * MICROS;

    fn event(age_micros: i64) -> Event<'static> {
        Event {
            id: "01".into(),
            commit_ts: COMMIT,
            event_ts: COMMIT - age_micros,
            content_id: Some("a".into()),
            user_id: Some("u".into()),
            device: None,
            title: Some("t".into()),
            content_type: None,
            millis: 900,
        }
    }

    #[test]
    fn late_and_future_are_decided_to_the_microsecond() {
        for (age, dropped) in [
            (LATE_SECONDS * MICROS, (0, 0)),
            (LATE_SECONDS * MICROS + 1, (1, 0)),
            (-FUTURE_SECONDS * MICROS, (0, 0)),
            (-FUTURE_SECONDS * MICROS - 1, (0, 1)),
        ] {
            let mut batch = Batch::default();
            batch.add(&event(age));
            assert_eq!((batch.dropped(), batch.events()), (dropped, 1), "{age}");
            let counted = batch.buckets.values().any(|b| b.no_device.is_some());
            assert_eq!(counted, dropped == (0, 0), "{age}");
        }
    }

    #[test]
    fn infinite_times_neither_overflow_nor_count() {
        let mut batch = Batch::default();
        batch.add(&Event { event_ts: i64::MIN, ..event(0) });
        batch.add(&Event { event_ts: i64::MAX, ..event(0) });
        assert_eq!(batch.dropped(), (1, 1));
        assert_eq!(batch.buckets.keys().collect::<Vec<_>>(), [&bucket_of(COMMIT)]);
    }

    #[test]
    fn a_bucket_expires_by_its_own_time_and_no_event_moves_that() {
        assert_eq!(expiry(180_000_000), 1_800_000_000 + WINDOW_SECONDS + EXPIRY_SLACK);
    }

    #[test]
    fn the_newest_position_names_the_content_whatever_the_order() {
        let mut batch = Batch::default();
        batch.add(&Event { id: "02".into(), title: Some("new".into()), ..event(0) });
        batch.add(&Event { id: "01".into(), title: Some("old".into()), ..event(0) });
        assert_eq!(batch.contents["a"].title.as_deref(), Some("new"));
    }

    #[test]
    fn null_content_counts_for_devices_only() {
        let mut batch = Batch::default();
        batch.add(&Event { content_id: None, ..event(0) });
        let bucket = &batch.buckets[&bucket_of(COMMIT)];
        assert!(bucket.contents.is_empty() && batch.contents.is_empty());
        assert_eq!(bucket.no_device, Some(Use { events: 1, last: COMMIT }));
    }

    #[test]
    fn the_script_gets_a_flat_list() {
        let mut batch = Batch::default();
        batch.add(&event(0));
        let mut args = Vec::new();
        batch.encode(|a| args.push(String::from_utf8(a.to_vec()).unwrap()));
        let expires = "1800000720";
        let last = COMMIT.to_string();
        assert_eq!(
            args,
            [
                "1",
                "a",
                "01",
                "=t",
                "",
                expires,
                "1",
                "180000000",
                expires,
                "1",
                "a",
                "900",
                "1",
                "1",
                "u",
                "1",
                "",
                "1",
                &last,
                "0",
                "0"
            ]
        );
    }
}
