//! The table of all types: how it is made, and what Postgres itself says of its values.

use std::collections::BTreeMap;

use crate::rig::Pipeline;

use super::samples::Sample;

/// A table with a column for each of some types.
pub struct Zoo {
    pub table: &'static str,
    pub columns: Vec<Column>,
}

/// One column of it.
pub struct Column {
    pub name: String,
    /// Its type as SQL.
    sql: String,
    /// SQL of its values, one a row.
    values: Vec<String>,
}

/// What every sink has to have in a row: by column.
#[derive(Default)]
pub struct Expected {
    /// JSON.
    pub json: BTreeMap<String, String>,
    /// As `rig::pyarrow` tells values.
    pub parquet: BTreeMap<String, Option<String>>,
    /// As BigQuery holds it.
    pub bigquery: BTreeMap<String, Option<String>>,
    /// What Parquet cannot hold.
    pub raw: BTreeMap<String, String>,
}

impl Zoo {
    pub fn new(table: &'static str, samples: &[&[Sample]], arrays: bool) -> Self {
        let samples = samples.iter().copied().flatten();
        let scalar = |(n, s): (usize, &Sample)| Column::scalar(&format!("v{n}"), s);
        let columns: Vec<_> = samples.clone().enumerate().map(scalar).collect();
        let array = |(n, s): (usize, &Sample)| Column::array(&format!("a{n}"), s);
        let arrays = samples.enumerate().filter(|_| arrays).filter_map(array);
        Self { table, columns: columns.into_iter().chain(arrays).collect() }
    }

    pub async fn create(&self, p: &Pipeline) {
        let columns: Vec<_> = self.columns.iter().map(|c| format!("{} {}", c.name, c.sql)).collect();
        p.run(&format!("CREATE TABLE {} (id int PRIMARY KEY, {})", self.table, columns.join(", "))).await;
    }

    /// A row for each value of the column that has most of them, and one of NULLs.
    pub async fn fill(&self, p: &Pipeline) {
        let rows = self.columns.iter().map(|c| c.values.len()).max().unwrap_or(0);
        for row in 0..=rows {
            let value = |c: &Column| c.values.get(row).cloned().unwrap_or_else(|| "NULL".into());
            let values: Vec<_> = self.columns.iter().map(value).collect();
            p.run(&format!("INSERT INTO {} VALUES ({row}, {})", self.table, values.join(", "))).await;
        }
    }

    /// What Postgres says of each row.
    pub async fn expected(&self, p: &Pipeline) -> Vec<Expected> {
        p.run("SET TimeZone = 'UTC'").await;
        let asked: Vec<_> = self.columns.iter().map(Column::questions).collect();
        let sql = format!("SELECT {} FROM {} ORDER BY id", asked.join(", "), self.table);
        let rows = p.sql.query(&sql, &[]).await.unwrap_or_else(|e| panic!("{e:?}: {sql}"));
        let expected = |row: &tokio_postgres::Row| {
            let mut expected = Expected::default();
            for (n, column) in self.columns.iter().enumerate() {
                let answer = |i: usize| row.get::<_, Option<String>>(4 * n + i);
                expected.json.insert(column.name.clone(), answer(0).unwrap_or("null".into()));
                expected.parquet.insert(column.name.clone(), answer(1));
                expected.bigquery.insert(column.name.clone(), answer(2));
                expected.raw.extend(answer(3).map(|raw| (column.name.clone(), raw)));
            }
            expected
        };
        rows.iter().map(expected).collect()
    }

    /// The columns as BigQuery is asked for them, in the form of [`Expected::bigquery`].
    pub fn bigquery(&self) -> Vec<String> {
        self.columns.iter().map(Column::bigquery).collect()
    }
}

impl Column {
    fn scalar(prefix: &str, sample: &Sample) -> Self {
        let values = sample.values.iter().map(|v| value(sample.sql, v)).collect();
        Self { name: name(prefix, sample.sql), sql: sample.sql.into(), values }
    }

    /// With NULL, of two dimensions, with other lower bounds, empty. What is an array already has no such column.
    fn array(prefix: &str, sample: &Sample) -> Option<Self> {
        let base = sample.sql;
        if base.ends_with("[]") || base.ends_with("vector") && base != "tsvector" || ["tags", "moods"].contains(&base) {
            return None;
        }
        let all: Vec<_> = sample.values.iter().map(|v| value(base, v)).collect();
        let (first, last) = (&all[0], &all[all.len() - 1]);
        let mut values = vec![
            format!("ARRAY[{}, NULL]::{base}[]", all.join(", ")),
            format!("array_fill({first}, ARRAY[2], ARRAY[-1])"),
            format!("'{{}}'::{base}[]"),
            format!("ARRAY[NULL]::{base}[]"),
        ];
        if !is_time(base) {
            values.push(format!("ARRAY[[{first}, NULL], [{last}, {first}]]::{base}[]"));
            values.push(format!("array_fill({last}, ARRAY[1, 2, 2], ARRAY[3, -1, 0])"));
        }
        Some(Self { name: name(prefix, base), sql: format!("{base}[]"), values })
    }

    /// Four expressions: the fields of [`Expected`].
    fn questions(&self) -> String {
        let (c, base) = (&*self.name, self.sql.trim_end_matches("[]"));
        let array = base != self.sql;
        let printed = format!("CASE WHEN num_nulls({c}) = 0 THEN format('%s', {c}) END");
        // A user would have these as objects; falaj keeps to Postgres's own text.
        let as_text = ["pair", "nested", "dpair", "hstore", "int2vector", "oidvector"].contains(&base);
        let json = match array {
            true if as_text || ["tags", "moods"].contains(&base) => format!("to_json({c}::text[])"),
            true if is_time(base) => format!(
                "CASE WHEN num_nulls({c}) = 0 THEN '[' || coalesce((SELECT string_agg(coalesce({}, 'null'), ',' ORDER BY n) \
                 FROM unnest({c}) WITH ORDINALITY AS u (e, n)), '') || ']' END",
                time_as_json("e", base)
            ),
            false if as_text => format!("to_json({printed})"),
            false if is_time(base) => time_as_json(c, base),
            _ => format!("to_json({c})"),
        };
        let (holds, parquet, bigquery) = match base {
            _ if array => ("true".into(), printed.clone(), printed),
            "bool" | "int2" | "int4" | "int8" | "positive" | "small" => ("true".into(), c.into(), c.into()),
            "float4" | "float8" => {
                ("true".into(), format!("encode({base}send({c}), 'hex')"), format!("encode(float8send({c}), 'hex')"))
            }
            "numeric(12,3)" | "numeric(38,18)" | "price" => {
                (format!("{c} <> 'NaN'"), c.into(), format!("trim_scale({c})"))
            }
            "date" => (in_calendar(c), format!("{c} - date '1970-01-01'"), format!("{c} - date '1970-01-01'")),
            time if is_time(time) => {
                let micros = format!("(extract(epoch FROM {c}) * 1000000)::bigint");
                (in_calendar(c), micros.clone(), micros)
            }
            _ => ("true".into(), printed.clone(), printed),
        };
        format!(
            "({json})::text, CASE WHEN {holds} THEN ({parquet})::text END, CASE WHEN {holds} THEN ({bigquery})::text END, \
             CASE WHEN NOT ({holds}) THEN {c}::text END"
        )
    }

    fn bigquery(&self) -> String {
        let c = &self.name;
        match &*self.sql {
            "bool" => format!("CAST({c} AS STRING)"),
            "date" => format!("DATE_DIFF({c}, DATE '1970-01-01', DAY)"),
            "timestamp" => format!("DATETIME_DIFF({c}, DATETIME '1970-01-01 00:00:00', MICROSECOND)"),
            time if is_time(time) => format!("UNIX_MICROS({c})"),
            _ => c.clone(),
        }
    }

    /// BigQuery's answers, in the form of [`Expected::bigquery`].
    pub fn normal(&self, answer: Option<String>) -> Option<String> {
        let answer = answer?;
        Some(match &*self.sql {
            "float4" | "float8" => format!("{:016x}", answer.parse::<f64>().unwrap().to_bits()),
            "numeric(12,3)" | "numeric(38,18)" | "price" if answer.contains('.') => {
                answer.trim_end_matches('0').trim_end_matches('.').to_owned()
            }
            _ => answer,
        })
    }
}

fn value(sql: &str, value: &str) -> String {
    match value.strip_prefix('=') {
        Some(expression) => format!("({expression})::{sql}"),
        None => format!("'{}'::{sql}", value.replace('\'', "''")),
    }
}

fn name(prefix: &str, sql: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' };
    format!("{prefix}_{}", sql.trim_matches('"').chars().map(plain).collect::<String>())
}

fn is_time(base: &str) -> bool {
    base == "moment" || base == "timestamp" || base.starts_with("timestamptz")
}

fn in_calendar(c: &str) -> String {
    format!("(isfinite({c}) AND {c} >= '0001-01-01' AND {c} < '10000-01-01')")
}

fn time_as_json(c: &str, base: &str) -> String {
    let zone = if base == "timestamp" { "" } else { "\"Z\"" };
    let rfc3339 = format!("to_char({c}, 'YYYY-MM-DD\"T\"HH24:MI:SS.US{zone}')");
    format!("to_json(CASE WHEN {} THEN {rfc3339} ELSE {c}::text END)::text", in_calendar(c))
}
