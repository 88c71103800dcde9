//! The `falaj` binary: reads the command line and the configuration, runs one role, maps its error to an exit code.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use falaj::cli::{Cli, Consume, Outlet, Verb};
use falaj::config::Config;
use falaj::consume::outlets;
use falaj::error::{Error, Result};
use falaj::world::{Health, World};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// How long a drain may take after the first signal.
const DRAIN: Duration = Duration::from_secs(10);
/// … and that of the demo, which drains stage after stage and then counts everything.
const DEMO_DRAIN: Duration = Duration::from_secs(60);
/// Bytes of an allocation from which it is a mapping of its own. All buffers of a usual load are smaller: a mapping for
/// each of those would cost more in page faults than it saves.
#[cfg(target_env = "gnu")]
const LARGE_BLOCK: i32 = 4 << 20;

fn main() -> ExitCode {
    let cli = Cli::parse();
    bound_heap(&cli.verb);
    log_to_stderr();
    // pgwire-replication brings ring and other crates aws-lc-rs: with both compiled in, rustls needs one to be named.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::fatal("starting the runtime", e))
        .and_then(|runtime| {
            let outcome = runtime.block_on(run(cli));
            runtime.shutdown_timeout(Duration::from_millis(500));
            outcome
        });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("falaj: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Few arenas for all threads: buffers are filled by one thread and freed by another, and each arena more keeps what it
/// once held. Where rows come from Postgres threads hand over batches and seldom wait for each other, so there one is enough.
///
/// There too, what a large row takes goes back to the system at once: left alone, malloc takes such blocks from the heap as
/// soon as the first has been freed, and the heap keeps the holes. So does its end, once it is free. `consume` has no large
/// rows, and would only take back what it has just given.
#[cfg(target_env = "gnu")]
fn bound_heap(verb: &Verb) {
    let options: &[_] = match verb {
        Verb::Produce(_) | Verb::Backfill(_) | Verb::Init(_) | Verb::Run | Verb::Demo(_) => {
            &[(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, LARGE_BLOCK), (libc::M_TRIM_THRESHOLD, LARGE_BLOCK / 2)]
        }
        _ => &[(libc::M_ARENA_MAX, 2)],
    };
    for &(what, value) in options {
        // SAFETY: no other thread runs yet; a value that is refused changes nothing.
        unsafe { libc::mallopt(what, value) };
    }
}

#[cfg(not(target_env = "gnu"))]
fn bound_heap(_: &Verb) {}

/// What concerns falaj of the environment. Names and values need not be UTF-8, and those of others often are not.
fn environment() -> Result<Vec<(String, String)>> {
    let ours = std::env::vars_os().filter_map(|(name, value)| {
        let name = name.into_string().ok().filter(|name| name.starts_with("FALAJ_"))?;
        Some((name, value))
    });
    let text = |(name, value): (String, OsString)| match value.into_string() {
        Ok(value) => Ok((name, value)),
        Err(_) => {
            Err(Error::refused("configuration", format!("{name} is no UTF-8"), "text", "unset it or mend its value"))
        }
    };
    ours.map(text).collect()
}

async fn run(cli: Cli) -> Result<()> {
    let file = cli.config.as_deref().or_else(|| Some(Path::new("falaj.toml")).filter(|p| p.exists()));
    let config = Arc::new(Config::load(file, environment()?)?);
    let world = World { config, stop: CancellationToken::new(), health: Health::default() };
    let patience = if let Verb::Demo(_) = cli.verb { DEMO_DRAIN } else { DRAIN };
    tokio::spawn(watch_signals(world.stop.clone(), patience));
    let metrics = falaj::metrics::install()?;
    let checks = starting(&world.config, &cli.verb);
    if !checks.is_empty() {
        checks.into_iter().for_each(|check| world.health.failing(check, "starting"));
        falaj::http::start(&world, metrics.clone()).await?;
    }
    dispatch(&world, cli.verb, metrics).await
}

/// What has to pass before a role that stays is ready; until it has been tried for the first time, it fails.
fn starting(config: &Config, verb: &Verb) -> Vec<&'static str> {
    let produce = ["replication"];
    let loads = config.bigquery.project.as_deref().is_some_and(|project| !project.is_empty());
    let upload: &[_] = if loads { &["upload"] } else { &[] };
    let consume = |args: &Consume| -> Vec<&'static str> {
        let checks = |outlet| match outlet {
            Outlet::Redis => &["redis", "kafka_board"][..],
            Outlet::External => &["kafka_external"],
        };
        outlets(config, args).into_iter().flat_map(checks).copied().collect()
    };
    match verb {
        Verb::Produce(_) => produce.to_vec(),
        Verb::Upload(_) => upload.to_vec(),
        Verb::Consume(args) => consume(args),
        Verb::Run => [&produce[..], &consume(&Consume::default()), upload].concat(),
        _ => Vec::new(),
    }
}

async fn dispatch(world: &World, verb: Verb, metrics: PrometheusHandle) -> Result<()> {
    match verb {
        Verb::Init(args) => falaj::init::run(world, &args).await,
        Verb::Check(args) => falaj::check::run(world, args.json).await,
        Verb::Generate(args) => falaj::generate::run(world, &args).await,
        Verb::Produce(args) => falaj::produce::run(world, &args).await,
        Verb::Measure(args) => falaj::produce::measure(world, args.until_lsn).await,
        Verb::Backfill(args) => falaj::backfill::run(world, &args).await,
        Verb::Consume(args) => falaj::consume::run(world, &args).await,
        Verb::Board(args) => falaj::consume::board(world, &args).await,
        Verb::Upload(args) => falaj::upload::run(world, &args).await,
        Verb::Replay(args) => falaj::replay::run(world, &args).await,
        Verb::Verify(args) => falaj::verify::run(world, &args).await,
        Verb::Bookmark(args) => falaj::bookmark::run(world, &args).await,
        Verb::Run => falaj::run::run(world).await,
        Verb::Demo(args) => falaj::demo::run(world, &args, metrics).await,
        Verb::Status(args) => falaj::status::run(world, &args).await,
        Verb::Top => falaj::top::run(world).await,
        Verb::Tap(args) => falaj::tap::run(world, &args).await,
        Verb::MockExternal(args) => falaj::mock_external::run(world, &args).await,
        Verb::Healthcheck => falaj::http::healthcheck(&world.config).await,
    }
}

/// The first SIGTERM or SIGINT drains; a second one, or the end of `patience`, ends the process at once with 1.
async fn watch_signals(stop: CancellationToken, patience: Duration) {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        return;
    };
    let mut either = async || tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} };
    either().await;
    tracing::info!("draining; a second signal ends at once");
    stop.cancel();
    tokio::select! {
        () = either() => {}
        () = tokio::time::sleep(patience) => tracing::error!("not drained within {patience:?}"),
    }
    std::process::exit(1);
}

fn log_to_stderr() {
    let filter =
        EnvFilter::try_from_env("FALAJ_LOG").unwrap_or_else(|_| EnvFilter::new("info,rustls=warn,librdkafka=warn"));
    let terminal = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(terminal)
        .with_target(false)
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sink_that_is_named_twice_waits_for_no_other() {
        let config = Config::load(None, []).unwrap();
        let checks = |sinks: &[&str]| starting(&config, &Cli::parse_from([&["falaj", "consume"], sinks].concat()).verb);
        assert_eq!(checks(&["--sinks", "redis,redis"]), ["redis", "kafka_board"]);
        assert_eq!(checks(&["--sinks", "external,external"]), ["kafka_external"]);
        let both = ["redis", "kafka_board", "kafka_external"];
        assert_eq!(checks(&["--sinks", "external,redis"]), both);
        assert_eq!(checks(&[]), both);
    }
}
