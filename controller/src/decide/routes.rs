//! Which networks lead to which node.
//!
//! Wanted are a Node's podCIDRs, what people write (`routes-extra`), what the node's record asks for, and what is behind
//! the plain peers that it serves. Each is allowed or not by itself; of those that overlap the earlier holder keeps: who
//! has it approved comes before who wants it, then the elder. The networks that are given never overlap, so one look to
//! either side in their order finds every conflict.
//!
//! A network that moves has to be taken from the one before it is given to the other: what an approval in force still
//! gives away is given to nobody else in the same decision, so that no two approvals ever hold it at once.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use keystone_mesh_core::admission::overlap;
use keystone_mesh_core::facts::MAX_FACT;
use keystone_mesh_core::network::Network;
use keystone_mesh_core::node::{Approval, MAX_POD_CIDRS, MAX_ROUTES, NodeName};

use super::census::{Census, Machine, Standing};
use super::plain::Serving;
use crate::view::Settings;

/// Who wants a network for a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// `spec.podCIDRs`.
    PodCidr,
    /// The annotation `routes-extra`.
    Person,
    /// The record's `routes-wanted`.
    Record,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PodCidr => "spec.podCIDRs",
            Self::Person => "the annotation routes-extra",
            Self::Record => "the node's record",
        })
    }
}

/// Who has a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner<'a> {
    Node(&'a NodeName),
    Peer(&'a NodeName),
}

impl fmt::Display for Owner<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(name) => write!(f, "node `{name}`"),
            Self::Peer(name) => write!(f, "plain peer `{name}`"),
        }
    }
}

/// Why a network is not given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RouteRefusal {
    /// Nobody allowed it.
    #[error(
        "{net} ({asker}) is not allowed: add it to --allowed-routes of the controller, or to spec.routes of the Member"
    )]
    NotAllowed {
        /// What was asked.
        net: IpNet,
        /// By whom.
        asker: String,
    },
    /// A pod CIDR outside of those that there are.
    #[error("{0} (spec.podCIDRs) is outside of the controller's --pod-cidrs")]
    OutsidePodCidrs(IpNet),
    /// A pod CIDR that could be somebody's in the internet.
    #[error("{0} (spec.podCIDRs) is public address space; if the cluster's pods are there, name it with --pod-cidrs")]
    PublicPodCidr(IpNet),
    /// Addresses that are never routed.
    #[error("{0} is a default route, or loopback, link-local or multicast space; none of these leads to a node")]
    Special(IpNet),
    /// Another's.
    #[error("{net} overlaps {taken} of {owner}, which has it already; each network has one way")]
    Overlap {
        /// What was asked.
        net: IpNet,
        /// What is there.
        taken: IpNet,
        /// Whose it is.
        owner: String,
    },
    /// More than an approval can hold.
    #[error(
        "{0} is one network too many: a node is the way to at most {MAX_ROUTES} networks and has at most {MAX_POD_CIDRS} \
         pod CIDRs"
    )]
    TooMany(IpNet),
}

impl RouteRefusal {
    /// For conditions.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::NotAllowed { .. } => "RouteNotAllowed",
            Self::OutsidePodCidrs(_) | Self::PublicPodCidr(_) => "OutsidePodCIDRs",
            Self::Special(_) => "RouteNotPossible",
            Self::Overlap { .. } => "RouteOverlap",
            Self::TooMany(_) => "TooManyRoutes",
        }
    }
}

/// What one machine or peer is given, and what not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Granted {
    pub(super) routes: BTreeSet<IpNet>,
    pub(super) pod_cidrs: BTreeSet<IpNet>,
    pub(super) refused: Vec<RouteRefusal>,
}

/// Who is given what.
#[derive(Debug, Default)]
pub(super) struct Routes<'a> {
    pub(super) machines: BTreeMap<&'a NodeName, Granted>,
    /// Of plain peers, their own addresses included.
    pub(super) peers: BTreeMap<&'a NodeName, Granted>,
    /// The plain peers that a machine serves.
    pub(super) served: BTreeMap<&'a NodeName, Vec<&'a NodeName>>,
}

/// Decides about every route.
pub(super) fn grant<'a>(
    network: &Network,
    settings: &Settings,
    census: &Census<'a>,
    serving: &[Serving<'a>],
) -> Routes<'a> {
    let mut book = Book::new(network);
    let mut wants: Vec<Wants<'a>> = Vec::new();
    for machine in census.machines.values().filter(|machine| machine.admitted().is_some()) {
        wants.push(Wants::of_machine(machine, settings, &mut book));
    }
    wants.sort_by_key(|wants| (wants.created, wants.name));
    let mut of_peers: Vec<Wants<'a>> = serving.iter().map(|serving| Wants::of_peer(serving, &mut book)).collect();
    of_peers.sort_by_key(|wants| (wants.created, wants.name));
    wants.append(&mut of_peers);
    book.moving = given_away(census, &wants);
    for has_it in [true, false] {
        for wants in &wants {
            for net in wants.nets.iter().filter(|net| wants.held.contains(net) == has_it) {
                book.give(wants, *net);
            }
        }
    }
    book.routes
}

/// What approvals hold that are in force, or were until this decision, and what nobody wants of them any more. Without a
/// record no reader acts on an approval, so one that somebody brought back to a silent object is in nobody's way.
fn given_away<'a>(census: &Census<'a>, wants: &[Wants<'a>]) -> Vec<(IpNet, &'a NodeName)> {
    let kept: BTreeSet<(&NodeName, IpNet)> =
        wants.iter().flat_map(|wants| wants.nets.iter().map(|net| (wants.carrier, *net))).collect();
    let counts = |machine: &&Machine<'_>| machine.standing != Standing::Silent;
    let held = census.machines.values().filter(counts).flat_map(|machine| {
        let approval = machine.newest.filter(|approval| !approval.is_revoked());
        approval.into_iter().flat_map(Approval::behind).map(|net| (net, machine.name))
    });
    held.filter(|(net, carrier)| !kept.contains(&(carrier, *net))).collect()
}

/// What one machine or peer wants and may have, and what it has.
struct Wants<'a> {
    owner: Owner<'a>,
    name: &'a NodeName,
    created: u64,
    /// Whose approval has to hold it.
    carrier: &'a NodeName,
    nets: Vec<IpNet>,
    /// Those that are the pods' of a machine.
    pods: BTreeSet<IpNet>,
    /// Those that are a plain peer's own addresses: of the mesh, and kept apart by the ledger.
    own: Vec<IpNet>,
    /// What it has already.
    held: BTreeSet<IpNet>,
}

impl<'a> Wants<'a> {
    fn of_machine(machine: &Machine<'a>, settings: &Settings, book: &mut Book<'a>) -> Self {
        let mut nets = Vec::new();
        let mut pods = BTreeSet::new();
        for (net, source) in wanted(machine) {
            if nets.contains(&net) {
                continue;
            }
            match check(net, source, machine, settings) {
                Ok(()) => {
                    nets.push(net);
                    pods.extend((source == Source::PodCidr).then_some(net));
                }
                // What it once asked for, and what has other grounds, as the addresses of plain peers.
                Err(_) if machine.record.is_none() && source == Source::Record => {}
                Err(refusal) => book.refuse(Owner::Node(machine.name), refusal),
            }
        }
        let held = machine.in_force().map(|approval| approval.behind().collect()).unwrap_or_default();
        let name = machine.name;
        book.routes.machines.entry(name).or_default();
        let (owner, created) = (Owner::Node(name), machine.created());
        Self { owner, name, created, carrier: name, nets, pods, own: Vec::new(), held }
    }

    fn of_peer(serving: &Serving<'a>, book: &mut Book<'a>) -> Self {
        let mut nets = serving.addresses.clone();
        for &net in &serving.routes {
            match special(net) {
                false if !nets.contains(&net) => nets.push(net),
                false => {}
                true => book.refuse(Owner::Peer(serving.name), RouteRefusal::Special(net)),
            }
        }
        let name = serving.name;
        book.routes.peers.entry(name).or_default();
        book.routes.served.entry(serving.node).or_default().push(name);
        let held = serving.held.iter().copied().collect();
        let (owner, pods, own) = (Owner::Peer(name), BTreeSet::new(), serving.addresses.clone());
        Self { owner, name, created: serving.created, carrier: serving.node, nets, pods, own, held }
    }
}

/// What leads to a machine, if it is allowed. Without a record nobody knows what it asks for, so what it has stays.
fn wanted(machine: &Machine<'_>) -> Vec<(IpNet, Source)> {
    let pods = machine.node.map(|node| node.pod_cidrs.as_slice()).unwrap_or_default();
    let extra = machine.carried().map(|mesh| mesh.wishes.routes.as_slice()).unwrap_or_default();
    let asked = match machine.record {
        Some(record) => record.routes.as_slice(),
        None => machine.in_force().map(|approval| approval.routes.as_slice()).unwrap_or_default(),
    };
    let of = |nets: &[IpNet], source| nets.iter().map(move |net| (net.trunc(), source)).collect::<Vec<_>>();
    [of(pods, Source::PodCidr), of(extra, Source::Person), of(asked, Source::Record)].concat()
}

fn check(net: IpNet, source: Source, machine: &Machine<'_>, settings: &Settings) -> Result<(), RouteRefusal> {
    if special(net) {
        return Err(RouteRefusal::Special(net));
    }
    let inside = |allowed: &[IpNet]| allowed.iter().any(|allowed| allowed.contains(&net));
    match source {
        // A kubelet may name the podCIDRs of its own Node: without bounds it could take anybody's addresses.
        Source::PodCidr if settings.pod_cidrs.is_empty() && !private(net) => Err(RouteRefusal::PublicPodCidr(net)),
        Source::PodCidr if settings.pod_cidrs.is_empty() || inside(&settings.pod_cidrs) => Ok(()),
        Source::PodCidr => Err(RouteRefusal::OutsidePodCidrs(net)),
        Source::Person | Source::Record => {
            let of_member = machine.member.map(|member| member.routes.as_slice()).unwrap_or_default();
            if inside(&settings.allowed_routes) || inside(of_member) {
                Ok(())
            } else {
                Err(RouteRefusal::NotAllowed { net, asker: source.to_string() })
            }
        }
    }
}

/// Loopback, link-local and multicast space, "this network" of RFC 791 and IPv4's reserved end, and what holds any of it, as
/// a default route does.
fn special(net: IpNet) -> bool {
    const NOBODYS: [IpNet; 8] = [
        v4([0, 0, 0, 0], 8),
        v4([127, 0, 0, 0], 8),
        v4([169, 254, 0, 0], 16),
        v4([224, 0, 0, 0], 3),
        v6([0, 0], 128),
        IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128)),
        v6([0xfe80, 0], 10),
        v6([0xff00, 0], 8),
    ];
    NOBODYS.iter().any(|nobodys| overlap(*nobodys, net))
}

/// Space that is nobody's in the internet: RFC 1918, shared space (RFC 6598) and unique local addresses (RFC 4193).
fn private(net: IpNet) -> bool {
    const PRIVATE: [IpNet; 5] = [
        v4([10, 0, 0, 0], 8),
        v4([172, 16, 0, 0], 12),
        v4([192, 168, 0, 0], 16),
        v4([100, 64, 0, 0], 10),
        v6([0xfc00, 0], 7),
    ];
    PRIVATE.iter().any(|private| private.contains(&net))
}

const fn v4([a, b, c, d]: [u8; 4], prefix: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix))
}

const fn v6([first, second]: [u16; 2], prefix: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(first, second, 0, 0, 0, 0, 0, 0), prefix))
}

/// A network and who has it; the mesh itself is nobody's.
type Taken<'a> = (IpNet, Option<Owner<'a>>);

/// The networks that are given: disjoint, by family and first address.
struct Book<'a> {
    taken: BTreeMap<(bool, u128), Taken<'a>>,
    /// Networks that approvals in force have to give away first, and whose they are.
    moving: Vec<(IpNet, &'a NodeName)>,
    /// How many networks each list of an approval holds (its routes, its pod CIDRs), and how long their text is.
    room: BTreeMap<(&'a NodeName, bool), (usize, usize)>,
    routes: Routes<'a>,
}

impl<'a> Book<'a> {
    fn new(network: &Network) -> Self {
        let taken = network.prefixes().map(|net| (position(net), (net, None)));
        Self { taken: taken.into(), moving: Vec::new(), room: BTreeMap::new(), routes: Routes::default() }
    }

    fn give(&mut self, wants: &Wants<'a>, net: IpNet) {
        // The next decision gives it, once it is seen that the other has it no more.
        if self.moving.iter().any(|(moving, of)| *of != wants.carrier && overlap(net, *moving)) {
            return;
        }
        let (own, pods) = (wants.own.contains(&net), wants.pods.contains(&net));
        if !own {
            match self.conflict(net) {
                // Covered by what it has already.
                Some((taken, Some(owner))) if owner == wants.owner && taken.contains(&net) => return,
                Some((taken, owner)) => {
                    let owner = owner.map_or_else(|| "the mesh itself".to_owned(), |owner| owner.to_string());
                    return self.refuse(wants.owner, RouteRefusal::Overlap { net, taken, owner });
                }
                None => {}
            }
        }
        /// Between two networks in a list.
        const SEPARATOR: usize = 2;
        let list = (wants.carrier, pods);
        let (count, bytes) = self.room.get(&list).copied().unwrap_or_default();
        let limit = if pods { MAX_POD_CIDRS } else { MAX_ROUTES };
        let bytes = bytes + net.to_string().len() + SEPARATOR;
        if count == limit || bytes > MAX_FACT {
            return self.refuse(wants.owner, RouteRefusal::TooMany(net));
        }
        self.room.insert(list, (count + 1, bytes));
        if !own {
            self.taken.insert(position(net), (net, Some(wants.owner)));
        }
        let granted = self.granted(wants.owner);
        if pods {
            granted.pod_cidrs.insert(net)
        } else {
            granted.routes.insert(net)
        };
    }

    /// The network that another one overlaps. Those that are taken are disjoint, so only the nearest one below and the
    /// nearest one above can.
    fn conflict(&self, net: IpNet) -> Option<Taken<'a>> {
        let start = position(net);
        let below = self.taken.range(..=start).next_back();
        let above = self.taken.range(start..).next();
        let mut near = below.into_iter().chain(above).map(|(_, taken)| *taken);
        near.find(|(taken, _)| overlap(net, *taken))
    }

    fn refuse(&mut self, owner: Owner<'a>, refusal: RouteRefusal) {
        let refused = &mut self.granted(owner).refused;
        if !refused.contains(&refusal) {
            refused.push(refusal);
        }
    }

    fn granted(&mut self, owner: Owner<'a>) -> &mut Granted {
        match owner {
            Owner::Peer(name) => self.routes.peers.entry(name).or_default(),
            Owner::Node(name) => self.routes.machines.entry(name).or_default(),
        }
    }
}

fn position(net: IpNet) -> (bool, u128) {
    match net {
        IpNet::V4(v4) => (false, v4.network().to_bits().into()),
        IpNet::V6(v6) => (true, v6.network().to_bits()),
    }
}
