//! Longest-prefix lookup, against trying every prefix.

#![no_main]

use std::net::IpAddr;

use ipnet::IpNet;
use keystone_fuzz::Input;
use keystone_mesh_core::allowed_ips::AllowedIps;
use libfuzzer_sys::fuzz_target;

/// More prefixes take long to try one by one, and find nothing that fewer do not.
const MAX_PREFIXES: usize = 32;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mut entries: Vec<(IpNet, usize)> = Vec::new();
    while !input.is_empty() && entries.len() < MAX_PREFIXES {
        let (addr, len) = (address(&mut input), input.byte());
        let len = len % if addr.is_ipv4() { 33 } else { 129 };
        entries.push((IpNet::new(addr, len).expect("within the address's bits"), entries.len()));
    }
    let table = AllowedIps::new(entries.iter().copied());
    let edges =
        |net: &IpNet| [net.addr(), net.network(), net.broadcast(), before(net.network()), after(net.broadcast())];
    for addr in entries.iter().flat_map(|(net, _)| edges(net)) {
        let longest = entries.iter().filter(|(net, _)| net.contains(&addr)).max_by_key(|(net, _)| net.prefix_len());
        assert_eq!(table.get(addr), longest.map(|(_, value)| *value), "{addr}");
    }
});

/// An address with few bits set or cleared, so that prefixes often nest.
fn address(input: &mut Input<'_>) -> IpAddr {
    let [shape, first, second, at] = input.take();
    let filler = if shape & 2 == 0 { 0 } else { 0xff };
    if shape & 1 == 0 {
        let mut octets = [filler; 4];
        octets[usize::from(at % 4)] = second;
        octets[0] ^= first;
        octets.into()
    } else {
        let mut octets = [filler; 16];
        octets[usize::from(at % 16)] = second;
        octets[0] ^= first;
        octets.into()
    }
}

fn before(addr: IpAddr) -> IpAddr {
    match addr {
        IpAddr::V4(addr) => IpAddr::V4(addr.to_bits().wrapping_sub(1).into()),
        IpAddr::V6(addr) => IpAddr::V6(addr.to_bits().wrapping_sub(1).into()),
    }
}

fn after(addr: IpAddr) -> IpAddr {
    match addr {
        IpAddr::V4(addr) => IpAddr::V4(addr.to_bits().wrapping_add(1).into()),
        IpAddr::V6(addr) => IpAddr::V6(addr.to_bits().wrapping_add(1).into()),
    }
}
