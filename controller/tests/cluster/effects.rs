//! Every effect as the API server carries it out, and what its refusals are taken for.

use std::time::Instant;

use anyhow::{Context, Result};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Node, NodeAddress, NodeCondition, Taint};
use keystone_controller::apply::{Applied, Applier};
use keystone_controller::decide::{Effect, Target};
use keystone_controller::lease::{self, Leadership, Replica};
use keystone_controller::queue::Outcome;
use keystone_mesh_api::{
    JoinToken, JoinTokenStatus, LEADER_LEASE, LEDGER_LABEL, Member, MemberStatus, NAMESPACE, Peer, PeerStatus,
};
use keystone_mesh_core::annotations;
use keystone_mesh_core::directory::Carrier;
use keystone_mesh_core::key::Secret;
use keystone_mesh_core::ledger::PageEdit;
use keystone_mesh_core::node::Approval;
use keystone_mesh_core::plain_peer::{PlainPeer, SignedPlainPeer};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::world::{PATIENCE, in_world, until};

const IDENTITY: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

/// A client, and an applier that leads.
struct Stage {
    client: Client,
    applier: Applier,
    _stop: watch::Sender<bool>,
}

impl Stage {
    async fn new(client: Client) -> Result<Self> {
        let leadership = Leadership::new();
        let key = Secret::from_bytes([1; 32]).identity();
        let applier = Applier::new(client.clone(), NAMESPACE.into(), key, leadership.clone());
        let early = applier.apply(page(9, None)).await;
        assert_eq!(early.outcome, Outcome::Dropped, "nothing is sent before it leads");
        let (stop, stopped) = watch::channel(false);
        let leases = Api::<Lease>::namespaced(client.clone(), NAMESPACE);
        let leads = leadership.clone();
        tokio::spawn(async move {
            lease::run(leases, LEADER_LEASE, Replica { name: "stage".into(), place: None }, &leads, stopped).await
        });
        until("it leads", PATIENCE, async || Ok(leadership.holds(Instant::now()).then_some(()))).await?;
        Ok(Self { client, applier, _stop: stop })
    }

    async fn apply(&self, effect: Effect) -> Applied {
        self.applier.apply(effect).await
    }

    async fn done(&self, effect: Effect) {
        let Applied { outcome, object, error, .. } = self.apply(effect).await;
        assert_eq!((outcome, error), (Outcome::Done, None));
        assert!(object.is_some(), "the answer shows the object");
    }

    async fn not_done(&self, effect: Effect, wanted: Outcome) {
        let Applied { outcome, error, .. } = self.apply(effect).await;
        assert_eq!(outcome, wanted, "{error:?}");
    }

    async fn create<K>(&self, object: Value) -> Result<Target>
    where
        K: kube::Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned + Serialize,
    {
        let made =
            Api::<K>::all(self.client.clone()).create(&PostParams::default(), &serde_json::from_value(object)?).await?;
        Ok(Target { name: made.name_any().parse()?, uid: made.uid().context("a uid")? })
    }

    async fn node(&self, name: &str) -> Result<Node> {
        Ok(Api::<Node>::all(self.client.clone()).get(name).await?)
    }
}

fn page(number: u32, resource_version: Option<String>) -> Effect {
    let edit = PageEdit { page: number, data: [("1".to_owned(), "x".to_owned())].into() };
    Effect::Ledger { edit, resource_version }
}

fn another(target: &Target) -> Target {
    Target { uid: "00000000-0000-0000-0000-000000000000".into(), ..target.clone() }
}

fn taint(key: &str) -> Taint {
    Taint { key: key.into(), effect: "NoSchedule".into(), ..Taint::default() }
}

#[test]
fn pages_are_written_over_what_was_read_only() {
    in_world("effects::pages_are_written_over_what_was_read_only", |world| {
        world.with_client(async |client| {
            let stage = Stage::new(client).await?;
            stage.done(page(0, None)).await;
            stage.not_done(page(0, None), Outcome::Conflict).await;
            stage.not_done(page(0, Some("1".into())), Outcome::Conflict).await;
            stage.not_done(page(1, Some("1".into())), Outcome::Gone).await;
            let maps = Api::<ConfigMap>::namespaced(stage.client.clone(), NAMESPACE);
            let stored = maps.get("keystone-mesh-addresses-0").await?;
            assert_eq!(stored.labels()[LEDGER_LABEL], "0");
            stage.done(page(0, stored.resource_version())).await;
            Ok(())
        })
    });
}

#[test]
fn a_nodes_parts_are_changed_without_harm_to_others() {
    in_world("effects::a_nodes_parts_are_changed_without_harm_to_others", |world| {
        let approval = |serial| {
            Box::new(Approval {
                network: world.key.id(),
                name: "w1".parse().unwrap(),
                identity: Secret::from_bytes([2; 32]).identity().id(),
                addresses: vec!["10.98.0.2/32".parse().unwrap()],
                routes: vec!["10.42.0.0/24".parse().unwrap()],
                pod_cidrs: vec![],
                endpoints: vec![],
                relays: vec![],
                location: None,
                serial,
            })
        };
        world.with_client(async |client| {
            let stage = Stage::new(client).await?;
            let target = stage
                .create::<Node>(json!({
                    "metadata": {"name": "w1", "annotations": {"mesh.keystone.cluster/routes": "forged", "other": "x"}},
                    "status": {"conditions": [{"type": "Ready", "status": "True"}]},
                }))
                .await?;

            // Approvals: forced over whatever stands there, never for another Node, and no Node comes of it.
            let approve =
                |target: Target, serial| Effect::Approve { carrier: Carrier::Node, target, approval: approval(serial) };
            stage.done(approve(target.clone(), 1)).await;
            stage.done(approve(target.clone(), 2)).await;
            stage.not_done(approve(another(&target), 3), Outcome::Conflict).await;
            let nobody = Target { name: "nobody".parse()?, uid: target.uid.clone() };
            stage.not_done(approve(nobody, 3), Outcome::Conflict).await;
            assert!(stage.node("nobody").await.is_err());
            let node = stage.node("w1").await?;
            let signed = annotations::approval(&target.name, node.annotations())?.context("an approval")?;
            assert_eq!(*signed.get(), *approval(2));
            assert_eq!(node.annotations()["other"], "x");

            // Taints: only over what was seen.
            let taints = |target: &Target, seen: &[&str], wanted: &[&str]| Effect::NodeTaints {
                target: target.clone(),
                seen: seen.iter().map(|key| taint(key)).collect(),
                wanted: wanted.iter().map(|key| taint(key)).collect(),
            };
            let nodes = Api::<Node>::all(stage.client.clone());
            let patch = Patch::Merge(json!({"spec": {"taints": null}}));
            nodes.patch("w1", &PatchParams::default(), &patch).await?;
            let (ours, theirs) = ("readiness.k8s.io/keystone-mesh", "someone.else/x");
            stage.done(taints(&target, &[], &[ours])).await;
            let both = [ours, theirs];
            let patch = Patch::Merge(json!({"spec": {"taints": both.map(taint)}}));
            nodes.patch("w1", &PatchParams::default(), &patch).await?;
            stage.not_done(taints(&target, &[ours], &[]), Outcome::Conflict).await;
            stage.not_done(taints(&target, &[], &[ours]), Outcome::Conflict).await;
            stage.not_done(taints(&another(&target), &both, &[]), Outcome::Conflict).await;
            stage.done(taints(&target, &both, &[theirs])).await;
            assert_eq!(stage.node("w1").await?.spec.unwrap().taints.unwrap(), [taint(theirs)]);
            stage.done(taints(&target, &[theirs], &[])).await;
            stage.done(taints(&target, &[], &[ours])).await;

            // Conditions, labels, addresses.
            let condition = |status: &str| NodeCondition {
                type_: "MeshReady".into(),
                status: status.into(),
                reason: Some("Reached".into()),
                ..NodeCondition::default()
            };
            let conditions =
                |target: Target, status: &str| Effect::NodeConditions { target, conditions: vec![condition(status)] };
            stage.done(conditions(target.clone(), "True")).await;
            stage.done(conditions(target.clone(), "False")).await;
            stage.not_done(conditions(another(&target), "True"), Outcome::Conflict).await;
            let init = |provider: &str| Effect::NodeInit {
                target: target.clone(),
                labels: [("topology.kubernetes.io/zone".to_owned(), "z".to_owned())].into(),
                provider_id: Some(provider.into()),
            };
            stage.done(init("aws:///z/i-1")).await;
            stage.not_done(init("aws:///z/i-2"), Outcome::Refused).await;
            let address = NodeAddress { type_: "InternalIP".into(), address: "10.98.0.2".into() };
            stage.done(Effect::NodeAddresses { target: target.clone(), addresses: vec![address.clone()] }).await;
            let node = stage.node("w1").await?;
            assert_eq!(node.labels()["topology.kubernetes.io/zone"], "z");
            let status = node.status.unwrap();
            assert_eq!(status.addresses.unwrap(), [address]);
            let told: Vec<(String, String)> =
                status.conditions.unwrap().into_iter().map(|one| (one.type_, one.status)).collect();
            assert_eq!(told.len(), 2);
            assert!(told.contains(&("MeshReady".into(), "False".into())), "{told:?}");
            Ok(())
        })
    });
}

#[test]
fn custom_resources_are_changed_under_their_preconditions() {
    in_world("effects::custom_resources_are_changed_under_their_preconditions", |world| {
        world.with_client(async |client| {
            let stage = Stage::new(client.clone()).await?;
            let member =
                stage.create::<Member>(json!({"metadata": {"name": "m1"}, "spec": {"identity": IDENTITY}})).await?;
            let status = |target: Target, addresses: &[&str]| Effect::MemberStatus {
                target,
                status: MemberStatus {
                    addresses: addresses.iter().map(ToString::to_string).collect(),
                    ..MemberStatus::default()
                },
            };
            stage.done(status(member.clone(), &["10.98.0.2"])).await;
            stage.done(status(member.clone(), &[])).await;
            stage.not_done(status(another(&member), &["10.98.0.3"]), Outcome::Conflict).await;
            let stored = Api::<Member>::all(client.clone()).get("m1").await?;
            assert_eq!(stored.status.unwrap_or_default().addresses, Vec::<String>::new());
            stage.not_done(Effect::DeleteMember { target: another(&member) }, Outcome::Conflict).await;
            let deleted = stage.apply(Effect::DeleteMember { target: member.clone() }).await;
            assert_eq!(deleted.outcome, Outcome::Done);
            stage.not_done(Effect::DeleteMember { target: member.clone() }, Outcome::Gone).await;
            stage.not_done(status(member, &[]), Outcome::Gone).await;

            let key = Secret::from_bytes([3; 32]).wireguard(0).public_key();
            let peer = stage
                .create::<Peer>(json!({"metadata": {"name": "p1"}, "spec": {"publicKey": key.to_string()}}))
                .await?;
            let stated = PlainPeer {
                network: world.key.id(),
                name: peer.name.clone(),
                node: "home".parse()?,
                public_key: key,
                addresses: vec!["10.98.0.9/32".parse()?],
                routes: vec![],
                endpoint: None,
                persistent_keepalive: Some(25),
                serial: 1,
            };
            stage.done(Effect::StatePeer { target: peer.clone(), peer: Box::new(stated.clone()) }).await;
            let status = PeerStatus { node: Some("home".into()), ..PeerStatus::default() };
            stage.done(Effect::PeerStatus { target: peer.clone(), status }).await;
            let stored = Api::<Peer>::all(client.clone()).get("p1").await?;
            let signed = SignedPlainPeer::from_annotations(&peer.name, stored.annotations())?.context("a statement")?;
            assert_eq!(*signed.get(), stated);
            assert_eq!(stored.status.unwrap().node.as_deref(), Some("home"));

            let name = "aaaaaaaaaaaaa";
            stage.create::<JoinToken>(json!({"metadata": {"name": name}, "spec": {"hash": "h", "uses": 2}})).await?;
            let tokens = Api::<JoinToken>::all(client.clone());
            let used = |resource_version: Option<String>, used: u32, joined: &[&str]| Effect::TokenStatus {
                name: name.into(),
                resource_version: resource_version.unwrap(),
                status: JoinTokenStatus { used, joined: joined.iter().map(ToString::to_string).collect() },
            };
            let first = tokens.get(name).await?.resource_version();
            stage.done(used(first.clone(), 1, &["w1"])).await;
            stage.not_done(used(first, 1, &["w2"]), Outcome::Conflict).await;
            let second = tokens.get(name).await?;
            assert_eq!(second.status.as_ref().unwrap().joined, ["w1"]);
            stage.done(used(second.resource_version(), 0, &[])).await;
            assert_eq!(tokens.get(name).await?.status.unwrap(), JoinTokenStatus::default());
            Ok(())
        })
    });
}
