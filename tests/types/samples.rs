//! The zoo: every built-in type, and one of every kind of user-defined type, with values at their edges.

/// A type and values of it.
#[derive(Clone, Copy)]
pub struct Sample {
    /// As SQL writes it, modifier included.
    pub sql: &'static str,
    /// Literals; one that begins with `=` is an SQL expression. The first is the example of docs/types.md, and is
    /// therefore as Postgres prints it.
    pub values: &'static [&'static str],
}

const fn sample(sql: &'static str, values: &'static [&'static str]) -> Sample {
    Sample { sql, values }
}

/// Built-in types that cannot be the type of a value that a client has given: they have no input.
pub const WITHOUT_INPUT: [&str; 7] = [
    "gtsvector",
    "pg_brin_bloom_summary",
    "pg_brin_minmax_multi_summary",
    "pg_dependencies",
    "pg_mcv_list",
    "pg_ndistinct",
    "pg_node_tree",
];

/// Types whose binary form falaj reads, and their edges.
pub const NUMBERS_TEXT_AND_TIMES: &[Sample] = &[
    sample("bool", &["t", "f"]),
    sample("int2", &["-7", "-32768", "32767", "0"]),
    sample("int4", &["42", "-2147483648", "2147483647", "0"]),
    sample("int8", &["9223372036854775807", "-9223372036854775808", "0"]),
    sample(
        "float4",
        &[
            "0.1",
            "NaN",
            "Infinity",
            "-Infinity",
            "-0",
            "1e-45",
            "-1.1754942e-38",
            "3.4028235e+38",
            "117760704",
            "1e6",
            "16777216",
        ],
    ),
    sample(
        "float8",
        &[
            "0.1",
            "NaN",
            "Infinity",
            "-Infinity",
            "-0",
            "5e-324",
            "-2.225073858507201e-308",
            "1.7976931348623157e+308",
            "1e23",
            "18014398509481992",
            "1e15",
            "123456789012345",
            "0.0001",
            "0.00001",
        ],
    ),
    sample(
        "numeric",
        &[
            "1.10",
            "NaN",
            "Infinity",
            "-Infinity",
            "0.00000",
            "-0.000100",
            "100000000",
            "0.00000000000000000001",
            "12345678901234567890.5",
            "=(repeat('9876543210', 100))::numeric",
            "=('-' || repeat('1234567890', 100) || '.' || repeat('0', 50) || '7')::numeric",
        ],
    ),
    sample("numeric(12,3)", &["12345.100", "NaN", "-0.001", "999999999.999", "-999999999.999", "0"]),
    sample(
        "numeric(38,18)",
        &["1.000000000000000000", "99999999999999999999.999999999999999999", "-0.000000000000000001"],
    ),
    sample("numeric(40,2)", &["99999999999999999999999999999999999999.10", "NaN"]),
    sample(
        "text",
        &[
            "web\u{2011}safari",
            "web-safari",
            "",
            "🎧 emoji, é, e\u{301}",
            "عنوان عربي \u{200f}",
            r"\u0000 \x00",
            "a\"b\\c/d",
            "tab\t line\n return\r \u{1}\u{8}\u{c}\u{1f}\u{7f}\u{2028}",
            "null",
            "\u{feff}bom \u{10ffff}",
            "=repeat('long é ', 5000)",
        ],
    ),
    sample("varchar(20)", &["web\u{2011}safari", "", "  spaces  "]),
    sample("char(6)", &["ab    ", "", "é"]),
    sample("name", &["pg_class", "", "=repeat('x', 63)"]),
    sample(
        "json",
        &[
            r#"{"b": 1.10, "a":[ ], "b": 2}"#,
            "null",
            r#""\u0000 \ud83c\udfa7 é""#,
            "[1e2, 18446744073709551617, -0, 1.000]",
            "{\"a\" :\n\t1}",
            "  7 ",
            r#""""#,
        ],
    ),
    sample(
        "jsonb",
        &[
            r#"{"a": 9223372036854775809, "b": 1.10}"#,
            "null",
            r#"{"b": 1, "a": [], "b": 2}"#,
            r#""🎧 \" \\ \n""#,
            "1e30",
            "[]",
        ],
    ),
    sample(
        "uuid",
        &[
            "c0ffee00-0000-4000-8000-000000000001",
            "00000000-0000-0000-0000-000000000000",
            "{FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF}",
        ],
    ),
    sample(
        "date",
        &[
            "2024-02-29",
            "infinity",
            "-infinity",
            "0044-03-15 BC",
            "0001-12-31 BC",
            "0001-01-01",
            "9999-12-31",
            "10000-01-01",
            "5874897-12-31",
            "4714-11-24 BC",
            "1969-12-31",
        ],
    ),
    sample(
        "timestamp",
        &[
            "2024-02-29 12:00:00.5",
            "infinity",
            "-infinity",
            "0044-03-15 10:00:00.000001 BC",
            "0001-01-01 00:00:00",
            "9999-12-31 23:59:59.999999",
            "10000-01-01 00:00:00",
            "294276-12-31 23:59:59.999999",
            "4714-11-24 00:00:00 BC",
            "1969-12-31 23:59:59.999999",
            "1999-12-31 23:59:59.9",
        ],
    ),
    sample(
        "timestamptz",
        &[
            "2024-02-29 12:00:00.5+00",
            "infinity",
            "-infinity",
            "0044-03-15 10:00:00+00 BC",
            "0001-01-01 00:00:00+00",
            "9999-12-31 23:59:59.999999+00",
            "10000-01-01 00:00:00+00",
            "294276-12-31 23:59:59.999999+00",
            "4714-11-24 00:00:00+00 BC",
            "2024-02-29 12:00:00+05:30",
            "1969-12-31 23:59:59.999999+00",
        ],
    ),
    sample("timestamptz(3)", &["2024-02-29 12:00:00.123+00"]),
    sample("bytea", &[r"\xdeadbeef", "", r"\x00", "=decode(repeat('00ff', 5000), 'hex')"]),
];

/// Types that are carried as Postgres's own text.
pub const OTHERS: &[Sample] = &[
    sample("\"char\"", &["x", "", "=chr(127)::\"char\""]),
    sample(
        "interval",
        &["1 year 2 mons -3 days +04:05:06.7", "00:00:00", "-178000000 years", "=make_interval(secs => -0.000001)"],
    ),
    sample("time", &["12:34:56.789", "24:00:00", "00:00:00.000001"]),
    sample("timetz", &["12:34:56+05:30", "24:00:00-15:59"]),
    sample("money", &["=1234.5::money", "=('-0.01'::numeric)::money", "=92233720368547758.07::money"]),
    sample("inet", &["10.0.0.1", "10.0.0.1/8", "::ffff:1.2.3.4", "fe80::1/64"]),
    sample("cidr", &["10.0.0.0/8", "2001:db8::/32", "10.0.0.1/32"]),
    sample("macaddr", &["08:00:2b:01:02:03"]),
    sample("macaddr8", &["08:00:2b:01:02:03:04:05"]),
    sample("bit", &["1"]),
    sample("bit(5)", &["10110"]),
    sample("varbit", &["101", "", "=repeat('10', 200)::varbit"]),
    sample("tsvector", &["'cat':3A 'it''s':2 'é'", ""]),
    sample("tsquery", &["'fat' & ( 'rat' | !'cat' )", ""]),
    sample("point", &["(1.5,-0)", "(NaN,Infinity)", "(1e+300,117760704)"]),
    sample("line", &["{1,-1,0}"]),
    sample("lseg", &["[(0,0),(1,1)]"]),
    sample("box", &["(1,1),(0,0)"]),
    sample("path", &["((0,0),(1,1))", "[(0,0),(1,1)]"]),
    sample("polygon", &["((0,0),(1,0),(1,1))"]),
    sample("circle", &["<(0,0),1.5>"]),
    sample("pg_lsn", &["16/B374D848", "0/0", "FFFFFFFF/FFFFFFFF"]),
    sample("oid", &["4294967295", "0"]),
    sample("xid", &["4294967295", "3"]),
    sample("xid8", &["18446744073709551615"]),
    sample("cid", &["4294967295"]),
    sample("tid", &["(4294967295,65535)"]),
    sample("regclass", &["pg_class", "-", "123456"]),
    sample("regtype", &["integer", "character varying[]"]),
    sample("regproc", &["now", "-"]),
    sample("regprocedure", &["sum(integer)"]),
    sample("regoper", &["|/"]),
    sample("regoperator", &["+(integer,integer)"]),
    sample("regconfig", &["simple"]),
    sample("regdictionary", &["simple"]),
    sample("regnamespace", &["pg_catalog"]),
    sample("regrole", &["pg_monitor"]),
    sample("regcollation", &["\"C\""]),
    sample("refcursor", &["a cursor"]),
    sample("aclitem", &["pg_monitor=r/pg_monitor"]),
    sample("jsonpath", &["$.\"a\"[*]?(@ > 1)"]),
    sample("pg_snapshot", &["10:20:10,14"]),
    sample("txid_snapshot", &["10:20:10,14"]),
    sample("int2vector", &["1 2 3", ""]),
    sample("oidvector", &["1 2 3", ""]),
    sample("int2vector[]", &["{\"1 2 3\",\"\"}"]),
    sample("oidvector[]", &["{\"1 2 3\",\"\"}"]),
    sample("int4range", &["[1,10)", "empty", "(,)"]),
    sample("int8range", &["[1,9223372036854775807)"]),
    sample("numrange", &["[1.10,2.20]", "(,Infinity)"]),
    sample("tsrange", &["[\"2024-02-29 12:00:00.5\",infinity]"]),
    sample(
        "tstzrange",
        &["[\"0044-03-15 00:00:00+00 BC\",\"2024-02-29 12:00:00+00\")", "(,\"2024-02-29 12:00:00+05:30\"]"],
    ),
    sample("daterange", &["[2024-02-29,2024-03-01)", "[,infinity]"]),
    sample("int4multirange", &["{[1,3),[5,8)}", "{}"]),
    sample("int8multirange", &["{[1,3)}"]),
    sample("nummultirange", &["{[1.10,2.20],(3,)}"]),
    sample("tsmultirange", &["{[\"2024-02-29 12:00:00\",\"2024-02-29 13:00:00\")}"]),
    sample("tstzmultirange", &["{[\"2024-02-29 12:00:00+00\",)}"]),
    sample("datemultirange", &["{[2024-02-29,2024-03-01)}"]),
];

/// Needs a server that is built with libxml.
pub const XML: Sample = sample(
    "xml",
    &[
        "<a x=\"1\">é &amp; 🎧</a>",
        "<?xml version=\"1.0\" encoding=\"utf-8\" standalone=\"yes\"?><a/>",
        "<!-- c -->text",
    ],
);

/// What a user makes of them.
pub const USER_TYPES: &str = r#"
    CREATE TYPE mood AS ENUM ('sad', 'so so', 'quite, "happy" é 🎧', 'NULL');
    CREATE DOMAIN positive AS int CHECK (VALUE > 0);
    CREATE DOMAIN small AS positive CHECK (VALUE < 1000);
    CREATE DOMAIN price AS numeric(10,2);
    CREATE DOMAIN moment AS timestamptz;
    CREATE DOMAIN document AS jsonb;
    CREATE DOMAIN "Odd ""name" AS varchar(30);
    CREATE DOMAIN dmood AS mood;
    CREATE DOMAIN tags AS text[];
    CREATE DOMAIN moods AS mood[];
    CREATE TYPE pair AS (a int, "b c" text, d small, e mood[]);
    CREATE TYPE nested AS (p pair, at timestamptz);
    CREATE DOMAIN dpair AS pair;
    CREATE TYPE floats AS RANGE (subtype = float8, multirange_type_name = floatses);
"#;

/// User-defined types whose binary form falaj reads.
pub const USER_LIKE_BUILT_IN: &[Sample] = &[
    sample("mood", &["sad", "so so", "quite, \"happy\" é 🎧", "NULL"]),
    sample("positive", &["5", "2147483647"]),
    sample("small", &["7"]),
    sample("price", &["12.30", "NaN", "-99999999.99"]),
    sample("moment", &["2024-02-29 12:00:00+00", "infinity"]),
    sample("document", &[r#"{"a": 1.10}"#]),
    sample("\"Odd \"\"name\"", &["x é"]),
    sample("dmood", &["sad"]),
];

/// Other user-defined types.
pub const USER_OTHERS: &[Sample] = &[
    sample("tags", &["{a,NULL,\"b c\"}", "[2:3]={x,y}", "{}"]),
    sample("moods", &["{sad,\"so so\",NULL}"]),
    sample("tags[]", &["{\"{a,b}\",NULL}"]),
    sample("moods[]", &["{\"{sad}\"}"]),
    sample("pair", &["(1,\"a \"\"q\"\" b, c\",7,\"{sad,\"\"so so\"\"}\")", "(,,,)", "(,\"\",,{})"]),
    sample("nested", &["(\"(1,x,,)\",\"2024-02-29 12:00:00+00\")"]),
    sample("dpair", &["(1,é,,)"]),
    sample("floats", &["[0.1,1e+23)", "empty"]),
    sample("floatses", &["{[0.1,117760704)}", "{}"]),
];

/// With the extensions hstore, ltree and citext.
pub const EXTENSIONS: &[Sample] = &[
    sample("citext", &["MiXed é", ""]),
    sample("hstore", &["\"a\"=>\"1\", \"b c\"=>NULL, \"q\"=>\"x\\\"y, é\"", ""]),
    sample("ltree", &["Top.Science.Astronomy", ""]),
    sample("lquery", &["*.Science.*{1,2}.x@"]),
    sample("ltxtquery", &["Europe & Russia*@"]),
];
