//! Longest-prefix lookup: once per packet in each direction, so nanoseconds count.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};

use criterion::{BenchmarkId, Criterion, Throughput};
use ipnet::IpNet;
use keystone_benches::{address, numbers, pods};
use keystone_mesh_core::allowed_ips::AllowedIps;

/// Addresses that are looked up in one iteration.
const LOOKUPS: usize = 1024;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    lookup(&mut criterion);
    criterion.final_summary();
}

fn lookup(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lookup");
    for prefixes in [10, 1_000, 10_000] {
        let entries = entries(prefixes);
        let table = AllowedIps::new(entries.iter().copied());
        let addrs: Vec<IpAddr> = addresses(prefixes).take(LOOKUPS).collect();
        group.throughput(Throughput::Elements(LOOKUPS as u64));
        group.bench_function(BenchmarkId::new("get", prefixes), |b| {
            b.iter(|| addrs.iter().filter_map(|addr| table.get(black_box(*addr))).fold(0, u32::wrapping_add));
        });
        group.throughput(Throughput::Elements(u64::from(prefixes)));
        group.bench_function(BenchmarkId::new("build", prefixes), |b| {
            b.iter(|| AllowedIps::new(entries.iter().copied()));
        });
    }
    group.finish();
}

/// Half mesh addresses, half pod networks.
fn entries(prefixes: u32) -> Vec<(IpNet, u32)> {
    (0..prefixes).map(|n| (if n % 2 == 0 { address(n / 2) } else { pods(n / 2) }, n)).collect()
}

/// Addresses in pod networks, mostly of the table.
fn addresses(prefixes: u32) -> impl Iterator<Item = IpAddr> {
    let addr = move |number: u32| Ipv4Addr::from_bits(0xac10_0000 + number % (prefixes << 7)).into();
    numbers().map(addr)
}
