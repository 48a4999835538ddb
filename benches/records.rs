//! Signed statements and tokens: once per change of a node at every other node, and once per join.

use std::hint::black_box;

use criterion::Criterion;
use keystone_benches::{network, network_key, record, secret, signed_record};
use keystone_mesh_core::network::SignedNetwork;
use keystone_mesh_core::node::SignedRecord;
use keystone_mesh_core::token::{Token, TokenId, TokenRecord, TokenSecret};

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    records(&mut criterion);
    tokens(&mut criterion);
    criterion.final_summary();
}

fn records(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("records");
    let identity = secret(0).identity();
    let (plain, signed) = (record(0), signed_record(0));
    group.bench_function("sign", |b| b.iter(|| plain.clone().sign(&identity)));
    let map = signed.to_map();
    group.bench_function("read-and-verify", |b| b.iter(|| SignedRecord::from_map(black_box(&map))));
    let json = serde_json::to_vec(&signed).expect("a record is JSON");
    group.bench_function("read-and-verify-json", |b| {
        b.iter(|| serde_json::from_slice::<SignedRecord>(black_box(&json)));
    });
    group.bench_function("write-json", |b| b.iter(|| serde_json::to_vec(black_box(&signed))));
    let document = network().sign(&network_key()).expect("the sample is small").to_map();
    group.bench_function("read-and-verify-network", |b| b.iter(|| SignedNetwork::from_map(black_box(&document))));
    group.finish();
}

fn tokens(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("tokens");
    let (id, secret) = (TokenId::from_bytes([1; 8]), TokenSecret::from_bytes([2; 20]));
    let token = Token { network: network().id, id, secret: secret.clone(), rendezvous: network().rendezvous() };
    let text = token.encode();
    group.bench_function("parse", |b| b.iter(|| black_box(text.as_str()).parse::<Token>()));
    let stored = TokenRecord {
        id,
        hash: secret.hash(),
        created: 100,
        expires: Some(200),
        uses_left: Some(10),
        names: Some("worker-*".parse().expect("a pattern")),
        routes: vec![],
        revoked: false,
    };
    let name = record(0).name;
    group.bench_function("check", |b| b.iter(|| stored.check(black_box(&secret), &name, 150)));
    group.finish();
}
