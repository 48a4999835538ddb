//! Fragments in any order, at any place, of any size. Every byte that a part carries says where it belongs, so a
//! packet that comes out with a byte in the wrong place, or with one that never arrived, is noticed.

#![no_main]

use std::time::{Duration, Instant};

use keystone_fuzz::Input;
use keystone_mesh_core::NodeId;
use keystone_mesh_core::relay::frame::{MAX_PACKET, Place};
use keystone_mesh_core::relay::reassembly::{PER_SENDER, Reassembly, TOTAL};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mut now = Instant::now();
    let mut reassembly = Reassembly::new();
    let mut senders = std::collections::BTreeSet::new();
    let mut completed = 0;
    while !input.is_empty() {
        let [sender, id, pause] = input.take();
        let place = Place { id: id.into(), offset: input.number(), total: input.number() };
        let part: Vec<u8> = (0..input.number() % 10_000)
            .map(|i| expected(sender, place, usize::from(place.offset) + usize::from(i)))
            .collect();
        now += Duration::from_millis(pause.into());
        senders.insert(sender);

        if let Some(packet) = reassembly.handle_fragment(NodeId::from_bytes([sender; 32]), place, &part, now) {
            completed += 1;
            assert_eq!(packet.len(), usize::from(place.total));
            assert!((1..=MAX_PACKET).contains(&packet.len()));
            assert!(packet.iter().enumerate().all(|(at, byte)| *byte == expected(sender, place, at)));
        }
        assert_eq!(reassembly.counters().completed, completed);
        assert!(reassembly.unfinished() <= TOTAL.min(senders.len() * PER_SENDER));
    }
    reassembly.handle_timeout(now + Duration::from_secs(2));
    assert_eq!(reassembly.unfinished(), 0);
});

/// Never zero, which is what a byte that did not arrive looks like.
fn expected(sender: u8, place: Place, at: usize) -> u8 {
    let mixed = at.wrapping_mul(31) ^ usize::from(sender) ^ usize::from(place.id) << 3 ^ usize::from(place.total) << 1;
    (mixed % 255) as u8 + 1
}
