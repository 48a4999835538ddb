//! A program that runs on a host, with its output in a file; it ends when this value does.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::netns::Namespace;
use crate::{tool, wait};

/// How often a wait looks for the end of a process.
const POLL: Duration = Duration::from_millis(5);

/// A program started on a host. Dropping it kills it (SIGKILL) and waits for its end.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Output of all runs of one program on one host goes to the same file, one after the other.
    pub(crate) fn spawn(namespace: &Namespace, command: &mut Command, log: &Path) -> Result<Self> {
        Self::prepare(command, log)?;
        let child = namespace.spawn(command)?;
        Ok(Self::watch(command, child, log))
    }

    /// As [`Host::spawn`](crate::Host::spawn), in the network of the caller: where a sandbox has no hosts. Output is
    /// appended to the file `log`.
    pub fn start(command: &mut Command, log: &Path) -> Result<Self> {
        Self::prepare(command, log)?;
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        Ok(Self::watch(command, child, log))
    }

    fn prepare(command: &mut Command, log: &Path) -> Result<()> {
        let file = File::options().create(true).append(true).open(log);
        let file = file.with_context(|| format!("open {}", log.display()))?;
        // A group of its own: Ctrl-C in the terminal is for the lab, which then ends everything.
        command.env("PATH", tool::search_path()).stdin(Stdio::null()).process_group(0);
        command.stdout(file.try_clone().context("share the log file")?).stderr(file);
        Ok(())
    }

    fn watch(command: &Command, child: Child, log: &Path) -> Self {
        Self { name: command.get_program().to_string_lossy().into_owned(), child, log: log.to_owned() }
    }

    /// Process id inside the sandbox.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The status, once it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("look after {}", self.name))
    }

    /// SIGKILL, and wait: the program cannot clean up after itself.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("kill {}", self.name))?;
        self.child.wait().with_context(|| format!("wait for {}", self.name))?;
        Ok(())
    }

    /// Sends any signal: SIGSTOP makes a program silent without ending it, SIGCONT lets it go on.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).context("process ids fit in 31 bits")?);
        kill(pid, signal).with_context(|| format!("send {signal} to {}", self.name))
    }

    /// SIGTERM, and wait for a clean end.
    pub fn terminate(mut self, patience: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        let what = format!("{} ends after SIGTERM", self.name);
        wait::until(&what, patience, POLL, || self.ended())
    }

    /// The last lines that it wrote.
    pub fn log_tail(&self, lines: usize) -> String {
        tail(&self.log, lines)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// The last `lines` lines of a log file, indented; empty if there is none.
pub(crate) fn tail(log: &Path, lines: usize) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].iter().map(|line| format!("      {line}\n")).collect()
}
