//! The binary under test as a process.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::until;

/// A fraction of what a process has to do that is to be killed midway.
const SLICE: Duration = Duration::from_millis(20);

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A running `falaj`; killed when dropped. Its output goes to files, so that no pipe can block it.
pub struct Falaj {
    child: Child,
    out: PathBuf,
    log: PathBuf,
}

/// How a process ended.
#[derive(Debug)]
pub struct Ended {
    /// `None`: by a signal.
    pub code: Option<i32>,
    pub out: String,
    pub log: String,
}

impl Falaj {
    pub fn start(args: &[&str], env: &BTreeMap<String, String>, dir: &Path) -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let (out, log) = (dir.join(format!("{number}.out")), dir.join(format!("{number}.log")));
        let mut command = Command::new(env!("CARGO_BIN_EXE_falaj"));
        command.args(args).envs(env).current_dir(dir).stdin(Stdio::null());
        command.stdout(File::create(&out).unwrap()).stderr(File::create(&log).unwrap());
        Self { child: command.spawn().unwrap(), out, log }
    }

    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// SIGKILL, and waits until the process has gone.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGKILL once this holds, while there is still work left: the process runs in slices and rests while it is asked.
    pub async fn killed_midway(mut self, mut holds: impl AsyncFnMut() -> bool) {
        until("a part of the work is done", async || {
            self.signal("-CONT");
            tokio::time::sleep(SLICE).await;
            assert!(self.runs(), "ended too early: {}", self.log());
            self.signal("-STOP");
            holds().await
        })
        .await;
        self.kill();
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Resident memory in bytes; 0 when it has ended.
    pub fn rss(&self) -> usize {
        let statm = fs::read_to_string(format!("/proc/{}/statm", self.child.id())).unwrap_or_default();
        statm.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).unwrap_or(0) * 4096
    }

    pub fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits until the log has these words.
    pub async fn says(&mut self, words: &str) {
        until(&format!("the log says {words}"), async || {
            let said = self.log().contains(words);
            assert!(said || self.runs(), "ended without saying {words}: {}", self.log());
            said
        })
        .await;
    }

    pub async fn end(mut self) -> Ended {
        let mut status = None;
        until("the process ends", async || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        })
        .await;
        Ended { code: status.and_then(|s| s.code()), out: fs::read_to_string(&self.out).unwrap(), log: self.log() }
    }

    /// Waits for exit code 0; gives standard output.
    pub async fn ends_well(self) -> String {
        let ended = self.end().await;
        assert_eq!(ended.code, Some(0), "{}", ended.log);
        ended.out
    }

    /// SIGTERM, and waits for exit code 0.
    pub async fn drains(self) {
        self.signal("-TERM");
        self.ends_well().await;
    }
}

impl Drop for Falaj {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<_> = log.lines().rev().take(20).collect();
            eprintln!("the end of its log:\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
    }
}
