//! The table of differences, and the property that applying one leaves none.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const INDEX: u32 = 7;

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn route(dst: &str, mtu: Option<u32>) -> Route {
    Route { dst: net(dst), mtu, via: None }
}

fn own(dst: &str) -> KernelRoute {
    KernelRoute {
        dst: net(dst),
        metric: ROUTE_METRIC,
        protocol: ROUTE_PROTOCOL,
        link: Some(INDEX),
        via: None,
        mtu: None,
    }
}

fn own_rule(family: Family) -> KernelRule {
    KernelRule { family, priority: RULE_PRIORITY, table: TABLE, protocol: ROUTE_PROTOCOL, not_marked: true }
}

fn desired() -> Desired {
    Desired {
        mtu: 1420,
        up: true,
        addresses: vec![net("10.98.0.3/32"), net("fd00:98::3/128")],
        routes: vec![route("10.98.0.0/16", None), route("fd00:98::/48", None)],
        rule: true,
    }
}

fn fresh() -> Actual {
    Actual { link: Some(Link { index: INDEX, mtu: 1500, up: false, tun: true }), ipv6: true, ..Actual::default() }
}

fn settled() -> Actual {
    let mut kernel = fresh();
    kernel.apply_all(&diff(&desired(), &kernel).ops);
    kernel
}

fn local(name: &str, address: &str) -> HostInterface {
    HostInterface {
        name: name.into(),
        up: true,
        addresses: vec![HostAddress { net: net(address), global: true, preferred: true }],
    }
}

/// The kernel as far as the mesh needs it: what it refuses and what it does by itself.
impl Actual {
    fn apply_all(&mut self, ops: &[KernelOp]) {
        for op in ops {
            self.apply(*op);
        }
    }

    fn apply(&mut self, op: KernelOp) {
        let link = || self.link.expect("only rules are changed without an interface");
        match op {
            KernelOp::RemoveRule(rule) => self.rules.retain(|r| *r != rule),
            KernelOp::RemoveRoute(route) => self.routes.retain(|r| *r != route),
            KernelOp::SetMtu(mtu) => self.link = Some(Link { mtu, ..link() }),
            KernelOp::SetUp => self.link = Some(Link { up: true, ..link() }),
            KernelOp::AddAddress(address) => {
                assert!(!self.addresses.contains(&address), "EEXIST: {address}");
                self.addresses.push(address);
            }
            KernelOp::RemoveAddress(address) => {
                assert!(self.addresses.contains(&address), "EADDRNOTAVAIL: {address}");
                self.addresses.retain(|a| *a != address);
            }
            KernelOp::AddRoute(route) => {
                assert!(link().up, "ENETDOWN: {}", route.dst);
                assert!(!self.has_route(route.dst), "EEXIST: {}", route.dst);
                self.add_route(route);
            }
            KernelOp::ReplaceRoute(route) => {
                assert!(link().up, "ENETDOWN: {}", route.dst);
                assert!(self.has_route(route.dst), "nothing to replace: {}", route.dst);
                self.routes.retain(|r| r.dst != route.dst || r.metric != ROUTE_METRIC);
                self.add_route(route);
            }
            KernelOp::AddRule(family) => self.rules.push(own_rule(family)),
            KernelOp::SetDown => {
                self.link = Some(Link { up: false, ..link() });
                self.routes.retain(|r| r.link != Some(INDEX));
            }
            KernelOp::RemoveLink => {
                self.link = None;
                self.addresses.clear();
                self.routes.retain(|r| r.link != Some(INDEX));
            }
        }
    }

    fn has_route(&self, dst: IpNet) -> bool {
        self.routes.iter().any(|r| r.dst == dst && r.metric == ROUTE_METRIC)
    }

    fn add_route(&mut self, route: Route) {
        // A gateway is taken only where the host reaches it by itself.
        assert!(route.via.is_none_or(|via| on_link(via, &self.others)), "ENETUNREACH: {route:?}");
        let link = Some(INDEX).filter(|_| route.via.is_none());
        self.routes.push(KernelRoute { mtu: route.mtu, link, via: route.via, ..own(&route.dst.to_string()) });
    }

    fn foreign(&self) -> (Vec<KernelRoute>, Vec<KernelRule>, Vec<HostInterface>) {
        (
            self.routes.iter().copied().filter(|r| r.protocol != ROUTE_PROTOCOL).collect(),
            self.rules.iter().copied().filter(|r| r.protocol != ROUTE_PROTOCOL).collect(),
            self.others.clone(),
        )
    }
}

#[test]
fn a_fresh_interface_is_built_from_the_link_up_to_the_rule() {
    assert_eq!(
        diff(&desired(), &fresh()).ops,
        [
            KernelOp::SetMtu(1420),
            KernelOp::SetUp,
            KernelOp::AddAddress(net("10.98.0.3/32")),
            KernelOp::AddAddress(net("fd00:98::3/128")),
            KernelOp::AddRoute(route("10.98.0.0/16", None)),
            KernelOp::AddRoute(route("fd00:98::/48", None)),
            KernelOp::AddRule(Family::V4),
            KernelOp::AddRule(Family::V6),
        ]
    );
}

#[test]
fn a_neighbour_is_the_way_while_it_is_on_a_network_of_this_host_and_the_mesh_otherwise() {
    let mut wanted = desired();
    wanted.routes.push(Route { via: Some("192.168.1.7".parse().unwrap()), ..route("10.42.1.0/24", None) });
    let pods = Route { via: Some("192.168.1.7".parse().unwrap()), ..route("10.42.1.0/24", None) };
    let through_mesh = route("10.42.1.0/24", None);
    let mut kernel = settled();
    for (others, expected) in [
        (vec![], KernelOp::AddRoute(through_mesh)),
        (vec![local("eth0", "192.168.1.2/24")], KernelOp::ReplaceRoute(pods)),
        (vec![HostInterface { up: false, ..local("eth0", "192.168.1.2/24") }], KernelOp::ReplaceRoute(through_mesh)),
        (vec![local("eth0", "192.168.1.2/24")], KernelOp::ReplaceRoute(pods)),
        // The address is this host's own, or of another network.
        (vec![local("eth0", "192.168.1.7/24")], KernelOp::ReplaceRoute(through_mesh)),
    ] {
        kernel.others = others;
        let ops = diff(&wanted, &kernel).ops;
        assert_eq!(ops, [expected]);
        kernel.apply_all(&ops);
        assert_eq!(diff(&wanted, &kernel).ops, []);
    }
    kernel.others = vec![local("eth0", "192.168.2.2/24")];
    assert_eq!(diff(&wanted, &kernel).ops, []);
    wanted.routes.last_mut().unwrap().via = Some("fd00::7".parse().unwrap());
    kernel.others = vec![local("eth0", "fd00::2/64")];
    assert_eq!(diff(&wanted, &kernel).ops, [], "a neighbour of the other family leads nowhere");
}

#[test]
fn removal_goes_from_the_rule_down_to_the_link() {
    let mut kernel = settled();
    let removal = removal(&kernel);
    assert_eq!(
        removal.ops,
        [
            KernelOp::RemoveRule(own_rule(Family::V4)),
            KernelOp::RemoveRule(own_rule(Family::V6)),
            KernelOp::RemoveRoute(own("10.98.0.0/16")),
            KernelOp::RemoveRoute(own("fd00:98::/48")),
            KernelOp::RemoveLink,
        ]
    );
    kernel.apply_all(&removal.ops);
    assert_eq!(super::removal(&kernel), Diff::default());
}

/// A case of the table: what is changed by hand in a settled kernel, or in the desire, and what restores it.
struct Case {
    name: &'static str,
    change: fn(&mut Desired, &mut Actual),
    ops: Vec<KernelOp>,
    warnings: Vec<Warning>,
}

fn differences() -> Vec<Case> {
    vec![
        Case { name: "nothing", change: |_, _| {}, ops: vec![], warnings: vec![] },
        Case {
            name: "a route was deleted",
            change: |_, k| k.routes.retain(|r| r.dst != net("10.98.0.0/16")),
            ops: vec![KernelOp::AddRoute(route("10.98.0.0/16", None))],
            warnings: vec![],
        },
        Case {
            name: "a rule was deleted",
            change: |_, k| k.rules.retain(|r| r.family != Family::V6),
            ops: vec![KernelOp::AddRule(Family::V6)],
            warnings: vec![],
        },
        Case {
            name: "our rule was replaced by a foreign one that says the same",
            change: |_, k| k.rules[0].protocol = 3,
            ops: vec![],
            warnings: vec![],
        },
        Case {
            name: "a foreign rule has our priority and says something else",
            change: |_, k| k.rules.push(KernelRule { protocol: 4, table: 254, ..own_rule(Family::V4) }),
            ops: vec![],
            warnings: vec![],
        },
        Case {
            name: "a rule of ours says something else",
            change: |_, k| k.rules[0].not_marked = false,
            ops: vec![
                KernelOp::RemoveRule(KernelRule { not_marked: false, ..own_rule(Family::V4) }),
                KernelOp::AddRule(Family::V4),
            ],
            warnings: vec![],
        },
        Case {
            name: "the path MTU of a destination is measured",
            change: |d, _| d.routes[0].mtu = Some(1280),
            ops: vec![KernelOp::ReplaceRoute(route("10.98.0.0/16", Some(1280)))],
            warnings: vec![],
        },
        Case {
            name: "a route of ours leads to an interface of an earlier life",
            change: |_, k| k.routes[0].link = Some(3),
            ops: vec![KernelOp::ReplaceRoute(route("10.98.0.0/16", None))],
            warnings: vec![],
        },
        Case {
            name: "an address changes: the new one first, or the kernel drops all routes with the old one",
            change: |d, _| d.addresses[0] = net("10.98.0.4/32"),
            ops: vec![KernelOp::AddAddress(net("10.98.0.4/32")), KernelOp::RemoveAddress(net("10.98.0.3/32"))],
            warnings: vec![],
        },
        Case {
            name: "the kernel made a link-local address",
            change: |_, k| k.addresses.push(net("fe80::1/64")),
            ops: vec![],
            warnings: vec![],
        },
        Case {
            name: "a foreign route stands in our table, elsewhere",
            change: |_, k| k.routes.push(KernelRoute { protocol: 4, ..own("192.0.2.0/24") }),
            ops: vec![],
            warnings: vec![],
        },
        Case {
            name: "a foreign route stands where ours should",
            change: |d, k| {
                d.routes.push(route("192.0.2.0/24", None));
                k.routes.push(KernelRoute { protocol: 4, ..own("192.0.2.0/24") });
            },
            ops: vec![],
            warnings: vec![Warning::ForeignRoute { dst: net("192.0.2.0/24"), protocol: 4 }],
        },
        Case {
            name: "a foreign route with another metric is in nobody's way",
            change: |d, k| {
                d.routes.push(route("192.0.2.0/24", None));
                k.routes.push(KernelRoute { protocol: 4, metric: 9, ..own("192.0.2.0/24") });
            },
            ops: vec![KernelOp::AddRoute(route("192.0.2.0/24", None))],
            warnings: vec![],
        },
        Case {
            name: "a route has host bits and stands twice",
            change: |d, _| {
                d.routes.push(route("192.0.2.7/24", Some(1300)));
                d.routes.push(route("192.0.2.0/24", None));
            },
            ops: vec![KernelOp::AddRoute(route("192.0.2.0/24", None))],
            warnings: vec![],
        },
    ]
}

fn circumstances() -> Vec<Case> {
    vec![
        Case {
            name: "the interface is gone",
            change: |_, k| k.apply(KernelOp::RemoveLink),
            ops: vec![],
            warnings: vec![Warning::LinkMissing],
        },
        Case {
            name: "the interface is somebody else's",
            change: |_, k| {
                k.link = Some(Link { tun: false, mtu: 1500, ..k.link.unwrap() });
                k.routes.clear();
            },
            ops: vec![],
            warnings: vec![Warning::LinkNotTun],
        },
        Case {
            name: "the interface was taken down, and IPv4 routes with it",
            change: |_, k| k.apply(KernelOp::SetDown),
            ops: vec![
                KernelOp::SetUp,
                KernelOp::AddRoute(route("10.98.0.0/16", None)),
                KernelOp::AddRoute(route("fd00:98::/48", None)),
            ],
            warnings: vec![],
        },
        Case {
            name: "the interface shall be down",
            change: |d, _| d.up = false,
            ops: vec![
                KernelOp::RemoveRoute(own("10.98.0.0/16")),
                KernelOp::RemoveRoute(own("fd00:98::/48")),
                KernelOp::SetDown,
            ],
            warnings: vec![],
        },
        Case {
            name: "IPv6 is switched off",
            change: |_, k| {
                k.ipv6 = false;
                k.addresses.pop();
                k.routes.pop();
            },
            ops: vec![KernelOp::RemoveRule(own_rule(Family::V6))],
            warnings: vec![Warning::Ipv6Disabled],
        },
        Case {
            name: "a mesh route would take the home network away",
            change: |d, k| {
                d.routes.push(route("192.168.0.0/16", None));
                k.others.push(local("eth0", "192.168.1.20/24"));
            },
            ops: vec![],
            warnings: vec![Warning::RouteCoversLocalNetwork {
                route: net("192.168.0.0/16"),
                network: net("192.168.1.0/24"),
                interface: "eth0".into(),
            }],
        },
        Case {
            name: "the host joins a network that an installed route covers",
            change: |_, k| k.others.push(local("wlan0", "10.98.7.3/24")),
            ops: vec![KernelOp::RemoveRoute(own("10.98.0.0/16"))],
            warnings: vec![Warning::RouteCoversLocalNetwork {
                route: net("10.98.0.0/16"),
                network: net("10.98.7.0/24"),
                interface: "wlan0".into(),
            }],
        },
        Case {
            name: "the home network is larger than the mesh route, which is more specific",
            change: |_, k| k.others.push(local("eth0", "10.0.0.7/8")),
            ops: vec![],
            warnings: vec![],
        },
        Case {
            name: "a single address is no network",
            change: |_, k| k.others.push(local("lo", "10.98.0.9/32")),
            ops: vec![],
            warnings: vec![],
        },
    ]
}

#[test]
fn each_difference_has_its_operations() {
    for case in differences().into_iter().chain(circumstances()) {
        let (mut desired, mut kernel) = (desired(), settled());
        (case.change)(&mut desired, &mut kernel);
        let found = diff(&desired, &kernel);
        assert_eq!(found.ops, case.ops, "{}", case.name);
        assert_eq!(found.warnings, case.warnings.into_iter().collect(), "{}", case.name);

        kernel.apply_all(&found.ops);
        assert_eq!(diff(&desired, &kernel).ops, [], "{}: applying it leaves a difference", case.name);
    }
}

#[test]
fn an_interface_that_is_no_tun_survives_removal() {
    let mut kernel = settled();
    kernel.link = Some(Link { tun: false, ..kernel.link.unwrap() });
    let removal = removal(&kernel);
    assert!(!removal.ops.contains(&KernelOp::RemoveLink));
    assert_eq!(removal.warnings, BTreeSet::from([Warning::LinkNotTun]));
}

/// Few addresses, so that desired and actual state meet often.
fn prefixes() -> impl Strategy<Value = IpNet> {
    (any::<bool>(), 0_u8..4, 0_usize..3).prop_map(|(v6, n, length)| {
        let text = match v6 {
            false => format!("10.98.{n}.0/{}", [16, 24, 32][length]),
            true => format!("fd00:98:0:{n}::/{}", [48, 64, 128][length]),
        };
        net(&text).trunc()
    })
}

fn desires() -> impl Strategy<Value = Desired> {
    let via = prop_oneof![Just(None), Just(Some("10.98.1.77")), Just(Some("fd00:98:0:1::77")), Just(Some("192.0.2.1"))];
    let via = via.prop_map(|via| via.map(|text| text.parse().unwrap()));
    let routes = vec((prefixes(), proptest::option::of(1280_u32..1283), via), 0..8)
        .prop_map(|routes| routes.into_iter().map(|(dst, mtu, via)| Route { dst, mtu, via }).collect());
    (1280_u32..1283, any::<bool>(), vec(prefixes(), 0..4), routes, any::<bool>())
        .prop_map(|(mtu, up, addresses, routes, rule)| Desired { mtu, up, addresses, routes, rule })
}

fn kernels() -> impl Strategy<Value = Actual> {
    let protocol = || prop_oneof![Just(ROUTE_PROTOCOL), Just(4)];
    let link = proptest::option::of((1280_u32..1283, any::<bool>(), proptest::bool::weighted(0.9)));
    let metric = prop_oneof![Just(ROUTE_METRIC), Just(9)];
    let route = (prefixes(), metric, protocol(), proptest::option::of(INDEX..INDEX + 2));
    let rule = (any::<bool>(), protocol(), any::<bool>());
    let others = vec(prefixes(), 0..2);
    (link, vec(prefixes(), 0..4), vec(route, 0..6), vec(rule, 0..3), others, any::<bool>()).prop_map(
        |(link, mut addresses, routes, rules, others, ipv6)| {
            let link = link.map(|(mtu, up, tun)| Link { index: INDEX, mtu, up, tun });
            addresses.sort_unstable();
            addresses.dedup();
            let mut routes: Vec<KernelRoute> = routes
                .into_iter()
                .map(|(dst, metric, protocol, link)| {
                    // The kernel takes routes away with their interface, so foreign ones here lead elsewhere.
                    let link = link.filter(|_| protocol == ROUTE_PROTOCOL);
                    KernelRoute { dst, metric, protocol, link, via: None, mtu: None }
                })
                .collect();
            routes.sort_unstable_by_key(|r| (r.dst, r.metric));
            routes.dedup_by_key(|r| (r.dst, r.metric));
            let rules = rules.into_iter().map(|(v6, protocol, not_marked)| {
                let family = if v6 { Family::V6 } else { Family::V4 };
                KernelRule { protocol, not_marked, ..own_rule(family) }
            });
            let mut rules: Vec<KernelRule> = rules.collect();
            rules.sort_unstable();
            rules.dedup();
            let others = others.iter().map(|n| local("eth0", &n.to_string())).collect();
            Actual { link, addresses, routes, rules, others, ipv6 }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn applying_a_difference_leaves_none_and_touches_nothing_foreign(desired in desires(), kernel in kernels()) {
        let first = diff(&desired, &kernel);
        let mut after = kernel.clone();
        after.apply_all(&first.ops);
        prop_assert_eq!(diff(&desired, &after).ops, []);
        prop_assert_eq!(after.foreign(), kernel.foreign());
    }

    #[test]
    fn removal_leaves_nothing_of_ours_and_everything_else(kernel in kernels()) {
        let mut after = kernel.clone();
        after.link = after.link.map(|link| Link { tun: true, ..link });
        let foreign = after.foreign();
        let ops = removal(&after).ops;
        after.apply_all(&ops);
        prop_assert_eq!(removal(&after).ops, []);
        prop_assert_eq!(after.link, None);
        prop_assert_eq!(after.foreign(), foreign);
    }
}
