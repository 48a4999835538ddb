//! Says, before anything is touched, what is missing on this machine and what to do about it.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::unistd::geteuid;

use crate::nat::{self, Inbound, Nat};
use crate::router::RouterSpec;
use crate::sandbox::Sandbox;
use crate::tool;

/// A program that the lab calls, and the Debian package that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tool {
    program: &'static str,
    package: &'static str,
}

impl Tool {
    /// `program` is in Debian's `package`.
    pub const fn new(program: &'static str, package: &'static str) -> Self {
        Self { program, package }
    }
}

const fn tool(program: &'static str, package: &'static str) -> Tool {
    Tool::new(program, package)
}

/// What a [`World`](crate::World) needs.
pub const NETWORK_TOOLS: &[Tool] =
    &[tool("ip", "iproute2"), tool("tc", "iproute2"), tool("nft", "nftables"), tool("unshare", "util-linux")];

/// What the scenarios need besides.
pub const SCENARIO_TOOLS: &[Tool] = &[tool("iperf3", "iperf3")];

/// What plain WireGuard peers and measurements with them need besides.
pub const PEER_TOOLS: &[Tool] = &[tool("wg", "wireguard-tools"), tool("ethtool", "ethtool")];

/// How long apt may wait for another apt, in seconds: tests of several crates may come here together.
const APT_LOCK_TIMEOUT: &str = "DPkg::Lock::Timeout=120";

/// Makes sure that `tools` are installed, and that namespaces can be made. Installs packages where we are root on Debian
/// or a child of it; elsewhere the error has the command.
pub fn ensure(tools: &[Tool]) -> Result<()> {
    let missing: Vec<&Tool> = tools.iter().filter(|tool| tool::find(tool.program).is_none()).collect();
    if !missing.is_empty() {
        let mut packages: Vec<&str> = missing.iter().map(|tool| tool.package).collect();
        packages.sort_unstable();
        packages.dedup();
        let programs: Vec<&str> = missing.iter().map(|tool| tool.program).collect();
        let names = packages.join(" ");
        if !(geteuid().is_root() && Path::new("/etc/debian_version").exists()) {
            bail!(
                "missing programs: {}. On Debian or Ubuntu: sudo apt-get install {names}. \
                 Elsewhere: install the packages that have them.",
                programs.join(", ")
            );
        }
        install(&packages).with_context(|| format!("install the packages {names} for {}", programs.join(", ")))?;
        if let Some(tool) = missing.iter().find(|tool| tool::find(tool.program).is_none()) {
            bail!("the package {} is installed, but there is no program {} on the PATH", tool.package, tool.program);
        }
    }
    namespaces_are_allowed()
}

/// Whether a test can make a [`World`](crate::World) here. If not it says SKIPPED and why; in CI (`CI` is set) nothing is
/// skipped, and the test fails.
pub fn can_test() -> bool {
    can_test_with(NETWORK_TOOLS)
}

/// As [`can_test`], for a test that calls `tools`.
pub fn can_test_with(tools: &[Tool]) -> bool {
    let Err(err) = ensure(tools) else { return true };
    assert!(std::env::var_os("CI").is_none(), "the lab cannot run, and in CI nothing is skipped: {err:#}");
    // A test has no better place to say so than its output.
    let _nobody_reads = io::Write::write_all(&mut io::stderr(), format!("SKIPPED: {err:#}\n").as_bytes());
    false
}

fn install(packages: &[&str]) -> Result<()> {
    if apt_get(&["install", "--yes", "--no-install-recommends"], packages).is_err() {
        // The package lists of a fresh machine are empty or old.
        apt_get(&["update"], &[])?;
        apt_get(&["install", "--yes", "--no-install-recommends"], packages)?;
    }
    Ok(())
}

fn apt_get(arguments: &[&str], packages: &[&str]) -> Result<()> {
    let output = Command::new("apt-get")
        .args(["--option", APT_LOCK_TIMEOUT, "--quiet"])
        .args(arguments)
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .output()
        .context("start apt-get")?;
    if !output.status.success() {
        bail!("apt-get {}: {}", arguments[0], String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn namespaces_are_allowed() -> Result<()> {
    let tried = Sandbox::unshare()?.arg("true").stdin(Stdio::null()).output().context("start unshare")?;
    if tried.status.success() {
        return Ok(());
    }
    bail!(
        "private namespaces cannot be made here ({}). Run as root, or allow user namespaces: \
         sysctl user.max_user_namespaces above 0; where they exist, kernel.unprivileged_userns_clone=1 and \
         kernel.apparmor_restrict_unprivileged_userns=0; in a container, --privileged or \
         --security-opt seccomp=unconfined",
        String::from_utf8_lossy(&tried.stderr).trim()
    )
}

/// Inside the sandbox: whether the kernel has the NATs that the lab makes.
pub fn check_nftables() -> Result<()> {
    let lan = RouterSpec::default().lan;
    let mut rules = nat::ruleset(Nat::FullCone, Inbound::Drop, lan, Duration::from_secs(1));
    rules += &nat::ruleset(Nat::Symmetric, Inbound::Drop, lan, Duration::from_secs(1));
    rules += "delete table inet router\n";
    tool::feed(Command::new("nft").args(["-f", "-"]), &rules).map(drop).context(
        "nftables NAT is not usable here: the kernel needs CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET, CONFIG_NFT_NAT and \
         CONFIG_NFT_MASQ (modprobe nf_tables nft_chain_nat nft_masq)",
    )
}

/// Inside the sandbox: whether programs can make a TUN device.
pub fn check_tun() -> Result<()> {
    const DEVICE: &str = "/dev/net/tun";
    match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(_) => {}
        Err(err) if err.kind() == io::ErrorKind::NotFound => bail!(
            "{DEVICE} does not exist: modprobe tun; in a container, --device {DEVICE}; where /dev has no such node, \
             mkdir -p /dev/net && mknod -m 666 {DEVICE} c 10 200"
        ),
        Err(err) if err.kind() == io::ErrorKind::PermissionDenied => {
            bail!("{DEVICE} may not be opened by this user: chmod 666 {DEVICE}, as most distributions have it")
        }
        Err(err) => return Err(anyhow!(err).context(format!("open {DEVICE}"))),
    }
    let try_one = "tuntap add dev preflight0 mode tun\ntuntap del dev preflight0 mode tun\n";
    tool::feed(Command::new("ip").args(["-batch", "-"]), try_one)
        .map(drop)
        .with_context(|| format!("{DEVICE} opens, but no TUN device can be made with it (kernel: CONFIG_TUN)"))
}
