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

/// How the interfaces of a mesh by its default name, and those of pods (`ks` and a hash), are called in a rule.
const OUR_LINKS: &str = "ks+";

/// Whether somebody's firewall drops what this host forwards for its pods, as Docker and ufw do. No table of ours can undo
/// that. Nothing is said where `iptables` is not there to be asked.
pub fn forwarding(interface: &str) -> Vec<Finding> {
    let asked = ["iptables", "ip6tables"].into_iter().filter_map(|program| {
        let output = Command::new(program).arg("-S").output().ok().filter(|done| done.status.success())?;
        Some((program, String::from_utf8_lossy(&output.stdout).into_owned()))
    });
    asked.filter_map(|(program, rules)| dropped(program, &rules, interface)).collect()
}

/// `rules`: all chains, as `iptables -S` prints them.
fn dropped(program: &str, rules: &str, interface: &str) -> Option<Finding> {
    if !rules.lines().any(|line| line.trim() == "-P FORWARD DROP") {
        return None;
    }
    let rules: Vec<Vec<&str>> = rules.lines().map(without_comment).collect();
    // What FORWARD passes everything to, DOCKER-USER for example, decides as FORWARD does.
    let passed_to = rules.iter().filter_map(|rule| match rule[..] {
        ["-A", "FORWARD", "-j", chain] => Some(chain),
        _ => None,
    });
    let chains: Vec<&str> = passed_to.chain(["FORWARD"]).collect();
    let accepts = |direction: &str, link: &str| {
        rules.iter().any(|rule| match rule[..] {
            ["-A", chain, way, name, "-j", "ACCEPT"] => {
                let covers = name == link || name.strip_suffix('+').is_some_and(|start| link.starts_with(start));
                way == direction && covers && chains.contains(&chain)
            }
            ["-A", chain, "-j", "ACCEPT"] => chains.contains(&chain),
            _ => false,
        })
    };
    let links = [OUR_LINKS, interface].into_iter().take(if interface.starts_with("ks") { 1 } else { 2 });
    let missing: Vec<String> = links
        .flat_map(|link| [("-i", link), ("-o", link)])
        .filter(|(direction, link)| !accepts(direction, link))
        .map(|(direction, link)| format!("{program} -I FORWARD {direction} {link} -j ACCEPT"))
        .collect();
    if missing.is_empty() {
        return None;
    }
    let says = format!(
        "the policy of {program}'s chain FORWARD is DROP (Docker and ufw do that), so packets of pods may be dropped here: \
         `{}`, with Docker into DOCKER-USER; with ufw DEFAULT_FORWARD_POLICY=\"ACCEPT\" in /etc/default/ufw",
        missing.join("; ")
    );
    Some(Finding { check: "forward", ok: false, says })
}

/// The words of a rule. A comment restricts nothing.
fn without_comment(rule: &str) -> Vec<&str> {
    let Some((before, comment)) = rule.split_once(" -m comment --comment ") else {
        return rule.split_whitespace().collect();
    };
    let after = match comment.strip_prefix('"') {
        Some(quoted) => quoted.split_once("\" ").map_or("", |(_, after)| after),
        None => comment.split_once(' ').map_or("", |(_, after)| after),
    };
    before.split_whitespace().chain(after.split_whitespace()).collect()
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

    const DOCKER: &str = "-P INPUT ACCEPT\n-P FORWARD DROP\n-N DOCKER-USER\n-A FORWARD -j DOCKER-USER\n\
        -A FORWARD -o docker0 -j ACCEPT\n-A DOCKER-USER -j RETURN\n";

    #[test]
    fn a_firewall_that_drops_what_is_forwarded_is_named_with_the_remedy() {
        let found = dropped("iptables", DOCKER, "ksmesh0").unwrap();
        let remedy = "`iptables -I FORWARD -i ks+ -j ACCEPT; iptables -I FORWARD -o ks+ -j ACCEPT`";
        assert!(found.says.contains(remedy) && found.says.contains("ufw"), "{}", found.says);
        let named = dropped("ip6tables", DOCKER, "mesh7").unwrap().says;
        for part in ["-i ks+", "-o ks+", "-i mesh7", "-o mesh7"] {
            assert!(named.contains(&format!("ip6tables -I FORWARD {part} -j ACCEPT")), "{named}");
        }
        assert!(dropped("iptables", "-P FORWARD ACCEPT\n", "ksmesh0").is_none());
        assert!(dropped("iptables", "", "ksmesh0").is_none());
    }

    #[test]
    fn what_lets_pods_through_is_recognized_and_what_does_not_is_told() {
        let said = |rules: &str, interface| dropped("iptables", &format!("{DOCKER}{rules}"), interface);
        let both = "-A FORWARD -i ks+ -j ACCEPT\n-A FORWARD -o ks+ -j ACCEPT\n";
        assert!(said(both, "ksmesh0").is_none());
        assert!(said(&both.replace("FORWARD", "DOCKER-USER"), "ksmesh0").is_none());
        assert!(said(&both.replace(" -j", " -m comment --comment \"pods of the mesh\" -j"), "ksmesh0").is_none());
        assert!(said("-A DOCKER-USER -j ACCEPT\n", "mesh7").is_none());
        assert!(said(&format!("{both}{}", both.replace("ks+", "mesh+")), "mesh7").is_none());

        let the_interface_alone = both.replace("ks+", "ksmesh0");
        let one_way = "-A FORWARD -i ks+ -j ACCEPT\n";
        let of_a_chain_that_nothing_comes_to = both.replace("FORWARD", "OTHER");
        let of_one_protocol = both.replace(" -j", " -p tcp -j");
        let all_but = both.replace("-i ks+", "! -i ks+");
        for rules in [&*the_interface_alone, one_way, &of_a_chain_that_nothing_comes_to, &of_one_protocol, &all_but, ""]
        {
            assert!(said(rules, "ksmesh0").is_some(), "{rules}");
        }
        assert!(!said(one_way, "ksmesh0").unwrap().says.contains("-i ks+"), "what is there is not asked for");
        assert!(said(both, "mesh7").unwrap().says.contains("-i mesh7"));
    }
}
