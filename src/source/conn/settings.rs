//! Connection settings as libpq gathers them: connection string > service file > PG* variables.
//!
//! An empty value counts as absent. Values of the connection string never stand in an error: a password with a bare `@`
//! would show up in the wrong place.

use std::collections::BTreeMap;
use std::path::PathBuf;

use percent_encoding::percent_decode_str;

use super::{Env, bad};
use crate::error::{Error, Result};

/// Settings by their libpq name.
#[derive(Default)]
pub(super) struct Settings(BTreeMap<&'static str, String>);

/// What falaj does with a key.
enum Use {
    /// It counts.
    Kept,
    /// It has no meaning here.
    Ignored,
    /// Only these values can be honoured; another one is refused, because ignoring it could lower security.
    Only(&'static [&'static str]),
}

use Use::{Ignored, Kept, Only};

/// libpq's keys (libpq-connect, "Parameter Key Words") with their variables.
const KEYS: &[(&str, &str, Use)] = &[
    ("service", "PGSERVICE", Kept),
    ("host", "PGHOST", Kept),
    ("hostaddr", "PGHOSTADDR", Kept),
    ("port", "PGPORT", Kept),
    ("dbname", "PGDATABASE", Kept),
    ("user", "PGUSER", Kept),
    ("password", "PGPASSWORD", Kept),
    ("passfile", "PGPASSFILE", Kept),
    ("connect_timeout", "PGCONNECT_TIMEOUT", Kept),
    ("options", "PGOPTIONS", Kept),
    ("application_name", "PGAPPNAME", Kept),
    ("fallback_application_name", "", Kept),
    ("sslmode", "PGSSLMODE", Kept),
    ("sslrootcert", "PGSSLROOTCERT", Kept),
    ("sslcert", "PGSSLCERT", Kept),
    ("sslkey", "PGSSLKEY", Kept),
    ("sslsni", "PGSSLSNI", Kept),
    ("keepalives", "", Kept),
    ("keepalives_idle", "", Kept),
    ("keepalives_interval", "", Kept),
    ("keepalives_count", "", Kept),
    ("tcp_user_timeout", "", Kept),
    ("client_encoding", "PGCLIENTENCODING", Ignored),
    ("krbsrvname", "PGKRBSRVNAME", Ignored),
    ("gsslib", "PGGSSLIB", Ignored),
    ("gssdelegation", "PGGSSDELEGATION", Ignored),
    ("target_session_attrs", "PGTARGETSESSIONATTRS", Only(&["any"])),
    ("load_balance_hosts", "PGLOADBALANCEHOSTS", Only(&["disable"])),
    ("channel_binding", "PGCHANNELBINDING", Only(&["disable", "prefer"])),
    ("gssencmode", "PGGSSENCMODE", Only(&["disable", "prefer"])),
    ("sslnegotiation", "PGSSLNEGOTIATION", Only(&["postgres"])),
    ("sslcertmode", "PGSSLCERTMODE", Only(&["allow"])),
    ("sslcompression", "PGSSLCOMPRESSION", Only(&["0"])),
    ("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION", Only(&["TLSv1", "TLSv1.1", "TLSv1.2"])),
    ("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION", Only(&["TLSv1.3"])),
    ("sslcrl", "PGSSLCRL", Only(&[])),
    ("sslcrldir", "PGSSLCRLDIR", Only(&[])),
    ("sslpassword", "", Only(&[])),
    ("requirepeer", "PGREQUIREPEER", Only(&[])),
    ("require_auth", "PGREQUIREAUTH", Only(&[])),
    ("replication", "", Only(&[])),
];

impl Settings {
    /// Reads the connection string, then the service file, then the variables.
    pub(super) fn gather(url: &str, env: Env<'_>) -> Result<Self> {
        let mut settings = Self::default();
        for (key, value) in parse(url)? {
            settings.put(&key, value, "[postgres].url")?;
        }
        settings.fill_from_service(env)?;
        for (key, variable, _) in KEYS.iter().filter(|(_, variable, _)| !variable.is_empty()) {
            if let Some(value) = env(variable) {
                settings.fill(key, value, variable)?;
            }
        }
        Ok(settings)
    }

    /// A setting that is there and not empty.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// Comma-separated settings (hosts, ports); none when absent.
    pub(super) fn list(&self, key: &str) -> Vec<&str> {
        self.get(key).map(|s| s.split(',').map(str::trim).collect()).unwrap_or_default()
    }

    /// A number.
    pub(super) fn number(&self, key: &str) -> Result<Option<u64>> {
        // libpq takes a negative number of seconds as 0: the default or no limit.
        let parse = |s: &str| s.trim().parse::<i64>().map(|n| n.max(0).unsigned_abs());
        self.get(key).map(parse).transpose().map_err(|_| {
            bad(format!("the connection setting {key} is not a number"), "a whole number", "mend it".to_owned())
        })
    }

    fn put(&mut self, key: &str, value: String, place: &str) -> Result<()> {
        let Some((key, _, used)) = KEYS.iter().find(|(known, _, _)| *known == key) else {
            return Err(bad(
                format!("{place}: the connection setting {key:?} is not known"),
                "a parameter key word of libpq; a `@`, `:`, `/`, `?` or `&` within a password percent-encoded",
                "mend [postgres].url (or the service file)",
            ));
        };
        if value.is_empty() {
            return Ok(());
        }
        match used {
            Kept => {
                self.0.insert(key, value);
                Ok(())
            }
            Ignored => Ok(()),
            Only(values) if values.contains(&value.as_str()) => Ok(()),
            Only([]) => {
                Err(bad(format!("{place}: {key} is set"), "no such setting: falaj cannot honour it", "remove it"))
            }
            Only(values) => Err(bad(
                format!("{place}: {key} = {value:?}"),
                &format!("{}: falaj cannot honour another value", values.join(" or ")),
                "change or remove it",
            )),
        }
    }

    fn fill(&mut self, key: &str, value: String, place: &str) -> Result<()> {
        if self.0.contains_key(key) { Ok(()) } else { self.put(key, value, place) }
    }

    fn fill_from_service(&mut self, env: Env<'_>) -> Result<()> {
        let Some(service) = self.get("service").map(str::to_owned).or_else(|| env("PGSERVICE")) else {
            return Ok(());
        };
        if service.is_empty() {
            return Ok(());
        }
        let files = service_files(env);
        for path in &files {
            let Ok(text) = std::fs::read_to_string(path) else { continue };
            if let Some(entries) = service_section(&text, &service) {
                let place = format!("service {service} in {}", path.display());
                for (key, value) in entries {
                    self.fill(key, value.to_owned(), &place)?;
                }
                return Ok(());
            }
        }
        let looked: Vec<_> = files.iter().map(|p| p.display().to_string()).collect();
        Err(bad(
            format!("the service {service:?} is in none of: {}", looked.join(", ")),
            "a readable service file with that section",
            format!("add [{service}] to one of them, or set PGSERVICEFILE"),
        ))
    }
}

fn service_files(env: Env<'_>) -> Vec<PathBuf> {
    let own = env("PGSERVICEFILE").filter(|s| !s.is_empty()).map(PathBuf::from);
    let own = own.or_else(|| env("HOME").map(|home| PathBuf::from(home).join(".pg_service.conf")));
    let system = env("PGSYSCONFDIR").unwrap_or_else(|| "/etc/postgresql-common".into());
    own.into_iter().chain([PathBuf::from(system).join("pg_service.conf")]).collect()
}

/// The `key=value` lines below `[name]`; `None` without such a section.
fn service_section<'a>(text: &'a str, name: &str) -> Option<Vec<(&'a str, &'a str)>> {
    let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
    lines.find(|l| l.strip_prefix('[').and_then(|l| l.strip_suffix(']')) == Some(name))?;
    Some(lines.take_while(|l| !l.starts_with('[')).filter_map(|l| l.split_once('=')).map(trimmed).collect())
}

fn trimmed<'a>((key, value): (&'a str, &'a str)) -> (&'a str, &'a str) {
    (key.trim(), value.trim())
}

fn parse(url: &str) -> Result<Vec<(String, String)>> {
    let url = url.trim();
    match url.strip_prefix("postgres://").or_else(|| url.strip_prefix("postgresql://")) {
        Some(rest) => parse_uri(rest),
        None if url.contains("://") => Err(malformed("a scheme that is not postgres://")),
        None => parse_pairs(url),
    }
}

/// `[user[:password]@][host[:port],…][/dbname][?key=value&…]`, each part percent-encoded.
fn parse_uri(rest: &str) -> Result<Vec<(String, String)>> {
    let mut pairs = Vec::new();
    let mut add = |key: &str, raw: &str| -> Result<()> {
        pairs.push((key.to_owned(), decode(raw)?));
        Ok(())
    };
    let authority_end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (mut authority, tail) = rest.split_at(authority_end);
    if let Some((credentials, hosts)) = authority.split_once('@') {
        let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
        add("user", user)?;
        add("password", password)?;
        authority = hosts;
    }
    let (hosts, ports) = split_hosts(authority)?;
    add("host", &hosts.join(","))?;
    add("port", &if ports.iter().all(|p| p.is_empty()) { String::new() } else { ports.join(",") })?;
    let (path, query) = tail.split_once('?').unwrap_or((tail, ""));
    if authority.contains('@') || path.contains('@') {
        return Err(malformed("a bare `@` within a part"));
    }
    add("dbname", path.strip_prefix('/').unwrap_or(path))?;
    for pair in query.split('&').filter(|p| !p.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or_else(|| malformed("a query part without `=`"))?;
        match (decode(key)?.as_str(), value) {
            // libpq keeps this one for JDBC's sake.
            ("ssl", "true") => add("sslmode", "require")?,
            (key, value) => add(key, value)?,
        }
    }
    Ok(pairs)
}

/// `host:port,[v6]:port` → hosts and ports, both still percent-encoded.
fn split_hosts(authority: &str) -> Result<(Vec<&str>, Vec<&str>)> {
    let mut hosts = Vec::new();
    let mut ports = Vec::new();
    for part in authority.split(',') {
        let (host, port) = match part.strip_prefix('[') {
            Some(v6) => {
                let (host, rest) = v6.split_once(']').ok_or_else(|| malformed("a `[` without `]` in the host"))?;
                let port = rest.strip_prefix(':').or(Some("").filter(|_| rest.is_empty()));
                (host, port.ok_or_else(|| malformed("text between `]` and the port"))?)
            }
            None => part.split_once(':').unwrap_or((part, "")),
        };
        hosts.push(host);
        ports.push(port);
    }
    Ok((hosts, ports))
}

fn decode(raw: &str) -> Result<String> {
    let bytes = raw.as_bytes();
    let whole = |at: usize| bytes.get(at + 1..at + 3).is_some_and(|h| h.iter().all(u8::is_ascii_hexdigit));
    if (0..bytes.len()).any(|at| bytes[at] == b'%' && !whole(at)) || raw.contains("%00") {
        return Err(malformed("a `%` without two hexadecimal digits behind it, or %00"));
    }
    Ok(percent_decode_str(raw).decode_utf8().map_err(|_| malformed("percent-encoding that is not UTF-8"))?.into())
}

/// `key = value key='quoted \' value' …`
fn parse_pairs(text: &str) -> Result<Vec<(String, String)>> {
    let mut pairs = Vec::new();
    let mut chars = text.chars().peekable();
    loop {
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if chars.peek().is_none() {
            return Ok(pairs);
        }
        let mut key = String::new();
        while let Some(c) = chars.next_if(|&c| c != '=' && !c.is_whitespace()) {
            key.push(c);
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if chars.next() != Some('=') {
            return Err(malformed("a word without `=` behind it"));
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        pairs.push((key, pair_value(&mut chars)?));
    }
}

fn pair_value(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Result<String> {
    let quoted = chars.next_if_eq(&'\'').is_some();
    let mut value = String::new();
    loop {
        match chars.next() {
            None if quoted => return Err(malformed("a quote that is not closed")),
            None => return Ok(value),
            Some('\'') if quoted => return Ok(value),
            Some('\\') => value.extend(chars.next()),
            Some(c) if !quoted && c.is_whitespace() => return Ok(value),
            Some(c) => value.push(c),
        }
    }
}

fn malformed(what: &str) -> Error {
    bad(
        format!("the connection string has {what}"),
        "postgres://user:password@host:port/dbname?key=value, or key=value pairs",
        "mend [postgres].url; `@`, `:`, `/`, `?`, `%` and `&` within a part are written %40, %3A, %2F, %3F, %25, %26",
    )
}
