//! Dates and timestamps: Postgres's binary counts and its ISO text, in both directions.

use super::{Converted, bad, utf8};
use crate::pgoutput::Cell;
use crate::schema::Type;

/// Days between the Unix epoch and Postgres's (2000-01-01).
pub const EPOCH_DAYS: i32 = 10_957;
const DAY: i64 = 86_400_000_000;
use crate::pgoutput::EPOCH_MICROS;

/// A point in time, or one of the values that no calendar has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instant {
    /// Days (of a date) or microseconds (of a timestamp) since the Unix epoch.
    At(i64),
    /// `infinity`, `-infinity`, years before 1 or after 9999: Postgres's own text is the only exact form.
    Beyond,
}

/// Proleptic Gregorian year, month, day of a number of days since 1970-01-01.
/// Algorithm: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms".
fn civil(days: i64) -> (i64, u32, u32) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + i64::from(month <= 2), month as u32, (doy - (153 * mp + 2) / 5 + 1) as u32)
}

/// Inverse of [`civil`].
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let y = year - i64::from(month <= 2);
    let era = y.div_euclid(400);
    let yoe = y.rem_euclid(400);
    let doy = (153 * (month + if month > 2 { -3 } else { 9 }) + 2) / 5 + day - 1;
    era * 146_097 + yoe * 365 + yoe / 4 - yoe / 100 + doy - 719_468
}

/// `00` to `99`.
const PAIRS: [[u8; 2]; 100] = {
    let mut pairs = [[b'0'; 2]; 100];
    let mut n = 0;
    while n < 100 {
        pairs[n] = [b'0' + (n / 10) as u8, b'0' + (n % 10) as u8];
        n += 1;
    }
    pairs
};

/// The last two digits.
fn two(n: u32) -> [u8; 2] {
    PAIRS[n as usize % 100]
}

/// `YYYY-MM-DD`; a year before 1 counts backwards and the caller appends ` BC`.
fn write_day(year: i64, month: u32, day: u32, out: &mut Vec<u8>) {
    let year = if year <= 0 { 1 - year } else { year };
    if year < 10_000 {
        out.extend_from_slice(&two((year / 100) as u32));
        out.extend_from_slice(&two((year % 100) as u32));
    } else {
        out.extend_from_slice(itoa::Buffer::new().format(year).as_bytes());
    }
    out.push(b'-');
    out.extend_from_slice(&two(month));
    out.push(b'-');
    out.extend_from_slice(&two(day));
}

fn write_clock(micros: i64, out: &mut Vec<u8>) {
    let seconds = (micros / 1_000_000) as u32;
    out.extend_from_slice(&two(seconds / 3600));
    out.push(b':');
    out.extend_from_slice(&two(seconds / 60 % 60));
    out.push(b':');
    out.extend_from_slice(&two(seconds % 60));
}

fn six(n: u32) -> [u8; 6] {
    let (a, b, c) = (two(n / 10_000), two(n / 100 % 100), two(n % 100));
    [a[0], a[1], b[0], b[1], c[0], c[1]]
}

/// `date_out` of a binary date (days since 2000-01-01).
pub(super) fn write_date(days: i32, out: &mut Vec<u8>) {
    match days {
        i32::MAX => return out.extend_from_slice(b"infinity"),
        i32::MIN => return out.extend_from_slice(b"-infinity"),
        _ => {}
    }
    let (year, month, day) = civil(i64::from(days) + i64::from(EPOCH_DAYS));
    write_day(year, month, day, out);
    if year <= 0 {
        out.extend_from_slice(b" BC");
    }
}

/// `timestamp_out` of a binary timestamp (µs since 2000-01-01), with the zone's suffix.
pub(super) fn write_timestamp(micros: i64, zone: &str, out: &mut Vec<u8>) {
    match micros {
        i64::MAX => return out.extend_from_slice(b"infinity"),
        i64::MIN => return out.extend_from_slice(b"-infinity"),
        _ => {}
    }
    let (days, clock) = (micros.div_euclid(DAY), micros.rem_euclid(DAY));
    let (year, month, day) = civil(days + i64::from(EPOCH_DAYS));
    write_day(year, month, day, out);
    out.push(b' ');
    write_clock(clock, out);
    let fraction = (clock % 1_000_000) as u32;
    if fraction > 0 {
        out.push(b'.');
        let digits = six(fraction);
        let end = digits.iter().rposition(|d| *d != b'0').map_or(0, |i| i + 1);
        out.extend_from_slice(&digits[..end]);
    }
    out.extend_from_slice(zone.as_bytes());
    if year <= 0 {
        out.extend_from_slice(b" BC");
    }
}

/// RFC 3339 with six digits of µs since the Unix epoch; `zone` is `Z` or empty. Only for years 1 to 9999.
pub(crate) fn write_rfc3339(micros: i64, zone: &str, out: &mut Vec<u8>) {
    let (days, clock) = (micros.div_euclid(DAY), micros.rem_euclid(DAY));
    let (year, month, day) = civil(days);
    let (year, seconds, fraction) = (year as u32, (clock / 1_000_000) as u32, (clock % 1_000_000) as u32);
    let mut text = *b"0000-00-00T00:00:00.000000";
    let pairs = [
        (0, year / 100),
        (2, year % 100),
        (5, month),
        (8, day),
        (11, seconds / 3600),
        (14, seconds / 60 % 60),
        (17, seconds % 60),
        (20, fraction / 10_000),
        (22, fraction / 100 % 100),
        (24, fraction % 100),
    ];
    for (at, n) in pairs {
        text[at..at + 2].copy_from_slice(&two(n));
    }
    out.extend_from_slice(&text);
    out.extend_from_slice(zone.as_bytes());
}

/// What [`write_timestamp`] writes, of what [`write_rfc3339`] has written; other text as it is.
pub(super) fn text_of_rfc3339(text: &str, zone: &str) -> String {
    let Some((day, clock)) = text.split_once('T') else { return text.to_owned() };
    let clock = clock.trim_end_matches('Z').trim_end_matches('0');
    let (seconds, fraction) = clock.split_once('.').unwrap_or((clock, ""));
    let dot = if fraction.is_empty() { "" } else { "." };
    format!("{day} {seconds}{dot}{fraction}{zone}")
}

fn in_calendar(days: i64) -> bool {
    // 0001-01-01 … 9999-12-31
    (-719_162..=2_932_896).contains(&days)
}

/// µs since the Unix epoch of a timestamp(tz) cell; `None` for NULL.
///
/// # Errors
/// [`super::BadValue`] when the cell is no timestamp.
pub fn micros_of_timestamp(ty: Type, cell: Cell<'_>) -> Converted<Option<Instant>> {
    match cell {
        Cell::Null | Cell::Unchanged => Ok(None),
        Cell::Binary(bytes) => {
            let micros = i64::from_be_bytes(super::fixed(ty, bytes)?);
            let unix = micros.checked_add(EPOCH_MICROS).filter(|m| in_calendar(m.div_euclid(DAY)));
            Ok(Some(unix.map_or(Instant::Beyond, Instant::At)))
        }
        Cell::Text(text) => parse_timestamp(utf8(ty, text)?).map_or_else(|| bad(ty, text), |i| Ok(Some(i))),
    }
}

/// Days since the Unix epoch of a date cell; `None` for NULL.
///
/// # Errors
/// [`super::BadValue`] when the cell is no date.
pub fn days_of_date(ty: Type, cell: Cell<'_>) -> Converted<Option<Instant>> {
    match cell {
        Cell::Null | Cell::Unchanged => Ok(None),
        Cell::Binary(bytes) => {
            let days = i64::from(i32::from_be_bytes(super::fixed(ty, bytes)?)) + i64::from(EPOCH_DAYS);
            Ok(Some(if in_calendar(days) { Instant::At(days) } else { Instant::Beyond }))
        }
        Cell::Text(text) => parse_date(utf8(ty, text)?).map_or_else(|| bad(ty, text), |i| Ok(Some(i))),
    }
}

fn parse_date(text: &str) -> Option<Instant> {
    if matches!(text, "infinity" | "-infinity") || text.ends_with(" BC") {
        return Some(Instant::Beyond);
    }
    let (rest, day) = text.rsplit_once('-')?;
    let (year, month) = rest.rsplit_once('-')?;
    let days = days_from_civil(number(year)?, number(month)?, number(day)?);
    Some(if in_calendar(days) { Instant::At(days) } else { Instant::Beyond })
}

/// `2026-11-24 19:29:00.123456+00`; the session's zone is UTC, so the offset is always `+00`.
fn parse_timestamp(text: &str) -> Option<Instant> {
    if matches!(text, "infinity" | "-infinity") || text.ends_with(" BC") {
        return Some(Instant::Beyond);
    }
    let (date, clock) = text.split_once(' ')?;
    let Instant::At(days) = parse_date(date)? else { return Some(Instant::Beyond) };
    let clock = clock.strip_suffix("+00").unwrap_or(clock);
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, ""));
    let mut parts = clock.split(':').map(number);
    let (h, m, s) = (parts.next()??, parts.next()??, parts.next()??);
    if parts.next().is_some() || fraction.len() > 6 {
        return None;
    }
    let micros = if fraction.is_empty() { 0 } else { number(fraction)? * 10_i64.pow(6 - fraction.len() as u32) };
    Some(Instant::At(days * DAY + ((h * 60 + m) * 60 + s) * 1_000_000 + micros))
}

fn number(digits: &str) -> Option<i64> {
    if digits.is_empty() || digits.len() > 9 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(write: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        write(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn edges_of_the_calendar_print_as_postgres_does() {
        assert_eq!(of(|o| write_date(0, o)), "2000-01-01");
        assert_eq!(of(|o| write_date(59, o)), "2000-02-29");
        assert_eq!(of(|o| write_date(-730_120, o)), "0001-12-31 BC");
        assert_eq!(of(|o| write_date(i32::MIN, o)), "-infinity");
        assert_eq!(of(|o| write_timestamp(-1, "+00", o)), "1999-12-31 23:59:59.999999+00");
        assert_eq!(of(|o| write_timestamp(1_100_000, "", o)), "2000-01-01 00:00:01.1");
        assert_eq!(of(|o| write_rfc3339(EPOCH_MICROS, "Z", o)), "2000-01-01T00:00:00.000000Z");
    }

    #[test]
    fn text_that_is_no_time_is_an_error() {
        for text in [
            "",
            "2026-11",
            "2026-11-24T00:00:00",
            "2026-11-24 00:00",
            "2026-11-24 00:00:00.1234567",
            "2026-11-24 00:00:00+03",
            "x",
        ] {
            assert!(micros_of_timestamp(Type::Timestamptz, Cell::Text(text.as_bytes())).is_err(), "{text}");
        }
        for text in ["infinity", "0044-03-15 00:00:00 BC", "12026-01-01 00:00:00"] {
            assert_eq!(micros_of_timestamp(Type::Timestamp, Cell::Text(text.as_bytes())), Ok(Some(Instant::Beyond)));
        }
    }

    proptest! {
        #[test]
        fn both_wire_forms_agree(micros in -63_082_281_600_000_000_i64..252_455_615_999_999_999) {
            let text = of(|o| write_timestamp(micros, "+00", o));
            let from_text = micros_of_timestamp(Type::Timestamptz, Cell::Text(text.as_bytes())).unwrap();
            let from_binary = micros_of_timestamp(Type::Timestamptz, Cell::Binary(&micros.to_be_bytes())).unwrap();
            prop_assert_eq!(from_text, from_binary);
            prop_assert_eq!(from_text, Some(Instant::At(micros + EPOCH_MICROS)));
            let json = of(|o| write_rfc3339(micros + EPOCH_MICROS, "Z", o));
            prop_assert_eq!(text_of_rfc3339(&json, "+00"), text);
        }

        #[test]
        fn days_and_calendar_are_inverse(days in -2_000_000_i64..4_000_000) {
            let (y, m, d) = civil(days);
            prop_assert_eq!(days_from_civil(y, i64::from(m), i64::from(d)), days);
        }
    }
}
