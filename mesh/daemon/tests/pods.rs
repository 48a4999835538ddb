//! Pods on real hosts of the lab: what the daemon installs, masquerades and routes for them, and takes away again.
//!
//! Two nodes on one LAN start from snapshots whose approvals this test signs, so no registry is needed. A pod is an
//! address of its host here: routing, masquerade and the plugin's place on the node are the same.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use keystone_cni::facts::PodFacts;
use keystone_lab::mesh::{Node, Program, Route};
use keystone_lab::ping::Pinger;
use keystone_lab::sandbox::{SCRATCH, in_own_world};
use keystone_lab::{Host, RouterSpec, Wire, World, wait};
use keystone_mesh::cni::layout::CONFLIST;
use keystone_mesh::state::{Membership, Snapshot, StateDir};
use keystone_mesh_core::key::Secret;
use keystone_mesh_core::network::{DEFAULT_IPV4, Network, default_ipv6};
use keystone_mesh_core::node::{Approval, Entry, NodeRecord};
use keystone_mesh_core::path::Nat;

const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(100);
/// A program that tells its versions as the reference plugin does; asked once.
const PORTMAP: &str = "#!/bin/sh\necho '{\"cniVersion\":\"1.0.0\",\"supportedVersions\":[\"0.4.0\",\"1.0.0\"]}'\n";

fn network_key() -> Secret {
    Secret::from_bytes([1; 32])
}

/// Two nodes on one LAN, each with its secret and the whole truth on disk, and a host of that LAN which is no node.
struct Site {
    nodes: [Node; 2],
    neighbour: Host,
}

impl Site {
    fn new(world: &World) -> Result<Self> {
        let router = world.router("attic", RouterSpec::default())?;
        let hosts = [router.host("one")?, router.host("two")?];
        let program = Program::find(Some(env!("CARGO_BIN_EXE_keystone-mesh").into()))?;
        let nodes = [Node::new(&program, &hosts[0], "one")?, Node::new(&program, &hosts[1], "two")?];
        let states = [0, 1].map(|at: usize| StateDir::open(&folder(&nodes[at]).join("state")));
        let [one, two] = states;
        let states = [one?, two?];
        let secrets = [states[0].secret_or_create()?, states[1].secret_or_create()?];
        let mut entries = Vec::new();
        for (at, (host, secret)) in hosts.iter().zip(&secrets).enumerate() {
            entries.push(entry(at, host, secret)?);
        }
        for (state, node) in states.iter().zip(&nodes) {
            let network = Some(document().sign(&network_key().identity())?);
            let approval = entries.iter().find(|entry| entry.name().as_str() == node.name());
            let approval = approval.and_then(|entry| entry.approval.clone());
            let (id, name) = (network_key().identity().id(), node.name().parse()?);
            state.set_membership(&Membership {
                network: id,
                name,
                control_plane: false,
                rendezvous: vec![],
                approval,
            })?;
            state.set_snapshot(&Snapshot { network, entries: entries.clone(), peers: vec![], live: vec![] })?;
        }
        // A pod, as far as packets are concerned.
        for (at, host) in hosts.iter().enumerate() {
            ip(host, "link set lo up")?;
            ip(host, &format!("address add {}/32 dev lo", pod(at)))?;
        }
        Ok(Self { nodes, neighbour: router.host("printer")? })
    }
}

fn document() -> Network {
    let id = network_key().identity().id();
    let ipv4 = DEFAULT_IPV4.parse().expect("a prefix");
    Network { id, ipv4, ipv6: default_ipv6(id), relays: vec![], gateways: vec![], serial: 1 }
}

fn entry(at: usize, host: &Host, secret: &Secret) -> Result<Entry> {
    let name: keystone_mesh_core::node::NodeName = host.name().parse()?;
    let record = NodeRecord {
        name: name.clone(),
        identity: secret.identity().id(),
        public_key: secret.wireguard(0).public_key(),
        endpoints: vec![format!("host {}:51840", host.v4()).parse()?],
        nat: Nat::Unknown,
        relays: vec![],
        routes: vec![],
        seq: 1,
    };
    let approval = Approval {
        network: network_key().identity().id(),
        name,
        identity: secret.identity().id(),
        addresses: vec![format!("10.98.0.{}/32", at + 1).parse()?],
        routes: vec![],
        pod_cidrs: vec![format!("10.42.{}.0/24", at + 1).parse()?],
        endpoints: vec![],
        relays: vec![],
        location: Some("home/attic".parse()?),
        serial: 1,
    };
    Ok(Entry { record: record.sign(&secret.identity()), approval: Some(approval.sign(&network_key().identity())) })
}

fn pod(at: usize) -> IpAddr {
    IpAddr::from([10, 42, u8::try_from(at + 1).expect("two nodes"), 5])
}

fn folder(node: &Node) -> PathBuf {
    Path::new(SCRATCH).join("nodes").join(node.name())
}

fn ip(host: &Host, command: &str) -> Result<String> {
    host.run(Command::new("ip").args(command.split(' ')))
}

/// How a host reaches an address.
fn way(host: &Host, to: IpAddr) -> Result<String> {
    ip(host, &format!("route get {to}"))
}

#[test]
fn pods_are_set_up_masqueraded_and_taken_away() {
    in_own_world("pods_are_set_up_masqueraded_and_taken_away", || {
        let site = Site::new(&World::new(Wire::Offloaded)?)?;
        let [one, two] = &site.nodes;
        let at = folder(one);
        let (configurations, plugins) = (at.join("net.d"), at.join("bin"));
        fs::create_dir_all(&plugins)?;
        fs::write(at.join("keystone-cni"), "not run here")?;
        fs::write(plugins.join("portmap"), PORTMAP)?;
        Command::new("chmod").arg("+x").arg(plugins.join("portmap")).status()?;
        let text = |path: &Path| path.to_str().map(str::to_owned).context("UTF-8");
        let directories = [text(&configurations)?, text(&plugins)?, text(&at.join("keystone-cni"))?];
        let [net_d, bin, plugin] = directories.each_ref().map(String::as_str);
        let mode = ["--cni-conf-dir", net_d, "--cni-bin-dir", bin, "--cni-plugin", plugin, "--cni-mode"];
        let up = |node: &Node, how: &str| node.up(&[&mode[..], &[how]].concat());
        one.host().run(Command::new("sysctl").args(["-q", "net.ipv4.ip_forward=0"]))?;
        up(one, "pod-network")?;
        two.up(&[])?;

        let _pings = Pinger::start(one.host(), pod(1), POLL)?;
        let facts = wait::until("the node is ready for pods", PATIENCE, POLL, || {
            one.check_alive()?;
            let facts = PodFacts::read(&at.join("run/pods.json")).ok();
            Ok(facts.filter(|facts| facts.ready.all()))
        })?;
        assert_eq!((facts.node.as_str(), facts.pod_cidrs.as_slice()), ("one", &["10.42.1.0/24".parse()?][..]));
        wait::until("the list is there", PATIENCE, POLL, || Ok(configurations.join(CONFLIST).exists().then_some(())))?;
        let list: serde_json::Value = serde_json::from_slice(&fs::read(configurations.join(CONFLIST))?)?;
        assert_eq!(
            (&list["plugins"][0]["type"], &list["plugins"][1]["type"]),
            (&"keystone-cni".into(), &"portmap".into())
        );
        assert_eq!(list["cniVersions"], serde_json::json!(["1.0.0"]));
        assert_eq!(fs::read(plugins.join("keystone-cni"))?, b"not run here");
        assert_eq!(one.host().enter(|| fs::read_to_string("/proc/sys/net/ipv4/ip_forward"))?.trim(), "1");

        // A pod's packet leaves the cluster with its node's address, and stays as it is inside.
        let (lan, mesh) = (one.host().v4(), one.mesh_v4()?);
        ensure!(mesh.octets()[..2] == [10, 98]);
        wait::until("it leaves with the node's address", PATIENCE, POLL, || {
            Ok((seen_as(one.host(), &site.neighbour, site.neighbour.v4().into())? == Some(lan.into())).then_some(()))
        })?;
        assert_eq!(seen_as(one.host(), two.host(), pod(1))?, Some(pod(0)));

        // Somebody flushes the packet filter: it comes back.
        one.host().run(Command::new("nft").args(["delete", "table", "inet", "keystone-pods"]))?;
        let masquerades = || one.host().run(Command::new("nft").args(["list", "table", "inet", "keystone-pods"])).ok();
        wait::until("masquerade is back", PATIENCE, POLL, || Ok(masquerades()))?;

        // A restart leaves everything in place; another mode takes it away, and only what is ours.
        fs::write(configurations.join("99-other.conf"), "{}")?;
        one.stop()?;
        ensure!(configurations.join(CONFLIST).exists() && masquerades().is_some(), "a stop leaves it");
        up(one, "underlay")?;
        wait::until(
            "the list is gone",
            PATIENCE,
            POLL,
            || Ok((!configurations.join(CONFLIST).exists()).then_some(())),
        )?;
        wait::until("masquerade is gone", PATIENCE, POLL, || Ok(masquerades().is_none().then_some(())))?;
        wait::until("pods are not routed", PATIENCE, POLL, || {
            Ok((!way(one.host(), pod(1))?.contains("ksmesh0")).then_some(()))
        })?;
        ensure!(configurations.join("99-other.conf").exists() && plugins.join("keystone-cni").exists());

        one.stop()?;
        up(one, "pod-network")?;
        wait::until("the list is back", PATIENCE, POLL, || Ok(configurations.join(CONFLIST).exists().then_some(())))?;
        let force = ["leave", "--force"];
        one.host().run(
            Command::new(env!("CARGO_BIN_EXE_keystone-mesh"))
                .args(force)
                .envs(one.environment().into_iter().filter(|(key, _)| key.starts_with("KEYSTONE"))),
        )?;
        ensure!(
            !configurations.join(CONFLIST).exists() && masquerades().is_none() && !at.join("run/pods.json").exists()
        );
        ensure!(configurations.join("99-other.conf").exists(), "somebody else's stays");
        Ok(())
    });
}

/// Whose packet it seems to be that the pod on `from` sends to this address of `to`; none where none came.
fn seen_as(from: &Host, to: &Host, address: IpAddr) -> Result<Option<IpAddr>> {
    let server = to.udp(SocketAddr::new(address, 0))?;
    server.set_read_timeout(Some(Duration::from_secs(2)))?;
    let client = from.udp(SocketAddr::new(pod(0), 0))?;
    client.send_to(b"who?", server.local_addr()?)?;
    let mut bytes = [0; 8];
    Ok(server.recv_from(&mut bytes).ok().map(|(_, from)| from.ip()))
}

#[test]
fn a_hosts_daemon_serves_pods_as_the_agent_tells_it_and_goes_on_so_after_a_restart() {
    in_own_world("a_hosts_daemon_serves_pods_as_the_agent_tells_it_and_goes_on_so_after_a_restart", || {
        let site = Site::new(&World::new(Wire::Offloaded)?)?;
        let [one, two] = &site.nodes;
        for node in &site.nodes {
            node.up(&[])?;
        }
        let routed = |node: &Node, wanted: bool| {
            wait::until(&format!("{}: pods are routed: {wanted}", node.name()), PATIENCE, POLL, || {
                node.check_alive()?;
                Ok((way(node.host(), pod(1 - index(node)))?.contains("ksmesh0") == wanted).then_some(()))
            })
        };
        let masquerades =
            || one.host().run(Command::new("nft").args(["list", "table", "inet", "keystone-pods"])).is_ok();
        routed(one, true)?;
        ensure!(!masquerades(), "nobody said that the mesh is the pods' network");

        serve_pods(one, "pod-network", true)?;
        wait::until("masquerade is there", PATIENCE, POLL, || Ok(masquerades().then_some(())))?;
        serve_pods(one, "underlay", false)?;
        routed(one, false)?;
        wait::until("masquerade is gone", PATIENCE, POLL, || Ok((!masquerades()).then_some(())))?;
        one.kill()?;
        one.up(&[])?;
        one.wait_until("is back", PATIENCE, |_| true)?;
        routed(one, false)?;

        // What a daemon was started with comes first.
        two.stop()?;
        let nowhere = folder(two).join("net.d");
        two.up(&["--cni-mode", "underlay", "--cni-conf-dir", nowhere.to_str().context("UTF-8")?])?;
        routed(two, false)?;
        serve_pods(two, "pod-network", true)?;
        two.wait_until("goes on", PATIENCE, |_| true)?;
        routed(two, false)
    });
}

fn index(node: &Node) -> usize {
    usize::from(node.name() == "two")
}

/// Says what the agent's pod says.
fn serve_pods(node: &Node, mode: &str, routes: bool) -> Result<()> {
    let service = serde_json::json!({ "mode": mode, "routes": routes, "policies": false });
    let request = serde_json::json!({ "ask": "serve-pods", "service": service });
    let socket = folder(node).join("run/control.sock");
    wait::until("the daemon is told", PATIENCE, POLL, || {
        let Ok(mut stream) = UnixStream::connect(&socket) else { return Ok(None) };
        stream.write_all(format!("{request}\n").as_bytes())?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        ensure!(answer.contains("done"), "{answer}");
        Ok(Some(()))
    })
}

#[test]
fn pods_of_a_neighbour_are_reached_over_the_lan_while_it_answers_there_and_through_the_mesh_otherwise() {
    let name = "pods_of_a_neighbour_are_reached_over_the_lan_while_it_answers_there_and_through_the_mesh_otherwise";
    in_own_world(name, || {
        let site = Site::new(&World::new(Wire::Offloaded)?)?;
        let [one, two] = &site.nodes;
        for node in &site.nodes {
            node.up(&["--lan-routes"])?;
        }
        one.wait_for_path("two", Route::Direct, PATIENCE)?;
        let plainly = format!("via {}", two.host().v4());
        wait::until("pods are reached over the LAN", PATIENCE, POLL, || {
            one.check_alive()?;
            Ok(way(one.host(), pod(1))?.contains(&plainly).then_some(()))
        })?;
        let pings = Pinger::start(one.host(), pod(1), Duration::from_millis(50))?;
        pings.first_reply(PATIENCE)?;

        // Its firewall begins to drop the mesh's port: nobody can tell any more whether it is there.
        let nft = |words: &str| two.host().run(Command::new("nft").args(words.split(' ')));
        nft("add table inet test")?;
        nft("add chain inet test in { type filter hook input priority 0 ; }")?;
        nft("add rule inet test in udp dport 51840 drop")?;
        wait::until("the mesh is the way again", PATIENCE, POLL, || {
            Ok(way(one.host(), pod(1))?.contains("ksmesh0").then_some(()))
        })?;
        nft("delete table inet test")?;
        wait::until("the LAN is the way again", PATIENCE, POLL, || {
            Ok(way(one.host(), pod(1))?.contains(&plainly).then_some(()))
        })?;
        pings.reply_to_request_after(Instant::now(), PATIENCE)?;

        // The LAN's interface loses its address, and with it the neighbour.
        let lan = one.host().v4();
        ip(one.host(), &format!("address del {lan}/24 dev eth0"))?;
        wait::until("the mesh is the way", PATIENCE, POLL, || {
            Ok(way(one.host(), pod(1)).is_ok_and(|way| !way.contains("via 192")).then_some(()))
        })
    });
}
