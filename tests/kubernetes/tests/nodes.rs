//! Nodes: real kubelets with real containers.

use std::time::Duration;

use keystone_kubelab::{ApiServer, BUSYBOX, ClusterNode, NodeOptions, Options, in_own_cluster};
use keystone_lab::{Wire, World, wait};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(200);

#[test]
fn a_node_registers_and_runs_a_pod_that_speaks() {
    in_own_cluster("a_node_registers_and_runs_a_pod_that_speaks", || {
        let world = World::new(Wire::Offloaded)?;
        let (home, worker) = (world.public_host("home")?, world.public_host("worker")?);
        let mut server = ApiServer::start(Options { host: Some(home.clone()), ..Options::default() })?;
        server.start_controller_manager()?;
        server.start_scheduler()?;
        let mut node = ClusterNode::start(&server, NodeOptions::new(&worker, worker.v4().into(), home.v4().into()))?;
        let ready = "jsonpath={.items[*].status.conditions[?(@.type=='Ready')].status}";
        wait::until("the node is Ready", PATIENCE, POLL, || {
            node.check_alive()?;
            Ok((server.kubectl(&["get", "nodes", "--output", ready])? == "True").then_some(()))
        })?;

        let command = ["/bin/sh", "-c", "echo a word from the pod; exec sleep 3600"];
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": "speaker", "namespace": "default" },
            "spec": {
                "hostNetwork": true,
                "terminationGracePeriodSeconds": 0,
                "automountServiceAccountToken": false,
                "containers": [{ "name": "main", "image": BUSYBOX, "imagePullPolicy": "Never", "command": command }],
            },
        });
        wait::until("the default ServiceAccount is made", PATIENCE, POLL, || Ok(server.apply(&pod.to_string()).ok()))?;
        wait::until("its log can be read", PATIENCE, POLL, || {
            node.check_alive()?;
            Ok(server.kubectl(&["logs", "speaker"]).ok().filter(|log| log == "a word from the pod\n"))
        })?;
        let said = server.kubectl(&["exec", "speaker", "--", "/bin/sh", "-c", "echo $((6 * 7))"])?;
        assert_eq!(said, "42\n");
        Ok(())
    });
}
