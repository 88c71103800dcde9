//! The SQL of a copy: which rows, in which order, in which form. Pure.

use super::plan::{Key, Part, Plan, Range};
use super::row::Form;
use crate::schema::Relation;
use crate::source::catalog::Table;
use crate::source::wire::{ident, literal};

/// Rows of a range, roughly; a table that has less is cut for the sake of the lanes.
const RANGE_ROWS: u64 = 250_000;
/// … but not into ranges smaller than this.
const LEAST_ROWS: u64 = 5_000;
/// Ranges of a table at most: rows of a snapshot have their numbers in blocks, one a range, and a number has ten digits.
const MOST_RANGES: u64 = 512;
/// Blocks of a sample for each range: keys in the order of their rows come a block at a time.
const SAMPLE_BLOCKS: u64 = 32;

/// How the columns of a table are asked for, and how they come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Columns {
    list: String,
    /// Of each column: those of the relation, then the row's place where the table is cut by it.
    pub forms: Vec<Form>,
    /// Indexes of the columns that it is cut by; the place is the last one.
    pub key: Vec<usize>,
}

impl Columns {
    /// Columns of a relation that is cut by `order`. A type whose send format is not known comes as its own text, that is
    /// what its output function gives: as it comes in the stream.
    pub fn new(relation: &Relation, order: &[Part]) -> Self {
        let one = |c: &crate::schema::Column| {
            let name = ident(&c.name);
            match c.ty().has_binary() {
                true => (name, Form::Binary),
                // `IS DISTINCT FROM NULL` and not `IS NOT NULL`: that is false for a row of NULLs.
                false => (format!("CASE WHEN {name} IS DISTINCT FROM NULL THEN format('%s', {name}) END"), Form::Text),
            }
        };
        let (mut list, mut forms): (Vec<_>, Vec<_>) = relation.columns.iter().map(one).unzip();
        let mut key: Vec<usize> = order.iter().filter_map(|part| relation.index_of(&part.column)).collect();
        if is_by_place(order) {
            (key, list, forms) =
                (vec![list.len()], [list, vec!["ctid".into()]].concat(), [forms, vec![Form::Binary]].concat());
        }
        Self { list: list.join(", "), forms, key }
    }
}

/// Whether a table is cut by where its rows lie.
pub(super) fn is_by_place(order: &[Part]) -> bool {
    matches!(order, [Part { column, .. }] if column == "ctid")
}

/// What a table is cut by: its primary key where the stream has all of it, else the place of its rows. `parts` has the key.
pub(super) fn order(table: &Table, parts: &[Part]) -> Vec<Part> {
    let published = table.primary_key.iter().filter(|name| table.relation.index_of(name).is_some());
    let key: Vec<Part> = published.filter_map(|name| parts.iter().find(|part| part.column == *name).cloned()).collect();
    if key.is_empty() || key.len() < table.primary_key.len() {
        return by_place();
    }
    key
}

/// Cut by where the rows lie.
pub(super) fn by_place() -> Vec<Part> {
    vec![Part { column: "ctid".into(), ty: "tid".into(), operators: None }]
}

/// The conditions on every row: the publication's own, and `--where`.
pub(super) fn conditions(row_filter: Option<&str>, filter: Option<&str>) -> String {
    let all: Vec<_> = row_filter.into_iter().chain(filter).map(|c| format!("({c})")).collect();
    if all.is_empty() { "true".to_owned() } else { all.join(" AND ") }
}

/// Settings under which the rows come in their order without a sort, where the planner has the choice.
pub(super) fn settings(plan: &Plan) -> &'static str {
    match (is_by_place(&plan.order), &plan.filter) {
        // Blocks one after the other; no index may put them in another order.
        (true, _) => {
            "SET LOCAL enable_indexscan = off; SET LOCAL enable_indexonlyscan = off; SET LOCAL enable_bitmapscan = off; \
             SET LOCAL enable_seqscan = on; SET LOCAL enable_sort = on"
        }
        // Through the key's index: a sequential scan would read the whole table for each range.
        (false, None) => {
            "SET LOCAL enable_indexscan = on; SET LOCAL enable_indexonlyscan = on; SET LOCAL enable_bitmapscan = off; \
             SET LOCAL enable_seqscan = off; SET LOCAL enable_sort = off"
        }
        // The condition may have an index of its own.
        (false, Some(_)) => {
            "SET LOCAL enable_indexscan = on; SET LOCAL enable_indexonlyscan = on; SET LOCAL enable_bitmapscan = on; \
             SET LOCAL enable_seqscan = on; SET LOCAL enable_sort = on"
        }
    }
}

/// Copies the rows of a range after `after`, in the key's order.
pub(super) fn copy(columns: &Columns, plan: &Plan, range: &Range, after: Option<&Key>, conditions: &str) -> String {
    let bounds = [(after, Than::Greater), (range.upto.as_ref(), Than::LessOrEqual)];
    let bounds = bounds.iter().filter_map(|(key, than)| Some(compare(&plan.order, *than, (*key)?)));
    let all: Vec<_> = bounds.chain([conditions.to_owned()]).collect();
    // The place gives no order that the planner knows of: it would sort what comes sorted.
    let order = if is_by_place(&plan.order) { String::new() } else { format!(" ORDER BY {}", names(&plan.order)) };
    format!(
        "COPY (SELECT {} FROM {} WHERE {}{order}) TO STDOUT (FORMAT binary)",
        columns.list,
        range.source,
        all.join(" AND ")
    )
}

fn names(order: &[Part]) -> String {
    order.iter().map(|part| name(&part.column)).collect::<Vec<_>>().join(", ")
}

fn name(column: &str) -> String {
    if column == "ctid" { column.to_owned() } else { ident(column) }
}

/// How a row lies to a bound.
#[derive(Clone, Copy)]
enum Than {
    Greater,
    LessOrEqual,
}

fn compare(order: &[Part], than: Than, key: &Key) -> String {
    let values: Vec<_> =
        order.iter().zip(key).map(|(part, value)| format!("{}::{}", literal(value), part.ty)).collect();
    if order.iter().any(|part| part.operators.is_some()) {
        return compare_each(order, than, &values);
    }
    let sign = match than {
        Than::Greater => ">",
        Than::LessOrEqual => "<=",
    };
    match order.len() {
        1 => format!("{} {sign} {}", names(order), values.concat()),
        _ => format!("({}) {sign} ({})", names(order), values.join(", ")),
    }
}

/// As the comparison of rows, column by column: SQL has one operator for all columns of a row.
fn compare_each(order: &[Part], than: Than, values: &[String]) -> String {
    let signs = ["<", "<=", "=", ">=", ">"].map(str::to_owned);
    let (strict, inclusive) = match than {
        Than::Greater => (4, 3),
        Than::LessOrEqual => (0, 1),
    };
    let mut condition = String::new();
    for (at, (part, value)) in order.iter().zip(values).enumerate().rev() {
        let one =
            |sign: usize| format!("{} {} {value}", name(&part.column), part.operators.as_ref().unwrap_or(&signs)[sign]);
        let is_last = at + 1 == order.len();
        condition = match than {
            Than::Greater if is_last => one(strict),
            Than::LessOrEqual if is_last => one(inclusive),
            // The first of the two is what the index can be searched by.
            _ => format!("{} AND ({} OR {} AND {condition})", one(inclusive), one(strict), one(2)),
        };
        if !is_last {
            condition = format!("({condition})");
        }
    }
    condition
}

/// How many ranges a table of so many rows is cut into.
pub(super) fn range_count(rows: u64, lanes: usize) -> u64 {
    let for_lanes = (2 * lanes as u64).min(rows / LEAST_ROWS);
    rows.div_ceil(RANGE_ROWS).max(for_lanes).clamp(1, MOST_RANGES)
}

/// Keys at which a table is cut into `count` ranges of about equal size, from a sample of its blocks.
pub(super) fn cuts(order: &[Part], source: &str, blocks: u64, conditions: &str, count: u64) -> String {
    let percent = (100.0 * (SAMPLE_BLOCKS * count) as f64 / blocks.max(1) as f64).min(100.0);
    // Half a table read at random costs more than all of it in order.
    let sample =
        if percent >= 50.0 { String::new() } else { format!(" TABLESAMPLE SYSTEM ({percent:.6}) REPEATABLE (1)") };
    let (names, texts) = (names(order), order.iter().map(|p| format!("format('%s', {})", name(&p.column))));
    let texts: Vec<_> = texts.collect();
    format!(
        "SELECT ARRAY[{}] FROM (SELECT {names}, row_number() OVER (ORDER BY {names}) AS n, count(*) OVER () AS c \
         FROM {source}{sample} WHERE {conditions}) AS s \
         WHERE n * {count} / c <> (n - 1) * {count} / c AND n < c ORDER BY n",
        texts.join(", ")
    )
}

/// The ranges between `cuts`.
pub(super) fn ranges(source: &str, cuts: Vec<Key>) -> Vec<Range> {
    let starts = [None].into_iter().chain(cuts.iter().cloned().map(Some));
    let ends = cuts.iter().cloned().map(Some).chain([None]);
    starts.zip(ends).map(|(after, upto)| Range { source: source.to_owned(), after, upto }).collect()
}

/// Cuts of a table of so many blocks into `count` ranges.
pub(super) fn block_cuts(blocks: u64, count: u64) -> Vec<Key> {
    let count = count.min(blocks).max(1);
    (1..count).map(|n| vec![format!("({},0)", blocks * n / count)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lsn::{Lsn, SlotIdentity};
    use crate::schema::Column;

    fn table(key: &[&str]) -> Table {
        let column = |name: &str, type_oid| Column { name: name.into(), type_oid, type_mod: -1, identity: true };
        Table {
            relation: Relation {
                oid: 1,
                namespace: "public".into(),
                name: "t\"".into(),
                replica_identity: b'd',
                columns: vec![column("id", 20), column("net", 869), column("at", 1184)],
            },
            primary_key: key.iter().map(|k| (*k).into()).collect(),
            type_oids: Vec::new(),
            partitioned: false,
            readable: true,
            row_filter: None,
        }
    }

    fn parts() -> [Part; 5] {
        let foreign = |sign: &str| format!("OPERATOR(\"x y\".{sign})");
        [
            ("id", "bigint", None),
            ("net", "inet", None),
            ("at", "timestamp with time zone", None),
            ("hidden", "text", None),
            ("mail", "\"x y\".citext", Some(["<", "<=", "=", ">=", ">"].map(foreign))),
        ]
        .map(|(column, ty, operators)| Part { column: column.into(), ty: ty.into(), operators })
    }

    #[test]
    fn keys_of_an_extension_are_compared_by_its_own_operators() {
        let [id, _, _, _, mail] = parts();
        let one = compare(std::slice::from_ref(&mail), Than::LessOrEqual, &vec!["A".into()]);
        assert_eq!(one, r#""mail" OPERATOR("x y".<=) 'A'::"x y".citext"#);
        let key = vec!["A".into(), "7".into()];
        assert_eq!(
            compare(&[mail.clone(), id.clone()], Than::Greater, &key),
            r#"("mail" OPERATOR("x y".>=) 'A'::"x y".citext AND ("mail" OPERATOR("x y".>) 'A'::"x y".citext OR "mail" OPERATOR("x y".=) 'A'::"x y".citext AND "id" > '7'::bigint))"#
        );
        assert_eq!(
            compare(&[id, mail], Than::LessOrEqual, &vec!["7".into(), "A".into()]),
            r#"("id" <= '7'::bigint AND ("id" < '7'::bigint OR "id" = '7'::bigint AND "mail" OPERATOR("x y".<=) 'A'::"x y".citext))"#
        );
    }

    fn plan(key: &[&str]) -> (Plan, Columns) {
        let table = table(key);
        let order = order(&table, &parts());
        let columns = Columns::new(&table.relation, &order);
        let plan = Plan {
            version: 1,
            identity: SlotIdentity { system_id: "7".into(), timeline: 1, slot: "falaj".into() },
            table: "t".into(),
            filter: None,
            backfill: Lsn(256),
            order,
            storage: None,
            rows: 0,
            lanes: 2,
            ranges: vec![],
            finished: false,
        };
        (plan, columns)
    }

    const LIST: &str = r#""id", CASE WHEN "net" IS DISTINCT FROM NULL THEN format('%s', "net") END, "at""#;

    #[test]
    fn a_range_of_a_key_is_copied_in_its_order() {
        let (one, columns) = plan(&["id"]);
        let cuts = vec![vec!["10".to_owned()], vec!["20".to_owned()]];
        let ranges = ranges("ONLY \"public\".\"t\"\"\"", cuts);
        assert_eq!(ranges.len(), 3);
        assert_eq!(
            copy(&columns, &one, &ranges[1], ranges[1].after.as_ref(), &conditions(Some("a > 1"), Some("b OR c"))),
            format!(
                r#"COPY (SELECT {LIST} FROM ONLY "public"."t""" WHERE "id" > '10'::bigint AND "id" <= '20'::bigint AND (a > 1) AND (b OR c) ORDER BY "id") TO STDOUT (FORMAT binary)"#
            )
        );
        assert_eq!(columns.forms, [Form::Binary, Form::Text, Form::Binary]);
        let (two, columns) = plan(&["at", "id"]);
        assert_eq!(columns.key, [2, 0]);
        let after = vec!["2026-01-01 00:00:00+00".to_owned(), "o'1".to_owned()];
        assert_eq!(
            copy(&columns, &two, &Range { source: "t".into(), after: None, upto: None }, Some(&after), "true"),
            format!(
                r#"COPY (SELECT {LIST} FROM t WHERE ("at", "id") > ('2026-01-01 00:00:00+00'::timestamp with time zone, 'o''1'::bigint) AND true ORDER BY "at", "id") TO STDOUT (FORMAT binary)"#
            )
        );
    }

    #[test]
    fn without_a_published_key_the_place_of_a_row_is_what_a_table_is_cut_by() {
        for key in [&[][..], &["hidden"], &["id", "hidden"]] {
            let (plan, columns) = plan(key);
            assert!(is_by_place(&plan.order));
            assert_eq!((columns.forms.len(), &columns.key[..]), (4, &[3][..]));
            let range = &ranges("t", block_cuts(100, 2))[1];
            assert_eq!(
                copy(&columns, &plan, range, range.after.as_ref(), "true"),
                format!(
                    "COPY (SELECT {LIST}, ctid FROM t WHERE ctid > '(50,0)'::tid AND true) TO STDOUT (FORMAT binary)"
                )
            );
        }
        assert_eq!(block_cuts(0, 4), Vec::<Key>::new());
    }

    #[test]
    fn the_number_of_ranges_follows_rows_and_lanes() {
        let counts: Vec<_> = [(0, 2), (9_999, 2), (10_000, 2), (2_000_000, 2), (2_000_000, 8), (u64::MAX, 2)]
            .map(|(rows, lanes)| range_count(rows, lanes))
            .into();
        assert_eq!(counts, [1, 1, 2, 8, 16, 512]);
    }

    #[test]
    fn a_small_table_is_read_whole_for_its_cuts_and_a_large_one_is_sampled() {
        let (plan, _) = plan(&["id"]);
        let small = cuts(&plan.order, "t", 100, "true", 4);
        assert_eq!(
            small,
            "SELECT ARRAY[format('%s', \"id\")] FROM (SELECT \"id\", row_number() OVER (ORDER BY \"id\") AS n, count(*) OVER () \
             AS c FROM t WHERE true) AS s WHERE n * 4 / c <> (n - 1) * 4 / c AND n < c ORDER BY n"
        );
        assert!(cuts(&plan.order, "t", 100_000, "true", 4).contains("TABLESAMPLE SYSTEM (0.128000) REPEATABLE (1)"));
    }
}
