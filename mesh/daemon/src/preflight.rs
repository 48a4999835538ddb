//! What the daemon needs of its host, checked before anything is touched. Each finding is a sentence with the remedy.

use std::fs;
use std::path::Path;
use std::process::Command;

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

/// Whether somebody's firewall drops what this host forwards for its pods, as Docker and ufw do. No table of ours can undo
/// that. Nothing is said where `iptables` is not there to be asked.
pub fn forwarding(interface: &str) -> Vec<Finding> {
    let asked = ["iptables", "ip6tables"].into_iter().filter_map(|program| {
        let output =
            Command::new(program).args(["-S", "FORWARD"]).output().ok().filter(|done| done.status.success())?;
        Some((program, String::from_utf8_lossy(&output.stdout).into_owned()))
    });
    asked.filter_map(|(program, rules)| dropped(program, &rules, interface)).collect()
}

fn dropped(program: &str, rules: &str, interface: &str) -> Option<Finding> {
    let drops = rules.lines().any(|line| line.trim() == "-P FORWARD DROP");
    let accepts = |line: &str| line.contains(interface) && line.ends_with("-j ACCEPT");
    if !drops || rules.lines().any(accepts) {
        return None;
    }
    let says = format!(
        "the policy of {program}'s chain FORWARD is DROP (Docker and ufw do that), so packets of pods may be dropped here: \
         `{program} -I FORWARD -i {interface} -j ACCEPT; {program} -I FORWARD -o {interface} -j ACCEPT`, with Docker into \
         DOCKER-USER; with ufw DEFAULT_FORWARD_POLICY=\"ACCEPT\" in /etc/default/ufw"
    );
    Some(Finding { check: "forward", ok: false, says })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_firewall_that_drops_what_is_forwarded_is_named_with_the_remedy() {
        let docker = "-P FORWARD DROP\n-A FORWARD -j DOCKER-USER\n-A FORWARD -o docker0 -j ACCEPT\n";
        let found = dropped("iptables", docker, "ksmesh0").unwrap();
        assert!(found.says.contains("iptables -I FORWARD -i ksmesh0 -j ACCEPT") && found.says.contains("ufw"));
        for fine in ["-P FORWARD ACCEPT\n", "-P FORWARD DROP\n-A FORWARD -i ksmesh0 -j ACCEPT\n", ""] {
            assert!(dropped("iptables", fine, "ksmesh0").is_none(), "{fine}");
        }
    }
}
