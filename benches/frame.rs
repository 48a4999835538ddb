//! Relay frames: once per relayed packet at both ends, and twice at the relay.

use std::hint::black_box;
use std::time::Instant;

use criterion::{Criterion, Throughput};
use keystone_benches::secret;
use keystone_mesh_core::relay::{Frame, Reassembly};

/// A sealed packet of the default MTU.
const SEALED: usize = 1280 + 32;
/// The smallest datagram that QUIC may be down to.
const SMALL_PATH: usize = 1162;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    frames(&mut criterion);
    criterion.final_summary();
}

fn frames(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("frame");
    group.throughput(Throughput::Bytes(SEALED as u64));
    let peer = secret(0).identity().id();
    let packet = vec![7; SEALED];
    let frame = Frame::Data { peer, packet: &packet };
    let bytes = frame.encode();
    group.bench_function("encode", |b| b.iter(|| black_box(&frame).encode()));
    group.bench_function("decode", |b| b.iter(|| Frame::decode(black_box(&bytes)).map(|frame| frame.encoded_len())));
    group.bench_function("forward", |b| {
        b.iter(|| Frame::decode(black_box(&bytes)).map(|frame| frame.readdressed(peer).encode()));
    });
    group.bench_function("split", |b| {
        b.iter(|| {
            black_box(frame).split(1, SMALL_PATH).map(|parts| parts.map(|part| part.encode().len()).sum::<usize>())
        });
    });
    let parts: Vec<Frame<'_>> = frame.split(1, SMALL_PATH).expect("it can be split").collect();
    let (now, mut reassembly) = (Instant::now(), Reassembly::new());
    group.bench_function("reassemble", |b| {
        b.iter(|| parts.iter().find_map(|part| put(&mut reassembly, *part, now)).map(|packet| packet.len()));
    });
    group.finish();
}

fn put(reassembly: &mut Reassembly, part: Frame<'_>, now: Instant) -> Option<Vec<u8>> {
    match part {
        Frame::Fragment { peer, place, part } => reassembly.handle_fragment(peer, place, part, now),
        Frame::Data { .. } => None,
    }
}
