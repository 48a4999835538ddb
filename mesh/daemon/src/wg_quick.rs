//! The configuration of a machine with stock WireGuard, as `wg-quick(8)` and the WireGuard apps read it.
//!
//! ```text
//!   network document, records and approvals, the peer's statement ──> WgQuick ──> file
//!                                                                            └──> QR code, for a phone's camera
//! ```
//!
//! Pure: what is true of the mesh goes in, text comes out.

use std::fmt::Write as _;
use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ipnet::IpNet;
use keystone_mesh_core::network::Network;
use keystone_mesh_core::node::{Approval, Entry, NodeName, NodeRecord};
use keystone_mesh_core::path::{CandidateKind, Nat};
use keystone_mesh_core::plain_peer::PlainPeer;
use keystone_mesh_core::relay::HostPort;
use keystone_mesh_core::{PrivateKey, PublicKey};
use qrcode::QrCode;
use qrcode::render::unicode::Dense1x2;
use zeroize::Zeroizing;

/// Seconds between the machine's keepalives: NATs forget a UDP mapping after 30 s (RFC 4787, REQ-5, sets two minutes, which
/// many do not keep), and a machine that is silent can no longer be called.
pub const KEEPALIVE: u16 = 25;

/// Everything that stands in the file but the private key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WgQuick {
    /// The machine's name.
    pub name: NodeName,
    /// Its mesh addresses.
    pub addresses: Vec<IpNet>,
    /// MTU of its interface, in bytes.
    pub mtu: u16,
    /// The node that serves it.
    pub node: NodeName,
    /// That node's WireGuard key.
    pub node_key: PublicKey,
    /// Where that node is reached.
    pub endpoint: Endpoint,
    /// What goes into the tunnel: the mesh, and the networks behind its nodes.
    pub allowed_ips: Vec<IpNet>,
}

/// Where the serving node is reached from anywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// People say so, or the node has this public address itself.
    Known(HostPort),
    /// So others see it through its NAT, which may let nobody in who was not called.
    ThroughNat(HostPort),
    /// Nobody knows.
    Unknown,
}

/// Why no configuration can be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MakeError {
    /// The statement is not this network's.
    #[error("peer `{0}` is stated by another network than the one whose document is in the cluster")]
    OtherNetwork(NodeName),
    /// The serving node is not there, or not approved.
    #[error(
        "node `{node}`, which serves peer `{peer}`, is not approved, or has published no record yet; see \
         `kubectl describe node {node}`, or serve the peer from another with spec.node of the Peer"
    )]
    NoServer {
        /// The peer.
        peer: NodeName,
        /// The node.
        node: NodeName,
    },
}

/// Why there is no QR code.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the configuration is too large for a QR code ({networks} networks in AllowedIPs); import the file instead, as with \
     `scp` or a USB cable"
)]
pub struct TooLarge {
    networks: usize,
}

impl WgQuick {
    /// What is true of a plain peer in this network. `entries`: every node. `mtu`: the mesh's, in bytes.
    pub fn make(network: &Network, entries: &[Entry], peer: &PlainPeer, mtu: u16) -> Result<Self, MakeError> {
        if peer.network != network.id {
            return Err(MakeError::OtherNetwork(peer.name.clone()));
        }
        let server = entries.iter().find(|entry| *entry.name() == peer.node);
        let (record, approval) = server
            .and_then(|entry| Some((entry.record.get(), entry.approved(network.id)?)))
            .ok_or_else(|| MakeError::NoServer { peer: peer.name.clone(), node: peer.node.clone() })?;
        let approved = entries.iter().filter_map(|entry| entry.approved(network.id));
        let behind_nodes = approved.flat_map(Approval::behind);
        let own = |net: &IpNet| peer.routes.contains(net) || peer.addresses.contains(net);
        let wanted: Vec<IpNet> = network.prefixes().into_iter().chain(behind_nodes).filter(|net| !own(net)).collect();
        Ok(Self {
            name: peer.name.clone(),
            addresses: peer.addresses.clone(),
            mtu,
            node: peer.node.clone(),
            node_key: record.public_key,
            endpoint: Endpoint::of(network, record, approval),
            // Neighbours become one, and what another contains is left out: a phone's camera reads few.
            allowed_ips: IpNet::aggregate(&wanted),
        })
    }

    /// The file. Without a key its line is a comment that says how to get one.
    pub fn file(&self, key: Option<&PrivateKey>) -> Zeroizing<String> {
        let key_line = match key {
            Some(key) => Zeroizing::new(format!("PrivateKey = {}\n", *text(key))),
            None => Zeroizing::new(format!(
                "# PrivateKey = as it was shown when the peer was made; it is kept nowhere. If it is lost:\n\
                 #   keystone-mesh peer config {} --new-key\n",
                self.name
            )),
        };
        let endpoint_line = match &self.endpoint {
            Endpoint::Known(at) => format!("Endpoint = {at}\n"),
            Endpoint::ThroughNat(at) => {
                format!(
                    "# As others see {} through its NAT, which may not let this machine in.\nEndpoint = {at}\n",
                    self.node
                )
            }
            Endpoint::Unknown => {
                format!("# Endpoint = HOST:PORT, where {} is reached: it names no public address.\n", self.node)
            }
        };
        let head = format!("# {} in the mesh, served by {}\n", self.name, self.node);
        self.render(&head, &key_line, &endpoint_line)
    }

    /// The same without comments as a QR code of half blocks. `ansi`: black on white, whatever the terminal's colours.
    pub fn qr_code(&self, key: &PrivateKey, ansi: bool) -> Result<Zeroizing<String>, TooLarge> {
        let endpoint = match &self.endpoint {
            Endpoint::Known(at) | Endpoint::ThroughNat(at) => format!("Endpoint = {at}\n"),
            Endpoint::Unknown => String::new(),
        };
        let key = Zeroizing::new(format!("PrivateKey = {}\n", *text(key)));
        let content = self.render("", &key, &endpoint);
        // The least correction: a screen has no scratches, and fewer modules are read from further away.
        let code = QrCode::with_error_correction_level(content.as_bytes(), qrcode::EcLevel::L)
            .map_err(|_| TooLarge { networks: self.allowed_ips.len() })?;
        let blocks = code.render::<Dense1x2>().dark_color(Dense1x2::Light).light_color(Dense1x2::Dark).build();
        let mut out = Zeroizing::new(String::with_capacity(2 * blocks.len()));
        for line in Zeroizing::new(blocks).lines() {
            // The glyphs are drawn where modules are light, so that they come out right on a dark terminal, too.
            let (before, after) = if ansi { ("\x1b[40;97m", "\x1b[0m") } else { ("", "") };
            out.push_str(before);
            out.push_str(line);
            out.push_str(after);
            out.push('\n');
        }
        Ok(out)
    }

    fn render(&self, head: &str, key: &str, endpoint: &str) -> Zeroizing<String> {
        // Room for all of it: a text that grows leaves copies of the key behind.
        let mut out = Zeroizing::new(String::with_capacity(1024 + 64 * self.allowed_ips.len()));
        let list = |nets: &[IpNet]| nets.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let _ = write!(
            out,
            "{head}[Interface]\n{key}Address = {}\nMTU = {}\n\n\
             [Peer]\nPublicKey = {}\n{endpoint}AllowedIPs = {}\nPersistentKeepalive = {KEEPALIVE}\n",
            list(&self.addresses),
            self.mtu,
            self.node_key,
            list(&self.allowed_ips),
        );
        out
    }
}

impl Endpoint {
    /// The best one of a node: what people approved, where the network says that the control plane is, what the node's own
    /// configuration names, an address of the node's that is public, and what others see of it.
    fn of(network: &Network, record: &NodeRecord, approval: &Approval) -> Self {
        let gateways = if record.identity == network.id { &network.gateways[..] } else { &[] };
        if let Some(at) = approval.endpoints.iter().chain(gateways).next() {
            return Self::Known(at.clone());
        }
        let first = |kind, fits: fn(IpAddr) -> bool| {
            // IPv4 first: it is everywhere, and a file names one endpoint alone.
            let mut of_kind: Vec<_> = record.endpoints.iter().filter(|c| c.kind == kind && fits(c.addr.ip())).collect();
            of_kind.sort_by_key(|candidate| candidate.addr.is_ipv6());
            of_kind.first().map(|candidate| HostPort::from(candidate.addr))
        };
        let known = first(CandidateKind::Configured, |_| true).or_else(|| first(CandidateKind::Host, is_public));
        match (known, first(CandidateKind::Reflexive, is_public), record.nat) {
            (Some(at), _, _) => Self::Known(at),
            (None, Some(at), Nat::None) => Self::Known(at),
            // A mapping for each destination tells nothing of the one that this machine would need.
            (None, _, Nat::EndpointDependent) | (None, None, _) => Self::Unknown,
            (None, Some(at), Nat::Unknown | Nat::EndpointIndependent) => Self::ThroughNat(at),
        }
    }
}

/// Whether an address can be reached from anywhere: none of the private, shared and special ones (RFC 6890).
fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            let shared = a == 100 && (64..128).contains(&b);
            !(v4.is_private() || v4.is_loopback() || v4.is_link_local() || v4.is_unspecified() || shared || a >= 224)
        }
        IpAddr::V6(v6) => v6.segments()[0] & 0xe000 == 0x2000,
    }
}

fn text(key: &PrivateKey) -> Zeroizing<String> {
    Zeroizing::new(BASE64.encode(key.as_bytes()))
}

#[cfg(test)]
mod tests;
