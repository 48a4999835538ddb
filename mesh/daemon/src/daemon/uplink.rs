//! The node's ways to others: relays, and the registry behind them.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use keystone_mesh_core::NodeId;
use keystone_mesh_core::gateway::{FromGateway, ToGateway, VERSION};
use keystone_mesh_core::node::{NodeRecord, SignedApproval};
use keystone_mesh_core::path::Nat;
use keystone_mesh_core::relay::{AdmissionLimits, Rendezvous};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::Start;
use crate::clock::unix_now_ms;
use crate::config::{Config, RegistryKind};
use crate::dataplane::{DataPlane, PacketBatch, RelaySink};
use crate::kube_api::access::Access;
use crate::kube_api::watch::Pace;
use crate::member::REGISTRY_FILE;
use crate::quic::endpoint::{ConnectionHandler, EndpointLimits, QuicEndpoint};
use crate::quic::gateway::{self, GatewayAcceptor, GatewayStream, StreamVia};
use crate::quic::relay_pool::{RelayPool, RelayPoolConfig};
use crate::quic::relay_server::{Deliver, RelayServer, RelayServerConfig};
use crate::quic::splice::AcceptSpliced;
use crate::quic::{frames, tls::Protocol};
use crate::registry::Registry;
use crate::registry::backend::Backend;
use crate::registry::client::{Dial, GatewayRegistry, Invitation, MAX_FRAME, Stream};
use crate::registry::embedded::EmbeddedRegistry;
use crate::registry::handover::{self, Handover};
use crate::registry::kubernetes::KubernetesRegistry;
use crate::registry::kubernetes::gateway::KubernetesBackend;
use crate::registry::kubernetes::hub::{self, First, Hub, Known};
use crate::registry::kubernetes::moving::move_all;
use crate::registry::server::{Caller, Gateway};
use crate::relay::{credential, verifier};
use crate::state::{Membership, Snapshot, StateDir};
use crate::store::Store;

/// How long one round over all ways to the control plane may take.
const DIAL_PATIENCE: Duration = Duration::from_secs(10);
/// Streams that wait to be served by the gateway.
const WAITING_STREAMS: usize = 256;

/// The data plane is there before the relays are; until they are, packets for relays are dropped and counted.
#[derive(Default)]
pub(super) struct LateRelays(OnceLock<Weak<RelayPool>>);

impl LateRelays {
    pub(super) fn set(&self, relays: &Arc<RelayPool>) {
        let _ = self.0.set(Arc::downgrade(relays));
    }
}

impl RelaySink for LateRelays {
    fn send(&self, relay: NodeId, to: NodeId, packets: &mut dyn Iterator<Item = &[u8]>) -> usize {
        match self.0.get().and_then(Weak::upgrade) {
            Some(relays) => relays.send(relay, to, packets),
            None => packets.count(),
        }
    }
}

/// Where the control plane is met and what is shown there: changes as the network's document and approval do.
#[derive(Debug, Default)]
struct Ways {
    rendezvous: Vec<Rendezvous>,
    credential: Option<Vec<u8>>,
}

/// Opens the registry of the control plane, with what the configuration says about the network; none elsewhere.
pub(super) fn open_store(start: &Start, config: &Config) -> anyhow::Result<Option<Arc<Store>>> {
    let control_plane = start.membership.as_ref().is_some_and(|membership| membership.control_plane);
    match (control_plane, config.registry) {
        (true, Some(RegistryKind::Gateway)) => {
            bail!("registry = gateway: this host is the control plane and has the gateway; use embedded or kubernetes")
        }
        (false, Some(RegistryKind::Embedded)) => {
            bail!("registry = embedded: only the control plane's host has that; use gateway or kubernetes")
        }
        (true, _) => {}
        (false, _) => return Ok(None),
    }
    let store = Store::open(&start.state.file(REGISTRY_FILE), start.secret.identity())?;
    store.edit_network(|network| {
        if !config.relays.is_empty() {
            network.relays.clone_from(&config.relays);
        }
        if !config.gateways.is_empty() {
            network.gateways.clone_from(&config.gateways);
        }
    })?;
    if config.registry != Some(RegistryKind::Kubernetes) && store.is_moved()? {
        bail!(
            "this network's registry was moved to Kubernetes, which knows what happened since; start with --registry kubernetes"
        );
    }
    Ok(Some(Arc::new(store)))
}

/// The one hub of this daemon, where it has access to Kubernetes of its own.
fn open_hub(
    start: &Start,
    config: &Config,
    store: Option<&Arc<Store>>,
    seed: u64,
) -> anyhow::Result<Option<(Arc<Hub>, Access)>> {
    let Some(network) = start.network.filter(|_| config.registry == Some(RegistryKind::Kubernetes)) else {
        return Ok(None);
    };
    let access = match &config.service_account {
        Some(account) => Access::service_account(account.clone(), config.namespace.as_deref())?,
        None => Access::find(config.kubeconfig.as_deref(), config.namespace.as_deref())?,
    };
    let Snapshot { network: document, entries, peers, .. } = start.snapshot.clone();
    let mut known = Known { network: document, entries, peers };
    let mut first: Option<First> = None;
    if let Some(store) = store {
        known.network = Some(store.network());
        if !store.is_moved()? {
            known.entries = store.watch().entries;
            let (store, access) = (store.clone(), access.clone());
            first = Some(Box::new(move || {
                let (store, access) = (store.clone(), access.clone());
                Box::pin(async move { move_all(&store, &access).await })
            }));
        }
    }
    let founder = store.is_some();
    let hub =
        Hub::start(hub::Start { access: access.clone(), network, known, founder, first, pace: Pace::default(), seed });
    if let Some(store) = store {
        hub.set_document(store.network());
    }
    Ok(Some((Arc::new(hub), access)))
}

/// Everything between this node and others that is not the data plane.
pub(super) struct Uplink {
    pub(super) endpoint: QuicEndpoint,
    pub(super) relays: Arc<RelayPool>,
    pub(super) registry: Option<Box<dyn Registry>>,
    /// Access to Kubernetes, while there is some.
    pub(super) access: watch::Receiver<Option<Access>>,
    /// On the control plane: what it knows and decides.
    pub(super) backend: Option<Arc<dyn Backend>>,
    /// And the gateway to that.
    pub(super) gateway: Option<Arc<Gateway>>,
    ways: Arc<Mutex<Ways>>,
    serving: Vec<JoinHandle<()>>,
}

impl Uplink {
    pub(super) fn start(
        start: &Start,
        config: &Config,
        store: Option<Arc<Store>>,
        endpoint: QuicEndpoint,
        plane: &Arc<DataPlane>,
    ) -> anyhow::Result<Self> {
        let identity = start.secret.identity();
        let network = start.network;
        let seed = random_seed()?;
        let (hub, own_access) = open_hub(start, config, store.as_ref(), seed)?.unzip();
        let mut access = watch::channel(own_access).1;
        let backend = store.as_ref().map(|store| -> Arc<dyn Backend> {
            match &hub {
                Some(hub) => Arc::new(KubernetesBackend::new(hub.clone(), store.network())),
                None => store.clone(),
            }
        });
        let shown = start.membership.as_ref().and_then(|membership| membership.approval.as_ref()).map(credential);
        let known = start.snapshot.network.as_ref().map(|network| network.get().rendezvous()).unwrap_or_default();
        let first = start.membership.as_ref().map(|m| m.rendezvous.clone()).unwrap_or_default();
        let invited = start.token.as_ref().map(|token| token.rendezvous.clone()).unwrap_or_default();
        let ways = Ways { rendezvous: merged([known, first, invited]), credential: shown.clone() };
        let ways = Arc::new(Mutex::new(ways));

        // Weak: the data plane ends with the driver, whatever connection still lingers.
        let plane = Arc::downgrade(plane);
        let deliver: Deliver = Arc::new(move |relay, from, packets| {
            if let Some(plane) = plane.upgrade() {
                plane.inject(relay, from, PacketBatch(packets));
            }
        });
        let mut handlers: Vec<(Protocol, Arc<dyn ConnectionHandler>)> = Vec::new();
        let mut serving = Vec::new();
        let mut spliced: Option<Arc<dyn AcceptSpliced>> = None;
        let gateway = backend.as_ref().map(|backend| Arc::new(Gateway::new(backend.clone())));
        if let Some(gateway) = &gateway {
            let (acceptor, streams) = GatewayAcceptor::new(&identity, WAITING_STREAMS);
            serving.push(tokio::spawn(serve_gateway(gateway.clone(), streams)));
            handlers.push((Protocol::Gateway, acceptor.clone()));
            spliced = Some(acceptor);
        }
        let local = match network {
            Some(network) if config.serve_relay => {
                let relay = RelayServer::new(
                    identity.id(),
                    RelayServerConfig {
                        network,
                        limits: AdmissionLimits::default(),
                        splices: 1024,
                        verify: verifier(network),
                        gateway: spliced.clone(),
                        node: Some(deliver.clone()),
                    },
                );
                handlers.push((Protocol::Relay, relay.clone()));
                Some(relay)
            }
            _ => None,
        };
        if !handlers.is_empty() {
            let endpoint = endpoint.clone();
            serving.push(tokio::spawn(async move { endpoint.serve(handlers).await }));
        }
        let pool = RelayPoolConfig { credential: shown, seed, receive: deliver, spliced, local };
        let relays = Arc::new(RelayPool::new(endpoint.clone(), pool));

        let own = network.zip(start.name.clone());
        let registry: Option<Box<dyn Registry>> = match (hub, store, own) {
            (Some(hub), _, Some((_, name))) => Some(Box::new(KubernetesRegistry::new(hub, name, identity.id()))),
            (None, Some(store), _) => Some(Box::new(EmbeddedRegistry::new(store))),
            (None, None, Some((network, name))) => {
                let mut invitation = start.token.as_ref().map(|t| Invitation { id: t.id, secret: t.secret.clone() });
                let dial = dialler(endpoint.clone(), network, ways.clone());
                let open = move || -> Box<dyn Registry> {
                    Box::new(GatewayRegistry::start(dial.clone(), invitation.take(), seed))
                };
                let own = handover::Own { network, name, identity: identity.id(), seed };
                let handover = Handover::new(own, Box::new(open));
                access = handover.access();
                Some(Box::new(handover))
            }
            (_, _, None) => None,
        };
        Ok(Self { endpoint, relays, registry, access, backend, gateway, ways, serving })
    }

    /// The registry's kind, for status.
    pub(super) fn kind(&self) -> &'static str {
        self.registry.as_ref().map_or("none", |registry| registry.kind())
    }

    /// The registry, where it takes access to Kubernetes.
    pub(super) fn handover(&mut self) -> Option<&mut Handover> {
        self.registry.as_mut()?.handover()
    }

    /// The node was let in: relays and the gateway are shown its approval from here on.
    pub(super) fn set_approval(&self, approval: &SignedApproval) {
        let shown = credential(approval);
        self.relays.set_credential(Some(&shown));
        self.ways.lock().unwrap_or_else(PoisonError::into_inner).credential = Some(shown);
    }

    /// The network's document says where the control plane is met.
    pub(super) fn set_rendezvous(&self, rendezvous: Vec<Rendezvous>) {
        let mut ways = self.ways.lock().unwrap_or_else(PoisonError::into_inner);
        // What a token said stays as a last resort: the document's names may not resolve here.
        ways.rendezvous = merged([rendezvous, std::mem::take(&mut ways.rendezvous)]);
    }

    /// The host's network changed: what failed may work, what worked may not.
    pub(super) fn network_changed(&mut self) {
        self.relays.network_changed();
        if let Some(registry) = &mut self.registry {
            registry.network_changed();
        }
    }

    pub(super) async fn finish(self) {
        drop(self.registry);
        self.endpoint.close().await;
        for task in self.serving {
            task.abort();
        }
    }
}

/// Ways in order, each once, and no more than are worth dialling in parallel.
fn merged<const N: usize>(lists: [Vec<Rendezvous>; N]) -> Vec<Rendezvous> {
    /// A token and a document have at most 8 and 12.
    const MOST: usize = 20;
    let mut ways: Vec<Rendezvous> = Vec::new();
    for way in lists.into_iter().flatten() {
        if !ways.contains(&way) && ways.len() < MOST {
            ways.push(way);
        }
    }
    ways
}

fn dialler(endpoint: QuicEndpoint, network: NodeId, ways: Arc<Mutex<Ways>>) -> Dial {
    Arc::new(move || {
        let endpoint = endpoint.clone();
        let (rendezvous, credential) = {
            let ways = ways.lock().unwrap_or_else(PoisonError::into_inner);
            (ways.rendezvous.clone(), ways.credential.clone())
        };
        Box::pin(async move {
            match gateway::dial(&endpoint, network, &rendezvous, credential.as_deref(), DIAL_PATIENCE).await {
                Ok(stream) => Ok(Box::new(stream) as Box<dyn Stream>),
                Err(error) => Err(error.to_string()),
            }
        })
    })
}

async fn serve_gateway(gateway: Arc<Gateway>, mut streams: mpsc::Receiver<GatewayStream>) {
    while let Some(stream) = streams.recv().await {
        let gateway = gateway.clone();
        let address = stream.observed.unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0)));
        let caller = Caller { id: stream.peer, address, direct: stream.via == StreamVia::Direct };
        tokio::spawn(async move { gateway.serve(stream, caller).await });
    }
}

fn random_seed() -> anyhow::Result<u64> {
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).context("no randomness")?;
    Ok(u64::from_be_bytes(seed))
}

/// Tells the control plane that this node leaves, while no daemon runs.
pub(super) async fn tell_leave(state: &StateDir, membership: &Membership, patience: Duration) -> anyhow::Result<()> {
    let secret = state.secret()?.context("the secret is missing")?;
    let snapshot = state.snapshot().ok().flatten().unwrap_or_default();
    let known = snapshot.network.as_ref().map(|network| network.get().rendezvous()).unwrap_or_default();
    let ways = merged([known, membership.rendezvous.clone()]);
    let shown = membership.approval.as_ref().map(credential);
    let endpoint = QuicEndpoint::bind("[::]:0".parse()?, secret.identity(), EndpointLimits::default())?;
    let mut stream = gateway::dial(&endpoint, membership.network, &ways, shown.as_deref(), patience).await?;
    let record = NodeRecord {
        name: membership.name.clone(),
        identity: secret.identity().id(),
        public_key: secret.wireguard(0).public_key(),
        endpoints: vec![],
        nat: Nat::Unknown,
        relays: vec![],
        routes: vec![],
        seq: unix_now_ms(),
    };
    let record = record.sign(&secret.identity());
    frames::write(&mut stream, &ToGateway::Attach { version: VERSION, record }, MAX_FRAME).await?;
    frames::write(&mut stream, &ToGateway::Leave, MAX_FRAME).await?;
    loop {
        let heard: FromGateway = frames::read_within(&mut stream, MAX_FRAME, patience).await?;
        if let FromGateway::Refused(refusal) = heard {
            return if refusal.code == "not-member" { Ok(()) } else { Err(anyhow!(refusal.message)) };
        }
        if matches!(heard, FromGateway::Left) {
            return Ok(());
        }
    }
}
