//! From the cluster to one node's table.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::ranges::{self, Range};
use super::{Cluster, Direction, Name, NamedPort, Owners, Peer, Pod, Policy, Port, Rule, TABLE, mentioned, names};
use crate::kernel::Family;
use crate::nftables::{self, Action, Chain, DataType, Element, Field, Hook, Match, Set, Table, Verdict, family_of};

/// Ports of one rule of a policy that become rules by themselves. The kernel finds a set by going through all of them,
/// when a rule that refers to it is made, and most policies name a port or two.
const MAX_PORTS_IN_RULES: usize = 2;

/// What one node has to enforce.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// The kernel's table.
    pub table: Table,
    /// Pods of this node that policies isolate, in one direction at least.
    pub isolated: usize,
    /// Those of them that have no address yet.
    pub waiting: usize,
}

/// What `node` has to enforce. `own`: the prefixes that its pods' addresses come from.
pub fn compile(cluster: &Cluster, node: &str, own: &[IpNet]) -> Compiled {
    let mut compiler = Compiler::new(cluster, node);
    let mut waiting = BTreeSet::new();
    let (mut isolated_pods, mut waiting_pods) = (0, 0);
    for (name, pod) in cluster.pods.iter().filter(|(_, pod)| pod.counts() && pod.node.as_deref() == Some(node)) {
        let isolated = compiler.pod(name, pod);
        isolated_pods += usize::from(!isolated.is_empty());
        if pod.addresses.is_empty() {
            waiting_pods += usize::from(!isolated.is_empty());
            waiting.extend(isolated);
        }
    }
    compiler.hold_back(&waiting, own);
    Compiled { table: compiler.table, isolated: isolated_pods, waiting: waiting_pods }
}

struct Compiler<'a> {
    cluster: &'a Cluster,
    owners: Owners<'a>,
    table: Table,
    /// The chains of pods that the same policies select.
    chains: BTreeMap<ChainOf<'a>, String>,
}

/// What makes two chains the same.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct ChainOf<'a> {
    direction: Direction,
    family: Family,
    policies: Vec<&'a Name>,
    /// What the rules' named ports mean; nothing where no rule has one.
    ports: Arc<[NamedPort]>,
}

impl<'a> Compiler<'a> {
    fn new(cluster: &'a Cluster, node: &str) -> Self {
        let mut table = Table { name: TABLE.to_owned(), ..Table::default() };
        table.chains.insert("forward".to_owned(), Chain { hook: Some(Hook::Forward), rules: forward() });
        for family in Family::ALL {
            let address = DataType::address(family);
            let pairs = Set::of_keys(vec![address; 2], "an isolated pod and itself", []);
            let known = Set::of_keys(vec![address], "addresses of this node's pods", []);
            table.sets.insert(fixed("self", family), pairs);
            table.sets.insert(fixed("known", family), known);
            for direction in [Direction::Egress, Direction::Ingress] {
                let waiting = Set::of_ranges(vec![address], "where addresses of unknown pods are isolated", []);
                let isolated = Set::verdicts(family, "this node's isolated pods");
                table.sets.insert(fixed(waiting_set(direction), family), waiting);
                table.sets.insert(fixed(word(direction), family), isolated);
            }
        }
        Self { cluster, owners: cluster.owners(node), table, chains: BTreeMap::new() }
    }

    /// Adds a pod of this node, and answers in which directions it is isolated.
    fn pod(&mut self, name: &'a Name, pod: &'a Pod) -> Vec<Direction> {
        let cluster = self.cluster;
        let first: Name = (name.0.clone(), "".into());
        let of_namespace = cluster.policies.range(first..).take_while(|((namespace, _), _)| *namespace == name.0);
        let selecting: Vec<(&Name, &Policy)> = of_namespace.filter(|(_, p)| p.pods.matches(&pod.labels)).collect();
        let isolating = |direction| -> Vec<_> {
            selecting.iter().copied().filter(|(_, policy)| policy.rules(direction).is_some()).collect()
        };
        let isolated = [Direction::Egress, Direction::Ingress].map(|direction| (direction, isolating(direction)));
        let isolated: Vec<_> = isolated.into_iter().filter(|(_, policies)| !policies.is_empty()).collect();
        for address in pod.addresses.iter().copied() {
            if self.owners.get(&address) != Some(&name) {
                continue;
            }
            let family = family_of(address);
            let element = Element::address(address);
            self.insert(fixed("known", family), element, None);
            for (direction, policies) in &isolated {
                let chain = self.chain(*direction, family, policies, &pod.ports);
                self.insert(fixed(word(*direction), family), element, Some(Verdict::Jump(chain)));
                self.insert(fixed("self", family), element.and_address(address), None);
            }
        }
        isolated.into_iter().map(|(direction, _)| direction).collect()
    }

    fn insert(&mut self, set: String, element: Element, verdict: Option<Verdict>) {
        self.table.sets.entry(set).and_modify(|set| drop(set.elements.insert(element, verdict)));
    }

    /// As long as pods that policies select have no address, every address that may be theirs is isolated: a pod is
    /// isolated from its first moment on, and what policies allow follows once its address is known.
    fn hold_back(&mut self, waiting: &BTreeSet<Direction>, own: &[IpNet]) {
        for direction in waiting {
            for family in Family::ALL {
                for range in ranges::prefixes(family, own.iter().copied()) {
                    self.insert(fixed(waiting_set(*direction), family), range, None);
                }
            }
        }
    }

    /// The chain that returns for what one of the policies allows, and drops the rest.
    fn chain(
        &mut self,
        direction: Direction,
        family: Family,
        policies: &[(&'a Name, &'a Policy)],
        ports: &Arc<[NamedPort]>,
    ) -> String {
        let rules = || policies.iter().filter_map(|(_, policy)| policy.rules(direction)).flatten();
        let names_ports = rules().flat_map(|rule| rule.ports.iter().flatten()).any(|p| matches!(p, Port::Named(..)));
        let own_ports = if direction == Direction::Ingress && names_ports { ports.clone() } else { Arc::default() };
        let policy_names = policies.iter().map(|(name, _)| *name).collect();
        let key = ChainOf { direction, family, policies: policy_names, ports: own_ports };
        if let Some(chain) = self.chains.get(&key) {
            return chain.clone();
        }
        let mut allowed: BTreeMap<Vec<Match>, BTreeSet<String>> = BTreeMap::new();
        for (name, policy) in policies {
            for rule in policy.rules(direction).into_iter().flatten() {
                for matches in self.alternatives(direction, family, &name.0, rule, &key.ports) {
                    allowed.entry(matches).or_default().insert(shown(name));
                }
            }
        }
        let back = |(matches, of): (_, BTreeSet<String>)| {
            nftables::Rule::new(matches, Action::Verdict(Verdict::Return), &mentioned(&of))
        };
        let mut rules: Vec<_> = allowed.into_iter().map(back).collect();
        let isolating = mentioned(&policies.iter().map(|(name, _)| shown(name)).collect());
        rules.push(nftables::Rule::new(vec![], Action::CountedDrop, &format!("isolated by {isolating}")));
        let content: Vec<String> = rules.iter().map(ToString::to_string).collect();
        let chain = names::name(word(direction), Some(family), &content.join("\n"));
        self.table.chains.insert(chain.clone(), Chain { hook: None, rules });
        self.chains.insert(key, chain.clone());
        chain
    }

    /// What a rule allows: each alternative is a list of conditions.
    fn alternatives(
        &mut self,
        direction: Direction,
        family: Family,
        namespace: &str,
        rule: &Rule,
        own_ports: &[NamedPort],
    ) -> Vec<Vec<Match>> {
        let mut alternatives = Vec::new();
        let ports: Option<Vec<&Port>> = rule.ports.as_ref().map(|ports| ports.iter().collect());
        let by_number = match ports.as_deref() {
            None => vec![None],
            Some(ports) => self.by_number(&numbered(ports, own_ports)),
        };
        if !by_number.is_empty() {
            for matches in self.peers(direction, family, namespace, rule.peers.as_deref()) {
                let with = |port: &Option<Match>| matches.iter().cloned().chain(port.clone()).collect();
                alternatives.extend(by_number.iter().map(with));
            }
        }
        if direction == Direction::Egress {
            let named = ports.into_iter().flatten().filter_map(|port| match port {
                Port::Named(protocol, name) => Some((*protocol, name.as_str())),
                Port::Range(..) => None,
            });
            let named: Vec<_> = named.collect();
            if !named.is_empty() {
                alternatives.push(vec![self.named(family, namespace, rule.peers.as_deref(), &named)]);
            }
        }
        alternatives
    }

    /// Ranges of ports as alternatives: a few by themselves, and more in a set, which is one lookup.
    fn by_number(&mut self, ranges: &[(u8, u16, u16)]) -> Vec<Option<Match>> {
        if ranges.len() <= MAX_PORTS_IN_RULES {
            let alone = |&(protocol, low, high): &(u8, u16, u16)| Some(Match::Ports { protocol, low, high });
            return ranges.iter().map(alone).collect();
        }
        let elements: Vec<Element> =
            ranges.iter().map(|(protocol, low, high)| Element::ports(*protocol, *low, *high)).collect();
        let name = names::name("ports", None, &format!("{elements:?}"));
        let make = || Set::of_ranges(vec![DataType::Protocol, DataType::Port], "", elements);
        self.table.sets.entry(name.clone()).or_insert_with(make);
        vec![Some(in_ports(name))]
    }

    /// Whom a rule means: each alternative is a list of conditions.
    fn peers(
        &mut self,
        direction: Direction,
        family: Family,
        namespace: &str,
        peers: Option<&[Peer]>,
    ) -> Vec<Vec<Match>> {
        let Some(peers) = peers else { return vec![vec![]] };
        let field = match direction {
            Direction::Ingress => Field::Source(family),
            Direction::Egress => Field::Destination(family),
        };
        let sets = [self.pods(family, namespace, peers), self.blocks(family, peers)];
        sets.into_iter().flatten().map(|set| vec![Match::is_in(field, &set)]).collect()
    }

    /// The set of pods that are meant by their labels.
    fn pods(&mut self, family: Family, namespace: &str, peers: &[Peer]) -> Option<String> {
        let content = described(namespace, peers)?;
        let name = names::name("pods", Some(family), &content);
        if !self.table.sets.contains_key(&name) {
            let pods = self.meant(namespace, peers);
            let of_family = |(_, address): &(&Pod, IpAddr)| family_of(*address) == family;
            let elements = pods.filter(of_family).map(|(_, address)| Element::address(address));
            let set = Set::of_keys(vec![DataType::address(family)], &content, elements);
            self.table.sets.insert(name.clone(), set);
        }
        Some(name)
    }

    /// Pods that are meant by their labels, with each of their addresses; some twice.
    fn meant<'b>(&'b self, namespace: &'b str, peers: &'b [Peer]) -> impl Iterator<Item = (&'b Pod, IpAddr)> {
        let cluster: &'b Cluster = self.cluster;
        peers.iter().flat_map(move |peer| {
            let (namespaces, pods): (Vec<&str>, _) = match peer {
                Peer::Pods { namespaces: None, pods } => (vec![namespace], Some(pods)),
                Peer::Pods { namespaces: Some(namespaces), pods } => {
                    (cluster.namespaces_with(namespaces).collect(), Some(pods))
                }
                Peer::Block { .. } => (vec![], None),
            };
            let of_namespaces = namespaces.into_iter().flat_map(move |namespace| cluster.pods_in(namespace));
            of_namespaces
                .filter(move |(_, pod)| pod.counts() && pods.is_some_and(|pods| pods.matches(&pod.labels)))
                .flat_map(move |(name, pod)| self.addresses(name, pod))
        })
    }

    fn addresses<'b>(&'b self, name: &'b Name, pod: &'b Pod) -> impl Iterator<Item = (&'b Pod, IpAddr)> {
        let owned = move |address: &&IpAddr| self.owners.get(address).is_some_and(|owner| *owner == name);
        pod.addresses.iter().filter(owned).map(move |address| (pod, *address))
    }

    /// The set of addresses that are meant by themselves; none where there are none of this family.
    fn blocks(&mut self, family: Family, peers: &[Peer]) -> Option<String> {
        let ranges = block_ranges(family, peers);
        if ranges.is_empty() {
            return None;
        }
        let elements: Vec<Element> = ranges.into_iter().map(|range| ranges::element(family, range)).collect();
        let name = names::name("blocks", Some(family), &format!("{elements:?}"));
        let make = || Set::of_ranges(vec![DataType::address(family)], "", elements);
        self.table.sets.entry(name.clone()).or_insert_with(make);
        Some(name)
    }

    /// That the destination is a pod that is meant, at a port that it gave one of these names.
    fn named(&mut self, family: Family, namespace: &str, peers: Option<&[Peer]>, ports: &[(u8, &str)]) -> Match {
        let whom = peers.map_or_else(|| "everybody".to_owned(), |peers| format!("{namespace}: {peers:?}"));
        let name = names::name("named", Some(family), &format!("{ports:?} of {whom}"));
        if !self.table.sets.contains_key(&name) {
            let blocks = peers.map(|peers| block_ranges(family, peers)).unwrap_or_default();
            let in_blocks = |address: &IpAddr| {
                let element = Element::address(*address);
                let types = [DataType::address(family)];
                blocks.iter().any(|range| ranges::element(family, *range).contains(&element.low, &types))
            };
            let everywhere = |address: &IpAddr| peers.is_none() || in_blocks(address);
            let by_address = self.owners.iter().filter(|(address, _)| everywhere(address));
            let by_address = by_address.filter_map(|(address, name)| Some((self.cluster.pods.get(*name)?, *address)));
            let by_labels = self.meant(namespace, peers.unwrap_or_default());
            let mut elements = BTreeSet::new();
            for (pod, address) in by_address.chain(by_labels).filter(|(_, address)| family_of(*address) == family) {
                let meant = |port: &&NamedPort| ports.contains(&(port.protocol, port.name.as_str()));
                for port in pod.ports.iter().filter(meant) {
                    elements.insert(Element::address(address).and_ports(port.protocol, port.port, port.port));
                }
            }
            let key = vec![DataType::address(family), DataType::Protocol, DataType::Port];
            let comment = ports.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(", ");
            self.table.sets.insert(name.clone(), Set::of_keys(key, &format!("ports {comment}"), elements));
        }
        let fields = vec![Field::Destination(family), Field::Protocol, Field::DestinationPort];
        Match::In { fields, set: name, negated: false }
    }
}

/// The rules of the one chain that the kernel enters.
fn forward() -> Vec<nftables::Rule> {
    let rule = |matches, action, comment| nftables::Rule::new(matches, action, comment);
    let pass = |matches, comment| rule(matches, Action::Verdict(Verdict::Accept), comment);
    let mut rules = vec![pass(vec![Match::Replies], "whose beginning was allowed")];
    for family in Family::ALL {
        let fields = vec![Field::Source(family), Field::Destination(family)];
        let itself = Match::In { fields, set: fixed("self", family), negated: false };
        rules.push(pass(vec![itself], "a pod may talk to itself, through a Service"));
    }
    for direction in [Direction::Egress, Direction::Ingress] {
        for family in Family::ALL {
            let field = match direction {
                Direction::Egress => Field::Source(family),
                Direction::Ingress => Field::Destination(family),
            };
            let waiting = vec![
                Match::is_in(field, &fixed(waiting_set(direction), family)),
                Match::not_in(field, &fixed("known", family)),
            ];
            rules.push(rule(waiting, Action::CountedDrop, "a pod that is not known yet"));
            rules.push(rule(vec![], Action::AsMapped(field, fixed(word(direction), family)), ""));
        }
    }
    rules
}

/// Ports that are numbers, and names that are among `own`: of each protocol ranges that neither overlap nor touch.
fn numbered(ports: &[&Port], own: &[NamedPort]) -> Vec<(u8, u16, u16)> {
    let mut by_protocol: BTreeMap<u8, Vec<Range>> = BTreeMap::new();
    for port in ports {
        match port {
            Port::Range(protocol, low, high) => {
                by_protocol.entry(*protocol).or_default().push(((*low).into(), (*high).into()));
            }
            Port::Named(protocol, name) => {
                for port in own.iter().filter(|port| port.protocol == *protocol && port.name == *name) {
                    by_protocol.entry(*protocol).or_default().push((port.port.into(), port.port.into()));
                }
            }
        }
    }
    let narrow = |port: u128| u16::try_from(port).unwrap_or(u16::MAX);
    let ranges = by_protocol
        .into_iter()
        .flat_map(|(protocol, all)| ranges::united(all).into_iter().map(move |range| (protocol, range)));
    ranges.map(|(protocol, (low, high))| (protocol, narrow(low), narrow(high))).collect()
}

/// The pods that peers mean by labels, in words that are the same for the same pods; none where they mean none so.
fn described(namespace: &str, peers: &[Peer]) -> Option<String> {
    let words: BTreeSet<String> = peers
        .iter()
        .filter_map(|peer| match peer {
            Peer::Pods { namespaces: None, pods } => Some(format!("{namespace}: {pods}")),
            Peer::Pods { namespaces: Some(namespaces), pods } => Some(format!("[{namespaces}]: {pods}")),
            Peer::Block { .. } => None,
        })
        .collect();
    (!words.is_empty()).then(|| words.into_iter().collect::<Vec<_>>().join("; "))
}

/// The addresses of a family that peers mean by themselves.
fn block_ranges(family: Family, peers: &[Peer]) -> Vec<Range> {
    let mut all = Vec::new();
    for peer in peers {
        if let Peer::Block { net, except } = peer
            && Family::of(net) == family
        {
            let except = except.iter().filter(|except| Family::of(except) == family);
            all.extend(ranges::without(ranges::of_prefix(*net), except.map(|e| ranges::of_prefix(*e)).collect()));
        }
    }
    ranges::united(all)
}

fn in_ports(set: String) -> Match {
    Match::In { fields: vec![Field::Protocol, Field::DestinationPort], set, negated: false }
}

/// The name of a set that is always there.
fn fixed(kind: &str, family: Family) -> String {
    let digit = match family {
        Family::V4 => '4',
        Family::V6 => '6',
    };
    format!("{kind}{digit}")
}

fn word(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

fn waiting_set(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "waiting-ingress",
        Direction::Egress => "waiting-egress",
    }
}

fn shown((namespace, name): &Name) -> String {
    format!("{namespace}/{name}")
}
