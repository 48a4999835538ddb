use clap::Parser as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use keystone_mesh_api::PeerStatus;

use super::*;
use crate::cli::Cli;

fn peer(conditions: &[(&str, &str, &str)]) -> Peer {
    let mut peer = Peer::new("laptop", PeerSpec { public_key: "KEY".into(), ..PeerSpec::default() });
    peer.status = Some(PeerStatus {
        addresses: vec!["10.98.1.1/32".into()],
        node: Some("home".into()),
        conditions: conditions.iter().map(|(status, reason, message)| ready(status, reason, message)).collect(),
    });
    peer
}

fn ready(status: &str, reason: &str, message: &str) -> Condition {
    let condition = serde_json::json!({
        "type": "Ready", "status": status, "reason": reason, "message": message, "lastTransitionTime": "2026-01-01T00:00:00Z"
    });
    serde_json::from_value(condition).unwrap()
}

#[test]
fn the_list_says_why_a_peer_is_not_ready() {
    assert_eq!(row(&peer(&[("True", "Served", "all is well")])), ["laptop", "10.98.1.1", "home", "True", ""]);
    let overlapping = row(&peer(&[("False", "RouteOverlap", "192.168.7.0/24 is worker's")]));
    assert_eq!(overlapping[3..], ["False", "RouteOverlap: 192.168.7.0/24 is worker's"]);
    let mut fresh = peer(&[]);
    fresh.status = None;
    assert_eq!(row(&fresh), ["laptop", "-", "-", "Unknown", "the controller has not seen it yet"]);
}

#[test]
fn no_private_key_can_be_an_argument() {
    for argument in ["--private-key", "--key"] {
        let parsed = Cli::try_parse_from(["keystone-mesh", "peer", "config", "laptop", argument, "AAAA"]);
        assert!(parsed.is_err(), "{argument}");
    }
}

#[test]
fn a_key_is_read_from_a_file_and_anything_else_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key");
    std::fs::write(&path, "CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk=\n").unwrap();
    assert_eq!(read_key(&path).unwrap().as_bytes(), &[9; 32]);
    std::fs::write(&path, "CQkJ").unwrap();
    let error = format!("{:#}", read_key(&path).unwrap_err());
    assert!(error.contains("holds no WireGuard private key") && !error.contains("CQkJ"), "{error}");
}

#[test]
fn every_key_is_another_one() {
    assert_ne!(new_key().unwrap().as_bytes(), new_key().unwrap().as_bytes());
}
