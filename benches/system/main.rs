//! The whole system against real servers: how fast each way out of Postgres is beside `pg_recvlogical -f /dev/null`, what it
//! costs, and what is in the sinks afterwards. `make bench` starts the servers and runs it; docs/benchmarks.md has the method.

mod bars;
mod live;
mod load;
mod parts;
mod peer;
mod plan;
mod process;
mod reader;
mod report;
mod shape;
mod sinks;
mod speed;
mod stack;
mod table;
mod warm;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;

use parts::Parts;
use report::Figures;
use speed::Speed;
use stack::Stack;

/// Exit code: all was measured, and a bar is missed.
const MISSED: u8 = 1;
/// Exit code: something could not be measured. The servers' logs are worth a look then.
const NOT_MEASURED: u8 = 2;

#[tokio::main]
async fn main() -> ExitCode {
    match bench().await {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(MISSED),
        Err(error) => {
            eprintln!("bench     {error:#}");
            ExitCode::from(NOT_MEASURED)
        }
    }
}

/// Measures, prints, and gives the number of bars that were missed.
async fn bench() -> Result<usize> {
    let quick = std::env::var("QUICK").is_ok_and(|v| !matches!(v.as_str(), "" | "0"));
    let figures = measure(quick, &Parts::from_env()?).await?;
    let raw = keep(&figures)?;
    println!("\n{}", figures.markdown());
    println!("Raw figures: {}\n", raw.display());
    let verdicts = figures.verdicts();
    for verdict in &verdicts {
        println!("{}  {}", if verdict.held { "held  " } else { "MISSED" }, verdict.text);
    }
    let missed = verdicts.iter().filter(|v| !v.held).count();
    println!("{} bars held, {missed} missed", verdicts.len() - missed);
    Ok(missed)
}

async fn measure(quick: bool, parts: &Parts) -> Result<Figures> {
    let workloads = plan::plan(quick, parts);
    let stack = Stack::open().await?;
    let machine = stack.machine().await?;
    if machine.load > 1.0 {
        eprintln!(
            "bench     the load average is {}: others work on this machine, the figures will wander",
            machine.load
        );
    }
    std::fs::create_dir_all(&stack.dir)?;
    load::prepare(&stack).await?;
    let mut speed = Speed::default();
    speed.install_peers(&stack, &workloads);
    for workload in workloads {
        eprintln!("bench     {}: writing {} rows", workload.name, workload.rows);
        let backlog = load::load(&stack, workload).await?;
        speed.workloads.push((workload, backlog.row_bytes));
        speed.take_turns(&stack, &backlog).await?;
        load::unload(&stack, &backlog).await?;
    }
    let live = live::measure(&stack, quick, parts).await?;
    let micro = if parts.has("micro") { report::micro(&target().join("criterion")) } else { Vec::new() };
    Ok(Figures { machine, speed, live, micro })
}

/// Writes the raw figures; each run of the bench has its own file.
fn keep(figures: &Figures) -> Result<PathBuf> {
    let dir = target().join("bench");
    std::fs::create_dir_all(&dir)?;
    let time = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
    let file = dir.join(format!("{time}.json"));
    std::fs::write(&file, serde_json::to_vec_pretty(figures)?)?;
    if let Some(plot) = figures.live.plot() {
        let file = dir.join("growth.svg");
        std::fs::write(&file, plot)?;
        println!("Plot of growth: {}", file.display());
    }
    Ok(file)
}

/// Cargo's target directory.
fn target() -> &'static Path {
    let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
    tmp.parent().unwrap_or(tmp)
}
