//! The directory under any sequence of objects that come, change, break and go.
//!
//! Each byte pair is an event. The objects' annotations are put together from genuine statements of two identities and
//! two networks, in every state that they ever had, and from rubbish. What must hold after each event: an approval
//! gives way only to a later one, a record of the approved identity only to a later one of the same, a node goes only
//! with its last object, and seeing the same again changes nothing.

#![no_main]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use keystone_fuzz::{Input, sample};
use keystone_mesh_core::NodeId;
use keystone_mesh_core::annotations::{self, KEYS, PREFIX};
use keystone_mesh_core::directory::{Carrier, Change, Directory, Object};
use keystone_mesh_core::node::{Approval, Entry, NodeRecord};
use libfuzzer_sys::fuzz_target;

type Map = BTreeMap<String, String>;

const NETWORK: u8 = 1;
const NAMES: [&str; 3] = ["worker-1", "worker-2", "Not_A_Name"];
const STATES: u64 = 4;

/// Every statement that there ever was: by name, by identity or network, by sequence number.
static RECORDS: LazyLock<Vec<Map>> = LazyLock::new(|| {
    let of = |name: &str, byte: u8, seq: u64| {
        let name = name.parse().expect("a node name");
        let record = NodeRecord { name, seq, ..sample::record(byte).get().clone() };
        annotations::of_record(&record.sign(&sample::identity(byte)))
    };
    every(|name, byte, seq| of(name, 2 + byte, seq))
});
static APPROVALS: LazyLock<Vec<Map>> = LazyLock::new(|| {
    let of = |name: &str, byte: u8, serial: u64| {
        let network = if serial == 0 { 9 } else { NETWORK };
        let mut approval = Approval {
            name: name.parse().expect("a node name"),
            serial,
            ..sample::approval(network, byte).get().clone()
        };
        if serial == 3 {
            approval.addresses.clear();
        }
        annotations::of_approval(&approval.sign(&sample::identity(network)))
    };
    every(|name, byte, serial| of(name, 2 + byte, serial))
});

fn every(of: impl Fn(&str, u8, u64) -> Map) -> Vec<Map> {
    let names = NAMES.iter().filter(|name| name.parse::<keystone_mesh_core::node::NodeName>().is_ok());
    let each = names.flat_map(|name| (0..2).flat_map(move |byte| (0..STATES).map(move |state| (name, byte, state))));
    each.map(|(name, byte, state)| of(name, byte, state)).collect()
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let network = sample::identity(NETWORK).id();
    let mut directory = Directory::new(network, Vec::new(), Vec::new());
    let mut objects: BTreeMap<(Carrier, &str), Map> = BTreeMap::new();
    while !input.is_empty() {
        let what = input.byte();
        let carrier = if what & 1 == 0 { Carrier::Node } else { Carrier::Member };
        let name = NAMES[usize::from(what >> 1) % NAMES.len()];
        let before: BTreeMap<String, Entry> = entries(&directory);
        let changes = match what >> 5 {
            0..5 => {
                let annotations = change(objects.entry((carrier, name)).or_default(), &mut input);
                let object = Object { name: name.into(), annotations };
                let changes = directory.handle_object(carrier, &object);
                assert_eq!(directory.handle_object(carrier, &object), [], "seen twice");
                changes
            }
            5 => {
                objects.remove(&(carrier, name));
                directory.handle_deleted(carrier, name)
            }
            6 => {
                objects.retain(|(of, _), _| *of != carrier);
                directory.handle_listed(carrier, &[])
            }
            _ => {
                let changes = directory.handle_listed(carrier, &listed(&objects, carrier));
                assert_eq!(changes, [], "what was seen is listed");
                changes
            }
        };
        check(&before, &entries(&directory), &objects, network, &changes);
    }
});

fn change(annotations: &mut Map, input: &mut Input<'_>) -> Map {
    let (how, which) = (input.byte(), usize::from(input.byte()));
    match how % 6 {
        0 => annotations.extend(RECORDS[which % RECORDS.len()].clone()),
        1 => annotations.extend(APPROVALS[which % APPROVALS.len()].clone()),
        2 => annotations.clear(),
        3 => drop(annotations.remove(&key(which))),
        4 => drop(annotations.insert(key(which), String::from_utf8_lossy(input.slice(8)).into_owned())),
        _ => {
            let from = &RECORDS[usize::from(input.byte()) % RECORDS.len()];
            if let Some(text) = from.get(&key(which)) {
                annotations.insert(key(which), text.clone());
            }
        }
    }
    annotations.clone()
}

fn key(which: usize) -> String {
    format!("{PREFIX}{}", KEYS[which % KEYS.len()].name)
}

fn listed(objects: &BTreeMap<(Carrier, &str), Map>, carrier: Carrier) -> Vec<Object> {
    let of = objects.iter().filter(|((of, _), _)| *of == carrier);
    of.map(|((_, name), annotations)| Object { name: (*name).into(), annotations: annotations.clone() }).collect()
}

fn entries(directory: &Directory) -> BTreeMap<String, Entry> {
    directory.entries().map(|entry| (entry.name().to_string(), entry.clone())).collect()
}

fn check(
    before: &BTreeMap<String, Entry>,
    after: &BTreeMap<String, Entry>,
    objects: &BTreeMap<(Carrier, &str), Map>,
    network: NodeId,
    changes: &[Change],
) {
    let carried: BTreeSet<&str> = objects.keys().map(|(_, name)| *name).collect();
    for (name, old) in before {
        assert_eq!(after.contains_key(name), carried.contains(name.as_str()), "{name} goes with its last object");
        let Some(new) = after.get(name) else { continue };
        let serial = |entry: &Entry| entry.approval.as_ref().map(|approval| approval.get().serial);
        assert!(serial(new) >= serial(old), "an older approval");
        if old.approved(network).is_some() && serial(new) == serial(old) {
            let (old, new) = (old.record.get(), new.record.get());
            assert_eq!(old.identity, new.identity, "another identity than the approved one");
            assert!(new.seq >= old.seq, "an older record");
        }
    }
    // What readers are told is all that they need.
    let mut told = before.clone();
    for change in changes {
        match change {
            Change::Changed(entry) => drop(told.insert(entry.name().to_string(), (**entry).clone())),
            Change::Removed(name) => assert!(told.remove(name.as_str()).is_some()),
            Change::Peer(_) | Change::PeerRemoved(_) => panic!("there is no peer"),
        }
    }
    assert_eq!(told, *after);
}
