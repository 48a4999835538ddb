//! What the demultiplexer makes of a datagram's first bytes, and the destination of a packet that comes out of a tunnel.

#![no_main]

use keystone_mesh::tun::ip;
use keystone_mesh::udp::DatagramKind;
use keystone_mesh_core::probe::{self, Unverified};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let kind = DatagramKind::of(data);
    let first = data.first().copied().unwrap_or(0);
    let expected = match first {
        1..=4 if data.len() >= 4 && data[1..4] == [0; 3] => DatagramKind::WireGuard,
        5 => DatagramKind::Probe,
        0x40.. => DatagramKind::Quic,
        _ => DatagramKind::Unknown,
    };
    assert_eq!(kind, expected);
    assert!(kind == DatagramKind::Probe || !probe::is_probe(data));
    assert!(kind == DatagramKind::Probe || Unverified::parse(data).is_err());

    if let Some(destination) = ip::destination(data) {
        assert_eq!(destination.is_ipv4(), first >> 4 == 4);
        assert_eq!(destination.is_ipv6(), first >> 4 == 6);
        assert!(data.len() >= 20);
    }
});
