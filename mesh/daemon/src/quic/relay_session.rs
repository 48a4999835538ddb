//! One connection to a relay, from the client's end: greeting, then streams.

use std::net::SocketAddr;
use std::time::Duration;

use keystone_mesh_core::NodeId;
use keystone_mesh_core::relay::message::{ClientMessage, CloseCode, Credential, MAX_MESSAGE, RelayMessage, VERSION};
use keystone_mesh_core::relay::{Refusal, RelayAddr, Role};
use quinn::{Connection, ConnectionError, RecvStream, SendStream};

use super::endpoint::{QuicEndpoint, canonical};
use super::frames::{self, StreamError};
use super::reach::{self, ReachError};
use super::splice::ByteStream;
use super::tls::Protocol;

/// How long a relay may take to answer on a stream.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a relay is of no use.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// No connection.
    #[error(transparent)]
    Unreachable(#[from] ReachError),
    /// The relay says no.
    #[error("the relay refused: {0}")]
    Refused(#[source] Refusal),
    /// The relay ended the connection.
    #[error("the connection to the relay ended: {}", why_closed(.0))]
    Closed(ConnectionError),
    /// The relay did not keep to the protocol, or the stream to it failed.
    #[error("talking to the relay: {0}")]
    Stream(#[source] StreamError),
    /// The relay answered something else.
    #[error("the relay answered {0} where it should not")]
    Unexpected(&'static str),
}

/// A connection on which the relay has said welcome.
#[derive(Debug)]
pub struct RelaySession {
    /// The connection; it lasts as long as the session.
    pub connection: Connection,
    /// The control stream towards the relay.
    pub control: SendStream,
    /// The control stream from the relay.
    pub answers: RecvStream,
    /// This end's address as the relay sees it.
    pub observed: SocketAddr,
    /// What this end is to the relay.
    pub role: Role,
}

impl RelaySession {
    /// Connects to a relay and greets it. Without `datagrams` the session only carries splices and takes the place of
    /// no other session of this identity.
    pub async fn open(
        endpoint: &QuicEndpoint,
        relay: &RelayAddr,
        credential: Option<Vec<u8>>,
        datagrams: bool,
    ) -> Result<Self, RelayError> {
        let connection = reach::connect_any(endpoint, &relay.addrs, relay.id, Protocol::Relay).await?.connection;
        let greeting = Self::greet(&connection, credential, datagrams);
        let greeted = greeting.await;
        // The reason of a closed connection says more than that of the stream that broke with it.
        greeted.map_err(|error| match (error, connection.close_reason()) {
            (RelayError::Stream(_), Some(reason)) => RelayError::Closed(reason),
            (error, _) => error,
        })
    }

    async fn greet(connection: &Connection, credential: Option<Vec<u8>>, datagrams: bool) -> Result<Self, RelayError> {
        let (mut control, mut answers) = connection.open_bi().await.map_err(RelayError::Closed)?;
        let hello = ClientMessage::Hello { version: VERSION, credential: credential.map(Credential), datagrams };
        frames::write(&mut control, &hello, MAX_MESSAGE).await.map_err(RelayError::Stream)?;
        let answer = frames::read_within(&mut answers, MAX_MESSAGE, ANSWER_TIMEOUT).await;
        let answer = answer.map_err(RelayError::Stream)?;
        let RelayMessage::Welcome { version: _, observed, role, max_packet: _ } = answer else {
            return Err(unexpected(answer));
        };
        Ok(Self { connection: connection.clone(), control, answers, observed: canonical(observed), role })
    }

    /// Opens a splice to the network key through this session.
    pub async fn splice(&self, network: NodeId) -> Result<Box<dyn ByteStream>, RelayError> {
        splice(&self.connection, network).await
    }

    /// Ends the session in order.
    pub fn close(&self) {
        self.connection.close(CloseCode::Done.number().into(), b"done");
    }
}

/// Opens a splice to the network key through a connection that has been welcomed.
pub(crate) async fn splice(connection: &Connection, network: NodeId) -> Result<Box<dyn ByteStream>, RelayError> {
    let (mut send, mut receive) = connection.open_bi().await.map_err(RelayError::Closed)?;
    let connect = ClientMessage::Connect { to: network };
    frames::write(&mut send, &connect, MAX_MESSAGE).await.map_err(RelayError::Stream)?;
    let answer = frames::read_within(&mut receive, MAX_MESSAGE, ANSWER_TIMEOUT).await.map_err(RelayError::Stream)?;
    let RelayMessage::Spliced {} = answer else { return Err(unexpected(answer)) };
    Ok(Box::new(tokio::io::join(receive, send)))
}

fn unexpected(message: RelayMessage) -> RelayError {
    RelayError::Unexpected(match message {
        RelayMessage::Refused(refusal) => return RelayError::Refused(refusal),
        RelayMessage::Welcome { .. } => "Welcome",
        RelayMessage::Observed { .. } => "Observed",
        RelayMessage::Spliced {} => "Spliced",
        RelayMessage::Incoming { .. } => "Incoming",
    })
}

/// The reason of a close in words.
pub(crate) fn why_closed(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ApplicationClosed(close) if !close.reason.is_empty() => {
            String::from_utf8_lossy(&close.reason).chars().filter(|c| !c.is_control()).take(200).collect()
        }
        ConnectionError::TimedOut => "no answer for 30 s".into(),
        ConnectionError::ApplicationClosed(_)
        | ConnectionError::VersionMismatch
        | ConnectionError::TransportError(_)
        | ConnectionError::ConnectionClosed(_)
        | ConnectionError::Reset
        | ConnectionError::LocallyClosed
        | ConnectionError::CidsExhausted => error.to_string(),
    }
}
