//! Real daemons and agents on hosts of the lab, with a real API server.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use keystone_kubelab::{ApiServer, Options};
use keystone_lab::mesh::{Node, Program};
use keystone_lab::ping::Pinger;
use keystone_lab::{Host, Process, Wire, World, sandbox, wait};
use keystone_mesh::state::StateDir;
use serde_json::Value;

use crate::approver;
use crate::world::{PATIENCE, install_resources, node};

const POLL: Duration = Duration::from_millis(100);

/// The files of a pod's service account, with a token that is bound to its Node.
fn service_account(server: &ApiServer, name: &str) -> Result<PathBuf> {
    let dir = Path::new(sandbox::SCRATCH).join(format!("account-{name}"));
    fs::create_dir_all(&dir)?;
    let access = server.service_account_on(name, "keystone-mesh", "keystone-mesh")?;
    fs::write(dir.join("ca.crt"), access.authority())?;
    fs::write(dir.join("namespace"), "keystone-mesh")?;
    fs::write(dir.join("token"), access.token().context("a token")?)?;
    Ok(dir)
}

/// An agent on the host of `at`, with that daemon's folders.
fn agent(at: &Node, api: &Host, account: &Path, more: &[&str]) -> Result<Process> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keystone-mesh"));
    command.env("KUBERNETES_SERVICE_HOST", api.v4().to_string()).env("KUBERNETES_SERVICE_PORT", "6443");
    command.envs(at.environment().into_iter().filter(|(name, _)| *name != "PATH"));
    command.args(["agent", "--name", at.name(), "--service-account"]).arg(account).args(more);
    at.host().spawn(&format!("agent-{}", at.name()), &mut command)
}

fn status(at: &Node) -> Result<Value> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keystone-mesh"));
    command.envs(at.environment().into_iter().filter(|(name, _)| *name != "PATH")).args(["status", "--json"]);
    Ok(serde_json::from_str(&at.host().run(&mut command)?)?)
}

fn wait_for_registry(at: &Node, kind: &str) -> Result<()> {
    let what = format!("the registry of {} is {kind}", at.name());
    let waited = wait::until(&what, PATIENCE, POLL, || {
        let Ok(status) = status(at) else { return Ok(None) };
        Ok((status["registry"]["kind"] == kind && status["registry"]["state"] == "current").then_some(()))
    });
    waited.with_context(|| format!("{:?}\n{}", status(at).map(|status| status["registry"].clone()), at.log_tail(20)))
}

fn on_node(server: &ApiServer, name: &str, key: &str) -> Result<Value> {
    let object: Value = serde_json::from_str(&server.kubectl(&["get", "node", name, "--output", "json"])?)?;
    Ok(object["metadata"]["annotations"][format!("mesh.keystone.cluster/{key}")].clone())
}

#[test]
fn an_agent_gives_access_without_a_packet_lost_or_runs_the_daemon_itself() {
    let name = "agent::an_agent_gives_access_without_a_packet_lost_or_runs_the_daemon_itself";
    if !sandbox::is_inside() && !keystone_kubelab::can_test() {
        return;
    }
    sandbox::in_own_world(name, || {
        let world = World::new(Wire::Offloaded)?;
        let hosts = ["home", "joined", "bare"].map(|name| world.public_host(name));
        let [home_host, joined_host, bare_host] = hosts;
        let (home_host, joined_host, bare_host) = (home_host?, joined_host?, bare_host?);
        let options =
            Options { host: Some(home_host.clone()), addresses: vec![home_host.v4().into()], ..Options::default() };
        let server = ApiServer::start(options)?;
        install_resources(&server)?;
        server.kubectl(&[
            "create",
            "clusterrolebinding",
            "all",
            "--clusterrole=cluster-admin",
            "--group=system:serviceaccounts",
        ])?;
        let program = Program::find(Some(env!("CARGO_BIN_EXE_keystone-mesh").into()))?;

        // The control plane's host, with Kubernetes as its registry.
        let home = Node::new(&program, &home_host, "home")?;
        let network = home.init()?;
        let kubeconfig = home_host.folder()?.join("admin-for-home");
        server.admin().write_kubeconfig(&kubeconfig)?;
        let gateway = format!("{}:51840", home_host.v4());
        let kubeconfig = kubeconfig.to_str().context("UTF-8")?;
        home.up(&["--gateway", &gateway, "--registry", "kubernetes", "--kubeconfig", kubeconfig])?;
        let state = home.environment().into_iter().find(|(name, _)| *name == "KEYSTONE_MESH_STATE_DIR");
        let secret = StateDir::read_only(Path::new(&state.context("a state directory")?.1)).secret()?;
        let identity = secret.context("a secret")?.identity();
        std::thread::scope(|scope| {
            let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
            let server = &server;
            let approving = scope.spawn(move || {
                server.with_client(server.admin(), async |client| {
                    let approving = approver::start(client, identity);
                    let _ = stopped.await;
                    approving.abort();
                    Ok(())
                })
            });
            let done = story(server, &home, [&joined_host, &bare_host], &program, &network);
            drop(stop);
            approving.join().map_err(|_| anyhow::anyhow!("the approver panicked"))??;
            done.with_context(|| format!("home says:\n{}", home.log_tail(30)))
        })
    });
}

fn story(server: &ApiServer, home: &Node, hosts: [&Host; 2], program: &Program, network: &str) -> Result<()> {
    wait_for_registry(home, "kubernetes")?;
    let joined = Node::new(program, hosts[0], "joined")?;
    joined.up_with_token(&home.create_token(1)?)?;
    wait_for_registry(&joined, "gateway")?;
    let pinger = Pinger::start(hosts[0], home.mesh_v4()?, Duration::from_millis(20))?;
    pinger.first_reply(PATIENCE)?;

    // Its Node comes, and the pod on it, which hands over what it has.
    server.apply(&node("joined", &Default::default()))?;
    let account = service_account(server, "joined")?;
    let before = Instant::now();
    let mut agent_there = agent(&joined, home.host(), &account, &[])?;
    wait_for_registry(&joined, "kubernetes")?;
    wait::until("the record stands on the Node", PATIENCE, POLL, || {
        Ok(on_node(server, "joined", "signature")?.is_string().then_some(()))
    })?;
    // The Node's approval comes from the same hand; nothing of it was felt.
    std::thread::sleep(Duration::from_secs(1));
    let (sent, received) = pinger.trace().counts(before, Instant::now() - Duration::from_millis(500));
    ensure!(sent > 10 && sent == received, "{received} of {sent} pings came back");

    // A daemon that is started again has its access again; a token that is rotated takes the old one's place.
    joined.kill()?;
    joined.up(&[])?;
    wait_for_registry(&joined, "kubernetes")?;
    service_account(server, "joined")?;
    ensure!(agent_there.ended()?.is_none(), "the agent ended: {}", agent_there.log_tail(20));
    let writes = server.metrics()?.writes("nodes");
    std::thread::sleep(Duration::from_secs(12));
    ensure!(server.metrics()?.writes("nodes") == writes, "a renewal is no write");
    agent_there.terminate(PATIENCE)?;

    // A Node without a daemon and without a token: the agent runs it, and the Node's approval makes it a member.
    server.apply(&node("bare", &Default::default()))?;
    let bare = Node::new(program, hosts[1], "bare")?;
    let account = service_account(server, "bare")?;
    let agent_there = agent(&bare, home.host(), &account, &["--network", network, "--host-patience", "1"])?;
    let waited = wait_for_registry(&bare, "kubernetes");
    waited.with_context(|| agent_there.log_tail(20))?;
    let pinger = Pinger::start(hosts[1], home.mesh_v4()?, Duration::from_millis(100))?;
    pinger.first_reply(PATIENCE).map(drop).with_context(|| agent_there.log_tail(20))?;
    agent_there.terminate(PATIENCE).map(drop)
}
