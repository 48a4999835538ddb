//! The image: built without a registry, and run by a real kubelet and containerd as the manifests say.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keystone_kubelab::{ApiServer, ClusterNode, NodeOptions, Options, in_own_cluster};
use keystone_lab::mesh::{Node, Program};
use keystone_lab::ping::Pinger;
use keystone_lab::{Wire, World, sandbox, tool, wait};
use keystone_mesh_api::{AGENT_ACCOUNT, GATEWAY_ACCOUNT, NAMESPACE};
use serde_json::{Value, json};

use crate::{MANIFESTS, PATIENCE, POLL, can_go_on, documents, repository, run, shipped};

/// Capability 12 (capabilities(7)), and no other.
const NET_ADMIN: &str = "0000000000001000";
/// Pods come, go and come again.
const LONG: Duration = Duration::from_secs(120);

/// Where the image and its programs are built.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("image")
}

/// Builds the image with the programs of the development profile. False where that cannot be.
fn build() -> bool {
    let missing = ["buildah", "readelf"].into_iter().find(|program| tool::find(program).is_none());
    let missing = missing.map(|program| format!("{program} is not here; `make deps` installs it"));
    if !can_go_on(missing.as_deref()) {
        return false;
    }
    let mut command = Command::new(repository("deploy/image/build"));
    let archive = run(command.env("PROFILE", "dev").env("OUT", folder())).unwrap();
    fs::write(folder().join("archive"), archive.trim()).unwrap();
    true
}

fn archive() -> PathBuf {
    PathBuf::from(fs::read_to_string(folder().join("archive")).unwrap())
}

/// The manifests, for a cluster whose API server is at this address, and for this network.
fn manifests(server: &str, network: &str) -> Vec<Value> {
    let mut objects = documents(MANIFESTS);
    for object in &mut objects {
        let Some(pod) = object.pointer_mut("/spec/template/spec") else { continue };
        let more = [
            json!({"name": "KUBERNETES_SERVICE_HOST", "value": server}),
            json!({"name": "KUBERNETES_SERVICE_PORT", "value": "6443"}),
            json!({"name": "KEYSTONE_MESH_NETWORK", "value": network}),
            json!({"name": "KEYSTONE_MESH_HOST_PATIENCE", "value": "2"}),
            json!({"name": "KEYSTONE_CONTROLLER_APPROVAL", "value": "auto"}),
        ];
        let container = pod["containers"][0].as_object_mut().unwrap();
        container.insert("imagePullPolicy".into(), "Never".into());
        container["env"].as_array_mut().unwrap().extend(more);
        // A flag wins over its variable.
        if let Some(arguments) = container.get_mut("args").and_then(Value::as_array_mut) {
            arguments.retain(|argument| argument != "--approval=member");
        }
    }
    objects
}

/// The pods of a part: name and whether it is ready.
fn pods(server: &ApiServer, part: &str) -> Result<Vec<(String, bool)>> {
    let selector = format!("app.kubernetes.io/component={part}");
    let list = server.kubectl(&["-n", "keystone-mesh", "get", "pods", "--selector", &selector, "--output", "json"])?;
    let list: Value = serde_json::from_str(&list)?;
    let pods = list["items"].as_array().context("items")?.iter();
    Ok(pods
        .map(|pod| {
            let ready = pod["status"]["containerStatuses"][0]["ready"] == true;
            (pod["metadata"]["name"].as_str().unwrap_or_default().to_owned(), ready)
        })
        .collect())
}

/// Process ids of programs with these first two words.
fn processes(words: [&str; 2]) -> Vec<u32> {
    let ids = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let said = |id: &u32| fs::read_to_string(format!("/proc/{id}/cmdline")).unwrap_or_default();
    ids.filter(|id| said(id).split('\0').take(2).eq(words)).collect()
}

#[test]
fn the_image_runs_as_the_manifests_say_and_brings_a_node_into_the_mesh() {
    let name = "image::the_image_runs_as_the_manifests_say_and_brings_a_node_into_the_mesh";
    if !sandbox::is_inside() && !build() {
        return;
    }
    in_own_cluster(name, || {
        let world = World::new(Wire::Offloaded)?;
        let (home, worker) = (world.public_host("home")?, world.public_host("worker")?);
        let laptop = world.public_host("laptop")?;
        let options = Options { host: Some(home.clone()), audit: true, ..Options::default() };
        let mut server = ApiServer::start(options)?;
        server.start_controller_manager()?;
        server.start_scheduler()?;

        // Home has the network key; the Secret goes where the controller finds it.
        let program = Program::find(Some(folder().join("static/debug/keystone-mesh")))?;
        let plane = Node::new(&program, &home, "home")?;
        let network = plane.init()?;
        let list = json!({"apiVersion": "v1", "kind": "List", "items": manifests(&home.v4().to_string(), &network)});
        server.apply(&list.to_string())?;
        server.apply(&plane.kubernetes_secret()?)?;
        let kubeconfig = home.folder()?.join("admin-for-home");
        server.admin().write_kubeconfig(&kubeconfig)?;
        let gateway = format!("{}:51840", home.v4());
        let up =
            ["--gateway", &gateway, "--registry", "kubernetes", "--kubeconfig", kubeconfig.to_str().context("UTF-8")?];
        plane.up(&up)?;
        wait::until("home has its address", PATIENCE, POLL, || Ok(plane.mesh_v4().ok()))?;

        // One machine is all: its kubelet is told of nothing but the image.
        let mut node = ClusterNode::start(&server, NodeOptions::new(&worker, worker.v4().into(), home.v4().into()))?;
        node.import(&archive())?;
        wait::until("the node registers", LONG, POLL, || {
            node.check_alive()?;
            let label = ["label", "node", "worker", "node-role.kubernetes.io/control-plane="];
            Ok(server.kubectl(&label).ok())
        })?;

        let told = || {
            let describe = server.kubectl(&["-n", "keystone-mesh", "describe", "pods"]).unwrap_or_default();
            let logs = pods(&server, "agent")
                .unwrap_or_default()
                .into_iter()
                .chain(pods(&server, "controller").unwrap_or_default());
            let logs = logs.map(|(pod, _)| {
                server.kubectl(&["-n", "keystone-mesh", "logs", &pod, "--tail=20"]).unwrap_or_default()
            });
            format!("{describe}\n{}", logs.collect::<String>())
        };
        story(&server, &mut node, &plane).with_context(told)?;

        // The first start was an administrator's; every other is the gateway's account's.
        plane.stop()?;
        server.service_account(NAMESPACE, GATEWAY_ACCOUNT)?.write_kubeconfig(&kubeconfig)?;
        plane.up(&up)?;
        wait::until("home is back", PATIENCE, POLL, || Ok(plane.mesh_v4().ok()))?;
        let joined = Node::new(&program, &laptop, "laptop")?;
        joined.up_with_token(&plane.create_token(1)?)?;
        wait::until("the laptop has its address", PATIENCE, POLL, || Ok(joined.mesh_v4().ok()))?;
        joined.leave()?;
        nothing_was_refused_and_agents_use_all_they_have(&server).with_context(|| plane.log_tail(20))
    });
}

fn story(server: &ApiServer, node: &mut ClusterNode, plane: &Node) -> Result<()> {
    // Two replicas on the one host, whose port only one of them has.
    wait::until("both controllers are ready", LONG, POLL, || {
        node.check_alive()?;
        let pods = pods(server, "controller")?;
        Ok((pods.len() == 2 && pods.iter().all(|(_, ready)| *ready)).then_some(()))
    })?;
    let agent = wait::until("the agent is ready", LONG, POLL, || {
        node.check_alive()?;
        Ok(pods(server, "agent")?.into_iter().find(|(_, ready)| *ready).map(|(name, _)| name))
    })?;

    // What it was given, and no more.
    let ids = processes(["/keystone-mesh", "agent"]);
    ensure!(ids.len() == 1, "{ids:?}");
    let status = fs::read_to_string(format!("/proc/{}/status", ids[0]))?;
    let field = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
        line.trim_start_matches(':').trim().to_owned()
    };
    assert_eq!(["CapEff", "CapBnd", "NoNewPrivs", "Seccomp"].map(field), [NET_ADMIN, NET_ADMIN, "1", "2"]);
    for id in processes(["/keystone-controller", "run"]) {
        let status = fs::read_to_string(format!("/proc/{id}/status"))?;
        ensure!(status.contains("CapEff:\t0000000000000000") && status.contains("Uid:\t65532"), "{status}");
    }

    // The record was published, approved and put to use: home reaches the node through the mesh.
    let address: std::net::Ipv4Addr = wait::until("the node has its address", LONG, POLL, || {
        let annotation = r"jsonpath={.metadata.annotations.mesh\.keystone\.cluster/addresses}";
        let addresses = server.kubectl(&["get", "node", "worker", "--output", annotation])?;
        let first = addresses.split([' ', ',', '/']).next().unwrap_or_default().to_owned();
        Ok(first.parse().ok())
    })?;
    let pinger = Pinger::start(plane.host(), address, Duration::from_millis(20))?;
    pinger.first_reply(PATIENCE)?;
    let ready = r#"jsonpath={.status.conditions[?(@.type=="MeshApproved")].status}"#;
    assert_eq!(server.kubectl(&["get", "node", "worker", "--output", ready])?, "True");

    // Another pod takes over: the interface stays, and with it what runs through it.
    server.kubectl(&["-n", "keystone-mesh", "delete", "pod", &agent])?;
    wait::until("another agent is ready", LONG, POLL, || {
        let pods = pods(server, "agent")?;
        Ok(pods.into_iter().find(|(name, ready)| *ready && *name != agent))
    })?;
    pinger.reply_to_request_after(std::time::Instant::now(), PATIENCE)?;
    node.run("ip", &["link", "show", "ksmesh0"]).map(drop)
}

/// From the API server's audit: no account of ours asked for what it may not, and the agent's has no right to spare.
fn nothing_was_refused_and_agents_use_all_they_have(server: &ApiServer) -> Result<()> {
    let mut used = BTreeSet::new();
    for event in server.audit()? {
        let account = event["user"]["username"]
            .as_str()
            .and_then(|user| user.strip_prefix("system:serviceaccount:keystone-mesh:"));
        let Some(account) =
            account.filter(|_| event["stage"] == "ResponseComplete" || event["stage"] == "ResponseStarted")
        else {
            continue;
        };
        let code = event["responseStatus"]["code"].as_u64().unwrap_or_default();
        ensure!(code != 401 && code != 403, "{account} was refused: {event}");
        let (verb, object) = (event["verb"].as_str().unwrap_or_default(), &event["objectRef"]);
        if let Some(resource) = object["resource"].as_str() {
            used.insert((account.to_owned(), verb.to_owned(), resource.to_owned()));
        }
    }
    let agents = used.iter().filter(|(account, ..)| account == AGENT_ACCOUNT);
    let agents: BTreeSet<(String, String)> =
        agents.map(|(_, verb, resource)| (verb.clone(), resource.clone())).collect();
    let mut granted = BTreeSet::new();
    for role in [shipped("ClusterRole", AGENT_ACCOUNT), shipped("Role", AGENT_ACCOUNT)] {
        for rule in role["rules"].as_array().unwrap() {
            for (verb, resource) in product(&rule["verbs"], &rule["resources"]) {
                granted.insert((verb, resource));
            }
        }
    }
    ensure!(agents == granted, "the agent's account uses {agents:?} and was given {granted:?}");
    ensure!(
        used.iter().any(|(account, verb, what)| account == GATEWAY_ACCOUNT && verb == "create" && what == "members")
    );
    Ok(())
}

fn product(verbs: &Value, resources: &Value) -> Vec<(String, String)> {
    let words = |list: &Value| -> Vec<String> {
        list.as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect()
    };
    let resources = words(resources);
    words(verbs).iter().flat_map(|verb| resources.iter().map(move |what| (verb.clone(), what.clone()))).collect()
}
