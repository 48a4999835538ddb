//! A cluster in the hand: objects, one controller that follows them, a clock.

use std::collections::BTreeMap;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{ConfigMap, Node, NodeCondition, NodeSpec, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta};
use keystone_mesh_api::{JoinToken, JoinTokenSpec, Member, MemberSpec, Peer, PeerSpec};
use keystone_mesh_core::annotations::{self, PREFIX, Writer};
use keystone_mesh_core::ledger::Ledger;
use keystone_mesh_core::network::{DEFAULT_IPV4, Network, default_ipv6};
use keystone_mesh_core::node::{Approval, NodeRecord, SignedApproval};
use keystone_mesh_core::path::Nat;
use keystone_mesh_core::plain_peer::SignedPlainPeer;
use keystone_mesh_core::{NodeId, Secret};

use super::model::{Api, Watcher};
use crate::decide::{Action, Decision, Event, conditions, reconcile};
use crate::view::{ClusterView, Now, Reach, Report, Settings};

pub(super) const START: Now = 1_795_500_000_000;
pub(super) const SECOND: Now = 1000;
pub(super) const MINUTE: Now = 60 * SECOND;

/// The secret of the machine `byte`; number 1 is the control plane's own.
pub(super) fn secret(byte: u8) -> Secret {
    Secret::from_bytes([byte; 32])
}

pub(super) fn id(byte: u8) -> NodeId {
    secret(byte).identity().id()
}

pub(super) fn relay() -> NodeId {
    id(200)
}

pub(super) fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

pub(super) fn record(name: &str, byte: u8) -> NodeRecord {
    NodeRecord {
        name: name.parse().unwrap(),
        identity: id(byte),
        public_key: secret(byte).wireguard(0).public_key(),
        endpoints: vec!["host 192.0.2.7:51840".parse().unwrap()],
        nat: Nat::Unknown,
        relays: vec![relay()],
        routes: vec![],
        seq: 1,
    }
}

pub(super) fn network_document() -> ConfigMap {
    let document = Network {
        id: id(1),
        ipv4: DEFAULT_IPV4.parse().unwrap(),
        ipv6: default_ipv6(id(1)),
        relays: vec![format!("{}@relay.example.org:51840", relay()).parse().unwrap()],
        gateways: vec![],
        serial: 1,
    };
    let metadata = ObjectMeta { name: Some("keystone-mesh-network".to_owned()), ..ObjectMeta::default() };
    let data = Some(document.sign(&secret(1).identity()).unwrap().to_map());
    ConfigMap { metadata, data, ..ConfigMap::default() }
}

pub(super) struct World {
    pub(super) api: Api,
    pub(super) controller: Watcher,
    pub(super) now: Now,
}

impl World {
    pub(super) fn new(settings: Settings) -> Self {
        let api = Api::new(network_document());
        let mut controller = Watcher::new(ClusterView::new(id(1), settings));
        controller.view.handle_leading(START - MINUTE);
        Self { api, controller, now: START }
    }

    /// With the startup taint off, for tests about other things.
    pub(super) fn plain() -> Self {
        Self::new(Settings { startup_taint: false, ..Settings::default() })
    }

    pub(super) fn auto() -> Self {
        let policy = crate::view::Policy::Auto;
        Self::new(Settings { startup_taint: false, policy, ..Settings::default() })
    }

    /// A controller that starts anew: it knows only what is stored.
    pub(super) fn restart(&mut self) {
        let settings = self.controller.view.settings().clone();
        self.controller = Watcher::new(ClusterView::new(id(1), settings));
        self.controller.view.handle_leading(self.now);
    }

    // --- what people and machines do ---

    pub(super) fn node(&mut self, name: &str) {
        let metadata = self.api.meta(name, self.now);
        let spec = NodeSpec { provider_id: Some(format!("test://{name}")), ..NodeSpec::default() };
        self.api.nodes.insert(name.to_owned(), Node { metadata, spec: Some(spec), status: None });
    }

    /// The machine `byte` publishes its record on the Node, or on the Member where there is no Node.
    pub(super) fn publish(&mut self, name: &str, byte: u8) {
        self.publish_record(record(name, byte), byte);
    }

    pub(super) fn publish_record(&mut self, record: NodeRecord, byte: u8) {
        let name = record.name.to_string();
        let facts = annotations::of_record(&record.sign(&secret(byte).identity()));
        self.annotate(&name, &facts, Writer::Node);
    }

    /// Whoever may patch Nodes replaces all annotations of a writer.
    pub(super) fn annotate(&mut self, name: &str, facts: &BTreeMap<String, String>, writer: Writer) {
        let set = |stored: &mut Option<BTreeMap<String, String>>| {
            let stored = stored.get_or_insert_default();
            annotations::names(writer).for_each(|key| drop(stored.remove(&format!("{PREFIX}{key}"))));
            stored.extend(facts.clone());
        };
        if self.api.nodes.contains_key(name) {
            self.api.edit_node(name, |node| set(&mut node.metadata.annotations));
        } else {
            self.api.edit_member(name, |member| set(&mut member.metadata.annotations));
        }
    }

    pub(super) fn wish(&mut self, name: &str, key: &str, value: &str) {
        let (key, value) = (format!("{PREFIX}{key}"), value.to_owned());
        self.api.edit_node(name, |node| drop(node.metadata.annotations.get_or_insert_default().insert(key, value)));
    }

    pub(super) fn pods(&mut self, name: &str, cidrs: &[&str]) {
        let cidrs = cidrs.iter().map(|cidr| (*cidr).to_owned()).collect();
        self.api.edit_node(name, |node| node.spec.get_or_insert_default().pod_cidrs = Some(cidrs));
    }

    pub(super) fn label(&mut self, name: &str, key: &str, value: &str) {
        let (key, value) = (key.to_owned(), value.to_owned());
        self.api.edit_node(name, |node| drop(node.metadata.labels.get_or_insert_default().insert(key, value)));
    }

    /// A person vouches for a machine, as `keystone-mesh approve` does.
    pub(super) fn vouch(&mut self, name: &str, byte: u8) {
        self.member(name, MemberSpec { identity: id(byte).to_string(), ..MemberSpec::default() });
    }

    pub(super) fn join(&mut self, name: &str, byte: u8, token: &str) {
        let spec = MemberSpec { identity: id(byte).to_string(), token: Some(token.to_owned()), routes: vec![] };
        self.member(name, spec);
        if !self.api.nodes.contains_key(name) {
            self.publish(name, byte);
        }
    }

    pub(super) fn member(&mut self, name: &str, spec: MemberSpec) {
        let metadata = self.api.meta(name, self.now);
        self.api.members.insert(name.to_owned(), Member { metadata, spec, status: None });
    }

    pub(super) fn token(&mut self, name: &str, edit: impl FnOnce(&mut JoinTokenSpec)) {
        let mut spec = JoinTokenSpec { hash: "hash".to_owned(), ..JoinTokenSpec::default() };
        edit(&mut spec);
        let metadata = self.api.meta(name, self.now);
        self.api.tokens.insert(name.to_owned(), JoinToken { metadata, spec, status: None });
    }

    pub(super) fn peer(&mut self, name: &str, byte: u8, edit: impl FnOnce(&mut PeerSpec)) {
        let public_key = secret(byte).wireguard(0).public_key().to_string();
        let mut spec = PeerSpec { public_key, ..PeerSpec::default() };
        edit(&mut spec);
        let metadata = self.api.meta(name, self.now);
        self.api.peers.insert(name.to_owned(), Peer { metadata, spec, status: None });
    }

    /// A Node with its record and a person's word for it.
    pub(super) fn approved(&mut self, name: &str, byte: u8) {
        self.node(name);
        self.publish(name, byte);
        self.vouch(name, byte);
        self.settle();
        assert!(self.is_in(name), "{name} is approved");
    }

    /// The control plane's own host, whose identity is the network's key.
    pub(super) fn home(&mut self) {
        self.node("home");
        self.label("home", "node-role.kubernetes.io/control-plane", "true");
        self.publish("home", 1);
        self.settle();
        assert!(self.is_in("home"));
    }

    /// What a reporter says of others.
    pub(super) fn report(&mut self, reporter: &str, peers: &[(&str, Reach)]) {
        let peers = peers.iter().map(|(name, reach)| (name.parse().unwrap(), *reach)).collect();
        self.controller.view.handle_report(Report { reporter: reporter.parse().unwrap(), at: self.now, peers });
    }

    // --- the controller ---

    pub(super) fn decide(&mut self) -> Decision {
        self.controller.follow(&self.api, self.now, |_, _| true);
        let decision = reconcile(&self.controller.view, self.now);
        assert_eq!(decision, reconcile(&self.controller.view, self.now), "the same view gives the same decision");
        decision
    }

    pub(super) fn apply(&mut self, actions: &[Action]) -> Vec<Event> {
        let key = secret(1).identity();
        let mut events = Vec::new();
        for action in actions {
            self.api.apply(action, &key, self.now).unwrap_or_else(|why| panic!("{action:?}: {why:?}"));
            events.extend(action.events.clone());
        }
        events
    }

    /// Decides and applies until there is nothing to do. What was told on the way.
    pub(super) fn settle(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        for _ in 0..12 {
            let actions = self.decide().actions;
            if actions.is_empty() {
                return events;
            }
            events.extend(self.apply(&actions));
        }
        panic!("does not settle: {:#?}", self.decide().actions);
    }

    pub(super) fn pass(&mut self, time: Now) {
        self.now += time;
    }

    // --- what is there ---

    pub(super) fn annotations(&self, name: &str) -> BTreeMap<String, String> {
        let node = self.api.nodes.get(name).map(|node| &node.metadata);
        let meta = node.or_else(|| self.api.members.get(name).map(|member| &member.metadata));
        meta.and_then(|meta| meta.annotations.clone()).unwrap_or_default()
    }

    pub(super) fn signed_approval(&self, name: &str) -> Option<SignedApproval> {
        annotations::approval(&name.parse().unwrap(), &self.annotations(name)).ok().flatten()
    }

    pub(super) fn approval(&self, name: &str) -> Option<Approval> {
        self.signed_approval(name).map(|signed| signed.get().clone())
    }

    pub(super) fn is_in(&self, name: &str) -> bool {
        self.approval(name).is_some_and(|approval| !approval.is_revoked())
    }

    pub(super) fn address(&self, name: &str) -> String {
        self.approval(name)
            .and_then(|approval| Some(approval.addresses.first()?.addr().to_string()))
            .unwrap_or_default()
    }

    pub(super) fn routes(&self, name: &str) -> Vec<String> {
        self.approval(name).unwrap().routes.iter().map(ToString::to_string).collect()
    }

    pub(super) fn pod_cidrs(&self, name: &str) -> Vec<String> {
        self.approval(name).unwrap().pod_cidrs.iter().map(ToString::to_string).collect()
    }

    pub(super) fn statement(&self, name: &str) -> Option<SignedPlainPeer> {
        let annotations = self.api.peers[name].metadata.annotations.clone().unwrap_or_default();
        SignedPlainPeer::from_annotations(&name.parse().unwrap(), &annotations).unwrap()
    }

    pub(super) fn condition(&self, node: &str, type_: &str) -> Option<NodeCondition> {
        let conditions = self.api.nodes[node].status.clone().unwrap_or_default().conditions.unwrap_or_default();
        conditions.into_iter().find(|condition| condition.type_ == type_)
    }

    /// `STATUS/REASON` of a Node's condition.
    pub(super) fn says(&self, node: &str, type_: &str) -> String {
        self.condition(node, type_)
            .map_or_else(String::new, |c| format!("{}/{}", c.status, c.reason.unwrap_or_default()))
    }

    /// `STATUS/REASON` of a Member's condition.
    pub(super) fn member_says(&self, name: &str, type_: &str) -> String {
        said(&self.api.members[name].status.clone().unwrap_or_default().conditions, type_)
    }

    /// `STATUS/REASON` of a Peer's condition.
    pub(super) fn peer_says(&self, name: &str, type_: &str) -> String {
        said(&self.api.peers[name].status.clone().unwrap_or_default().conditions, type_)
    }

    pub(super) fn taints(&self, node: &str) -> Vec<String> {
        let spec = self.api.nodes[node].spec.clone().unwrap_or_default();
        spec.taints.unwrap_or_default().into_iter().map(|taint| taint.key).collect()
    }

    pub(super) fn taint(&mut self, node: &str, key: &str) {
        let taint = Taint { key: key.to_owned(), effect: "NoSchedule".to_owned(), ..Taint::default() };
        self.api.edit_node(node, |node| node.spec.get_or_insert_default().taints.get_or_insert_default().push(taint));
    }

    pub(super) fn ledger(&self) -> Ledger {
        self.controller.view.ledger().clone()
    }
}

fn said(conditions: &[Condition], type_: &str) -> String {
    let found = conditions.iter().find(|condition| condition.type_ == type_);
    found.map_or_else(String::new, |condition| format!("{}/{}", condition.status, condition.reason))
}

/// The reasons of events, in order.
pub(super) fn reasons(events: &[Event]) -> Vec<&'static str> {
    events.iter().map(|event| event.reason).collect()
}

pub(super) fn time(at: Now) -> k8s_openapi::apimachinery::pkg::apis::meta::v1::Time {
    conditions::time(at)
}
