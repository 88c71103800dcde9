//! Relations as the stream describes them, and the types whose values falaj knows by name.

use serde::{Deserialize, Serialize};

/// A column's type. Everything that is not listed is carried as Postgres's own text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Type {
    /// `boolean`
    Bool,
    /// `smallint`
    Int2,
    /// `integer`
    Int4,
    /// `bigint`
    Int8,
    /// `real`
    Float4,
    /// `double precision`
    Float8,
    /// `numeric`, with precision and scale where declared.
    Numeric(Option<(u8, i8)>),
    /// `text`, `varchar`, `char(n)`, `name`: binary form = text form.
    Text,
    /// `json`
    Json,
    /// `jsonb`
    Jsonb,
    /// `uuid`
    Uuid,
    /// `date`
    Date,
    /// `timestamp without time zone`
    Timestamp,
    /// `timestamp with time zone`
    Timestamptz,
    /// `bytea`
    Bytea,
    /// An array; the element's type decides how its elements look in JSON.
    Array(Element),
    /// Any other type.
    Other,
}

/// Element types of arrays that are not simply strings in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Element {
    /// `boolean[]`
    Bool,
    /// Integer, numeric and float arrays: elements are JSON numbers.
    Number,
    /// `json[]`, `jsonb[]`: elements are embedded.
    Json,
    /// `timestamp[]`
    Timestamp,
    /// `timestamptz[]`
    Timestamptz,
    /// Elements are strings.
    Text,
}

impl Type {
    /// From `pg_attribute.atttypid` and `atttypmod` (oids of `pg_type.dat`, fixed for built-in types).
    pub fn from_oid(oid: u32, type_mod: i32) -> Self {
        match oid {
            16 => Self::Bool,
            21 => Self::Int2,
            23 => Self::Int4,
            20 => Self::Int8,
            700 => Self::Float4,
            701 => Self::Float8,
            1700 => Self::Numeric(numeric_mod(type_mod)),
            25 | 1042 | 1043 | 19 => Self::Text,
            114 => Self::Json,
            3802 => Self::Jsonb,
            2950 => Self::Uuid,
            1082 => Self::Date,
            1114 => Self::Timestamp,
            1184 => Self::Timestamptz,
            17 => Self::Bytea,
            1000 => Self::Array(Element::Bool),
            1005 | 1007 | 1016 | 1021 | 1022 | 1231 => Self::Array(Element::Number),
            199 | 3807 => Self::Array(Element::Json),
            1115 => Self::Array(Element::Timestamp),
            1185 => Self::Array(Element::Timestamptz),
            1002 | 1003 | 1009 | 1014 | 1015 | 2951 | 1182 | 1001 => Self::Array(Element::Text),
            _ => Self::Other,
        }
    }

    /// Whether falaj decodes the type's binary send format. A stream with any other type runs in text.
    pub fn has_binary(self) -> bool {
        !matches!(self, Self::Array(_) | Self::Other)
    }
}

/// `numeric(p, s)` packs both into the type modifier (numeric.c: `((p << 16) | (s & 0x7ff)) + VARHDRSZ`).
fn numeric_mod(type_mod: i32) -> Option<(u8, i8)> {
    let packed = type_mod.checked_sub(4).filter(|m| *m >= 0)?;
    let precision = (packed >> 16) & 0xffff;
    let scale = ((packed & 0x7ff) ^ 1024) - 1024;
    Some((u8::try_from(precision).ok()?, i8::try_from(scale).ok()?))
}

/// One column of a relation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// `pg_attribute.atttypid`
    pub type_oid: u32,
    /// `pg_attribute.atttypmod`
    pub type_mod: i32,
    /// Part of the replica identity.
    pub identity: bool,
}

impl Column {
    /// The type that falaj knows it by.
    pub fn ty(&self) -> Type {
        Type::from_oid(self.type_oid, self.type_mod)
    }
}

/// A table as a Relation message describes it: the schema that the following rows were written under.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation {
    /// `pg_class.oid`
    pub oid: u32,
    /// Schema.
    pub namespace: String,
    /// Bare name.
    pub name: String,
    /// `pg_class.relreplident`: `d`, `n`, `f` or `i`.
    pub replica_identity: u8,
    /// Columns in order.
    pub columns: Vec<Column>,
}

impl Relation {
    /// Name used outside: bare in schema public, else `schema.table`.
    pub fn table(&self) -> String {
        if self.namespace == "public" { self.name.clone() } else { format!("{}.{}", self.namespace, self.name) }
    }

    /// Index of a column by name.
    pub fn index_of(&self, column: &str) -> Option<usize> {
        self.columns.iter().position(|c| c.name == column)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numeric_modifiers_give_precision_and_scale() {
        assert_eq!(Type::from_oid(1700, ((10 << 16) | 2) + 4), Type::Numeric(Some((10, 2))));
        assert_eq!(Type::from_oid(1700, ((5 << 16) | (-3 & 0x7ff)) + 4), Type::Numeric(Some((5, -3))));
        assert_eq!(Type::from_oid(1700, -1), Type::Numeric(None));
    }
}
