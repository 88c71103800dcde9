//! The load as a pure function: what is written, in which transactions, in which order. No clock, no connection.

use std::collections::VecDeque;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use uuid::Uuid;

use super::catalog::{self, Catalog, Content, Subject};
use super::event::{Engagement, engagement};
use super::sessions::Sessions;

/// How many contents of its own a load starts with.
pub const STOCK: u64 = 240;

/// One transaction of the load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    /// In order.
    pub ops: Vec<Op>,
    /// How it ends.
    pub end: End,
    /// Engagement rows that it leaves in the table.
    pub committed: u64,
    /// Engagement rows that it writes and takes back, whole or by a savepoint.
    pub rolled_back: u64,
}

impl Transaction {
    /// Whether it writes `content`: then the order of it and its neighbours matters.
    pub fn touches_content(&self) -> bool {
        self.ops.iter().any(|op| matches!(op, Op::AddContent(_) | Op::ChangeContent(_)))
    }
}

/// How a transaction ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By COMMIT.
    Commit,
    /// By ROLLBACK.
    Rollback,
}

/// One step of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Engagement rows through one INSERT statement.
    Insert(Vec<Engagement>),
    /// Engagement rows through COPY.
    Copy(Vec<Engagement>),
    /// A new content, before the first event that may be about it.
    AddContent(Content),
    /// A content gets another title and, where it has a length, another length.
    ChangeContent(ContentChange),
    /// SAVEPOINT.
    Savepoint,
    /// ROLLBACK TO that savepoint.
    RollbackToSavepoint,
    /// RELEASE that savepoint.
    ReleaseSavepoint,
}

/// New values for a content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContentChange {
    /// Which one.
    pub id: Uuid,
    /// The new title.
    pub title: String,
    /// The new length; `None` where it stays.
    pub length_seconds: Option<i32>,
}

/// How dense the load is in time and in transactions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Committed engagement rows a second of the model's time.
    pub rows_per_second: f64,
    /// Most engagement rows in one transaction.
    pub most_rows: u64,
    /// What the sizes lean to: 1.0 spreads them evenly over the orders of magnitude, smaller values prefer large ones.
    pub lean: f64,
}

/// An endless stream of transactions; two models with the same arguments give the same ones.
#[derive(Debug)]
pub struct Model {
    seed: u64,
    pace: Pace,
    rng: StdRng,
    catalog: Catalog,
    sessions: Sessions,
    /// Committed so far: the model's clock.
    committed: u64,
    /// Numbers for contents and titles.
    numbered: u64,
    /// What may be sent again under a new id.
    recent: VecDeque<Engagement>,
}

/// The contents that a load of this seed starts with, oldest first.
pub fn stock(seed: u64) -> Vec<Content> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..STOCK).map(|n| catalog::content(seed, n, STOCK, &mut rng)).collect()
}

impl Model {
    /// A load over `subjects`, oldest first; they must be in `content` when the first transaction is written.
    pub fn new(seed: u64, pace: Pace, subjects: Vec<Subject>) -> Self {
        let mut rng = StdRng::seed_from_u64(seed.wrapping_add(1));
        let catalog = Catalog::new(subjects, &mut rng);
        let sessions = Sessions::new(pace.rows_per_second, &catalog, &mut rng);
        Self { seed, pace, rng, catalog, sessions, committed: 0, numbered: STOCK, recent: VecDeque::new() }
    }

    /// The model's time when `committed` rows are in, in microseconds after the start.
    pub fn time(&self, committed: u64) -> i64 {
        (committed as f64 / self.pace.rows_per_second * 1e6) as i64
    }

    /// The next transaction; it commits at most `budget` engagement rows.
    pub fn next(&mut self, budget: u64) -> Transaction {
        let size = self.size(budget);
        let transaction = match self.rng.random_range(0..1000) {
            0..20 => self.rolled_back(size),
            20..50 if size >= 4 => self.with_savepoint(size),
            _ => self.plain(size),
        };
        self.committed += transaction.committed;
        transaction
    }

    fn size(&mut self, budget: u64) -> u64 {
        let most = self.pace.most_rows.max(1) as f64;
        let order = self.rng.random::<f64>().powf(self.pace.lean);
        ((most + 1.0).powf(order) as u64).clamp(1, budget.max(1))
    }

    fn plain(&mut self, size: u64) -> Transaction {
        let mut ops = self.content_work();
        let split = if size > 16 && self.rng.random_bool(0.1) { self.rng.random_range(1..size) } else { size };
        ops.push(self.rows(0, split));
        if split < size {
            ops.extend(self.change());
            ops.push(self.rows(split, size - split));
        }
        Transaction { ops, end: End::Commit, committed: size, rolled_back: 0 }
    }

    /// Its content changes are taken back too: nothing downstream may ever show them.
    fn rolled_back(&mut self, size: u64) -> Transaction {
        let mut ops: Vec<Op> = self.change().into_iter().collect();
        ops.push(self.rows(0, size));
        Transaction { ops, end: End::Rollback, committed: 0, rolled_back: size }
    }

    /// Half of the savepoints are rolled back, the others released.
    fn with_savepoint(&mut self, size: u64) -> Transaction {
        let before = self.rng.random_range(1..size - 1);
        let within = self.rng.random_range(1..size - before);
        let after = size - before - within;
        let mut ops = vec![self.rows(0, before), Op::Savepoint];
        ops.extend(self.change());
        let (back, kept, end) = if self.rng.random_bool(0.5) {
            (within, 0, Op::RollbackToSavepoint)
        } else {
            (0, within, Op::ReleaseSavepoint)
        };
        ops.push(self.rows(before, within));
        ops.push(end);
        ops.push(self.rows(before + kept, after));
        Transaction { ops, end: End::Commit, committed: before + kept + after, rolled_back: back }
    }

    /// `n` rows, the first of them `offset` rows into this transaction.
    fn rows(&mut self, offset: u64, n: u64) -> Op {
        let rows = (offset..offset + n).map(|k| self.row(self.committed + k)).collect();
        if n < 8 || (n < 200 && self.rng.random_bool(0.5)) { Op::Insert(rows) } else { Op::Copy(rows) }
    }

    /// One in a hundred is an earlier row again, as a client sends it that has got no answer.
    fn row(&mut self, committed: u64) -> Engagement {
        const RECENT: usize = 256;
        if !self.recent.is_empty() && self.rng.random_bool(0.01) {
            return self.recent[self.rng.random_range(0..self.recent.len())].clone();
        }
        let now = self.time(committed);
        let session = self.sessions.next(now, &self.catalog, &mut self.rng);
        let row = engagement(self.seed, &session, &self.catalog, now, &mut self.rng);
        if self.rng.random_bool(0.05) {
            self.recent.truncate(RECENT - 1);
            self.recent.push_front(row.clone());
        }
        row
    }

    /// Contents come and change while the load runs.
    fn content_work(&mut self) -> Vec<Op> {
        match self.rng.random_range(0..100) {
            0 => vec![self.add()],
            1..6 => self.change().into_iter().collect(),
            _ => Vec::new(),
        }
    }

    fn add(&mut self) -> Op {
        let mut content = catalog::content(self.seed, self.numbered, STOCK, &mut self.rng);
        content.published = self.time(self.committed);
        self.numbered += 1;
        self.catalog.add(Subject::from(&content), &mut self.rng);
        Op::AddContent(content)
    }

    fn change(&mut self) -> Option<Op> {
        let subject = self.catalog.any(&mut self.rng)?;
        self.numbered += 1;
        Some(Op::ChangeContent(ContentChange {
            id: subject.id,
            title: catalog::title(&mut self.rng, self.numbered),
            length_seconds: subject.kind.and_then(|kind| catalog::length(kind, &mut self.rng)),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn model(seed: u64) -> Model {
        let pace = Pace { rows_per_second: 500.0, most_rows: 2000, lean: 1.0 };
        Model::new(seed, pace, stock(seed).iter().map(Subject::from).collect())
    }

    fn take(model: &mut Model, count: u64) -> Vec<Transaction> {
        let mut left = count;
        let mut all = Vec::new();
        while left > 0 {
            let transaction = model.next(left);
            left -= transaction.committed;
            all.push(transaction);
        }
        all
    }

    fn rows(op: &Op) -> &[Engagement] {
        match op {
            Op::Insert(rows) | Op::Copy(rows) => rows,
            _ => &[],
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_rows_and_another_seed_others() {
        let (a, b, c) = (take(&mut model(7), 20_000), take(&mut model(7), 20_000), take(&mut model(8), 20_000));
        assert_eq!(a, b);
        assert_ne!(a, c);
        assert_eq!(stock(7), stock(7));
    }

    #[test]
    fn exactly_the_budget_is_committed_and_the_counts_are_what_the_steps_do() {
        let all = take(&mut model(1), 30_000);
        assert_eq!(all.iter().map(|t| t.committed).sum::<u64>(), 30_000);
        for transaction in &all {
            let (mut kept, mut open, mut back) = (0, None, 0);
            for op in &transaction.ops {
                kept += rows(op).len() as u64;
                match op {
                    Op::Savepoint => open = Some(kept),
                    Op::RollbackToSavepoint => {
                        let at = open.take().unwrap();
                        back += kept - at;
                        kept = at;
                    }
                    Op::ReleaseSavepoint => open = None,
                    _ => {}
                }
            }
            let expected = match transaction.end {
                End::Commit => (kept, back),
                End::Rollback => (0, kept + back),
            };
            assert_eq!((transaction.committed, transaction.rolled_back), expected);
        }
    }

    #[test]
    fn every_kind_of_transaction_and_row_occurs() {
        let all = take(&mut model(2), 200_000);
        let any = |f: &dyn Fn(&Op) -> bool| all.iter().flat_map(|t| &t.ops).any(f);
        assert!(all.iter().any(|t| t.end == End::Rollback));
        assert!(all.iter().any(|t| t.committed == 1) && all.iter().any(|t| t.committed > 1000));
        assert!(any(&|op| matches!(op, Op::RollbackToSavepoint)) && any(&|op| matches!(op, Op::ReleaseSavepoint)));
        assert!(any(&|op| matches!(op, Op::AddContent(_))) && any(&|op| matches!(op, Op::ChangeContent(_))));
        assert!(any(&|op| matches!(op, Op::Insert(_))) && any(&|op| matches!(op, Op::Copy(_))));
        let all_rows: Vec<String> = all.iter().flat_map(|t| &t.ops).flat_map(rows).map(|r| format!("{r:?}")).collect();
        let distinct: HashSet<&String> = all_rows.iter().collect();
        assert!(distinct.len() < all_rows.len(), "some rows are sent again");
    }

    #[test]
    fn a_content_that_was_taken_back_is_never_referred_to() {
        let mut known: HashSet<Uuid> = stock(3).iter().map(|c| c.id).collect();
        for transaction in take(&mut model(3), 100_000) {
            for op in &transaction.ops {
                match op {
                    Op::AddContent(content) => {
                        assert_eq!(transaction.end, End::Commit);
                        known.insert(content.id);
                    }
                    other => assert!(rows(other).iter().filter_map(|r| r.content_id).all(|id| known.contains(&id))),
                }
            }
        }
    }
}
