//! The walk of one chunk: message → change → event → sinks; lookup changes into the fold.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::Arc;
use std::time::Instant;

use hashbrown::HashMap;
use tokio_postgres::Client;

use super::history::History;
use super::lag::Lag;
use super::messages::Messages;
use super::row;
use super::until::{Reached, Until};
use crate::change::{Assembler, Change, Step};
use crate::config;
use crate::enrich::Enricher;
use crate::error::{Error, Refusal, Result};
use crate::event::Layout;
use crate::lsn::{Checkpoint, Commit, Lsn, Position};
use crate::message::Sent;
use crate::pgoutput::{self, Message, ParseError};
use crate::schema::Relation;
use crate::sink::Sink;
use crate::source::chunk::{Chunk, Frame};
use crate::source::slot::{self, WireForm};
use crate::source::types::{self, Told};

/// Everything the walk knows between two messages.
pub(super) struct Walk {
    pub(super) enricher: Enricher,
    client: Client,
    form: WireForm,
    tables: Vec<config::Table>,
    assembler: Assembler,
    told: Told,
    layouts: HashMap<u32, Known>,
    /// Relations that have been described, before their next row. Beside a partitioned table the server describes each of its
    /// partitions too, although their rows come as the root's: those are never planned.
    described: HashMap<u32, Relation>,
    messages: Messages,
    /// The sinks want the old row of every update that brings it.
    pub(super) keep_old: bool,
    generations: u32,
    /// What every sink of this run has already.
    have: Checkpoint,
    /// End of the last whole transaction, or an idle position.
    resume: Lsn,
    /// Last change of the open transaction.
    last: Option<Position>,
    /// Last change of the lookup rows below `resume`.
    lookups: Position,
    pub(super) history: History,
    /// The server waits for an acknowledgement.
    wanted: bool,
    scratch: Vec<u8>,
    lag: Lag,
    events: u64,
    started: Instant,
}

/// A relation that the stream has described.
struct Known {
    relation: Relation,
    primary_key: Vec<usize>,
    planned: Planned,
    /// Index of the lookup table that this relation is.
    lookup: Option<usize>,
}

/// How its events look, or why they cannot be made. That is said only once an event has to be made: a session may begin
/// with rows that every sink has, written under a schema that the configuration no longer knows.
enum Planned {
    Layout(Arc<Layout>),
    Refused(Refusal),
}

/// A frame with its message.
enum Parsed<'a> {
    Message(std::result::Result<Message<'a>, ParseError>),
    Keepalive { wal_end: Lsn, reply: bool },
}

impl<'a> From<Frame<'a>> for Parsed<'a> {
    fn from(frame: Frame<'a>) -> Self {
        match frame {
            Frame::Data(bytes) => Self::Message(pgoutput::parse(bytes, false)),
            Frame::Keepalive { wal_end, reply } => Self::Keepalive { wal_end, reply },
        }
    }
}

fn undecoded(error: impl Display) -> Error {
    Error::fatal("decoding the replication stream", error)
}

impl Walk {
    pub(super) fn new(
        client: Client,
        form: WireForm,
        enricher: Enricher,
        tables: Vec<config::Table>,
        from: Lsn,
        have: Checkpoint,
        history: History,
    ) -> Self {
        Self {
            lookups: enricher.changed,
            enricher,
            client,
            form,
            tables,
            assembler: Assembler::default(),
            told: Told::default(),
            layouts: HashMap::new(),
            described: HashMap::new(),
            messages: Messages::default(),
            keep_old: false,
            generations: 0,
            have,
            resume: from,
            last: None,
            history,
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
        let Self { resume, last: partial, .. } = *self;
        Checkpoint { resume, partial, lookups: Some(self.lookups), commit: self.history.last }
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

    /// Walks every frame; stops early where `until` says so. While one is walked, the lookup row of the next one comes from
    /// memory.
    pub(super) async fn chunk(
        &mut self,
        chunk: &Chunk,
        sinks: &mut [Box<dyn Sink>],
        mut until: Option<&mut Until>,
    ) -> Result<Option<Reached>> {
        let mut frames = chunk.frames().map(Parsed::from);
        let mut next = frames.next();
        while let Some(parsed) = next {
            next = frames.next();
            if let Some(Parsed::Message(Ok(message))) = &next {
                self.fetch_ahead(message);
            }
            let reached = match parsed {
                Parsed::Message(message) => {
                    self.message(message.map_err(undecoded)?, sinks, until.as_deref_mut()).await?
                }
                Parsed::Keepalive { wal_end, reply } => self.keepalive(wal_end, reply, until.as_deref())?,
            };
            if reached.is_some() {
                return Ok(reached);
            }
        }
        Ok(None)
    }

    fn fetch_ahead(&mut self, message: &Message<'_>) {
        let (Message::Insert { relation, new } | Message::Update { relation, new, .. }) = message else { return };
        if let Some(Known { planned: Planned::Layout(layout), .. }) = self.layouts.get(relation) {
            self.enricher.fetch_ahead(layout, *new, &mut self.scratch);
        }
    }

    /// Everything committed below `wal_end` has been sent; with nothing open that is a position too.
    fn keepalive(&mut self, wal_end: Lsn, reply: bool, until: Option<&Until>) -> Result<Option<Reached>> {
        self.wanted |= reply;
        if self.assembler.open().is_some() {
            return Ok(None);
        }
        self.history.passes(wal_end)?;
        let reached = until.and_then(|u| u.idle(wal_end));
        if reached.is_none() {
            self.reach(wal_end);
        }
        Ok(reached)
    }

    async fn message(
        &mut self,
        message: Message<'_>,
        sinks: &mut [Box<dyn Sink>],
        until: Option<&mut Until>,
    ) -> Result<Option<Reached>> {
        if !self.described.is_empty() {
            self.meet(&message, sinks).await?;
        }
        let open = self.assembler.open();
        match self.assembler.push(message).map_err(undecoded)? {
            Step::Change(change) => self.change(&change, sinks)?,
            Step::Truncate(changes) => changes.iter().try_for_each(|change| self.change(change, sinks))?,
            Step::Type { oid, namespace, name } => self.told.tell(oid, namespace, name),
            Step::Relation(mut relation) => {
                types::resolve(&self.client, &mut relation.columns, &self.told).await?;
                if self.form == WireForm::Binary && !relation.columns.iter().all(|c| c.ty().has_binary()) {
                    return Ok(Some(Reached::ReadInText));
                }
                self.described.insert(relation.oid, relation);
            }
            Step::Begin => {
                let Some(commit) = self.assembler.transaction() else { return Ok(None) };
                self.history.begins(commit)?;
                return Ok(until.and_then(|u| u.begin(commit.lsn, self.resume)));
            }
            Step::Commit { end_lsn, commit_ts } => {
                return self.commit(open.unwrap_or_default(), end_lsn, commit_ts, sinks, until);
            }
            Step::Message(sent) => return self.sent(sent, sinks, until).await,
            Step::Other => {}
        }
        Ok(None)
    }

    /// Plans the relations of a row or truncate whose description has come since the last one.
    async fn meet(&mut self, message: &Message<'_>, sinks: &mut [Box<dyn Sink>]) -> Result<()> {
        let relations = match message {
            Message::Insert { relation, .. } | Message::Update { relation, .. } | Message::Delete { relation, .. } => {
                std::slice::from_ref(relation)
            }
            Message::Truncate { relations, .. } => relations,
            _ => return Ok(()),
        };
        for oid in relations {
            if let Some(relation) = self.described.remove(oid) {
                self.relation(relation, sinks).await?;
            }
        }
        Ok(())
    }

    /// A message of `pg_logical_emit_message`. One of a transaction waits for the row behind it, or for the commit.
    async fn sent(
        &mut self,
        sent: Sent<'_>,
        sinks: &mut [Box<dyn Sink>],
        until: Option<&mut Until>,
    ) -> Result<Option<Reached>> {
        if self.messages.prepare(self.generations, sinks).await? {
            self.generations += 1;
        }
        if sent.commit_ts.is_some() {
            return self.messages.wait(sent).map(|()| None);
        }
        self.history.passes(sent.lsn)?;
        let reached = until.and_then(|u| u.message(sent.lsn, self.resume));
        if reached.is_none() {
            self.messages.push(sent, sinks)?;
            self.events += 1;
            self.reach(sent.lsn);
        }
        Ok(reached)
    }

    fn commit(
        &mut self,
        commit_lsn: Lsn,
        end_lsn: Lsn,
        commit_ts: i64,
        sinks: &mut [Box<dyn Sink>],
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
        self.events += self.messages.push_waiting(None, sinks)?;
        (self.resume, self.last) = (self.resume.max(end_lsn), None);
        self.history.ends();
        self.lookups = self.enricher.changed;
        self.lag.committed(end_lsn, commit_ts);
        Ok(None)
    }

    /// A new schema: plans its events, and tells lookup cache and sinks. The same schema again changes nothing.
    async fn relation(&mut self, relation: Relation, sinks: &mut [Box<dyn Sink>]) -> Result<()> {
        let primary_key = slot::primary_key(&self.client, &relation).await?;
        let lookup = self.enricher.lookup(&relation.table());
        let numbers = match lookup {
            Some(_) => slot::column_numbers(&self.client, relation.oid).await?,
            None => BTreeMap::new(),
        };
        let changed = self.follow(lookup, &relation, &numbers)?;
        let oid = relation.oid;
        let same = |known: &Known| known.relation == relation && known.primary_key == primary_key;
        if !self.layouts.get(&oid).is_some_and(same) {
            self.messages.refuse_same_name(&relation.table())?;
            self.refuse_same_name(&relation)?;
            let known = self.plan(relation, primary_key, lookup, sinks).await?;
            self.layouts.insert(oid, known);
        }
        if changed { self.plan_again(oid, sinks).await } else { Ok(()) }
    }

    /// Tells the lookup cache of a schema; says whether the events that a lookup table enriches have to be planned anew.
    fn follow(&mut self, lookup: Option<usize>, relation: &Relation, numbers: &BTreeMap<String, i16>) -> Result<bool> {
        let next = self.assembler.next().unwrap_or(Position { commit_lsn: self.resume, ordinal: 0 });
        let xid = self.assembler.xid();
        match lookup {
            Some(lookup) => self.enricher.relation(lookup, relation, numbers, next, xid),
            None => self.enricher.require_no_lookup(relation, next, xid).map(|()| false),
        }
    }

    async fn plan(
        &mut self,
        relation: Relation,
        primary_key: Vec<usize>,
        lookup: Option<usize>,
        sinks: &mut [Box<dyn Sink>],
    ) -> Result<Known> {
        let table = relation.table();
        let config = self.tables.iter().find(|t| t.name == table);
        let planned = match self.enricher.layout(self.generations, relation.clone(), primary_key.clone(), config) {
            Ok(layout) => {
                let layout = Arc::new(layout);
                self.generations += 1;
                for sink in sinks {
                    sink.prepare(&layout).await?;
                }
                Planned::Layout(layout)
            }
            Err(Error::Refused(refusal)) => Planned::Refused(refusal),
            Err(error) => return Err(error),
        };
        Ok(Known { relation, primary_key, planned, lookup })
    }

    /// A lookup table has changed its columns' types: the events that it enriches look different from here on.
    async fn plan_again(&mut self, changed: u32, sinks: &mut [Box<dyn Sink>]) -> Result<()> {
        let Some(table) = self.layouts.get(&changed).map(|known| known.relation.table()) else { return Ok(()) };
        let joins = |name: &str| {
            self.tables.iter().any(|t| t.name == name && t.lookup.as_ref().is_some_and(|l| l.table == table))
        };
        let of = |known: &Known| joins(&known.relation.table());
        let dependent: Vec<u32> = self.layouts.iter().filter(|(_, known)| of(known)).map(|(oid, _)| *oid).collect();
        for oid in dependent {
            if let Some(Known { relation, primary_key, lookup, .. }) = self.layouts.remove(&oid) {
                let known = self.plan(relation, primary_key, lookup, sinks).await?;
                self.layouts.insert(oid, known);
            }
        }
        Ok(())
    }

    /// `a.b` may be table b of schema a, or a table of schema public: two of one name must not share a topic.
    /// A table that was dropped and made anew has another oid, but the same schema and name: that is the same table.
    fn refuse_same_name(&self, relation: &Relation) -> Result<()> {
        let clash = |known: &Known| {
            let other = &known.relation;
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
        self.history.has_row()?;
        let Some(known) = self.layouts.get(&change.relation) else {
            return Err(Error::Fatal(format!(
                "{}: a row of relation {} before its schema",
                change.at, change.relation
            )));
        };
        match &known.planned {
            Planned::Layout(layout) => {
                let event = row::event(&mut self.enricher, &mut self.scratch, layout, change, self.keep_old)?;
                match self.messages.is_empty() {
                    true => sinks.iter_mut().try_for_each(|sink| sink.push(&event))?,
                    false => self.events += self.messages.push_waiting(Some(&event), sinks)?,
                }
            }
            Planned::Refused(_) if self.have.has(change.at) => {
                self.events += self.messages.push_waiting(None, sinks)?;
            }
            Planned::Refused(refusal) => return Err(Error::Refused(refusal.clone())),
        }
        if let Some(lookup) = known.lookup {
            self.enricher.fold(lookup, &known.relation, change)?;
        }
        self.last = Some(change.at);
        self.history.last = Some(Commit { lsn: change.at.commit_lsn, ts: change.commit_ts });
        self.events += 1;
        Ok(())
    }
}
