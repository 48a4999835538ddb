//! Packets from the wire, put together into super packets for the kernel.
//!
//! Decrypted packets lie in one buffer. Those that follow each other in one TCP or UDP flow become one group; a group is
//! written as its first packet, headers patched, and the payloads of the others, straight from where they lie:
//!
//! ```text
//!   buffer:   [h0 p0] [h1 p1] [other flow] [h2 p2]
//!   written:  virtio header, [h0' p0], [p1], [p2]
//! ```
//!
//! The rules are those of the kernel's GRO, so that cutting a group gives the same packets back: everything in the
//! headers is equal but lengths, checksums, the sequence number and the IPv4 identification; sequence numbers follow
//! each other; all payloads have one length but the last, which may be shorter and ends the group, as PSH does.
//! Packets whose checksum is wrong, fragments, IPv4 options and IPv6 extension headers are left alone. A packet that
//! continues a flow but may not join its group opens a new one behind it: within a flow, order is kept.

use std::io::IoSlice;
use std::ops::Range;

use super::virtio::{Gso, VirtioHeader};
use super::{Offload, checksum, ip};

/// Packets per group: the kernel's `UDP_MAX_SEGMENTS` up to 6.8, and more than 64 KiB of usual TCP segments.
const MAX_PACKETS: usize = 64;
/// Bytes of a group, headers included: what an IP length field can say.
const MAX_BYTES: usize = 65535;
/// Flows that are searched for a group to join. With more flows at once, the oldest stop growing.
const MAX_OPEN: usize = 16;

const TCP_ACK: u8 = 0x10;
const TCP_PSH: u8 = 0x08;
const TCP_ECE: u8 = 0x40;

/// Collects packets of one batch and hands them out in groups. Keeps its memory from batch to batch.
#[derive(Debug)]
pub struct Coalescer {
    offload: Offload,
    groups: Vec<Group>,
    /// Packets of groups behind the first, linked.
    joined: Vec<Joined>,
    /// Indices of groups that may still grow, the latest last.
    open: Vec<usize>,
}

#[derive(Debug)]
struct Joined {
    payload: Range<usize>,
    next: Option<usize>,
}

#[derive(Debug)]
struct Group {
    first: Range<usize>,
    flow: Option<Flow>,
    joined: Option<(usize, usize)>,
    packets: usize,
    bytes: usize,
    next_sequence: u32,
    last_id: u16,
    ids: Ids,
    pushed: bool,
}

/// How the IPv4 identification goes from packet to packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ids {
    /// One packet so far.
    Unknown,
    Counting,
    /// Allowed only where DF makes the identification meaningless (RFC 6864).
    Constant,
}

/// Where things are in a packet that may be part of a group.
#[derive(Clone, Copy, Debug)]
struct Flow {
    gso: Gso,
    transport: usize,
    headers_len: usize,
    payload_len: usize,
}

impl Coalescer {
    /// A coalescer for a TUN queue that takes these super packets.
    pub fn new(offload: Offload) -> Self {
        Self { offload, groups: Vec::new(), joined: Vec::new(), open: Vec::new() }
    }

    /// Whether nothing was pushed since the last drain.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Adds the packet at `range` of `buffer`. Until [`Coalescer::drain`] the packet stays where it is.
    pub fn push(&mut self, buffer: &[u8], range: Range<usize>) {
        let packet = &buffer[range.clone()];
        let Some(flow) = Flow::of(packet, self.offload) else {
            self.close_groups_of(buffer, packet);
            self.open_group(packet, range, None);
            return;
        };
        let Some(at) = self.open.iter().rposition(|group| self.groups[*group].is_of_flow(buffer, flow.key(packet)))
        else {
            self.open_group(packet, range, Some(flow));
            return;
        };
        let group = self.open[at];
        if self.groups[group].admits(buffer, packet, &flow) {
            self.join(group, packet, &flow, &range);
            if !self.groups[group].may_grow(packet, &flow) {
                self.open.remove(at);
            }
        } else {
            self.open.remove(at);
            self.open_group(packet, range, Some(flow));
        }
    }

    /// Gives every group, in order, as the parts of one write, and forgets them. `buffer` is the one that the packets
    /// were pushed from; headers are patched in it.
    pub fn drain(&mut self, buffer: &mut [u8], mut write: impl FnMut(&[IoSlice<'_>])) {
        self.open.clear();
        for group in self.groups.drain(..) {
            let header = match (&group.flow, group.joined) {
                (Some(flow), Some(_)) => group.finish_headers(flow, &mut buffer[group.first.clone()]),
                _ => VirtioHeader::default(),
            }
            .encode();
            let mut parts = [IoSlice::new(&[]); MAX_PACKETS + 1];
            parts[0] = IoSlice::new(&header);
            parts[1] = IoSlice::new(&buffer[group.first.clone()]);
            let mut used = 2;
            let mut next = group.joined.map(|(first, _)| first);
            while let Some(joined) = next.map(|index| &self.joined[index]) {
                parts[used] = IoSlice::new(&buffer[joined.payload.clone()]);
                used += 1;
                next = joined.next;
            }
            write(&parts[..used]);
        }
        self.joined.clear();
    }

    fn open_group(&mut self, packet: &[u8], range: Range<usize>, flow: Option<Flow>) {
        let group = Group {
            bytes: range.len(),
            first: range,
            flow,
            joined: None,
            packets: 1,
            next_sequence: flow.map_or(0, |flow| flow.sequence(packet).wrapping_add(flow.payload_len as u32)),
            last_id: identification(packet),
            ids: Ids::Unknown,
            pushed: false,
        };
        if flow.is_some_and(|flow| !flow.pushes(packet)) {
            if self.open.len() == MAX_OPEN {
                self.open.remove(0);
            }
            self.open.push(self.groups.len());
        }
        self.groups.push(group);
    }

    /// Ends the groups that a packet, which can be in none, must not be overtaken by.
    fn close_groups_of(&mut self, buffer: &[u8], packet: &[u8]) {
        match Flow::key_of(packet) {
            Some(key) => self.open.retain(|group| !self.groups[*group].is_of_flow(buffer, key)),
            None => self.open.clear(),
        }
    }

    fn join(&mut self, group: usize, packet: &[u8], flow: &Flow, range: &Range<usize>) {
        let index = self.joined.len();
        self.joined.push(Joined { payload: range.start + flow.headers_len..range.end, next: None });
        let group = &mut self.groups[group];
        match &mut group.joined {
            None => group.joined = Some((index, index)),
            Some((_, last)) => {
                self.joined[*last].next = Some(index);
                *last = index;
            }
        }
        group.packets += 1;
        group.bytes += flow.payload_len;
        group.next_sequence = group.next_sequence.wrapping_add(flow.payload_len as u32);
        group.ids = group.step_to(packet);
        group.last_id = identification(packet);
        group.pushed = flow.pushes(packet);
    }
}

impl Group {
    fn is_of_flow(&self, buffer: &[u8], key: &[u8]) -> bool {
        self.flow.as_ref().is_some_and(|flow| flow.key(&buffer[self.first.clone()]) == key)
    }

    /// Whether a packet of the same flow may be the next one of the group.
    fn admits(&self, buffer: &[u8], packet: &[u8], flow: &Flow) -> bool {
        let Some(own) = &self.flow else { return false };
        let first = &buffer[self.first.clone()];
        own.gso == flow.gso
            && own.headers_len == flow.headers_len
            && flow.payload_len <= own.payload_len
            && self.bytes + flow.payload_len <= MAX_BYTES
            && (flow.gso == Gso::Udp || flow.sequence(packet) == self.next_sequence)
            && flow.has_same_headers(first, packet)
            && self.step_is_sound(packet)
    }

    /// Whether the group takes more after `packet` has joined it.
    fn may_grow(&self, packet: &[u8], flow: &Flow) -> bool {
        self.packets < MAX_PACKETS
            && self.flow.as_ref().is_some_and(|own| own.payload_len == flow.payload_len)
            && !flow.pushes(packet)
    }

    fn step_is_sound(&self, packet: &[u8]) -> bool {
        if packet[0] >> 4 != 4 {
            return true;
        }
        let dont_fragment = packet[6] & 0x40 != 0;
        match (self.ids, self.step_to(packet)) {
            (_, Ids::Unknown) => false,
            (Ids::Unknown, step) => step == Ids::Counting || dont_fragment,
            (ids, step) => ids == step,
        }
    }

    /// How the identification goes from the group's last packet to this one; unknown means neither way.
    fn step_to(&self, packet: &[u8]) -> Ids {
        match identification(packet).wrapping_sub(self.last_id) {
            0 => Ids::Constant,
            1 => Ids::Counting,
            _ => Ids::Unknown,
        }
    }

    /// Makes the first packet's headers those of the group: its lengths, and checksums for the kernel to finish.
    fn finish_headers(&self, flow: &Flow, first: &mut [u8]) -> VirtioHeader {
        let transport_total = self.bytes - flow.transport;
        let version = first[0] >> 4;
        if version == 4 {
            first[2..4].copy_from_slice(&(self.bytes as u16).to_be_bytes());
            first[10..12].fill(0);
            let finished = checksum::finish(checksum::sum(&first[..flow.transport], 0));
            first[10..12].copy_from_slice(&finished);
        } else {
            first[4..6].copy_from_slice(&((self.bytes - ip::V6_LEN) as u16).to_be_bytes());
        }
        let (protocol, offset) = if flow.gso == Gso::Udp { (ip::UDP, 6) } else { (ip::TCP, 16) };
        if flow.gso == Gso::Udp {
            let at = flow.transport + 4;
            first[at..at + 2].copy_from_slice(&(transport_total as u16).to_be_bytes());
        } else if self.pushed {
            first[flow.transport + 13] |= TCP_PSH;
        }
        let pseudo = checksum::pseudo_header(&first[ip::address_range(version)], protocol, transport_total);
        let field = flow.transport + offset;
        first[field..field + 2].copy_from_slice(&checksum::fold(pseudo));
        VirtioHeader {
            needs_checksum: true,
            gso: flow.gso,
            header_len: flow.headers_len as u16,
            gso_size: flow.payload_len as u16,
            checksum_start: flow.transport as u16,
            checksum_offset: offset as u16,
        }
    }
}

impl Flow {
    /// The flow of a packet that may be part of a group; none for any other.
    fn of(packet: &[u8], offload: Offload) -> Option<Self> {
        let (transport, protocol) = match packet.first()? {
            0x45 => {
                let header = packet.first_chunk::<{ ip::V4_LEN }>()?;
                let is_fragment = header[6] & 0xbf != 0 || header[7] != 0;
                let is_sound = checksum::fold(checksum::sum(header, 0)) == [0xff; 2];
                (!is_fragment && is_sound).then_some((ip::V4_LEN, header[9]))?
            }
            0x60..=0x6f => (ip::V6_LEN, packet.first_chunk::<{ ip::V6_LEN }>()?[6]),
            _ => return None,
        };
        ip::destination(packet)?;
        let (gso, headers_len) = match (protocol, offload) {
            (ip::TCP, Offload::Tcp | Offload::TcpAndUdp) => {
                let header = packet.get(transport..)?.first_chunk::<20>()?;
                let gso = if transport == ip::V4_LEN { Gso::Tcp4 } else { Gso::Tcp6 };
                let is_plain = header[13] & !(TCP_PSH | TCP_ECE) == TCP_ACK;
                let len = usize::from(header[12] >> 4) * 4;
                (is_plain && len >= 20).then_some((gso, transport + len))?
            }
            (ip::UDP, Offload::TcpAndUdp) => {
                let header = packet.get(transport..)?.first_chunk::<8>()?;
                let len = usize::from(u16::from_be_bytes([header[4], header[5]]));
                let has_checksum = header[6..8] != [0, 0];
                (has_checksum && len == packet.len() - transport).then_some((Gso::Udp, transport + 8))?
            }
            _ => return None,
        };
        let payload_len = packet.len().checked_sub(headers_len).filter(|len| *len > 0)?;
        let addresses = &packet[ip::address_range(packet[0] >> 4)];
        let pseudo = checksum::pseudo_header(addresses, protocol, packet.len() - transport);
        let is_sound = checksum::fold(checksum::sum(&packet[transport..], pseudo)) == [0xff; 2];
        is_sound.then_some(Self { gso, transport, headers_len, payload_len })
    }

    /// Addresses and ports, which lie side by side.
    fn key<'a>(&self, packet: &'a [u8]) -> &'a [u8] {
        let addresses = if self.transport == ip::V4_LEN { 12 } else { 8 };
        &packet[addresses..self.transport + 4]
    }

    /// The key of any packet with plain headers, whether it may be part of a group or not.
    fn key_of(packet: &[u8]) -> Option<&[u8]> {
        match packet.first()? {
            0x45 if packet.len() >= ip::V4_LEN + 4 && packet[6] & 0x3f == 0 && packet[7] == 0 => Some(&packet[12..24]),
            0x60..=0x6f if packet.len() >= ip::V6_LEN + 4 && matches!(packet[6], ip::TCP | ip::UDP) => {
                Some(&packet[8..44])
            }
            _ => None,
        }
    }

    fn sequence(&self, packet: &[u8]) -> u32 {
        let at = self.transport + 4;
        u32::from_be_bytes([packet[at], packet[at + 1], packet[at + 2], packet[at + 3]])
    }

    fn pushes(&self, packet: &[u8]) -> bool {
        self.gso != Gso::Udp && packet[self.transport + 13] & TCP_PSH != 0
    }

    /// Whether two packets of one flow agree in all that a group has only once: type of service, ECN, TTL, DF, flow
    /// label; and of TCP the acknowledgement, flags, window and options.
    fn has_same_headers(&self, a: &[u8], b: &[u8]) -> bool {
        let same = |range: Range<usize>| a[range.clone()] == b[range];
        let ip = if self.transport == ip::V4_LEN { same(0..2) && same(6..10) } else { same(0..4) && same(6..8) };
        let t = self.transport;
        let tcp = || {
            same(t + 8..t + 13)
                && (a[t + 13] ^ b[t + 13]) & !TCP_PSH == 0
                && same(t + 14..t + 16)
                && same(t + 18..self.headers_len)
        };
        ip && (self.gso == Gso::Udp || tcp())
    }
}

/// The IPv4 identification; of no meaning for IPv6.
fn identification(packet: &[u8]) -> u16 {
    packet.get(4..6).map_or(0, |bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::split::Segments;
    use super::super::testing::{self, Packet};
    use super::super::virtio::HEADER_LEN;
    use super::*;

    /// What is written for a batch of packets.
    fn coalesce(packets: &[Vec<u8>], offload: Offload) -> Vec<Vec<u8>> {
        let mut buffer = Vec::new();
        let mut coalescer = Coalescer::new(offload);
        let mut ranges = Vec::new();
        for packet in packets {
            ranges.push(buffer.len()..buffer.len() + packet.len());
            buffer.extend_from_slice(packet);
        }
        for range in ranges {
            coalescer.push(&buffer, range);
        }
        let mut written = Vec::new();
        coalescer.drain(&mut buffer, |parts| {
            written.push(parts.iter().flat_map(|part| part.iter().copied()).collect());
        });
        assert!(coalescer.is_empty());
        written
    }

    /// Cuts what was written as the kernel would.
    fn cut(written: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        for bytes in written {
            let header = VirtioHeader::decode(bytes).unwrap();
            let mut packet = bytes[HEADER_LEN..].to_vec();
            let mut segments = Segments::new(&header, &mut packet).unwrap();
            while let Some(segment) = segments.next_segment() {
                packets.push(segment.to_vec());
            }
        }
        packets
    }

    /// A stream of `count` packets that follow each other, `len` bytes of payload each.
    fn stream(first: &Packet, count: usize, len: usize) -> Vec<Packet> {
        (0..count)
            .map(|i| Packet {
                sequence: first.sequence.wrapping_add((i * len) as u32),
                id: first.id.wrapping_add(i as u16),
                payload: (0..len).map(|b| (b * 3 + i) as u8).collect(),
                ..first.clone()
            })
            .collect()
    }

    fn bytes(packets: &[Packet]) -> Vec<Vec<u8>> {
        packets.iter().map(Packet::build).collect()
    }

    #[test]
    fn packets_of_a_flow_become_one_and_cut_to_the_same_again() {
        for first in [Packet::tcp(false, 0), Packet::tcp(true, 0), Packet::udp(false, 0), Packet::udp(true, 0)] {
            let mut packets = stream(&first, 20, 1000);
            packets[19].payload.truncate(123);
            let packets = bytes(&packets);
            let written = coalesce(&packets, Offload::TcpAndUdp);
            assert_eq!(written.len(), 1, "{first:?}");
            assert!(VirtioHeader::decode(&written[0]).unwrap().needs_checksum);
            assert_eq!(cut(&written), packets);
        }
    }

    #[test]
    fn flows_that_interleave_are_each_put_together() {
        let a = stream(&Packet::tcp(false, 0), 10, 500);
        let b = stream(&Packet { ports: (1, 2), ..Packet::tcp(false, 0) }, 10, 700);
        let mixed: Vec<_> = a.iter().zip(&b).flat_map(|(a, b)| [a.build(), b.build()]).collect();
        assert_eq!(coalesce(&mixed, Offload::TcpAndUdp).len(), 2);
    }

    #[test]
    fn without_the_offload_every_packet_stays_alone() {
        let tcp = bytes(&stream(&Packet::tcp(false, 0), 5, 100));
        let udp = bytes(&stream(&Packet::udp(false, 0), 5, 100));
        assert_eq!(coalesce(&tcp, Offload::None).len(), 5);
        assert_eq!(coalesce(&udp, Offload::Tcp).len(), 5);
        for written in coalesce(&tcp, Offload::None) {
            assert_eq!(written[..HEADER_LEN], [0; HEADER_LEN]);
        }
    }

    #[test]
    fn a_push_ends_the_group_and_survives() {
        let mut packets = stream(&Packet::tcp(false, 0), 6, 100);
        packets[2].flags |= TCP_PSH;
        let packets = bytes(&packets);
        let written = coalesce(&packets, Offload::TcpAndUdp);
        assert_eq!(written.len(), 2);
        assert_eq!(cut(&written), packets);
    }

    #[test]
    fn whatever_differs_in_a_header_starts_anew_and_order_is_kept() {
        let changes: &[fn(&mut Packet)] = &[
            |p| p.ack += 1,
            |p| p.window += 1,
            |p| p.tos ^= 1,
            |p| p.ttl -= 1,
            |p| p.flags |= 0x01,
            |p| p.flags |= 0x80,
            |p| p.flags |= TCP_ECE,
            |p| p.flags |= 0x20,
            |p| p.options[7] = 9,
            |p| p.options.extend([1, 1, 1, 0]),
            |p| p.sequence += 1,
            |p| p.sequence -= 100,
            |p| p.payload.push(1),
            |p| p.id += 5,
            |p| p.dont_fragment = false,
        ];
        for (index, change) in changes.iter().enumerate() {
            let mut packets = stream(&Packet::tcp(false, 0), 6, 100);
            packets[3..].iter_mut().for_each(change);
            let packets = bytes(&packets);
            let written = coalesce(&packets, Offload::TcpAndUdp);
            assert!(written.len() > 1, "change {index}");
            assert_eq!(cut(&written), packets, "change {index}");
        }
    }

    #[test]
    fn a_short_packet_ends_the_group() {
        let mut packets = stream(&Packet::udp(true, 0), 6, 100);
        packets[2].payload.truncate(50);
        let packets = bytes(&packets);
        let written = coalesce(&packets, Offload::TcpAndUdp);
        assert_eq!(written.len(), 2);
        assert_eq!(cut(&written), packets);
    }

    #[test]
    fn constant_identifications_join_only_with_dont_fragment() {
        for (dont_fragment, groups) in [(true, 1), (false, 4)] {
            let mut packets = stream(&Packet { dont_fragment, ..Packet::tcp(false, 0) }, 4, 100);
            packets.iter_mut().for_each(|packet| packet.id = 0);
            assert_eq!(coalesce(&bytes(&packets), Offload::TcpAndUdp).len(), groups);
        }
    }

    #[test]
    fn damaged_packets_pass_alone_and_unchanged() {
        let mut packets = bytes(&stream(&Packet::tcp(false, 0), 4, 100));
        packets[1][60] ^= 1;
        packets[2][11] ^= 1;
        let written = coalesce(&packets, Offload::TcpAndUdp);
        assert_eq!(written.len(), 4);
        for (written, packet) in written.iter().zip(&packets) {
            assert_eq!(&written[HEADER_LEN..], packet);
        }
    }

    #[test]
    fn groups_stay_within_64_kib_and_64_packets() {
        for (len, count) in [(1400, 60), (10, 200)] {
            let packets = bytes(&stream(&Packet::tcp(false, 0), count, len));
            let written = coalesce(&packets, Offload::TcpAndUdp);
            assert!(written.iter().all(|bytes| bytes.len() <= HEADER_LEN + MAX_BYTES));
            assert_eq!(cut(&written), packets);
        }
    }

    #[test]
    fn fragments_options_and_extension_headers_stay_alone() {
        let mut fragment = Packet::udp(false, 100).build();
        fragment[6] |= 0x20;
        let mut extension = Packet::udp(true, 100).build();
        extension[6] = 0;
        for packet in [fragment, extension, vec![0x46; 100], vec![0x45], vec![]] {
            let written = coalesce(&[packet.clone(), packet.clone()], Offload::TcpAndUdp);
            assert_eq!(
                written,
                [[vec![0; HEADER_LEN], packet.clone()].concat(), [vec![0; HEADER_LEN], packet].concat()]
            );
        }
    }

    proptest! {
        #[test]
        fn no_input_panics_and_nothing_is_lost(
            packets in prop::collection::vec(
                prop_oneof![
                    prop::collection::vec(any::<u8>(), 0..120),
                    (any::<bool>(), any::<bool>(), 0usize..60, 0u32..200, any::<u8>()).prop_map(|(v6, tcp, len, sequence, flags)| {
                        let base = if tcp { Packet::tcp(v6, len) } else { Packet::udp(v6, len) };
                        Packet { sequence, flags, ..base }.build()
                    }),
                ],
                0..40,
            ),
        ) {
            let written = coalesce(&packets, Offload::TcpAndUdp);
            let total: usize = packets.iter().map(Vec::len).sum();
            prop_assert!(written.iter().map(|bytes| bytes.len() - HEADER_LEN).sum::<usize>() <= total);
            prop_assert!(written.len() <= packets.len());
        }

        #[test]
        fn streams_with_any_faults_cut_to_the_packets_that_came(
            v6: bool,
            steps in prop::collection::vec((0usize..3, prop_oneof![8 => Just(0u8), 1 => 1u8..8]), 1..80),
        ) {
            let mut packets = Vec::new();
            let mut sequence = [5000u32; 3];
            let mut ids = [0u16; 3];
            for (flow, fault) in steps {
                let mut packet = Packet { ports: (flow as u16, 9), ..Packet::tcp(v6, 64) };
                packet.sequence = sequence[flow];
                packet.id = ids[flow];
                match fault {
                    1 => packet.flags |= TCP_PSH,
                    2 => packet.payload.truncate(10),
                    3 => packet.sequence = packet.sequence.wrapping_sub(64),
                    4 => packet.ack = 3,
                    5 => packet.payload.clear(),
                    6 => packet.flags = 0x11,
                    7 => packet.tos = 3,
                    _ => {}
                }
                sequence[flow] = packet.sequence.wrapping_add(packet.payload.len() as u32);
                ids[flow] = ids[flow].wrapping_add(1);
                packets.push(packet);
            }
            let cut = cut(&coalesce(&bytes(&packets), Offload::TcpAndUdp));
            prop_assert_eq!(cut.len(), packets.len());
            // Between flows the order may change; within a flow it may not.
            for flow in 0..3u16 {
                let of_flow = |bytes: &&Vec<u8>| {
                    let t = if v6 { 40 } else { 20 };
                    bytes[t..t + 2] == flow.to_be_bytes()
                };
                let came: Vec<_> = packets.iter().filter(|packet| packet.ports.0 == flow).map(Packet::build).collect();
                let went: Vec<_> = cut.iter().filter(of_flow).cloned().collect();
                prop_assert_eq!(went, came);
            }
            cut.iter().for_each(|packet| testing::assert_sound(packet));
        }
    }
}
