//! Backlogs of any length beside any number of contents: what the board and growth are measured on.

use anyhow::{Context, Result};
use falaj::lsn::Lsn;

use crate::process;
use crate::reader::falaj;
use crate::stack::Stack;

/// Rows in a transaction.
pub const SIZE: u64 = 1000;

/// Both tables empty, then this many contents, and the procedure that writes events about them.
pub async fn reset(stack: &Stack, contents: u64) -> Result<()> {
    let sql = format!(
        "TRUNCATE engagement_events, content; \
         INSERT INTO content \
         SELECT md5('content' || n)::uuid, 'content-' || n, 'الساقية: لماذا نتعلم العربية؟ ' || n, \
                (ARRAY['podcast', 'newsletter', 'video'])[n % 3 + 1], \
                CASE n % 3 WHEN 1 THEN NULL ELSE 300 + n::bigint * 7919 % 6900 END, timestamptz '2026-01-01' + n * interval '1 min' \
         FROM generate_series(0, {contents} - 1) n; \
         {PROCEDURE}"
    );
    stack.execute(&sql).await?;
    stack.execute("VACUUM ANALYZE content").await
}

/// The rows of `load.rs`, except that they happened within the last minute, so that the board counts them, and that the
/// contents are drawn evenly, so that every one of them is looked up.
const PROCEDURE: &str = r#"
CREATE OR REPLACE PROCEDURE bench_rows(first bigint, last bigint, size bigint, contents bigint) LANGUAGE plpgsql AS $$
BEGIN
    FOR lowest IN first..last BY size LOOP
        INSERT INTO engagement_events (content_id, user_id, event_type, event_ts, duration_ms, device, raw_payload)
        SELECT CASE WHEN n % 50 > 0 THEN md5('content' || n * 7919 % contents)::uuid END,
               md5('user' || n % 20000)::uuid,
               (ARRAY['play', 'play', 'pause', 'click', 'finish'])[(n % 5)::int + 1],
               clock_timestamp() - n % 60 * interval '1 s',
               CASE WHEN n % 4 > 0 THEN n * 7919 % 600000 END,
               (ARRAY['ios', 'android', 'web-safari', U&'web\2011safari', 'web-chrome', 'desktop'])[(n % 6)::int + 1],
               format('{"seq": %s, "app": {"version": "5.%s"}, "geo": {"city": "الرياض"}}', n, n % 40)::jsonb
        FROM generate_series(lowest, least(lowest + size - 1, last)) n;
        COMMIT;
    END LOOP;
END $$"#;

/// A slot, for which a pipeline of the same name is made; gives where it stands.
pub async fn slot(stack: &Stack, name: &str) -> Result<Lsn> {
    let mut init = falaj(stack, name, name, "archive");
    init.args(["init", "--yes"]);
    tokio::task::block_in_place(|| process::run(init, stack.servers)).context("making the slot")?;
    stack.lsn(&format!("SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = '{name}'")).await
}

/// Writes the rows with these numbers; gives the WAL's end behind them.
pub async fn write(stack: &Stack, first: u64, last: u64, contents: u64) -> Result<Lsn> {
    // Without the triggers of the foreign key: every content is there.
    stack.execute("SET synchronous_commit = off; SET session_replication_role = replica").await?;
    stack.execute(&format!("CALL bench_rows({first}, {last}, {SIZE}, {contents})")).await?;
    stack.execute("SET synchronous_commit = on; SET session_replication_role = origin").await?;
    // A transaction with a durable commit takes everything before it to the disk.
    stack.ask("SELECT pg_logical_emit_message(true, 'falaj bench', 'loaded')::text").await?;
    stack.execute("CHECKPOINT").await?;
    stack.lsn("SELECT pg_current_wal_flush_lsn()::text").await
}
