//! The first lookup rows: what `init` writes at the slot's own consistent point.

use std::collections::BTreeMap;
use std::path::Path;

use futures_util::TryStreamExt;
use tokio_postgres::Client;

use super::origin;
use crate::config;
use crate::enrich::state::{self, BaseHeader, BaseWriter, ColumnType, LookupTable, Snapshot};
use crate::enrich::wanted;
use crate::error::{Error, Result};
use crate::schema::Column;
use crate::source::catalog::Table;
use crate::source::conn::sql_error;
use crate::source::slot::column_numbers;
use crate::source::snapshot::{Files, lock};
use crate::source::wire::ident;

/// A lookup table, as the state knows it and as the catalogue does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// Key and joined columns.
    pub table: LookupTable,
    /// Where its rows are read.
    pub source: Table,
}

/// The lookup tables that the published tables need.
///
/// # Errors
/// [`Error::Refused`] for a lookup table that is not published, has no single-column primary key, lacks a configured
/// column, or whose replica identity does not hold the key.
pub fn lookups(published: &[Table], tables: &[config::Table]) -> Result<Vec<Lookup>> {
    let find = |name: &str| published.iter().find(|t| t.relation.table() == name);
    let used: Vec<config::Table> = tables.iter().filter(|t| find(&t.name).is_some()).cloned().collect();
    wanted(&used).into_iter().map(|(name, columns)| lookup(&name, find(&name), &columns)).collect()
}

fn lookup(name: &str, source: Option<&Table>, columns: &[String]) -> Result<Lookup> {
    let source = source.ok_or_else(|| {
        Error::refused(
            "lookup_table",
            format!("the lookup table \"{name}\" is not in the publication"),
            "each lookup table in the same publication as the tables that it enriches",
            format!("ALTER PUBLICATION … ADD TABLE {name};, or change [table.lookup]"),
        )
    })?;
    let column = |wanted: &String| {
        let found = source.relation.columns.iter().find(|c| c.name == *wanted);
        found.ok_or_else(|| {
            Error::refused(
                "lookup_columns",
                format!("lookup table {name} has no published column \"{wanted}\""),
                "the key and the joined columns, published",
                "add the column (or publish it), or change [table.lookup]",
            )
        })
    };
    let key = column(single_key(name, source)?)?;
    if !key.identity {
        // The default identity lacks a primary key that is DEFERRABLE.
        let identity = if source.relation.replica_identity == b'd' { "FULL" } else { "DEFAULT" };
        return Err(Error::refused(
            "lookup_identity",
            format!("the replica identity of lookup table {name} does not hold its primary key \"{}\"", key.name),
            "a replica identity with the primary key, so that updates and deletes can be followed",
            format!("ALTER TABLE {} REPLICA IDENTITY {identity};", source.sql_name()),
        ));
    }
    let columns = columns.iter().map(|c| column(c).map(typed)).collect::<Result<_>>()?;
    let oid = Some(source.relation.oid);
    let table = LookupTable { table: name.to_owned(), oid, key: typed(key), columns, numbers: BTreeMap::new() };
    Ok(Lookup { table, source: source.clone() })
}

fn single_key<'a>(name: &str, source: &'a Table) -> Result<&'a String> {
    match source.primary_key.as_slice() {
        [key] => Ok(key),
        other => Err(Error::refused(
            "lookup_key",
            format!("lookup table {name} has a primary key of {} columns", other.len()),
            "a primary key of one column",
            format!("ALTER TABLE {} ADD PRIMARY KEY (…);, or take another lookup table", source.sql_name()),
        )),
    }
}

fn typed(column: &Column) -> ColumnType {
    ColumnType { name: column.name.clone(), type_oid: column.type_oid, type_mod: column.type_mod }
}

/// Writes the base with the rows of an exported snapshot (its name, and the files of the tables from before it was made), or with
/// those of now, and then with what now was. Gives the number of rows.
///
/// # Errors
/// [`Error::Refused`] for want of SELECT; [`Error::Unreachable`]; [`Error::Fatal`] when the disk refuses.
pub(super) async fn write(
    client: &Client,
    snapshot: Option<(&str, &Files)>,
    mut header: BaseHeader,
    lookups: &[Lookup],
    dir: &Path,
) -> Result<u64> {
    let failed = |e: tokio_postgres::Error| sql_error("reading the lookup rows", &e);
    client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await.map_err(failed)?;
    match snapshot {
        Some((name, files)) => files.enter(client, name).await?,
        None => {
            let sources: Vec<_> = lookups.iter().map(|l| l.source.sql_source()).collect();
            client.batch_execute(&lock(&sources)).await.map_err(failed)?;
            header.adopted_snapshot = Some(now(client).await?);
        }
    }
    // The snapshot of the slot's own beginning: rows that it sees are in no event.
    let origin = match snapshot {
        Some(_) => Some(Snapshot { lsn: header.origin, ..now(client).await? }),
        None => None,
    };
    for (table, lookup) in header.tables.iter_mut().zip(lookups) {
        table.numbers = column_numbers(client, lookup.source.relation.oid).await?;
    }
    let mut out = BaseWriter::create(dir, &header)?;
    let mut count = 0;
    read(client, lookups, |number, key, values| {
        count += 1;
        out.row(number, key, values)
    })
    .await?;
    client.batch_execute("COMMIT").await.map_err(failed)?;
    // With the base everything counts as written.
    origin.map_or(Ok(()), |origin| origin::write(dir, &origin))?;
    if snapshot.is_none() {
        state::clear(dir)?;
    }
    out.finish()?;
    Ok(count)
}

/// Hands every lookup row that the session's transaction sees to `each`: number of the table, key, joined values.
///
/// # Errors
/// [`Error::Refused`] for want of SELECT; [`Error::Unreachable`]; what `each` gives.
pub async fn read(
    client: &Client,
    lookups: &[Lookup],
    mut each: impl FnMut(usize, &str, &[Option<&str>]) -> Result<()>,
) -> Result<()> {
    let failed = |e: tokio_postgres::Error| sql_error("reading the lookup rows", &e);
    for (number, lookup) in lookups.iter().enumerate() {
        let none: [&str; 0] = [];
        let rows = client.query_raw(&select(lookup), none).await.map_err(failed)?;
        let mut rows = std::pin::pin!(rows);
        while let Some(row) = rows.try_next().await.map_err(failed)? {
            let values: Vec<Option<&str>> = (1..row.len()).map(|i| row.get(i)).collect();
            each(number, row.get(0), &values)?;
        }
    }
    Ok(())
}

/// The snapshot of the open transaction.
///
/// # Errors
/// [`Error::Unreachable`] when the connection is lost.
pub(crate) async fn now(client: &Client) -> Result<Snapshot> {
    let sql = "SELECT pg_catalog.pg_current_snapshot()::text, (CASE WHEN pg_catalog.pg_is_in_recovery() \
               THEN pg_catalog.pg_last_wal_replay_lsn() ELSE pg_catalog.pg_current_wal_insert_lsn() END)::text";
    let row = client.query_one(sql, &[]).await.map_err(|e| sql_error("reading the lookup rows", &e))?;
    let lsn = row.get::<_, &str>(1).parse().map_err(|e| Error::fatal("reading an LSN from Postgres", e))?;
    Ok(Snapshot { xids: row.get(0), lsn })
}

fn select(lookup: &Lookup) -> String {
    let columns = [&lookup.table.key].into_iter().chain(&lookup.table.columns);
    let list: Vec<_> = columns.map(|c| output(&ident(&c.name))).collect();
    // What the publication filters out is not streamed either.
    let filter = lookup.source.row_filter.as_ref().map(|filter| format!(" WHERE {filter}")).unwrap_or_default();
    format!("SELECT {} FROM {}{filter}", list.join(", "), lookup.source.sql_source())
}

/// The text that the stream has of a column, by the type's output function. A cast to text is another thing: it writes
/// `true` for `t`, `10.0.0.1/32` for `10.0.0.1`, and leaves the blanks of `char(n)` out.
fn output(column: &str) -> String {
    format!("CASE WHEN num_nulls({column}) = 0 THEN format('%s', {column}) END")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::schema::Relation;

    fn table(name: &str, columns: &[&str], key: &[&str]) -> Table {
        let column = |c: &&str| Column { name: (*c).into(), type_oid: 25, type_mod: -1, identity: key.contains(c) };
        Table {
            relation: Relation {
                oid: 1,
                namespace: "public".into(),
                name: name.into(),
                replica_identity: b'd',
                columns: columns.iter().map(column).collect(),
            },
            primary_key: key.iter().map(|k| (*k).into()).collect(),
            type_oids: Vec::new(),
            partitioned: false,
            readable: true,
            row_filter: None,
        }
    }

    fn content() -> Table {
        table("content", &["id", "title", "content_type", "length_seconds"], &["id"])
    }

    #[test]
    fn lookups_are_those_that_published_tables_need() {
        let tables = Config::defaults().unwrap().tables;
        let events = table("engagement_events", &["id", "content_id"], &["id"]);
        let found = lookups(&[content(), events.clone()], &tables).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(
            select(&found[0]),
            format!(
                r#"SELECT {}, {}, {}, {} FROM ONLY "public"."content""#,
                output("\"id\""),
                output("\"title\""),
                output("\"content_type\""),
                output("\"length_seconds\"")
            )
        );
        assert_eq!(lookups(&[content()], &tables).unwrap(), []);
        let mut silent = content();
        silent.relation.columns[0].identity = false;
        for (broken, check) in [
            (vec![events.clone()], "lookup_table"),
            (vec![events.clone(), table("content", &["id", "title"], &["id"])], "lookup_columns"),
            (vec![events.clone(), table("content", &["id", "title"], &["id", "title"])], "lookup_key"),
            (vec![events, silent], "lookup_identity"),
        ] {
            let Err(Error::Refused(refusal)) = lookups(&broken, &tables) else { panic!("{check}") };
            assert_eq!(refusal.check, check);
        }
    }
}
