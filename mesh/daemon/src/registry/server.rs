//! The gateway: serves what the control plane knows to nodes, and lets joiners in.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use keystone_mesh_core::NodeId;
use keystone_mesh_core::gateway::{FromGateway, Refusal, ToGateway};
use keystone_mesh_core::node::{NodeName, SignedApproval, SignedRecord};
use keystone_mesh_core::throttle::Throttle;
use keystone_mesh_core::token::{TokenId, TokenRefusal, TokenSecret};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, broadcast, mpsc};

use super::backend::{Backend, Change, Watched};
use super::client::MAX_FRAME;
use super::counts::{GatewayCounters, GatewaySnapshot, Opening};
use crate::quic::frames::{self, StreamError};

/// How long a client may take to say what it wants, and to take an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// The largest message that is read: a record is at most some 20 KiB, and whoever sends more is no node of ours yet.
const MAX_QUESTION: usize = 64 << 10;
/// Sessions at once: twice the largest mesh that is aimed at.
const MAX_SESSIONS: usize = 10_000;

/// The gateway of one network.
pub struct Gateway {
    backend: Arc<dyn Backend>,
    throttle: Mutex<Throttle>,
    sessions: Semaphore,
    counters: GatewayCounters,
}

/// Who is at the other end of a session.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// The identity that TLS proved.
    pub id: NodeId,
    /// Where it comes from: seen by ourselves, or told by the relay.
    pub address: SocketAddr,
    /// Whether the session runs straight over our own socket, so that the address is one of the caller's mesh socket.
    pub direct: bool,
}

impl Gateway {
    /// A gateway to what the backend knows.
    pub fn new(backend: Arc<dyn Backend>) -> Self {
        let sessions = Semaphore::new(MAX_SESSIONS);
        Self { backend, throttle: Mutex::default(), sessions, counters: GatewayCounters::default() }
    }

    /// What it has done so far, and how many sessions there are.
    pub fn snapshot(&self) -> GatewaySnapshot {
        self.counters.snapshot(MAX_SESSIONS - self.sessions.available_permits())
    }

    /// Serves one session to its end. Errors end the session, and only that.
    pub async fn serve<S: AsyncRead + AsyncWrite + Send + 'static>(&self, stream: S, caller: Caller) {
        let Ok(_place) = self.sessions.try_acquire() else {
            self.counters.full();
            tracing::warn!(caller = %caller.address, "gateway is full; session refused");
            return;
        };
        match self.session(stream, caller).await {
            Ok(()) | Err(StreamError::Closed) => {}
            Err(error) => tracing::debug!(caller = %caller.id.short(), %error, "gateway session ended"),
        }
    }

    async fn session<S: AsyncRead + AsyncWrite + Send + 'static>(
        &self,
        stream: S,
        caller: Caller,
    ) -> Result<(), StreamError> {
        let (mut input, mut output) = tokio::io::split(stream);
        let first = frames::read_within::<ToGateway>(&mut input, MAX_QUESTION, PATIENCE).await?;
        let opening = Opening::of(&first);
        let opened = self.open(first, caller).await;
        self.counters.opened(opening, &opened);
        let name = match opened {
            Ok((name, greeting)) => {
                if let Some(greeting) = greeting {
                    say(&mut output, &greeting).await?;
                }
                name
            }
            Err(refusal) => {
                tracing::info!(caller = %caller.address, code = refusal.code, "refused: {}", refusal.message);
                return say(&mut output, &FromGateway::Refused(refusal)).await;
            }
        };
        if caller.direct {
            say(&mut output, &FromGateway::Observed { address: caller.address }).await?;
        }
        // Reading is not cancel-safe, so it has its own task; one message waits at most.
        let (heard, mut messages) = mpsc::channel(1);
        let reading = tokio::spawn(async move {
            loop {
                let message = frames::read::<ToGateway>(&mut input, MAX_QUESTION).await;
                let ended = message.is_err();
                if heard.send(message).await.is_err() || ended {
                    break;
                }
            }
        });
        let result = self.attached(&mut output, &mut messages, caller, &name).await;
        reading.abort();
        result
    }

    /// The first message: who may have a session at all.
    async fn open(&self, first: ToGateway, caller: Caller) -> Result<(NodeName, Option<FromGateway>), Refusal> {
        match first {
            ToGateway::Join { token, secret, record, .. } => {
                let name = record.get().name.clone();
                let approval = self.join(caller, record, token, &secret).await?;
                tracing::info!(node = %name, from = %caller.address, "joined");
                Ok((name, Some(FromGateway::Joined { approval })))
            }
            ToGateway::Attach { record, .. } => {
                let name = record.get().name.clone();
                self.backend.publish(caller.id, record).await?;
                Ok((name, None))
            }
            ToGateway::Publish { .. } | ToGateway::Leave => {
                Err(Refusal { code: "unexpected".into(), message: "a session begins with join or attach".into() })
            }
        }
    }

    async fn join(
        &self,
        caller: Caller,
        record: SignedRecord,
        token: TokenId,
        secret: &TokenSecret,
    ) -> Result<SignedApproval, Refusal> {
        let source = caller.address.ip();
        if let Some(wait) = self.throttle().wait(source, Instant::now()) {
            let seconds = wait.as_secs() + 1;
            let message = format!("too many failed joins from {source}; try again in {seconds} s");
            return Err(Refusal { code: "slow-down".into(), message });
        }
        let joined = self.backend.join(caller.id, record, token, secret).await;
        match &joined {
            Ok(_) => self.throttle().handle_success(source),
            Err(refusal) if refusal.code == TokenRefusal::Unknown.code() => {
                self.throttle().handle_failure(source, Instant::now());
            }
            Err(_) => {}
        }
        joined
    }

    fn throttle(&self) -> MutexGuard<'_, Throttle> {
        self.throttle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn attached(
        &self,
        output: &mut (impl AsyncWrite + Unpin),
        messages: &mut mpsc::Receiver<Result<ToGateway, StreamError>>,
        caller: Caller,
        name: &NodeName,
    ) -> Result<(), StreamError> {
        let mut changes = self.everything(output).await?;
        loop {
            tokio::select! {
                message = messages.recv() => match message.unwrap_or(Err(StreamError::Closed))? {
                    ToGateway::Publish { record } => {
                        let seq = record.get().seq;
                        match self.backend.publish(caller.id, record).await {
                            Ok(()) => say(output, &FromGateway::Published { seq }).await?,
                            Err(refusal) => say(output, &FromGateway::Refused(refusal)).await?,
                        }
                    }
                    ToGateway::Leave => return self.leave(output, caller, name).await,
                    ToGateway::Join { .. } | ToGateway::Attach { .. } => {
                        let message = "the session is open already".into();
                        return say(output, &FromGateway::Refused(Refusal { code: "unexpected".into(), message })).await;
                    }
                },
                change = changes.recv() => match change {
                    Ok(Change::Node(entry)) => say(output, &FromGateway::Changed { entry: *entry }).await?,
                    Ok(Change::Removed(gone)) if gone == *name => {
                        let message = "this machine was removed from the network; join it again with a token".into();
                        return say(output, &FromGateway::Refused(Refusal { code: "not-member".into(), message })).await;
                    }
                    Ok(Change::Removed(name)) => say(output, &FromGateway::Removed { name }).await?,
                    Ok(Change::Peer(peer)) => say(output, &FromGateway::PeerChanged { peer: *peer }).await?,
                    Ok(Change::PeerRemoved(name)) => say(output, &FromGateway::PeerRemoved { name }).await?,
                    Ok(Change::Network(network)) => say(output, &FromGateway::Network { network: *network }).await?,
                    Err(broadcast::error::RecvError::Lagged(_)) => changes = self.everything(output).await?,
                    Err(broadcast::error::RecvError::Closed) => return Ok(()),
                },
            }
        }
    }

    async fn everything(
        &self,
        output: &mut (impl AsyncWrite + Unpin),
    ) -> Result<broadcast::Receiver<Change>, StreamError> {
        let Watched { network, entries, peers, changes } = self.backend.watch();
        say(output, &FromGateway::Snapshot { network, entries, peers }).await?;
        Ok(changes)
    }

    async fn leave(
        &self,
        output: &mut (impl AsyncWrite + Unpin),
        caller: Caller,
        name: &NodeName,
    ) -> Result<(), StreamError> {
        match self.backend.leave(caller.id, name).await {
            Ok(()) => say(output, &FromGateway::Left).await,
            Err(refusal) => say(output, &FromGateway::Refused(refusal)).await,
        }
    }
}

async fn say(output: &mut (impl AsyncWrite + Unpin), message: &FromGateway) -> Result<(), StreamError> {
    let written = tokio::time::timeout(PATIENCE, frames::write(output, message, MAX_FRAME)).await;
    written.map_err(|_| StreamError::TimedOut(PATIENCE))?
}
