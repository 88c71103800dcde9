//! A table in BigQuery: found, made where it never was, and held to what the stream brings.

use gcp_bigquery_client::model::clustering::Clustering;
use gcp_bigquery_client::model::table::Table;
use gcp_bigquery_client::model::table_field_schema::TableFieldSchema;
use gcp_bigquery_client::model::table_reference::TableReference;
use gcp_bigquery_client::model::table_schema::TableSchema;
use gcp_bigquery_client::model::time_partitioning::TimePartitioning;
use gcp_bigquery_client::model::view_definition::ViewDefinition;
use tracing::{info, warn};

use super::bigquery::{Answer, BigQuery};
use super::chain::{self, Chain, Link};
use super::columns::{self, Clash};
use super::copy::Part;
use super::files::Source;
use super::media::CHECK;
use super::record::{Turn, hash};
use super::table::TableLoad;
use super::{LIST_EVERY, history};
use crate::error::{Error, Result};
use crate::world::backoff;

/// How often the creation of a table or view is tried.
const CREATIONS: u32 = 3;
/// Label of a table: whose positions its rows have.
const LABEL_OWNER: &str = "falaj_owner";
/// Label of a view: hash of the query that falaj gave it.
const LABEL_VIEW: &str = "falaj_view";

impl TableLoad<'_> {
    /// Makes the table where it never was. The columns of a job: those of the file, then those that only the table has.
    pub(super) async fn ensure_table(
        &self,
        chain: &Chain<'_>,
        turn: &Turn,
        source: &Source,
    ) -> Result<Vec<TableFieldSchema>> {
        let refused = |why: String, fix: String| {
            Error::refused(
                "bigquery_table",
                format!("table {:?} ({}): {why}", self.table, source.path.display()),
                "columns that BigQuery can hold, of the types that its table has",
                fix,
            )
        };
        if self.copy.is_none() && chain::owner(&source.origin, self.table) != chain.owner {
            return Err(mixed(source));
        }
        let mend = "mend the column in Postgres or in BigQuery, or load into another data set (bigquery.dataset)";
        let wanted = columns::fields(source.schema()).map_err(|why| refused(why, mend.to_owned()))?;
        let new = self.new_table(chain, source, &wanted);
        let found = match self.find_table(chain).await? {
            Some(table) => table,
            None => self.make_table(chain, turn, &new).await?,
        };
        check_owner(chain, &found)?;
        let BigQuery { project, dataset, .. } = self.service;
        let name = format!("{project}.{dataset}.{}", chain.table_id);
        let clustered = found.clustering.and_then(|c| c.fields).unwrap_or_default();
        let known = self.relax(&name, source, found.schema.fields.unwrap_or_default()).await?;
        let united = columns::unite(wanted, known, &name, &clustered);
        united.map_err(|Clash { found, sql, anew }| {
            let sql = match anew {
                true => format!("{sql} {} (the table is clustered by the column)", columns::create_sql(&new)),
                false => sql,
            };
            let then = "Then this table's loads go on by themselves with the rows that wait";
            refused(found, format!("run in BigQuery: {sql} {then}"))
        })
    }

    async fn find_table(&self, chain: &Chain<'_>) -> Result<Option<Table>> {
        match self.world.for_ever(CHECK, || self.service.table(&chain.table_id)).await? {
            Answer::Is(table) => Ok(Some(table)),
            Answer::Absent | Answer::Exists => Ok(None),
        }
    }

    /// Makes the table, unless rows were loaded into it before: then somebody has dropped it, and a new one would lack them.
    async fn make_table(&self, chain: &Chain<'_>, turn: &Turn, new: &Table) -> Result<Table> {
        let Some(loaded) = self.loaded_before(chain, turn).await? else {
            self.create(new).await?;
            return Ok(new.clone());
        };
        // Another process may have made and filled it since it was looked for.
        match self.find_table(chain).await? {
            Some(table) => Ok(table),
            None => Err(self.gone(turn, new, &loaded)),
        }
    }

    /// What was loaded into the table before, by the records or by the service's jobs.
    async fn loaded_before(&self, chain: &Chain<'_>, turn: &Turn) -> Result<Option<String>> {
        let (record, nothing) = (turn.read(), self.copy.and_then(Part::before));
        // Those of another stream do not count.
        if record.as_ref().is_none_or(|record| record.owner == chain.owner) {
            if let Some(loaded) = record.and_then(|record| record.loaded).filter(|loaded| Some(*loaded) > nothing) {
                return Ok(Some(format!("rows up to {loaded}, by {}", turn.record().display())));
            }
            if turn.read_history().is_some_and(|history| !history.is_empty()) {
                return Ok(Some(format!("rows of backfills, by {}", turn.history().display())));
            }
        }
        // Without the records the first job of each kind tells, for as long as the service remembers it.
        let mut links = vec![chain.look(nothing, 0).await?];
        if let Some((batch, file)) = self.history.first() {
            let name = history::name(batch, file);
            links.push(chain.look_for_history(&name, batch.first, batch.last, 0).await?);
        }
        Ok(links.into_iter().find_map(|link| match link {
            Link::Followed(job) => Some(format!("rows up to {}, by job {}", job.to, job.id)),
            Link::Free(_) => None,
        }))
    }

    fn gone(&self, turn: &Turn, new: &Table, loaded: &str) -> Error {
        let TableReference { project_id, dataset_id, table_id } = &new.table_reference;
        let fix = match self.copy {
            Some(_) => "run the same replay again: it begins anew".to_owned(),
            None => format!(
                "bring it back as it was between its last load and the moment when it was dropped (T in milliseconds since \
                 1970): bq cp '{project_id}:{dataset_id}.{table_id}@T' '{project_id}:{dataset_id}.{table_id}' – or load what \
                 the archive has into another one: falaj replay --from LSN --sink bigquery --table NAME – or, where the whole \
                 service is a new one, have everything loaded: {} – or go on without the earlier rows: {}",
                turn.removal(),
                columns::create_sql(new),
            ),
        };
        Error::refused(
            "bigquery_table",
            format!("there is no table {project_id}.{dataset_id}.{table_id}, but it was loaded before ({loaded})"),
            "the table with these rows: one that is made anew would lack them",
            fix,
        )
    }

    /// Lets the table (`project.dataset.table`) hold NULL where the stream may bring it.
    async fn relax(
        &self,
        table: &str,
        source: &Source,
        mut known: Vec<TableFieldSchema>,
    ) -> Result<Vec<TableFieldSchema>> {
        for name in columns::too_strict(source.schema(), &known) {
            self.world.for_ever(CHECK, || self.service.drop_not_null(table, &name)).await?;
            info!(table, column = name, "no longer required: the stream may bring NULL");
            known.iter_mut().filter(|f| f.name == name).for_each(|f| f.mode = Some("NULLABLE".into()));
        }
        Ok(known)
    }

    fn new_table(&self, chain: &Chain<'_>, source: &Source, fields: &[TableFieldSchema]) -> Table {
        let schema = TableSchema::new(fields.to_vec());
        let table = Table::new(&self.service.project, &self.service.dataset, &chain.table_id, schema)
            .time_partitioning(TimePartitioning::per_day().field("_commit_ts"))
            .label(LABEL_OWNER, &chain::short_owner(&chain.owner));
        let key = source.record_key.clone().map_or_else(|| source.primary_key.clone(), |key| vec![key]);
        let cluster = columns::clustering(&key, source.schema(), fields);
        if cluster.is_empty() { table } else { table.clustering(Clustering { fields: Some(cluster) }) }
    }

    /// A view that falaj has made follows the table's columns; one without its label is left as it is.
    pub(super) async fn ensure_view(
        &self,
        chain: &Chain<'_>,
        key: &[(String, String)],
        fields: &[TableFieldSchema],
    ) -> Result<()> {
        let id = columns::view_id(&chain.table_id);
        if key.is_empty() {
            return Ok(());
        }
        let BigQuery { project, dataset, .. } = self.service;
        let query = columns::view_query(&format!("{project}.{dataset}.{}", chain.table_id), key, fields);
        let version = chain::short_owner(&hash(&query));
        let definition = ViewDefinition { query: query.clone(), use_legacy_sql: Some(false), ..Default::default() };
        let view =
            Table::new(project, dataset, &id, TableSchema::default()).label(LABEL_VIEW, &version).view(definition);
        let made = match self.world.for_ever(CHECK, || self.service.table(&id)).await? {
            Answer::Absent | Answer::Exists => self.create(&view).await,
            Answer::Is(found) => match found.labels.as_ref().and_then(|labels| labels.get(LABEL_VIEW)) {
                Some(old) if *old != version => {
                    self.world.for_ever(CHECK, || self.service.replace_view(&id, &query, (LABEL_VIEW, &version))).await
                }
                _ => Ok(()),
            },
        };
        // A key of a type that cannot be compared leaves the table without a view, not without its rows.
        made.unwrap_or_else(|error| warn!("view {id}: {error}"));
        Ok(())
    }

    /// Several tables are made at once, and a clash of two changes of one data set is answered as if it were for good.
    async fn create(&self, table: &Table) -> Result<()> {
        let mut delays = backoff();
        for _ in 1..CREATIONS {
            match self.world.for_ever(CHECK, || self.service.create_table(table.clone())).await {
                Err(Error::Fatal(why)) => warn!("trying again: {why}"),
                outcome => return outcome,
            }
            self.world.pause(delays.next().unwrap_or(LIST_EVERY)).await?;
        }
        self.service.create_table(table.clone()).await
    }
}

fn check_owner(chain: &Chain<'_>, table: &Table) -> Result<()> {
    let ours = chain::short_owner(&chain.owner);
    match label(table) {
        Some(other) if *other != ours => Err(Error::refused(
            "bigquery_table_owner",
            format!("table {} holds the rows of another stream ({LABEL_OWNER}={other})", chain.table_id),
            format!(
                "a table of its own for {} ({LABEL_OWNER}={ours}): positions of two streams cannot be compared",
                chain.name
            ),
            "load into another data set (bigquery.dataset)",
        )),
        _ => Ok(()),
    }
}

/// Whose positions a table's rows have.
pub(super) fn label(table: &Table) -> Option<&String> {
    table.labels.as_ref().and_then(|labels| labels.get(LABEL_OWNER))
}

fn mixed(source: &Source) -> Error {
    Error::refused(
        "archive_identity",
        format!("{} is of pipeline {:?}, {}", source.path.display(), source.origin.pipeline, source.origin.slot),
        "one archive directory a pipeline and slot",
        "move the files of the other one to a directory of their own",
    )
}
