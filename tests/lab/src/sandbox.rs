//! The private place in which a lab runs, and from which nothing can leak.
//!
//! ```text
//!   keystone-lab (outside)                     waits; forwards Ctrl-C by closing the lifeline
//!     └─ unshare --net --mount --pid ...       util-linux; dies with its child and the child with it
//!          └─ keystone-lab (inside, PID 1)     reads the lifeline on stdin; its end is the end of everything
//!               ├─ daemons, iperf3, ...
//!               └─ /run/netns/*                on a private tmpfs
//! ```
//!
//! PID 1 of a PID namespace takes all processes of that namespace with it, and a network or mount namespace without
//! processes is taken down by the kernel. So whichever of the three programs is killed, and with whatever signal,
//! nothing stays behind, and no clean-up code has to run for that.

use std::ffi::OsString;
use std::io::{PipeReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::{env, fs, io, process, thread};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;

use crate::tool;

/// Set for the program inside; PID 1 with this variable knows where it is.
const INSIDE: &str = "KEYSTONE_LAB_INSIDE";

/// Exit status after Ctrl-C: 128 + SIGINT, as shells have it.
const INTERRUPTED: i32 = 130;

/// The lab's own scratch space: state of daemons, logs. On a tmpfs that only the sandbox sees.
pub const SCRATCH: &str = "/run/keystone-lab";

/// CAP_NET_ADMIN and CAP_SYS_ADMIN as bits of `CapEff` (capabilities(7), linux/capability.h).
const NEEDED_CAPABILITIES: u64 = (1 << 12) | (1 << 21);

/// True in the process that [`Sandbox::enter`] started.
pub fn is_inside() -> bool {
    process::id() == 1 && env::var_os(INSIDE).is_some()
}

/// A running copy of this program in private namespaces. Dropping it ends the copy and all that it started.
pub struct Sandbox {
    child: Child,
    lifeline: Option<ChildStdin>,
}

impl Sandbox {
    /// Starts this very program again, with `args`, in private namespaces. Its output goes where ours goes.
    pub fn enter<I: IntoIterator<Item = OsString>>(args: I) -> Result<Self> {
        Self::start(Self::unshare()?, args)
    }

    /// As [`Self::enter`], with stdout and stderr, in order, to be read here.
    pub fn enter_piped<I: IntoIterator<Item = OsString>>(args: I) -> Result<(Self, PipeReader)> {
        let (reader, writer) = io::pipe().context("make a pipe")?;
        let mut command = Self::unshare()?;
        command.stdout(writer.try_clone().context("share the pipe")?).stderr(writer);
        Ok((Self::start(command, args)?, reader))
    }

    fn start<I: IntoIterator<Item = OsString>>(mut command: Command, args: I) -> Result<Self> {
        let program = env::current_exe().context("find the path of this program")?;
        command.arg(program).args(args).env(INSIDE, "1").stdin(Stdio::piped());
        let mut child = command.spawn().context("start unshare (package util-linux)")?;
        let lifeline = child.stdin.take();
        Ok(Self { child, lifeline })
    }

    /// `unshare` with the namespaces of a lab, ready for a program and its arguments.
    pub(crate) fn unshare() -> Result<Command> {
        let mut command = Command::new("unshare");
        command.env("PATH", tool::search_path());
        if !has_needed_capabilities()? {
            command.args(["--user", "--map-root-user"]);
        }
        command.args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--"]);
        Ok(command)
    }

    /// Process id of `unshare`, whose end is the end of the sandbox.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end. A killed caller closes the lifeline, so the sandbox never outlives it.
    pub fn wait(mut self) -> Result<ExitStatus> {
        // Child::wait closes a stdin that it owns; the lifeline is held here until after it.
        let lifeline = self.lifeline.take();
        let status = self.child.wait().context("wait for the lab")?;
        drop(lifeline);
        Ok(status)
    }

    /// As [`Self::wait`], and SIGINT, SIGTERM and SIGHUP end the sandbox and are waited for too, so that everything is
    /// gone when the shell prompt is back. Needs a process with one thread: it blocks those signals for itself.
    pub fn wait_or_interrupt(mut self) -> Result<ExitStatus> {
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD] {
            mask.add(signal);
        }
        mask.thread_block().context("block signals")?;
        let signals = SignalFd::new(&mask).context("open a signalfd")?;
        let mut lifeline = self.lifeline.take();
        loop {
            if let Some(status) = self.child.try_wait().context("wait for the lab")? {
                return Ok(status);
            }
            let caught = signals.read_signal().context("read a signal")?;
            if caught.is_some_and(|info| info.ssi_signo != Signal::SIGCHLD as u32) {
                drop(lifeline.take());
            }
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _gone = self.child.wait();
        }
    }
}

/// The status that a caller should exit with after its sandbox ended with `status`.
pub fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Runs `test` inside a sandbox of its own and panics if it fails: the first line of a test that needs a [`World`]. Where
/// no sandbox can be made the test is skipped, but never in CI ([`can_test`](crate::preflight::can_test)).
///
/// `name` is the test's path as the test program lists it; the program runs itself again for that one test.
///
/// [`World`]: crate::World
pub fn in_own_world(name: &str, test: impl FnOnce() -> Result<()>) {
    if is_inside() {
        settle().and_then(|_place| test()).expect("the test fails inside its sandbox");
        return;
    }
    if !crate::preflight::can_test() {
        return;
    }
    let args = [name, "--exact", "--include-ignored", "--nocapture"].map(OsString::from);
    let (sandbox, mut output) = Sandbox::enter_piped(args).expect("the sandbox starts");
    let mut text = String::new();
    output.read_to_string(&mut text).expect("the test inside writes UTF-8");
    let status = sandbox.wait().expect("the sandbox ends");
    let said = without_runner(&text);
    assert!(status.success(), "{name} fails in its sandbox: {status}\n{said}");
    show(&said);
}

/// What a test inside had to say, but for the lines of its test runner, which would count twice.
fn without_runner(text: &str) -> String {
    let of_runner = |line: &&str| line.starts_with("test ") || line.starts_with("running ");
    text.lines().filter(|line| !of_runner(line)).collect::<Vec<_>>().join("\n")
}

#[expect(clippy::print_stdout, reason = "this way it is the output of the test outside, to be shown or not")]
fn show(said: &str) {
    println!("{said}");
}

/// What the inside knows about where it is.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Our process id as the outside sees it; `nsenter --target` takes it.
    pub outer_pid: u32,
    /// True where a user namespace was needed.
    pub own_user_namespace: bool,
}

/// Furnishes the sandbox: a private /run and /proc, and the lifeline that ends this process with its starter.
pub fn settle() -> Result<Place> {
    if !is_inside() {
        bail!("not inside a sandbox: start the lab through Sandbox::enter");
    }
    let place = Place { outer_pid: outer_pid()?, own_user_namespace: !owns_all_users()? };
    mount_private("tmpfs", "/run")?;
    // Containers mask parts of /proc and then refuse a fresh one; theirs works too, it only shows more processes.
    let _masked = mount_private("proc", "/proc");
    fs::create_dir_all(crate::netns::RUN_NETNS).context("make /run/netns")?;
    // Programs that run outside of any host have 127.0.0.1 and nothing else.
    tool::feed(Command::new("ip").args(["-batch", "-"]), "link set dev lo up\n").context("bring loopback up")?;
    fs::create_dir_all(SCRATCH).context("make the scratch folder")?;
    thread::Builder::new().name("lifeline".into()).spawn(follow_lifeline).context("start the lifeline")?;
    Ok(place)
}

fn mount_private(kind: &str, target: &str) -> Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some(kind), target, Some(kind), flags, None::<&str>).with_context(|| format!("mount {kind} on {target}"))
}

fn follow_lifeline() {
    let mut byte = [0];
    loop {
        match io::stdin().lock().read(&mut byte) {
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Ok(0) | Err(_) => process::exit(INTERRUPTED),
            Ok(_) => {}
        }
    }
}

fn has_needed_capabilities() -> Result<bool> {
    let effective = status_field("CapEff:")?;
    let bits = u64::from_str_radix(&effective, 16).with_context(|| format!("parse CapEff {effective:?}"))?;
    Ok(bits & NEEDED_CAPABILITIES == NEEDED_CAPABILITIES)
}

/// `NSpid` lists our id in each nested PID namespace, outermost first, as seen by the mounted /proc (proc(5)).
fn outer_pid() -> Result<u32> {
    let field = status_field("NSpid:")?;
    let first = field.split_whitespace().next().unwrap_or_default();
    first.parse().with_context(|| format!("parse NSpid {field:?}"))
}

/// The initial user namespace maps the whole range of user ids onto itself (user_namespaces(7)).
fn owns_all_users() -> Result<bool> {
    let map = fs::read_to_string("/proc/self/uid_map").context("read /proc/self/uid_map")?;
    Ok(map.split_whitespace().eq(["0", "0", "4294967295"]))
}

fn status_field(name: &str) -> Result<String> {
    let status = fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.map(|value| value.trim().to_owned()).with_context(|| format!("/proc/self/status has no {name}"))
}
