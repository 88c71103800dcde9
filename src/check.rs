//! `falaj check`: every requirement of the configured roles, with what was found, what is needed, and the exact fix.
//!
//! Each requirement is a function that gives what it found, or the very refusal that the verbs give. Every server is tried
//! once, all of them at the same time, a few seconds at most.

pub(crate) mod kafka;
pub mod peers;
pub mod postgres;
pub mod role;

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use crate::config::{Config, SinkName};
use crate::error::{Error, Refusal, Result};
use crate::sink::kafka::require_room;
use crate::world::{World, print};

/// How long one server may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// One requirement, tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Short stable name, such as `wal_level`.
    pub check: &'static str,
    /// Whether it is met.
    pub ok: bool,
    /// What is there.
    pub found: String,
    /// What must be there.
    pub needed: String,
    /// The exact command or edit that mends it; advice where `ok`, empty where there is none.
    pub fix: String,
    /// Nobody answered: the requirement could not be tried.
    #[serde(skip)]
    unreachable: bool,
}

/// What a requirement that is met has found.
pub struct Found {
    text: String,
    advice: String,
}

impl Found {
    /// Met, with something to know about.
    fn with_advice(text: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { text: text.into(), advice: advice.into() }
    }
}

impl<T: Into<String>> From<T> for Found {
    fn from(text: T) -> Self {
        Self { text: text.into(), advice: String::new() }
    }
}

impl Finding {
    /// The outcome of a requirement. A refusal brings its own name and words.
    fn of<T: Into<Found>>(check: &'static str, needed: &str, outcome: Result<T>) -> Self {
        let (refusal, ok, unreachable) = match outcome.map(Into::into) {
            Ok(Found { text, advice }) => {
                (Refusal { check, found: text, needed: needed.to_owned(), fix: advice }, true, false)
            }
            Err(Error::Refused(refusal)) => (refusal, false, false),
            Err(error) => {
                let unreachable = error.is_transient();
                let fix =
                    if unreachable { "start it, or mend its address in the configuration" } else { "see the message" };
                let (found, needed, fix) = (error.to_string(), needed.to_owned(), fix.to_owned());
                (Refusal { check, found, needed, fix }, false, unreachable)
            }
        };
        let Refusal { check, found, needed, fix } = refusal;
        Self { check, ok, found, needed, fix, unreachable }
    }
}

/// Runs the verb.
///
/// # Errors
/// [`Error::Refused`] when something answered wrong, [`Error::Unreachable`] when the only failures are servers that do not
/// answer. Both after everything has been printed.
pub async fn run(world: &World, json: bool) -> Result<()> {
    let findings = findings(world).await;
    if json {
        let text = serde_json::to_string_pretty(&findings).map_err(|e| Error::fatal("writing JSON", e))?;
        print(&(text + "\n"))?;
    } else {
        print(&render(&findings))?;
    }
    verdict(&findings)
}

/// One attempt, a few seconds at most.
async fn within<T>(what: &str, attempt: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(PATIENCE, attempt).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Error::unreachable(what, format!("no answer within {PATIENCE:?}"))),
    }
}

/// Tries everything that the configured roles need.
pub async fn findings(world: &World) -> Vec<Finding> {
    let config = &world.config;
    let has = |sink| config.produce.sinks.contains(&sink);
    let (postgres, kafka, peers) = tokio::join!(
        postgres::findings(config),
        async { if has(SinkName::Kafka) { Some(kafka::probe(config).await) } else { None } },
        peers::findings(config),
    );
    let mut all = postgres.findings;
    match (config.sources(postgres.tables), kafka) {
        (Ok(tables), Some(probe)) => {
            all.extend(probe.into_findings(config, &tables));
            all.extend(room(config, &tables).await);
        }
        (Ok(_), None) => {}
        (Err(error), _) => all.push(Finding::of::<&str>("table_names", "one name a source of events", Err(error))),
    }
    all.extend(peers);
    all
}

/// Whether topics and broker take what a raised `message.max.bytes` allows.
async fn room(config: &Config, tables: &[String]) -> Option<Finding> {
    let topics: Vec<String> = tables.iter().map(|table| config.topic(table)).collect();
    let asked = within("Kafka", require_room(config, &topics)).await.transpose()?;
    let told = asked.map(|bytes| format!("every topic takes {bytes} bytes"));
    Some(Finding::of("kafka_too_large", "topics that take message.max.bytes", told))
}

fn verdict(findings: &[Finding]) -> Result<()> {
    let failed: Vec<&Finding> = findings.iter().filter(|f| !f.ok).collect();
    let names: Vec<_> = failed.iter().map(|f| f.check).collect();
    let counted = format!("{} of {} requirements not met: {}", failed.len(), findings.len(), names.join(", "));
    match failed.iter().all(|f| f.unreachable) {
        _ if failed.is_empty() => Ok(()),
        true => Err(Error::unreachable(names.join(", "), counted)),
        false => Err(Error::refused("check", counted, "all of them", "what is printed beside each")),
    }
}

/// One line a requirement; more only where there is something to do or to know.
fn render(findings: &[Finding]) -> String {
    let width = findings.iter().map(|f| f.check.len()).max().unwrap_or(0);
    let mut text = String::new();
    for f in findings {
        let mark = match (f.ok, f.fix.is_empty()) {
            (true, true) => "ok  ",
            (true, false) => "note",
            (false, _) => "FAIL",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{mark}  {:width$}  {}", f.check, f.found);
        if !f.ok {
            let _ = writeln!(text, "      {:width$}  needed: {}", "", f.needed);
        }
        if !f.fix.is_empty() {
            let _ = writeln!(text, "      {:width$}  {} {}", "", if f.ok { "→" } else { "fix:   " }, f.fix);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_has_exactly_five_fields() {
        let finding = Finding::of("wal_level", "logical", Ok("logical"));
        let json = serde_json::to_string(&[finding]).unwrap();
        assert_eq!(json, r#"[{"check":"wal_level","ok":true,"found":"logical","needed":"logical","fix":""}]"#);
    }

    #[test]
    fn the_exit_code_tells_wrong_from_unreachable() {
        let ok = || Finding::of("a", "x", Ok("x"));
        let away = || Finding::of::<&str>("b", "x", Err(Error::unreachable("B", "refused")));
        let wrong = || Finding::of::<&str>("c", "x", Err(Error::refused("d", "f", "n", "x")));
        assert!(verdict(&[ok()]).is_ok());
        assert_eq!(verdict(&[ok(), away()]).unwrap_err().exit_code(), 69);
        assert_eq!(verdict(&[away(), wrong()]).unwrap_err().exit_code(), 78);
        assert_eq!(wrong().check, "d");
    }

    #[test]
    fn details_stand_only_where_there_is_something_to_do() {
        let note = Finding::of("slot", "x", Ok(Found::with_advice("in use by pid 7", "a second produce waits")));
        let wrong = Finding::of::<&str>("c", "x", Err(Error::refused("long_name", "f", "n", "do it")));
        let text = render(&[Finding::of("wal_level", "logical", Ok("logical")), note, wrong]);
        assert_eq!(
            text,
            "ok    wal_level  logical\n\
             note  slot       in use by pid 7\n                 → a second produce waits\n\
             FAIL  long_name  f\n                 needed: n\n                 fix:    do it\n"
        );
    }
}
