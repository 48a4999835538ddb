//! Packets for tests, built the slow and obvious way.

use super::virtio::{Gso, VirtioHeader};
use super::{checksum, ip};

/// A TCP or UDP packet, field by field.
#[derive(Clone, Debug)]
pub(crate) struct Packet {
    pub(crate) v6: bool,
    pub(crate) tcp: bool,
    pub(crate) ports: (u16, u16),
    pub(crate) sequence: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    pub(crate) options: Vec<u8>,
    pub(crate) id: u16,
    pub(crate) dont_fragment: bool,
    pub(crate) tos: u8,
    pub(crate) ttl: u8,
    pub(crate) payload: Vec<u8>,
}

impl Packet {
    pub(crate) fn tcp(v6: bool, len: usize) -> Self {
        Self {
            v6,
            tcp: true,
            ports: (43210, 80),
            sequence: 1000,
            ack: 77,
            flags: 0x10,
            window: 501,
            options: vec![1, 1, 8, 10, 0, 0, 0, 5, 0, 0, 0, 6],
            id: 7,
            dont_fragment: true,
            tos: 2,
            ttl: 64,
            payload: (0..len).map(|i| (i * 7 % 251) as u8).collect(),
        }
    }

    pub(crate) fn udp(v6: bool, len: usize) -> Self {
        Self { tcp: false, options: Vec::new(), flags: 0, ..Self::tcp(v6, len) }
    }

    pub(crate) fn transport(&self) -> usize {
        if self.v6 { 40 } else { 20 }
    }

    pub(crate) fn headers_len(&self) -> usize {
        self.transport() + if self.tcp { 20 + self.options.len() } else { 8 }
    }

    pub(crate) fn virtio(&self, size: u16) -> VirtioHeader {
        let gso = match (self.tcp, self.v6) {
            (true, false) => Gso::Tcp4,
            (true, true) => Gso::Tcp6,
            (false, _) => Gso::Udp,
        };
        VirtioHeader {
            needs_checksum: true,
            gso,
            header_len: self.headers_len() as u16,
            gso_size: size,
            checksum_start: self.transport() as u16,
            checksum_offset: if self.tcp { 16 } else { 6 },
        }
    }

    pub(crate) fn build(&self) -> Vec<u8> {
        let mut bytes = self.build_unfinished();
        let (start, field) = (self.transport(), self.transport() + if self.tcp { 16 } else { 6 });
        let sum = checksum::sum(&bytes[start..], 0);
        let finished = if self.tcp { checksum::finish(sum) } else { checksum::finish_nonzero(sum) };
        bytes[field..field + 2].copy_from_slice(&finished);
        bytes
    }

    /// With only the pseudo header's sum in the transport checksum.
    pub(crate) fn build_unfinished(&self) -> Vec<u8> {
        let total = self.headers_len() + self.payload.len();
        let transport_total = total - self.transport();
        let protocol = if self.tcp { ip::TCP } else { ip::UDP };
        let mut bytes = Vec::new();
        if self.v6 {
            bytes.extend_from_slice(&[0x60 | self.tos >> 4, self.tos << 4, 0, 9]);
            bytes.extend_from_slice(&(transport_total as u16).to_be_bytes());
            bytes.extend_from_slice(&[protocol, self.ttl]);
            bytes.extend_from_slice(&[[0xfd; 16], [0xfc; 16]].concat());
        } else {
            bytes.extend_from_slice(&[0x45, self.tos]);
            bytes.extend_from_slice(&(total as u16).to_be_bytes());
            bytes.extend_from_slice(&self.id.to_be_bytes());
            bytes.extend_from_slice(&[if self.dont_fragment { 0x40 } else { 0 }, 0, self.ttl, protocol, 0, 0]);
            bytes.extend_from_slice(&[10, 98, 0, 1, 10, 98, 0, 2]);
            let finished = checksum::finish(checksum::sum(&bytes, 0));
            bytes[10..12].copy_from_slice(&finished);
        }
        let addresses = ip::address_range(bytes[0] >> 4);
        let pseudo = checksum::fold(checksum::pseudo_header(&bytes[addresses], protocol, transport_total));
        bytes.extend_from_slice(&self.ports.0.to_be_bytes());
        bytes.extend_from_slice(&self.ports.1.to_be_bytes());
        if self.tcp {
            bytes.extend_from_slice(&self.sequence.to_be_bytes());
            bytes.extend_from_slice(&self.ack.to_be_bytes());
            bytes.extend_from_slice(&[(((20 + self.options.len()) / 4) << 4) as u8, self.flags]);
            bytes.extend_from_slice(&self.window.to_be_bytes());
            bytes.extend_from_slice(&[pseudo[0], pseudo[1], 0, 0]);
            bytes.extend_from_slice(&self.options);
        } else {
            bytes.extend_from_slice(&(transport_total as u16).to_be_bytes());
            bytes.extend_from_slice(&pseudo);
        }
        bytes.extend_from_slice(&self.payload);
        bytes
    }
}

/// Checks lengths and checksums of a whole TCP or UDP packet.
pub(crate) fn assert_sound(packet: &[u8]) {
    assert!(ip::destination(packet).is_some(), "the IP length field is wrong");
    let version = packet[0] >> 4;
    let (transport, protocol) = if version == 4 { (20, packet[9]) } else { (40, packet[6]) };
    if version == 4 {
        assert_eq!(checksum::fold(checksum::sum(&packet[..20], 0)), [0xff; 2], "IPv4 header checksum");
    }
    let pseudo = checksum::pseudo_header(&packet[ip::address_range(version)], protocol, packet.len() - transport);
    assert_eq!(checksum::fold(checksum::sum(&packet[transport..], pseudo)), [0xff; 2], "transport checksum");
}
