//! Binary COPY → cells: pure and total.
//!
//! Source: PostgreSQL documentation, COPY, "Binary Format". The server sends one CopyData a row; the first one begins with
//! the file's header, the last one is the trailer.

use crate::event::Cells;
use crate::pgoutput::Cell;

const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0";

/// How a column of the copy is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// The type's send format.
    Binary,
    /// The type's own text, which the statement has asked for.
    Text,
}

/// Takes the header off the first message.
pub(super) fn without_header(message: &[u8]) -> Result<&[u8], String> {
    let flags = message.strip_prefix(HEADER).ok_or("a copy that does not begin as the binary format does")?;
    let (_, rest) = flags.split_first_chunk::<4>().ok_or("a header without flags")?;
    let (length, rest) = rest.split_first_chunk::<4>().ok_or("a header without the length of its extension")?;
    rest.get(u32::from_be_bytes(*length) as usize..).ok_or_else(|| "a header that is cut off".to_owned())
}

/// Reads a row's cells into `cells`; `false` for the trailer.
pub(super) fn read<'a>(row: &'a [u8], forms: &[Form], cells: &mut Cells<'a>) -> Result<bool, String> {
    let (count, mut rest) = row.split_first_chunk::<2>().ok_or("a row without its number of columns")?;
    match i16::from_be_bytes(*count) {
        -1 if rest.is_empty() => return Ok(false),
        n if usize::try_from(n) == Ok(forms.len()) => {}
        n => return Err(format!("a row of {n} columns; {} were asked for", forms.len())),
    }
    for form in forms {
        let (length, after) = rest.split_first_chunk::<4>().ok_or("a row that is cut off")?;
        let length = i32::from_be_bytes(*length);
        let (bytes, after) = match usize::try_from(length) {
            Ok(length) => after.split_at_checked(length).ok_or("a value that is cut off")?,
            Err(_) if length == -1 => {
                cells.push(Cell::Null);
                rest = after;
                continue;
            }
            Err(_) => return Err(format!("a value of {length} bytes")),
        };
        cells.push(match form {
            Form::Binary => Cell::Binary(bytes),
            Form::Text => Cell::Text(bytes),
        });
        rest = after;
    }
    if rest.is_empty() { Ok(true) } else { Err(format!("{} bytes after the end of a row", rest.len())) }
}

/// Place of a row, as SQL writes it: block and line of a `tid`.
pub(super) fn place(tid: &[u8]) -> Option<(u32, u16)> {
    let (block, line) = tid.split_first_chunk::<4>()?;
    Some((u32::from_be_bytes(*block), u16::from_be_bytes(line.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn first() -> Vec<u8> {
        [HEADER, &[0; 8], &[0, 2], &[0, 0, 0, 1], b"x", &[255, 255, 255, 255]].concat()
    }

    #[test]
    fn a_row_reads_whole_or_not_at_all() {
        let first = first();
        let row = without_header(&first).unwrap();
        let mut cells = Cells::new();
        assert_eq!(read(row, &[Form::Text, Form::Binary], &mut cells), Ok(true));
        assert_eq!(cells[..], [Cell::Text(b"x"), Cell::Null]);
        assert_eq!(read(&[255, 255], &[Form::Text], &mut Cells::new()), Ok(false));
        for cut in 0..row.len() {
            assert!(read(&row[..cut], &[Form::Text, Form::Binary], &mut Cells::new()).is_err(), "{cut}");
        }
        for cut in 0..first.len() - row.len() {
            assert!(without_header(&first[..cut]).is_err(), "{cut}");
        }
        assert!(read(row, &[Form::Text], &mut Cells::new()).is_err());
        assert!(read(&[row, b"!"].concat(), &[Form::Text, Form::Binary], &mut Cells::new()).is_err());
        assert_eq!(place(&[0, 0, 1, 0, 0, 7]), Some((256, 7)));
        assert_eq!(place(&[0, 0, 1, 0, 0]), None);
    }

    proptest! {
        #[test]
        fn nothing_panics(bytes in proptest::collection::vec(any::<u8>(), 0..60), columns in 0..4_usize) {
            let _ = without_header(&bytes);
            let _ = read(&bytes, &vec![Form::Binary; columns], &mut Cells::new());
        }
    }
}
