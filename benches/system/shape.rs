//! The shapes of backlogs: what one transaction writes, what has to be there before, and what is undone afterwards.

use serde::Serialize;

/// What the rows of a backlog are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Shape {
    /// New rows of `engagement_events`, about 250 bytes each in text form.
    Inserts,
    /// The same with 4 kB of payload, which Postgres keeps out of line.
    Wide,
    /// Updates of rows that are there, `REPLICA IDENTITY FULL`: each message has the old row and the new one.
    FullUpdates,
    /// New rows that fall into 20 tables of which falaj knows nothing but the primary key.
    Tables,
}

/// Number of tables of [`Shape::Tables`].
const TABLES: usize = 20;

/// The rows depend on their number alone. Popularity falls with the third power; one content in fifty and one duration in
/// four is NULL.
const INSERT: &str = r#"
    INSERT INTO TARGET (content_id, user_id, event_type, event_ts, duration_ms, device, raw_payload)
    SELECT CASE WHEN n % 50 > 0 THEN md5('content' || floor(CONTENTS * ((n * 7919 % 10007) / 10007.0) ^ 3)::int)::uuid END,
           md5('user' || n % 20000)::uuid,
           (ARRAY['play', 'play', 'pause', 'click', 'finish'])[(n % 5)::int + 1],
           timestamptz '2026-01-01' + n * interval '1.234567 ms',
           CASE WHEN n % 4 > 0 THEN n * 7919 % 600000 END,
           (ARRAY['ios', 'android', 'web-safari', U&'web\2011safari', 'web-chrome', 'desktop'])[(n % 6)::int + 1],
           PAYLOAD
    FROM generate_series(lowest, highest) n"#;

const PAYLOAD: &str =
    r#"format('{"seq": %s, "app": {"version": "5.%s"}, "geo": {"city": "الرياض"}}', n, n % 40)::jsonb"#;

/// Hexadecimal digits that never repeat: Postgres finds nothing to compress in them, zstd half.
const WIDE_PAYLOAD: &str = "jsonb_build_object('seq', n, 'note', (SELECT string_agg(md5(n || '/' || part), '') FROM generate_series(1, 125) part))";

/// The bench alone has written the table, so the numbers of its rows follow one another.
const UPDATE: &str = "
    UPDATE engagement_events SET duration_ms = coalesce(duration_ms, 0) + 1
    FROM (SELECT min(id) - 1 AS base FROM engagement_events) AS oldest
    WHERE id BETWEEN base + lowest AND base + highest";

/// Rows go to the partitions by a hash of their number: hardly one message is of the same table as the one before.
const MAKE_TABLES: &str = "
    CREATE TABLE engagement_events_all (LIKE engagement_events INCLUDING DEFAULTS, PRIMARY KEY (id)) PARTITION BY HASH (id)";

impl Shape {
    /// The tables that the rows are in.
    pub fn tables(self) -> Vec<String> {
        match self {
            Self::Tables => (1..=TABLES).map(|number| format!("engagement_events_{number:02}")).collect(),
            Self::Inserts | Self::Wide | Self::FullUpdates => vec!["engagement_events".to_owned()],
        }
    }

    /// `_op` of every event.
    pub fn op(self) -> &'static str {
        if self == Self::FullUpdates { "u" } else { "c" }
    }

    /// What has to be so before the slot is made.
    pub fn before(self) -> String {
        match self {
            Self::Inserts | Self::Wide => String::new(),
            Self::FullUpdates => "ALTER TABLE engagement_events REPLICA IDENTITY FULL".to_owned(),
            Self::Tables => {
                let parts = self.tables().into_iter().enumerate().map(|(remainder, table)| {
                    format!(
                        "CREATE TABLE {table} PARTITION OF engagement_events_all \
                         FOR VALUES WITH (MODULUS {TABLES}, REMAINDER {remainder}) WITH (autovacuum_enabled = off)"
                    )
                });
                let publish = format!("ALTER PUBLICATION falaj ADD TABLE {}", self.tables().join(", "));
                [MAKE_TABLES.to_owned()].into_iter().chain(parts).chain([publish]).collect::<Vec<_>>().join("; ")
            }
        }
    }

    /// What is undone when the last reader has read it.
    pub fn after(self) -> &'static str {
        match self {
            Self::Inserts | Self::Wide => "",
            Self::FullUpdates => "ALTER TABLE engagement_events REPLICA IDENTITY DEFAULT",
            Self::Tables => "DROP TABLE engagement_events_all",
        }
    }

    /// `bench_load(total, size)`, which writes `total` rows in transactions of `size`.
    pub fn procedure(self, contents: u32) -> String {
        let insert = |target, payload| {
            let insert = INSERT.replace("CONTENTS", &contents.to_string());
            insert.replace("TARGET", target).replace("PAYLOAD", payload)
        };
        let statement = match self {
            Self::Inserts => insert("engagement_events", PAYLOAD),
            Self::Wide => insert("engagement_events", WIDE_PAYLOAD),
            Self::FullUpdates => UPDATE.to_owned(),
            Self::Tables => insert("engagement_events_all", PAYLOAD),
        };
        format!(
            "CREATE OR REPLACE PROCEDURE bench_load(total bigint, size bigint) LANGUAGE plpgsql AS $$
             DECLARE highest bigint;
             BEGIN
                 FOR lowest IN 1..total BY size LOOP
                     highest := least(lowest + size - 1, total);
                     {statement};
                     COMMIT;
                 END LOOP;
             END $$"
        )
    }
}
