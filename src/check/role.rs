//! What the server is: a primary, or a standby that can decode; and whether its slots survive it.

use tokio_postgres::Client;

use super::Found;
use super::postgres::{at_least, setting};
use crate::error::{Error, Result};
use crate::source::slot;

/// `server_version_num` from which a standby can decode.
const STANDBY_VERSION: i64 = 160_000;
/// … and from which slots are copied to standbys.
const FAILOVER_VERSION: i64 = 170_000;

/// What the server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It takes writes.
    Primary,
    /// It follows one.
    Standby {
        /// `hot_standby_feedback`: without it the primary removes what the slot needs.
        feedback: bool,
    },
}

/// Whether the server is a primary or a standby that can decode.
///
/// # Errors
/// [`Error::Refused`] for a standby before Postgres 16; [`Error::Unreachable`] when the connection is lost.
pub async fn server_role(client: &Client) -> Result<Role> {
    if !slot::is_standby(client).await? {
        return Ok(Role::Primary);
    }
    if at_least(client, STANDBY_VERSION).await? {
        let feedback = setting(client, "hot_standby_feedback").await? == "on";
        return Ok(Role::Standby { feedback });
    }
    Err(Error::refused(
        "server_role",
        format!("a standby of Postgres {}", setting(client, "server_version").await?),
        "the primary, or a standby of Postgres 16 or later: before, a standby cannot decode",
        "name the primary in postgres.url",
    ))
}

pub(super) fn found(role: Role) -> Found {
    match role {
        Role::Primary => "primary".into(),
        Role::Standby { feedback: true } => "standby, with hot_standby_feedback".into(),
        Role::Standby { feedback: false } => Found::with_advice(
            "standby, without hot_standby_feedback",
            "the primary's next VACUUM can invalidate the slot, and changes are lost: ALTER SYSTEM SET hot_standby_feedback = \
             on; on the standby, and let it stream through a physical slot (primary_slot_name)",
        ),
    }
}

/// Refuses where no failover slot can be made.
///
/// # Errors
/// [`Error::Refused`] before Postgres 17, and on a standby.
pub async fn failover(client: &Client, role: Role) -> Result<()> {
    let refuse = |found: String, fix: &str| {
        Err(Error::refused("failover_slot", found, "the primary of a Postgres 17 or later, for --failover", fix))
    };
    if role != Role::Primary {
        return refuse("a standby".into(), "name the primary in postgres.url, or leave --failover out");
    }
    match at_least(client, FAILOVER_VERSION).await? {
        true => Ok(()),
        false => {
            let version = setting(client, "server_version").await?;
            refuse(format!("Postgres {version}"), "leave --failover out, or upgrade the server")
        }
    }
}

/// A failover slot. Without `synchronized_standby_slots` falaj may be ahead of the standby that takes over.
pub(super) async fn failover_found(client: &Client, slot: Found) -> Result<Found> {
    let Found { text, advice } = slot;
    let text = format!("{text}; failover slot");
    if advice.is_empty() && setting(client, "synchronized_standby_slots").await?.is_empty() {
        return Ok(Found::with_advice(
            text,
            "falaj can be ahead of a standby that takes over: name the standbys' physical slots in synchronized_standby_slots",
        ));
    }
    Ok(Found::with_advice(text, advice))
}
