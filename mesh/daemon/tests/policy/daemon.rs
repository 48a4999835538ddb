//! The real daemon with a real API server: what it hears is in the kernel, and stays there whatever becomes of both.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use keystone_kubelab::{ApiServer, Options};
use keystone_lab::mesh::{Node, Program};
use keystone_lab::{Host, Wire, World, sandbox, wait};
use keystone_mesh_core::policy::TABLE;
use serde_json::{Value, json};

use crate::stage::labelled;

const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(100);

fn nft(host: &Host, arguments: &[&str]) -> Result<String> {
    host.run(Command::new("nft").args(arguments))
}

/// The table, without the counts of packets.
fn table(host: &Host) -> Result<String> {
    nft(host, &["--stateless", "list", "table", "inet", TABLE])
}

fn wait_for_table(host: &Host, what: &str, so: impl Fn(&str) -> bool) -> Result<String> {
    let waited = wait::until(what, PATIENCE, POLL, || Ok(table(host).ok().filter(|table| so(table))));
    waited.with_context(|| format!("{:?}", table(host)))
}

fn policy_status(node: &Node) -> Result<Value> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keystone-mesh"));
    command.envs(node.environment().into_iter().filter(|(name, _)| *name != "PATH")).args(["status", "--json"]);
    let status: Value = serde_json::from_str(&node.host().run(&mut command)?)?;
    Ok(status["network_policy"].clone())
}

fn wait_for_status(node: &Node, what: &str, so: impl Fn(&Value) -> bool) -> Result<Value> {
    let waited = wait::until(what, PATIENCE, POLL, || Ok(policy_status(node).ok().filter(|status| so(status))));
    waited.with_context(|| format!("{:?}\n{}", policy_status(node), node.log_tail(30)))
}

/// A pod on this node; with an address it runs.
fn apply_pod(server: &ApiServer, name: &str, app: &str, address: Option<&str>) -> Result<()> {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": "default", "labels": { "app": app } },
        "spec": {
            "nodeName": "home", "automountServiceAccountToken": false,
            "containers": [{ "name": "c", "image": "none", "ports": [{ "name": "http", "containerPort": 8080 }] }],
        },
    });
    server.apply(&pod.to_string())?;
    if let Some(address) = address {
        let status = json!({ "status": { "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }] } });
        let patch = format!("--patch={status}");
        server.kubectl(&["patch", "pod", name, "--subresource=status", "--type=merge", &patch])?;
    }
    Ok(())
}

fn policy(name: &str, spec: &Value) -> String {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": { "name": name, "namespace": "default" }, "spec": spec,
    })
    .to_string()
}

#[test]
fn policies_are_in_force_whatever_becomes_of_the_daemon_and_the_api_server() {
    let name = "daemon::policies_are_in_force_whatever_becomes_of_the_daemon_and_the_api_server";
    if !sandbox::is_inside() && !keystone_kubelab::can_test() {
        return;
    }
    sandbox::in_own_world(name, || {
        let world = World::new(Wire::Offloaded)?;
        let host = world.public_host("home")?;
        let options = Options { host: Some(host.clone()), addresses: vec![host.v4().into()], ..Options::default() };
        let mut server = ApiServer::start(options)?;
        let node = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "home" },
            "spec": { "podCIDR": "10.42.1.0/24", "podCIDRs": ["10.42.1.0/24"] } });
        server.apply(&node.to_string())?;
        for namespace in ["default", "keystone-mesh"] {
            let object = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": namespace } });
            server.apply(&object.to_string())?;
        }
        let account = json!({ "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": { "name": "default", "namespace": "default" } });
        server.apply(&account.to_string())?;
        let home = Node::new(&Program::find(Some(env!("CARGO_BIN_EXE_keystone-mesh").into()))?, &host, "home")?;
        home.init()?;
        let kubeconfig = host.folder()?.join("admin");
        server.admin().write_kubeconfig(&kubeconfig)?;
        let gateway = format!("{}:51840", host.v4());
        let kubeconfig = kubeconfig.to_str().context("UTF-8")?.to_owned();
        let arguments = ["--gateway", &gateway, "--registry", "kubernetes", "--kubeconfig", &kubeconfig];
        let with_policies = [&arguments[..], &["--network-policy"]].concat();
        home.up(&with_policies)?;
        let done = story(&mut server, &home, &arguments, &with_policies);
        done.with_context(|| format!("the daemon says:\n{}", home.log_tail(40)))
    });
}

fn story(server: &mut ApiServer, home: &Node, without: &[&str], with: &[&str]) -> Result<()> {
    let host = home.host();
    wait_for_status(home, "the empty cluster is in force", |status| status["state"] == "current")?;
    nft(host, &["add", "table", "inet", "foreign"])?;

    // A policy, a pod that it selects, one that it allows.
    let allow = json!({ "podSelector": labelled("app", "web"),
        "ingress": [{ "from": [{ "podSelector": labelled("app", "client") }], "ports": [{ "port": "http" }] }] });
    server.apply(&policy("web", &allow))?;
    apply_pod(server, "web", "web", None)?;
    wait_for_table(host, "unknown addresses are isolated", |table| table.contains("10.42.1.0/24"))?;
    wait_for_status(home, "the pod waits", |status| status["waiting_pods"] == 1 && status["isolated_pods"] == 1)?;
    apply_pod(server, "web", "web", Some("10.42.1.2"))?;
    apply_pod(server, "client", "client", Some("10.42.1.3"))?;
    let isolated = |table: &str| table.contains("10.42.1.2 : jump ingress4-") && !table.contains("10.42.1.0/24");
    let first = wait_for_table(host, "web is isolated, client allowed", |table| {
        isolated(table) && table.contains("elements = { 10.42.1.3 }") && table.contains("tcp dport 8080")
    })?;
    wait_for_status(home, "it says so", |status| status["policies"] == 1 && status["waiting_pods"] == 0)?;

    // Killed, and started again: not a rule was missing, none was written.
    home.kill()?;
    ensure!(table(host)? == first, "a killed daemon leaves everything");
    home.up(with)?;
    let status = wait_for_status(home, "it is current again", |status| status["state"] == "current")?;
    ensure!(status["applies"] == 0 && table(host)? == first, "a daemon that comes back changes nothing: {status}");
    home.stop()?;
    ensure!(table(host)? == first, "so does one that is stopped");
    home.up(with)?;
    wait_for_status(home, "it is current again", |status| status["state"] == "current")?;

    let removing = [with, &["--on-stop", "remove"]].concat();
    home.stop()?;
    home.up(&removing)?;
    wait_for_status(home, "it is current again", |status| status["state"] == "current")?;
    home.stop()?;
    ensure!(table(host)? == first, "pods stay isolated when the interface goes");
    ensure!(host.run(Command::new("ip").args(["link", "show", "ksmesh0"])).is_err(), "and it has gone");
    home.up(with)?;
    wait_for_status(home, "it is current again", |status| status["state"] == "current")?;

    // Without an API server: what is in force stays, vandalism included, which is put right without it.
    server.kill()?;
    wait_for_status(home, "it says that it hears nothing", |status| status["state"] == "stale")?;
    nft(host, &["flush", "table", "inet", TABLE])?;
    wait_for_table(host, "everything is back", |table| table == first)?;
    let status = wait_for_status(home, "it was counted", |status| status["repairs"] == 1)?;
    println!("{status}");
    server.restart()?;

    // A change, and a policy that is gone.
    server.apply(&policy("all", &json!({ "podSelector": {}, "policyTypes": ["Egress"] })))?;
    wait_for_table(host, "egress is closed", |table| table.contains("10.42.1.3 : jump egress4-"))?;
    server.kubectl(&["delete", "networkpolicy", "all", "web"])?;
    wait_for_table(host, "nobody is isolated", |table| !table.contains("jump"))?;

    // Switched off: its table goes, others' stay.
    home.stop()?;
    home.up(without)?;
    wait::until("the table is gone", PATIENCE, POLL, || Ok(table(host).is_err().then_some(())))?;
    ensure!(nft(host, &["list", "tables"])?.contains("foreign"), "other tables are others'");
    ensure!(policy_status(home)?.is_null(), "and nothing is said of policies");
    Ok(())
}
