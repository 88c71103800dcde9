//! A table in BigQuery → facts, and the form in which its values are compared: that of its columns, which keep no trailing
//! zeros of a decimal and no time that they cannot hold (that stands in `_raw`).

use std::collections::HashMap;

use arrow_schema::{DataType, Field, Schema};
use gcp_bigquery_client::model::field_type::FieldType;
use gcp_bigquery_client::model::table_row::TableRow;

use super::fold::{Fact, Fold};
use super::table::{Form, Table, hash, old_key};
use crate::change::Op;
use crate::error::{Error, Result};
use crate::lsn::{Lsn, Position};
use crate::pgoutput::Cell;
use crate::schema::Type;
use crate::sink::columns::data_type;
use crate::upload::bigquery::{Answer, BigQuery};
use crate::upload::columns::{column_names, table_id};
use crate::value::{self, Converted, Instant, write_json_string};

/// Rows that are asked for at once; the service may give fewer.
const PAGE: usize = 10_000;
/// falaj's own columns, behind those of the table.
const OWN: [&str; 5] = ["_id", "_op", "_old_key", "_unchanged", "_raw"];

/// Appends a value as a column of BigQuery holds it.
pub(super) fn write(ty: Type, cell: Cell<'_>, out: &mut Vec<u8>) -> Converted<()> {
    let mut scratch = Vec::new();
    let text = value::text(ty, cell, &mut scratch)?.unwrap_or_default();
    let held = match data_type(ty) {
        DataType::Boolean => value::boolean(ty, cell)?.map(|b| b.to_string()),
        DataType::Int32 | DataType::Int64 => Some(text.to_owned()),
        DataType::Float32 | DataType::Float64 => value::float(ty, cell)?.map(|x| format!("{x:?}")),
        DataType::Decimal128(precision, scale) => {
            let limit = 10_i128.pow(precision.into());
            let found = value::decimal(ty, cell)?;
            found
                .filter(|d| d.at_scale(scale.unsigned_abs().into()).is_some_and(|n| n.abs() < limit))
                .map(|_| plain_decimal(text))
        }
        DataType::Date32 => value::days_of_date(ty, cell)?.filter(is_held).map(|_| text.to_owned()),
        DataType::Timestamp(..) => value::micros_of_timestamp(ty, cell)?.and_then(|at| match at {
            Instant::At(micros) => Some(micros.to_string()),
            _ => None,
        }),
        _ => return Ok(write_json_string(text, out)),
    };
    Ok(out.extend_from_slice(held.unwrap_or_else(|| raw(text)).as_bytes()))
}

fn is_held(at: &Instant) -> bool {
    matches!(at, Instant::At(_))
}

/// A value that its column cannot hold.
fn raw(text: &str) -> String {
    format!("raw {text}")
}

fn plain_decimal(text: &str) -> String {
    let short = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { text };
    if matches!(short, "-0" | "") { "0".to_owned() } else { short.to_owned() }
}

/// The same form of a value that BigQuery has given as text.
fn found(ty: Type, text: &str) -> Result<String> {
    let strange = || Error::fatal("reading a value of BigQuery", format_args!("{text:?} is no {ty:?}"));
    Ok(match data_type(ty) {
        DataType::Float32 | DataType::Float64 => format!("{:?}", text.parse::<f64>().map_err(|_| strange())?),
        DataType::Decimal128(..) => plain_decimal(text),
        DataType::Boolean | DataType::Int32 | DataType::Int64 | DataType::Date32 | DataType::Timestamp(..) => {
            text.to_owned()
        }
        _ => {
            let mut out = Vec::new();
            write_json_string(text, &mut out);
            String::from_utf8(out).map_err(|_| strange())?
        }
    })
}

/// A table of the data set.
pub(super) struct Warehouse<'a> {
    service: &'a BigQuery,
    table: &'a Table,
    id: String,
    /// What is selected of each column; `None` where the table has none of the name.
    columns: Vec<Option<String>>,
    /// The first position that the stream has not brought; `None` where it has brought nothing.
    pub(super) bound: Option<Position>,
}

impl<'a> Warehouse<'a> {
    /// Looks the table up; `None` when there is none.
    pub(super) async fn open(service: &'a BigQuery, table: &'a Table) -> Result<Option<Self>> {
        let id = table_id(&table.name).map_err(|why| Error::fatal(format_args!("table {}", table.name), why))?;
        let Answer::Is(found) = service.table(&id).await? else { return Ok(None) };
        let highest = service.highest(&id).await?;
        let fields = found.schema.fields.unwrap_or_default();
        let all: Vec<_> = table.columns.iter().map(|(name, _)| Field::new(name, DataType::Utf8, true)).collect();
        let names = column_names(&Schema::new(all)).map_err(|why| Error::fatal("reading from BigQuery", why))?;
        let select = |name: &String| {
            let field = fields.iter().find(|field| field.name.eq_ignore_ascii_case(name))?;
            Some(match field.r#type {
                FieldType::Timestamp => format!("UNIX_MICROS(`{}`)", field.name),
                FieldType::Datetime => format!("UNIX_MICROS(TIMESTAMP(`{}`))", field.name),
                _ => format!("`{}`", field.name),
            })
        };
        let columns = names.iter().map(select).collect();
        let bound = highest.map(|highest| Position { ordinal: highest.ordinal + 1, ..highest });
        Ok(Some(Self { service, table, id, columns, bound }))
    }

    fn name(&self) -> String {
        format!("`{}.{}.{}`", self.service.project, self.service.dataset, self.id)
    }

    /// Folds the table's rows, page by page in the order of their positions. `sees` says whether the snapshot sees a commit.
    ///
    /// # Errors
    /// As every request; [`Error::Fatal`] for a row that is no event.
    pub(super) async fn fold(&self, mut fold: Fold, sees: impl Fn(Lsn) -> bool) -> Result<Fold> {
        let columns = self.columns.iter().map(|column| column.clone().unwrap_or_else(|| "NULL".to_owned()));
        let own = OWN.iter().map(|name| format!("`{name}`"));
        let list: Vec<_> = columns.chain(own).collect();
        let (list, name, mut after) = (list.join(", "), self.name(), String::new());
        loop {
            let sql = format!("SELECT {list} FROM {name} WHERE _id > '{after}' ORDER BY _id LIMIT {PAGE}");
            let rows = self.service.query(sql).await?;
            let Some(last) = rows.last() else { break };
            after = text(last, self.columns.len()).unwrap_or_default();
            for row in &rows {
                self.push(row, &mut fold, &sees)?;
            }
        }
        self.find_doubled(&mut fold).await?;
        Ok(fold)
    }

    fn push(&self, row: &TableRow, fold: &mut Fold, sees: &impl Fn(Lsn) -> bool) -> Result<()> {
        let strange = |why: &dyn std::fmt::Display| Error::fatal(format_args!("reading {}", self.name()), why);
        let own = |n: usize| text(row, self.columns.len() + n);
        let id = own(0).ok_or_else(|| strange(&"a row without _id"))?;
        let at = Position::from_event_id(&id).ok_or_else(|| strange(&format_args!("_id is {id:?}")))?;
        let op = own(1).and_then(|op| Op::from_letter(&op)).ok_or_else(|| strange(&"no known _op"))?;
        if !sees(at.commit_lsn) {
            return Ok(());
        }
        if op == Op::Truncate {
            fold.push(&Fact { at, op, key: "", old_key: None, values: &[] });
            return Ok(());
        }
        let unchanged: Vec<String> = json(own(3)).map_err(|e| strange(&e))?;
        let raws: HashMap<String, String> = json(own(4)).map_err(|e| strange(&e))?;
        let mut texts = Vec::with_capacity(self.columns.len());
        for (i, (name, ty)) in self.table.columns.iter().enumerate() {
            let told = self.columns[i].is_some() && !unchanged.contains(name);
            let value = match (text(row, i), raws.get(name)) {
                (Some(value), _) => found(*ty, &value)?,
                (None, Some(text)) => raw(text),
                (None, None) => "null".to_owned(),
            };
            texts.push(told.then_some(value));
        }
        let Some(key) = self.table.key_text(|i| texts[i].clone()) else {
            fold.unclear += u64::from(!unchanged.is_empty());
            return Ok(());
        };
        let old = own(2).map(|json| old_key(self.table, Form::Warehouse, &json, |i| texts[i].clone()));
        let old = old.transpose()?.flatten();
        let values: Vec<_> = texts.iter().map(|text| text.as_deref().map(hash)).collect();
        fold.push(&Fact { at, op, key: &key, old_key: old.as_deref(), values: &values });
        Ok(())
    }

    /// A page may end between two rows of one id, so that ids are counted by themselves.
    async fn find_doubled(&self, fold: &mut Fold) -> Result<()> {
        let sql = format!("SELECT _id FROM {} GROUP BY _id HAVING COUNT(*) > 1 ORDER BY _id LIMIT {PAGE}", self.name());
        for row in self.service.query(sql).await? {
            let at = text(&row, 0).as_deref().and_then(Position::from_event_id);
            if let Some(at) = at {
                fold.note_doubled(at);
            }
        }
        Ok(())
    }
}

fn text(row: &TableRow, column: usize) -> Option<String> {
    match row.columns.as_ref()?.get(column)?.value.as_ref()? {
        serde_json::Value::String(text) => Some(text.clone()),
        serde_json::Value::Null => None,
        other => Some(other.to_string()),
    }
}

fn json<T: Default + serde::de::DeserializeOwned>(text: Option<String>) -> serde_json::Result<T> {
    text.map_or_else(|| Ok(T::default()), |text| serde_json::from_str(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours(ty: Type, text: &str) -> String {
        let mut out = Vec::new();
        write(ty, Cell::Text(text.as_bytes()), &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn both_sides_write_a_value_alike() {
        let numeric = Type::Numeric(Some((12, 3)));
        for (ty, text, given) in [
            (numeric, "1.100", "1.1"),
            (numeric, "-0.000", "0"),
            (numeric, "100.000", "100"),
            (Type::Float8, "1e+20", "1.0E20"),
            (Type::Float4, "0.1", "0.10000000149011612"),
            (Type::Bool, "t", "true"),
            (Type::Int4, "-7", "-7"),
            (Type::Date, "2024-02-29", "2024-02-29"),
            (Type::Timestamptz, "1970-01-01 00:00:01.5+00", "1500000"),
            (Type::Text, "a\"b", "a\"b"),
            (Type::Jsonb, "{\"a\": 1.10}", "{\"a\": 1.10}"),
        ] {
            assert_eq!(ours(ty, text), found(ty, given).unwrap(), "{ty:?} {text}");
        }
        assert_eq!(ours(numeric, "NaN"), "raw NaN");
        assert_eq!(ours(Type::Timestamptz, "infinity"), "raw infinity");
        assert_eq!(ours(Type::Date, "0044-03-15 BC"), "raw 0044-03-15 BC");
    }
}
