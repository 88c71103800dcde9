//! The simulator by its outside names.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::external::stage::{Process, until};

/// A port that was free a moment ago.
fn free_address() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

async fn start(flags: &[&str]) -> (Process, String) {
    let address = free_address();
    let args = [&["mock-external", "--listen", &address], flags].concat();
    let process = Process::start(&args, &BTreeMap::new());
    let url = format!("http://{address}");
    until("the simulator answers", async || reqwest::get(format!("{url}/received")).await.is_ok()).await;
    (process, url)
}

async fn post(url: &str, key: Option<&str>, body: &'static str) -> Option<u16> {
    let mut request = reqwest::Client::new().post(format!("{url}/events")).body(body);
    if let Some(key) = key {
        request = request.header("Idempotency-Key", key);
    }
    request.send().await.ok().map(|answer| answer.status().as_u16())
}

async fn received(url: &str) -> Value {
    reqwest::get(format!("{url}/received")).await.unwrap().json().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn repeats_are_answered_as_the_first_time_and_conflicts_refused() {
    let (process, url) = start(&[]).await;
    assert_eq!(received(&url).await, json!({"unique": 0, "requests": 0, "duplicates": 0, "conflicts": 0}));
    let sent = [(Some("a"), "1"), (Some("a"), "1"), (Some("a"), "2"), (Some("b"), "1"), (None, "1")];
    let mut statuses = Vec::new();
    for (key, body) in sent {
        statuses.push(post(&url, key, body).await);
    }
    assert_eq!(statuses, [200, 200, 422, 200, 400].map(Some));
    assert_eq!(received(&url).await, json!({"unique": 2, "requests": 5, "duplicates": 1, "conflicts": 1}));
    assert_eq!(reqwest::get(format!("{url}/ids")).await.unwrap().text().await.unwrap(), "a\nb");
    process.terminate();
    process.ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fail_one_makes_every_request_a_fault() {
    let (_process, url) = start(&["--fail", "1"]).await;
    let mut kinds = std::collections::BTreeSet::new();
    for _ in 0..60 {
        kinds.insert(post(&url, Some("a"), "1").await);
    }
    assert_eq!(kinds, [None, Some(200), Some(408), Some(429), Some(500), Some(503)].into());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_address_and_a_bad_rate_are_said() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, log) = Process::start(&["mock-external", "--listen", &address], &BTreeMap::new()).end().await;
    assert_eq!((code, log.contains(&address)), (Some(78), true), "{log}");
    let (code, log) = Process::start(&["mock-external", "--fail", "1.5"], &BTreeMap::new()).end().await;
    assert_eq!((code, log.contains("0.0 to 1.0")), (Some(2), true), "{log}");
}
