//! `demo`: the whole system on one machine, in one terminal: load, every role, the outside system, and a count at the end.
//!
//! The servers are there already (`make demo` starts them). All it makes is named `falaj_demo`: a database of its own, topics,
//! keys, a data set, directories. What an earlier demo left is removed first.

mod figures;
mod guide;
mod screen;
mod stage;
mod tally;
mod warehouse;

use std::future::Future;
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::mock_external::{self, Faults, Mock};
use crate::world::World;
use crate::{cli, consume, generate, http, produce, upload};
use figures::Figures;
use screen::Screen;
use stage::Stage;

/// Engagement rows a second: lively, and easy for any machine.
const RATE: u64 = 300;
/// Of the load and of the faults.
const SEED: u64 = 7;
/// Share of requests that the outside system answers with a fault, so that retries are seen.
const FAULTS: f64 = 0.02;
/// How long the drain may take; less than what `main` allows after a signal.
const DRAIN: Duration = Duration::from_secs(40);
/// How often it is looked whether the roles are ready.
const LOOK: Duration = Duration::from_millis(50);
/// How often the view is drawn on a terminal …
const DRAW: Duration = Duration::from_secs(1);
/// … and how often a line is printed elsewhere.
const LINE: Duration = Duration::from_secs(5);

/// Runs until `--for` is over or the first signal, drains, counts, and prints what it found.
///
/// # Errors
/// [`Error::Fatal`] when the counts differ at the end; that of a role which fails; [`Error::Unreachable`] for a server that is
/// away at the start.
pub async fn run(world: &World, args: &cli::Demo, metrics: PrometheusHandle) -> Result<()> {
    let root = stage::root(&world.config)?;
    let mut screen = Screen::take(&root.join("log"))?;
    let outcome = show(world, args, metrics, &mut screen).await;
    if outcome.is_err() {
        screen.say(&format!("every role's log is in {}", root.join("log").display()));
    }
    outcome
}

async fn show(world: &World, args: &cli::Demo, metrics: PrometheusHandle, screen: &mut Screen) -> Result<()> {
    let began = Instant::now();
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(|e| Error::fatal("listening on 127.0.0.1", e))?;
    let outside = listener.local_addr().map_err(|e| Error::fatal("listening on 127.0.0.1", e))?;
    let mock = Mock::new(Faults::random(FAULTS, SEED));
    let outside = format!("http://{outside}/events");
    let stage = Stage::new(world, &outside)?;
    tokio::select! {
        prepared = stage.prepare(screen) => prepared?,
        () = world.stop.cancelled() => return stage.drop_slot().await,
    }
    tokio::spawn(mock_external::serve(listener, mock.clone(), CancellationToken::new()));
    match http::start(&stage.world, metrics.clone()).await? {
        Some(address) => screen.say(&format!("dashboard  http://{address}/")),
        None => screen.say("dashboard  not served: http.listen is empty or in use"),
    }
    let mut cast = Cast::start(&stage.world);
    let mut figures = Figures::new(&stage, metrics, mock.clone(), began);
    let ended = watch(world, args, &mut cast, &mut figures, screen).await;
    screen.say(&figures.line());
    let counted = match ended {
        Ok(()) => timeout(DRAIN, drain(&stage, cast, screen)).await.unwrap_or_else(|_| Err(not_drained())),
        Err(error) => {
            // Whatever does not end now ends with the process.
            let _ = timeout(DRAIN, cast.stop()).await;
            Err(error)
        }
    };
    // A slot that nobody reads keeps the server's WAL for ever.
    let dropped = stage.drop_slot().await;
    counted?;
    dropped?;
    let tally = tally::count(&stage, &mock).await?;
    screen.say(&tally.text());
    screen.say(&guide::text(&stage));
    tally.verdict()
}

fn not_drained() -> Error {
    Error::Fatal(format!("not everything was through within {DRAIN:?}: a server is away or too slow"))
}

/// Shows the figures until the time is up or a signal comes.
async fn watch(
    world: &World,
    args: &cli::Demo,
    cast: &mut Cast,
    figures: &mut Figures<'_>,
    screen: &mut Screen,
) -> Result<()> {
    let deadline = args.length.map(|span| Instant::now() + span.0);
    let mut tick = interval(DRAW);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut line = Instant::now() + LINE;
    loop {
        tokio::select! {
            () = world.stop.cancelled() => return Ok(()),
            () = until(deadline) => return Ok(()),
            failure = cast.failure() => return Err(failure),
            _ = tick.tick() => {
                figures.take().await;
                if let Some(seconds) = figures.first_visible() {
                    screen.say(&format!("first event on the board {seconds:.1} s after the start"));
                }
                if screen.is_terminal() {
                    screen.draw(&figures.view());
                } else if Instant::now() >= line {
                    screen.say(&figures.line());
                    line += LINE;
                }
            }
        }
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Lets everything that was committed through every role, to a fixed LSN, as `--until-lsn`, `--until-end` and `--once` do.
async fn drain(stage: &Stage, cast: Cast, screen: &mut Screen) -> Result<()> {
    let Cast { generate, produce, consume, upload } = cast;
    generate.stop().await?;
    let end = stage.server_lsn().await?;
    screen.say(&format!("draining   produce to {end}"));
    produce.stop().await?;
    produce_to(stage, end).await?;
    screen.say("draining   consume and upload to the end");
    let consumed = async {
        consume.stop().await?;
        let args = both_outlets(true);
        consume::run(&stage.world, &args).await
    };
    let uploaded = async {
        upload.stop().await?;
        upload::run(&stage.world, &cli::Upload { once: true }).await
    };
    let (consumed, uploaded) = tokio::join!(consumed, uploaded);
    consumed.and(uploaded)
}

async fn produce_to(stage: &Stage, end: Lsn) -> Result<()> {
    let args = cli::Produce { until_lsn: Some(end), ..Default::default() };
    produce::run(&stage.world, &args).await
}

/// An empty address is a fault here: everything is shown.
fn both_outlets(until_end: bool) -> cli::Consume {
    cli::Consume { until_end, sinks: Some(vec![cli::Outlet::Redis, cli::Outlet::External]) }
}

/// The roles at work. Each has its own stop, because they are drained one after the other.
struct Cast {
    generate: Role,
    produce: Role,
    consume: Role,
    upload: Role,
}

impl Cast {
    fn start(world: &World) -> Self {
        let load = cli::Generate { rate: Some(RATE), count: None, seed: SEED };
        Self {
            produce: Role::start("produce", world, async |w| produce::run(&w, &cli::Produce::default()).await),
            consume: Role::start("consume", world, async |w| consume::run(&w, &both_outlets(false)).await),
            upload: Role::start("upload", world, async |w| upload::run(&w, &cli::Upload::default()).await),
            generate: Role::start("generate", world, async move |w| {
                // A load that began before its readers would show their start as latency.
                match streaming(&w).await {
                    true => generate::run(&w, &load).await,
                    false => Ok(()),
                }
            }),
        }
    }

    /// Why a role has failed; waits for ever while all are well.
    async fn failure(&mut self) -> Error {
        let Self { generate, produce, consume, upload } = self;
        tokio::select! {
            error = generate.failure() => error,
            error = produce.failure() => error,
            error = consume.failure() => error,
            error = upload.failure() => error,
        }
    }

    async fn stop(self) {
        let Self { generate, produce, consume, upload } = self;
        for role in [&generate, &produce, &consume, &upload] {
            role.stop.cancel();
        }
        for role in [generate, produce, consume, upload] {
            // The first failure is the one that is told.
            if let Err(error) = role.stop().await {
                info!("{error}");
            }
        }
    }
}

/// Waits until events flow to every reader; false when the demo is ended first.
async fn streaming(world: &World) -> bool {
    loop {
        let report = world.health.report();
        if ["replication", "kafka_board", "kafka_external"].iter().all(|check| report.get(check) == Some(&None)) {
            return true;
        }
        if world.pause(LOOK).await.is_err() {
            return false;
        }
    }
}

struct Role {
    name: &'static str,
    stop: CancellationToken,
    /// `None` once it has ended by itself, well.
    task: Option<JoinHandle<Result<()>>>,
}

impl Role {
    fn start<F>(name: &'static str, world: &World, role: impl FnOnce(World) -> F) -> Self
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let stop = CancellationToken::new();
        let world = World { stop: stop.clone(), ..world.clone() };
        Self { name, stop, task: Some(tokio::spawn(role(world))) }
    }

    async fn failure(&mut self) -> Error {
        if let Some(task) = &mut self.task {
            let ended = joined(self.name, task.await);
            // `upload` ends without a project.
            self.task = None;
            if let Err(error) = ended {
                return error;
            }
        }
        std::future::pending().await
    }

    async fn stop(self) -> Result<()> {
        self.stop.cancel();
        match self.task {
            Some(task) => joined(self.name, task.await),
            None => Ok(()),
        }
    }
}

fn joined(name: &str, ended: Result<Result<()>, tokio::task::JoinError>) -> Result<()> {
    ended.map_err(|e| Error::fatal(name, e))?
}
