//! Relay frames: decode, encode, split for a smaller path, split once more, and put together again.

#![no_main]

use std::time::Instant;

use keystone_fuzz::Input;
use keystone_mesh_core::NodeId;
use keystone_mesh_core::relay::frame::{FRAGMENT_HEADER, Frame, FrameError, MAX_PACKET, MIN_DATAGRAM};
use keystone_mesh_core::relay::reassembly::Reassembly;
use libfuzzer_sys::fuzz_target;

/// Parts that reassembly takes of one packet.
const MAX_PARTS: usize = 20;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let (max_datagram, smaller, turn) = (input.number().into(), input.number().into(), input.byte());
    let Ok(frame) = Frame::decode(input.rest()) else { return };
    assert_eq!(frame.encode(), input.rest());
    assert_eq!(frame.encoded_len(), input.rest().len());
    let other = NodeId::from_bytes([7; 32]);
    assert_eq!(frame.readdressed(other).peer(), other);
    assert_eq!(frame.readdressed(other).readdressed(frame.peer()), frame);

    let Some(parts) = split(frame, max_datagram) else { return };
    // What the relay does where the receiver's path is smaller still.
    let parts: Option<Vec<_>> = parts.into_iter().map(|part| split(part, smaller)).collect();
    let Some(mut parts) = parts.map(|parts| parts.concat()) else { return };
    let Frame::Data { peer, packet } = frame else { return };
    if let [Frame::Data { .. }] = parts[..] {
        return;
    }
    let count = parts.len();
    parts.rotate_left(usize::from(turn) % count);
    let (now, mut reassembly) = (Instant::now(), Reassembly::new());
    let mut whole = Vec::new();
    for part in &parts {
        let Frame::Fragment { place, part, .. } = part else { panic!("a packet is split or it is not") };
        whole.extend(reassembly.handle_fragment(peer, *place, part, now));
    }
    if count <= MAX_PARTS {
        assert_eq!(whole, [packet]);
        assert_eq!(reassembly.unfinished(), 0);
    } else {
        assert!(whole.is_empty());
    }
});

/// Splits, and checks what comes out: the same bytes at the same places, in frames that fit and decode.
fn split(frame: Frame<'_>, max_datagram: usize) -> Option<Vec<Frame<'_>>> {
    let parts: Vec<_> = match frame.split(9, max_datagram) {
        Ok(parts) => parts.collect(),
        Err(error) => {
            assert_eq!(error, FrameError::Short(max_datagram));
            assert!(max_datagram < MIN_DATAGRAM && max_datagram < frame.encoded_len());
            return None;
        }
    };
    if frame.encoded_len() <= max_datagram {
        assert_eq!(parts, [frame]);
        return Some(parts);
    }
    let (mut offset, end, total, id, bytes) = match frame {
        Frame::Data { packet, .. } => (0, packet.len(), packet.len(), 9, packet),
        Frame::Fragment { place, part, .. } => {
            (place.offset.into(), usize::from(place.offset) + part.len(), place.total.into(), place.id, part)
        }
    };
    let start = offset;
    assert!(total <= MAX_PACKET);
    for part in &parts {
        assert!(part.encoded_len() <= max_datagram);
        assert_eq!(Frame::decode(&part.encode()), Ok(*part));
        let Frame::Fragment { peer, place, part } = part else { panic!("what is split is fragments") };
        assert_eq!((*peer, place.id, usize::from(place.total)), (frame.peer(), id, total));
        assert_eq!(usize::from(place.offset), offset);
        assert_eq!(*part, &bytes[offset - start..offset - start + part.len()]);
        offset += part.len();
    }
    assert_eq!(offset, end);
    assert_eq!(parts.len(), bytes.len().div_ceil(max_datagram - FRAGMENT_HEADER));
    Some(parts)
}
