//! `falaj replay`, bookmarks and `--start`, on real servers: the same bytes again, in order, never twice.

mod bookmark;
mod outlets;
mod topic;

use falaj::lsn::Lsn;

use crate::rig::process::Ended;
use crate::rig::{Pipeline, Servers, archive, assert_same, id, load};

/// The values of several topics in the order of the stream.
async fn values(p: &Pipeline, tables: &[&str]) -> Vec<String> {
    let mut all = Vec::new();
    for table in tables {
        all.extend(p.values(table).await);
    }
    all.sort_by_cached_key(|value| id(value).to_owned());
    all
}

/// The commit LSN in an event.
fn commit(event: &str) -> Lsn {
    Lsn(u64::from_str_radix(&id(event)[..16], 16).unwrap())
}

/// The same as a flag.
fn lsn(event: &str) -> String {
    commit(event).to_string()
}

fn lines(out: &str) -> Vec<String> {
    out.lines().map(str::to_owned).collect()
}

async fn replay(p: &Pipeline, flags: &[&str]) -> Ended {
    p.start(&[&["replay"], flags].concat()).end().await
}

async fn replayed(p: &Pipeline, flags: &[&str]) -> String {
    p.start(&[&["replay"], flags].concat()).ends_well().await
}

/// Rows of every kind in several batches, a schema that changes, every table of the publication.
async fn history(p: &mut Pipeline) -> Vec<&'static str> {
    p.set("FALAJ_ARCHIVE__SEAL_BYTES", "16KiB");
    p.run(
        "CREATE TABLE every (id bigint PRIMARY KEY, i2 smallint, f4 real, f8 double precision, n numeric, amount numeric(12,3),
             b boolean, d date, t timestamp, tz timestamptz, u uuid, js json, jb jsonb, txt text, v varchar(9), c char(4), ia int[], ta text[], by bytea);
         CREATE TABLE page (a int, at timestamptz, body text, \"quoted \"\"é\" text, PRIMARY KEY (a, at));
         ALTER TABLE page ALTER body SET STORAGE EXTERNAL;
         CREATE SCHEMA app; CREATE TABLE app.log (line json);
         CREATE PUBLICATION falaj FOR TABLE every, page, app.log",
    )
    .await;
    p.run(include_str!("../sql/01_tables.sql")).await;
    p.run("ALTER PUBLICATION falaj ADD TABLE content, engagement_events").await;
    p.init().await;
    p.run(
        r#"INSERT INTO every VALUES
         (1, -32768, 1.5, 0.1, 1.10, 12345.100, true, '2024-02-29', '2024-02-29 12:00:00.000001', '2024-02-29 12:00:00.5+03', 'c0ffee00-0000-4000-8000-000000000001', '{"b": 1.10, "a":[ ]}', '{"b": 1.10, "a":[ ]}', E'tab\there "q" \\ \u0001 é 🎧', 'web‑saf', 'ab', '{{1,NULL},{3,4}}', '{"a,b",NULL,"NULL"}', '\xdeadbeef'),
         (2, 32767, 'NaN', '-Infinity', 'NaN', -0.001, false, 'infinity', '-infinity', 'infinity', NULL, 'null', 'null', '', '', '', '{}', '{}', ''),
         (3, 0, '-0', 1e300, 123456789012345678901234567890.123456789, 0, NULL, '0044-03-15 BC', '0044-03-15 10:00:00 BC', '0001-01-01 00:00:00+00', NULL, '"x"', '1e2', 'x', NULL, NULL, NULL, NULL, NULL),
         (4, 1, 1e-40, 5e-324, 1e-20, 'NaN', true, '9999-12-31', '9999-12-31 23:59:59.999999', '12026-01-01 00:00:00+00', NULL, ' [1,  2] ', '[1, 2]', 'x', 'y', 'z', '[2:3]={7,8}', '{}', '\x00'),
         (9223372036854775807, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL)"#,
    )
    .await;
    p.run("UPDATE every SET n = -n, f8 = f8 / 3, f4 = f4 / 3 WHERE id < 4; DELETE FROM every WHERE id = 3").await;
    p.run("INSERT INTO page VALUES (1, '2024-01-01 10:00+03', repeat('é', 3000), 'x'), (2, 'infinity', NULL, NULL)")
        .await;
    p.run("UPDATE page SET \"quoted \"\"é\" = 'y' WHERE a = 1").await;
    p.run("UPDATE page SET at = at - interval '1.5 s' WHERE a = 1").await;
    p.run("UPDATE page SET at = '-infinity' WHERE a = 2").await;
    p.run(r#"INSERT INTO app.log VALUES ('{"a":  1.10}'), (NULL)"#).await;
    p.produce().await;
    load::mixed(p, 2000, 7).await;
    p.produce().await;
    p.run(
        "ALTER TABLE every ADD COLUMN late text DEFAULT 'd'; INSERT INTO every (id, late) VALUES (10, NULL), (11, 'l')",
    )
    .await;
    p.run(
        "ALTER TABLE every DROP COLUMN i2; BEGIN; INSERT INTO every (id) VALUES (12); TRUNCATE page, app.log; COMMIT",
    )
    .await;
    p.produce().await;
    assert!(archive::batches(&p.archive()).len() > 3);
    vec!["every", "page", "app.log", "content", "engagement_events"]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_to_stdout_has_the_bytes_of_the_kafka_values_in_order() {
    let mut p = Pipeline::bare(Servers::shared(), "rp_stdout").await;
    let tables = history(&mut p).await;
    let values = values(&p, &tables).await;
    assert!(values.len() > 3000);
    let first = lsn(&values[0]);
    assert_same("stdout", &lines(&replayed(&p, &["--from", &first, "--sink", "stdout"]).await), &values);

    // Commit LSNs, both inclusive; a transaction is never cut.
    let (from, to) = (lsn(&values[500]), lsn(&values[1500]));
    let within = |value: &&String| (commit(&values[500])..=commit(&values[1500])).contains(&commit(value));
    let some: Vec<_> = values.iter().filter(within).cloned().collect();
    assert!(some.len() > 900 && some.len() < values.len());
    let out = replayed(&p, &["--from", &from, "--to", &to, "--sink", "stdout"]).await;
    assert_same("a part", &lines(&out), &some);
    let one = replayed(&p, &["--from", &first, "--to", &first, "--sink", "stdout"]).await;
    assert_same("one commit", &lines(&one), &values[..5]);

    let report = replayed(&p, &["--from", &from, "--to", &to, "--sink", "stdout", "--dry-run"]).await;
    let bytes: usize = some.iter().map(String::len).sum();
    assert!(report.starts_with(&format!("range {from} – {to}: {} rows, {bytes} bytes, in ", some.len())), "{report}");
    let events: Vec<_> = some.iter().filter(|v| v.contains("\"_table\":\"engagement_events\"")).collect();
    let line = format!(
        "{:>12} rows {:>14} bytes  engagement_events\n",
        events.len(),
        events.iter().map(|v| v.len()).sum::<usize>()
    );
    assert!(report.contains(&line) && report.ends_with("nothing was sent\n"), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_stream_is_replayed_with_the_same_bytes() {
    let mut p = Pipeline::bare(Servers::shared(), "rp_text").await;
    p.set("FALAJ_ARCHIVE__SEAL_BYTES", "64KiB");
    p.run(
        "CREATE TABLE every (id bigint PRIMARY KEY, f4 real, f8 double precision, n numeric, amount numeric(12,3), d date, t timestamp, tz timestamptz, a inet);
         CREATE PUBLICATION falaj FOR TABLE every",
    )
    .await;
    p.init().await;
    p.run(
        "SELECT setseed(0.4);
         INSERT INTO every SELECT g, (random() * 10 ^ (g % 20 - 20))::real, random() * 10 ^ (g % 300 - 300), (random() * 1000)::numeric, (random() * 1000)::numeric(12,3),
             '2000-01-01'::date + g, '1999-01-01'::timestamp + g * interval '1 hour 1.000001 s', now() - g * interval '1 day', '10.0.0.0'::inet + g
         FROM generate_series(1, 3000) AS g",
    )
    .await;
    p.produce().await;
    let values = p.values("every").await;
    assert_eq!(values.len(), 3000);
    let out = replayed(&p, &["--from", &lsn(&values[0]), "--sink", "stdout"]).await;
    assert_same("stdout", &lines(&out), &values);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_that_is_not_kept_is_refused_with_what_is_kept() {
    let p = Pipeline::new("rp_range").await;
    let origin = p.confirmed().await;
    let nothing = replay(&p, &["--from", &origin.to_string(), "--sink", "stdout"]).await;
    assert_eq!(nothing.code, Some(78), "{nothing:?}");
    assert!(nothing.log.contains("holds nothing") && nothing.log.contains(&format!("from {origin} on")), "{nothing:?}");
    p.run("INSERT INTO engagement_events (event_ts) SELECT now() FROM generate_series(1, 5)").await;
    let end = p.produce().await;
    let kept = format!("holds commits from {origin} to {end}");
    for (from, to) in
        [(Lsn(8), None), (Lsn(origin.0 - 8), None), (Lsn(end.0 + 8), None), (origin, Some(Lsn(end.0 + 8)))]
    {
        let (from, to) = (from.to_string(), to.map(|to: Lsn| to.to_string()));
        let mut flags = vec!["--from", &from, "--sink", "stdout"];
        flags.extend(to.iter().flat_map(|to| ["--to", to.as_str()]));
        let ended = replay(&p, &flags).await;
        assert_eq!((ended.code, ended.out.as_str()), (Some(78), ""), "{ended:?}");
        assert!(ended.log.contains("replay_range") && ended.log.contains(&kept), "{}", ended.log);
    }
    // From the very beginning, and at the very end, there is something to say.
    let all = replay(&p, &["--from", &origin.to_string(), "--to", &end.to_string(), "--sink", "stdout"]).await;
    assert_eq!((all.code, all.out.lines().count()), (Some(0), 5), "{all:?}");
    assert!(all.log.contains("--to is where the archive ends"), "{}", all.log);
    assert_eq!(replayed(&p, &["--from", &end.to_string(), "--sink", "stdout"]).await, "");
    for flags in [
        &["--from", "0/8", "--sink", "kafka"][..],
        &["--from", "0/8", "--to", "0/1", "--sink", "stdout"],
        &["--from", "0/8", "--sink", "redis", "--topic", "x"],
        &["--from", "x", "--sink", "stdout"],
        &["--from", "0/8"],
    ] {
        assert_eq!(replay(&p, flags).await.code, Some(2), "{flags:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_was_taken_away_is_not_passed_over() {
    let p = Pipeline::new("rp_gap").await;
    for _ in 0..4 {
        p.run("INSERT INTO engagement_events (event_ts) SELECT now() FROM generate_series(1, 10)").await;
        p.produce().await;
    }
    let (values, batches) = (p.values("engagement_events").await, archive::batches(&p.archive()));
    assert_eq!(batches.len(), 4);
    let (first, last) = (lsn(&values[0]), lsn(&values[39]));
    std::fs::remove_dir_all(p.archive().join(&batches[2])).unwrap();
    let ended = replay(&p, &["--from", &first, "--sink", "stdout"]).await;
    assert_eq!((ended.code, ended.out.as_str()), (Some(78), ""), "{ended:?}");
    assert!(ended.log.contains("archive_gap") && ended.log.contains(&format!("--from {last}")), "{}", ended.log);
    let rest = replayed(&p, &["--from", &last, "--sink", "stdout"]).await;
    assert_same("behind the gap", &lines(&rest), &values[30..]);
    // Without the oldest ones the archive begins later.
    std::fs::remove_dir_all(p.archive().join(&batches[0])).unwrap();
    let ended = replay(&p, &["--from", &first, "--sink", "stdout"]).await;
    assert!(ended.code == Some(78) && ended.log.contains("replay_range"), "{ended:?}");
    let second = lsn(&values[10]);
    let part = replayed(&p, &["--from", &second, "--to", &second, "--sink", "stdout"]).await;
    assert_same("the one before the gap", &lines(&part), &values[10..20]);
}
