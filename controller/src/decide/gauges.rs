//! What the metrics show.

use std::collections::BTreeMap;

use keystone_mesh_api::READY_CONDITION;
use keystone_mesh_core::network::Network;

use super::action::Gauges;
use super::census::{Census, Machine, Standing};
use super::readiness;
use super::routes::{Granted, Routes};
use crate::view::{ClusterView, Now, TokenView};

/// Every state of a machine, as labels.
const STATES: [&str; 8] =
    ["approved", "identity_changed", "admitting", "waiting", "refused", "revoked", "leaving", "without_record"];

/// Counts what was decided. `ready` tells of every plain peer whether it is.
pub(super) fn count(
    view: &ClusterView,
    network: &Network,
    census: &Census<'_>,
    routes: &Routes<'_>,
    ready: &[bool],
    now: Now,
) -> Gauges {
    let mut gauges = Gauges {
        machines: STATES.map(|state| (state, 0)).into(),
        ready: ["true", "false", "unknown"].map(|status| (status, 0)).into(),
        peers: ["true", "false"].map(|ready| (ready, 0)).into(),
        tokens: ["usable", "expired", "used-up", "revoked"].map(|state| (state, 0)).into(),
        addresses_held: view.ledger().live().count() as u64,
        // Without the network's own number and its broadcast address.
        addresses_total: (1_u64 << (32 - u32::from(network.ipv4.prefix_len()))) - 2,
        routes_refused: routes.machines.values().chain(routes.peers.values()).map(refused).sum(),
        faults: BTreeMap::new(),
        members_absent: 0,
    };
    for machine in census.machines.values() {
        add(&mut gauges.machines, state(machine));
        let absent =
            readiness::absent_since(machine).is_some_and(|since| now >= since.saturating_add(readiness::ABSENT));
        gauges.members_absent += u64::from(absent);
        let condition = machine.node.and_then(|node| node.conditions.get(READY_CONDITION));
        match condition.map(|condition| condition.status.as_str()) {
            Some("True") => add(&mut gauges.ready, "true"),
            Some("False") => add(&mut gauges.ready, "false"),
            Some(_) => add(&mut gauges.ready, "unknown"),
            None => {}
        }
    }
    for ready in ready {
        add(&mut gauges.peers, if *ready { "true" } else { "false" });
    }
    for token in view.tokens().values() {
        add(&mut gauges.tokens, token_state(token, now));
    }
    for (kind, _, _) in view.faults() {
        add(&mut gauges.faults, kind.label());
    }
    gauges
}

fn refused(granted: &Granted) -> u64 {
    granted.refused.len() as u64
}

fn state(machine: &Machine<'_>) -> &'static str {
    match machine.standing {
        Standing::Silent => "without_record",
        Standing::Waiting(_) => "waiting",
        Standing::Refused(_) | Standing::Changed { .. } => "refused",
        Standing::Undecided(_) | Standing::Spending | Standing::Entering(_) | Standing::Adopting(..) => "admitting",
        Standing::Admitted { stranger: Some(_), .. } => "identity_changed",
        Standing::Admitted { stranger: None, .. } => "approved",
        Standing::Revoked(_) => "revoked",
        Standing::Leaving => "leaving",
    }
}

fn token_state(token: &TokenView, now: Now) -> &'static str {
    if token.revoked {
        "revoked"
    } else if token.expires.is_some_and(|expires| now >= expires) {
        "expired"
    } else if token.uses.is_some_and(|uses| token.status.used >= uses) {
        "used-up"
    } else {
        "usable"
    }
}

fn add(counts: &mut BTreeMap<&'static str, u64>, label: &'static str) {
    *counts.entry(label).or_default() += 1;
}
