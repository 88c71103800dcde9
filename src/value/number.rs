//! Floats and numerics: Postgres's digits, and exact decimals.

use std::fmt::LowerExp;
use std::str::FromStr;

use super::{Converted, bad, utf8};
use crate::pgoutput::Cell;
use crate::schema::Type;

/// `float4out`: exponent form from 1e6 on.
pub(super) fn write_float4(x: f32, out: &mut Vec<u8>) {
    if !write_special(f64::from(x), out) {
        lay_out(&shortest(x, 6), 6, out);
    }
}

/// `float8out`: exponent form from 1e15 on.
pub(super) fn write_float8(x: f64, out: &mut Vec<u8>) {
    if !write_special(x, out) {
        lay_out(&shortest(x, 15), 15, out);
    }
}

/// The digits that Postgres writes, as `{:e}` lays them out: the shortest that read back, like Rust's but for ties.
///
/// Where two of that length are as near, Postgres takes the even one. And digits that lie just midway to the next float
/// are too short for it, for the sake of readers that round a tie the wrong way. Either can only be with more digits
/// than a float always keeps (`exact`), of a number that is whole in units of 2⁻²⁵.
fn shortest<T: Float>(x: T, exact: usize) -> String {
    const UNITS: f64 = 33_554_432.0;
    let mut text = format!("{x:e}");
    let mut digits = digits_of(&text);
    if !(digits >= exact || exponent_of(&text) >= exact) || (x.into() * UNITS).fract() != 0.0 {
        return text;
    }
    // With a given number of digits Rust rounds half to even. Below a power of two floats are nearer to each other: there
    // the nearest digits may be another float's.
    let even = format!("{x:.*e}", digits - 1);
    if even.parse().is_ok_and(|y: T| y == x) {
        text = even;
    }
    while is_midway(x, &text) {
        text = format!("{x:.digits$e}");
        digits += 1;
    }
    text
}

trait Float: LowerExp + FromStr + PartialEq + Copy + Into<f64> {}
impl Float for f32 {}
impl Float for f64 {}

fn digits_of(text: &str) -> usize {
    text.bytes().take_while(|b| *b != b'e').filter(u8::is_ascii_digit).count()
}

/// 0 for a negative one.
fn exponent_of(text: &str) -> usize {
    text.split_once('e').and_then(|(_, exponent)| exponent.parse().ok()).unwrap_or(0)
}

/// Whether the slightest bit more, or less, than `text` reads as another float.
fn is_midway<T: Float>(x: T, text: &str) -> bool {
    let Some((mantissa, exponent)) = text.split_once('e') else { return false };
    let mantissa = if mantissa.contains('.') { mantissa.trim_end_matches('0').trim_end_matches('.') } else { mantissa };
    let point = if mantissa.contains('.') { "" } else { "." };
    let (head, last) = mantissa.split_at(mantissa.len().saturating_sub(1));
    let one_less = last.parse::<u8>().unwrap_or(1).saturating_sub(1);
    let more = format!("{mantissa}{point}{:0>50}e{exponent}", 1);
    let less = format!("{head}{one_less}{point}{:9>50}e{exponent}", 9);
    [more, less].iter().any(|text| text.parse::<T>().is_ok_and(|y| y != x))
}

fn write_special(x: f64, out: &mut Vec<u8>) -> bool {
    let text = match x {
        x if x.is_nan() => "NaN",
        f64::INFINITY => "Infinity",
        f64::NEG_INFINITY => "-Infinity",
        _ => return false,
    };
    out.extend_from_slice(text.as_bytes());
    true
}

/// Rust's `{:e}` writes the shortest digits that read back, as Postgres does; only the layout differs.
fn lay_out(shortest: &str, limit: i32, out: &mut Vec<u8>) {
    let (mantissa, exponent) = shortest.split_once('e').unwrap_or((shortest, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let mantissa = match mantissa.strip_prefix('-') {
        Some(rest) => {
            out.push(b'-');
            rest
        }
        None => mantissa,
    };
    if exponent < -4 || exponent >= limit {
        let sign = if exponent < 0 { '-' } else { '+' };
        out.extend_from_slice(format!("{mantissa}e{sign}{:02}", exponent.abs()).as_bytes());
        return;
    }
    place_point(mantissa.replace('.', "").as_bytes(), exponent, out);
}

/// Writes `digits` with the point after digit number `exponent`, counted from 0.
fn place_point(digits: &[u8], exponent: i32, out: &mut Vec<u8>) {
    let Ok(exponent) = usize::try_from(exponent) else {
        out.extend_from_slice(b"0.");
        out.extend(std::iter::repeat_n(b'0', exponent.unsigned_abs() as usize - 1));
        return out.extend_from_slice(digits);
    };
    let whole = exponent + 1;
    if digits.len() <= whole {
        out.extend_from_slice(digits);
        return out.extend(std::iter::repeat_n(b'0', whole - digits.len()));
    }
    out.extend_from_slice(&digits[..whole]);
    out.push(b'.');
    out.extend_from_slice(&digits[whole..]);
}

/// `numeric_send`: ndigits, weight, sign, dscale, then base-10000 digits (numeric.c).
pub(super) fn write_numeric(ty: Type, bytes: &[u8], out: &mut Vec<u8>) -> Converted<()> {
    let Some((head, digits)) = bytes.split_first_chunk::<8>() else { return bad(ty, bytes) };
    let half = |i: usize| u16::from_be_bytes([head[i], head[i + 1]]);
    let (count, weight, sign, scale) = (usize::from(half(0)), i32::from(half(2) as i16), half(4), usize::from(half(6)));
    match sign {
        0 => {}
        0x4000 => out.push(b'-'),
        0xC000 => return push(out, "NaN"),
        0xD000 => return push(out, "Infinity"),
        0xF000 => return push(out, "-Infinity"),
        _ => return bad(ty, bytes),
    }
    if digits.len() != 2 * count {
        return bad(ty, bytes);
    }
    // Groups outside the sent ones are zero: leading ones of a small fraction, trailing ones of a round number.
    let group = |i: i32| match usize::try_from(i).ok().and_then(|i| digits.get(2 * i..2 * i + 2)) {
        Some(pair) => u16::from_be_bytes([pair[0], pair[1]]),
        None => 0,
    };
    out.extend_from_slice(itoa::Buffer::new().format(if weight < 0 { 0 } else { group(0) }).as_bytes());
    for i in 1..=weight {
        out.extend_from_slice(&four(group(i)));
    }
    if scale > 0 {
        out.push(b'.');
        for (i, at) in (weight + 1..).zip((0..scale).step_by(4)) {
            out.extend_from_slice(&four(group(i))[..(scale - at).min(4)]);
        }
    }
    Ok(())
}

fn push(out: &mut Vec<u8>, text: &str) -> Converted<()> {
    out.extend_from_slice(text.as_bytes());
    Ok(())
}

fn four(group: u16) -> [u8; 4] {
    let digit = |n: u16| b'0' + (n % 10) as u8;
    [digit(group / 1000), digit(group / 100), digit(group / 10), digit(group)]
}

/// An exact decimal: `unscaled × 10^-scale`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decimal {
    /// All digits as one integer.
    pub unscaled: i128,
    /// Digits after the point.
    pub scale: u32,
}

impl Decimal {
    /// Parses a decimal number as Postgres prints it, exponent form of floats included.
    /// `None` for NaN, infinities, and numbers of more than 38 digits.
    pub fn parse(text: &str) -> Option<Self> {
        let (digits, exponent) = match text.split_once(['e', 'E']) {
            Some((digits, exponent)) => (digits, exponent.parse::<i32>().ok()?),
            None => (text, 0),
        };
        let (negative, digits) = digits.strip_prefix('-').map_or((false, digits), |d| (true, d));
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let mut unscaled = 0_i128;
        for byte in whole.bytes().chain(fraction.bytes()) {
            let digit = char::from(byte).to_digit(10)?;
            unscaled = unscaled.checked_mul(10)?.checked_add(digit.into())?;
        }
        let scale = i32::try_from(fraction.len()).ok()?.checked_sub(exponent)?;
        let unscaled = if negative { -unscaled } else { unscaled };
        match u32::try_from(scale) {
            Ok(scale) => Some(Self { unscaled, scale }),
            Err(_) => {
                Some(Self { unscaled: unscaled.checked_mul(10_i128.checked_pow(scale.unsigned_abs())?)?, scale: 0 })
            }
        }
    }

    /// The unscaled integer at another scale; `None` when digits would be lost or do not fit.
    pub fn at_scale(self, scale: u32) -> Option<i128> {
        match scale.checked_sub(self.scale) {
            Some(more) => self.unscaled.checked_mul(10_i128.checked_pow(more)?),
            None => {
                let power = 10_i128.checked_pow(self.scale - scale)?;
                (self.unscaled % power == 0).then_some(self.unscaled / power)
            }
        }
    }

    /// Quotient rounded half away from zero to `scale` digits, as `round(a::numeric / b, scale)` does.
    /// `None` when `divisor` is zero or negative, or when it does not fit 38 digits.
    pub fn divide(self, divisor: Self, scale: u32) -> Option<Self> {
        if divisor.unscaled <= 0 {
            return None;
        }
        // a·10^-s ÷ b·10^-t at scale r = (a · 10^(t+r)) ÷ (b · 10^s)
        let (more, less) = (divisor.scale.checked_add(scale)?, self.scale);
        if let Some(short) = short_quotient((self.unscaled, more), (divisor.unscaled, less)) {
            return Some(Self { unscaled: short.into(), scale });
        }
        let numerator = self.unscaled.checked_mul(10_i128.checked_pow(more)?)?;
        let denominator = divisor.unscaled.checked_mul(10_i128.checked_pow(less)?)?;
        let (quotient, rest) = (numerator / denominator, numerator % denominator);
        let away = if rest.unsigned_abs() >= denominator.unsigned_abs().div_ceil(2) { numerator.signum() } else { 0 };
        Some(Self { unscaled: quotient + away, scale })
    }

    /// Appends it as Postgres prints a numeric of this scale.
    pub fn write(self, out: &mut Vec<u8>) {
        if self.unscaled < 0 {
            out.push(b'-');
        }
        let mut buffer = itoa::Buffer::new();
        let digits = match u64::try_from(self.unscaled.unsigned_abs()) {
            Ok(short) => buffer.format(short),
            Err(_) => buffer.format(self.unscaled.unsigned_abs()),
        };
        place_point_at_scale(digits.as_bytes(), self.scale as usize, out);
    }
}

/// The rounded quotient of two numbers, each with the power of ten that it is multiplied by; `None` where 64 bits do not do. 128 bits
/// are slow to multiply and to divide, and nearly all numbers have fewer. The divisor is positive.
fn short_quotient(dividend: (i128, u32), divisor: (i128, u32)) -> Option<i64> {
    let wide = |(unscaled, power): (i128, u32)| i64::try_from(unscaled).ok()?.checked_mul(10_i64.checked_pow(power)?);
    let (dividend, divisor) = (wide(dividend)?, wide(divisor)?);
    let (quotient, rest) = (dividend / divisor, dividend % divisor);
    let away = if rest.unsigned_abs() >= divisor.unsigned_abs().div_ceil(2) { dividend.signum() } else { 0 };
    Some(quotient + away)
}

fn place_point_at_scale(digits: &[u8], scale: usize, out: &mut Vec<u8>) {
    let whole = digits.len().saturating_sub(scale);
    out.extend_from_slice(if whole == 0 { b"0" } else { &digits[..whole] });
    if scale > 0 {
        out.push(b'.');
        out.extend(std::iter::repeat_n(b'0', scale.saturating_sub(digits.len())));
        out.extend_from_slice(&digits[whole..]);
    }
}

/// A number cell as an exact decimal; `None` for NULL, NaN, infinities, and numbers of more than 38 digits.
///
/// # Errors
/// [`super::BadValue`] when the cell is no number.
pub fn decimal(ty: Type, cell: Cell<'_>) -> Converted<Option<Decimal>> {
    if matches!(ty, Type::Int2 | Type::Int4 | Type::Int8) {
        return Ok(super::int(ty, cell)?.map(|n| Decimal { unscaled: n.into(), scale: 0 }));
    }
    let mut buffer = Vec::new();
    let text = match cell {
        Cell::Text(text) => utf8(ty, text)?,
        cell => {
            if !super::write_text(ty, cell, &mut buffer)? {
                return Ok(None);
            }
            utf8(ty, &buffer)?
        }
    };
    Ok(Decimal::parse(text))
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
    fn floats_print_as_postgres_15_does() {
        for (x, text) in [
            (0.0, "0"),
            (-0.0, "-0"),
            (1.5, "1.5"),
            (100.0, "100"),
            (1e14, "100000000000000"),
            (1e15, "1e+15"),
            (1.25e20, "1.25e+20"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (5e-324, "5e-324"),
            (f64::MAX, "1.7976931348623157e+308"),
            (123456.789, "123456.789"),
            (1e23, "9.999999999999999e+22"),
            (18_014_398_509_481_992.0, "1.8014398509481992e+16"),
            (562_949_953_421_312.0 + 0.25, "562949953421312.2"),
            (2.0_f64.powi(-25), "2.9802322387695312e-08"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
        ] {
            assert_eq!(of(|o| write_float8(x, o)), text);
        }
        assert_eq!(of(|o| write_float4(0.1, o)), "0.1");
        assert_eq!(of(|o| write_float4(1e6, o)), "1e+06");
        assert_eq!(of(|o| write_float4(117_760_704.0, o)), "1.17760704e+08");
        assert_eq!(of(|o| write_float4(999_999.0, o)), "999999");
    }

    fn numeric(weight: i16, sign: u16, scale: u16, digits: &[u16]) -> String {
        let mut bytes = Vec::new();
        for half in [digits.len() as u16, weight as u16, sign, scale].into_iter().chain(digits.iter().copied()) {
            bytes.extend(half.to_be_bytes());
        }
        of(|o| write_numeric(Type::Numeric(None), &bytes, o).unwrap())
    }

    #[test]
    fn binary_numerics_keep_every_digit_and_their_scale() {
        assert_eq!(numeric(0, 0, 2, &[1, 1000]), "1.10");
        assert_eq!(numeric(1, 0x4000, 0, &[12, 3456]), "-123456");
        assert_eq!(numeric(2, 0, 0, &[5]), "500000000");
        assert_eq!(numeric(-2, 0, 7, &[1230]), "0.0000123");
        assert_eq!(numeric(-1, 0, 4, &[1]), "0.0001");
        assert_eq!(numeric(0, 0, 3, &[]), "0.000");
        assert_eq!(numeric(0, 0xC000, 0, &[]), "NaN");
        assert_eq!(numeric(0, 0xD000, 32, &[]), "Infinity");
    }

    #[test]
    fn division_rounds_half_away_from_zero_like_sql() {
        let divide =
            |a: &str, b: &str, scale| Decimal::parse(a)?.divide(Decimal::parse(b)?, scale).map(|d| of(|o| d.write(o)));
        assert_eq!(divide("900", "1000", 3).as_deref(), Some("0.900"));
        assert_eq!(divide("1.5", "100", 2).as_deref(), Some("0.02"));
        assert_eq!(divide("-1.5", "100", 2).as_deref(), Some("-0.02"));
        assert_eq!(divide("1", "3", 2).as_deref(), Some("0.33"));
        assert_eq!(divide("-1", "1000", 3).as_deref(), Some("-0.001"));
        assert_eq!(divide("-1", "1000000", 3).as_deref(), Some("0.000"));
        assert_eq!((divide("1", "0", 2), divide("1", "-5", 2), divide("NaN", "5", 2)), (None, None, None));
        assert_eq!(divide("99999999999999999999999999999999999999", "0.01", 2), None);
    }

    proptest! {
        /// Scaled up by 2^65 both ways, so that 64 bits do not do.
        #[test]
        fn a_short_division_is_a_long_one(a: i32, b in 1..i32::MAX, s in 0..4_u32, t in 0..4_u32, r in 0..4_u32) {
            let long = 1_i128 << 65;
            let of = |unscaled: i32, scale, times: i128| Decimal { unscaled: i128::from(unscaled) * times, scale };
            prop_assert_eq!(of(a, s, 1).divide(of(b, t, 1), r), of(a, s, long).divide(of(b, t, long), r));
        }

        #[test]
        fn decimals_read_back(unscaled in any::<i64>(), scale in 0..12_u32) {
            let d = Decimal { unscaled: unscaled.into(), scale };
            prop_assert_eq!(Decimal::parse(&of(|o| d.write(o))), Some(d));
        }

        #[test]
        fn shortest_floats_read_back(bits: u64) {
            let x = f64::from_bits(bits);
            prop_assume!(x.is_finite());
            prop_assert_eq!(of(|o| write_float8(x, o)).parse::<f64>().unwrap().to_bits(), bits);
        }
    }
}
