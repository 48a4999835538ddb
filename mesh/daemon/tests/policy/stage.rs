//! Two nodes with pods, and somebody outside.
//!
//! ```text
//!    outside ───── node-1 ═══════ node-2        each node a namespace that forwards and enforces for its own pods,
//!                 / |  |  \         |   \       each pod a namespace behind a veth pair
//!             web  db  …  new     far   shop
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use keystone_mesh::nftables::KernelTable;
use keystone_mesh_core::kernel::Family;
use keystone_mesh_core::policy::{self, Cluster, Labels, Name, NamedPort, Pod, Policy, TCP, UDP, compile};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

/// For what takes no time on an idle machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(2);

/// Ports that everybody listens on.
const TCP_PORTS: [u16; 4] = [80, 81, 8080, 8443];
const UDP_PORTS: [u16; 2] = [53, 5353];

/// The addresses of somebody.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
}

impl Place {
    pub(crate) fn address(self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }
}

/// Pods: node, namespace, name, labels, named TCP ports.
type PodRow = (u8, &'static str, &'static str, &'static [(&'static str, &'static str)], &'static [(&'static str, u16)]);

const PODS: [PodRow; 7] = [
    (1, "default", "web", &[("app", "web"), ("tier", "front")], &[("http", 80), ("admin", 8080)]),
    (1, "default", "db", &[("app", "db"), ("tier", "back")], &[("http", 8080)]),
    (1, "default", "client", &[("app", "client")], &[]),
    (1, "default", "new", &[("app", "new")], &[]),
    (1, "shop", "cart", &[("app", "client")], &[]),
    (2, "default", "far", &[("app", "client"), ("zone", "far")], &[]),
    (2, "shop", "api", &[("app", "web")], &[("http", 81)]),
];

/// The namespaces and their labels.
const NAMESPACES: [(&str, &[(&str, &str)]); 2] = [("default", &[("team", "base")]), ("shop", &[("team", "shop")])];

const SERVICE: &str = "table inet service {
    chain prerouting {
        type nat hook prerouting priority dstnat;
        ip daddr 10.96.0.1 dnat ip to 10.42.1.1
        ip6 daddr fd00:96::1 dnat ip6 to fd00:42:0:1::1
    }
    chain postrouting {
        type nat hook postrouting priority srcnat;
        ip saddr 10.42.1.1 ip daddr 10.42.1.1 masquerade
        ip6 saddr fd00:42:0:1::1 ip6 daddr fd00:42:0:1::1 masquerade
    }
}
";

pub(crate) struct Stage {
    pub(crate) cluster: Cluster,
    pub(crate) places: BTreeMap<String, Place>,
    kernels: [KernelTable; 2],
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Passed,
    Dropped,
}

impl Stage {
    /// Builds everything; everybody listens.
    pub(crate) fn new() -> Result<Self> {
        let mut batch = String::new();
        let mut places = BTreeMap::new();
        for name in ["node-1", "node-2", "outside"] {
            run(&["ip", "netns", "add", name])?;
            batch.push_str(&format!("-n {name} link set lo up\n"));
        }
        link(&mut batch, ("node-1", "mesh"), ("node-2", "mesh"), ("10.98.0.1/24", "10.98.0.2/24"));
        link(&mut batch, ("node-1", "mesh"), ("node-2", "mesh"), ("fd00:98::1/64", "fd00:98::2/64"));
        link(&mut batch, ("node-1", "wan"), ("outside", "eth0"), ("192.0.2.1/24", "192.0.2.10/24"));
        link(&mut batch, ("node-1", "wan"), ("outside", "eth0"), ("2001:db8::1/64", "2001:db8::10/64"));
        for (node, other) in [(1, 2), (2, 1)] {
            batch.push_str(&format!("-n node-{node} route add 10.42.{other}.0/24 via 10.98.0.{other}\n"));
            batch.push_str(&format!("-n node-{node} route add fd00:42:0:{other}::/64 via fd00:98::{other}\n"));
        }
        for words in [
            "-n node-2 route add default via 10.98.0.1",
            "-n node-2 route add default via fd00:98::1",
            "-n outside route add default via 192.0.2.1",
            "-n outside route add default via 2001:db8::1",
            "-n outside addr add 192.0.2.20/32 dev lo",
        ] {
            batch.push_str(words);
            batch.push('\n');
        }
        let place = |v4: &str, v6: &str| Place { v4: v4.parse().unwrap(), v6: v6.parse().unwrap() };
        places.insert("node-1".to_owned(), place("10.98.0.1", "fd00:98::1"));
        places.insert("node-2".to_owned(), place("10.98.0.2", "fd00:98::2"));
        places.insert("outside".to_owned(), place("192.0.2.10", "2001:db8::10"));
        places.insert("outside-2".to_owned(), place("192.0.2.20", "2001:db8::10"));
        for (number, (node, _, name, _, _)) in PODS.iter().enumerate() {
            let number = number + 1;
            run(&["ip", "netns", "add", name])?;
            let place = place(&format!("10.42.{node}.{number}"), &format!("fd00:42:0:{node}::{number}"));
            pod_link(&mut batch, *node, name, place);
            places.insert((*name).to_owned(), place);
        }
        ip(&batch)?;
        for node in ["node-1", "node-2"] {
            within(node, || {
                fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
                fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")
            })?;
        }
        // A Service, as kube-proxy would make it: the destination is web's, and a pod that calls itself gets another source.
        for node in ["node-1", "node-2"] {
            within(node, || feed(&["nft", "-f", "-"], SERVICE))?;
        }
        places.insert("service".to_owned(), place("10.96.0.1", "fd00:96::1"));
        for name in places.keys().filter(|name| !["outside-2", "service"].contains(&name.as_str())) {
            within(name, listen).with_context(|| format!("listen in {name}"))?;
        }
        let kernels = ["node-1", "node-2"].map(|node| within(node, || KernelTable::open(policy::TABLE)));
        let [one, two] = kernels;
        let cluster = cluster(&places);
        let mut stage = Self { cluster, places, kernels: [one?, two?] };
        stage.enforce()?;
        stage.wait_until_open()?;
        Ok(stage)
    }

    /// Makes these the cluster's policies: namespace, name, spec.
    pub(crate) fn set_policies(&mut self, policies: &[(&str, &str, Value)]) -> Result<()> {
        self.cluster.policies.clear();
        for (namespace, name, spec) in policies {
            let read = Policy::read(spec);
            ensure!(read.faults.is_empty(), "{namespace}/{name}: {:?}", read.faults);
            self.cluster.policies.insert(((*namespace).into(), (*name).into()), read);
        }
        self.enforce()
    }

    /// Brings both nodes to what the cluster says.
    pub(crate) fn enforce(&mut self) -> Result<()> {
        for (node, kernel) in [1, 2].into_iter().zip(&mut self.kernels) {
            let own = [format!("10.42.{node}.0/24"), format!("fd00:42:0:{node}::/64")];
            let own = own.map(|net| net.parse().unwrap());
            kernel.apply(compile(&self.cluster, &format!("node-{node}"), &own).table)?;
        }
        Ok(())
    }

    pub(crate) fn pod(&mut self, namespace: &str, name: &str) -> &mut Pod {
        let name: Name = (namespace.into(), name.into());
        self.cluster.pods.get_mut(&name).unwrap()
    }

    /// Sends one attempt and finds what became of it: an answer came, or a node counted a drop.
    pub(crate) fn attempt(&self, family: Family, from: &str, to: &str, by: &str) -> Result<Outcome> {
        let target = self.places[to].address(family);
        let before = drops()?;
        let mut attempt = within(from, || Attempt::start(target, by))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            if attempt.answered()? {
                return Ok(Outcome::Passed);
            }
            if drops()? > before {
                return Ok(Outcome::Dropped);
            }
            ensure!(Instant::now() < deadline, "{from} to {to} ({target}) by {by}: neither an answer nor a drop");
            thread::sleep(POLL);
        }
    }

    /// The first packets wait for neighbours to be found, and addresses to be usable.
    fn wait_until_open(&self) -> Result<()> {
        let names: Vec<&String> = self.places.keys().filter(|name| *name != "service").collect();
        for family in Family::ALL {
            for name in &names {
                let target = if name.starts_with("outside") { "web" } else { "outside" };
                let from = if **name == "outside-2" { "outside" } else { name };
                let deadline = Instant::now() + PATIENCE;
                while within(from, || ping(self.places[target].address(family)))?.wait()?.code() != Some(0) {
                    ensure!(Instant::now() < deadline, "no way from {from} to {target} by {family}");
                }
            }
        }
        Ok(())
    }
}

/// A packet on its way, or several.
enum Attempt {
    Tcp(Socket),
    Udp(UdpSocket),
    Ping(Child),
}

impl Attempt {
    /// `by`: `tcp/PORT`, `udp/PORT` or `icmp`.
    fn start(target: IpAddr, by: &str) -> Result<Self> {
        let Some((protocol, port)) = by.split_once('/') else { return Ok(Self::Ping(ping(target)?)) };
        let to = SocketAddr::new(target, port.parse()?);
        match protocol {
            "tcp" => {
                let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
                socket.set_nonblocking(true)?;
                match socket.connect(&to.into()) {
                    Ok(()) => {}
                    Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
                    Err(error) => return Err(error.into()),
                }
                Ok(Self::Tcp(socket))
            }
            "udp" => {
                let socket = UdpSocket::bind(if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
                socket.set_nonblocking(true)?;
                socket.send_to(b"hello", to)?;
                Ok(Self::Udp(socket))
            }
            other => bail!("{other} is no protocol of these tests"),
        }
    }

    fn answered(&mut self) -> Result<bool> {
        match self {
            Self::Tcp(socket) => {
                if let Some(error) = socket.take_error()? {
                    bail!("refused instead of dropped: {error}");
                }
                Ok(socket.peer_addr().is_ok())
            }
            Self::Udp(socket) => match socket.recv(&mut [0; 16]) {
                Ok(_) => Ok(true),
                Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
                Err(error) => Err(error.into()),
            },
            Self::Ping(child) => match child.try_wait()? {
                None => Ok(false),
                Some(status) => Ok(status.success()),
            },
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if let Self::Ping(child) = self {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn ping(target: IpAddr) -> Result<Child> {
    let mut command = Command::new("ping");
    command.args(["-c", "1", "-W", "1", &target.to_string()]);
    Ok(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
}

/// Packets that policies of both nodes have dropped, as nft(8) counts them.
fn drops() -> Result<u64> {
    let mut sum = 0;
    for node in ["node-1", "node-2"] {
        let listed = within(node, || run(&["nft", "-j", "list", "table", "inet", policy::TABLE]))?;
        let listed: Value = serde_json::from_str(&listed)?;
        let rules =
            listed["nftables"].as_array().into_iter().flatten().filter_map(|one| one["rule"]["expr"].as_array());
        sum += rules.flatten().filter_map(|one| one["counter"]["packets"].as_u64()).sum::<u64>();
    }
    Ok(sum)
}

/// Runs `work` on a thread inside a namespace. Sockets and programs that it starts stay inside.
pub(crate) fn within<R: Send>(name: &str, work: impl FnOnce() -> R + Send) -> R {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            let file = File::open(format!("/run/netns/{name}")).unwrap();
            setns(file, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        inside.join().unwrap_or_else(|cause| std::panic::resume_unwind(cause))
    })
}

/// Listens in this namespace until the process ends: whoever connects is accepted, what comes by UDP is sent back.
fn listen() -> Result<()> {
    for port in TCP_PORTS {
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
        thread::spawn(move || for _accepted in listener.incoming().flatten() {});
    }
    for port in UDP_PORTS {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))?;
        thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..length], from);
            }
        });
    }
    Ok(())
}

/// Lines of ip(8). Pairs are made first; what begins with `-n NAME` is of that namespace.
fn ip(batch: &str) -> Result<()> {
    let (of_namespaces, pairs): (Vec<&str>, Vec<&str>) = batch.lines().partition(|line| line.starts_with("-n "));
    let mut by_namespace: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for line in of_namespaces {
        let (name, rest) = line["-n ".len()..].split_once(' ').unwrap();
        by_namespace.entry(name).or_default().push(rest);
    }
    feed(&["ip", "-batch", "-"], &pairs.join("\n"))?;
    for (name, lines) in by_namespace {
        feed(&["ip", "-n", name, "-batch", "-"], &lines.join("\n")).with_context(|| name.to_owned())?;
    }
    Ok(())
}

/// A veth pair between two namespaces, once, and one more address at each end.
fn link(batch: &mut String, one: (&str, &str), two: (&str, &str), addresses: (&str, &str)) {
    let ((at, name), (there, peer)) = (one, two);
    if !batch.contains(&format!("link add {name} netns {at}")) {
        batch.push_str(&format!("link add {name} netns {at} type veth peer name {peer} netns {there}\n"));
        batch.push_str(&format!("-n {at} link set {name} up\n-n {there} link set {peer} up\n"));
    }
    let nodad = if addresses.0.contains(':') { " nodad" } else { "" };
    batch.push_str(&format!("-n {at} addr add {} dev {name}{nodad}\n", addresses.0));
    batch.push_str(&format!("-n {there} addr add {} dev {peer}{nodad}\n", addresses.1));
}

/// A pod behind its node: routed addresses, and a gateway that is the same for all.
fn pod_link(batch: &mut String, node: u8, name: &str, place: Place) {
    let (v4, v6) = (place.v4, place.v6);
    batch.push_str(&format!(
        "link add {name} netns node-{node} type veth peer name eth0 netns {name}
-n {name} link set lo up
-n {name} link set eth0 up
-n node-{node} link set {name} up
-n node-{node} addr add 169.254.1.1/32 dev {name}
-n node-{node} addr add fe80::1/64 dev {name} nodad
-n node-{node} route add {v4}/32 dev {name}
-n node-{node} route add {v6}/128 dev {name}
-n {name} addr add {v4}/32 dev eth0
-n {name} addr add {v6}/128 dev eth0 nodad
-n {name} route add 169.254.1.1 dev eth0 scope link
-n {name} route add default via 169.254.1.1 dev eth0
-n {name} route add default via fe80::1 dev eth0
"
    ));
}

fn cluster(places: &BTreeMap<String, Place>) -> Cluster {
    let labels = |all: &[(&str, &str)]| -> Arc<Labels> {
        Arc::new(all.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    };
    let mut cluster = Cluster::default();
    for (name, of) in NAMESPACES {
        cluster.namespaces.insert(name.into(), labels(of));
    }
    for (node, namespace, name, of, ports) in PODS {
        let Place { v4, v6 } = places[name];
        let ports = ports.iter().map(|(name, port)| NamedPort { name: (*name).to_owned(), protocol: TCP, port: *port });
        let dns = NamedPort { name: "dns".to_owned(), protocol: UDP, port: 53 };
        let pod = Pod {
            labels: labels(of),
            node: Some(format!("node-{node}").into()),
            addresses: vec![v4.into(), v6.into()],
            ports: ports.chain([dns]).collect(),
            ..Pod::default()
        };
        cluster.pods.insert((namespace.into(), name.into()), pod);
    }
    // One that has its node's network: policies do not mean it.
    let Place { v4, v6 } = places["node-2"];
    let host = Pod {
        labels: labels(&[("app", "client")]),
        node: Some("node-2".into()),
        addresses: vec![v4.into(), v6.into()],
        host_network: true,
        ..Pod::default()
    };
    cluster.pods.insert(("default".into(), "on-the-host".into()), host);
    cluster
}

/// `{ "matchLabels": { KEY: VALUE } }`
pub(crate) fn labelled(key: &str, value: &str) -> Value {
    json!({ "matchLabels": { key: value } })
}

pub(crate) fn run(words: &[&str]) -> Result<String> {
    feed(words, "")
}

fn feed(words: &[&str], input: &str) -> Result<String> {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| words.join(" "))?;
    child.stdin.take().unwrap().write_all(input.as_bytes())?;
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said)?;
    let output = child.wait_with_output()?;
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{}: {complaint}\n{input}", words.join(" "));
    Ok(said)
}
