//! Feeds the view: from watches, and from the API server's answers to our own writes.
//!
//! An answer is fed at once, so that a decision never waits for the watch to bring what is known already, and never
//! repeats a write because a cache is behind. Then two sources tell of one object, and the version keeps their order:
//! what is older than what is known is left out. What says nothing else than before (a kubelet's heartbeat, another
//! controller's annotation) is left out too, and wakes nobody.

use std::collections::{BTreeMap, BTreeSet};

use keystone_mesh_core::NodeId;
use kube::api::ObjectMeta;

use crate::metrics::{self, Metrics};
use crate::view::{CloudClaim, CloudKind, ClusterView, Kind, Now, Report, Settings};
use crate::watch::{Change, Object, Update};

/// The view, and which version of each object it shows.
#[derive(Debug)]
pub struct Index {
    view: ClusterView,
    known: BTreeMap<Kind, BTreeMap<String, Known>>,
    /// Names seen by a list that is under way.
    listing: BTreeMap<Kind, BTreeSet<String>>,
    metrics: Metrics,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    uid: String,
    /// `metadata.resourceVersion`, whose order is that of the changes (KEP-5504); 0 where it is no number.
    version: u64,
    digest: Option<u64>,
    /// Whether an answer told of it, which a list may not know of yet.
    answered: bool,
}

impl Index {
    /// An empty view.
    pub fn new(network: NodeId, settings: Settings, metrics: Metrics) -> Self {
        Self { view: ClusterView::new(network, settings), known: BTreeMap::new(), listing: BTreeMap::new(), metrics }
    }

    /// What is known.
    pub fn view(&self) -> &ClusterView {
        &self.view
    }

    /// A watch saw something. Says whether the view changed.
    pub fn handle_update(&mut self, update: Update, now: Now) -> bool {
        let Update { kind, change } = update;
        match change {
            Change::Listing => {
                self.listing.insert(kind, BTreeSet::new());
                false
            }
            Change::Set(object) => self.handle_object(kind, object),
            Change::Deleted { name } => self.handle_deleted(kind, &name, now),
            Change::Listed => self.handle_listed(kind, now),
            Change::Malformed { name, why } => {
                tracing::warn!(
                    resource = kind.label(),
                    name,
                    why,
                    "an object does not read and is left as it was known"
                );
                self.metrics.malformed.get_or_create(&metrics::Resource::of(kind.label())).inc();
                // It exists: that it does not read is no reason to think it gone.
                if let Some(listing) = self.listing.get_mut(&kind) {
                    listing.insert(name);
                }
                false
            }
        }
    }

    /// The API server answered a write of ours with the object as it stands. One that is not known any longer, or not
    /// by this uid, went in the meantime; only a page of the ledger is fed that was not known before: we made it.
    pub fn handle_answer(&mut self, object: Object) -> bool {
        let (kind, meta) = identify(&object);
        let name = key_of(kind, meta);
        let new = known_of(meta, None, true);
        let known = self.known.get(&kind).and_then(|known| known.get(&name));
        let fits = known.map_or(kind == Kind::LedgerPage, |known| known.uid == new.uid && known.version < new.version);
        if !fits {
            return false;
        }
        if let Some(listing) = self.listing.get_mut(&kind) {
            listing.insert(name);
        }
        self.feed(kind, object, true)
    }

    /// An object turned out to be gone.
    pub fn handle_deleted(&mut self, kind: Kind, name: &str, now: Now) -> bool {
        let was_known = self.known.entry(kind).or_default().remove(name).is_some();
        if was_known {
            self.view.handle_deleted(kind, name, now);
        }
        self.count(kind);
        was_known
    }

    /// This replica has become the leader.
    pub fn handle_leading(&mut self, now: Now) {
        self.view.handle_leading(now);
    }

    /// A reporter answered.
    pub fn handle_report(&mut self, report: Report) {
        self.view.handle_report(report);
    }

    fn handle_object(&mut self, kind: Kind, object: Object) -> bool {
        let (_, meta) = identify(&object);
        let name = key_of(kind, meta);
        let new = known_of(meta, None, false);
        let listing = self.listing.get_mut(&kind).map(|listing| listing.insert(name.clone())).is_some();
        if let Some(known) = self.known.get(&kind).and_then(|known| known.get(&name))
            && known.uid == new.uid
        {
            // A list is the truth even where its versions run backwards, as after a restored backup; an answer of ours
            // may be younger than a list that was under way.
            let older =
                if listing { known.answered && new.version < known.version } else { new.version < known.version };
            if older || new.version == known.version {
                return false;
            }
        }
        self.feed(kind, object, false)
    }

    fn handle_listed(&mut self, kind: Kind, now: Now) -> bool {
        let names = self.listing.remove(&kind).unwrap_or_default();
        self.known.entry(kind).or_default().retain(|name, _| names.contains(name));
        self.view.handle_listed(kind, &names, now);
        self.count(kind);
        true
    }

    fn feed(&mut self, kind: Kind, object: Object, answered: bool) -> bool {
        let (_, meta) = identify(&object);
        let name = key_of(kind, meta);
        let digest = if let Object::Node(node) = &object { Some(node.digest()) } else { None };
        let known = known_of(meta, digest, answered);
        let before = self.known.entry(kind).or_default().insert(name, known);
        self.count(kind);
        if digest.is_some() && before.is_some_and(|before| before.digest == digest) {
            return false;
        }
        match object {
            Object::Node(node) => self.view.handle_node(&node.0),
            Object::Member(member) => self.view.handle_member(&member),
            Object::Peer(peer) => self.view.handle_peer(&peer),
            Object::Token(token) => self.view.handle_token(&token),
            Object::Page(page) => self.view.handle_page(&page),
            Object::Network(document) => self.view.handle_network(&document),
            Object::Claim(cloud, claim) => match CloudClaim::parse(cloud, &claim) {
                Ok(claim) => self.view.handle_claim(claim),
                Err(error) => {
                    tracing::warn!(resource = kind.label(), name = ?claim.metadata.name, %error, "an object does not read");
                    self.metrics.malformed.get_or_create(&metrics::Resource::of(kind.label())).inc();
                    return false;
                }
            },
        }
        true
    }

    fn count(&self, kind: Kind) {
        let count = self.known.get(&kind).map_or(0, BTreeMap::len);
        self.metrics.objects.get_or_create(&metrics::Resource::of(kind.label())).set(count as i64);
    }
}

fn identify(object: &Object) -> (Kind, &ObjectMeta) {
    match object {
        Object::Node(node) => (Kind::Node, &node.0.metadata),
        Object::Member(member) => (Kind::Member, &member.metadata),
        Object::Peer(peer) => (Kind::Peer, &peer.metadata),
        Object::Token(token) => (Kind::JoinToken, &token.metadata),
        Object::Page(page) => (Kind::LedgerPage, &page.metadata),
        Object::Network(document) => (Kind::Network, &document.metadata),
        Object::Claim(CloudKind::NodeClaim, claim) => (Kind::NodeClaim, &claim.metadata),
        Object::Claim(CloudKind::Machine, claim) => (Kind::Machine, &claim.metadata),
    }
}

/// The name under which an object is known: NodeClaims and Machines with their namespace, where they have one.
pub(crate) fn key_of(kind: Kind, meta: &ObjectMeta) -> String {
    let name = meta.name.clone().unwrap_or_default();
    match (&meta.namespace, kind) {
        (Some(namespace), Kind::NodeClaim | Kind::Machine) => format!("{namespace}/{name}"),
        (Some(_) | None, _) => name,
    }
}

fn known_of(meta: &ObjectMeta, digest: Option<u64>, answered: bool) -> Known {
    let version = meta.resource_version.as_deref().and_then(|version| version.parse().ok());
    Known { uid: meta.uid.clone().unwrap_or_default(), version: version.unwrap_or(0), digest, answered }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;
    use keystone_mesh_api::{LEDGER_PREFIX, Member};
    use keystone_mesh_core::key::Secret;
    use serde_json::json;

    use super::*;
    use crate::slim::SlimNode;

    fn index() -> Index {
        Index::new(Secret::from_bytes([1; 32]).identity().id(), Settings::default(), Metrics::default())
    }

    fn node(uid: &str, version: u64, label: &str) -> Object {
        let node: SlimNode = serde_json::from_value(json!({
            "metadata": {
                "name": "w1", "uid": uid, "resourceVersion": version.to_string(), "labels": {"l": label},
                "creationTimestamp": "2026-01-01T00:00:00Z",
            },
        }))
        .unwrap();
        Object::Node(Box::new(node))
    }

    fn page(version: u64) -> Object {
        let name = format!("{LEDGER_PREFIX}0");
        let page: ConfigMap =
            serde_json::from_value(json!({"metadata": {"name": name, "resourceVersion": version.to_string()}}))
                .unwrap();
        Object::Page(Box::new(page))
    }

    fn set(object: Object) -> Update {
        Update { kind: identify(&object).0, change: Change::Set(object) }
    }

    fn node_update(change: Change) -> Update {
        Update { kind: Kind::Node, change }
    }

    fn names(index: &Index, kind: Kind) -> Vec<String> {
        index.known.get(&kind).map(|known| known.keys().cloned().collect()).unwrap_or_default()
    }

    #[test]
    fn what_says_nothing_else_wakes_nobody() {
        let mut index = index();
        assert!(index.handle_update(set(node("u", 1, "a")), 0));
        assert!(!index.handle_update(set(node("u", 2, "a")), 0));
        assert!(index.handle_update(set(node("u", 3, "b")), 0));
    }

    #[test]
    fn an_answer_is_known_before_the_watch_brings_it_and_the_watch_does_not_undo_it() {
        let mut index = index();
        index.handle_update(set(node("u", 1, "a")), 0);
        assert!(index.handle_answer(node("u", 5, "c")));
        assert!(!index.handle_update(set(node("u", 3, "b")), 0), "older than the answer");
        assert!(!index.handle_update(set(node("u", 5, "c")), 0), "the same");
        assert!(index.handle_update(set(node("u", 6, "d")), 0));
    }

    #[test]
    fn an_answer_brings_nothing_back_that_went() {
        let mut index = index();
        index.handle_update(set(node("u", 1, "a")), 0);
        index.handle_update(node_update(Change::Deleted { name: "w1".into() }), 0);
        assert!(!index.handle_answer(node("u", 2, "b")));
        index.handle_update(set(node("v", 4, "a")), 0);
        assert!(!index.handle_answer(node("u", 5, "b")), "the Node of that name is another");
        assert_eq!(names(&index, Kind::Node), ["w1"]);
    }

    #[test]
    fn what_a_list_does_not_name_is_gone() {
        let mut index = index();
        index.handle_update(set(node("u", 1, "a")), 0);
        index.handle_update(node_update(Change::Listing), 0);
        index.handle_update(node_update(Change::Listed), 0);
        assert!(names(&index, Kind::Node).is_empty());
    }

    #[test]
    fn a_page_that_was_written_during_a_list_is_not_gone() {
        let mut index = index();
        index.handle_update(Update { kind: Kind::LedgerPage, change: Change::Listing }, 0);
        assert!(index.handle_answer(page(7)));
        index.handle_update(Update { kind: Kind::LedgerPage, change: Change::Listed }, 0);
        assert_eq!(names(&index, Kind::LedgerPage).len(), 1);
    }

    #[test]
    fn a_list_of_a_restored_backup_counts_though_its_versions_are_older() {
        let mut index = index();
        index.handle_update(set(node("u", 100, "a")), 0);
        assert!(!index.handle_update(set(node("u", 50, "b")), 0));
        index.handle_update(node_update(Change::Listing), 0);
        assert!(index.handle_update(set(node("u", 50, "b")), 0));
        index.handle_update(node_update(Change::Listed), 0);
        assert!(index.handle_update(set(node("u", 51, "c")), 0));
    }

    #[test]
    fn an_object_that_does_not_read_is_not_thought_gone() {
        let mut index = index();
        let member: Member =
            serde_json::from_value(json!({"metadata": {"name": "m", "uid": "u"}, "spec": {"identity": "x"}})).unwrap();
        index.handle_update(set(Object::Member(Box::new(member))), 0);
        let update = |change| Update { kind: Kind::Member, change };
        index.handle_update(update(Change::Listing), 0);
        index.handle_update(update(Change::Malformed { name: "m".into(), why: "bad".into() }), 0);
        index.handle_update(update(Change::Listed), 0);
        assert_eq!(names(&index, Kind::Member), ["m"]);
    }
}
