//! The two fields of an event that delivery needs, read without looking at the rest.

use std::borrow::Cow;

use serde::Deserialize;

use crate::archive::parse_bound;
use crate::lsn::Position;

/// What a Kafka record turns out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// An event; its `_id` is the idempotency key.
    Event {
        /// `_id`: visible ASCII, so that it can stand in a header.
        id: String,
    },
    /// An event of a backfill (op `r`).
    History {
        /// `_id`, as above.
        id: String,
    },
    /// Nothing that falaj writes, with what is wrong with it. It becomes a dead letter, not a silent gap.
    Malformed(String),
}

impl Content {
    /// Reads the value of a record; `None` is a tombstone.
    pub fn read(value: Option<&[u8]>) -> Self {
        #[derive(Deserialize)]
        struct Fields<'a> {
            #[serde(borrow)]
            _id: Cow<'a, str>,
            #[serde(borrow)]
            _op: Cow<'a, str>,
        }
        let Some(value) = value else { return Self::Malformed("a record without a value".into()) };
        let Fields { _id: id, _op: op } = match serde_json::from_slice(value) {
            Ok(fields) => fields,
            Err(e) => return Self::Malformed(format!("not an event with _id and _op: {e}")),
        };
        if id.is_empty() || !id.bytes().all(|b| b.is_ascii_graphic()) {
            return Self::Malformed(format!("_id {id:?} cannot stand in a header"));
        }
        match &*op {
            "c" | "u" | "d" | "t" => Self::Event { id: id.into_owned() },
            "r" => Self::History { id: id.into_owned() },
            other => Self::Malformed(format!("_op {other:?}; needed: c, u, d, t or r")),
        }
    }

    /// `_id`, where there is one.
    pub fn id(&self) -> Option<&str> {
        match self {
            Self::Event { id } | Self::History { id } => Some(id),
            Self::Malformed(_) => None,
        }
    }
}

/// The position that an `_id` of falaj's own form stands for.
pub fn position(id: &str) -> Option<Position> {
    parse_bound(&id.replacen(':', ".", 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lsn::Lsn;

    #[test]
    fn ids_and_ops_are_read_whatever_else_the_event_holds() {
        let body = br#"{"raw":{"_id":"no","_op":"no"},"n":1.10,"_id":"00000000000000FF:0000000009","_op":"u"}"#;
        let content = Content::read(Some(body));
        assert_eq!(content, Content::Event { id: "00000000000000FF:0000000009".into() });
        let at = Position { commit_lsn: Lsn(0xFF), ordinal: 9 };
        assert_eq!(content.id().and_then(position), Some(at));
        assert_eq!(Content::read(Some(br#"{"_id":"x","_op":"r"}"#)), Content::History { id: "x".into() });
    }

    #[test]
    fn what_is_no_event_says_why() {
        let bad: [&[u8]; 8] = [
            b"",
            b"{",
            b"[]",
            b"{\"_id\":\"x\"}",
            b"{\"_id\":1,\"_op\":\"c\"}",
            br#"{"_id":"","_op":"c"}"#,
            "{\"_id\":\"é\",\"_op\":\"c\"}".as_bytes(),
            br#"{"_id":"x","_op":"z"}"#,
        ];
        for value in bad {
            assert!(matches!(Content::read(Some(value)), Content::Malformed(_)), "{value:?}");
        }
        assert_eq!(Content::read(None), Content::Malformed("a record without a value".into()));
    }
}
