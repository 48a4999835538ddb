//! What has to be made for a pod, as a value: steps in their order, and what takes each of them back.
//!
//! ```text
//!   host                                             pod
//!   ks39a7199053c6  02:6b:73:00:00:01 ═══ veth ═══  eth0  02:..  10.244.1.2/32  fd00:244:1::2/128
//!   10.244.1.2      dev ks..  scope link             default via 169.254.1.1  (neighbour, permanent: host's MAC)
//!   fd00:244:1::2   dev ks..                         default via fe80::1      (neighbour, permanent: host's MAC)
//!   neighbours, permanent: the pod's MAC
//! ```
//!
//! Both ends know each other's hardware address from the start. So nobody asks by ARP or neighbour discovery and nobody
//! has to answer for an address that is not there: no proxy ARP, no bridge, no wait for duplicate address detection, and
//! the first packet leaves at once.
//!
//! Only the interface has an inverse of its own; what is made on it goes when it goes. Leases are taken before the plan
//! and given back after it (`verbs::add`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::attachment::{Attachment, HOST_MAC, Mac, interface_group};
use crate::spec::{Code, Dns, Error, Interface, Ip, Result, Route, Success};

/// A pod's next hop for IPv4: link-local, so that no pod CIDR loses an address for it (RFC 3927).
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// A pod's next hop for IPv6.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// The origin written into the host's routes to its pods (`rtm_protocol` of rtnetlink(7)): the number beside the mesh's own
/// 152, which the daemon takes for its routes and would clean up.
pub const ROUTE_PROTOCOL: u8 = 153;

/// The smallest MTU of IPv6 (RFC 8200); below it the kernel takes IPv6 off the interface.
const MIN_MTU_V6: u32 = 1280;

/// Everything that is made for one attachment, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// From the first to the last.
    pub steps: Vec<Step>,
}

/// One step. Each is one request to the kernel, which is done whole or not at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The host forwards packets of this family. Of the whole node, so it is never taken back.
    Forward(Family),
    /// The pair of interfaces, the pod's end already in the pod.
    CreatePair(Pair),
    /// The host's interface is up, and has this text for people.
    HostUp(String),
    /// The pod's interface may have IPv6, which some runtimes turn off.
    AllowIpv6(String),
    /// The pod's interface is up.
    PodUp,
    /// The pod's interface has this address.
    PodAddress(IpAddr),
    /// The pod knows the hardware address of its gateway.
    PodGateway(IpAddr),
    /// The pod sends this by its gateway.
    PodRoute(IpNet),
    /// The host knows the pod's hardware address.
    HostNeighbour(IpAddr, Mac),
    /// The host sends this to the pod.
    HostRoute(IpAddr),
    /// Both ends carry packets, and the pod answers for its addresses. The kernel arranges either some time after it was
    /// asked, and drops what comes before.
    Settle(Vec<IpAddr>),
}

/// A pair of interfaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// Name on the host.
    pub host: String,
    /// Name in the pod.
    pub pod: String,
    /// Hardware address in the pod.
    pub pod_mac: Mac,
    /// Of both ends, in bytes.
    pub mtu: u32,
    /// Number of the network on the host.
    pub group: u32,
}

/// How a step is taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inverse {
    /// By deleting the pair, and with it everything on it.
    DeletePair,
    /// By nothing: it goes with the pair, or stays because it is the node's.
    Nothing,
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// The pod's next hop.
    pub fn gateway(self) -> IpAddr {
        match self {
            Self::V4 => GATEWAY_V4.into(),
            Self::V6 => GATEWAY_V6.into(),
        }
    }

    /// The prefix of everything.
    pub fn default_route(self) -> IpNet {
        match self {
            Self::V4 => IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0),
            Self::V6 => IpNet::new_assert(Ipv6Addr::UNSPECIFIED.into(), 0),
        }
    }
}

impl Step {
    /// What takes this step back.
    pub fn inverse(&self) -> Inverse {
        match self {
            Self::CreatePair(_) => Inverse::DeletePair,
            Self::Forward(_)
            | Self::HostUp(_)
            | Self::AllowIpv6(_)
            | Self::PodUp
            | Self::PodAddress(_)
            | Self::PodGateway(_)
            | Self::PodRoute(_)
            | Self::HostNeighbour(..)
            | Self::HostRoute(_)
            | Self::Settle(_) => Inverse::Nothing,
        }
    }

    /// What it does, to complete "cannot".
    pub fn describe(&self) -> String {
        match self {
            Self::Forward(Family::V4) => "turn on forwarding of IPv4".into(),
            Self::Forward(Family::V6) => "turn on forwarding of IPv6".into(),
            Self::CreatePair(pair) => format!("make the interfaces {} and {}", pair.host, pair.pod),
            Self::HostUp(_) => "set the host's interface up".into(),
            Self::AllowIpv6(interface) => format!("allow IPv6 on the pod's {interface}"),
            Self::PodUp => "set the pod's interface up".into(),
            Self::PodAddress(address) => format!("give {address} to the pod"),
            Self::PodGateway(gateway) => format!("tell the pod where {gateway} is"),
            Self::PodRoute(to) => format!("give the pod a route to {to}"),
            Self::HostNeighbour(address, _) => format!("tell the host where {address} is"),
            Self::HostRoute(address) => format!("give the host a route to {address}"),
            Self::Settle(_) => "wait until both ends carry packets".into(),
        }
    }
}

/// What an attachment gets, once its addresses are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Whose.
    pub attachment: Attachment,
    /// Hardware address in the pod.
    pub mac: Mac,
    /// MTU of both ends in bytes.
    pub mtu: u32,
    /// Addresses, one of a family at most.
    pub addresses: Vec<IpAddr>,
    /// More specific routes that an IPAM plugin asked for. They go to the same gateway.
    pub routes: Vec<IpNet>,
}

impl Wanted {
    /// The steps, or why this cannot be made.
    pub fn plan(&self) -> Result<Plan> {
        if self.addresses.is_empty() {
            return Err(Error::new(
                Code::InvalidConfig,
                "there is no address for the pod: neither pod CIDR nor IPAM gave one",
            ));
        }
        let mut families: Vec<Family> = self.addresses.iter().map(|address| Family::of(*address)).collect();
        families.sort_unstable();
        families.dedup();
        if families.contains(&Family::V6) && self.mtu < MIN_MTU_V6 {
            return Err(Error::new(
                Code::InvalidConfig,
                format!(
                    "an MTU of {} is too small for IPv6, which needs {MIN_MTU_V6}: raise \"mtu\", or give pods IPv4 only",
                    self.mtu
                ),
            ));
        }
        let mut steps: Vec<Step> = families.iter().copied().map(Step::Forward).collect();
        steps.push(Step::CreatePair(Pair {
            host: self.attachment.host_name(),
            pod: self.attachment.ifname.clone(),
            pod_mac: self.mac,
            mtu: self.mtu,
            group: interface_group(&self.attachment.network),
        }));
        steps.push(Step::HostUp(self.attachment.to_string()));
        if families.contains(&Family::V6) {
            steps.push(Step::AllowIpv6(self.attachment.ifname.clone()));
        }
        steps.push(Step::PodUp);
        steps.extend(self.addresses.iter().copied().map(Step::PodAddress));
        steps.extend(families.iter().map(|family| Step::PodGateway(family.gateway())));
        steps.extend(self.pod_routes().map(Step::PodRoute));
        steps.extend(self.addresses.iter().map(|address| Step::HostNeighbour(*address, self.mac)));
        steps.extend(self.addresses.iter().copied().map(Step::HostRoute));
        steps.push(Step::Settle(self.addresses.clone()));
        Ok(Plan { steps })
    }

    /// What the runtime and the plugins behind us are told.
    pub fn result(&self, netns: &str, dns: Dns) -> Success {
        let host = Interface {
            name: self.attachment.host_name(),
            mac: HOST_MAC.to_string(),
            mtu: Some(self.mtu),
            sandbox: String::new(),
        };
        let pod = Interface {
            name: self.attachment.ifname.clone(),
            mac: self.mac.to_string(),
            mtu: Some(self.mtu),
            sandbox: netns.into(),
        };
        let ip = |address: &IpAddr| Ip {
            address: IpNet::from(*address),
            gateway: Some(Family::of(*address).gateway()),
            interface: Some(1),
        };
        let route = |dst: IpNet| Route { dst, gw: Some(Family::of(dst.addr()).gateway()), mtu: None };
        Success {
            interfaces: vec![host, pod],
            ips: self.addresses.iter().map(ip).collect(),
            routes: self.pod_routes().map(route).collect(),
            dns,
        }
    }

    /// The default routes of the families that there are, and what was asked for beside them.
    fn pod_routes(&self) -> impl Iterator<Item = IpNet> {
        let has = |family| self.addresses.iter().any(|address| Family::of(*address) == family);
        let families = [Family::V4, Family::V6].into_iter().filter(move |family| has(*family));
        let specific = self.routes.iter().copied();
        let reachable = specific.filter(move |route| route.prefix_len() > 0 && has(Family::of(route.addr())));
        families.map(Family::default_route).chain(reachable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(addresses: &[&str]) -> Wanted {
        let attachment = Attachment { network: "pods".into(), container: "c1".into(), ifname: "eth0".into() };
        Wanted {
            mac: attachment.pod_mac(),
            attachment,
            mtu: 1280,
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
            routes: vec![],
        }
    }

    #[test]
    fn a_pod_with_both_families_has_both_of_everything() {
        let steps = wanted(&["10.244.1.2", "fd00:244:1::2"]).plan().unwrap().steps;
        let count = |wanted: fn(&Step) -> bool| steps.iter().filter(|step| wanted(step)).count();
        assert_eq!(count(|step| matches!(step, Step::PodAddress(_))), 2);
        assert_eq!(count(|step| matches!(step, Step::PodRoute(_))), 2);
        assert_eq!(count(|step| matches!(step, Step::HostRoute(_))), 2);
        assert_eq!(count(|step| matches!(step, Step::PodGateway(_))), 2);
        assert_eq!(count(|step| matches!(step, Step::CreatePair(_))), 1);
    }

    #[test]
    fn a_pod_of_one_family_has_nothing_of_the_other() {
        let steps = wanted(&["10.244.1.2"]).plan().unwrap().steps;
        assert!(!steps.iter().any(|step| matches!(step, Step::AllowIpv6(_) | Step::Forward(Family::V6))));
        let steps = wanted(&["fd00:244:1::2"]).plan().unwrap().steps;
        assert!(!steps.contains(&Step::Forward(Family::V4)));
        assert!(!steps.contains(&Step::PodGateway(GATEWAY_V4.into())));
    }

    #[test]
    fn the_interface_is_made_before_everything_on_it_and_is_all_that_has_to_be_taken_back() {
        let steps = wanted(&["10.244.1.2", "fd00:244:1::2"]).plan().unwrap().steps;
        let made = steps.iter().position(|step| step.inverse() == Inverse::DeletePair).unwrap();
        assert!(steps[..made].iter().all(|step| matches!(step, Step::Forward(_))));
        assert!(steps[made + 1..].iter().all(|step| step.inverse() == Inverse::Nothing));
    }

    #[test]
    fn routes_of_an_ipam_plugin_are_made_beside_the_default_and_not_for_a_family_without_address() {
        let mut wanted = wanted(&["10.244.1.2"]);
        wanted.routes = ["0.0.0.0/0", "192.0.2.0/24", "fd01::/64"].map(|route| route.parse().unwrap()).to_vec();
        let routes: Vec<String> =
            wanted.result("/run/netns/a", Dns::default()).routes.iter().map(|route| route.dst.to_string()).collect();
        assert_eq!(routes, ["0.0.0.0/0", "192.0.2.0/24"]);
    }

    #[test]
    fn what_cannot_be_made_is_said_before_anything_is_made() {
        assert!(wanted(&[]).plan().unwrap_err().is(Code::InvalidConfig));
        let mut small = wanted(&["fd00::2"]);
        small.mtu = 1279;
        assert!(small.plan().unwrap_err().message.contains("1280"));
        small.addresses = vec!["10.0.0.2".parse().unwrap()];
        assert!(small.plan().is_ok());
    }

    #[test]
    fn the_result_lists_both_ends_and_where_they_are() {
        let result = wanted(&["10.244.1.2"]).result("/run/netns/a", Dns::default());
        assert_eq!(result.interfaces[0].sandbox, "");
        assert_eq!(
            (result.interfaces[1].name.as_str(), result.interfaces[1].sandbox.as_str()),
            ("eth0", "/run/netns/a")
        );
        assert_eq!(result.ips[0].interface, Some(1));
        assert_eq!(result.ips[0].address.to_string(), "10.244.1.2/32");
    }
}
