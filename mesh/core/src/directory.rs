//! What Kubernetes objects say, merged into what is known of every node.
//!
//! Whoever may patch Nodes can write or delete annotations. So nothing is taken back because an annotation is missing
//! or faulty, and what is known gives way only to what is signed and later:
//!
//! ```text
//!   approval   ours, of this name, with a higher serial                         -> counts from then on
//!   record     the approved identity's, with a higher sequence number           -> counts from then on
//!              the approved identity's, where another's is known                -> counts from then on
//!              another identity's than the approved one                         -> told, waits for an approval
//!              nobody is approved                                               -> the last word counts: it is no peer
//!   the last object of the name goes                                            -> the node goes
//! ```
//!
//! A Node and a Member may carry one name; both are merged by these rules, and the node goes with the later of them. An
//! object that comes back after that starts afresh, but for one thing: an approval that is not later than the last one
//! of before is a copy that somebody kept, and does not count. The [`MEMORY`] latest names are remembered for that; a
//! directory that is made anew remembers none, and there the controller's revocation, which has a higher serial, ends
//! what was brought back.
//!
//! An object changes often for reasons that are not ours (a kubelet's labels), and a signature costs some 50 µs to
//! verify. So the text of a record and of an approval is digested, and the same text is not read twice.

mod known;

use std::collections::BTreeMap;
use std::fmt;

use self::known::{CARRIERS, Known, Memory, Seen};
use crate::annotations::{self, Writer};
use crate::facts::Malformed;
use crate::key::NodeId;
use crate::node::{Entry, NodeName, SignedApproval, SignedRecord};
use crate::plain_peer::{self, SignedPlainPeer};

/// Names that went, remembered with the serial of their last approval: 20 times a burst of 200 nodes, some 500 KiB.
pub const MEMORY: usize = 4096;

/// Which kind of object carries annotations of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Carrier {
    /// A Node.
    Node,
    /// A Member: a machine that is no Node, or not yet.
    Member,
}

/// What changed for readers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A node came or changed.
    Changed(Box<Entry>),
    /// A node went.
    Removed(NodeName),
    /// A plain peer came or changed.
    Peer(Box<SignedPlainPeer>),
    /// A plain peer went.
    PeerRemoved(NodeName),
}

/// What is wrong with an object's annotations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The record does not read.
    Record(Malformed),
    /// The approval does not read.
    Approval(Malformed),
    /// The approval is another network's.
    ForeignApproval(NodeId),
    /// The approval is one of before the node went: somebody kept it and brought it back.
    ReplayedApproval {
        /// Its serial.
        found: u64,
        /// The last serial before the node went.
        last: u64,
    },
    /// The record is signed by another identity than the approved one; the approved one's stays in force.
    OtherIdentity {
        /// Who is approved.
        approved: NodeId,
        /// Who signed.
        found: NodeId,
    },
    /// The plain peer's statement does not read.
    Peer(Malformed),
    /// The object's name is no node name.
    Name(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = annotations::PREFIX;
        match self {
            Self::Record(why) => write!(f, "the record in the annotations {prefix}* is not used: {why}"),
            Self::Approval(why) => write!(f, "the approval in the annotations {prefix}* is not used: {why}"),
            Self::ForeignApproval(network) => {
                write!(f, "{prefix}network: the approval is one of network {network}, which is not this one")
            }
            Self::ReplayedApproval { found, last } => {
                write!(
                    f,
                    "{prefix}approval-serial: {found} is not later than {last}, from before this name was removed"
                )
            }
            Self::OtherIdentity { approved, found } => write!(
                f,
                "{prefix}identity: the record is signed by {found}, but {approved} is approved and stays in force; if the \
                 machine was reinstalled, approve it again"
            ),
            Self::Peer(why) => write!(f, "the statement in the annotations {prefix}* is not used: {why}"),
            Self::Name(why) => f.write_str(why),
        }
    }
}

/// One object as it is watched: its name and its annotations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.annotations`.
    pub annotations: BTreeMap<String, String>,
}

/// Where a fault was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    Carried(Carrier),
    Peer,
}

/// A plain peer, and the digest of the text that it was last read from.
#[derive(Clone, Debug)]
struct KnownPeer {
    statement: Option<SignedPlainPeer>,
    seen: Option<Seen>,
}

/// The merged view. See the [module](self).
#[derive(Clone, Debug)]
pub struct Directory {
    network: NodeId,
    nodes: BTreeMap<NodeName, Known>,
    peers: BTreeMap<NodeName, KnownPeer>,
    nodes_gone: Memory,
    peers_gone: Memory,
    faults: BTreeMap<(String, Source), Vec<Fault>>,
}

impl Directory {
    /// A directory of `network` that starts from what is known of old: a snapshot's entries and peers. They stay until
    /// a fresh list of every kind does not name them.
    pub fn new(network: NodeId, entries: Vec<Entry>, peers: Vec<SignedPlainPeer>) -> Self {
        let nodes = entries.into_iter().map(|entry| (entry.name().clone(), Known::of_old(entry, network)));
        let peers = peers.into_iter().filter(|peer| peer.get().network == network);
        let peers = peers.map(|peer| (peer.get().name.clone(), KnownPeer { statement: Some(peer), seen: None }));
        Self {
            network,
            nodes: nodes.collect(),
            peers: peers.collect(),
            nodes_gone: Memory::default(),
            peers_gone: Memory::default(),
            faults: BTreeMap::new(),
        }
    }

    /// An object came or changed.
    pub fn handle_object(&mut self, carrier: Carrier, object: &Object) -> Vec<Change> {
        let source = Source::Carried(carrier);
        let Some(name) = self.name(source, &object.name) else { return Vec::new() };
        let record = Seen::of(annotations::names(Writer::Node), &object.annotations);
        let approval = Seen::of(annotations::names(Writer::Controller), &object.annotations);
        let carried = self.nodes.entry(name.clone()).or_default().carried(carrier);
        let same_record = carried.record.replace(record) == Some(record);
        let same_approval = carried.approval.replace(approval) == Some(approval);
        if same_record && same_approval {
            return Vec::new();
        }
        let mut changed = false;
        if !same_approval {
            let read = annotations::approval(&name, &object.annotations);
            changed |= self.approval(source, &name, read);
        }
        if !same_record {
            let read = annotations::record(&name, &object.annotations);
            changed |= self.record(carrier, &name, read);
        }
        self.tell_identity(&name);
        let entry = self.nodes.get(&name).and_then(Known::entry).filter(|_| changed);
        entry.map(|entry| Change::Changed(Box::new(entry.clone()))).into_iter().collect()
    }

    /// An object went.
    pub fn handle_deleted(&mut self, carrier: Carrier, name: &str) -> Vec<Change> {
        self.faults.remove(&(name.to_owned(), Source::Carried(carrier)));
        let Ok(name) = name.parse::<NodeName>() else { return Vec::new() };
        let Some(known) = self.nodes.get_mut(&name) else { return Vec::new() };
        known.forget(carrier);
        if known.is_carried() {
            return Vec::new();
        }
        let Some(known) = self.nodes.remove(&name) else { return Vec::new() };
        if let Some(approval) = known.approval() {
            self.nodes_gone.remember(&name, approval.serial);
        }
        if known.entry().is_some() { vec![Change::Removed(name)] } else { Vec::new() }
    }

    /// Every object of a kind, after a fresh list; what is not among them is gone.
    pub fn handle_listed(&mut self, carrier: Carrier, objects: &[Object]) -> Vec<Change> {
        let listed: BTreeMap<&str, &Object> = objects.iter().map(|object| (object.name.as_str(), object)).collect();
        let source = Source::Carried(carrier);
        let carried = self.nodes.iter().filter(|(_, known)| known.carried_by(carrier)).map(|(name, _)| name.as_str());
        let gone = gone(carried, &self.faults, source, |name| listed.contains_key(name));
        let mut changes: Vec<Change> = gone.iter().flat_map(|name| self.handle_deleted(carrier, name)).collect();
        changes.extend(listed.values().flat_map(|object| self.handle_object(carrier, object)));
        changes
    }

    /// A Peer object came or changed.
    pub fn handle_peer(&mut self, object: &Object) -> Vec<Change> {
        let Some(name) = self.name(Source::Peer, &object.name) else { return Vec::new() };
        let text = Seen::of(plain_peer::KEYS.iter().copied(), &object.annotations);
        let known = self.peers.entry(name.clone()).or_insert(KnownPeer { statement: None, seen: None });
        if known.seen.replace(text) == Some(text) {
            return Vec::new();
        }
        let last = self.peers_gone.serial(&name);
        let (found, fault) = match SignedPlainPeer::from_annotations(&name, &object.annotations) {
            Ok(Some(found)) if found.get().network != self.network => {
                (None, Some(Fault::ForeignApproval(found.get().network)))
            }
            Ok(Some(found)) if last.is_some_and(|last| found.get().serial <= last) => {
                let fault = Fault::ReplayedApproval { found: found.get().serial, last: last.unwrap_or_default() };
                (None, Some(fault))
            }
            Ok(found) => (found, None),
            Err(why) => (None, Some(Fault::Peer(why))),
        };
        let newer = |found: &SignedPlainPeer| {
            known.statement.as_ref().is_none_or(|stored| stored.get().serial < found.get().serial)
        };
        let found = found.filter(newer);
        let changes = found.iter().map(|found| Change::Peer(Box::new(found.clone()))).collect();
        if found.is_some() {
            known.statement = found;
        }
        self.set_faults(Source::Peer, &name, |_| false, fault);
        changes
    }

    /// A Peer object went.
    pub fn handle_peer_deleted(&mut self, name: &str) -> Vec<Change> {
        self.faults.remove(&(name.to_owned(), Source::Peer));
        let Ok(name) = name.parse::<NodeName>() else { return Vec::new() };
        let Some(KnownPeer { statement: Some(peer), .. }) = self.peers.remove(&name) else { return Vec::new() };
        self.peers_gone.remember(&name, peer.get().serial);
        vec![Change::PeerRemoved(name)]
    }

    /// Every Peer object, after a fresh list.
    pub fn handle_peers_listed(&mut self, objects: &[Object]) -> Vec<Change> {
        let listed: BTreeMap<&str, &Object> = objects.iter().map(|object| (object.name.as_str(), object)).collect();
        let known = self.peers.keys().map(NodeName::as_str);
        let gone = gone(known, &self.faults, Source::Peer, |name| listed.contains_key(name));
        let mut changes: Vec<Change> = gone.iter().flat_map(|name| self.handle_peer_deleted(name)).collect();
        changes.extend(listed.values().flat_map(|object| self.handle_peer(object)));
        changes
    }

    /// Every node with a valid record, approved or not.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.nodes.values().filter_map(Known::entry)
    }

    /// Every plain peer.
    pub fn peers(&self) -> impl Iterator<Item = &SignedPlainPeer> {
        self.peers.values().filter_map(|known| known.statement.as_ref())
    }

    /// What is wrong, by object name. A name comes once for each object of that name.
    pub fn faults(&self) -> impl Iterator<Item = (&str, &[Fault])> {
        self.faults.iter().map(|((name, _), faults)| (name.as_str(), faults.as_slice()))
    }

    /// Takes in what was read of an approval. Whether anything changed.
    fn approval(&mut self, source: Source, name: &NodeName, read: Result<Option<SignedApproval>, Malformed>) -> bool {
        let last = self.nodes_gone.serial(name);
        let (found, fault) = match read {
            Ok(Some(found)) if found.get().network != self.network => {
                (None, Some(Fault::ForeignApproval(found.get().network)))
            }
            Ok(Some(found)) if last.is_some_and(|last| found.get().serial <= last) => {
                let fault = Fault::ReplayedApproval { found: found.get().serial, last: last.unwrap_or_default() };
                (None, Some(fault))
            }
            Ok(found) => (found, None),
            Err(why) => (None, Some(Fault::Approval(why))),
        };
        self.set_faults(source, name, of_record, fault);
        let known = self.nodes.get_mut(name);
        known.zip(found).is_some_and(|(known, found)| known.handle_approval(found))
    }

    /// Takes in what was read of a record. Whether anything changed.
    fn record(&mut self, carrier: Carrier, name: &NodeName, read: Result<Option<SignedRecord>, Malformed>) -> bool {
        let (found, fault) = match read {
            Ok(found) => (found, None),
            Err(why) => (None, Some(Fault::Record(why))),
        };
        self.set_faults(Source::Carried(carrier), name, |old| !matches!(old, Fault::Record(_)), fault);
        self.nodes.get_mut(name).is_some_and(|known| known.handle_record(carrier, found))
    }

    /// Tells of a record that waits for its identity to be approved, where there is one.
    fn tell_identity(&mut self, name: &NodeName) {
        for carrier in CARRIERS {
            let fault = self.nodes.get(name).and_then(|known| known.waits(carrier));
            let fault = fault.map(|(approved, found)| Fault::OtherIdentity { approved, found });
            self.set_faults(Source::Carried(carrier), name, |old| !matches!(old, Fault::OtherIdentity { .. }), fault);
        }
    }

    /// The object's name, where it can be a node's.
    fn name(&mut self, source: Source, text: &str) -> Option<NodeName> {
        match text.parse() {
            Ok(name) => Some(name),
            Err(why) => {
                let why = crate::node::NameError::to_string(&why);
                self.faults.insert((text.to_owned(), source), vec![Fault::Name(why)]);
                None
            }
        }
    }

    /// Of the faults found at `source` keeps those that `keep` says, and adds one.
    fn set_faults(&mut self, source: Source, name: &NodeName, keep: impl Fn(&Fault) -> bool, fault: Option<Fault>) {
        let key = (name.to_string(), source);
        let mut faults = self.faults.remove(&key).unwrap_or_default();
        faults.retain(keep);
        faults.extend(fault);
        if !faults.is_empty() {
            self.faults.insert(key, faults);
        }
    }
}

/// Whether a fault is one of the record, not of the approval.
fn of_record(fault: &Fault) -> bool {
    matches!(fault, Fault::Record(_) | Fault::OtherIdentity { .. })
}

/// The names of `source` that were there or faulty, and are not listed.
fn gone<'a>(
    known: impl Iterator<Item = &'a str>,
    faults: &'a BTreeMap<(String, Source), Vec<Fault>>,
    source: Source,
    listed: impl Fn(&str) -> bool,
) -> Vec<String> {
    let faulty = faults.keys().filter(|(_, of)| *of == source).map(|(name, _)| name.as_str());
    let mut gone: Vec<String> = known.chain(faulty).filter(|name| !listed(name)).map(str::to_owned).collect();
    gone.sort_unstable();
    gone.dedup();
    gone
}

#[cfg(test)]
mod attacks;
#[cfg(test)]
mod tests;
