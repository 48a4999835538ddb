//! One network namespace: made by a thread that unshares, kept alive by a bind mount under /run/netns (so `ip -n NAME`
//! works), entered by a thread that calls `setns`. A namespace belongs to a thread, so none of this needs `fork`.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::{panic, thread};

use anyhow::{Context, Result, bail};
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::tool;

/// Where iproute2 looks for named network namespaces (ip-netns(8)).
pub(crate) const RUN_NETNS: &str = "/run/netns";

/// Where control groups are mounted (cgroups(7)).
const CGROUPS: &str = "/sys/fs/cgroup";

/// Settings of every namespace, before its first link. Relative to /proc/sys/net; one that the kernel lacks is skipped.
const SYSCTLS: &[(&str, &str)] = &[
    ("ipv4/ip_forward", "0"),
    // Loose, as systemd sets it on most distributions; strict would drop what policy routing legitimately returns.
    ("ipv4/conf/all/rp_filter", "2"),
    ("ipv4/conf/default/rp_filter", "2"),
    // Duplicate address detection holds an address back for a second; addresses here are given out without doubles.
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
    ("ipv6/conf/all/keep_addr_on_down", "1"),
    ("ipv6/conf/default/keep_addr_on_down", "1"),
    // Bridged frames must not pass the routers' nftables.
    ("bridge/bridge-nf-call-iptables", "0"),
    ("bridge/bridge-nf-call-ip6tables", "0"),
    // Lets the lab's own pings do without raw sockets (icmp(7)).
    ("ipv4/ping_group_range", "0 0"),
];

pub(crate) struct Namespace {
    name: String,
    file: File,
}

impl Namespace {
    pub(crate) fn create(name: &str) -> Result<Self> {
        let path = PathBuf::from(RUN_NETNS).join(name);
        if path.exists() {
            bail!("{name} exists already in this world");
        }
        let made = thread::scope(|scope| join(scope.spawn(|| make(&path))));
        let file = made.with_context(|| format!("make the network namespace {name}"))?;
        let namespace = Self { name: name.to_owned(), file };
        namespace.ip("link set dev lo up\n")?;
        Ok(namespace)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` on a thread inside this namespace. Sockets that it opens stay inside for their whole life.
    pub(crate) fn enter<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        thread::scope(|scope| {
            join(scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET).expect("an open namespace of ours can be entered");
                work()
            }))
        })
    }

    /// Starts a program inside this namespace, with a /sys that shows this namespace's devices.
    pub(crate) fn spawn(&self, command: &mut Command) -> Result<Child> {
        let name = command.get_program().to_string_lossy().into_owned();
        let started = self.enter(|| {
            unshare(CloneFlags::CLONE_NEWNS).context("unshare the mount namespace")?;
            mount_own_sys();
            command.spawn().with_context(|| format!("start {name}"))
        });
        started.with_context(|| format!("on {}", self.name))
    }

    /// Runs lines of `ip -batch` here.
    pub(crate) fn ip(&self, batch: &str) -> Result<()> {
        let mut command = Command::new("ip");
        command.args(["-n", &self.name, "-batch", "-"]);
        tool::feed(&mut command, batch).map(drop).with_context(|| format!("on {}", self.name))
    }

    /// Loads a ruleset here, all of it or nothing.
    pub(crate) fn nft(&self, ruleset: &str) -> Result<()> {
        let mut command = Command::new("nft");
        command.args(["-f", "-"]);
        self.enter(|| tool::feed(&mut command, ruleset)).map(drop).with_context(|| format!("on {}", self.name))
    }

    pub(crate) fn tc(&self, arguments: &str) -> Result<()> {
        let mut command = Command::new("tc");
        command.args(["-n", &self.name]).args(arguments.split_whitespace());
        tool::feed(&mut command, "").map(drop).with_context(|| format!("on {}", self.name))
    }

    /// Sets one value below /proc/sys/net of this namespace.
    pub(crate) fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/net/{key}");
        let written = self.enter(|| fs::write(&path, value));
        written.with_context(|| format!("on {}: write {value:?} to {path}", self.name))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let path = PathBuf::from(RUN_NETNS).join(&self.name);
        // The kernel does the same when the sandbox ends; failing here leaves nothing behind.
        let _unmounted = umount2(&path, MntFlags::MNT_DETACH);
        let _removed = fs::remove_file(&path);
    }
}

fn make(path: &PathBuf) -> Result<File> {
    unshare(CloneFlags::CLONE_NEWNET).context("unshare(CLONE_NEWNET)")?;
    File::create(path)?;
    mount(Some("/proc/thread-self/ns/net"), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .context("bind mount")?;
    for (key, value) in SYSCTLS {
        let _kernel_without_it = fs::write(format!("/proc/sys/net/{key}"), value);
    }
    Ok(File::open(path)?)
}

/// /sys shows the devices of the namespace in which it was mounted. The control groups stay what they are. Where a
/// container forbids a fresh one the old one must do.
fn mount_own_sys() {
    let groups = File::options().read(true).custom_flags(OFlag::O_PATH.bits()).open(CGROUPS);
    let mounted = mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), None::<&str>);
    if let (Ok(groups), Ok(())) = (groups, mounted) {
        let source = format!("/proc/thread-self/fd/{}", groups.as_raw_fd());
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        let _none_here = mount(Some(source.as_str()), CGROUPS, None::<&str>, flags, None::<&str>);
    }
}

fn join<R>(thread: thread::ScopedJoinHandle<'_, R>) -> R {
    thread.join().unwrap_or_else(|cause| panic::resume_unwind(cause))
}
