//! The life of a node, from its first record to the end of its Node.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;
use std::time::Instant;

use k8s_openapi::api::core::v1::{Node, NodeCondition, Taint};
use k8s_openapi::api::events::v1::Event;
use keystone_lab::wait;
use keystone_mesh_api::{JoinToken, Member, Peer, READY_CONDITION, STARTUP_TAINT};
use keystone_mesh_core::annotations;
use keystone_mesh_core::key::Secret;
use keystone_mesh_core::ledger::Holder;
use keystone_mesh_core::node::Approval;
use keystone_mesh_core::plain_peer::SignedPlainPeer;
use kube::api::{Api, ListParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::json;

use crate::world::{Machine, PATIENCE, POLL, create, delete, in_world};

const AUTO: &[&str] = &["--approval=auto"];

#[test]
fn a_node_is_approved_and_its_address_given_back_when_it_goes() {
    in_world("approval::a_node_is_approved_and_its_address_given_back_when_it_goes", |world| {
        let controller = world.controller("a", 9001, AUTO)?;
        let machines = Machine::many("w", 1);
        let machine = &machines[0];
        world.with_client(async |client| create(&client, &machines).await)?;
        let approvals = world.until_approved(&machines, PATIENCE)?;
        let approval = &approvals[machine.name()];
        assert_eq!((approval.identity, approval.addresses.len()), (machine.id(), 2));
        assert!(
            approval
                .addresses
                .iter()
                .all(|address| { world.network.prefixes().iter().any(|prefix| prefix.contains(address)) })
        );

        let node = world.with_client(async |client| Ok(Api::<Node>::all(client).get(machine.name()).await?))?;
        assert!(taints(&node).iter().any(|key| key == "someone.else/starting"), "{:?}", taints(&node));
        let managers = node.metadata.managed_fields.unwrap_or_default();
        assert!(managers.iter().any(|entry| entry.manager.as_deref() == Some("keystone-controller")));
        let told = world.until("an event tells of it", PATIENCE, async |client| {
            let events = Api::<Event>::namespaced(client.clone(), "default").list(&ListParams::default()).await?;
            let about = |event: &Event| event.regarding.as_ref().and_then(|object| object.name.clone());
            let approvals = |event: &Event| event.reason.as_deref() == Some("Approved");
            Ok(events.into_iter().find(|event| about(event).as_deref() == Some(machine.name()) && approvals(event)))
        })?;
        assert!(told.note.as_deref().is_some_and(|note| note.contains("10.98.")), "{:?}", told.note);

        world.with_client(async |client| delete(&client, &machines).await)?;
        world.until_approved(&[], PATIENCE)?;
        let holder = Holder::Node(machine.name().parse()?, machine.id());
        let ledger = world.with_client(async |client| world.ledger(&client).await)?;
        assert_eq!(ledger.held_by(&holder), None);

        // Nothing is left to do, so nothing is written: whatever was wanted before stands when a later Node, of which there
        // is nothing to say, has its taint.
        let writes = || world.server.metrics().map(|metrics| metrics.writes("nodes") + metrics.writes("configmaps"));
        let before = writes()?;
        world.with_client(async |client| {
            let later: Node = serde_json::from_value(json!({"metadata": {"name": "later"}}))?;
            Ok(Api::<Node>::all(client).create(&PostParams::default(), &later).await?)
        })?;
        world.until("the later Node has its taint", PATIENCE, async |client| {
            let node = Api::<Node>::all(client.clone()).get("later").await?;
            Ok(taints(&node).iter().any(|key| key == STARTUP_TAINT).then_some(()))
        })?;
        let written = wait::until("both writes are counted", PATIENCE, POLL, || {
            Ok(Some(writes()? - before).filter(|written| *written >= 2))
        })?;
        assert_eq!(written, 2);
        assert!(controller.process.terminate(PATIENCE)?.success());
        Ok(())
    });
}

#[test]
fn a_node_that_nobody_vouches_for_waits_for_a_person() {
    in_world("approval::a_node_that_nobody_vouches_for_waits_for_a_person", |world| {
        let _controller = world.controller("a", 9001, &[])?;
        let machines = Machine::many("w", 1);
        let machine = &machines[0];
        world.with_client(async |client| create(&client, &machines).await)?;
        let waiting = world.until("a condition says what to do", PATIENCE, async |client| {
            let node = Api::<Node>::all(client.clone()).get(machine.name()).await?;
            Ok(condition(&node, "MeshApproved").filter(|condition| condition.status == "False"))
        })?;
        assert_eq!(waiting.reason.as_deref(), Some("WaitingForApproval"));
        assert!(waiting.message.is_some_and(|message| message.contains("keystone-mesh approve w-0")));
        world.until_approved(&[], PATIENCE)?;

        let member = json!({"metadata": {"name": machine.name()}, "spec": {"identity": machine.id().to_string()}});
        world.with_client(async |client| {
            let member: Member = serde_json::from_value(member)?;
            Api::<Member>::all(client).create(&PostParams::default(), &member).await?;
            Ok(())
        })?;
        world.until_approved(&machines, PATIENCE)?;
        world.until("the Member's status tells of it", PATIENCE, async |client| {
            let status = Api::<Member>::all(client.clone()).get(machine.name()).await?.status.unwrap_or_default();
            let is = |kind: &str| status.conditions.iter().any(|one| one.type_ == kind && one.status == "True");
            Ok((is("Approved") && is("Node") && status.addresses.len() == 2).then_some(()))
        })?;

        world.with_client(async |client| delete(&client, &machines).await)?;
        world.until_approved(&[], PATIENCE)?;
        world.until("the Member went with its Node", PATIENCE, async |client| {
            let member = Api::<Member>::all(client.clone()).get_opt(machine.name()).await?;
            Ok(member.is_none().then_some(()))
        })?;
        Ok(())
    });
}

#[test]
fn a_token_lets_in_as_many_as_it_says() {
    in_world("approval::a_token_lets_in_as_many_as_it_says", |world| {
        let _controller = world.controller("a", 9001, &[])?;
        let token = "aaaaaaaaaaaaa";
        let machines = Machine::many("w", 3);
        world.with_client(async |client| {
            let made: JoinToken =
                serde_json::from_value(json!({"metadata": {"name": token}, "spec": {"hash": "h", "uses": 2}}))?;
            Api::<JoinToken>::all(client.clone()).create(&PostParams::default(), &made).await?;
            for machine in &machines {
                let member: Member = serde_json::from_value(json!({
                    "metadata": {"name": machine.name(), "annotations": annotations::of_record(&machine.record())},
                    "spec": {"identity": machine.id().to_string(), "token": token},
                }))?;
                Api::<Member>::all(client.clone()).create(&PostParams::default(), &member).await?;
            }
            Ok(())
        })?;
        let refused = world.until("two are in and one is not", PATIENCE, async |client| {
            let members = Api::<Member>::all(client.clone()).list(&ListParams::default()).await?;
            let (mut approved, mut refused) = (0, Vec::new());
            for member in members {
                let name = member.name_any().parse()?;
                approved += usize::from(annotations::approval(&name, member.annotations())?.is_some());
                let status = member.status.unwrap_or_default();
                refused.extend(
                    status.conditions.into_iter().filter(|one| one.type_ == "Approved" && one.status == "False"),
                );
            }
            Ok((approved == 2 && refused.len() == 1).then_some(refused))
        })?;
        assert!(refused[0].message.contains("used up"), "{refused:?}");
        let status = world.with_client(async |client| Ok(Api::<JoinToken>::all(client).get(token).await?.status))?;
        let status = status.unwrap();
        assert_eq!((status.used, status.joined.len()), (2, 2));

        // One of them becomes a Node: its approval is carried there, and costs no second use.
        let has_joined = |machine: &Machine| status.joined.contains(&machine.id().to_string());
        let joined: Vec<Machine> = machines.into_iter().filter(has_joined).take(1).collect();
        world.with_client(async |client| create(&client, &joined).await)?;
        world.until("the Node carries the approval", PATIENCE, async |client| {
            Ok(world.approvals(client).await?.remove(joined[0].name()))
        })?;
        let after = world.with_client(async |client| Ok(Api::<JoinToken>::all(client).get(token).await?.status))?;
        assert_eq!(after.unwrap(), status);
        Ok(())
    });
}

#[test]
fn a_node_that_peers_reach_is_ready_and_loses_its_startup_taint() {
    in_world("approval::a_node_that_peers_reach_is_ready_and_loses_its_startup_taint", |world| {
        let _controller = world.controller("a", 9001, &["--approval=auto", "--report-interval=1"])?;
        let home = Machine::new("home", 0);
        let worker = Machine::new("w", 0);
        world.with_client(async |client| {
            let mut node = home.node();
            node.labels_mut().insert("node-role.kubernetes.io/control-plane".into(), String::new());
            let nodes = Api::<Node>::all(client.clone());
            nodes.create(&PostParams::default(), &node).await?;
            nodes.create(&PostParams::default(), &worker.node()).await?;
            Ok(())
        })?;
        let approvals = world.until_approved(&[home.clone(), worker.clone()], PATIENCE)?;
        world.until("the startup taint is there", PATIENCE, async |client| {
            let node = Api::<Node>::all(client.clone()).get(worker.name()).await?;
            Ok(taints(&node).iter().any(|key| key == STARTUP_TAINT).then_some(()))
        })?;

        // The daemon of the control plane, as far as the controller asks it.
        let address = approvals[home.name()].addresses[0].addr();
        keystone_lab::tool::feed(
            Command::new("ip").args(["-batch", "-"]),
            &format!("address add {address}/32 dev lo\n"),
        )?;
        let listener = TcpListener::bind((address, 51842))?;
        let peers = json!({"node": home.name(), "peers": [{"name": worker.name(), "path": "relayed"}]}).to_string();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                let _ = stream.read(&mut [0; 1024]);
                let _ = write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{peers}", peers.len());
            }
        });
        let node = world.until("it is ready and the taint is lifted", PATIENCE, async |client| {
            let node = Api::<Node>::all(client.clone()).get(worker.name()).await?;
            let ready = condition(&node, READY_CONDITION).is_some_and(|condition| condition.status == "True");
            Ok((ready && !taints(&node).iter().any(|key| key == STARTUP_TAINT)).then_some(node))
        })?;
        assert!(taints(&node).iter().any(|key| key == "someone.else/starting"), "{:?}", taints(&node));
        Ok(())
    });
}

#[test]
fn a_machine_that_its_autoscaler_took_is_out_while_its_node_is_still_there() {
    in_world("approval::a_machine_that_its_autoscaler_took_is_out_while_its_node_is_still_there", |world| {
        let machines = Machine::many("w", 3);
        let claims = [
            json!({
                "apiVersion": "karpenter.sh/v1", "kind": "NodeClaim", "metadata": {"name": "claim"},
                "status": {"nodeName": machines[0].name(), "providerID": "aws:///z/i-1"},
            }),
            json!({
                "apiVersion": "cluster.x-k8s.io/v1beta1", "kind": "Machine",
                "metadata": {"name": "claim", "namespace": "default"},
                "spec": {"providerID": "hcloud://1"}, "status": {"nodeRef": {"name": machines[1].name()}},
            }),
        ];
        world.server.apply(&autoscalers_resource("karpenter.sh", "v1", "NodeClaim", "Cluster"))?;
        world.server.apply(&autoscalers_resource("cluster.x-k8s.io", "v1beta1", "Machine", "Namespaced"))?;
        world.server.kubectl(&["wait", "--for=condition=Established", "--timeout=30s", "crd", "--all"])?;
        let controller = world.controller("a", 9001, AUTO)?;
        for resource in ["nodeclaims.karpenter.sh", "machines.cluster.x-k8s.io"] {
            controller.until_logged(&format!("autoscaler resource={resource}"), PATIENCE)?;
        }
        for claim in &claims {
            world.server.apply(&claim.to_string())?;
        }
        world.with_client(async |client| create(&client, &machines).await)?;
        world.until_approved(&machines, PATIENCE)?;
        for (machine, kind) in machines.iter().zip(["nodeclaim", "machine.cluster.x-k8s.io"]) {
            let deleted = Instant::now();
            world.server.kubectl(&["delete", kind, "claim"])?;
            world.until("its approval is taken back", PATIENCE, async |client| {
                let approval = world.approvals(client).await?.remove(machine.name());
                Ok(approval.filter(Approval::is_revoked))
            })?;
            println!("{kind}: out {:?} after it went", deleted.elapsed());
            let holder = Holder::Node(machine.name().parse()?, machine.id());
            world.until("its address is given back", PATIENCE, async |client| {
                Ok(world.ledger(client).await?.held_by(&holder).is_none().then_some(()))
            })?;
        }
        let left = world.with_client(async |client| world.approvals(&client).await)?;
        assert!(!left[machines[2].name()].is_revoked(), "the others stay");
        Ok(())
    });
}

/// A stand-in for the resource that an autoscaler brings.
fn autoscalers_resource(group: &str, version: &str, kind: &str, scope: &str) -> String {
    let singular = kind.to_lowercase();
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{singular}s.{group}"),
            "annotations": {"api-approved.kubernetes.io": "unapproved, a stand-in"},
        },
        "spec": {
            "group": group, "scope": scope,
            "names": {"kind": kind, "plural": format!("{singular}s"), "singular": singular},
            "versions": [{
                "name": version, "served": true, "storage": true,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}},
            }],
        },
    })
    .to_string()
}

#[test]
fn pod_cidrs_are_approved_an_overlap_names_both_sides_and_a_raw_node_is_initialised() {
    let name = "approval::pod_cidrs_are_approved_an_overlap_names_both_sides_and_a_raw_node_is_initialised";
    in_world(name, |world| {
        let _controller = world.controller("a", 9001, &["--approval=auto", "--node-init"])?;
        let machines = Machine::many("w", 2);
        let (uninitialized, cidr) = ("node.cloudprovider.kubernetes.io/uninitialized", "10.42.1.0/24");
        let pods = async |client: &Client, machine: &Machine| {
            let approval = world.approvals(client).await?.remove(machine.name());
            anyhow::Ok(approval.map(|approval| approval.pod_cidrs).unwrap_or_default())
        };
        let create = |machine: &Machine| {
            let mut node = machine.node();
            let spec = node.spec.get_or_insert_default();
            spec.pod_cidrs = Some(vec![cidr.to_owned()]);
            spec.taints.get_or_insert_default().push(Taint {
                key: uninitialized.to_owned(),
                effect: "NoSchedule".to_owned(),
                ..Taint::default()
            });
            world.with_client(async |client| Ok(Api::<Node>::all(client).create(&PostParams::default(), &node).await?))
        };
        create(&machines[0])?;
        world.until("its podCIDR is approved", PATIENCE, async |client| {
            Ok((pods(client, &machines[0]).await? == [cidr.parse()?]).then_some(()))
        })?;
        create(&machines[1])?;
        let refused = world.until("the overlap is refused", PATIENCE, async |client| {
            let node = Api::<Node>::all(client.clone()).get(machines[1].name()).await?;
            Ok(condition(&node, "MeshRoutes").filter(|condition| condition.status == "False"))
        })?;
        let message = refused.message.unwrap_or_default();
        assert_eq!(refused.reason.as_deref(), Some("RouteOverlap"));
        assert!(message.contains(cidr) && message.contains(machines[0].name()), "{message}");

        let node = world.until("it is initialised", PATIENCE, async |client| {
            let node = Api::<Node>::all(client.clone()).get(machines[1].name()).await?;
            Ok((!taints(&node).iter().any(|key| key == uninitialized)).then_some(node))
        })?;
        let label = |name: &str| node.labels().get(&format!("topology.kubernetes.io/{name}")).map(String::as_str);
        assert_eq!((label("region"), label("zone")), (Some("home"), Some("home")));
        let id = node.spec.as_ref().and_then(|spec| spec.provider_id.as_deref());
        assert_eq!(id, Some("keystone://home/w-1"));
        let addresses = node.status.and_then(|status| status.addresses).unwrap_or_default();
        assert!(
            addresses.iter().any(|one| one.type_ == "InternalIP" && one.address.starts_with("10.98.")),
            "{addresses:?}"
        );

        // When the first one goes, the other has it.
        world.with_client(async |client| delete(&client, &machines[..1]).await)?;
        world.until("it is the other's", PATIENCE, async |client| {
            Ok((pods(client, &machines[1]).await? == [cidr.parse()?]).then_some(()))
        })
    });
}

#[test]
fn a_plain_peer_is_served_by_its_node() {
    in_world("approval::a_plain_peer_is_served_by_its_node", |world| {
        let _controller = world.controller("a", 9001, AUTO)?;
        let machines = Machine::many("home", 1);
        world.with_client(async |client| create(&client, &machines).await)?;
        world.until_approved(&machines, PATIENCE)?;
        let key = Secret::from_bytes([77; 32]).wireguard(0).public_key();
        world.server.apply(
            &json!({
                "apiVersion": "mesh.keystone.cluster/v1alpha1", "kind": "Peer", "metadata": {"name": "phone"},
                "spec": {"publicKey": key.to_string(), "node": machines[0].name()},
            })
            .to_string(),
        )?;
        let statement = world.until("it is stated and ready", PATIENCE, async |client| {
            let peer = Api::<Peer>::all(client.clone()).get("phone").await?;
            let statement = SignedPlainPeer::from_annotations(&"phone".parse()?, peer.annotations())?;
            let status = peer.status.unwrap_or_default();
            let ready = status.conditions.iter().any(|one| one.type_ == "Ready" && one.status == "True");
            Ok(statement.filter(|_| ready))
        })?;
        let stated = statement.get();
        assert_eq!((stated.network, stated.public_key), (world.key.id(), key));
        let leads = async |client: &Client| {
            let approvals = world.approvals(client).await?;
            let routes = &approvals[machines[0].name()].routes;
            anyhow::Ok(stated.addresses.iter().all(|address| routes.contains(address)))
        };
        assert!(world.with_client(async |client| leads(&client).await)?);

        world.server.kubectl(&["delete", "peers.mesh.keystone.cluster", "phone"])?;
        world.until("no route leads to it", PATIENCE, async |client| Ok((!leads(client).await?).then_some(())))?;
        world.until_approved(&machines, PATIENCE)?;
        Ok(())
    });
}

fn taints(node: &Node) -> Vec<String> {
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    taints.map(|taint| taint.key.clone()).collect()
}

fn condition(node: &Node, kind: &str) -> Option<NodeCondition> {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().find(|condition| condition.type_ == kind).cloned()
}
