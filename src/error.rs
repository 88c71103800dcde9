//! What can go wrong, sorted by what the caller does about it.

use std::fmt;

/// An answer that says no: what was found, what is needed, and how to get there.
///
/// The same text is printed by the verb that refuses and by `falaj check`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Short stable name of the requirement, such as `wal_level`.
    pub check: &'static str,
    /// What is there.
    pub found: String,
    /// What must be there.
    pub needed: String,
    /// The exact command or edit that mends it.
    pub fix: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { check, found, needed, fix } = self;
        write!(f, "{check}\n  found:  {found}\n  needed: {needed}\n  fix:    {fix}")
    }
}

/// Every error that leaves a module of falaj.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The command line is wrong. Exit 2.
    #[error("{0}")]
    Usage(String),
    /// Something answered, and the answer is no: configuration, rights, password, position. Exit 78.
    #[error("{0}")]
    Refused(Refusal),
    /// A peer does not answer. At the start: retried for 30 s, then exit 69; later: retried for ever.
    #[error("{what} cannot be reached: {why}")]
    Unreachable {
        /// The peer, with its address.
        what: String,
        /// The client library's reason.
        why: String,
    },
    /// Another owner has taken over; this process must not write any more. Exit 1.
    #[error("fenced: {0}")]
    Fenced(String),
    /// Anything else that cannot be retried. Exit 1.
    #[error("{0}")]
    Fatal(String),
}

/// `Result` with falaj's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A refusal from its four parts.
    pub fn refused(
        check: &'static str,
        found: impl Into<String>,
        needed: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self::Refused(Refusal { check, found: found.into(), needed: needed.into(), fix: fix.into() })
    }

    /// A peer that does not answer.
    pub fn unreachable(what: impl Into<String>, why: impl fmt::Display) -> Self {
        Self::Unreachable { what: what.into(), why: why.to_string() }
    }

    /// A failure of the local machine or of an invariant, with what was being done.
    pub fn fatal(doing: impl fmt::Display, why: impl fmt::Display) -> Self {
        Self::Fatal(format!("{doing}: {why}"))
    }

    /// The process's exit code for this error (sysexits: 69 unavailable, 78 configuration).
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Refused(_) => 78,
            Self::Unreachable { .. } => 69,
            Self::Fenced(_) | Self::Fatal(_) => 1,
        }
    }

    /// Whether trying again later, with everything as it is, can succeed.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }
}
