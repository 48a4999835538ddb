//! The controller with the very account, role and policies that deploy/ ships, and a worker that went bad.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, NodeAddress, NodeCondition, Taint};
use keystone_controller::apply::Applier;
use keystone_controller::decide::{Effect, Event, Regarding, Target};
use keystone_controller::events::Recorder;
use keystone_controller::lease::{self, Leadership, Replica};
use keystone_controller::metrics::Metrics;
use keystone_controller::queue::Outcome;
use keystone_controller::watch as watches;
use keystone_kubelab::{Access, ApiServer, Options, with_api_server};
use keystone_mesh_api::{
    AGENT_ACCOUNT, CONTROLLER_ACCOUNT, JoinToken, JoinTokenStatus, LEADER_LEASE, Member, MemberStatus, NAMESPACE, Peer,
    PeerStatus,
};
use keystone_mesh_core::annotations::{self, PREFIX, Writer};
use keystone_mesh_core::directory::{Carrier, Directory, Object};
use keystone_mesh_core::ledger::PageEdit;
use keystone_mesh_core::node::{Approval, Entry, NodeName};
use keystone_mesh_core::plain_peer::PlainPeer;
use keystone_mesh_core::plan::{Plan, plan};
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use serde::de::DeserializeOwned;
use serde::{Deserialize as _, Serialize};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::world::{Machine, PATIENCE, World, create_all, until};

/// What deploy/ ships.
const MANIFESTS: &str = include_str!("../../../deploy/manifests/keystone-mesh.yaml");

/// Kinds that autoscalers would bring.
const AUTOSCALERS: [(&str, &str, &str, &str); 2] =
    [("karpenter.sh", "v1", "NodeClaim", "nodeclaims"), ("cluster.x-k8s.io", "v1beta1", "Machine", "machines")];

fn definition((group, version, kind, plural): (&str, &str, &str, &str)) -> String {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{plural}.{group}"),
            "annotations": {"api-approved.kubernetes.io": "unapproved, for a test"},
        },
        "spec": {
            "group": group, "scope": "Cluster",
            "names": {"kind": kind, "plural": plural, "singular": kind.to_lowercase()},
            "versions": [{
                "name": version, "served": true, "storage": true,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}},
            }],
        },
    })
    .to_string()
}

/// Every object of the manifests.
fn shipped() -> Vec<Value> {
    let documents = serde_yaml_ng::Deserializer::from_str(MANIFESTS);
    documents.map(|document| Value::deserialize(document).unwrap()).filter(|object| !object.is_null()).collect()
}

/// What the controller's roles grant: verb and resource, with its subresource.
fn granted() -> BTreeSet<(String, String)> {
    let mut granted = BTreeSet::new();
    let roles = shipped().into_iter().filter(|object| {
        ["ClusterRole", "Role"].iter().any(|kind| object["kind"] == *kind)
            && object["metadata"]["name"] == CONTROLLER_ACCOUNT
    });
    for rule in roles.flat_map(|role| role["rules"].as_array().cloned().unwrap()) {
        for verb in rule["verbs"].as_array().unwrap() {
            for resource in rule["resources"].as_array().unwrap() {
                granted.insert((verb.as_str().unwrap().to_owned(), resource.as_str().unwrap().to_owned()));
            }
        }
    }
    granted
}

/// What the account asked for, from the audit. An error where it was refused.
fn asked(server: &ApiServer) -> Result<BTreeSet<(String, String)>> {
    let user = format!("system:serviceaccount:{NAMESPACE}:{CONTROLLER_ACCOUNT}");
    let mut asked = BTreeSet::new();
    for event in server.audit()? {
        if event["user"]["username"] != user.as_str() {
            continue;
        }
        ensure!(event["responseStatus"]["code"] != 403, "it was refused: {event}");
        let (verb, object) = (event["verb"].as_str().unwrap_or_default(), &event["objectRef"]);
        let Some(resource) = object["resource"].as_str() else { continue };
        let subresource = object["subresource"].as_str().map(|name| format!("/{name}")).unwrap_or_default();
        asked.insert((verb.to_owned(), format!("{resource}{subresource}")));
    }
    Ok(asked)
}

#[test]
fn the_controllers_role_is_what_it_asks_for() {
    let options = Options { audit: true, ..Options::default() };
    with_api_server("accounts::the_controllers_role_is_what_it_asks_for", options, |server| {
        for autoscaler in AUTOSCALERS {
            server.apply(&definition(autoscaler))?;
        }
        let world = World::new(server)?;
        world.server.apply(MANIFESTS)?;
        let account = world.server.service_account(NAMESPACE, CONTROLLER_ACCOUNT)?;
        let admin = world.server.admin().clone();
        // Both clients in one world; what is made is made by a person.
        let made = world.server.with_client(&admin, async |client| Objects::make(client).await)?;
        world.server.with_client(&account, async |client| everything(client, &world, made).await)
    });
}

/// What the effects are about.
struct Objects {
    node: Target,
    member: Target,
    peer: Target,
    token_version: String,
}

impl Objects {
    const TOKEN: &'static str = "aaaaaaaaaaaaa";

    async fn make(client: Client) -> Result<Self> {
        let (name, identity) = (json!({"name": "w1"}), "a".repeat(52));
        let key = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
        let token = json!({"metadata": {"name": Self::TOKEN}, "spec": {"hash": "h", "uses": 2}});
        make::<JoinToken>(&client, token).await?;
        let token = Api::<JoinToken>::all(client.clone()).get(Self::TOKEN).await?;
        Ok(Self {
            node: make::<Node>(&client, json!({"metadata": name})).await?,
            member: make::<Member>(&client, json!({"metadata": name, "spec": {"identity": identity}})).await?,
            peer: make::<Peer>(&client, json!({"metadata": {"name": "p1"}, "spec": {"publicKey": key}})).await?,
            token_version: token.resource_version().context("a version")?,
        })
    }
}

async fn make<K>(client: &Client, object: Value) -> Result<Target>
where
    K: kube::Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned + Serialize,
{
    let object = serde_json::from_value(object)?;
    let made = Api::<K>::all(client.clone()).create(&PostParams::default(), &object).await?;
    Ok(Target { name: made.name_any().parse()?, uid: made.uid().context("a uid")? })
}

/// Everything that a controller ever does to the API server, once.
async fn everything(client: Client, world: &World<'_>, made: Objects) -> Result<()> {
    let metrics = Metrics::default();
    let (_watching, mut updates) = watches::start(&client, NAMESPACE, 60, &metrics);
    tokio::spawn(async move { while updates.recv().await.is_some() {} });

    let leadership = Leadership::new();
    let (_stop, stopped) = watch::channel(false);
    let (leads, leases) = (leadership.clone(), Api::<Lease>::namespaced(client.clone(), NAMESPACE));
    tokio::spawn(async move {
        lease::run(leases, LEADER_LEASE, Replica { name: "test".into(), place: None }, &leads, stopped).await
    });
    until("it leads", PATIENCE, async || Ok(leadership.holds(Instant::now()).then_some(()))).await?;

    let applier = Applier::new(client.clone(), NAMESPACE.into(), world.key.clone(), leadership.clone());
    let Objects { node, member, peer, token_version } = made;
    let page = |resource_version| Effect::Ledger {
        edit: PageEdit { page: 0, data: [("1".to_owned(), "x".to_owned())].into() },
        resource_version,
    };
    let approval = || {
        Box::new(Approval {
            network: world.key.id(),
            name: "w1".parse().expect("a node name"),
            identity: Machine::new("w", 1).id(),
            addresses: vec![],
            routes: vec![],
            pod_cidrs: vec![],
            endpoints: vec![],
            relays: vec![],
            location: None,
            serial: 1,
        })
    };
    let statement = Box::new(PlainPeer {
        network: world.key.id(),
        name: peer.name.clone(),
        node: "w1".parse()?,
        public_key: "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=".parse()?,
        addresses: vec![],
        routes: vec![],
        endpoint: None,
        persistent_keepalive: None,
        serial: 1,
    });
    let taint = Taint { key: "a/b".into(), effect: "NoSchedule".into(), ..Taint::default() };
    let condition = NodeCondition { type_: "MeshReady".into(), status: "True".into(), ..NodeCondition::default() };
    let address = NodeAddress { type_: "InternalIP".into(), address: "10.98.0.2".into() };
    let seen = Api::<Node>::all(client.clone());
    // Taints that admission itself has put there.
    let seen = seen.list(&ListParams::default()).await?.items.remove(0).spec.and_then(|spec| spec.taints);
    let effects = [
        page(None),
        page(Some("1".into())),
        Effect::Approve { carrier: Carrier::Node, target: node.clone(), approval: approval() },
        Effect::Approve { carrier: Carrier::Member, target: member.clone(), approval: approval() },
        Effect::NodeConditions { target: node.clone(), conditions: vec![condition] },
        Effect::NodeTaints { target: node.clone(), seen: seen.unwrap_or_default(), wanted: vec![taint] },
        Effect::NodeInit { target: node.clone(), labels: BTreeMap::new(), provider_id: Some("keystone://h/w1".into()) },
        Effect::NodeAddresses { target: node.clone(), addresses: vec![address] },
        Effect::StatePeer { target: peer.clone(), peer: statement },
        Effect::PeerStatus { target: peer, status: PeerStatus::default() },
        Effect::MemberStatus { target: member.clone(), status: MemberStatus::default() },
        Effect::TokenStatus {
            name: Objects::TOKEN.into(),
            resource_version: token_version,
            status: JoinTokenStatus { used: 1, joined: vec!["w1".into()] },
        },
        Effect::DeleteMember { target: member },
    ];
    for effect in effects {
        let what = format!("{effect:?}");
        let applied = applier.apply(effect).await;
        // The page's version is not the one that it has.
        let fits = matches!(applied.outcome, Outcome::Done | Outcome::Conflict);
        ensure!(fits, "{what}: {:?} {:?}", applied.outcome, applied.error);
    }

    let recorder = Recorder::start(client, "test".into(), metrics);
    let event = Event {
        regarding: Regarding::Node,
        name: "w1".into(),
        uid: node.uid,
        warning: false,
        reason: "Approved",
        note: "of a test".into(),
    };
    recorder.record(event.clone());
    recorder.record(event);
    // The lease is renewed and the second event counted while this goes on.
    until("it asked for all that it may", PATIENCE, async || Ok((asked(world.server)? == granted()).then_some(())))
        .await
        .with_context(|| format!("asked: {:?}\ngranted: {:?}", asked(world.server), granted()))
}

/// What a reader makes of the network, and what it would do.
struct Reader {
    me: keystone_mesh_core::NodeId,
    directory: Directory,
}

impl Reader {
    fn new(world: &World<'_>, me: &Machine) -> Self {
        Self { me: me.id(), directory: Directory::new(world.key.id(), vec![], vec![]) }
    }

    /// Looks at every Node as it stands.
    fn look(&mut self, world: &World<'_>) -> Result<Plan> {
        let nodes = world.with_client(async |client| {
            Ok(Api::<Node>::all(client).list_metadata(&ListParams::default()).await?.items)
        })?;
        let objects = nodes
            .into_iter()
            .map(|node| Object { name: node.name_any(), annotations: node.metadata.annotations.unwrap_or_default() });
        let objects: Vec<Object> = objects.collect();
        self.directory.handle_listed(Carrier::Node, &objects);
        Ok(self.plan(world))
    }

    fn plan(&self, world: &World<'_>) -> Plan {
        let entries: BTreeMap<NodeName, Entry> =
            self.directory.entries().map(|entry| (entry.name().clone(), entry.clone())).collect();
        let mut plan = plan(self.me, &world.network, &entries, &BTreeMap::new());
        // What is left out is told, and is no part of what is done.
        plan.faults.clear();
        plan
    }
}

/// Everything that was an annotation of the contract goes; this comes.
async fn overwrite(client: &Client, node: &str, with: &BTreeMap<String, String>) -> Result<()> {
    let all = annotations::KEYS.iter().map(|key| (format!("{PREFIX}{}", key.name), Value::Null));
    let mut patch: serde_json::Map<String, Value> = all.collect();
    patch.extend(with.iter().map(|(key, value)| (key.clone(), value.clone().into())));
    let patch = Patch::Merge(json!({"metadata": {"annotations": patch}}));
    Api::<Node>::all(client.clone()).patch(node, &PatchParams::default(), &patch).await?;
    Ok(())
}

#[test]
fn whoever_writes_on_every_node_changes_nothing_for_anybody() {
    let name = "accounts::whoever_writes_on_every_node_changes_nothing_for_anybody";
    with_api_server(name, Options::default(), |server| {
        let world = World::new(server)?;
        // No policy holds, and the worker's account may do everything to Nodes.
        let mut objects = shipped();
        objects.retain(|object| object["apiVersion"] != "admissionregistration.k8s.io/v1");
        world.server.apply(&json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string())?;
        world.server.kubectl(&["create", "clusterrole", "all", "--verb=*", "--resource=nodes,nodes/status"])?;
        let subject = format!("--serviceaccount={NAMESPACE}:{AGENT_ACCOUNT}");
        world.server.kubectl(&["create", "clusterrolebinding", "all", "--clusterrole=all", &subject])?;
        let account = world.server.service_account(NAMESPACE, CONTROLLER_ACCOUNT)?;
        let controller = world.controller_as(&account, "a", 9001, &["--approval=auto", "--pod-cidrs=10.42.0.0/16"])?;
        controller.until_leading(PATIENCE)?;

        let machines = Machine::many("w", 4);
        // Each has networks behind it.
        let node = |machine: &Machine| {
            let mut node = machine.node();
            let number = machines.iter().position(|other| other.name() == machine.name()).unwrap_or_default();
            node.spec.get_or_insert_default().pod_cidrs = Some(vec![format!("10.42.{number}.0/24")]);
            node
        };
        world.with_client(async |client| create_all(&client, &machines, node).await)?;
        let approvals = world.until("all are approved with their pods", PATIENCE, async |client| {
            let approvals = world.approvals(client).await?;
            let complete = |machine: &Machine| {
                approvals.get(machine.name()).is_some_and(|a| !a.addresses.is_empty() && a.pod_cidrs.len() == 1)
            };
            Ok(machines.iter().all(complete).then_some(approvals))
        })?;
        let [bad, victim, reader, other] = &machines[..] else { unreachable!("there are four") };
        let mut reader = Reader::new(&world, reader);
        let before = reader.look(&world)?;
        ensure!(before.members.len() == 3, "{before:?}");

        let agent = world.server.service_account_on(bad.name(), NAMESPACE, AGENT_ACCOUNT)?;
        for (what, node, forged) in forgeries(&world, bad, victim, other)? {
            attack(&world, &agent, node, &forged)?;
            let seen = reader.look(&world)?;
            ensure!(seen == before, "{what}: a reader now wants {seen:?} instead of {before:?}");
            // The approval comes back as it was, but for its serial; until then the last good one counts.
            world
                .until(&format!("{what}: it is put right"), PATIENCE, async |client| {
                    let node_now = Api::<Node>::all(client.clone()).get_metadata(node).await?;
                    let (name, wanted) = (node.parse()?, &approvals[node]);
                    let Ok(Some(found)) = annotations::approval(&name, node_now.annotations()) else { return Ok(None) };
                    let found_nets = (&found.get().addresses, &found.get().routes, &found.get().pod_cidrs);
                    let same = found_nets == (&wanted.addresses, &wanted.routes, &wanted.pod_cidrs);
                    ensure!(found.get().network != world.key.id() || same, "{what}: approved was {:?}", found.get());
                    Ok((found.get().network == world.key.id() && found.get().identity == wanted.identity).then_some(()))
                })
                .with_context(|| controller.process.log_tail(20))?;
            let seen = reader.look(&world)?;
            ensure!(seen == before, "{what}: afterwards a reader wants {seen:?} instead of {before:?}");
            // The victim's daemon puts its record back, which is not played here.
            let record = machines.iter().find(|machine| machine.name() == node).context("a machine")?.record();
            world.with_client(async |client| {
                let patch = json!({
                    "apiVersion": "v1", "kind": "Node",
                    "metadata": {"name": node, "annotations": annotations::of_record(&record)},
                });
                let params = PatchParams::apply("test").force();
                Ok(Api::<Node>::all(client).patch_metadata(node, &params, &Patch::Apply(patch)).await.map(drop)?)
            })?;
        }
        world.until_approved(&machines, PATIENCE)?;
        // Somebody who comes fresh, with no memory, sees the same.
        let fresh = Reader::new(&world, &machines[2]).look(&world)?;
        ensure!(fresh == before, "{fresh:?}");
        Ok(())
    });
}

fn attack(world: &World<'_>, agent: &Access, node: &str, forged: &BTreeMap<String, String>) -> Result<()> {
    world.server.with_client(agent, async |client| overwrite(&client, node, forged).await)
}

type Forgery<'a> = (&'static str, &'a str, BTreeMap<String, String>);

/// What `bad` can write with all that it knows: its own secret, and everything that stands on Nodes.
fn forgeries<'a>(
    world: &World<'_>,
    bad: &'a Machine,
    victim: &'a Machine,
    other: &'a Machine,
) -> Result<Vec<Forgery<'a>>> {
    let stands = |machine: &Machine| {
        world.with_client(async |client| {
            Ok(Api::<Node>::all(client).get_metadata(machine.name()).await?.metadata.annotations.unwrap_or_default())
        })
    };
    let (own, theirs, others) = (stands(bad)?, stands(victim)?, stands(other)?);
    let with = |base: &BTreeMap<String, String>, keys: &[(&str, String)]| {
        let mut changed = base.clone();
        changed.extend(keys.iter().map(|(key, value)| (format!("{PREFIX}{key}"), value.clone())));
        changed
    };
    let of = |all: &BTreeMap<String, String>, key: &str| all[&format!("{PREFIX}{key}")].clone();
    let approved: BTreeSet<String> =
        annotations::names(Writer::Controller).map(|name| format!("{PREFIX}{name}")).collect();
    let splice = |record: &BTreeMap<String, String>, approval: &BTreeMap<String, String>| {
        let mut spliced = record.clone();
        spliced.retain(|key, _| !approved.contains(key));
        spliced.extend(approval.iter().filter(|(key, _)| approved.contains(*key)).map(|(k, v)| (k.clone(), v.clone())));
        spliced
    };
    // By its own identity, as if that were the network.
    let true_one = annotations::approval(&victim.name().parse()?, &theirs)?.context("an approval")?;
    let self_signed = Approval { network: bad.id(), ..true_one.get().clone() }.sign(bad.identity());
    let self_signed = annotations::of_approval(&self_signed);
    Ok(vec![
        ("nothing is left on it", victim.name(), BTreeMap::new()),
        ("its own record and approval on another's Node", victim.name(), own.clone()),
        ("its own record under another's approval", victim.name(), splice(&own, &theirs)),
        ("another key", victim.name(), with(&theirs, &[("public-key", of(&own, "public-key"))])),
        ("another endpoint", victim.name(), with(&theirs, &[("endpoints", "host 192.0.2.66:51840".into())])),
        ("a higher sequence number", victim.name(), with(&theirs, &[("seq", "99".into())])),
        (
            "garbage",
            victim.name(),
            annotations::KEYS.iter().map(|key| (format!("{PREFIX}{}", key.name), "\u{0}∞".into())).collect(),
        ),
        ("another's addresses for itself", bad.name(), with(&own, &[("addresses", of(&theirs, "addresses"))])),
        ("everything as its route", bad.name(), with(&own, &[("routes", "0.0.0.0/0,::/0".into())])),
        ("another's pods for itself", bad.name(), with(&own, &[("pod-cidrs", of(&theirs, "pod-cidrs"))])),
        ("another's approval for itself", bad.name(), splice(&own, &theirs)),
        ("all of another for itself", bad.name(), others.clone()),
        ("an approval of its own making", victim.name(), splice(&theirs, &self_signed)),
        ("an approval of its own making, for itself", bad.name(), splice(&own, &self_signed)),
    ])
}
