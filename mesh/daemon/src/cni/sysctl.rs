//! Switches of the kernel without which a node forwards nothing for its pods: which have to be changed, and changing them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where the switches are: first as this process has them, then as the chart mounts the host's, because a container's own
/// are read-only.
const PLACES: [&str; 2] = ["/proc/sys", "/host/proc/sys"];

/// A switch that is not as pods need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Switch {
    /// Its path, as in `net/ipv4/ip_forward`.
    pub path: String,
    /// What it has to be.
    pub value: u8,
    /// What goes wrong otherwise.
    pub why: &'static str,
}

/// What pods need of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needs<'a> {
    /// The mesh's interface.
    pub interface: &'a str,
    /// Whether pods have IPv4.
    pub ipv4: bool,
    /// Whether pods have IPv6.
    pub ipv6: bool,
}

/// The switches to change, in this order. `read`: how a switch is; none where it does not exist. `interfaces`: all there are.
pub fn needed(needs: &Needs<'_>, interfaces: &[String], read: impl Fn(&str) -> Option<u8>) -> Vec<Switch> {
    let mut switches = Vec::new();
    let mut want = |path: String, value, why| {
        if read(&path).is_some_and(|found| found != value) {
            switches.push(Switch { path, value, why });
        }
    };
    if needs.ipv4 {
        want("net/ipv4/ip_forward".into(), 1, "this host forwards no packet of its pods");
        // The stricter of the interface's and everybody's counts, as long as neither is 2 (ip-sysctl in the kernel's docs).
        let everybody = read("net/ipv4/conf/all/rp_filter").unwrap_or(0);
        let path = format!("net/ipv4/conf/{}/rp_filter", needs.interface);
        if read(&path).is_some_and(|own| own.max(everybody) == 1) {
            want(path, 2, "packets that come another way than they go are dropped (strict reverse path filter)");
        }
    }
    if needs.ipv6 && read("net/ipv6/conf/all/forwarding") == Some(0) {
        // A host that forwards reads no more router advertisements, unless it is told to by 2: it would lose its own way out.
        for interface in interfaces {
            let path = format!("net/ipv6/conf/{interface}/accept_ra");
            if read(&path) == Some(1) {
                want(path, 2, "a host that forwards would lose its own IPv6 route");
            }
        }
        want("net/ipv6/conf/all/forwarding".into(), 1, "this host forwards no IPv6 packet of its pods");
    }
    switches
}

/// Makes the switches so. What could not be, a sentence each with the remedy.
pub fn apply(needs: &Needs<'_>) -> Vec<String> {
    apply_in(needs, &PLACES.map(PathBuf::from))
}

fn apply_in(needs: &Needs<'_>, places: &[PathBuf]) -> Vec<String> {
    let Some(own) = places.first() else { return Vec::new() };
    let read = |path: &str| fs::read_to_string(own.join(path)).ok()?.trim().parse().ok();
    let interfaces: Vec<String> = fs::read_dir(own.join("net/ipv6/conf"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    let mut problems = Vec::new();
    for Switch { path, value, why } in needed(needs, &interfaces, read) {
        match set(&path, value, places) {
            Ok(()) => tracing::info!(switch = path.replace('/', "."), value, "set a switch of the kernel"),
            Err(error) => {
                let name = path.replace('/', ".");
                problems.push(format!(
                    "{name} has to be {value}, or {why}; it cannot be set from here ({error}): on the host, write `{name} = {value}` \
                     into /etc/sysctl.d/90-keystone-mesh.conf and run `sysctl --system`"
                ));
            }
        }
    }
    problems
}

fn set(path: &str, value: u8, places: &[PathBuf]) -> io::Result<()> {
    let mut failed = io::Error::from(io::ErrorKind::NotFound);
    for place in places.iter().filter(|place| Path::new(place).is_dir()) {
        match fs::write(place.join(path), value.to_string()) {
            Ok(()) => return Ok(()),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn changes(ipv4: bool, ipv6: bool, found: &[(&str, u8)]) -> Vec<(String, u8)> {
        let needs = Needs { interface: "ksmesh0", ipv4, ipv6 };
        let found: BTreeMap<&str, u8> = found.iter().copied().collect();
        let interfaces = ["all", "eth0", "ksmesh0"].map(str::to_owned);
        let switches = needed(&needs, &interfaces, |path| found.get(path).copied());
        switches.into_iter().map(|switch| (switch.path, switch.value)).collect()
    }

    #[test]
    fn what_is_right_is_left_alone_and_what_does_not_exist_too() {
        assert_eq!(changes(true, true, &[]), []);
        let right =
            [("net/ipv4/ip_forward", 1), ("net/ipv4/conf/all/rp_filter", 0), ("net/ipv4/conf/ksmesh0/rp_filter", 0)];
        assert_eq!(changes(true, true, &right), []);
        assert_eq!(changes(false, false, &[("net/ipv4/ip_forward", 0), ("net/ipv6/conf/all/forwarding", 0)]), []);
    }

    #[test]
    fn a_strict_reverse_path_filter_becomes_loose_where_packets_of_pods_come_in() {
        for (all, own, changed) in
            [(1, 0, true), (0, 1, true), (1, 1, true), (2, 1, false), (1, 2, false), (0, 0, false)]
        {
            let found = [("net/ipv4/conf/all/rp_filter", all), ("net/ipv4/conf/ksmesh0/rp_filter", own)];
            let expected: &[(String, u8)] = &[("net/ipv4/conf/ksmesh0/rp_filter".to_owned(), 2)];
            assert_eq!(changes(true, false, &found), if changed { expected } else { &[] }, "{all} {own}");
        }
        let found = [("net/ipv4/conf/all/rp_filter", 1), ("net/ipv4/conf/eth0/rp_filter", 1)];
        assert_eq!(changes(true, false, &found), [], "no other interface is touched");
    }

    #[test]
    fn forwarding_ipv6_does_not_cost_the_host_its_route() {
        let found = [
            ("net/ipv6/conf/all/forwarding", 0),
            ("net/ipv6/conf/all/accept_ra", 1),
            ("net/ipv6/conf/eth0/accept_ra", 1),
            ("net/ipv6/conf/ksmesh0/accept_ra", 0),
        ];
        let changed = changes(false, true, &found);
        let paths: Vec<&str> = changed.iter().map(|(path, _)| path.as_str()).collect();
        assert_eq!(
            paths,
            ["net/ipv6/conf/all/accept_ra", "net/ipv6/conf/eth0/accept_ra", "net/ipv6/conf/all/forwarding"],
            "router advertisements first"
        );
    }

    #[test]
    fn what_a_container_cannot_set_is_set_where_the_hosts_switches_are_mounted_or_told() {
        let root = tempfile::tempdir().unwrap();
        let (own, host) = (root.path().join("own"), root.path().join("host"));
        fs::create_dir_all(own.join("net/ipv4")).unwrap();
        fs::write(own.join("net/ipv4/ip_forward"), "0\n").unwrap();
        // Nobody, not even root, can write into a directory as a file.
        let places = [own.clone(), host.clone()];
        let needs = Needs { interface: "ksmesh0", ipv4: true, ipv6: false };
        assert_eq!(apply_in(&needs, &places), [""; 0]);
        assert_eq!(fs::read_to_string(own.join("net/ipv4/ip_forward")).unwrap(), "1");

        let wrong = set("net/ipv4/no_such/switch", 1, &places);
        assert!(wrong.is_err());
        fs::create_dir_all(host.join("net/ipv4/no_such")).unwrap();
        set("net/ipv4/no_such/switch", 1, &places).unwrap();
        assert_eq!(fs::read_to_string(host.join("net/ipv4/no_such/switch")).unwrap(), "1");
    }
}
