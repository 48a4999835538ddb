//! What saves system calls: super packets taken apart and put together, and the checksum that both spend most on.

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use keystone_benches::{TCP_HEADERS, tcp_flow, tcp_packet};
use keystone_mesh::tun::Offload;
use keystone_mesh::tun::checksum;
use keystone_mesh::tun::coalesce::Coalescer;
use keystone_mesh::tun::split::Segments;
use keystone_mesh::tun::virtio::{Gso, VirtioHeader};

/// Payload of a segment at the default MTU of 1280.
const SEGMENT: usize = 1280 - TCP_HEADERS;
/// Segments of a super packet: as many as fit 64 KiB.
const SEGMENTS: usize = (65535 - TCP_HEADERS) / SEGMENT;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    split(&mut criterion);
    coalesce(&mut criterion);
    sum(&mut criterion);
    criterion.final_summary();
}

fn split(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("offload");
    let packet = tcp_packet(1, 1, SEGMENTS * SEGMENT);
    let header = VirtioHeader {
        needs_checksum: true,
        gso: Gso::Tcp4,
        header_len: TCP_HEADERS as u16,
        gso_size: SEGMENT as u16,
        checksum_start: 20,
        checksum_offset: 16,
    };
    group.throughput(Throughput::Bytes(packet.len() as u64));
    group.bench_function("split-64k", |b| {
        let cut = |packet: &mut Vec<u8>| {
            let mut segments = Segments::new(&header, packet).expect("a super packet");
            while let Some(segment) = segments.next_segment() {
                black_box(segment);
            }
        };
        b.iter_batched_ref(|| packet.clone(), cut, BatchSize::LargeInput);
    });
    group.finish();
}

fn coalesce(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("offload");
    let flow = tcp_flow(SEGMENTS, SEGMENT);
    let mut coalescer = Coalescer::new(Offload::TcpAndUdp);
    group.throughput(Throughput::Bytes(flow.len() as u64));
    group.bench_function("coalesce-64k", |b| {
        let join = |buffer: &mut Vec<u8>| {
            for start in (0..buffer.len()).step_by(TCP_HEADERS + SEGMENT) {
                coalescer.push(buffer, start..start + TCP_HEADERS + SEGMENT);
            }
            let mut writes = 0;
            coalescer.drain(buffer, |parts| {
                black_box(parts);
                writes += 1;
            });
            assert_eq!(writes, 1);
        };
        b.iter_batched_ref(|| flow.clone(), join, BatchSize::LargeInput);
    });
    group.finish();
}

fn sum(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("checksum");
    for len in [64, 1280, 65535] {
        let bytes = vec![7; len];
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(BenchmarkId::new("sum", len), |b| {
            b.iter(|| checksum::fold(checksum::sum(black_box(&bytes), 0)));
        });
    }
    group.finish();
}
