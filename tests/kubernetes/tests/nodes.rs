//! Nodes: real kubelets with real containers.

use std::fs;
use std::panic::catch_unwind;
use std::time::Duration;

use anyhow::{Result, bail};
use keystone_kubelab::{ApiServer, BUSYBOX, ClusterNode, NodeOptions, Options, in_own_cluster};
use keystone_lab::{Wire, World, sandbox, wait};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(200);

/// Waits until the only node is Ready, and a pod of the host's network that runs `script` is there.
fn run_pod(server: &ApiServer, node: &mut ClusterNode, script: &str) -> Result<()> {
    let ready = "jsonpath={.items[*].status.conditions[?(@.type=='Ready')].status}";
    wait::until("the node is Ready", PATIENCE, POLL, || {
        node.check_alive()?;
        Ok((server.kubectl(&["get", "nodes", "--output", ready])? == "True").then_some(()))
    })?;
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": "pod", "namespace": "default" },
        "spec": {
            "hostNetwork": true,
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": false,
            "containers": [{
                "name": "main",
                "image": BUSYBOX,
                "imagePullPolicy": "Never",
                "command": ["/bin/sh", "-c", script],
            }],
        },
    });
    wait::until("the default ServiceAccount is made", PATIENCE, POLL, || Ok(server.apply(&pod.to_string()).ok()))?;
    wait::until("the pod runs", PATIENCE, POLL, || {
        node.check_alive()?;
        let phase = server.kubectl(&["get", "pod", "pod", "--output", "jsonpath={.status.phase}"])?;
        Ok((phase == "Running").then_some(()))
    })
}

fn cluster() -> Result<(ApiServer, ClusterNode)> {
    let world = World::new(Wire::Offloaded)?;
    let (home, worker) = (world.public_host("home")?, world.public_host("worker")?);
    let mut server = ApiServer::start(Options { host: Some(home.clone()), ..Options::default() })?;
    server.start_controller_manager()?;
    server.start_scheduler()?;
    let node = ClusterNode::start(&server, NodeOptions::new(&worker, worker.v4().into(), home.v4().into()))?;
    Ok((server, node))
}

#[test]
fn a_node_registers_and_runs_a_pod_that_speaks() {
    in_own_cluster("a_node_registers_and_runs_a_pod_that_speaks", || {
        let (server, mut node) = cluster()?;
        run_pod(&server, &mut node, "echo a word from the pod; exec sleep 3600")?;
        assert_eq!(server.kubectl(&["logs", "pod"])?, "a word from the pod\n");
        let answer = || server.kubectl(&["exec", "pod", "--", "/bin/sh", "-c", "echo $((6 * 7))"]);
        assert_eq!(answer()?, "42\n");

        // The pod does not need its kubelet, and is found again.
        node.kill_kubelet()?;
        answer().unwrap_err();
        node.start_kubelet()?;
        wait::until("the kubelet answers again", PATIENCE, POLL, || Ok(answer().ok()))?;

        // A node that goes takes its containers along, while the rest of the world goes on.
        drop(node);
        wait::until("its programs and containers are gone", PATIENCE, POLL, || {
            Ok(running(&["containerd-shim", "containerd", "kubelet", "sleep 3600"]).is_empty().then_some(()))
        })?;
        server.get("/readyz").map(drop)
    });
}

#[test]
fn after_a_failed_test_nothing_is_left() {
    let failing = || {
        in_own_cluster("after_a_failed_test_nothing_is_left", || {
            let (server, mut node) = cluster()?;
            run_pod(&server, &mut node, "exec sleep 3601")?;
            bail!("on purpose, with everything running")
        });
    };
    if sandbox::is_inside() {
        return failing();
    }
    // Where it is skipped there is no panic either.
    if catch_unwind(failing).is_err() {
        let gone = wait::until("the container is gone", PATIENCE, POLL, || {
            Ok(running(&["sleep 3601"]).is_empty().then_some(()))
        });
        gone.expect("the container ends with its sandbox");
        let mounts = fs::read_to_string("/proc/self/mounts").expect("the list of mounts");
        assert!(!mounts.contains("keystone-lab"), "{mounts}");
        assert_eq!(fs::read_dir("/var/lib/kubelet").map(Iterator::count).unwrap_or(0), 0);
    }
}

/// Command lines of processes that begin with one of these words.
fn running(programs: &[&str]) -> Vec<String> {
    let processes = fs::read_dir("/proc").expect("a list of processes").flatten();
    let lines = processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
    let lines = lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    let name = |line: &str| line.rsplit_once("/bin/").map_or(line.to_owned(), |(_, name)| name.to_owned());
    lines.filter(|line| programs.iter().any(|program| name(line).starts_with(program))).collect()
}
