//! A super packet from the kernel, taken apart into packets for the wire.
//!
//! Segments are given out one by one, in order, and each is gone when the next is asked for. That allows to cut in
//! place: the next segment's headers are laid over the tail of the segment before it, right in front of its own
//! payload. Payload is never moved.
//!
//! ```text
//!   read:       [headers][payload 0][payload 1][payload 2]
//!   segment 0:  [headers][payload 0]
//!   segment 1:           ...[headers][payload 1]
//!   segment 2:                      ...[headers][payload 2]
//! ```
//!
//! What differs between the segments of one super packet is what the kernel's own segmentation would make of it:
//! lengths, the IPv4 identification, the TCP sequence number, FIN and PSH (last segment only), CWR (first only) and
//! the checksums.

use super::virtio::{Gso, VirtioHeader};
use super::{checksum, ip};

/// IPv4 or IPv6 headers and a transport header: 60 + 60 bytes at most in IPv4; IPv6 extension headers get the rest.
const MAX_HEADERS: usize = 256;

const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;

/// Why a packet could not be taken apart: its virtio header and its own headers contradict each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SplitError {
    /// The packet ends before what its headers announce.
    #[error("the packet of {0} bytes ends within its headers")]
    Truncated(usize),
    /// The IP version, the protocol or the transport header's place is not what the virtio header says.
    #[error("the packet's headers are not those that its virtio header announces")]
    Mismatch,
    /// More headers than any sane packet has.
    #[error("{0} bytes of headers, more than {MAX_HEADERS}")]
    HeadersTooLong(usize),
}

/// The segments of one packet: of a super packet several, of any other just itself.
#[derive(Debug)]
pub struct Segments<'a> {
    packet: &'a mut [u8],
    cut: Option<Cut>,
    next: usize,
    count: usize,
}

/// How a super packet is cut.
#[derive(Debug)]
struct Cut {
    headers: [u8; MAX_HEADERS],
    headers_len: usize,
    transport: usize,
    segment_size: usize,
    tcp: bool,
}

impl<'a> Segments<'a> {
    /// Takes a packet as read from the TUN, without its virtio header. A checksum that the kernel left unfinished is
    /// completed.
    pub fn new(header: &VirtioHeader, packet: &'a mut [u8]) -> Result<Self, SplitError> {
        if header.gso == Gso::None {
            if header.needs_checksum {
                complete_checksum(header, packet)?;
            }
            return Ok(Self { packet, cut: None, next: 0, count: 1 });
        }
        let cut = Cut::new(header, packet)?;
        let payload = packet.len() - cut.headers_len;
        let count = payload.div_ceil(cut.segment_size).max(1);
        Ok(Self { packet, cut: Some(cut), next: 0, count })
    }

    /// How many segments are left.
    pub fn left(&self) -> usize {
        self.count - self.next
    }

    /// The length of the next segment, if there is one.
    pub fn next_len(&self) -> Option<usize> {
        (self.next < self.count).then(|| match &self.cut {
            None => self.packet.len(),
            Some(cut) => cut.headers_len + self.payload_len(cut, self.next),
        })
    }

    /// The next segment, complete with checksums. It overwrites the tail of the one before.
    pub fn next_segment(&mut self) -> Option<&mut [u8]> {
        let len = self.next_len()?;
        let index = self.next;
        self.next += 1;
        let Some(cut) = &self.cut else { return Some(self.packet) };
        let start = index * cut.segment_size;
        let segment = &mut self.packet[start..start + len];
        cut.write_headers(segment, index, index + 1 == self.count);
        Some(segment)
    }

    fn payload_len(&self, cut: &Cut, index: usize) -> usize {
        let payload = self.packet.len() - cut.headers_len;
        (payload - (index * cut.segment_size).min(payload)).min(cut.segment_size)
    }
}

impl Cut {
    fn new(header: &VirtioHeader, packet: &[u8]) -> Result<Self, SplitError> {
        let truncated = SplitError::Truncated(packet.len());
        let version = packet.first().ok_or(truncated)? >> 4;
        let transport = usize::from(header.checksum_start);
        let protocol = match version {
            4 if packet.len() >= ip::V4_LEN => {
                if transport != usize::from(packet[0] & 0x0f) * 4 || transport < ip::V4_LEN {
                    return Err(SplitError::Mismatch);
                }
                Some(packet[9])
            }
            // Behind extension headers the protocol stands anywhere; the kernel's word is taken for it.
            6 if packet.len() >= ip::V6_LEN => (transport == ip::V6_LEN).then(|| packet[6]),
            4 | 6 => return Err(truncated),
            _ => return Err(SplitError::Mismatch),
        };
        let tcp = match (header.gso, version) {
            (Gso::Tcp4, 4) | (Gso::Tcp6, 6) => true,
            (Gso::Udp, 4 | 6) => false,
            (Gso::None | Gso::Tcp4 | Gso::Tcp6 | Gso::Udp, _) => return Err(SplitError::Mismatch),
        };
        let expected = if tcp { ip::TCP } else { ip::UDP };
        if protocol.is_some_and(|protocol| protocol != expected)
            || header.gso_size == 0
            || (version == 6 && transport < ip::V6_LEN)
        {
            return Err(SplitError::Mismatch);
        }
        let transport_len = if tcp { usize::from(packet.get(transport + 12).ok_or(truncated)? >> 4) * 4 } else { 8 };
        if tcp && transport_len < 20 {
            return Err(SplitError::Mismatch);
        }
        let headers_len = transport + transport_len;
        if headers_len > MAX_HEADERS {
            return Err(SplitError::HeadersTooLong(headers_len));
        }
        let mut headers = [0; MAX_HEADERS];
        headers[..headers_len].copy_from_slice(packet.get(..headers_len).ok_or(truncated)?);
        Ok(Self { headers, headers_len, transport, segment_size: usize::from(header.gso_size), tcp })
    }

    /// Lays the headers of segment `index` over the start of `segment`, whose payload is in place.
    fn write_headers(&self, segment: &mut [u8], index: usize, last: bool) {
        let version = self.headers[0] >> 4;
        let transport_total = segment.len() - self.transport;
        let headers = &mut segment[..self.headers_len];
        headers.copy_from_slice(&self.headers[..self.headers_len]);

        let (ip, transport) = headers.split_at_mut(self.transport);
        if version == 4 {
            write_v4(ip, transport_total, index);
        } else {
            put16(ip, 4, self.transport - ip::V6_LEN + transport_total);
        }
        if self.tcp {
            let offset = (index * self.segment_size) as u32;
            let sequence = u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]);
            transport[4..8].copy_from_slice(&sequence.wrapping_add(offset).to_be_bytes());
            if !last {
                transport[13] &= !(TCP_FIN | TCP_PSH);
            }
            if index > 0 {
                transport[13] &= !TCP_CWR;
            }
        } else {
            put16(transport, 4, transport_total);
        }

        let field = self.transport + if self.tcp { 16 } else { 6 };
        segment[field..field + 2].fill(0);
        let protocol = if self.tcp { ip::TCP } else { ip::UDP };
        let pseudo = checksum::pseudo_header(&segment[ip::address_range(version)], protocol, transport_total);
        let sum = checksum::sum(&segment[self.transport..], pseudo);
        let finished = if self.tcp { checksum::finish(sum) } else { checksum::finish_nonzero(sum) };
        segment[field..field + 2].copy_from_slice(&finished);
    }
}

/// Lengths, identification and header checksum of one segment's IPv4 header.
fn write_v4(header: &mut [u8], transport_total: usize, index: usize) {
    put16(header, 2, header.len() + transport_total);
    let id = u16::from_be_bytes([header[4], header[5]]);
    header[4..6].copy_from_slice(&id.wrapping_add(index as u16).to_be_bytes());
    header[10..12].fill(0);
    let finished = checksum::finish(checksum::sum(header, 0));
    header[10..12].copy_from_slice(&finished);
}

/// Writes a length field. Lengths within a packet of 64 KiB fit.
fn put16(header: &mut [u8], at: usize, value: usize) {
    header[at..at + 2].copy_from_slice(&(value as u16).to_be_bytes());
}

/// Adds what the kernel left out: the field holds the pseudo header's sum, so summing from the transport header on
/// gives the whole.
fn complete_checksum(header: &VirtioHeader, packet: &mut [u8]) -> Result<(), SplitError> {
    let start = usize::from(header.checksum_start);
    let field = start + usize::from(header.checksum_offset);
    if field + 2 > packet.len() {
        return Err(SplitError::Truncated(packet.len()));
    }
    let finished = checksum::finish_nonzero(checksum::sum(&packet[start..], 0));
    packet[field..field + 2].copy_from_slice(&finished);
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{self, Packet};
    use super::*;

    /// The super packet that the kernel would hand over for `packet`: checksum unfinished.
    fn segments_of(packet: &Packet, size: u16) -> Vec<Vec<u8>> {
        let mut bytes = packet.build();
        let header = packet.virtio(size);
        let mut segments = Segments::new(&header, &mut bytes).unwrap();
        let mut out = Vec::new();
        while let Some(segment) = segments.next_segment() {
            out.push(segment.to_vec());
        }
        assert_eq!(segments.left(), 0);
        out
    }

    fn check_cut(packet: &Packet, size: u16) {
        let segments = segments_of(packet, size);
        assert_eq!(segments.len(), packet.payload.len().div_ceil(usize::from(size)));
        let mut payload = Vec::new();
        for (index, segment) in segments.iter().enumerate() {
            testing::assert_sound(segment);
            let last = index + 1 == segments.len();
            let at = payload.len();
            payload.extend_from_slice(&segment[packet.headers_len()..]);
            let mut expected = packet.clone();
            expected.payload = packet.payload[at..payload.len()].to_vec();
            expected.sequence = packet.sequence.wrapping_add(at as u32);
            expected.id = packet.id.wrapping_add(index as u16);
            if !last {
                expected.flags &= !(TCP_FIN | TCP_PSH);
            }
            if index > 0 {
                expected.flags &= !TCP_CWR;
            }
            assert_eq!(segment, &expected.build(), "segment {index}");
        }
        assert_eq!(payload, packet.payload);
    }

    #[test]
    fn tcp_is_cut_as_the_kernel_would() {
        for v6 in [false, true] {
            let packet = Packet { flags: 0x10 | TCP_PSH | TCP_FIN | TCP_CWR, ..Packet::tcp(v6, 5000) };
            check_cut(&packet, 1368);
            check_cut(&packet, 1250);
            check_cut(&packet, 8);
        }
    }

    #[test]
    fn udp_is_cut_into_datagrams() {
        for v6 in [false, true] {
            check_cut(&Packet::udp(v6, 4001), 1000);
            check_cut(&Packet::udp(v6, 4000), 1000);
        }
    }

    #[test]
    fn a_sequence_number_wraps() {
        check_cut(&Packet { sequence: u32::MAX - 1000, id: u16::MAX, ..Packet::tcp(false, 4000) }, 1000);
    }

    #[test]
    fn an_unfinished_checksum_is_completed() {
        for packet in [Packet::tcp(false, 77), Packet::tcp(true, 0), Packet::udp(false, 3), Packet::udp(true, 500)] {
            let whole = packet.build();
            let mut bytes = packet.build_unfinished();
            let header = VirtioHeader { gso: Gso::None, ..packet.virtio(0) };
            let mut segments = Segments::new(&header, &mut bytes).unwrap();
            assert_eq!(segments.next_len(), Some(whole.len()));
            assert_eq!(segments.next_segment().unwrap(), &whole);
            assert!(segments.next_segment().is_none());
        }
    }

    #[test]
    fn contradictions_are_errors() {
        let packet = Packet::tcp(false, 3000);
        let good = packet.virtio(1000);
        for bad in [
            VirtioHeader { gso: Gso::Tcp6, ..good },
            VirtioHeader { gso: Gso::Udp, ..good },
            VirtioHeader { gso_size: 0, ..good },
            VirtioHeader { checksum_start: 24, ..good },
        ] {
            assert_eq!(Segments::new(&bad, &mut packet.build()).unwrap_err(), SplitError::Mismatch, "{bad:?}");
        }
        assert!(matches!(Segments::new(&good, &mut packet.build()[..30]), Err(SplitError::Truncated(30))));
        assert!(matches!(Segments::new(&good, &mut []), Err(SplitError::Truncated(0))));
    }

    proptest! {
        #[test]
        fn no_input_panics(
            header in prop::array::uniform10(any::<u8>()),
            gso in prop_oneof![Just(0u8), Just(1), Just(4), Just(5)],
            start in prop_oneof![Just(20u16), Just(40), any::<u16>()],
            mut packet in prop::collection::vec(any::<u8>(), 0..300),
            version in prop_oneof![Just(0x45u8), Just(0x60), any::<u8>()],
        ) {
            let mut header = header;
            header[1] = gso;
            header[6..8].copy_from_slice(&start.to_ne_bytes());
            if let Some(first) = packet.first_mut() {
                *first = version;
            }
            let header = VirtioHeader::decode(&header).unwrap();
            let len = packet.len();
            if let Ok(mut segments) = Segments::new(&header, &mut packet) {
                while let Some(announced) = segments.next_len() {
                    let segment = segments.next_segment().unwrap();
                    prop_assert_eq!(segment.len(), announced);
                    prop_assert!(segment.len() <= len);
                }
            }
        }

        #[test]
        fn any_cut_reassembles(len in 1usize..9000, size in 1u16..3000, v6: bool, tcp: bool) {
            check_cut(&if tcp { Packet::tcp(v6, len) } else { Packet::udp(v6, len) }, size);
        }
    }
}
