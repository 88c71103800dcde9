//! Derived columns: exact quotients of columns, NULL in → NULL out.

use smallvec::SmallVec;

use crate::config;
use crate::error::{Error, Result};
use crate::event::OutColumn;
use crate::pgoutput::Cell;
use crate::schema::Type;
use crate::value::{Converted, Decimal, decimal};

/// One derived column of a layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Derivation {
    dividend: Operand,
    divisor: Operand,
    scale: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operand {
    Constant(i64),
    /// Index among the source and lookup columns.
    Column(usize),
    /// Index among the derived columns before this one.
    Derived(usize),
}

/// The derived columns' type: every quotient of 29 whole digits fits (BigQuery's NUMERIC has as many).
fn quotient(scale: u32) -> Type {
    let scale = scale.min(9) as u8;
    Type::Numeric(Some((29 + scale, scale as i8)))
}

/// Resolves operands against the columns so far and appends the derived columns.
///
/// # Errors
/// [`Error::Refused`] for an operand that does not exist or is no number, and for a scale above 9.
pub fn plan(table: &str, wanted: &[config::Derive], columns: &mut Vec<OutColumn>) -> Result<Vec<Derivation>> {
    let base = columns.len();
    let mut plans = Vec::new();
    for derive in wanted {
        let refused = |found: String| {
            Error::refused(
                "derive",
                format!("table {table}, derived column {}: {found}", derive.name),
                "integers and number columns, and a scale of at most 9",
                "mend [[table.derive]], or the table",
            )
        };
        if derive.scale > 9 {
            return Err(refused(format!("scale = {}", derive.scale)));
        }
        let operand = |operand: &config::Operand| match operand {
            config::Operand::Number(n) => Ok(Operand::Constant(*n)),
            config::Operand::Column(name) => match columns.iter().position(|c| c.name == *name) {
                None => Err(refused(format!("there is no column \"{name}\""))),
                Some(at) if !is_number(columns[at].ty) => Err(refused(format!("\"{name}\" is {:?}", columns[at].ty))),
                Some(at) if at >= base => Ok(Operand::Derived(at - base)),
                Some(at) => Ok(Operand::Column(at)),
            },
        };
        let [dividend, divisor] = &derive.divide;
        plans.push(Derivation { dividend: operand(dividend)?, divisor: operand(divisor)?, scale: derive.scale });
        columns.push(OutColumn::new(&derive.name, quotient(derive.scale)));
    }
    Ok(plans)
}

fn is_number(ty: Type) -> bool {
    matches!(ty, Type::Int2 | Type::Int4 | Type::Int8 | Type::Float4 | Type::Float8 | Type::Numeric(_))
}

/// Quotients of one row, in order; `cells` are its source and lookup columns.
///
/// # Errors
/// [`crate::value::BadValue`] when a cell is not of its column's type.
pub fn quotients(
    plans: &[Derivation],
    columns: &[OutColumn],
    cells: &[Cell<'_>],
) -> Converted<SmallVec<[Option<Decimal>; 4]>> {
    let mut done: SmallVec<[Option<Decimal>; 4]> = SmallVec::new();
    for plan in plans {
        let value = |operand| match operand {
            Operand::Constant(n) => Ok(Some(Decimal { unscaled: n.into(), scale: 0 })),
            Operand::Column(at) => decimal(columns[at].ty, cells[at]),
            Operand::Derived(at) => Ok(done[at]),
        };
        let quotient = match (value(plan.dividend)?, value(plan.divisor)?) {
            (Some(a), Some(b)) => a.divide(b, plan.scale),
            _ => None,
        };
        done.push(quotient);
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn columns() -> Vec<OutColumn> {
        [("duration_ms", Type::Int4), ("length_seconds", Type::Int4), ("title", Type::Text)]
            .map(|(n, t)| OutColumn::new(n, t))
            .to_vec()
    }

    fn text(d: Option<Decimal>) -> Option<String> {
        d.map(|d| {
            let mut out = Vec::new();
            d.write(&mut out);
            String::from_utf8(out).unwrap()
        })
    }

    #[test]
    fn the_default_columns_follow_sql() {
        let wanted = Config::defaults().unwrap().tables[0].derive.clone();
        let mut all = columns();
        let plans = plan("t", &wanted, &mut all).unwrap();
        let pair = |ms: &str, length: Option<&str>| {
            let cells =
                [Cell::Text(ms.as_bytes()), length.map_or(Cell::Null, |l| Cell::Text(l.as_bytes())), Cell::Null];
            let got = quotients(&plans, &all, &cells).unwrap();
            (text(got[0]), text(got[1]))
        };
        let some = |s: &str| Some(s.to_owned());
        assert_eq!(pair("900", Some("60")), (some("0.900"), some("0.02")));
        assert_eq!(pair("90000", Some("60")), (some("90.000"), some("1.50")));
        assert_eq!(pair("-300", Some("60")), (some("-0.300"), some("-0.01")));
        assert_eq!(pair("900", None), (some("0.900"), None));
        assert_eq!(pair("900", Some("0")), (some("0.900"), None));
        assert_eq!(pair("900", Some("-60")), (some("0.900"), None));
        let null = quotients(&plans, &all, &[Cell::Null, Cell::Text(b"60"), Cell::Null]).unwrap();
        assert_eq!((null[0], null[1]), (None, None));
    }

    #[test]
    fn an_operand_that_is_missing_or_no_number_is_refused() {
        for operand in ["nowhere", "title"] {
            let wanted = config::Derive {
                name: "x".into(),
                divide: [config::Operand::Column(operand.into()), config::Operand::Number(1)],
                scale: 2,
            };
            assert_eq!(plan("t", &[wanted], &mut columns()).unwrap_err().exit_code(), 78);
        }
    }
}
