//! A lookup row in one allocation, its key with it: each text of its own would cost its share of the heap, and another look at
//! memory that is in no cache of the processor.

use std::borrow::Borrow;
use std::hash::{Hash, Hasher};
use std::str::Utf8Error;

use hashbrown::Equivalent;

/// Bytes of one number.
const NUMBER: usize = size_of::<usize>();
/// In an end: the value is NULL. No text is as long as that.
const NULL: usize = 1 << (usize::BITS - 1);
/// Bytes that a processor fetches at once.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;
/// So much of a row is fetched ahead; longer ones the processor sees coming.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 4 * LINE;

/// How many texts there are, where each of them ends, then all of them: the key's, and those of the joined columns.
///
/// In a set it is found by its key.
pub(super) struct Row(Box<[u8]>);

impl Row {
    pub(super) fn new<'a>(key: &'a str, values: impl ExactSizeIterator<Item = Option<&'a str>> + Clone) -> Self {
        let count = 1 + values.len();
        let texts = [Some(key)].into_iter().chain(values);
        let mut end = (1 + count) * NUMBER;
        let mut bytes = Vec::with_capacity(end + texts.clone().flatten().map(str::len).sum::<usize>());
        bytes.extend_from_slice(&count.to_ne_bytes());
        for text in texts.clone() {
            end += text.map_or(0, str::len);
            let null = if text.is_none() { NULL } else { 0 };
            bytes.extend_from_slice(&(end | null).to_ne_bytes());
        }
        texts.flatten().for_each(|text| bytes.extend_from_slice(text.as_bytes()));
        Self(bytes.into())
    }

    /// The text of a column; `None` for NULL.
    pub(super) fn get(&self, column: usize) -> Option<&[u8]> {
        let (before, end) = (self.number(1 + column), self.number(2 + column));
        (end & NULL == 0).then(|| &self.0[before & !NULL..end])
    }

    /// The key's text.
    pub(super) fn key(&self) -> Result<&str, Utf8Error> {
        std::str::from_utf8(self.borrow())
    }

    /// All columns.
    pub(super) fn texts(&self) -> Result<Vec<Option<&str>>, Utf8Error> {
        (1..self.number(0)).map(|n| self.get(n - 1).map(std::str::from_utf8).transpose()).collect()
    }

    /// Has the processor fetch it from memory, and does not wait for that.
    fn fetch(&self) {
        #[cfg(target_arch = "x86_64")]
        for line in self.0.chunks(LINE).take(AHEAD / LINE) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: every x86_64 has it, and it may be given any address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
        }
        // Elsewhere it is read, and nobody needs what was read.
        #[cfg(not(target_arch = "x86_64"))]
        std::hint::black_box(self.0.first().copied());
    }

    fn number(&self, at: usize) -> usize {
        let mut number = [0; NUMBER];
        number.copy_from_slice(&self.0[at * NUMBER..(at + 1) * NUMBER]);
        usize::from_ne_bytes(number)
    }
}

impl Borrow<[u8]> for Row {
    fn borrow(&self) -> &[u8] {
        &self.0[(1 + self.number(0)) * NUMBER..self.number(1)]
    }
}

impl Hash for Row {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Borrow::<[u8]>::borrow(self).hash(state);
    }
}

/// The key of a row that will be looked for soon: to look for it here finds nothing, but has the row fetched.
pub(super) struct Coming<'a>(pub(super) &'a [u8]);

impl Hash for Coming<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl Equivalent<Row> for Coming<'_> {
    fn equivalent(&self, row: &Row) -> bool {
        row.fetch();
        false
    }
}

impl PartialEq for Row {
    fn eq(&self, other: &Self) -> bool {
        Borrow::<[u8]>::borrow(self) == Borrow::<[u8]>::borrow(other)
    }
}

impl Eq for Row {}

#[cfg(test)]
mod tests {
    use hashbrown::HashSet;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_row_gives_back_what_it_was_made_of(key: String, values: Vec<Option<String>>) {
            let texts: Vec<_> = values.iter().map(Option::as_deref).collect();
            let row = Row::new(&key, texts.iter().copied());
            prop_assert_eq!(row.key().unwrap(), &key);
            prop_assert_eq!(row.texts().unwrap(), texts.clone());
            for (column, text) in texts.iter().enumerate() {
                prop_assert_eq!(row.get(column), text.map(str::as_bytes));
            }
        }
    }

    #[test]
    fn a_set_finds_a_row_by_its_key_alone() {
        let row = |key, value| Row::new(key, [Some(value)].into_iter());
        let mut rows: HashSet<Row> = [row("a", "1"), row("b", "2")].into_iter().collect();
        assert!(rows.replace(row("a", "3")).is_some());
        let found = |rows: &HashSet<Row>, key: &str| {
            rows.get(key.as_bytes()).map(|row| row.texts().unwrap().into_iter().flatten().collect::<String>())
        };
        assert_eq!(
            (found(&rows, "a"), found(&rows, "b"), found(&rows, "ab")),
            (Some("3".into()), Some("2".into()), None)
        );
        assert!(rows.get(&Coming(b"a")).is_none());
        assert!(rows.remove("a".as_bytes()));
        assert_eq!((found(&rows, "a"), rows.len()), (None, 1));
    }
}
