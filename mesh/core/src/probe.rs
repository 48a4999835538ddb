//! The probe datagram, authenticated with a key that both ends derive.
//!
//! Probes find out whether two nodes reach each other over a path, how fast, and from which address. They share the
//! UDP port with WireGuard (first byte 1 to 4), STUN (0 and 1) and QUIC (0x40 and up), so their first byte is 5:
//!
//! ```text
//! 0           4         5      6          8          16       28       28+n         len-16     len
//! +-----------+---------+------+----------+----------+--------+--------+------------+----------+
//! | 05 'KSP'  | version | kind | n, u16   | key hint | txid   | body   | zeros      | MAC      |
//! +-----------+---------+------+----------+----------+--------+--------+------------+----------+
//!
//! Ping   1   flags (1: the sender wants the path)          padded, to see whether a full-size packet passes
//! Pong   2   where the ping was seen to come from          echoes the ping's txid
//! Punch  3   flags (1: answers a punch), count, addresses  "probe me at these, I am probing you"
//!
//! address:   4, IPv4, port   |   6, IPv6, port   |   0 (Pong only: the ping came through a relay)
//! ```
//!
//! Integers are big-endian. The MAC is HMAC-SHA256 (RFC 2104) over everything before it, truncated to its first 16
//! bytes. The key is one per pair of nodes; the *key hint*, a hash of the sender's WireGuard key, tells the receiver
//! which pair's key to verify with, and makes a probe that is reflected to its sender one from nobody it knows.
//!
//! Reading is in two steps, so that a datagram from an unknown sender costs a few comparisons and no cryptography:
//! [`Unverified::parse`], a lookup of [`Unverified::sender`], [`Unverified::verify`].
//!
//! **Replay.** The MAC does not prove freshness: a probe that somebody recorded can be sent again, from any address.
//! Only a pong proves something, because it echoes a transaction id that was drawn for the occasion. A ping or a
//! punch makes its receiver answer and probe, never send traffic.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use hmac::{Hmac, Mac as _};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::key::{PrivateKey, PublicKey};

/// What a probe begins with.
pub const MAGIC: [u8; 4] = [0x05, b'K', b'S', b'P'];
/// The version that this crate speaks.
pub const VERSION: u8 = 1;
/// Addresses in one punch at most.
pub const MAX_PUNCH_ADDRESSES: usize = 8;

const HEADER_LEN: usize = 28;
const MAC_LEN: usize = 16;
const KEY_LABEL: &[u8] = b"keystone-mesh 1 probe";
const HINT_LABEL: &[u8] = b"keystone-mesh 1 probe hint";
const FLAG_WANTED: u8 = 1;
const FLAG_ANSWER: u8 = 1;

/// UDP payload of a WireGuard data message that carries a packet of `mtu` bytes: 16 bytes of header and 16 of tag.
/// The size to which pings are padded.
pub fn full_size(mtu: u16) -> u16 {
    mtu.saturating_add(32)
}

/// Whether a datagram claims to be a probe. For the demultiplexer.
pub fn is_probe(datagram: &[u8]) -> bool {
    datagram.starts_with(&MAGIC)
}

/// Why a datagram is no acceptable probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// It does not begin with [`MAGIC`].
    #[error("not a probe")]
    NotAProbe,
    /// It ends before its fields do.
    #[error("probe of {actual} bytes where at least {wanted} are expected")]
    Truncated {
        /// Bytes that the fields need.
        wanted: usize,
        /// Bytes there are.
        actual: usize,
    },
    /// Another version than [`VERSION`].
    #[error("probe of version {0}; this node speaks version {VERSION}")]
    Version(u8),
    /// A kind that does not exist in this version.
    #[error("probe of unknown kind {0}")]
    Kind(u8),
    /// Not made with the key of this pair of nodes, or changed on the way.
    #[error("probe does not authenticate")]
    BadMac,
    /// Authentic, but its body does not parse: the peer has a fault.
    #[error("authentic probe with a malformed body: {0}")]
    Body(&'static str),
}

/// The key with which two nodes authenticate their probes.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct ProbeKey([u8; 32]);

impl ProbeKey {
    /// Derives the pair's key; both ends get the same. None if `peer` is a low-order point (no honest key is).
    pub fn agree(own: &PrivateKey, peer: &PublicKey) -> Option<Self> {
        own.agree(peer).map(|secret| Self(secret.derive(KEY_LABEL)))
    }

    fn mac(&self, message: &[u8]) -> [u8; MAC_LEN] {
        let mut hmac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        hmac.update(message);
        let full = hmac.finalize().into_bytes();
        let mut mac = [0; MAC_LEN];
        mac.copy_from_slice(&full[..MAC_LEN]);
        mac
    }
}

impl fmt::Debug for ProbeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProbeKey(..)")
    }
}

/// Names the sender's WireGuard key to those who know it: 8 bytes of a hash.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyHint([u8; 8]);

impl KeyHint {
    /// The hint of a key.
    pub fn of(key: &PublicKey) -> Self {
        let digest = Sha256::new().chain_update(HINT_LABEL).chain_update(key.as_bytes()).finalize();
        let mut hint = [0; 8];
        hint.copy_from_slice(&digest[..8]);
        Self(hint)
    }
}

impl fmt::Debug for KeyHint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyHint({:016x})", u64::from_be_bytes(self.0))
    }
}

/// Ties a pong to its ping.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TxId(pub [u8; 12]);

impl fmt::Debug for TxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TxId(")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        write!(f, ")")
    }
}

/// What a probe says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// "Do you hear me here?"
    Ping {
        /// The sender has traffic for the path or wants it ready; false where it only keeps up its half of one.
        wanted: bool,
    },
    /// "Yes." Echoes the transaction id of the ping.
    Pong {
        /// The address that the ping came from; none if it came through a relay.
        seen: Option<SocketAddr>,
    },
    /// "Probe me now at these addresses, while I probe you": sent through the relay.
    Punch {
        /// Whether it answers a punch. Answers are not answered.
        answer: bool,
        /// At most [`MAX_PUNCH_ADDRESSES`]; the rest is not sent.
        addresses: Vec<SocketAddr>,
    },
}

/// One probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Whose it is.
    pub sender: KeyHint,
    /// Drawn by whoever asks, echoed by whoever answers.
    pub txid: TxId,
    /// What it says.
    pub message: Message,
}

impl Probe {
    /// The datagram, padded with zeros to `len` bytes where it is shorter.
    pub fn encode(&self, key: &ProbeKey, len: u16) -> Vec<u8> {
        let mut body = Vec::new();
        let kind = encode_message(&self.message, &mut body);
        let body_len = u16::try_from(body.len()).expect("eight addresses are the longest body");

        let mut out = Vec::with_capacity(usize::from(len).max(HEADER_LEN + body.len() + MAC_LEN));
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[VERSION, kind]);
        out.extend_from_slice(&body_len.to_be_bytes());
        out.extend_from_slice(&self.sender.0);
        out.extend_from_slice(&self.txid.0);
        out.extend_from_slice(&body);
        out.resize(out.len().max(usize::from(len).saturating_sub(MAC_LEN)), 0);
        let mac = key.mac(&out);
        out.extend_from_slice(&mac);
        out
    }
}

/// A datagram that has the shape of a probe. Says only who may have sent it.
#[derive(Clone, Copy, Debug)]
pub struct Unverified<'a> {
    kind: Kind,
    sender: KeyHint,
    txid: TxId,
    body: &'a [u8],
    authenticated: &'a [u8],
    mac: &'a [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ping = 1,
    Pong = 2,
    Punch = 3,
}

impl<'a> Unverified<'a> {
    /// Checks the shape. Reads the header only, allocates nothing.
    pub fn parse(datagram: &'a [u8]) -> Result<Self, ProbeError> {
        if !is_probe(datagram) {
            return Err(ProbeError::NotAProbe);
        }
        let truncated = |wanted| ProbeError::Truncated { wanted, actual: datagram.len() };
        let (header, rest) =
            datagram.split_first_chunk::<HEADER_LEN>().ok_or_else(|| truncated(HEADER_LEN + MAC_LEN))?;
        let [_, _, _, _, version, kind, len_high, len_low, fields @ ..] = header;
        if *version != VERSION {
            return Err(ProbeError::Version(*version));
        }
        let kind = match *kind {
            1 => Kind::Ping,
            2 => Kind::Pong,
            3 => Kind::Punch,
            other => return Err(ProbeError::Kind(other)),
        };
        let body_len = usize::from(u16::from_be_bytes([*len_high, *len_low]));
        if rest.len() < body_len + MAC_LEN {
            return Err(truncated(HEADER_LEN + body_len + MAC_LEN));
        }
        let (hint, txid) = fields.split_at(8);
        let (authenticated, mac) = datagram.split_at(datagram.len() - MAC_LEN);
        Ok(Self {
            kind,
            sender: KeyHint(hint.try_into().expect("the split is at 8 bytes")),
            txid: TxId(txid.try_into().expect("the header leaves 12 bytes")),
            body: &rest[..body_len],
            authenticated,
            mac,
        })
    }

    /// Whose key to verify with.
    pub fn sender(&self) -> KeyHint {
        self.sender
    }

    /// Checks the MAC in constant time, then reads the body.
    pub fn verify(&self, key: &ProbeKey) -> Result<Probe, ProbeError> {
        if !bool::from(key.mac(self.authenticated).ct_eq(self.mac)) {
            return Err(ProbeError::BadMac);
        }
        let message = decode_message(self.kind, self.body)?;
        Ok(Probe { sender: self.sender, txid: self.txid, message })
    }
}

// --- bodies ---

fn encode_message(message: &Message, body: &mut Vec<u8>) -> u8 {
    let kind = match message {
        Message::Ping { wanted } => {
            body.push(if *wanted { FLAG_WANTED } else { 0 });
            Kind::Ping
        }
        Message::Pong { seen } => {
            match seen {
                Some(addr) => encode_address(*addr, body),
                None => body.push(0),
            }
            Kind::Pong
        }
        Message::Punch { answer, addresses } => {
            body.push(if *answer { FLAG_ANSWER } else { 0 });
            let sent = &addresses[..addresses.len().min(MAX_PUNCH_ADDRESSES)];
            body.push(u8::try_from(sent.len()).expect("eight fit a byte"));
            sent.iter().for_each(|addr| encode_address(*addr, body));
            Kind::Punch
        }
    };
    kind as u8
}

fn encode_address(addr: SocketAddr, body: &mut Vec<u8>) {
    match addr.ip() {
        IpAddr::V4(ip) => {
            body.push(4);
            body.extend_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            body.push(6);
            body.extend_from_slice(&ip.octets());
        }
    }
    body.extend_from_slice(&addr.port().to_be_bytes());
}

fn decode_message(kind: Kind, body: &[u8]) -> Result<Message, ProbeError> {
    let mut body = Body(body);
    let message = match kind {
        // Flags that this version does not know are ignored: they may only ever be hints.
        Kind::Ping => Message::Ping { wanted: body.byte()? & FLAG_WANTED != 0 },
        Kind::Pong => match body.byte()? {
            0 => Message::Pong { seen: None },
            family => Message::Pong { seen: Some(body.address(family)?) },
        },
        Kind::Punch => {
            let answer = body.byte()? & FLAG_ANSWER != 0;
            let count = usize::from(body.byte()?);
            if count > MAX_PUNCH_ADDRESSES {
                return Err(ProbeError::Body("more than 8 addresses"));
            }
            let address = |_| {
                let family = body.byte()?;
                body.address(family)
            };
            Message::Punch { answer, addresses: (0..count).map(address).collect::<Result<_, _>>()? }
        }
    };
    if body.0.is_empty() { Ok(message) } else { Err(ProbeError::Body("bytes after its end")) }
}

/// What is left to read of a body.
struct Body<'a>(&'a [u8]);

impl Body<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], ProbeError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(ProbeError::Body("it ends early"))?;
        self.0 = rest;
        Ok(*taken)
    }

    fn byte(&mut self) -> Result<u8, ProbeError> {
        let [byte] = self.take()?;
        Ok(byte)
    }

    fn address(&mut self, family: u8) -> Result<SocketAddr, ProbeError> {
        let ip = match family {
            4 => IpAddr::from(self.take::<4>()?),
            // One form per address: an IPv4-mapped IPv6 address would compare unequal to the IPv4 address it means.
            6 => IpAddr::from(self.take::<16>()?).to_canonical(),
            _ => return Err(ProbeError::Body("an address that is neither IPv4 nor IPv6")),
        };
        Ok(SocketAddr::new(ip, u16::from_be_bytes(self.take()?)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::key::Secret;

    fn keys() -> (ProbeKey, ProbeKey, KeyHint) {
        let (a, b) = (Secret::from_bytes([1; 32]).wireguard(0), Secret::from_bytes([2; 32]).wireguard(0));
        let at_a = ProbeKey::agree(&a, &b.public_key()).unwrap();
        let at_b = ProbeKey::agree(&b, &a.public_key()).unwrap();
        (at_a, at_b, KeyHint::of(&a.public_key()))
    }

    fn addresses() -> impl Strategy<Value = SocketAddr> {
        let v4 = any::<([u8; 4], u16)>().prop_map(|(ip, port)| SocketAddr::from((ip, port)));
        let v6 = any::<([u8; 16], u16)>().prop_map(|(ip, port)| SocketAddr::new(IpAddr::from(ip).to_canonical(), port));
        prop_oneof![v4, v6]
    }

    fn messages() -> impl Strategy<Value = Message> {
        prop_oneof![
            any::<bool>().prop_map(|wanted| Message::Ping { wanted }),
            proptest::option::of(addresses()).prop_map(|seen| Message::Pong { seen }),
            (any::<bool>(), vec(addresses(), 0..=MAX_PUNCH_ADDRESSES))
                .prop_map(|(answer, addresses)| Message::Punch { answer, addresses }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_probe_round_trips_at_any_size(message in messages(), txid: [u8; 12], len in 0..1600u16) {
            let (at_a, at_b, sender) = keys();
            let probe = Probe { sender, txid: TxId(txid), message };
            let datagram = probe.encode(&at_a, len);
            prop_assert!(datagram.len() >= usize::from(len));
            let read = Unverified::parse(&datagram).unwrap();
            prop_assert_eq!(read.sender(), sender);
            prop_assert_eq!(read.verify(&at_b), Ok(probe));
        }

        #[test]
        fn any_flipped_bit_is_refused(message in messages(), len in 0..300u16, at: prop::sample::Index, bit in 0..8u8) {
            let (key, _, sender) = keys();
            let mut datagram = Probe { sender, txid: TxId([7; 12]), message }.encode(&key, len);
            let at = at.index(datagram.len());
            datagram[at] ^= 1 << bit;
            prop_assert!(Unverified::parse(&datagram).and_then(|probe| probe.verify(&key)).is_err());
        }

        #[test]
        fn random_bytes_never_panic(bytes in vec(any::<u8>(), 0..200), kind in 0..5u8) {
            let (key, ..) = keys();
            let _ = Unverified::parse(&bytes).and_then(|probe| probe.verify(&key));
            let shaped = [&MAGIC[..], &[VERSION, kind], &bytes].concat();
            let _ = Unverified::parse(&shaped).and_then(|probe| probe.verify(&key));
        }

        #[test]
        fn an_authentic_random_body_never_panics(body in vec(any::<u8>(), 0..200)) {
            for kind in [Kind::Ping, Kind::Pong, Kind::Punch] {
                let _ = decode_message(kind, &body);
            }
        }

        #[test]
        fn every_truncation_is_refused(message in messages(), cut: prop::sample::Index) {
            let (key, _, sender) = keys();
            let datagram = Probe { sender, txid: TxId([7; 12]), message }.encode(&key, 0);
            let short = &datagram[..cut.index(datagram.len())];
            prop_assert!(Unverified::parse(short).and_then(|probe| probe.verify(&key)).is_err());
        }
    }

    #[test]
    fn the_form_on_the_wire_is_fixed() {
        let probe = Probe {
            sender: KeyHint([0xaa; 8]),
            txid: TxId([0xbb; 12]),
            message: Message::Pong { seen: Some("192.0.2.7:51840".parse().unwrap()) },
        };
        let datagram = probe.encode(&ProbeKey([0; 32]), 0);
        let expected = "054b535001020007aaaaaaaaaaaaaaaabbbbbbbbbbbbbbbbbbbbbbbb04c0000207ca80";
        assert_eq!(data_encoding::HEXLOWER.encode(&datagram[..35]), expected);
        assert_eq!(datagram.len(), 35 + MAC_LEN);
    }

    #[test]
    fn a_probe_for_another_pair_is_refused() {
        let (key, _, sender) = keys();
        let datagram = Probe { sender, txid: TxId([7; 12]), message: Message::Ping { wanted: true } }.encode(&key, 0);
        let probe = Unverified::parse(&datagram).unwrap();
        assert_eq!(probe.verify(&ProbeKey([9; 32])), Err(ProbeError::BadMac));
    }

    #[test]
    fn other_protocols_of_the_port_are_no_probes() {
        for first in [0u8, 1, 2, 3, 4, 0x40, 0xc0] {
            assert_eq!(Unverified::parse(&[first; 64]).unwrap_err(), ProbeError::NotAProbe);
        }
    }

    #[test]
    fn a_full_size_ping_is_as_large_as_a_full_size_wireguard_packet() {
        let (key, _, sender) = keys();
        let ping = Probe { sender, txid: TxId([7; 12]), message: Message::Ping { wanted: true } };
        assert_eq!(ping.encode(&key, full_size(1420)).len(), 1420 + 32);
    }

    #[test]
    fn debug_shows_no_key() {
        assert_eq!(format!("{:?}", keys().0), "ProbeKey(..)");
    }
}
