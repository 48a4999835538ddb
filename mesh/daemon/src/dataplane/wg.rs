//! The WireGuard engine: the one place that knows boringtun.
//!
//! An [`Engine`] is our end of all tunnels: the private key, and the guard before handshakes. A [`Tunnel`] is the
//! cryptographic state with one peer; it takes 11 KiB, so it exists only while it is of use.
//!
//! boringtun counts 24 bits of an index as the peer's and 8 as the session's. What stands in the 24 bits is ours to
//! choose; see [`super::table::PeerIndex`].

use std::net::IpAddr;
use std::sync::Arc;

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use boringtun::x25519;
use keystone_mesh_core::{DropReason, PresharedKey, PrivateKey, PublicKey};

use super::table::PeerIndex;

/// What sealing adds to a packet: type, receiver, counter (16 bytes) and tag (16 bytes).
pub(crate) const OVERHEAD: usize = 32;
/// Bytes of a handshake initiation, the longest message beside data.
pub(crate) const INITIATION_LEN: usize = 148;
const RESPONSE_LEN: usize = 92;
const COOKIE_REPLY_LEN: usize = 64;

/// Handshakes per second that are answered without asking for a cookie: about what one core can do (370 us each), so
/// that cookies, each of which costs an honest peer seconds, come only when there is no other way.
const HANDSHAKES_PER_SECOND: u64 = 2500;

/// Counters from here on are never used (WireGuard paper, section 6.1); boringtun leaves the check to us.
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// A datagram by its type and receiver; its contents are not checked yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// For no session yet.
    Initiation,
    /// Answers our initiation.
    Response(PeerIndex),
    /// Answers our initiation with a cookie.
    CookieReply(PeerIndex),
    /// A sealed packet.
    Data(PeerIndex),
}

impl Message {
    /// Reads type and receiver; none where the length does not fit the type.
    pub(crate) fn parse(datagram: &[u8]) -> Option<Self> {
        let index = |at: usize| Some(PeerIndex::from_wire(*datagram.get(at..)?.first_chunk()?));
        match (*datagram.first()?, datagram.len()) {
            (1, INITIATION_LEN) => Some(Self::Initiation),
            (2, RESPONSE_LEN) => Some(Self::Response(index(8)?)),
            (3, COOKIE_REPLY_LEN) => Some(Self::CookieReply(index(4)?)),
            (4, OVERHEAD..) => Some(Self::Data(index(4)?)),
            _ => None,
        }
    }
}

/// The receiver index of a data message, as it stands there; zeros where there is none.
pub(crate) fn receiver(message: &[u8]) -> [u8; 4] {
    message.get(4..).and_then(|rest| rest.first_chunk()).copied().unwrap_or_default()
}

/// Our end of all tunnels.
pub(crate) struct Engine {
    private: x25519::StaticSecret,
    public: x25519::PublicKey,
    guard: RateLimiter,
    /// boringtun checks a handshake again inside the tunnel; this one never finds itself under load.
    no_limit: Arc<RateLimiter>,
}

impl Engine {
    pub(crate) fn new(key: &PrivateKey) -> Self {
        let private = x25519::StaticSecret::from(*key.as_bytes());
        let public = x25519::PublicKey::from(&private);
        let guard = RateLimiter::new(&public, HANDSHAKES_PER_SECOND);
        let no_limit = Arc::new(RateLimiter::new(&public, u64::MAX));
        Self { private, public, guard, no_limit }
    }

    /// Checks a handshake message's MACs, before anything dear is done. `Err` holds either why it is refused, or the
    /// length of the cookie reply written to `out`.
    pub(crate) fn admit(&self, from: Option<IpAddr>, message: &[u8], out: &mut [u8]) -> Result<(), Refusal> {
        self.guard.reset_count();
        match self.guard.verify_packet(from, message, out) {
            Ok(_) => Ok(()),
            Err(TunnResult::WriteToNetwork(cookie)) => Err(Refusal::Cookie(cookie.len())),
            Err(TunnResult::Err(error)) => Err(Refusal::Drop(reason(&error, DropReason::BadMac))),
            Err(TunnResult::Done | TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..)) => {
                Err(Refusal::Drop(DropReason::MalformedWireGuard))
            }
        }
    }

    /// The key that an initiation claims to come from. That it holds the key is proven only by the handshake.
    pub(crate) fn initiator(&self, message: &[u8]) -> Result<PublicKey, DropReason> {
        let Ok(Packet::HandshakeInit(initiation)) = Tunn::parse_incoming_packet(message) else {
            return Err(DropReason::MalformedWireGuard);
        };
        let half = parse_handshake_anon(&self.private, &self.public, &initiation);
        half.map(|half| PublicKey::from_bytes(half.peer_static_public)).map_err(|_| DropReason::BadHandshake)
    }

    /// A tunnel without a session.
    pub(crate) fn tunnel(&self, peer: &PublicKey, psk: Option<&PresharedKey>, index: PeerIndex) -> Tunnel {
        let peer = x25519::PublicKey::from(*peer.as_bytes());
        let psk = psk.map(|psk| *psk.as_bytes());
        // Persistent keepalives are the keeper's: boringtun would send them whether the line is silent or not.
        let limiter = Some(Arc::clone(&self.no_limit));
        Tunnel(Box::new(Tunn::new(self.private.clone(), peer, psk, None, index.bits(), limiter)))
    }
}

/// Whether a message that we made is a handshake's first.
pub(crate) fn is_initiation(message: &[u8]) -> bool {
    message.first() == Some(&1)
}

/// Why a handshake message goes no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Drop(DropReason),
    /// Answer with the cookie reply of this length.
    Cookie(usize),
}

/// What became of a data message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// Authentic and empty.
    Keepalive,
    /// Authentic: so many bytes are in the output, an IP packet from this source.
    Packet(usize, IpAddr),
    Refused(DropReason),
}

/// What became of a handshake message: the length of the answer in the output, if there is one.
pub(crate) type Answer = Result<Option<usize>, DropReason>;

/// Time has passed in a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tick {
    /// Nothing to do.
    Idle,
    /// Send the message of this length in the output.
    Send(usize),
    /// Handshakes went unanswered for 90 s, or the keys are too old to keep: the tunnel has nothing left.
    Expired,
}

/// The cryptographic state with one peer.
pub(crate) struct Tunnel(Box<Tunn>);

impl Tunnel {
    /// Whether a session exists to seal packets in.
    pub(crate) fn has_session(&self) -> bool {
        self.0.time_since_last_handshake().is_some()
    }

    /// Seals a packet (or nothing, which is a keepalive) into `out`, which must have room for it and [`OVERHEAD`], and
    /// for [`INITIATION_LEN`]. Gives the length; none without a session.
    pub(crate) fn seal(&mut self, packet: &[u8], out: &mut [u8]) -> Option<usize> {
        match self.0.encapsulate(packet, out) {
            TunnResult::WriteToNetwork(sealed) if sealed.first() == Some(&4) => Some(sealed.len()),
            TunnResult::WriteToNetwork(_)
            | TunnResult::Done
            | TunnResult::Err(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => None,
        }
    }

    /// Opens a data message into `out`, which must be as long as the message.
    pub(crate) fn open(&mut self, message: &[u8], out: &mut [u8]) -> Opened {
        let counter = message.get(8..).and_then(|rest| rest.first_chunk()).map(|bytes| u64::from_le_bytes(*bytes));
        if counter.is_none_or(|counter| counter >= REJECT_AFTER_MESSAGES) {
            return Opened::Refused(DropReason::ReplayedPacket);
        }
        match self.0.decapsulate(None, message, out) {
            TunnResult::WriteToTunnelV4(packet, from) => Opened::Packet(packet.len(), from.into()),
            TunnResult::WriteToTunnelV6(packet, from) => Opened::Packet(packet.len(), from.into()),
            TunnResult::Done => Opened::Keepalive,
            TunnResult::Err(error) => Opened::Refused(reason(&error, DropReason::BadTag)),
            TunnResult::WriteToNetwork(_) => Opened::Refused(DropReason::MalformedWireGuard),
        }
    }

    /// Takes an initiation, a response or a cookie reply. `out` must have room for [`INITIATION_LEN`].
    pub(crate) fn handshake(&mut self, message: &[u8], out: &mut [u8]) -> Answer {
        match self.0.decapsulate(None, message, out) {
            TunnResult::WriteToNetwork(answer) => Ok(Some(answer.len())),
            TunnResult::Done => Ok(None),
            TunnResult::Err(error) => Err(reason(&error, DropReason::BadHandshake)),
            TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..) => Err(DropReason::BadHandshake),
        }
    }

    /// Writes an initiation into `out` and gives its length. With one on its way already: none, unless `again`.
    pub(crate) fn initiate(&mut self, out: &mut [u8], again: bool) -> Option<usize> {
        written(self.0.format_handshake_initiation(out, again))
    }

    /// Lets time pass; to be called every 250 ms, which is also the resolution of the tunnel's clock.
    pub(crate) fn tick(&mut self, out: &mut [u8]) -> Tick {
        match self.0.update_timers(out) {
            TunnResult::WriteToNetwork(message) => Tick::Send(message.len()),
            TunnResult::Err(WireGuardError::ConnectionExpired) => Tick::Expired,
            TunnResult::Done
            | TunnResult::Err(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => Tick::Idle,
        }
    }
}

fn written(result: TunnResult<'_>) -> Option<usize> {
    match result {
        TunnResult::WriteToNetwork(message) => Some(message.len()),
        TunnResult::Done | TunnResult::Err(_) | TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..) => {
            None
        }
    }
}

/// boringtun's error as a reason to drop; `bad_crypto` where the cryptography failed.
fn reason(error: &WireGuardError, bad_crypto: DropReason) -> DropReason {
    match error {
        WireGuardError::InvalidMac => DropReason::BadMac,
        WireGuardError::InvalidAeadTag => bad_crypto,
        WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter => DropReason::ReplayedPacket,
        WireGuardError::WrongTai64nTimestamp => DropReason::ReplayedHandshake,
        WireGuardError::NoCurrentSession | WireGuardError::WrongIndex => DropReason::UnknownSession,
        WireGuardError::UnderLoad => DropReason::UnderLoad,
        // What `decapsulate` says of a packet that opens well and is no IP packet.
        WireGuardError::InvalidPacket => DropReason::MalformedInner,
        WireGuardError::UnexpectedPacket
        | WireGuardError::WrongKey
        | WireGuardError::InvalidTai64nTimestamp
        | WireGuardError::ConnectionExpired
        | WireGuardError::LockFailed => DropReason::BadHandshake,
        WireGuardError::DestinationBufferTooSmall
        | WireGuardError::IncorrectPacketLength
        | WireGuardError::WrongPacketType => DropReason::MalformedWireGuard,
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn under_load_an_initiator_proves_its_address_with_a_cookie() {
        let (ours, theirs) = (PrivateKey::from_bytes([1; 32]), PrivateKey::from_bytes([2; 32]));
        let (responder, initiator) = (Engine::new(&ours), Engine::new(&theirs));
        let (here, elsewhere) = (Some("192.0.2.1".parse().unwrap()), Some("192.0.2.2".parse().unwrap()));
        let refused = Err(Refusal::Cookie(COOKIE_REPLY_LEN));
        let [mut plain, mut proven, mut cookie] = [[0; INITIATION_LEN]; 3];

        // The count starts afresh each second, so the whole is tried until it fits between two such moments.
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let mut tunnel = initiator.tunnel(&ours.public_key(), None, PeerIndex::from_wire([0, 1, 0, 0]));
            assert_eq!(tunnel.initiate(&mut plain, true), Some(INITIATION_LEN));
            while responder.admit(here, &plain, &mut cookie) != refused {
                assert!(Instant::now() < deadline, "a flood goes unnoticed");
            }
            assert_eq!(tunnel.handshake(&cookie[..COOKIE_REPLY_LEN], &mut [0; INITIATION_LEN]), Ok(None));
            assert_eq!(tunnel.initiate(&mut proven, true), Some(INITIATION_LEN));
            let answer = |from, message: &[u8]| responder.admit(from, message, &mut [0; INITIATION_LEN]);
            let with_cookie = answer(here, &proven);
            let without = [answer(here, &plain), answer(elsewhere, &proven), answer(None, &proven)];
            if without == [refused, refused, Err(Refusal::Drop(DropReason::UnderLoad))] {
                assert_eq!(with_cookie, Ok(()));
                break;
            }
            assert!(Instant::now() < deadline, "a cookie is not asked for");
        }
    }

    #[test]
    fn without_load_nobody_is_asked_for_a_cookie() {
        let (ours, theirs) = (PrivateKey::from_bytes([1; 32]), PrivateKey::from_bytes([2; 32]));
        let (responder, initiator) = (Engine::new(&ours), Engine::new(&theirs));
        let mut tunnel = initiator.tunnel(&ours.public_key(), None, PeerIndex::from_wire([0, 1, 0, 0]));
        let mut message = [0; INITIATION_LEN];
        assert_eq!(tunnel.initiate(&mut message, true), Some(INITIATION_LEN));
        for _ in 0..1000 {
            assert_eq!(responder.admit(None, &message, &mut [0; INITIATION_LEN]), Ok(()));
        }
    }
}
