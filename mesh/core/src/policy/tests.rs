//! The compiled table against a model that decides by the letter of the specification.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::*;
use crate::nftables::{Action, Change, Element, Field, Hook, Key, Match, Present, Table, Verdict, changes, family_of};

// --- a machine that does what the kernel does with a table ---

#[derive(Clone, Copy, Debug)]
struct Packet {
    from: IpAddr,
    to: IpAddr,
    protocol: u8,
    /// Bytes 2 and 3 behind the IP header.
    port: u16,
    reply: bool,
}

impl Packet {
    fn new(from: &str, to: &str, protocol: u8, port: u16) -> Self {
        Self { from: from.parse().unwrap(), to: to.parse().unwrap(), protocol, port, reply: false }
    }
}

fn passes(table: &Table, packet: &Packet) -> bool {
    let entered = table.chains.iter().filter(|(_, chain)| chain.hook == Some(Hook::Forward));
    entered.map(|(name, _)| name).all(|chain| runs(table, chain, packet) != Verdict::Drop)
}

fn runs(table: &Table, chain: &str, packet: &Packet) -> Verdict {
    for rule in &table.chains[chain].rules {
        if !rule.matches.iter().all(|matched| matches(table, matched, packet)) {
            continue;
        }
        let verdict = match &rule.action {
            Action::Verdict(verdict) => verdict.clone(),
            Action::CountedDrop => Verdict::Drop,
            Action::AsMapped(field, map) => match mapped(table, *field, map, packet) {
                Some(verdict) => verdict,
                None => continue,
            },
            Action::Masquerade => Verdict::Accept,
        };
        let verdict = match verdict {
            Verdict::Jump(to) => runs(table, &to, packet),
            other @ (Verdict::Accept | Verdict::Drop | Verdict::Return) => other,
        };
        match verdict {
            Verdict::Return if matches!(rule.action, Action::Verdict(Verdict::Return)) => return Verdict::Return,
            Verdict::Return | Verdict::Jump(_) => {}
            decided @ (Verdict::Accept | Verdict::Drop) => return decided,
        }
    }
    Verdict::Return
}

fn matches(table: &Table, matched: &Match, packet: &Packet) -> bool {
    match matched {
        Match::Replies => packet.reply,
        Match::NotOutBy(_) => true,
        Match::Ports { protocol, low, high } => packet.protocol == *protocol && (*low..=*high).contains(&packet.port),
        Match::In { fields, set, negated } => {
            let set = &table.sets[set];
            key(fields, packet).is_some_and(|key| {
                let found = set.elements.keys().any(|element| element.contains(&key, &set.shape.key));
                found != *negated
            })
        }
    }
}

fn mapped(table: &Table, field: Field, map: &str, packet: &Packet) -> Option<Verdict> {
    let key = key(&[field], packet)?;
    table.sets[map].elements.get(&Element { low: key, high: key })?.clone()
}

fn key(fields: &[Field], packet: &Packet) -> Option<Key> {
    let mut bytes = Vec::new();
    for field in fields {
        match field {
            Field::Source(family) if family_of(packet.from) == *family => octets(packet.from, &mut bytes),
            Field::Destination(family) if family_of(packet.to) == *family => octets(packet.to, &mut bytes),
            Field::Source(_) | Field::Destination(_) => return None,
            Field::Protocol => bytes.extend([packet.protocol, 0, 0, 0]),
            Field::DestinationPort => bytes.extend([packet.port.to_be_bytes(), [0, 0]].concat()),
        }
    }
    Key::new(&bytes)
}

fn octets(address: IpAddr, bytes: &mut Vec<u8>) {
    match address {
        IpAddr::V4(v4) => bytes.extend(v4.octets()),
        IpAddr::V6(v6) => bytes.extend(v6.octets()),
    }
}

// --- the specification, read naively ---

/// Whether a node lets a packet pass, by what <https://kubernetes.io/docs/concepts/services-networking/network-policies/>
/// says.
fn allowed(cluster: &Cluster, node: &str, own: &[IpNet], packet: &Packet) -> bool {
    if packet.reply || (packet.from == packet.to && is_isolated_here(cluster, node, packet.from)) {
        return true;
    }
    let both = [(Direction::Egress, packet.from, packet.to), (Direction::Ingress, packet.to, packet.from)];
    both.into_iter().all(|(direction, pod, peer)| match owner(cluster, node, pod) {
        Some((name, there)) if there.node.as_deref() == Some(node) => {
            let mut policies = isolating(cluster, name, there, direction).peekable();
            policies.peek().is_none()
                || policies.any(|policy| {
                    let mut rules = policy.rules(direction).unwrap().iter();
                    rules.any(|rule| rule_allows(cluster, node, name, rule, peer, packet))
                })
        }
        Some(_) | None => !(own.iter().any(|net| net.contains(&pod)) && somebody_waits(cluster, node, direction)),
    })
}

fn owner<'a>(cluster: &'a Cluster, node: &str, address: IpAddr) -> Option<(&'a Name, &'a Pod)> {
    let mut claims: Vec<_> =
        cluster.pods.iter().filter(|(_, pod)| pod.counts() && pod.addresses.contains(&address)).collect();
    // The node believes its own pods first; then the most alive, and of those the first by name.
    claims.sort_by_key(|(_, pod)| std::cmp::Reverse((pod.node.as_deref() == Some(node), pod.stage)));
    claims.first().copied()
}

fn isolating<'a>(
    cluster: &'a Cluster,
    name: &'a Name,
    pod: &'a Pod,
    direction: Direction,
) -> impl Iterator<Item = &'a Policy> {
    cluster
        .policies
        .iter()
        .filter(move |((namespace, _), p)| *namespace == name.0 && p.pods.matches(&pod.labels))
        .filter(move |(_, policy)| policy.rules(direction).is_some())
        .map(|(_, policy)| policy)
}

fn is_isolated_here(cluster: &Cluster, node: &str, address: IpAddr) -> bool {
    owner(cluster, node, address).is_some_and(|(name, pod)| {
        let both = [Direction::Egress, Direction::Ingress];
        pod.node.as_deref() == Some(node) && both.iter().any(|d| isolating(cluster, name, pod, *d).next().is_some())
    })
}

fn somebody_waits(cluster: &Cluster, node: &str, direction: Direction) -> bool {
    cluster.pods.iter().any(|(name, pod)| {
        let here = pod.counts() && pod.node.as_deref() == Some(node);
        here && pod.addresses.is_empty() && isolating(cluster, name, pod, direction).next().is_some()
    })
}

fn rule_allows(cluster: &Cluster, node: &str, selected: &Name, rule: &Rule, peer: IpAddr, packet: &Packet) -> bool {
    let receiver = owner(cluster, node, packet.to);
    let by_port = rule.ports.as_ref().is_none_or(|ports| {
        ports.iter().any(|port| match port {
            Port::Range(protocol, low, high) => packet.protocol == *protocol && (*low..=*high).contains(&packet.port),
            Port::Named(protocol, name) => receiver.is_some_and(|(_, pod)| {
                pod.ports.iter().any(|named| {
                    (named.protocol, &named.name) == (*protocol, name)
                        && (packet.protocol, packet.port) == (named.protocol, named.port)
                })
            }),
        })
    });
    let by_peer = rule.peers.as_ref().is_none_or(|peers| {
        peers.iter().any(|one| match one {
            Peer::Block { net, except } => net.contains(&peer) && !except.iter().any(|except| except.contains(&peer)),
            Peer::Pods { namespaces, pods } => owner(cluster, node, peer).is_some_and(|((namespace, _), pod)| {
                let in_namespace = match namespaces {
                    None => *namespace == selected.0,
                    Some(selector) => cluster.namespaces.get(namespace).is_some_and(|labels| selector.matches(labels)),
                };
                in_namespace && pods.matches(&pod.labels)
            }),
        })
    });
    by_port && by_peer
}

// --- clusters at random ---

/// SplitMix64: every seed is another cluster, on every machine the same.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % sides as u64).unwrap()
    }

    fn one_in(&mut self, sides: usize) -> bool {
        self.roll(sides) == 0
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.roll(from.len())].clone()
    }

    fn labels(&mut self) -> Labels {
        let keys = ["app", "tier"].into_iter().filter(|_| !self.one_in(3)).collect::<Vec<_>>();
        keys.into_iter().map(|key| (key.to_owned(), self.pick(&["a", "b", "c"]).to_owned())).collect()
    }

    fn selector(&mut self) -> Value {
        let label = self.pick(&["app", "tier"]);
        let value = self.pick(&["a", "b", "c"]);
        match self.roll(7) {
            0 | 1 => json!({}),
            2 | 3 => json!({ "matchLabels": { label: value } }),
            4 => json!({ "matchExpressions": [{ "key": label, "operator": "In", "values": [value, "a"] }] }),
            5 => json!({ "matchExpressions": [{ "key": label, "operator": "NotIn", "values": [value] }] }),
            _ => {
                let operator = self.pick(&["Exists", "DoesNotExist"]);
                json!({ "matchExpressions": [{ "key": label, "operator": operator }] })
            }
        }
    }

    fn peer(&mut self) -> Value {
        match self.roll(6) {
            0 | 1 => json!({ "podSelector": self.selector() }),
            2 => json!({ "namespaceSelector": self.selector() }),
            3 => json!({ "namespaceSelector": self.selector(), "podSelector": self.selector() }),
            4 => match self.roll(4) {
                0 => json!({ "ipBlock": { "cidr": "0.0.0.0/0", "except": ["10.42.0.0/16", "192.0.2.0/25"] } }),
                1 => json!({ "ipBlock": { "cidr": "192.0.2.0/24", "except": ["192.0.2.4/30"] } }),
                2 => json!({ "ipBlock": { "cidr": "10.42.1.0/25" } }),
                _ => json!({ "ipBlock": { "cidr": "10.42.2.0/29", "except": ["10.42.2.0/29"] } }),
            },
            _ => match self.roll(3) {
                0 => json!({ "ipBlock": { "cidr": "::/0", "except": ["fd00:42::/32"] } }),
                1 => json!({ "ipBlock": { "cidr": "fd00:42:0:1::/64" } }),
                _ => json!({ "ipBlock": { "cidr": "not a cidr" } }),
            },
        }
    }

    fn port(&mut self) -> Value {
        let protocol = self.pick(&["TCP", "UDP", "SCTP"]);
        match self.roll(6) {
            0 => json!({ "protocol": protocol }),
            1 | 2 => json!({ "protocol": protocol, "port": self.pick(&[80, 81, 443]) }),
            3 => json!({ "port": 80, "endPort": self.pick(&[80, 82, 65535]) }),
            _ => json!({ "protocol": protocol, "port": self.pick(&["web", "dns"]) }),
        }
    }

    fn rules(&mut self, peers: &str) -> Vec<Value> {
        (0..self.roll(3))
            .map(|_| {
                let mut rule = json!({});
                if !self.one_in(4) {
                    rule[peers] = (0..1 + self.roll(2)).map(|_| self.peer()).collect();
                }
                if !self.one_in(2) {
                    rule["ports"] = (0..1 + self.roll(3)).map(|_| self.port()).collect();
                }
                rule
            })
            .collect()
    }

    fn policy(&mut self) -> Policy {
        let mut spec = json!({ "podSelector": self.selector() });
        match self.roll(4) {
            0 => {}
            1 => spec["policyTypes"] = json!(["Ingress"]),
            2 => spec["policyTypes"] = json!(["Egress"]),
            _ => spec["policyTypes"] = json!(["Ingress", "Egress"]),
        }
        if !self.one_in(4) {
            spec["ingress"] = self.rules("from").into();
        }
        if !self.one_in(3) {
            spec["egress"] = self.rules("to").into();
        }
        Policy::read(&spec)
    }

    fn pod(&mut self, number: usize) -> Pod {
        let node = 1 + self.roll(2);
        let host = u8::try_from(1 + number).unwrap();
        // Now and then several say that they have one address, of one node or of both.
        let v4 = match self.roll(16) {
            0 => IpAddr::from([10, 42, u8::try_from(node).unwrap(), 1]),
            1 => IpAddr::from([10, 42, u8::try_from(3 - node).unwrap(), u8::try_from(1 + self.roll(6)).unwrap()]),
            _ => IpAddr::from([10, 42, u8::try_from(node).unwrap(), host]),
        };
        let v6 = IpAddr::from(Ipv6Addr::new(0xfd00, 0x42, 0, u16::try_from(node).unwrap(), 0, 0, 0, host.into()));
        let addresses = match self.roll(12) {
            0 => vec![],
            1 => vec![v6],
            2 | 3 => vec![v4],
            _ => vec![v4, v6],
        };
        let port = |name: &str, protocol, port| NamedPort { name: name.to_owned(), protocol, port };
        let all = [port("web", TCP, 80), port("web", TCP, 81), port("dns", UDP, 443), port("dns", TCP, 443)];
        let stage = match self.roll(12) {
            0 => Stage::Finished,
            1 => Stage::Leaving,
            _ => Stage::Alive,
        };
        Pod {
            labels: Arc::new(self.labels()),
            node: (!self.one_in(15)).then(|| format!("node-{node}").into()),
            addresses,
            host_network: self.one_in(12),
            stage,
            ports: all.into_iter().filter(|_| self.one_in(2)).collect(),
        }
    }

    fn cluster(&mut self) -> Cluster {
        let mut cluster = Cluster::default();
        for namespace in ["default", "kube", "web"] {
            if !self.one_in(10) {
                cluster.namespaces.insert(namespace.into(), Arc::new(self.labels()));
            }
        }
        for number in 0..4 + self.roll(10) {
            let namespace = self.pick(&["default", "kube", "web"]);
            let pod = self.pod(number);
            cluster.pods.insert((namespace.into(), format!("pod-{number}").into()), pod);
        }
        for number in 0..self.roll(6) {
            let namespace = self.pick(&["default", "kube", "web"]);
            let policy = self.policy();
            cluster.policies.insert((namespace.into(), format!("policy-{number}").into()), policy);
        }
        cluster
    }

    fn packet(&mut self, cluster: &Cluster) -> Packet {
        let addresses: Vec<IpAddr> = cluster.pods.values().flat_map(|pod| pod.addresses.iter().copied()).collect();
        let strangers = ["192.0.2.5", "192.0.2.130", "198.51.100.1", "10.42.1.200", "2001:db8::1", "fd00:42:0:1::77"];
        let mut address = || match self.one_in(4) || addresses.is_empty() {
            true => self.pick(&strangers).parse().unwrap(),
            false => self.pick(&addresses),
        };
        let from: IpAddr = address();
        let to = std::iter::repeat_with(address).find(|to| family_of(*to) == family_of(from)).unwrap();
        let protocol = self.pick(&[TCP, TCP, UDP, SCTP, 1]);
        Packet { from, to, protocol, port: self.pick(&[80, 81, 82, 443, 9]), reply: self.one_in(20) }
    }
}

const OWN: [(&str, &str); 2] = [("10.42.1.0/24", "fd00:42:0:1::/64"), ("10.42.2.0/24", "fd00:42:0:2::/64")];

fn own(node: usize) -> [IpNet; 2] {
    let (v4, v6) = OWN[node];
    [v4.parse().unwrap(), v6.parse().unwrap()]
}

#[test]
fn the_compiled_table_decides_as_the_specification_does() {
    let (mut dropped, mut passed) = (0, 0);
    for seed in 0..500 {
        let mut dice = Dice(seed);
        let cluster = dice.cluster();
        for (node, name) in ["node-1", "node-2"].into_iter().enumerate() {
            let table = compile(&cluster, name, &own(node)).table;
            refers_to_what_is_there(&table);
            for _ in 0..60 {
                let packet = dice.packet(&cluster);
                let expected = allowed(&cluster, name, &own(node), &packet);
                let found = passes(&table, &packet);
                assert_eq!(found, expected, "seed {seed}, {name}: {packet:?}\n{cluster:#?}\n{table}");
                *(if found { &mut passed } else { &mut dropped }) += 1;
            }
        }
    }
    println!("{passed} packets passed, {dropped} were dropped");
    assert!(dropped > 5_000 && passed > 5_000, "both outcomes occur often: {passed} and {dropped}");
}

fn refers_to_what_is_there(table: &Table) {
    for rule in table.chains.values().flat_map(|chain| &chain.rules) {
        for matched in &rule.matches {
            if let Match::In { fields, set, .. } = matched {
                let types: Vec<_> = fields.iter().map(|field| field.data_type()).collect();
                assert_eq!(table.sets[set].shape.key, types, "{rule}");
            }
        }
    }
    for set in table.sets.values() {
        let chains = set.elements.values().flatten().filter_map(Verdict::chain);
        chains.for_each(|chain| assert!(table.chains.contains_key(chain), "{chain}"));
        let mut last: Option<Element> = None;
        for element in set.elements.keys().filter(|_| set.shape.ranges && set.shape.key.len() == 1) {
            assert!(last.is_none_or(|last| last.high.next().unwrap() < element.low), "ranges touch: {table}");
            last = Some(*element);
        }
    }
}

#[test]
fn steps_lead_from_any_table_to_any_other() {
    for seed in 0..300 {
        let mut dice = Dice(seed);
        let [from, to] = [0, 1].map(|_| compile(&dice.cluster(), "node-1", &own(0)).table);
        let present = Present::from(from);
        let steps = changes(Some(&present), &to);
        assert_eq!(after(present.clone(), &steps), Present::from(to.clone()), "seed {seed}: {steps:?}");
        let there = Present::from(to.clone());
        assert_eq!(changes(Some(&there), &to), []);
    }
}

/// What the kernel has after these steps; it refuses what refers to nothing.
fn after(mut present: Present, steps: &[Change<'_>]) -> Present {
    for step in steps {
        match step {
            Change::AddTable => {}
            Change::DeleteTable => present = Present::default(),
            Change::AddSet(name, set) => {
                let set = crate::nftables::PresentSet { shape: set.shape.clone(), elements: BTreeMap::new() };
                assert!(present.sets.insert((*name).to_owned(), set).is_none());
            }
            Change::DeleteSet(name) => drop(present.sets.remove(*name).unwrap()),
            Change::AddElements(name, _, elements) => {
                for (element, verdict) in elements {
                    let chain = verdict.and_then(Verdict::chain);
                    assert!(chain.is_none_or(|chain| present.chains.contains_key(chain)));
                    let set = present.sets.get_mut(*name).unwrap();
                    assert!(set.elements.insert(*element, verdict.cloned()).is_none());
                }
            }
            Change::DeleteElements(name, _, elements) => {
                let set = present.sets.get_mut(*name).unwrap();
                elements.iter().for_each(|(element, _)| drop(set.elements.remove(element).unwrap()));
            }
            Change::AddChain(name, chain) => {
                let chain = crate::nftables::PresentChain { hook: chain.hook, rules: vec![] };
                assert!(present.chains.insert((*name).to_owned(), chain).is_none());
            }
            Change::DeleteChain(name) => {
                let jumps = present.sets.values().flat_map(|set| set.elements.values().flatten());
                assert!(jumps.filter_map(Verdict::chain).all(|chain| chain != *name), "somebody jumps to it");
                drop(present.chains.remove(*name).unwrap());
            }
            Change::FlushChain(name) => present.chains.get_mut(*name).unwrap().rules.clear(),
            Change::AddRule(name, rule) => present.chains.get_mut(*name).unwrap().rules.push(rule.mark()),
        }
    }
    present
}

// --- by hand ---

fn pod(node: &str, address: &str, labels: &[(&str, &str)]) -> Pod {
    let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let addresses = if address.is_empty() { vec![] } else { vec![address.parse().unwrap()] };
    Pod { labels: Arc::new(labels), node: Some(node.into()), addresses, ..Pod::default() }
}

fn name(text: &str) -> Name {
    let (namespace, name) = text.split_once('/').unwrap();
    (namespace.into(), name.into())
}

fn small(spec: &Value) -> Cluster {
    let mut cluster = Cluster::default();
    cluster.namespaces.insert("default".into(), Arc::default());
    cluster.pods.insert(name("default/web"), pod("n", "10.42.1.1", &[("app", "web")]));
    cluster.pods.insert(name("default/client"), pod("m", "10.42.2.1", &[("app", "client")]));
    cluster.policies.insert(name("default/p"), Policy::read(spec));
    cluster
}

fn decides(cluster: &Cluster, packet: &Packet) -> bool {
    passes(&compile(cluster, "n", &["10.42.1.0/24".parse().unwrap()]).table, packet)
}

#[test]
fn what_does_not_read_allows_nothing_and_still_isolates() {
    let web = json!({ "matchLabels": { "app": "web" } });
    let packet = Packet::new("10.42.2.1", "10.42.1.1", TCP, 80);
    let broken = [
        (json!([{ "from": [{ "ipBlock": { "cidr": "10.0.0.0/33" } }] }]), "from[0].ipBlock.cidr"),
        (json!([{ "from": [{ "ipBlock": { "cidr": "10.0.0.0/8", "except": ["x"] } }] }]), "except"),
        (json!([{ "from": [{}] }]), "names nobody"),
        (json!([{ "from": [{ "podSelector": {}, "ipBlock": { "cidr": "10.0.0.0/8" } }] }]), "stands alone"),
        (
            json!([{ "from": [{ "podSelector": { "matchExpressions": [{ "key": "a", "operator": "Near" }] } }] }]),
            "Near",
        ),
        (json!([{ "from": [{ "podSelector": { "matchExpressions": [{ "key": "a", "operator": "In" }] } }] }]), "In"),
        (json!([{ "from": [{ "podSelector": {}, "serviceAccount": "x" }] }]), "serviceAccount"),
        (json!([{ "ports": [{ "port": 80, "endPort": 79 }] }]), "endPort 79"),
        (json!([{ "ports": [{ "port": "web", "endPort": 90 }] }]), "endPort"),
        (json!([{ "ports": [{ "port": 0 }] }]), "port 0"),
        (json!([{ "ports": [{ "protocol": "ICMP" }] }]), "ICMP"),
        (json!([{ "when": "tomorrow" }]), "when"),
        (json!([7]), "not an object"),
    ];
    for (ingress, says) in broken {
        let cluster = small(&json!({ "podSelector": web, "policyTypes": ["Ingress"], "ingress": ingress }));
        let faults: Vec<_> = cluster.faults().map(|(_, fault)| fault.to_owned()).collect();
        assert!(faults.len() == 1 && faults[0].contains(says), "{ingress}: {faults:?}");
        assert!(!decides(&cluster, &packet), "{ingress}");
    }
    // The good rule beside a bad one holds.
    let good = json!([{ "from": [{}] }, { "from": [{ "podSelector": {} }] }]);
    assert!(decides(&small(&json!({ "podSelector": web, "ingress": good })), &packet));
    // Whom a policy selects is not known: then everybody.
    let all = small(&json!({ "podSelector": { "matchLabels": 5 }, "policyTypes": ["Ingress"] }));
    assert!(!decides(&all, &packet));
}

#[test]
fn a_pod_without_an_address_isolates_where_its_address_may_be() {
    let mut cluster =
        small(&json!({ "podSelector": { "matchLabels": { "app": "soon" } }, "policyTypes": ["Ingress"] }));
    let to_new = Packet::new("10.42.2.1", "10.42.1.9", TCP, 80);
    let from_new = Packet::new("10.42.1.9", "10.42.2.1", TCP, 80);
    let to_known = Packet::new("10.42.2.1", "10.42.1.1", TCP, 80);
    assert!(decides(&cluster, &to_new), "nobody is expected");

    cluster.pods.insert(name("default/soon"), pod("n", "", &[("app", "soon")]));
    assert!(!decides(&cluster, &to_new), "it may be the new pod's");
    assert!(decides(&cluster, &from_new), "the policy is about ingress");
    assert!(decides(&cluster, &to_known), "who is known is not harmed");
    assert_eq!(compile(&cluster, "n", &[]).waiting, 1);
    assert_eq!(compile(&cluster, "m", &[]).waiting, 0, "it is another node's");

    cluster.pods.insert(name("default/soon"), pod("n", "10.42.1.9", &[("app", "soon")]));
    assert!(!decides(&cluster, &to_new));
    assert!(decides(&cluster, &Packet::new("10.42.2.1", "10.42.1.10", TCP, 80)), "nobody is expected any more");
}

#[test]
fn an_ended_pod_has_no_address_and_a_leaving_one_gives_way() {
    let mut cluster = small(&json!({ "podSelector": {}, "ingress": [{ "from": [{ "podSelector": {} }] }] }));
    let packet = Packet::new("10.42.2.1", "10.42.1.1", TCP, 80);
    assert!(decides(&cluster, &packet));
    cluster.pods.get_mut(&name("default/client")).unwrap().stage = Stage::Finished;
    assert!(!decides(&cluster, &packet), "the address is nobody's");
    cluster.pods.get_mut(&name("default/client")).unwrap().stage = Stage::Leaving;
    assert!(decides(&cluster, &packet), "it still runs");
    cluster.pods.insert(name("other/new"), pod("m", "10.42.2.1", &[]));
    assert!(!decides(&cluster, &packet), "the address is another's");
}

#[test]
fn what_another_node_says_takes_no_policy_away_from_a_pod_here() {
    let web = json!({ "matchLabels": { "app": "web" } });
    let mut cluster = small(&json!({ "podSelector": web, "policyTypes": ["Ingress", "Egress"] }));
    let [to, from] = [("10.42.2.1", "10.42.1.1"), ("10.42.1.1", "10.42.2.1")].map(|(a, b)| Packet::new(a, b, TCP, 80));
    for stage in [Stage::Alive, Stage::Leaving] {
        cluster.pods.get_mut(&name("default/web")).unwrap().stage = stage;
        // Before it in the alphabet, and further from its end.
        for node in [Some("m"), None] {
            let rogue = Pod { node: node.map(Into::into), ..pod("", "10.42.1.1", &[]) };
            cluster.pods.insert(name("a/rogue"), rogue);
            assert!(!decides(&cluster, &to) && !decides(&cluster, &from), "{stage:?} {node:?}");
        }
    }
}

#[test]
fn pods_and_policies_come_and_go_without_touching_what_others_share() {
    let spec = |app: &str| json!({ "podSelector": {}, "ingress": [{ "from": [{ "podSelector": { "matchLabels": { "app": app } } }] }] });
    let mut cluster = small(&spec("client"));
    let before = Present::from(compile(&cluster, "n", &[]).table);
    cluster.pods.insert(name("default/client-2"), pod("m", "10.42.2.2", &[("app", "client")]));
    let table = compile(&cluster, "n", &[]).table;
    let steps = changes(Some(&before), &table);
    let [Change::AddElements(set, _, elements)] = &steps[..] else { panic!("one element: {steps:?}") };
    assert!(set.starts_with("pods4-") && elements.len() == 1, "{steps:?}");

    // A second policy that says the same shares the set.
    cluster.policies.insert(name("default/q"), Policy::read(&spec("client")));
    let shared = compile(&cluster, "n", &[]).table;
    let sets = |table: &Table| table.sets.keys().cloned().collect::<Vec<_>>();
    assert_eq!(sets(&shared), sets(&table));
}

#[test]
fn nothing_is_in_the_way_where_no_policy_is() {
    let cluster = Cluster { policies: BTreeMap::new(), ..small(&json!({})) };
    let compiled = compile(&cluster, "n", &[]);
    assert_eq!((compiled.isolated, compiled.waiting, compiled.table.chains.len()), (0, 0, 1));
    for (from, to) in [("10.42.2.1", "10.42.1.1"), ("10.42.1.1", "192.0.2.1"), ("192.0.2.1", "10.42.1.1")] {
        assert!(passes(&compiled.table, &Packet::new(from, to, UDP, 53)));
    }
    let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    assert!(passes(&compiled.table, &Packet { from: any, to: any, protocol: 1, port: 0, reply: false }));
}

#[test]
fn a_thousand_policies_over_many_pods_compile_quickly_enough() {
    let mut cluster = Cluster::default();
    let shared: Vec<Arc<Labels>> = (0..100)
        .map(|app| Arc::new(Labels::from([("app".to_owned(), format!("app-{app}")), ("x".into(), "y".into())])))
        .collect();
    for namespace in 0..10 {
        let namespace: Arc<str> = format!("ns-{namespace}").into();
        cluster.namespaces.insert(namespace.clone(), Arc::default());
    }
    for number in 0..30_000_u32 {
        let namespace = format!("ns-{}", number % 10).into();
        let node = format!("node-{}", number / 30).into();
        let addresses = vec![IpAddr::V4(Ipv4Addr::from(0x0a2a_0000 + number))];
        let labels = shared[number as usize / 10 % 100].clone();
        let pod = Pod { labels, node: Some(node), addresses, ..Pod::default() };
        cluster.pods.insert((namespace, format!("pod-{number}").into()), pod);
    }
    for number in 0..1000 {
        let select = |app: usize| json!({ "matchLabels": { "app": format!("app-{}", app % 100) } });
        let spec = json!({
            "podSelector": select(number / 10),
            "ingress": [{ "from": [{ "podSelector": select(number / 10 + 1) }], "ports": [{ "port": 8000 + number }] }],
        });
        let namespace = format!("ns-{}", number % 10).into();
        cluster.policies.insert((namespace, format!("policy-{number}").into()), Policy::read(&spec));
    }
    let start = std::time::Instant::now();
    let compiled = compile(&cluster, "node-7", &[]);
    let took = start.elapsed();
    println!("1,000 policies, 30,000 pods, 30 of them here: {took:?}, {} sets", compiled.table.sets.len());
    assert_eq!(compiled.isolated, 30);
    assert!(took.as_secs() < 10, "{took:?}");
}

#[test]
fn whatever_a_spec_is_it_reads_and_a_wrong_one_opens_nothing() {
    fn tree(dice: &mut Dice, depth: usize) -> Value {
        let keys = [
            "podSelector",
            "policyTypes",
            "ingress",
            "egress",
            "from",
            "to",
            "ports",
            "port",
            "endPort",
            "protocol",
            "ipBlock",
            "cidr",
            "except",
            "namespaceSelector",
            "matchLabels",
            "matchExpressions",
            "key",
            "operator",
            "values",
            "odd",
        ];
        match dice.roll(if depth == 0 { 5 } else { 9 }) {
            0 => Value::Null,
            1 => json!(dice.roll(70_000)),
            2 => json!(dice.pick(&["TCP", "In", "Exists", "Ingress", "Egress", "10.0.0.0/8", "::/0", "x", ""])),
            3 => json!(-1.5),
            4 => json!(true),
            5 | 6 => (0..dice.roll(3)).map(|_| tree(dice, depth - 1)).collect(),
            _ => {
                Value::Object((0..dice.roll(5)).map(|_| (dice.pick(&keys).to_owned(), tree(dice, depth - 1))).collect())
            }
        }
    }
    let mut read = 0;
    for seed in 0..20_000 {
        let mut dice = Dice(seed);
        let spec = tree(&mut dice, 6);
        let policy = Policy::read(&spec);
        assert!(policy.ingress.is_some() || policy.egress.is_some(), "{spec}");
        read += usize::from(policy.faults.is_empty());
    }
    println!("{read} of 20,000 had no fault");
}
