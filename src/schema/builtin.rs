//! The built-in types of Postgres: base types, ranges and multiranges of `pg_type.dat`, the same in every release since 14.

use super::Type::{self, *};

/// A built-in type.
pub struct BuiltIn {
    /// `pg_type.oid`
    pub oid: u32,
    /// `pg_type.typarray`; 0 where there are no arrays of it.
    pub array: u32,
    /// `pg_type.typname`
    pub name: &'static str,
    /// What falaj knows it as.
    pub ty: Type,
}

const fn built_in(oid: u32, array: u32, name: &'static str, ty: Type) -> BuiltIn {
    BuiltIn { oid, array, name, ty }
}

/// All of them, by oid.
pub const BUILT_IN: &[BuiltIn] = &[
    built_in(16, 1000, "bool", Bool),
    built_in(17, 1001, "bytea", Bytea),
    built_in(18, 1002, "char", Other),
    built_in(19, 1003, "name", Text),
    built_in(20, 1016, "int8", Int8),
    built_in(21, 1005, "int2", Int2),
    built_in(22, 1006, "int2vector", Other),
    built_in(23, 1007, "int4", Int4),
    built_in(24, 1008, "regproc", Other),
    built_in(25, 1009, "text", Text),
    built_in(26, 1028, "oid", Other),
    built_in(27, 1010, "tid", Other),
    built_in(28, 1011, "xid", Other),
    built_in(29, 1012, "cid", Other),
    built_in(30, 1013, "oidvector", Other),
    built_in(114, 199, "json", Json),
    built_in(142, 143, "xml", Other),
    built_in(194, 0, "pg_node_tree", Other),
    built_in(600, 1017, "point", Other),
    built_in(601, 1018, "lseg", Other),
    built_in(602, 1019, "path", Other),
    built_in(603, 1020, "box", Other),
    built_in(604, 1027, "polygon", Other),
    built_in(628, 629, "line", Other),
    built_in(650, 651, "cidr", Other),
    built_in(700, 1021, "float4", Float4),
    built_in(701, 1022, "float8", Float8),
    built_in(718, 719, "circle", Other),
    built_in(774, 775, "macaddr8", Other),
    built_in(790, 791, "money", Other),
    built_in(829, 1040, "macaddr", Other),
    built_in(869, 1041, "inet", Other),
    built_in(1033, 1034, "aclitem", Other),
    built_in(1042, 1014, "bpchar", Text),
    built_in(1043, 1015, "varchar", Text),
    built_in(1082, 1182, "date", Date),
    built_in(1083, 1183, "time", Other),
    built_in(1114, 1115, "timestamp", Timestamp),
    built_in(1184, 1185, "timestamptz", Timestamptz),
    built_in(1186, 1187, "interval", Other),
    built_in(1266, 1270, "timetz", Other),
    built_in(1560, 1561, "bit", Other),
    built_in(1562, 1563, "varbit", Other),
    built_in(1700, 1231, "numeric", Numeric(None)),
    built_in(1790, 2201, "refcursor", Other),
    built_in(2202, 2207, "regprocedure", Other),
    built_in(2203, 2208, "regoper", Other),
    built_in(2204, 2209, "regoperator", Other),
    built_in(2205, 2210, "regclass", Other),
    built_in(2206, 2211, "regtype", Other),
    built_in(2950, 2951, "uuid", Uuid),
    built_in(2970, 2949, "txid_snapshot", Other),
    built_in(3220, 3221, "pg_lsn", Other),
    built_in(3361, 0, "pg_ndistinct", Other),
    built_in(3402, 0, "pg_dependencies", Other),
    built_in(3614, 3643, "tsvector", Other),
    built_in(3615, 3645, "tsquery", Other),
    built_in(3642, 3644, "gtsvector", Other),
    built_in(3734, 3735, "regconfig", Other),
    built_in(3769, 3770, "regdictionary", Other),
    built_in(3802, 3807, "jsonb", Jsonb),
    built_in(3904, 3905, "int4range", Other),
    built_in(3906, 3907, "numrange", Other),
    built_in(3908, 3909, "tsrange", Other),
    built_in(3910, 3911, "tstzrange", Other),
    built_in(3912, 3913, "daterange", Other),
    built_in(3926, 3927, "int8range", Other),
    built_in(4072, 4073, "jsonpath", Other),
    built_in(4089, 4090, "regnamespace", Other),
    built_in(4096, 4097, "regrole", Other),
    built_in(4191, 4192, "regcollation", Other),
    built_in(4451, 6150, "int4multirange", Other),
    built_in(4532, 6151, "nummultirange", Other),
    built_in(4533, 6152, "tsmultirange", Other),
    built_in(4534, 6153, "tstzmultirange", Other),
    built_in(4535, 6155, "datemultirange", Other),
    built_in(4536, 6157, "int8multirange", Other),
    built_in(4600, 0, "pg_brin_bloom_summary", Other),
    built_in(4601, 0, "pg_brin_minmax_multi_summary", Other),
    built_in(5017, 0, "pg_mcv_list", Other),
    built_in(5038, 5039, "pg_snapshot", Other),
    built_in(5069, 271, "xid8", Other),
];

impl BuiltIn {
    /// The type of this oid, or the element of the array type of this oid.
    pub fn of(oid: u32) -> Option<&'static Self> {
        BUILT_IN.iter().find(|t| t.oid == oid || (t.array == oid && oid != 0))
    }

    /// The oid of the type or, with `_` before it, array type of this name.
    pub fn oid_of(name: &str) -> Option<u32> {
        let of = |t: &Self| match name.strip_prefix('_') {
            Some(element) => (t.name == element && t.array != 0).then_some(t.array),
            None => (t.name == name).then_some(t.oid),
        };
        BUILT_IN.iter().find_map(of)
    }
}
