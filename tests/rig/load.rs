//! Changes of every kind, as an application makes them.

use super::{Pipeline, connect};

/// Two long transactions that overlap each other and everything else, `generate` in between, then updates, deletes,
/// changed keys, roll-backs, and contents whose title changes from one event to the next.
pub async fn mixed(pipeline: &Pipeline, rows: u64, seed: u64) {
    let (first, second) = tokio::join!(long(pipeline, "first"), long(pipeline, "second"));
    first.piece(1).await;
    second.piece(1).await;
    let (rows, seed) = (rows.to_string(), seed.to_string());
    pipeline.start(&["generate", "--count", &rows, "--seed", &seed]).ends_well().await;
    first.piece(2).await;
    second.piece(2).await;
    changes(pipeline).await;
    second.commit().await;
    titles(pipeline).await;
    first.piece(3).await;
    first.commit().await;
}

/// What `generate` does not do.
pub async fn changes(pipeline: &Pipeline) {
    for sql in CHANGES {
        pipeline.run(sql).await;
    }
}

/// Contents whose title changes from one event to the next, a commit each: what an event must show depends on its place.
pub async fn titles(pipeline: &Pipeline) {
    pipeline.run(TITLES).await;
}

const CHANGES: [&str; 10] = [
    "UPDATE engagement_events SET duration_ms = coalesce(duration_ms, 0) + 1 WHERE id % 17 = 0",
    "UPDATE engagement_events SET content_id = NULL WHERE id % 97 = 0",
    "UPDATE engagement_events SET id = -id WHERE id % 101 = 0",
    "DELETE FROM engagement_events WHERE id % 23 = 0",
    "BEGIN; DELETE FROM engagement_events; ROLLBACK",
    "BEGIN; SAVEPOINT s; UPDATE content SET title = 'never seen'; ROLLBACK TO s; \
     INSERT INTO engagement_events (content_id, event_ts, duration_ms) SELECT id, now(), 900 FROM content LIMIT 50; COMMIT",
    "BEGIN; UPDATE content SET length_seconds = length_seconds + 1 WHERE length_seconds > 0; \
     UPDATE engagement_events SET device = 'web‑safari' WHERE id % 211 = 0; COMMIT",
    "UPDATE content SET title = title || ' / \"second\"\\edition', length_seconds = NULL WHERE content_type = 'video'",
    "INSERT INTO engagement_events (event_ts, duration_ms, raw_payload) \
     SELECT now(), -g, '{\"a\":[1.10, null], \"b\":\"\\u0041\"}' FROM generate_series(1, 20) AS g",
    "DELETE FROM content WHERE NOT EXISTS (SELECT FROM engagement_events WHERE content_id = content.id)",
];

/// Each commit changes a title and adds an event before and after the change.
const TITLES: &str = "DO $$
DECLARE which uuid;
BEGIN
    FOR i IN 1..200 LOOP
        SELECT id INTO which FROM content ORDER BY slug OFFSET i % 7 LIMIT 1;
        INSERT INTO engagement_events (content_id, event_ts, duration_ms) VALUES (which, now(), i);
        UPDATE content SET title = 'version ' || i, length_seconds = i % 5 WHERE id = which;
        INSERT INTO engagement_events (content_id, event_ts, duration_ms) VALUES (which, now(), i);
        COMMIT;
    END LOOP;
END $$";

/// A transaction that stays open while others commit.
struct Long {
    name: &'static str,
    client: tokio_postgres::Client,
}

async fn long(pipeline: &Pipeline, name: &'static str) -> Long {
    let client = connect(&pipeline.config.postgres.url).await;
    client.batch_execute("BEGIN").await.unwrap();
    Long { name, client }
}

impl Long {
    async fn piece(&self, number: u32) {
        let name = self.name;
        let sql = format!(
            "INSERT INTO content VALUES (md5('{name}{number}')::uuid, '{name}-{number}', 'long {name} {number}', 'podcast', 60, now());
             INSERT INTO engagement_events (content_id, event_ts, duration_ms)
                 SELECT id, now(), g FROM content, generate_series(1, 300) AS g WHERE slug LIKE '{name}-%';
             UPDATE content SET title = title || '+' WHERE slug LIKE '{name}-%';
             INSERT INTO engagement_events (content_id, event_ts, duration_ms)
                 SELECT id, now(), g FROM content, generate_series(1, 300) AS g WHERE slug LIKE '{name}-%'"
        );
        self.client.batch_execute(&sql).await.unwrap();
    }

    async fn commit(&self) {
        self.client.batch_execute("COMMIT").await.unwrap();
    }
}
