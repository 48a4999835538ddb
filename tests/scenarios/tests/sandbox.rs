//! However a lab ends, nothing of it is left; two labs do not meet; and neither needs root.

#![expect(clippy::unwrap_used, reason = "a test may fail wherever it likes")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::Duration;

use keystone_lab::{preflight, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use tempfile::TempDir;

const LAB: &str = env!("CARGO_BIN_EXE_keystone-lab");
const PATIENCE: Duration = Duration::from_secs(30);
const EVERY: Duration = Duration::from_millis(20);

/// A lab that stays up, and a program that runs on one of its hosts.
struct Kept {
    lab: Child,
    stderr: BufReader<ChildStderr>,
    init: i32,
    guest: Child,
    processes: String,
}

impl Kept {
    fn start() -> Self {
        let mut lab = Command::new(LAB);
        lab.args(["nats", "--keep", "--json"]);
        let mut lab = lab_command(&mut lab).spawn().unwrap();
        let mut stderr = BufReader::new(lab.stderr.take().unwrap());
        let command = lines(&mut stderr).find(|line| line.trim_start().starts_with("home-0")).unwrap();
        let words: Vec<&str> = command.split_whitespace().skip(1).collect();
        let target = words.iter().position(|word| *word == "--target").unwrap();
        let init = words[target + 1].parse().unwrap();
        // The command that the lab offers for a shell runs a program instead where it is given one.
        let guest = Command::new(words[0]).args(&words[1..]).args(["sleep", "1000"]).spawn().unwrap();
        let processes = namespace_of(init, "pid").unwrap();
        wait::until("the guest runs inside", PATIENCE, EVERY, || Ok((members(&processes).len() == 2).then_some(())))
            .unwrap();
        Self { lab, stderr, init, guest, processes }
    }

    /// Waits until everything is gone, and returns how the lab ended.
    fn end(mut self) -> ExitStatus {
        let status = self.lab.wait().unwrap();
        self.guest.wait().unwrap();
        wait::until("all processes of the lab are gone", PATIENCE, EVERY, || {
            Ok(members(&self.processes).is_empty().then_some(()))
        })
        .unwrap();
        assert_eq!(lines(&mut self.stderr).filter(|line| line.contains("panicked")).count(), 0);
        status
    }
}

fn lab_command(command: &mut Command) -> &mut Command {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped())
}

fn lines(stderr: &mut BufReader<ChildStderr>) -> impl Iterator<Item = String> {
    stderr.lines().map(|line| line.unwrap())
}

fn namespace_of(pid: i32, kind: &str) -> Option<String> {
    Some(fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok()?.to_string_lossy().into_owned())
}

/// All processes in a PID namespace.
fn members(namespace: &str) -> Vec<i32> {
    let numbers = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    numbers.filter(|pid| namespace_of(*pid, "pid").as_deref() == Some(namespace)).collect()
}

fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

/// What of the outside a lab could leave something in.
fn outside() -> BTreeSet<String> {
    let devices = fs::read_dir("/sys/class/net").unwrap().map(|entry| entry.unwrap().file_name());
    let devices = devices.map(|name| format!("device {}", name.to_string_lossy()));
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mounts = mounts.lines().filter(|line| line.contains("keystone-lab") || line.contains("home-0"));
    let named =
        fs::read_dir("/run/netns").into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let named = named.filter(|name| name.starts_with("home-") || name.starts_with("probe-"));
    devices
        .filter(|name| name.contains("home-") || name.contains("probe-"))
        .chain(mounts.map(str::to_owned))
        .chain(named)
        .collect()
}

#[test]
fn however_a_lab_ends_nothing_is_left() {
    if !preflight::can_test() {
        return;
    }
    let before = outside();
    for (end, code) in [
        (Signal::SIGINT, Some(130)),
        (Signal::SIGTERM, Some(130)),
        (Signal::SIGHUP, Some(130)),
        (Signal::SIGKILL, None),
    ] {
        let kept = Kept::start();
        signal(i32::try_from(kept.lab.id()).unwrap(), end);
        assert_eq!(kept.end().code(), code, "{end}");
    }
    // The processes in between die too, and with them everything.
    let kept = Kept::start();
    signal(kept.init, Signal::SIGKILL);
    assert!(!kept.end().success());
    let kept = Kept::start();
    let unshare = parent_of(kept.init);
    signal(unshare, Signal::SIGKILL);
    assert!(!kept.end().success());
    assert_eq!(outside(), before);
}

fn parent_of(pid: i32) -> i32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap();
    parent.trim().parse().unwrap()
}

#[test]
fn two_labs_with_the_same_names_do_not_disturb_each_other() {
    if !preflight::can_test() {
        return;
    }
    let labs = [(); 2].map(|()| Command::new(LAB).args(["nats", "--json"]).stdout(Stdio::piped()).spawn().unwrap());
    for lab in labs {
        let output = lab.wait_with_output().unwrap();
        let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(document["ok"], true, "{document}");
        assert!(output.status.success());
    }
}

/// A copy of the lab where every user may run it: the build's own folder may be below a private home.
struct PublicCopy(TempDir);

impl PublicCopy {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::copy(LAB, folder.path().join("keystone-lab")).unwrap();
        Self(folder)
    }

    fn program(&self) -> PathBuf {
        self.0.path().join("keystone-lab")
    }
}

/// A lab started as an ordinary user.
fn as_nobody(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]).arg(program);
    command.current_dir("/").stdin(Stdio::null());
    command
}

#[test]
fn a_lab_needs_no_root_where_user_namespaces_are_allowed() {
    if !geteuid().is_root() {
        println!("every test of this crate runs without root here");
        return;
    }
    if !preflight::can_test() {
        return;
    }
    let copy = PublicCopy::new();
    let output = as_nobody(&copy.program()).args(["nats", "--json"]).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    if complaint.contains("private namespaces cannot be made here") {
        println!("SKIPPED: user namespaces are not allowed here: {complaint}");
        return;
    }
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["ok"], true, "{document} {complaint}");
}

/// Runs a lab as an ordinary user of a machine on which something is hidden by an empty file system.
fn complaint_without(folders: &str, arguments: &[&str]) -> String {
    let copy = PublicCopy::new();
    let script = format!("for folder in {folders}; do mount -t tmpfs none $folder; done; exec \"$@\"");
    let lab = as_nobody(&copy.program());
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script, "sh", "/usr/bin/setpriv"]).args(lab.get_args()).args(arguments);
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn what_is_missing_is_named_with_its_remedy() {
    if !geteuid().is_root() {
        println!("SKIPPED: hiding parts of the machine needs root");
        return;
    }
    if !preflight::can_test() {
        return;
    }
    let no_tools = complaint_without("/usr/sbin /usr/local/sbin", &["nats"]);
    assert!(no_tools.contains("apt-get install iproute2 nftables"), "{no_tools}");
    let no_tun = complaint_without("/dev/net", &["home-and-cloud"]);
    assert!(no_tun.contains("/dev/net/tun does not exist: modprobe tun"), "{no_tun}");
}
