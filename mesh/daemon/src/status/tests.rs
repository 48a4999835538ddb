use keystone_mesh_core::Secret;
use keystone_mesh_core::path::Nat;

use super::*;

/// A node with a direct peer, a relayed one and a plain one.
pub(crate) fn sample() -> Status {
    let secret = |byte: u8| Secret::from_bytes([byte; 32]);
    let peer = |byte: u8, name: &str, path: &str, reason: Option<&str>| Peer {
        name: name.to_owned(),
        identity: Some(secret(byte).identity().id()),
        public_key: secret(byte).wireguard(0).public_key(),
        addresses: vec![format!("10.98.0.{byte}/32").parse().unwrap()],
        routes: vec![],
        pod_cidrs: vec![],
        location: None,
        served_by: None,
        path: path.to_owned(),
        via: Some(format!("198.51.100.{byte}:51840")),
        rtt_ms: Some(f64::from(byte)),
        last_handshake_s: Some(30.0),
        rx_bytes: 1000 * u64::from(byte),
        tx_bytes: 2000 * u64::from(byte),
        reason: reason.map(str::to_owned),
        tried: vec![],
    };
    Status {
        node: Node {
            name: Some("home".parse().unwrap()),
            network: Some(secret(1).identity().id()),
            identity: secret(1).identity().id(),
            public_key: secret(1).wireguard(0).public_key(),
            addresses: vec!["10.98.0.1/32".parse().unwrap()],
            pod_cidrs: vec!["10.42.0.0/24".parse().unwrap()],
            mesh_cidrs: vec!["10.98.0.0/16".parse().unwrap()],
            control_plane: true,
            approval: Approval::Approved,
            approval_reason: None,
            location: Some("home/attic".parse().unwrap()),
            interface: "ksmesh0".into(),
            mtu: 1280,
            listen_port: 51840,
            endpoints: vec!["host 192.168.1.2:51840".into()],
            nat: Nat::EndpointIndependent,
            version: env!("CARGO_PKG_VERSION").into(),
            pid: 1,
            uptime_s: 60.0,
        },
        conditions: vec![],
        relays: vec![Relay {
            id: secret(9).identity().id(),
            address: "198.51.100.9:51840".into(),
            state: "up".into(),
            rtt_ms: Some(3.0),
            observed: None,
            reason: None,
        }],
        registry: Registry {
            kind: "embedded".into(),
            state: "current".into(),
            reason: None,
            since_s: 60.0,
            known_from: "registry".into(),
        },
        peers: vec![
            peer(2, "worker-pub", "direct", None),
            peer(3, "worker-sym", "relayed", Some("no answer from 2 addresses")),
        ],
        plain_peers: vec![],
        faults: vec![NodeFault { node: "worker-odd".into(), code: "record".into(), says: "worker-odd: broken".into() }],
        fault_counts: BTreeMap::from([("record".to_owned(), 1)]),
        data_plane: DataPlane {
            up: true,
            live_sessions: 2,
            drops: BTreeMap::from([("no_route".to_owned(), 7)]),
            ..DataPlane::default()
        },
        counts: Counts { path_changes: 4, ..Counts::default() },
        network_policy: Some(NetworkPolicy {
            state: "current".into(),
            policies: 3,
            apply_ms: Some(12.0),
            last_applied_s: Some(30.0),
            ..NetworkPolicy::default()
        }),
        gateway: Some(GatewaySnapshot {
            joins: BTreeMap::from([("token-unknown".to_owned(), 2)]),
            ..GatewaySnapshot::default()
        }),
        relay_server: Some(RelaySnapshot::default()),
        warnings: vec![],
    }
}

#[test]
fn a_node_is_ready_when_it_is_in_the_mesh_by_registry_or_by_snapshot() {
    assert_eq!(sample().not_ready(), None);
    let mut rebooted = sample();
    rebooted.registry.state = "stale".into();
    rebooted.registry.known_from = "snapshot".into();
    assert_eq!(rebooted.not_ready(), None);
}

#[test]
fn whatever_is_missing_is_named_with_the_remedy() {
    type Break = fn(&mut Status);
    let cases: [(Break, &str); 4] = [
        (
            |s| {
                s.registry.known_from = "none".into();
                s.registry.kind = "gateway".into();
                s.registry.reason = Some("no way to it".into());
            },
            "the gateway registry has not been heard (no way to it), and there is no snapshot of an earlier run",
        ),
        (
            |s| {
                s.node.approval = Approval::Pending;
                s.node.approval_reason = Some("run `keystone-mesh approve home`".into());
            },
            "this node is pending: run `keystone-mesh approve home`",
        ),
        (|s| s.node.approval = Approval::Revoked, "this node is revoked: the network has not approved it"),
        (
            |s| {
                s.data_plane.up = false;
                s.warnings = vec!["10.42.0.0/24 is taken".into()];
            },
            "addresses and routes are not on ksmesh0 yet: 10.42.0.0/24 is taken",
        ),
    ];
    for (broken, says) in cases {
        let mut status = sample();
        broken(&mut status);
        assert_eq!(status.not_ready().as_deref(), Some(says));
    }
}

#[test]
fn a_daemon_with_plain_peers_alone_asks_nobody() {
    let mut status = sample();
    (status.node.name, status.node.approval) = (None, Approval::None);
    (status.registry.state, status.registry.known_from) = ("none".into(), "none".into());
    assert_eq!(status.not_ready(), None);
}

#[test]
fn the_page_of_peers_names_the_node_and_has_the_peers_as_status_has_them() {
    let status = sample();
    let page = serde_json::to_value(status.peers_page()).unwrap();
    let whole = serde_json::to_value(&status).unwrap();
    assert_eq!(page["node"], "home");
    assert_eq!(page["peers"], whole["peers"]);
}

#[test]
fn what_is_written_reads_back() {
    let text = serde_json::to_string(&sample()).unwrap();
    let read: Status = serde_json::from_str(&text).unwrap();
    assert_eq!(serde_json::to_string(&read).unwrap(), text);
}

#[test]
fn what_the_network_says_is_told_with_the_command() {
    let name: NodeName = "worker-1".parse().unwrap();
    let id = |byte: u8| Secret::from_bytes([byte; 32]).identity().id();
    let said = |addresses: &[&str]| node::Approval {
        network: id(1),
        name: name.clone(),
        identity: id(2),
        addresses: addresses.iter().map(|net| net.parse().unwrap()).collect(),
        routes: vec![],
        pod_cidrs: vec![],
        endpoints: vec![],
        relays: vec![],
        location: None,
        serial: 1,
    };
    let in_force = said(&["10.98.0.2/32"]);
    assert_eq!(Approval::of(&name, id(2), Some(&in_force)), (Approval::Approved, None));
    for (identity, approval, state, words) in [
        (id(2), None, Approval::Pending, "run `keystone-mesh approve worker-1` on the control plane".to_owned()),
        (id(3), Some(in_force), Approval::Pending, format!("approve worker-1 --identity {}", id(3))),
        (id(2), Some(said(&[])), Approval::Revoked, "it was put out of the network".to_owned()),
    ] {
        let (found, why) = Approval::of(&name, identity, approval.as_ref());
        assert!(found == state && why.as_ref().is_some_and(|why| why.contains(&words)), "{why:?}");
    }
}
