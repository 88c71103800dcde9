//! The `falaj` binary: reads the command line and the configuration, runs one role, maps its error to an exit code.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use falaj::cli::{Cli, Verb};
use falaj::config::Config;
use falaj::error::{Error, Result};
use falaj::world::{Health, World};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// How long a drain may take after the first signal.
const DRAIN: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let cli = Cli::parse();
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

async fn run(cli: Cli) -> Result<()> {
    let file = cli.config.as_deref().or_else(|| Some(Path::new("falaj.toml")).filter(|p| p.exists()));
    let config = Arc::new(Config::load(file, std::env::vars())?);
    let world = World { config, stop: CancellationToken::new(), health: Health::default() };
    tokio::spawn(watch_signals(world.stop.clone()));
    dispatch(&world, cli.verb).await
}

async fn dispatch(world: &World, verb: Verb) -> Result<()> {
    match verb {
        Verb::Init(args) => falaj::init::run(world, &args).await,
        Verb::Check(args) => falaj::check::run(world, args.json).await,
        Verb::Generate(args) => falaj::generate::run(world, &args).await,
        Verb::Produce(args) => falaj::produce::run(world, &args).await,
        Verb::Measure(args) => falaj::produce::measure(world, args.until_lsn).await,
        Verb::Consume(args) => falaj::consume::run(world, &args).await,
        Verb::Board(args) => falaj::consume::board(world, &args).await,
        Verb::MockExternal(args) => falaj::mock_external::run(world, &args).await,
        Verb::Upload(args) => falaj::upload::run(world, &args).await,
        other => Err(Error::Usage(format!("{other:?} is not there yet"))),
    }
}

/// The first SIGTERM or SIGINT drains; a second one, or ten seconds, ends the process at once with 1.
async fn watch_signals(stop: CancellationToken) {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        return;
    };
    let mut either = async || tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} };
    either().await;
    tracing::info!("draining; a second signal ends at once");
    stop.cancel();
    tokio::select! {
        () = either() => {}
        () = tokio::time::sleep(DRAIN) => tracing::error!("not drained within {DRAIN:?}"),
    }
    std::process::exit(1);
}

fn log_to_stderr() {
    let filter =
        EnvFilter::try_from_env("FALAJ_LOG").unwrap_or_else(|_| EnvFilter::new("info,rustls=warn,librdkafka=warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
}
