//! A Postgres of the test's own, so that it may change pg_hba.conf, switch TLS on, and stop it.

use std::path::{Path, PathBuf};
use std::process::Command;

use falaj::source::conn::Conninfo;
use tokio_postgres::Client;

/// Stopped and removed when dropped.
pub struct Server {
    dir: PathBuf,
    pub url: String,
    pub port: String,
    pub socket_dir: String,
    pub certificates: tempfile::TempDir,
}

impl Server {
    pub async fn start(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("falaj-{name}-{}", std::process::id()));
        stack(&dir, &["up", "postgres"]);
        let env = stack(&dir, &["env"]);
        let url = env.lines().find_map(|l| l.strip_prefix("export FALAJ_POSTGRES__URL=")).expect("an URL").to_owned();
        let port = url.rsplit_once(':').and_then(|(_, rest)| rest.split_once('/')).expect("a port").0.to_owned();
        let certificates = tempfile::tempdir().unwrap();
        let socket_dir = dir.join("postgres/run").canonicalize().unwrap().display().to_string();
        Self { dir, url, port, socket_dir, certificates }
    }

    pub async fn sql(&self) -> Client {
        Conninfo::gather(&self.url, &|_| None).unwrap().sql("test").await.unwrap()
    }

    /// Replaces pg_hba.conf.
    pub async fn hba(&self, lines: &str) {
        let client = self.sql().await;
        std::fs::write(self.data().join("pg_hba.conf"), lines).unwrap();
        reload(&client).await;
    }

    /// Adds a line to postgresql.conf; counts from the next start on.
    pub fn configure(&self, line: &str) {
        let path = self.data().join("postgresql.auto.conf");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{text}{line}\n")).unwrap();
    }

    pub fn restart(&self) {
        stack(&self.dir, &["stop", "postgres"]);
        stack(&self.dir, &["up", "postgres"]);
    }

    /// Switches TLS on, with a certificate for `localhost` signed by `root.crt`; `other.crt` has signed nothing.
    pub async fn tls(&self) {
        let dir = self.certificates.path();
        let new_root = "req -new -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=root";
        openssl(dir, &format!("{new_root} -keyout root.key -out root.crt"));
        openssl(dir, &format!("{new_root} -keyout other.key -out other.crt"));
        openssl(dir, "req -new -newkey rsa:2048 -nodes -subj /CN=localhost -keyout server.key -out server.csr");
        std::fs::write(dir.join("san"), "subjectAltName=DNS:localhost\n").unwrap();
        openssl(
            dir,
            "x509 -req -in server.csr -days 2 -CA root.crt -CAkey root.key -CAcreateserial -extfile san -out server.crt",
        );
        for file in ["server.crt", "server.key"] {
            self.install(&dir.join(file));
        }
        let client = self.sql().await;
        client.batch_execute("ALTER SYSTEM SET ssl = on").await.unwrap();
        reload(&client).await;
    }

    /// Copies a file into the data directory with the owner and mode that the server wants.
    fn install(&self, file: &Path) {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let to = self.data().join(file.file_name().unwrap());
        std::fs::copy(file, &to).unwrap();
        std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o600)).unwrap();
        let owner = self.data().metadata().unwrap();
        std::os::unix::fs::chown(&to, Some(owner.uid()), Some(owner.gid())).unwrap();
    }

    fn data(&self) -> PathBuf {
        self.dir.join("postgres/data").canonicalize().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        stack(&self.dir, &["down", "--purge"]);
    }
}

/// Waits until the server has read its files again: new sessions are then under the new rules.
async fn reload(client: &Client) {
    let loaded = async || -> String { client.query_one("SELECT pg_conf_load_time()::text", &[]).await.unwrap().get(0) };
    let before = loaded().await;
    client.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while loaded().await == before {
        assert!(std::time::Instant::now() < deadline, "the configuration was not read again");
        tokio::task::yield_now().await;
    }
}

fn stack(dir: &Path, arguments: &[&str]) -> String {
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/dev/stack");
    let out = Command::new(program).args(arguments).env("FALAJ_STACK_DIR", dir).output().expect("dev/stack runs");
    assert!(out.status.success(), "dev/stack {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn openssl(dir: &Path, arguments: &str) {
    let out = Command::new("openssl").args(arguments.split(' ')).current_dir(dir).output().expect("openssl runs");
    assert!(out.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&out.stderr));
}
