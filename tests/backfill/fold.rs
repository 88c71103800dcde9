//! The state of a table as its events give it, and a writer that never rests.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value};

use crate::rig::{Pipeline, connect};

/// Rows of `item` by id: `v` and `body`.
pub type State = BTreeMap<i64, (i64, Option<String>)>;

/// What the events are worth in the order of their ids, whatever order they came in.
pub fn fold(mut events: Vec<String>) -> State {
    events.sort_by_cached_key(|event| crate::rig::id(event).to_owned());
    let mut state = State::new();
    for event in events {
        let event: Map<String, Value> = serde_json::from_str(&event).unwrap();
        let id = event["id"].as_i64();
        match event["_op"].as_str().unwrap() {
            "d" => drop(state.remove(&id.unwrap())),
            "t" => state.clear(),
            _ => {
                let old = event.get("_old_key").map_or(id, |old| old["id"].as_i64()).unwrap();
                let before = state.remove(&old);
                let body = match event.get("body") {
                    Some(Value::Null) if is_unchanged(&event) => before.and_then(|row| row.1),
                    Some(body) => body.as_str().map(str::to_owned),
                    None => before.and_then(|row| row.1),
                };
                state.insert(id.unwrap(), (event["v"].as_i64().unwrap(), body));
            }
        }
    }
    state
}

fn is_unchanged(event: &Map<String, Value>) -> bool {
    event.get("_unchanged").is_some_and(|names| names.as_array().unwrap().iter().any(|name| name == "body"))
}

/// `item` as Postgres has it.
pub async fn source(p: &Pipeline) -> State {
    let rows = p.sql.query("SELECT id, v::bigint, body FROM item", &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect()
}

/// Inserts, updates, deletes and changes of keys on all of `item`, one transaction after the other, until it is stopped.
pub struct Writer {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<u64>,
}

impl Writer {
    /// Without `moves` it changes no key.
    pub async fn start(p: &Pipeline, rows: i64, seed: u64, moves: bool) -> Self {
        let client = connect(&p.config.postgres.url).await;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let task = tokio::spawn(async move {
            let (mut random, mut written) = (StdRng::seed_from_u64(seed), 0);
            while !stopped.load(Ordering::Relaxed) {
                let mut sql = String::new();
                for _ in 0..random.random_range(1..8) {
                    sql += &change(&mut random, rows, if moves { 6 } else { 5 });
                }
                let roll_back = random.random_range(0..10) == 0;
                let end = if roll_back { "ROLLBACK" } else { "COMMIT" };
                client.batch_execute(&format!("BEGIN; {sql} {end}")).await.unwrap();
                written += u64::from(!roll_back);
            }
            written
        });
        Self { stop, task }
    }

    /// Gives the number of its transactions.
    pub async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap()
    }
}

fn change(random: &mut StdRng, rows: i64, kinds: u32) -> String {
    let id = random.random_range(-rows..2 * rows);
    let other = random.random_range(-rows..2 * rows);
    match random.random_range(0..kinds) {
        0 => format!("INSERT INTO item VALUES ({id}, 0, repeat('n', 3000)) ON CONFLICT DO NOTHING;"),
        1 => format!("UPDATE item SET v = v + 1 WHERE id = {id};"),
        2 => format!("UPDATE item SET body = 'short {other}' WHERE id = {id};"),
        3 => format!("DELETE FROM item WHERE id BETWEEN {id} AND {id} + 2;"),
        4 => format!("UPDATE item SET v = v + 1 WHERE id BETWEEN {id} AND {id} + 20;"),
        _ => format!(
            "UPDATE item SET id = {other}, v = v + 1 WHERE id = {id} AND NOT EXISTS (SELECT FROM item WHERE id = {other});"
        ),
    }
}
