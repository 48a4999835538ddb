//! From records to what is wanted, and from what is there to that: once per change of the mesh, at every node.

use std::collections::BTreeMap;
use std::hint::black_box;

use criterion::{BenchmarkId, Criterion};
use keystone_benches::{mesh, network, secret};
use keystone_mesh_core::PeerConfig;
use keystone_mesh_core::kernel::{self, Actual, Desired, KernelRoute, Link, ROUTE_METRIC, ROUTE_PROTOCOL, Route};
use keystone_mesh_core::key::PublicKey;
use keystone_mesh_core::plan::{self, Plan};

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for nodes in [100, 1_000] {
        plans(&mut criterion, nodes);
    }
    criterion.final_summary();
}

fn plans(criterion: &mut Criterion, nodes: u32) {
    let mut group = criterion.benchmark_group("plan");
    let (me, network, entries) = (secret(0).identity().id(), network(), mesh(nodes));
    let none = BTreeMap::new();
    let planned = plan::plan(me, &network, &entries, &none);
    assert!(planned.faults.is_empty(), "{:?}", planned.faults);
    group.bench_function(BenchmarkId::new("plan", nodes), |b| {
        b.iter(|| plan::plan(me, &network, black_box(&entries), &none));
    });

    let peers = peers(&planned);
    let mut changed = peers.clone();
    changed.pop_first();
    group.bench_function(BenchmarkId::new("diff-one-removed", nodes), |b| {
        b.iter(|| plan::diff(black_box(&peers), black_box(&changed)));
    });
    group.bench_function(BenchmarkId::new("diff-from-nothing", nodes), |b| {
        b.iter(|| plan::diff(&BTreeMap::new(), black_box(&peers)));
    });

    let (desired, settled) = kernel_state(&planned);
    group.bench_function(BenchmarkId::new("kernel-diff-settled", nodes), |b| {
        b.iter(|| kernel::diff(black_box(&desired), black_box(&settled)));
    });
    let fresh = Actual { routes: vec![], ..settled };
    group.bench_function(BenchmarkId::new("kernel-diff-fresh", nodes), |b| {
        b.iter(|| kernel::diff(black_box(&desired), black_box(&fresh)));
    });
    group.finish();
}

fn peers(plan: &Plan) -> BTreeMap<PublicKey, PeerConfig> {
    plan.members.iter().map(|(key, member)| (*key, member.config.clone())).collect()
}

/// What a plan wants of the kernel, and a kernel that holds its routes.
fn kernel_state(plan: &Plan) -> (Desired, Actual) {
    const INDEX: u32 = 7;
    let routes: Vec<Route> = plan.routes().map(|dst| Route { dst, mtu: None, via: None }).collect();
    let held = routes.iter().map(|route| KernelRoute {
        dst: route.dst,
        metric: ROUTE_METRIC,
        protocol: ROUTE_PROTOCOL,
        link: Some(INDEX),
        via: None,
        mtu: None,
    });
    let actual = Actual {
        link: Some(Link { index: INDEX, mtu: 1280, up: true, tun: true }),
        addresses: plan.addresses.clone(),
        routes: held.collect(),
        ipv6: true,
        ..Actual::default()
    };
    let desired = Desired { mtu: 1280, up: true, addresses: plan.addresses.clone(), routes, rule: true };
    (desired, actual)
}
