//! Probes: a few per peer and second while a path is looked for, one every few seconds after.

use std::hint::black_box;

use criterion::Criterion;
use keystone_benches::secret;
use keystone_mesh_core::probe::{KeyHint, Message, Probe, ProbeKey, TxId, Unverified, full_size};

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    probes(&mut criterion);
    criterion.final_summary();
}

fn probes(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("probe");
    let (a, b) = (secret(0).wireguard(0), secret(1).wireguard(0));
    group.bench_function("agree", |bench| bench.iter(|| ProbeKey::agree(black_box(&a), &b.public_key())));
    let key = ProbeKey::agree(&a, &b.public_key()).expect("honest keys");
    let probe =
        Probe { sender: KeyHint::of(&a.public_key()), txid: TxId([7; 12]), message: Message::Ping { wanted: true } };
    for (name, len) in [("small", 0), ("full-size", full_size(1280))] {
        let datagram = probe.encode(&key, len);
        group.bench_function(format!("encode-{name}"), |b| b.iter(|| black_box(&probe).encode(&key, len)));
        group.bench_function(format!("parse-and-verify-{name}"), |b| {
            b.iter(|| Unverified::parse(black_box(&datagram)).and_then(|read| read.verify(&key)));
        });
        group.bench_function(format!("parse-only-{name}"), |b| b.iter(|| Unverified::parse(black_box(&datagram))));
    }
    group.finish();
}
