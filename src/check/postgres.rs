//! What falaj needs of Postgres. The functions are used by the verbs too, so that a refusal reads the same everywhere.

use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use tokio_postgres::Client;

use super::{Finding, Found, role, within};
use crate::config::{self, Config};
use crate::enrich;
use crate::enrich::state::{self, BaseHeader, LookupTable};
use crate::error::{Error, Result};
use crate::init::base;
use crate::lsn::SlotIdentity;
use crate::sink::kafka::BACKLOG;
use crate::source::catalog::{self, Table};
use crate::source::conn::{Conninfo, sql_error};
use crate::source::slot::{self, SlotState};
use crate::source::wire::{Wire, ident};

const APPLICATION: &str = "falaj check";
/// `server_version_num` of the oldest supported release.
const LEAST_VERSION: i64 = 140_000;

/// The findings, and the tables to expect topics for.
pub(super) struct Postgres {
    pub findings: Vec<Finding>,
    pub tables: Vec<String>,
}

/// Tries everything, or as much as can be reached.
pub(super) async fn findings(config: &Arc<Config>) -> Postgres {
    let mut found = Postgres { findings: Vec::new(), tables: Vec::new() };
    let session = async {
        let conninfo = Conninfo::parse(&config.postgres.url)?;
        let client = within("Postgres", conninfo.sql(APPLICATION)).await?;
        Ok((conninfo, client))
    };
    match session.await {
        Ok((conninfo, client)) => {
            found.push("postgres", "a session", Ok(conninfo.to_string()));
            found.server(config, &client).await;
            let identity = found.replication(config, &conninfo).await;
            found.publication(config, &client).await;
            found.slot(config, &client, conninfo.dbname(), identity.as_ref()).await;
        }
        Err(error) => found.push::<&str>("postgres", "a server that answers", Err(error)),
    }
    found
}

impl Postgres {
    fn push<T: Into<Found>>(&mut self, check: &'static str, needed: &str, outcome: Result<T>) {
        self.findings.push(Finding::of(check, needed, outcome));
    }

    async fn server(&mut self, config: &Config, client: &Client) {
        self.push("postgres_version", "14 or later", version(client).await);
        let role = role::server_role(client).await;
        self.push("server_role", "a primary, or a standby of Postgres 16 or later", role.map(role::found));
        self.push("wal_level", "logical", wal_level(client).await);
        self.push("replication_slots", "a free one", free_slot(client, &config.postgres.slot).await);
        self.push("wal_senders", "a free one", free_sender(client, &config.postgres.slot).await);
        self.push("max_slot_wal_keep_size", "no limit, or one that outlasts every outage", keep_size(client).await);
        self.push("wal_sender_timeout", "0, or several seconds", sender_timeout(client).await);
        if let Some(found) = encoding(client).await.transpose() {
            self.push("server_encoding", "UTF8, or one that Postgres turns into it", found);
        }
        self.push("clock", &format!("within {} ms of Postgres's", BACKLOG.as_millis()), clock(client).await);
    }

    async fn replication(&mut self, config: &Config, conninfo: &Conninfo) -> Option<SlotIdentity> {
        let outcome = within("Postgres", identity(conninfo, &config.postgres.slot)).await;
        let identity = outcome.as_ref().ok().cloned();
        let told = outcome.map(|i| format!("role \"{}\" may stream; {i}", conninfo.user()));
        self.push("role_replication", "LOGIN, REPLICATION, and a line of pg_hba.conf", told);
        identity
    }

    async fn publication(&mut self, config: &Config, client: &Client) {
        let name = &config.postgres.publication;
        let tables = async {
            slot::wire_form(client, name).await?;
            catalog::published(client, name).await
        };
        let tables = match tables.await {
            Ok(tables) => tables,
            Err(error) => return self.push::<&str>("publication", "a publication of the tables to stream", Err(error)),
        };
        self.tables = tables.iter().map(|t| t.relation.table()).collect();
        self.push("publication", "one table or more", some_tables(name, &tables));
        self.push("published_changes", "insert, update, delete, truncate", operations(client, name).await);
        self.push("configured_tables", "each [[table]] published", configured(config, &tables));
        self.push("table_rights", "SELECT on every published table", readable(&tables.iter().collect::<Vec<_>>()));
        self.push("columns", "the configured columns, no name twice", columns(config, &tables));
        if let Ok(Some(known)) = state::tables(&config.state.dir) {
            self.push("lookup_tables", "as the lookup state knows them", lookup_tables(client, &known, &tables).await);
        }
        self.push("replica_identity", "a primary key, or another identity", identities(&tables));
    }

    async fn slot(&mut self, config: &Arc<Config>, client: &Client, database: &str, identity: Option<&SlotIdentity>) {
        let name = &config.postgres.slot;
        let state = match slot::read(client, name).await {
            Ok(found) => slot::require(name, found, database),
            Err(error) => Err(error),
        };
        let found = match &state {
            Ok(state) if state.failover => role::failover_found(client, slot_found(name, state)).await,
            state => state.as_ref().map(|s| slot_found(name, s)).map_err(Error::clone),
        };
        self.push("slot", "a pgoutput slot with its WAL", found);
        let base = state::header(&config.state.dir);
        self.push("lookup_state", "the state that init wrote with the slot", lookup_state(config, &base, identity));
        // Only when the rest stands: positions mean nothing without their slot.
        if let (Ok(state), Ok(Some(base)), Some(identity)) = (state, base, identity) {
            self.positions(config, client, identity, &state, &base).await;
        }
    }

    /// Every sink's position against the slot, as `produce` will judge it.
    async fn positions(
        &mut self,
        config: &Arc<Config>,
        client: &Client,
        identity: &SlotIdentity,
        state: &SlotState,
        base: &BaseHeader,
    ) {
        let needed = "at or above confirmed_flush_lsn, at or below the end of the WAL";
        let read = async {
            Ok((slot::server_lsn(client).await?, within("a sink", crate::produce::positions(config, identity)).await?))
        };
        let (server, positions) = match read.await {
            Ok(read) => read,
            Err(error) => return self.push::<&str>("sink_position", needed, Err(error)),
        };
        for (sink, stored) in positions {
            let position = stored.map(crate::sink::Stored::checkpoint);
            let judged = slot::require_position(sink, position, state.confirmed_flush_lsn, base.origin, server);
            self.push("sink_position", needed, judged.map(|at| format!("{sink} resumes at {}", at.resume)));
        }
    }
}

/// The server's version.
///
/// # Errors
/// [`Error::Refused`] below 14.
pub async fn version(client: &Client) -> Result<String> {
    let text = setting(client, "server_version").await?;
    match at_least(client, LEAST_VERSION).await? {
        true => Ok(text),
        false => Err(Error::refused("postgres_version", text, "Postgres 14 or later", "upgrade the server")),
    }
}

pub(super) async fn at_least(client: &Client, version: i64) -> Result<bool> {
    Ok(setting(client, "server_version_num").await?.parse::<i64>().is_ok_and(|n| n >= version))
}

/// `wal_level`.
///
/// # Errors
/// [`Error::Refused`] unless it is `logical`.
pub async fn wal_level(client: &Client) -> Result<String> {
    match setting(client, "wal_level").await? {
        level if level == "logical" => Ok(level),
        level => Err(Error::refused(
            "wal_level",
            level,
            "logical",
            "ALTER SYSTEM SET wal_level = logical; then restart the server",
        )),
    }
}

/// Replication slots in use. Our own needs no free one.
///
/// # Errors
/// [`Error::Refused`] when all are taken.
pub async fn free_slot(client: &Client, slot: &str) -> Result<String> {
    let sql = "SELECT count(*), count(*) FILTER (WHERE slot_name::text = $1) FROM pg_catalog.pg_replication_slots";
    free(client, "replication_slots", "max_replication_slots", sql, slot).await
}

/// WAL senders in use. A `produce` that streams already has one.
///
/// # Errors
/// [`Error::Refused`] when all are taken.
pub async fn free_sender(client: &Client, slot: &str) -> Result<String> {
    let sql = "SELECT count(*), (SELECT count(*) FROM pg_catalog.pg_replication_slots \
               WHERE slot_name::text = $1 AND active) FROM pg_catalog.pg_stat_replication";
    free(client, "wal_senders", "max_wal_senders", sql, slot).await
}

async fn free(client: &Client, check: &'static str, limit: &str, sql: &str, slot: &str) -> Result<String> {
    let row = client.query_one(sql, &[&slot]).await.map_err(|e| sql_error(check, &e))?;
    let (used, ours): (i64, i64) = (row.get(0), row.get(1));
    let most = setting(client, limit).await?;
    let found = format!("{used} of {most} in use");
    if ours > 0 || most.parse::<i64>().is_ok_and(|most| used < most) {
        return Ok(found);
    }
    let more = used + 4;
    Err(Error::refused(
        check,
        found,
        "a free one",
        format!("ALTER SYSTEM SET {limit} = {more}; then restart the server, or drop what is not used"),
    ))
}

async fn keep_size(client: &Client) -> Result<Found> {
    let found = setting(client, "max_slot_wal_keep_size").await?;
    if found == "-1" {
        return Ok("no limit".into());
    }
    Ok(Found::with_advice(
        found,
        "once a stopped falaj is this far behind, the slot is lost and changes with it: watch its lag, or set -1",
    ))
}

async fn sender_timeout(client: &Client) -> Result<Found> {
    let sql = "SELECT setting::bigint FROM pg_catalog.pg_settings WHERE name = 'wal_sender_timeout'";
    let row = client.query_one(sql, &[]).await.map_err(|e| sql_error("wal_sender_timeout", &e))?;
    let (milliseconds, found): (i64, String) = (row.get(0), setting(client, "wal_sender_timeout").await?);
    if milliseconds == 0 || milliseconds >= 5_000 {
        return Ok(found.into());
    }
    Ok(Found::with_advice(found, "a short pause of the network already ends the stream: 60s is the default"))
}

/// Only where there is something to say.
async fn encoding(client: &Client) -> Result<Option<Found>> {
    let found = setting(client, "server_encoding").await?;
    let advice = "Postgres takes any bytes and sends them as they are; a row that is not UTF-8 stops the stream: copy the database into one with ENCODING UTF8";
    Ok((found == "SQL_ASCII").then(|| Found::with_advice(found, advice)))
}

async fn clock(client: &Client) -> Result<Found> {
    let failed = |e| sql_error("reading the clock", &e);
    let sql = "SELECT (extract(epoch FROM pg_catalog.clock_timestamp()) * 1000)::bigint";
    let statement = client.prepare(sql).await.map_err(failed)?;
    let (asked, now) = (Instant::now(), SystemTime::now());
    let server: i64 = client.query_one(&statement, &[]).await.map_err(failed)?.get(0);
    // The server has looked in the middle of the round trip.
    let ours = (now + asked.elapsed() / 2).duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Ok(skew(ours.as_millis() as i64 - server))
}

fn skew(ahead_ms: i64) -> Found {
    let side = if ahead_ms < 0 { "behind" } else { "ahead of" };
    let found = format!("{} ms {side} Postgres's", ahead_ms.abs());
    if u128::from(ahead_ms.unsigned_abs()) <= BACKLOG.as_millis() {
        return found.into();
    }
    Found::with_advice(
        found,
        "set both by NTP: with a clock ahead live changes are taken for a backlog, with one behind a backlog for live changes",
    )
}

/// Whether the publication exists.
///
/// # Errors
/// [`Error::Unreachable`] when the connection is lost.
pub async fn publication_exists(client: &Client, name: &str) -> Result<bool> {
    let sql = "SELECT 1 FROM pg_catalog.pg_publication WHERE pubname::text = $1";
    Ok(client.query_opt(sql, &[&name]).await.map_err(|e| sql_error("reading the publication", &e))?.is_some())
}

fn some_tables(name: &str, tables: &[Table]) -> Result<String> {
    match tables {
        [] => Err(Error::refused(
            "publication",
            format!("publication \"{name}\" has no table"),
            "the tables to stream",
            format!("ALTER PUBLICATION {} ADD TABLE …;", ident(name)),
        )),
        tables => {
            let names: Vec<_> = tables.iter().map(|t| t.relation.table()).collect();
            Ok(format!("\"{name}\": {}", names.join(", ")))
        }
    }
}

async fn operations(client: &Client, name: &str) -> Result<Found> {
    let sql =
        "SELECT pubinsert, pubupdate, pubdelete, pubtruncate FROM pg_catalog.pg_publication WHERE pubname::text = $1";
    let row = client.query_one(sql, &[&name]).await.map_err(|e| sql_error("reading the publication", &e))?;
    let (yes, no): (Vec<_>, Vec<_>) =
        ["insert", "update", "delete", "truncate"].iter().enumerate().partition(|(i, _)| row.get(*i));
    let names = |of: Vec<(usize, &&str)>| of.into_iter().map(|(_, name)| *name).collect::<Vec<_>>().join(", ");
    let (yes, no) = (names(yes), names(no));
    if no.is_empty() {
        return Ok(yes.into());
    }
    Ok(Found::with_advice(
        format!("{yes}; not {no}"),
        format!(
            "{no} never reaches the sinks, and lookup rows go stale: ALTER PUBLICATION {} SET (publish = 'insert, update, delete, truncate');",
            ident(name)
        ),
    ))
}

/// A [[table]] that is not published is a slip of the pen, unless it is the built-in one.
fn configured(config: &Config, published: &[Table]) -> Result<Found> {
    let is_published = |t: &&config::Table| published.iter().any(|p| p.relation.table() == t.name);
    let (found, missing): (Vec<_>, Vec<_>) = config.tables.iter().partition(is_published);
    let names = |of: &[&config::Table]| of.iter().map(|t| t.name.as_str()).collect::<Vec<_>>().join(", ");
    if missing.is_empty() {
        return Ok(names(&found).into());
    }
    let text = format!("not in publication \"{}\": {}", config.postgres.publication, names(&missing));
    if is_default(&config.tables) {
        return Ok(Found::with_advice(text, "the built-in [[table]] block has no effect; name your own tables there"));
    }
    Err(Error::refused(
        "configured_tables",
        text,
        "each [[table]] in the publication",
        format!("ALTER PUBLICATION {} ADD TABLE …;, or remove the block", ident(&config.postgres.publication)),
    ))
}

/// Whether these are the built-in `[[table]]` blocks.
pub fn is_default(tables: &[config::Table]) -> bool {
    let text = |tables: &[config::Table]| serde_json::to_string(tables).ok();
    Config::defaults().is_ok_and(|d| text(&d.tables) == text(tables))
}

/// Refuses tables that this role may not read.
///
/// # Errors
/// [`Error::Refused`] with the GRANT.
pub fn readable(tables: &[&Table]) -> Result<String> {
    let closed: Vec<_> = tables.iter().filter(|t| !t.readable).map(|t| t.sql_name()).collect();
    if closed.is_empty() {
        return Ok(format!("SELECT on {} of {}", tables.len(), tables.len()));
    }
    Err(Error::refused(
        "table_rights",
        format!("no SELECT on {}", closed.join(", ")),
        "SELECT on every published table and USAGE on its schema",
        format!("GRANT SELECT ON {} TO the role of [postgres].url; (and USAGE on the schema)", closed.join(", ")),
    ))
}

/// Plans every table's events, without their rows.
fn columns(config: &Config, tables: &[Table]) -> Result<String> {
    let lookups = base::lookups(tables, &config.tables)?;
    let mut count = 0;
    for table in tables {
        let relation = table.relation.clone();
        let settings = config.table(&relation.table());
        count += enrich::layout(lookups.iter().map(|l| &l.table), 0, relation, Vec::new(), settings)?.columns.len();
    }
    Ok(format!("{count} columns in {} tables, {} of them looked up", tables.len(), lookups.len()))
}

/// What the stream will come to.
async fn lookup_tables(client: &Client, known: &[LookupTable], published: &[Table]) -> Result<String> {
    let mut relations = Vec::new();
    for relation in published.iter().map(|t| &t.relation) {
        relations.push((relation, slot::column_numbers(client, relation.oid).await?));
    }
    enrich::require_same(known, &relations)?;
    let names: Vec<_> = known.iter().map(|t| t.table.as_str()).collect();
    Ok(if names.is_empty() { "none".to_owned() } else { names.join(", ") })
}

fn identities(tables: &[Table]) -> Result<Found> {
    let bare: Vec<_> = tables.iter().filter(|t| !t.has_identity()).map(Table::sql_name).collect();
    if bare.is_empty() {
        return Ok("every table".into());
    }
    Ok(Found::with_advice(
        format!("none: {}", bare.join(", ")),
        "Postgres refuses UPDATE and DELETE on these while they are published: add a primary key, or \
         ALTER TABLE … REPLICA IDENTITY FULL; inserts are streamed as they are",
    ))
}

fn slot_found(name: &str, state: &SlotState) -> Found {
    let at = format!("\"{name}\" at {}", state.confirmed_flush_lsn);
    match (state.active_pid, state.wal_status.as_deref()) {
        (Some(pid), _) => Found::with_advice(
            format!("{at}; slot in use by pid {pid}"),
            "that produce streams; another one waits as its standby",
        ),
        (None, Some("unreserved")) => Found::with_advice(
            format!("{at}; wal_status unreserved"),
            "its WAL can be removed at the next checkpoint: start produce now, and raise max_slot_wal_keep_size",
        ),
        (None, status) => format!("{at}; wal_status {}", status.unwrap_or("unknown")).into(),
    }
}

fn lookup_state(config: &Config, base: &Result<Option<BaseHeader>>, identity: Option<&SlotIdentity>) -> Result<Found> {
    let (dir, slot) = (&config.state.dir, &config.postgres.slot);
    let Some(base) = base.as_ref().map_err(Error::clone)? else { return Err(state::unknown(dir, slot)) };
    if let Some(identity) = identity {
        state_is_ours(dir, Some(base), identity)?;
        enrich::require_identity(dir, base, identity)?;
    }
    enrich::require_columns(dir, &base.tables, &config.tables)?;
    let text = format!("{}: as of {}", dir.display(), base.lsn);
    if base.adopted {
        return Ok(Found::with_advice(
            format!("{text}, adopted"),
            "events from before the adoption carry the lookup rows of that moment",
        ));
    }
    Ok(text.into())
}

/// Refuses a state directory that belongs to another cluster or slot: it is never overwritten.
///
/// # Errors
/// [`Error::Refused`] with both identities.
pub fn state_is_ours(dir: &Path, base: Option<&BaseHeader>, identity: &SlotIdentity) -> Result<()> {
    let Some(base) = base else { return Ok(()) };
    if (&base.identity.system_id, &base.identity.slot) == (&identity.system_id, &identity.slot) {
        return Ok(());
    }
    Err(Error::refused(
        "lookup_state",
        format!("{} belongs to {}", dir.display(), base.identity),
        format!("a directory of its own for {identity}"),
        "choose another state.dir; where that slot is gone for good, remove the directory",
    ))
}

/// Refuses a slot that is to be made and is there.
///
/// # Errors
/// [`Error::Refused`]; [`Error::Unreachable`] when the connection is lost.
pub async fn no_slot(client: &Client, slot: &str) -> Result<()> {
    match slot::read(client, slot).await? {
        None => Ok(()),
        Some(_) => Err(Error::refused(
            "slot",
            format!("slot \"{slot}\" has been made meanwhile"),
            "a name that no slot has, or the slot of another falaj init",
            "run falaj init again: it shows what is missing now",
        )),
    }
}

/// Which stream a slot of this server is.
///
/// # Errors
/// As [`Wire::connect`].
pub async fn identity(conninfo: &Conninfo, slot: &str) -> Result<SlotIdentity> {
    let mut wire = Wire::connect(conninfo, APPLICATION).await?;
    let system = wire.identify_system().await.map_err(|e| e.into_error("IDENTIFY_SYSTEM"))?;
    Ok(SlotIdentity { system_id: system.system_id, timeline: system.timeline, slot: slot.to_owned() })
}

pub(super) async fn setting(client: &Client, name: &str) -> Result<String> {
    let row = client.query_one("SELECT pg_catalog.current_setting($1)", &[&name]).await;
    Ok(row.map_err(|e| sql_error(name, &e))?.get(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_off_is_met_with_advice() {
        let told = [0, 100, 101, -5000].map(|ahead| {
            let found = skew(ahead);
            (found.text, found.advice.is_empty())
        });
        let expected =
            [("0 ms ahead of", true), ("100 ms ahead of", true), ("101 ms ahead of", false), ("5000 ms behind", false)];
        assert_eq!(told, expected.map(|(side, met)| (format!("{side} Postgres's"), met)));
    }
}
