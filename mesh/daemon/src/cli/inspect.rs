//! `status` and `peers`.

use ipnet::IpNet;

use super::output::{ago, bytes, print, print_json, table};
use crate::config::Places;
use crate::control::{self, Answer, Request, not_the_question};
use crate::status::{Approval, Condition, NetworkPolicy, Peer, PlainPeer, Registry, Status};

/// Asks the daemon for its status.
pub(super) async fn fetch(places: &Places) -> anyhow::Result<Status> {
    let answer = control::ask(&places.socket(), &Request::Status).await?;
    if let Answer::Status(status) = answer { Ok(*status) } else { Err(not_the_question().into()) }
}

pub(super) async fn status(places: &Places, json: bool) -> anyhow::Result<()> {
    let mut status = fetch(places).await?;
    if status.registry.kind == "kubernetes" && status.registry.state == "current" {
        match control::ask(&places.socket(), &Request::Conditions).await {
            Ok(Answer::Conditions { conditions }) => status.conditions = conditions,
            Ok(_) => return Err(not_the_question().into()),
            Err(error) => status.warnings.push(format!("what the controller says of this node is not known: {error}")),
        }
    }
    if json { print_json(&status) } else { print(&describe(&status)) }
}

pub(super) async fn peers(places: &Places, json: bool) -> anyhow::Result<()> {
    let status = fetch(places).await?;
    if json {
        return print_json(&status);
    }
    let mut text = peer_table(&status.peers);
    for peer in status.peers.iter().filter(|peer| !peer.tried.is_empty()) {
        text.push_str(&format!("\n{}\n", peer.name));
        for line in &peer.tried {
            text.push_str(&format!("  {line}\n"));
        }
    }
    print(&text)
}

fn describe(status: &Status) -> String {
    head(status) + &peer_table(&status.peers) + &plain_table(&status.plain_peers)
}

fn head(status: &Status) -> String {
    let node = &status.node;
    let name = node.name.as_ref().map_or("(plain WireGuard)", |name| name.as_str());
    let role = if node.control_plane { ", control plane" } else { "" };
    let addresses: Vec<String> = node.addresses.iter().map(|net| net.addr().to_string()).collect();
    let mut text = format!("{name}{role}  {}", addresses.join("  ")).trim_end().to_owned() + "\n";
    let mut fact = |key: &str, value: String| text.push_str(&format!("  {key:<10} {value}\n"));
    fact("interface", format!("{} (MTU {}), UDP port {}", node.interface, node.mtu, node.listen_port));
    if let Some(network) = node.network {
        fact("network", network.to_string());
    }
    if node.name.is_some() {
        fact("identity", node.identity.to_string());
        let why = node.approval_reason.as_ref().map_or(String::new(), |why| format!(": {why}"));
        fact("approval", format!("{}{why}", node.approval.label()));
        for condition in status.conditions.iter().filter(|condition| !repeats(condition, node.approval)) {
            fact("condition", describe_condition(condition));
        }
        if let Some(location) = &node.location {
            fact("location", location.to_string());
        }
        fact(
            "nat",
            format!(
                "{}{}",
                node.nat,
                if node.endpoints.is_empty() { String::new() } else { format!("; {}", node.endpoints.join(", ")) }
            ),
        );
        if !node.pod_cidrs.is_empty() {
            fact("pods", words(&node.pod_cidrs));
        }
        fact("registry", registry(&status.registry));
    }
    if let Some(policy) = &status.network_policy {
        fact("policy", network_policy(policy));
    }
    for relay in &status.relays {
        let rtt = relay.rtt_ms.map_or(String::new(), |rtt| format!(", {rtt:.1} ms"));
        let why = relay.reason.as_ref().map_or(String::new(), |why| format!(": {why}"));
        fact("relay", format!("{} {}{rtt}{why}", relay.address, relay.state));
    }
    if let Some(first) = status.faults.first() {
        let count: u64 = status.fault_counts.values().sum();
        let more = if count > 1 { "; `keystone-mesh doctor` has more" } else { "" };
        fact("faults", format!("{count}, first {}{more}", first.says));
    }
    for warning in &status.warnings {
        fact("warning", warning.clone());
    }
    let drops: Vec<String> =
        status.data_plane.drops.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
    if !drops.is_empty() {
        fact("drops", drops.join(", "));
    }
    text.push('\n');
    text
}

/// The enforcement of network policies in a line.
fn network_policy(policy: &NetworkPolicy) -> String {
    let NetworkPolicy { state, policies, isolated_pods, .. } = policy;
    let mut text = format!("{state}, {policies} network policies, {isolated_pods} pods here isolated");
    if policy.waiting_pods > 0 {
        text.push_str(&format!(", {} of them without an address yet", policy.waiting_pods));
    }
    if let Some(why) = &policy.reason {
        text.push_str(&format!(": {why}"));
    }
    text
}

/// Whether a condition says no more than the line of the approval.
fn repeats(condition: &Condition, approval: Approval) -> bool {
    match approval {
        Approval::Approved => condition.kind.ends_with("Approved") && condition.status == "True",
        Approval::Pending => condition.reason == "WaitingForApproval",
        Approval::Revoked | Approval::None => false,
    }
}

fn describe_condition(condition: &Condition) -> String {
    let Condition { kind, status, reason, message } = condition;
    let code = if status == "True" { String::new() } else { format!(" ({reason})") };
    format!("{kind} {status}{code}: {message}")
}

/// The registry in a line, with how long it has been lost and what stands in for it.
pub(super) fn registry(registry: &Registry) -> String {
    let Registry { kind, state, since_s, .. } = registry;
    let mut text = match state.as_str() {
        "stale" => format!("{kind}, stale for {}", ago(*since_s)),
        _ => format!("{kind}, {state}"),
    };
    if let Some(why) = &registry.reason {
        text.push_str(&format!(": {why}"));
    }
    if registry.known_from == "snapshot" {
        text.push_str(" (the snapshot of an earlier run is in force)");
    }
    text
}

fn peer_table(peers: &[Peer]) -> String {
    if peers.is_empty() {
        return "no peers yet; let another machine join with `keystone-mesh token create`\n".into();
    }
    let rows: Vec<Vec<String>> = peers.iter().map(row).collect();
    table(&["PEER", "ADDRESS", "PATH", "VIA", "RTT", "HANDSHAKE", "RX", "TX", "WHY NOT DIRECT"], &rows)
}

/// The network's plain peers; nothing where there are none.
fn plain_table(peers: &[PlainPeer]) -> String {
    if peers.is_empty() {
        return String::new();
    }
    let row = |peer: &PlainPeer| {
        let address = peer.addresses.first().map_or_else(|| "-".to_owned(), |net| net.addr().to_string());
        vec![peer.name.to_string(), address, peer.served_by.to_string(), words(&peer.routes)]
    };
    let rows: Vec<Vec<String>> = peers.iter().map(row).collect();
    format!("\n{}", table(&["PLAIN PEER", "ADDRESS", "SERVED BY", "ROUTES"], &rows))
}

fn words(nets: &[IpNet]) -> String {
    nets.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

fn row(peer: &Peer) -> Vec<String> {
    let dash = || "-".to_owned();
    vec![
        peer.name.clone(),
        peer.addresses.first().map_or_else(dash, |net| net.addr().to_string()),
        peer.path.clone(),
        peer.via.clone().unwrap_or_else(dash),
        peer.rtt_ms.map_or_else(dash, |rtt| format!("{rtt:.1} ms")),
        peer.last_handshake_s.map_or_else(dash, |seconds| format!("{} ago", ago(seconds))),
        bytes(peer.rx_bytes),
        bytes(peer.tx_bytes),
        peer.reason.clone().unwrap_or_default(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::tests::sample;

    #[test]
    fn status_names_node_approval_place_registry_faults_and_plain_peers() {
        let mut status = sample();
        status.plain_peers.push(PlainPeer {
            name: "laptop".parse().unwrap(),
            served_by: "home".parse().unwrap(),
            public_key: status.node.public_key,
            addresses: vec!["10.98.0.9/32".parse().unwrap()],
            routes: vec!["192.168.7.0/24".parse().unwrap()],
        });
        let text = describe(&status);
        for line in [
            "home, control plane  10.98.0.1",
            "  approval   approved",
            "  location   home/attic",
            "  pods       10.42.0.0/24",
            "  registry   embedded, current",
            "  faults     1, first worker-odd: broken",
            "PLAIN PEER  ADDRESS    SERVED BY  ROUTES",
            "laptop      10.98.0.9  home       192.168.7.0/24",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn conditions_show_their_reason_where_they_are_not_true() {
        let mut status = sample();
        let condition = |kind: &str, status: &str, reason: &str, message: &str| Condition {
            kind: kind.into(),
            status: status.into(),
            reason: reason.into(),
            message: message.into(),
        };
        status.conditions = vec![
            condition("MeshApproved", "True", "Approved", "in the network with 10.98.0.1"),
            condition("MeshReady", "True", "Reached", "its peers reach it through the mesh"),
            condition("MeshRoutes", "False", "RouteOverlap", "10.42.1.0/24 overlaps"),
        ];
        let text = head(&status);
        assert!(text.contains("  condition  MeshReady True: its peers reach it through the mesh\n"), "{text}");
        assert!(!text.contains("MeshApproved"), "the line of the approval says it: {text}");
        assert!(text.contains("  condition  MeshRoutes False (RouteOverlap): 10.42.1.0/24 overlaps\n"), "{text}");
    }

    #[test]
    fn a_node_that_waits_says_for_what_and_a_lost_registry_since_when() {
        let mut status = sample();
        status.node.approval = Approval::Pending;
        status.node.approval_reason = Some("nobody has approved it yet".into());
        status.registry.state = "stale".into();
        status.registry.since_s = 300.0;
        status.registry.reason = Some("connection refused".into());
        status.registry.known_from = "snapshot".into();
        let text = describe(&status);
        assert!(text.contains("  approval   pending: nobody has approved it yet\n"), "{text}");
        let line = "embedded, stale for 5 min: connection refused (the snapshot of an earlier run is in force)";
        assert!(text.contains(&format!("  registry   {line}\n")), "{text}");
    }

    #[test]
    fn the_lines_in_docs_are_those_of_the_commands() {
        let page = include_str!("../../../../docs/operations.md");
        let said = |line: &str| assert!(page.contains(line), "docs/operations.md has no line `{line}`");
        let mut status = sample();
        status.node.name = Some("worker-1".parse().unwrap());
        (status.node.approval, status.node.approval_reason) =
            Approval::of(&"worker-1".parse().unwrap(), status.node.identity, None);
        said(head(&status).lines().find(|line| line.contains("approval")).unwrap());

        (status.registry.kind, status.registry.state) = ("gateway".into(), "stale".into());
        status.registry.since_s = 300.0;
        status.registry.reason = Some("the control plane was not reached: ...".into());
        said(head(&status).lines().find(|line| line.contains("registry")).unwrap());
        status.registry.known_from = "snapshot".into();
        said(registry(&status.registry).rsplit_once("... ").unwrap().1);

        for heading in page.lines().filter_map(|line| line.strip_prefix("## ")) {
            let anchor: String =
                heading.to_lowercase().chars().filter(|c| c.is_alphanumeric() || " -".contains(*c)).collect();
            let linked = page.contains(&format!("](#{})", anchor.replace(' ', "-")));
            let last = ["A direct path comes and goes", "Where the numbers are ours", "Removing it"];
            assert!(linked || last.contains(&heading), "nothing leads to `{heading}`");
        }
    }
}
