//! Lookup rows of one moment: for copies, whose events are all as of one snapshot.

use super::cache::Cache;
use super::plan::extend;
use super::state::LookupTable;
use crate::config;
use crate::error::Result;
use crate::event::{Cells, Layout};
use crate::schema::Relation;
use crate::value::Converted;

/// Lookup tables as one snapshot shows them. They do not change, so threads share them.
pub struct Moment {
    caches: Vec<Cache>,
}

impl Moment {
    /// The tables, without a row.
    pub fn new(tables: impl IntoIterator<Item = LookupTable>) -> Self {
        let tables: Vec<LookupTable> = tables.into_iter().collect();
        Self { caches: Cache::all(&tables) }
    }

    /// Adds a row of table number `table`.
    pub fn put(&mut self, table: usize, key: &str, values: &[Option<&str>]) {
        if let Some(cache) = self.caches.get_mut(table) {
            cache.put(key, values.iter().copied());
        }
    }

    /// Plans the layout of a relation's events.
    ///
    /// # Errors
    /// As [`super::layout`].
    pub fn layout(
        &self,
        generation: u32,
        relation: Relation,
        primary_key: Vec<usize>,
        config: Option<&config::Table>,
    ) -> Result<Layout> {
        super::layout(self.caches.iter().map(|c| &c.table), generation, relation, primary_key, config)
    }

    /// Appends lookup and derived columns to the source columns of a row. `scratch` holds the derived texts.
    ///
    /// # Errors
    /// [`crate::value::BadValue`] when a cell is not of its column's type.
    pub fn extend<'a>(&'a self, layout: &Layout, cells: &mut Cells<'a>, scratch: &'a mut Vec<u8>) -> Converted<()> {
        extend(&self.caches, layout, cells, scratch).map(drop)
    }
}
