//! Backlogs: a slot, then rows in transactions of one size behind it.

use std::process::Command;

use anyhow::{Context, Result};
use falaj::lsn::Lsn;

use crate::plan::Workload;
use crate::process;
use crate::reader::falaj;
use crate::shape::Shape;
use crate::stack::Stack;

/// A backlog that is in the WAL.
pub struct Backlog {
    /// What it is.
    pub workload: Workload,
    /// A slot at its start, which nobody reads: each run reads a copy.
    pub slot: String,
    /// Where that slot stands.
    pub start: Lsn,
    /// End of the rows.
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
const CONTENTS: u32 = 20_000;

/// Tables, publication and contents.
pub async fn prepare(stack: &Stack) -> Result<()> {
    stack.execute(include_str!("../../sql/01_tables.sql")).await?;
    stack.execute(include_str!("../../sql/02_publication.sql")).await?;
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
    stack.execute(&contents).await
}

/// Makes the slot and writes the rows behind it.
pub async fn load(stack: &Stack, workload: Workload) -> Result<Backlog> {
    let slot = format!("bench_{}", workload.name.replace(|c: char| !c.is_ascii_alphanumeric(), "_").to_lowercase());
    if workload.shape == Shape::FullUpdates {
        rows_to_update(stack, workload.rows).await?;
    }
    stack.execute(&workload.shape.before()).await?;
    let mut init = falaj(stack, &slot, &slot, "archive");
    init.args(["init", "--yes"]);
    tokio::task::block_in_place(|| process::run(init, stack.servers)).context("making the slot")?;
    write(stack, workload.shape, workload.rows, workload.per_transaction).await?;
    // A transaction with a durable commit takes everything before it to the disk.
    stack.ask("SELECT pg_logical_emit_message(true, 'falaj bench', 'loaded')::text").await?;
    stack.execute("CHECKPOINT").await?;
    let end = stack.lsn("SELECT pg_current_wal_flush_lsn()::text").await?;
    let start = format!("SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = '{slot}'");
    let start = stack.lsn(&start).await?;
    let mut backlog = Backlog { workload, slot, start, end, row_bytes: RowBytes { text: 0.0, binary: 0.0 } };
    let text = wire_bytes(stack, &backlog, false).await?;
    backlog.row_bytes = RowBytes { text, binary: wire_bytes(stack, &backlog, true).await? };
    Ok(backlog)
}

/// Drops the slot, and undoes what the backlog's shape asked for.
pub async fn unload(stack: &Stack, backlog: &Backlog) -> Result<()> {
    stack.drop_slot(&backlog.slot).await?;
    stack.execute(backlog.workload.shape.after()).await
}

async fn write(stack: &Stack, shape: Shape, rows: u64, per_transaction: u64) -> Result<()> {
    stack.execute(&shape.procedure(CONTENTS)).await?;
    // Without the triggers of the foreign key: every content is there.
    stack.execute("SET synchronous_commit = off; SET session_replication_role = replica").await?;
    stack.execute(&format!("CALL bench_load({rows}, {})", per_transaction.min(rows))).await?;
    stack.execute("SET synchronous_commit = on; SET session_replication_role = origin").await
}

/// The workloads before have left more than enough, unless they are left out.
async fn rows_to_update(stack: &Stack, wanted: u64) -> Result<()> {
    let there: u64 = stack.ask("SELECT count(*)::text FROM engagement_events").await?.parse()?;
    if there < wanted {
        write(stack, Shape::Inserts, wanted - there, 100_000).await?;
    }
    Ok(())
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
