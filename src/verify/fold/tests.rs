//! Facts in, rows out.

use super::super::table::for_test;
use super::*;
use crate::lsn::Lsn;
use crate::schema::Type;

fn at(lsn: u64) -> Position {
    Position { commit_lsn: Lsn(lsn), ordinal: 0 }
}

fn fact<'a>(lsn: u64, op: Op, key: &'a str, values: &'a [Option<u64>]) -> Fact<'a> {
    Fact { at: at(lsn), op, key, old_key: None, values }
}

fn fold(bound: u64) -> Fold {
    let table = for_test(&[("id", Type::Int4), ("a", Type::Text)], &[0]);
    Fold::new(&table, Range::ALL, at(bound), &Changed::default(), usize::MAX)
}

fn row(fold: &mut Fold, key: &str) -> Option<Vec<Option<u64>>> {
    let row = fold.take(key)?;
    fold.values(&row).map(|(_, values)| values)
}

#[test]
fn the_order_of_events_does_not_matter_and_an_unchanged_value_is_carried() {
    let (whole, partial) = ([Some(1), Some(7)], [Some(2), None]);
    let facts =
        [fact(1, Op::Create, "1", &whole), fact(2, Op::Update, "1", &partial), fact(3, Op::Delete, "2", &partial)];
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
        let mut fold = fold(100);
        order.iter().for_each(|i| fold.push(&facts[*i]));
        assert_eq!(row(&mut fold, "1"), Some(vec![Some(2), Some(7)]), "{order:?}");
        assert_eq!(row(&mut fold, "2"), None);
    }
}

#[test]
fn a_value_of_an_earlier_row_under_the_key_is_not_the_rows_own() {
    let (whole, partial) = ([Some(1), Some(7)], [Some(2), None]);
    let mut fold = fold(100);
    fold.push(&fact(1, Op::Create, "1", &whole));
    fold.push(&fact(2, Op::Delete, "1", &whole));
    fold.push(&Fact { old_key: Some("9"), ..fact(3, Op::Update, "1", &partial) });
    assert_eq!(row(&mut fold, "1"), Some(vec![Some(2), None]));
    assert_eq!(row(&mut fold, "9"), None);
}

#[test]
fn a_truncate_empties_what_came_before_it() {
    let whole = [Some(1), Some(7)];
    let mut fold = fold(100);
    fold.push(&fact(2, Op::Truncate, "", &[]));
    fold.push(&fact(1, Op::Create, "1", &whole));
    fold.push(&fact(3, Op::Create, "2", &whole));
    assert_eq!((row(&mut fold, "1"), row(&mut fold, "2")), (None, Some(whole.to_vec())));
}

#[test]
fn an_event_that_was_there_before_is_named_and_one_behind_the_bound_is_left_out() {
    let whole = [Some(1), Some(7)];
    let mut fold = fold(100);
    for lsn in [1, 1, 100] {
        fold.push(&fact(lsn, Op::Create, if lsn == 1 { "1" } else { "2" }, &whole));
    }
    assert_eq!(fold.doubled, [(at(1), "1".to_owned())]);
    assert_eq!((fold.is_changed("1"), fold.is_changed("2")), (false, true));
    assert_eq!(row(&mut fold, "2"), None);
}

#[test]
fn copies_count_however_far_the_stream_is_and_one_that_was_given_is_known() {
    let whole = [Some(1), Some(7)];
    let mut fold = fold(100).with_copies(at(200));
    for (lsn, key) in [(199, "1"), (199, "1"), (200, "2")] {
        fold.push(&fact(lsn, Op::Read, key, &whole));
    }
    for (lsn, key) in [(199, "1"), (199, "3"), (200, "4")] {
        fold.note_copy(&fact(lsn, Op::Read, key, &whole));
    }
    fold.note_later(&fact(99, Op::Create, "5", &whole));
    fold.note_later(&fact(100, Op::Create, "6", &whole));
    assert_eq!(fold.doubled, [(at(199), "1".to_owned())]);
    assert_eq!(["1", "2", "3", "4", "5", "6"].map(|key| fold.is_changed(key)), [false, true, false, true, false, true]);
    assert_eq!(["1", "2", "3", "4"].map(|key| fold.is_given(key)), [false, false, true, false]);
    assert_eq!(row(&mut fold, "1"), Some(whole.to_vec()));
}

#[test]
fn equal_rows_without_a_key_are_counted() {
    let table = for_test(&[("a", Type::Text)], &[]);
    let mut fold = Fold::new(&table, Range::ALL, at(100), &Changed::default(), usize::MAX);
    for (lsn, op) in [(1, Op::Create), (2, Op::Create), (3, Op::Delete), (4, Op::Create)] {
        fold.push(&fact(lsn, op, "[1]", &[]));
    }
    assert_eq!((fold.take_copy("[1]"), fold.take_copy("[2]")), (Some(at(4)), None));
    let (_, rest) = fold.rest().next().unwrap();
    assert_eq!(fold.count(&rest), 1);
}

#[test]
fn a_fold_that_has_grown_too_large_gives_half_of_its_keys_up() {
    let mut fold = fold(1 << 20);
    fold.most = 20_000;
    let keys: Vec<String> = (0..200).map(|n| n.to_string()).collect();
    for (n, key) in (1..).zip(&keys) {
        fold.push(&fact(n, Op::Create, key, &[Some(1), Some(2)]));
    }
    let range = fold.range;
    assert!(range.last < u64::MAX, "{range:?}");
    let held = keys.iter().filter(|key| range.has(hash(key))).count();
    assert_eq!(fold.rest().count(), held);
}

#[test]
fn without_any_memory_each_row_still_comes_in_one_range() {
    let keys: Vec<String> = (0..200).map(|n| n.to_string()).collect();
    let (mut first, mut rows) = (0, 0);
    loop {
        let mut fold = fold(1 << 20);
        (fold.most, fold.range.first) = (0, first);
        for (n, key) in (1..).zip(&keys) {
            fold.push(&fact(n, Op::Create, key, &[Some(1), Some(2)]));
        }
        rows += fold.rest().count();
        match fold.range.last {
            u64::MAX => break,
            last => first = last + 1,
        }
    }
    assert_eq!(rows, keys.len());
}
