//! The terminal, taken over: the roles' own output and every log line go to a file, so that nothing disturbs the view.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use crate::error::{Error, Result};

/// Where the demo writes. Dropping it gives stdout and stderr back.
pub(super) struct Screen {
    out: File,
    err: OwnedFd,
    terminal: bool,
    /// Lines of the view that stands on the terminal now.
    drawn: usize,
}

impl Screen {
    /// Sends stdout and stderr of this process to `log`, and keeps the real ones.
    pub(super) fn take(log: &Path) -> Result<Self> {
        let failed = |e: std::io::Error| Error::fatal(format_args!("sending the log to {}", log.display()), e);
        let terminal = std::io::stdout().is_terminal();
        let file = File::create(log).map_err(failed)?;
        std::io::stdout().flush().map_err(failed)?;
        let out = std::io::stdout().as_fd().try_clone_to_owned().map_err(failed)?.into();
        let err = std::io::stderr().as_fd().try_clone_to_owned().map_err(failed)?;
        rustix::stdio::dup2_stdout(&file).map_err(|e| failed(e.into()))?;
        rustix::stdio::dup2_stderr(&file).map_err(|e| failed(e.into()))?;
        Ok(Self { out, err, terminal, drawn: 0 })
    }

    pub(super) fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Prints lines that stay.
    pub(super) fn say(&mut self, lines: &str) {
        self.clear();
        self.write(&format!("{lines}\n"));
    }

    /// Draws the view in the place of the one before. A line that is too long is cut, not wrapped.
    pub(super) fn draw(&mut self, view: &str) {
        let mut text = self.back();
        text.push_str("\x1b[?7l");
        for line in view.lines() {
            text.push_str(line);
            text.push_str("\x1b[K\n");
        }
        text.push_str("\x1b[?7h");
        self.drawn = view.lines().count();
        self.write(&text);
    }

    /// Takes the view away.
    fn clear(&mut self) {
        let text = self.back();
        self.drawn = 0;
        self.write(&text);
    }

    /// To the first line of the view, and everything from there removed.
    fn back(&self) -> String {
        if self.drawn == 0 { String::new() } else { format!("\x1b[{}A\r\x1b[J", self.drawn) }
    }

    /// A terminal that has gone away is no reason to stop.
    fn write(&mut self, text: &str) {
        let _ = self.out.write_all(text.as_bytes());
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = std::io::stdout().flush();
        let _ = rustix::stdio::dup2_stdout(&self.out);
        let _ = rustix::stdio::dup2_stderr(&self.err);
    }
}
