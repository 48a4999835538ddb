//! The annotation contract: how records and approvals stand on Kubernetes objects.
//!
//! One readable annotation per fact, under [`PREFIX`]. The object's own name is the node's name and is not repeated. A
//! record and an approval are each verified on their own, so that a fault in one says nothing about the other; what
//! people write is unsigned, and the controller folds it into the approval that it signs. docs/annotations.md has the
//! table, which a test holds to [`KEYS`].

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

use ipnet::IpNet;

use crate::facts::{FieldError, MAX_FACT, Malformed};
use crate::io::excerpt;
use crate::key::NodeId;
use crate::node::{Location, MAX_FORCED, MAX_RELAYS, MAX_ROUTES, NodeName, SignedApproval, SignedRecord};
use crate::relay::address::HostPort;

/// Before every annotation's key.
pub const PREFIX: &str = "mesh.keystone.cluster/";

/// Who writes an annotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Writer {
    /// The node's own daemon, or the gateway for a node without credentials. Covered by the node's signature.
    Node,
    /// The controller. Covered by the network key's signature.
    Controller,
    /// A person. Not signed: the controller checks it and folds it into the approval.
    Person,
}

/// One annotation of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Without [`PREFIX`].
    pub name: &'static str,
    /// Who writes it.
    pub writer: Writer,
}

/// What people ask for on a Node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// `force-endpoint`: where the node is reached, whatever it says itself; at most 4.
    pub endpoints: Vec<HostPort>,
    /// `relay-force`: the relays that the node has to listen on; at most 4.
    pub relays: Vec<NodeId>,
    /// `routes-extra`: networks behind the node.
    pub routes: Vec<IpNet>,
    /// `location`: where the node stands.
    pub location: Option<Location>,
}

/// What an object's annotations say. Each part is there, absent (`Ok(None)`), or faulty by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// The node's word.
    pub record: Result<Option<SignedRecord>, Malformed>,
    /// The network's word. Whether it is our network's is the caller's question.
    pub approval: Result<Option<SignedApproval>, Malformed>,
    /// People's wishes, without the faulty ones.
    pub wishes: Wishes,
    /// What was wrong with the others.
    pub wish_faults: Vec<FieldError>,
}

/// The version that `version` says; a record of another one is not read.
pub const VERSION: &str = "1";

/// Every annotation of Nodes and Members. Those of Peer objects are [`crate::plain_peer::KEYS`].
pub const KEYS: &[Key] = &[
    Key { name: "identity", writer: Writer::Node },
    Key { name: "public-key", writer: Writer::Node },
    Key { name: "key-proof", writer: Writer::Node },
    Key { name: "endpoints", writer: Writer::Node },
    Key { name: "nat", writer: Writer::Node },
    Key { name: "relay", writer: Writer::Node },
    Key { name: "routes-wanted", writer: Writer::Node },
    Key { name: "seq", writer: Writer::Node },
    Key { name: "signature", writer: Writer::Node },
    Key { name: "version", writer: Writer::Node },
    Key { name: "network", writer: Writer::Controller },
    Key { name: "approved", writer: Writer::Controller },
    Key { name: "addresses", writer: Writer::Controller },
    Key { name: "routes", writer: Writer::Controller },
    Key { name: "pod-cidrs", writer: Writer::Controller },
    Key { name: "approved-endpoints", writer: Writer::Controller },
    Key { name: "approved-relays", writer: Writer::Controller },
    Key { name: "approved-location", writer: Writer::Controller },
    Key { name: "approval-serial", writer: Writer::Controller },
    Key { name: "approval-signature", writer: Writer::Controller },
    Key { name: "force-endpoint", writer: Writer::Person },
    Key { name: "relay-force", writer: Writer::Person },
    Key { name: "routes-extra", writer: Writer::Person },
    Key { name: "location", writer: Writer::Person },
];

/// The names, without [`PREFIX`], of what `writer` writes.
pub fn names(writer: Writer) -> impl Iterator<Item = &'static str> {
    KEYS.iter().filter(move |key| key.writer == writer).map(|key| key.name)
}

/// Reads the annotations of the object `name`; keys without [`PREFIX`] and unknown ones are ignored.
pub fn decode(name: &NodeName, annotations: &BTreeMap<String, String>) -> Decoded {
    let (wishes, wish_faults) = wishes(annotations);
    Decoded { record: record(name, annotations), approval: approval(name, annotations), wishes, wish_faults }
}

/// The record among the annotations of the object `name`; none where no annotation of a record is there.
pub fn record(name: &NodeName, annotations: &BTreeMap<String, String>) -> Result<Option<SignedRecord>, Malformed> {
    let version = annotations.get(&annotation("version")).filter(|version| *version != VERSION);
    if let Some(found) = version {
        return Err(Malformed(vec![FieldError::Newer { key: "version", found: excerpt(found) }]));
    }
    facts_of(name, names(Writer::Node), annotations).map(|facts| SignedRecord::from_map(&facts)).transpose()
}

/// The approval among the annotations of the object `name`; none where no annotation of an approval is there.
pub fn approval(name: &NodeName, annotations: &BTreeMap<String, String>) -> Result<Option<SignedApproval>, Malformed> {
    facts_of(name, names(Writer::Controller), annotations).map(|facts| SignedApproval::from_map(&facts)).transpose()
}

/// What people ask for, and what of it could not be read. People put a comma between elements, with or without a space.
pub fn wishes(annotations: &BTreeMap<String, String>) -> (Wishes, Vec<FieldError>) {
    let mut reader = WishReader { annotations, faults: Vec::new() };
    let wishes = Wishes {
        endpoints: reader.list("force-endpoint", MAX_FORCED),
        relays: reader.list("relay-force", MAX_RELAYS),
        routes: reader.list("routes-extra", MAX_ROUTES).into_iter().map(|Route(net)| net).collect(),
        location: reader.list("location", 1).pop(),
    };
    (wishes, reader.faults)
}

/// A record as annotations, with [`PREFIX`].
pub fn of_record(record: &SignedRecord) -> BTreeMap<String, String> {
    let mut annotations = prefixed(record.to_map());
    annotations.insert(annotation("version"), VERSION.to_owned());
    annotations
}

/// An approval as annotations, with [`PREFIX`].
pub fn of_approval(approval: &SignedApproval) -> BTreeMap<String, String> {
    prefixed(approval.to_map())
}

/// Facts as annotations: the name is the object's own.
pub(crate) fn prefixed(facts: BTreeMap<String, String>) -> BTreeMap<String, String> {
    facts.into_iter().filter(|(key, _)| key != "name").map(|(key, value)| (annotation(&key), value)).collect()
}

/// The facts under these annotations, with the object's name; none where none of them is there.
pub(crate) fn facts_of(
    name: &NodeName,
    keys: impl IntoIterator<Item = impl AsRef<str>>,
    annotations: &BTreeMap<String, String>,
) -> Option<BTreeMap<String, String>> {
    let mut facts = BTreeMap::new();
    for key in keys {
        let key = key.as_ref();
        if let Some(text) = annotations.get(&annotation(key)) {
            // One character too many is enough for a reader to refuse it.
            let text = if text.len() > MAX_FACT { text.chars().take(MAX_FACT + 1).collect() } else { text.clone() };
            facts.insert(key.to_owned(), text);
        }
    }
    if facts.is_empty() {
        return None;
    }
    facts.insert("name".to_owned(), name.to_string());
    Some(facts)
}

/// A key with its prefix.
pub(crate) fn annotation(name: &str) -> String {
    format!("{PREFIX}{name}")
}

/// Reads what people wrote: element by element, and keeps the good ones.
struct WishReader<'a> {
    annotations: &'a BTreeMap<String, String>,
    faults: Vec<FieldError>,
}

impl WishReader<'_> {
    fn list<T: FromStr<Err: Display>>(&mut self, key: &'static str, limit: usize) -> Vec<T> {
        let Some(text) = self.annotations.get(&annotation(key)) else { return Vec::new() };
        if text.len() > MAX_FACT {
            self.faults.push(FieldError::TooLong { key, limit: MAX_FACT, unit: "bytes" });
            return Vec::new();
        }
        let mut good = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            match part.parse() {
                Ok(_) if good.len() == limit => {
                    self.faults.push(FieldError::TooLong { key, limit, unit: "elements" });
                    break;
                }
                Ok(value) => good.push(value),
                Err(why) => self.faults.push(FieldError::Invalid { key, why: T::Err::to_string(&why) }),
            }
        }
        good
    }
}

/// A network as people write it: with its host bits cleared, or it was meant otherwise.
struct Route(IpNet);

impl FromStr for Route {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("`{}` is not a network; expected one as in 10.42.1.0/24", excerpt(text));
        let net: IpNet = text.parse().map_err(|_| expected())?;
        if net.trunc() == net {
            Ok(Self(net))
        } else {
            Err(format!("{net} has host bits set; did you mean {}?", net.trunc()))
        }
    }
}

#[cfg(test)]
mod page;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::tests::{entry, secret};

    fn w() -> NodeName {
        "w".parse().unwrap()
    }

    fn whole() -> BTreeMap<String, String> {
        let entry = entry(1, 2, "w", "10.98.0.2/32", &["10.42.1.0/24"]);
        let mut annotations = of_record(&entry.record);
        annotations.extend(of_approval(&entry.approval.unwrap()));
        annotations
    }

    fn errors<T: std::fmt::Debug>(part: Result<T, Malformed>) -> Vec<FieldError> {
        part.unwrap_err().0
    }

    #[test]
    fn a_record_and_an_approval_read_back_among_other_peoples_annotations() {
        let entry = entry(1, 2, "w", "10.98.0.2/32", &["10.42.1.0/24"]);
        let mut annotations = whole();
        annotations.insert("example.org/seq".into(), "rubbish".into());
        annotations.insert("mesh.keystone.cluster/unknown".into(), "rubbish".into());
        let decoded = decode(&w(), &annotations);
        assert_eq!((decoded.record, decoded.approval), (Ok(Some(entry.record)), Ok(entry.approval)));
        assert_eq!((decoded.wishes, decoded.wish_faults), (Wishes::default(), vec![]));
    }

    #[test]
    fn keys_are_unique_and_each_has_one_writer() {
        let mut names: Vec<&str> = KEYS.iter().map(|key| key.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), KEYS.len());
        let writer = |key: &String| KEYS.iter().find(|known| annotation(known.name) == *key).map(|known| known.writer);
        let entry = entry(1, 2, "w", "10.98.0.2/32", &["10.42.1.0/24"]);
        assert!(of_record(&entry.record).keys().all(|key| writer(key) == Some(Writer::Node)));
        assert!(of_approval(&entry.approval.unwrap()).keys().all(|key| writer(key) == Some(Writer::Controller)));
    }

    #[test]
    fn nothing_there_is_no_fault_and_a_part_of_it_is_one_for_each_missing_field() {
        assert_eq!(record(&w(), &BTreeMap::new()), Ok(None));
        assert_eq!(approval(&w(), &BTreeMap::new()), Ok(None));
        let part = BTreeMap::from([(annotation("seq"), "no number".to_owned())]);
        let found = errors(record(&w(), &part));
        assert_eq!(found.len(), 4, "identity, public-key, seq, signature: {found:?}");
        let part = BTreeMap::from([(annotation("addresses"), "10.98.0.0/24".to_owned())]);
        let found = errors(approval(&w(), &part));
        assert_eq!(found.len(), 5, "network, approved, addresses, approval-serial, approval-signature: {found:?}");
    }

    #[test]
    fn a_newer_version_says_that_an_upgrade_is_due() {
        let mut annotations = whole();
        annotations.insert(annotation("version"), "2".into());
        let found = errors(record(&w(), &annotations));
        assert!(matches!(&found[..], [FieldError::Newer { found, .. }] if found == "2"));
        assert!(found[0].to_string().contains("upgrade"), "{}", found[0]);
        assert!(approval(&w(), &annotations).is_ok());
        annotations.remove(&annotation("version"));
        assert!(record(&w(), &annotations).is_ok(), "the version is a hint, not signed");
    }

    #[test]
    fn an_endless_text_is_refused_before_it_is_read() {
        let mut annotations = whole();
        annotations.insert(annotation("endpoints"), "ü".repeat(100_000));
        annotations.insert(annotation("routes"), "10.0.0.0/8, ".repeat(100));
        annotations.insert(annotation("routes-extra"), "10.0.0.0/8,".repeat(10_000));
        let decoded = decode(&w(), &annotations);
        assert!(matches!(errors(decoded.record)[..], [FieldError::TooLong { key: "endpoints", .. }, ..]));
        assert!(matches!(errors(decoded.approval)[..], [FieldError::TooLong { key: "routes", .. }, ..]));
        assert!(matches!(decoded.wish_faults[..], [FieldError::TooLong { key: "routes-extra", .. }]));
    }

    #[test]
    fn of_peoples_wishes_the_good_ones_count_and_the_others_are_told() {
        let relay = secret(200).identity().id();
        let said = [
            ("force-endpoint", "home.example.org:51840,192.0.2.1:9, nonsense, 1.2.3.4:0"),
            ("relay-force", &format!(" {relay} ")),
            ("routes-extra", "10.42.1.0/24,\n10.42.2.1/24"),
            ("location", "Nowhere Land"),
        ];
        let annotations = said.iter().map(|(key, text)| (annotation(key), (*text).to_owned())).collect();
        let (wishes, faults) = wishes(&annotations);
        assert_eq!(wishes.endpoints.len(), 2);
        assert_eq!(wishes.relays, [relay]);
        assert_eq!(wishes.routes, ["10.42.1.0/24".parse().unwrap()]);
        assert_eq!(wishes.location, None);
        assert_eq!(faults.len(), 4, "{faults:?}");
        assert!(faults[2].to_string().contains("did you mean 10.42.2.0/24?"), "{}", faults[2]);
    }

    #[test]
    fn too_many_wishes_are_cut_off_and_told() {
        let many: Vec<String> = (1..10).map(|n| format!("192.0.2.{n}:9")).collect();
        let (wishes, faults) = wishes(&BTreeMap::from([(annotation("force-endpoint"), many.join(","))]));
        assert_eq!(wishes.endpoints.len(), MAX_FORCED);
        assert!(matches!(faults[..], [FieldError::TooLong { key: "force-endpoint", limit: MAX_FORCED, .. }]));
    }
}
