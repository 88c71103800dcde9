//! What the demo runs on: a database, topics, keys, a data set and directories of its own, made anew each time.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::admin::AdminOptions;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::screen::Screen;
use super::warehouse::Warehouse;
use crate::config::{BigQuery, Config, Postgres, SinkName, Span};
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::source::conn::{Conninfo, sql_error};
use crate::source::slot;
use crate::world::World;
use crate::{cli, init, kafka};

/// Name of database, slot, publication and directory; prefix of pipeline and data set.
pub(super) const NAME: &str = "falaj_demo";
/// Batches are sealed, and loaded, so often that both are seen in a short demo.
const OFTEN: Span = Span(Duration::from_secs(5));

/// The stage, set.
pub(super) struct Stage {
    /// The demo's own configuration, and a stop that nobody pulls: its roles have their own.
    pub(super) world: World,
    /// Connects to the database that was configured; the demo's own is made from there.
    home: Conninfo,
}

/// Directory of the demo's archive, state and log, beside the configured archive; made where it is absent.
pub(super) fn root(config: &Config) -> Result<PathBuf> {
    let root = config.archive.dir.with_file_name(NAME);
    match std::fs::create_dir_all(&root).and_then(|()| root.canonicalize()) {
        Ok(root) => Ok(root),
        Err(e) => Err(Error::refused(
            "archive_directory",
            format!("creating {}: {e}", root.display()),
            "a directory that can be written, beside archive.dir",
            "mend archive.dir or its rights",
        )),
    }
}

impl Stage {
    /// Plans the stage; nothing is asked yet.
    pub(super) fn new(world: &World, outside: &str) -> Result<Self> {
        let config = Arc::new(configuration(&world.config, outside)?);
        let home = Conninfo::parse(&world.config.postgres.url)?;
        Ok(Self { world: World { config, stop: CancellationToken::new(), health: world.health.clone() }, home })
    }

    /// Removes what an earlier demo has left, makes everything, and runs `init`.
    pub(super) async fn prepare(&self, screen: &mut Screen) -> Result<()> {
        let config = &self.world.config;
        screen.say(&format!("Postgres   {}", Conninfo::parse(&config.postgres.url)?));
        self.database().await?;
        screen.say(&format!("Kafka      topics {}.* at {}", config.pipeline, config.kafka.servers()));
        self.forget_topics().await;
        screen.say(&format!("Redis      keys {{falaj:{}}}*", config.pipeline));
        screen.say(&format!("archive    {}", config.archive.dir.display()));
        self.directories()?;
        match Warehouse::of(config)? {
            Some(warehouse) => {
                screen.say(&format!("BigQuery   data set {} at {}", config.bigquery.dataset, warehouse.base()));
                warehouse.forget().await;
            }
            None => screen.say("BigQuery   left out: no local server in bigquery.project and bigquery.endpoint"),
        }
        let (url, faults) = (&config.external.url, super::FAULTS * 100.0);
        screen.say(&format!("outside    the simulator at {url}, {faults} % of its answers are faults"));
        let args = cli::Init { yes: true, with_tables: true, adopt_slot: false, failover: false, snapshot: false };
        init::run(&self.world, &args).await
    }

    /// The database, made anew. A slot in use means that another demo runs.
    async fn database(&self) -> Result<()> {
        let client = self.world.at_start("postgres", || self.home.sql("falaj demo")).await?;
        let failed = |e: tokio_postgres::Error| sql_error("making the demo's database", &e);
        if let Some(slot) = slot::read(&client, NAME).await? {
            if let Some(pid) = slot.active_pid {
                return Err(Error::refused(
                    "demo",
                    format!("slot \"{NAME}\" is read through pid {pid}: another demo runs on this server"),
                    "one demo at a time",
                    "end the other one first",
                ));
            }
            client.execute("SELECT pg_drop_replication_slot($1::text::name)", &[&NAME]).await.map_err(failed)?;
        }
        client.execute(&format!("DROP DATABASE IF EXISTS {NAME} WITH (FORCE)"), &[]).await.map_err(failed)?;
        let create = format!("CREATE DATABASE {NAME} TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C'");
        client.execute(&create, &[]).await.map_err(failed)?;
        Ok(())
    }

    /// Topics of earlier demos. What cannot be removed does not matter: their names are never used again.
    async fn forget_topics(&self) {
        let config = self.world.config.clone();
        let removed = async {
            let admin = Arc::new(kafka::admin(&config.kafka)?);
            let asked = admin.clone();
            let listed = tokio::task::spawn_blocking(move || asked.inner().fetch_metadata(None, kafka::TIMEOUT)).await;
            let listed = listed.map_err(|e| Error::fatal("listing topics", e))?;
            let listed = listed.map_err(|e| kafka::error(&config.kafka, &e))?;
            let names: Vec<&str> = listed.topics().iter().map(|t| t.name()).filter(|name| is_demo(name)).collect();
            if !names.is_empty() {
                let options = AdminOptions::new().operation_timeout(Some(kafka::TIMEOUT));
                admin.delete_topics(&names, &options).await.map_err(|e| kafka::error(&config.kafka, &e))?;
            }
            Ok::<_, Error>(())
        };
        if let Err(error) = removed.await {
            warn!(%error, "topics of earlier demos stay");
        }
    }

    fn directories(&self) -> Result<()> {
        for dir in [&self.world.config.archive.dir, &self.world.config.state.dir] {
            if dir.exists() {
                let removed = std::fs::remove_dir_all(dir);
                removed.map_err(|e| Error::fatal(format_args!("removing {}", dir.display()), e))?;
            }
        }
        Ok(())
    }

    /// End of the server's WAL: everything that was committed lies below.
    pub(super) async fn server_lsn(&self) -> Result<Lsn> {
        slot::server_lsn(&self.client().await?).await
    }

    /// An SQL session in the demo's database.
    pub(super) async fn client(&self) -> Result<tokio_postgres::Client> {
        Conninfo::parse(&self.world.config.postgres.url)?.sql("falaj demo").await
    }

    /// Drops the slot, once the server has noticed that its reader is gone.
    pub(super) async fn drop_slot(&self) -> Result<()> {
        let client = self.home.sql("falaj demo").await?;
        let drop = "SELECT pg_drop_replication_slot(slot_name) FROM pg_catalog.pg_replication_slots WHERE slot_name::text = $1";
        self.world
            .at_start("slot", || async {
                client.execute(drop, &[&NAME]).await.map(|_| ()).map_err(|e| match e.code() {
                    Some(code) if code.code() == "55006" => Error::unreachable("the demo's slot", "still in use"),
                    _ => sql_error("dropping the demo's slot", &e),
                })
            })
            .await
    }
}

/// Whether a topic or data set is one of a demo's: the name, and the time of its start.
pub(super) fn is_demo(name: &str) -> bool {
    let stamp = name.strip_prefix(NAME).and_then(|rest| rest.strip_prefix('_')).unwrap_or_default();
    let digits = stamp.bytes().take_while(u8::is_ascii_digit).count();
    digits == STAMP_DIGITS && matches!(stamp.as_bytes().get(digits), None | Some(b'.'))
}

const STAMP: &str = "%Y%m%d%H%M%S";
const STAMP_DIGITS: usize = 14;

fn configuration(given: &Config, outside: &str) -> Result<Config> {
    let root = root(given)?;
    let run = format!("{NAME}_{}", jiff::Timestamp::now().strftime(STAMP));
    let mut config = Config { tables: Config::defaults()?.tables, pipeline: run.clone(), ..given.clone() };
    let url = in_database(&given.postgres.url);
    config.postgres = Postgres { url, slot: NAME.into(), publication: NAME.into() };
    config.produce.sinks = vec![SinkName::Kafka, SinkName::Archive];
    config.kafka.topic = "{pipeline}.{table}".into();
    config.archive.dir = root.join("archive");
    config.archive.seal_after = OFTEN;
    config.state.dir = root.join("state");
    config.external.url = outside.to_owned();
    // The demo never loads into the real service, which costs money.
    let project = given.bigquery.project.clone().filter(|p| !p.is_empty() && Warehouse::is_local(given));
    config.bigquery = BigQuery { project, dataset: run, load_every: OFTEN, ..given.bigquery.clone() };
    Ok(config)
}

/// The same server, another database.
fn in_database(url: &str) -> String {
    match url.split_once("://") {
        None => format!("{url} dbname={NAME}"),
        Some((scheme, rest)) => match rest.split_once('?') {
            Some((server, settings)) => format!("{scheme}://{server}?{settings}&dbname={NAME}"),
            None => format!("{scheme}://{}/{NAME}", rest.split('/').next().unwrap_or_default()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_demo_has_made_is_removed() {
        assert!(is_demo("falaj_demo_20260102030405") && is_demo("falaj_demo_20260102030405.checkpoint"));
        for other in
            ["falaj_demo", "falaj_demo_1", "falaj_demo_20260102030405x", "falaj.content", "x_falaj_demo_20260102030405"]
        {
            assert!(!is_demo(other), "{other}");
        }
    }

    #[test]
    fn the_url_is_that_of_the_same_server() {
        let database = |url: &str| Conninfo::gather(&in_database(url), &|_| None).unwrap().to_string();
        for url in [
            "postgres://me@127.0.0.1:5433/app",
            "postgres://me@127.0.0.1:5433",
            "host=127.0.0.1 port=5433 user=me dbname=app",
        ] {
            assert_eq!(database(url), "127.0.0.1:5433, database \"falaj_demo\", role \"me\"", "{url}");
        }
        let settings = in_database("postgres://me@127.0.0.1:5433/app?application_name=x");
        assert_eq!(settings, "postgres://me@127.0.0.1:5433/app?application_name=x&dbname=falaj_demo");
    }
}
