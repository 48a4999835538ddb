//! Hosts: threads with a network namespace each, and the cables between them.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use keystone_mesh::dataplane::{Config, DataEvent, DataPlane, NoRelays, RelaySink};
use keystone_mesh::tun::{Tun, TunClaim, TunConfig};
use keystone_mesh::udp::{UdpConfig, UdpSocket};
use keystone_mesh_core::io::{PeerConfig, PeerOp};
use keystone_mesh_core::{PresharedKey, PrivateKey, PublicKey, Via};
use tokio::sync::mpsc;

/// How long a condition may take to come true. Generous: the machine may be busy with other tests.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

type Job = Box<dyn FnOnce() + Send>;

/// A thread in a network namespace of its own. What it opens stays in there, also when other threads use it. The
/// namespace and all in it vanish with the last descriptor.
pub(crate) struct Host {
    jobs: Sender<Job>,
    tid: i32,
}

impl Host {
    /// A host with nothing but loopback.
    pub(crate) fn new() -> Self {
        let (jobs, queue) = channel::<Job>();
        let (started, start) = channel();
        thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a network namespace needs root");
            started.send(nix::unistd::gettid().as_raw()).unwrap();
            for job in queue {
                job();
            }
        });
        let host = Self { jobs, tid: start.recv().unwrap() };
        host.ip("link set lo up");
        host
    }

    /// Runs something in the host.
    pub(crate) fn run<R: Send + 'static>(&self, job: impl FnOnce() -> R + Send + 'static) -> R {
        let (done, result) = channel();
        self.jobs.send(Box::new(move || drop(done.send(job())))).unwrap();
        result.recv().expect("the job in the host panicked")
    }

    /// Runs `ip ARGUMENTS`.
    pub(crate) fn ip(&self, arguments: &str) {
        let arguments = arguments.to_owned();
        self.run(move || {
            let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
            assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
        });
    }

    /// Lays a cable to another host, with addresses 192.0.2.x and 2001:db8::x.
    pub(crate) fn connect(&self, own: u8, other: &Self, others: u8) {
        self.ip(&format!("link add wire{others} type veth peer name wire{own} netns {}", other.tid));
        for (host, name, address) in [(self, others, own), (other, own, others)] {
            host.ip(&format!("address add 192.0.2.{address}/24 dev wire{name}"));
            host.ip(&format!("address add 2001:db8::{address}/64 dev wire{name} nodad"));
            host.ip(&format!("link set wire{name} up"));
        }
    }
}

/// A host with a data plane, mesh addresses 10.98.0.x and fd98::x, reachable at 192.0.2.x and 2001:db8::x.
pub(crate) struct Node {
    pub(crate) host: Host,
    pub(crate) number: u8,
    pub(crate) key: PrivateKey,
    pub(crate) plane: Option<DataPlane>,
    pub(crate) events: mpsc::Receiver<DataEvent>,
    pub(crate) port: u16,
    claim: Option<TunClaim>,
    shards: usize,
}

/// A node's private key.
pub(crate) fn key(number: u8) -> PrivateKey {
    PrivateKey::from_bytes([number; 32])
}

impl Node {
    /// A running node without peers.
    pub(crate) fn new(number: u8) -> Self {
        Self::with_shards(number, 1)
    }

    /// A running node with several shards.
    pub(crate) fn with_shards(number: u8, shards: usize) -> Self {
        let mut node = Self {
            host: Host::new(),
            number,
            key: key(number),
            plane: None,
            events: mpsc::channel(1).1,
            port: 51840,
            claim: None,
            shards,
        };
        node.start();
        node
    }

    /// Starts the data plane on a fresh interface.
    pub(crate) fn start(&mut self) {
        self.start_with(Arc::new(NoRelays));
    }

    /// Starts the data plane with relays.
    pub(crate) fn start_with(&mut self, relay: Arc<dyn RelaySink>) {
        let (events, receiver) = mpsc::channel(1000);
        let (private_key, port, shards) = (self.key.clone(), self.port, self.shards);
        let (plane, claim) = self.host.run(move || {
            let config = TunConfig { name: "ks0".to_owned(), queues: shards, persistent: false };
            let (tun, claim) = Tun::open(&config).unwrap().into_queues();
            let config = UdpConfig { port, fwmark: None, shared: shards > 1 };
            let sockets = (0..shards).map(|_| Arc::new(UdpSocket::bind(&config).unwrap())).collect();
            (DataPlane::start(Config { tun, sockets, private_key, relay, events }).unwrap(), claim)
        });
        self.plane = Some(plane);
        self.claim = Some(claim);
        self.events = receiver;
        self.host.ip(&format!("address add 10.98.0.{}/24 dev ks0", self.number));
        self.host.ip(&format!("address add fd98::{}/64 dev ks0 nodad", self.number));
        self.host.ip("link set ks0 mtu 1420 up");
    }

    /// Stops the data plane; the interface goes with it.
    pub(crate) fn stop(&mut self) {
        self.plane = None;
        self.claim = None;
    }

    pub(crate) fn plane(&self) -> &DataPlane {
        self.plane.as_ref().expect("the node is running")
    }

    /// Makes another node a peer.
    pub(crate) fn add(&self, other: &Self, preshared_key: Option<PresharedKey>, via: Option<Via>) {
        self.plane().apply(&[PeerOp::Set(config(other.number, preshared_key))]);
        assert!(self.plane().set_path(&other.public(), via));
    }

    pub(crate) fn public(&self) -> PublicKey {
        self.key.public_key()
    }

    /// The node's UDP address on the cable.
    pub(crate) fn direct(&self, v6: bool) -> Via {
        Via::Direct(SocketAddr::new(wire_address(self.number, v6), self.port))
    }

    pub(crate) fn mesh_address(&self, v6: bool) -> IpAddr {
        mesh_address(self.number, v6)
    }

    /// Waits for an event that `wanted` accepts.
    pub(crate) fn wait_event(&mut self, wanted: impl Fn(&DataEvent) -> bool) -> DataEvent {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self.events.try_recv() {
                Ok(event) if wanted(&event) => return event,
                Ok(_) => {}
                Err(_) => {
                    assert!(Instant::now() < deadline, "the event did not come");
                    thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }
}

/// The configuration of a peer.
pub(crate) fn config(number: u8, preshared_key: Option<PresharedKey>) -> PeerConfig {
    let host = |v6| IpNet::from(mesh_address(number, v6));
    PeerConfig {
        key: key(number).public_key(),
        identity: None,
        preshared_key,
        persistent_keepalive: None,
        allowed_ips: vec![host(false), host(true)],
    }
}

pub(crate) fn mesh_address(number: u8, v6: bool) -> IpAddr {
    if v6 { format!("fd98::{number}").parse().unwrap() } else { IpAddr::from([10, 98, 0, number]) }
}

pub(crate) fn wire_address(number: u8, v6: bool) -> IpAddr {
    if v6 { format!("2001:db8::{number}").parse().unwrap() } else { IpAddr::from([192, 0, 2, number]) }
}

/// Two connected nodes that are each other's peers.
pub(crate) fn pair(preshared_key: Option<PresharedKey>, v6: bool) -> (Node, Node) {
    let (a, b) = (Node::new(1), Node::new(2));
    a.host.connect(1, &b.host, 2);
    a.add(&b, preshared_key.clone(), Some(b.direct(v6)));
    b.add(&a, preshared_key, Some(a.direct(v6)));
    (a, b)
}

/// Waits until something is so.
pub(crate) fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "did not happen: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}
