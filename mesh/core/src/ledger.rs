//! Who holds which address: the controller's ledger, as it stands in Kubernetes.
//!
//! An address is claimed here before it is approved anywhere, under the API server's optimistic concurrency. So two
//! controllers cannot give one address twice, a crash between claim and approval costs nothing, and a node that went
//! while no controller ran is noticed by its claim. Claims are kept in pages of [`PAGE`] host numbers, one ConfigMap
//! each; a released claim stays as a note of when, until its address is given again.

use std::collections::BTreeMap;
use std::fmt;

use crate::facts::FieldError;
use crate::network::Network;
use crate::node::NodeName;

/// Host numbers per page: a page of long names is some 40 KiB, a ConfigMap holds 1 MiB.
pub const PAGE: u32 = 256;

/// Who an address is for: a node's identity or a plain peer's key, with the name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Holder {
    /// A node: the identity is pinned under the name for as long as the claim lives.
    Node(NodeName, crate::key::NodeId),
    /// A plain peer.
    Peer(NodeName),
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(name, id) => write!(f, "node {name} {id}"),
            Self::Peer(name) => write!(f, "peer {name}"),
        }
    }
}

/// One address' entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Whose it is, or was.
    pub holder: Holder,
    /// When it was given back, in seconds since 1970; none while it is held.
    pub released: Option<u64>,
}

/// What a page's ConfigMap is to hold; all of its `data`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageEdit {
    /// Which page: host number / [`PAGE`].
    pub page: u32,
    /// `data` of the ConfigMap: host number to claim, as text.
    pub data: BTreeMap<String, String>,
}

/// The ledger as last acknowledged by the API server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    claims: BTreeMap<u32, Claim>,
}

/// No address is left.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no address is left in {0}; remove nodes that are gone, or make a larger network")]
pub struct Exhausted(pub ipnet::Ipv4Net);

impl Ledger {
    /// Reads one page over what is known of it; faulty lines are told and their numbers are taken by nobody.
    pub fn handle_page(&mut self, page: u32, data: &BTreeMap<String, String>) -> Vec<FieldError> {
        let _ = (page, data);
        todo!()
    }

    /// The number that this very holder has.
    pub fn held_by(&self, holder: &Holder) -> Option<u32> {
        let _ = holder;
        todo!()
    }

    /// The live claim of a node name, with the identity that is pinned to it.
    pub fn pinned(&self, name: &NodeName) -> Option<(u32, crate::key::NodeId)> {
        let _ = name;
        todo!()
    }

    /// Claims a number: the one that the holder had before where it still rests or is free, else one never given, else
    /// the one that rested longest beyond the quarantine. Idempotent. `now` in seconds since 1970.
    pub fn claim(&mut self, network: &Network, holder: &Holder, now: u64) -> Result<u32, Exhausted> {
        let _ = (network, holder, now);
        todo!()
    }

    /// Claims the very number that an approval of old gives the holder, where nobody else has it.
    pub fn adopt(&mut self, host: u32, holder: &Holder) -> bool {
        let _ = (host, holder);
        todo!()
    }

    /// Gives a holder's number back.
    pub fn release(&mut self, holder: &Holder, now: u64) {
        let _ = (holder, now);
        todo!()
    }

    /// Every live claim.
    pub fn live(&self) -> impl Iterator<Item = (u32, &Holder)> {
        self.claims.iter().filter(|(_, claim)| claim.released.is_none()).map(|(host, claim)| (*host, &claim.holder))
    }

    /// The pages that differ from `acknowledged`, as they are to be written.
    pub fn edits_since(&self, acknowledged: &Self) -> Vec<PageEdit> {
        let _ = acknowledged;
        todo!()
    }
}
