//! The host's other interfaces, and which of their addresses may be offered to peers.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::path::candidate::usable;

/// Interfaces with names that begin so belong to containers and their networks. Their addresses exist on every node
/// alike or live inside a tunnel, so a peer that probes one reaches itself, a stranger's container, or the mesh through
/// itself (the classic failure on Cilium clusters).
pub const CONTAINER_INTERFACE_PREFIXES: &[&str] = &[
    "br-",
    "cali",
    "cilium",
    "cni",
    "docker",
    "flannel",
    "kube-bridge",
    "kube-ipvs",
    "lxc",
    "lxdbr",
    "nodelocaldns",
    "podman",
    "tunl",
    "veth",
    "virbr",
    "vxlan",
    "weave",
];

/// An interface of the host that is not the mesh's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostInterface {
    /// Its name.
    pub name: String,
    /// Whether it is up (`IFF_UP` of netdevice(7)).
    pub up: bool,
    /// Its addresses.
    pub addresses: Vec<HostAddress>,
}

/// An address of one of the host's interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostAddress {
    /// The address with the length of its network.
    pub net: IpNet,
    /// Whether its scope is global (ip-address(8)).
    pub global: bool,
    /// Whether connections may start from it: not tentative, a duplicate or deprecated (RFC 4862).
    pub preferred: bool,
}

/// The addresses that a peer may try, sorted: global ones of interfaces that are up, outside of containers and of the
/// `mesh` prefixes.
pub fn host_addresses(interfaces: &[HostInterface], mesh: &[IpNet]) -> Vec<IpAddr> {
    let outside = interfaces.iter().filter(|interface| interface.up && !of_containers(&interface.name));
    let offered = outside.flat_map(|interface| &interface.addresses).filter(|a| a.global && a.preferred);
    let mut addresses: Vec<IpAddr> = offered.map(|a| a.net.addr()).filter(|&addr| usable(addr, mesh)).collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

fn of_containers(name: &str) -> bool {
    CONTAINER_INTERFACE_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str, up: bool, addresses: &[&str]) -> HostInterface {
        let address = |net: &&str| HostAddress { net: net.parse().unwrap(), global: true, preferred: true };
        HostInterface { name: name.into(), up, addresses: addresses.iter().map(address).collect() }
    }

    #[test]
    fn only_addresses_that_a_peer_can_reach_are_offered() {
        let mut interfaces = vec![
            interface("lo", true, &["127.0.0.1/8", "::1/128", "203.0.113.9/32"]),
            interface("eth0", true, &["192.0.2.7/24", "2001:db8::7/64", "fe80::7/64", "10.98.0.3/16"]),
            interface("eth1", false, &["192.0.2.8/24"]),
            interface("eth2", true, &["192.0.2.7/24"]),
            interface("cni0", true, &["10.42.1.1/24"]),
            interface("br-0123456789ab", true, &["172.18.0.1/16"]),
            interface("cilium_host", true, &["10.0.0.1/32"]),
        ];
        interfaces.push(HostInterface {
            name: "eth3".into(),
            up: true,
            addresses: vec![
                HostAddress { net: "2001:db8::8/64".parse().unwrap(), global: true, preferred: false },
                HostAddress { net: "192.0.2.9/24".parse().unwrap(), global: false, preferred: true },
            ],
        });
        let offered = host_addresses(&interfaces, &["10.98.0.0/16".parse().unwrap()]);
        let expected: Vec<IpAddr> =
            ["192.0.2.7", "203.0.113.9", "2001:db8::7"].iter().map(|a| a.parse().unwrap()).collect();
        assert_eq!(offered, expected);
    }

    #[test]
    fn a_prefix_matches_only_at_the_beginning_of_a_name() {
        assert!(of_containers("veth12ab"));
        assert!(!of_containers("eth0"));
        assert!(!of_containers("my-docker"));
    }
}
