//! Enrichment as a fold over the stream: lookup rows are changed by the stream itself, in commit order, so every event
//! sees them *as of its own position*. No query, no clock, no poll.

pub(crate) mod adoption;
mod cache;
pub mod derive;
mod moment;
mod plan;
mod row;
pub mod state;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::Path;

use crate::change::Change;
use crate::config;
use crate::error::{Error, Result};
use crate::event::{Cells, Layout};
use crate::lsn::{Checkpoint, Lsn, Position, SlotIdentity};
use crate::pgoutput::{Cell, Tuple};
use crate::schema::Relation;
use crate::value::Converted;
use adoption::Adoption;
use cache::Cache;
pub use moment::Moment;
pub use plan::{Plan, layout};
use plan::{extend, fetch_ahead};
use state::{BaseHeader, BaseWriter, ChangeLog, Entry, LookupChange, LookupTable};

/// A log beyond this size is folded into a new base when a session begins.
const COMPACT_AT: u64 = 4 << 20;
/// A session during which the log has grown by this much, and by twice the base, makes room for another one.
const OUTGROWN: u64 = 64 << 20;

/// The lookup tables and their columns that a configuration joins; several tables may share one.
pub fn wanted(tables: &[config::Table]) -> Vec<(String, Vec<String>)> {
    let mut wanted: Vec<(String, Vec<String>)> = Vec::new();
    for lookup in tables.iter().filter_map(|t| t.lookup.as_ref()) {
        let at = wanted.iter().position(|(table, _)| *table == lookup.table).unwrap_or_else(|| {
            wanted.push((lookup.table.clone(), Vec::new()));
            wanted.len() - 1
        });
        for column in &lookup.columns {
            if !wanted[at].1.contains(column) {
                wanted[at].1.push(column.clone());
            }
        }
    }
    wanted
}

/// Whether a state is that of this stream.
///
/// # Errors
/// [`Error::Refused`] with both identities.
pub fn require_identity(dir: &Path, header: &BaseHeader, identity: &SlotIdentity) -> Result<()> {
    match header.identity == *identity {
        true => Ok(()),
        false => Err(refused(dir, format!("the state of {}; this is {identity}", header.identity))),
    }
}

/// Whether a state has the lookup columns of the configuration.
///
/// # Errors
/// [`Error::Refused`] with the first one that it lacks.
pub fn require_columns(dir: &Path, known: &[LookupTable], tables: &[config::Table]) -> Result<()> {
    for (table, columns) in wanted(tables) {
        // A lookup that no published table uses is in no base; one that a table needs is looked for in `layout`.
        let Some(found) = known.iter().find(|t| t.table == table) else { continue };
        if let Some(column) = columns.iter().find(|c| !found.columns.iter().any(|k| k.name == **c)) {
            return Err(refused(dir, format!("no column \"{column}\" of lookup table \"{table}\"")));
        }
    }
    Ok(())
}

/// Whether the lookup tables of a state are, in the catalogue, still what the stream has shown. `published` are its tables, with the
/// numbers of their columns.
///
/// # Errors
/// The refusal with which the stream would stop at the table's next row.
pub fn require_same(tables: &[LookupTable], published: &[(&Relation, BTreeMap<String, i16>)]) -> Result<()> {
    for cache in Cache::all(tables) {
        let named = published.iter().find(|(r, _)| r.table() == cache.table.table);
        let renamed = published.iter().find(|(r, _)| Some(r.oid) == cache.table.oid);
        match (named, renamed) {
            (Some((relation, numbers)), _) => drop(cache.under(relation, numbers)?),
            (None, Some((relation, _))) => return Err(cache.renamed(relation)),
            (None, None) => {}
        }
    }
    Ok(())
}

/// The cached lookup tables and the log that makes them last.
pub struct Enricher {
    caches: Vec<Cache>,
    log: ChangeLog,
    /// How long the log may become in this session, in bytes.
    room: u64,
    /// The loaded state holds every change below it.
    from: Lsn,
    origin: Lsn,
    /// Last change of the rows: what a position names, so that an older copy of the state is not taken for this one.
    pub changed: Position,
    adoption: Option<Adoption>,
    /// Look-ups that found a row, since the start.
    pub hits: u64,
    /// Look-ups that found none: the event has NULL columns.
    pub misses: u64,
}

impl Enricher {
    /// Builds the lookup rows as of `upto` from the state directory.
    ///
    /// # Errors
    /// [`Error::Refused`] for a state that is missing, of another stream, without a configured column, or an older copy.
    pub fn load(dir: &Path, upto: Checkpoint, identity: &SlotIdentity, tables: &[config::Table]) -> Result<Self> {
        let mut caches: Vec<Cache> = Vec::new();
        let (header, last, log) = state::load(dir, upto.resume, |header, table, change| {
            if caches.is_empty() {
                caches = Cache::all(&header.tables);
            }
            match caches.get_mut(table) {
                Some(cache) => cache.apply(change),
                None => return Err(refused(dir, format!("a row of table number {table}"))),
            }
            Ok(())
        })?;
        if caches.is_empty() {
            caches = Cache::all(&header.tables);
        }
        require_identity(dir, &header, identity)?;
        require_columns(dir, &header.tables, tables)?;
        let named = upto.lookups.unwrap_or(last);
        if named > last && !header.holds(named) {
            return Err(state::older(dir, last, named));
        }
        let adoption = header.adopted_snapshot.as_ref().map(|snapshot| {
            Adoption::parse(snapshot).ok_or_else(|| refused(dir, format!("adopted_snapshot is {snapshot:?}")))
        });
        let (adoption, origin) = (adoption.transpose()?, header.origin);
        let changed = last.max(named);
        let bytes = log.bytes()?;
        let room = bytes + OUTGROWN.max(2 * state::base_bytes(dir)?);
        let loaded = Self { caches, log, room, from: upto.resume, origin, changed, adoption, hits: 0, misses: 0 };
        let compact = bytes > COMPACT_AT && !loaded.log.has_tail()?;
        if compact { loaded.compact(dir, header, upto.resume) } else { Ok(loaded) }
    }

    /// Writes the rows as of `lsn` as the new base, so that the log does not grow with the years.
    fn compact(mut self, dir: &Path, header: BaseHeader, lsn: Lsn) -> Result<Self> {
        write_base(dir, BaseHeader { lsn, changed: Some(self.changed), ..header }, &self.caches)?;
        self.log = ChangeLog::empty(dir)?;
        self.room = OUTGROWN.max(2 * state::base_bytes(dir)?);
        Ok(self)
    }

    /// Makes the rows as they are, those as of `lsn`, the base of an installation that begins there.
    ///
    /// # Errors
    /// [`Error::Fatal`] when the disk refuses.
    pub fn begin_at(mut self, dir: &Path, slot: &str, lsn: Lsn) -> Result<()> {
        // What is still buffered must not be written behind the end of the emptied log.
        self.log.sync()?;
        let header = state::require_header(dir, slot)?;
        self.compact(dir, BaseHeader { origin: lsn, ..header }, lsn).map(drop)
    }

    /// Where the slot stood when the state was made: a sink without a position may start only from here.
    pub fn origin(&self) -> Lsn {
        self.origin
    }

    /// Whether the log should be folded into a new base, which another session does where the sinks have everything.
    ///
    /// # Errors
    /// [`Error::Fatal`] when the disk refuses.
    pub fn is_outgrown(&self) -> Result<bool> {
        Ok(self.log.bytes()? > self.room)
    }

    /// Cached rows of all lookup tables.
    pub fn rows(&self) -> usize {
        self.caches.iter().map(|c| c.rows.len()).sum()
    }

    /// Plans the layout of a relation's events.
    ///
    /// # Errors
    /// [`Error::Refused`] for a configured column that the relation has not, or a name that would stand twice.
    pub fn layout(
        &self,
        generation: u32,
        relation: Relation,
        primary_key: Vec<usize>,
        config: Option<&config::Table>,
    ) -> Result<Layout> {
        layout(self.caches.iter().map(|c| &c.table), generation, relation, primary_key, config)
    }

    /// Appends lookup and derived columns to the source columns of a row. `scratch` holds the derived texts.
    ///
    /// # Errors
    /// [`crate::value::BadValue`] when a cell is not of its column's type.
    pub fn extend<'a>(&'a mut self, layout: &Layout, cells: &mut Cells<'a>, scratch: &'a mut Vec<u8>) -> Converted<()> {
        match extend(&self.caches, layout, cells, scratch)? {
            Some(true) => self.hits += 1,
            Some(false) => self.misses += 1,
            None => {}
        }
        Ok(())
    }

    /// Prepares for [`Enricher::extend`] of a row that is about to come: a cached row that no core has in its own cache takes as
    /// long to come as all the rest of an event to be made, if it is waited for.
    pub fn fetch_ahead(&self, layout: &Layout, row: Tuple<'_>, scratch: &mut Vec<u8>) {
        fetch_ahead(&self.caches, layout, row, scratch);
    }

    /// Appends NULL lookup and derived columns: for the delete of a row of which only the key is known.
    pub fn extend_with_nulls(layout: &Layout, cells: &mut Cells<'_>) {
        cells.resize(layout.columns.len(), Cell::Null);
    }

    /// Index of the lookup table with this name.
    pub fn lookup(&self, table: &str) -> Option<usize> {
        self.caches.iter().position(|c| c.table.table == table)
    }

    /// A lookup table's schema has come, in transaction `xid`: remembers its columns' types. Says whether they have changed.
    /// `numbers` are those of its columns in the catalogue.
    ///
    /// Rows that were adopted are as of a later moment than the transactions that the adoption saw: a schema of these that
    /// does not fit has been left behind, and its rows are not followed.
    ///
    /// # Errors
    /// [`Error::Refused`] when the key or a joined column is gone, when it is another table, or when the cached rows cannot
    /// be what the table holds now; [`Error::Fatal`] when the disk refuses.
    pub fn relation(
        &mut self,
        table: usize,
        relation: &Relation,
        numbers: &BTreeMap<String, i16>,
        next: Position,
        xid: Option<u32>,
    ) -> Result<bool> {
        let seen = self.adopted(next, xid);
        let cache = &mut self.caches[table];
        let none = BTreeMap::new();
        let under = cache.under(relation, if seen { &none } else { numbers });
        // The server describes a relation once, which may be below what is loaded, and rows of it may come after that.
        cache.follows = !seen || (matches!(under, Ok(None)) && cache.fits(relation));
        // The loaded state has it already.
        if !cache.follows || next.commit_lsn < self.from {
            return Ok(false);
        }
        let Some(fresh) = under? else { return Ok(false) };
        let changed = fresh.columns != cache.table.columns;
        self.record(table, next, LookupChange::Relation(fresh))?;
        Ok(changed)
    }

    /// The schema of a table that is no lookup table by its name.
    ///
    /// # Errors
    /// [`Error::Refused`] when it was one until now: its rows would no longer be followed.
    pub fn require_no_lookup(&self, relation: &Relation, next: Position, xid: Option<u32>) -> Result<()> {
        let renamed = self.caches.iter().find(|c| c.table.oid == Some(relation.oid));
        match renamed.filter(|_| next.commit_lsn >= self.from && !self.adopted(next, xid)) {
            Some(cache) => Err(cache.renamed(relation)),
            None => Ok(()),
        }
    }

    /// Whether the adopted rows are already as of a transaction.
    fn adopted(&self, at: Position, xid: Option<u32>) -> bool {
        self.adoption.as_ref().zip(xid).is_some_and(|(adoption, xid)| adoption.saw(at.commit_lsn, xid))
    }

    /// Folds a change of a lookup table into the cache and the log. What the loaded state already holds is left out.
    ///
    /// # Errors
    /// [`Error::Fatal`] for a value that is not of its type, a row without a key, or a disk that refuses.
    pub fn fold(&mut self, table: usize, relation: &Relation, change: &Change<'_>) -> Result<()> {
        if change.at.commit_lsn < self.from || !self.caches[table].follows {
            return Ok(());
        }
        let folded = self.caches[table].fold(relation, change.row)?;
        folded.into_iter().try_for_each(|f| self.record(table, change.at, f))
    }

    fn record(&mut self, table: usize, at: Position, change: LookupChange) -> Result<()> {
        // Most updates of a busy lookup table touch no joined column. The log goes on with such an entry only where it has it.
        let idle = self.caches[table].has(&change);
        let entry = Entry { at, table, change };
        match idle {
            true if !self.log.is_next(&entry)? => return Ok(()),
            true => {}
            false => self.log.append(&entry)?,
        }
        self.changed = self.changed.max(at);
        self.caches[table].apply(entry.change);
        Ok(())
    }

    /// Makes every folded change durable. To be called before a sink gets what lies beyond it: then the state is never behind.
    ///
    /// # Errors
    /// [`Error::Fatal`] when the disk refuses.
    pub fn sync(&mut self) -> Result<()> {
        self.log.sync()
    }
}

/// Writes the lookup rows as of `upto` to another directory, as those with which `slot` begins there. The state may be in
/// use by a `produce`.
///
/// # Errors
/// [`Error::Refused`] for a state that is missing, or whose rows are of a later moment; [`Error::Fatal`] from the disk.
pub fn copy_state(dir: &Path, upto: Lsn, to: &Path, slot: &str) -> Result<()> {
    loop {
        let mut caches: Vec<Cache> = Vec::new();
        let header = state::read(dir, upto, |header, table, change| {
            if caches.is_empty() {
                caches = Cache::all(&header.tables);
            }
            let cache = caches.get_mut(table).ok_or_else(|| refused(dir, format!("a row of table number {table}")))?;
            Ok(cache.apply(change))
        })?;
        // A new base that came in between has emptied the log: read both again.
        if state::header(dir)?.as_ref() != Some(&header) {
            continue;
        }
        if caches.is_empty() {
            caches = Cache::all(&header.tables);
        }
        let identity = SlotIdentity { slot: slot.to_owned(), ..header.identity };
        return write_base(to, BaseHeader { identity, lsn: upto, origin: upto, changed: None, ..header }, &caches);
    }
}

fn write_base(dir: &Path, header: BaseHeader, caches: &[Cache]) -> Result<()> {
    let tables = caches.iter().map(|c| c.table.clone()).collect();
    let mut base = BaseWriter::create(dir, &BaseHeader { tables, ..header })?;
    for (index, cache) in caches.iter().enumerate() {
        for row in &cache.rows {
            let texts = row.key().and_then(|key| Ok((key, row.texts()?)));
            let (key, values) = texts.map_err(|e| Error::fatal("a lookup row's texts", e))?;
            base.row(index, key, &values)?;
        }
    }
    base.finish()
}

fn refused(dir: &Path, found: String) -> Error {
    Error::refused(
        "lookup_state",
        format!("{}: {found}", dir.display()),
        "the lookup state of this slot, with every lookup column of the configuration",
        state::RESTORE,
    )
}
