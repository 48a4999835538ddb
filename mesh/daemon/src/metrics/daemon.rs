//! The daemon's metrics.

use std::time::Duration;

use keystone_mesh_core::DropReason;

use super::{Metric, Page, gateway, policy, process, relay};
use crate::status::{Approval, NodeFault, Peer, Status};

// --- the node ---

const INFO: Metric = Metric::gauge("keystone_mesh_build_info", &["version"], "1; the version is in the label.");
const READY: Metric =
    Metric::gauge("keystone_mesh_ready", &[], "1 while the node carries traffic of the mesh, as /readyz says.");
const APPROVAL: Metric =
    Metric::gauge("keystone_mesh_approval", &["state"], "1 for what the network says of this node, 0 for the others.");
const NAT: Metric =
    Metric::gauge("keystone_mesh_nat_info", &["nat"], "1; the NAT in front of this node is in the label.");
const WARNINGS: Metric =
    Metric::gauge("keystone_mesh_warnings", &[], "Things that are not as they should be, as `status` lists them.");

// --- the data plane ---

const SESSIONS: Metric = Metric::gauge("keystone_mesh_sessions", &[], "Peers with a WireGuard session.");
const RECEIVED: Metric =
    Metric::counter("keystone_mesh_received_datagrams_total", &[], "WireGuard data messages that were authentic.");
const RECEIVED_BYTES: Metric =
    Metric::counter("keystone_mesh_received_bytes_total", &[], "Bytes of received data messages.");
const SENT: Metric =
    Metric::counter("keystone_mesh_sent_datagrams_total", &[], "Datagrams that the kernel or a relay took.");
const SENT_BYTES: Metric = Metric::counter("keystone_mesh_sent_bytes_total", &[], "Bytes of sent datagrams.");
const DROPS: Metric =
    Metric::counter("keystone_mesh_dropped_packets_total", &["reason"], "Packets that went no further, by reason.");
const STARTED: Metric =
    Metric::counter("keystone_mesh_handshakes_started_total", &[], "Handshake initiations sent, repetitions included.");
const COMPLETED: Metric =
    Metric::counter("keystone_mesh_handshakes_completed_total", &[], "Sessions established and proven, whoever began.");
const FAILED: Metric = Metric::counter(
    "keystone_mesh_handshakes_failed_total",
    &[],
    "Handshakes given up after 90 seconds without an answer.",
);
const CPU: Metric =
    Metric::counter("keystone_mesh_data_plane_cpu_seconds_total", &[], "CPU time of the data plane's threads.");

// --- paths ---

const PEERS: Metric = Metric::gauge("keystone_mesh_peers", &["path"], "Peers by the state of their path.");
const PATH_CHANGES: Metric =
    Metric::counter("keystone_mesh_path_changes_total", &[], "Times that a peer's packets were sent another way.");
const PROBES_SENT: Metric = Metric::counter("keystone_mesh_probes_sent_total", &[], "Path probes sent.");
const PROBES_RECEIVED: Metric =
    Metric::counter("keystone_mesh_probes_received_total", &[], "Authentic path probes received.");
const RELAYS: Metric =
    Metric::gauge("keystone_mesh_relays", &["state"], "Relays by the state of this node's connection.");
const RELAY_RTT: Metric =
    Metric::gauge("keystone_mesh_relay_rtt_seconds", &["relay"], "Round trip to a connected relay.");

// --- the registry ---

const REGISTRY_UP: Metric =
    Metric::gauge("keystone_mesh_registry_up", &["kind"], "1 while the registry is heard, 0 while it is not.");
const REGISTRY_STALE: Metric = Metric::gauge(
    "keystone_mesh_registry_stale_seconds",
    &[],
    "Seconds since the registry was lost, or waited for; 0 while it is heard.",
);
const REGISTRY_WRITES: Metric =
    Metric::counter("keystone_mesh_registry_writes_total", &["result"], "Writes of records, by their result.");
const REGISTRY_LOSSES: Metric =
    Metric::counter("keystone_mesh_registry_losses_total", &[], "Times that the registry was lost.");
const FAULTS: Metric = Metric::gauge(
    "keystone_mesh_node_faults",
    &["code"],
    "Nodes and plain peers that are left out, wholly or in part, by what is wrong with what is said of them.",
);

// --- the kernel ---

const REPAIRS: Metric = Metric::counter(
    "keystone_mesh_kernel_repairs_total",
    &[],
    "Addresses, routes and rules put right after somebody else changed them.",
);
const KERNEL_ERRORS: Metric =
    Metric::counter("keystone_mesh_kernel_errors_total", &[], "Addresses, routes and rules that the kernel refused.");

// --- this listener ---

const REFUSED: Metric = Metric::counter(
    "keystone_mesh_status_refused_connections_total",
    &[],
    "Connections to the status listener beyond its limit.",
);

// --- each peer ---

const PEER_PATH: Metric =
    Metric::gauge("keystone_mesh_peer_path", &["peer", "path"], "1; the state of the peer's path is in the label.");
const PEER_RTT: Metric = Metric::gauge("keystone_mesh_peer_rtt_seconds", &["peer"], "Round trip of the peer's path.");
const PEER_HANDSHAKE: Metric = Metric::gauge(
    "keystone_mesh_peer_last_handshake_timestamp_seconds",
    &["peer"],
    "When the last handshake was completed, in seconds since 1970.",
);
const PEER_RECEIVED: Metric =
    Metric::counter("keystone_mesh_peer_received_bytes_total", &["peer"], "Bytes of WireGuard messages from the peer.");
const PEER_SENT: Metric =
    Metric::counter("keystone_mesh_peer_sent_bytes_total", &["peer"], "Bytes of WireGuard messages to the peer.");

/// Every metric of the daemon, in the order of the page; those of the process, of the gateway on
/// the control plane and of a relay inside it follow.
pub const METRICS: [Metric; 34] = [
    INFO,
    READY,
    APPROVAL,
    NAT,
    WARNINGS,
    SESSIONS,
    RECEIVED,
    RECEIVED_BYTES,
    SENT,
    SENT_BYTES,
    DROPS,
    STARTED,
    COMPLETED,
    FAILED,
    CPU,
    PEERS,
    PATH_CHANGES,
    PROBES_SENT,
    PROBES_RECEIVED,
    RELAYS,
    RELAY_RTT,
    REGISTRY_UP,
    REGISTRY_STALE,
    REGISTRY_WRITES,
    REGISTRY_LOSSES,
    FAULTS,
    REPAIRS,
    KERNEL_ERRORS,
    REFUSED,
    PEER_PATH,
    PEER_RTT,
    PEER_HANDSHAKE,
    PEER_RECEIVED,
    PEER_SENT,
];

/// What the page is made from beside the daemon's status.
#[derive(Clone, Copy, Debug)]
pub struct Around {
    /// Peers up to which each has samples of its own.
    pub peers: usize,
    /// Connections to the status listener that were refused.
    pub refused: u64,
    /// The time since 1970.
    pub now: Duration,
}

/// The page of a daemon.
pub fn page(status: &Status, around: Around) -> Page {
    let mut page = Page::default();
    add_node(&mut page, status);
    add_data_plane(&mut page, status);
    add_paths(&mut page, status);
    add_registry(&mut page, status);
    page.add(&REPAIRS, status.counts.kernel_repairs as f64);
    page.add(&KERNEL_ERRORS, status.counts.kernel_errors as f64);
    page.add(&REFUSED, around.refused as f64);
    // With more there are none at all: which ones have some shall not depend on who else is there.
    if status.peers.len() <= around.peers {
        add_peers(&mut page, &status.peers, around.now);
    }
    process::add(&mut page);
    if let Some(enforced) = &status.network_policy {
        policy::add(&mut page, enforced, around.now);
    }
    if let Some(served) = &status.gateway {
        gateway::add(&mut page, served);
    }
    if let Some(server) = &status.relay_server {
        relay::add(&mut page, server);
    }
    page
}

fn add_node(page: &mut Page, status: &Status) {
    let node = &status.node;
    page.add_each(&INFO, [([node.version.clone()], 1.0)]);
    page.add(&READY, f64::from(status.not_ready().is_none()));
    page.add_each(
        &APPROVAL,
        Approval::ALL.map(|state| ([state.label().to_owned()], f64::from(state == node.approval))),
    );
    page.add_each(&NAT, [([node.nat.label().to_owned()], 1.0)]);
    page.add(&WARNINGS, status.warnings.len() as f64);
}

fn add_data_plane(page: &mut Page, status: &Status) {
    let plane = &status.data_plane;
    let drops = DropReason::ALL.iter().map(|reason| reason.label());
    page.add(&SESSIONS, plane.live_sessions as f64);
    page.add(&RECEIVED, plane.rx_datagrams as f64);
    page.add(&RECEIVED_BYTES, plane.rx_bytes as f64);
    page.add(&SENT, plane.tx_datagrams as f64);
    page.add(&SENT_BYTES, plane.tx_bytes as f64);
    page.add_each(&DROPS, drops.map(|label| ([label.to_owned()], plane.drops.get(label).copied().unwrap_or(0) as f64)));
    page.add(&STARTED, plane.handshakes.started as f64);
    page.add(&COMPLETED, plane.handshakes.completed as f64);
    page.add(&FAILED, plane.handshakes.failed as f64);
    page.add(&CPU, plane.cpu_s);
}

fn add_paths(page: &mut Page, status: &Status) {
    let paths = Peer::PATHS.map(|path| (path, status.peers.iter().filter(|peer| peer.path == path).count()));
    let relays = ["up", "connecting", "down"]
        .map(|state| (state, status.relays.iter().filter(|relay| relay.state == state).count()));
    let rtts = status.relays.iter().filter_map(|relay| Some(([relay.address.clone()], relay.rtt_ms? / 1e3)));
    page.add_each(&PEERS, paths.map(|(path, count)| ([path.to_owned()], count as f64)));
    page.add(&PATH_CHANGES, status.counts.path_changes as f64);
    page.add(&PROBES_SENT, status.counts.probes_sent as f64);
    page.add(&PROBES_RECEIVED, status.counts.probes_received as f64);
    page.add_each(&RELAYS, relays.map(|(state, count)| ([state.to_owned()], count as f64)));
    page.add_each(&RELAY_RTT, rtts);
}

fn add_registry(page: &mut Page, status: &Status) {
    let registry = &status.registry;
    let heard = registry.state == "current";
    let waits = matches!(registry.state.as_str(), "connecting" | "stale");
    let faults =
        NodeFault::CODES.map(|code| ([code.to_owned()], status.fault_counts.get(code).copied().unwrap_or(0) as f64));
    let writes = [("ok", status.counts.registry_writes), ("error", status.counts.registry_write_errors)];
    if registry.state != "none" {
        page.add_each(&REGISTRY_UP, [([registry.kind.clone()], f64::from(heard))]);
        page.add(&REGISTRY_STALE, if waits { registry.since_s } else { 0.0 });
    }
    page.add_each(&REGISTRY_WRITES, writes.map(|(result, count)| ([result.to_owned()], count as f64)));
    page.add(&REGISTRY_LOSSES, status.counts.registry_losses as f64);
    page.add_each(&FAULTS, faults);
}

fn add_peers(page: &mut Page, peers: &[Peer], now: Duration) {
    let each = |of: fn(&Peer) -> Option<f64>| {
        peers.iter().filter_map(move |peer| Some(([peer.name.clone()], of(peer)?))).collect::<Vec<_>>()
    };
    let handshakes = peers.iter().filter_map(|peer| {
        let at = now.as_secs_f64() - peer.last_handshake_s?;
        // To the millisecond: two clocks were read, one after the other.
        Some(([peer.name.clone()], (at * 1e3).round() / 1e3))
    });
    page.add_each(&PEER_PATH, peers.iter().map(|peer| ([peer.name.clone(), peer.path.clone()], 1.0)));
    page.add_each(&PEER_RTT, each(|peer| peer.rtt_ms.map(|rtt| rtt / 1e3)));
    page.add_each(&PEER_HANDSHAKE, handshakes);
    page.add_each(&PEER_RECEIVED, each(|peer| Some(peer.rx_bytes as f64)));
    page.add_each(&PEER_SENT, each(|peer| Some(peer.tx_bytes as f64)));
}
