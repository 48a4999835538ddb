//! What the daemon needs of its host, checked before anything is touched. Each finding is a sentence with the remedy.

use std::fs;
use std::path::Path;

use serde::Serialize;

/// One check.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What was checked.
    pub check: &'static str,
    /// Whether it is as it should be.
    pub ok: bool,
    /// What was found, and where it is not ok what to do.
    pub says: String,
}

/// Bit of CAP_NET_ADMIN (capabilities(7)).
const CAP_NET_ADMIN: u32 = 12;

/// All checks of the host; changes nothing.
pub fn host() -> Vec<Finding> {
    vec![net_admin(), tun(), ipv6()]
}

/// The failed checks that make a start impossible, as one error.
pub fn require() -> anyhow::Result<()> {
    let failed: Vec<String> =
        [net_admin(), tun()].into_iter().filter(|finding| !finding.ok).map(|finding| finding.says).collect();
    if failed.is_empty() { Ok(()) } else { anyhow::bail!(failed.join("; and ")) }
}

fn net_admin() -> Finding {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    let ok = effective & (1 << CAP_NET_ADMIN) != 0;
    let says = if ok {
        "CAP_NET_ADMIN is there"
    } else {
        "CAP_NET_ADMIN is missing, without which no interface and no route can be made: run as root, or give the service \
         `AmbientCapabilities=CAP_NET_ADMIN` (systemd) or `capabilities.add: [NET_ADMIN]` (Kubernetes)"
    };
    Finding { check: "capability", ok, says: says.into() }
}

fn tun() -> Finding {
    let path = Path::new("/dev/net/tun");
    let (ok, says) = match fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => (true, "/dev/net/tun opens".to_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => (
            false,
            "/dev/net/tun is missing: run `modprobe tun`, or in a container mount the host's /dev/net/tun".to_owned(),
        ),
        Err(error) => {
            (false, format!("/dev/net/tun does not open ({error}): give this user or container access to it"))
        }
    };
    Finding { check: "tun", ok, says }
}

fn ipv6() -> Finding {
    let off = fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6").map(|text| text.trim() == "1");
    let says = match off {
        Ok(false) => "IPv6 is on",
        Ok(true) => "IPv6 is switched off (net.ipv6.conf.all.disable_ipv6): the mesh carries IPv4 alone",
        Err(_) => "the kernel has no IPv6: the mesh carries IPv4 alone",
    };
    Finding { check: "ipv6", ok: matches!(off, Ok(false)), says: says.into() }
}
