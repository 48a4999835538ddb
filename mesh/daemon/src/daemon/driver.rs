//! The driver of the node's machine: every event becomes an input, every output an effect. No policy.

mod commands;
mod news;

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use keystone_mesh_core::kernel::{Desired, Route};
use keystone_mesh_core::mesh::{Counters, Mesh, Output, with_port};
use keystone_mesh_core::network::SignedNetwork;
use keystone_mesh_core::node::NodeRecord;
use keystone_mesh_core::relay::{HostPort, RelayAddr};
use keystone_mesh_core::{DropReason, Via};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::addresses::{self, Resolved};
use super::keeper::{Keeper, KeeperEvent};
use super::pods::Pods;
use super::saver::Saver;
use super::uplink::Uplink;
use super::{End, Kept, Local, Start, hints, report};
use crate::clock::unix_now_ms;
use crate::config::Config;
use crate::control::Call;
use crate::dataplane::DataEvent;
use crate::http::{HttpServer, listen, pages};
use crate::kube_api::watch::Pace;
use crate::policy::{self, Enforcer};
use crate::quic::relay_client::RelayState;
use crate::registry::Event;
use crate::service::Service;
use crate::signals::Stop;
use crate::state::{LivePeer, Snapshot};
use crate::status::Counts;

/// Between two samples of the counters while there is traffic, as the path machine asks for.
const SAMPLE: Duration = Duration::from_millis(100);
/// And while there has been none for [`QUIET_AFTER`].
const SAMPLE_QUIET: Duration = Duration::from_millis(500);
/// How long after the last traffic the counters are sampled more seldom: an idle daemon should cost nothing that shows.
const QUIET_AFTER: Duration = Duration::from_secs(5);

/// What the registry last said about itself.
#[derive(Clone, Debug)]
pub(super) enum RegistryState {
    /// There is none.
    None,
    /// It has not been heard yet.
    Waiting,
    /// It is heard.
    Current,
    /// It was lost, for this reason.
    Stale(String),
}

pub(super) struct Driver {
    pub(super) start: Start,
    pub(super) config: Config,
    pub(super) mesh: Mesh,
    pub(super) local: Local,
    pub(super) uplink: Uplink,
    pub(super) keeper: Keeper,

    // --- what was heard ---
    pub(super) registry_state: RegistryState,
    pub(super) registry_since: Instant,
    pub(super) registry_heard: bool,
    pub(super) kernel_up: bool,
    signed_network: Option<SignedNetwork>,
    relay_changes: watch::Receiver<()>,
    pub(super) relays: Vec<RelayAddr>,
    names: watch::Sender<Vec<HostPort>>,
    resolved: mpsc::Receiver<Resolved>,

    // --- what was done ---
    last_seq: u64,
    published: Option<NodeRecord>,
    timeout: Option<Instant>,
    saver: Option<Saver>,
    pub(super) pods: Pods,
    facts_due: bool,
    dirty: bool,
    pub(super) counts: Counts,
    service: Option<(Vec<IpAddr>, Service)>,
    status: Option<HttpServer>,
    pub(super) policy: Option<Enforcer>,
    /// What takes the policies' table away, after an enforcer or an earlier run that had one.
    policy_removal: Option<JoinHandle<()>>,
    service_addresses: Vec<IpAddr>,
}

impl Driver {
    pub(super) fn new(start: Start, config: Config, mesh: Mesh, local: Local, uplink: Uplink, kept: Kept) -> Self {
        let Kept { keeper, pods } = kept;
        let endpoints = config.plain_peers.iter().filter_map(|p| Some((p.config.key, p.endpoint.clone()?))).collect();
        let (names, wanted) = watch::channel(Vec::new());
        let (resolved, _) = addresses::start(config.endpoints.clone(), endpoints, wanted);
        let registry_state = if uplink.registry.is_some() { RegistryState::Waiting } else { RegistryState::None };
        let relay_changes = uplink.relays.changes();
        let saver = Some(Saver::start(start.state.clone()));
        Self {
            start,
            config,
            mesh,
            local,
            uplink,
            keeper,
            registry_state,
            registry_since: Instant::now(),
            registry_heard: false,
            kernel_up: false,
            signed_network: None,
            relay_changes,
            relays: Vec::new(),
            names,
            resolved,
            last_seq: 0,
            published: None,
            timeout: None,
            saver,
            pods,
            facts_due: true,
            dirty: false,
            counts: Counts::default(),
            service: None,
            status: None,
            policy: None,
            policy_removal: None,
            service_addresses: Vec::new(),
        }
    }

    /// Gives the machine what is on disk and in the configuration; nobody needs to answer for that.
    pub(super) fn begin(&mut self) {
        let now = Instant::now();
        self.mesh.handle_hints(hints(&self.start.snapshot));
        for peer in &self.config.plain_peers {
            let endpoint = peer.endpoint.as_ref().and_then(HostPort::literal);
            self.mesh.handle_plain_peer(peer.name.clone(), peer.config.clone(), endpoint, now);
        }
        let Snapshot { network, entries, peers, .. } = std::mem::take(&mut self.start.snapshot);
        match network {
            Some(network) if Some(network.get().id) == self.start.network => {
                if let Err(error) = self.everything(network, entries, peers) {
                    tracing::error!(%error, "the snapshot is not used");
                }
            }
            Some(_) => tracing::warn!("the snapshot is another network's and is not used"),
            None => {}
        }
        self.drain(now);
    }

    /// Serves status where the configuration says so.
    pub(super) fn serve_status(&mut self, calls: mpsc::Sender<Call>) {
        if !self.config.status_listen.is_empty() {
            self.status = Some(pages::serve_daemon(calls, self.config.metrics_peers));
            self.listen_for_status();
        }
    }

    /// Enforces network policies, or takes away what an earlier run that did has left.
    pub(super) fn enforce_policies(&mut self) {
        match self.start.name.as_ref().filter(|_| self.pods.service.policies) {
            Some(_) if self.policy.is_some() => {}
            Some(name) => {
                let access = self.uplink.access.clone();
                let seed = u64::from(self.local.port) ^ unix_now_ms();
                let after = self.policy_removal.take();
                let start = policy::Start { node: name.to_string(), access, pace: Pace::default(), seed, after };
                self.policy = Some(Enforcer::start(start));
            }
            None => {
                self.policy_removal = Some(policy::take_away(self.policy.take()));
            }
        }
    }

    /// Runs until a signal, or until the node has left.
    pub(super) async fn run(
        &mut self,
        stop: &mut Stop,
        mut events: mpsc::Receiver<DataEvent>,
        mut calls: mpsc::Receiver<Call>,
    ) -> End {
        let mut sample_at = Instant::now() + SAMPLE;
        let mut quiet_at = sample_at + QUIET_AFTER;
        loop {
            let timeout = self.timeout.unwrap_or(sample_at).min(sample_at);
            tokio::select! {
                signal = stop.requested() => {
                    tracing::info!(signal, "stopping");
                    return End::Stopped;
                }
                Some(event) = events.recv() => {
                    if matches!(event, DataEvent::TunLost) {
                        return End::InterfaceLost;
                    }
                    self.data_event(event);
                }
                event = next_event(&mut self.uplink) => if let Err(error) = self.registry_events(event) {
                    return End::PutOut(error);
                },
                _ = self.relay_changes.changed() => self.relays_changed(),
                event = self.keeper.next() => match event {
                    KeeperEvent::HostAddresses(addresses) => self.host_addresses(addresses),
                    KeeperEvent::Applied => {
                        (self.kernel_up, self.facts_due) = (true, true);
                        self.restart_service();
                    }
                },
                Some(resolved) = self.resolved.recv() => self.resolved(resolved),
                Some(call) = calls.recv() => if let Some(asker) = self.call(call).await { return End::Left(asker) },
                () = tokio::time::sleep_until(timeout.into()) => {}
            }
            let now = Instant::now();
            if now >= sample_at {
                if self.sample(now) {
                    quiet_at = now + QUIET_AFTER;
                }
                self.tell_facts(now);
                sample_at = now + if now < quiet_at { SAMPLE } else { SAMPLE_QUIET };
            }
            if self.timeout.is_some_and(|at| now >= at) {
                self.mesh.handle_timeout(now);
            }
            self.drain(now);
        }
    }

    /// Writes what is left to write and says goodbye.
    pub(super) async fn finish(self) {
        self.save();
        drop(self.service);
        drop(self.status);
        drop(self.keeper);
        // Whoever takes their table away after this is not overtaken by a round that was under way.
        if let Some(policy) = self.policy {
            policy.stop().await;
        }
        if let Some(removal) = self.policy_removal {
            let _ = removal.await;
        }
        if let Some(saver) = self.saver {
            saver.finish().await;
        }
        self.uplink.finish().await;
    }

    // --- events to inputs ---

    fn data_event(&mut self, event: DataEvent) {
        let now = Instant::now();
        match event {
            DataEvent::Probe { via, from, bytes } => match self.mesh.handle_probe(via, from, &bytes, now) {
                Ok(()) => self.counts.probes_received += 1,
                Err(refusal) => {
                    self.local.plane.count_drop(DropReason::BadProbe);
                    tracing::trace!(%via, %refusal, "probe dropped");
                }
            },
            DataEvent::Demand { peer } => self.mesh.handle_demand(&peer, now),
            DataEvent::Roamed { peer, via } => self.mesh.handle_roamed(&peer, via, now),
            DataEvent::Handshake { peer } => self.mesh.handle_session(&peer),
            DataEvent::TunLost => {}
        }
    }

    fn relays_changed(&mut self) {
        self.relay_changes.mark_unchanged();
        let now = Instant::now();
        for (id, state) in self.uplink.relays.states() {
            match state {
                RelayState::Up { observed, .. } => {
                    self.mesh.handle_observed(observer(&self.relays, id), observed, now);
                    self.mesh.handle_relay(id, true, now);
                }
                RelayState::Connecting | RelayState::Down { .. } => self.mesh.handle_relay(id, false, now),
            }
        }
    }

    fn host_addresses(&mut self, addresses: Vec<IpAddr>) {
        let known = !self.mesh.location().0.is_empty();
        self.mesh.handle_host_addresses(with_port(addresses, self.local.port), Instant::now());
        if known {
            self.uplink.network_changed();
        }
    }

    fn resolved(&mut self, resolved: Resolved) {
        let now = Instant::now();
        self.mesh.handle_configured_addresses(resolved.own, now);
        self.mesh.handle_resolved(resolved.names, now);
        for (key, addr) in resolved.plain {
            if let Some(peer) = self.config.plain_peers.iter().find(|peer| peer.config.key == key) {
                self.mesh.handle_plain_peer(peer.name.clone(), peer.config.clone(), Some(addr), now);
            }
        }
    }

    /// Whether there was traffic since the last sample.
    fn sample(&mut self, now: Instant) -> bool {
        let counters = self.local.plane.stats().peers.into_iter().map(|peer| Counters {
            peer: peer.key,
            sent: peer.tx_bytes,
            received: peer.rx_bytes,
            received_via: peer.received_via,
        });
        let counters: Vec<Counters> = counters.collect();
        self.mesh.handle_counters(&counters, now)
    }

    // --- outputs to effects ---

    fn drain(&mut self, now: Instant) {
        loop {
            match self.mesh.poll_output(now) {
                Output::Peers(ops) => {
                    self.facts_due = true;
                    self.local.plane.apply(&ops);
                }
                Output::Kernel { addresses, routes } => self.set_kernel(addresses, routes),
                Output::Relays(relays) => {
                    self.uplink.relays.set_relays(&relays);
                    // The relay inside this node is always up for it.
                    let own = self.start.secret.identity().id();
                    let inside = self.config.serve_relay && relays.iter().any(|relay| relay.id == own);
                    self.mesh.handle_relay(own, inside, now);
                    self.relays = relays;
                }
                Output::Names(names) => drop(self.names.send_replace(names.into_iter().collect())),
                Output::SetPath { peer, via } => {
                    self.facts_due = true;
                    self.counts.path_changes += 1;
                    // False: the peer went in the same breath, and its removal is the next output.
                    tracing::debug!(%peer, via = via.map(tracing::field::display), "path");
                    self.local.plane.set_path(&peer, via);
                }
                Output::StartHandshake(peer) => drop(self.local.plane.start_handshake(&peer)),
                Output::SendProbe { to, via, bytes } => {
                    self.counts.probes_sent += 1;
                    self.send_probe(to, via, &bytes);
                }
                Output::Publish(record) => self.publish(record),
                Output::Save => (self.dirty, self.facts_due) = (true, true),
                Output::Timeout { at, .. } => {
                    self.timeout = Some(at);
                    break;
                }
                Output::Idle => {
                    self.timeout = None;
                    break;
                }
            }
        }
        if std::mem::take(&mut self.dirty) {
            self.save();
        }
    }

    fn set_kernel(&mut self, addresses: Vec<IpNet>, routes: Vec<Route>) {
        self.service_addresses = addresses.iter().map(IpNet::addr).collect();
        self.keeper.set_desired(Desired { mtu: self.config.mtu.into(), up: true, addresses, routes, rule: true });
        self.listen_for_status();
    }

    /// At most once for each sample: a mesh that starts changes a thousand paths in a second.
    fn tell_facts(&mut self, now: Instant) {
        if std::mem::take(&mut self.facts_due) || self.pods.facts.again_at().is_some_and(|at| now >= at) {
            let status = report::status(self, now);
            self.pods.update(&status, now);
        }
    }

    fn listen_for_status(&self) {
        if let Some(status) = &self.status {
            status.set_addresses(listen::addresses(&self.config.status_listen, &self.service_addresses));
        }
    }

    /// Ping and bench are answered on the mesh addresses, once they are on the interface.
    fn restart_service(&mut self) {
        let members = self.start.name.is_some();
        if members && self.service.as_ref().is_none_or(|(addresses, _)| *addresses != self.service_addresses) {
            // The old one goes first: the addresses may overlap.
            self.service = None;
            self.service = Some((self.service_addresses.clone(), Service::start(&self.service_addresses)));
        }
    }

    fn send_probe(&self, to: Option<keystone_mesh_core::NodeId>, via: Via, bytes: &[u8]) {
        match (via, to) {
            (Via::Direct(addr), _) => self.local.plane.send_probe(addr, bytes),
            (Via::Relay(relay), Some(to)) => drop(self.uplink.relays.send(relay, to, &mut std::iter::once(bytes))),
            (Via::Relay(_), None) => {}
        }
    }

    fn publish(&mut self, record: NodeRecord) {
        self.published = Some(record.clone());
        self.last_seq = unix_now_ms().max(self.last_seq + 1);
        let record = NodeRecord { seq: self.last_seq, ..record };
        if let Some(registry) = &mut self.uplink.registry {
            self.counts.registry_writes += 1;
            let key = self.config.private_key.clone().unwrap_or_else(|| self.start.secret.wireguard(0));
            registry.publish(record.sign_with_key(&self.start.secret.identity(), &key));
        }
    }

    fn save(&self) {
        let Some(saver) = &self.saver else { return };
        let (_, entries, peers) = self.mesh.known();
        let live = self.mesh.hints().into_iter().map(|hint| LivePeer { key: hint.peer, direct: hint.direct });
        saver.save(Snapshot {
            network: self.signed_network.clone(),
            entries: entries.cloned().collect(),
            peers: peers.cloned().collect(),
            live: live.collect(),
        });
    }
}

/// Stands for the gateway among those who see this node from outside; not an address that a relay can have.
const GATEWAY_OBSERVER: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 1)), 1);

/// A relay as observer. One given by name is told from others by its key, in the discard prefix of RFC 6666.
fn observer(relays: &[RelayAddr], id: keystone_mesh_core::NodeId) -> SocketAddr {
    let literal = relays.iter().find(|relay| relay.id == id).and_then(|relay| relay.addrs.first()?.literal());
    literal.unwrap_or_else(|| {
        let [a, b, c, d, e, f, ..] = *id.as_bytes();
        let [g, h, i] = [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]), u16::from_be_bytes([e, f])];
        SocketAddr::new(Ipv6Addr::new(0x100, 0, 0, 0, 1, g, h, i).into(), 1)
    })
}

async fn next_event(uplink: &mut Uplink) -> Event {
    match &mut uplink.registry {
        Some(registry) => registry.next().await,
        None => std::future::pending().await,
    }
}
