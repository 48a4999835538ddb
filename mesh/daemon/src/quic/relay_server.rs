//! The relay: forwards datagrams between clients and splices streams to the control plane.
//!
//! One task per client, with these parts side by side; the first to end ends the client:
//!
//! ```text
//!   control     answers CheckAddress; pushes Observed when the client's address changes
//!   datagrams   batch ── quota ── table ── queue of the destination's connection (bounded, tail drop)
//!   splices     Connect ── admission ── stream to the control plane (or the local gateway) ── pipe
//!   lifetime    cuts joiners
//! ```
//!
//! What it decides it asks of `keystone_mesh_core::relay`. Nothing grows with what clients send: datagrams wait in
//! the connections' own bounded queues, and what does not fit is dropped and counted.

mod control;
mod counters;
mod forward;
mod splices;

use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU16, AtomicUsize};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::Duration;

use bytes::Bytes;
use keystone_mesh_core::NodeId;
use keystone_mesh_core::relay::frame::MAX_PACKET;
use keystone_mesh_core::relay::message::{ClientMessage, CloseCode, MAX_MESSAGE, RelayMessage, VERSION};
use keystone_mesh_core::relay::table::Serial;
use keystone_mesh_core::relay::{Admission, AdmissionLimits, Code, Grant, Refusal, Role, Table};
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::{Semaphore, watch};

use super::endpoint::{Authenticated, ConnectionHandler, QuicEndpoint, canonical};
use super::frames;
use super::splice::AcceptSpliced;
use super::tls::Protocol;
pub use counters::{REFUSALS, RelayCounters, RelaySnapshot};
pub use forward::LocalNode;

/// How long a client may take for a message that it owes.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often clients' addresses are compared with what they were told.
const SWEEP: Duration = Duration::from_secs(1);
/// How long the farewell of a refused client is waited for.
const FAREWELL: Duration = Duration::from_secs(2);

/// Checks an approval that a client shows: whether the network key signed it for this identity.
pub type Verify = Arc<dyn Fn(&[u8], NodeId) -> Result<(), Refusal> + Send + Sync>;

/// Receives packets: the relay's identity, the sender's, and the packets in the order in which they came.
pub type Deliver = Arc<dyn Fn(NodeId, NodeId, Vec<Bytes>) + Send + Sync>;

/// What a relay needs to know.
pub struct RelayServerConfig {
    /// The key of the network that it serves.
    pub network: NodeId,
    /// Bounds and quotas.
    pub limits: AdmissionLimits,
    /// Splices of all clients at once; each holds at most 32 KiB and two streams' windows.
    pub splices: usize,
    /// Checks approvals.
    pub verify: Verify,
    /// Where splices end if the relay runs inside the control plane itself.
    pub gateway: Option<Arc<dyn AcceptSpliced>>,
    /// Where packets to the relay's own identity go if it runs inside a node.
    pub node: Option<Deliver>,
}

impl RelayServerConfig {
    /// A relay alone, with default limits.
    pub fn standalone(network: NodeId, verify: Verify) -> Self {
        Self { network, limits: AdmissionLimits::default(), splices: 1024, verify, gateway: None, node: None }
    }
}

/// A relay. Give it connections with [`QuicEndpoint::serve`].
pub struct RelayServer {
    id: NodeId,
    config: RelayServerConfig,
    admission: Mutex<Admission>,
    clients: RwLock<Table<Arc<Client>>>,
    local: Option<LocalNode>,
    splices: Arc<Semaphore>,
    counters: RelayCounters,
}

/// An admitted client.
struct Client {
    id: NodeId,
    grant: Grant,
    connection: Connection,
    /// What the client was told its address is.
    observed: watch::Sender<std::net::SocketAddr>,
    /// For packets that the relay splits on the way to this client.
    next_id: AtomicU16,
    open_splices: AtomicUsize,
}

/// Runs a relay alone on an endpoint, until the endpoint is closed.
pub async fn serve(endpoint: &QuicEndpoint, relay: Arc<RelayServer>) {
    endpoint.serve(vec![(Protocol::Relay, relay)]).await;
}

impl RelayServer {
    /// A relay with the identity of the endpoint that will serve it. Call it within a tokio runtime: it starts a small
    /// task that ends with it.
    pub fn new(id: NodeId, config: RelayServerConfig) -> Arc<Self> {
        let relay = Arc::new(Self {
            id,
            admission: Mutex::new(Admission::new(config.network, config.limits)),
            clients: RwLock::default(),
            local: config.node.clone().map(|deliver| LocalNode::new(id, deliver)),
            splices: Arc::new(Semaphore::new(config.splices)),
            counters: RelayCounters::default(),
            config,
        });
        tokio::spawn(sweep(Arc::downgrade(&relay)));
        relay
    }

    /// The relay's identity.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// Ends the connection of a node that lost its approval. It may come back with one that is good. Returns whether it
    /// was connected.
    pub fn disconnect(&self, id: NodeId, reason: &str) -> bool {
        let client = self.client(id);
        if let Some(client) = &client {
            client.connection.close(CloseCode::Refused.number().into(), reason.as_bytes());
        }
        client.is_some()
    }

    /// What it has done so far, and who is connected.
    pub fn snapshot(&self) -> RelaySnapshot {
        let clients = self.clients.read().unwrap_or_else(PoisonError::into_inner).len();
        let joiners = self.admission.lock().unwrap_or_else(PoisonError::into_inner).joiners();
        let open_splices = self.config.splices.saturating_sub(self.splices.available_permits());
        self.counters.snapshot(clients, joiners, open_splices)
    }

    async fn serve_client(self: Arc<Self>, connection: Authenticated) {
        let Authenticated { connection, peer } = connection;
        let (mut control, mut messages, datagrams, grant, _leave) = match self.greet(&connection, peer).await {
            Ok(greeted) => greeted,
            Err((control, refusal)) => return self.refuse(&connection, control, refusal).await,
        };
        let observed = canonical(connection.remote_address());
        let client = Arc::new(Client {
            id: peer,
            grant,
            connection: connection.clone(),
            observed: watch::Sender::new(observed),
            next_id: AtomicU16::new(0),
            open_splices: AtomicUsize::new(0),
        });
        // Known before it is welcomed: what it is sent from then on arrives.
        let _registered = (datagrams && grant.datagrams()).then(|| self.register(&client));
        let welcome = RelayMessage::Welcome { version: VERSION, observed, role: grant.role, max_packet: MAX_PACKET };
        if frames::write(&mut control, &welcome, MAX_MESSAGE).await.is_err() {
            return;
        }
        tracing::debug!(client = %peer.short(), role = ?grant.role, %observed, "relay client admitted");
        tokio::select! {
            _ = connection.closed() => {}
            () = self.forward_datagrams(&client, datagrams) => {}
            () = self.accept_splices(&client) => {}
            (code, reason) = self.converse(&client, &mut control, &mut messages) =>
                connection.close(code.number().into(), reason.as_bytes()),
            () = lifetime(grant.lifetime) => {
                self.counters.cut();
                connection.close(CloseCode::Timeout.number().into(), b"the time for joining is over");
            }
        }
    }

    /// Reads the greeting and decides about the client. The error is what it is told, and on which stream.
    async fn greet(
        self: &Arc<Self>,
        connection: &Connection,
        peer: NodeId,
    ) -> Result<(SendStream, RecvStream, bool, Grant, Leave), (Option<SendStream>, Refusal)> {
        let malformed = |message: String| Refusal { code: Code::Malformed, message };
        let opening = tokio::time::timeout(MESSAGE_TIMEOUT, connection.accept_bi()).await;
        let Ok(Ok((control, mut messages))) = opening else {
            return Err((None, malformed("no control stream was opened".into())));
        };
        let message = frames::read_within(&mut messages, MAX_MESSAGE, MESSAGE_TIMEOUT).await;
        let (credential, datagrams) = match message {
            Ok(ClientMessage::Hello { version: VERSION, credential, datagrams }) => (credential, datagrams),
            Ok(ClientMessage::Hello { version, .. }) => {
                let message =
                    format!("this relay speaks version {VERSION}, not {version}; upgrade the older of the two");
                return Err((Some(control), Refusal { code: Code::UnsupportedVersion, message }));
            }
            Ok(ClientMessage::CheckAddress {} | ClientMessage::Connect { .. }) => {
                return Err((Some(control), malformed("the first message must be a Hello".into())));
            }
            Err(error) => return Err((Some(control), malformed(format!("reading the Hello: {error}")))),
        };
        let from = canonical(connection.remote_address()).ip();
        let credential = credential.as_ref().map(|credential| credential.0.as_slice());
        let admitted = self.admission.lock().unwrap_or_else(PoisonError::into_inner).handle_client(
            peer,
            credential,
            from,
            |credential, client| (self.config.verify)(credential, client),
        );
        match admitted {
            Ok(grant) => {
                self.counters.admitted(grant.role);
                let leave = Leave { relay: self.clone(), role: grant.role, from };
                Ok((control, messages, datagrams, grant, leave))
            }
            Err(refusal) => Err((Some(control), refusal)),
        }
    }

    async fn refuse(&self, connection: &Connection, control: Option<SendStream>, refusal: Refusal) {
        // Of all its attempts at a relay's addresses a client keeps one and closes the others before it greets.
        if connection.close_reason().is_some() {
            return;
        }
        self.counters.refused(refusal.code);
        let code = if refusal.code == Code::Malformed { CloseCode::Malformed } else { CloseCode::Refused };
        let reason = refusal.message.clone();
        if let Some(mut control) = control {
            let told = frames::write(&mut control, &RelayMessage::Refused(refusal), MAX_MESSAGE).await;
            if told.is_ok() && control.finish().is_ok() {
                // A close would overtake the message.
                let _ = tokio::time::timeout(FAREWELL, control.stopped()).await;
            }
        }
        connection.close(code.number().into(), reason.as_bytes());
    }

    fn register(self: &Arc<Self>, client: &Arc<Client>) -> Registered {
        let inserted = self.clients.write().unwrap_or_else(PoisonError::into_inner).insert(client.id, client.clone());
        let (serial, replaced) = inserted;
        if let Some(replaced) = replaced {
            self.counters.replaced();
            let reason = b"another connection with this identity took the place";
            replaced.connection.close(CloseCode::Replaced.number().into(), reason);
        }
        Registered { relay: self.clone(), id: client.id, serial }
    }

    fn client(&self, id: NodeId) -> Option<Arc<Client>> {
        self.clients.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }
}

impl ConnectionHandler for RelayServer {
    fn serve(self: Arc<Self>, connection: Authenticated) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(self.serve_client(connection))
    }
}

/// Gives a joiner's place back.
struct Leave {
    relay: Arc<RelayServer>,
    role: Role,
    from: IpAddr,
}

impl Drop for Leave {
    fn drop(&mut self) {
        self.relay.admission.lock().unwrap_or_else(PoisonError::into_inner).handle_left(self.role, self.from);
    }
}

/// Takes a client out of the table.
struct Registered {
    relay: Arc<RelayServer>,
    id: NodeId,
    serial: Serial,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.relay.clients.write().unwrap_or_else(PoisonError::into_inner).remove(self.id, self.serial);
    }
}

async fn lifetime(limit: Option<Duration>) {
    match limit {
        Some(limit) => tokio::time::sleep(limit).await,
        None => std::future::pending().await,
    }
}

/// Tells clients when their address has changed; quinn has no event for it. Ends with the relay.
async fn sweep(relay: Weak<RelayServer>) {
    let mut ticks = tokio::time::interval(SWEEP);
    loop {
        ticks.tick().await;
        let Some(relay) = relay.upgrade() else { return };
        for (_, client) in relay.clients.read().unwrap_or_else(PoisonError::into_inner).iter() {
            client.note_address();
        }
    }
}
