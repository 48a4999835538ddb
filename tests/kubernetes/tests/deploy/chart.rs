//! The chart: rendered by the real Helm, and taken by the real API server.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};
use keystone_kubelab::{Options, with_api_server};
use serde_json::{Value, json};

use crate::{MANIFESTS, can_go_on, documents, install, repository, run, shipped};

const CHART: &str = "deploy/chart/keystone-mesh";

/// Helm, if it is built. It is only asked for what it does without network.
fn helm() -> Option<Command> {
    let folder = run(Command::new(repository("tests/assets/install-helm")).arg("--path")).unwrap();
    let program = PathBuf::from(folder.trim()).join("helm");
    let missing = "Helm is not built; `make chart` does it, in some minutes";
    can_go_on((!program.is_file()).then_some(missing)).then(|| Command::new(program))
}

/// Renders the chart with these arguments besides.
fn render(mut helm: Command, arguments: &[&str]) -> Result<Vec<Value>> {
    helm.args(["template", "keystone-mesh"]).arg(repository(CHART)).args(["--namespace", "keystone-mesh"]);
    Ok(documents(&run(helm.args(arguments))?))
}

/// The files with values that the chart is checked with.
fn values() -> Vec<PathBuf> {
    let files = fs::read_dir(repository(CHART).join("ci")).unwrap();
    let mut files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn the_manifests_are_what_helm_renders() {
    if helm().is_none() {
        return;
    }
    let rendered = run(&mut Command::new(repository("deploy/manifests/render"))).unwrap();
    assert!(rendered == MANIFESTS, "deploy/manifests is not what the chart says: run `make manifests`");
}

#[test]
fn helm_finds_no_fault_with_any_set_of_values() {
    let Some(mut command) = helm() else { return };
    run(command.args(["lint", "--strict"]).arg(repository(CHART))).unwrap();
    assert!(values().len() >= 3);
    for file in values() {
        let mut command = helm().unwrap();
        run(command.args(["lint", "--strict"]).arg(repository(CHART)).arg("--values").arg(&file)).unwrap();
    }
}

#[test]
fn values_reach_what_they_are_for() {
    if helm().is_none() {
        return;
    }
    let of = |name: &str| {
        let file = repository(CHART).join("ci").join(name);
        render(helm().unwrap(), &["--values", file.to_str().unwrap()]).unwrap()
    };
    let find = |objects: &[Value], kind: &str, name: &str| {
        objects.iter().find(|object| object["kind"] == kind && object["metadata"]["name"] == name).cloned()
    };
    let home = of("home-values.yaml");
    let agent = find(&home, "DaemonSet", "keystone-mesh").unwrap().to_string();
    assert!(agent.contains(r#"{"name":"KEYSTONE_MESH_NETWORK","value":"g2jks6kmklkrfgvo7e5d2n2f"#), "{agent}");
    assert!(agent.contains(r#"{"name":"KUBERNETES_SERVICE_HOST","value":"127.0.0.1"}"#), "{agent}");
    let controller = find(&home, "Deployment", "keystone-controller").unwrap();
    let arguments = controller["spec"]["template"]["spec"]["containers"][0]["args"].to_string();
    for argument in ["--approval=auto", "--allowed-routes=192.168.1.0/24,fd00:1::/64", "--node-init"] {
        assert!(arguments.contains(argument), "{arguments}");
    }
    for part in [
        r#"{"name":"KEYSTONE_MESH_CNI_MODE","value":"pod-network"}"#,
        r#"{"name":"KEYSTONE_MESH_NETWORK_POLICY","value":"true"}"#,
        r#"{"name":"KEYSTONE_MESH_CNI_CONF_DIR","value":"/host/cni/net.d"}"#,
        r#"{"mountPath":"/host/cni/bin","name":"cni-plugins"}"#,
        r#"{"path":"/var/lib/rancher/k3s/agent/etc/cni/net.d","type":"DirectoryOrCreate"}"#,
        r#"{"path":"/proc/sys/net","type":"Directory"}"#,
    ] {
        assert!(agent.contains(part), "{part} is not in {agent}");
    }
    assert!(!agent.contains("KEYSTONE_MESH_POD_ROUTES") && !agent.contains("CNI_FACTS"), "{agent}");
    for account in ["keystone-mesh", "keystone-gateway"] {
        let role = find(&home, "ClusterRole", account).unwrap().to_string();
        assert!(role.contains("networkpolicies") && !MANIFESTS.contains("networkpolicies"), "{role}");
    }
    assert!(!MANIFESTS.contains("cni"), "without a mode no directory of another network is mounted");
    assert!(find(&home, "Namespace", "keystone-mesh").is_none(), "Helm makes the namespace itself");

    let everything = of("everything-values.yaml");
    for (kind, name) in [
        ("Namespace", "keystone-mesh"),
        ("Service", "keystone-controller"),
        ("ServiceMonitor", "keystone-mesh"),
        ("ServiceMonitor", "keystone-controller"),
        ("PrometheusRule", "keystone-mesh"),
        ("ConfigMap", "keystone-mesh-dashboard"),
    ] {
        assert!(find(&everything, kind, name).is_some(), "{kind} {name}");
    }
    let rules = find(&everything, "PrometheusRule", "keystone-mesh").unwrap();
    assert!(rules["spec"]["groups"].as_array().is_some_and(|groups| !groups.is_empty()));
    let dashboard = find(&everything, "ConfigMap", "keystone-mesh-dashboard").unwrap();
    let dashboard = dashboard["data"]["keystone-mesh.json"].as_str().unwrap();
    assert!(serde_json::from_str::<Value>(dashboard).unwrap()["panels"].is_array());
    let controller = find(&everything, "Deployment", "keystone-controller").unwrap();
    let spec = &controller["spec"]["template"]["spec"];
    assert_eq!(spec["hostNetwork"], false);
    assert!(spec.to_string().contains("--metrics-listen=[::]:51843") && !spec.to_string().contains("\"host\":"));
    assert_eq!(spec["containers"][0]["image"], format!("registry.example.org:5000/mesh@sha256:{}", "0".repeat(64)));

    let agent = find(&everything, "DaemonSet", "keystone-mesh").unwrap().to_string();
    assert!(agent.contains(r#"{"name":"KEYSTONE_MESH_POD_ROUTES","value":"true"}"#), "{agent}");
    assert!(agent.contains(r#"{"name":"KEYSTONE_MESH_CNI_FACTS","value":"/run/mesh/pods.json"}"#), "{agent}");
    assert!(
        agent.contains("cni-configurations") && !agent.contains("cni-plugins") && !agent.contains("/proc/sys"),
        "{agent}"
    );

    let kinds = of("little-values.yaml").iter().map(|object| object["kind"].as_str().unwrap().to_owned()).collect();
    let kinds: std::collections::BTreeSet<String> = kinds;
    let accounts = ["ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "ServiceAccount"];
    assert_eq!(kinds, accounts.map(str::to_owned).into());
}

#[test]
fn bad_values_are_refused_by_name() {
    if helm().is_none() {
        return;
    }
    for (bad, named) in [
        ("contoller.replicas=1", "contoller"),
        ("networkKey=AAAA", "networkKey"),
        ("controller.approval=everybody", "approval"),
        ("controller.replicas=-1", "replicas"),
        ("controller.allowedRoutes={everywhere}", "allowedRoutes"),
        ("agent.maxUnavailable=0", "maxUnavailable"),
        ("agent.tokenSeconds=60", "tokenSeconds"),
        ("agent.statusPort=80", "statusPort"),
        ("agent.stateDir=relative", "stateDir"),
        ("cni.mode=overlay", "mode"),
        ("cni.confDir=relative", "confDir"),
        ("cni.podRoutes=maybe", "podRoutes"),
        ("image.digest=sha256:short", "digest"),
    ] {
        let refused = render(helm().unwrap(), &["--set", bad]).unwrap_err().to_string();
        assert!(refused.contains(named), "{bad}: {refused}");
    }
}

#[test]
fn the_manifests_install_by_server_side_apply_and_a_second_time_change_nothing() {
    let name = "chart::the_manifests_install_by_server_side_apply_and_a_second_time_change_nothing";
    with_api_server(name, Options::default(), |server| {
        // Without the namespace a dry run has nowhere to be.
        server.apply(&shipped("Namespace", "keystone-mesh").to_string())?;
        let dry = ["apply", "--server-side", "--dry-run=server", "--validate=strict", "--filename", "-"];
        server.kubectl_with(&dry, MANIFESTS)?;
        install(server)?;
        let versions = |server: &keystone_kubelab::ApiServer| {
            let print = r#"jsonpath={range .items[*]}{.kind}/{.metadata.name} {.metadata.resourceVersion}{"\n"}{end}"#;
            server.kubectl_with(&["get", "--filename", "-", "--output", print], MANIFESTS)
        };
        let before = versions(server)?;
        ensure!(before.lines().count() == documents(MANIFESTS).len(), "{before}");
        server.apply(MANIFESTS)?;
        assert_eq!(versions(server)?, before);

        // Admission knows the policies' fields: what does not compile would be said here.
        for policy in ["keystone-mesh-nodes", "keystone-mesh-annotations", "keystone-mesh-members"] {
            let get = ["get", "validatingadmissionpolicy", policy, "--output", "json"];
            let policy: Value = serde_json::from_str(&server.kubectl(&get)?)?;
            let warnings = &policy["status"]["typeChecking"]["expressionWarnings"];
            ensure!(warnings.is_null(), "{}: {warnings}", policy["metadata"]["name"]);
        }

        // What other values render is taken as well.
        if helm().is_none() {
            return Ok(());
        }
        for file in values() {
            let mut objects = render(helm().unwrap(), &["--values", file.to_str().unwrap()])?;
            // Kinds that the Prometheus operator would bring.
            objects.retain(|object| object["apiVersion"] != "monitoring.coreos.com/v1");
            let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
            let force = [&dry[..], &["--force-conflicts"]].concat();
            server.kubectl_with(&force, &list.to_string())?;
        }
        Ok(())
    });
}
