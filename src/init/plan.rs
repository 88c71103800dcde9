//! What is there, and what is missing.

mod carry_out;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use tokio_postgres::Client;
use tracing::warn;

use super::base;
use super::step::{Step, list};
use crate::backfill;
use crate::check::kafka::require_checkpoint;
use crate::check::peers::writable;
use crate::check::postgres as require;
use crate::check::role::{self, Role};
use crate::cli;
use crate::config::{Config, SinkName};
use crate::enrich::state;
use crate::error::{Error, Refusal, Result};
use crate::kafka;
use crate::lsn::{Lsn, SlotIdentity};
use crate::produce;
use crate::sink::Stored;
use crate::source::catalog;
use crate::source::conn::Conninfo;
use crate::source::slot::{self, ANEW};
use crate::source::wire::{ident, literal};
use crate::world::World;

/// The tables of the engagement schema.
const TABLES: &str = include_str!("../../sql/01_tables.sql");
/// Their names, as `TABLES` makes them.
pub(super) const TABLE_NAMES: [&str; 2] = ["content", "engagement_events"];
const APPLICATION: &str = "falaj init";

/// The checkpoint topic holds one live record: compaction soon after a segment is full keeps reading it short.
pub(super) const CHECKPOINT: &[(&str, &str)] =
    &[("cleanup.policy", "compact"), ("segment.bytes", "1048576"), ("min.cleanable.dirty.ratio", "0.01")];

/// Nobody else keeps what the outside system has refused: it stays until somebody has looked.
pub(super) const DEAD_LETTERS: &[(&str, &str)] = &[("retention.ms", "-1")];

/// The steps that are missing, and a word on what is there.
pub(super) struct Plan {
    conninfo: Conninfo,
    client: Client,
    identity: SlotIdentity,
    role: Role,
    present: Vec<String>,
    steps: Vec<Step>,
    /// What the steps will do beyond what they say.
    notes: Vec<String>,
}

impl Plan {
    /// Looks at everything and changes nothing.
    pub(super) async fn make(world: &World, args: &cli::Init) -> Result<Self> {
        let config = &world.config;
        let conninfo = Conninfo::parse(&config.postgres.url)?;
        let client = world.at_start("postgres", || conninfo.sql(APPLICATION)).await?;
        require::version(&client).await?;
        let role = role::server_role(&client).await?;
        require::wal_level(&client).await?;
        if args.failover {
            role::failover(&client, role).await?;
        }
        let identity = require::identity(&conninfo, &config.postgres.slot).await?;
        let (present, steps, notes) = Default::default();
        let mut plan = Self { conninfo, client, identity, role, present, steps, notes };
        let made = if args.with_tables { plan.plan_tables().await? } else { Vec::new() };
        let published = plan.plan_publication(config, &made).await?;
        let sources = config.sources(published.clone())?;
        if config.produce.sinks.contains(&SinkName::Kafka) {
            plan.plan_topics(world, &sources).await?;
        }
        plan.plan_slot(world, args).await?;
        plan.refuse_writes_on_a_standby()?;
        if args.snapshot {
            plan.plan_snapshot(world, &published)?;
        }
        Ok(plan)
    }

    /// Whether nothing is missing.
    pub(super) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Plans the copy of what is there already. It belongs to the slot's beginning: for a slot that exists, only a copy that
    /// was begun with it is gone on with.
    fn plan_snapshot(&mut self, world: &World, published: &[String]) -> Result<()> {
        if self.steps.iter().any(|step| matches!(step, Step::Slot { .. })) {
            self.steps.push(Step::Snapshot { tables: published.to_vec() });
            return Ok(());
        }
        let (tables, unknown) = backfill::unfinished(world, published)?;
        if let Some(table) = unknown.first() {
            return Err(Error::refused(
                "snapshot",
                format!("the slot exists already, and nothing is known of a copy of {}", list(&unknown)),
                "a slot that init --snapshot makes itself: its snapshot is there only at that moment",
                format!("falaj backfill {table}, for each of them: it copies them as they are now, beside the stream"),
            ));
        }
        match tables.is_empty() {
            true => self.present.push(format!("a copy of the rows of {}", list(published))),
            false => self.steps.push(Step::Snapshot { tables }),
        }
        Ok(())
    }

    async fn plan_tables(&mut self) -> Result<Vec<String>> {
        let mut missing = Vec::new();
        for name in TABLE_NAMES {
            if catalog::table(&self.client, name).await?.is_none() {
                missing.push(name.to_owned());
            }
        }
        if missing.is_empty() {
            self.present.push(format!("tables {}", TABLE_NAMES.join(", ")));
        } else {
            self.steps.push(Step::Tables);
        }
        Ok(missing)
    }

    /// Gives the names of the published tables: those of a publication that exists, else those that one can be made of.
    async fn plan_publication(&mut self, config: &Config, made: &[String]) -> Result<Vec<String>> {
        let name = &config.postgres.publication;
        if require::publication_exists(&self.client, name).await? {
            let tables = catalog::published(&self.client, name).await?;
            base::lookups(&tables, &config.tables)?;
            let names: Vec<_> = tables.iter().map(|t| t.relation.table()).collect();
            self.present.push(format!("publication \"{name}\": {}", list(&names)));
            return Ok(names);
        }
        let mut tables = Vec::new();
        for wanted in configured(config) {
            match catalog::table(&self.client, &wanted).await? {
                Some(table) => {
                    if !table.has_identity() {
                        self.notes.push(without_identity(&wanted));
                    }
                    tables.push((wanted, table.sql_name()));
                }
                None if made.contains(&wanted) => tables.push((wanted.clone(), format!("public.{}", ident(&wanted)))),
                // The built-in block may be meant for none of them.
                None if require::is_default(&config.tables) => {}
                None => {
                    return Err(Error::refused(
                        "configured_tables",
                        format!("no table {wanted}, which [[table]] names"),
                        "each table of the configuration",
                        "create it, or mend its name under [[table]]",
                    ));
                }
            }
        }
        if tables.is_empty() {
            return Err(Error::refused(
                "publication",
                format!(
                    "no publication \"{name}\", and none of the configured tables: {}",
                    configured(config).join(", ")
                ),
                "a publication of the tables to stream",
                "falaj init --with-tables, or name your tables in [[table]], or CREATE PUBLICATION by hand",
            ));
        }
        let (names, quoted): (Vec<_>, Vec<_>) = tables.into_iter().unzip();
        // What comes from a partition is the partitioned table's.
        let sql = format!(
            "CREATE PUBLICATION {} FOR TABLE {} WITH (publish_via_partition_root = true)",
            ident(name),
            quoted.join(", ")
        );
        self.steps.push(Step::Publication { name: name.clone(), tables: names.clone(), sql });
        Ok(names)
    }

    async fn plan_topics(&mut self, world: &World, published: &[String]) -> Result<()> {
        let config = &world.config;
        let existing = world.at_start("kafka", || topics(config)).await?;
        let rows = published.iter().map(|t| (config.topic(t), config.kafka.partitions, &[][..]));
        let own = [(config.checkpoint_topic(), 1, CHECKPOINT), (config.dead_letter_topic(), 1, DEAD_LETTERS)];
        let mut present = Vec::new();
        for (name, partitions, settings) in rows.chain(own) {
            if existing.contains_key(&name) {
                present.push(name);
            } else {
                self.steps.push(Step::Topic { name, partitions, settings });
            }
        }
        if present.contains(&config.checkpoint_topic()) {
            // It works for now, and somebody has chosen it; `check` refuses it.
            match world.at_start("kafka", || require_checkpoint(config, &existing)).await {
                Err(Error::Refused(refusal)) => warn!("{refusal}"),
                told => told?,
            }
        }
        if !present.is_empty() {
            self.present.push(format!("topics {}", present.join(", ")));
        }
        Ok(())
    }

    async fn plan_slot(&mut self, world: &World, args: &cli::Init) -> Result<()> {
        let (config, adopt) = (&world.config, args.adopt_slot);
        let name = config.postgres.slot.clone();
        let state = config.state.dir.display().to_string();
        writable("state_dir", "state.dir", &config.state.dir)?;
        let base = match state::header(&config.state.dir) {
            // What nobody can read any more is what an adoption replaces.
            Err(Error::Refused(_)) if adopt => None,
            header => header?,
        };
        require::state_is_ours(&config.state.dir, base.as_ref(), &self.identity)?;
        let Some(found) = slot::read(&self.client, &name).await? else {
            require::free_slot(&self.client, &name).await?;
            self.require_no_position(world, &name).await?;
            self.steps.push(Step::Slot { name, state, failover: args.failover });
            return Ok(());
        };
        let found = slot::require(&name, Some(found), self.conninfo.dbname())?;
        if args.failover && !found.failover {
            return Err(no_failover(&name));
        }
        if base.is_some() && !adopt {
            self.present.push(format!("slot \"{name}\" at {}, lookup rows in {state}", found.confirmed_flush_lsn));
            return Ok(());
        }
        if !adopt {
            return Err(self.no_state(world, &name).await);
        }
        if let Some(pid) = found.active_pid {
            return Err(Error::refused(
                "slot",
                format!("slot \"{name}\" is in use by pid {pid}"),
                "a slot that nobody reads while its lookup rows are rebuilt",
                "stop that falaj produce (or run) first",
            ));
        }
        let confirmed = found.confirmed_flush_lsn;
        let origin = match base {
            Some(base) => base.origin,
            None => world.at_start("kafka", || self.origin(world, confirmed)).await?,
        };
        self.steps.push(Step::Adopt { name, state, confirmed, origin });
        Ok(())
    }

    /// A slot without lookup rows: lost ones, or an `init` that was killed before it had them. No sink has anything then.
    async fn no_state(&self, world: &World, slot: &str) -> Error {
        let lost = state::unknown(&world.config.state.dir, slot);
        match (self.require_no_position(world, slot).await, lost) {
            (Ok(()), Error::Refused(lost)) => {
                let anew = format!(
                    "after an init that was killed, SELECT pg_drop_replication_slot({}), then the same command (no sink has \
                     anything of this slot). Otherwise {}",
                    literal(slot),
                    lost.fix
                );
                Error::Refused(Refusal { fix: anew, ..lost })
            }
            (Ok(()) | Err(Error::Refused(_)), lost) => lost,
            (Err(error), _) => error,
        }
    }

    /// Where sinks without a position may begin, when nobody knows where the slot began: an adoption must not make a lost sink
    /// look like a new one.
    async fn origin(&self, world: &World, confirmed: Lsn) -> Result<Lsn> {
        let sinks = self.sinks(world).await?;
        let there: Vec<_> = sinks.iter().filter(|(_, position)| position.is_some()).map(|(sink, _)| *sink).collect();
        match sinks.iter().rfind(|(_, position)| position.is_none()) {
            Some((sink, _)) if !there.is_empty() => {
                let found =
                    format!("{sink} has no position, {} has, and the slot stands at {confirmed}", there.join(", "));
                Err(slot::lost_sink(sink, found, confirmed))
            }
            _ => Ok(confirmed),
        }
    }

    /// A new slot goes on from no position: `produce` would refuse it, and a copy would be made into sinks that have the rows.
    async fn require_no_position(&self, world: &World, slot: &str) -> Result<()> {
        let sinks = world.at_start("kafka", || self.sinks(world)).await?;
        let refuse = |found: String| {
            Err(Error::refused(
                "sink_position",
                format!("no slot \"{slot}\", and {found} of one that has gone"),
                "for a new slot, sinks without a position and without copied rows: what came since is in no sink, and what is \
                 copied now may be in them",
                ANEW,
            ))
        };
        if let Some((sink, position)) =
            sinks.into_iter().find_map(|(sink, position)| Some((sink, position?.checkpoint())))
        {
            return refuse(format!("{sink} stands at {}", position.resume));
        }
        for name in &world.config.produce.sinks {
            let is_new = *name == SinkName::Kafka && self.makes_checkpoint_topic(&world.config);
            if !is_new && backfill::has_history(*name, &world.config).await? {
                return refuse(format!(
                    "{} has rows that were copied from the snapshot",
                    format!("{name:?}").to_lowercase()
                ));
            }
        }
        Ok(())
    }

    fn makes_checkpoint_topic(&self, config: &Config) -> bool {
        let checkpoint = config.checkpoint_topic();
        self.steps.iter().any(|step| matches!(step, Step::Topic { name, .. } if *name == checkpoint))
    }

    /// The positions of the configured sinks; a topic that is still to be made has none.
    async fn sinks(&self, world: &World) -> Result<Vec<(&'static str, Option<Stored>)>> {
        let config = &world.config;
        let is_new = self.makes_checkpoint_topic(config);
        let mut found = Vec::new();
        for name in &config.produce.sinks {
            found.push(match name {
                SinkName::Kafka if is_new => ("kafka", None),
                _ => produce::peek(*name, config, &self.identity, Some(&world.stop)).await?,
            });
        }
        Ok(found)
    }

    /// What only the primary can make has to be there.
    fn refuse_writes_on_a_standby(&self) -> Result<()> {
        let writes = |step: &&Step| matches!(step, Step::Tables | Step::Publication { .. });
        match self.steps.iter().find(writes) {
            Some(step) if self.role != Role::Primary => Err(Error::refused(
                "server_role",
                format!("a standby, without {}", step.noun()),
                "tables and publication, made on the primary",
                match step {
                    Step::Publication { sql, .. } => format!("run on the primary: {sql};"),
                    _ => "run sql/01_tables.sql on the primary".to_owned(),
                },
            )),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.conninfo)?;
        self.present.iter().try_for_each(|p| writeln!(f, "  =  {p}"))?;
        self.steps.iter().try_for_each(|s| writeln!(f, "  +  {s}"))?;
        self.notes.iter().try_for_each(|n| writeln!(f, "note: {n}"))
    }
}

/// The configured tables and their lookup tables, each once.
fn configured(config: &Config) -> Vec<String> {
    let lookups = config.tables.iter().filter_map(|t| t.lookup.as_ref()).map(|l| &l.table);
    let mut names: Vec<String> = Vec::new();
    for name in config.tables.iter().map(|t| &t.name).chain(lookups) {
        if !names.contains(name) {
            names.push(name.clone());
        }
    }
    names
}

/// Postgres lets such a table be published, and then refuses what its writers do.
fn without_identity(table: &str) -> String {
    format!(
        "UPDATE and DELETE on {table} will fail once it is published: give it a primary key or REPLICA IDENTITY FULL"
    )
}

async fn topics(config: &Arc<Config>) -> Result<BTreeMap<String, usize>> {
    let config = config.clone();
    let read = move || kafka::topics(&config.kafka, kafka::TIMEOUT);
    tokio::task::spawn_blocking(read).await.map_err(|e| Error::fatal("reading the topics", e))?
}

fn no_failover(slot: &str) -> Error {
    let name = ident(slot);
    Error::refused(
        "failover_slot",
        format!("slot {name} is there, and is no failover slot"),
        "a failover slot, for --failover",
        format!(
            "stop falaj produce, then: psql \"dbname=… replication=database\" -c 'ALTER_REPLICATION_SLOT {name} (FAILOVER true)'"
        ),
    )
}
