//! Relations as the stream describes them, and the types whose values falaj knows by name.

mod builtin;

pub use builtin::{BUILT_IN, BuiltIn};

/// A column's type. Everything that is not listed is carried as Postgres's own text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// `box[]`: strings, the only built-in ones that stand between semicolons.
    Box,
    /// Elements are strings.
    Text,
}

impl Element {
    fn of(element: &BuiltIn) -> Self {
        match element.ty {
            Type::Bool => Self::Bool,
            Type::Int2 | Type::Int4 | Type::Int8 | Type::Float4 | Type::Float8 | Type::Numeric(_) => Self::Number,
            Type::Json | Type::Jsonb => Self::Json,
            Type::Timestamp => Self::Timestamp,
            Type::Timestamptz => Self::Timestamptz,
            _ if element.name == "box" => Self::Box,
            _ => Self::Text,
        }
    }

    /// What stands between two elements in a literal (`pg_type.typdelim`).
    pub fn delimiter(self) -> char {
        if self == Self::Box { ';' } else { ',' }
    }
}

impl Type {
    /// From `pg_attribute.atttypid` and `atttypmod`. A type that is not built in is [`Type::Other`].
    pub fn from_oid(oid: u32, type_mod: i32) -> Self {
        match BuiltIn::of(oid) {
            Some(element) if element.oid != oid => Self::Array(Element::of(element)),
            Some(BuiltIn { ty: Self::Numeric(_), .. }) => Self::Numeric(numeric_mod(type_mod)),
            Some(known) => known.ty,
            None => Self::Other,
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
    /// `pg_attribute.atttypid`; of a user-defined type whose values look like a built-in one's, that one
    /// (see [`crate::source::types`]).
    pub type_oid: u32,
    /// `pg_attribute.atttypmod`, or that of the domain.
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

    #[test]
    fn array_oids_are_arrays_of_their_elements() {
        assert_eq!(Type::from_oid(1007, -1), Type::Array(Element::Number));
        assert_eq!(Type::from_oid(1231, ((10 << 16) | 2) + 4), Type::Array(Element::Number));
        assert_eq!(Type::from_oid(3807, -1), Type::Array(Element::Json));
        assert_eq!(Type::from_oid(1020, -1), Type::Array(Element::Box));
        assert_eq!(Type::from_oid(1041, -1), Type::Array(Element::Text));
        for unknown in [0, 1, 16_384] {
            assert_eq!(Type::from_oid(unknown, -1), Type::Other);
        }
        assert_eq!(
            (BuiltIn::oid_of("int4"), BuiltIn::oid_of("_int4"), BuiltIn::oid_of("mood")),
            (Some(23), Some(1007), None)
        );
        assert_eq!((BuiltIn::oid_of("_pg_node_tree"), BuiltIn::oid_of("_")), (None, None));
    }
}
