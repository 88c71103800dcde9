//! `upload` against the local BigQuery server: every row once, whatever happens on the way.

mod bench;
mod faults;
mod proxy;

use std::process::{Command, Stdio};

use bench::{Bench, Guard, Row, files, ids, row, rows, text, until};

#[test]
fn without_a_project_there_is_nothing_to_do_and_the_files_stay() {
    let bench = Bench::new("noproject");
    let batch = bench.seal(&[("events", &rows(0, 3))]);
    let output = bench.upload(&["--once"]).env_remove("FALAJ_BIGQUERY__PROJECT").output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "nothing to do: no project\n");
    assert!(batch.join("events.parquet").exists());
}

#[test]
fn data_set_tables_and_views_are_created_and_every_value_arrives() {
    let bench = Bench::new("values");
    let history = [row(10, 0, "c", 1), row(10, 1, "c", 2), row(11, 0, "u", 1), row(12, 0, "d", 2), row(13, 0, "c", 3)];
    bench.seal(&[("events", &history), ("app.other", &rows(0, 2))]);
    assert_eq!(bench.loads(), bench.line(2, 7));
    assert_eq!(bench.ids("events"), ids(&history));
    assert_eq!(bench.ids("app_other"), ids(&rows(0, 2)));

    let sql = "SELECT id, count, title, share, price = NUMERIC '2.07', FORMAT_TIMESTAMP('%F %T', at), CAST(day AS STRING), good, \
               _op, _lsn, _commit_lsn, _ordinal, _unchanged FROM `DATASET.events` WHERE _id = '000000000000000A:0000000001'";
    let values: Vec<String> = bench.query(sql).remove(0).into_iter().map(|v| v.unwrap_or("NULL".into())).collect();
    assert_eq!(
        values,
        [
            "2",
            "4",
            "عنوان 2",
            "0.5",
            "true",
            "2023-11-14 22:13:20",
            "2022-01-08",
            "true",
            "c",
            "0/A",
            "10",
            "1",
            "NULL"
        ]
    );

    let table = bench.table("events");
    assert_eq!(table["timePartitioning"]["type"], "DAY");
    assert_eq!(table["timePartitioning"]["field"], "_commit_ts");
    assert_eq!(table["clustering"]["fields"], serde_json::json!(["title"]));
    let types: Vec<String> = table["schema"]["fields"]
        .as_array()
        .unwrap()
        .iter()
        .map(|f| format!("{} {}", f["name"].as_str().unwrap(), f["type"].as_str().unwrap()))
        .collect();
    assert_eq!(
        types[..9],
        [
            "id INTEGER",
            "count INTEGER",
            "title STRING",
            "share FLOAT",
            "price NUMERIC",
            "at TIMESTAMP",
            "local DATETIME",
            "day DATE",
            "good BOOLEAN"
        ]
    );
    let latest = bench.query("SELECT id, _op FROM `DATASET.events_latest` ORDER BY id");
    assert_eq!(latest, [[Some("1".into()), Some("u".into())], [Some("3".into()), Some("c".into())]]);
}

#[test]
fn a_truncate_empties_the_latest_view() {
    let bench = Bench::new("truncate");
    bench.seal(&[("events", &[row(10, 0, "c", 1), row(11, 0, "t", 0), row(12, 0, "c", 5)])]);
    bench.loads();
    assert_eq!(bench.query("SELECT id FROM `DATASET.events_latest`"), [[Some("5".to_owned())]]);
}

#[test]
fn a_changed_key_leaves_no_row_of_the_old_one_in_the_latest_view() {
    let bench = Bench::new("moved");
    let moved = Row { old_key: Some("{\"id\":1}"), ..row(12, 0, "u", 9) };
    bench.seal(&[("events", &[row(10, 0, "c", 1), row(11, 0, "c", 2), moved, row(13, 0, "u", 2)])]);
    bench.loads();
    let latest = || bench.query("SELECT CAST(id AS STRING) FROM `DATASET.events_latest` ORDER BY id").concat();
    assert_eq!(latest(), ["2", "9"].map(|v| Some(v.to_owned())));
    bench.seal(&[("events", &[row(14, 0, "c", 1)])]);
    bench.loads();
    assert_eq!(latest(), ["1", "2", "9"].map(|v| Some(v.to_owned())));
}

#[test]
fn the_latest_view_has_the_value_of_an_unchanged_toast_column_also_of_a_new_one() {
    let bench = Bench::new("toast");
    let silent = |lsn, columns| Row { title: None, unchanged: Some(columns), ..row(lsn, 0, "u", 1) };
    bench.seal(&[("events", &[row(10, 0, "c", 1), silent(11, "[\"title\"]")])]);
    bench.seal_as(&[("events", &[row(12, 0, "u", 1), silent(13, "[\"title\", \"note\"]")])], true);
    bench.loads();
    let latest = bench.query("SELECT title, note, _lsn FROM `DATASET.events_latest`");
    assert_eq!(latest, [["عنوان 1", "noted", "0/D"].map(|v| Some(v.to_owned()))]);
}

#[test]
fn small_batches_become_one_job_and_nothing_is_loaded_again() {
    let bench = Bench::new("merge");
    for n in 0..5 {
        bench.seal(&[("events", &rows(n * 10, n * 10 + 10))]);
    }
    assert_eq!(bench.loads(), bench.line(1, 50));
    assert_eq!(bench.loads(), bench.line(0, 0));
    bench.seal(&[("events", &rows(50, 55))]);
    bench.seal(&[("events", &rows(55, 60)), ("other", &rows(60, 61))]);
    assert_eq!(bench.loads(), bench.line(2, 11));
    assert_eq!(bench.ids("events"), ids(&rows(0, 60)));
    assert_eq!(bench.loaded(), 3);
}

#[test]
fn a_lost_or_torn_record_doubles_nothing() {
    let bench = Bench::new("record");
    bench.seal(&[("events", &rows(0, 10))]);
    bench.loads();
    std::fs::remove_dir_all(bench.archive().join(".upload")).unwrap();
    assert_eq!(bench.loads(), bench.line(0, 0));
    std::fs::remove_dir_all(bench.archive().join(".upload")).unwrap();
    bench.seal(&[("events", &rows(10, 15))]);
    assert_eq!(bench.loads(), bench.line(1, 5));
    for record in walk(&bench.archive().join(".upload")) {
        std::fs::write(record, "{\"table\": \"ev").unwrap();
    }
    assert_eq!(bench.loads(), bench.line(0, 0));
    assert_eq!(bench.ids("events"), ids(&rows(0, 15)));
    assert_eq!(bench.loaded(), 2);
}

#[test]
fn rows_that_someone_has_deleted_do_not_come_back() {
    let bench = Bench::new("deleted");
    bench.seal(&[("events", &rows(0, 10))]);
    bench.loads();
    bench.query("DELETE FROM `DATASET.events` WHERE id < 4");
    std::fs::remove_dir_all(bench.archive().join(".upload")).unwrap();
    assert_eq!(bench.loads(), bench.line(0, 0));
    bench.query("DELETE FROM `DATASET.events` WHERE TRUE");
    assert_eq!(bench.loads(), bench.line(0, 0));
    std::fs::remove_dir_all(bench.archive().join(".upload")).unwrap();
    assert_eq!(bench.loads(), bench.line(0, 0));
    bench.seal(&[("events", &rows(10, 12))]);
    bench.loads();
    assert_eq!(bench.ids("events"), ids(&rows(10, 12)));
}

#[test]
fn a_table_that_was_dropped_is_not_made_anew_without_its_rows() {
    let bench = Bench::new("dropped");
    bench.seal(&[("events", &rows(0, 10)), ("app.other", &rows(0, 2))]);
    bench.loads();
    bench.query("DROP TABLE `DATASET.events`");
    bench.seal(&[("events", &rows(10, 15)), ("app.other", &rows(10, 12))]);
    let refused = bench.refused();
    assert!(refused.contains("rows up to 0/3F1#0, by ") && refused.contains(".json)"), "{refused}");
    assert_eq!(bench.ids("app_other"), [ids(&rows(0, 2)), ids(&rows(10, 12))].concat());
    // Without the record its jobs tell.
    std::fs::remove_dir_all(bench.archive().join(".upload")).unwrap();
    let refused = bench.refused();
    assert!(refused.contains("rows up to 0/3F1#0, by job falaj-test-events-start-"), "{refused}");
    assert!(bench.table("events")["error"]["code"] == 404, "{}", bench.table("events"));

    let sql = refused.split("go on without the earlier rows: ").nth(1).unwrap().split(';').next().unwrap();
    bench.query(sql);
    let made = bench.table("events");
    assert_eq!(bench.loads(), bench.line(1, 5));
    assert_eq!(bench.ids("events"), ids(&rows(10, 15)));
    // It is as if falaj had made it.
    let other = bench.table("app_other");
    assert!(made["labels"]["falaj_owner"].is_string(), "{made}");
    for part in ["timePartitioning", "clustering"] {
        assert_eq!(made[part], other[part], "{part}");
    }
    assert_eq!(made["schema"], other["schema"]);
}

#[test]
fn a_dropped_table_that_had_only_history_is_not_made_anew_either() {
    let bench = Bench::new("dropped_history");
    bench.seal_history("events", &[row(1007, 0, "r", 1), row(1007, 1, "r", 2)]);
    assert_eq!(bench.loads(), bench.line(1, 2));
    bench.query("DROP TABLE `DATASET.events`");
    assert_eq!(bench.loads(), bench.line(0, 0));
    bench.seal_history("events", &[row(1015, 0, "r", 3)]);
    let refused = bench.refused();
    assert!(refused.contains("rows of backfills, by "), "{refused}");
    std::fs::remove_dir_all(bench.archive().join(".upload")).unwrap();
    let refused = bench.refused();
    assert!(refused.contains("by job falaj-test-events-r-"), "{refused}");
}

#[test]
fn a_new_service_gets_everything_once_the_records_of_the_old_one_are_removed() {
    let mut bench = Bench::new("anew");
    let batch = bench.seal(&[("events", &rows(0, 10))]);
    bench.loads();
    let dir = bench.archive().join(".upload");
    let records = || std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
    let old = records().next().unwrap();
    // The same records, and a data set of which nobody knows a job: as if the service had lost all it had.
    let aside = bench.dir.path().join("aside");
    std::fs::rename(&batch, &aside).unwrap();
    bench.dataset.push_str("_new");
    bench.loads();
    std::fs::rename(&aside, &batch).unwrap();
    let new = records().find(|dir| *dir != old).unwrap();
    for file in std::fs::read_dir(&old).unwrap().map(|entry| entry.unwrap()) {
        std::fs::copy(file.path(), new.join(file.file_name())).unwrap();
    }
    bench.seal(&[("events", &rows(10, 15))]);
    let refused = bench.refused();
    let command = refused.split("have everything loaded: ").nth(1).unwrap().split(" – ").next().unwrap();
    assert!(command.starts_with("rm -f "), "{command}");
    let status = Command::new("sh").args(["-c", command]).current_dir(bench.dir.path()).status().unwrap();
    assert!(status.success(), "{command}");
    assert_eq!(bench.loads(), bench.line(1, 15));
    assert_eq!(bench.ids("events"), ids(&rows(0, 15)));
}

#[test]
fn batches_that_are_cut_elsewhere_after_a_crash_load_only_what_is_new() {
    let bench = Bench::new("recut");
    let first = bench.seal(&[("events", &rows(0, 10))]);
    bench.loads();
    std::fs::remove_dir_all(first).unwrap();
    bench.seal(&[("events", &rows(0, 6))]);
    bench.seal(&[("events", &rows(6, 16))]);
    assert_eq!(bench.loads(), bench.line(1, 6));
    std::fs::remove_dir_all(bench.archive().join(".upload")).unwrap();
    assert_eq!(bench.loads(), bench.line(0, 0));
    assert_eq!(bench.ids("events"), ids(&rows(0, 16)));
}

#[test]
fn a_changed_schema_begins_a_new_job_and_a_dropped_column_is_null() {
    let bench = Bench::new("schema");
    bench.seal(&[("events", &rows(0, 2))]);
    bench.seal_as(&[("events", &rows(2, 4))], true);
    bench.seal(&[("events", &rows(4, 6))]);
    assert_eq!(bench.loads(), bench.line(3, 6));
    let notes = bench.query("SELECT note FROM `DATASET.events` ORDER BY _id");
    let noted = Some("noted".to_owned());
    assert_eq!(notes.concat(), [None, None, noted.clone(), noted, None, None]);
}

#[test]
fn columns_that_someone_has_added_to_the_table_stay_null() {
    let bench = Bench::new("added");
    bench.seal(&[("events", &rows(0, 2))]);
    bench.loads();
    for column in ["said STRING", "doc JSON", "place GEOGRAPHY", "pair STRUCT<a INT64, b STRING>", "tags ARRAY<STRING>"]
    {
        bench.query(&format!("ALTER TABLE `DATASET.events` ADD COLUMN {column}"));
    }
    bench.seal_as(&[("events", &rows(2, 4))], true);
    bench.seal(&[("events", &rows(4, 6))]);
    assert_eq!(bench.loads(), bench.line(2, 4));
    let sql = "SELECT note, said, IF(doc IS NULL, NULL, 'set'), ST_ASTEXT(place), pair.b, CAST(ARRAY_LENGTH(tags) AS STRING) \
               FROM `DATASET.events` WHERE id >= 2 ORDER BY _id";
    let null = || vec![None; 5];
    let noted = |note: Option<&str>| [vec![note.map(str::to_owned)], null()].concat();
    assert_eq!(bench.query(sql), [noted(Some("noted")), noted(Some("noted")), noted(None), noted(None)]);
}

#[test]
fn a_schema_that_changes_within_a_batch_loads_both_parts() {
    let bench = Bench::new("parts");
    let batch = bench.seal(&[("events", &rows(0, 4)), ("other", &rows(4, 10))]);
    bench.write(&batch.join("events.1.parquet"), "events", &rows(5, 8), true);
    assert_eq!(bench.loads(), bench.line(3, 13));
    assert_eq!(bench.loads(), bench.line(0, 0));
    let all = [rows(0, 4), rows(5, 8)].concat();
    assert_eq!(bench.ids("events"), ids(&all));
}

#[test]
fn a_torn_file_is_named_and_other_tables_go_on() {
    let bench = Bench::new("torn");
    bench.seal(&[("events", &rows(0, 3)), ("other", &rows(0, 3))]);
    let second = bench.seal(&[("events", &rows(3, 6)), ("other", &rows(3, 6))]);
    bench.seal(&[("events", &rows(6, 9))]);
    let torn = second.join("events.parquet");
    let whole = std::fs::read(&torn).unwrap();
    std::fs::write(&torn, &whole[..whole.len() / 2]).unwrap();
    let output = bench.once();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(String::from_utf8_lossy(&output.stderr).contains(torn.to_str().unwrap()), "{}", text(&output));
    assert_eq!(bench.ids("other"), ids(&rows(0, 6)));
    assert_eq!(bench.ids("events"), ids(&rows(0, 3)));
    std::fs::write(&torn, whole).unwrap();
    assert_eq!(bench.loads(), bench.line(1, 6));
    assert_eq!(bench.ids("events"), ids(&rows(0, 9)));
}

#[test]
fn what_waits_is_told_of_stream_and_history_also_where_files_are_torn() {
    let bench = Bench::new("pending");
    let copied = [2007, 2015].map(|lsn| bench.seal_history("events", &[row(lsn, 0, "r", 1)]));
    let torn = [bench.seal(&[("events", &rows(0, 3))])].into_iter().chain(copied);
    torn.for_each(|batch| std::fs::write(batch.join("events.parquet"), "torn").unwrap());
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let mut command = bench.upload(&[]);
    let command = command.env("FALAJ_HTTP__LISTEN", &address).stdout(Stdio::null());
    let _process = Guard(command.spawn().unwrap());
    let told = "falaj_upload_pending_batches{table=\"events\"} 3\n";
    until("three files are told", || bench::get(&format!("http://{address}/metrics")).contains(told));
}

#[test]
fn a_torn_file_of_history_does_not_hold_up_those_behind_it() {
    let bench = Bench::new("torncopy");
    let torn = bench.seal_history("events", &[row(2007, 0, "r", 1)]).join("events.parquet");
    let whole = std::fs::read(&torn).unwrap();
    std::fs::write(&torn, "torn").unwrap();
    let second = row(2015, 0, "r", 2);
    bench.seal_history("events", std::slice::from_ref(&second));
    let output = bench.once();
    assert!(output.status.code() == Some(1) && text(&output).contains(torn.to_str().unwrap()), "{}", text(&output));
    assert_eq!(bench.ids("events"), ids(std::slice::from_ref(&second)));
    std::fs::write(&torn, whole).unwrap();
    bench.loads();
    assert_eq!(bench.ids("events"), ids(&[row(2007, 0, "r", 1), second]));
}

#[test]
fn rows_of_another_stream_are_refused() {
    let mut bench = Bench::new("streams");
    bench.seal(&[("events", &rows(0, 3))]);
    bench.loads();
    bench.system_id.push('7');
    std::fs::remove_dir_all(bench.archive()).unwrap();
    bench.seal(&[("events", &rows(0, 5))]);
    let output = bench.once();
    assert_eq!(output.status.code(), Some(78), "{}", text(&output));
    assert!(String::from_utf8_lossy(&output.stderr).contains("bigquery_table_owner"), "{}", text(&output));
    assert_eq!(bench.ids("events"), ids(&rows(0, 3)));
}

#[test]
fn two_processes_share_the_work_and_double_nothing() {
    let bench = Bench::new("two");
    for n in 0..20 {
        bench.seal(&[("a", &rows(n * 10, n * 10 + 10)), ("b", &rows(n * 10, n * 10 + 10))]);
    }
    let spawn = || bench.upload(&["--once"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    for process in [spawn(), spawn(), spawn()] {
        let output = process.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
    }
    for table in ["a", "b"] {
        assert_eq!(bench.ids(table), ids(&rows(0, 200)));
    }
    assert_eq!(bench.loaded(), 2);
}

#[test]
fn it_runs_on_and_ends_with_0_on_sigterm() {
    let bench = Bench::new("loop");
    bench.seal(&[("events", &rows(0, 5))]);
    let mut command = bench.upload(&[]);
    let command = command.env("FALAJ_BIGQUERY__LOAD_EVERY", "100ms").stdout(Stdio::null());
    let mut process = Guard(command.spawn().unwrap());
    until("the first batch is loaded", || bench.loaded() == 1);
    bench.seal(&[("events", &rows(5, 9))]);
    until("the second batch is loaded", || bench.loaded() == 2);
    terminate(process.0.id());
    assert_eq!(process.0.wait().unwrap().code(), Some(0));
    assert_eq!(bench.ids("events"), ids(&rows(0, 9)));
}

fn terminate(pid: u32) {
    let status = Command::new("kill").arg(pid.to_string()).status().unwrap();
    assert!(status.success());
}

/// The record files under a directory.
fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut found = files(dir);
    found.retain(|path| path.extension().is_some_and(|e| e == "json"));
    assert!(!found.is_empty(), "no record under {}", dir.display());
    found
}
