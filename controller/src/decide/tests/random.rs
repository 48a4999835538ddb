//! Random histories: two controllers with stale views race, writes are lost, whoever may write Nodes tampers.
//!
//! What has to hold at every write is checked where the write is done: nothing is approved that the ledger does not say,
//! and no number changes hands before it rested. What has to hold in the end is checked when everybody has seen
//! everything.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use keystone_mesh_api::{LEDGER_PREFIX, MemberSpec};
use keystone_mesh_core::NodeId;
use keystone_mesh_core::admission::{QUARANTINE, host_of, overlap};
use keystone_mesh_core::annotations::{self, Writer};
use keystone_mesh_core::ledger::{Holder, Ledger};
use keystone_mesh_core::node::{Approval, NodeName};
use proptest::prelude::*;

use super::model::{Api, Watcher};
use super::world::*;
use crate::decide::{Action, Effect, reconcile};
use crate::view::{ClusterView, Now, Policy, Settings};

const NAMES: [&str; 4] = ["worker-1", "worker-2", "worker-3", "worker-4"];
const PEERS: [&str; 2] = ["laptop", "worker-1"];
const CIDRS: [&str; 4] = ["10.42.1.0/24", "10.42.2.0/24", "10.42.0.0/16", "10.98.0.0/24"];
/// A write that was decided longer ago than this is not done any more: it timed out.
const PATIENCE: Now = 20 * SECOND;

#[derive(Clone, Debug)]
enum Op {
    /// A Node registers, with its record.
    Register(usize, u8),
    DeleteNode(usize),
    Publish(usize, u8),
    Vouch(usize, u8),
    Join(usize, u8),
    DeleteMember(usize),
    Pods(usize, usize),
    Peer(usize, u8),
    DeletePeer(usize),
    /// The annotations of one writer are removed.
    Strip(usize, bool),
    /// An approval that stood somewhere once is put on a Node.
    Replay(usize, usize),
    Pass(Now),
    /// A controller sees some of what is new, and decides.
    Decide(usize, u64),
    /// It does some of what it decided.
    Apply(usize, u64),
    /// It starts anew.
    Restart(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let name = || 0..NAMES.len();
    let machine = || 2..7_u8;
    prop_oneof![
        3 => (name(), machine()).prop_map(|(n, b)| Op::Register(n, b)),
        2 => name().prop_map(Op::DeleteNode),
        1 => (name(), machine()).prop_map(|(n, b)| Op::Publish(n, b)),
        2 => (name(), machine()).prop_map(|(n, b)| Op::Vouch(n, b)),
        2 => (name(), machine()).prop_map(|(n, b)| Op::Join(n, b)),
        1 => name().prop_map(Op::DeleteMember),
        2 => (name(), 0..CIDRS.len()).prop_map(|(n, c)| Op::Pods(n, c)),
        2 => (0..PEERS.len(), 2..9_u8).prop_map(|(p, b)| Op::Peer(p, b)),
        1 => (0..PEERS.len()).prop_map(Op::DeletePeer),
        1 => (name(), any::<bool>()).prop_map(|(n, w)| Op::Strip(n, w)),
        1 => (name(), 0..8_usize).prop_map(|(n, k)| Op::Replay(n, k)),
        2 => prop_oneof![0..20 * SECOND, 0..60 * MINUTE, Just(QUARANTINE * SECOND)].prop_map(Op::Pass),
        9 => (0..2_usize, any::<u64>()).prop_map(|(c, s)| Op::Decide(c, s)),
        9 => (0..2_usize, any::<u64>()).prop_map(|(c, s)| Op::Apply(c, s)),
        1 => (0..2_usize).prop_map(Op::Restart),
    ]
}

struct Racer {
    watcher: Watcher,
    decided: (Now, Vec<Action>),
}

struct Race {
    world: World,
    racers: [Racer; 2],
    settings: Settings,
    /// Who decided last. The other one may still write what it decided.
    leader: Option<usize>,
    /// Every approval that ever stood on an object.
    kept: Vec<BTreeMap<String, String>>,
    /// The address of each holder since its claim began.
    held: BTreeMap<Holder, u32>,
}

impl Race {
    fn new(policy: Policy) -> Self {
        let settings = Settings { policy, ..Settings::default() };
        let racer =
            || Racer { watcher: Watcher::new(ClusterView::new(id(1), settings.clone())), decided: (START, Vec::new()) };
        let mut world = World::new(settings.clone());
        world.node("home");
        world.publish("home", 1);
        world.token("t", |token| token.uses = Some(3));
        Self { racers: [racer(), racer()], world, settings, leader: None, kept: Vec::new(), held: BTreeMap::new() }
    }

    fn step(&mut self, op: &Op) {
        let world = &mut self.world;
        match *op {
            Op::Register(n, byte) => {
                world.node(NAMES[n]);
                world.publish(NAMES[n], byte);
            }
            Op::DeleteNode(n) => drop(world.api.nodes.remove(NAMES[n])),
            Op::Publish(n, byte) if exists(&world.api, NAMES[n]) => world.publish(NAMES[n], byte),
            Op::Vouch(n, byte) => {
                world.member(NAMES[n], MemberSpec { identity: id(byte).to_string(), ..MemberSpec::default() });
            }
            Op::Join(n, byte) if !world.api.members.contains_key(NAMES[n]) => world.join(NAMES[n], byte, "t"),
            Op::DeleteMember(n) => drop(world.api.members.remove(NAMES[n])),
            Op::Pods(n, c) if world.api.nodes.contains_key(NAMES[n]) => world.pods(NAMES[n], &[CIDRS[c]]),
            Op::Peer(p, byte) => world.peer(PEERS[p], byte, |_| {}),
            Op::DeletePeer(p) => drop(world.api.peers.remove(PEERS[p])),
            Op::Strip(n, node) if exists(&world.api, NAMES[n]) => {
                world.annotate(NAMES[n], &BTreeMap::new(), if node { Writer::Node } else { Writer::Controller });
            }
            Op::Replay(n, k) if exists(&world.api, NAMES[n]) && !self.kept.is_empty() => {
                let kept = self.kept[k % self.kept.len()].clone();
                world.annotate(NAMES[n], &kept, Writer::Controller);
            }
            Op::Pass(time) => {
                world.pass(time);
                // Watches are behind, but not for as long as this.
                if time > 20 * SECOND {
                    for racer in &mut self.racers {
                        racer.watcher.follow(&world.api, world.now, |_, _| true);
                    }
                }
            }
            Op::Decide(c, seed) => {
                let racer = &mut self.racers[c];
                if self.leader.replace(c) != Some(c) {
                    racer.watcher.view.handle_leading(world.now);
                }
                let mut salt = seed;
                racer.watcher.follow(&world.api, world.now, |_, _| coin(&mut salt));
                racer.decided = (world.now, reconcile(&racer.watcher.view, world.now).actions);
            }
            Op::Apply(c, seed) => {
                let (at, actions) = std::mem::take(&mut self.racers[c].decided);
                let mut salt = seed;
                if self.world.now.saturating_sub(at) < PATIENCE {
                    for action in actions.iter().filter(|_| coin(&mut salt)) {
                        self.write(action);
                    }
                }
            }
            Op::Restart(c) => {
                self.racers[c].watcher = Watcher::new(ClusterView::new(id(1), self.settings.clone()));
                self.leader.take_if(|leader| *leader == c);
            }
            Op::Publish(..) | Op::Join(..) | Op::Pods(..) | Op::Strip(..) | Op::Replay(..) => {}
        }
    }

    /// Does one write, and checks what has to hold of it.
    fn write(&mut self, action: &Action) {
        let before = ledger(&self.world.api);
        if self.world.api.apply(action, &secret(1).identity(), self.world.now).is_err() {
            return;
        }
        let now = self.world.now / 1000;
        match &action.effect {
            Effect::Ledger { .. } => self.check_ledger(&before, now),
            Effect::Approve { approval, .. } => {
                self.check_approval(approval);
                let signed = approval.as_ref().clone().sign(&secret(1).identity());
                self.kept.push(annotations::of_approval(&signed));
            }
            Effect::StatePeer { peer, .. } if !peer.is_revoked() => {
                self.check_holder(&Holder::Peer(peer.name.clone()), host(&peer.addresses));
            }
            Effect::StatePeer { .. }
            | Effect::MemberStatus { .. }
            | Effect::PeerStatus { .. }
            | Effect::TokenStatus { .. }
            | Effect::NodeConditions { .. }
            | Effect::NodeTaints { .. }
            | Effect::NodeInit { .. }
            | Effect::NodeAddresses { .. }
            | Effect::DeleteMember { .. } => {}
        }
    }

    fn check_ledger(&mut self, before: &Ledger, now: u64) {
        let after = ledger(&self.world.api);
        for host in 0..100 {
            let (Some(old), Some(new)) = (before.noted(host), after.noted(host)) else {
                assert!(before.noted(host).is_none(), "a note of {host} was lost");
                continue;
            };
            if old.holder != new.holder {
                let at = old.released.unwrap_or_else(|| panic!("{host} was taken from {}", old.holder));
                assert!(now - at >= QUARANTINE, "{host} did not rest: {} gave it to {}", old.holder, new.holder);
            }
        }
        let live: BTreeSet<&Holder> = after.live().map(|(_, holder)| holder).collect();
        self.held.retain(|holder, _| live.contains(holder));
    }

    fn check_approval(&mut self, approval: &Approval) {
        if !approval.is_revoked() {
            let holder = Holder::Node(approval.name.clone(), approval.identity);
            self.check_holder(&holder, host(&approval.addresses));
        }
    }

    /// What is signed is in the ledger, and is what was signed before.
    fn check_holder(&mut self, holder: &Holder, host: u32) {
        let ledger = ledger(&self.world.api);
        let noted = ledger.noted(host).unwrap_or_else(|| panic!("{host} was given to {holder} without a claim"));
        assert_eq!(noted.holder, *holder, "{host} is somebody else's");
        if noted.released.is_none() {
            assert_eq!(*self.held.entry(holder.clone()).or_insert(host), host, "{holder} was renumbered");
        }
    }

    /// One leads and sees everything, until there is nothing to do; then the next does.
    fn settle(&mut self) {
        self.world.pass(MINUTE);
        for c in [0, 1] {
            let rounds = (0..40).take_while(|_| self.round(c)).count();
            assert!(rounds < 40, "controller {c} does not come to rest: {:#?}", self.actions(c));
        }
    }

    /// Both lead at once and see everything. They may disagree only about what one of them remembers and the other does
    /// not, so this is for two that begin alike.
    fn settle_together(&mut self) {
        let rounds = (0..40).take_while(|_| [0, 1].map(|c| self.round(c)).contains(&true)).count();
        assert!(rounds < 40, "the controllers do not come to rest: {:#?}", self.actions(0));
    }

    /// Whether there was anything to do.
    fn round(&mut self, c: usize) -> bool {
        self.racers[c].watcher.follow(&self.world.api, self.world.now, |_, _| true);
        let actions = self.actions(c);
        actions.iter().for_each(|action| self.write(action));
        !actions.is_empty()
    }

    fn actions(&self, c: usize) -> Vec<Action> {
        reconcile(&self.racers[c].watcher.view, self.world.now).actions
    }

    fn check_end(&self) {
        let api = &self.world.api;
        let ledger = ledger(api);
        let names: BTreeSet<String> = api.nodes.keys().chain(api.members.keys()).cloned().collect();
        let mut taken: Vec<(String, IpNet)> = Vec::new();
        let mut admitted = 0;
        for name in &names {
            let parsed: NodeName = name.parse().unwrap();
            let pinned = ledger.pinned(&parsed);
            let approval = self.world.approval(name).filter(|approval| !approval.is_revoked());
            match (pinned, approval) {
                (Some((host, id)), Some(approval)) => {
                    assert_eq!((approval.identity, host_of(&network(), &approval)), (id, Some(host)), "{name}");
                    let nets = approval.networks();
                    taken.extend(nets.map(|net| (name.clone(), net)));
                    admitted += 1;
                }
                (None, None) => {}
                // It never had an approval, and nobody knows its record any more.
                (Some((_, id)), None) => {
                    assert_ne!(self.signer(name), Some(id), "the approval of {name} was lost");
                    admitted += 1;
                }
                (None, Some(approval)) => panic!("{name} has an approval without a claim: {approval:?}"),
            }
        }
        for (i, (one, a)) in taken.iter().enumerate() {
            for (other, b) in &taken[i + 1..] {
                assert!(!overlap(*a, *b), "{a} of {one} overlaps {b} of {other}");
            }
        }
        for (_, holder) in ledger.live() {
            match holder {
                Holder::Node(name, _) => {
                    assert!(names.contains(name.as_str()), "{holder} is gone and holds an address");
                }
                Holder::Peer(name) => assert!(api.peers.contains_key(name.as_str()), "{holder} is gone"),
            }
        }
        let token = api.tokens["t"].status.clone().unwrap_or_default();
        assert!(token.used <= 3 && token.joined.len() == token.used as usize, "{token:?}");
        let gauges = reconcile(&self.racers[1].watcher.view, self.world.now).gauges;
        assert_eq!(gauges.machines["approved"] + gauges.machines["identity_changed"], admitted);
    }

    fn signer(&self, name: &str) -> Option<NodeId> {
        let record = annotations::record(&name.parse().unwrap(), &self.world.annotations(name)).unwrap();
        record.map(|record| record.get().identity)
    }
}

fn exists(api: &Api, name: &str) -> bool {
    api.nodes.contains_key(name) || api.members.contains_key(name)
}

fn network() -> keystone_mesh_core::network::Network {
    let document = network_document().data.unwrap();
    keystone_mesh_core::network::SignedNetwork::from_map(&document).unwrap().get().clone()
}

fn host(addresses: &[IpNet]) -> u32 {
    let first = network().ipv4.network().to_bits();
    match addresses[0] {
        IpNet::V4(v4) => v4.addr().to_bits() - first,
        IpNet::V6(_) => panic!("IPv4 comes first"),
    }
}

/// The ledger as it is stored.
fn ledger(api: &Api) -> Ledger {
    let mut ledger = Ledger::default();
    for (name, page) in &api.pages {
        let number = name.strip_prefix(LEDGER_PREFIX).unwrap().parse().unwrap();
        let faults = ledger.handle_page(number, page.data.as_ref().unwrap());
        assert!(faults.is_empty(), "{faults:?}");
    }
    ledger
}

/// Three times in four.
fn coin(salt: &mut u64) -> bool {
    *salt = salt.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *salt >> 62 != 0
}

fn run(policy: Policy, ops: &[Op]) {
    let mut race = Race::new(policy);
    for op in ops {
        race.step(op);
    }
    race.settle();
    race.check_end();
    // And once more after a restart of both: what is stored is all there is to know.
    for racer in &mut race.racers {
        racer.watcher = Watcher::new(ClusterView::new(id(1), race.settings.clone()));
    }
    race.settle_together();
    race.check_end();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_history_doubles_loses_or_changes_an_address_or_an_approval(
        auto in any::<bool>(),
        ops in prop::collection::vec(op(), 1..90),
    ) {
        run(if auto { Policy::Auto } else { Policy::Member }, &ops);
    }
}

#[test]
fn a_holder_with_two_numbers_keeps_the_one_that_it_was_approved_with() {
    let mut world = World::plain();
    world.approved("worker-1", 2);
    let before = world.approval("worker-1").unwrap();
    let page = world.api.pages.get_mut("keystone-mesh-addresses-0").unwrap();
    let line = page.data.as_mut().unwrap().remove("1").unwrap();
    // As after a race of two controllers in two pages: the approved number is the higher one.
    let serial = before.serial + 1;
    let approved = Approval { addresses: nets(&["10.98.1.44/32"]), serial, ..before };
    page.data.as_mut().unwrap().insert("7".into(), line.clone());
    world.api.touch(|api| &mut api.pages.get_mut("keystone-mesh-addresses-0").unwrap().metadata);
    let metadata = world.api.meta("keystone-mesh-addresses-1", world.now);
    let data = Some([("300".to_owned(), line)].into());
    let page = k8s_openapi::api::core::v1::ConfigMap { metadata, data, ..Default::default() };
    world.api.pages.insert("keystone-mesh-addresses-1".into(), page);
    world.annotate("worker-1", &annotations::of_approval(&approved.sign(&secret(1).identity())), Writer::Controller);
    world.settle();
    assert_eq!(world.address("worker-1"), "10.98.1.44");
    let live: Vec<u32> = world.ledger().live().map(|(host, _)| host).collect();
    assert_eq!(live, [300]);
}

/// Prints what a pass costs: `cargo test --release -p keystone-controller -- --nocapture five_thousand`.
#[test]
fn five_thousand_nodes_are_settled_in_a_few_passes() {
    let mut world = World::new(Settings { policy: Policy::Auto, node_init: true, ..Settings::default() });
    let secret_of = |n: u32| {
        let mut bytes = [7; 32];
        bytes[..4].copy_from_slice(&n.to_be_bytes());
        keystone_mesh_core::Secret::from_bytes(bytes)
    };
    for n in 0..5000_u32 {
        let name = format!("worker-{n}");
        let mut said = record(&name, 2);
        (said.identity, said.public_key) = (secret_of(n).identity().id(), secret_of(n).wireguard(0).public_key());
        let signed = said.sign(&secret_of(n).identity());
        world.node(&name);
        world.annotate(&name, &annotations::of_record(&signed), Writer::Node);
        world.pods(&name, &[&format!("10.{}.{}.0/24", 100 + n / 256, n % 256)]);
    }
    let peers: Vec<(String, crate::view::Reach)> =
        (0..5000).map(|n| (format!("worker-{n}"), crate::view::Reach::Reached)).collect();
    let peers: Vec<(&str, crate::view::Reach)> = peers.iter().map(|(name, reach)| (name.as_str(), *reach)).collect();
    let (mut idle, mut settled) = (std::time::Duration::MAX, 0);
    for round in 0..32 {
        world.controller.follow(&world.api, world.now, |_, _| true);
        if round > 2 {
            world.report("worker-0", &peers);
        }
        let begun = on_cpu();
        let actions = reconcile(&world.controller.view, world.now).actions;
        let took = on_cpu() - begun;
        println!("round {round}: {} actions in {took:?}", actions.len());
        if actions.is_empty() {
            (idle, settled) = (idle.min(took), settled + 1);
        }
        if settled == 3 {
            println!("with nothing to do: {idle:?} at best");
            return;
        }
        world.apply(&actions);
        world.pass(SECOND);
    }
    panic!("still not settled after 32 passes");
}

/// How long this thread was on a processor (proc_pid_schedstat(5)): other work on the machine does not count.
fn on_cpu() -> std::time::Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanos = stat.split(' ').next().and_then(|nanos| nanos.parse().ok());
    std::time::Duration::from_nanos(nanos.unwrap_or(0))
}
