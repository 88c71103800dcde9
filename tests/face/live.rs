//! The verbs that follow: `tap` and `top`.

use std::time::Duration;

use falaj::config::Config;
use rdkafka::producer::Producer;

use super::troupe::{Process, Stage, until};
use crate::rig::kafka::{open_transaction, records};

/// Values of all events of the stage's topics, sorted.
async fn values(stage: &Stage) -> Vec<String> {
    let config = Config::load(None, stage.env()).unwrap();
    let mut values = Vec::new();
    for table in ["content", "engagement_events"] {
        values.extend(records(&config, &config.topic(table)).await.into_iter().map(|record| record.value));
    }
    values.sort();
    values
}

/// Two taps: one of all tables, one of content alone, to whose topic somebody else is writing in a transaction. Each shows what was
/// committed since, once, with its very bytes; and of that transaction nothing, nor what lies behind it while it is open.
#[tokio::test]
async fn tap_shows_each_event_from_now_on_with_the_bytes_of_its_value() {
    let stage = Stage::new("tap").await;
    let produce = stage.start(&["produce"]);
    stage.generate(40).await;
    until("the first rows are in Kafka", async || {
        values(&stage).await.iter().filter(|v| v.contains("\"_table\":\"engagement_events\"")).count() == 40
    })
    .await;
    let before = values(&stage).await;
    let config = Config::load(None, stage.env()).unwrap();
    let open = open_transaction(&config, &config.topic("content"), 3).await;
    let (all, content) = (stage.start(&["tap"]), stage.start(&["tap", "content", "content"]));
    for tap in [&all, &content] {
        until("it is at the end", async || tap.log().contains("from now on")).await;
    }
    stage.sql().await.execute("UPDATE public.content SET title = title || '!'", &[]).await.unwrap();
    stage.generate(60).await;
    let is_event = |line: &&str| line.contains("\"_table\":\"engagement_events\"");
    until("it has shown the events", async || all.out().lines().filter(is_event).count() == 60).await;
    assert_eq!((all.out().lines().filter(|l| !is_event(l)).count(), content.out()), (0, String::new()));
    tokio::task::spawn_blocking(move || open.abort_transaction(Duration::from_secs(30)).unwrap()).await.unwrap();
    let mut after = values(&stage).await;
    before.iter().for_each(|value| drop(after.remove(after.iter().position(|v| v == value).unwrap())));
    until("both have shown the rest", async || {
        all.out().lines().count() + content.out().lines().count() >= 2 * after.len() - 60
    })
    .await;
    for tap in [&all, &content] {
        assert_eq!(tap.ends("-TERM").await, 0, "{}", tap.log());
    }
    let shown = |tap: &Process| {
        let mut lines: Vec<String> = tap.out().lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(shown(&all), after);
    after.retain(|value| value.contains("\"_table\":\"content\""));
    assert!(!after.is_empty());
    assert_eq!(shown(&content), after);
    assert_eq!(produce.ends("-TERM").await, 0, "{}", produce.log());
}

#[tokio::test]
async fn tap_of_a_topic_that_is_not_there_is_refused() {
    let stage = Stage::new("no_tap").await;
    let tap = stage.start(&["tap", "content", "no_such_table"]);
    assert_eq!(tap.end().await, 78, "{}", tap.log());
    let missing = format!("missing: {}.no_such_table\n", stage.name);
    assert!(tap.log().contains(&missing), "{}", tap.log());
}

#[tokio::test]
async fn top_shows_status_rates_and_ranking_again_and_again() {
    let stage = Stage::new("top").await;
    let run = stage.start(&["run"]);
    let http = run.http().await;
    stage.generate(50).await;
    let applied = async || http.get("/metrics").await.1.contains("\nfalaj_consume_redis_events_total 50\n");
    until("the board has every event", applied).await;
    let top = stage.start(&["top"]);
    until("it has looked twice at everything", async || top.out().contains("\nrates      server ")).await;
    assert_eq!(top.ends("-TERM").await, 0, "{}", top.log());
    let out = top.out();
    let last = out.split("pipeline   ").find(|view| view.contains("\nrates ")).unwrap();
    let begins = |line: &str| last.lines().any(|l| l.starts_with(line));
    assert!(last.starts_with(&format!("{}, as of ", stage.name)), "{last}");
    for line in ["slot       ", "kafka      durable to ", "archive    ", "board      ", "rates      server ", "   1 "] {
        assert!(begins(line), "{line:?}: {last}");
    }
    let board = http.json("/api/v1/board").await;
    let best = board["top"][0]["events"].as_u64().unwrap();
    let first = last.lines().find(|l| l.starts_with("   1 ")).unwrap();
    assert_eq!(first.split_whitespace().nth(2).unwrap().parse::<u64>().unwrap(), best, "{last}");
}

/// Each server that is away is a line of the view; none of them ends it.
#[tokio::test]
async fn top_goes_on_while_every_server_is_away() {
    let away = [
        ("FALAJ_POSTGRES__URL", "postgres://nobody@127.0.0.1:1/none"),
        ("FALAJ_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1"),
        ("FALAJ_REDIS__URL", "redis://127.0.0.1:1/0"),
        ("FALAJ_ARCHIVE__DIR", "/nonexistent/archive"),
    ];
    let top = Process::start(&["top"], &away.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
    until("it has looked twice at everything", async || top.out().contains("\nrates      not known\n")).await;
    assert!(top.out().matches("\nranking not known: ").count() >= 2, "{}", top.out());
    assert_eq!(top.ends("-TERM").await, 0, "{}", top.log());
}
