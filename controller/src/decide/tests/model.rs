//! The API server as far as decisions can tell: objects, versions, uids, compare and swap.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{ConfigMap, Node, NodeCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use keystone_mesh_api::{JoinToken, LEDGER_PREFIX, Member, Peer};
use keystone_mesh_core::Identity;
use keystone_mesh_core::annotations::{self, PREFIX, Writer};
use keystone_mesh_core::directory::Carrier;
use keystone_mesh_core::node::SignedApproval;
use keystone_mesh_core::plain_peer;
use kube::Resource;

use crate::decide::{Action, Effect, Target, conditions};
use crate::view::{CloudClaim, CloudKind, ClusterView, Kind, Now};

/// Everything that is stored.
#[derive(Clone, Debug, Default)]
pub(super) struct Api {
    pub(super) nodes: BTreeMap<String, Node>,
    pub(super) members: BTreeMap<String, Member>,
    pub(super) peers: BTreeMap<String, Peer>,
    pub(super) tokens: BTreeMap<String, JoinToken>,
    pub(super) pages: BTreeMap<String, ConfigMap>,
    pub(super) network: Option<ConfigMap>,
    pub(super) claims: BTreeMap<(CloudKind, String), CloudClaim>,
    version: u64,
    uids: u64,
}

/// Why a write was not done; the driver tries again from the next view.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    Conflict,
    NotFound,
}

impl Api {
    pub(super) fn new(network: ConfigMap) -> Self {
        Self { network: Some(network), ..Self::default() }
    }

    pub(super) fn meta(&mut self, name: &str, now: Now) -> ObjectMeta {
        self.uids += 1;
        ObjectMeta {
            name: Some(name.to_owned()),
            uid: Some(format!("uid-{}", self.uids)),
            resource_version: Some(self.next_version()),
            creation_timestamp: Some(conditions::time(now)),
            annotations: Some(BTreeMap::new()),
            labels: Some(BTreeMap::new()),
            ..ObjectMeta::default()
        }
    }

    /// Marks an object as changed.
    pub(super) fn touch(&mut self, meta: impl FnOnce(&mut Self) -> &mut ObjectMeta) {
        let version = self.next_version();
        meta(self).resource_version = Some(version);
    }

    pub(super) fn edit_node(&mut self, name: &str, edit: impl FnOnce(&mut Node)) {
        edit(self.nodes.get_mut(name).expect("the node exists"));
        self.touch(|api| &mut api.nodes.get_mut(name).expect("the node exists").metadata);
    }

    pub(super) fn edit_member(&mut self, name: &str, edit: impl FnOnce(&mut Member)) {
        edit(self.members.get_mut(name).expect("the member exists"));
        self.touch(|api| &mut api.members.get_mut(name).expect("the member exists").metadata);
    }

    pub(super) fn edit_peer(&mut self, name: &str, edit: impl FnOnce(&mut Peer)) {
        edit(self.peers.get_mut(name).expect("the peer exists"));
        self.touch(|api| &mut api.peers.get_mut(name).expect("the peer exists").metadata);
    }

    pub(super) fn edit_token(&mut self, name: &str, edit: impl FnOnce(&mut JoinToken)) {
        edit(self.tokens.get_mut(name).expect("the token exists"));
        self.touch(|api| &mut api.tokens.get_mut(name).expect("the token exists").metadata);
    }

    /// Does what an action says, signed with the network's key, as the driver does.
    pub(super) fn apply(&mut self, action: &Action, key: &Identity, now: Now) -> Result<(), Refused> {
        match &action.effect {
            Effect::Ledger { edit, resource_version } => {
                let name = format!("{LEDGER_PREFIX}{}", edit.page);
                let stored = self.pages.get(&name).and_then(|page| page.metadata.resource_version.clone());
                if stored != *resource_version {
                    return Err(Refused::Conflict);
                }
                let metadata = self.meta(&name, now);
                self.pages.insert(name, ConfigMap { metadata, data: Some(edit.data.clone()), ..ConfigMap::default() });
            }
            Effect::Approve { carrier, target, approval } => {
                let signed = approval.as_ref().clone().sign(key);
                match carrier {
                    Carrier::Node => {
                        hit(&mut self.nodes, target)?;
                        self.edit_node(target.name.as_str(), |node| set_approval(&mut node.metadata, &signed));
                    }
                    Carrier::Member => {
                        hit(&mut self.members, target)?;
                        self.edit_member(target.name.as_str(), |member| set_approval(&mut member.metadata, &signed));
                    }
                }
            }
            Effect::StatePeer { target, peer } => {
                hit(&mut self.peers, target)?;
                let statement = peer.as_ref().clone().sign(key).to_annotations();
                self.edit_peer(target.name.as_str(), |peer| {
                    let annotations = peer.metadata.annotations.get_or_insert_default();
                    plain_peer::KEYS.iter().for_each(|key| drop(annotations.remove(&format!("{PREFIX}{key}"))));
                    annotations.extend(statement);
                });
            }
            Effect::MemberStatus { target, status } => {
                hit(&mut self.members, target)?;
                self.edit_member(target.name.as_str(), |member| member.status = Some(status.clone()));
            }
            Effect::PeerStatus { target, status } => {
                hit(&mut self.peers, target)?;
                self.edit_peer(target.name.as_str(), |peer| peer.status = Some(status.clone()));
            }
            Effect::TokenStatus { name, resource_version, status } => {
                let token = self.tokens.get(name).ok_or(Refused::NotFound)?;
                if token.metadata.resource_version.as_ref() != Some(resource_version) {
                    return Err(Refused::Conflict);
                }
                self.edit_token(name, |token| token.status = Some(status.clone()));
            }
            Effect::NodeConditions { target, conditions } => {
                hit(&mut self.nodes, target)?;
                self.edit_node(target.name.as_str(), |node| {
                    let stored = node.status.get_or_insert_default().conditions.get_or_insert_default();
                    conditions.iter().for_each(|condition| set_condition(stored, condition));
                });
            }
            Effect::NodeTaints { target, seen, wanted } => {
                let node = hit(&mut self.nodes, target)?;
                if node.spec.clone().unwrap_or_default().taints.unwrap_or_default() != *seen {
                    return Err(Refused::Conflict);
                }
                self.edit_node(target.name.as_str(), |node| {
                    node.spec.get_or_insert_default().taints = Some(wanted.clone());
                });
            }
            Effect::NodeInit { target, labels, provider_id } => {
                hit(&mut self.nodes, target)?;
                self.edit_node(target.name.as_str(), |node| {
                    node.metadata.labels.get_or_insert_default().extend(labels.clone());
                    if let Some(id) = provider_id {
                        node.spec.get_or_insert_default().provider_id.get_or_insert_with(|| id.clone());
                    }
                });
            }
            Effect::NodeAddresses { target, addresses } => {
                hit(&mut self.nodes, target)?;
                self.edit_node(target.name.as_str(), |node| {
                    node.status.get_or_insert_default().addresses = Some(addresses.clone());
                });
            }
            Effect::DeleteMember { target } => {
                hit(&mut self.members, target)?;
                self.members.remove(target.name.as_str());
            }
        }
        Ok(())
    }

    fn next_version(&mut self) -> String {
        self.version += 1;
        self.version.to_string()
    }
}

fn hit<'a, T: Resource>(objects: &'a mut BTreeMap<String, T>, target: &Target) -> Result<&'a mut T, Refused> {
    let object = objects.get_mut(target.name.as_str()).ok_or(Refused::NotFound)?;
    if object.meta().uid.as_ref() == Some(&target.uid) { Ok(object) } else { Err(Refused::Conflict) }
}

/// As server-side apply by the controller does: what it does not name any more goes.
fn set_approval(meta: &mut ObjectMeta, signed: &SignedApproval) {
    let stored = meta.annotations.get_or_insert_default();
    annotations::names(Writer::Controller).for_each(|name| drop(stored.remove(&format!("{PREFIX}{name}"))));
    stored.extend(annotations::of_approval(signed));
}

fn set_condition(stored: &mut Vec<NodeCondition>, condition: &NodeCondition) {
    stored.retain(|stored| stored.type_ != condition.type_);
    stored.push(condition.clone());
}

/// A view that follows the API as watches do, as far and as late as the test says.
#[derive(Debug)]
pub(super) struct Watcher {
    pub(super) view: ClusterView,
    known: BTreeMap<(Kind, String), (String, String)>,
    claims: BTreeSet<(CloudKind, String)>,
}

impl Watcher {
    pub(super) fn new(view: ClusterView) -> Self {
        Self { view, known: BTreeMap::new(), claims: BTreeSet::new() }
    }

    /// Brings the view up to date with those objects that `sees` says.
    pub(super) fn follow(&mut self, api: &Api, now: Now, mut sees: impl FnMut(Kind, &str) -> bool) {
        if let Some(network) = &api.network {
            self.view.handle_network(network);
        }
        for (name, page) in &api.pages {
            if self.is_news(Kind::LedgerPage, name, &page.metadata, &mut sees) {
                self.view.handle_page(page);
            }
        }
        for (name, token) in &api.tokens {
            if self.is_news(Kind::JoinToken, name, &token.metadata, &mut sees) {
                self.view.handle_token(token);
            }
        }
        for (name, node) in &api.nodes {
            if self.is_news(Kind::Node, name, &node.metadata, &mut sees) {
                self.view.handle_node(node);
            }
        }
        for (name, member) in &api.members {
            if self.is_news(Kind::Member, name, &member.metadata, &mut sees) {
                self.view.handle_member(member);
            }
        }
        for (name, peer) in &api.peers {
            if self.is_news(Kind::Peer, name, &peer.metadata, &mut sees) {
                self.view.handle_peer(peer);
            }
        }
        for (key, claim) in &api.claims {
            self.claims.insert(key.clone());
            self.view.handle_claim(claim.clone());
        }
        for (kind, name) in std::mem::take(&mut self.claims) {
            if api.claims.contains_key(&(kind, name.clone())) {
                self.claims.insert((kind, name));
            } else {
                let of = match kind {
                    CloudKind::NodeClaim => Kind::NodeClaim,
                    CloudKind::Machine => Kind::Machine,
                };
                self.view.handle_deleted(of, &name, now);
            }
        }
        let gone: Vec<(Kind, String)> = self
            .known
            .keys()
            .filter(|(kind, name)| match kind {
                Kind::Node => !api.nodes.contains_key(name),
                Kind::Member => !api.members.contains_key(name),
                Kind::Peer => !api.peers.contains_key(name),
                Kind::JoinToken => !api.tokens.contains_key(name),
                Kind::LedgerPage => !api.pages.contains_key(name),
                Kind::Network | Kind::NodeClaim | Kind::Machine => false,
            })
            .filter(|(kind, name)| sees(*kind, name))
            .cloned()
            .collect();
        for (kind, name) in gone {
            self.view.handle_deleted(kind, &name, now);
            self.known.remove(&(kind, name));
        }
        for kind in Kind::REQUIRED {
            let mut names: BTreeSet<String> =
                self.known.keys().filter(|(of, _)| *of == kind).map(|(_, name)| name.clone()).collect();
            let document = api.network.iter().filter(|_| kind == Kind::Network);
            names.extend(document.filter_map(|document| document.metadata.name.clone()));
            self.view.handle_listed(kind, &names, now);
        }
    }

    fn is_news(
        &mut self,
        kind: Kind,
        name: &str,
        meta: &ObjectMeta,
        sees: &mut impl FnMut(Kind, &str) -> bool,
    ) -> bool {
        let now = (meta.uid.clone().unwrap_or_default(), meta.resource_version.clone().unwrap_or_default());
        let known = self.known.get(&(kind, name.to_owned()));
        if known == Some(&now) || !sees(kind, name) {
            return false;
        }
        self.known.insert((kind, name.to_owned()), now);
        true
    }
}
