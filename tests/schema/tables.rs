//! Tables come into the publication and go.

use super::{arrive, with_items};
use crate::produce::shown;
use crate::rig::{Pipeline, archive, id};

const EVENT: &str = "INSERT INTO engagement_events (event_ts, duration_ms) VALUES (now(), 1)";

#[tokio::test(flavor = "multi_thread")]
async fn a_new_table_without_a_topic_stops_the_stream_and_nothing_is_lost() {
    let p = Pipeline::new("newtable").await;
    let produce = p.start(&["produce"]);
    p.streams("").await;
    // It has looked at the publication by then.
    p.run(EVENT).await;
    arrive(&p, "engagement_events", 1).await;
    p.run("CREATE TABLE late (id int PRIMARY KEY, note text); ALTER PUBLICATION falaj ADD TABLE late").await;
    p.run(EVENT).await;
    p.run(&format!(
        "BEGIN; {EVENT}; INSERT INTO late VALUES (1, 'first'); {EVENT}; INSERT INTO late VALUES (2, 'second'); COMMIT"
    ))
    .await;
    let ended = produce.end().await;
    let topic = p.config.topic("late");
    for words in ["kafka_topics", &topic, "first rows of table late", "needed:", "falaj init", "nothing is lost"] {
        assert!(ended.code == Some(78) && ended.log.contains(words), "{words}: {}", ended.log);
    }
    // What stood before the new table's first row is in already, of its own transaction too.
    assert_eq!((p.values("engagement_events").await.len(), p.rows("engagement_events").len()), (3, 3));
    let again = p.start(&["produce"]).end().await;
    assert!(again.code == Some(78) && again.log.contains(&topic), "{}", again.log);
    p.init().await;
    p.run("INSERT INTO late VALUES (3, 'third')").await;
    p.produce().await;
    let names = ["_op", "id", "note"];
    let late = [r#"_op="c" id=1 note="first""#, r#"_op="c" id=2 note="second""#, r#"_op="c" id=3 note="third""#];
    assert_eq!(shown(&p.values("late").await, &names), late);
    assert_eq!(shown(&p.rows("late"), &names), late);
    let events = p.values("engagement_events").await;
    let ordinals: Vec<_> = events.iter().map(|e| &id(e)[17..]).collect();
    assert_eq!(ordinals, ["0000000000", "0000000000", "0000000000", "0000000002"]);
    assert_eq!(p.rows("engagement_events").len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_table_whose_topic_is_there_before_its_first_row_flows_on() {
    let p = Pipeline::new("flowon").await;
    let produce = p.start(&["produce"]);
    p.streams("").await;
    p.run(EVENT).await;
    arrive(&p, "engagement_events", 1).await;
    p.run("CREATE TABLE late (id int PRIMARY KEY); ALTER PUBLICATION falaj ADD TABLE late").await;
    p.init().await;
    p.run("INSERT INTO late SELECT g FROM generate_series(1, 10) AS g").await;
    arrive(&p, "late", 10).await;
    p.run("ALTER PUBLICATION falaj DROP TABLE late; INSERT INTO late VALUES (11)").await;
    p.run("ALTER PUBLICATION falaj ADD TABLE late; INSERT INTO late VALUES (12)").await;
    p.run("DROP TABLE late").await;
    p.run(EVENT).await;
    arrive(&p, "engagement_events", 2).await;
    produce.drains().await;
    let ids: Vec<String> = (1..=10).chain([12]).map(|n| format!("id={n}")).collect();
    assert_eq!(shown(&p.values("late").await, &["id"]), ids);
    assert_eq!(shown(&p.rows("late"), &["id"]), ids);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_came_and_went_while_produce_was_down() {
    let p = Pipeline::new("gone").await;
    p.run("CREATE TABLE brief (id int PRIMARY KEY, n numeric); ALTER PUBLICATION falaj ADD TABLE brief").await;
    p.run("INSERT INTO brief VALUES (1, 1.10), (2, NULL)").await;
    p.run("ALTER TABLE brief DROP n; DELETE FROM brief WHERE id = 1").await;
    p.run("DROP TABLE brief").await;
    p.run(EVENT).await;
    let topic = p.config.topic("brief");
    let ended = p.start(&["produce"]).end().await;
    let told = format!("--create --topic {topic} --partitions 3");
    assert!(ended.code == Some(78) && ended.log.contains(&told), "{}", ended.log);
    falaj::kafka::create_topic(&p.config.kafka, &topic, 3, &[]).await.unwrap();
    p.produce().await;
    let brief = [r#"_op="c" id=1 n=1.10"#, r#"_op="c" id=2 n=null"#, r#"_op="d" id=1 n=-"#];
    assert_eq!(shown(&p.values("brief").await, &["_op", "id", "n"]), brief);
    assert_eq!((p.rows("brief").len(), p.values("engagement_events").await.len()), (3, 1));
}

/// What an open transaction writes before the table is published is not streamed, what it writes after that is.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_published_while_a_transaction_writes_to_it() {
    let p = with_items("midway").await;
    p.run("CREATE TABLE late (id int PRIMARY KEY)").await;
    let other = crate::rig::connect(&p.config.postgres.url).await;
    other.batch_execute("BEGIN; INSERT INTO late VALUES (1); INSERT INTO item VALUES (1, 'a', 1)").await.unwrap();
    p.run("ALTER PUBLICATION falaj ADD TABLE late").await;
    p.init().await;
    other.batch_execute("INSERT INTO late VALUES (2); INSERT INTO item VALUES (2, 'b', 2); COMMIT").await.unwrap();
    p.produce().await;
    assert_eq!(shown(&p.values("late").await, &["_op", "id"]), [r#"_op="c" id=2"#]);
    assert_eq!(shown(&p.rows("late"), &["_op", "id"]), [r#"_op="c" id=2"#]);
    assert_eq!(shown(&p.values("item").await, &["id"]), ["id=1", "id=2"]);
}

/// Dropped and made anew, and two tables that change their names in one transaction.
#[tokio::test(flavor = "multi_thread")]
async fn a_name_stands_for_the_table_that_has_it_at_that_moment() {
    let p = with_items("names").await;
    let other = "CREATE TABLE other (x text PRIMARY KEY); ALTER PUBLICATION falaj ADD TABLE other";
    p.run(other).await;
    p.init().await;
    p.run("INSERT INTO item VALUES (1, 'a', 1); INSERT INTO other VALUES ('a')").await;
    p.run(
        "BEGIN; INSERT INTO item VALUES (2, 'b', 2); ALTER TABLE item RENAME TO aside; ALTER TABLE other RENAME TO item; \
         ALTER TABLE aside RENAME TO other; INSERT INTO item VALUES ('b'); INSERT INTO other VALUES (3, 'c', 3); COMMIT",
    )
    .await;
    p.run("BEGIN; INSERT INTO item VALUES ('c'); DROP TABLE item; CREATE TABLE item (id int PRIMARY KEY, y bool); ALTER PUBLICATION falaj ADD TABLE item; INSERT INTO item VALUES (7, true); COMMIT").await;
    p.run("INSERT INTO other VALUES (4, 'd', 4)").await;
    p.produce().await;
    let names = ["id", "a", "n", "x", "y"];
    let item = [
        r#"id=1 a="a" n=1 x=- y=-"#,
        r#"id=2 a="b" n=2 x=- y=-"#,
        r#"id=- a=- n=- x="b" y=-"#,
        r#"id=- a=- n=- x="c" y=-"#,
        "id=7 a=- n=- x=- y=true",
    ];
    let other = [r#"id=- a=- n=- x="a" y=-"#, r#"id=3 a="c" n=3 x=- y=-"#, r#"id=4 a="d" n=4 x=- y=-"#];
    assert_eq!(shown(&p.values("item").await, &names), item);
    assert_eq!(shown(&p.values("other").await, &names), other);
    assert_eq!(shown(&p.rows("item"), &names), item);
    assert_eq!(shown(&p.rows("other"), &names), other);
    assert_eq!(archive::batches(&p.archive()).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_is_dropped_while_streaming_stops_the_stream() {
    let p = Pipeline::new("unpublished").await;
    // On Postgres 18 only a warning tells, which a database may keep back.
    p.run(&format!("ALTER DATABASE {} SET client_min_messages = error", p.name)).await;
    let produce = p.start(&["produce"]);
    p.streams("").await;
    p.run(EVENT).await;
    arrive(&p, "engagement_events", 1).await;
    p.run("DROP PUBLICATION falaj").await;
    p.run(EVENT).await;
    let ended = produce.end().await;
    for words in ["found:", "publication \"falaj\"", "needed:", "fix:"] {
        assert!(ended.code == Some(78) && ended.log.contains(words), "{words}: {}", ended.log);
    }
    assert_eq!((p.values("engagement_events").await.len(), p.rows("engagement_events").len()), (1, 1));
}
