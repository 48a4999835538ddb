//! What is said on the streams of a relay connection, each message a frame of [`wire`](crate::wire).
//!
//! ```text
//!   control stream, opened by the client, open as long as the connection:
//!     client  Hello, then CheckAddress whenever it likes
//!     relay   Welcome or Refused, then Observed when the client's address changes or was asked for
//!   splice, opened by the client:       client  Connect     relay  Spliced or Refused     then bytes
//!   splice, opened to the control plane:  relay  Incoming                                 then bytes
//! ```

use std::net::SocketAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::admission::Role;
use crate::key::NodeId;

/// The version of these messages.
pub const VERSION: u16 = 1;
/// The largest message on a relay's streams, in bytes: a credential and little else.
pub const MAX_MESSAGE: usize = 16 * 1024;

/// Why a relay refused, for machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The relay does not speak the client's version.
    UnsupportedVersion,
    /// The credential is not valid for this client and network.
    BadCredential,
    /// The client may not do this.
    NotAllowed,
    /// A limit is reached; later it may work.
    Busy,
    /// The control plane is not connected to this relay.
    NotConnected,
    /// Not a message that is expected here.
    Malformed,
}

/// A refusal with its reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// For machines.
    pub code: Code,
    /// For people: what was wrong, and what to do.
    pub message: String,
}

/// From a client, on the control stream or as a splice's first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ClientMessage {
    /// Opens the connection.
    Hello {
        /// [`VERSION`].
        version: u16,
        /// The approval, where there is one.
        credential: Option<Credential>,
        /// Whether to exchange datagrams. Without, the connection only carries splices and takes no one's place.
        datagrams: bool,
    },
    /// Asks for an [`RelayMessage::Observed`]: the client's network may have changed.
    CheckAddress {},
    /// Opens a splice.
    Connect {
        /// Whom to reach: the network key.
        to: NodeId,
    },
}

/// From the relay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum RelayMessage {
    /// The client is admitted.
    Welcome {
        /// [`VERSION`].
        version: u16,
        /// The client's address as the relay sees it: its reflexive candidate.
        observed: SocketAddr,
        /// What the client is to the relay.
        role: Role,
        /// The largest packet that is forwarded, in bytes.
        max_packet: usize,
    },
    /// The client's address as the relay sees it.
    Observed {
        /// The address.
        addr: SocketAddr,
    },
    /// The splice reached the control plane.
    Spliced {},
    /// To the control plane: the first message of a stream from a client.
    Incoming {
        /// The client's identity, as the relay authenticated it. Proof is the TLS inside.
        from: NodeId,
        /// The client's address as the relay sees it.
        addr: SocketAddr,
    },
    /// No.
    Refused(Refusal),
}

/// Codes of QUIC's CONNECTION_CLOSE and RESET_STREAM between clients and relays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseCode {
    /// The end was wanted.
    Done = 0,
    /// Something was said that is not in the protocol.
    Malformed = 1,
    /// The client was refused; the reason was sent as a message.
    Refused = 2,
    /// Another connection with this identity took the place.
    Replaced = 3,
    /// The time that was granted is over, or a message did not come in time.
    Timeout = 4,
    /// A limit is reached.
    Busy = 5,
}

impl CloseCode {
    /// The number on the wire.
    pub fn number(self) -> u32 {
        self as u32
    }
}

/// An approval as opaque bytes; Base64 in JSON.
#[derive(Clone, PartialEq, Eq)]
pub struct Credential(pub Vec<u8>);

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credential({} bytes)", self.0.len())
    }
}

impl Serialize for Credential {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&BASE64.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Credential {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        BASE64.decode(&text).map(Self).map_err(|_| serde::de::Error::custom("a credential is Base64"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire;
    use proptest::prelude::*;

    fn round_trip<T: Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug>(message: &T) {
        let frame = wire::encode(message, MAX_MESSAGE).unwrap();
        assert_eq!(&wire::decode_message::<T>(&frame[wire::LENGTH_BYTES..]).unwrap(), message);
    }

    #[test]
    fn messages_round_trip() {
        let id = crate::key::Secret::from_bytes([1; 32]).identity().id();
        let addr = "192.0.2.1:7".parse().unwrap();
        let refusal = Refusal { code: Code::Busy, message: "later".into() };
        round_trip(&ClientMessage::Hello {
            version: VERSION,
            credential: Some(Credential(vec![1, 2])),
            datagrams: true,
        });
        round_trip(&ClientMessage::CheckAddress {});
        round_trip(&ClientMessage::Connect { to: id });
        round_trip(&RelayMessage::Welcome { version: VERSION, observed: addr, role: Role::Node, max_packet: 9 });
        round_trip(&RelayMessage::Observed { addr });
        round_trip(&RelayMessage::Spliced {});
        round_trip(&RelayMessage::Incoming { from: id, addr });
        round_trip(&RelayMessage::Refused(refusal));
    }

    proptest! {
        #[test]
        fn rubbish_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = wire::decode_message::<ClientMessage>(&bytes);
            let _ = wire::decode_message::<RelayMessage>(&bytes);
        }
    }
}
