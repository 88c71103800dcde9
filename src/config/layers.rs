//! One layer over another: file over defaults, environment over both.

use tracing::warn;

use super::refused;
use crate::error::Result;

/// The line is named, not shown: it may hold a password.
pub(super) fn parse_toml(text: &str, name: &str) -> Result<toml::Table> {
    text.parse().map_err(|e: toml::de::Error| {
        let line =
            text.get(..e.span().map_or(0, |span| span.start)).map_or(1, |before| before.matches('\n').count() + 1);
        refused(format!("{name}, line {line}: {}", e.message()), "valid TOML", "mend the line that is named")
    })
}

/// Sections merge key by key; `[[table]]` blocks of a file replace the default ones as a whole.
pub(super) fn overlay(base: &mut toml::Table, over: toml::Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Table(b)), toml::Value::Table(o)) => overlay(b, o),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

/// The first key whose type is not that of its default: serde would say the type, but not the key. Under `[kafka]` a
/// text may also be written as a number or boolean.
pub(super) fn mistyped(path: &str, defaults: &toml::Table, found: &toml::Table) -> Option<String> {
    found.iter().find_map(|(key, value)| {
        let default = defaults.get(key)?;
        let path = format!("{path}{key}");
        match (default, value) {
            (toml::Value::Table(default), toml::Value::Table(value)) => mistyped(&format!("{path}."), default, value),
            (toml::Value::String(_), value) if path.starts_with("kafka.") && !value.is_array() && !value.is_table() => {
                None
            }
            (default, value) if default.same_type(value) => None,
            (default, value) => Some(format!("{path} = {value}; its type is {}", default.type_str())),
        }
    })
}

/// `FALAJ_SECTION__KEY=value`, and `FALAJ_PIPELINE`. Other `FALAJ_…` names without `__` belong to the tooling.
pub(super) fn overlay_env(tree: &mut toml::Table, name: &str, value: &str) -> Result<()> {
    let Some(path) = name.strip_prefix("FALAJ_") else { return Ok(()) };
    if path == "PIPELINE" {
        tree.insert("pipeline".into(), value.into());
        return Ok(());
    }
    let Some((section, key)) = path.split_once("__") else {
        warn_of_single_underscore(tree, name, path);
        return Ok(());
    };
    let section = section.to_ascii_lowercase();
    let mut key = key.to_ascii_lowercase();
    let known = ["topic", "partitions", "replication_factor", "headers", "tombstones", "too_large", "envelope"];
    if section == "kafka" && !known.contains(&key.as_str()) {
        key = key.replace('_', ".");
    }
    let Some(toml::Value::Table(table)) = tree.get_mut(&section) else {
        return Err(refused(
            format!("environment variable {name}"),
            "FALAJ_SECTION__KEY with a section of config/falaj.toml",
            "unset it or mend its name",
        ));
    };
    let typed = typed_like(table.get(&key), value).ok_or_else(|| {
        refused(format!("{name}={value}"), "a value of the same type as in config/falaj.toml", "mend the value")
    })?;
    table.insert(key, typed);
    Ok(())
}

/// `FALAJ_POSTGRES_URL` looks right, and is not read. What the tooling has of that form is no key.
fn warn_of_single_underscore(tree: &toml::Table, name: &str, path: &str) {
    let Some((section, key)) = path.split_once('_') else { return };
    let known = tree.get(&section.to_ascii_lowercase()).is_some_and(toml::Value::is_table);
    if known && path != "KAFKA_JVM" {
        warn!("{name} is not read: write FALAJ_{section}__{key}");
    }
}

/// Environment values are text; the default that stands at the same key says which type is meant.
fn typed_like(default: Option<&toml::Value>, text: &str) -> Option<toml::Value> {
    Some(match default {
        Some(toml::Value::Integer(_)) => text.parse::<i64>().ok()?.into(),
        Some(toml::Value::Boolean(_)) => text.parse::<bool>().ok()?.into(),
        Some(toml::Value::Array(_)) => text
            .trim_matches(|c| c == '[' || c == ']')
            .split(',')
            .map(|s| s.trim().trim_matches('"').to_owned())
            .filter(|s| !s.is_empty())
            .collect::<Vec<_>>()
            .into(),
        _ => text.into(),
    })
}
