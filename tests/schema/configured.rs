//! A column that the configuration names changes or goes.

use crate::produce::shown;
use crate::rig::Pipeline;
use crate::rig::process::Ended;

const CONTENT: &str = "00000000-0000-0000-0000-00000000000a";
const NAMES: [&str; 6] = ["id", "title", "headline", "length_seconds", "engagement_seconds", "engagement_pct"];

/// The built-in table with other columns.
fn table(key: &str, columns: &str) -> String {
    format!(
        "[[table]]\nname = \"engagement_events\"\nkey = \"{key}\"\n\
         [table.lookup]\ntable = \"content\"\non = \"{key}\"\ncolumns = [{columns}]\n\
         [[table.derive]]\nname = \"engagement_seconds\"\ndivide = [\"duration_ms\", 1000]\nscale = 3\n\
         [[table.derive]]\nname = \"engagement_pct\"\ndivide = [\"engagement_seconds\", \"length_seconds\"]\nscale = 2\n"
    )
}

fn event(column: &str, ms: u32) -> String {
    format!("INSERT INTO engagement_events ({column}, event_ts, duration_ms) VALUES ('{CONTENT}', now(), {ms})")
}

async fn with_content(name: &str) -> Pipeline {
    let p = Pipeline::new(name).await;
    p.run(&format!("INSERT INTO content VALUES ('{CONTENT}', 's', 'one', 'podcast', 100, now())")).await;
    p
}

async fn is_refused(p: &Pipeline, words: &[&str]) -> Ended {
    let ended = p.start(&["produce"]).end().await;
    for word in [words, &["found:", "needed:", "fix:"]].concat() {
        assert!(ended.code == Some(78) && ended.log.contains(word), "{word}: {}", ended.log);
    }
    ended
}

/// The same, and `check` says it in the same words.
async fn is_refused_and_checked(p: &Pipeline, words: &[&str]) {
    let ended = is_refused(p, words).await;
    let checked = p.start(&["check", "--json"]).end().await;
    let findings: Vec<serde_json::Value> = serde_json::from_str(&checked.out).unwrap();
    let same = |f: &serde_json::Value| {
        let parts = ["check", "found", "needed", "fix"];
        f["ok"] == false && parts.iter().all(|part| ended.log.contains(f[*part].as_str().unwrap()))
    };
    assert!(checked.code == Some(78) && findings.iter().any(same), "{}: {}", ended.log, checked.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_column_that_has_gone_stops_the_stream_and_a_mended_configuration_goes_on() {
    let mut p = with_content("keygone").await;
    let (old, new) = (event("content_id", 1000), event("cid", 2000));
    p.run(&old).await;
    p.run(&format!(
        "BEGIN; {old}; ALTER TABLE engagement_events RENAME content_id TO cid; {new}; UPDATE content SET title = 'two'; {new}; COMMIT"
    ))
    .await;
    is_refused_and_checked(&p, &["table_columns", "engagement_events", "content_id", "[[table]]"]).await;
    let before = [
        r#"id=1 title="one" headline=- length_seconds=100 engagement_seconds=1.000 engagement_pct=0.01"#,
        r#"id=2 title="one" headline=- length_seconds=100 engagement_seconds=1.000 engagement_pct=0.01"#,
    ];
    assert_eq!(shown(&p.values("engagement_events").await, &NAMES), before);
    assert_eq!(shown(&p.rows("engagement_events"), &NAMES), before);
    p.configure(&table("cid", r#""title", "content_type", "length_seconds""#));
    p.produce().await;
    let after = [
        r#"id=3 title="one" headline=- length_seconds=100 engagement_seconds=2.000 engagement_pct=0.02"#,
        r#"id=4 title="two" headline=- length_seconds=100 engagement_seconds=2.000 engagement_pct=0.02"#,
    ];
    assert_eq!(shown(&p.values("engagement_events").await, &NAMES), [before, after].concat());
    assert_eq!(shown(&p.rows("engagement_events"), &NAMES), [before, after].concat());
    let keys: Vec<_> = p.records("engagement_events").await.into_iter().map(|r| r.key).collect();
    assert_eq!(keys, [(); 4].map(|()| Some(CONTENT.to_owned())));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lookup_column_that_has_gone_stops_the_stream_until_the_rows_are_adopted_anew() {
    let mut p = with_content("lookupgone").await;
    let event = event("content_id", 1000);
    p.run(&event).await;
    p.run(&format!(
        "BEGIN; UPDATE content SET title = 'two'; {event}; ALTER TABLE content RENAME title TO headline; \
         UPDATE content SET headline = 'three'; {event}; COMMIT"
    ))
    .await;
    p.run("UPDATE content SET headline = 'four'").await;
    is_refused_and_checked(&p, &["lookup_columns", "content", "\"title\"", "falaj init --adopt-slot"]).await;
    p.configure(&table("content_id", r#""headline", "content_type", "length_seconds""#));
    is_refused(&p, &["lookup_state", "\"headline\"", "falaj init --adopt-slot"]).await;
    p.start(&["init", "--yes", "--adopt-slot"]).ends_well().await;
    p.run("UPDATE content SET headline = 'five'").await;
    p.run(&event).await;
    p.produce().await;
    // The rows under the new schema are followed again, from the first of them on.
    let rest = "length_seconds=100 engagement_seconds=1.000 engagement_pct=0.01";
    let expected = [
        format!(r#"id=1 title="one" headline=- {rest}"#),
        format!(r#"id=2 title="two" headline=- {rest}"#),
        format!(r#"id=3 title=- headline="three" {rest}"#),
        format!(r#"id=4 title=- headline="five" {rest}"#),
    ];
    assert_eq!(shown(&p.values("engagement_events").await, &NAMES), expected);
    assert_eq!(shown(&p.rows("engagement_events"), &NAMES), expected);
}

/// Nothing of the old schema has been streamed yet when the rows are adopted under the new one.
#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_schema_from_before_the_adoption_are_passed_over() {
    let mut p = with_content("lookupold").await;
    let event = event("content_id", 1000);
    p.run(&event).await;
    p.run("UPDATE content SET title = 'two'").await;
    p.run("ALTER TABLE content RENAME title TO headline").await;
    p.run("UPDATE content SET headline = 'three'").await;
    p.run(&event).await;
    p.configure(&table("content_id", r#""headline", "content_type", "length_seconds""#));
    p.start(&["init", "--yes", "--adopt-slot"]).ends_well().await;
    p.run("UPDATE content SET headline = 'four'").await;
    p.run(&event).await;
    for _ in 0..2 {
        p.produce().await;
        let rest = "length_seconds=100 engagement_seconds=1.000 engagement_pct=0.01";
        let expected = ["three", "three", "four"]
            .iter()
            .zip(1..)
            .map(|(headline, id)| format!(r#"id={id} title=- headline="{headline}" {rest}"#));
        assert_eq!(shown(&p.values("engagement_events").await, &NAMES), expected.collect::<Vec<_>>());
    }
}

/// The adopted rows know the new key alone, and the stream brings the change of the key without the long value.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_was_changed_before_the_adoption_keeps_its_long_values() {
    let p = with_content("lookupkey").await;
    p.run("ALTER TABLE content ALTER title SET STORAGE EXTERNAL; ALTER TABLE engagement_events DROP CONSTRAINT engagement_events_content_id_fkey").await;
    p.run("UPDATE content SET title = repeat('x', 5000)").await;
    p.produce().await;
    p.run("UPDATE content SET id = gen_random_uuid()").await;
    p.start(&["init", "--yes", "--adopt-slot"]).ends_well().await;
    p.run("INSERT INTO engagement_events (content_id, event_type, event_ts) SELECT id, 'play', now() FROM content")
        .await;
    p.produce().await;
    let event: serde_json::Value = serde_json::from_str(&p.values("engagement_events").await[0]).unwrap();
    assert_eq!(event["title"], "x".repeat(5000));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lookup_column_of_a_wider_type_goes_on_and_one_that_was_rewritten_stops() {
    let p = with_content("lookuptype").await;
    let event = event("content_id", 1000);
    p.run(&event).await;
    p.run("BEGIN; ALTER TABLE content ALTER length_seconds TYPE bigint; UPDATE content SET slug = 't'; COMMIT").await;
    p.run(&event).await;
    p.run(&format!("BEGIN; {event}; ALTER TABLE content ALTER length_seconds TYPE numeric; {event}; UPDATE content SET length_seconds = 12.50; {event}; COMMIT")).await;
    p.produce().await;
    let line = |id: u32, length: &str, pct: &str| {
        format!(
            r#"id={id} title="one" headline=- length_seconds={length} engagement_seconds=1.000 engagement_pct={pct}"#
        )
    };
    let mut expected: Vec<_> = (1..=4).map(|id| line(id, "100", "0.01")).collect();
    expected.push(line(5, "12.50", "0.08"));
    assert_eq!(shown(&p.values("engagement_events").await, &NAMES), expected);
    // The same events, written by another process that begins in the middle, are the same.
    p.run("ALTER TABLE content ALTER length_seconds TYPE numeric(9,1)").await;
    p.run("UPDATE content SET slug = 'u'").await;
    p.run(&event).await;
    is_refused_and_checked(&p, &["lookup_columns", "\"length_seconds\"", "falaj init --adopt-slot"]).await;
    assert_eq!(p.values("engagement_events").await.len(), 5);
    p.start(&["init", "--yes", "--adopt-slot"]).ends_well().await;
    p.produce().await;
    expected.push(line(6, "12.5", "0.08"));
    assert_eq!(shown(&p.values("engagement_events").await, &NAMES), expected);
    assert_eq!(p.rows("engagement_events").len(), 6);
}

/// Name and type are the same, and for the rows that are not touched the stream brings no value of the new one.
#[tokio::test(flavor = "multi_thread")]
async fn another_column_under_a_lookup_columns_name_stops_the_stream_until_the_rows_are_adopted() {
    let p = with_content("lookupswap").await;
    let other = "00000000-0000-0000-0000-00000000000b";
    p.run(&format!("INSERT INTO content VALUES ('{other}', 't', 'other', 'podcast', 100, now())")).await;
    let event = event("content_id", 1000);
    p.run(&event).await;
    p.run("ALTER TABLE content ADD len2 int; UPDATE content SET len2 = length_seconds / 2").await;
    p.run(&event).await;
    p.run(
        "BEGIN; ALTER TABLE content RENAME length_seconds TO length_before; \
         ALTER TABLE content RENAME len2 TO length_seconds; COMMIT",
    )
    .await;
    p.run(&format!("UPDATE content SET slug = 'u' WHERE id = '{other}'")).await;
    p.run(&event).await;
    is_refused_and_checked(&p, &["lookup_columns", "another column as \"length_seconds\"", "falaj init --adopt-slot"])
        .await;
    p.start(&["init", "--yes", "--adopt-slot"]).ends_well().await;
    p.produce().await;
    let values = p.values("engagement_events").await;
    let lengths = ["id=1 length_seconds=100", "id=2 length_seconds=100", "id=3 length_seconds=50"];
    assert_eq!(shown(&values, &["id", "length_seconds"]), lengths);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lookup_table_that_is_made_anew_stops_the_stream_until_its_rows_are_adopted() {
    let p = with_content("lookupanew").await;
    let event = event("content_id", 1000);
    p.run(&event).await;
    p.run(
        "CREATE TABLE fresh (LIKE content INCLUDING ALL); INSERT INTO fresh SELECT id, slug, 'fresh', content_type, 50, publish_ts FROM content; \
         ALTER TABLE engagement_events DROP CONSTRAINT engagement_events_content_id_fkey; DROP TABLE content; \
         ALTER TABLE fresh RENAME TO content; ALTER PUBLICATION falaj ADD TABLE content",
    )
    .await;
    p.run("UPDATE content SET slug = 'z'").await;
    p.run(&event).await;
    is_refused_and_checked(&p, &["lookup_columns", "another table", "falaj init --adopt-slot"]).await;
    p.start(&["init", "--yes", "--adopt-slot"]).ends_well().await;
    p.produce().await;
    let expected = [
        r#"id=1 title="one" headline=- length_seconds=100 engagement_seconds=1.000 engagement_pct=0.01"#,
        r#"id=2 title="fresh" headline=- length_seconds=50 engagement_seconds=1.000 engagement_pct=0.02"#,
    ];
    assert_eq!(shown(&p.values("engagement_events").await, &NAMES), expected);
    assert_eq!(shown(&p.rows("engagement_events"), &NAMES), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lookup_table_that_is_renamed_stops_the_stream_until_it_is_named_and_adopted() {
    let mut p = with_content("lookupname").await;
    let event = event("content_id", 1000);
    p.run(&event).await;
    p.run("ALTER TABLE content RENAME TO works").await;
    p.run("UPDATE works SET title = 'two'").await;
    p.run(&event).await;
    is_refused(&p, &["kafka_topics", &p.config.topic("works")]).await;
    falaj::kafka::create_topic(&p.config.kafka, &p.config.topic("works"), 1, &[]).await.unwrap();
    is_refused_and_checked(
        &p,
        &["lookup_columns", "lookup table content is called works now", "falaj init --adopt-slot"],
    )
    .await;
    let columns = r#""title", "content_type", "length_seconds""#;
    p.configure(&table("content_id", columns).replace("\"content\"", "\"works\""));
    p.start(&["init", "--yes", "--adopt-slot"]).ends_well().await;
    p.produce().await;
    let rest = "headline=- length_seconds=100 engagement_seconds=1.000 engagement_pct=0.01";
    let expected = [format!(r#"id=1 title="one" {rest}"#), format!(r#"id=2 title="two" {rest}"#)];
    assert_eq!(shown(&p.values("engagement_events").await, &NAMES), expected);
    assert_eq!(shown(&p.rows("engagement_events"), &NAMES), expected);
}
