//! NetworkPolicies of Kubernetes (`networking.k8s.io/v1`): from what the cluster says to what one node's kernel enforces.
//!
//! ```text
//!   pods, namespaces, policies ──► compile() ──► Table inet keystone-policy, of one node
//!
//!   a forwarded packet:
//!     a reply, or a pod to itself ─────────────────────────────────────────────► passes
//!     source is a pod here that policies isolate ──► its egress chain ──► no rule: dropped
//!     destination is a pod here that policies isolate ──► its ingress chain ──► no rule: dropped
//! ```
//!
//! What follows from that shape:
//! * Each node enforces for its own pods alone: the source's node decides about egress, the destination's about ingress,
//!   so that both have to allow, wherever they are.
//! * Only forwarded packets are looked at. What the node itself says to its pods, and they to it, is not forwarded and
//!   always passes, as the documentation of NetworkPolicy promises (probes of the kubelet depend on it).
//! * A packet costs two lookups of addresses, and then one for each distinct rule of the policies that select this pod.
//!   How many policies, pods and namespaces there are else does not matter.
//! * What selects pods is a set of addresses, shared by all rules that say the same; a pod that comes or goes changes
//!   elements of sets and no rule. Everything else (chains, blocks, ports) has a name made from what it says and never
//!   changes: another content is another chain.
//!
//! A policy that cannot be read in part ([`Policy::read`]) still isolates what it selects; only what it would have allowed
//! is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

pub use self::compile::{Compiled, compile};
pub(crate) use self::ranges::prefixes;
pub use self::selector::{Labels, Operator, Requirement, Selector};

mod compile;
mod names;
mod ranges;
mod read;
mod selector;
#[cfg(test)]
mod tests;

/// The name of the table.
pub const TABLE: &str = "keystone-policy";

/// TCP's number (IANA, protocol numbers).
pub const TCP: u8 = 6;
/// UDP's.
pub const UDP: u8 = 17;
/// SCTP's.
pub const SCTP: u8 = 132;

/// A namespace and a name.
pub type Name = (Arc<str>, Arc<str>);

/// What is known of the cluster.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    /// Every pod.
    pub pods: BTreeMap<Name, Pod>,
    /// Every namespace's labels.
    pub namespaces: BTreeMap<Arc<str>, Arc<Labels>>,
    /// Every policy.
    pub policies: BTreeMap<Name, Policy>,
}

/// What matters of a pod. The larger parts are shared: thousands of pods have the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Its labels.
    pub labels: Arc<Labels>,
    /// The node that it runs on, once that is decided.
    pub node: Option<Arc<str>>,
    /// Its addresses, once it has them.
    pub addresses: Vec<IpAddr>,
    /// Whether it uses the network of its node: no policy selects it, and none means it by its labels.
    pub host_network: bool,
    /// How far it is.
    pub stage: Stage,
    /// The ports that its containers have named.
    pub ports: Arc<[NamedPort]>,
}

/// How far a pod is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Its containers have ended and do not come back (`Succeeded`, `Failed`): its addresses are free.
    Finished,
    /// It was deleted and its containers may still run. Where another pod has its address, the address is the other's.
    Leaving,
    /// It runs, or will.
    #[default]
    Alive,
}

/// A port that a container has named.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NamedPort {
    /// Its name.
    pub name: String,
    /// Its protocol, by number.
    pub protocol: u8,
    /// Its number.
    pub port: u16,
}

/// A policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The pods of its namespace that it selects.
    pub pods: Selector,
    /// What may come to them; none: it does not isolate them against that.
    pub ingress: Option<Vec<Rule>>,
    /// What they may send; none: it does not isolate them against that.
    pub egress: Option<Vec<Rule>>,
    /// What could not be read, a sentence each. It allows nothing.
    pub faults: Vec<String>,
}

/// Something that a policy allows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// With whom; none: with everybody.
    pub peers: Option<Vec<Peer>>,
    /// By which ports; none: by all, and by protocols without ports too.
    pub ports: Option<Vec<Port>>,
}

/// Whom a rule means.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Peer {
    /// Pods.
    Pods {
        /// Of which namespaces; none: of the policy's own.
        namespaces: Option<Selector>,
        /// And which of their pods.
        pods: Selector,
    },
    /// Addresses, pods' or not.
    Block {
        /// All of these,
        net: IpNet,
        /// but not those.
        except: Vec<IpNet>,
    },
}

/// Which ports a rule means.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Port {
    /// All between two, both included, of a protocol.
    Range(u8, u16, u16),
    /// The one that the receiving pod gave this name, of a protocol.
    Named(u8, String),
}

/// What a direction of traffic is to the pod that a policy selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// To the pod.
    Ingress,
    /// From the pod.
    Egress,
}

impl Policy {
    /// What it says of a direction.
    pub fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Ingress => self.ingress.as_deref(),
            Direction::Egress => self.egress.as_deref(),
        }
    }
}

impl Pod {
    /// Whether policies are about it: it has a network of its own, and is not over.
    pub fn counts(&self) -> bool {
        !self.host_network && self.stage != Stage::Finished
    }
}

impl Cluster {
    /// Who has which address, as `node` sees it. Of several pods with the same one, a pod of this node comes before
    /// others: what another node says of its pods, late or wrong, takes no policy away from a pod here. Then the one that
    /// is furthest from its end.
    fn owners(&self, node: &str) -> BTreeMap<IpAddr, &Name> {
        let mut owners: BTreeMap<IpAddr, ((bool, Stage), &Name)> = BTreeMap::new();
        for (name, pod) in self.pods.iter().filter(|(_, pod)| pod.counts()) {
            let claim = (pod.node.as_deref() == Some(node), pod.stage);
            for address in &pod.addresses {
                let owner = owners.entry(*address).or_insert((claim, name));
                if owner.0 < claim {
                    *owner = (claim, name);
                }
            }
        }
        owners.into_iter().map(|(address, (_, name))| (address, name)).collect()
    }

    /// What is wrong with policies: of which one, and a sentence.
    pub fn faults(&self) -> impl Iterator<Item = (&Name, &str)> {
        self.policies.iter().flat_map(|(name, policy)| policy.faults.iter().map(move |fault| (name, fault.as_str())))
    }

    /// Names of namespaces whose labels match.
    fn namespaces_with<'a>(&'a self, selector: &'a Selector) -> impl Iterator<Item = &'a str> {
        self.namespaces.iter().filter(|(_, labels)| selector.matches(labels)).map(|(name, _)| &**name)
    }

    /// The pods of a namespace.
    fn pods_in<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = (&'a Name, &'a Pod)> {
        let first: Name = (namespace.into(), "".into());
        self.pods.range(first..).take_while(move |((of, _), _)| **of == *namespace)
    }
}

/// Addresses of pods, each with its pod.
type Owners<'a> = BTreeMap<IpAddr, &'a Name>;

/// Names that are mentioned together, as a comment.
fn mentioned(names: &BTreeSet<String>) -> String {
    names.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
}
