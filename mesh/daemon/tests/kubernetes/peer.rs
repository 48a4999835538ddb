//! `keystone-mesh peer` against a real API server; who approves and signs is played by the test.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use keystone_kubelab::{ApiServer, Options, with_api_server};
use keystone_lab::wait;
use keystone_mesh_core::plain_peer::PlainPeer;
use keystone_mesh_core::{PrivateKey, annotations};
use serde_json::{Value, json};

use crate::world::*;

const POLL: Duration = Duration::from_millis(100);

/// A cluster with the network's document, the control plane `home` and a worker, and the program under test.
struct Cluster<'a> {
    server: &'a ApiServer,
    dir: tempfile::TempDir,
}

impl<'a> Cluster<'a> {
    fn new(server: &'a ApiServer) -> Result<Self> {
        install_resources(server)?;
        apply_network(server)?;
        server.apply(&approved_node(1, "home"))?;
        server.apply(&approved_node(2, "worker"))?;
        let dir = tempfile::tempdir()?;
        server.admin().write_kubeconfig(&dir.path().join("kubeconfig"))?;
        Ok(Self { server, dir })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keystone-mesh"));
        command.arg("peer").args(arguments).arg("--kubeconfig").arg(self.file("kubeconfig"));
        command.env("KEYSTONE_MESH_STATE_DIR", self.file("state")).env("KEYSTONE_MESH_RUN_DIR", self.file("run"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn peer(&self, arguments: &[&str]) -> Result<Output> {
        Ok(self.command(arguments).output()?)
    }

    /// What the controller does: states the peer for its present key, as `serial`.
    fn state(&self, name: &str, serial: u64) -> Result<()> {
        let object = wait::until("there is a Peer", PATIENCE, POLL, || {
            let Ok(text) = self.server.kubectl(&["get", "peers.mesh.keystone.cluster", name, "--output", "json"])
            else {
                return Ok(None);
            };
            let object: Value = serde_json::from_str(&text)?;
            let stated = &object["metadata"]["annotations"][format!("{}public-key", annotations::PREFIX)];
            Ok((*stated != object["spec"]["publicKey"]).then_some(object))
        })?;
        let peer = PlainPeer {
            network: network_key().id(),
            name: name.parse()?,
            node: "home".parse()?,
            public_key: object["spec"]["publicKey"].as_str().context("a key")?.parse()?,
            addresses: vec!["10.98.0.9/32".parse()?],
            routes: vec![],
            endpoint: None,
            persistent_keepalive: None,
            serial,
        };
        let patch = json!({ "metadata": { "annotations": peer.sign(&network_key()).to_annotations() } });
        let patch = patch.to_string();
        self.server.kubectl(&["patch", "peers.mesh.keystone.cluster", name, "--type", "merge", "--patch", &patch])?;
        Ok(())
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The private key in a configuration.
fn key_in(config: &str) -> Result<PrivateKey> {
    let line = config.lines().find_map(|line| line.strip_prefix("PrivateKey = ")).context("no private key")?;
    Ok(line.parse()?)
}

#[test]
fn a_peer_is_made_shown_given_another_key_and_removed() {
    with_api_server("peer::a_peer_is_made_shown_given_another_key_and_removed", Options::default(), |server| {
        let cluster = Cluster::new(server)?;
        let adding = cluster.command(&["add", "laptop", "--keepalive", "30", "--qr"]).spawn()?;
        cluster.state("laptop", 1)?;
        let added = adding.wait_with_output()?;
        let (config, said) = (text(&added.stdout), text(&added.stderr));
        ensure!(added.status.success(), "{said}");
        for line in [
            "Address = 10.98.0.9/32",
            "MTU = 1280",
            "Endpoint = 192.0.2.1:51840",
            "PersistentKeepalive = 25",
            &format!("PublicKey = {}", secret(1).wireguard(0).public_key()),
        ] {
            ensure!(config.lines().any(|found| found == line), "{line} is not in\n{config}");
        }
        ensure!(config.contains("AllowedIPs = 10.98.0.0/16, fd"), "{config}");
        ensure!(said.contains('▄') && said.contains("stands here and nowhere else"), "{said}");
        let object: Value = serde_json::from_str(&server.kubectl(&[
            "get",
            "peers.mesh.keystone.cluster",
            "laptop",
            "--output",
            "json",
        ])?)?;
        let key = key_in(&config)?;
        ensure!(
            object["spec"]["publicKey"] == key.public_key().to_string() && object["spec"]["persistentKeepalive"] == 30
        );
        ensure!(!object.to_string().contains(config.lines().nth(2).context("the key's line")?));

        shown(&cluster, &config)?;
        let again = cluster.peer(&["add", "laptop"])?;
        ensure!(!again.status.success() && text(&again.stderr).contains("--new-key"), "{}", text(&again.stderr));

        let renewing = cluster.command(&["config", "laptop", "--new-key"]).spawn()?;
        cluster.state("laptop", 2)?;
        let renewed = renewing.wait_with_output()?;
        ensure!(renewed.status.success(), "{}", text(&renewed.stderr));
        let other = key_in(&text(&renewed.stdout))?;
        ensure!(other.public_key() != key.public_key(), "another key");

        ensure!(cluster.peer(&["remove", "laptop"])?.status.success());
        let gone = cluster.peer(&["remove", "laptop"])?;
        ensure!(text(&gone.stderr).contains("there is no peer `laptop`"), "{}", text(&gone.stderr));
        Ok(())
    });
}

/// Without a key, with the right one, with another's, and in the list.
fn shown(cluster: &Cluster<'_>, config: &str) -> Result<()> {
    let plain = cluster.peer(&["config", "laptop"])?;
    let plain = text(&plain.stdout);
    ensure!(plain.contains("\n# PrivateKey = ") && key_in(&plain).is_err(), "{plain}");

    let path = cluster.file("laptop.key");
    let line = config.lines().find_map(|line| line.strip_prefix("PrivateKey = ")).context("a key")?;
    std::fs::write(&path, line)?;
    let whole = cluster.peer(&["config", "laptop", "--private-key-file", as_text(&path)?])?;
    ensure!(text(&whole.stdout) == config, "{}\n{config}", text(&whole.stdout));

    std::fs::write(&path, "CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk=")?;
    let wrong = cluster.peer(&["config", "laptop", "--private-key-file", as_text(&path)?])?;
    ensure!(text(&wrong.stderr).contains("is not the private key of peer `laptop`"), "{}", text(&wrong.stderr));

    let listed: Value = serde_json::from_slice(&cluster.peer(&["list", "--json"])?.stdout)?;
    ensure!(listed[0]["name"] == "laptop" && listed[0]["public_key"] == key_in(config)?.public_key().to_string());
    Ok(())
}

fn as_text(path: &Path) -> Result<&str> {
    path.to_str().context("the path is UTF-8")
}

#[test]
fn a_peer_that_nobody_states_is_taken_back_and_the_verdict_is_told() {
    with_api_server(
        "peer::a_peer_that_nobody_states_is_taken_back_and_the_verdict_is_told",
        Options::default(),
        |server| {
            let cluster = Cluster::new(server)?;
            let alone = cluster.peer(&["add", "phone", "--timeout", "1"])?;
            let said = text(&alone.stderr);
            ensure!(!alone.status.success() && alone.stdout.is_empty(), "no key without an address");
            ensure!(
                said.contains("no address within 1 s; does it run?") && said.contains("the peer was taken back"),
                "{said}"
            );
            ensure!(server.kubectl(&["get", "peers.mesh.keystone.cluster", "phone"]).is_err(), "it is gone");

            let spec = json!({ "publicKey": secret(9).wireguard(0).public_key() });
            let object = json!({
                "apiVersion": "mesh.keystone.cluster/v1alpha1", "kind": "Peer", "metadata": { "name": "site" }, "spec": spec
            });
            server.apply(&object.to_string())?;
            let condition = json!({
                "type": "Ready", "status": "False", "reason": "NodeUnknown", "message": "there is no node `attic`",
                "lastTransitionTime": "2026-01-01T00:00:00Z"
            });
            let patch = json!({ "status": { "conditions": [condition] } }).to_string();
            let subresource = ["--subresource", "status", "--type", "merge", "--patch", &patch];
            server.kubectl(&[&["patch", "peers.mesh.keystone.cluster", "site"], &subresource[..]].concat())?;
            let refused = cluster.peer(&["config", "site", "--timeout", "1"])?;
            let said = text(&refused.stderr);
            ensure!(said.contains("there is no node `attic` (NodeUnknown)"), "{said}");
            let listed = text(&cluster.peer(&["list"])?.stdout);
            ensure!(listed.contains("NodeUnknown: there is no node `attic`"), "{listed}");
            Ok(())
        },
    );
}
