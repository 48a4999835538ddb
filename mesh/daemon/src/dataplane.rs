//! stub
use bytes::Bytes;
use keystone_mesh_core::mesh::Counters;
use keystone_mesh_core::*;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;
/// x
pub const THREAD_PREFIX: &str = "ksm-";
/// x
pub trait RelaySink: Send + Sync {
    /// x
    fn send(&self, relay: NodeId, to: NodeId, packets: &mut dyn Iterator<Item = &[u8]>) -> usize;
}
/// x
pub enum DataEvent {
    Probe { via: Via, from: Option<NodeId>, bytes: Vec<u8> },
    Demand { peer: PublicKey },
    Roamed { peer: PublicKey, via: Via },
    Handshake { peer: PublicKey },
}
/// x
pub struct Config {
    pub tun: Vec<crate::tun::TunQueue>,
    pub sockets: Vec<crate::udp::UdpSocket>,
    pub private_key: PrivateKey,
    pub relay_sink: Arc<dyn RelaySink>,
    pub events: tokio::sync::mpsc::Sender<DataEvent>,
}
/// x
pub struct DataPlane;
/// x
pub struct PeerStats {
    pub key: PublicKey,
    pub last_handshake: Option<Instant>,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
}
/// x
pub struct Stats {
    pub peers: Vec<PeerStats>,
    pub live_sessions: usize,
}
impl Stats {
    pub fn drops(&self, _r: DropReason) -> u64 {
        0
    }
}
impl DataPlane {
    pub fn start(_c: Config) -> anyhow::Result<Self> {
        todo!()
    }
    pub fn apply(&self, _o: &[PeerOp]) {}
    pub fn set_path(&self, _p: &PublicKey, _v: Option<Via>) {}
    pub fn start_handshake(&self, _p: &PublicKey) {}
    pub fn send_probe(&self, _a: SocketAddr, _b: &[u8]) {}
    pub fn inject(&self, _v: Via, _f: NodeId, _p: Vec<Bytes>) {}
    pub fn counters(&self) -> Vec<Counters> {
        vec![]
    }
    pub fn stats(&self) -> Stats {
        todo!()
    }
    pub fn local_addr(&self) -> SocketAddr {
        todo!()
    }
    pub fn public_key(&self) -> PublicKey {
        todo!()
    }
    pub fn quic_socket(&self) -> Arc<dyn quinn::AsyncUdpSocket> {
        todo!()
    }
    pub fn stop(&self) {}
}
