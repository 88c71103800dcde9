//! Reaching Postgres, `init` and `check`, against real servers.

mod place;
mod server;
mod verbs;

use falaj::source::conn::Conninfo;
use falaj::source::wire::{Wire, WireError};
use tokio::io::AsyncReadExt;

use self::server::Server;

fn no_env(_: &str) -> Option<String> {
    None
}

fn conninfo(url: &str) -> Conninfo {
    Conninfo::gather(url, &no_env).unwrap()
}

/// Both clients must agree: `Ok` with the session's role, or the refusal's check name, or `unreachable`.
async fn login(url: &str) -> String {
    let to = conninfo(url);
    let name = |e: falaj::error::Error| match e {
        falaj::error::Error::Refused(refusal) => refusal.check.to_owned(),
        falaj::error::Error::Unreachable { .. } => "unreachable".to_owned(),
        other => panic!("{other}"),
    };
    let sql = match to.sql("falaj-test").await {
        Ok(client) => {
            let row = client.query_one("SELECT session_user::text", &[]).await.unwrap();
            row.get(0)
        }
        Err(e) => name(e),
    };
    let wire = match Wire::connect(&to, "falaj-test").await {
        Ok(mut wire) => wire.query("SELECT session_user").await.unwrap()[0][0].clone().unwrap(),
        Err(e) => name(e),
    };
    assert_eq!(sql, wire, "{to}");
    sql
}

#[tokio::test]
async fn every_way_in_works_alike_for_both_clients() {
    let server = Server::start("login").await;
    let sql = server.sql().await;
    sql.batch_execute(
        "SET password_encryption = 'md5'; CREATE ROLE by_md5 LOGIN REPLICATION PASSWORD 'm d5';
         SET password_encryption = 'scram-sha-256'; CREATE ROLE by_scram LOGIN REPLICATION PASSWORD 'scräm';
         CREATE ROLE by_text LOGIN REPLICATION PASSWORD 't:x@t';
         CREATE ROLE by_tls LOGIN REPLICATION;
         CREATE ROLE plain_only LOGIN REPLICATION;
         CREATE ROLE no_replication LOGIN;",
    )
    .await
    .unwrap();
    server
        .hba(
            "local all all trust
             host all by_md5 all md5
             host all by_scram all scram-sha-256
             host all by_text all password
             hostssl all by_tls all trust
             hostnossl all plain_only all trust
             host all postgres,no_replication,gone all trust",
        )
        .await;
    let at = |user: &str| format!("postgres://{user}@127.0.0.1:{}/postgres", server.port);
    let cases = [
        (at("by_md5:m%20d5"), "by_md5"),
        (at("by_md5:no"), "postgres_password"),
        (at("by_scram:scr%C3%A4m"), "by_scram"),
        (at("by_scram:no"), "postgres_password"),
        (at("by_scram"), "postgres_password"),
        (at("by_text:t%3Ax%40t"), "by_text"),
        (at("by_tls"), "postgres_login"),
        (at("plain_only"), "plain_only"),
        (at("plain_only") + "?sslmode=require", "postgres_tls"),
        (at("gone"), "postgres_login"),
        (at("postgres").replace("/postgres", "/nowhere").replace("//nowhere", "//postgres"), "postgres_database"),
        (format!("host={} port={} user=by_tls dbname=postgres", server.socket_dir, server.port), "by_tls"),
        (format!("postgres://postgres@127.0.0.1:1,127.0.0.1:{}/postgres", server.port), "postgres"),
        ("postgres://postgres@127.0.0.1:1/postgres".to_owned(), "unreachable"),
        ("postgres://postgres@no-such-host.invalid/postgres".to_owned(), "unreachable"),
        ("host=/nowhere user=postgres".to_owned(), "unreachable"),
    ];
    for (url, expected) in &cases {
        assert_eq!(login(url).await, *expected, "{url}");
    }
    let refusal = Wire::connect(&conninfo(&at("no_replication")), "t").await.err().unwrap();
    assert!(refusal.to_string().contains("ALTER ROLE \"no_replication\" REPLICATION"), "{refusal}");

    server.tls().await;
    let at = |user: &str, rest: &str| format!("postgres://{user}@localhost:{}/postgres?{rest}", server.port);
    let root = server.certificates.path().join("root.crt").display().to_string();
    let other = server.certificates.path().join("other.crt").display().to_string();
    let cases = [
        (at("by_tls", ""), "by_tls"),
        (at("by_tls", "sslmode=disable"), "postgres_login"),
        (at("plain_only", ""), "plain_only"),
        (at("plain_only", "sslmode=require"), "postgres_login"),
        (at("by_tls", "sslmode=require"), "by_tls"),
        (at("by_scram:scr%C3%A4m", "sslmode=require"), "by_scram"),
        (at("by_tls", &format!("sslmode=require&sslrootcert={other}")), "postgres_tls"),
        (at("by_tls", &format!("sslmode=verify-full&sslrootcert={root}")), "by_tls"),
        (at("by_tls", &format!("sslmode=verify-full&sslrootcert={other}")), "postgres_tls"),
        (at("by_tls", &format!("sslmode=verify-ca&sslrootcert={root}")).replace("localhost", "127.0.0.1"), "by_tls"),
        (
            at("by_tls", &format!("sslmode=verify-full&sslrootcert={root}")).replace("localhost", "127.0.0.1"),
            "postgres_tls",
        ),
        (at("by_tls", "sslmode=verify-full&sslrootcert=/nowhere.pem"), "postgres_tls"),
    ];
    for (url, expected) in &cases {
        assert_eq!(login(url).await, *expected, "{url}");
    }
}

#[tokio::test]
async fn copy_both_loses_no_byte_and_errors_keep_their_sqlstate() {
    let server = Server::start("wire").await;
    let to = conninfo(&server.url);
    let mut wire = Wire::connect(&to, "falaj-test").await.unwrap();
    assert_eq!(wire.query("SHOW DateStyle").await.unwrap(), [[Some("ISO, MDY".to_owned())]]);
    let system = wire.identify_system().await.unwrap();
    assert_eq!((system.timeline, system.dbname.as_deref()), (1, Some("postgres")));
    let Err(WireError::Server(e)) = wire.query("DROP_REPLICATION_SLOT \"none\"").await else { panic!() };
    assert_eq!(e.code, "42704");
    wire.query("CREATE_REPLICATION_SLOT \"s\" LOGICAL pgoutput NOEXPORT_SNAPSHOT").await.unwrap();
    let sql = server.sql().await;
    sql.batch_execute("CREATE PUBLICATION p; SELECT pg_logical_emit_message(true, 'p', repeat('x', 5000))")
        .await
        .unwrap();
    let start = "START_REPLICATION SLOT \"s\" LOGICAL 0/0 (proto_version '1', publication_names 'p', messages 'true')";
    let mut stream = wire.copy_both(start).await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'd');
    let length = stream.read_u32().await.unwrap();
    let mut body = vec![0; length as usize - 4];
    stream.read_exact(&mut body).await.unwrap();
    assert!(b"wk".contains(&body[0]));
    let Err(WireError::Server(e)) = Wire::connect(&to, "t").await.unwrap().copy_both(start).await else { panic!() };
    assert_eq!(e.code, "55006");
}
