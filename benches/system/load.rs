//! Backlogs: a slot, then rows in transactions of one size behind it.

use std::process::Command;

use anyhow::{Context, Result};
use falaj::lsn::Lsn;

use crate::plan::Workload;
use crate::process;
use crate::reader::falaj;
use crate::stack::Stack;

/// A backlog that is in the WAL.
pub struct Backlog {
    /// What it is.
    pub workload: Workload,
    /// A slot at its start, which nobody reads: each run reads a copy.
    pub slot: String,
    /// Its end.
    pub end: Lsn,
    /// Bytes of a row's replication message, text and binary, transactions included.
    pub row_bytes: RowBytes,
}

/// Bytes a row on the wire.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct RowBytes {
    /// Text, which `pg_recvlogical` asks for.
    pub text: f64,
    /// Binary, which falaj asks for.
    pub binary: f64,
}

/// Contents that are there before the first slot is made.
const CONTENTS: u32 = 2000;

/// Tables, contents, and the procedure that writes the events.
pub async fn prepare(stack: &Stack) -> Result<()> {
    stack.execute(include_str!("../../sql/01_tables.sql")).await?;
    // Autovacuum would come in the middle of a run.
    stack
        .execute(
            "ALTER TABLE content SET (autovacuum_enabled = off); \
             ALTER TABLE engagement_events SET (autovacuum_enabled = off)",
        )
        .await?;
    let contents = format!(
        "INSERT INTO content \
         SELECT md5('content' || n)::uuid, 'content-' || n, 'الساقية: لماذا نتعلم العربية؟ ' || n, \
                (ARRAY['podcast', 'newsletter', 'video'])[n % 3 + 1], \
                CASE n % 3 WHEN 1 THEN NULL ELSE 300 + n * 7919 % 6900 END, timestamptz '2026-01-01' + n * interval '1 h' \
         FROM generate_series(0, {}) n",
        CONTENTS - 1
    );
    stack.execute(&contents).await?;
    stack.execute(&PROCEDURE.replace("CONTENTS", &CONTENTS.to_string())).await
}

/// The rows depend on their number alone. Popularity falls with the third power; one content in fifty and one duration in
/// four is NULL; the payload brings a row to about 255 bytes in text form.
const PROCEDURE: &str = r#"
CREATE PROCEDURE bench_load(total bigint, size bigint) LANGUAGE plpgsql AS $$
BEGIN
    FOR first IN 1..total BY size LOOP
        INSERT INTO engagement_events (content_id, user_id, event_type, event_ts, duration_ms, device, raw_payload)
        SELECT CASE WHEN n % 50 > 0 THEN md5('content' || floor(CONTENTS * ((n * 7919 % 10007) / 10007.0) ^ 3)::int)::uuid END,
               md5('user' || n % 20000)::uuid,
               (ARRAY['play', 'play', 'pause', 'click', 'finish'])[n % 5 + 1],
               timestamptz '2026-01-01' + n * interval '1.234567 ms',
               CASE WHEN n % 4 > 0 THEN n * 7919 % 600000 END,
               (ARRAY['ios', 'android', 'web-safari', U&'web\2011safari', 'web-chrome', 'desktop'])[n % 6 + 1],
               format('{"seq": %s, "app": {"version": "5.%s"}, "geo": {"city": "الرياض"}}', n, n % 40)::jsonb
        FROM generate_series(first, least(first + size - 1, total)) n;
        COMMIT;
    END LOOP;
END $$"#;

/// Makes the slot and writes the rows behind it.
pub async fn load(stack: &Stack, workload: Workload) -> Result<Backlog> {
    let slot = format!("bench_{}", workload.name.replace(|c: char| !c.is_ascii_alphanumeric(), "_"));
    let mut init = falaj(stack, &slot, &slot, "archive");
    init.args(["init", "--yes"]);
    tokio::task::block_in_place(|| process::run(init, stack.servers)).context("making the slot")?;
    // Without the triggers of the foreign key: every content is there.
    stack.execute("SET synchronous_commit = off; SET session_replication_role = replica").await?;
    let size = workload.per_transaction.min(workload.rows);
    stack.execute(&format!("CALL bench_load({}, {size})", workload.rows)).await?;
    stack.execute("SET synchronous_commit = on; SET session_replication_role = origin").await?;
    // A transaction with a durable commit takes everything before it to the disk.
    stack.ask("SELECT pg_logical_emit_message(true, 'falaj bench', 'loaded')::text").await?;
    stack.execute("CHECKPOINT").await?;
    let end = stack.ask("SELECT pg_current_wal_flush_lsn()::text").await?;
    let end = end.parse().map_err(anyhow::Error::msg)?;
    let mut backlog = Backlog { workload, slot, end, row_bytes: RowBytes { text: 0.0, binary: 0.0 } };
    let text = wire_bytes(stack, &backlog, false).await?;
    backlog.row_bytes = RowBytes { text, binary: wire_bytes(stack, &backlog, true).await? };
    Ok(backlog)
}

/// Reads the backlog into a file and looks at its size. It also brings the WAL into the page cache, for all readers alike.
async fn wire_bytes(stack: &Stack, backlog: &Backlog, binary: bool) -> Result<f64> {
    let copy = stack.copy_slot(&backlog.slot, "bench_size").await?;
    let file = stack.dir.join("frames");
    let mut command = recvlogical(stack, &copy, backlog.end);
    command.arg("-f").arg(&file).args(["-o", &format!("binary={binary}")]);
    tokio::task::block_in_place(|| process::run(command, stack.servers))?;
    let size = std::fs::metadata(&file)?.len();
    std::fs::remove_file(&file)?;
    stack.drop_slot(&copy).await?;
    Ok(size as f64 / backlog.workload.rows as f64)
}

/// `pg_recvlogical` up to `end`; where it writes to is still to be said.
pub fn recvlogical(stack: &Stack, slot: &str, end: Lsn) -> Command {
    let mut command = Command::new("pg_recvlogical");
    command.args(["-d", &stack.config.postgres.url, "-S", slot, "--start", "--no-loop", "-o", "proto_version=1"]);
    command.args(["-o", "publication_names=falaj", "--endpos", &end.to_string()]);
    command
}

impl Stack {
    /// A slot of its own for one run, at the place where `slot` stands.
    pub async fn copy_slot(&self, slot: &str, copy: &str) -> Result<String> {
        self.ask(&format!("SELECT slot_name::text FROM pg_copy_logical_replication_slot('{slot}', '{copy}')")).await
    }

    /// Drops a slot as soon as its reader has let it go.
    pub async fn drop_slot(&self, slot: &str) -> Result<()> {
        let held = format!("SELECT active::text FROM pg_replication_slots WHERE slot_name = '{slot}'");
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while self.ask(&held).await? == "true" && std::time::Instant::now() < deadline {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        self.execute(&format!("SELECT pg_drop_replication_slot('{slot}')")).await
    }
}
