//! Holds docs/annotations.md to the code.

use std::collections::BTreeSet;

use super::*;
use crate::node::Approval;
use crate::node::tests::{entry, record, secret};
use crate::plain_peer;

const PAGE: &str = include_str!("../../../../docs/annotations.md");

/// The rows of the table under this heading: the first two cells.
fn rows(heading: &str) -> Vec<(String, String)> {
    let section = PAGE.split_once(&format!("\n## {heading}\n")).unwrap().1;
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|row| {
        let mut cells = row.split(" | ");
        (cells.next().unwrap().trim_end_matches('`').to_owned(), cells.next().unwrap().to_owned())
    })
    .collect()
}

/// The fenced block that begins with this line, its lines without the fence.
fn block(first: &str) -> &'static str {
    let start = PAGE.find(&format!("```\n{first}")).unwrap() + 4;
    PAGE[start..].split_once("```").unwrap().0
}

/// What the example shows.
fn example() -> (SignedRecord, SignedApproval) {
    let record = record(2, "worker-1").sign_with_key(&secret(2).identity(), &secret(2).wireguard(0));
    let approval = entry(1, 2, "worker-1", "10.98.0.2/32", &["192.168.7.0/24"]).approval.unwrap().get().clone();
    let pods = Approval { pod_cidrs: vec!["10.42.1.0/24".parse().unwrap()], ..approval };
    (record, pods.sign(&secret(1).identity()))
}

#[test]
fn the_table_has_a_row_for_every_annotation_and_no_other() {
    let word = |writer: Writer| match writer {
        Writer::Node => "node",
        Writer::Controller => "controller",
        Writer::Person => "person",
    };
    let keys: Vec<_> = KEYS.iter().map(|key| (key.name.to_owned(), word(key.writer).to_owned())).collect();
    assert_eq!(rows("Nodes and Members"), keys);
    let peers: BTreeSet<String> = rows("Peers").into_iter().map(|(name, _)| name).collect();
    assert_eq!(peers, plain_peer::KEYS.iter().map(|key| (*key).to_owned()).collect());
}

#[test]
fn the_example_is_what_the_code_writes_and_its_bytes_are_what_is_signed() {
    let (record, approval) = example();
    let mut annotations = of_record(&record);
    annotations.extend(of_approval(&approval));
    let lines: Vec<String> = annotations.iter().map(|(key, text)| format!("{key}: {text}\n")).collect();
    assert_eq!(block(PREFIX), lines.concat());

    let signature = |key: &str| annotations[&annotation(key)].parse().unwrap();
    let signed = block("keystone-mesh record 1\n").as_bytes();
    assert!(record.get().identity.verify(signed, &signature("signature")));
    let signed = block("keystone-mesh approval 1\n").as_bytes();
    assert!(approval.get().network.verify(signed, &signature("approval-signature")));
}

#[test]
fn the_limits_on_the_page_are_those_of_the_code() {
    for limit in [
        format!("{MAX_FACT} bytes"),
        format!("{} endpoints", crate::node::MAX_ENDPOINTS),
        format!("{MAX_RELAYS} relays"),
        format!("{MAX_ROUTES} networks"),
        format!("{} pod CIDRs", crate::node::MAX_POD_CIDRS),
        format!("{MAX_FORCED} forced endpoints"),
        format!("{} addresses", crate::node::MAX_ADDRESSES),
        format!("{} names", crate::directory::MEMORY),
    ] {
        assert!(PAGE.contains(&limit), "docs/annotations.md does not say `{limit}`");
    }
}
