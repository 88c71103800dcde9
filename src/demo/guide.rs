//! What to look at next, as lines that work while the servers run.

use super::stage::Stage;
use super::warehouse::Warehouse;

/// The lines, with the demo's own addresses and names.
pub(super) fn text(stage: &Stage) -> String {
    let config = &stage.world.config;
    let (pipeline, archive) = (&config.pipeline, &config.archive.dir);
    let (postgres, redis) = (shown(&config.postgres.url), shown(&config.redis.url));
    let falaj = std::env::current_exe().map_or("falaj".into(), |path| path.display().to_string());
    // Any Python with pyarrow; `make demo` names the one that its BigQuery server runs under.
    let python = std::env::var("FALAJ_PYTHON").unwrap_or_else(|_| "python3".into());
    let events = archive.join("*-*").join("engagement_events.parquet");
    let mut text = format!(
        "\nLook around:\n\
         psql {postgres} -c 'SELECT device, count(*) FROM engagement_events GROUP BY 1 ORDER BY 2 DESC'\n\
         FALAJ_PIPELINE={pipeline} FALAJ_REDIS__URL={redis} {falaj} board\n\
         redis-cli -u {redis} HGETALL '{{falaj:{pipeline}}}'   # the Kafka offsets that the board stands at\n\
         {python} -c \"import glob, pyarrow.parquet as pq; print(pq.read_table(max(glob.glob('{}'))).slice(0, 3).to_pylist())\"",
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

/// The address as one word of the shell, without its password.
fn shown(url: &str) -> String {
    format!("'{}'", without_password(url).replace('\'', r"'\''"))
}

/// The address as it may stand on a screen.
fn without_password(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return pairs_without_password(url) };
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (user, server) = rest.rsplit_once('@').map_or((None, rest), |(user, server)| (Some(user), server));
    let user = user.map(|user| user.split(':').next().unwrap_or_default());
    let at = user.map_or_else(|| server.to_owned(), |user| format!("{user}@{server}"));
    let query: Vec<_> = query.split('&').filter(|pair| !pair.is_empty() && !pair.starts_with("password")).collect();
    let query = if query.is_empty() { String::new() } else { format!("?{}", query.join("&")) };
    format!("{scheme}://{at}{query}")
}

/// The `key = value` pairs of a connection string, but the password's. Values stay as they are written: quoted ones may hold
/// blanks (libpq, "Keyword/Value Connection Strings").
fn pairs_without_password(text: &str) -> String {
    let mut pairs = Vec::new();
    let mut rest = text;
    while let Some((key, value)) = rest.split_once('=') {
        let (key, value) = (key.trim(), value.trim_start());
        let end = value_end(value);
        if key != "password" {
            pairs.push(format!("{key}={}", &value[..end]));
        }
        rest = &value[end..];
    }
    pairs.join(" ")
}

/// Where a value ends, in bytes: before a blank, or behind its closing quote. A backslash takes the next character with it.
fn value_end(value: &str) -> usize {
    let quoted = value.starts_with('\'');
    let mut chars = value.char_indices().skip(usize::from(quoted));
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => {
                chars.next();
            }
            '\'' if quoted => return at + 1,
            c if !quoted && c.is_whitespace() => return at,
            _ => {}
        }
    }
    value.len()
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
    }

    #[test]
    fn a_quoted_password_is_one_value() {
        for (url, shown) in [
            ("host=h password=x user=me", "host=h user=me"),
            ("password='a b' host=h", "host=h"),
            (r"host=h password='a \' b=c' user=me", "host=h user=me"),
            (r"host=h password=a\ b user=me", "host=h user=me"),
            ("host = h password = 'a b'user=me", "host=h user=me"),
            ("application_name='a b' passfile=/p password=x", "application_name='a b' passfile=/p"),
            ("password=x", ""),
        ] {
            assert_eq!(without_password(url), shown, "{url}");
        }
    }

    #[test]
    fn an_address_is_one_word_of_the_shell() {
        assert_eq!(shown("host=h password=x"), "'host=h'");
        assert_eq!(shown("options='a b'"), r"'options='\''a b'\'''");
    }
}
