//! `status` and `peers`.

use super::output::{ago, bytes, print, print_json, table};
use crate::config::Places;
use crate::control::{self, Answer, Request, not_the_question};
use crate::status::{Peer, Status};

/// Asks the daemon for its status.
pub(super) async fn fetch(places: &Places) -> anyhow::Result<Status> {
    let answer = control::ask(&places.socket(), &Request::Status).await?;
    if let Answer::Status(status) = answer { Ok(*status) } else { Err(not_the_question().into()) }
}

pub(super) async fn status(places: &Places, json: bool) -> anyhow::Result<()> {
    let status = fetch(places).await?;
    if json { print_json(&status) } else { print(&(head(&status) + &peer_table(&status.peers))) }
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

fn head(status: &Status) -> String {
    let node = &status.node;
    let name = node.name.as_ref().map_or("(plain WireGuard)", |name| name.as_str());
    let role = if node.control_plane { ", control plane" } else { "" };
    let addresses: Vec<String> = node.addresses.iter().map(|net| net.addr().to_string()).collect();
    let mut text = format!("{name}{role}  {}\n", addresses.join("  "));
    let mut fact = |key: &str, value: String| text.push_str(&format!("  {key:<10} {value}\n"));
    fact("interface", format!("{} (MTU {}), UDP port {}", node.interface, node.mtu, node.listen_port));
    if let Some(network) = node.network {
        fact("network", network.to_string());
        fact(
            "nat",
            format!(
                "{}{}",
                node.nat,
                if node.endpoints.is_empty() { String::new() } else { format!("; {}", node.endpoints.join(", ")) }
            ),
        );
        let reason = status.registry.reason.as_ref().map_or(String::new(), |why| format!(": {why}"));
        fact("registry", format!("{}, {}{reason}", status.registry.kind, status.registry.state));
    }
    for relay in &status.relays {
        let rtt = relay.rtt_ms.map_or(String::new(), |rtt| format!(", {rtt:.1} ms"));
        let why = relay.reason.as_ref().map_or(String::new(), |why| format!(": {why}"));
        fact("relay", format!("{} {}{rtt}{why}", relay.address, relay.state));
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

fn peer_table(peers: &[Peer]) -> String {
    if peers.is_empty() {
        return "no peers yet; let another machine join with `keystone-mesh token create`\n".into();
    }
    let rows: Vec<Vec<String>> = peers.iter().map(row).collect();
    table(&["PEER", "ADDRESS", "PATH", "VIA", "RTT", "HANDSHAKE", "RX", "TX", "WHY NOT DIRECT"], &rows)
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
