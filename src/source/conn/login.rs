//! What a session is started with, and what the server's answers mean.

use crate::error::Error;
use crate::source::wire::ident;

/// What a session's start needs to know.
pub(in crate::source) struct Login<'a> {
    pub user: &'a str,
    pub dbname: &'a str,
    pub password: Option<&'a str>,
    pub application_name: &'a str,
    /// Command-line options of the session: the user's, then ours.
    pub options: String,
    /// The server, for messages.
    pub what: String,
}

impl Login<'_> {
    /// The error for a session that tokio-postgres could not start.
    pub(super) fn start_error(&self, e: &tokio_postgres::Error) -> Error {
        if let Some(db) = e.as_db_error() {
            return match db.code().code() {
                // Replication is not asked for here: this is about CONNECT.
                "42501" => self.no_connect(db.message()),
                code => self.refusal(code, db.message()),
            };
        }
        match std::error::Error::source(e).and_then(|s| s.downcast_ref::<std::io::Error>()) {
            Some(io) if io.kind() != std::io::ErrorKind::InvalidInput => Error::unreachable(&self.what, io),
            _ if e.is_closed() => Error::unreachable(&self.what, e),
            _ => self.no_password(&e.to_string()),
        }
    }

    /// The error for an ErrorResponse during the start of a session.
    pub(in crate::source) fn refusal(&self, sqlstate: &str, message: &str) -> Error {
        let Self { user, dbname, what, .. } = self;
        if is_transient(sqlstate) {
            return Error::unreachable(what, format!("{message} (SQLSTATE {sqlstate})"));
        }
        let (check, needed, fix) = match sqlstate {
            "28P01" if self.password.is_some() => (
                "postgres_password",
                format!("the password of role \"{user}\""),
                "mend it in [postgres].url, PGPASSWORD or ~/.pgpass".to_owned(),
            ),
            "28P01" => return self.no_password(message),
            "3D000" => (
                "postgres_database",
                format!("the database \"{dbname}\""),
                format!("createdb {dbname}, or mend the database in [postgres].url"),
            ),
            "42501" => (
                "role_replication",
                format!("role \"{user}\" may connect to \"{dbname}\" and has REPLICATION"),
                format!("ALTER ROLE {} REPLICATION; (as a superuser)", ident(user)),
            ),
            "28000" => (
                "postgres_login",
                format!("the role \"{user}\", and a line of pg_hba.conf that lets it into \"{dbname}\""),
                format!(
                    "CREATE ROLE {} LOGIN REPLICATION, or add `host {dbname} {user} ADDRESS/32 scram-sha-256` to \
                     pg_hba.conf and SELECT pg_reload_conf()",
                    ident(user)
                ),
            ),
            _ => (
                "postgres_settings",
                "a session with the settings given".to_owned(),
                "mend [postgres].url, PGOPTIONS or the server as the message says".to_owned(),
            ),
        };
        Error::refused(check, format!("{what}: {message} (SQLSTATE {sqlstate})"), needed, fix)
    }

    fn no_connect(&self, message: &str) -> Error {
        let Self { user, dbname, what, .. } = self;
        Error::refused(
            "postgres_login",
            format!("{what}: {message} (SQLSTATE 42501)"),
            format!("role \"{user}\" may connect to database \"{dbname}\""),
            format!("GRANT CONNECT ON DATABASE {} TO {};", ident(dbname), ident(user)),
        )
    }

    /// The refusal when the server asks for a password and there is none, or the exchange fails.
    pub(in crate::source) fn no_password(&self, why: &str) -> Error {
        Error::refused(
            "postgres_password",
            format!("{}: {why}", self.what),
            format!("a password for role \"{}\", database \"{}\"", self.user, self.dbname),
            "set PGPASSWORD, a line in ~/.pgpass (chmod 0600), or a password in [postgres].url",
        )
    }
}

/// Sorts an error of a running SQL session: the server went away, it refuses for want of rights, or the statement is wrong.
pub fn sql_error(doing: &str, e: &tokio_postgres::Error) -> Error {
    let Some(db) = e.as_db_error() else {
        let broken = e.is_closed() || std::error::Error::source(e).is_some_and(|s| s.is::<std::io::Error>());
        return if broken { Error::unreachable("Postgres", format!("{doing}: {e}")) } else { Error::fatal(doing, e) };
    };
    let text = format!("{doing}: {} (SQLSTATE {})", db.message(), db.code().code());
    match db.code().code() {
        code if is_transient(code) => Error::unreachable("Postgres", text),
        "42501" => Error::refused(
            "postgres_rights",
            text,
            "SELECT on the published tables, USAGE on their schemas",
            "GRANT what is named to the role of [postgres].url",
        ),
        _ => Error::Fatal(text),
    }
}

/// SQLSTATEs of a server that is starting, stopping, full or out of something, or that has ended a transaction for its own
/// reasons (40001: what a standby replays was in its way): later it may work.
pub(in crate::source) fn is_transient(sqlstate: &str) -> bool {
    matches!(sqlstate, "57P01" | "57P02" | "57P03" | "25P04")
        || ["08", "40", "53", "58"].iter().any(|c| sqlstate.starts_with(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_ended_for_its_own_reasons_is_tried_again() {
        let transient = |code: &&str| is_transient(code);
        // Recovery conflict, deadlock, transaction_timeout, shutdown, too many connections.
        assert!(["40001", "40P01", "25P04", "57P01", "53300"].iter().all(transient));
        assert!(!["42501", "28P01", "22021", "XX001", ""].iter().any(|code| is_transient(code)));
    }
}
