//! The network's own document: what every member must know before it can reach anyone.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::facts::{Facts, FieldError, Malformed, Reader, serde_as_facts};
use crate::key::{Identity, NodeId, Signature};
use crate::relay::address::{HostPort, RelayAddr, Rendezvous};

const NETWORK_KIND: &str = "network 1";

/// The default IPv4 mesh prefix: private (RFC 1918), and outside 100.64.0.0/10 (RFC 6598), which carriers and other
/// overlays use, and outside 10.42.0.0/15, which k3s gives to pods and services.
pub const DEFAULT_IPV4: &str = "10.98.0.0/16";

/// The network's IPv6 prefix: a unique local /48 (RFC 4193) whose global ID comes from the network key, so that two
/// networks practically never collide.
pub fn default_ipv6(network: NodeId) -> Ipv6Net {
    let id = network.as_bytes();
    let address = Ipv6Addr::from([0xfd, id[0], id[1], id[2], id[3], id[4], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    Ipv6Net::new(address, 48).expect("48 is a valid prefix length")
}

/// What every member knows of the network; signed by the network key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// The network key: the control plane's identity.
    pub id: NodeId,
    /// IPv4 prefix of the mesh.
    pub ipv4: Ipv4Net,
    /// IPv6 prefix of the mesh.
    pub ipv6: Ipv6Net,
    /// The relays, best first; at most 4.
    pub relays: Vec<RelayAddr>,
    /// Where the control-plane host is reachable from outside; at most 8.
    pub gateways: Vec<HostPort>,
    /// Grows with every change.
    pub serial: u64,
}

impl Network {
    /// The prefixes of the mesh itself.
    pub fn prefixes(&self) -> [IpNet; 2] {
        [self.ipv4.into(), self.ipv6.into()]
    }

    /// Every way to the control plane.
    pub fn rendezvous(&self) -> Vec<Rendezvous> {
        let gateways = self.gateways.iter().cloned().map(Rendezvous::Gateway);
        gateways.chain(self.relays.iter().cloned().map(Rendezvous::Relay)).collect()
    }

    fn facts(&self) -> Facts {
        Facts::default()
            .set("network", self.id)
            .set("ipv4", self.ipv4)
            .set("ipv6", self.ipv6)
            .set_list("relays", &self.relays)
            .set_list("gateways", &self.gateways)
            .set("serial", self.serial)
    }

    /// Signs the document with the network key, unless it is one that readers refuse: too many relays or gateways, or a
    /// prefix that can be no mesh's.
    pub fn sign(self, network: &Identity) -> Result<SignedNetwork, Malformed> {
        assert_eq!(self.id, network.id(), "only the network key signs its document");
        let signature = self.facts().sign(NETWORK_KIND, network);
        SignedNetwork::from_map(&SignedNetwork { network: self, signature }.to_map())
    }
}

/// A network document whose signature was verified against the network that it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedNetwork {
    network: Network,
    signature: Signature,
}

impl SignedNetwork {
    /// The document.
    pub fn get(&self) -> &Network {
        &self.network
    }

    /// The facts with their signature, as stored and sent.
    pub fn to_map(&self) -> BTreeMap<String, String> {
        self.network.facts().into_map("signature", &self.signature)
    }

    /// Reads and verifies [`SignedNetwork::to_map`]'s form. Whether the network is *ours* is the caller's question.
    pub fn from_map(map: &BTreeMap<String, String>) -> Result<Self, Malformed> {
        let mut reader = Reader::new(map);
        let id = reader.required("network");
        let ipv4: Option<Ipv4Net> = reader.required("ipv4");
        let ipv6: Option<Ipv6Net> = reader.required("ipv6");
        let relays = reader.list("relays", crate::node::MAX_RELAYS);
        let gateways = reader.list("gateways", 8);
        let serial = reader.required("serial");
        let signature = reader.required("signature");
        for prefix in ipv4.map(IpNet::from).into_iter().chain(ipv6.map(IpNet::from)) {
            if let Err(why) = check_prefix(prefix) {
                let key = if prefix.addr().is_ipv4() { "ipv4" } else { "ipv6" };
                reader.fault(FieldError::Invalid { key, why: why.to_string() });
            }
        }
        let signed = (|| {
            let network = Network { id: id?, ipv4: ipv4?, ipv6: ipv6?, relays, gateways, serial: serial? };
            Some(Self { network, signature: signature? })
        })();
        if let Some(Self { network, signature }) = &signed
            && let Err(error) = network.facts().verify(NETWORK_KIND, network.id, signature)
        {
            reader.fault(error);
        }
        reader.finish(signed)
    }
}

serde_as_facts!(SignedNetwork);

/// Why a mesh prefix was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrefixError {
    /// Host bits are set.
    #[error("{0} has host bits set; did you mean {1}?")]
    HostBits(IpNet, IpNet),
    /// Too few or too many addresses.
    #[error("{0} is no size for a mesh; use a prefix from /8 to /29 (IPv4) or from /32 to /120 (IPv6)")]
    Size(IpNet),
    /// Carriers' shared address space: CGNAT routers and other overlays use it.
    #[error("{0} lies in 100.64.0.0/10, which carrier NATs and other overlays use; choose another, as in 10.98.0.0/16")]
    Shared(IpNet),
    /// Loopback, link-local or multicast.
    #[error("{0} is loopback, link-local or multicast space; choose a private prefix, as in 10.98.0.0/16")]
    Special(IpNet),
}

/// Checks that a prefix can be a mesh's.
pub fn check_prefix(prefix: IpNet) -> Result<(), PrefixError> {
    if prefix.trunc() != prefix {
        return Err(PrefixError::HostBits(prefix, prefix.trunc()));
    }
    let sizes = if prefix.addr().is_ipv4() { 8..=29 } else { 32..=120 };
    if !sizes.contains(&prefix.prefix_len()) {
        return Err(PrefixError::Size(prefix));
    }
    let shared: IpNet = Ipv4Net::new_assert([100, 64, 0, 0].into(), 10).into();
    if shared.contains(&prefix) || prefix.contains(&shared) {
        return Err(PrefixError::Shared(prefix));
    }
    let special = match prefix.addr() {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_link_local() || v4.is_multicast(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unicast_link_local() || v6.is_multicast(),
    };
    if special { Err(PrefixError::Special(prefix)) } else { Ok(()) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::node::tests::secret;

    pub(crate) fn network(byte: u8) -> Network {
        let id = secret(byte).identity().id();
        Network {
            id,
            ipv4: DEFAULT_IPV4.parse().unwrap(),
            ipv6: default_ipv6(id),
            relays: vec![format!("{}@relay.example.org:51840", secret(200).identity().id()).parse().unwrap()],
            gateways: vec![],
            serial: 1,
        }
    }

    #[test]
    fn a_document_survives_json_and_refuses_changes() {
        let signed = network(1).sign(&secret(1).identity()).unwrap();
        let json = serde_json::to_string(&signed).unwrap();
        assert_eq!(serde_json::from_str::<SignedNetwork>(&json).unwrap(), signed);
        let mut map = signed.to_map();
        map.insert("ipv4".into(), "10.99.0.0/16".into());
        assert!(SignedNetwork::from_map(&map).is_err());
    }

    #[test]
    fn a_document_that_nobody_would_read_is_not_signed() {
        let mut crowded = network(1);
        crowded.relays = vec![crowded.relays[0].clone(); 5];
        let error = crowded.sign(&secret(1).identity()).unwrap_err().to_string();
        assert!(error.contains("`relays`") && error.contains('4'), "{error}");
    }

    #[test]
    fn prefixes_that_break_hosts_are_refused() {
        for bad in ["100.64.0.0/10", "100.100.0.0/16", "10.98.0.1/16", "10.98.0.0/30", "127.0.0.0/8", "fe80::/64"] {
            assert!(check_prefix(bad.parse().unwrap()).is_err(), "{bad}");
        }
        for good in ["10.98.0.0/16", "192.168.77.0/24", "fd12:3456:789a::/48"] {
            assert!(check_prefix(good.parse().unwrap()).is_ok(), "{good}");
        }
    }
}
