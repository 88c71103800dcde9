//! One process from start to exit: how long it takes, and the CPU and memory that it costs, here and in the servers.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

/// How often /proc is looked at.
const SAMPLE: Duration = Duration::from_millis(10);
/// A reader that has not come to its end by then never will.
const LIMIT: Duration = Duration::from_secs(600);
/// How often it is looked whether a peer has come to its end.
const LOOK: Duration = Duration::from_millis(100);
/// How long a peer may take to end when it is asked to.
const ENDING: Duration = Duration::from_secs(20);
/// `sysconf(_SC_CLK_TCK)`: 100 on every Linux (USER_HZ is part of its ABI).
const TICKS_PER_SECOND: f64 = 100.0;

/// Processes of the servers.
#[derive(Clone, Copy, Debug)]
pub struct Servers {
    /// The postmaster.
    pub postgres: u32,
    /// The broker.
    pub kafka: u32,
    /// The board's Redis.
    pub redis: u32,
}

/// CPU seconds, user and system.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Cpu {
    /// Of the process itself.
    pub client: f64,
    /// Of the server process that decodes for it.
    pub walsender: f64,
    /// Of the Kafka broker, meanwhile.
    pub broker: f64,
}

/// A process that has ended well.
#[derive(Debug)]
pub struct Finished {
    /// From start to exit.
    pub seconds: f64,
    /// What it cost.
    pub cpu: Cpu,
    /// Peak resident memory in bytes.
    pub peak_rss: u64,
    /// All that it printed.
    pub stdout: String,
    /// All that it logged.
    pub stderr: String,
}

/// Runs a command to its end. An exit code other than 0 is an error with the end of its log.
pub fn run(command: Command, servers: Servers) -> Result<Finished> {
    run_watched(command, servers, |_| ())
}

/// The same, and shows each line of its log to `on_line` as it comes.
pub fn run_watched(
    mut command: Command,
    servers: Servers,
    on_line: impl FnMut(&str) + Send + 'static,
) -> Result<Finished> {
    let broker = cpu_seconds(servers.kafka).context("the broker is gone")?;
    let began = Instant::now();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("starting {command:?}"))?;
    let watch = Watch::start(child.id(), servers.postgres);
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let err = thread::spawn(move || lines(err, on_line));
    let mut stdout = String::new();
    out.context("a pipe was asked for")?.read_to_string(&mut stdout)?;
    let stderr = err.join().map_err(|_| anyhow::anyhow!("the reader of stderr panicked"))??;
    // Its pipes have closed: it is ending now. As a zombie it still shows its CPU time.
    let client = cpu_at_end(child.id());
    let seconds = began.elapsed().as_secs_f64();
    let seen = watch.stop()?;
    let status = child.wait()?;
    ensure!(status.success(), "{command:?}: {status}\n{}", tail(&stderr));
    let cpu = Cpu {
        client: client?,
        walsender: seen.walsender_cpu,
        broker: cpu_seconds(servers.kafka).context("the broker is gone")? - broker,
    };
    Ok(Finished { seconds, cpu, peak_rss: seen.peak_rss, stdout, stderr })
}

/// Runs a command that does not end by itself until `done` says how long it took, or it has ended after all; then asks it
/// to end. Its output goes to the file `log`.
pub fn run_until(
    mut command: Command,
    servers: Servers,
    log: &Path,
    mut done: impl FnMut() -> Result<Option<f64>>,
) -> Result<Finished> {
    let broker = cpu_seconds(servers.kafka).context("the broker is gone")?;
    let file = fs::File::create(log).with_context(|| format!("creating {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    let mut child = command.spawn().with_context(|| format!("starting {command:?}"))?;
    let watch = Watch::start(child.id(), servers.postgres);
    let seconds = loop {
        thread::sleep(LOOK);
        match (done(), child.try_wait()?) {
            (Ok(None), None) => {}
            (Ok(Some(seconds)), None) => break Ok(seconds),
            (Err(why), None) => break Err(why),
            (_, Some(status)) => bail!("{command:?}: {status}\n{}", tail(&fs::read_to_string(log)?)),
        }
    };
    let client = cpu_seconds(child.id());
    let broker = cpu_seconds(servers.kafka).context("the broker is gone")? - broker;
    end(&mut child)?;
    let seen = watch.stop()?;
    let seconds = seconds.with_context(|| tail(&fs::read_to_string(log).unwrap_or_default()))?;
    let cpu = Cpu { client: client.context("it has ended")?, walsender: seen.walsender_cpu, broker };
    Ok(Finished { seconds, cpu, peak_rss: seen.peak_rss, stdout: String::new(), stderr: String::new() })
}

/// Asks a child to end, and ends it where it does not.
fn end(child: &mut Child) -> Result<()> {
    signal("TERM", child.id())?;
    let deadline = Instant::now() + ENDING;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
        }
        thread::sleep(SAMPLE);
    }
    Ok(())
}

/// Asks a process to end.
pub fn signal(name: &str, pid: u32) -> Result<()> {
    let status = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().context("running kill")?;
    ensure!(status.success(), "kill -{name} {pid}: {status}");
    Ok(())
}

/// Peak resident memory so far in bytes, while the process lives.
pub fn peak_rss(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kib| kib * 1024)
}

fn lines(pipe: Option<impl Read>, mut on_line: impl FnMut(&str)) -> Result<String> {
    let mut all = String::new();
    for line in BufReader::new(pipe.context("a pipe was asked for")?).lines() {
        let line = line?;
        on_line(&line);
        all.push_str(&line);
        all.push('\n');
    }
    Ok(all)
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

fn cpu_at_end(pid: u32) -> Result<f64> {
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        let stat = Stat::read(pid).context("a child that was not waited for is gone")?;
        if stat.state == "Z" {
            return Ok(stat.cpu_seconds);
        }
        thread::sleep(Duration::from_micros(200));
    }
    bail!("process {pid} closed its output and does not end")
}

/// What is seen of a process while it runs.
#[derive(Debug, Default)]
struct Seen {
    peak_rss: u64,
    walsender_cpu: f64,
    killed: bool,
}

struct Watch {
    stop: Sender<()>,
    thread: JoinHandle<Seen>,
}

impl Watch {
    fn start(pid: u32, postmaster: u32) -> Self {
        let (stop, stopped) = channel();
        Self { stop, thread: thread::spawn(move || watch(pid, postmaster, &stopped)) }
    }

    fn stop(self) -> Result<Seen> {
        drop(self.stop);
        let seen = self.thread.join().map_err(|_| anyhow::anyhow!("the watch panicked"))?;
        ensure!(!seen.killed, "it did not end within {LIMIT:?} and was killed");
        Ok(seen)
    }
}

/// The walsender ends with its client and is gone at once, so the last look before that counts.
fn watch(pid: u32, postmaster: u32, stopped: &Receiver<()>) -> Seen {
    let (mut seen, mut sender, began) = (Seen::default(), None, Instant::now());
    while stopped.recv_timeout(SAMPLE) == Err(RecvTimeoutError::Timeout) {
        seen.peak_rss = seen.peak_rss.max(peak_rss(pid).unwrap_or(0));
        sender = sender.or_else(|| walsender(postmaster));
        if let Some(cpu) = sender.and_then(cpu_seconds) {
            seen.walsender_cpu = cpu;
        }
        if began.elapsed() > LIMIT && !seen.killed {
            seen.killed = signal("KILL", pid).is_ok();
        }
    }
    seen
}

/// The one process of this server that streams.
fn walsender(postmaster: u32) -> Option<u32> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(|pid| {
        let title = || fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        Stat::read(*pid).is_some_and(|s| s.parent == postmaster) && title().contains("walsender")
    })
}

/// CPU seconds of a process so far, user and system; `None` when there is none.
pub fn cpu_seconds(pid: u32) -> Option<f64> {
    Stat::read(pid).map(|s| s.cpu_seconds)
}

/// CPU seconds so far of the threads with which a JVM compiles; `None` when there is no such process. A thread that has ended
/// counts no more, so the JVM must keep its compilers (`-XX:-UseDynamicNumberOfCompilerThreads`).
pub fn compiler_seconds(pid: u32) -> Option<f64> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
    let stats = threads.filter_map(|thread| Stat::read_file(&thread.path().join("stat")));
    Some(stats.filter(|stat| stat.name.contains("CompilerThre")).map(|stat| stat.cpu_seconds).sum())
}

/// CPU seconds that all cores together have worked, whoever for, since the machine came up.
pub fn machine_cpu_seconds() -> Result<f64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let ticks = |at| stat.split_whitespace().nth(at)?.parse::<f64>().ok();
    // "cpu", user, nice, system, idle, iowait, irq, softirq, steal (proc(5)).
    let worked: Option<f64> = [1, 2, 3, 6, 7, 8].into_iter().map(ticks).sum();
    Ok(worked.context("/proc/stat")? / TICKS_PER_SECOND)
}

/// Fields of /proc/PID/stat (proc(5)).
struct Stat {
    name: String,
    state: String,
    parent: u32,
    cpu_seconds: f64,
}

impl Stat {
    fn read(pid: u32) -> Option<Self> {
        Self::read_file(Path::new(&format!("/proc/{pid}/stat")))
    }

    fn read_file(file: &Path) -> Option<Self> {
        let stat = fs::read_to_string(file).ok()?;
        // The name may hold blanks and brackets.
        let (before, after) = stat.rsplit_once(") ")?;
        let fields: Vec<&str> = after.split(' ').collect();
        let ticks = |at: usize| fields.get(at)?.parse::<f64>().ok();
        Some(Self {
            name: before.split_once('(')?.1.to_owned(),
            state: fields.first()?.to_string(),
            parent: fields.get(1)?.parse().ok()?,
            cpu_seconds: (ticks(11)? + ticks(12)?) / TICKS_PER_SECOND,
        })
    }
}
