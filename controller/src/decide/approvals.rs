//! What is approved, on which object it stands, and what is taken back.
//!
//! The approval that is wanted is computed whole from what is decided; where the newest one known says the same, that
//! very one is put back wherever it was removed or changed, and nothing is signed anew. Otherwise a later one replaces
//! it, later than every other that is known: of two that name one network the one of later counts at every reader,
//! whatever a clock did between them. A valid approval of somebody who is not in the network (kept from earlier, brought back) is revoked.

use std::collections::BTreeSet;

use keystone_mesh_core::admission::addresses_of;
use keystone_mesh_core::directory::Carrier;
use keystone_mesh_core::key::NodeId;
use keystone_mesh_core::network::Network;
use keystone_mesh_core::node::Approval;

use super::action::{Action, Effect, Event, Regarding, Target};
use super::census::{Census, Machine, Standing};
use super::conditions;
use super::routes::Routes;
use crate::view::{ClusterView, Now};

/// Approves, changes and revokes.
pub(super) fn act(
    view: &ClusterView,
    network: &Network,
    census: &Census<'_>,
    routes: &Routes<'_>,
    now: Now,
) -> Vec<Action> {
    let relays: BTreeSet<NodeId> = network.relays.iter().map(|relay| relay.id).collect();
    let later = now.max(view.last_serial().saturating_add(1));
    census
        .machines
        .values()
        .filter_map(|machine| match machine.standing {
            Standing::Admitted { identity, host, .. } => {
                approve(&Context { network, relays: &relays, routes, later }, machine, identity, host)
            }
            Standing::Waiting(_) | Standing::Refused(_) | Standing::Changed { .. } | Standing::Revoked(_) => {
                revoke(machine, later)
            }
            // A Node of the same name was another machine's; its approval must not outlive it under the Member.
            Standing::Silent if is_of_another(machine) => revoke(machine, later),
            // What is not decided yet stays as it is, and what is leaving goes with its object.
            Standing::Silent
            | Standing::Undecided(_)
            | Standing::Spending
            | Standing::Entering(_)
            | Standing::Adopting(..)
            | Standing::Leaving => None,
        })
        .collect()
}

struct Context<'a> {
    network: &'a Network,
    relays: &'a BTreeSet<NodeId>,
    routes: &'a Routes<'a>,
    /// The serial of what is signed by this decision.
    later: u64,
}

fn approve(context: &Context<'_>, machine: &Machine<'_>, identity: NodeId, host: u32) -> Option<Action> {
    let before = machine.in_force();
    // An identity whose record nobody knows has no use for a first approval.
    if machine.record.is_none() && before.is_none() {
        return None;
    }
    let granted = context.routes.machines.get(machine.name)?;
    let mut wanted: BTreeSet<_> = granted.routes.clone();
    for peer in context.routes.served.get(machine.name).into_iter().flatten() {
        wanted.extend(context.routes.peers.get(peer).into_iter().flat_map(|granted| granted.routes.iter().copied()));
    }
    let wishes = &machine.carried()?.wishes;
    let mut approval = Approval {
        network: context.network.id,
        name: machine.name.clone(),
        identity,
        addresses: addresses_of(context.network, host),
        routes: wanted.into_iter().collect(),
        pod_cidrs: granted.pod_cidrs.iter().copied().collect(),
        endpoints: wishes.endpoints.clone(),
        relays: wishes.relays.iter().filter(|relay| context.relays.contains(relay)).copied().collect(),
        location: wishes.location.clone(),
        serial: 0,
    };
    approval.serial = match machine.newest {
        Some(newest) if *newest == (Approval { serial: newest.serial, ..approval.clone() }) => newest.serial,
        Some(_) | None => context.later,
    };
    if machine.newest == Some(&approval) && machine.carries_newest() {
        return None;
    }
    let (reason, event) = match before {
        Some(before) if before.serial == approval.serial => {
            ("the approval is put (back) on the object, where it is absent or was changed".to_owned(), None)
        }
        Some(before) => (difference(before, &approval), None),
        None => {
            let note = format!("In the network with {}", conditions::list(&approval.addresses));
            (note.clone(), Some((false, "Approved", note)))
        }
    };
    effect(machine, approval, reason, event)
}

fn is_of_another(machine: &Machine<'_>) -> bool {
    let member = machine.member.filter(|_| machine.node.is_none());
    member.zip(machine.newest).is_some_and(|(member, newest)| member.identity != newest.identity)
}

/// Takes back whatever valid approval there is.
fn revoke(machine: &Machine<'_>, later: u64) -> Option<Action> {
    let newest = machine.newest?;
    if newest.is_revoked() && machine.carries_newest() {
        return None;
    }
    // A Member that goes takes its approval with it.
    if machine.node.is_none() && machine.leftover.is_some() {
        return None;
    }
    let revoked = Approval {
        addresses: Vec::new(),
        routes: Vec::new(),
        pod_cidrs: Vec::new(),
        endpoints: Vec::new(),
        relays: Vec::new(),
        location: None,
        serial: if newest.is_revoked() { newest.serial } else { later },
        ..newest.clone()
    };
    let why = machine.standing.cloud_gone();
    let earlier = "the approval on this object was valid once, and the machine is not in the network";
    let note = format!("Out of the network: {}", why.as_deref().unwrap_or(earlier));
    let event = (!newest.is_revoked()).then(|| (true, "Revoked", note.clone()));
    effect(machine, revoked, note, event)
}

fn effect(
    machine: &Machine<'_>,
    approval: Approval,
    reason: String,
    event: Option<(bool, &'static str, String)>,
) -> Option<Action> {
    let (carrier, regarding, uid) = match (machine.node, machine.member) {
        (Some(node), _) => (Carrier::Node, Regarding::Node, &node.uid),
        (None, Some(member)) => (Carrier::Member, Regarding::Member, &member.uid),
        (None, None) => return None,
    };
    let target = Target { name: machine.name.clone(), uid: uid.clone() };
    let event = event.map(|(warning, reason, note)| {
        let (name, uid) = (machine.name.to_string(), uid.clone());
        Event { regarding, name, uid, warning, reason, note: conditions::cut(note.into()).into_owned() }
    });
    let effect = Effect::Approve { carrier, target, approval: Box::new(approval) };
    Some(Action { effect, reason, events: event.into_iter().collect() })
}

/// Which parts of an approval change.
fn difference(before: &Approval, after: &Approval) -> String {
    let parts = [
        ("addresses", before.addresses != after.addresses),
        ("routes", before.routes != after.routes),
        ("pod CIDRs", before.pod_cidrs != after.pod_cidrs),
        ("endpoints", before.endpoints != after.endpoints),
        ("relays", before.relays != after.relays),
        ("location", before.location != after.location),
    ];
    let changed: Vec<&str> = parts.iter().filter(|(_, changed)| *changed).map(|(part, _)| *part).collect();
    format!("the approval changes: {}", changed.join(", "))
}

/// The relays that people want a machine to listen on and that the network does not have.
pub(super) fn unknown_relays(network: &Network, machine: &Machine<'_>) -> Vec<NodeId> {
    let known = |id: &NodeId| network.relays.iter().any(|relay| relay.id == *id);
    let wanted = machine.carried().map(|mesh| mesh.wishes.relays.as_slice()).unwrap_or_default();
    wanted.iter().filter(|id| !known(id)).copied().collect()
}

/// Whether a machine is in the network and its object says so.
pub(super) fn stands(machine: &Machine<'_>) -> bool {
    machine.in_force().is_some() && machine.carries_newest()
}
