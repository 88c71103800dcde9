//! What to look at next, as lines that work while the servers run.

use super::stage::Stage;
use super::warehouse::Warehouse;

/// The lines, with the demo's own addresses and names.
pub(super) fn text(stage: &Stage) -> String {
    let config = &stage.world.config;
    let (pipeline, redis, archive) = (&config.pipeline, without_password(&config.redis.url), &config.archive.dir);
    let falaj = std::env::current_exe().map_or("falaj".into(), |path| path.display().to_string());
    // Any Python with pyarrow; `make demo` names the one that its BigQuery server runs under.
    let python = std::env::var("FALAJ_PYTHON").unwrap_or_else(|_| "python3".into());
    let events = archive.join("*-*").join("engagement_events.parquet");
    let mut text = format!(
        "\nLook around:\n\
         psql '{}' -c 'SELECT device, count(*) FROM engagement_events GROUP BY 1 ORDER BY 2 DESC'\n\
         FALAJ_PIPELINE={pipeline} FALAJ_REDIS__URL='{redis}' {falaj} board\n\
         redis-cli -u '{redis}' HGETALL '{{falaj:{pipeline}}}'   # the Kafka offsets that the board stands at\n\
         {python} -c \"import glob, pyarrow.parquet as pq; print(pq.read_table(max(glob.glob('{}'))).slice(0, 3).to_pylist())\"",
        without_password(&config.postgres.url),
        events.display(),
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
    let Some((scheme, rest)) = url.split_once("://") else {
        let shown: Vec<_> = url.split_whitespace().filter(|pair| !pair.starts_with("password")).collect();
        return shown.join(" ");
    };
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (user, server) = rest.rsplit_once('@').map_or((None, rest), |(user, server)| (Some(user), server));
    let user = user.map(|user| user.split(':').next().unwrap_or_default());
    let at = user.map_or_else(|| server.to_owned(), |user| format!("{user}@{server}"));
    let query: Vec<_> = query.split('&').filter(|pair| !pair.is_empty() && !pair.starts_with("password")).collect();
    let query = if query.is_empty() { String::new() } else { format!("?{}", query.join("&")) };
    format!("{scheme}://{at}{query}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_not_shown() {
        assert_eq!(without_password("postgres://me:secret@h:1/d"), "postgres://me@h:1/d");
        assert_eq!(without_password("redis://h:1/0"), "redis://h:1/0");
        assert_eq!(
            without_password("postgres://me@h/d?sslmode=disable&password=x"),
            "postgres://me@h/d?sslmode=disable"
        );
        assert_eq!(without_password("host=h password=x user=me"), "host=h user=me");
    }
}
