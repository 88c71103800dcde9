//! `.pgpass`: `host:port:database:user:password`, `*` for any, `\:` and `\\` escaped; the first line that matches counts.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Whom a password is wanted for.
pub(super) struct Login<'a> {
    /// Host as it was given; `localhost` for the default socket directory.
    pub host: &'a str,
    pub port: u16,
    pub database: &'a str,
    pub user: &'a str,
}

/// The password of the first matching line; `None` without a file or a line.
///
/// As with libpq, a file that others may read does not count.
pub(super) fn lookup(path: &Path, login: &Login<'_>) -> Option<String> {
    let meta = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
    if meta.permissions().mode() & 0o077 != 0 {
        tracing::warn!(file = %path.display(), "password file ignored: others may read it; chmod 0600 mends that");
        return None;
    }
    find(&std::fs::read_to_string(path).ok()?, login)
}

fn find(text: &str, login: &Login<'_>) -> Option<String> {
    let port = login.port.to_string();
    let wanted = [login.host, &port, login.database, login.user];
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let fields = split(line);
        let (password, place) = fields.split_last().filter(|(_, place)| place.len() == 4)?;
        let hit = place.iter().zip(wanted).all(|(field, want)| field.raw == "*" || field.text == want);
        hit.then(|| password.text.clone())
    })
}

/// A field with and without its escapes: `\*` is a star, `*` is any.
#[derive(Default)]
struct Field {
    raw: String,
    text: String,
}

/// At most five fields: the password may hold colons.
fn split(line: &str) -> Vec<Field> {
    let mut fields = vec![Field::default()];
    let mut chars = line.trim_end_matches('\r').chars();
    while let Some(c) = chars.next() {
        let count = fields.len();
        let Some(field) = fields.last_mut() else { break };
        match c {
            ':' if count < 5 => fields.push(Field::default()),
            '\\' => {
                let escaped = chars.next().unwrap_or('\\');
                field.raw.extend(['\\', escaped]);
                field.text.push(escaped);
            }
            c => {
                field.raw.push(c);
                field.text.push(c);
            }
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_matching_line_counts_and_escapes_are_undone() {
        let text = "# comment\nother:*:*:*:no\nshort:line\nh:5432:db:u:p:a\\:s\\\\s\n*:*:*:u:any\n";
        let at = |host, user| Login { host, port: 5432, database: "db", user };
        assert_eq!(find(text, &at("h", "u")).as_deref(), Some("p:a:s\\s"));
        assert_eq!(find(text, &at("x", "u")).as_deref(), Some("any"));
        assert_eq!(find(text, &at("x", "v")), None);
    }

    #[test]
    fn a_file_that_others_may_read_does_not_count() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "*:*:*:*:secret\n").unwrap();
        let login = Login { host: "h", port: 1, database: "d", user: "u" };
        let mode = |m| std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(m)).unwrap();
        mode(0o644);
        assert_eq!(lookup(file.path(), &login), None);
        mode(0o600);
        assert_eq!(lookup(file.path(), &login).as_deref(), Some("secret"));
    }
}
