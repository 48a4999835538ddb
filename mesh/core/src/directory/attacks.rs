//! What somebody who may write every Node and Member can do to the mesh: nothing but to be told of.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use ipnet::IpNet;
use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::annotations::{KEYS, annotation};
use crate::key::PublicKey;
use crate::network::Network;
use crate::node::tests::{entry, secret};
use crate::node::{Approval, NodeRecord};
use crate::plan::{self, Plan};

type Annotations = BTreeMap<String, String>;

const NODES: u8 = 20;

fn name(byte: u8) -> String {
    format!("n{byte}")
}

/// Twenty approved nodes, as Node objects.
static MESH: LazyLock<Vec<Object>> = LazyLock::new(|| {
    let object = |byte: u8| {
        let routes = format!("10.42.{byte}.0/24");
        let entry = entry(1, 10 + byte, &name(byte), &format!("10.98.0.{byte}/32"), &[&routes]);
        let mut annotations = annotations::of_record(&entry.record);
        annotations.extend(annotations::of_approval(&entry.approval.unwrap()));
        Object { name: name(byte), annotations }
    };
    (1..=NODES).map(object).collect()
});

/// One act of vandalism on one annotation.
#[derive(Clone, Debug)]
enum Harm {
    Delete,
    Replace(String),
    Flip(Index, char),
    Swap(u8),
    CopyAll(u8),
}

fn harm() -> impl Strategy<Value = Harm> {
    prop_oneof![
        Just(Harm::Delete),
        prop_oneof![".{0,40}", "[a-z2-7]{52}", "[0-9./:, ]{0,30}"].prop_map(Harm::Replace),
        (any::<Index>(), any::<char>()).prop_map(|(at, with)| Harm::Flip(at, with)),
        (0..NODES).prop_map(Harm::Swap),
        (0..NODES).prop_map(Harm::CopyAll),
    ]
}

fn apply(objects: &mut [Object], of: u8, key: Index, harm: Harm) -> BTreeSet<usize> {
    let (of, key) = (of as usize, annotation(KEYS[key.index(KEYS.len())].name));
    let mut touched = BTreeSet::from([of]);
    let annotations = &mut objects[of].annotations;
    match harm {
        Harm::Delete => drop(annotations.remove(&key)),
        Harm::Replace(text) => drop(annotations.insert(key, text)),
        Harm::Flip(at, with) => {
            if let Some(text) = annotations.get_mut(&key).filter(|text| !text.is_empty()) {
                let at = at.index(text.chars().count());
                *text = text.chars().enumerate().map(|(i, c)| if i == at { with } else { c }).collect();
            }
        }
        Harm::Swap(with) => {
            let mine = annotations.remove(&key);
            let theirs = mine.and_then(|mine| objects[with as usize].annotations.insert(key.clone(), mine));
            if let Some(theirs) = theirs {
                objects[of].annotations.insert(key, theirs);
            }
            touched.insert(with.into());
        }
        Harm::CopyAll(from) => objects[of].annotations = objects[from as usize].annotations.clone(),
    }
    touched
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn an_annotation_that_is_harmed_is_told_of_and_changes_nothing(
        harms in proptest::collection::vec((0..NODES, any::<Index>(), harm()), 1..25),
    ) {
        let mut directory = Directory::new(secret(1).identity().id(), vec![], vec![]);
        directory.handle_listed(Carrier::Node, &MESH);
        let before: Vec<Entry> = directory.entries().cloned().collect();
        prop_assert_eq!(before.len(), NODES as usize);
        let mut objects = MESH.clone();
        for (of, key, harm) in harms {
            for touched in apply(&mut objects, of, key, harm) {
                let object = &objects[touched];
                prop_assert_eq!(directory.handle_object(Carrier::Node, object), []);
                let decoded = annotations::decode(&object.name.parse().unwrap(), &object.annotations);
                let told = directory.faults().any(|(name, _)| name == object.name);
                prop_assert_eq!(told, decoded.record.is_err() || decoded.approval.is_err(), "{:?}", object);
            }
        }
        prop_assert!(directory.entries().eq(&before));
        let again = directory.handle_listed(Carrier::Node, &MESH);
        prop_assert_eq!(again, []);
        prop_assert_eq!(directory.faults().count(), 0);
    }
}

// --- an adversary against a mesh that lives ---

/// Names and identities: the reader is node 0, the adversary's own node is the last.
const HONEST: u8 = 6;
const ADVERSARY: u8 = HONEST;
const ADVERSARY_NETWORK: u8 = 99;

#[derive(Clone, Copy, Debug)]
enum Step {
    // --- the honest ones ---
    Publish { node: u8, rotate: bool },
    Approve { node: u8, renumber: bool },
    Delete { node: u8 },
    Create { node: u8 },

    // --- the adversary, who has seen every annotation that ever was ---
    Replay { member: bool, on: u8, kept: Index, keys: u32 },
    Erase { member: bool, on: u8, keys: u32 },
    Impersonate { member: bool, on: u8, seq: u64, victim: u8 },
    Approval { member: bool, on: u8, serial: u64 },
    OwnRecord { victim: u8 },
}

fn step() -> impl Strategy<Value = Step> {
    let (on, member, keys) = (0..=ADVERSARY, any::<bool>(), prop_oneof![Just(u32::MAX), any::<u32>()]);
    let target = (member, on);
    prop_oneof![
        1 => (1..HONEST, any::<bool>()).prop_map(|(node, rotate)| Step::Publish { node, rotate }),
        1 => (0..HONEST, any::<bool>()).prop_map(|(node, renumber)| Step::Approve { node, renumber }),
        1 => (1..HONEST).prop_map(|node| Step::Delete { node }),
        1 => (1..HONEST).prop_map(|node| Step::Create { node }),
        4 => (target.clone(), any::<Index>(), keys.clone())
            .prop_map(|((member, on), kept, keys)| Step::Replay { member, on, kept, keys }),
        1 => (target.clone(), keys).prop_map(|((member, on), keys)| Step::Erase { member, on, keys }),
        1 => (target.clone(), prop_oneof![Just(u64::MAX), 0..50_u64], 0..HONEST)
            .prop_map(|((member, on), seq, victim)| Step::Impersonate { member, on, seq, victim }),
        1 => (target, prop_oneof![Just(u64::MAX), 0..50_u64])
            .prop_map(|((member, on), serial)| Step::Approval { member, on, serial }),
        1 => (0..HONEST).prop_map(|victim| Step::OwnRecord { victim }),
    ]
}

/// What is true of a node, whoever says otherwise.
#[derive(Clone, Debug)]
struct Truth {
    record: NodeRecord,
    approval: Approval,
    generation: u32,
}

/// A member as [`plan`] sees it.
type Seen = (PublicKey, Vec<IpNet>);

struct World {
    network: Network,
    clock: u64,
    hosts: u8,
    truth: BTreeMap<u8, Truth>,
    objects: BTreeMap<(Carrier, u8), Annotations>,
    kept: Vec<Annotations>,
    directory: Directory,
    plan: Plan,
}

impl World {
    fn new() -> Self {
        let network = crate::network::tests::network(1);
        let directory = Directory::new(network.id, vec![], vec![]);
        let (truth, objects, plan) = (BTreeMap::new(), BTreeMap::new(), Plan::default());
        let mut world = Self { network, clock: 0, hosts: 0, truth, objects, kept: vec![], directory, plan };
        for node in 0..=ADVERSARY {
            world.create(node);
            if node % 2 == 0 {
                // Half of them joined by token: a Member says what the Node says.
                let copy = world.objects[&(Carrier::Node, node)].clone();
                world.write(Carrier::Member, node, copy);
            }
        }
        world
    }

    /// The object is so from here on, and the reader sees it.
    fn write(&mut self, carrier: Carrier, node: u8, annotations: Annotations) {
        self.kept.push(annotations.clone());
        self.objects.insert((carrier, node), annotations.clone());
        self.directory.handle_object(carrier, &Object { name: name(node), annotations });
        self.replan();
    }

    fn replan(&mut self) {
        let entries = self.directory.entries().map(|entry| (entry.name().clone(), entry.clone())).collect();
        let me = secret(10).identity().id();
        self.plan = plan::plan(me, &self.network, &entries, &BTreeMap::new());
    }

    /// Server-side apply: `writer`'s annotations become these, the others stay.
    fn apply(&mut self, carrier: Carrier, node: u8, writer: Writer, with: Annotations) {
        let mut annotations = self.objects.get(&(carrier, node)).cloned().unwrap_or_default();
        for key in annotations::names(writer) {
            annotations.remove(&annotation(key));
        }
        annotations.extend(with);
        self.write(carrier, node, annotations);
    }

    fn next_approval(&mut self, node: u8, renumber: bool) -> Approval {
        self.clock += 1;
        let known = self.truth.get(&node).map(|truth| truth.approval.clone());
        let entry = entry(1, 10 + node, &name(node), "10.98.0.1/32", &[]);
        let mut approval = known.unwrap_or_else(|| entry.approval.unwrap().get().clone());
        if renumber {
            // Numbers come back round, so that what was approved of old overlaps what others have since.
            self.hosts = (self.hosts + 1) % 16;
            while self.truth.iter().any(|(other, truth)| *other != node && truth.has(self.hosts)) {
                self.hosts = (self.hosts + 1) % 16;
            }
            approval.addresses = vec![format!("10.98.0.{}/32", self.hosts).parse().unwrap()];
            approval.routes = vec![format!("10.42.{}.0/24", self.hosts).parse().unwrap()];
        }
        Approval { serial: self.clock, ..approval }
    }

    fn create(&mut self, node: u8) {
        let approval = self.next_approval(node, true);
        let record = entry(1, 10 + node, &name(node), "10.98.0.1/32", &[]).record.get().clone();
        self.clock += 1;
        let record = NodeRecord { seq: self.clock, ..record };
        self.truth.insert(node, Truth { record, approval, generation: 0 });
        self.say(node);
        self.approve(node);
    }

    fn say(&mut self, node: u8) {
        let Truth { record, generation, .. } = self.truth[&node].clone();
        let own = secret(10 + node);
        let record = match own.wireguard(generation) {
            key if key.public_key() == record.public_key => record.sign_with_key(&own.identity(), &key),
            _ => record.sign(&own.identity()),
        };
        self.apply(Carrier::Node, node, Writer::Node, annotations::of_record(&record));
    }

    fn approve(&mut self, node: u8) {
        let approval = self.truth[&node].approval.clone().sign(&secret(1).identity());
        self.apply(Carrier::Node, node, Writer::Controller, annotations::of_approval(&approval));
    }

    /// The honest nodes as the reader sees them, and its own addresses.
    fn seen(&self) -> (BTreeMap<String, Seen>, Vec<IpNet>) {
        let members = self.plan.members.values().filter(|member| member.name.as_str() != name(ADVERSARY));
        let seen =
            members.map(|member| (member.name.to_string(), (member.config.key, member.config.allowed_ips.clone())));
        (seen.collect(), self.plan.addresses.clone())
    }

    /// The honest nodes as they are.
    fn is(&self) -> (BTreeMap<String, Seen>, Vec<IpNet>) {
        let honest = self.truth.iter().filter(|(node, _)| (1..HONEST).contains(*node));
        let members = honest.map(|(node, truth)| {
            let Approval { addresses, routes, .. } = &truth.approval;
            (name(*node), (truth.record.public_key, [&addresses[..], routes].concat()))
        });
        (members.collect(), self.truth[&0].approval.addresses.clone())
    }

    fn take(&mut self, step: Step) {
        let carrier = |member: bool| if member { Carrier::Member } else { Carrier::Node };
        match step {
            Step::Publish { node, rotate } => {
                let Some(truth) = self.truth.get_mut(&node) else { return };
                self.clock += 1;
                truth.generation += u32::from(rotate);
                truth.record.public_key = secret(10 + node).wireguard(truth.generation).public_key();
                truth.record.seq = self.clock;
                self.say(node);
            }
            Step::Approve { node, renumber } => {
                if self.truth.contains_key(&node) {
                    let approval = self.next_approval(node, renumber);
                    self.truth.get_mut(&node).unwrap().approval = approval;
                    self.approve(node);
                }
            }
            Step::Delete { node } => {
                self.truth.remove(&node);
                for carrier in [Carrier::Node, Carrier::Member] {
                    self.objects.remove(&(carrier, node));
                    self.directory.handle_deleted(carrier, &name(node));
                }
                self.replan();
            }
            Step::Create { node } => {
                if !self.truth.contains_key(&node) {
                    self.create(node);
                }
            }
            Step::Replay { member, on, kept, keys } => {
                let kept = self.kept[kept.index(self.kept.len())].clone();
                self.vandalise(carrier(member), on, keys, &kept);
            }
            Step::Erase { member, on, keys } => self.vandalise(carrier(member), on, keys, &Annotations::new()),
            Step::Impersonate { member, on, seq, victim } => {
                let own = secret(10 + ADVERSARY);
                let mut record = entry(1, 10 + ADVERSARY, &name(on), "10.98.0.1/32", &[]).record.get().clone();
                record.seq = seq;
                record.public_key = self.truth.get(&victim).map_or(record.public_key, |truth| truth.record.public_key);
                let forged = annotations::of_record(&record.sign(&own.identity()));
                self.vandalise(carrier(member), on, u32::MAX, &forged);
            }
            Step::Approval { member, on, serial } => {
                let own = entry(ADVERSARY_NETWORK, 10 + ADVERSARY, &name(on), "10.98.0.1/32", &["0.0.0.0/0"]);
                let approval = Approval { serial, ..own.approval.unwrap().get().clone() };
                let forged = annotations::of_approval(&approval.sign(&secret(ADVERSARY_NETWORK).identity()));
                self.vandalise(carrier(member), on, u32::MAX, &forged);
            }
            Step::OwnRecord { victim } => {
                let Some(victim) = self.truth.get(&victim).map(|truth| truth.record.public_key) else { return };
                self.clock += 1;
                let own = self.truth.get_mut(&ADVERSARY).unwrap();
                own.record = NodeRecord { public_key: victim, seq: self.clock, ..own.record.clone() };
                self.say(ADVERSARY);
            }
        }
    }

    /// Of the object's annotations those whose bit is set become what `with` has, or go. A Node may be made for it, a
    /// Member not: nodes may register themselves.
    fn vandalise(&mut self, carrier: Carrier, on: u8, keys: u32, with: &Annotations) {
        if carrier == Carrier::Member && !self.objects.contains_key(&(carrier, on)) {
            return;
        }
        let mut annotations = self.objects.get(&(carrier, on)).cloned().unwrap_or_default();
        for (_, key) in KEYS.iter().enumerate().filter(|(bit, _)| keys & (1 << bit) != 0) {
            let key = annotation(key.name);
            match with.get(&key) {
                Some(text) => drop(annotations.insert(key, text.clone())),
                None => drop(annotations.remove(&key)),
            }
        }
        self.write(carrier, on, annotations);
    }
}

impl Truth {
    fn has(&self, host: u8) -> bool {
        self.approval.addresses.contains(&format!("10.98.0.{host}/32").parse().unwrap())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn whoever_may_write_every_annotation_changes_nobodys_key_address_or_route(
        steps in proptest::collection::vec(step(), 1..60),
    ) {
        let mut world = World::new();
        prop_assert_eq!(world.seen(), world.is());
        for step in steps {
            world.take(step);
            prop_assert_eq!(world.seen(), world.is(), "after {:?}", step);
        }
    }
}
