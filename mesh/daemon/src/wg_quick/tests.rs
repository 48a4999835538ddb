use std::process::Command;

use keystone_mesh_core::Secret;

use super::*;

fn secret(byte: u8) -> Secret {
    Secret::from_bytes([byte; 32])
}

fn network() -> Network {
    Network {
        id: secret(1).identity().id(),
        ipv4: "10.98.0.0/16".parse().unwrap(),
        ipv6: "fd36::/48".parse().unwrap(),
        relays: vec![],
        gateways: vec![],
        serial: 1,
    }
}

/// A node, approved; `record` and `approval` change what it and the network say.
fn node(byte: u8, name: &str, record: impl FnOnce(&mut NodeRecord), approval: impl FnOnce(&mut Approval)) -> Entry {
    let mut said = NodeRecord {
        name: name.parse().unwrap(),
        identity: secret(byte).identity().id(),
        public_key: secret(byte).wireguard(0).public_key(),
        endpoints: vec![],
        nat: Nat::Unknown,
        relays: vec![],
        routes: vec![],
        seq: 1,
    };
    record(&mut said);
    let mut allowed = Approval {
        network: network().id,
        name: name.parse().unwrap(),
        identity: secret(byte).identity().id(),
        addresses: vec![format!("10.98.0.{byte}/32").parse().unwrap()],
        routes: vec![],
        pod_cidrs: vec![],
        endpoints: vec![],
        relays: vec![],
        location: None,
        serial: 1,
    };
    approval(&mut allowed);
    Entry { record: said.sign(&secret(byte).identity()), approval: Some(allowed.sign(&secret(1).identity())) }
}

fn laptop() -> PlainPeer {
    PlainPeer {
        network: network().id,
        name: "laptop".parse().unwrap(),
        node: "home".parse().unwrap(),
        public_key: key().public_key(),
        addresses: vec!["10.98.1.1/32".parse().unwrap(), "fd36::1:1/128".parse().unwrap()],
        routes: vec!["192.168.7.0/24".parse().unwrap()],
        endpoint: None,
        persistent_keepalive: None,
        serial: 1,
    }
}

fn key() -> PrivateKey {
    PrivateKey::from_bytes([9; 32])
}

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// home serves the laptop, and another node has pods behind it.
fn config() -> WgQuick {
    let home = node(
        1,
        "home",
        |record| record.endpoints = vec!["configured 203.0.113.1:51840".parse().unwrap()],
        |approval| approval.routes = nets(&["10.98.1.1/32", "192.168.7.0/24", "10.42.0.0/24"]),
    );
    let worker = node(2, "worker", |_| {}, |approval| approval.routes = nets(&["10.42.1.0/24", "10.50.0.0/16"]));
    let mut waiting = node(3, "waiting", |_| {}, |approval| approval.routes = nets(&["10.60.0.0/16"]));
    waiting.approval = None;
    WgQuick::make(&network(), &[home, worker, waiting], &laptop(), 1280).unwrap()
}

#[test]
fn the_file_has_the_mesh_and_every_approved_network_but_the_peers_own() {
    let expected = "\
# laptop in the mesh, served by home
[Interface]
PrivateKey = CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk=
Address = 10.98.1.1/32, fd36::1:1/128
MTU = 1280

[Peer]
PublicKey = SERVER
Endpoint = 203.0.113.1:51840
AllowedIPs = 10.42.0.0/23, 10.50.0.0/16, 10.98.0.0/16, fd36::/48
PersistentKeepalive = 25
";
    let server = secret(1).wireguard(0).public_key().to_string();
    assert_eq!(*config().file(Some(&key())), expected.replace("SERVER", &server));
}

#[test]
fn without_a_key_the_file_says_how_to_get_one_and_has_none() {
    let file = config().file(None);
    assert!(file.contains("\n# PrivateKey = "), "{}", *file);
    assert!(file.contains("keystone-mesh peer config laptop --new-key\n"), "{}", *file);
    assert!(!file.lines().any(|line| line.starts_with("PrivateKey")));
}

#[test]
fn the_best_endpoint_is_what_people_say_then_what_is_public() {
    type Change = fn(&mut NodeRecord, &mut Approval);
    let at = |change: Change, gateways: &[&str]| {
        let (mut said, mut allowed) = (None, None);
        let entry = node(1, "home", |record| said = Some(record.clone()), |approval| allowed = Some(approval.clone()));
        drop(entry);
        let (mut said, mut allowed) = (said.unwrap(), allowed.unwrap());
        change(&mut said, &mut allowed);
        let gateways = gateways.iter().map(|text| text.parse().unwrap()).collect();
        Endpoint::of(&Network { gateways, ..network() }, &said, &allowed)
    };
    let known = |text: &str| Endpoint::Known(text.parse().unwrap());

    assert_eq!(
        at(|_, a| a.endpoints = vec!["home.example.org:1".parse().unwrap()], &["gw.example.org:2"]),
        known("home.example.org:1")
    );
    assert_eq!(at(|_, _| {}, &["gw.example.org:2"]), known("gw.example.org:2"));
    assert_eq!(
        at(
            |r, _| {
                r.endpoints = vec![
                    "host 192.168.1.2:3".parse().unwrap(),
                    "reflexive 198.51.100.7:3".parse().unwrap(),
                    "configured 203.0.113.1:3".parse().unwrap(),
                ];
            },
            &[]
        ),
        known("203.0.113.1:3")
    );
    assert_eq!(
        at(
            |r, _| r.endpoints = vec!["host [2001:db8::7]:3".parse().unwrap(), "host 198.51.100.7:3".parse().unwrap()],
            &[]
        ),
        known("198.51.100.7:3")
    );
    let reflexive: Change = |r, _| {
        r.nat = Nat::EndpointIndependent;
        r.endpoints = vec!["host 192.168.1.2:3".parse().unwrap(), "reflexive 198.51.100.7:3".parse().unwrap()];
    };
    assert_eq!(at(reflexive, &[]), Endpoint::ThroughNat("198.51.100.7:3".parse().unwrap()));
    let symmetric: Change = |r, _| {
        r.nat = Nat::EndpointDependent;
        r.endpoints = vec!["reflexive 198.51.100.7:3".parse().unwrap()];
    };
    assert_eq!(at(symmetric, &[]), Endpoint::Unknown);
    assert_eq!(at(|r, _| r.endpoints = vec!["host 100.64.1.2:3".parse().unwrap()], &[]), Endpoint::Unknown);
}

#[test]
fn an_endpoint_that_nobody_knows_is_a_comment() {
    let mut config = config();
    config.endpoint = Endpoint::Unknown;
    let file = config.file(Some(&key()));
    assert!(file.contains("\n# Endpoint = HOST:PORT, where home is reached"), "{}", *file);
    assert!(!file.lines().any(|line| line.starts_with("Endpoint")));
}

#[test]
fn a_peer_of_another_network_or_without_a_server_gets_no_file() {
    let foreign = PlainPeer { network: secret(7).identity().id(), ..laptop() };
    assert!(matches!(WgQuick::make(&network(), &[], &foreign, 1280), Err(MakeError::OtherNetwork(_))));
    let error = WgQuick::make(&network(), &[], &laptop(), 1280).unwrap_err().to_string();
    assert!(error.contains("node `home`") && error.contains("kubectl describe node home"), "{error}");
    let revoked = node(1, "home", |_| {}, |approval| approval.addresses = vec![]);
    assert!(WgQuick::make(&network(), &[revoked], &laptop(), 1280).is_err());
}

#[test]
fn the_qr_code_is_of_the_file_without_comments() {
    let config = config();
    let shown = config.qr_code(&key(), false).unwrap();
    let plain: String = config
        .file(Some(&key()))
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| format!("{line}\n"))
        .collect();
    let code = QrCode::with_error_correction_level(plain.as_bytes(), qrcode::EcLevel::L).unwrap();
    let (width, colors) = (code.width(), code.to_colors());
    // Four modules of light around it (ISO/IEC 18004), two in a glyph.
    let rows: Vec<Vec<char>> = shown.lines().map(|line| line.chars().collect()).collect();
    let light = |x: usize, y: usize| match rows[(y + 4) / 2][x + 4] {
        '█' => true,
        '▀' => (y + 4).is_multiple_of(2),
        '▄' => !(y + 4).is_multiple_of(2),
        ' ' => false,
        other => panic!("{other}"),
    };
    for y in 0..width {
        for x in 0..width {
            assert_eq!(light(x, y), colors[y * width + x] == qrcode::Color::Light, "module {x}, {y}");
        }
    }
    assert!(rows[0].iter().all(|glyph| *glyph == '█'), "light around it");
    let coloured = config.qr_code(&key(), true).unwrap();
    assert!(coloured.lines().all(|line| line.starts_with("\x1b[40;97m") && line.ends_with("\x1b[0m")));
}

#[test]
fn a_mesh_of_a_thousand_scattered_networks_has_no_qr_code_and_says_so() {
    let mut config = config();
    config.allowed_ips =
        (0..1000_u32).map(|i| format!("10.{}.{}.0/24", i / 128, 2 * (i % 128)).parse().unwrap()).collect();
    let error = config.qr_code(&key(), false).unwrap_err().to_string();
    assert!(error.contains("1000 networks"), "{error}");
}

/// Sections of a configuration as `wg` reads them: keys and values, without comments.
fn parse(file: &str) -> Vec<(String, Vec<(String, String)>)> {
    let mut sections = Vec::new();
    for line in file.lines().map(|line| line.split('#').next().unwrap_or("").trim()).filter(|line| !line.is_empty()) {
        match line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            Some(section) => sections.push((section.to_owned(), Vec::new())),
            None => {
                let (key, value) = line.split_once('=').expect("KEY = VALUE");
                let pair = (key.trim().to_owned(), value.trim().to_owned());
                sections.last_mut().expect("a section comes first").1.push(pair);
            }
        }
    }
    sections
}

#[test]
fn the_file_reads_back() {
    let sections = parse(&config().file(Some(&key())));
    let names: Vec<&str> = sections.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["Interface", "Peer"]);
    let value = |section: usize, key: &str| {
        sections[section].1.iter().find(|(found, _)| found == key).map(|(_, value)| value.clone()).unwrap()
    };
    assert_eq!(value(0, "PrivateKey").parse::<PrivateKey>().unwrap().public_key(), laptop().public_key);
    assert_eq!(value(1, "PublicKey").parse::<PublicKey>().unwrap(), config().node_key);
    let allowed: Vec<IpNet> = value(1, "AllowedIPs").split(", ").map(|net| net.parse().unwrap()).collect();
    assert_eq!(allowed, config().allowed_ips);
}

#[test]
fn wg_quick_and_wg_themselves_read_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("laptop.conf");
    std::fs::write(&path, config().file(Some(&key())).as_bytes()).unwrap();
    let stripped = match Command::new("wg-quick").arg("strip").arg(&path).output() {
        Ok(output) => output,
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "wg-quick: {error}, and in CI nothing is skipped");
            eprintln!("SKIPPED: wg-quick ({error}); Debian has it in `wireguard-tools`");
            return;
        }
    };
    let text = String::from_utf8(stripped.stdout).unwrap();
    assert!(stripped.status.success(), "{}", String::from_utf8_lossy(&stripped.stderr));
    assert!(text.contains("PrivateKey = ") && !text.contains("Address") && !text.contains("MTU"), "{text}");

    // `wg` reads the whole file before it looks for the interface: what it complains of is that there is none.
    std::fs::write(&path, text).unwrap();
    let set = Command::new("wg").args(["setconf", "ksm-absent"]).arg(&path).output().unwrap();
    let said = String::from_utf8_lossy(&set.stderr);
    assert!(said.contains("Unable to modify interface") && !said.contains("parsing"), "{said}");
}
