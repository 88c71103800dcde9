//! What to look at next, as lines that work while the servers run.

use super::stage::Stage;
use super::warehouse::Warehouse;

/// The lines, with the demo's own addresses and names.
pub(super) fn text(stage: &Stage) -> String {
    let config = &stage.world.config;
    let (pipeline, archive) = (&config.pipeline, config.archive.dir.display());
    let mut text = format!(
        "\nLook around:\n\
         psql '{}' -c 'SELECT device, count(*) FROM engagement_events GROUP BY 1 ORDER BY 2 DESC'\n\
         redis-cli -u {} HGETALL '{{falaj:{pipeline}}}'\n\
         FALAJ_PIPELINE={pipeline} falaj board\n\
         kcat -b {} -C -e -q -X isolation.level=read_committed -t {} -c 3\n\
         python3 -c \"import glob, pyarrow.parquet as pq; print(pq.read_table(sorted(glob.glob('{archive}/*-*/engagement_events.parquet'))[-1]).slice(0, 3).to_pylist())\"   # pip install pyarrow",
        without_password(&config.postgres.url),
        without_password(&config.redis.url),
        config.kafka.servers(),
        config.topic("engagement_events"),
    );
    if let Ok(Some(warehouse)) = Warehouse::of(config) {
        text.push_str(&format!(
            "\ncurl -s {} -H 'content-type: application/json' -d '{{\"useLegacySql\":false,\"query\":\"SELECT title, SUM(engagement_seconds) AS seconds FROM {}.engagement_events GROUP BY 1 ORDER BY 2 DESC LIMIT 5\"}}'",
            warehouse.queries(),
            config.bigquery.dataset,
        ));
    }
    text
}

/// The address as it may stand on a screen.
fn without_password(url: &str) -> String {
    let secret = || {
        let (scheme, rest) = url.split_once("://")?;
        let (user, server) = rest.split_once('@')?;
        let (user, _) = user.split_once(':')?;
        Some(format!("{scheme}://{user}@{server}"))
    };
    secret().unwrap_or_else(|| url.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_not_shown() {
        assert_eq!(without_password("postgres://me:secret@h:1/d"), "postgres://me@h:1/d");
        assert_eq!(without_password("redis://h:1/0"), "redis://h:1/0");
    }
}
