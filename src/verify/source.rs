//! The source: one snapshot, and what the slot still has for the sinks.
//!
//! Which events count is decided by the snapshot's transaction ids. Events know only their commit LSNs, so a temporary copy of
//! the slot is read from where the slot stands to the snapshot's place in the WAL: it tells the id of each transaction that
//! a sink may have or lack. What lies below the slot's acknowledgement has committed long before.

use std::collections::{BTreeMap, HashSet};
use std::pin::pin;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use tokio_postgres::{Client, SimpleQueryMessage};

use super::compare::{Comparison, SourceRow};
use super::fold::Changed;
use super::table::{Form, Table, canonical, hash};
use crate::enrich::adoption::Adoption;
use crate::enrich::state::Snapshot;
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::pgoutput::{Cell, Message, Tuple, parse};
use crate::schema::Relation;
use crate::source::conn::{Conninfo, sql_error};
use crate::source::wire::ident;
use crate::source::{catalog, pins, slot};
use crate::world::World;

const APPLICATION: &str = "falaj verify";
/// How often it is looked whether the WAL is there.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// What the WAL writer may be late by.
const FLUSH_SLACK: Duration = Duration::from_millis(500);

/// The source as of one snapshot.
pub(super) struct Source {
    client: Client,
    pub(super) snapshot: Snapshot,
    sees: Adoption,
    /// What was committed when the slot began to stream, where `init` has noted it.
    older: Option<Adoption>,
    pub(super) tables: Vec<Table>,
    /// Commits that the snapshot does not see.
    unseen: HashSet<Lsn>,
    changed: BTreeMap<u32, Changed>,
    none: Changed,
    /// Where the slot's rows of a table have the columns of its key; `None` where they lack one, or have it as another type.
    places: BTreeMap<u32, Option<Vec<usize>>>,
}

impl Source {
    /// Takes the snapshot.
    ///
    /// # Errors
    /// [`Error::Refused`] for a slot that is lost, or for want of rights; [`Error::Unreachable`].
    pub(super) async fn open(world: &World) -> Result<Self> {
        let config = &world.config;
        let conninfo = Conninfo::parse(&config.postgres.url)?;
        let stream = world.at_start("postgres", || conninfo.sql(APPLICATION)).await?;
        let client = conninfo.sql(APPLICATION).await?;
        slot::require(&config.postgres.slot, slot::read(&stream, &config.postgres.slot).await?, conninfo.dbname())?;
        // The copy first: whatever it has been told of is older than the snapshot.
        let copy = copy_name(&config.postgres.slot);
        pins::copy_for_session(&stream, &config.postgres.slot, &copy).await?;
        let failed = |e: tokio_postgres::Error| sql_error("taking a snapshot", &e);
        client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await.map_err(failed)?;
        let snapshot = crate::init::base::now(&client).await?;
        let sees = adoption(&snapshot)?;
        let tables = tables(&client, &config.postgres.publication).await?;
        let older = crate::init::origin::read(&config.state.dir)?.map(|origin| adoption(&origin)).transpose()?;
        let (unseen, changed, none, places) = Default::default();
        let mut source = Self { client, snapshot, sees, older, tables, unseen, changed, none, places };
        wait_for_flush(world, &stream, source.snapshot.lsn).await?;
        source.read_slot(&stream, &copy, &config.postgres.publication).await?;
        pins::drop_slot(&stream, &copy).await?;
        Ok(source)
    }

    /// Whether the snapshot sees what was committed there.
    pub(super) fn sees(&self, commit_lsn: Lsn) -> bool {
        commit_lsn < self.snapshot.lsn && !self.unseen.contains(&commit_lsn)
    }

    /// Rows of a table that transactions behind the slot's acknowledgement have changed.
    pub(super) fn changed(&self, table: &Table) -> &Changed {
        self.changed.get(&table.oid).unwrap_or(&self.none)
    }

    /// Reads what the slot would send up to the snapshot.
    async fn read_slot(&mut self, client: &Client, copy: &str, publication: &str) -> Result<()> {
        let failed = |e: tokio_postgres::Error| sql_error("reading a copy of the slot", &e);
        let sql = "SELECT data FROM pg_catalog.pg_logical_slot_peek_binary_changes($1::text::name, $2::text::pg_lsn, NULL, \
                   'proto_version', '1', 'publication_names', $3)";
        let (upto, publication) = (self.snapshot.lsn.to_string(), ident(publication));
        let arguments: [&str; 3] = [copy, &upto, &publication];
        let mut rows = pin!(client.query_raw(sql, arguments).await.map_err(failed)?);
        let mut transaction = None;
        while let Some(row) = rows.try_next().await.map_err(failed)? {
            let data: &[u8] = row.try_get(0).map_err(failed)?;
            let message = parse(data, false).map_err(|e| Error::fatal("reading a copy of the slot", e))?;
            self.note(message, &mut transaction)?;
        }
        Ok(())
    }

    /// Notes what a message of the slot says of rows that the snapshot sees.
    fn note(&mut self, message: Message<'_>, transaction: &mut Option<Lsn>) -> Result<()> {
        match (message, *transaction) {
            (Message::Begin { final_lsn, xid, .. }, _) => {
                let seen = self.sees.saw(final_lsn, xid);
                if !seen {
                    self.unseen.insert(final_lsn);
                }
                *transaction = seen.then_some(final_lsn);
            }
            (Message::Relation(relation), _) => self.note_columns(&relation),
            (Message::Insert { relation, new }, Some(at)) => self.note_row(relation, new, at)?,
            (Message::Update { relation, old, new }, Some(at)) => {
                self.note_row(relation, new, at)?;
                if let Some(old) = old {
                    self.note_row(relation, old.tuple(), at)?;
                }
            }
            (Message::Delete { relation, old }, Some(at)) => self.note_row(relation, old.tuple(), at)?,
            (Message::Truncate { relations, .. }, Some(at)) => {
                relations.iter().for_each(|oid| self.changed.entry(*oid).or_default().emptied = Some(at.0));
            }
            _ => {}
        }
        Ok(())
    }

    fn note_columns(&mut self, relation: &Relation) {
        let Some(table) = self.tables.iter().find(|table| table.oid == relation.oid) else { return };
        let place = |i: &usize| {
            let place = relation.index_of(&table.columns[*i].0)?;
            (relation.columns[place].type_oid == table.type_oids[*i]).then_some(place)
        };
        self.places.insert(relation.oid, table.key.iter().map(place).collect());
    }

    fn note_row(&mut self, oid: u32, tuple: Tuple<'_>, at: Lsn) -> Result<()> {
        let Some(table) = self.tables.iter().find(|table| table.oid == oid) else { return Ok(()) };
        let cells: Vec<_> = tuple.cells().collect();
        let changed = self.changed.entry(oid).or_default();
        let places = self.places.get(&oid).and_then(Option::as_deref);
        let key: Option<Vec<_>> = places.and_then(|places| places.iter().map(|i| cells.get(*i).copied()).collect());
        // A key that came or was changed meanwhile: which row it was cannot be told.
        let Some(key) = key else {
            changed.emptied = Some(at.0);
            return Ok(());
        };
        for form in [Form::Json, Form::Warehouse] {
            let values = table.key.iter().zip(&key).map(|(i, cell)| canonical(form, table.columns[*i].1, *cell));
            let values: Vec<_> = values.collect::<Result<_>>()?;
            let mut values = values.into_iter();
            if let Some(key) = table.key_text(|_| values.next()) {
                changed.note(&key, at.0);
            }
        }
        Ok(())
    }

    /// Compares each row of a table.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when the connection is lost; [`Error::Refused`] for want of SELECT.
    pub(super) async fn compare(&self, table: &Table, form: Form, comparison: &mut Comparison<'_>) -> Result<()> {
        let failed = |e: tokio_postgres::Error| sql_error(&format!("reading table {}", table.name), &e);
        let mut rows = pin!(self.client.simple_query_raw(&table.select).await.map_err(failed)?);
        while let Some(message) = rows.try_next().await.map_err(failed)? {
            let SimpleQueryMessage::Row(row) = message else { continue };
            let cell = |i: usize| row.get(i + 1).map_or(Cell::Null, |text| Cell::Text(text.as_bytes()));
            let values = table.columns.iter().enumerate().map(|(i, (_, ty))| canonical(form, *ty, cell(i)));
            let values: Vec<String> = values.collect::<Result<_>>()?;
            let Some(key) = table.key_text(|column| values.get(column).cloned()) else { continue };
            let hashes: Vec<_> = values.iter().map(|value| hash(value)).collect();
            let xmin = row.get(0).and_then(|xmin| xmin.parse().ok());
            let is_older =
                self.older.as_ref().zip(xmin).is_some_and(|(older, xmin)| older.had_ended(self.sees.writer(xmin)));
            comparison.take(&SourceRow { key: &key, values: &hashes, is_older });
        }
        Ok(())
    }
}

fn adoption(snapshot: &Snapshot) -> Result<Adoption> {
    Adoption::parse(snapshot).ok_or_else(|| Error::fatal("reading a snapshot", format_args!("{:?}", snapshot.xids)))
}

fn copy_name(slot: &str) -> String {
    let short: String = slot.chars().take(40).collect();
    format!("{short}_verify_{}", std::process::id())
}

/// A transaction that commits asynchronously is seen before its WAL is flushed, and the slot is read no further than that. The
/// WAL writer flushes such commits within three of its rounds; what is not flushed then belongs to none that is seen.
async fn wait_for_flush(world: &World, client: &Client, lsn: Lsn) -> Result<()> {
    let sql = "SELECT setting::int FROM pg_catalog.pg_settings WHERE name = 'wal_writer_delay'";
    let row = client.query_one(sql, &[]).await.map_err(|e| sql_error("reading a setting", &e))?;
    let rounds = Duration::from_millis(u64::from(row.get::<_, i32>(0).unsigned_abs()) * 3);
    let began = Instant::now();
    while slot::server_lsn(client).await? < lsn && began.elapsed() < rounds + FLUSH_SLACK {
        world.pause(LOOK_EVERY).await?;
    }
    Ok(())
}

async fn tables(client: &Client, publication: &str) -> Result<Vec<Table>> {
    let published = catalog::published(client, publication).await?;
    if published.is_empty() {
        return Err(Error::refused(
            "publication",
            format!("publication \"{publication}\" is not there, or has no table"),
            "a publication of the tables to compare",
            "falaj init",
        ));
    }
    Ok(published.iter().map(Table::of).collect())
}
