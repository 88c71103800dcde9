//! Tables as the catalogue describes them: for `init`, `check` and copies, before any Relation message has come.

use tokio_postgres::{Client, Row};

use super::conn::sql_error;
use super::types::{self, Told};
use super::wire::ident;
use crate::error::Result;
use crate::schema::{Column, Relation};

/// A table of the catalogue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its columns as the publication streams them; without a publication, all that are stored.
    pub relation: Relation,
    /// Oids of the columns' types as a Relation message has them; in `relation` user-defined ones are what they look like.
    pub type_oids: Vec<u32>,
    /// Primary key columns, in the key's order.
    pub primary_key: Vec<String>,
    /// A partitioned table: its rows are in its partitions.
    pub partitioned: bool,
    /// Whether the session's role may SELECT from it.
    pub readable: bool,
    /// The publication's condition on its rows, as SQL; `None` without one.
    pub row_filter: Option<String>,
}

/// Name outside: bare in schema public, else `schema.table`.
const OUTSIDE: &str = "CASE WHEN n.nspname = 'public' THEN c.relname::text ELSE n.nspname || '.' || c.relname END";

const TABLE: &str = "c.oid, n.nspname::text, c.relname::text, c.relkind = 'p', c.relreplident::text, \
    pg_catalog.has_table_privilege(c.oid, 'SELECT') AND pg_catalog.has_schema_privilege(n.oid, 'USAGE')";

/// Attribute numbers of an index's key, in its order, without the columns that it only INCLUDEs.
pub(super) const KEY: &str = "(i.indkey::int2[])[0:i.indnkeyatts - 1]";

impl Table {
    /// The quoted name, for SQL.
    pub fn sql_name(&self) -> String {
        format!("{}.{}", ident(&self.relation.namespace), ident(&self.relation.name))
    }

    /// The quoted name for reading the table's own rows: children by inheritance are tables of their own.
    pub fn sql_source(&self) -> String {
        if self.partitioned { self.sql_name() } else { format!("ONLY {}", self.sql_name()) }
    }

    /// Whether an UPDATE or DELETE has something to be identified by; without it Postgres refuses them once published.
    pub fn has_identity(&self) -> bool {
        match self.relation.replica_identity {
            b'f' => true,
            b'd' | b'i' => self.relation.columns.iter().any(|c| c.identity),
            _ => false,
        }
    }
}

/// The table of that name outside; `None` when there is none.
///
/// # Errors
/// [`crate::error::Error::Unreachable`] when the connection is lost.
pub async fn table(client: &Client, name: &str) -> Result<Option<Table>> {
    let sql = format!(
        "SELECT {TABLE} FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.relkind IN ('r', 'p') AND {OUTSIDE} = $1 ORDER BY n.nspname = 'public' DESC LIMIT 1"
    );
    let row = client.query_opt(&sql, &[&name]).await.map_err(|e| sql_error("reading the catalogue", &e))?;
    match row {
        Some(row) => Ok(Some(describe(client, &row, None).await?)),
        None => Ok(None),
    }
}

/// Names outside of the tables of a publication.
///
/// # Errors
/// [`crate::error::Error::Unreachable`] when the connection is lost.
pub async fn published_names(client: &Client, publication: &str) -> Result<Vec<String>> {
    let sql = format!(
        "SELECT {OUTSIDE} FROM pg_catalog.pg_publication_tables p \
         JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname \
         JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename WHERE p.pubname::text = $1"
    );
    let rows = client.query(&sql, &[&publication]).await.map_err(|e| sql_error("reading the publication", &e))?;
    rows.iter().map(|row| row.try_get(0).map_err(|e| sql_error("reading the publication", &e))).collect()
}

/// The tables of a publication, with the columns that it streams, ordered by name.
///
/// # Errors
/// [`crate::error::Error::Unreachable`] when the connection is lost.
pub async fn published(client: &Client, publication: &str) -> Result<Vec<Table>> {
    // Column lists and row filters came with Postgres 15; to_jsonb gives NULL where there is no such column.
    let sql = format!(
        "SELECT {TABLE}, ARRAY(SELECT pg_catalog.jsonb_array_elements_text(pg_catalog.to_jsonb(p) -> 'attnames')), \
             pg_catalog.to_jsonb(p) ->> 'rowfilter' \
         FROM pg_catalog.pg_publication_tables p \
         JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname \
         JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename \
         WHERE p.pubname::text = $1 ORDER BY n.nspname, c.relname"
    );
    let rows = client.query(&sql, &[&publication]).await.map_err(|e| sql_error("reading the publication", &e))?;
    let mut tables = Vec::new();
    for row in &rows {
        let listed: Vec<String> = row.get(6);
        let table = describe(client, row, Some(listed).filter(|l| !l.is_empty())).await?;
        tables.push(Table { row_filter: row.get(7), ..table });
    }
    Ok(tables)
}

/// Adds the columns and keys to a row of [`TABLE`].
async fn describe(client: &Client, row: &Row, listed: Option<Vec<String>>) -> Result<Table> {
    let oid: u32 = row.get(0);
    // The replica identity's columns: of the primary key (d), of the chosen index (i), all (f), none (n). A key that is
    // DEFERRABLE is none for Postgres, since two rows may have it for a moment.
    let sql = format!(
        "SELECT a.attname::text, a.atttypid, a.atttypmod, \
             c.relreplident = 'f' OR EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid \
                 AND a.attnum = ANY ({KEY}) \
                 AND (c.relreplident = 'd' AND i.indisprimary AND i.indimmediate \
                     OR c.relreplident = 'i' AND i.indisreplident)), \
             (SELECT pg_catalog.array_position({KEY}, a.attnum) FROM pg_catalog.pg_index i \
                 WHERE i.indrelid = c.oid AND i.indisprimary) \
         FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid \
         WHERE c.oid = $1 AND a.attnum > 0 AND NOT a.attisdropped AND (a.attgenerated = '' OR a.attname::text = ANY ($2)) \
         ORDER BY a.attnum"
    );
    // A generated column is streamed only where the publication names it (Postgres 18, publish_generated_columns).
    let named: &[String] = listed.as_deref().unwrap_or_default();
    let found = client.query(&sql, &[&oid, &named]).await.map_err(|e| sql_error("reading the catalogue", &e))?;
    let mut key: Vec<(i32, String)> =
        found.iter().filter_map(|r| Some((r.get::<_, Option<i32>>(4)?, r.get(0)))).collect();
    key.sort();
    let is_listed = |name: &str| listed.as_ref().is_none_or(|l| l.iter().any(|c| c == name));
    let column = |r: &Row| Column { name: r.get(0), type_oid: r.get(1), type_mod: r.get(2), identity: r.get(3) };
    let mut relation = Relation {
        oid,
        namespace: row.get(1),
        name: row.get(2),
        replica_identity: row.get::<_, &str>(4).bytes().next().unwrap_or(b'd'),
        columns: found.iter().map(column).filter(|c| is_listed(&c.name)).collect(),
    };
    let type_oids = relation.columns.iter().map(|c| c.type_oid).collect();
    types::resolve(client, &mut relation.columns, &Told::default()).await?;
    let primary_key = key.into_iter().map(|(_, name)| name).collect();
    Ok(Table { relation, type_oids, primary_key, partitioned: row.get(3), readable: row.get(5), row_filter: None })
}
