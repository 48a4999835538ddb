//! The one UDP port: WireGuard, QUIC and probes on a dual-stack socket, with segmentation offload both ways.
//!
//! WireGuard, QUIC and probes share the socket so that they share one NAT mapping. The first byte tells them apart:
//!
//! | first byte | what it is |
//! | --- | --- |
//! | 1 to 4, then three zeros | WireGuard |
//! | 5 | a probe |
//! | 0x40 and up | QUIC (RFC 9000 section 17: the fixed bit; greasing is off) |
//! | any other | unknown, counted and dropped |
//!
//! The socket is an IPv6 one that also speaks IPv4, which the kernel shows as IPv4-mapped addresses (RFC 4291 section
//! 2.5.5.2). They become plain IPv4 addresses here and never travel further in; [`quic`] is the exception, because
//! quinn wants addresses of the socket's own family.

pub mod quic;

use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::socket::{setsockopt, sockopt};
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};

use crate::lifeline::{Lifeline, Watch};

/// The first byte of every probe.
pub const PROBE_FIRST_BYTE: u8 = 0x05;

/// The first byte of a QUIC packet is at least this.
pub const QUIC_FIRST_BYTE: u8 = 0x40;

/// Socket buffers, in bytes: some 20 ms at 1.5 Gbit/s, the longest that a thread may be kept from the socket on a busy
/// two-core machine.
const BUFFER_BYTES: usize = 4 << 20;

/// What a datagram is, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatagramKind {
    /// A WireGuard message, by its type field; whether it is sound is for the engine to say.
    WireGuard,
    /// One of our probes.
    Probe,
    /// A QUIC packet.
    Quic,
    /// Nothing of ours.
    Unknown,
}

impl DatagramKind {
    /// Classifies a datagram.
    pub fn of(datagram: &[u8]) -> Self {
        match datagram {
            [1..=4, 0, 0, 0, ..] => Self::WireGuard,
            [PROBE_FIRST_BYTE, ..] => Self::Probe,
            [first, ..] if *first >= QUIC_FIRST_BYTE => Self::Quic,
            _ => Self::Unknown,
        }
    }
}

/// Why the UDP port could not be opened. Each says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another socket has the port.
    #[error("UDP port {0} is in use: stop the other program, or choose another port")]
    PortInUse(u16),
    /// Ports below 1024 need a capability.
    #[error("UDP port {0} needs CAP_NET_BIND_SERVICE: choose a port above 1023, or grant the capability")]
    PortForbidden(u16),
    /// Marking packets needs a capability.
    #[error("marking packets with {0:#x} needs CAP_NET_ADMIN: run as root, or grant the capability")]
    MarkForbidden(u32),
    /// Anything else that the kernel said.
    #[error("cannot open UDP port {port}: {action}: {source}")]
    Io {
        /// The port.
        port: u16,
        /// What was being done.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// How to open the UDP port.
#[derive(Clone, Copy, Debug, Default)]
pub struct UdpConfig {
    /// The port; 0 lets the kernel choose.
    pub port: u16,
    /// The mark of every packet sent (`SO_MARK`, socket(7)), for policy routing.
    pub fwmark: Option<u32>,
    /// Whether further sockets of this process may share the port, one per shard.
    pub shared: bool,
}

/// A UDP socket with segmentation offload. Sends and receives never block.
#[derive(Debug)]
pub struct UdpSocket {
    socket: std::net::UdpSocket,
    state: UdpSocketState,
    local: SocketAddr,
    lifeline: Lifeline,
}

impl UdpSocket {
    /// Opens the port on all addresses, of IPv6 and IPv4 where the kernel has IPv6, else of IPv4 alone.
    pub fn bind(config: &UdpConfig) -> Result<Self, BindError> {
        let bound = match Self::bind_family(config, Domain::IPV6) {
            Err(BindError::Io { source, .. }) if is_missing_family(&source) => Self::bind_family(config, Domain::IPV4),
            result => result,
        };
        let socket: std::net::UdpSocket = bound?.into();
        let io = |action| move |source| BindError::Io { port: config.port, action, source };
        let state = UdpSocketState::new((&socket).into()).map_err(io("setting options"))?;
        let local = socket.local_addr().map_err(io("reading its address"))?;
        Ok(Self { socket, state, local, lifeline: Lifeline::default() })
    }

    /// The address as the kernel has it: `[::]:PORT` on a dual-stack socket.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Watches for the moment when the port is free again.
    pub fn watch_end(&self) -> Watch {
        self.lifeline.watch()
    }

    /// How many datagrams of one size one send takes; 1 where there is no segmentation offload.
    pub fn max_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    /// Receives up to `bufs.len()` runs of datagrams; a run is one sender's, cut every `stride` bytes.
    pub fn recv(&self, bufs: &mut [IoSliceMut<'_>], metas: &mut [RecvMeta]) -> io::Result<usize> {
        self.state.recv((&self.socket).into(), bufs, metas)
    }

    /// Sends a run of datagrams of `stride` bytes each, the last possibly shorter.
    pub fn send(&self, to: SocketAddr, run: &[u8], stride: usize) -> io::Result<()> {
        let transmit = Transmit {
            destination: self.native(to),
            ecn: None,
            contents: run,
            segment_size: (stride < run.len()).then_some(stride),
            src_ip: None,
        };
        self.state.try_send((&self.socket).into(), &transmit)
    }

    /// An address in the socket's own family.
    fn native(&self, addr: SocketAddr) -> SocketAddr {
        match addr {
            SocketAddr::V4(v4) if self.local.is_ipv6() => {
                SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0).into()
            }
            SocketAddr::V4(_) | SocketAddr::V6(_) => addr,
        }
    }

    fn bind_family(config: &UdpConfig, family: Domain) -> Result<Socket, BindError> {
        let port = config.port;
        let io = |action| move |source| BindError::Io { port, action, source };
        let socket = Socket::new(family, Type::DGRAM, Some(Protocol::UDP)).map_err(io("making the socket"))?;
        let any: SocketAddr = if family == Domain::IPV6 {
            socket.set_only_v6(false).map_err(io("enabling IPv4"))?;
            (Ipv6Addr::UNSPECIFIED, port).into()
        } else {
            (Ipv4Addr::UNSPECIFIED, port).into()
        };
        if let Some(mark) = config.fwmark {
            socket.set_mark(mark).map_err(|source| match source.raw_os_error() {
                Some(libc::EPERM) => BindError::MarkForbidden(mark),
                _ => BindError::Io { port, action: "setting the mark", source },
            })?;
        }
        if config.shared {
            socket.set_reuse_port(true).map_err(io("sharing the port"))?;
        }
        enlarge_buffers(&socket);
        socket.bind(&any.into()).map_err(|source| match source.raw_os_error() {
            Some(libc::EADDRINUSE) => BindError::PortInUse(port),
            Some(libc::EACCES) => BindError::PortForbidden(port),
            _ => BindError::Io { port, action: "binding", source },
        })?;
        Ok(socket)
    }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// An address as the rest of the daemon writes it: IPv4-mapped IPv6 becomes IPv4.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => (v4, v6.port()).into(),
            // The flow label is no part of where a peer is.
            None => SocketAddrV6::new(*v6.ip(), v6.port(), 0, v6.scope_id()).into(),
        },
        SocketAddr::V4(_) => addr,
    }
}

/// Beyond the system's limit where we may, up to it where not. Small buffers cost throughput and nothing else.
fn enlarge_buffers(socket: &Socket) {
    if setsockopt(socket, sockopt::RcvBufForce, &BUFFER_BYTES).is_err() {
        let _ = socket.set_recv_buffer_size(BUFFER_BYTES);
    }
    if setsockopt(socket, sockopt::SndBufForce, &BUFFER_BYTES).is_err() {
        let _ = socket.set_send_buffer_size(BUFFER_BYTES);
    }
}

fn is_missing_family(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_tell_datagrams_apart() {
        for first in 1..=4 {
            assert_eq!(DatagramKind::of(&[first, 0, 0, 0, 9]), DatagramKind::WireGuard);
            assert_eq!(DatagramKind::of(&[first, 0, 1, 0, 9]), DatagramKind::Unknown);
            assert_eq!(DatagramKind::of(&[first, 0, 0]), DatagramKind::Unknown);
        }
        assert_eq!(DatagramKind::of(b"\x05KSP"), DatagramKind::Probe);
        assert_eq!(DatagramKind::of(&[0x40]), DatagramKind::Quic);
        assert_eq!(DatagramKind::of(&[0xff; 3]), DatagramKind::Quic);
        assert_eq!(DatagramKind::of(&[0x3f; 3]), DatagramKind::Unknown);
        assert_eq!(DatagramKind::of(&[0, 1, 0, 0]), DatagramKind::Unknown);
        assert_eq!(DatagramKind::of(&[]), DatagramKind::Unknown);
    }

    #[test]
    fn a_port_in_use_is_named() {
        let first = UdpSocket::bind(&UdpConfig::default()).unwrap();
        let port = first.local_addr().port();
        let error = UdpSocket::bind(&UdpConfig { port, ..UdpConfig::default() }).unwrap_err();
        assert!(matches!(error, BindError::PortInUse(p) if p == port));
        assert!(error.to_string().contains(&format!("port {port} is in use")), "{error}");
    }

    #[test]
    fn mapped_addresses_become_ipv4() {
        let addr = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert_eq!(canonical(addr("[::ffff:192.0.2.1]:7")), addr("192.0.2.1:7"));
        assert_eq!(canonical(addr("[2001:db8::1]:7")), addr("[2001:db8::1]:7"));
        assert_eq!(canonical(addr("192.0.2.1:7")), addr("192.0.2.1:7"));
    }
}
