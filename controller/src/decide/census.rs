//! Who is there, and how each stands: the one place where it is decided who is let in.
//!
//! A machine is a name under which there is a Node, a Member, or both. What it may be rests on what those who can write
//! Nodes cannot write: the ledger's pin, a Member, the network's signatures.
//!
//! ```text
//!             record                 token's use          address            approval
//!   Silent ──────────> let in? ────> recorded ──────────> acknowledged ────> signed
//!                        │            Spending             Entering           Admitted
//!                        ├─> Waiting (nobody vouches)      Adopting (it had one before there was a ledger)
//!                        ├─> Refused (somebody vouches, but)
//!                        └─> Changed (it is pinned to another identity)
//! ```

use std::collections::BTreeMap;

use keystone_mesh_api::JoinTokenStatus;
use keystone_mesh_core::admission::{JoinRefusal, host_of};
use keystone_mesh_core::annotations::Decoded;
use keystone_mesh_core::ledger::Holder;
use keystone_mesh_core::network::Network;
use keystone_mesh_core::node::{Approval, Entry, NodeName, NodeRecord, SignedApproval, SignedRecord};
use keystone_mesh_core::token::TokenRefusal;
use keystone_mesh_core::{NodeId, PublicKey};

use crate::view::{ClusterView, MemberView, NodeView, Now, Policy};

/// A token that a Member names and that is not there is waited for so long, in milliseconds: the Member's watch may be
/// ahead of the tokens'.
const TOKEN_GRACE: u64 = 10_000;

/// How a machine stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// No record: nothing to decide.
    Silent,
    /// Nobody vouches for it.
    Waiting(NodeId),
    /// It is not let in.
    Refused(JoinRefusal),
    /// A Member vouches for another identity under this name.
    Changed {
        /// Who may.
        vouched: NodeId,
        /// Who signed.
        found: NodeId,
    },
    /// What is needed to decide may still come; decided again then.
    Undecided(Now),
    /// Let in; the use of its token has to be recorded first.
    Spending,
    /// Let in; its address has to be claimed.
    Entering(NodeId),
    /// Let in before there was a ledger; the ledger has to take over its address.
    Adopting(NodeId, u32),
    /// In the network, with a claim that was acknowledged.
    Admitted {
        /// Who.
        identity: NodeId,
        /// Its host number.
        host: u32,
        /// Another identity whose record stands on the object.
        stranger: Option<NodeId>,
    },
    /// Was in the network.
    Revoked(Revocation),
    /// A Member whose Node went.
    Leaving,
}

impl Standing {
    /// That its autoscaler's object went and the machine with it, in words; none where something else is the case.
    pub(super) fn cloud_gone(&self) -> Option<String> {
        match self {
            Self::Revoked(Revocation::CloudGone(claim)) => {
                Some(format!("`{claim}`, the autoscaler's object of this machine, was deleted"))
            }
            Self::Silent
            | Self::Waiting(_)
            | Self::Refused(_)
            | Self::Changed { .. }
            | Self::Undecided(_)
            | Self::Spending
            | Self::Entering(_)
            | Self::Adopting(..)
            | Self::Admitted { .. }
            | Self::Revoked(Revocation::Earlier)
            | Self::Leaving => None,
        }
    }
}

/// Why a machine is no longer in the network though its object is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Revocation {
    /// Its autoscaler's object went: the name of it.
    CloudGone(String),
    /// It was taken back earlier, and nobody vouched for it since.
    Earlier,
}

/// A name, and everything that is known under it.
#[derive(Clone, Debug)]
pub(super) struct Machine<'a> {
    pub(super) name: &'a NodeName,
    pub(super) node: Option<&'a NodeView>,
    /// The Member that vouches for it.
    pub(super) member: Option<&'a MemberView>,
    /// A Member that outlived its Node.
    pub(super) leftover: Option<&'a MemberView>,
    /// What the machine says itself, as far as it is the one that counts.
    pub(super) record: Option<&'a NodeRecord>,
    /// The newest approval of ours under this name, for whomever.
    pub(super) newest: Option<&'a Approval>,
    pub(super) standing: Standing,
}

impl<'a> Machine<'a> {
    /// Its identity and host number, where it is in the network.
    pub(super) fn admitted(&self) -> Option<(NodeId, u32)> {
        match self.standing {
            Standing::Admitted { identity, host, .. } => Some((identity, host)),
            Standing::Silent
            | Standing::Waiting(_)
            | Standing::Refused(_)
            | Standing::Changed { .. }
            | Standing::Undecided(_)
            | Standing::Spending
            | Standing::Entering(_)
            | Standing::Adopting(..)
            | Standing::Revoked(_)
            | Standing::Leaving => None,
        }
    }

    /// The approval that is in force, where it is in the network.
    pub(super) fn in_force(&self) -> Option<&'a Approval> {
        let (identity, _) = self.admitted()?;
        self.newest.filter(|approval| approval.identity == identity && !approval.is_revoked())
    }

    /// The annotations of the object that carries record and approval: the Node's where there is one.
    pub(super) fn carried(&self) -> Option<&'a Decoded> {
        self.node.map(|node| &node.mesh).or_else(|| self.member.map(|member| &member.mesh))
    }

    /// Whether the carrying object shows exactly the newest approval.
    pub(super) fn carries_newest(&self) -> bool {
        let shown = self.carried().and_then(approval_in);
        shown.is_some() && shown == self.newest
    }

    /// When its first object was made.
    pub(super) fn created(&self) -> Now {
        let node = self.node.map(|node| node.created);
        node.into_iter().chain(self.member.map(|member| member.created)).min().unwrap_or(0)
    }
}

/// Every machine, and what letting them in costs tokens.
#[derive(Debug, Default)]
pub(super) struct Census<'a> {
    pub(super) machines: BTreeMap<&'a NodeName, Machine<'a>>,
    /// Whose WireGuard key it is, of those who are in the network.
    pub(super) keys: BTreeMap<PublicKey, &'a NodeName>,
    /// Tokens whose status changes.
    pub(super) tokens: BTreeMap<&'a str, JoinTokenStatus>,
}

/// Counts everyone and decides how they stand. Who is in the network comes first, and holds its identity and key
/// against whoever wants in; of these the elder goes first.
pub(super) fn take<'a>(view: &'a ClusterView, network: &'a Network, now: Now) -> Census<'a> {
    let mut taker = Taker::new(view, network, now);
    let mut census = Census::default();
    let mut applicants: Vec<Machine<'_>> = Vec::new();
    let mut machines: Vec<Machine<'_>> = Vec::with_capacity(view.nodes().len());
    let mut names: Vec<&NodeName> = view.nodes().keys().chain(view.members().keys()).collect();
    names.sort();
    names.dedup();
    for name in names {
        let mut machine = taker.machine(name);
        match taker.settled(&machine) {
            Some(standing) => {
                if matches!(standing, Standing::Revoked(_)) {
                    machine.leftover = machine.leftover.or(machine.member.take());
                }
                machine.standing = standing;
                taker.adopt_record(&mut machine);
                taker.hold(&machine);
                machines.push(machine);
            }
            None => applicants.push(machine),
        }
    }
    census.keys.clone_from(&taker.keys);
    applicants.sort_by_key(|machine| (machine.created(), machine.name));
    for mut machine in applicants {
        machine.standing = taker.judge(&mut machine);
        machines.push(machine);
    }
    // From a sorted list a map is built at once.
    machines.sort_by_key(|machine| machine.name);
    census.machines = machines.into_iter().map(|machine| (machine.name, machine)).collect();
    census.tokens = taker.tokens;
    census
}

/// What is needed to judge.
struct Taker<'a> {
    view: &'a ClusterView,
    network: &'a Network,
    now: Now,

    // Indexes over the view.
    entries: BTreeMap<&'a NodeName, &'a Entry>,
    pins: BTreeMap<&'a NodeName, Vec<(u32, NodeId)>>,
    gone: Gone<'a>,

    // What those who are let in hold.
    identities: BTreeMap<NodeId, &'a NodeName>,
    keys: BTreeMap<PublicKey, &'a NodeName>,
    peer_keys: BTreeMap<PublicKey, &'a NodeName>,
    tokens: BTreeMap<&'a str, JoinTokenStatus>,
}

impl<'a> Taker<'a> {
    fn new(view: &'a ClusterView, network: &'a Network, now: Now) -> Self {
        let mut pins: BTreeMap<&NodeName, Vec<(u32, NodeId)>> = BTreeMap::new();
        for (host, holder) in view.ledger().live() {
            match holder {
                Holder::Node(name, id) => pins.entry(name).or_default().push((host, *id)),
                Holder::Peer(_) => {}
            }
        }
        let stated = view.peers().values().filter_map(|peer| Some((peer.stated.as_ref()?, &peer.name)));
        Self {
            view,
            network,
            now,
            entries: view.directory().entries().map(|entry| (entry.name(), entry)).collect(),
            pins,
            gone: Gone::of(view),
            identities: BTreeMap::new(),
            keys: BTreeMap::new(),
            peer_keys: stated
                .filter(|(peer, _)| !peer.is_revoked())
                .map(|(peer, name)| (peer.public_key, name))
                .collect(),
            tokens: BTreeMap::new(),
        }
    }

    /// The objects and statements under a name; the standing is still to be decided.
    fn machine(&self, name: &'a NodeName) -> Machine<'a> {
        let node = self.view.nodes().get(name);
        let mut member = self.view.members().get(name);
        let mut leftover = None;
        let outlived = |member: &MemberView| match node {
            // The condition tells that there was a Node; the memory tells it where that was not written yet.
            None => {
                let caught_up = self.now >= self.view.caught_up_at();
                (member.had_node() && caught_up) || self.view.departed(name) == Some(member.identity)
            }
            Some(node) => self.succeeds(name, node) && self.view.departed(name) == Some(member.identity),
        };
        if member.is_some_and(outlived) {
            leftover = member.take();
        }
        let entry = self.entries.get(name).copied();
        let carried = [node.map(|node| &node.mesh), self.view.members().get(name).map(|member| &member.mesh)];
        let approvals = carried.into_iter().flatten().filter_map(approval_in);
        let approvals = approvals.chain(entry.and_then(|entry| entry.approval.as_ref()).map(|signed| signed.get()));
        let newest = approvals.filter(|approval| approval.network == self.network.id).max_by_key(|a| a.serial);
        Machine { name, node, member, leftover, record: None, newest, standing: Standing::Silent }
    }

    /// Whether a Node is the successor of one that went, as another machine.
    fn succeeds(&self, name: &NodeName, node: &NodeView) -> bool {
        let signer = record_in(&node.mesh).map(|record| record.identity);
        signer.is_some() && self.view.departed(name).is_some_and(|departed| signer != Some(departed))
    }

    /// How a machine stands that is or was in the network. None: it has to be judged.
    fn settled(&self, machine: &Machine<'a>) -> Option<Standing> {
        if machine.node.is_none() && machine.member.is_some_and(MemberView::had_node) {
            // The Node may just not be seen yet.
            return Some(Standing::Undecided(self.view.caught_up_at()));
        }
        if machine.node.is_none() && machine.leftover.is_some() {
            return Some(Standing::Leaving);
        }
        if let Some(claim) = self.gone.claim_of(machine) {
            return Some(Standing::Revoked(Revocation::CloudGone(claim.to_owned())));
        }
        let (host, pinned) = self.pin(machine)?;
        if machine.node.is_some_and(|node| self.succeeds(machine.name, node)) {
            return None;
        }
        if machine.node.is_none() && machine.member.is_some_and(|member| member.identity != pinned) {
            // What is left of the name is another machine's.
            return None;
        }
        let found = machine.carried().and_then(record_in).map(|record| record.identity);
        let stranger = found.filter(|found| *found != pinned);
        if let Some(member) = machine.member
            && member.token.is_none()
            && member.identity != pinned
            && stranger == Some(member.identity)
        {
            // A person vouches for the machine that is there.
            return None;
        }
        Some(Standing::Admitted { identity: pinned, host, stranger })
    }

    /// The claim that counts under a name. Of several, which only a race leaves, it is the one that was approved.
    fn pin(&self, machine: &Machine<'_>) -> Option<(u32, NodeId)> {
        let pins = self.pins.get(machine.name)?;
        let approved = machine.newest.filter(|approval| !approval.is_revoked());
        let matches = |(host, id): &&(u32, NodeId)| {
            approved.is_some_and(|approval| approval.identity == *id && host_of(self.network, approval) == Some(*host))
        };
        pins.iter().find(matches).or_else(|| pins.first()).copied()
    }

    /// Finds the record of the identity that counts, newest first.
    fn adopt_record(&self, machine: &mut Machine<'a>) {
        let Some((identity, _)) = machine.admitted() else { return };
        machine.record = self.record_of(machine, identity);
    }

    fn record_of(&self, machine: &Machine<'a>, identity: NodeId) -> Option<&'a NodeRecord> {
        let carried = [machine.node.map(|node| &node.mesh), machine.member.map(|member| &member.mesh)];
        let known = self.entries.get(machine.name).map(|entry| entry.record.get());
        let records = carried.into_iter().flatten().filter_map(record_in).chain(known);
        records.filter(|record| record.identity == identity).max_by_key(|record| record.seq)
    }

    /// Whoever is in holds its identity and its key against the others.
    fn hold(&mut self, machine: &Machine<'a>) {
        let Some((identity, _)) = machine.admitted() else { return };
        self.identities.entry(identity).or_insert(machine.name);
        if let Some(record) = machine.record {
            self.keys.entry(record.public_key).or_insert(machine.name);
        }
    }

    /// Judges a machine that is not in the network.
    fn judge(&mut self, machine: &mut Machine<'a>) -> Standing {
        let carried = machine.carried().and_then(record_in);
        let Some(identity) = machine.member.map(|member| member.identity).or(carried.map(|record| record.identity))
        else {
            return Standing::Silent;
        };
        machine.record = self.record_of(machine, identity);
        let Some(record) = machine.record else {
            return match carried {
                Some(record) => Standing::Changed { vouched: identity, found: record.identity },
                None => Standing::Silent,
            };
        };
        let standing = self.admission(machine, record);
        if matches!(standing, Standing::Entering(_) | Standing::Adopting(..) | Standing::Spending) {
            self.identities.insert(identity, machine.name);
            self.keys.insert(record.public_key, machine.name);
        }
        standing
    }

    fn admission(&mut self, machine: &Machine<'a>, record: &NodeRecord) -> Standing {
        let identity = record.identity;
        let mine = machine.newest.filter(|approval| approval.identity == identity);
        if mine.is_some_and(Approval::is_revoked) && !machine.member.is_some_and(|member| since(member, mine)) {
            return Standing::Revoked(Revocation::Earlier);
        }
        if machine.node.is_some_and(|node| node.deleting) {
            return Standing::Silent;
        }
        let adopted = mine.filter(|approval| !approval.is_revoked()).and_then(|approval| self.unknown_host(approval));
        // The control plane's own host signs its record with the network key itself.
        let vouched =
            machine.member.is_some() || identity == self.network.id || self.view.settings().policy == Policy::Auto;
        if !vouched && adopted.is_none() {
            return Standing::Waiting(identity);
        }
        if let Err(refusal) = self.check_unique(machine.name, record) {
            return Standing::Refused(refusal);
        }
        if let Some(host) = adopted {
            return Standing::Adopting(identity, host);
        }
        match machine.member.and_then(|member| Some((member, member.token.as_deref()?))) {
            Some((member, token)) => self.spend(member, token),
            None => Standing::Entering(identity),
        }
    }

    /// The host number of an approval, where the ledger never knew of it: one from before there was a ledger. Where the
    /// ledger has a note of the number, the approval may be a copy that somebody kept.
    fn unknown_host(&self, approval: &Approval) -> Option<u32> {
        host_of(self.network, approval).filter(|host| self.view.ledger().noted(*host).is_none())
    }

    fn check_unique(&self, name: &NodeName, record: &NodeRecord) -> Result<(), JoinRefusal> {
        if let Some(other) = self.identities.get(&record.identity).filter(|other| **other != name) {
            return Err(JoinRefusal::IdentityKnown((*other).clone()));
        }
        let holder = self.keys.get(&record.public_key).filter(|other| **other != name);
        match holder.or_else(|| self.peer_keys.get(&record.public_key)) {
            Some(other) => Err(JoinRefusal::KeyTaken((*other).clone())),
            None => Ok(()),
        }
    }

    /// Checks a Member's token, as of when the Member was made, and records its use: it stands in the token's status
    /// before anything is given for it, so that a use is never spent twice.
    fn spend(&mut self, member: &'a MemberView, id: &'a str) -> Standing {
        let Some(token) = self.view.tokens().get(id) else {
            let known_by = member.created.saturating_add(TOKEN_GRACE);
            let unknown = Standing::Refused(TokenRefusal::Unknown.into());
            return if self.now < known_by { Standing::Undecided(known_by) } else { unknown };
        };
        let mut status = self.tokens.get(id).unwrap_or(&token.status).clone();
        let identity = member.identity.to_string();
        if status.joined.contains(&identity) {
            let recorded = token.status.joined.contains(&identity);
            return if recorded { Standing::Entering(member.identity) } else { Standing::Spending };
        }
        if token.revoked {
            return Standing::Refused(TokenRefusal::Revoked.into());
        }
        if let Some(expires) = token.expires.filter(|expires| member.created >= *expires) {
            return Standing::Refused(TokenRefusal::Expired((member.created - expires) / 1000).into());
        }
        if let Some(pattern) = token.names.as_ref().filter(|pattern| !pattern.matches(&member.name)) {
            let (pattern, name) = (pattern.clone(), member.name.clone());
            return Standing::Refused(TokenRefusal::NameNotAllowed { pattern, name }.into());
        }
        if token.uses.is_some_and(|uses| status.used.max(length(&status.joined)) >= uses) {
            return Standing::Refused(TokenRefusal::UsedUp.into());
        }
        if token.uses.is_none() {
            // Who is in needs no note any more; a list without end would outgrow the object.
            status.joined.retain(|joined| !self.is_in(joined));
        }
        status.used = status.used.saturating_add(1);
        status.joined.push(identity);
        self.tokens.insert(id, status);
        Standing::Spending
    }

    fn is_in(&self, identity: &str) -> bool {
        identity.parse().is_ok_and(|identity: NodeId| self.identities.contains_key(&identity))
    }
}

/// Cloud claims that went, by what they were called, unless another is alive for the same machine.
#[derive(Debug, Default)]
struct Gone<'a> {
    by_node: BTreeMap<&'a str, (Now, &'a str)>,
    by_provider: BTreeMap<&'a str, (Now, &'a str)>,
}

impl<'a> Gone<'a> {
    fn of(view: &'a ClusterView) -> Self {
        let mut gone = Self::default();
        for claim in view.claims() {
            if let Some(at) = claim.gone {
                gone.by_node.extend(claim.node.as_deref().map(|node| (node, (at, claim.name.as_str()))));
                gone.by_provider.extend(claim.provider_id.as_deref().map(|id| (id, (at, claim.name.as_str()))));
            }
        }
        for claim in view.claims().filter(|claim| claim.gone.is_none()) {
            claim.node.as_deref().map(|node| gone.by_node.remove(node));
            claim.provider_id.as_deref().map(|id| gone.by_provider.remove(id));
        }
        gone
    }

    /// The claim that a machine was made for and that went since.
    fn claim_of(&self, machine: &Machine<'_>) -> Option<&'a str> {
        let provider = machine.node.and_then(|node| node.provider_id.as_deref());
        let by_provider = provider.and_then(|id| self.by_provider.get(id));
        let (at, claim) = by_provider.or_else(|| self.by_node.get(machine.name.as_str()))?;
        // A successor of the same name is younger than the end of its predecessor.
        let created = machine.node.map(|node| node.created).or(machine.member.map(|member| member.created))?;
        let vouched_since = machine.member.is_some_and(|member| member.token.is_none() && member.created > *at);
        (created <= *at && !vouched_since).then_some(*claim)
    }
}

/// Whether a Member was made after an approval, within the second that its time is told to.
fn since(member: &MemberView, approval: Option<&Approval>) -> bool {
    approval.is_none_or(|approval| member.created.saturating_add(999) >= approval.serial)
}

fn length<T>(list: &[T]) -> u32 {
    u32::try_from(list.len()).unwrap_or(u32::MAX)
}

/// The record that an object carries.
pub(super) fn record_in(mesh: &Decoded) -> Option<&NodeRecord> {
    mesh.record.as_ref().ok()?.as_ref().map(SignedRecord::get)
}

/// The approval that an object carries.
pub(super) fn approval_in(mesh: &Decoded) -> Option<&Approval> {
    mesh.approval.as_ref().ok()?.as_ref().map(SignedApproval::get)
}
