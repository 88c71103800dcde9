//! What an answer of the outside system means for the event. No IO.
//!
//! | answer | what happens |
//! |---|---|
//! | 2xx, body is no `{"status":"error"}` | delivered |
//! | 2xx, body is `{"status":"error"}` | sent again a few times, then a dead letter |
//! | 408, 409, 425, 429, 5xx, no answer at all | sent again for ever: an outage never turns into a dead letter |
//! | 3xx | sent again for ever, not ready: the address is wrong, which says nothing about the event |
//! | any other 4xx | dead letter |

use std::borrow::Cow;
use std::fmt;
use std::time::{Duration, SystemTime};

use serde::Deserializer;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

/// `Retry-After` is honoured up to here; a peer that asks for more is asked again after this time.
pub const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(3600);
/// How much of an answer's body is read. One whose `status` does not stand there cannot be told, and counts as an error.
pub const LONGEST_BODY: usize = 1 << 20;
/// How much of an answer's body stands in a reason.
const QUOTED: usize = 300;

/// An HTTP answer, as far as it matters here.
#[derive(Debug, Default)]
pub struct Answer<'a> {
    /// HTTP status code.
    pub status: u16,
    /// Value of `Retry-After`.
    pub retry_after: Option<&'a str>,
    /// Value of `Location`.
    pub location: Option<&'a str>,
    /// The body, up to [`LONGEST_BODY`].
    pub body: &'a [u8],
}

/// What to do with the event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The peer has it.
    Delivered,
    /// Send it again, not before `after`.
    Again {
        /// Why, as a label of the retry counter.
        kind: &'static str,
        /// Why, for people.
        reason: String,
        /// What the peer asked for.
        after: Option<Duration>,
    },
    /// A success whose body says "error": send it again a limited number of times.
    Error(String),
    /// The peer will never take it.
    Refused(String),
}

/// Judges an answer that came at `now`.
pub fn judge(answer: &Answer<'_>, now: SystemTime) -> Verdict {
    let reason = || format!("HTTP {}{}", answer.status, quoted(answer.body));
    let again = |kind| Verdict::Again { kind, reason: reason(), after: retry_after(answer.retry_after, now) };
    match answer.status {
        200..=299 if says_error(answer.body) => Verdict::Error(reason()),
        200..=299 => Verdict::Delivered,
        300..=399 => redirect(answer),
        408 => again("408"),
        409 => again("409"),
        425 => again("425"),
        429 => again("429"),
        400..=499 => Verdict::Refused(reason()),
        _ => again("5xx"),
    }
}

/// Redirects are not followed: a POST that becomes a GET on the way would look delivered.
fn redirect(answer: &Answer<'_>) -> Verdict {
    let to = answer.location.unwrap_or("(no Location)");
    let reason =
        format!("HTTP {} to {to}: redirects are not followed; set external.url to the new address", answer.status);
    Verdict::Again { kind: "redirect", reason, after: None }
}

/// Whether the body is a JSON object whose `status` is `"error"`. Any other body, also none, is no error.
fn says_error(body: &[u8]) -> bool {
    let text = body.strip_prefix(BOM).unwrap_or(body);
    let object = text.trim_ascii_start().starts_with(b"{");
    let mut status = None;
    let mut json = serde_json::Deserializer::from_slice(text);
    let read = json.deserialize_map(Status(&mut status)).and_then(|()| json.end());
    let whole = body.len() < LONGEST_BODY;
    match (status, read) {
        _ if !object => false,
        // A body that is no JSON in the end says nothing.
        (Some(status), read) => status == "error" && (read.is_ok() || !whole),
        (None, _) => !whole,
    }
}

/// Before a body of UTF-8, by some who write it.
const BOM: &[u8] = b"\xEF\xBB\xBF";

/// Takes the `status` of an object, also of one that is cut off behind it.
struct Status<'a>(&'a mut Option<Value>);

impl<'de> Visitor<'de> for Status<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<Cow<'_, str>>()? {
            match key == "status" {
                true => *self.0 = Some(map.next_value()?),
                false => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

/// Seconds or an HTTP date (RFC 9110, 10.2.3), at most [`LONGEST_RETRY_AFTER`]; anything else is as if absent.
fn retry_after(value: Option<&str>, now: SystemTime) -> Option<Duration> {
    let value = value?.trim();
    let after = match value.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(value).ok()?.duration_since(now).unwrap_or_default(),
    };
    Some(after.min(LONGEST_RETRY_AFTER))
}

/// The first bytes of a body, as text on one line.
fn quoted(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(QUOTED)]);
    let line: String = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match (line.is_empty(), body.len() > QUOTED) {
        (true, _) => String::new(),
        (_, false) => format!(": {line}"),
        (_, true) => format!(": {line}…"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(status: u16, body: &str) -> Verdict {
        judge(&Answer { status, body: body.as_bytes(), ..Answer::default() }, SystemTime::now())
    }

    #[test]
    fn a_200_with_an_error_body_is_an_error() {
        for body in [r#"{"status":"error"}"#, " {\"a\":[1],\"status\" : \"err\\u006fr\",\"message\":\"no\"}"] {
            assert!(matches!(verdict(200, body), Verdict::Error(reason) if reason.starts_with("HTTP 200: ")), "{body}");
        }
    }

    #[test]
    fn a_byte_order_mark_or_a_long_body_hides_nothing() {
        assert!(matches!(verdict(200, "\u{feff}{\"status\":\"error\"}"), Verdict::Error(_)));
        let long = |before: &str, after: &str| {
            let body = format!("{{{before}\"x\":\"{}\"{after}}}", "é".repeat(LONGEST_BODY));
            judge(
                &Answer { status: 200, body: &body.as_bytes()[..LONGEST_BODY], ..Answer::default() },
                SystemTime::now(),
            )
        };
        assert_eq!(long("\"status\":\"ok\",", ""), Verdict::Delivered);
        assert!(matches!(long("\"status\":\"error\",", ""), Verdict::Error(_)));
        // It may stand in what was not read.
        assert!(matches!(long("", ",\"status\":\"error\""), Verdict::Error(_)));
        let page = "<".repeat(LONGEST_BODY);
        assert_eq!(verdict(200, &page), Verdict::Delivered);
    }

    #[test]
    fn every_other_success_is_a_success() {
        for body in [
            "",
            "ok",
            "null",
            "[]",
            r#"["error"]"#,
            r#""error""#,
            r#"{"status":"ok"}"#,
            r#"{"status":1}"#,
            r#"{"status":null}"#,
            r#"{"nested":{"status":"error"}}"#,
            r#"{"status":"errors"}"#,
            r#"{"status":"error""#,
            "<html>{\"status\":\"error\"}</html>",
        ] {
            assert_eq!(verdict(202, body), Verdict::Delivered, "{body}");
        }
    }

    #[test]
    fn statuses_of_an_outage_come_again_and_others_are_refused() {
        for status in [408, 409, 425, 429, 500, 502, 503, 504, 599, 301, 307, 308] {
            assert!(matches!(verdict(status, ""), Verdict::Again { .. }), "{status}");
        }
        for status in [400, 401, 403, 404, 405, 410, 413, 422, 451] {
            assert_eq!(verdict(status, "no\n"), Verdict::Refused(format!("HTTP {status}: no")));
        }
    }

    #[test]
    fn a_redirect_names_its_location() {
        let answer = Answer { status: 308, location: Some("https://x/events"), ..Answer::default() };
        let Verdict::Again { reason, .. } = judge(&answer, SystemTime::now()) else { panic!("not sent again") };
        assert!(reason.contains("308 to https://x/events"), "{reason}");
    }

    #[test]
    fn retry_after_is_seconds_or_a_date_and_capped() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let date = httpdate::fmt_http_date(now + Duration::from_secs(7));
        let past = httpdate::fmt_http_date(now - Duration::from_secs(7));
        for (value, seconds) in [
            ("3", Some(3)),
            (" 0 ", Some(0)),
            (date.as_str(), Some(7)),
            (past.as_str(), Some(0)),
            ("99999999", Some(3600)),
            ("-1", None),
            ("1.5", None),
            ("soon", None),
            ("99999999999999999999999", None),
        ] {
            assert_eq!(retry_after(Some(value), now), seconds.map(Duration::from_secs), "{value}");
        }
        assert_eq!(retry_after(None, now), None);
    }

    #[test]
    fn a_long_body_is_quoted_up_to_a_point() {
        let Verdict::Refused(reason) = verdict(400, &"é\n".repeat(500)) else { panic!("not refused") };
        assert!(reason.len() < 400 && reason.ends_with('…') && !reason.contains('\n'), "{reason}");
    }
}
