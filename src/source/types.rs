//! User-defined types: the built-in type whose values look the same.
//!
//! A domain looks like its base type, an enum or citext like text, an array of them like an array of those, and an array
//! of composites, ranges or extension types like an array of text. Everything else keeps its oid, and is carried as
//! Postgres's own text.

use std::collections::HashMap;

use tokio_postgres::{Client, Row};

use super::conn::sql_error;
use crate::error::Result;
use crate::schema::{BuiltIn, Column};

const TEXT: u32 = 25;
const TEXT_ARRAY: u32 = 1009;

/// What the stream's Type messages have said: of a domain its base type, as it was when the rows were written. The
/// catalogue knows more of a type, but only of those that are still there.
#[derive(Debug, Default)]
pub struct Told(HashMap<u32, u32>);

impl Told {
    /// Takes a Type message. `namespace` is empty for `pg_catalog`.
    pub fn tell(&mut self, oid: u32, namespace: &str, name: &str) {
        if namespace.is_empty()
            && let Some(base) = BuiltIn::oid_of(name)
        {
            self.0.insert(oid, base);
        }
    }
}

/// Gives the columns of user-defined types the built-in types that their values look like.
///
/// # Errors
/// [`crate::error::Error::Unreachable`] when the connection is lost.
pub async fn resolve(client: &Client, columns: &mut [Column], told: &Told) -> Result<()> {
    let unknown: Vec<u32> = columns.iter().map(|c| c.type_oid).filter(|oid| BuiltIn::of(*oid).is_none()).collect();
    if unknown.is_empty() {
        return Ok(());
    }
    let rows = client.query(ENDS, &[&unknown]).await.map_err(|e| sql_error("reading the catalogue of types", &e))?;
    let alike: HashMap<u32, (u32, i32)> = rows.iter().filter_map(|row| Some((row.get(0), alike(row)?))).collect();
    for column in columns {
        let gone = || told.0.get(&column.type_oid).map(|base| (*base, -1));
        if let Some(found) = alike.get(&column.type_oid).copied().or_else(gone) {
            (column.type_oid, column.type_mod) = found;
        }
    }
    Ok(())
}

/// Where the way ends that leads from each type through domains to their bases, and once from an array to its element.
/// An extension may have its elements stand between something else than commas: such an array is not entered.
const ENDS: &str = "WITH RECURSIVE way (asked, at, mod, in_array, step) AS ( \
        SELECT o, o, -1, false, 0 FROM unnest($1::oid[]) AS o \
    UNION ALL \
        SELECT w.asked, CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.typelem END, \
               CASE t.typtype WHEN 'd' THEN t.typtypmod ELSE -1 END, w.in_array OR t.typtype <> 'd', w.step + 1 \
        FROM way w JOIN pg_catalog.pg_type t ON t.oid = w.at LEFT JOIN pg_catalog.pg_type e ON e.oid = t.typelem \
        WHERE t.typtype = 'd' OR (NOT w.in_array AND e.typarray = t.oid AND e.typdelim = ',')) \
    SELECT DISTINCT ON (w.asked) w.asked, w.at, w.mod, w.in_array, \
           coalesce(t.typtype = 'e' OR (p.prosrc = 'textsend' AND p.prolang = 12), false) \
    FROM way w JOIN pg_catalog.pg_type t ON t.oid = w.at LEFT JOIN pg_catalog.pg_proc p ON p.oid = t.typsend \
    ORDER BY w.asked, w.step DESC";

/// The built-in oid and modifier of a row of [`ENDS`]; `None` for a type unlike all of them.
fn alike(row: &Row) -> Option<(u32, i32)> {
    let (at, type_mod, in_array, is_text): (u32, i32, bool, bool) = (row.get(1), row.get(2), row.get(3), row.get(4));
    let at = if is_text { TEXT } else { at };
    match (in_array, BuiltIn::of(at)) {
        (false, known) => known.map(|_| (at, type_mod)),
        (true, Some(element)) if element.oid == at => Some((element.array, -1)),
        (true, _) => Some((TEXT_ARRAY, -1)),
    }
}
