//! What a node says of itself, and what it is allowed.
//!
//! A [`NodeRecord`] is the node's own word (its WireGuard key, where it may be reached, which relays it listens on),
//! signed by its identity. An [`Approval`] is the network's word (which addresses and routes are the node's), signed by
//! the network key. Readers act on a node only where both are there and agree on the identity; neither Kubernetes nor
//! a gateway nor another node can make either.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::facts::{Facts, FieldError, Malformed, Reader, serde_as_facts};
use crate::io::excerpt;
use crate::key::{Identity, NodeId, PrivateKey, PublicKey, Signature, serde_as_text};
use crate::path::{Candidate, Nat};
use crate::relay::address::HostPort;

const RECORD_KIND: &str = "record 1";
const APPROVAL_KIND: &str = "approval 1";

/// Most endpoints in a record: a host with many interfaces names its 16 best, a peer probes no more.
pub const MAX_ENDPOINTS: usize = 16;
/// Most relays in a record.
pub const MAX_RELAYS: usize = 4;
/// Most forced endpoints in an approval.
pub const MAX_FORCED: usize = 4;
/// Most mesh addresses of one node.
pub const MAX_ADDRESSES: usize = 8;
/// Most routes in a record or approval.
pub const MAX_ROUTES: usize = 64;
/// Most pod CIDRs of one node: Kubernetes gives one of each family, some allocators several small ones.
pub const MAX_POD_CIDRS: usize = 16;

/// A node's name: a Kubernetes Node name, that is an RFC 1123 subdomain of at most 253 characters.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName(String);

/// Why a name was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a node name: 1 to 253 characters a-z, 0-9, `-` and `.`, each part beginning and ending with a letter \
     or digit"
)]
pub struct NameError(String);

impl NodeName {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let label_ok = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if text.len() > 253 || !text.split('.').all(label_ok) {
            return Err(NameError(excerpt(text)));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

serde_as_text!(NodeName);

/// What a node says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRecord {
    /// The node's name.
    pub name: NodeName,
    /// Who speaks, and whose signature the record carries.
    pub identity: NodeId,
    /// The node's WireGuard key.
    pub public_key: PublicKey,
    /// Where the node may be reached directly, at most [`MAX_ENDPOINTS`].
    pub endpoints: Vec<Candidate>,
    /// The NAT in front of the node.
    pub nat: Nat,
    /// The relays that the node listens on, at most [`MAX_RELAYS`].
    pub relays: Vec<NodeId>,
    /// Networks behind the node for which it asks to be the way, at most [`MAX_ROUTES`].
    pub routes: Vec<IpNet>,
    /// Grows with every change; of two records the higher one counts.
    pub seq: u64,
}

impl NodeRecord {
    fn facts(&self) -> Facts {
        Facts::default()
            .set("name", &self.name)
            .set("identity", self.identity)
            .set("public-key", self.public_key)
            .set_list("endpoints", &self.endpoints)
            .set("nat", self.nat)
            .set_list("relay", &self.relays)
            .set_list("routes-wanted", &self.routes)
            .set("seq", self.seq)
    }

    /// Signs the record. The identity must be the one that the record names.
    pub fn sign(self, identity: &Identity) -> SignedRecord {
        assert_eq!(self.identity, identity.id(), "a node signs only its own record");
        let unsigned = SignedRecord { record: self, key_proof: None, signature: Signature::from_bytes([0; 64]) };
        unsigned.sign(identity)
    }

    /// Signs the record, with proof that the node has the WireGuard key that it shows. Readers ask for it where two
    /// nodes show one key.
    pub fn sign_with_key(self, identity: &Identity, key: &PrivateKey) -> SignedRecord {
        assert_eq!(self.identity, identity.id(), "a node signs only its own record");
        assert_eq!(self.public_key, key.public_key(), "a node proves only the key that it shows");
        let key_proof = Some(key.prove(self.identity));
        SignedRecord { record: self, key_proof, signature: Signature::from_bytes([0; 64]) }.sign(identity)
    }

    /// Whether two records differ in anything but their sequence number.
    pub fn says_the_same_as(&self, other: &Self) -> bool {
        Self { seq: 0, ..self.clone() } == Self { seq: 0, ..other.clone() }
    }
}

/// A record whose signature was verified; there is no other way to make one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedRecord {
    record: NodeRecord,
    key_proof: Option<Signature>,
    signature: Signature,
}

impl SignedRecord {
    /// What the node says.
    pub fn get(&self) -> &NodeRecord {
        &self.record
    }

    /// Whether the node has proved that the WireGuard key is its own.
    pub fn proves_its_key(&self) -> bool {
        let NodeRecord { identity, public_key, .. } = self.record;
        self.key_proof.is_some_and(|proof| public_key.is_proved(identity, &proof))
    }

    /// The facts with their signature, as stored and sent.
    pub fn to_map(&self) -> BTreeMap<String, String> {
        self.facts().into_map("signature", &self.signature)
    }

    fn facts(&self) -> Facts {
        self.record.facts().set_list("key-proof", self.key_proof.as_slice())
    }

    fn sign(mut self, identity: &Identity) -> Self {
        self.signature = self.facts().sign(RECORD_KIND, identity);
        self
    }

    /// Reads and verifies [`SignedRecord::to_map`]'s form. Unknown keys are ignored: they are not signed.
    pub fn from_map(map: &BTreeMap<String, String>) -> Result<Self, Malformed> {
        let mut reader = Reader::new(map);
        let name = reader.required("name");
        let identity = reader.required("identity");
        let public_key = reader.required("public-key");
        let key_proof = reader.optional("key-proof");
        let endpoints = reader.list("endpoints", MAX_ENDPOINTS);
        let nat = reader.optional("nat").unwrap_or_default();
        let relays = reader.list("relay", MAX_RELAYS);
        let routes = reader.list("routes-wanted", MAX_ROUTES);
        let seq = reader.required("seq");
        let signature = reader.required("signature");
        let signed = (|| {
            let record = NodeRecord {
                name: name?,
                identity: identity?,
                public_key: public_key?,
                endpoints,
                nat,
                relays,
                routes,
                seq: seq?,
            };
            Some(Self { record, key_proof, signature: signature? })
        })();
        if let Some(signed) = &signed
            && let Err(error) = signed.facts().verify(RECORD_KIND, signed.record.identity, &signed.signature)
        {
            reader.fault(error);
        }
        reader.finish(signed)
    }
}

/// Where a node stands, as people name it: `eu-west-1/eu-west-1a`, `home`. At most 63 characters a-z, 0-9, `-`, `.`, `/`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Location(String);

/// Why a location was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a location: 1 to 63 characters a-z, 0-9, `-`, `.` and `/`, beginning and ending with a letter or digit"
)]
pub struct LocationError(String);

impl Location {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Location {
    type Err = LocationError;

    fn from_str(text: &str) -> Result<Self, LocationError> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.' | b'/');
        let edge = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let ends_well = edge(text.bytes().next()) && edge(text.bytes().last());
        if text.len() > 63 || !ends_well || !text.bytes().all(allowed) {
            return Err(LocationError(excerpt(text)));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

serde_as_text!(Location);

/// What a node is allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Approval {
    /// The network that approves; its key signs.
    pub network: NodeId,
    /// The node's name.
    pub name: NodeName,
    /// The identity that is approved under this name.
    pub identity: NodeId,
    /// The node's own mesh addresses, each a full-length prefix (/32 or /128).
    pub addresses: Vec<IpNet>,
    /// Networks that are routed to the node.
    pub routes: Vec<IpNet>,
    /// Networks of the node's pods, at most [`MAX_POD_CIDRS`]: routed to the node unless somebody else carries pods.
    pub pod_cidrs: Vec<IpNet>,
    /// Where people say that the node is reached; tried like the node's own endpoints. At most [`MAX_FORCED`].
    pub endpoints: Vec<HostPort>,
    /// The relays that people tell the node to listen on; empty: those that it chooses. At most [`MAX_RELAYS`].
    pub relays: Vec<NodeId>,
    /// Where people say that the node stands.
    pub location: Option<Location>,
    /// Grows with every change of this node's approval.
    pub serial: u64,
}

impl Approval {
    fn facts(&self) -> Facts {
        Facts::default()
            .set("network", self.network)
            .set("name", &self.name)
            .set("approved", self.identity)
            .set_list("addresses", &self.addresses)
            .set_list("routes", &self.routes)
            .set_list("pod-cidrs", &self.pod_cidrs)
            .set_list("approved-endpoints", &self.endpoints)
            .set_list("approved-relays", &self.relays)
            .set("approved-location", self.location.as_ref().map(Location::as_str).unwrap_or_default())
            .set("approval-serial", self.serial)
    }

    /// Every network that the approval gives: addresses, routes and pod CIDRs.
    pub fn networks(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.addresses.iter().copied().chain(self.behind())
    }

    /// Networks behind the node: routes and pod CIDRs.
    pub fn behind(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.routes.iter().chain(&self.pod_cidrs).copied()
    }

    /// Whether this takes back what was approved: an approval without an address.
    pub fn is_revoked(&self) -> bool {
        self.addresses.is_empty()
    }

    /// Signs the approval with the network key.
    pub fn sign(self, network: &Identity) -> SignedApproval {
        assert_eq!(self.network, network.id(), "only the network key approves");
        let signature = self.facts().sign(APPROVAL_KIND, network);
        SignedApproval { approval: self, signature }
    }
}

/// An approval whose signature was verified against the network that it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedApproval {
    approval: Approval,
    signature: Signature,
}

impl SignedApproval {
    /// What is allowed.
    pub fn get(&self) -> &Approval {
        &self.approval
    }

    /// The facts with their signature, as stored and sent.
    pub fn to_map(&self) -> BTreeMap<String, String> {
        self.approval.facts().into_map("approval-signature", &self.signature)
    }

    /// Reads and verifies [`SignedApproval::to_map`]'s form. Whether the network is *ours* is the caller's question.
    pub fn from_map(map: &BTreeMap<String, String>) -> Result<Self, Malformed> {
        let mut reader = Reader::new(map);
        let network = reader.required("network");
        let name = reader.required("name");
        let identity = reader.required("approved");
        let addresses = read_addresses(&mut reader);
        let routes = reader.list("routes", MAX_ROUTES);
        let pod_cidrs = reader.list("pod-cidrs", MAX_POD_CIDRS);
        let endpoints = reader.list("approved-endpoints", MAX_FORCED);
        let relays = reader.list("approved-relays", MAX_RELAYS);
        let location = reader.optional("approved-location");
        let serial = reader.required("approval-serial");
        let signature = reader.required("approval-signature");
        let signed = (|| {
            let approval = Approval {
                network: network?,
                name: name?,
                identity: identity?,
                addresses,
                routes,
                pod_cidrs,
                endpoints,
                relays,
                location,
                serial: serial?,
            };
            Some(Self { approval, signature: signature? })
        })();
        if let Some(Self { approval, signature }) = &signed
            && let Err(error) = approval.facts().verify(APPROVAL_KIND, approval.network, signature)
        {
            reader.fault(error);
        }
        reader.finish(signed)
    }
}

/// Mesh addresses, each a full-length prefix.
pub(crate) fn read_addresses(reader: &mut Reader<'_>) -> Vec<IpNet> {
    let addresses: Vec<IpNet> = reader.list("addresses", MAX_ADDRESSES);
    if addresses.iter().any(|net| net.prefix_len() != net.max_prefix_len()) {
        let why = "expected full-length prefixes, /32 or /128".into();
        reader.fault(FieldError::Invalid { key: "addresses", why });
    }
    addresses
}

serde_as_facts!(SignedRecord, SignedApproval);

/// A node as a registry knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The node's own word.
    pub record: SignedRecord,
    /// The network's word about it, if any yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approval: Option<SignedApproval>,
}

impl Entry {
    /// The node's name.
    pub fn name(&self) -> &NodeName {
        &self.record.get().name
    }

    /// What counts of this and of what came after it: of one identity's records the one with the higher sequence number,
    /// of one network's approvals of it the one with the higher serial.
    pub fn succeeded_by(self, next: Self) -> Self {
        if self.record.get().identity != next.record.get().identity {
            return next;
        }
        let keeps_record = self.record.get().seq > next.record.get().seq;
        let approval = match (self.approval, next.approval) {
            (Some(known), Some(next)) => {
                let (a, b) = (known.get(), next.get());
                let keeps = a.network == b.network && a.identity == b.identity && a.serial > b.serial;
                Some(if keeps { known } else { next })
            }
            (_, next) => next,
        };
        Self { record: if keeps_record { self.record } else { next.record }, approval }
    }

    /// The approval where it is one of `network` for the very identity that signed the record under this name.
    pub fn approved(&self, network: NodeId) -> Option<&Approval> {
        let record = self.record.get();
        self.approval.as_ref().map(SignedApproval::get).filter(|approval| {
            approval.network == network
                && approval.identity == record.identity
                && approval.name == record.name
                && !approval.is_revoked()
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::key::Secret;

    pub(crate) fn secret(byte: u8) -> Secret {
        Secret::from_bytes([byte; 32])
    }

    pub(crate) fn record(byte: u8, name: &str) -> NodeRecord {
        NodeRecord {
            name: name.parse().unwrap(),
            identity: secret(byte).identity().id(),
            public_key: secret(byte).wireguard(0).public_key(),
            endpoints: vec!["host 192.0.2.7:51840".parse().unwrap()],
            nat: Nat::Unknown,
            relays: vec![secret(200).identity().id()],
            routes: vec![],
            seq: 1,
        }
    }

    pub(crate) fn entry(network: u8, byte: u8, name: &str, address: &str, routes: &[&str]) -> Entry {
        let approval = Approval {
            network: secret(network).identity().id(),
            name: name.parse().unwrap(),
            identity: secret(byte).identity().id(),
            addresses: vec![address.parse().unwrap()],
            routes: routes.iter().map(|route| route.parse().unwrap()).collect(),
            pod_cidrs: vec![],
            endpoints: vec![],
            relays: vec![],
            location: None,
            serial: 1,
        };
        Entry {
            record: record(byte, name).sign(&secret(byte).identity()),
            approval: Some(approval.sign(&secret(network).identity())),
        }
    }

    #[test]
    fn an_entry_survives_json() {
        let entry = entry(1, 2, "worker-1", "10.98.0.2/32", &["10.42.1.0/24"]);
        let json = serde_json::to_string(&entry).unwrap();
        assert_eq!(serde_json::from_str::<Entry>(&json).unwrap(), entry);
    }

    #[test]
    fn a_record_changed_after_signing_is_refused() {
        let good = record(2, "worker-1").sign(&secret(2).identity()).to_map();
        for (key, value) in [
            ("public-key", secret(3).wireguard(0).public_key().to_string()),
            ("name", "worker-2".to_owned()),
            ("identity", secret(3).identity().id().to_string()),
            ("endpoints", "host 198.51.100.1:1".to_owned()),
            ("seq", "2".to_owned()),
            ("routes-wanted", "0.0.0.0/0".to_owned()),
        ] {
            let mut bad = good.clone();
            bad.insert(key.to_owned(), value);
            let Malformed(errors) = SignedRecord::from_map(&bad).unwrap_err();
            assert!(matches!(errors[..], [FieldError::BadSignature { .. }]), "{key}: {errors:?}");
        }
    }

    #[test]
    fn every_malformed_field_is_reported() {
        let mut map = record(2, "worker-1").sign(&secret(2).identity()).to_map();
        map.insert("name".into(), "UPPER".into());
        map.insert("endpoints".into(), "host x, host 1.2.3.4:5".into());
        map.remove("seq");
        let Malformed(errors) = SignedRecord::from_map(&map).unwrap_err();
        assert_eq!(errors.len(), 3, "{errors:?}");
    }

    #[test]
    fn an_approval_counts_only_for_its_network_identity_and_name() {
        let network = secret(1).identity().id();
        let good = entry(1, 2, "worker-1", "10.98.0.2/32", &[]);
        assert!(good.approved(network).is_some());
        assert!(good.approved(secret(9).identity().id()).is_none());
        let stolen =
            Entry { record: record(3, "worker-1").sign(&secret(3).identity()), approval: good.approval.clone() };
        assert!(stolen.approved(network).is_none());
        let renamed = Entry { record: record(2, "worker-9").sign(&secret(2).identity()), approval: good.approval };
        assert!(renamed.approved(network).is_none());
    }

    #[test]
    fn names_are_kubernetes_names() {
        for good in ["a", "worker-1", "ip-10-0-0-1.eu-west-1.compute.internal"] {
            assert!(good.parse::<NodeName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a..b", "a_b", "a b", &"a".repeat(64), &"a.".repeat(127)] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad}");
        }
    }
}
