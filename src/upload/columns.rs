//! From Parquet columns and Postgres names to what BigQuery takes: field types, column and table names, the view.

use arrow_schema::{DataType, Field, Schema, TimeUnit};
use gcp_bigquery_client::model::field_type::FieldType;
use gcp_bigquery_client::model::table::Table;
use gcp_bigquery_client::model::table_field_schema::TableFieldSchema;
use gcp_bigquery_client::model::table_reference::TableReference;

/// Longest name of a BigQuery column, in characters.
const COLUMN_CHARS: usize = 300;
/// Longest name of a BigQuery table, in bytes.
const TABLE_BYTES: usize = 1024;
/// A table can be clustered by this many columns.
const CLUSTERING: usize = 4;
/// Suffix of the view with the latest row of each key.
const VIEW: &str = "_latest";

/// The BigQuery fields of a Parquet schema, in its order, all of them nullable.
///
/// # Errors
/// The column and its type, when BigQuery has no type that holds all of its values.
pub fn fields(schema: &Schema) -> Result<Vec<TableFieldSchema>, String> {
    let names = column_names(schema)?;
    schema.fields().iter().zip(&names).map(|(field, name)| bigquery_field(field, name)).collect()
}

fn bigquery_field(field: &Field, name: &str) -> Result<TableFieldSchema, String> {
    let (data_type, mode) = match field.data_type() {
        DataType::List(item) | DataType::LargeList(item) => (item.data_type(), "REPEATED"),
        other => (other, "NULLABLE"),
    };
    let kind =
        field_type(data_type).ok_or_else(|| format!("column {name:?} is {data_type}, which BigQuery cannot hold"))?;
    Ok(TableFieldSchema { mode: Some(mode.into()), ..TableFieldSchema::new(name, kind) })
}

fn field_type(data_type: &DataType) -> Option<FieldType> {
    Some(match data_type {
        DataType::Boolean => FieldType::Boolean,
        DataType::Int8 | DataType::Int16 | DataType::Int32 | DataType::Int64 => FieldType::Integer,
        DataType::UInt8 | DataType::UInt16 | DataType::UInt32 => FieldType::Integer,
        DataType::Float16 | DataType::Float32 | DataType::Float64 => FieldType::Float,
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => FieldType::String,
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView | DataType::FixedSizeBinary(_) => {
            FieldType::Bytes
        }
        DataType::Date32 | DataType::Date64 => FieldType::Date,
        DataType::Time32(_) | DataType::Time64(_) => FieldType::Time,
        DataType::Timestamp(_, Some(_)) => FieldType::Timestamp,
        DataType::Timestamp(_, None) => FieldType::Datetime,
        DataType::Decimal32(p, s)
        | DataType::Decimal64(p, s)
        | DataType::Decimal128(p, s)
        | DataType::Decimal256(p, s) => decimal(*p, *s)?,
        _ => return None,
    })
}

/// NUMERIC holds 29 digits before the point and 9 after it, BIGNUMERIC 38 and 38.
fn decimal(precision: u8, scale: i8) -> Option<FieldType> {
    let scale = u8::try_from(scale).ok()?;
    match (precision.saturating_sub(scale), scale) {
        (whole, 0..=9) if whole <= 29 => Some(FieldType::Numeric),
        (whole, 0..=38) if whole <= 38 => Some(FieldType::Bignumeric),
        _ => None,
    }
}

/// The Arrow type of an all-NULL column for a field that the table has and a file lacks.
pub fn null_type(kind: &FieldType) -> Option<DataType> {
    Some(match kind {
        FieldType::String => DataType::Utf8,
        FieldType::Bytes => DataType::Binary,
        FieldType::Integer | FieldType::Int64 => DataType::Int64,
        FieldType::Float | FieldType::Float64 => DataType::Float64,
        FieldType::Numeric => DataType::Decimal128(38, 9),
        FieldType::Bignumeric => DataType::Decimal128(38, 18),
        FieldType::Boolean | FieldType::Bool => DataType::Boolean,
        FieldType::Timestamp => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        FieldType::Datetime => DataType::Timestamp(TimeUnit::Microsecond, None),
        FieldType::Date => DataType::Date32,
        FieldType::Time => DataType::Time64(TimeUnit::Microsecond),
        _ => return None,
    })
}

/// A column that a table cannot take, and the SQL that lets loading go on.
#[derive(Debug, PartialEq, Eq)]
pub struct Clash {
    /// What is wrong.
    pub found: String,
    /// What to run.
    pub sql: String,
    /// The table is out of the way then, and a new one is needed.
    pub anew: bool,
}

/// The columns of a job: the file's, as the table knows them, then those that only the table has and that Parquet can bring
/// as NULL (JSON, say, cannot be loaded from Parquet: a job without such a column leaves it NULL as well). `clustered` are the
/// columns by which the table (`project.dataset.table`) is clustered.
///
/// # Errors
/// A column whose type in the table is another one.
pub fn unite(
    file: Vec<TableFieldSchema>,
    known: Vec<TableFieldSchema>,
    table: &str,
    clustered: &[String],
) -> Result<Vec<TableFieldSchema>, Clash> {
    let mut rest = known;
    let mut all = Vec::new();
    for field in file {
        let Some(at) = rest.iter().position(|f| f.name.to_lowercase() == field.name.to_lowercase()) else {
            all.push(field);
            continue;
        };
        if !same_type(&field, &rest[at]) {
            let taken = |name: &str| all.iter().chain(&rest).any(|f| f.name.to_lowercase() == name.to_lowercase());
            return Err(clash(&field, &rest[at], table, clustered, taken));
        }
        all.push(rest.remove(at));
    }
    all.extend(rest.into_iter().filter(|f| f.mode.as_deref() != Some("REPEATED") && null_type(&f.r#type).is_some()));
    Ok(all)
}

/// Names of the columns that a table requires and that the stream may bring as NULL, or does not know any more.
pub fn too_strict(schema: &Schema, known: &[TableFieldSchema]) -> Vec<String> {
    let held = |name: &str| {
        let names = column_names(schema).unwrap_or_default();
        let at = names.iter().position(|n| n.to_lowercase() == name.to_lowercase());
        at.is_some_and(|at| !schema.field(at).is_nullable())
    };
    let required = known.iter().filter(|f| f.mode.as_deref() == Some("REQUIRED"));
    required.filter(|f| !held(&f.name)).map(|f| f.name.clone()).collect()
}

/// A type is widened in place where BigQuery can do that; else what has been loaded keeps its type under another name, and
/// the new type begins with an empty column, or, where a column cannot be renamed, with an empty table.
fn clash(
    file: &TableFieldSchema,
    known: &TableFieldSchema,
    table: &str,
    clustered: &[String],
    taken: impl Fn(&str) -> bool,
) -> Clash {
    let (name, was, is) = (&known.name, sql_type(known), sql_type(file));
    let found = format!("column {name:?} is {is} now, and {was} in the table");
    let free =
        |old: String| (1..).map(|n| if n == 1 { old.clone() } else { format!("{old}{n}") }).find(|name| !taken(name));
    let sql = if widens(&was, &is) {
        format!("ALTER TABLE `{table}` ALTER COLUMN `{name}` SET DATA TYPE {is};")
    } else if clustered.contains(name) {
        let bare = table.rsplit('.').next().unwrap_or(table);
        let sql = format!("ALTER TABLE `{table}` RENAME TO `{bare}_{}`;", was.to_lowercase());
        return Clash { found, sql, anew: true };
    } else {
        let old = free(format!("{name}_{}", was.to_lowercase())).unwrap_or_default();
        format!("ALTER TABLE `{table}` RENAME COLUMN `{name}` TO `{old}`;")
    };
    Clash { found, sql, anew: false }
}

/// What `ALTER COLUMN SET DATA TYPE` allows, of the types that falaj makes.
fn widens(was: &str, is: &str) -> bool {
    matches!(
        (was, is),
        ("INT64", "NUMERIC" | "BIGNUMERIC" | "FLOAT64")
            | ("NUMERIC", "BIGNUMERIC" | "FLOAT64")
            | ("BIGNUMERIC", "FLOAT64")
    )
}

/// BigQuery's names of some of a schema's columns; empty when one of them is not there.
pub fn names_in(some: &[String], schema: &Schema) -> Vec<String> {
    let Ok(names) = column_names(schema) else { return Vec::new() };
    let name = |c: &String| schema.index_of(c).ok().map(|at| names[at].clone());
    some.iter().map(name).collect::<Option<Vec<_>>>().unwrap_or_default()
}

/// What a table is clustered by: the first key columns of types that BigQuery can cluster.
pub fn clustering(key: &[String], schema: &Schema, fields: &[TableFieldSchema]) -> Vec<String> {
    let sortable = |f: &TableFieldSchema| !matches!(f.r#type, FieldType::Float | FieldType::Bytes | FieldType::Time);
    let single =
        |name: &String| fields.iter().any(|f| f.name == *name && f.mode.as_deref() != Some("REPEATED") && sortable(f));
    names_in(key, schema).into_iter().filter(single).take(CLUSTERING).collect()
}

/// SQL that makes a table as falaj does.
pub fn create_sql(table: &Table) -> String {
    let TableReference { project_id, dataset_id, table_id } = &table.table_reference;
    let columns = table.schema.fields.iter().flatten();
    let columns: Vec<_> = columns.map(|f| format!("`{}` {}", f.name, sql_type(f))).collect();
    let mut sql = format!("CREATE TABLE `{project_id}.{dataset_id}.{table_id}` ({})", columns.join(", "));
    if let Some(field) = table.time_partitioning.as_ref().and_then(|p| p.field.as_ref()) {
        sql.push_str(&format!(" PARTITION BY DATE(`{field}`)"));
    }
    if let Some(fields) = table.clustering.as_ref().and_then(|c| c.fields.as_ref()) {
        let fields: Vec<_> = fields.iter().map(|f| format!("`{f}`")).collect();
        sql.push_str(&format!(" CLUSTER BY {}", fields.join(", ")));
    }
    let labels: Vec<_> =
        table.labels.iter().flatten().map(|(key, value)| format!("(\"{key}\", \"{value}\")")).collect();
    sql + &format!(" OPTIONS(labels=[{}]);", labels.join(", "))
}

/// Whether two fields hold the same type under BigQuery's two spellings of it.
fn same_type(a: &TableFieldSchema, b: &TableFieldSchema) -> bool {
    sql_type(a) == sql_type(b)
}

/// The type as SQL spells it.
fn sql_type(field: &TableFieldSchema) -> String {
    let word = match field.r#type {
        FieldType::Integer => "INT64".to_owned(),
        FieldType::Float => "FLOAT64".to_owned(),
        FieldType::Boolean => "BOOL".to_owned(),
        ref other => format!("{other:?}").to_uppercase(),
    };
    if field.mode.as_deref() == Some("REPEATED") { format!("ARRAY<{word}>") } else { word }
}

/// Column names as BigQuery takes them, in the schema's order: what it forbids becomes `_`.
///
/// # Errors
/// Two columns that would get one name (BigQuery compares without regard to case), and reserved names.
pub fn column_names(schema: &Schema) -> Result<Vec<String>, String> {
    let mut seen = std::collections::BTreeMap::new();
    schema
        .fields()
        .iter()
        .map(|field| {
            let name = column_name(field.name())?;
            match seen.insert(name.to_lowercase(), field.name()) {
                Some(other) => {
                    Err(format!("columns {other:?} and {:?} are one name to BigQuery, {name:?}", field.name()))
                }
                None => Ok(name),
            }
        })
        .collect()
}

fn column_name(name: &str) -> Result<String, String> {
    let reserved = ["_table_", "_file_", "_partition", "_row_timestamp", "__root__", "_colidentifier"];
    let mapped = map_chars(name, |c| {
        c.is_alphanumeric() || matches!(c, '_' | '-' | ' ' | '&' | '%' | '=' | '+' | ':' | '\'' | '<' | '>' | '#')
    });
    let lower = mapped.to_lowercase();
    if let Some(prefix) = reserved.iter().find(|r| lower.starts_with(**r)) {
        return Err(format!("column {name:?} begins with {prefix:?}, which BigQuery reserves"));
    }
    if mapped.is_empty() || mapped.chars().count() > COLUMN_CHARS {
        return Err(format!(
            "column {name:?} has {} characters; BigQuery takes 1 to {COLUMN_CHARS}",
            mapped.chars().count()
        ));
    }
    Ok(mapped)
}

/// Whether every name is plain letters, digits and `_`; others need BigQuery's flexible column names.
pub fn all_plain(fields: &[TableFieldSchema]) -> bool {
    fields.iter().all(|f| f.name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'))
}

/// The BigQuery table of a source table: its name, with `_` for what BigQuery forbids (also for the dot of `schema.table`).
pub fn table_id(table: &str) -> Result<String, String> {
    let id = map_chars(table, |c| c.is_alphanumeric() || matches!(c, '_' | '-' | ' '));
    match id.len() {
        1..=TABLE_BYTES => Ok(id),
        n => Err(format!("its name has {n} bytes; BigQuery takes 1 to {TABLE_BYTES}")),
    }
}

/// The view beside [`table_id`].
pub fn view_id(table_id: &str) -> String {
    format!("{table_id}{VIEW}")
}

fn map_chars(name: &str, allowed: impl Fn(char) -> bool) -> String {
    name.chars().map(|c| if allowed(c) { c } else { '_' }).collect()
}

/// The view's query: of each primary key the row with the highest position, unless that is a delete or a truncate came after it.
///
/// An unchanged TOAST column has the value of the last row that carries it, and a key that was changed into another one is
/// gone. Rows from before the key had one of its columns have none of these keys. `table` is `project.dataset.table`,
/// `primary_key` has the names of each key column in Postgres and in BigQuery, `fields` are the table's columns; `_id` sorts as
/// the position.
pub fn view_query(table: &str, primary_key: &[(String, String)], fields: &[TableFieldSchema]) -> String {
    let key: Vec<String> = primary_key.iter().map(|(_, name)| format!("`{name}`")).collect();
    let newest_first = format!("PARTITION BY {} ORDER BY _id DESC", key.join(", "));
    let carried = |f: &TableFieldSchema| {
        let (name, text) = (&f.name, serde_json::Value::from(f.name.as_str()));
        format!(
            "(FIRST_VALUE(IF({text} IN UNNEST(JSON_VALUE_ARRAY(_unchanged)), NULL, STRUCT(`{name}` AS v)) IGNORE NULLS) \
             OVER ({newest_first} ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING)).v AS `{name}`"
        )
    };
    let toasted: Vec<String> = fields.iter().filter(|f| can_be_toasted(f, primary_key)).map(carried).collect();
    let replace =
        if toasted.is_empty() { String::new() } else { format!(" REPLACE (\n  {}\n)", toasted.join(",\n  ")) };
    let (moved, stayed) = match fields.iter().any(|f| f.name == "_old_key") {
        true => (moved_keys(table, primary_key), " AND (_falaj_moved IS NULL OR _id > _falaj_moved)"),
        false => (String::new(), ""),
    };
    let keyed: String = key.iter().map(|c| format!(" AND source.{c} IS NOT NULL")).collect();
    format!(
        "SELECT source.*{replace} FROM `{table}` AS source{moved}\n\
         WHERE _op != 't'{stayed}{keyed} AND _id > (SELECT COALESCE(MAX(_id), '') FROM `{table}` WHERE _op = 't')\n\
         QUALIFY ROW_NUMBER() OVER ({newest_first}) = 1 AND _op != 'd'"
    )
}

/// Joins each key with the last update that changed it into another one: what came before is no row of that key any more.
///
/// `_old_key` is written with the names that the columns have in Postgres.
fn moved_keys(table: &str, primary_key: &[(String, String)]) -> String {
    let mut old = String::new();
    let mut same = Vec::new();
    for (n, (source, name)) in primary_key.iter().enumerate() {
        let path = serde_json::Value::from(format!("$.\"{source}\""));
        old += &format!("JSON_VALUE(_old_key, {path}) AS _falaj_key{n}, ");
        same.push(format!("CAST(source.`{name}` AS STRING) = _falaj_key{n}"));
    }
    let group: Vec<String> = (0..primary_key.len()).map(|n| format!("_falaj_key{n}")).collect();
    format!(
        "\nLEFT JOIN (SELECT {old}MAX(_id) AS _falaj_moved FROM `{table}` WHERE _old_key IS NOT NULL GROUP BY {})\n\
         ON {}",
        group.join(", "),
        same.join(" AND ")
    )
}

/// Postgres moves values of variable length out of the row, and then leaves them out of an update that does not touch them.
fn can_be_toasted(field: &TableFieldSchema, primary_key: &[(String, String)]) -> bool {
    let variable =
        matches!(field.r#type, FieldType::String | FieldType::Bytes | FieldType::Numeric | FieldType::Bignumeric);
    variable && !field.name.starts_with('_') && !primary_key.iter().any(|(_, name)| *name == field.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema(fields: &[(&str, DataType)]) -> Schema {
        Schema::new(fields.iter().map(|(n, t)| Field::new(*n, t.clone(), true)).collect::<Vec<_>>())
    }

    #[test]
    fn each_type_gets_the_bigquery_type_that_holds_all_of_it() {
        let utc = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
        let local = DataType::Timestamp(TimeUnit::Microsecond, None);
        let got: Vec<String> = fields(&schema(&[
            ("a", DataType::Int64),
            ("b", DataType::Int32),
            ("c", DataType::Decimal128(38, 9)),
            ("d", DataType::Decimal128(38, 10)),
            ("e", DataType::Decimal128(38, 0)),
            ("f", utc),
            ("g", local),
            ("h", DataType::Date32),
            ("i", DataType::Boolean),
            ("j", DataType::Float64),
            ("k", DataType::Utf8),
            ("l", DataType::Binary),
        ]))
        .unwrap()
        .iter()
        .map(|f| serde_json::to_value(&f.r#type).unwrap().as_str().unwrap().to_owned())
        .collect();
        assert_eq!(
            got,
            [
                "INTEGER",
                "INTEGER",
                "NUMERIC",
                "BIGNUMERIC",
                "BIGNUMERIC",
                "TIMESTAMP",
                "DATETIME",
                "DATE",
                "BOOLEAN",
                "FLOAT",
                "STRING",
                "BYTES"
            ]
        );
        assert_eq!(
            fields(&schema(&[("n", DataType::UInt64)])).unwrap_err(),
            "column \"n\" is UInt64, which BigQuery cannot hold"
        );
        assert!(fields(&schema(&[("n", DataType::Decimal256(76, 0))])).is_err());
    }

    #[test]
    fn a_type_that_the_table_cannot_take_is_told_with_the_sql_that_lets_it() {
        use FieldType::{Date, Int64, Integer, Json, Numeric, String};
        let field = |name: &str, kind, mode: &str| TableFieldSchema {
            mode: Some(mode.into()),
            ..TableFieldSchema::new(name, kind)
        };
        let plain = |name: &str, kind| field(name, kind, "NULLABLE");
        let unite = |file, known| unite(vec![file], known, "p.d.t", &["key".to_owned()]);
        let numbered = vec![plain("N", Int64), plain("n_int64", String)];
        for (file, known, sql) in [
            (
                plain("n", Numeric),
                vec![plain("n", Integer)],
                "ALTER TABLE `p.d.t` ALTER COLUMN `n` SET DATA TYPE NUMERIC;",
            ),
            (plain("n", Integer), vec![plain("n", String)], "ALTER TABLE `p.d.t` RENAME COLUMN `n` TO `n_string`;"),
            (plain("n", String), numbered, "ALTER TABLE `p.d.t` RENAME COLUMN `N` TO `N_int642`;"),
            (plain("key", String), vec![plain("key", Integer)], "ALTER TABLE `p.d.t` RENAME TO `t_int64`;"),
        ] {
            let clash = unite(file, known).unwrap_err();
            assert_eq!((clash.sql.as_str(), clash.anew), (sql, sql.contains("RENAME TO")));
        }
        let known = vec![plain("j", Json), field("a", String, "REPEATED"), plain("m", Date), plain("N", String)];
        let names = unite(plain("n", String), known).unwrap().into_iter().map(|f| f.name).collect::<Vec<_>>();
        assert_eq!(names, ["N", "m"]);
        let clash = unite(plain("n", String), vec![plain("N", Int64)]).unwrap_err();
        assert_eq!(clash.found, "column \"N\" is STRING now, and INT64 in the table");
        let file = Schema::new(vec![Field::new("n", DataType::Int64, true), Field::new("_id", DataType::Utf8, false)]);
        let known = [
            field("_id", String, "REQUIRED"),
            field("N", Int64, "REQUIRED"),
            field("gone", Date, "REQUIRED"),
            plain("m", Date),
        ];
        assert_eq!(too_strict(&file, &known), ["N", "gone"]);
    }

    #[test]
    fn hostile_names_become_names_that_bigquery_takes() {
        assert_eq!(table_id("app.events").unwrap(), "app_events");
        assert_eq!(table_id("a/b`\"🎧").unwrap(), "a_b___");
        assert_eq!(table_id("قائمة 1").unwrap(), "قائمة 1");
        assert_eq!(column_names(&schema(&[("a.b", DataType::Utf8), ("ط", DataType::Utf8)])).unwrap(), ["a_b", "ط"]);
        assert_eq!(
            column_names(&schema(&[("a.b", DataType::Utf8), ("A_b", DataType::Utf8)])).unwrap_err(),
            "columns \"a.b\" and \"A_b\" are one name to BigQuery, \"A_b\""
        );
        assert!(column_names(&schema(&[("_TABLE_x", DataType::Utf8)])).is_err());
        assert!(column_names(&schema(&[("_table", DataType::Utf8)])).is_ok());
    }
}
