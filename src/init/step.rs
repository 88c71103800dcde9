//! The steps of a plan, and how they are told.

use std::fmt;

use super::plan::TABLE_NAMES;
use crate::lsn::Lsn;

/// One change.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    Tables,
    Publication {
        name: String,
        tables: Vec<String>,
        sql: String,
    },
    Topic {
        name: String,
        partitions: i32,
        settings: &'static [(&'static str, &'static str)],
    },
    Slot {
        name: String,
        state: String,
        failover: bool,
    },
    /// Rows to be copied; with `Slot` before it, from that slot's snapshot.
    Snapshot {
        tables: Vec<String>,
    },
    Adopt {
        name: String,
        state: String,
        confirmed: Lsn,
        origin: Lsn,
    },
}

impl Step {
    pub(super) fn noun(&self) -> String {
        match self {
            Self::Tables => format!("tables {}", TABLE_NAMES.join(", ")),
            Self::Publication { name, .. } => format!("publication \"{name}\""),
            Self::Topic { name, .. } => format!("topic {name}"),
            Self::Slot { name, state, failover } => {
                let kind = if *failover { "failover slot" } else { "slot" };
                format!("{kind} \"{name}\", with the lookup rows in {state}")
            }
            Self::Snapshot { tables } => format!("a copy of the rows of {}", list(tables)),
            Self::Adopt { state, .. } => format!("lookup rows in {state}"),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tables => write!(f, "{} (sql/01_tables.sql)", self.noun()),
            Self::Publication { tables, .. } => write!(f, "{} for {}", self.noun(), list(tables)),
            Self::Topic { partitions, settings, .. } => {
                write!(f, "{}, {partitions} partition{}", self.noun(), if *partitions == 1 { "" } else { "s" })?;
                settings.iter().try_for_each(|setting| f.write_str(told(*setting)))
            }
            Self::Slot { .. } => write!(f, "{}, as of where it begins", self.noun()),
            Self::Snapshot { .. } => write!(f, "{}, as op r", self.noun()),
            Self::Adopt { name, state, confirmed, .. } => write!(
                f,
                "adopt slot \"{name}\" at {confirmed}: lookup rows of now in {state}; \
                 events from before now are enriched with the rows of now, not with those of their own time"
            ),
        }
    }
}

/// What a topic's setting means to who reads the plan; nothing where it only says how that is done.
fn told(setting: (&str, &str)) -> &'static str {
    match setting {
        ("cleanup.policy", "compact") => ", compacted",
        ("retention.ms", "-1") => ", kept for ever",
        _ => "",
    }
}

pub(super) fn list(names: &[String]) -> String {
    if names.is_empty() { "no table".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init::plan::{CHECKPOINT, DEAD_LETTERS};

    #[test]
    fn a_topic_is_told_with_what_becomes_of_its_records() {
        let told =
            |name: &str, partitions, settings| Step::Topic { name: name.to_owned(), partitions, settings }.to_string();
        assert_eq!(told("falaj.t", 3, &[]), "topic falaj.t, 3 partitions");
        assert_eq!(told("falaj.checkpoint", 1, CHECKPOINT), "topic falaj.checkpoint, 1 partition, compacted");
        assert_eq!(told("falaj.dead_letter", 1, DEAD_LETTERS), "topic falaj.dead_letter, 1 partition, kept for ever");
    }
}
