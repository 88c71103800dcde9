//! The walk of one chunk: message → change → event → sinks; lookup changes into the fold.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use tokio_postgres::Client;

use super::lag::Lag;
use super::until::{Reached, Until};
use crate::change::{Assembler, Change, Op, RowChange, Step};
use crate::config;
use crate::enrich::Enricher;
use crate::error::{Error, Result};
use crate::event::{Cells, Event, Layout, OldKey};
use crate::lsn::{Checkpoint, Lsn, Position};
use crate::pgoutput::{self, Cell, Old, Tuple};
use crate::schema::Relation;
use crate::sink::Sink;
use crate::source::chunk::{Chunk, Frame};
use crate::source::slot::{self, WireForm};

/// Everything the walk knows between two messages.
pub(super) struct Walk {
    pub(super) enricher: Enricher,
    client: Client,
    form: WireForm,
    tables: Vec<config::Table>,
    assembler: Assembler,
    layouts: HashMap<u32, Known>,
    generations: u32,
    /// End of the last whole transaction, or an idle position.
    resume: Lsn,
    /// Last change of the open transaction.
    last: Option<Position>,
    /// The server waits for an acknowledgement.
    wanted: bool,
    scratch: Vec<u8>,
    lag: Lag,
    events: u64,
    started: Instant,
}

struct Known {
    layout: Arc<Layout>,
    /// Index of the lookup table that this relation is.
    lookup: Option<usize>,
}

impl Walk {
    pub(super) fn new(
        client: Client,
        form: WireForm,
        enricher: Enricher,
        tables: Vec<config::Table>,
        from: Lsn,
    ) -> Self {
        Self {
            enricher,
            client,
            form,
            tables,
            assembler: Assembler::default(),
            layouts: HashMap::new(),
            generations: 0,
            resume: from,
            last: None,
            wanted: false,
            scratch: Vec::new(),
            lag: Lag::default(),
            events: 0,
            started: Instant::now(),
        }
    }

    /// Events walked so far.
    pub(super) fn events(&self) -> u64 {
        self.events
    }

    /// Seconds since the session began to stream.
    pub(super) fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// How far everything has been pushed to the sinks.
    pub(super) fn checkpoint(&self) -> Checkpoint {
        Checkpoint { resume: self.resume, partial: self.last }
    }

    /// Nothing up to `at` is missing, although no transaction ended there.
    pub(super) fn reach(&mut self, at: Lsn) {
        self.resume = self.resume.max(at);
    }

    /// Whether the server has asked for an acknowledgement since the last call.
    pub(super) fn take_wanted(&mut self) -> bool {
        std::mem::take(&mut self.wanted)
    }

    pub(super) fn measure(&mut self, sinks: &[Box<dyn Sink>]) {
        self.lag.measure(self.resume, sinks);
        metrics::counter!("falaj_produce_events_total").absolute(self.events);
        metrics::counter!("falaj_produce_lookup_hits_total").absolute(self.enricher.hits);
        metrics::counter!("falaj_produce_lookup_misses_total").absolute(self.enricher.misses);
        metrics::gauge!("falaj_produce_lookup_rows").set(self.enricher.rows() as f64);
    }

    /// Walks every frame; stops early where `until` says so.
    pub(super) async fn chunk(
        &mut self,
        chunk: &Chunk,
        sinks: &mut [Box<dyn Sink>],
        mut until: Option<&mut Until>,
    ) -> Result<Option<Reached>> {
        for frame in chunk.frames() {
            let reached = match frame {
                Frame::Data(bytes) => self.message(bytes, sinks, until.as_deref_mut()).await?,
                Frame::Keepalive { wal_end, reply } => self.keepalive(wal_end, reply, until.as_deref()),
            };
            if reached.is_some() {
                return Ok(reached);
            }
        }
        Ok(None)
    }

    /// Everything committed below `wal_end` has been sent; with nothing open that is a position too.
    fn keepalive(&mut self, wal_end: Lsn, reply: bool, until: Option<&Until>) -> Option<Reached> {
        self.wanted |= reply;
        if self.assembler.open().is_some() {
            return None;
        }
        let reached = until.and_then(|u| u.idle(wal_end));
        if reached.is_none() {
            self.reach(wal_end);
        }
        reached
    }

    async fn message(
        &mut self,
        bytes: &[u8],
        sinks: &mut [Box<dyn Sink>],
        until: Option<&mut Until>,
    ) -> Result<Option<Reached>> {
        let message = pgoutput::parse(bytes, false).map_err(|e| Error::fatal("decoding the replication stream", e))?;
        let open = self.assembler.open();
        match self.assembler.push(message).map_err(|e| Error::fatal("decoding the replication stream", e))? {
            Step::Change(change) => self.change(&change, sinks)?,
            Step::Truncate(changes) => changes.iter().try_for_each(|change| self.change(change, sinks))?,
            Step::Relation(relation) => {
                if self.form == WireForm::Binary && !relation.columns.iter().all(|c| c.ty().has_binary()) {
                    return Ok(Some(Reached::ReadInText));
                }
                self.relation(relation, sinks).await?;
            }
            Step::Begin => {
                let commit_lsn = self.assembler.open().unwrap_or_default();
                return Ok(until.and_then(|u| u.begin(commit_lsn, self.resume)));
            }
            Step::Commit { end_lsn, commit_ts } => {
                return self.commit(open.unwrap_or_default(), end_lsn, commit_ts, sinks, until);
            }
            Step::Other => {}
        }
        Ok(None)
    }

    fn commit(
        &mut self,
        commit_lsn: Lsn,
        end_lsn: Lsn,
        commit_ts: i64,
        sinks: &[Box<dyn Sink>],
        until: Option<&mut Until>,
    ) -> Result<Option<Reached>> {
        if let Some(until) = until {
            let mut halves = sinks.iter().filter_map(|s| s.stored().checkpoint().partial);
            let begun = halves.any(|p| p.commit_lsn == commit_lsn);
            let reached = until.commit(commit_lsn, end_lsn, begun)?;
            if reached.is_some() {
                return Ok(reached);
            }
        }
        (self.resume, self.last) = (self.resume.max(end_lsn), None);
        self.lag.committed(end_lsn, commit_ts);
        Ok(None)
    }

    /// A new schema: plans its events, and tells lookup cache and sinks. The same schema again changes nothing.
    async fn relation(&mut self, relation: Relation, sinks: &mut [Box<dyn Sink>]) -> Result<()> {
        let primary_key = slot::primary_key(&self.client, &relation).await?;
        if let Some(Known { layout, .. }) = self.layouts.get(&relation.oid)
            && layout.relation == relation
            && layout.primary_key == primary_key
        {
            return Ok(());
        }
        let (oid, table) = (relation.oid, relation.table());
        self.refuse_same_name(&relation)?;
        let lookup = self.enricher.lookup(&table);
        if let Some(lookup) = lookup {
            let next = self.assembler.next().unwrap_or(Position { commit_lsn: self.resume, ordinal: 0 });
            self.enricher.relation(lookup, &relation, next)?;
        }
        let config = self.tables.iter().find(|t| t.name == table);
        let layout = Arc::new(self.enricher.layout(self.generations, relation, primary_key, config)?);
        self.generations += 1;
        for sink in sinks {
            sink.prepare(&layout).await?;
        }
        self.layouts.insert(oid, Known { layout, lookup });
        Ok(())
    }

    /// `a.b` may be table b of schema a, or a table of schema public: two of one name must not share a topic.
    /// A table that was dropped and made anew has another oid, but the same schema and name: that is the same table.
    fn refuse_same_name(&self, relation: &Relation) -> Result<()> {
        let clash = |known: &Known| {
            let other = &known.layout.relation;
            other.table() == relation.table()
                && (&other.namespace, &other.name) != (&relation.namespace, &relation.name)
        };
        match self.layouts.values().any(clash) {
            false => Ok(()),
            true => Err(Error::refused(
                "table_names",
                format!("two published tables are called {} outside", relation.table()),
                "one name a table",
                "rename one of them, or take it out of the publication",
            )),
        }
    }

    fn change(&mut self, change: &Change<'_>, sinks: &mut [Box<dyn Sink>]) -> Result<()> {
        let Some(known) = self.layouts.get(&change.relation) else {
            return Err(Error::Fatal(format!(
                "{}: a row of relation {} before its schema",
                change.at, change.relation
            )));
        };
        let event = event(&mut self.enricher, &mut self.scratch, &known.layout, change)?;
        sinks.iter_mut().try_for_each(|sink| sink.push(&event))?;
        drop(event);
        if let Some(lookup) = known.lookup {
            self.enricher.fold(lookup, &known.layout.relation, change)?;
        }
        self.last = Some(change.at);
        self.events += 1;
        Ok(())
    }
}

/// Enriches a change as of its own position.
fn event<'a>(
    enricher: &'a mut Enricher,
    scratch: &'a mut Vec<u8>,
    layout: &'a Arc<Layout>,
    change: &Change<'a>,
) -> Result<Event<'a>> {
    let Change { at, commit_ts, row, .. } = *change;
    let mut event = Event { at, commit_ts, op: Op::Truncate, layout, cells: Cells::new(), old_key: None };
    match row {
        RowChange::Insert(new) => {
            event.op = Op::Create;
            read(new, at, layout, &mut event.cells)?;
        }
        RowChange::Update(old, new) => {
            event.op = Op::Update;
            read(new, at, layout, &mut event.cells)?;
            if let Some(old) = old {
                compare(old, at, &mut event)?;
            }
        }
        RowChange::Delete(Old::Full(old)) => {
            event.op = Op::Delete;
            read(old, at, layout, &mut event.cells)?;
        }
        RowChange::Delete(Old::Key(key)) => {
            event.op = Op::Delete;
            read(key, at, layout, &mut event.cells)?;
            Enricher::extend_with_nulls(layout, &mut event.cells);
            return Ok(event);
        }
        RowChange::Truncate => return Ok(event),
    }
    let extended = enricher.extend(layout, &mut event.cells, scratch);
    extended.map_err(|e| Error::fatal(format_args!("event {at} of table {}", layout.table), e))?;
    Ok(event)
}

/// Reads a row into `cells`, in place: they are large, and moving them costs more than reading.
fn read<'a>(tuple: Tuple<'a>, at: Position, layout: &Layout, cells: &mut Cells<'a>) -> Result<()> {
    let (found, needed) = (usize::from(tuple.len), layout.relation.columns.len());
    if found != needed {
        return Err(Error::Fatal(format!(
            "event {at} of table {}: a row of {found} columns; its schema has {needed}",
            layout.table
        )));
    }
    cells.extend(tuple.cells());
    Ok(())
}

/// Takes from the old row what the new one lacks, and the old key where it has changed.
fn compare<'a>(old: Old<'a>, at: Position, event: &mut Event<'a>) -> Result<()> {
    let mut before = Cells::new();
    read(old.tuple(), at, event.layout, &mut before)?;
    if let Old::Full(_) = old {
        fill_unchanged(&mut event.cells, &before);
    }
    let differs = |i: &usize| before[*i] != event.cells[*i] && event.cells[*i] != Cell::Unchanged;
    if event.layout.primary_key.iter().any(differs) {
        event.old_key = Some(OldKey::Row(before.into_vec()));
    }
    Ok(())
}

/// Under REPLICA IDENTITY FULL the old row has what the update did not touch.
fn fill_unchanged<'a>(new: &mut Cells<'a>, old: &Cells<'a>) {
    for (new, old) in new.iter_mut().zip(old).filter(|(new, _)| **new == Cell::Unchanged) {
        *new = *old;
    }
}
