//! The vocabulary that machines and drivers share.

use std::fmt;
use std::net::SocketAddr;

use ipnet::IpNet;

use crate::key::{NodeId, PresharedKey, PublicKey};

/// How a datagram travels between this node and one peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Via {
    /// Straight over UDP. The address is the peer's; IPv4 is never written as an IPv4-mapped IPv6 address.
    Direct(SocketAddr),
    /// Through the relay with this identity.
    Relay(NodeId),
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct(addr) => write!(f, "{addr}"),
            Self::Relay(id) => write!(f, "relay {}", id.short()),
        }
    }
}

/// One peer as the data plane needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerConfig {
    /// The peer's WireGuard key; names the peer in every other operation.
    pub key: PublicKey,
    /// The peer's identity: the address under which a relay knows it. None for plain WireGuard peers.
    pub identity: Option<NodeId>,
    /// Mixed into the handshake where set.
    pub preshared_key: Option<PresharedKey>,
    /// Seconds between keepalives, 1 to 65535; none sends none beyond the protocol's own.
    pub persistent_keepalive: Option<u16>,
    /// What may be sent to the peer and what it may send as source; longest prefix wins across peers.
    pub allowed_ips: Vec<IpNet>,
}

/// A change of the data plane's peers. Applied in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerOp {
    /// Adds a peer, or changes one in place: sessions survive unless the preshared key changed.
    Set(PeerConfig),
    /// Removes a peer and its sessions.
    Remove(PublicKey),
}

/// What a refusal shows of the text that it refuses: its beginning, without control characters. The text may come from
/// anyone, and the refusal goes to a person's terminal.
pub(crate) fn excerpt(text: &str) -> String {
    /// Enough to recognise it.
    const SHOWN: usize = 60;
    text.chars().take(SHOWN).flat_map(char::escape_debug).collect()
}

/// An enum of reasons, each with the stable label under which it is counted.
macro_rules! labelled {
    ($(#[$about:meta])* $enum:ident { $($(#[$doc:meta])* $name:ident = $label:literal,)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $enum { $($(#[$doc])* $name,)* }

        impl $enum {
            /// Every reason, in order of declaration.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The stable label in metrics and JSON.
            pub fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)* }
            }
        }
    };
}
pub(crate) use labelled;

labelled! {
    /// Why a packet went no further. Each is counted under its label.
    DropReason {
        /// A packet from the TUN that is neither IPv4 nor IPv6, or shorter than its header says.
        MalformedInner = "malformed_inner",
        /// No peer's allowed IPs cover the destination.
        NoRoute = "no_route",
        /// The peer has no path yet.
        NoPath = "no_path",
        /// Waiting for a handshake, and the queue for that is full.
        QueueFull = "queue_full",
        /// A datagram that is no WireGuard message, QUIC packet or probe.
        UnknownDatagram = "unknown_datagram",
        /// A WireGuard message of a wrong length or type.
        MalformedWireGuard = "malformed_wireguard",
        /// A handshake from a key that is no peer of ours.
        UnknownPeer = "unknown_peer",
        /// A probe that nobody sent who may probe this node: unknown, not authentic, or answering nothing.
        BadProbe = "bad_probe",
        /// A data packet for a session that does not exist (any more).
        UnknownSession = "unknown_session",
        /// A handshake whose MAC1 is not made for our key.
        BadMac = "bad_mac",
        /// A handshake refused because it replays an older one.
        ReplayedHandshake = "replayed_handshake",
        /// A handshake that fails its cryptography.
        BadHandshake = "bad_handshake",
        /// A data packet whose counter was seen before or is too old.
        ReplayedPacket = "replayed_packet",
        /// A data packet that does not authenticate.
        BadTag = "bad_tag",
        /// Answered with a cookie instead of a handshake because of load.
        UnderLoad = "under_load",
        /// A decrypted packet whose source is not among the sender's allowed IPs.
        SourceNotAllowed = "source_not_allowed",
        /// The queue towards QUIC is full.
        QuicQueueFull = "quic_queue_full",
        /// The queue towards the control plane (probes) is full.
        ControlQueueFull = "control_queue_full",
        /// The queue towards a relay connection is full, or the relay is not connected.
        RelayQueueFull = "relay_queue_full",
        /// The kernel did not take a datagram (buffer full, unreachable, too large).
        SendFailed = "send_failed",
        /// The kernel did not take a packet written to the TUN.
        TunWriteFailed = "tun_write_failed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_shows_little_and_nothing_that_moves_a_cursor() {
        assert_eq!(excerpt("a\u{1b}[2Jb"), "a\\u{1b}[2Jb");
        assert!(excerpt(&"\u{7f}".repeat(10_000)).len() < 1000);
    }

    #[test]
    fn drop_labels_are_unique_and_snake_case() {
        let mut labels: Vec<_> = DropReason::ALL.iter().map(|reason| reason.label()).collect();
        assert!(labels.iter().all(|l| l.chars().all(|c| c.is_ascii_lowercase() || c == '_')));
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels.len(), DropReason::ALL.len());
    }
}
