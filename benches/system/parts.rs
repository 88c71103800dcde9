//! Which parts of the bench are run: all of them, or those that `PARTS` names.

use anyhow::{Result, ensure};

/// Every part, in the order of a whole run.
const ALL: [&str; 8] = ["micro", "speed", "peers", "latency", "recovery", "board", "backfill", "growth"];

/// The chosen parts.
pub struct Parts(Vec<String>);

impl Parts {
    /// Reads `PARTS`, a comma list; unset or empty is all.
    pub fn from_env() -> Result<Self> {
        let text = std::env::var("PARTS").unwrap_or_default();
        let names: Vec<String> = text.split(',').map(str::trim).filter(|n| !n.is_empty()).map(str::to_owned).collect();
        let unknown = names.iter().find(|name| !ALL.contains(&name.as_str()));
        ensure!(unknown.is_none(), "PARTS={text}: there is no such part. Try: {}", ALL.join(","));
        Ok(Self(names))
    }

    /// Whether this part is to be run.
    pub fn has(&self, part: &str) -> bool {
        debug_assert!(ALL.contains(&part), "{part} is not in the list of parts");
        self.0.is_empty() || self.0.iter().any(|name| name == part)
    }
}
