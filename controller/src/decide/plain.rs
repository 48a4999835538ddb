//! Plain peers: who serves each, and what is stated of it.

use std::collections::BTreeMap;

use ipnet::IpNet;
use keystone_mesh_core::PublicKey;
use keystone_mesh_core::admission::addresses_of;
use keystone_mesh_core::ledger::Holder;
use keystone_mesh_core::network::Network;
use keystone_mesh_core::node::NodeName;
use keystone_mesh_core::plain_peer::PlainPeer;

use super::action::{Action, Effect, Event, Regarding, Target};
use super::addresses::Addresses;
use super::census::{Census, Machine};
use super::conditions::{self, Verdict};
use super::routes::{RouteRefusal, Routes};
use crate::view::{ClusterView, Now, ObjectFault, PeerView, PlainSpec};

/// Why a plain peer is not served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PeerRefusal {
    /// Its specification does not read.
    #[error("{0}")]
    Invalid(ObjectFault),
    /// Its key is a node's.
    #[error("its WireGuard key is that of node `{0}`; make a key of its own on the machine (`wg genkey`)")]
    KeyOfNode(NodeName),
    /// Its key is another plain peer's.
    #[error("its WireGuard key is that of Peer `{0}`; make a key of its own on the machine (`wg genkey`)")]
    KeyOfPeer(NodeName),
    /// There is nobody to serve it.
    #[error("no approved Node of the control plane is there to serve it; name one in spec.node")]
    NoControlPlane,
    /// The node that is to serve it does not exist.
    #[error("there is no Node `{0}` to serve it; correct spec.node")]
    NodeUnknown(NodeName),
    /// The node that is to serve it is not in the network.
    #[error("Node `{0}`, which is to serve it, is not in the network (yet); see its condition MeshApproved")]
    NodeNotApproved(NodeName),
    /// No address is left.
    #[error("{0}")]
    NoAddress(String),
    /// The serving node cannot take more.
    #[error("Node `{0}` is the way to as many networks as an approval can hold; name another in spec.node")]
    NodeFull(NodeName),
}

impl PeerRefusal {
    fn reason(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "Invalid",
            Self::KeyOfNode(_) | Self::KeyOfPeer(_) => "KeyTaken",
            Self::NoControlPlane => "NoControlPlane",
            Self::NodeUnknown(_) => "NodeUnknown",
            Self::NodeNotApproved(_) => "NodeNotApproved",
            Self::NoAddress(_) => "AddressesExhausted",
            Self::NodeFull(_) => "NodeFull",
        }
    }
}

/// A plain peer, and what was decided of it.
#[derive(Clone, Debug)]
pub(super) struct Plain<'a> {
    pub(super) peer: &'a PeerView,
    /// Who serves it, and how, where anybody does.
    pub(super) served: Option<(&'a NodeName, PlainSpec)>,
    /// What is wrong.
    pub(super) refusal: Option<PeerRefusal>,
}

impl Plain<'_> {
    /// Whether an earlier statement must not stand any longer: the key is somebody else's.
    fn is_impostor(&self) -> bool {
        matches!(self.refusal, Some(PeerRefusal::KeyOfNode(_) | PeerRefusal::KeyOfPeer(_)))
    }
}

/// A plain peer with an address: what its serving node has to be the way to.
#[derive(Clone, Debug)]
pub(super) struct Serving<'a> {
    pub(super) name: &'a NodeName,
    pub(super) created: Now,
    pub(super) node: &'a NodeName,
    pub(super) addresses: Vec<IpNet>,
    pub(super) routes: Vec<IpNet>,
    /// The networks behind it that its statement has already.
    pub(super) held: Vec<IpNet>,
}

/// Decides about every plain peer. Who was stated with a key keeps it, also against a node that shows it later (which
/// the nodes themselves settle, see `core::plan`); then come nodes, then the elder peer.
pub(super) fn judge<'a>(view: &'a ClusterView, network: &Network, census: &Census<'a>) -> Vec<Plain<'a>> {
    let home = home(network, census);
    let mut keys: BTreeMap<PublicKey, &NodeName> = BTreeMap::new();
    let mut peers: Vec<&PeerView> = view.peers().values().collect();
    peers.sort_by_key(|peer| (!keeps_key(peer), peer.created, &peer.name));
    let mut judged: Vec<Plain<'_>> = peers
        .into_iter()
        .map(|peer| {
            let (spec, fault) = specification(peer);
            let Some(spec) = spec else { return Plain { peer, served: None, refusal: fault } };
            let key_of_peer = keys.get(&spec.public_key).map(|other| PeerRefusal::KeyOfPeer((*other).clone()));
            let node = census.keys.get(&spec.public_key).filter(|_| !keeps_key(peer));
            let key_of_node = node.map(|node| PeerRefusal::KeyOfNode((*node).clone()));
            if let Some(refusal) = key_of_node.or(key_of_peer) {
                return Plain { peer, served: None, refusal: Some(refusal) };
            }
            keys.insert(spec.public_key, &peer.name);
            match server(peer, &spec, home, census) {
                Ok(node) => Plain { peer, served: Some((node, spec)), refusal: fault },
                Err(refusal) => Plain { peer, served: None, refusal: fault.or(Some(refusal)) },
            }
        })
        .collect();
    judged.sort_by_key(|plain| (plain.peer.created, &plain.peer.name));
    judged
}

fn keeps_key(peer: &PeerView) -> bool {
    let stated = peer.stated.as_ref().filter(|stated| !stated.is_revoked());
    stated.zip(peer.spec.as_ref().ok()).is_some_and(|(stated, spec)| stated.public_key == spec.public_key)
}

/// What is asked for; where that does not read, what was stated last, with the fault.
fn specification(peer: &PeerView) -> (Option<PlainSpec>, Option<PeerRefusal>) {
    match &peer.spec {
        Ok(spec) => (Some(spec.clone()), None),
        Err(fault) => {
            let stated = peer.stated.as_ref().filter(|stated| !stated.is_revoked());
            let spec = stated.map(|stated| PlainSpec {
                public_key: stated.public_key,
                node: Some(stated.node.clone()),
                endpoint: stated.endpoint.clone(),
                routes: stated.routes.clone(),
                persistent_keepalive: stated.persistent_keepalive,
            });
            (spec, Some(PeerRefusal::Invalid(fault.clone())))
        }
    }
}

/// The control plane's machine: the one whose identity is the network's key; else, of the Nodes with the role's label,
/// the one with the lowest address. A label can be forged by whoever may patch Nodes, an early address cannot.
fn home<'a>(network: &Network, census: &Census<'a>) -> Option<&'a NodeName> {
    let admitted = census.machines.values().filter_map(|machine| Some((machine.admitted()?, machine)));
    let home = admitted.clone().find(|((identity, _), _)| *identity == network.id);
    let labelled = admitted.filter(|(_, machine)| machine.node.is_some_and(|node| node.is_control_plane()));
    home.or_else(|| labelled.min_by_key(|((_, host), _)| *host)).map(|(_, machine)| machine.name)
}

fn server<'a>(
    peer: &PeerView,
    spec: &PlainSpec,
    home: Option<&'a NodeName>,
    census: &Census<'a>,
) -> Result<&'a NodeName, PeerRefusal> {
    match &spec.node {
        Some(name) => match census.machines.get_key_value(name) {
            Some((name, machine)) if machine.admitted().is_some() => Ok(name),
            Some(_) => Err(PeerRefusal::NodeNotApproved(name.clone())),
            None => Err(PeerRefusal::NodeUnknown(name.clone())),
        },
        None => {
            let before = peer.stated.as_ref().and_then(|stated| census.machines.get_key_value(&stated.node));
            let before = before.filter(|(_, machine)| machine.admitted().is_some() && home.is_none());
            home.or(before.map(|(name, _)| *name)).ok_or(PeerRefusal::NoControlPlane)
        }
    }
}

/// The plain peers that are served and have an address, and what for.
pub(super) fn serving<'a>(network: &Network, plain: &[Plain<'a>], addresses: &Addresses<'_>) -> Vec<Serving<'a>> {
    let of = |plain: &Plain<'a>| {
        let (node, spec) = plain.served.as_ref()?;
        let host = addresses.peers.get(&plain.peer.name)?;
        let held = plain.peer.stated.as_ref().filter(|stated| !stated.is_revoked());
        let addresses = addresses_of(network, *host);
        Some(Serving {
            name: &plain.peer.name,
            created: plain.peer.created,
            node,
            routes: spec.routes.clone(),
            held: held.into_iter().flat_map(|held| held.addresses.iter().chain(&held.routes)).copied().collect(),
            addresses,
        })
    };
    plain.iter().filter_map(of).collect()
}

/// What is needed to act on plain peers.
pub(super) struct Context<'a> {
    pub(super) network: &'a Network,
    pub(super) census: &'a Census<'a>,
    pub(super) addresses: &'a Addresses<'a>,
    pub(super) serving: &'a [Serving<'a>],
    pub(super) routes: &'a Routes<'a>,
    pub(super) now: Now,
}

/// States plain peers, and says how they stand. Gives each peer's readiness besides, as it is to be.
pub(super) fn act(context: &Context<'_>, plain: &[Plain<'_>]) -> (Vec<Action>, Vec<bool>) {
    let serving: BTreeMap<&NodeName, &Serving<'_>> =
        context.serving.iter().map(|serving| (serving.name, serving)).collect();
    let mut actions = Vec::new();
    let mut ready = Vec::new();
    for plain in plain {
        let name = &plain.peer.name;
        let granted = context.routes.peers.get(name);
        let serving = serving.get(name).copied();
        let fits = granted
            .zip(serving)
            .is_some_and(|(granted, serving)| serving.addresses.iter().all(|address| granted.routes.contains(address)));
        let wanted = statement(context, plain, serving.filter(|_| fits));
        let stands =
            wanted.as_ref().is_none_or(|wanted| plain.peer.carried && plain.peer.stated.as_ref() == Some(wanted));
        if let Some(wanted) = wanted.filter(|_| !stands) {
            actions.push(state(plain, wanted));
        }
        let verdict = verdict(context, plain, serving, fits, stands);
        let refused = granted.map(|granted| granted.refused.as_slice()).unwrap_or_default();
        ready.push(verdict.as_ref().map_or_else(
            || conditions::is_true(&plain.peer.status.conditions, "Ready"),
            |verdict| verdict.status == "True",
        ));
        actions.extend(status(context, plain, serving, verdict, refused));
    }
    (actions, ready)
}

/// What is to be stated; none where nothing is to change.
fn statement(context: &Context<'_>, plain: &Plain<'_>, serving: Option<&Serving<'_>>) -> Option<PlainPeer> {
    let stated = plain.peer.stated.as_ref();
    let name = &plain.peer.name;
    let mut wanted = match (&plain.served, serving) {
        (Some((node, spec)), Some(serving)) => {
            let granted = context.routes.peers.get(name)?;
            PlainPeer {
                network: context.network.id,
                name: name.clone(),
                node: (*node).clone(),
                public_key: spec.public_key,
                addresses: serving.addresses.clone(),
                routes: granted.routes.iter().filter(|net| !serving.addresses.contains(net)).copied().collect(),
                endpoint: spec.endpoint.clone(),
                persistent_keepalive: spec.persistent_keepalive,
                serial: 0,
            }
        }
        _ => {
            let stated = stated?;
            if plain.is_impostor() && !stated.is_revoked() {
                PlainPeer { addresses: Vec::new(), routes: Vec::new(), ..stated.clone() }
            } else {
                // What stands is not taken back because of a fault.
                stated.clone()
            }
        }
    };
    wanted.serial = match stated {
        Some(stated) if *stated == (PlainPeer { serial: stated.serial, ..wanted.clone() }) => stated.serial,
        Some(stated) => context.now.max(stated.serial + 1),
        None => context.now.max(1),
    };
    Some(wanted)
}

fn state(plain: &Plain<'_>, wanted: PlainPeer) -> Action {
    let peer = plain.peer;
    let (reason, event) = match &peer.stated {
        _ if wanted.is_revoked() => {
            let note = "Its statement is taken back: no node serves it".to_owned();
            (note.clone(), Some((true, "Withdrawn", note)))
        }
        Some(stated) if stated.serial == wanted.serial => {
            ("its statement is put back: the annotations were changed".to_owned(), None)
        }
        Some(stated) if stated.node == wanted.node => ("its statement changes".to_owned(), None),
        Some(_) | None => {
            let note = format!("Served by node {} with {}", wanted.node, conditions::list(&wanted.addresses));
            (note.clone(), Some((false, "Served", note)))
        }
    };
    let target = target(peer);
    let event = event.map(|(warning, reason, note)| event_of(peer, warning, reason, note));
    Action { effect: Effect::StatePeer { target, peer: Box::new(wanted) }, reason, events: event.into_iter().collect() }
}

/// Whether it is ready; none where that is on its way.
fn verdict(
    context: &Context<'_>,
    plain: &Plain<'_>,
    serving: Option<&Serving<'_>>,
    fits: bool,
    stands: bool,
) -> Option<Verdict> {
    if let Some(refusal) = &plain.refusal {
        return Some(Verdict::no("Ready", refusal.reason(), refusal.to_string()));
    }
    if let Some(exhausted) = context.addresses.without.get(&Holder::Peer(plain.peer.name.clone())) {
        let refusal = PeerRefusal::NoAddress(exhausted.to_string());
        return Some(Verdict::no("Ready", refusal.reason(), refusal.to_string()));
    }
    let serving = serving?;
    if !fits {
        let refusal = PeerRefusal::NodeFull(serving.node.clone());
        return Some(Verdict::no("Ready", refusal.reason(), refusal.to_string()));
    }
    let machine = context.census.machines.get(serving.node)?;
    let leads = |approved: &[IpNet]| serving.addresses.iter().all(|address| approved.contains(address));
    let led = machine.in_force().is_some_and(|approval| leads(&approval.routes)) && Machine::carries_newest(machine);
    (stands && led).then(|| Verdict::yes("Ready", "Served", format!("node {} serves it", serving.node)))
}

fn status(
    context: &Context<'_>,
    plain: &Plain<'_>,
    serving: Option<&Serving<'_>>,
    verdict: Option<Verdict>,
    refused: &[RouteRefusal],
) -> Option<Action> {
    let peer = plain.peer;
    let mut status = peer.status.clone();
    let host = context.addresses.peers.get(&peer.name);
    status.addresses = host.map(|host| conditions::hosts(&addresses_of(context.network, *host))).unwrap_or_default();
    status.node = serving.map(|serving| serving.node.to_string());
    let routes = conditions::routes("RoutesAccepted", refused);
    let mut events = Vec::new();
    for verdict in verdict.into_iter().chain(routes) {
        if conditions::set(&mut status.conditions, &verdict, peer.generation, context.now) {
            events.extend(verdict.warning().map(|(reason, note)| event_of(peer, true, reason, note)));
        }
    }
    let effect = Effect::PeerStatus { target: target(peer), status };
    let changed = matches!(&effect, Effect::PeerStatus { status, .. } if *status != peer.status);
    changed.then(|| Action { effect, reason: "how it stands has changed".to_owned(), events })
}

fn target(peer: &PeerView) -> Target {
    Target { name: peer.name.clone(), uid: peer.uid.clone() }
}

fn event_of(peer: &PeerView, warning: bool, reason: &'static str, note: String) -> Event {
    let (name, uid) = (peer.name.to_string(), peer.uid.clone());
    Event { regarding: Regarding::Peer, name, uid, warning, reason, note: conditions::cut(note.into()).into_owned() }
}
