//! Writes the seed corpus: a few good inputs for each target, so that a fuzzer starts behind the first checks.
//!
//! `cargo run --example seeds` in this directory writes `corpus/TARGET/NAME`. The output is the same at every run; run
//! it again when a format changes, and commit what differs.

use std::error::Error;
use std::fs;
use std::path::Path;

use keystone_fuzz::packet::Packet;
use keystone_fuzz::sample;
use keystone_mesh::control::{Answer, Request};
use keystone_mesh::state::{LivePeer, Membership, Snapshot};
use keystone_mesh::tun::virtio::{Gso, VirtioHeader};
use keystone_mesh_core::annotations;
use keystone_mesh_core::gateway::{FromGateway, ToGateway};
use keystone_mesh_core::probe::{KeyHint, Message, Probe, ProbeKey, TxId};
use keystone_mesh_core::relay::frame::{Frame, Place};
use keystone_mesh_core::relay::message::{ClientMessage, Code, Credential, Refusal, RelayMessage};
use keystone_mesh_core::relay::{Rendezvous, Role};
use keystone_mesh_core::wire;
use serde::Serialize;

type Result = std::result::Result<(), Box<dyn Error>>;

/// The network of every sample.
const NETWORK: u8 = 1;
/// The node of every sample.
const NODE: u8 = 2;

fn main() -> Result {
    datagrams()?;
    relay()?;
    streams()?;
    statements()?;
    annotations()?;
    texts()?;
    tun()?;
    cni()?;
    files()
}

fn seed(target: &str, name: &str, bytes: impl AsRef<[u8]>) -> Result {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::create_dir_all(&dir)?;
    Ok(fs::write(dir.join(name), bytes)?)
}

/// A seed behind a few bytes that choose what the target does with it.
fn seed_after(target: &str, name: &str, choices: &[u8], bytes: impl AsRef<[u8]>) -> Result {
    seed(target, name, [choices, bytes.as_ref()].concat())
}

fn datagrams() -> Result {
    let (a, b) = (sample::secret(1).wireguard(0), sample::secret(2).wireguard(0));
    let key = ProbeKey::agree(&a, &b.public_key()).ok_or("low order")?;
    let addresses = vec!["192.0.2.1:51840".parse()?, "[2001:db8::1]:51840".parse()?];
    for (name, message, len) in [
        ("ping", Message::Ping { wanted: true }, 300),
        ("pong", Message::Pong { seen: Some(addresses[1]) }, 0),
        ("pong-relayed", Message::Pong { seen: None }, 0),
        ("punch", Message::Punch { answer: true, addresses }, 0),
    ] {
        let probe = Probe { sender: KeyHint::of(&a.public_key()), txid: TxId([7; 12]), message };
        seed("probe", name, probe.encode(&key, len))?;
        seed("datagram", name, probe.encode(&key, 0))?;
    }
    seed("datagram", "wireguard", [4, 0, 0, 0, 1, 2, 3, 4])?;
    seed("datagram", "quic", [0xc0, 0, 0, 0, 1])?;
    seed("datagram", "ipv4", packet(false, false).build())?;
    seed("datagram", "ipv6", packet(true, false).build())
}

fn relay() -> Result {
    let peer = sample::identity(NODE).id();
    let data = Frame::Data { peer, packet: &[7; 400] }.encode();
    seed_after("relay_frame", "data", &[0, 200, 0, 150, 3], &data)?;
    seed_after("relay_frame", "data-that-fits", &[4, 0, 4, 0, 0], &data)?;
    let place = Place { id: 5, offset: 100, total: 500 };
    seed_after(
        "relay_frame",
        "fragment",
        &[0, 200, 0, 150, 1],
        Frame::Fragment { peer, place, part: &[7; 400] }.encode(),
    )?;
    // Sender, id, pause; offset, total, length: two halves, one of them twice, then the other order.
    let halves: [[u8; 9]; 5] = [
        [1, 1, 0, 0, 0, 0, 100, 0, 50],
        [1, 1, 9, 0, 0, 0, 100, 0, 50],
        [1, 1, 0, 0, 50, 0, 100, 0, 50],
        [2, 9, 0, 0, 50, 0, 100, 0, 50],
        [2, 9, 0, 0, 0, 0, 100, 0, 50],
    ];
    seed("relay_reassembly", "halves", halves.concat())?;
    seed("relay_reassembly", "overlap", [[1, 1, 0, 0, 0, 0, 9, 0, 6], [1, 1, 0, 0, 5, 0, 9, 0, 4]].concat())?;
    let many: Vec<u8> = (0..20).flat_map(|id| [1, id, 1, 0, 0, 0, 9, 0, 6]).collect();
    seed("relay_reassembly", "many-unfinished", many)
}

fn streams() -> Result {
    let id = sample::identity(NODE).id();
    let token = sample::token(NETWORK);
    let (record, approval) = (sample::record(NODE), sample::approval(NETWORK, NODE));
    let join = ToGateway::Join { version: 1, token: token.id, secret: token.secret, record: record.clone() };
    frames(0, "join", &[join, ToGateway::Leave])?;
    frames(0, "attach", &[ToGateway::Attach { version: 1, record: record.clone() }, ToGateway::Publish { record }])?;
    let network = sample::network(NETWORK);
    let snapshot = FromGateway::Snapshot {
        network: network.clone(),
        entries: vec![sample::entry(NETWORK, NODE)],
        peers: vec![sample::peer(NETWORK)],
    };
    frames(1, "joined", &[FromGateway::Joined { approval }, snapshot])?;
    let changed = FromGateway::Changed { entry: sample::entry(NETWORK, NODE) };
    frames(1, "changed", &[changed, FromGateway::Removed { name: "worker-1".parse()? }])?;
    let refused = keystone_mesh_core::gateway::Refusal { code: "token-expired".into(), message: "make another".into() };
    let observed = FromGateway::Observed { address: "192.0.2.1:51840".parse()? };
    let small = [observed, FromGateway::Published { seq: 3 }, FromGateway::Left, FromGateway::Refused(refused)];
    frames(1, "small", &small)?;
    frames(1, "network", &[FromGateway::Network { network }])?;
    let credential = Some(Credential(b"an approval".to_vec()));
    let hello = ClientMessage::Hello { version: 1, credential, datagrams: true };
    frames(2, "client", &[hello, ClientMessage::CheckAddress {}, ClientMessage::Connect { to: id }])?;
    let addr = "[2001:db8::1]:51840".parse()?;
    let welcome = RelayMessage::Welcome { version: 1, observed: addr, role: Role::Node, max_packet: 9216 };
    let refused = RelayMessage::Refused(Refusal { code: Code::Busy, message: "later".into() });
    let rest = [RelayMessage::Observed { addr }, RelayMessage::Spliced {}, RelayMessage::Incoming { from: id, addr }];
    frames(3, "relay", &[&[welcome, refused][..], &rest].concat())
}

/// The messages as a stream that is read in pieces of 100 bytes, and the first as a line that gets its length.
fn frames<T: Serialize>(kind: u8, name: &str, messages: &[T]) -> Result {
    let mut stream = vec![kind, 0xff, 0xff, 99];
    for message in messages {
        stream.extend(wire::encode(message, wire::MAX_MESSAGE)?);
    }
    seed("wire", name, stream)?;
    let line = serde_json::to_vec(&messages[0])?;
    seed_after("wire", &format!("{name}-line"), &[kind | 4, 0xff, 0xff, 9], line)
}

fn statements() -> Result {
    seed("statements", "record", serde_json::to_vec(&sample::record(NODE))?)?;
    seed("statements", "approval", serde_json::to_vec(&sample::approval(NETWORK, NODE))?)?;
    seed("statements", "network", serde_json::to_vec(&sample::network(NETWORK))?)?;
    seed("statements", "changed", r#"{"seq":"2","endpoints":"host 198.51.100.1:1","approval-serial":"9"}"#)
}

fn annotations() -> Result {
    let mut node = annotations::of_record(&sample::record(NODE));
    node.extend(annotations::of_approval(&sample::approval(NETWORK, NODE)));
    for (key, text) in [
        ("force-endpoint", "home.example.org:51840, 192.0.2.1:9"),
        ("relay-force", "q"),
        ("routes-extra", "10.42.1.0/24,10.42.2.0/24"),
        ("location", "eu/1a"),
    ] {
        node.insert(format!("{}{key}", annotations::PREFIX), text.to_owned());
    }
    seed("annotations_decode", "node", serde_json::to_vec(&node)?)?;
    seed("annotations_decode", "peer", serde_json::to_vec(&sample::peer(NETWORK).to_annotations())?)?;
    seed("annotations_decode", "numbered", r#"{"0":"x","3":"host 192.0.2.7:51840","9":"2","20":"10.0.0.1/8"}"#)?;

    // A node comes with record and approval, breaks, comes back as another, goes, and is listed.
    seed("directory", "life", [0, 0, 1, 0, 1, 1, 0, 2, 0, 0, 0, 5, 1, 1, 6, 0xa0, 0xa1, 0xe0, 0xc0])?;
    seed("directory", "broken", b"\0\0\x02\0\x01\x02\0\x04\x03rubbish!\0\x03\x02\xe0")?;

    let id = sample::identity(NODE).id();
    let page = format!(
        r#"{{"1":"node home {id}","2":"peer laptop","3":"node old {id} released 1795500000","4":"rubbish","05":"peer a"}}"#
    );
    seed_after("ledger_page", "page", &[0, 255], page)?;
    seed_after("ledger_page", "second", &[1, 0], r#"{"256":"peer a","511":"peer b released 0"}"#)
}

fn texts() -> Result {
    let token = sample::token(NETWORK);
    seed("token", "text", token.encode())?;
    // The bytes behind the text: network, id, secret, and a way with its length.
    let way = Rendezvous::Gateway("home.example.org:51840".parse()?).to_string();
    let head = [sample::identity(NETWORK).id().as_bytes(), &[1; 8][..], &[2; 20]].concat();
    seed("token", "bytes", [&head[..], &(way.len() as u16).to_be_bytes(), way.as_bytes()].concat())?;
    seed("token", "bytes-without-ways", head)?;

    let id = sample::identity(NODE).id();
    for (name, text) in [
        ("candidate", "reflexive [2001:db8::1]:51840".to_owned()),
        ("nat", "endpoint-dependent".to_owned()),
        ("identity", id.to_string()),
        ("wireguard-key", sample::secret(NODE).wireguard(0).public_key().to_string()),
        ("name", "ip-10-0-0-1.eu-west-1.compute.internal".to_owned()),
        ("gateway", "home.example.org:51840".to_owned()),
        ("relay", format!("{id}@relay.example.org:51840,[2001:db8::1]:443")),
        ("token-id", token.id.to_string()),
        ("pattern", "w?-*-x w1-a-b-x".to_owned()),
    ] {
        seed("text", name, text)?;
    }
    seed("text", "raw-public-key", id.to_spki())
}

fn tun() -> Result {
    for (v6, tcp, gso) in
        [(false, true, Gso::Tcp4), (true, true, Gso::Tcp6), (false, false, Gso::Udp), (true, false, Gso::Udp)]
    {
        let transport = if v6 { 40 } else { 20 };
        let header = VirtioHeader {
            needs_checksum: true,
            gso,
            header_len: transport + if tcp { 20 } else { 8 },
            gso_size: 100,
            checksum_start: transport,
            checksum_offset: if tcp { 16 } else { 6 },
        };
        let name = format!("{}-ipv{}", if tcp { "tcp" } else { "udp" }, if v6 { 6 } else { 4 });
        seed_after("tun_split", &name, &header.encode(), packet(v6, tcp).build())?;
        seed("virtio", &name, header.encode())?;
        let whole = VirtioHeader { gso: Gso::None, ..header };
        seed_after("tun_split", &format!("{name}-whole"), &whole.encode(), packet(v6, tcp).build())?;
    }
    // Offload, then five bytes a packet: kind, length, flags, change, at. Kinds 0 to 3 are UDP and TCP over both.
    for kind in 0..4 {
        let stream: Vec<u8> = [[kind, 100, 0, 0, 0]; 6].concat();
        seed_after("tun_coalesce", &format!("stream-{kind}"), &[0], stream)?;
    }
    let push: Vec<u8> = [[2, 100, 0, 0, 0], [2, 100, 8, 0, 0], [2, 100, 0, 0, 0], [2, 50, 0, 0, 0]].concat();
    seed_after("tun_coalesce", "push", &[0], push)?;
    let mixed: Vec<u8> = (0..24).flat_map(|i| [i % 8, 90, 1, if i % 5 == 4 { i % 8 } else { 0 }, i]).collect();
    seed_after("tun_coalesce", "mixed", &[0], mixed)?;
    seed_after("tun_coalesce", "large", &[0], [[0x82, 50, 0, 0, 0]; 8].concat())?;
    // Last octets and lengths of prefixes that nest; the second family in the odd ones.
    seed(
        "allowed_ips",
        "nested",
        [[0, 10, 0, 1, 8], [0, 10, 1, 1, 16], [0, 10, 1, 1, 24], [1, 0xfd, 7, 5, 48]].concat(),
    )?;
    seed(
        "allowed_ips",
        "edges",
        [[0, 0, 0, 0, 0], [2, 0, 0xff, 3, 32], [3, 0, 0xff, 15, 128], [1, 0, 0, 0, 0]].concat(),
    )
}

fn packet(v6: bool, tcp: bool) -> Packet {
    Packet {
        v6,
        tcp,
        port: 43210,
        sequence: u32::MAX - 150,
        flags: 0x99,
        window: 501,
        id: u16::MAX - 1,
        dont_fragment: true,
        ttl: 64,
        payload: (0..350u16).map(|i| (i % 251) as u8).collect(),
    }
}

fn cni() -> Result {
    let result = r#"{"cniVersion":"1.1.0","interfaces":[{"name":"ks39a7199053c6","mac":"02:6b:73:00:00:01","mtu":1280},
        {"name":"eth0","mac":"02:00:5e:00:53:01","mtu":1280,"sandbox":"/run/netns/c1"}],
        "ips":[{"address":"10.244.1.2/32","gateway":"169.254.1.1","interface":1},{"address":"fd00::2/128","interface":1}],
        "routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1","mtu":1200}],"dns":{"nameservers":["10.96.0.10"]}}"#;
    let config = format!(
        r#"{{"cniVersion":"1.1.0","name":"pods","type":"keystone-cni","mode":"pod-network","mtu":1280,
        "facts":"/run/keystone-mesh/pods.json","dataDir":"/var/lib/cni/keystone-cni","capabilities":{{"ips":true}},
        "ipam":{{"type":"keystone-cni","ranges":["10.244.1.0/24","fd00::/64"]}},
        "runtimeConfig":{{"ips":["10.244.1.7/24"],"mac":"02:00:5e:00:53:01"}},
        "cni.dev/valid-attachments":[{{"containerID":"c1","ifname":"eth0"}}],"prevResult":{result}}}"#
    );
    seed_after("cni", "configuration", &[0], config)?;
    let delegated = r#"{"cniVersion":"0.4.0","name":"a","type":"keystone-cni","ipam":{"type":"host-local"}}"#;
    seed_after("cni", "configuration-delegated", &[0], delegated)?;
    let add = "ADD\0c1\0eth0\0/run/netns/c1\0/opt/cni/bin\0K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0";
    seed_after("cni", "environment", &[1], add)?;
    seed_after("cni", "result", &[2], result)
}

fn files() -> Result {
    let id = sample::identity(NETWORK).id();
    let config = format!(
        "name = 'worker-1'\ninterface = 'ksmesh0'\nlisten_port = 51840\nmtu = 1280\nshards = 2\n\
         endpoints = ['home.example.org:51840']\nroutes = ['10.42.1.0/24']\nrelays = ['{id}@relay.example.org:51840']\n\
         gateways = ['192.0.2.1:51840']\nserve_relay = true\non_stop = 'remove'\naddresses = ['10.1.0.1/24']\n\n\
         [[peer]]\nname = 'phone'\npublic_key = '{}'\nendpoint = '192.0.2.7:51820'\nallowed_ips = ['10.1.0.2/32']\n\
         persistent_keepalive = 25\n",
        sample::secret(NODE).wireguard(0).public_key()
    );
    seed("config", "everything", config)?;
    seed("config", "little", "mtu = 1400\n")?;

    let token = sample::token(NETWORK);
    let create = Request::TokenCreate {
        ttl: Some(3600),
        uses: Some(1),
        names: Some("worker-*".parse()?),
        routes: vec!["10.42.1.0/24".parse()?],
    };
    let requests =
        [Request::Status, Request::Connect { name: "home".into() }, create, Request::TokenRevoke { id: token.id }];
    let more = [Request::Remove { name: "worker-1".parse()? }, Request::Leave { force: true }, Request::TokenList];
    for (index, request) in requests.iter().chain(&more).enumerate() {
        seed("control", &format!("request-{index}"), serde_json::to_vec(request)?)?;
    }
    let answer = Answer::Token { token: token.encode(), id: token.id, expires: None };
    seed("control", "answer-token", serde_json::to_vec(&answer)?)?;
    seed("control", "answer-failed", serde_json::to_vec(&Answer::Failed { message: "no such node".into() })?)?;

    let membership = Membership {
        network: id,
        name: "worker-1".parse()?,
        control_plane: false,
        rendezvous: token.rendezvous,
        approval: Some(sample::approval(NETWORK, NODE)),
    };
    let live = LivePeer { key: sample::secret(NODE).wireguard(0).public_key(), direct: Some("192.0.2.1:9".parse()?) };
    let snapshot = Snapshot {
        network: Some(sample::network(NETWORK)),
        entries: vec![sample::entry(NETWORK, NODE)],
        peers: vec![sample::peer(NETWORK)],
        live: vec![live],
    };
    seed_after("state", "snapshot", &[0], serde_json::to_vec(&snapshot)?)?;
    seed_after("state", "membership", &[1], serde_json::to_vec(&membership)?)?;
    seed_after("state", "secret", &[2], format!("\"{}\"", data_encoding::BASE64.encode(&[3; 32])))?;
    seed_after("state", "damaged", &[0x80 | 1], "keystone-mesh membership 1 crc32=00000000\n{}")
}
