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
                if settings.is_empty() { Ok(()) } else { write!(f, ", compacted") }
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

pub(super) fn list(names: &[String]) -> String {
    if names.is_empty() { "no table".to_owned() } else { names.join(", ") }
}
