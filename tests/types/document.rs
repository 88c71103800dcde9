//! docs/types.md is what the code does. `FALAJ_WRITE_DOCS=1` writes it anew.

use std::fmt::Write;

use arrow_schema::{DataType, Field, Schema};
use falaj::pgoutput::Cell;
use falaj::schema::{BUILT_IN, BuiltIn, Type};
use falaj::sink::columns::{data_type, own_columns};
use falaj::upload::columns::fields;
use falaj::value::write_json;

use super::database;
use super::samples::{
    EXTENSIONS, NUMBERS_TEXT_AND_TIMES, OTHERS, Sample, USER_LIKE_BUILT_IN, USER_OTHERS, USER_TYPES, WITHOUT_INPUT, XML,
};
use crate::rig::{Pipeline, Servers};

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/types.md");
const BEGIN: &str = "<!-- written by tests/types/document.rs: begin -->\n";
const END: &str = "<!-- written by tests/types/document.rs: end -->\n";
const BEGIN_OF_USERS: &str = "<!-- written by tests/types/document.rs, of a server with the extensions: begin -->\n";
const HEAD: &str = "| type | Postgres's text | JSON | Parquet | BigQuery |\n|---|---|---|---|---|\n";

/// The type as falaj knows it from its oid and modifier.
fn known(sample: &Sample) -> Type {
    let (name, modifier) = sample.sql.split_once('(').unwrap_or((sample.sql, ""));
    let name = match name.trim_matches('"') {
        "char" if sample.sql != "\"char\"" => "bpchar",
        name => name,
    };
    let oid = BuiltIn::oid_of(name).unwrap_or_else(|| panic!("{name} is no built-in type"));
    let numbers: Vec<i32> = modifier.trim_end_matches(')').split(',').filter_map(|n| n.parse().ok()).collect();
    let type_mod = match numbers[..] {
        [precision, scale] => ((precision << 16) | scale) + 4,
        _ => -1,
    };
    Type::from_oid(oid, type_mod)
}

fn parquet(data_type: &DataType) -> String {
    match data_type {
        DataType::Boolean => "boolean".into(),
        DataType::Int32 => "int32".into(),
        DataType::Int64 => "int64".into(),
        DataType::Float32 => "float".into(),
        DataType::Float64 => "double".into(),
        DataType::Utf8 => "string".into(),
        DataType::Decimal128(p, s) => format!("decimal({p},{s})"),
        DataType::Date32 => "date".into(),
        DataType::Timestamp(_, Some(_)) => "timestamp(µs, UTC)".into(),
        DataType::Timestamp(_, None) => "timestamp(µs)".into(),
        other => panic!("{other} has no name here"),
    }
}

fn bigquery(data_type: &DataType) -> String {
    let schema = Schema::new(vec![Field::new("c", data_type.clone(), true)]);
    format!("{:?}", fields(&schema).unwrap()[0].r#type).to_uppercase()
}

fn json(ty: Type, text: &str) -> String {
    let mut out = Vec::new();
    write_json(ty, Cell::Text(text.as_bytes()), &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

fn code(text: &str) -> String {
    format!("`{}`", text.replace('|', "\\|"))
}

fn row(out: &mut String, name: &str, ty: Type, text: &str) {
    let column = data_type(ty);
    let cells = [code(name), code(text), code(&json(ty, text)), parquet(&column), bigquery(&column)];
    writeln!(out, "| {} |", cells.join(" | ")).unwrap();
}

fn tables() -> String {
    let mut out = HEAD.to_owned();
    for sample in NUMBERS_TEXT_AND_TIMES.iter().chain(OTHERS).chain([&XML]).filter(|s| !s.sql.ends_with("[]")) {
        // Money's example depends on the server's setting.
        let text = if sample.sql == "money" { "$1,234.50" } else { sample.values[0] };
        row(&mut out, sample.sql, known(sample), text);
    }
    out += "\nArrays, of any of them:\n\n";
    out += HEAD;
    for (name, text) in [
        ("bool[]", "{t,NULL,f}"),
        ("int4[]", "{{1,NULL},{3,4}}"),
        ("int4[]", "[2:3]={1,2}"),
        ("numeric[]", "{1.10,NaN}"),
        ("jsonb[]", r#"{"{\"a\": 1.10}",NULL}"#),
        ("timestamptz[]", r#"{"2024-02-29 12:00:00.5+00",infinity}"#),
        ("text[]", r#"{"a b",NULL,"NULL",""}"#),
        ("box[]", "{(1,1),(0,0);(2,2),(1,1)}"),
        ("inet[]", "{}"),
    ] {
        let oid = BuiltIn::oid_of(&format!("_{}", name.trim_end_matches("[]"))).unwrap();
        row(&mut out, name, Type::from_oid(oid, -1), text);
    }
    out += "\nThe columns that falaj adds:\n\n| column | Parquet | BigQuery |\n|---|---|---|\n";
    for (name, data_type, _) in own_columns() {
        writeln!(out, "| {} | {} | {} |", code(name), parquet(&data_type), bigquery(&data_type)).unwrap();
    }
    out
}

/// Compares what stands behind `begin`, or writes it anew.
fn assert_written(begin: &str, tables: &str) {
    let document = std::fs::read_to_string(PATH).unwrap();
    let (head, rest) = document.split_once(begin).expect("a begin mark");
    let (found, tail) = rest.split_once(END).expect("an end mark");
    let wanted = format!("\n{tables}\n");
    if std::env::var_os("FALAJ_WRITE_DOCS").is_some() {
        std::fs::write(PATH, format!("{head}{begin}{wanted}{END}{tail}")).unwrap();
        return;
    }
    let differs = |(found, wanted): &(&str, &str)| found != wanted;
    let first = found.lines().zip(wanted.lines()).find(differs);
    assert!(found == wanted, "FALAJ_WRITE_DOCS=1 dev/test --test it -- the_table_of writes it anew; {first:?}");
}

#[test]
fn the_table_of_types_is_what_the_code_does() {
    assert_written(BEGIN, &tables());
}

/// The user's types as falaj finds them in the catalogue. Where a server lacks the extensions, theirs are not looked at.
#[tokio::test(flavor = "multi_thread")]
async fn the_table_of_user_types_is_what_the_code_does() {
    let (p, extended) = database("usertypes").await;
    let samples = [USER_LIKE_BUILT_IN, USER_OTHERS, if extended { EXTENSIONS } else { &[] }].concat();
    let columns: Vec<_> = samples.iter().enumerate().map(|(n, sample)| format!("c{n} {}", sample.sql)).collect();
    p.run(&format!("CREATE TABLE every ({}); CREATE PUBLICATION falaj FOR TABLE every", columns.join(", "))).await;
    let published = falaj::source::catalog::published(&p.sql, "falaj").await.unwrap();
    let types = published[0].relation.columns.iter().map(falaj::schema::Column::ty);
    let mut out =
        format!("```sql\n{}```\n\n{HEAD}", USER_TYPES.trim_start_matches('\n').replace("\n    ", "\n").trim_start());
    for (sample, ty) in samples.iter().zip(types) {
        row(&mut out, sample.sql, ty, sample.values[0]);
    }
    if extended {
        return assert_written(BEGIN_OF_USERS, &out);
    }
    let document = std::fs::read_to_string(PATH).unwrap();
    assert!(document.contains(&out), "{out}");
}

#[test]
fn every_built_in_type_has_a_sample_and_a_line() {
    let document = std::fs::read_to_string(PATH).unwrap();
    let samples: Vec<_> = [NUMBERS_TEXT_AND_TIMES, OTHERS, &[XML]].concat();
    for BuiltIn { name, .. } in BUILT_IN {
        let named = |s: &&Sample| match *name {
            "bpchar" => s.sql.starts_with("char("),
            "char" => s.sql == "\"char\"",
            name => s.sql.split('(').next() == Some(name),
        };
        let sampled = samples.iter().find(named);
        assert_eq!(sampled.is_none(), WITHOUT_INPUT.contains(name), "{name}");
        assert!(
            document.contains(&format!("`{}`", sampled.map_or(*name, |s| s.sql))),
            "{name} is not in docs/types.md"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_built_in_types_are_those_of_the_server() {
    let p = Pipeline::bare(Servers::shared(), "builtin").await;
    let rows = p
        .sql
        .query(
            "SELECT oid, typarray, typname::text, typdelim::text FROM pg_type WHERE oid < 10000 AND typtype IN ('b', 'r', 'm') \
             AND (typcategory <> 'A' OR typname IN ('int2vector', 'oidvector')) ORDER BY oid",
            &[],
        )
        .await
        .unwrap();
    let found: Vec<(u32, u32, String)> = rows.iter().map(|r| (r.get(0), r.get(1), r.get(2))).collect();
    let known: Vec<_> = BUILT_IN.iter().map(|t| (t.oid, t.array, t.name.to_owned())).collect();
    assert_eq!(found, known);
    let semicolons: Vec<String> = rows.iter().filter(|r| r.get::<_, &str>(3) != ",").map(|r| r.get(2)).collect();
    assert_eq!(semicolons, ["box"]);
}
