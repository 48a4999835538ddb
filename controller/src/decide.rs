//! What to do about a cluster: a pure function of its view and the time.
//!
//! ```text
//!   watches ──> ClusterView ──> reconcile(view, now) ──> actions ──> API server
//!                    ^                                                  │
//!                    └──────────── what it acknowledged <───────────────┘
//! ```
//!
//! The same view and time give the same actions; once they are applied there are none. Everything is decided afresh each
//! time, in this order:
//!
//! | module | decides |
//! | --- | --- |
//! | `census` | who is let in: policy, Members, tokens, pinned identities, what autoscalers say |
//! | `plain` | which plain peers are served, and by whom |
//! | `addresses` | who claims and gives back addresses in the ledger |
//! | `routes` | which networks lead to whom |
//! | `approvals` | what is signed for whom, put back, revoked |
//! | `readiness` | `MeshReady` and the startup taint |
//! | `standing` | conditions and statuses: all of it in words |
//! | `init` | provider IDs, labels and addresses where no cloud controller gives them |
//!
//! Nothing is decided that an earlier step has not seen acknowledged: a token's use before the claim, the claim before
//! the approval, the approval before the condition that tells of it. A crash between any two costs a repetition.

mod action;
mod addresses;
mod approvals;
mod census;
mod conditions;
mod gauges;
mod init;
mod plain;
mod readiness;
mod routes;
mod standing;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::net::IpAddr;

use keystone_mesh_core::admission::addresses_of;
use keystone_mesh_core::network::Network;
use keystone_mesh_core::node::NodeName;

pub use action::{Action, Decision, Effect, Event, Gauges, Regarding, Target};

use self::census::{Census, Machine, Standing};
use crate::view::{ClusterView, Now, Reporter};

/// While somebody waits for an address that comes free by time alone, it is looked after so often, in milliseconds.
const EXHAUSTED_RETRY: u64 = 60_000;

/// Decides what to do. Nothing, before every required kind was listed and the network's document is known.
pub fn reconcile(view: &ClusterView, now: Now) -> Decision {
    let Some(network) = view.network().filter(|_| view.is_complete()) else { return Decision::default() };
    let census = census::take(view, network, now);
    let plain = plain::judge(view, network, &census);
    let served: Vec<&NodeName> =
        plain.iter().filter(|plain| plain.served.is_some()).map(|plain| &plain.peer.name).collect();
    let addresses = addresses::assign(view, network, &census, &served, now);
    let serving = plain::serving(network, &plain, &addresses);
    let routes = routes::grant(network, view.settings(), &census, &serving);

    let mut actions = addresses.actions.clone();
    actions.extend(tokens(view, &census));
    actions.extend(approvals::act(view, network, &census, &routes, now));
    let context =
        plain::Context { network, census: &census, addresses: &addresses, serving: &serving, routes: &routes, now };
    let (of_peers, ready) = plain::act(&context, &plain);
    actions.extend(of_peers);
    let context = standing::Context { view, network, addresses: &addresses, routes: &routes, now };
    let (of_machines, changes_at) = standing::act(&context, &census);
    let busy: BTreeSet<NodeName> = of_machines.iter().filter_map(tainted).cloned().collect();
    actions.extend(of_machines);
    actions.extend(init::act(view, network, &census, &busy));

    let exhausted = (!addresses.without.is_empty()).then(|| now.saturating_add(EXHAUSTED_RETRY));
    let lapse = view.reports().lapse(now, view.settings().report_life);
    let caught_up = Some(view.caught_up_at()).filter(|at| *at > now);
    let again_at = [changes_at, exhausted, lapse, caught_up, undecided(&census)].into_iter().flatten().min();
    let gauges = gauges::count(view, network, &census, &routes, &ready, now);
    Decision { actions, gauges, again_at }
}

/// Whom to ask, over the mesh, which peers they reach: the control plane's nodes, the one with the network's key first;
/// where there are none, up to three others. The eldest come first: an address of long ago is nobody's who came today.
pub fn reporters(view: &ClusterView) -> Vec<Reporter> {
    /// Without a control plane: more than one, for none reports on itself.
    const OTHERS: usize = 3;
    let Some(network) = view.network() else { return Vec::new() };
    let census = census::take(view, network, Now::MAX);
    let mut approved: Vec<(&Machine<'_>, bool, u32)> = census
        .machines
        .values()
        .filter(|machine| approvals::stands(machine))
        .filter_map(|machine| {
            let (identity, host) = machine.admitted()?;
            Some((machine, identity == network.id, host))
        })
        .collect();
    approved.sort_by_key(|(_, home, host)| (!home, *host));
    let of_control_plane = |(machine, home, _): &&(&Machine<'_>, bool, u32)| {
        *home || machine.node.is_some_and(|node| node.is_control_plane())
    };
    let mut chosen: Vec<_> = approved.iter().filter(of_control_plane).collect();
    if chosen.is_empty() {
        chosen = approved.iter().take(OTHERS).collect();
    }
    chosen.into_iter().map(|(machine, _, host)| reporter(network, machine.name, *host)).collect()
}

fn reporter(network: &Network, name: &NodeName, host: u32) -> Reporter {
    let addresses: Vec<IpAddr> = addresses_of(network, host).iter().map(ipnet::IpNet::addr).collect();
    Reporter { name: name.clone(), addresses }
}

/// Uses of tokens are recorded under compare and swap.
fn tokens(view: &ClusterView, census: &Census<'_>) -> Vec<Action> {
    let of = |(name, status): (&&str, &keystone_mesh_api::JoinTokenStatus)| {
        let token = view.tokens().get(*name)?;
        let effect = Effect::TokenStatus {
            name: (*name).to_owned(),
            resource_version: token.resource_version.clone(),
            status: status.clone(),
        };
        let count = status.used.saturating_sub(token.status.used);
        Some(Action { effect, reason: format!("{count} more joined with it"), events: Vec::new() })
    };
    census.tokens.iter().filter_map(of).collect()
}

fn tainted(action: &Action) -> Option<&NodeName> {
    match &action.effect {
        Effect::NodeTaints { target, .. } => Some(&target.name),
        Effect::Ledger { .. }
        | Effect::Approve { .. }
        | Effect::StatePeer { .. }
        | Effect::MemberStatus { .. }
        | Effect::PeerStatus { .. }
        | Effect::TokenStatus { .. }
        | Effect::NodeConditions { .. }
        | Effect::NodeInit { .. }
        | Effect::NodeAddresses { .. }
        | Effect::DeleteMember { .. } => None,
    }
}

fn undecided(census: &Census<'_>) -> Option<Now> {
    let times = census.machines.values().filter_map(|machine| match machine.standing {
        Standing::Undecided(at) => Some(at),
        Standing::Silent
        | Standing::Waiting(_)
        | Standing::Refused(_)
        | Standing::Changed { .. }
        | Standing::Spending
        | Standing::Entering(_)
        | Standing::Adopting(..)
        | Standing::Admitted { .. }
        | Standing::Revoked(_)
        | Standing::Leaving => None,
    });
    times.min()
}
