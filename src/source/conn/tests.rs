//! Connection strings as libpq reads them.

use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt;

use super::*;

fn gather(url: &str, env: &[(&str, &str)]) -> Result<Conninfo> {
    let env: HashMap<_, _> = env.iter().copied().collect();
    Conninfo::gather(url, &|name| env.get(name).map(|v| (*v).to_owned()))
}

fn found(url: &str, env: &[(&str, &str)]) -> String {
    match gather(url, env).unwrap_err() {
        Error::Refused(refusal) => format!("{}: {}", refusal.check, refusal.found),
        other => panic!("{other}"),
    }
}

/// `user password @ address,address / dbname`
fn told(url: &str, env: &[(&str, &str)]) -> String {
    let c = gather(url, env).unwrap();
    let hosts: Vec<_> = c.targets.iter().map(Target::address).collect();
    let password = c.targets[0].password.as_deref().unwrap_or("-");
    format!("{} {password} @ {} / {}", c.user, hosts.join(","), c.dbname)
}

#[test]
fn pg_variables_come_before_the_built_in_url_and_after_a_chosen_one() {
    assert_eq!(crate::config::Config::defaults().unwrap().postgres.url, BUILT_IN);
    let env = [("PGHOST", "db.example"), ("PGUSER", "app")];
    assert_eq!(told(BUILT_IN, &env), "app - @ db.example:5432 / postgres");
    assert_eq!(told("postgres://me@127.0.0.1:5432/postgres", &env), "me - @ 127.0.0.1:5432 / postgres");
}

#[test]
fn a_host_that_does_not_answer_is_given_up_unless_the_system_is_to_decide() {
    let limit = |url: &str| gather(url, &[]).unwrap().tcp.user_timeout;
    assert_eq!(limit("host=h user=u"), Some(Duration::from_secs(60)));
    assert_eq!(limit("host=h user=u tcp_user_timeout=1500"), Some(Duration::from_millis(1500)));
    assert_eq!(limit("host=h user=u tcp_user_timeout=0"), None);
}

#[test]
fn connection_strings_read_as_libpq_reads_them() {
    let cases = [
        ("postgres://postgres@127.0.0.1:5432/postgres", "postgres - @ 127.0.0.1:5432 / postgres"),
        ("postgresql://u:p%40%3Ass@h/db", "u p@:ss @ h:5432 / db"),
        ("postgres://u:a:b@h", "u a:b @ h:5432 / u"),
        ("postgres://u@[::1]:6000/db", "u - @ [::1]:6000 / db"),
        ("postgres://u@[2001:db8::1]/db", "u - @ [2001:db8::1]:5432 / db"),
        ("postgres://u@a:1,b:2/db", "u - @ a:1,b:2 / db"),
        ("postgres://u@a,b:2/db", "u - @ a:5432,b:2 / db"),
        ("postgres://u@%2Ftmp%2Fpg:7/db", "u - @ /tmp/pg/.s.PGSQL.7 / db"),
        ("postgres://u@/db?host=/run/pg&port=7", "u - @ /run/pg/.s.PGSQL.7 / db"),
        ("postgres:///db?host=h&user=a@b&password=x%26y", "a@b x&y @ h:5432 / db"),
        ("postgres://h/d%2Fb%20%F0%9F%8E%A7?user=u", "u - @ h:5432 / d/b 🎧"),
        ("host=h user=u dbname=db", "u - @ h:5432 / db"),
        (r"host = h user='u v' password='it\'s \\ ok' dbname=''", r"u v it's \ ok @ h:5432 / u v"),
        ("host=a,b port=1,2 user=u", "u - @ a:1,b:2 / u"),
        ("host=a,b port=9 user=u", "u - @ a:9,b:9 / u"),
        ("host=name hostaddr=10.0.0.1 user=u", "u - @ name:5432 / u"),
        ("hostaddr=10.0.0.1 user=u", "u - @ 10.0.0.1:5432 / u"),
    ];
    for (url, expected) in cases {
        assert_eq!(told(url, &[]), expected, "{url}");
    }
}

#[test]
fn the_environment_fills_what_the_url_leaves_out() {
    let env = [
        ("PGHOST", "eh"),
        ("PGPORT", "7"),
        ("PGUSER", "eu"),
        ("PGPASSWORD", "ep"),
        ("PGDATABASE", "ed"),
        ("PGAPPNAME", "app"),
        ("PGOPTIONS", "-c work_mem=1MB"),
        ("PGCONNECT_TIMEOUT", "3"),
    ];
    assert_eq!(told("", &env), "eu ep @ eh:7 / ed");
    assert_eq!(told("postgres://u@h/d", &env), "u ep @ h:7 / d");
    assert_eq!(told("postgres://u:p@h:1/d", &env), "u p @ h:1 / d");
    let c = gather("", &env).unwrap();
    let login = c.login(&c.targets[0], "falaj-produce");
    assert_eq!((login.application_name, login.options.starts_with("-c work_mem=1MB -c search_path")), ("app", true));
    assert_eq!(c.connect_timeout, Some(Duration::from_secs(3)));
    assert_eq!(gather("user=u connect_timeout=0", &env).unwrap().connect_timeout, None);
    assert_eq!(gather("user=u host=h", &[]).unwrap().connect_timeout, Some(CONNECT_TIMEOUT));
}

#[test]
fn service_files_stand_between_the_url_and_the_environment() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("services");
    std::fs::write(&file, "# x\n[other]\nhost=no\n[s]\nhost=sh\nport = 8\nuser=su\n[last]\nuser=no\n").unwrap();
    let env = [("PGSERVICEFILE", file.to_str().unwrap()), ("PGHOST", "eh"), ("PGDATABASE", "ed")];
    assert_eq!(told("service=s", &env), "su - @ sh:8 / ed");
    assert_eq!(told("postgres://u@/d?service=s", &env), "u - @ sh:8 / d");
    let by_variable = [env.as_slice(), &[("PGSERVICE", "s")]].concat();
    assert_eq!(told("port=9", &by_variable), "su - @ sh:9 / ed");
    assert!(found("service=none", &env).contains("the service \"none\" is in none of"));
}

#[test]
fn passwords_come_from_the_password_file_host_by_host() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(".pgpass");
    std::fs::write(&file, "a:*:*:u:first\nb:2:db:u:second\nlocalhost:*:*:u:local\n").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let home = [("HOME", dir.path().to_str().unwrap())];
    let passwords = |url: &str, env: &[(&str, &str)]| -> Vec<_> {
        gather(url, env).unwrap().targets.into_iter().map(|t| t.password.unwrap_or_default()).collect()
    };
    assert_eq!(passwords("postgres://u@a,b:2,c/db", &home), ["first", "second", ""]);
    assert_eq!(passwords("postgres://u:own@a/db", &home), ["own"]);
    assert_eq!(passwords("host=/var/run/postgresql user=u", &home), ["local"]);
    let named = [("PGPASSFILE", file.to_str().unwrap())];
    assert_eq!(passwords("postgres://u@a/db", &named), ["first"]);
}

#[test]
fn sslmode_and_roots_decide_what_is_verified() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join(".postgresql")).unwrap();
    std::fs::write(dir.path().join(".postgresql/root.crt"), "").unwrap();
    let home = [("HOME", dir.path().to_str().unwrap())];
    let mode = |url: &str, env: &[(&str, &str)]| {
        let ssl = gather(&format!("host=h user=u {url}"), env).unwrap().ssl;
        (ssl.mode, ssl.roots != Roots::None)
    };
    let cases = [
        ("", false, (Mode::Prefer, false)),
        ("sslmode=disable", false, (Mode::Disable, false)),
        ("sslmode=allow", false, (Mode::Prefer, false)),
        ("sslmode=require", false, (Mode::Require, false)),
        ("sslmode=require sslrootcert=/r.pem", false, (Mode::VerifyCa, true)),
        ("sslmode=require", true, (Mode::VerifyCa, true)),
        ("sslmode=verify-ca", true, (Mode::VerifyCa, true)),
        ("sslmode=verify-full sslrootcert=/r.pem", false, (Mode::VerifyFull, true)),
        ("sslrootcert=system", false, (Mode::VerifyFull, true)),
    ];
    for (url, with_home, expected) in cases {
        assert_eq!(mode(url, if with_home { &home } else { &[] }), expected, "{url}");
    }
    assert_eq!(mode("", &[("PGSSLMODE", "require")]), (Mode::Require, false));
    assert_eq!(gather("postgres://u@h/?ssl=true", &[]).unwrap().ssl.mode, Mode::Require);
    for bad in ["sslmode=verify-ca", "sslmode=yes", "sslrootcert=system sslmode=require", "sslcert=/c"] {
        assert!(gather(&format!("host=h user=u {bad}"), &[]).is_err(), "{bad}");
    }
}

#[test]
fn what_cannot_be_honoured_is_refused_with_its_name() {
    let cases = [
        ("mysql://h/db", "a scheme that is not postgres://"),
        ("host=h user=u nonsense=1", "\"nonsense\" is not known"),
        ("postgres://u@h/db?target_session_attrs=read-write", "target_session_attrs = \"read-write\""),
        ("host=h user=u channel_binding=require", "channel_binding = \"require\""),
        ("host=h user=u require_auth=scram-sha-256", "require_auth is set"),
        ("host=a,b port=1,2,3 user=u", "2 hosts, 0 addresses, 3 ports"),
        ("host=h user=u port=70000", "the port is no number"),
        ("host=h user=u connect_timeout=soon", "connect_timeout is not a number"),
        ("host=h user", "a word without `=`"),
        ("host=h user='u", "a quote that is not closed"),
        ("postgres://u@[::1/db", "a `[` without `]`"),
        ("postgres://u:%4@h/db", "a `%` without two hexadecimal digits"),
        ("postgres://u:%ff@h/db", "not UTF-8"),
    ];
    for (url, expected) in cases {
        let found = found(url, &[]);
        assert!(found.starts_with("postgres_url: ") && found.contains(expected), "{url} → {found}");
    }
    assert!(found("host=h user=u", &[("PGREQUIREAUTH", "none")]).contains("PGREQUIREAUTH: require_auth is set"));
}

#[test]
fn a_password_never_shows() {
    let c = gather("postgres://u:s3cret@h/db", &[]).unwrap();
    assert!(!format!("{c} {c:?}").contains("s3cret"));
    // A bare `@`, `/`, `?` or `:` in the password moves its rest into another part.
    for url in [
        "postgres://u:p@s3cret@h/db",
        "postgres://u:p/s3cret@h/db",
        "postgres://u:p?s3cret@h/db",
        "postgres://h:s3cret/db",
        "postgres://u:%s3cret@h/db",
    ] {
        let error = gather(url, &[]).unwrap_err().to_string();
        assert!(!error.contains("s3cret"), "{error}");
    }
}

#[test]
fn without_anything_the_role_is_the_systems_user() {
    let c = gather("", &[]).unwrap();
    assert!(!c.user().is_empty());
    assert_eq!(c.dbname(), c.user());
}
