//! The daemon: puts the parts together, and takes them apart again.
//!
//! ```text
//!                      +-------------------- driver (one task) --------------------+
//!   registry  <------> |  Mesh (core): inputs in, outputs out; no policy out here  | <----> control socket
//!   relays    <------> |                                                           | -----> snapshot on disk
//!                      +-----------------------------------------------------------+
//!                           |  peers, paths, probes            |  addresses, routes
//!                      data plane (own threads)           kernel keeper (task)
//!                           |  one UDP port: WireGuard, probes, QUIC
//! ```

mod addresses;
mod driver;
mod keeper;
mod pods;
mod report;
mod saver;
mod uplink;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use keystone_mesh_core::mesh::{Hint, Mesh, Own};
use keystone_mesh_core::node::NodeName;
use keystone_mesh_core::token::Token;
use keystone_mesh_core::{NodeId, PublicKey, Secret, kernel as core_kernel};
use tokio::sync::{mpsc, oneshot};

use self::driver::Driver;
use self::keeper::Keeper;
use self::pods::Pods;
use self::uplink::Uplink;
use crate::cni::facts::FactsFile;
use crate::cni::installer;
use crate::cni::service::Told;
use crate::config::{Config, OnStop, Places, RegistryKind};
use crate::control::{self, Answer};
use crate::dataplane::{self, DataPlane, RelaySink};
use crate::join::{self, refuse_other_network, relays_of};
use crate::lifeline::Watch;
use crate::member;
use crate::preflight;
use crate::quic::endpoint::{EndpointLimits, QuicEndpoint};
use crate::signals::Stop;
use crate::state::{Membership, Snapshot, StateDir};
use crate::tun::{Tun, TunConfig};
use crate::udp::{UdpConfig, UdpSocket};

/// Events of the data plane that wait for the driver; more are dropped and counted.
const EVENTS: usize = 1024;
/// Calls of the control socket that wait for the driver; a caller beyond waits at its socket.
const CALLS: usize = 16;

/// How long a join may take before the daemon gives up.
const JOIN_PATIENCE: Duration = Duration::from_secs(60);

/// How long the answer to a leave has to reach its asker.
const FAREWELL: Duration = Duration::from_millis(100);

/// How long connections may hold the port after their end, and how often that is looked at.
const RELEASE_PATIENCE: Duration = Duration::from_secs(5);
const RELEASE_POLL: Duration = Duration::from_millis(2);

/// How a daemon ended.
#[derive(Debug)]
enum End {
    /// By a signal: comes back.
    Stopped,
    /// Left the network: does not. Who asked is answered once everything is cleaned up.
    Left(oneshot::Sender<Answer>),
    /// Somebody deleted the interface: to be started again at once.
    InterfaceLost,
    /// The control plane will not have this node: an interface without peers would only swallow packets.
    PutOut(anyhow::Error),
}

/// What an end takes away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Gone {
    /// The interface, with addresses, routes and rules.
    interface: bool,
    /// What pods that are to come need: the CNI list and the facts.
    coming_pods: bool,
    /// What holds for pods that run: the packet filter's tables, and how the agent's pod wants pods served.
    running_pods: bool,
}

impl End {
    /// Pods run on without the daemon, and stay isolated until the node has left.
    fn takes_away(&self, on_stop: OnStop) -> Gone {
        match self {
            Self::Stopped => Gone { interface: on_stop == OnStop::Remove, ..Gone::default() },
            Self::InterfaceLost => Gone { interface: true, ..Gone::default() },
            Self::PutOut(_) => Gone { interface: true, coming_pods: true, running_pods: false },
            Self::Left(_) => Gone { interface: true, coming_pods: true, running_pods: true },
        }
    }
}

/// The data plane and what is fixed about it.
struct Local {
    plane: Arc<DataPlane>,
    port: u16,
    public_key: PublicKey,
    started: Instant,
}

/// What tasks of their own keep as it should be.
struct Kept {
    keeper: Keeper,
    pods: Pods,
}

/// What only one can have, and tasks of QUIC hold a moment longer than the daemon's driver.
struct Held(Vec<Watch>);

impl Held {
    /// Waits until port and registry can be opened again; not for ever, because opening them says it better.
    async fn released(self) {
        let deadline = Instant::now() + RELEASE_PATIENCE;
        while !self.0.iter().all(Watch::gone) && Instant::now() < deadline {
            tokio::time::sleep(RELEASE_POLL).await;
        }
    }
}

/// What a start knows about this node.
struct Start {
    state: Arc<StateDir>,
    secret: Secret,
    membership: Option<Membership>,
    snapshot: Snapshot,
    token: Option<Token>,
    name: Option<NodeName>,
    /// The network key that is given beforehand: by membership, token or configuration.
    network: Option<NodeId>,
}

/// Runs the daemon until it is asked to stop, or leaves.
pub async fn run(places: &Places, config: Config, token: Option<Token>) -> anyhow::Result<()> {
    let mut stop = Stop::new()?;
    let interface = config.interface.clone();
    let mut token = token;
    if config.registry == Some(RegistryKind::Kubernetes)
        && let Some(token) = token.take()
    {
        join_first(places, &config, &token).await?;
    }
    let end = loop {
        match run_once(places, config.clone(), token.take(), &mut stop).await {
            Ok(End::InterfaceLost) => tracing::warn!(interface, "somebody deleted the interface; making it again"),
            end => break end,
        }
    };
    // A failed start has made nothing, and what is there may be another daemon's.
    let gone = end.as_ref().map_or_else(|_| Gone::default(), |end| end.takes_away(config.on_stop));
    let removed = if gone.interface { keeper::remove(&interface).await } else { Ok(()) };
    if gone.running_pods {
        keeper::remove_tables().await;
        Told::in_directory(&places.run_dir).forget();
    }
    let removed = if gone.coming_pods {
        FactsFile::remove(&places.facts());
        removed.and(installer::withdraw(&config.cni))
    } else {
        removed
    };
    tracing::info!(interface_removed = gone.interface && removed.is_ok(), "daemon stopped");
    if let Ok(End::Left(answer)) = end {
        let said = match &removed {
            Ok(()) => Answer::Done,
            Err(error) => Answer::Failed { message: format!("left the network, but {error:#}") },
        };
        let _ = answer.send(said);
        // The answer leaves by a task of its own, which the end of the process would cut off.
        tokio::time::sleep(FAREWELL).await;
        return removed;
    }
    removed?;
    match end? {
        End::PutOut(error) => Err(error),
        End::Stopped | End::Left(_) | End::InterfaceLost => Ok(()),
    }
}

/// A token is shown to the gateway, whatever the registry is from then on.
async fn join_first(places: &Places, config: &Config, token: &Token) -> anyhow::Result<()> {
    let state = StateDir::open(&places.state_dir)?;
    let name = config.name.clone().map_or_else(member::host_name, Ok)?;
    join::join(&state, token, name, config.routes.clone(), JOIN_PATIENCE).await.map(drop)
}

async fn run_once(places: &Places, config: Config, token: Option<Token>, stop: &mut Stop) -> anyhow::Result<End> {
    let started = Instant::now();
    let start = prepare(places, &config, token)?;
    let store = uplink::open_store(&start, &config)?;
    preflight::require()?;
    let listener = control::bind(&places.socket())?;

    let key = config.private_key.clone().unwrap_or_else(|| start.secret.wireguard(0));
    let (events_in, events) = mpsc::channel(EVENTS);
    let relay_sink = Arc::new(uplink::LateRelays::default());
    let (sockets, port) = open_sockets(&config)?;
    let held =
        Held(sockets.iter().map(|socket| socket.watch_end()).chain(store.as_ref().map(|s| s.watch_end())).collect());
    let (plane, tun_claim) = open_plane(&config, &key, sockets, relay_sink.clone(), events_in)?;
    let plane = Arc::new(plane);
    let endpoint = QuicEndpoint::new(plane.quic_socket(), start.secret.identity(), EndpointLimits::default())
        .context("cannot start QUIC")?;
    let uplink = Uplink::start(&start, &config, store, endpoint, &plane)?;
    relay_sink.set(&uplink.relays);
    let keeper = keeper::start(&config.interface)?;
    let (calls_in, calls) = mpsc::channel(CALLS);
    let serving = tokio::spawn(control::serve(listener, calls_in.clone()));

    let pods = Pods::start(&config, places);
    let mesh = Mesh::new(own(&start, &config, pods.service.routes, key.clone())?);
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        name = start.name.as_ref().map(NodeName::as_str),
        identity = %start.secret.identity().id(),
        interface = config.interface,
        port,
        "daemon started"
    );
    let local = Local { plane, port, public_key: key.public_key(), started };
    let mut driver = Driver::new(start, config, mesh, local, uplink, Kept { keeper, pods });
    driver.serve_status(calls_in);
    driver.enforce_policies();
    driver.begin();
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let end = driver.run(stop, events, calls).await;
    if !matches!(end, End::InterfaceLost) {
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    }
    if !matches!(end, End::Left(_)) {
        serving.abort();
    }
    let _ = std::fs::remove_file(places.socket());
    driver.finish().await;
    drop(tun_claim);
    if matches!(end, End::InterfaceLost) {
        held.released().await;
    }
    Ok(end)
}

/// Reads and checks everything on disk, before anything is touched.
fn prepare(places: &Places, config: &Config, token: Option<Token>) -> anyhow::Result<Start> {
    let state = StateDir::open(&places.state_dir)?;
    let membership = state.membership()?;
    if let (Some(membership), Some(token)) = (&membership, &token) {
        refuse_other_network(membership, token)?;
    }
    if let (Some(membership), Some(given)) = (&membership, config.network)
        && membership.network != given
    {
        bail!(
            "this machine is in the network {}, and --network names {given}; run `keystone-mesh leave` first",
            membership.network
        );
    }
    let by_approval = config.registry == Some(RegistryKind::Kubernetes) && token.is_none();
    if membership.is_none() && by_approval && config.network.is_none() {
        bail!(
            "this machine is in no network, and to join one by its approval in Kubernetes it has to know the network key: \
             give it with --network KEY (`keystone-mesh status --json` on the control plane shows it)"
        );
    }
    let alone = membership.is_none() && token.is_none() && !by_approval;
    if alone && config.plain_peers.is_empty() {
        bail!(
            "this machine is in no network: make one with `keystone-mesh init`, join one with `--token-file FILE`, or give \
             plain WireGuard peers in --config"
        );
    }
    let name = match &membership {
        Some(membership) => {
            if let Some(wanted) = config.name.as_ref().filter(|wanted| **wanted != membership.name) {
                bail!(
                    "this machine is in the network as `{}`; to become `{wanted}` it has to leave and join again",
                    membership.name
                );
            }
            Some(membership.name.clone())
        }
        None if alone => None,
        None => Some(config.name.clone().map_or_else(member::host_name, Ok)?),
    };
    let secret = state.secret_or_create()?;
    // A snapshot is a convenience: damaged, it is left alone and everything is learned again.
    let snapshot = state.snapshot().unwrap_or_else(|error| {
        tracing::error!(%error, "the snapshot is not used");
        None
    });
    let token = if membership.is_some() { None } else { token };
    let given = config.network.filter(|_| by_approval);
    let network = membership.as_ref().map(|m| m.network).or(token.as_ref().map(|token| token.network)).or(given);
    let snapshot = snapshot.unwrap_or_default();
    Ok(Start { state: Arc::new(state), secret, membership, snapshot, token, name, network })
}

/// One socket per shard, all on one port.
fn open_sockets(config: &Config) -> anyhow::Result<(Vec<Arc<UdpSocket>>, u16)> {
    let mut sockets = Vec::with_capacity(config.shards.into());
    let mut port = config.listen_port;
    for _ in 0..config.shards {
        let socket =
            UdpSocket::bind(&UdpConfig { port, fwmark: Some(core_kernel::FWMARK), shared: config.shards > 1 })?;
        // With port 0 the first socket's choice is everyone's.
        port = socket.local_addr().port();
        sockets.push(Arc::new(socket));
    }
    Ok((sockets, port))
}

/// The interface and the data plane; after the port, which may be in use: the interface outlives a failed start.
fn open_plane(
    config: &Config,
    key: &keystone_mesh_core::PrivateKey,
    sockets: Vec<Arc<UdpSocket>>,
    relay_sink: Arc<dyn RelaySink>,
    events: mpsc::Sender<dataplane::DataEvent>,
) -> anyhow::Result<(DataPlane, crate::tun::TunClaim)> {
    let tun = Tun::open(&TunConfig { name: config.interface.clone(), queues: config.shards.into(), persistent: true })?;
    let (queues, claim) = tun.into_queues();
    let private_key = key.clone();
    let plane = DataPlane::start(dataplane::Config { tun: queues, sockets, private_key, relay: relay_sink, events })?;
    Ok((plane, claim))
}

fn own(start: &Start, config: &Config, pod_routes: bool, key: keystone_mesh_core::PrivateKey) -> anyhow::Result<Own> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).context("no randomness")?;
    Ok(Own {
        identity: start.secret.identity().id(),
        key,
        name: start.name.clone(),
        relays: start.token.as_ref().map(|token| relays_of(&token.rendezvous)).unwrap_or_default(),
        mtu: config.mtu,
        routes: config.routes.clone(),
        pod_routes,
        lan_routes: config.lan_routes,
        addresses: config.addresses.clone(),
        seed,
    })
}

/// What a snapshot says about peers, as the machine takes it.
fn hints(snapshot: &Snapshot) -> impl Iterator<Item = Hint> + '_ {
    snapshot.live.iter().map(|live| Hint { peer: live.key, direct: live.direct })
}

/// What was told to pods and about them ends with the membership.
fn forget_pods(places: &Places) {
    FactsFile::remove(&places.facts());
    Told::in_directory(&places.state_dir).forget();
}

/// Leaves while no daemon runs: tells the control plane, cleans up, forgets.
pub async fn leave_offline(places: &Places, interface: &str, cni_conf_dir: &Path, force: bool) -> anyhow::Result<()> {
    let state = StateDir::open(&places.state_dir)?;
    let Some(membership) = state.membership()? else {
        bail!("this machine is in no network (state directory {})", places.state_dir.display());
    };
    if !membership.control_plane {
        let told = uplink::tell_leave(&state, &membership, Duration::from_secs(10)).await;
        match told {
            Ok(()) => {}
            Err(error) if force => tracing::warn!(%error, "the control plane was not told; remove this node there"),
            Err(error) => {
                return Err(error.context(
                    "the control plane cannot be told, so this node would stay in its list; try again, or clean up here alone \
                     with --force and run `keystone-mesh remove` there",
                ));
            }
        }
    }
    keeper::remove(interface).await?;
    keeper::remove_tables().await;
    forget_pods(places);
    installer::withdraw_from(cni_conf_dir)?;
    Ok(state.forget()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_pods_stay_isolated_until_the_node_has_left() {
        let (asker, _) = oneshot::channel();
        let ends = [End::Stopped, End::InterfaceLost, End::PutOut(anyhow::anyhow!("refused")), End::Left(asker)];
        let gone = |on_stop| ends.each_ref().map(|end| end.takes_away(on_stop));
        for on_stop in [OnStop::Keep, OnStop::Remove] {
            assert_eq!(gone(on_stop).map(|gone| gone.running_pods), [false, false, false, true]);
            assert_eq!(gone(on_stop).map(|gone| gone.coming_pods), [false, false, true, true]);
        }
        assert_eq!(gone(OnStop::Keep).map(|gone| gone.interface), [false, true, true, true]);
        assert_eq!(gone(OnStop::Remove).map(|gone| gone.interface), [true; 4]);
    }
}
