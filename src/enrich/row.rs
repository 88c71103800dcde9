//! The texts that a lookup row brings to an event, in one allocation: each text of its own would cost its share of the heap,
//! and another look at memory that is in no cache of the processor.

use std::str::Utf8Error;

/// Bytes of one end.
const END: usize = size_of::<usize>();
/// In an end: the value is NULL. No text is as long as that.
const NULL: usize = 1 << (usize::BITS - 1);

/// Texts of the joined columns: where each of them ends, then all of them.
pub(super) struct Row {
    columns: usize,
    bytes: Box<[u8]>,
}

impl Row {
    pub(super) fn new<'a>(values: impl ExactSizeIterator<Item = Option<&'a str>> + Clone) -> Self {
        let columns = values.len();
        let texts = values.clone().flatten().map(str::len).sum::<usize>();
        let mut bytes = Vec::with_capacity(columns * END + texts);
        let mut end = columns * END;
        for value in values.clone() {
            end += value.map_or(0, str::len);
            let null = if value.is_none() { NULL } else { 0 };
            bytes.extend_from_slice(&(end | null).to_ne_bytes());
        }
        values.flatten().for_each(|text| bytes.extend_from_slice(text.as_bytes()));
        Self { columns, bytes: bytes.into() }
    }

    /// The text of a column; `None` for NULL.
    pub(super) fn get(&self, column: usize) -> Option<&[u8]> {
        let start = column.checked_sub(1).map_or(self.columns * END, |before| self.end(before) & !NULL);
        let end = self.end(column);
        (end & NULL == 0).then(|| &self.bytes[start..end])
    }

    /// All of them.
    pub(super) fn texts(&self) -> Result<Vec<Option<&str>>, Utf8Error> {
        (0..self.columns).map(|column| self.get(column).map(std::str::from_utf8).transpose()).collect()
    }

    fn end(&self, column: usize) -> usize {
        let mut end = [0; END];
        end.copy_from_slice(&self.bytes[column * END..(column + 1) * END]);
        usize::from_ne_bytes(end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_row_gives_back_what_it_was_made_of(values: Vec<Option<String>>) {
            let texts: Vec<_> = values.iter().map(Option::as_deref).collect();
            let row = Row::new(texts.iter().copied());
            prop_assert_eq!(row.texts().unwrap(), texts.clone());
            for (column, text) in texts.iter().enumerate() {
                prop_assert_eq!(row.get(column), text.map(str::as_bytes));
            }
        }
    }
}
