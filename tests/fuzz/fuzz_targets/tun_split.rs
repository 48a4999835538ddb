//! Packets from the TUN device: ten bytes of virtio header, then a packet. Segments together carry the payload, fit
//! the announced size, and are sound packets, whatever the headers say.

#![no_main]

use keystone_fuzz::packet;
use keystone_mesh::tun::ip;
use keystone_mesh::tun::split::Segments;
use keystone_mesh::tun::virtio::{Gso, HEADER_LEN, VirtioHeader};
use libfuzzer_sys::fuzz_target;

const MAX_PACKET: usize = 65535;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

fuzz_target!(|data: &[u8]| {
    let Ok(header) = VirtioHeader::decode(data) else { return };
    let original = &data[HEADER_LEN..];
    if original.len() > MAX_PACKET {
        return;
    }
    let mut packet = original.to_vec();
    let Ok(mut segments) = Segments::new(&header, &mut packet) else { return };
    if header.gso == Gso::None {
        check_whole(&header, original, &mut segments);
    } else {
        check_cut(&header, original, &mut segments);
    }
    assert_eq!((segments.left(), segments.next_len()), (0, None));
    assert!(segments.next_segment().is_none());
});

/// A packet that stays as it is, but for the two bytes of its checksum.
fn check_whole(header: &VirtioHeader, original: &[u8], segments: &mut Segments<'_>) {
    assert_eq!((segments.left(), segments.next_len()), (1, Some(original.len())));
    let whole = segments.next_segment().expect("one segment");
    let mut expected = original.to_vec();
    if header.needs_checksum {
        let field = usize::from(header.checksum_start) + usize::from(header.checksum_offset);
        expected[field..field + 2].copy_from_slice(&whole[field..field + 2]);
    }
    assert_eq!(whole, expected);
}

fn check_cut(header: &VirtioHeader, original: &[u8], segments: &mut Segments<'_>) {
    let (tcp, transport) = (header.gso != Gso::Udp, usize::from(header.checksum_start));
    let headers_len = transport + if tcp { usize::from(original[transport + 12] >> 4) * 4 } else { 8 };
    let (payload, size) = (&original[headers_len..], usize::from(header.gso_size));
    let count = payload.len().div_ceil(size).max(1);
    assert_eq!(segments.left(), count);
    for index in 0..count {
        let expected = &payload[index * size..payload.len().min((index + 1) * size)];
        assert_eq!(segments.next_len(), Some(headers_len + expected.len()));
        let segment = segments.next_segment().expect("as many as announced");
        assert_eq!(&segment[headers_len..], expected, "payload of segment {index}");
        assert!(ip::destination(segment).is_some());
        packet::assert_sound(segment, transport, tcp);
        if tcp {
            let sequence = |p: &[u8]| u32::from_be_bytes(*p[transport + 4..].first_chunk().expect("a TCP header"));
            assert_eq!(sequence(segment), sequence(original).wrapping_add((index * size) as u32));
            let only = |flag: u8, here: bool| if here { flag } else { 0 };
            let kept = !(FIN | PSH | CWR) | only(FIN | PSH, index + 1 == count) | only(CWR, index == 0);
            assert_eq!(segment[transport + 13], original[transport + 13] & kept, "flags of segment {index}");
        }
    }
}
