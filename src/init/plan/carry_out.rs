//! How a plan's steps are made.

use tracing::info;

use super::{APPLICATION, Plan, TABLES};
use crate::backfill::{self, Source, Speed, Wanted};
use crate::check::postgres as require;
use crate::check::role::Role;
use crate::config::Config;
use crate::enrich::state::{self, BaseHeader};
use crate::error::{Error, Result};
use crate::init::base::{self, Lookup};
use crate::init::step::Step;
use crate::kafka;
use crate::lsn::Lsn;
use crate::source::catalog::{self, Table};
use crate::source::conn::sql_error;
use crate::source::snapshot::{self, Files, Kind};
use crate::source::wire::{Wire, ident};
use crate::world::{World, print};

/// How fast the rows of `--snapshot` are copied.
const SPEED: Speed = Speed { jobs: backfill::JOBS, rate: None };

impl Plan {
    /// Carries every step out, in order: the slot comes last, so that nothing holds WAL back before all else is there.
    pub(in crate::init) async fn carry_out(&self, world: &World) -> Result<()> {
        let mut snapshot = None;
        for step in &self.steps {
            if let Step::Snapshot { tables } = step {
                backfill::copy(world, &wanted(tables), SPEED, snapshot.take()).await?;
                continue;
            }
            snapshot = self.carry_out_step(world, step).await?;
            print(&format!("  made {}\n", step.noun()))?;
        }
        Ok(())
    }

    /// Gives the new slot's snapshot, where there is one and it is needed.
    async fn carry_out_step(&self, world: &World, step: &Step) -> Result<Option<Source>> {
        let config = &world.config;
        match step {
            Step::Tables => {
                self.client.batch_execute(TABLES).await.map_err(|e| refused_sql("tables", "sql/01_tables.sql", &e))?;
            }
            Step::Publication { sql, .. } => {
                self.client.batch_execute(sql).await.map_err(|e| refused_sql("publication", sql, &e))?;
            }
            Step::Topic { name, partitions, settings } => {
                kafka::create_topic(&config.kafka, name, *partitions, settings).await?;
            }
            Step::Slot { failover, .. } => return self.create_slot(world, *failover).await,
            Step::Adopt { confirmed, origin, .. } => {
                let lookups = self.lookups(config).await?;
                self.write_base(config, None, *confirmed, *origin, &lookups).await?;
            }
            Step::Snapshot { .. } => {}
        }
        Ok(None)
    }

    /// Creates the slot and writes the lookup rows from its snapshot. A slot whose rows cannot be written is dropped again.
    async fn create_slot(&self, world: &World, failover: bool) -> Result<Option<Source>> {
        let config = &world.config;
        let copied = self.steps.iter().find_map(|step| match step {
            Step::Snapshot { tables } => Some(wanted(tables)),
            _ => None,
        });
        let slot = &config.postgres.slot;
        // Looked up before the slot exists, so that a refusal leaves nothing behind.
        let lookups = self.lookups(config).await?;
        let reader = match &copied {
            Some(copied) => Some(backfill::begin(world, &self.conninfo, copied).await?),
            None => None,
        };
        let files = Files::note(&self.client, &lookups.iter().map(|l| &l.source).collect::<Vec<_>>()).await?;
        let mut wire = Wire::connect(&self.conninfo, APPLICATION).await?;
        // The plan may be old: it was asked for, or another init was waited for.
        require::no_slot(&self.client, slot).await?;
        // What an earlier slot of this name has left would look like this one's, were the process killed before its own is
        // there.
        state::set_aside(&config.state.dir)?;
        let made = tokio::select! {
            made = snapshot::new_slot(&mut wire, slot, if failover { Kind::Failover } else { Kind::Permanent }) => made,
            never = snapshot::said_waiting(matches!(self.role, Role::Standby { .. })) => match never {},
            // The server goes on waiting, and may make the slot all the same.
            () = world.stop.cancelled() => return Err(Error::Fatal("shut down while the slot was being made".into())),
        };
        let (at, snapshot) = match made {
            Ok(made) => made,
            Err(refused @ Error::Refused(_)) => {
                state::put_back(&config.state.dir)?;
                return Err(refused);
            }
            Err(error) => return Err(error),
        };
        let mut source = None;
        let write = async {
            backfill::forget(&config.state.dir)?;
            if let (Some((client, files)), Some(copied)) = (reader, &copied) {
                files.enter(&client, &snapshot).await?;
                let copying = Source::new(&self.conninfo, (client, files), at, &snapshot, &self.identity);
                backfill::prepare(world, &copying, copied, SPEED.jobs).await?;
                source = Some(copying);
            }
            self.write_base(config, Some((&snapshot, &files)), at, at, &lookups).await
        };
        let written = tokio::select! {
            written = write => written,
            () = world.stop.cancelled() => Err(Error::Fatal("shut down while writing the lookup rows".into())),
        };
        let Err(error) = written else {
            if let Some(source) = &mut source {
                source.hold(wire);
            }
            return Ok(source);
        };
        match wire.query(&format!("DROP_REPLICATION_SLOT {}", ident(slot))).await {
            Ok(_) => {
                tracing::error!("the lookup rows could not be written; the slot \"{slot}\" just made was dropped again")
            }
            Err(drop) => tracing::error!(
                error = %drop,
                "the lookup rows could not be written, and the slot just made is still there: SELECT pg_drop_replication_slot('{slot}')"
            ),
        }
        Err(error)
    }

    async fn lookups(&self, config: &Config) -> Result<Vec<Lookup>> {
        let published: Vec<Table> = catalog::published(&self.client, &config.postgres.publication).await?;
        let lookups = base::lookups(&published, &config.tables)?;
        require::readable(&lookups.iter().map(|l| &l.source).collect::<Vec<_>>())?;
        Ok(lookups)
    }

    async fn write_base(
        &self,
        config: &Config,
        snapshot: Option<(&str, &Files)>,
        at: Lsn,
        origin: Lsn,
        lookups: &[Lookup],
    ) -> Result<()> {
        let header = BaseHeader {
            version: 1,
            identity: self.identity.clone(),
            lsn: at,
            origin,
            adopted: snapshot.is_none(),
            adopted_snapshot: None,
            changed: None,
            tables: lookups.iter().map(|l| l.table.clone()).collect(),
        };
        let rows = base::write(&self.client, snapshot, header, lookups, &config.state.dir).await?;
        info!(%at, rows, dir = %config.state.dir.display(), "lookup rows written");
        Ok(())
    }
}

fn wanted(tables: &[String]) -> Vec<Wanted> {
    tables.iter().map(|table| Wanted { table: table.clone(), filter: None }).collect()
}

fn refused_sql(check: &'static str, sql: &str, e: &tokio_postgres::Error) -> Error {
    match e.as_db_error() {
        Some(db) if !e.is_closed() => Error::refused(
            check,
            format!("{sql}: {} (SQLSTATE {})", db.message(), db.code().code()),
            "the right to create it (owner of the tables, or superuser)",
            format!("run it once as such a role: {sql}"),
        ),
        _ => sql_error(sql, e),
    }
}
