//! What the board reads of one engagement event: bytes of a Kafka value → [`Event`]. Pure; never panics.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

/// A created engagement event, borrowed from the bytes of its Kafka value.
///
/// A column that the table or its lookup does not have (any more) counts as NULL: to drop one is legal, and must not empty
/// the board.
///
/// Times are microseconds since 1970 UTC. `-infinity` and times before Christ are `i64::MIN`, `infinity` is `i64::MAX`.
#[derive(Debug, PartialEq, Eq)]
pub struct Event<'a> {
    /// The event's position; sorts as text.
    pub id: Cow<'a, str>,
    /// When its transaction committed.
    pub commit_ts: i64,
    /// When it happened by the client's clock.
    pub event_ts: i64,
    /// What was used; `None` counts for devices only.
    pub content_id: Option<Cow<'a, str>>,
    /// Who used it; `None` is no user.
    pub user_id: Option<Cow<'a, str>>,
    /// `None` is a row of its own.
    pub device: Option<Cow<'a, str>>,
    /// Title as of the event's position.
    pub title: Option<Cow<'a, str>>,
    /// Kind of content as of the event's position.
    pub content_type: Option<Cow<'a, str>>,
    /// Engagement in thousandths of a second; NULL is 0.
    pub millis: i64,
}

/// Reads one Kafka value; `None` for an update, delete, truncate or row of history, which the board does not count.
///
/// # Errors
/// What is wrong with the record.
pub fn parse(value: &[u8]) -> Result<Option<Event<'_>>, String> {
    // Text that is checked as a whole need not be checked string by string.
    let text = std::str::from_utf8(value).map_err(|e| e.to_string())?;
    let wire: Wire<'_> = serde_json::from_str(text).map_err(|e| e.to_string())?;
    match wire.op.0.as_ref() {
        "c" => wire.created().map(Some),
        "u" | "d" | "r" | "t" => Ok(None),
        other => Err(format!("_op is {other:?}; needed: c, u, d, r or t")),
    }
}

#[derive(Deserialize)]
struct Wire<'a> {
    #[serde(borrow, rename = "_op")]
    op: Text<'a>,
    #[serde(borrow, rename = "_id")]
    id: Option<Text<'a>>,
    #[serde(borrow, rename = "_commit_ts")]
    commit_ts: Option<Text<'a>>,
    #[serde(borrow)]
    event_ts: Option<Text<'a>>,
    #[serde(borrow)]
    content_id: Option<Text<'a>>,
    #[serde(borrow)]
    user_id: Option<Text<'a>>,
    #[serde(borrow)]
    device: Option<Text<'a>>,
    #[serde(borrow)]
    title: Option<Text<'a>>,
    #[serde(borrow)]
    content_type: Option<Text<'a>>,
    #[serde(borrow)]
    engagement_seconds: Option<&'a RawValue>,
}

impl<'a> Wire<'a> {
    fn created(self) -> Result<Event<'a>, String> {
        Ok(Event {
            id: required(self.id, "_id")?,
            commit_ts: finite(time(self.commit_ts, "_commit_ts")?)?,
            event_ts: time(self.event_ts, "event_ts")?,
            content_id: self.content_id.map(|t| t.0),
            user_id: self.user_id.map(|t| t.0),
            device: self.device.map(|t| t.0),
            title: self.title.map(|t| t.0),
            content_type: self.content_type.map(|t| t.0),
            millis: self.engagement_seconds.map_or(Ok(0), |raw| {
                thousandths(raw.get())
                    .ok_or_else(|| format!("engagement_seconds is {raw}; needed: a plain number or null"))
            })?,
        })
    }
}

fn required<'a>(field: Option<Text<'a>>, name: &str) -> Result<Cow<'a, str>, String> {
    field.map(|t| t.0).ok_or_else(|| format!("{name} is missing or null"))
}

fn time(field: Option<Text<'_>>, name: &str) -> Result<i64, String> {
    let text = required(field, name)?;
    micros(&text).ok_or_else(|| format!("{name} is {text:?}; needed: a time as 2026-01-31T23:59:59.000000Z"))
}

/// Client clocks may say infinity; the server's clock does not.
fn finite(micros: i64) -> Result<i64, String> {
    if micros == i64::MIN || micros == i64::MAX {
        Err("_commit_ts is no time that a commit can have".into())
    } else {
        Ok(micros)
    }
}

/// serde borrows a `Cow` only where it stands directly in a field; this carries the borrow through an [`Option`].
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// A JSON number in thousandths, exact; digits past the third are rounded half away from zero.
fn thousandths(number: &str) -> Option<i64> {
    let (negative, digits) = number.strip_prefix('-').map_or((false, number), |rest| (true, rest));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let plain = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !plain(whole) || !plain(fraction) {
        return None;
    }
    let digit = |i: usize| fraction.as_bytes().get(i).map_or(0, |b| i64::from(b - b'0'));
    let magnitude = whole
        .parse::<i64>()
        .ok()?
        .checked_mul(1000)?
        .checked_add(digit(0) * 100 + digit(1) * 10 + digit(2) + i64::from(digit(3) >= 5))?;
    Some(if negative { -magnitude } else { magnitude })
}

/// Microseconds since 1970 of `YYYY-MM-DDTHH:MM:SS[.ffffff]Z`, and of the texts that Postgres has for what lies outside.
fn micros(text: &str) -> Option<i64> {
    match text {
        "infinity" => return Some(i64::MAX),
        "-infinity" => return Some(i64::MIN),
        _ if text.ends_with(" BC") => return Some(i64::MIN),
        // A year of five digits, as Postgres writes it.
        _ if text.find('-').is_some_and(|at| at > 4 && number(&text[..at]).is_some()) => return Some(i64::MAX),
        _ => {}
    }
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let mut parts = date.splitn(3, '-');
    let (year, month, day) = (number(parts.next()?)?, number(parts.next()?)?, number(parts.next()?)?);
    let (time, fraction) = time.split_once('.').unwrap_or((time, ""));
    let mut parts = time.splitn(3, ':');
    let (hour, minute, second) = (number(parts.next()?)?, number(parts.next()?)?, number(parts.next()?)?);
    let in_range = (1..=12).contains(&month) && (1..=31).contains(&day) && hour < 24 && minute < 60 && second < 60;
    if !in_range || fraction.len() > 6 {
        return None;
    }
    let scale = 10_i64.pow(6 - fraction.len() as u32);
    let fraction = if fraction.is_empty() { 0 } else { number(fraction)? * scale };
    let seconds = ((days(year, month, day) * 24 + hour) * 60 + minute) * 60 + second;
    // Postgres's calendar ends a little later than ours.
    Some(seconds.saturating_mul(1_000_000).saturating_add(fraction))
}

/// Up to six digits: enough for any year that Postgres knows, too few to overflow.
fn number(digits: &str) -> Option<i64> {
    let plain = (1..=6).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
    if plain { digits.parse().ok() } else { None }
}

/// Days since 1970-01-01 in the proleptic Gregorian calendar (H. Hinnant, "chrono-Compatible Low-Level Date Algorithms").
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EVENT: &str = r#"{"id":1,"content_id":"c-1","user_id":null,"event_type":"play","event_ts":"2026-01-02T03:04:05.000006Z","duration_ms":900,"device":"web\u2011safari","raw_payload":{"a":[1]},"title":"قناة \"الماء\"","content_type":"video","length_seconds":9,"engagement_seconds":0.900,"engagement_pct":0.10,"_id":"0000000000000001:0000000000","_op":"c","_table":"engagement_events","_lsn":"0/1","_commit_ts":"2026-01-02T03:04:06.000000Z"}"#;

    #[test]
    fn an_event_is_read_with_its_bytes_exact() {
        let event = parse(EVENT.as_bytes()).unwrap().unwrap();
        assert_eq!(event.device.as_deref(), Some("web\u{2011}safari"));
        assert_eq!(event.title.as_deref(), Some("قناة \"الماء\""));
        assert_eq!((event.millis, event.user_id), (900, None));
        assert_eq!(event.commit_ts - event.event_ts, 999_994);
        assert!(matches!(event.id, Cow::Borrowed(_)), "what holds no escape is not copied");
    }

    #[test]
    fn only_creations_count_and_a_truncate_needs_no_columns() {
        for op in ["u", "d", "r", "t"] {
            assert_eq!(parse(format!(r#"{{"_op":"{op}"}}"#).as_bytes()), Ok(None));
        }
    }

    /// The same event, of a table or lookup without some of the columns.
    fn without(columns: &[&str]) -> String {
        let mut fields: serde_json::Map<String, serde_json::Value> = serde_json::from_str(EVENT).unwrap();
        columns.iter().for_each(|column| assert!(fields.remove(*column).is_some(), "{column}"));
        serde_json::Value::Object(fields).to_string()
    }

    #[test]
    fn a_column_that_is_gone_counts_as_null() {
        let descriptive = ["content_id", "user_id", "device", "title", "content_type", "engagement_seconds"];
        let text = without(&descriptive);
        let event = parse(text.as_bytes()).unwrap().unwrap();
        assert_eq!((&event.content_id, &event.user_id, &event.device), (&None, &None, &None));
        assert_eq!((&event.title, &event.content_type, event.millis), (&None, &None, 0));
        assert_eq!(event.commit_ts - event.event_ts, 999_994);
        let text = without(&["device"]);
        let event = parse(text.as_bytes()).unwrap().unwrap();
        assert_eq!((event.device.as_deref(), event.content_type.as_deref()), (None, Some("video")));
    }

    #[test]
    fn a_foreign_record_is_named_not_guessed() {
        for needed in ["_id", "_commit_ts", "event_ts"] {
            let absent = without(&[needed]);
            assert_eq!(parse(absent.as_bytes()), Err(format!("{needed} is missing or null")));
        }
        let null = EVENT.replace(r#""2026-01-02T03:04:05.000006Z""#, "null");
        assert_eq!(parse(null.as_bytes()), Err("event_ts is missing or null".into()));
        for bad in ["", "null", "[]", "{}", "\u{1}", r#"{"_op":"x"}"#, r#"{"_op":"c"}"#, r#"{"_op":1}"#] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(parse(b"\xff\xfe").is_err());
    }

    #[test]
    fn nine_hundred_milliseconds_are_0_9_seconds() {
        let table =
            [("0.900", 900), ("0.9", 900), ("-1.5", -1500), ("7", 7000), ("0", 0), ("0.0015", 2), ("-0.0015", -2)];
        for (text, millis) in table {
            assert_eq!(thousandths(text), Some(millis), "{text}");
        }
        for bad in ["\"1\"", "1e3", "NaN", "99999999999999999999", "true", "1.x", "-"] {
            assert_eq!(thousandths(bad), None, "{bad}");
        }
    }

    #[test]
    fn times_outside_the_calendar_are_late_or_future() {
        assert_eq!(micros("infinity"), Some(i64::MAX));
        assert_eq!(micros("-infinity"), Some(i64::MIN));
        assert_eq!(micros("0044-03-15 12:00:00+00 BC"), Some(i64::MIN));
        assert_eq!(micros("1970-01-01T00:00:00Z"), Some(0));
        assert_eq!(micros("294276-12-31 23:59:59.999999+00"), Some(i64::MAX));
        assert_eq!(micros("10000-01-01 00:00:00+00"), Some(i64::MAX));
        for bad in ["", "2026-01-01", "2026-13-01T00:00:00Z", "2026-01-01T00:00:00+00", "2026-01-01T25:00:00Z"] {
            assert_eq!(micros(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn times_agree_with_jiff(us in -62_135_596_800_000_000_i64..253_402_000_000_000_000) {
            let text = format!("{:.6}", jiff::Timestamp::from_microsecond(us).unwrap());
            prop_assert_eq!(micros(&text), Some(us), "{}", text);
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0..EVENT.len()) {
            let _ = parse(&bytes);
            prop_assert!(parse(&EVENT.as_bytes()[..cut]).is_err());
        }
    }
}
