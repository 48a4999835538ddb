//! A compromised worker with its ServiceAccount's token, a gateway and a kubelet that overreach: the admission policies
//! hold them, whatever roles they were given.

use anyhow::{Result, bail, ensure};
use k8s_openapi::api::core::v1::Node;
use keystone_kubelab::{Access, ApiServer, Options, with_api_server};
use keystone_lab::wait;
use keystone_mesh_api::{AGENT_ACCOUNT, AGENT_MANAGER, GATEWAY_ACCOUNT, Member, NAMESPACE, Peer};
use keystone_mesh_core::annotations::{KEYS, PREFIX, Writer, names};
use keystone_mesh_core::facts::MAX_FACT;
use keystone_mesh_core::plain_peer;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::{PATIENCE, POLL, install, shipped};

/// All rights on what the mesh lives on, so that nothing but the policies holds who has them.
const EVERYTHING: &str = r#"
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: everything}
rules:
  - {apiGroups: [""], resources: [nodes, nodes/status, nodes/proxy], verbs: ["*"]}
  - {apiGroups: [mesh.keystone.cluster], resources: ["*"], verbs: ["*"]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: everything}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: everything}
subjects:
  - {kind: ServiceAccount, namespace: keystone-mesh, name: keystone-mesh}
  - {kind: ServiceAccount, namespace: keystone-mesh, name: keystone-gateway}
"#;

/// A worker, another one, both with a record, an approval, a wish and something of somebody else.
fn world(server: &ApiServer) -> Result<()> {
    install(server)?;
    server.apply(EVERYTHING)?;
    for name in ["worker-1", "worker-2", "canary"] {
        server.apply(&node(name).to_string())?;
    }
    for name in ["nas", "canary"] {
        let member = json!({
            "apiVersion": "mesh.keystone.cluster/v1alpha1", "kind": "Member",
            "metadata": {"name": name, "annotations": annotations()},
            "spec": {"identity": "a".repeat(52)},
        });
        server.apply(&member.to_string())?;
    }
    // What the API server reads of a policy it obeys some moments later.
    let stranger = server.service_account(NAMESPACE, AGENT_ACCOUNT)?;
    let gateway = server.service_account(NAMESPACE, GATEWAY_ACCOUNT)?;
    let mut attempt = 0;
    wait::until("every policy holds", PATIENCE, POLL, || {
        // What changes nothing is nobody's business.
        attempt += 1;
        let denied = [
            denial(&change(server, &stranger, "canary", json!({"metadata": {"labels": {"a": attempt.to_string()}}}))),
            denial(&change(server, &gateway, "canary", annotate("approved", attempt.to_string()))),
            denial(&change_member(
                server,
                &stranger,
                "canary",
                json!({"metadata": {"labels": {"a": attempt.to_string()}}}),
            )),
        ];
        Ok(denied.iter().all(Option::is_some).then_some(()))
    })
}

fn annotations() -> Value {
    let mut annotations = json!({"example.org/owner": "somebody"});
    for key in KEYS {
        annotations[format!("{PREFIX}{}", key.name)] = "as it was".into();
    }
    annotations
}

fn node(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "annotations": annotations(), "labels": {"example.org/zone": "a"}},
    })
}

fn annotate(key: &str, value: impl Into<Value>) -> Value {
    json!({"metadata": {"annotations": {format!("{PREFIX}{key}"): value.into()}}})
}

fn change(server: &ApiServer, access: &Access, node: &str, patch: Value) -> Result<()> {
    server.with_client(access, async |client| {
        let nodes = Api::<Node>::all(client);
        Ok(nodes.patch(node, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)?)
    })
}

fn change_status(server: &ApiServer, access: &Access, node: &str, patch: Value) -> Result<()> {
    server.with_client(access, async |client| {
        let nodes = Api::<Node>::all(client);
        Ok(nodes.patch_status(node, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)?)
    })
}

fn change_member(server: &ApiServer, access: &Access, member: &str, patch: Value) -> Result<()> {
    server.with_client(access, async |client| {
        let members = Api::<Member>::all(client);
        Ok(members.patch(member, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)?)
    })
}

/// Which policy denied it, if one did.
fn denial(result: &Result<()>) -> Option<String> {
    let said = format!("{:#}", result.as_ref().err()?);
    let (_, policy) = said.split_once("ValidatingAdmissionPolicy '")?;
    policy.split_once('\'').map(|(policy, _)| policy.to_owned())
}

fn denied_by(policy: &str, what: &str, result: Result<()>) -> Result<()> {
    match (denial(&result), result) {
        (Some(by), _) if by == policy => Ok(()),
        (_, Ok(())) => bail!("{what}: nobody denied it"),
        (_, Err(error)) => bail!("{what}: {policy} did not deny it, but: {error:#}"),
    }
}

#[test]
fn the_policy_names_the_annotations_that_nodes_write() {
    let policy = shipped("ValidatingAdmissionPolicy", "keystone-mesh-annotations");
    let spec = policy["spec"].to_string();
    let mut listed: Vec<&str> = spec.split('\'').filter_map(|text| text.strip_prefix(PREFIX)).collect();
    listed.retain(|name| !name.is_empty());
    let mut written: Vec<&str> = names(Writer::Node).collect();
    written.sort_unstable();
    assert_eq!(listed, written);
    assert!(spec.contains(&format!("<= {MAX_FACT}")), "no value may be longer than what readers take");
}

#[test]
fn an_agent_changes_its_own_record_and_nothing_else() {
    with_api_server("admission::an_agent_changes_its_own_record_and_nothing_else", Options::default(), |server| {
        world(server)?;
        let agent = server.service_account_on("worker-1", NAMESPACE, AGENT_ACCOUNT)?;
        let own = |patch| change(server, &agent, "worker-1", patch);

        // Its record it writes, key by key, by server-side apply, and takes it away.
        for key in names(Writer::Node) {
            own(annotate(key, "mine"))?;
            own(annotate(key, "m".repeat(MAX_FACT)))?;
        }
        server.with_client(&agent, async |client| {
            let mut record = annotate("seq", "2");
            record["apiVersion"] = "v1".into();
            record["kind"] = "Node".into();
            let params = PatchParams::apply(AGENT_MANAGER).force();
            let nodes = Api::<Node>::all(client);
            nodes.patch_metadata("worker-1", &params, &Patch::Apply(&record)).await?;
            Ok(())
        })?;
        own(annotate("signature", Value::Null))?;

        let nodes = "keystone-mesh-nodes";
        let keys = "keystone-mesh-annotations";
        for key in names(Writer::Controller).chain(names(Writer::Person)).chain(["of-a-later-version"]) {
            denied_by(keys, key, own(annotate(key, "mine")))?;
        }
        for key in names(Writer::Controller).chain(names(Writer::Person)) {
            denied_by(keys, key, own(annotate(key, Value::Null)))?;
        }
        denied_by(keys, "a value that no reader takes", own(annotate("endpoints", "e".repeat(MAX_FACT + 1))))?;
        let spec_and_metadata = [
            ("a label", json!({"metadata": {"labels": {"node-role.kubernetes.io/control-plane": ""}}})),
            ("no label", json!({"metadata": {"labels": {"example.org/zone": null}}})),
            ("an annotation of others", json!({"metadata": {"annotations": {"example.org/owner": "me"}}})),
            ("no annotation of others", json!({"metadata": {"annotations": {"example.org/owner": null}}})),
            ("another annotation", json!({"metadata": {"annotations": {"example.org/other": "me"}}})),
            ("a finalizer", json!({"metadata": {"finalizers": ["example.org/forever"]}})),
            (
                "an owner",
                json!({"metadata": {"ownerReferences": [
                    {"apiVersion": "v1", "kind": "Node", "name": "worker-2", "uid": "1-2-3"},
                ]}}),
            ),
            ("a taint", json!({"spec": {"taints": [{"key": "a", "effect": "NoExecute"}]}})),
            ("a cordon", json!({"spec": {"unschedulable": true}})),
            ("a pod network", json!({"spec": {"podCIDR": "10.42.9.0/24", "podCIDRs": ["10.42.9.0/24"]}})),
            ("a provider", json!({"spec": {"providerID": "keystone://home/elsewhere"}})),
        ];
        for (what, patch) in spec_and_metadata {
            denied_by(nodes, what, own(patch))?;
        }
        let address = json!({"status": {"addresses": [{"type": "InternalIP", "address": "10.98.0.1"}]}});
        denied_by(nodes, "an address", change_status(server, &agent, "worker-1", address))?;
        denied_by(nodes, "a record by status", change_status(server, &agent, "worker-1", annotate("seq", "9")))?;

        // Other nodes, and none at all.
        for key in names(Writer::Node) {
            denied_by(nodes, "another's record", change(server, &agent, "worker-2", annotate(key, "mine")))?;
            denied_by(nodes, "another's record", change(server, &agent, "worker-2", annotate(key, Value::Null)))?;
        }
        let whole = server.with_client(&agent, async |client| {
            let nodes = Api::<Node>::all(client.clone());
            let mut other = nodes.get("worker-1").await?;
            other.metadata.labels = None;
            let replaced = nodes.replace("worker-1", &PostParams::default(), &other).await.map(drop);
            let made = serde_json::from_value(json!({"metadata": {"name": "worker-3"}}))?;
            let made = nodes.create(&PostParams::default(), &made).await.map(drop);
            let deleted = nodes.delete("worker-2", &DeleteParams::default()).await.map(drop);
            let (all, every) = (ListParams::default(), DeleteParams::default());
            let emptied = nodes.delete_collection(&every, &all).await.map(drop);
            let proxied = http::Request::get("/api/v1/nodes/worker-2/proxy/pods").body(Vec::new())?;
            let proxied = client.request_text(proxied).await.map(drop);
            Ok([("replace", replaced), ("create", made), ("delete", deleted), ("empty", emptied), ("proxy", proxied)])
        })?;
        for (what, result) in whole {
            denied_by(nodes, what, result.map_err(Into::into))?;
        }

        // Machines that are no Nodes.
        let members = "keystone-mesh-members";
        let patch = json!({"spec": {"routes": ["10.0.0.0/8"]}});
        denied_by(members, "a Member's routes", change_member(server, &agent, "nas", patch))?;
        let made = server.with_client(&agent, async |client| {
            let member: Member = serde_json::from_value(json!({
                "apiVersion": "mesh.keystone.cluster/v1alpha1", "kind": "Member",
                "metadata": {"name": "friend"}, "spec": {"identity": "b".repeat(52)},
            }))?;
            let members = Api::<Member>::all(client);
            let made = members.create(&PostParams::default(), &member).await.map(drop);
            Ok([made, members.delete("nas", &DeleteParams::default()).await.map(drop)])
        })?;
        for result in made {
            denied_by(members, "a Member", result.map_err(Into::into))?;
        }

        // Without a node in its token it is nobody's agent.
        let unbound = server.service_account(NAMESPACE, AGENT_ACCOUNT)?;
        denied_by(nodes, "an unbound token", change(server, &unbound, "worker-1", annotate("seq", "3")))?;

        // Nothing of all this is anywhere.
        let left: Value = serde_json::from_str(&server.kubectl(&["get", "node", "worker-2", "--output", "json"])?)?;
        ensure!(left["metadata"]["annotations"] == annotations(), "worker-2 was changed: {left}");
        let left: Value = serde_json::from_str(&server.kubectl(&["get", "node", "worker-1", "--output", "json"])?)?;
        let tainted = left["spec"]["taints"].to_string().contains("NoExecute");
        ensure!(!tainted && left["status"].get("addresses").is_none(), "worker-1 was changed: {left}");
        Ok(())
    });
}

#[test]
fn the_gateway_publishes_for_every_node_and_approves_none() {
    with_api_server(
        "admission::the_gateway_publishes_for_every_node_and_approves_none",
        Options::default(),
        |server| {
            world(server)?;
            let gateway = server.service_account(NAMESPACE, GATEWAY_ACCOUNT)?;
            for node in ["worker-1", "worker-2"] {
                for key in names(Writer::Node) {
                    change(server, &gateway, node, annotate(key, "mirrored"))?;
                    change_member(server, &gateway, "nas", annotate(key, "mirrored"))?;
                }
                for key in names(Writer::Controller).chain(names(Writer::Person)) {
                    denied_by("keystone-mesh-annotations", key, change(server, &gateway, node, annotate(key, "mine")))?;
                }
                let label = json!({"metadata": {"labels": {"a": "b"}}});
                denied_by("keystone-mesh-nodes", "a label", change(server, &gateway, node, label))?;
            }
            for key in names(Writer::Controller) {
                let forged = change_member(server, &gateway, "nas", annotate(key, "mine"));
                denied_by("keystone-mesh-annotations", key, forged)?;
            }
            change_member(server, &gateway, "nas", json!({"spec": {"routes": ["10.7.0.0/16"]}}))?;

            // It lets machines and peers in, without their approval.
            let member = |annotations: Value| {
                json!({
                    "apiVersion": "mesh.keystone.cluster/v1alpha1", "kind": "Member",
                    "metadata": {"name": "joined", "annotations": annotations}, "spec": {"identity": "b".repeat(52)},
                })
            };
            let peer = |annotations: Value| {
                json!({
                    "apiVersion": "mesh.keystone.cluster/v1alpha1", "kind": "Peer",
                    "metadata": {"name": "phone", "annotations": annotations},
                    "spec": {"publicKey": "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="},
                })
            };
            let own = |key: &str| json!({format!("{PREFIX}{key}"): "mine"});
            server.with_client(&gateway, async |client| {
                let (members, peers) = (Api::<Member>::all(client.clone()), Api::<Peer>::all(client));
                let params = PostParams::default();
                let forged = members.create(&params, &serde_json::from_value(member(own("approved")))?).await;
                denied_by("keystone-mesh-annotations", "an approved Member", forged.map(drop).map_err(Into::into))?;
                members.create(&params, &serde_json::from_value(member(own("identity")))?).await?;
                for key in plain_peer::KEYS {
                    let forged = peers.create(&params, &serde_json::from_value(peer(own(key)))?).await;
                    denied_by("keystone-mesh-annotations", key, forged.map(drop).map_err(Into::into))?;
                }
                peers.create(&params, &serde_json::from_value(peer(json!({})))?).await?;
                Ok(())
            })
        },
    );
}

#[test]
fn kubelets_leave_the_annotations_of_the_mesh_alone_and_people_do_not_have_to() {
    let name = "admission::kubelets_leave_the_annotations_of_the_mesh_alone_and_people_do_not_have_to";
    with_api_server(name, Options::default(), |server| {
        world(server)?;
        let kubelet = server.user("system:node:worker-1", Some("system:nodes"))?;
        let keys = "keystone-mesh-annotations";
        for key in KEYS {
            denied_by(keys, key.name, change(server, &kubelet, "worker-1", annotate(key.name, "mine")))?;
            denied_by(keys, key.name, change(server, &kubelet, "worker-1", annotate(key.name, Value::Null)))?;
            denied_by(keys, key.name, change_status(server, &kubelet, "worker-1", annotate(key.name, "mine")))?;
        }
        // What a kubelet does all day goes on: registration, labels, annotations, status.
        change(server, &kubelet, "worker-1", json!({"metadata": {"annotations": {"example.org/other": "kubelet"}}}))?;
        let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
        change_status(server, &kubelet, "worker-1", ready)?;
        let fresh = server.user("system:node:fresh", Some("system:nodes"))?;
        server.with_client(&fresh, async |client| {
            let nodes = Api::<Node>::all(client);
            let forged = serde_json::from_value(node("fresh"))?;
            let forged = nodes.create(&PostParams::default(), &forged).await;
            denied_by(keys, "a Node that comes approved", forged.map(drop).map_err(Into::into))?;
            let bare = json!({"metadata": {"name": "fresh"}});
            nodes.create(&PostParams::default(), &serde_json::from_value(bare)?).await?;
            Ok(())
        })?;
        change_status(server, &fresh, "fresh", json!({"status": {"nodeInfo": {}}}))
            .or_else(|_incomplete| change_status(server, &fresh, "fresh", json!({"status": {"phase": "Running"}})))?;

        // People write wishes, and in an emergency anything.
        let person = server.user("somebody", Some("system:masters"))?;
        for key in KEYS {
            change(server, &person, "worker-2", annotate(key.name, "by hand"))?;
        }
        Ok(())
    });
}
