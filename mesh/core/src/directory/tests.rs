use std::collections::BTreeMap;

use super::*;
use crate::node::tests::{entry, record, secret};
use crate::node::{Approval, NodeRecord};
use crate::plain_peer::PlainPeer;

fn network() -> NodeId {
    secret(1).identity().id()
}

fn directory() -> Directory {
    Directory::new(network(), vec![], vec![])
}

fn object(name: &str, parts: &[&BTreeMap<String, String>]) -> Object {
    let annotations = parts.iter().flat_map(|part| part.iter()).map(|(key, text)| (key.clone(), text.clone()));
    Object { name: name.into(), annotations: annotations.collect() }
}

/// The record of `byte` under this name with this sequence number, as annotations.
fn said(byte: u8, name: &str, seq: u64) -> BTreeMap<String, String> {
    annotations::of_record(&NodeRecord { seq, ..record(byte, name) }.sign(&secret(byte).identity()))
}

/// The approval by the network of `by` of the identity of `byte`, as annotations.
fn approved(by: u8, byte: u8, name: &str, address: &str, serial: u64) -> BTreeMap<String, String> {
    let addresses = if address.is_empty() { vec![] } else { vec![address.parse().unwrap()] };
    let approval = entry(by, byte, name, "10.98.0.9/32", &[]).approval.unwrap().get().clone();
    annotations::of_approval(&Approval { addresses, serial, ..approval }.sign(&secret(by).identity()))
}

fn faults(directory: &Directory, name: &str) -> Vec<Fault> {
    directory.faults().filter(|(of, _)| *of == name).flat_map(|(_, faults)| faults.to_vec()).collect()
}

fn only(directory: &Directory) -> &Entry {
    let mut entries = directory.entries();
    let entry = entries.next().unwrap();
    assert!(entries.next().is_none());
    entry
}

#[test]
fn a_node_comes_changes_and_goes() {
    let mut directory = directory();
    let mine = approved(1, 2, "w", "10.98.0.2/32", 1);
    assert_eq!(directory.handle_object(Carrier::Node, &object("w", &[])), []);
    let changes = directory.handle_object(Carrier::Node, &object("w", &[&said(2, "w", 1)]));
    assert!(matches!(&changes[..], [Change::Changed(entry)] if entry.approval.is_none()));
    let changes = directory.handle_object(Carrier::Node, &object("w", &[&said(2, "w", 1), &mine]));
    assert!(matches!(&changes[..], [Change::Changed(entry)] if entry.approved(network()).is_some()));
    assert_eq!(directory.handle_object(Carrier::Node, &object("w", &[&said(2, "w", 1), &mine])), []);
    assert_eq!(directory.handle_object(Carrier::Node, &object("w", &[&said(2, "w", 2), &mine])).len(), 1);
    assert_eq!(only(&directory).record.get().seq, 2);
    assert_eq!(directory.handle_deleted(Carrier::Node, "w"), [Change::Removed("w".parse().unwrap())]);
    assert_eq!(directory.handle_deleted(Carrier::Node, "w"), []);
    assert_eq!(directory.entries().count(), 0);
}

#[test]
fn an_approval_may_come_before_the_record() {
    let mut directory = directory();
    let mine = approved(1, 2, "w", "10.98.0.2/32", 1);
    assert_eq!(directory.handle_object(Carrier::Member, &object("w", &[&mine])), []);
    assert_eq!(directory.entries().count(), 0);
    directory.handle_object(Carrier::Node, &object("w", &[&said(2, "w", 1)]));
    assert!(only(&directory).approved(network()).is_some());
}

#[test]
fn what_is_missing_or_broken_takes_nothing_back_and_is_told() {
    let mut directory = directory();
    let mine = approved(1, 2, "w", "10.98.0.2/32", 1);
    let whole = object("w", &[&said(2, "w", 1), &mine]);
    directory.handle_object(Carrier::Node, &whole);
    let before = only(&directory).clone();
    assert_eq!(directory.handle_object(Carrier::Node, &object("w", &[])), []);
    assert_eq!(faults(&directory, "w"), []);
    let mut broken = whole.clone();
    broken.annotations.insert("mesh.keystone.cluster/endpoints".into(), "nowhere".into());
    broken.annotations.insert("mesh.keystone.cluster/addresses".into(), "10.98.0.3/32".into());
    assert_eq!(directory.handle_object(Carrier::Node, &broken), []);
    let told = faults(&directory, "w");
    assert!(matches!(&told[..], [Fault::Approval(_), Fault::Record(_)]), "{told:?}");
    assert!(told[1].to_string().contains("`endpoints`"), "{}", told[1]);
    assert_eq!(only(&directory), &before);
    directory.handle_object(Carrier::Node, &whole);
    assert_eq!(faults(&directory, "w"), []);
}

#[test]
fn of_two_records_and_of_two_approvals_the_later_one_counts() {
    let mut directory = directory();
    let at = |seq: u64, serial: u64| {
        object("w", &[&said(2, "w", seq), &approved(1, 2, "w", &format!("10.98.0.{serial}/32"), serial)])
    };
    directory.handle_object(Carrier::Node, &at(5, 5));
    for (carrier, seq, serial) in [(Carrier::Node, 4, 4), (Carrier::Member, 5, 1), (Carrier::Member, 1, 5)] {
        assert_eq!(directory.handle_object(carrier, &at(seq, serial)), []);
    }
    let entry = only(&directory);
    assert_eq!((entry.record.get().seq, entry.approved(network()).unwrap().serial), (5, 5));
}

#[test]
fn a_node_goes_with_the_last_object_of_its_name() {
    let mut directory = directory();
    let both = object("w", &[&said(2, "w", 1), &approved(1, 2, "w", "10.98.0.2/32", 1)]);
    directory.handle_object(Carrier::Member, &both);
    directory.handle_object(Carrier::Node, &object("w", &[]));
    assert_eq!(directory.handle_deleted(Carrier::Member, "w"), []);
    assert!(only(&directory).approved(network()).is_some());
    assert_eq!(directory.handle_deleted(Carrier::Node, "w").len(), 1);
}

#[test]
fn another_identity_waits_until_it_is_approved_by_whatever_object() {
    let mut directory = directory();
    let old = approved(1, 2, "w", "10.98.0.2/32", 1);
    directory.handle_object(Carrier::Node, &object("w", &[&said(2, "w", 1), &old]));
    assert_eq!(directory.handle_object(Carrier::Node, &object("w", &[&said(3, "w", 9), &old])), []);
    let (approved_id, found) = (secret(2).identity().id(), secret(3).identity().id());
    assert_eq!(faults(&directory, "w"), [Fault::OtherIdentity { approved: approved_id, found }]);
    assert_eq!(only(&directory).record.get().identity, approved_id);
    let now = approved(1, 3, "w", "10.98.0.2/32", 2);
    assert_eq!(directory.handle_object(Carrier::Member, &object("w", &[&now])).len(), 1);
    assert_eq!(only(&directory).approved(network()).unwrap().identity, found);
    assert_eq!(faults(&directory, "w"), []);
}

#[test]
fn while_nobody_is_approved_the_last_word_counts() {
    let mut directory = directory();
    directory.handle_object(Carrier::Node, &object("w", &[&said(2, "w", 9)]));
    directory.handle_object(Carrier::Node, &object("w", &[&said(3, "w", 1)]));
    assert_eq!(only(&directory).record.get().identity, secret(3).identity().id());
    let revoked = approved(1, 3, "w", "", 2);
    directory.handle_object(Carrier::Node, &object("w", &[&said(3, "w", 1), &revoked]));
    assert!(only(&directory).approved(network()).is_none());
    directory.handle_object(Carrier::Node, &object("w", &[&said(2, "w", 9), &revoked]));
    assert_eq!(only(&directory).record.get().identity, secret(2).identity().id());
}

#[test]
fn a_foreign_approval_and_a_bad_name_are_told() {
    let mut directory = directory();
    directory.handle_object(Carrier::Node, &object("w", &[&approved(9, 2, "w", "10.98.0.2/32", 99)]));
    assert_eq!(faults(&directory, "w"), [Fault::ForeignApproval(secret(9).identity().id())]);
    assert_eq!(directory.handle_object(Carrier::Node, &object("Not_A_Name", &[])), []);
    assert!(matches!(&faults(&directory, "Not_A_Name")[..], [Fault::Name(why)] if why.contains("Not_A_Name")));
    directory.handle_listed(Carrier::Node, &[]);
    assert_eq!(directory.faults().count(), 0, "faults go with their objects");
}

#[test]
fn a_fresh_list_removes_what_it_does_not_name_and_costs_nothing_where_nothing_changed() {
    let mut directory = directory();
    let objects: Vec<Object> = (2..7_u8)
        .map(|byte| {
            let name = format!("n{byte}");
            object(&name, &[&said(byte, &name, 1), &approved(1, byte, &name, &format!("10.98.0.{byte}/32"), 1)])
        })
        .collect();
    assert_eq!(directory.handle_listed(Carrier::Node, &objects).len(), 5);
    assert_eq!(directory.handle_listed(Carrier::Node, &objects), []);
    let changes = directory.handle_listed(Carrier::Node, &objects[1..]);
    assert_eq!(changes, [Change::Removed("n2".parse().unwrap())]);
    assert_eq!(directory.handle_listed(Carrier::Member, &[]), []);
    assert_eq!(directory.entries().count(), 4);
}

#[test]
fn what_a_snapshot_knows_stays_until_no_list_names_it() {
    let old = vec![entry(1, 2, "a", "10.98.0.2/32", &[]), entry(1, 3, "b", "10.98.0.3/32", &[])];
    let mut directory = Directory::new(network(), old, vec![]);
    assert_eq!(directory.entries().count(), 2);
    assert_eq!(directory.handle_listed(Carrier::Node, &[object("a", &[])]), []);
    assert_eq!(directory.handle_listed(Carrier::Member, &[]), [Change::Removed("b".parse().unwrap())]);
    assert!(only(&directory).approved(network()).is_some(), "its annotations were deleted meanwhile");
}

#[test]
fn an_approval_of_before_a_removal_does_not_come_back() {
    let mut directory = directory();
    let kept = object("w", &[&said(2, "w", 1), &approved(1, 2, "w", "10.98.0.2/32", 5)]);
    directory.handle_object(Carrier::Node, &kept);
    directory.handle_deleted(Carrier::Node, "w");
    let changes = directory.handle_object(Carrier::Node, &kept);
    assert!(matches!(&changes[..], [Change::Changed(entry)] if entry.approval.is_none()));
    assert_eq!(faults(&directory, "w"), [Fault::ReplayedApproval { found: 5, last: 5 }]);
    directory.handle_deleted(Carrier::Node, "w");
    directory.handle_object(Carrier::Node, &kept);
    assert!(only(&directory).approval.is_none(), "the second removal does not forget the first");
    let again = object("w", &[&said(2, "w", 1), &approved(1, 2, "w", "10.98.0.7/32", 6)]);
    directory.handle_object(Carrier::Node, &again);
    assert!(only(&directory).approved(network()).is_some());
    assert_eq!(faults(&directory, "w"), []);
}

#[test]
fn names_that_went_are_remembered_up_to_a_bound() {
    let mut memory = Memory::default();
    for i in 0..MEMORY as u64 + 10 {
        memory.remember(&format!("n{i}").parse().unwrap(), i);
    }
    assert_eq!(memory.serial(&"n9".parse().unwrap()), None);
    assert_eq!(memory.serial(&"n10".parse().unwrap()), Some(10));
}

fn stated(name: &str, address: &str, serial: u64) -> Object {
    let peer = PlainPeer {
        network: network(),
        name: name.parse().unwrap(),
        node: "home".parse().unwrap(),
        public_key: secret(9).wireguard(0).public_key(),
        addresses: vec![address.parse().unwrap()],
        routes: vec![],
        endpoint: None,
        persistent_keepalive: None,
        serial,
    };
    object(name, &[&peer.sign(&secret(1).identity()).to_annotations()])
}

#[test]
fn plain_peers_are_kept_like_nodes() {
    let mut directory = directory();
    let five = stated("laptop", "10.98.1.1/32", 5);
    assert_eq!(directory.handle_peer(&object("laptop", &[])), []);
    assert_eq!(directory.handle_peer(&five).len(), 1);
    assert_eq!(directory.handle_peer(&five), []);
    assert_eq!(directory.handle_peer(&stated("laptop", "10.98.1.2/32", 4)), []);
    assert_eq!(directory.handle_peer(&object("laptop", &[])), []);
    let moved = Object { name: "phone".into(), ..stated("laptop", "10.98.1.1/32", 9) };
    assert_eq!(directory.handle_peer(&moved), []);
    assert!(matches!(&faults(&directory, "phone")[..], [Fault::Peer(_)]));
    assert_eq!(directory.peers().next().unwrap().get().serial, 5);
    assert_eq!(directory.handle_peers_listed(&[moved]), [Change::PeerRemoved("laptop".parse().unwrap())]);
    assert_eq!(directory.handle_peer(&five), []);
    assert_eq!(faults(&directory, "laptop"), [Fault::ReplayedApproval { found: 5, last: 5 }]);
    assert_eq!(directory.handle_peer(&stated("laptop", "10.98.1.1/32", 6)).len(), 1);
    let mut again = Directory::new(network(), vec![], directory.peers().cloned().collect());
    assert_eq!(again.handle_peers_listed(&[]), [Change::PeerRemoved("laptop".parse().unwrap())]);
}
