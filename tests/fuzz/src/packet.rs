//! TCP and UDP packets, written and checked with a checksum that is slow and plain (RFC 1071 section 4.1).

const TCP: u8 = 6;
const UDP: u8 = 17;

/// A TCP or UDP packet over IPv4 or IPv6 without IP options.
#[derive(Clone, Debug)]
pub struct Packet {
    /// IPv6, not IPv4.
    pub v6: bool,
    /// TCP, not UDP.
    pub tcp: bool,
    /// Source port; the destination's is 80.
    pub port: u16,
    /// TCP sequence number.
    pub sequence: u32,
    /// TCP flags.
    pub flags: u8,
    /// TCP window.
    pub window: u16,
    /// IPv4 identification.
    pub id: u16,
    /// IPv4: DF.
    pub dont_fragment: bool,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// What is carried.
    pub payload: Vec<u8>,
}

impl Packet {
    /// The packet as it goes on a wire.
    pub fn build(&self) -> Vec<u8> {
        let (protocol, header_len) = if self.tcp { (TCP, 20) } else { (UDP, 8) };
        let transport_total = header_len + self.payload.len();
        let mut bytes = Vec::new();
        if self.v6 {
            bytes.extend_from_slice(&[0x60, 0, 0, 9]);
            bytes.extend_from_slice(&(transport_total as u16).to_be_bytes());
            bytes.extend_from_slice(&[protocol, self.ttl]);
            bytes.extend_from_slice(&[[0xfd; 16], [0xfc; 16]].concat());
        } else {
            bytes.extend_from_slice(&[0x45, 0]);
            bytes.extend_from_slice(&(20 + transport_total as u16).to_be_bytes());
            bytes.extend_from_slice(&self.id.to_be_bytes());
            bytes.extend_from_slice(&[if self.dont_fragment { 0x40 } else { 0 }, 0, self.ttl, protocol, 0, 0]);
            bytes.extend_from_slice(&[10, 98, 0, 1, 10, 98, 0, 2]);
        }
        bytes.extend_from_slice(&self.port.to_be_bytes());
        bytes.extend_from_slice(&80u16.to_be_bytes());
        if self.tcp {
            bytes.extend_from_slice(&self.sequence.to_be_bytes());
            bytes.extend_from_slice(&[0, 0, 0, 77, 0x50, self.flags]);
            bytes.extend_from_slice(&self.window.to_be_bytes());
            bytes.extend_from_slice(&[0; 4]);
        } else {
            bytes.extend_from_slice(&(transport_total as u16).to_be_bytes());
            bytes.extend_from_slice(&[0; 2]);
        }
        bytes.extend_from_slice(&self.payload);
        finish(&mut bytes);
        bytes
    }
}

/// Writes the checksums of a packet that [`Packet::build`] made and that was changed since.
pub fn finish(packet: &mut [u8]) {
    let (at, protocol) = transport(packet);
    if packet[0] >> 4 == 4 {
        packet[10..12].fill(0);
        let sum = !sum(&packet[..at]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    let field = at + checksum_field(protocol);
    packet[field..field + 2].fill(0);
    let sum = match !transport_sum(packet, at, protocol) {
        0 if protocol == UDP => 0xffff,
        sum => sum,
    };
    packet[field..field + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Checks lengths and checksums of a TCP or UDP packet. `at` is where the transport header is.
pub fn assert_sound(packet: &[u8], at: usize, tcp: bool) {
    if packet[0] >> 4 == 4 {
        assert_eq!(usize::from(u16::from_be_bytes([packet[2], packet[3]])), packet.len(), "IPv4 length");
        assert_eq!(sum(&packet[..at]), 0xffff, "IPv4 header checksum");
    } else {
        assert_eq!(40 + usize::from(u16::from_be_bytes([packet[4], packet[5]])), packet.len(), "IPv6 length");
    }
    if !tcp {
        assert_eq!(usize::from(u16::from_be_bytes([packet[at + 4], packet[at + 5]])), packet.len() - at, "UDP length");
    }
    assert_eq!(transport_sum(packet, at, if tcp { TCP } else { UDP }), 0xffff, "transport checksum");
}

/// The packet without what may change on its way through a group: where the checksums are right, their two forms of
/// zero; and the IPv4 identification where DF makes it meaningless (RFC 6864). Any other packet as it is.
pub fn normal(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let is_plain = match packet.first() {
        Some(0x45) => packet.len() >= 20,
        Some(0x60..=0x6f) => packet.len() >= 40,
        _ => false,
    };
    if !is_plain {
        return packet;
    }
    let (at, protocol) = transport(&packet);
    let is_v4 = packet[0] == 0x45;
    let transport_len = if protocol == TCP { 20 } else { 8 };
    let is_sound = matches!(protocol, TCP | UDP)
        && packet.len() >= at + transport_len
        && (!is_v4 || sum(&packet[..at]) == 0xffff)
        && transport_sum(&packet, at, protocol) == 0xffff;
    if is_sound {
        let field = at + checksum_field(protocol);
        packet[field..field + 2].fill(0);
        if is_v4 {
            packet[10..12].fill(0);
            if packet[6] & 0x40 != 0 {
                packet[4..6].fill(0);
            }
        }
    }
    packet
}

/// Addresses and ports of a packet with plain headers; none for any other.
pub fn flow(packet: &[u8]) -> Option<Vec<u8>> {
    match packet.first()? {
        0x45 if packet.len() >= 24 && packet[6] & 0x3f == 0 && packet[7] == 0 => Some(packet[12..24].to_vec()),
        0x60..=0x6f if packet.len() >= 44 && matches!(packet[6], TCP | UDP) => Some(packet[8..44].to_vec()),
        _ => None,
    }
}

fn transport(packet: &[u8]) -> (usize, u8) {
    if packet[0] >> 4 == 4 { (20, packet[9]) } else { (40, packet[6]) }
}

fn checksum_field(protocol: u8) -> usize {
    if protocol == TCP { 16 } else { 6 }
}

fn transport_sum(packet: &[u8], at: usize, protocol: u8) -> u16 {
    let addresses = if packet[0] >> 4 == 4 { &packet[12..20] } else { &packet[8..40] };
    let len = ((packet.len() - at) as u32).to_be_bytes();
    sum(&[addresses, &len, &[0, protocol], &packet[at..]].concat())
}

fn sum(bytes: &[u8]) -> u16 {
    let pairs = bytes.chunks_exact(2);
    let odd = pairs.remainder().first().map_or(0, |byte| u64::from(*byte) << 8);
    let mut sum = pairs.map(|pair| u64::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u64>() + odd;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
