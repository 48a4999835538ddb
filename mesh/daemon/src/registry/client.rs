//! A node's session with the gateway, kept up for ever.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use keystone_mesh_core::backoff::Backoff;
use keystone_mesh_core::gateway::{FromGateway, Refusal, ToGateway, VERSION};
use keystone_mesh_core::node::SignedRecord;
use keystone_mesh_core::token::{TokenId, TokenSecret};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::{Answer, Event, Registry};
use crate::quic::frames::{self, StreamError};

/// The largest message of a session: a snapshot of 5,000 nodes at some 1.5 KiB each.
pub const MAX_FRAME: usize = 16 << 20;
/// Events that wait for the driver; the session then waits too.
const EVENTS: usize = 64;
/// How long a leave waits for its answer.
const LEAVE_PATIENCE: Duration = Duration::from_secs(5);
/// A session in which a node joined through a relay is one of a stranger to that relay, which cuts it after a minute. It
/// is renewed once the approval has settled.
const RENEW_AFTER: Duration = Duration::from_secs(5);
/// How long the answer to the first message may take.
const OPEN_PATIENCE: Duration = Duration::from_secs(10);

/// A stream to the gateway, authenticated at both ends.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Opens a stream to the gateway over whichever way works first; an error says what each way answered.
pub type Dial = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Result<Box<dyn Stream>, String>> + Send>> + Send + Sync>;

/// What lets a node in.
#[derive(Clone, Debug)]
pub struct Invitation {
    /// The token's id.
    pub id: TokenId,
    /// The token's secret.
    pub secret: TokenSecret,
}

/// The gateway as a registry.
#[derive(Debug)]
pub struct GatewayRegistry {
    record: watch::Sender<Option<SignedRecord>>,
    events: mpsc::Receiver<Event>,
    leave: mpsc::Sender<oneshot::Sender<Result<(), String>>>,
    retry_now: Arc<Notify>,
    session: JoinHandle<()>,
}

impl GatewayRegistry {
    /// Starts the session; it opens once a record is published. With an invitation it joins, and attaches from then on.
    pub fn start(dial: Dial, invitation: Option<Invitation>, seed: u64) -> Self {
        let (record, records) = watch::channel(None);
        let (tell, events) = mpsc::channel(EVENTS);
        let (leave, leaves) = mpsc::channel(1);
        let retry_now = Arc::new(Notify::new());
        let session = Session { dial, invitation, records, tell, leaves, retry_now: retry_now.clone() };
        let session = tokio::spawn(session.run(Backoff::new(seed)));
        Self { record, events, leave, retry_now, session }
    }
}

impl Drop for GatewayRegistry {
    fn drop(&mut self) {
        self.session.abort();
    }
}

impl Registry for GatewayRegistry {
    fn kind(&self) -> &'static str {
        "gateway"
    }

    fn publish(&mut self, record: SignedRecord) {
        self.record.send_replace(Some(record));
    }

    fn next(&mut self) -> Answer<'_, Event> {
        Box::pin(async {
            match self.events.recv().await {
                Some(event) => event,
                // The session ends only after a refusal, which was told.
                None => std::future::pending().await,
            }
        })
    }

    fn leave(&mut self) -> Answer<'_, Result<(), String>> {
        Box::pin(async {
            let (tell, answer) = oneshot::channel();
            let asked = async {
                self.leave.send(tell).await.map_err(|_| "the session with the gateway is over".to_owned())?;
                answer.await.map_err(|_| "the session with the gateway ended before it answered".to_owned())?
            };
            let late = || "the gateway did not answer in time".to_owned();
            tokio::time::timeout(LEAVE_PATIENCE, asked).await.unwrap_or_else(|_| Err(late()))
        })
    }

    fn network_changed(&mut self) {
        self.retry_now.notify_one();
    }
}

struct Session {
    dial: Dial,
    invitation: Option<Invitation>,
    records: watch::Receiver<Option<SignedRecord>>,
    tell: mpsc::Sender<Event>,
    leaves: mpsc::Receiver<oneshot::Sender<Result<(), String>>>,
    retry_now: Arc<Notify>,
}

/// How a session ended.
enum End {
    /// To be opened again.
    Lost(String),
    /// To be opened again at once, as the member that this node has become.
    Renewed,
    /// Not to be opened again.
    Over,
}

impl Session {
    async fn run(mut self, mut backoff: Backoff) {
        loop {
            if self.records.wait_for(Option::is_some).await.is_err() {
                return;
            }
            let why = match (self.dial)().await {
                Ok(stream) => match self.attached(stream, &mut backoff).await {
                    End::Lost(why) => why,
                    End::Renewed => continue,
                    End::Over => return,
                },
                Err(why) => why,
            };
            if self.tell.send(Event::Stale { why }).await.is_err() {
                return;
            }
            let again = backoff.handle_failure(Instant::now());
            tokio::select! {
                () = tokio::time::sleep_until(again.into()) => {}
                () = self.retry_now.notified() => backoff.handle_network_change(),
                Some(answer) = self.leaves.recv() => {
                    let _ = answer.send(Err("the gateway cannot be reached".into()));
                }
            }
        }
    }

    async fn attached(&mut self, stream: Box<dyn Stream>, backoff: &mut Backoff) -> End {
        let (mut input, mut output) = tokio::io::split(stream);
        let Some(record) = self.records.borrow_and_update().clone() else { return End::Lost("no record yet".into()) };
        let joins = self.invitation.is_some();
        let first = match &self.invitation {
            Some(Invitation { id, secret }) => {
                ToGateway::Join { version: VERSION, token: *id, secret: secret.clone(), record }
            }
            None => ToGateway::Attach { version: VERSION, record },
        };
        if let Err(error) = frames::write(&mut output, &first, MAX_FRAME).await {
            return lost(&error);
        }
        match frames::read_within::<FromGateway>(&mut input, MAX_FRAME, OPEN_PATIENCE).await {
            Ok(message) => {
                backoff.handle_connected(Instant::now());
                if let Some(end) = self.heard(message).await {
                    return end;
                }
            }
            Err(error) => return lost(&error),
        }
        // Reading is not cancel-safe, so it has its own task; one message waits at most.
        let (heard, mut messages) = mpsc::channel(1);
        let reading = tokio::spawn(async move {
            loop {
                let message = frames::read::<FromGateway>(&mut input, MAX_FRAME).await;
                let ended = message.is_err();
                if heard.send(message).await.is_err() || ended {
                    break;
                }
            }
        });
        let exchange = self.exchange(&mut output, &mut messages);
        let end = if joins {
            tokio::time::timeout(RENEW_AFTER, exchange).await.unwrap_or(End::Renewed)
        } else {
            exchange.await
        };
        reading.abort();
        end
    }

    async fn exchange(
        &mut self,
        output: &mut (impl AsyncWrite + Unpin),
        messages: &mut mpsc::Receiver<Result<FromGateway, StreamError>>,
    ) -> End {
        let mut leaving = None;
        loop {
            tokio::select! {
                message = messages.recv() => match message.unwrap_or(Err(StreamError::Closed)) {
                    Ok(message) => {
                        if let Some(end) = self.answered(message, &mut leaving).await {
                            return end;
                        }
                    }
                    Err(error) => return lost(&error),
                },
                changed = self.records.changed() => {
                    if changed.is_err() {
                        return End::Over;
                    }
                    let Some(record) = self.records.borrow_and_update().clone() else { continue };
                    if let Err(error) = frames::write(output, &ToGateway::Publish { record }, MAX_FRAME).await {
                        return lost(&error);
                    }
                }
                Some(answer) = self.leaves.recv() => {
                    leaving = Some(answer);
                    if let Err(error) = frames::write(output, &ToGateway::Leave, MAX_FRAME).await {
                        return lost(&error);
                    }
                }
            }
        }
    }

    async fn answered(
        &mut self,
        message: FromGateway,
        leaving: &mut Option<oneshot::Sender<Result<(), String>>>,
    ) -> Option<End> {
        match (&message, leaving.is_some()) {
            (FromGateway::Left, true) => {
                let _ = leaving.take()?.send(Ok(()));
                Some(End::Over)
            }
            (FromGateway::Refused(refusal), true) => {
                // A node that is being removed hears so; it is gone all the same.
                let gone = refusal.code == "not-member";
                let _ = leaving.take()?.send(if gone { Ok(()) } else { Err(refusal.to_string()) });
                if gone { Some(End::Over) } else { None }
            }
            _ => self.heard(message).await,
        }
    }

    async fn heard(&mut self, message: FromGateway) -> Option<End> {
        let event = match message {
            FromGateway::Joined { approval } => {
                self.invitation = None;
                Event::Joined(approval)
            }
            FromGateway::Snapshot { network, entries, peers } => Event::Snapshot { network, entries, peers },
            FromGateway::Changed { entry } => Event::Changed(Box::new(entry)),
            FromGateway::Removed { name } => Event::Removed(name),
            FromGateway::PeerChanged { peer } => Event::PeerChanged(Box::new(peer)),
            FromGateway::PeerRemoved { name } => Event::PeerRemoved(name),
            FromGateway::Network { network } => Event::Network(network),
            FromGateway::Observed { address } => Event::Observed(address),
            FromGateway::Published { .. } | FromGateway::Left => return None,
            FromGateway::Refused(refusal) => return self.refused(refusal).await,
        };
        self.tell.send(event).await.err().map(|_| End::Over)
    }

    async fn refused(&mut self, refusal: Refusal) -> Option<End> {
        match refusal.code.as_str() {
            // These pass: the control plane is slowed, its disk full, or our own newer record overtook this one.
            "slow-down" | "registry-unavailable" => Some(End::Lost(refusal.to_string())),
            "stale-record" => {
                tracing::warn!("{}", refusal.message);
                None
            }
            _ => {
                let _ = self.tell.send(Event::Refused(refusal)).await;
                Some(End::Over)
            }
        }
    }
}

fn lost(error: &StreamError) -> End {
    End::Lost(format!("the session with the gateway: {error}"))
}
