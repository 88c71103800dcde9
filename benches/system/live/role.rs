//! A verb of falaj that runs beside the bench until it is told to end, or is killed.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::process;

/// How long it may take to get going, and to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// The process, and where its log goes.
pub struct Role {
    child: Child,
    name: &'static str,
    log: PathBuf,
}

/// What it was like.
pub struct Ended {
    /// Peak resident memory in bytes.
    pub rss: u64,
    /// CPU seconds.
    pub cpu: f64,
}

impl Role {
    /// Starts it; its output goes to files in `dir`.
    pub fn start(mut command: Command, dir: &Path, name: &'static str) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let (out, log) = (dir.join(format!("{name}.out")), dir.join(format!("{name}.log")));
        command.stdin(Stdio::null()).stdout(File::create(&out)?).stderr(File::create(&log)?);
        let child = command.spawn().with_context(|| format!("starting {name}"))?;
        Ok(Self { child, name, log })
    }

    /// Waits until its log has this word.
    pub fn wait_for(&mut self, word: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.log_text()?.contains(word) {
            self.is_alive()?;
            ensure!(Instant::now() < deadline, "{} does not get going:\n{}", self.name, self.log_text()?);
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Ends it and waits until it has drained.
    pub fn stop(mut self) -> Result<Ended> {
        self.is_alive()?;
        let gone = || format!("{} is gone", self.name);
        let rss = process::peak_rss(self.child.id()).with_context(gone)?;
        let cpu = process::cpu_seconds(self.child.id()).with_context(gone)?;
        process::signal("TERM", self.child.id())?;
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(Instant::now() < deadline, "{} does not end", self.name);
            thread::sleep(Duration::from_millis(20));
        };
        ensure!(status.success(), "{}: {status}\n{}", self.name, self.log_text()?);
        Ok(Ended { rss, cpu })
    }

    /// SIGKILL: it has no chance to do anything any more.
    pub fn kill(mut self) -> Result<()> {
        self.is_alive()?;
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// An error with its log when it has ended.
    pub fn is_alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} has ended, {status}:\n{}", self.name, self.log_text()?),
        }
    }

    fn log_text(&self) -> Result<String> {
        Ok(std::fs::read_to_string(&self.log)?)
    }
}

impl Drop for Role {
    /// After an error it must not run on; where it has ended there is nothing to kill.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
