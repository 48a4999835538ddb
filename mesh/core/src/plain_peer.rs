//! Machines with stock WireGuard (a laptop, a phone, another site) that a node of the mesh serves.
//!
//! The serving node has the peer in its data plane; for every other node the peer's addresses are among the serving
//! node's approved routes. The statement is signed by the network key and stands in the annotations of a Peer object.

use std::collections::BTreeMap;
use std::num::NonZeroU16;

use ipnet::IpNet;

use crate::annotations;
use crate::facts::{Facts, Malformed, Reader, serde_as_facts};
use crate::key::{Identity, NodeId, PublicKey, Signature};
use crate::node::{MAX_ROUTES, NodeName, read_addresses};
use crate::relay::address::HostPort;

const PEER_KIND: &str = "peer 1";

/// The annotations of a Peer object, without [`annotations::PREFIX`]; the controller writes them all.
pub const KEYS: &[&str] = &[
    "network",
    "node",
    "public-key",
    "addresses",
    "routes",
    "endpoint",
    "persistent-keepalive",
    "peer-serial",
    "peer-signature",
];

/// What the network says of a plain peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlainPeer {
    /// The network that approves; its key signs.
    pub network: NodeId,
    /// The peer's name.
    pub name: NodeName,
    /// The node that serves it.
    pub node: NodeName,
    /// Its WireGuard key.
    pub public_key: PublicKey,
    /// Its mesh addresses, each a full-length prefix.
    pub addresses: Vec<IpNet>,
    /// Networks behind it.
    pub routes: Vec<IpNet>,
    /// Where it is reached; none: it has to come first.
    pub endpoint: Option<HostPort>,
    /// Seconds between keepalives from the serving node.
    pub persistent_keepalive: Option<u16>,
    /// Grows with every change.
    pub serial: u64,
}

impl PlainPeer {
    fn facts(&self) -> Facts {
        let keepalive = self.persistent_keepalive.map(|seconds| seconds.to_string());
        Facts::default()
            .set("network", self.network)
            .set("name", &self.name)
            .set("node", &self.node)
            .set("public-key", self.public_key)
            .set_list("addresses", &self.addresses)
            .set_list("routes", &self.routes)
            .set_list("endpoint", self.endpoint.as_slice())
            .set("persistent-keepalive", keepalive.unwrap_or_default())
            .set("peer-serial", self.serial)
    }

    /// Whether this takes back what was stated: a peer without an address.
    pub fn is_revoked(&self) -> bool {
        self.addresses.is_empty()
    }

    /// Signs the statement with the network key.
    pub fn sign(self, network: &Identity) -> SignedPlainPeer {
        assert_eq!(self.network, network.id(), "only the network key states plain peers");
        let signature = self.facts().sign(PEER_KIND, network);
        SignedPlainPeer { peer: self, signature }
    }
}

/// A statement whose signature was verified against the network that it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedPlainPeer {
    peer: PlainPeer,
    signature: Signature,
}

impl SignedPlainPeer {
    /// What is stated.
    pub fn get(&self) -> &PlainPeer {
        &self.peer
    }

    /// The facts with their signature, as stored and sent.
    pub fn to_map(&self) -> BTreeMap<String, String> {
        self.peer.facts().into_map("peer-signature", &self.signature)
    }

    /// Reads and verifies [`SignedPlainPeer::to_map`]'s form. Whether the network is *ours* is the caller's question.
    pub fn from_map(map: &BTreeMap<String, String>) -> Result<Self, Malformed> {
        let mut reader = Reader::new(map);
        let network = reader.required("network");
        let name = reader.required("name");
        let node = reader.required("node");
        let public_key = reader.required("public-key");
        let addresses = read_addresses(&mut reader);
        let routes = reader.list("routes", MAX_ROUTES);
        let endpoint = reader.optional("endpoint");
        let persistent_keepalive = reader.optional("persistent-keepalive").map(NonZeroU16::get);
        let serial = reader.required("peer-serial");
        let signature = reader.required("peer-signature");
        let signed = (|| {
            let peer = PlainPeer {
                network: network?,
                name: name?,
                node: node?,
                public_key: public_key?,
                addresses,
                routes,
                endpoint,
                persistent_keepalive,
                serial: serial?,
            };
            Some(Self { peer, signature: signature? })
        })();
        if let Some(Self { peer, signature }) = &signed
            && let Err(error) = peer.facts().verify(PEER_KIND, peer.network, signature)
        {
            reader.fault(error);
        }
        reader.finish(signed)
    }

    /// As annotations of the Peer object, with the prefix; the name is the object's.
    pub fn to_annotations(&self) -> BTreeMap<String, String> {
        annotations::prefixed(self.to_map())
    }

    /// Reads [`SignedPlainPeer::to_annotations`]' form; none where the object carries no statement yet.
    pub fn from_annotations(
        name: &NodeName,
        annotations: &BTreeMap<String, String>,
    ) -> Result<Option<Self>, Malformed> {
        annotations::facts_of(name, KEYS, annotations).map(|facts| Self::from_map(&facts)).transpose()
    }
}

serde_as_facts!(SignedPlainPeer);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::FieldError;
    use crate::node::tests::secret;

    fn laptop() -> SignedPlainPeer {
        let peer = PlainPeer {
            network: secret(1).identity().id(),
            name: "laptop".parse().unwrap(),
            node: "home".parse().unwrap(),
            public_key: secret(9).wireguard(0).public_key(),
            addresses: vec!["10.98.1.1/32".parse().unwrap()],
            routes: vec!["192.168.7.0/24".parse().unwrap()],
            endpoint: Some("laptop.example.org:51820".parse().unwrap()),
            persistent_keepalive: Some(25),
            serial: 7,
        };
        peer.sign(&secret(1).identity())
    }

    #[test]
    fn a_statement_survives_annotations_and_json() {
        let annotations = laptop().to_annotations();
        assert!(
            annotations.keys().all(|key| KEYS.iter().any(|name| key.strip_prefix(annotations::PREFIX) == Some(name)))
        );
        let read = SignedPlainPeer::from_annotations(&"laptop".parse().unwrap(), &annotations).unwrap();
        assert_eq!(read, Some(laptop()));
        let json = serde_json::to_string(&laptop()).unwrap();
        assert_eq!(serde_json::from_str::<SignedPlainPeer>(&json).unwrap(), laptop());
    }

    #[test]
    fn a_statement_moved_to_another_object_or_changed_is_refused() {
        let good = laptop().to_annotations();
        let refused = |name: &str, annotations: &BTreeMap<String, String>| {
            let Malformed(errors) = SignedPlainPeer::from_annotations(&name.parse().unwrap(), annotations).unwrap_err();
            errors
        };
        assert!(matches!(refused("phone", &good)[..], [FieldError::BadSignature { .. }]));
        for (key, value) in [
            ("node", "worker-1".to_owned()),
            ("public-key", secret(3).wireguard(0).public_key().to_string()),
            ("addresses", "10.98.1.2/32".to_owned()),
            ("routes", "0.0.0.0/0".to_owned()),
            ("endpoint", "192.0.2.1:1".to_owned()),
            ("persistent-keepalive", "26".to_owned()),
            ("peer-serial", "8".to_owned()),
        ] {
            let mut bad = good.clone();
            bad.insert(format!("{}{key}", annotations::PREFIX), value);
            assert!(matches!(refused("laptop", &bad)[..], [FieldError::BadSignature { .. }]), "{key}");
        }
    }

    #[test]
    fn an_object_without_a_statement_is_not_faulty() {
        let other = BTreeMap::from([("example.org/owner".to_owned(), "me".to_owned())]);
        assert_eq!(SignedPlainPeer::from_annotations(&"laptop".parse().unwrap(), &other), Ok(None));
        let mut partial = laptop().to_annotations();
        partial.remove("mesh.keystone.cluster/peer-serial");
        partial.insert("mesh.keystone.cluster/persistent-keepalive".into(), "0".into());
        partial.insert("mesh.keystone.cluster/addresses".into(), "10.98.1.0/24".into());
        let Malformed(errors) = SignedPlainPeer::from_annotations(&"laptop".parse().unwrap(), &partial).unwrap_err();
        assert_eq!(errors.len(), 3, "{errors:?}");
    }
}
