//! Packets from the wire, some that follow each other in a flow, some damaged, some no packets at all: cutting what is
//! written gives them back, each flow in its order.

#![no_main]

use std::collections::BTreeMap;

use keystone_fuzz::Input;
use keystone_fuzz::packet::{Packet, finish, flow, normal};
use keystone_mesh::tun::Offload;
use keystone_mesh::tun::coalesce::Coalescer;
use keystone_mesh::tun::split::Segments;
use keystone_mesh::tun::virtio::{HEADER_LEN, VirtioHeader};
use libfuzzer_sys::fuzz_target;

/// Packets of one batch.
const MAX_BATCH: usize = 128;
/// Bytes of one batch: two super packets and some.
const MAX_BYTES: usize = 160 << 10;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let offload = [Offload::TcpAndUdp, Offload::Tcp, Offload::None][usize::from(input.byte() % 3)];
    let mut streams = Streams::default();
    let mut packets = Vec::new();
    let mut bytes = 0;
    while !input.is_empty() && packets.len() < MAX_BATCH && bytes < MAX_BYTES {
        let packet = streams.next_packet(&mut input);
        bytes += packet.len();
        packets.push(packet);
    }
    let given_back = cut(&coalesce(&packets, offload));
    assert_eq!(by_flow(&given_back), by_flow(&packets));
});

/// Where each of four flows stands.
#[derive(Default)]
struct Streams(BTreeMap<u8, (u32, u16)>);

impl Streams {
    /// The next packet as five bytes ask for it: usually the one that follows the flow's last one.
    fn next_packet(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        let [kind, len, flags, change, at] = input.take();
        if change & 0xf == 0xf {
            return input.slice(len.into()).to_vec();
        }
        let (sequence, id) = self.0.entry(kind & 0x0f).or_insert((u32::MAX - 500, u16::MAX - 3));
        let len = usize::from(len) * if kind & 0x80 == 0 { 1 } else { 257 };
        let packet = Packet {
            v6: kind & 1 != 0,
            tcp: kind & 2 != 0,
            port: (kind >> 2 & 3).into(),
            sequence: sequence.wrapping_add(if change & 0xf == 1 { 1 } else { 0 }),
            // Mostly a plain ACK.
            flags: if change & 0xf == 2 { flags } else { 0x10 | flags & 0x08 },
            window: if change & 0xf == 3 { at.into() } else { 501 },
            id: id.wrapping_add(if change & 0xf == 4 { at.into() } else { 0 }),
            dont_fragment: kind & 0x10 == 0,
            ttl: if change & 0xf == 5 { at } else { 64 },
            payload: (0..len.min(65_400)).map(|i| (i % 251) as u8 ^ at).collect(),
        };
        *sequence = sequence.wrapping_add(packet.payload.len() as u32);
        *id = id.wrapping_add(if kind & 0x20 == 0 { 1 } else { 0 });
        let mut bytes = packet.build();
        let damaged = usize::from(at) % bytes.len();
        if change & 0xf == 6 {
            bytes[damaged] ^= flags;
        }
        if change & 0xf == 7 && damaged >= 20 {
            // A header that nobody planned for, with the checksum that belongs to it.
            bytes[damaged] ^= flags;
            finish(&mut bytes);
        }
        bytes
    }
}

fn coalesce(packets: &[Vec<u8>], offload: Offload) -> Vec<Vec<u8>> {
    let mut buffer = packets.concat();
    let mut coalescer = Coalescer::new(offload);
    let mut start = 0;
    for packet in packets {
        coalescer.push(&buffer, start..start + packet.len());
        start += packet.len();
    }
    let mut written = Vec::new();
    coalescer.drain(&mut buffer, |parts| written.push(parts.iter().flat_map(|part| part.to_vec()).collect()));
    assert!(coalescer.is_empty());
    written
}

/// Cuts what was written as the kernel would.
fn cut(written: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    for bytes in written {
        let header = VirtioHeader::decode(bytes).expect("a virtio header");
        let mut packet = bytes[HEADER_LEN..].to_vec();
        assert!(packet.len() <= 65535, "a super packet of {} bytes", packet.len());
        let mut segments = Segments::new(&header, &mut packet).expect("a super packet that can be cut");
        while let Some(segment) = segments.next_segment() {
            packets.push(segment.to_vec());
        }
    }
    packets
}

/// The packets of each flow in their order. Those without one may be anywhere, so their order is their value.
fn by_flow(packets: &[Vec<u8>]) -> BTreeMap<Option<Vec<u8>>, Vec<Vec<u8>>> {
    let mut flows: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for packet in packets {
        flows.entry(flow(packet)).or_default().push(normal(packet));
    }
    if let Some(others) = flows.get_mut(&None) {
        others.sort();
    }
    flows
}
