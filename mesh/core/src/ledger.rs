//! Who holds which address: the controller's ledger, as it stands in Kubernetes.
//!
//! An address is claimed here before it is approved anywhere, under the API server's optimistic concurrency. So two
//! controllers cannot give one address twice, a crash between claim and approval costs nothing, and a node that went
//! while no controller ran is noticed by its claim. Claims are kept in pages of [`PAGE`] host numbers, one ConfigMap
//! each; a released claim stays as a note of when, until its address is given again.
//!
//! ```text
//!   ConfigMap keystone-mesh-addresses-0
//!     "1":  node home 3xk…               held; the identity is pinned under the name
//!     "2":  peer laptop                  held
//!     "3":  node worker-7 q5d… released 1795500000
//!     "4":  node worker-8                does not read: told, kept as it is, and nobody gets number 4
//! ```
//!
//! A claim is written by compare and swap of its page alone, so two controllers that know different states may claim
//! two numbers for one holder, in two pages. Neither number is doubled; everybody uses the lower one, and a release
//! gives both back.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::admission::QUARANTINE;
use crate::facts::FieldError;
use crate::io::excerpt;
use crate::key::NodeId;
use crate::network::Network;
use crate::node::NodeName;

/// Host numbers per page: a page of long names is some 90 KiB, a ConfigMap holds 1 MiB.
pub const PAGE: u32 = 256;

/// Who an address is for: a node's identity or a plain peer, with the name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Holder {
    /// A node: the identity is pinned under the name for as long as the claim lives.
    Node(NodeName, NodeId),
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

/// One address' entry. As text: `node NAME IDENTITY` or `peer NAME`, then ` released SECONDS` where it was given back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Whose it is, or was.
    pub holder: Holder,
    /// When it was given back, in seconds since 1970; none while it is held.
    pub released: Option<u64>,
}

/// A text that is no claim.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a claim; expected `node NAME IDENTITY` or `peer NAME`, with ` released SECONDS` where it was given back"
)]
pub struct ClaimError(String);

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.holder.fmt(f)?;
        self.released.map_or(Ok(()), |at| write!(f, " released {at}"))
    }
}

impl FromStr for Claim {
    type Err = ClaimError;

    fn from_str(text: &str) -> Result<Self, ClaimError> {
        let words: Vec<&str> = text.splitn(6, ' ').collect();
        let read = || -> Option<Self> {
            let (holder, rest) = match words[..] {
                ["node", name, id, ref rest @ ..] => (Holder::Node(name.parse().ok()?, id.parse().ok()?), rest),
                ["peer", name, ref rest @ ..] => (Holder::Peer(name.parse().ok()?), rest),
                _ => return None,
            };
            let released = match rest {
                [] => None,
                ["released", at] => Some(at.parse().ok()?),
                _ => return None,
            };
            Some(Self { holder, released })
        };
        // There is one way to write a claim: what is read is written back as it was.
        read().filter(|claim| claim.to_string() == text).ok_or_else(|| ClaimError(excerpt(text)))
    }
}

/// What a page's ConfigMap is to hold; all of its `data`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageEdit {
    /// Which page: host number / [`PAGE`].
    pub page: u32,
    /// `data` of the ConfigMap: host number to claim, as text.
    pub data: BTreeMap<String, String>,
}

/// The ledger as last acknowledged by the API server, or with claims that are still to be written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    claims: BTreeMap<u32, Claim>,
    /// The numbers of every holder, live and released.
    numbers: BTreeMap<Holder, BTreeSet<u32>>,
    /// Lines that do not read, by page: written back as they are.
    faulty: BTreeMap<u32, BTreeMap<String, String>>,
    /// Numbers that faulty lines may be about.
    blocked: BTreeSet<u32>,
}

/// No address is left.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no address is left in {0}; remove nodes that are gone, or make a larger network")]
pub struct Exhausted(pub ipnet::Ipv4Net);

impl Ledger {
    /// Reads one page over what is known of it; faulty lines are told and their numbers are taken by nobody.
    pub fn handle_page(&mut self, page: u32, data: &BTreeMap<String, String>) -> Vec<FieldError> {
        for host in self.page(page).map(|(host, _)| host).collect::<Vec<_>>() {
            self.take(host);
        }
        self.faulty.remove(&page);
        let mut faults = Vec::new();
        for (key, text) in data {
            match read_line(page, key, text) {
                Ok((host, claim)) => self.put(host, claim),
                Err(why) => {
                    let why = format!("page {page}, `{}`: {why}", excerpt(key));
                    faults.push(FieldError::Invalid { key: "data", why });
                    self.faulty.entry(page).or_default().insert(key.clone(), text.clone());
                }
            }
        }
        let about = self.faulty.values().flat_map(BTreeMap::keys).filter_map(|key| key.trim().parse().ok());
        self.blocked = about.collect();
        faults
    }

    /// The number that this very holder has.
    pub fn held_by(&self, holder: &Holder) -> Option<u32> {
        self.numbers.get(holder)?.iter().copied().find(|host| self.is_live(*host))
    }

    /// The live claim of a node name, with the identity that is pinned to it.
    pub fn pinned(&self, name: &NodeName) -> Option<(u32, NodeId)> {
        let first = Holder::Node(name.clone(), NodeId::from_bytes([0; 32]));
        let last = Holder::Node(name.clone(), NodeId::from_bytes([0xff; 32]));
        let live = self.numbers.range(first..=last).filter_map(|(holder, _)| match holder {
            Holder::Node(_, id) => Some((self.held_by(holder)?, *id)),
            Holder::Peer(_) => None,
        });
        live.min_by_key(|(host, _)| *host)
    }

    /// What is noted of a number, held or given back.
    pub fn noted(&self, host: u32) -> Option<&Claim> {
        self.claims.get(&host)
    }

    /// Claims a number: the one that the holder has or had, else one never given, else the one that rested longest
    /// beyond the quarantine. Idempotent. `now` in seconds since 1970.
    pub fn claim(&mut self, network: &Network, holder: &Holder, now: u64) -> Result<u32, Exhausted> {
        if let Some(host) = self.held_by(holder) {
            return Ok(host);
        }
        let hosts = hosts(network);
        let host = self
            .rested_of(holder, &hosts)
            .or_else(|| self.never_given(&hosts))
            .or_else(|| self.rested_longest(&hosts, now))
            .ok_or(Exhausted(network.ipv4))?;
        self.put(host, Claim { holder: holder.clone(), released: None });
        Ok(host)
    }

    /// Claims the very number that an approval of old gives the holder, where nobody else has it and the holder has no
    /// other. Whether the holder has it now.
    pub fn adopt(&mut self, host: u32, holder: &Holder) -> bool {
        match self.held_by(holder) {
            Some(held) => held == host,
            None if host == 0 || self.blocked.contains(&host) || self.is_live(host) => false,
            None => {
                self.put(host, Claim { holder: holder.clone(), released: None });
                true
            }
        }
    }

    /// Gives a holder's number back.
    pub fn release(&mut self, holder: &Holder, now: u64) {
        for host in self.numbers.get(holder).into_iter().flatten() {
            if let Some(claim) = self.claims.get_mut(host) {
                claim.released.get_or_insert(now);
            }
        }
    }

    /// Every live claim.
    pub fn live(&self) -> impl Iterator<Item = (u32, &Holder)> {
        self.claims.iter().filter(|(_, claim)| claim.released.is_none()).map(|(host, claim)| (*host, &claim.holder))
    }

    /// The pages that differ from `acknowledged`, as they are to be written.
    pub fn edits_since(&self, acknowledged: &Self) -> Vec<PageEdit> {
        let differs = |a: &Self, b: &Self| -> BTreeSet<u32> {
            let claims = a.claims.iter().filter(|(host, claim)| b.claims.get(host) != Some(claim));
            let faulty = a.faulty.iter().filter(|(page, lines)| b.faulty.get(page) != Some(lines));
            claims.map(|(host, _)| host / PAGE).chain(faulty.map(|(page, _)| *page)).collect()
        };
        let pages = &differs(self, acknowledged) | &differs(acknowledged, self);
        pages.into_iter().map(|page| PageEdit { page, data: self.data(page) }).collect()
    }

    // --- where a number is looked for ---

    fn rested_of(&self, holder: &Holder, hosts: &RangeInclusive<u32>) -> Option<u32> {
        let mut rested = self.numbers.get(holder)?.iter().copied();
        rested.find(|host| hosts.contains(host) && !self.blocked.contains(host))
    }

    fn never_given(&self, hosts: &RangeInclusive<u32>) -> Option<u32> {
        let mut given = self.claims.range(hosts.clone()).map(|(host, _)| *host).peekable();
        hosts.clone().find(|host| given.next_if_eq(host).is_none() && !self.blocked.contains(host))
    }

    fn rested_longest(&self, hosts: &RangeInclusive<u32>, now: u64) -> Option<u32> {
        let released = self.claims.range(hosts.clone()).filter_map(|(host, claim)| Some((claim.released?, *host)));
        let usable = released.filter(|(at, host)| {
            // A clock that went back must not end a quarantine: a time to come counts as none passed.
            now.saturating_sub(*at) >= QUARANTINE && !self.blocked.contains(host)
        });
        usable.min().map(|(_, host)| host)
    }

    // --- keeping both maps in step ---

    fn is_live(&self, host: u32) -> bool {
        self.claims.get(&host).is_some_and(|claim| claim.released.is_none())
    }

    fn put(&mut self, host: u32, claim: Claim) {
        self.take(host);
        self.numbers.entry(claim.holder.clone()).or_default().insert(host);
        self.claims.insert(host, claim);
    }

    fn take(&mut self, host: u32) {
        let Some(Claim { holder, .. }) = self.claims.remove(&host) else { return };
        if let Some(numbers) = self.numbers.get_mut(&holder) {
            numbers.remove(&host);
            if numbers.is_empty() {
                self.numbers.remove(&holder);
            }
        }
    }

    fn page(&self, page: u32) -> impl Iterator<Item = (u32, &Claim)> {
        let first = page.saturating_mul(PAGE);
        self.claims.range(first..=first.saturating_add(PAGE - 1)).map(|(host, claim)| (*host, claim))
    }

    fn data(&self, page: u32) -> BTreeMap<String, String> {
        let faulty = self.faulty.get(&page).cloned().unwrap_or_default();
        faulty.into_iter().chain(self.page(page).map(|(host, claim)| (host.to_string(), claim.to_string()))).collect()
    }
}

fn read_line(page: u32, key: &str, text: &str) -> Result<(u32, Claim), String> {
    let host = key.parse::<u32>().ok().filter(|host| host.to_string() == key && host / PAGE == page && *host != 0);
    let first = u64::from(page) * u64::from(PAGE);
    let host = host.ok_or_else(|| {
        format!("not a host number of this page; expected one of {} to {}", first.max(1), first + u64::from(PAGE) - 1)
    })?;
    text.parse().map(|claim| (host, claim)).map_err(|why: ClaimError| why.to_string())
}

/// The host numbers that a network has: the IPv4 prefix is the smaller one. Number 0 is the network itself, the last
/// one its broadcast address.
fn hosts(network: &Network) -> RangeInclusive<u32> {
    let bits = 32 - u32::from(network.ipv4.prefix_len());
    1..=(1_u32 << bits) - 2
}

#[cfg(test)]
mod tests;
