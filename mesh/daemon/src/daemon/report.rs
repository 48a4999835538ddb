//! The driver's state as [`Status`].

use std::time::Instant;

use keystone_mesh_core::mesh::PeerStatus;
use keystone_mesh_core::path::{Outcome, State, Tried};
use keystone_mesh_core::{NodeId, Via};

use super::driver::{Driver, RegistryState};
use crate::dataplane::{PeerStats, Stats};
use crate::quic::relay_client::RelayState;
use crate::service::data_plane_cpu;
use crate::status::{DataPlane, Node, Peer, Registry, Relay, Status};

pub(super) fn status(driver: &Driver, now: Instant) -> Status {
    let stats = driver.local.plane.stats();
    let peers = driver.mesh.peers(now).into_iter().map(|peer| describe_peer(driver, peer, &stats, now)).collect();
    let mut warnings = driver.keeper.warnings();
    warnings.extend(driver.mesh.faults().iter().map(ToString::to_string));
    warnings.extend(driver.mesh.unapproved_routes().map(|route| {
        format!(
            "the route to {route} is asked for and not approved; leave and join again with a token made with `token create \
             --route {route}`"
        )
    }));
    Status {
        node: node(driver, now),
        relays: driver.relays.iter().map(|relay| describe_relay(driver, relay)).collect(),
        registry: registry(driver),
        peers,
        data_plane: DataPlane { live_sessions: stats.live_sessions, drops: drops(&stats), cpu_s: data_plane_cpu() },
        warnings,
    }
}

fn node(driver: &Driver, now: Instant) -> Node {
    let (candidates, nat) = driver.mesh.location();
    let membership = driver.start.membership.as_ref();
    Node {
        name: driver.start.name.clone(),
        network: membership.map(|membership| membership.network),
        identity: driver.start.secret.identity().id(),
        public_key: driver.local.public_key,
        addresses: driver.mesh.addresses(),
        control_plane: membership.is_some_and(|membership| membership.control_plane),
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

fn registry(driver: &Driver) -> Registry {
    let (state, reason) = match &driver.registry_state {
        RegistryState::None => ("none", None),
        RegistryState::Waiting => ("connecting", None),
        RegistryState::Current => ("current", None),
        RegistryState::Stale(why) => ("stale", Some(why.clone())),
    };
    Registry { kind: driver.uplink.kind.to_owned(), state: state.to_owned(), reason }
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

fn describe_peer(driver: &Driver, peer: PeerStatus, stats: &Stats, now: Instant) -> Peer {
    let counted = stats.peers.iter().find(|counted| counted.key == peer.key);
    let path = match peer.path.state {
        State::Direct => "direct",
        State::Relayed => "relayed",
        State::Idle => "idle",
        State::Connecting => "none",
    };
    let last_handshake = counted.and_then(|counted: &PeerStats| counted.last_handshake);
    Peer {
        name: peer.name,
        identity: peer.identity,
        public_key: peer.key,
        addresses: peer.addresses,
        routes: peer.routes,
        path: path.to_owned(),
        via: peer.path.via.map(|via| describe_via(driver, via)),
        rtt_ms: peer.path.rtt.map(millis),
        last_handshake_s: last_handshake.map(|at| now.saturating_duration_since(at).as_secs_f64()),
        rx_bytes: counted.map_or(0, |counted| counted.rx_bytes),
        tx_bytes: counted.map_or(0, |counted| counted.tx_bytes),
        reason: peer.path.reason.map(|reason| reason.to_string()),
        tried: peer.path.tried.iter().map(|tried| describe_tried(driver, tried)).collect(),
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

fn drops(stats: &Stats) -> std::collections::BTreeMap<String, u64> {
    let counted = stats.drops.iter().filter(|(_, count)| *count > 0);
    counted.map(|(reason, count)| (reason.label().to_owned(), *count)).collect()
}

fn millis(time: std::time::Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
