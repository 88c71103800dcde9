//! Servers of a test's own, so that it may stop and kill them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Stopped and removed when dropped.
pub struct Stack {
    dir: PathBuf,
    env: Vec<(String, String)>,
}

impl Stack {
    pub fn up(name: &str, servers: &[&str]) -> Self {
        Self::up_with(name, servers, &[])
    }

    /// As [`Stack::up`], with settings of `dev/stack` in its environment.
    pub fn up_with(name: &str, servers: &[&str], env: &[(&str, &str)]) -> Self {
        let mut stack = Self::named(name);
        stack.env = env.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        stack.call(&[&["up"], servers].concat());
        stack
    }

    /// Nothing is started yet.
    pub fn named(name: &str) -> Self {
        Self { dir: std::env::temp_dir().join(format!("falaj-{name}-{}", std::process::id())), env: Vec::new() }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Runs a verb of `dev/stack`.
    pub fn call(&self, arguments: &[&str]) -> String {
        let out = self.command(arguments).output().expect("dev/stack runs");
        assert!(out.status.success(), "dev/stack {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    /// Sends a signal to a server.
    pub fn signal(&self, server: &str, name: &str) {
        let pid = std::fs::read_to_string(self.dir.join(format!("run/{server}.pid"))).unwrap();
        assert!(Command::new("kill").args([name, pid.trim()]).status().unwrap().success());
    }

    /// The addresses of its servers.
    pub fn addresses(&self) -> BTreeMap<String, String> {
        let lines = self.call(&["env"]);
        let pairs = lines.lines().filter_map(|line| line.strip_prefix("export ")?.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/dev/stack"));
        command.args(arguments).env("FALAJ_STACK_DIR", &self.dir).envs(self.env.iter().cloned());
        command
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        let _ = self.command(&["down", "--purge"]).output();
    }
}
