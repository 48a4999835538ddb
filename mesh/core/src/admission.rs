//! Whether a node is let in, and what it is granted.
//!
//! A pure decision over what the control plane knows. The driver carries it out in one transaction: it stores the
//! entry and the token's remaining uses together, or nothing.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::facts::join;
use crate::key::NodeId;
use crate::network::Network;
use crate::node::{Approval, Entry, NodeName, NodeRecord};
use crate::token::{TokenRecord, TokenRefusal, TokenSecret};

/// An address is not given to another node for so long after its node went: caches, sessions and firewalls elsewhere
/// still know it. One day, in seconds.
pub const QUARANTINE: u64 = 24 * 3600;

/// What the control plane knows when a node asks to join.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// The network's document.
    pub network: &'a Network,
    /// Every node.
    pub entries: &'a BTreeMap<NodeName, Entry>,
    /// Host numbers of nodes that went, and when (seconds since 1970).
    pub released: &'a BTreeMap<u32, u64>,
    /// The host number to try first: one after the last that was given.
    pub next_host: u32,
}

/// Why a node is not let in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JoinRefusal {
    /// The token is not good for it.
    #[error(transparent)]
    Token(#[from] TokenRefusal),
    /// The record is another's.
    #[error("the record is signed by another identity than the one that connected")]
    WrongIdentity,
    /// The name belongs to another machine.
    #[error(
        "a node named `{name}` is already in the network with another identity ({known}); choose another name, or on the \
         control plane run `keystone-mesh remove {name}` if that machine is gone"
    )]
    NameTaken {
        /// The name.
        name: NodeName,
        /// First characters of the identity that has it.
        known: String,
    },
    /// This machine is in the network under another name.
    #[error("this machine is already in the network as `{0}`; run `keystone-mesh leave` on it first")]
    IdentityKnown(NodeName),
    /// The WireGuard key is another node's.
    #[error("the WireGuard key is that of node `{0}`; two machines cannot share one (was a disk image copied?)")]
    KeyTaken(NodeName),
    /// Asked to be the way to a network that the token does not allow.
    #[error(
        "the token allows no route to {wanted} (it allows: {allowed}); make one with `token create --route {wanted}`"
    )]
    RouteNotAllowed {
        /// What was asked.
        wanted: IpNet,
        /// What the token allows.
        allowed: String,
    },
    /// Asked for a network that is another's.
    #[error("{wanted} overlaps {taken}, which is {owner}; each network has one way")]
    RouteOverlap {
        /// What was asked.
        wanted: IpNet,
        /// What is there.
        taken: IpNet,
        /// Whose it is.
        owner: String,
    },
    /// No address is left.
    #[error("no address is left in {0}; remove nodes that are gone, or make a larger network")]
    AddressesExhausted(IpNet),
}

impl JoinRefusal {
    /// The stable code in answers and metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Token(refusal) => refusal.code(),
            Self::WrongIdentity => "wrong-identity",
            Self::NameTaken { .. } => "name-taken",
            Self::IdentityKnown(_) => "identity-known",
            Self::KeyTaken(_) => "key-taken",
            Self::RouteNotAllowed { .. } => "route-not-allowed",
            Self::RouteOverlap { .. } => "route-overlap",
            Self::AddressesExhausted(_) => "addresses-exhausted",
        }
    }
}

/// A node that is let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// What it is allowed; to be signed.
    pub approval: Approval,
    /// Whether this costs the token a use: not where the same machine joins again.
    pub spends_use: bool,
    /// The host number that was given, where one was.
    pub host: Option<u32>,
}

/// Decides about a join by token. `client` is the identity that TLS proved; `now` in seconds since 1970.
pub fn decide_join(
    known: Known<'_>,
    client: NodeId,
    record: &NodeRecord,
    token: Option<&TokenRecord>,
    secret: &TokenSecret,
    now: u64,
) -> Result<Grant, JoinRefusal> {
    if record.identity != client {
        return Err(JoinRefusal::WrongIdentity);
    }
    let token = token.ok_or(TokenRefusal::Unknown)?;
    let mine = known.entries.get(&record.name).filter(|entry| entry.record.get().identity == client);
    let again = mine.and_then(|entry| entry.approved(known.network.id));
    match token.check(secret, &record.name, now) {
        // A machine whose answer was lost asks again with a token that it has itself used up.
        Err(TokenRefusal::UsedUp) if again.is_some() => {}
        other => other?,
    }
    check_unique(known, record)?;
    for &wanted in &record.routes {
        if !token.routes.iter().any(|allowed| allowed.contains(&wanted)) {
            return Err(JoinRefusal::RouteNotAllowed { wanted, allowed: list_or_none(&token.routes) });
        }
    }
    grant(known, record, now)
}

/// Decides what the control-plane host itself is allowed: like any node, without a token.
pub fn decide_own(known: Known<'_>, record: &NodeRecord, now: u64) -> Result<Grant, JoinRefusal> {
    check_unique(known, record)?;
    grant(known, record, now)
}

/// Why a record is not stored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishRefusal {
    /// No node of this name and identity is in the network.
    #[error("this machine is not in the network (any more); join it with a token")]
    NotMember,
    /// A newer record is there.
    #[error(
        "a newer record is stored (sequence number {stored}, got {got}); is a second machine running on the same secret?"
    )]
    Stale {
        /// The sequence number that is stored.
        stored: u64,
        /// The one that came.
        got: u64,
    },
    /// Not unique, or another's.
    #[error(transparent)]
    Join(#[from] JoinRefusal),
}

impl PublishRefusal {
    /// The stable code in answers and metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotMember => "not-member",
            Self::Stale { .. } => "stale-record",
            Self::Join(refusal) => refusal.code(),
        }
    }
}

/// Decides whether a member's record is stored. `Ok(false)`: it is, already.
pub fn decide_publish(known: Known<'_>, client: NodeId, record: &NodeRecord) -> Result<bool, PublishRefusal> {
    if record.identity != client {
        return Err(JoinRefusal::WrongIdentity.into());
    }
    let stored = known.entries.get(&record.name).map(|entry| entry.record.get());
    match stored {
        Some(stored) if stored.identity == client && stored == record => Ok(false),
        Some(stored) if stored.identity == client && stored.seq >= record.seq => {
            Err(PublishRefusal::Stale { stored: stored.seq, got: record.seq })
        }
        Some(stored) if stored.identity == client => {
            check_unique(known, record)?;
            Ok(true)
        }
        Some(_) | None => Err(PublishRefusal::NotMember),
    }
}

fn check_unique(known: Known<'_>, record: &NodeRecord) -> Result<(), JoinRefusal> {
    for (name, entry) in known.entries {
        let other = entry.record.get();
        match (*name == record.name, other.identity == record.identity) {
            (true, false) => {
                let known = other.identity.short();
                return Err(JoinRefusal::NameTaken { name: name.clone(), known });
            }
            (false, true) => return Err(JoinRefusal::IdentityKnown(name.clone())),
            (false, false) if other.public_key == record.public_key => return Err(JoinRefusal::KeyTaken(name.clone())),
            (true, true) | (false, false) => {}
        }
    }
    Ok(())
}

fn grant(known: Known<'_>, record: &NodeRecord, now: u64) -> Result<Grant, JoinRefusal> {
    check_routes(known, record)?;
    let before = known.entries.get(&record.name).and_then(|entry| entry.approved(known.network.id));
    let (addresses, host) = match before {
        Some(approval) => (approval.addresses.clone(), None),
        None => {
            let host = free_host(known, now)?;
            (addresses_of(known.network, host), Some(host))
        }
    };
    let approval = Approval {
        network: known.network.id,
        name: record.name.clone(),
        identity: record.identity,
        addresses,
        routes: record.routes.clone(),
        pod_cidrs: Vec::new(),
        endpoints: before.map(|approval| approval.endpoints.clone()).unwrap_or_default(),
        relays: before.map(|approval| approval.relays.clone()).unwrap_or_default(),
        location: before.and_then(|approval| approval.location.clone()),
        serial: before.map_or(1, |approval| approval.serial + 1),
    };
    Ok(Grant { approval, spends_use: before.is_none(), host })
}

/// Checks the routes that a record asks for against the mesh and against every other node's.
pub fn check_routes(known: Known<'_>, record: &NodeRecord) -> Result<(), JoinRefusal> {
    for &wanted in &record.routes {
        for taken in known.network.prefixes() {
            if overlap(wanted, taken) {
                return Err(JoinRefusal::RouteOverlap { wanted, taken, owner: "the mesh's own prefix".into() });
            }
        }
        for (name, entry) in known.entries.iter().filter(|(name, _)| **name != record.name) {
            let mut behind = entry.approved(known.network.id).into_iter().flat_map(Approval::behind);
            if let Some(taken) = behind.find(|taken| overlap(wanted, *taken)) {
                return Err(JoinRefusal::RouteOverlap { wanted, taken, owner: format!("node `{name}`'s") });
            }
        }
    }
    Ok(())
}

/// Whether two networks share an address.
pub fn overlap(a: IpNet, b: IpNet) -> bool {
    a.contains(&b) || b.contains(&a)
}

fn list_or_none(routes: &[IpNet]) -> String {
    if routes.is_empty() { "none".into() } else { join(routes, ", ") }
}

/// Host numbers go upwards and round, so that an address comes back as late as possible.
fn free_host(known: Known<'_>, now: u64) -> Result<u32, JoinRefusal> {
    // The IPv4 prefix is the smaller one; host 0 is the network, the last one its broadcast address.
    let bits = 32 - u32::from(known.network.ipv4.prefix_len());
    let last = (1_u32 << bits) - 2;
    let taken: std::collections::BTreeSet<u32> = known
        .entries
        .values()
        .filter_map(|entry| entry.approved(known.network.id))
        .filter_map(|approval| host_of(known.network, approval))
        .collect();
    let resting = |host: &u32| known.released.get(host).is_some_and(|&at| now.saturating_sub(at) < QUARANTINE);
    let start = known.next_host.clamp(1, last);
    (start..=last)
        .chain(1..start)
        .find(|host| !taken.contains(host) && !resting(host))
        .ok_or(JoinRefusal::AddressesExhausted(known.network.ipv4.into()))
}

/// The host number of a node's addresses.
pub fn host_of(network: &Network, approval: &Approval) -> Option<u32> {
    approval.addresses.iter().find_map(|net| match net.addr() {
        IpAddr::V4(v4) if network.ipv4.contains(&v4) => Some(u32::from(v4) - u32::from(network.ipv4.network())),
        IpAddr::V4(_) | IpAddr::V6(_) => None,
    })
}

/// The mesh addresses of a host number, one of each family.
pub fn addresses_of(network: &Network, host: u32) -> Vec<IpNet> {
    let v4 = Ipv4Addr::from(u32::from(network.ipv4.network()) + host);
    let v6 = Ipv6Addr::from(u128::from(network.ipv6.network()) + u128::from(host));
    vec![IpAddr::from(v4).into(), IpAddr::from(v6).into()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::network::tests::network;
    use crate::node::tests::{entry, record, secret};
    use crate::token::{SECRET_LEN, TokenId};

    fn token(routes: &[&str]) -> TokenRecord {
        TokenRecord {
            id: TokenId::from_bytes([1; 8]),
            hash: token_secret().hash(),
            created: 0,
            expires: None,
            uses_left: Some(1),
            names: None,
            routes: routes.iter().map(|route| route.parse().unwrap()).collect(),
            revoked: false,
        }
    }

    fn token_secret() -> TokenSecret {
        TokenSecret::from_bytes([2; SECRET_LEN])
    }

    fn entries(list: &[Entry]) -> BTreeMap<NodeName, Entry> {
        list.iter().map(|entry| (entry.name().clone(), entry.clone())).collect()
    }

    fn join_with(
        list: &[Entry],
        record: &NodeRecord,
        token: Option<&TokenRecord>,
        released: &BTreeMap<u32, u64>,
    ) -> Result<Grant, JoinRefusal> {
        let known = Known { network: &network(1), entries: &entries(list), released, next_host: 2 };
        decide_join(known, record.identity, record, token, &token_secret(), 1000)
    }

    fn home() -> Entry {
        entry(1, 1, "home", "10.98.0.1/32", &["10.42.0.0/24"])
    }

    #[test]
    fn a_node_gets_the_next_address_of_both_families() {
        let grant = join_with(&[home()], &record(2, "worker-1"), Some(&token(&[])), &BTreeMap::new()).unwrap();
        assert_eq!(grant.approval.addresses[0].to_string(), "10.98.0.2/32");
        assert!(grant.approval.addresses[1].to_string().ends_with("::2/128"));
        assert!(grant.spends_use);
    }

    #[test]
    fn the_same_machine_joins_again_at_no_cost_and_keeps_its_address() {
        let worker = entry(1, 2, "worker-1", "10.98.0.9/32", &[]);
        let used_up = TokenRecord { uses_left: Some(0), ..token(&[]) };
        let grant = join_with(&[home(), worker], &record(2, "worker-1"), Some(&used_up), &BTreeMap::new()).unwrap();
        assert_eq!(grant.approval.addresses[0].to_string(), "10.98.0.9/32");
        assert!(!grant.spends_use);
    }

    #[test]
    fn a_second_machine_cannot_take_a_known_name() {
        let worker = entry(1, 2, "worker-1", "10.98.0.2/32", &[]);
        let refusal = join_with(&[home(), worker], &record(3, "worker-1"), Some(&token(&[])), &BTreeMap::new());
        let refusal = refusal.unwrap_err();
        assert_eq!(refusal.code(), "name-taken");
        assert!(refusal.to_string().contains("keystone-mesh remove worker-1"));
    }

    #[test]
    fn a_copied_disk_image_is_told() {
        let mut copied = record(3, "worker-2");
        copied.public_key = record(2, "worker-1").public_key;
        let worker = entry(1, 2, "worker-1", "10.98.0.2/32", &[]);
        let refusal =
            join_with(std::slice::from_ref(&worker), &copied, Some(&token(&[])), &BTreeMap::new()).unwrap_err();
        assert_eq!(refusal.code(), "key-taken");
        let refusal = join_with(&[worker], &record(2, "worker-2"), Some(&token(&[])), &BTreeMap::new()).unwrap_err();
        assert_eq!(refusal.code(), "identity-known");
    }

    #[test]
    fn routes_need_a_token_that_allows_them_and_overlap_nothing() {
        let wanting = |route: &str| NodeRecord { routes: vec![route.parse().unwrap()], ..record(2, "worker-1") };
        let all = token(&["0.0.0.0/0"]);
        let code = |route: &str, token: &TokenRecord| {
            join_with(&[home()], &wanting(route), Some(token), &BTreeMap::new()).map_err(|refusal| refusal.code())
        };
        assert!(code("10.42.1.0/24", &all).is_ok());
        assert_eq!(code("10.42.1.0/24", &token(&["10.43.0.0/16"])).unwrap_err(), "route-not-allowed");
        assert_eq!(code("10.42.0.0/16", &all).unwrap_err(), "route-overlap");
        assert_eq!(code("10.42.0.128/25", &all).unwrap_err(), "route-overlap");
        assert_eq!(code("10.98.7.0/24", &all).unwrap_err(), "route-overlap");
        assert_eq!(code("0.0.0.0/0", &all).unwrap_err(), "route-overlap");
    }

    #[test]
    fn unknown_tokens_and_foreign_records_are_refused() {
        let refusal = join_with(&[], &record(2, "worker-1"), None, &BTreeMap::new()).unwrap_err();
        assert_eq!(refusal.code(), "token-unknown");
        let known = Known { network: &network(1), entries: &BTreeMap::new(), released: &BTreeMap::new(), next_host: 2 };
        let client = secret(3).identity().id();
        let refusal = decide_join(known, client, &record(2, "w"), Some(&token(&[])), &token_secret(), 0).unwrap_err();
        assert_eq!(refusal.code(), "wrong-identity");
    }

    #[test]
    fn only_a_member_publishes_and_only_forwards() {
        let worker = entry(1, 2, "worker-1", "10.98.0.2/32", &[]);
        let all = entries(&[home(), worker]);
        let known = Known { network: &network(1), entries: &all, released: &BTreeMap::new(), next_host: 3 };
        let mine = secret(2).identity().id();
        let at = |seq: u64| NodeRecord { seq, nat: crate::path::Nat::None, ..record(2, "worker-1") };
        assert_eq!(decide_publish(known, mine, &at(2)), Ok(true));
        assert_eq!(decide_publish(known, mine, &record(2, "worker-1")), Ok(false));
        assert_eq!(decide_publish(known, mine, &at(1)).unwrap_err().code(), "stale-record");
        assert_eq!(
            decide_publish(known, mine, &NodeRecord { seq: 9, ..record(2, "home") }).unwrap_err().code(),
            "not-member"
        );
        let theirs = secret(3).identity().id();
        assert_eq!(decide_publish(known, theirs, &at(9)).unwrap_err().code(), "wrong-identity");
    }

    #[test]
    fn a_released_address_rests_for_a_day() {
        let released = BTreeMap::from([(2, 990)]);
        let grant = join_with(&[home()], &record(2, "worker-1"), Some(&token(&[])), &released).unwrap();
        assert_eq!(grant.host, Some(3));
        let rested = BTreeMap::from([(2, 0)]);
        let known = Known { network: &network(1), entries: &entries(&[home()]), released: &rested, next_host: 2 };
        assert_eq!(free_host(known, QUARANTINE), Ok(2));
    }

    proptest! {
        #[test]
        fn addresses_are_unique_until_the_prefix_is_full(next in 0_u32..20, count in 1_usize..20) {
            let small = Network { ipv4: "10.98.0.0/28".parse().unwrap(), ..network(1) };
            let (mut known, mut next_host) = (BTreeMap::new(), next);
            for i in 0..count {
                let record = record(2 + i as u8, &format!("worker-{i}"));
                let view = Known { network: &small, entries: &known, released: &BTreeMap::new(), next_host };
                match decide_own(view, &record, 0) {
                    Ok(grant) => {
                        prop_assert!(i < 14);
                        next_host = grant.host.unwrap() + 1;
                        let taken = known.values().any(|e: &Entry| e.approval.as_ref().unwrap().get().addresses == grant.approval.addresses);
                        prop_assert!(!taken);
                        let approval = Some(grant.approval.sign(&secret(1).identity()));
                        let record = record.sign(&secret(2 + i as u8).identity());
                        known.insert(record.get().name.clone(), Entry { record, approval });
                    }
                    Err(refusal) => {
                        prop_assert!(i >= 14);
                        prop_assert_eq!(refusal.code(), "addresses-exhausted");
                    }
                }
            }
        }
    }
}
