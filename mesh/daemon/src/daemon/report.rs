//! The driver's state as [`Status`].

use std::collections::BTreeMap;
use std::time::Instant;

use keystone_mesh_core::mesh::PeerStatus;
use keystone_mesh_core::node::{Entry, NodeName, SignedApproval};
use keystone_mesh_core::path::{Outcome, State, Tried};
use keystone_mesh_core::plain_peer::SignedPlainPeer;
use keystone_mesh_core::plan::Fault;
use keystone_mesh_core::{NodeId, PublicKey, Via};

use super::driver::{Driver, RegistryState};
use crate::dataplane::{PeerStats, Stats};
use crate::quic::relay_client::RelayState;
use crate::registry::{Faults, MAX_FAULTS};
use crate::service::data_plane_cpu;
use crate::status::{
    Approval, Counts, DataPlane, Handshakes, Node, NodeFault, Peer, PlainPeer, Registry, Relay, Status,
};

pub(super) fn status(driver: &Driver, now: Instant) -> Status {
    let stats = driver.local.plane.stats();
    let counted: BTreeMap<PublicKey, &PeerStats> = stats.peers.iter().map(|peer| (peer.key, peer)).collect();
    let peers = driver.mesh.peers(now).into_iter();
    let peers = peers.map(|peer| describe_peer(driver, &peer, counted.get(&peer.key).copied(), now)).collect();
    let mut warnings = driver.keeper.warnings();
    warnings.extend(driver.uplink.registry.iter().flat_map(|registry| registry.warnings()));
    warnings.extend(driver.pods.problems());
    warnings.extend(driver.policy.iter().flat_map(|policy| policy.warnings()));
    warnings.extend(driver.mesh.unapproved_routes().map(|route| {
        format!(
            "the route to {route} is asked for and not approved; leave and join again with a token made with `token create \
             --route {route}`"
        )
    }));
    let faults = faults(driver);
    Status {
        node: node(driver, now),
        conditions: Vec::new(),
        relays: driver.relays.iter().map(|relay| describe_relay(driver, relay)).collect(),
        registry: registry(driver, now),
        peers,
        plain_peers: driver.mesh.known().2.map(describe_stated).collect(),
        faults: faults.first,
        fault_counts: faults.counts.into_iter().map(|(code, count)| (code.to_owned(), count)).collect(),
        data_plane: data_plane(driver, &stats),
        counts: counts(driver),
        network_policy: driver.policy.as_ref().map(|policy| policy.status(now)),
        gateway: driver.uplink.gateway.as_ref().map(|gateway| gateway.snapshot()),
        relay_server: driver.uplink.relays.local().map(|relay| relay.snapshot()),
        warnings,
    }
}

fn node(driver: &Driver, now: Instant) -> Node {
    let (candidates, nat) = driver.mesh.location();
    let membership = driver.start.membership.as_ref();
    let own = own_entry(driver);
    let (approval, approval_reason) = approval(driver, own);
    let location = own.and_then(|entry| entry.approval.as_ref()?.get().location.clone());
    Node {
        name: driver.start.name.clone(),
        network: membership.map(|membership| membership.network),
        identity: driver.start.secret.identity().id(),
        public_key: driver.local.public_key,
        addresses: driver.mesh.addresses(),
        pod_cidrs: driver.mesh.pod_cidrs().to_vec(),
        mesh_cidrs: driver.mesh.known().0.map(|network| network.prefixes().to_vec()).unwrap_or_default(),
        control_plane: membership.is_some_and(|membership| membership.control_plane),
        approval,
        approval_reason,
        location,
        interface: driver.config.interface.clone(),
        mtu: driver.config.mtu,
        listen_port: driver.local.port,
        endpoints: candidates.iter().map(ToString::to_string).collect(),
        nat,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_s: now.saturating_duration_since(driver.local.started).as_secs_f64(),
    }
}

fn own_entry(driver: &Driver) -> Option<&Entry> {
    let name = driver.start.name.as_ref()?;
    driver.mesh.known().1.into_iter().find(|entry| entry.name() == name)
}

/// What the network says of this node, and what to do where that is not yes.
fn approval(driver: &Driver, own: Option<&Entry>) -> (Approval, Option<String>) {
    let Some(name) = &driver.start.name else { return (Approval::None, None) };
    let membership = driver.start.membership.as_ref();
    let said = own.and_then(|entry| entry.approval.as_ref()).or(membership.and_then(|m| m.approval.as_ref()));
    Approval::of(name, driver.start.secret.identity().id(), said.map(SignedApproval::get))
}

/// What the plan leaves out, and what the registry reads and cannot use.
fn faults(driver: &Driver) -> Faults {
    let mut all = driver.uplink.registry.as_ref().map(|registry| registry.faults()).unwrap_or_default();
    // That this node waits is said where its approval is.
    let own =
        |fault: &&Fault| !matches!(fault, Fault::NotApproved { name } if driver.start.name.as_ref() == Some(name));
    let planned = Faults::of(driver.mesh.faults().iter().filter(own).map(NodeFault::of_plan));
    for (code, count) in planned.counts {
        *all.counts.entry(code).or_default() += count;
    }
    all.first.extend(planned.first);
    all.first.truncate(MAX_FAULTS);
    all
}

fn counts(driver: &Driver) -> Counts {
    let writes = driver.uplink.registry.as_ref().and_then(|registry| registry.writes());
    Counts {
        registry_writes: writes.map_or(driver.counts.registry_writes, |writes| writes.done),
        registry_write_errors: writes.map_or(0, |writes| writes.failed),
        kernel_repairs: driver.keeper.counts().repairs(),
        kernel_errors: driver.keeper.counts().errors(),
        ..driver.counts
    }
}

fn data_plane(driver: &Driver, stats: &Stats) -> DataPlane {
    DataPlane {
        up: driver.kernel_up,
        live_sessions: stats.live_sessions,
        rx_datagrams: stats.rx_packets,
        rx_bytes: stats.rx_bytes,
        tx_datagrams: stats.tx_packets,
        tx_bytes: stats.tx_bytes,
        handshakes: Handshakes {
            started: stats.handshakes_started,
            completed: stats.handshakes_completed,
            failed: stats.handshakes_failed,
        },
        drops: drops(stats),
        cpu_s: data_plane_cpu(),
    }
}

fn registry(driver: &Driver, now: Instant) -> Registry {
    let (state, reason) = match &driver.registry_state {
        RegistryState::None => ("none", None),
        RegistryState::Waiting => ("connecting", None),
        RegistryState::Current => ("current", None),
        RegistryState::Stale(why) => ("stale", Some(why.clone())),
    };
    let known_from = match (driver.registry_heard, driver.mesh.known().0) {
        (true, _) => "registry",
        (false, Some(_)) => "snapshot",
        (false, None) => "none",
    };
    Registry {
        kind: driver.uplink.kind().to_owned(),
        state: state.to_owned(),
        reason,
        since_s: now.saturating_duration_since(driver.registry_since).as_secs_f64(),
        known_from: known_from.to_owned(),
    }
}

fn describe_relay(driver: &Driver, relay: &keystone_mesh_core::relay::RelayAddr) -> Relay {
    let client = driver.uplink.relays.client(relay.id);
    let address = relay.addrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let (state, observed, reason) = match client.as_ref().map(|client| client.state().borrow().clone()) {
        None => ("up", None, Some("this node is the relay".to_owned())),
        Some(RelayState::Connecting) => ("connecting", None, None),
        Some(RelayState::Up { observed, .. }) => ("up", Some(observed.to_string()), None),
        Some(RelayState::Down { why, .. }) => ("down", None, Some(why)),
    };
    let rtt_ms = client.and_then(|client| client.rtt()).map(millis);
    Relay { id: relay.id, address, state: state.to_owned(), rtt_ms, observed, reason }
}

fn describe_peer(driver: &Driver, peer: &PeerStatus, counted: Option<&PeerStats>, now: Instant) -> Peer {
    let path = match peer.path.state {
        State::Direct => "direct",
        State::Relayed => "relayed",
        State::Idle => "idle",
        State::Connecting => "none",
    };
    // One of this node's configuration is nobody's to serve.
    let stated = |name: &NodeName| {
        driver.mesh.known().2.any(|stated| stated.get().public_key == peer.key && stated.get().node == *name)
    };
    let served_by = driver.start.name.clone().filter(|name| peer.identity.is_none() && stated(name));
    let last_handshake = counted.and_then(|counted| counted.last_handshake);
    Peer {
        name: peer.name.clone(),
        identity: peer.identity,
        public_key: peer.key,
        addresses: peer.addresses.clone(),
        routes: peer.routes.clone(),
        pod_cidrs: peer.pod_cidrs.clone(),
        location: peer.location.clone(),
        served_by,
        path: path.to_owned(),
        via: peer.path.via.map(|via| describe_via(driver, via)),
        rtt_ms: peer.path.rtt.map(millis),
        last_handshake_s: last_handshake.map(|at| now.saturating_duration_since(at).as_secs_f64()),
        rx_bytes: counted.map_or(0, |counted| counted.rx_bytes),
        tx_bytes: counted.map_or(0, |counted| counted.tx_bytes),
        reason: peer.path.reason.as_ref().map(ToString::to_string),
        tried: peer.path.tried.iter().map(|tried| describe_tried(driver, tried)).collect(),
    }
}

fn describe_stated(stated: &SignedPlainPeer) -> PlainPeer {
    let peer = stated.get();
    PlainPeer {
        name: peer.name.clone(),
        served_by: peer.node.clone(),
        public_key: peer.public_key,
        addresses: peer.addresses.clone(),
        routes: peer.routes.clone(),
    }
}

fn describe_tried(driver: &Driver, tried: &Tried) -> String {
    let outcome = match tried.outcome {
        Outcome::Untried => "not tried",
        Outcome::Probing => "being probed",
        Outcome::Silent => "no answer",
        Outcome::LargeProbesLost => "answers small probes only: full-size packets do not pass",
        Outcome::Died => "stopped working",
        Outcome::Works => "works",
    };
    let rtt = tried.rtt.map_or(String::new(), |rtt| format!(", {:.1} ms", millis(rtt)));
    let ago = tried.ago.map_or(String::new(), |ago| format!(" ({} s ago)", ago.as_secs()));
    format!("{} ({}): {outcome}{rtt}{ago}", describe_via(driver, tried.via), tried.origin.label())
}

fn describe_via(driver: &Driver, via: Via) -> String {
    match via {
        Via::Direct(addr) => addr.to_string(),
        Via::Relay(id) => format!("relay {}", relay_name(driver, id)),
    }
}

fn relay_name(driver: &Driver, id: NodeId) -> String {
    let named = driver.relays.iter().find(|relay| relay.id == id).and_then(|relay| relay.addrs.first());
    named.map_or_else(|| id.short(), ToString::to_string)
}

fn drops(stats: &Stats) -> BTreeMap<String, u64> {
    let counted = stats.drops.iter().filter(|(_, count)| *count > 0);
    counted.map(|(reason, count)| (reason.label().to_owned(), *count)).collect()
}

fn millis(time: std::time::Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
