//! A session within the snapshot, and what the catalogue and the lookup tables say there.

use tokio_postgres::Client;
use tracing::info;

use super::plan::{Key, Part, Plan, Range, refused};
use super::statement::{self, is_by_place};
use super::{APPLICATION, Wanted};
use crate::check::postgres as require;
use crate::config::Config;
use crate::enrich::Moment;
use crate::error::{Error, Result};
use crate::init::base;
use crate::lsn::{Lsn, SlotIdentity};
use crate::source::catalog::{self, Table};
use crate::source::conn::{Conninfo, sql_error};
use crate::source::slot;
use crate::source::snapshot::{self, Files, Kind};
use crate::source::wire::{Wire, ident};
use crate::world::{START_PATIENCE, World};

/// How often the lock of another backfill is tried again.
const AGAIN: std::time::Duration = std::time::Duration::from_millis(500);

/// Bytes of a table for which the order of its rows on disk matters: beyond, it is not simply in memory.
const LARGE: i64 = 1 << 30;

/// A snapshot that belongs to an LSN, and a session that sees it.
pub(crate) struct Source {
    pub(super) conninfo: Conninfo,
    /// In a transaction with this snapshot; holds the lock of the pipeline's backfill.
    pub(super) client: Client,
    /// Transactions that committed below it are seen, and no others.
    pub(super) lsn: Lsn,
    /// For other sessions, while `wire` is open or, after [`Source::hold_alone`], `client`.
    pub(super) name: String,
    pub(super) identity: SlotIdentity,
    /// The tables that are read in the snapshot.
    files: Files,
    /// What has exported the snapshot.
    pub(super) wire: Option<Wire>,
}

impl Source {
    /// The snapshot of a slot that was made just now; `client` has begun for it.
    pub(crate) fn new(
        conninfo: &Conninfo,
        (client, files): (Client, Files),
        lsn: Lsn,
        snapshot: &str,
        identity: &SlotIdentity,
    ) -> Self {
        let (conninfo, name, identity) = (conninfo.clone(), snapshot.to_owned(), identity.clone());
        Self { conninfo, client, lsn, name, identity, files, wire: None }
    }

    /// Holds the session that has exported the snapshot.
    pub(crate) fn hold(&mut self, wire: Wire) {
        self.wire = Some(wire);
    }

    /// A new snapshot, by way of a temporary slot.
    pub(super) async fn take(world: &World, wanted: &[Wanted]) -> Result<Self> {
        let postgres = &world.config.postgres;
        let conninfo = Conninfo::parse(&postgres.url)?;
        let client = conninfo.sql(APPLICATION).await?;
        slot::require(&postgres.slot, slot::read(&client, &postgres.slot).await?, conninfo.dbname())?;
        require::free_slot(&client, "").await?;
        require::free_sender(&client, "").await?;
        let files = begin(world, &client, wanted).await?;
        let mut wire = Wire::connect(&conninfo, APPLICATION).await?;
        let system = wire.identify_system().await.map_err(|e| e.into_error("IDENTIFY_SYSTEM"))?;
        // A slot's name has 63 characters at most.
        let temporary = format!("{:.40}_backfill_{}", postgres.slot, std::process::id());
        let (lsn, name) = tokio::select! {
            made = snapshot::new_slot(&mut wire, &temporary, Kind::Temporary) => made?,
            never = snapshot::said_waiting(false) => match never {},
            () = world.stop.cancelled() => return Err(Error::Fatal("shut down before anything was copied".into())),
        };
        files.enter(&client, &name).await?;
        let identity =
            SlotIdentity { system_id: system.system_id, timeline: system.timeline, slot: postgres.slot.clone() };
        Ok(Self { conninfo, client, lsn, name, identity, files, wire: Some(wire) })
    }

    /// From now on this session alone holds the snapshot: the one that exported it has ended, and with it its temporary slot.
    pub(super) async fn hold_alone(&mut self) -> Result<()> {
        self.name = self.client.query_one("SELECT pg_export_snapshot()", &[]).await.map_err(|e| failed(&e))?.get(0);
        if let Some(wire) = self.wire.take() {
            wire.end().await;
        }
        Ok(())
    }

    /// Another session within the same snapshot, with locks of its own: the first one's end with its own work. Gives its process
    /// too.
    pub(super) async fn another(&self) -> Result<(Client, i32)> {
        let client = self.conninfo.sql(APPLICATION).await?;
        let pid = pid(&client).await?;
        client.batch_execute(BEGIN).await.map_err(|e| failed(&e))?;
        self.files.enter(&client, &self.name).await?;
        Ok((client, pid))
    }

    /// The moment at which the snapshot was taken over, µs since the Unix epoch.
    pub(super) async fn moment(&self) -> Result<i64> {
        let sql = "SELECT (extract(epoch FROM transaction_timestamp()) * 1000000)::bigint";
        Ok(self.client.query_one(sql, &[]).await.map_err(|e| failed(&e))?.get(0))
    }

    /// The lookup rows, as the snapshot has them.
    pub(super) async fn lookups(&self, config: &Config) -> Result<Moment> {
        let published = catalog::published(&self.client, &config.postgres.publication).await?;
        let lookups = base::lookups(&published, &config.tables)?;
        let mut moment = Moment::new(lookups.iter().map(|l| l.table.clone()));
        base::read(&self.client, &lookups, |table, key, values| Ok(moment.put(table, key, values))).await?;
        Ok(moment)
    }

    /// The plan of a table: that of an unfinished backfill, else a new one.
    pub(super) async fn plan(&self, config: &Config, wanted: &Wanted, found: &Table, lanes: usize) -> Result<Plan> {
        let (state, path) = (&config.state.dir, Plan::path(&config.state.dir, &wanted.table));
        let Some(plan) = Plan::read(state, &wanted.table)?.filter(|plan| !plan.finished) else {
            return self.new_plan(config, wanted, found, lanes).await;
        };
        plan.require(state, &self.identity, wanted.filter.as_deref())?;
        let fits = match is_by_place(&plan.order) {
            true => plan.storage == Some(self.storage(found).await?),
            false => plan.order == statement::order(found, &self.key(found).await?),
        };
        if !fits {
            let why = "an unfinished backfill; since then the table was rewritten, or has got another key";
            return Err(refused(&path, why.into()));
        }
        Ok(Plan { lanes: plan.lanes.max(lanes), ..plan })
    }

    /// Cuts a table into ranges.
    pub(super) async fn new_plan(&self, config: &Config, wanted: &Wanted, found: &Table, lanes: usize) -> Result<Plan> {
        let filter = wanted.filter.as_deref();
        let lanes = lanes.max(Plan::lanes(&config.state.dir)?);
        let (order, storage) = self.order(found).await?;
        let rows = self.estimate(found, filter).await?;
        let ranges = self.ranges(found, &order, filter, statement::range_count(rows, lanes)).await?;
        Ok(Plan {
            version: 1,
            identity: self.identity.clone(),
            table: wanted.table.clone(),
            filter: wanted.filter.clone(),
            backfill: self.lsn,
            order,
            storage,
            rows,
            lanes,
            ranges,
            finished: false,
        })
    }

    /// What a table is cut by; where that is the place of its rows, also which files they are in.
    async fn order(&self, found: &Table) -> Result<(Vec<Part>, Option<String>)> {
        let mut order = statement::order(found, &self.key(found).await?);
        if self.is_scattered(found, &order[0].column).await? {
            order = statement::by_place();
        }
        let storage = if is_by_place(&order) { Some(self.storage(found).await?) } else { None };
        Ok((order, storage))
    }

    /// Whether a large table's rows lie in another order than its key's, so that reading them by the key would take a block
    /// for each row. After a crash a copy by place leans on the updates of the stream, so these must be complete.
    async fn is_scattered(&self, found: &Table, column: &str) -> Result<bool> {
        let sql = "SELECT pg_relation_size(c.oid) >= $3 \
                       AND (c.relreplident = 'f' OR coalesce(pg_relation_size(nullif(c.reltoastrelid, 0)), 0) = 0) \
                       AND EXISTS (SELECT FROM pg_stats s WHERE s.schemaname = n.nspname AND s.tablename = c.relname \
                           AND s.attname::text = $2 AND abs(s.correlation) < 0.9) \
                   FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1";
        let row = self.client.query_one(sql, &[&found.relation.oid, &column, &LARGE]).await;
        Ok(row.map_err(|e| failed(&e))?.get(0))
    }

    /// The columns of a table's primary key, in no order. (That of Postgres 18 WITHOUT OVERLAPS is no btree, and gives no order.)
    async fn key(&self, found: &Table) -> Result<Vec<Part>> {
        let sql = "SELECT a.attname::text, format_type(a.atttypid, a.atttypmod), \
                       CASE WHEN o.opcnamespace <> 'pg_catalog'::regnamespace AND h.amname = 'btree' THEN ARRAY( \
                           SELECT format('OPERATOR(%I.%s)', n.nspname, p.oprname) \
                           FROM pg_amop m JOIN pg_operator p ON p.oid = m.amopopr JOIN pg_namespace n ON n.oid = p.oprnamespace \
                           WHERE m.amopfamily = o.opcfamily AND m.amoplefttype = o.opcintype AND m.amoprighttype = o.opcintype \
                           ORDER BY m.amopstrategy) END \
                   FROM pg_index i, unnest(i.indkey::int2[], i.indclass::oid[]) AS k (attnum, class) \
                       JOIN pg_opclass o ON o.oid = k.class JOIN pg_am h ON h.oid = o.opcmethod, pg_attribute a \
                   WHERE i.indrelid = $1 AND i.indisprimary AND a.attrelid = i.indrelid AND a.attnum = k.attnum";
        let rows = self.client.query(sql, &[&found.relation.oid]).await.map_err(|e| failed(&e))?;
        let part = |row: &tokio_postgres::Row| {
            let operators: Option<Vec<String>> = row.get(2);
            let operators = operators.map(|list| {
                <[String; 5]>::try_from(list).map_err(|list| {
                    Error::fatal("reading the operators of a primary key", format_args!("{list:?} instead of five"))
                })
            });
            Ok(Part { column: row.get(0), ty: row.get(1), operators: operators.transpose()? })
        };
        rows.iter().map(part).collect()
    }

    /// The files that a table's rows are in.
    async fn storage(&self, found: &Table) -> Result<String> {
        let sql = "SELECT coalesce(string_agg(pg_relation_filenode(relid)::text, ' ' ORDER BY relid), \
                   pg_relation_filenode($1::oid)::text) FROM pg_partition_tree($1::oid) WHERE isleaf";
        let row = self.client.query_one(sql, &[&found.relation.oid]).await.map_err(|e| failed(&e))?;
        Ok(row.get::<_, Option<String>>(0).unwrap_or_default())
    }

    /// The planner's guess of the rows; a condition that is no SQL is found here.
    async fn estimate(&self, found: &Table, filter: Option<&str>) -> Result<u64> {
        let conditions = statement::conditions(found.row_filter.as_deref(), filter);
        let sql = format!("EXPLAIN (FORMAT JSON) SELECT FROM {} WHERE {conditions}", found.sql_source());
        let answer = self.client.simple_query(&sql).await.map_err(|e| match (e.as_db_error(), filter) {
            (Some(db), Some(filter)) if db.code().code().starts_with("42") => Error::refused(
                "backfill_where",
                format!("--where {filter:?}: {}", db.message()),
                format!("an SQL condition on the columns of {}; only pg_catalog is searched", found.sql_name()),
                "mend --where; write functions, types and tables of other schemas with the schema's name",
            ),
            _ => failed(&e),
        })?;
        let text: String = answer
            .iter()
            .filter_map(|m| match m {
                tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0),
                _ => None,
            })
            .collect();
        let plan: serde_json::Value = serde_json::from_str(&text).map_err(|e| Error::fatal("reading EXPLAIN", e))?;
        Ok(plan[0]["Plan"]["Plan Rows"].as_u64().unwrap_or(0))
    }

    async fn ranges(&self, found: &Table, order: &[Part], filter: Option<&str>, count: u64) -> Result<Vec<Range>> {
        let leaves = self.leaves(found).await?;
        if is_by_place(order) {
            let total: u64 = leaves.iter().map(|(_, blocks)| blocks).sum();
            let share = |blocks: u64| (count * blocks).div_ceil(total.max(1));
            let cut = |(source, blocks): (String, u64)| {
                statement::ranges(&source, statement::block_cuts(blocks, share(blocks)))
            };
            return Ok(leaves.into_iter().flat_map(cut).collect());
        }
        let source = found.sql_source();
        if count == 1 {
            return Ok(statement::ranges(&source, Vec::new()));
        }
        let blocks = leaves.iter().map(|(_, blocks)| blocks).sum();
        let conditions = statement::conditions(found.row_filter.as_deref(), filter);
        let sql = statement::cuts(order, &source, blocks, &conditions, count);
        let rows = self.client.query(&sql, &[]).await.map_err(|e| failed(&e))?;
        Ok(statement::ranges(&source, rows.iter().map(|row| row.get::<_, Key>(0)).collect()))
    }

    /// What holds the rows: the table itself, or its partitions; each with its number of blocks.
    async fn leaves(&self, found: &Table) -> Result<Vec<(String, u64)>> {
        let sql = "SELECT n.nspname::text, c.relname::text, \
                       pg_relation_size(c.oid) / current_setting('block_size')::bigint \
                   FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                   WHERE c.oid IN (SELECT $1::oid UNION SELECT relid::oid FROM pg_partition_tree($1::oid) WHERE isleaf) \
                       AND c.relkind = 'r' ORDER BY c.oid";
        let rows = self.client.query(sql, &[&found.relation.oid]).await.map_err(|e| failed(&e))?;
        let leaf = |row: &tokio_postgres::Row| {
            let name = format!("ONLY {}.{}", ident(row.get(0)), ident(row.get(1)));
            (name, row.get::<_, i64>(2).unsigned_abs())
        };
        Ok(rows.iter().map(leaf).collect())
    }
}

/// The published tables that are wanted.
///
/// # Errors
/// [`Error::Refused`] for one that is not published or cannot be read.
pub(super) async fn find(config: &Config, client: &Client, wanted: &[Wanted]) -> Result<Vec<Table>> {
    let publication = &config.postgres.publication;
    let published = catalog::published(client, publication).await?;
    let mut found = Vec::new();
    for Wanted { table: name, .. } in wanted {
        let Some(table) = published.iter().find(|t| t.relation.table() == *name) else {
            let names: Vec<_> = published.iter().map(|t| t.relation.table()).collect();
            return Err(Error::refused(
                "backfill_table",
                format!("publication \"{publication}\" has {}, not \"{name}\"", names.join(", ")),
                "a published table: the changes after the copy come from the stream",
                format!("name it as falaj does, or ALTER PUBLICATION {} ADD TABLE …;", ident(publication)),
            ));
        };
        if !table.readable {
            return Err(Error::refused(
                "table_rights",
                format!("this role may not read {}", table.sql_name()),
                "SELECT on the table and USAGE on its schema",
                format!("GRANT SELECT ON {} TO the role of [postgres].url", table.sql_name()),
            ));
        }
        found.push(table.clone());
    }
    Ok(found)
}

/// The lock of the pipeline's backfill, then the transaction that is to see the snapshot. Gives the files of what is read in it:
/// the tables, and those that enrich their rows.
pub(super) async fn begin(world: &World, client: &Client, wanted: &[Wanted]) -> Result<Files> {
    lock(world, client).await?;
    let config = &world.config;
    let tables = find(config, client, wanted).await?;
    let lookups = base::lookups(&catalog::published(client, &config.postgres.publication).await?, &config.tables)?;
    let read: Vec<_> = tables.iter().chain(lookups.iter().map(|lookup| &lookup.source)).collect();
    require::readable(&read)?;
    let files = Files::note(client, &read).await?;
    client.batch_execute(BEGIN).await.map_err(|e| failed(&e))?;
    Ok(files)
}

/// Rows in their order: no parallel plan, no scan that begins where another one is.
const BEGIN: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; \
    SET LOCAL max_parallel_workers_per_gather = 0; SET LOCAL synchronize_seqscans = off";

/// One backfill of a pipeline at a time.
async fn lock(world: &World, client: &Client) -> Result<()> {
    let name = format!("falaj backfill {}/{}", world.config.pipeline, world.config.postgres.slot);
    let sql = "SELECT pg_try_advisory_lock(hashtextextended($1, 0))";
    let began = std::time::Instant::now();
    loop {
        if client.query_one(sql, &[&name]).await.map_err(|e| failed(&e))?.get(0) {
            return Ok(());
        }
        if began.elapsed() > START_PATIENCE {
            return Err(Error::refused(
                "backfill_lock",
                "another backfill of this pipeline is running",
                "one at a time",
                "wait for it; --jobs is what makes one faster",
            ));
        }
        info!("another backfill of this pipeline is running, waiting");
        world.pause(AGAIN).await?;
    }
}

/// The server's process of a session.
pub(super) async fn pid(client: &Client) -> Result<i32> {
    Ok(client.query_one("SELECT pg_backend_pid()", &[]).await.map_err(|e| failed(&e))?.get(0))
}

pub(super) fn failed(e: &tokio_postgres::Error) -> Error {
    sql_error("backfill", e)
}
