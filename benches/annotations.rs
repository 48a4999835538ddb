//! The annotation contract at its size: every Node read for the first time, and listed again unchanged.

use std::collections::BTreeMap;
use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use keystone_benches::{mesh, network_key};
use keystone_mesh_core::annotations;
use keystone_mesh_core::directory::{Carrier, Directory, Object};
use keystone_mesh_core::ledger::{Holder, Ledger};
use keystone_mesh_core::node::NodeName;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for nodes in [1_000, 5_000] {
        directories(&mut criterion, nodes);
    }
    ledgers(&mut criterion);
    criterion.final_summary();
}

fn directories(criterion: &mut Criterion, nodes: u32) {
    let mut group = criterion.benchmark_group("annotations");
    group.throughput(Throughput::Elements(nodes.into())).sample_size(10);
    let objects: Vec<Object> = mesh(nodes).into_iter().map(|(name, entry)| object(&name, &entry)).collect();
    if nodes == 1_000 {
        let named: Vec<(NodeName, &BTreeMap<String, String>)> =
            objects.iter().map(|o| (o.name.parse().expect("a node name"), &o.annotations)).collect();
        group.bench_function(BenchmarkId::new("decode", nodes), |b| {
            b.iter(|| {
                named.iter().filter(|(name, map)| annotations::decode(name, black_box(map)).record.is_ok()).count()
            });
        });
    }
    let network = network_key().id();
    let mut directory = Directory::new(network, vec![], vec![]);
    assert_eq!(directory.handle_listed(Carrier::Node, &objects).len(), nodes as usize);
    group.bench_function(BenchmarkId::new("relist-unchanged", nodes), |b| {
        b.iter(|| assert_eq!(directory.handle_listed(Carrier::Node, black_box(&objects)), []));
    });
    let one = &objects[nodes as usize / 2];
    group.throughput(Throughput::Elements(1));
    group.bench_function(BenchmarkId::new("one-unchanged", nodes), |b| {
        b.iter(|| assert_eq!(directory.handle_object(Carrier::Node, black_box(one)), []));
    });
    group.finish();
}

fn object(name: &NodeName, entry: &keystone_mesh_core::node::Entry) -> Object {
    let mut annotations = annotations::of_record(&entry.record);
    annotations.extend(entry.approval.iter().flat_map(annotations::of_approval));
    annotations.insert("node.alpha.kubernetes.io/ttl".into(), "0".into());
    Object { name: name.to_string(), annotations }
}

fn ledgers(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ledger");
    let network = keystone_benches::network();
    let mut ledger = Ledger::default();
    for (name, entry) in mesh(5_000) {
        let holder = Holder::Node(name, entry.record.get().identity);
        ledger.claim(&network, &holder, 0).expect("65,534 numbers");
    }
    let newcomer = Holder::Peer("laptop".parse().expect("a name"));
    group.bench_function("claim-among-5000", |b| {
        b.iter_batched(
            || ledger.clone(),
            |mut ledger| ledger.claim(&network, black_box(&newcomer), 0),
            criterion::BatchSize::LargeInput,
        );
    });
    let mut claimed = ledger.clone();
    claimed.claim(&network, &newcomer, 0).expect("a number");
    group.bench_function("edits-among-5000", |b| b.iter(|| black_box(&claimed).edits_since(&ledger)));
    group.finish();
}
