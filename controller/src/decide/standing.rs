//! How machines stand, in words: conditions of Nodes, status of Members.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::NodeCondition;
use keystone_mesh_core::admission::{JoinRefusal, addresses_of};
use keystone_mesh_core::ledger::Holder;
use keystone_mesh_core::network::Network;
use keystone_mesh_core::node::NodeName;

use super::action::{Action, Effect, Event, Regarding, Target};
use super::addresses::Addresses;
use super::approvals;
use super::census::{Census, Machine, Revocation, Standing};
use super::conditions::{self, Verdict};
use super::readiness::{self, Readiness};
use super::routes::Routes;
use crate::view::{
    APPROVED_CONDITION, ClusterView, MemberView, NODE_CONDITION, NodeView, Now, REACHED_CONDITION, ROUTES_CONDITION,
    WISHES_CONDITION,
};

/// What is needed to say how machines stand.
pub(super) struct Context<'a> {
    pub(super) view: &'a ClusterView,
    pub(super) network: &'a Network,
    pub(super) addresses: &'a Addresses<'a>,
    pub(super) routes: &'a Routes<'a>,
    pub(super) now: Now,
}

/// Conditions of Nodes, status of Members, Members that go. Besides, when time alone changes an answer.
pub(super) fn act(context: &Context<'_>, census: &Census<'_>) -> (Vec<Action>, Option<Now>) {
    let mut actions = Vec::new();
    let mut again_at: Option<Now> = None;
    for machine in census.machines.values() {
        if let Some(node) = machine.node.filter(|node| !node.deleting) {
            let readiness = readiness::judge(context.view, machine, node, context.now);
            again_at = again_at.into_iter().chain(readiness.again_at).min();
            actions.extend(readiness.taints.clone());
            if !readiness.taint_first {
                actions.extend(of_node(context, machine, node, readiness));
            }
        }
        if let Some(member) = machine.member.filter(|member| !member.deleting) {
            let (reached, turns_at) = readiness::of_member(context.view, machine, member, context.now);
            let counted_at = readiness::absent_since(machine).map(|since| since.saturating_add(readiness::ABSENT));
            let times = [turns_at, counted_at, recorded_by(machine, member)]
                .into_iter()
                .flatten()
                .filter(|at| *at > context.now);
            again_at = again_at.into_iter().chain(times).min();
            actions.extend(of_member(context, machine, member, reached));
        }
        actions.extend(machine.leftover.filter(|leftover| !leftover.deleting).map(|leftover| goes(machine, leftover)));
    }
    (actions, again_at)
}

fn of_node(context: &Context<'_>, machine: &Machine<'_>, node: &NodeView, readiness: Readiness) -> Option<Action> {
    let verdicts = [
        approved(context, machine, APPROVED_CONDITION),
        readiness.verdict,
        routes(context, machine, ROUTES_CONDITION),
        wishes(context, machine, WISHES_CONDITION),
    ];
    let mut conditions: BTreeMap<&str, &NodeCondition> =
        node.conditions.iter().map(|(condition, current)| (condition.as_str(), current)).collect();
    let mut changed: Vec<NodeCondition> = Vec::new();
    let mut events = Vec::new();
    for verdict in verdicts.into_iter().flatten() {
        let current = node.conditions.get(verdict.condition);
        let Some(condition) = conditions::of_node(current, &verdict, context.now) else { continue };
        changed.push(condition);
        let news = current.is_none_or(|current| {
            current.status != verdict.status || current.reason.as_deref() != Some(verdict.reason)
        });
        let turned = verdict.condition == crate::view::READY_CONDITION && verdict.status == "True";
        let told = verdict.warning().map(|(reason, note)| (true, reason, note));
        let told = told.or_else(|| turned.then(|| (false, "MeshReady", verdict.message.clone().into_owned())));
        events.extend(told.filter(|_| news && worth_an_event(&verdict)).map(|(warning, reason, note)| {
            let (name, uid) = (node.name.to_string(), node.uid.clone());
            Event { regarding: Regarding::Node, name, uid, warning, reason, note }
        }));
    }
    if changed.is_empty() {
        return None;
    }
    let said: Vec<String> = changed
        .iter()
        .map(|condition| {
            format!("{} is {} ({})", condition.type_, condition.status, condition.reason.as_deref().unwrap_or_default())
        })
        .collect();
    conditions.extend(changed.iter().map(|condition| (condition.type_.as_str(), condition)));
    let conditions = conditions.into_values().cloned().collect();
    let target = Target { name: node.name.clone(), uid: node.uid.clone() };
    Some(Action { effect: Effect::NodeConditions { target, conditions }, reason: said.join(", "), events })
}

/// That a machine which is not approved is not ready either is no news; a revocation is told where it is made.
fn worth_an_event(verdict: &Verdict) -> bool {
    !matches!(verdict.reason, "NotApproved" | "Revoked" | "CloudGone")
}

fn of_member(
    context: &Context<'_>,
    machine: &Machine<'_>,
    member: &MemberView,
    reached: Option<Verdict>,
) -> Option<Action> {
    let mut status = member.status.clone();
    if !matches!(machine.standing, Standing::Undecided(_)) {
        let theirs = machine.admitted().filter(|(identity, _)| *identity == member.identity);
        let addresses = theirs.map(|(_, host)| conditions::hosts(&addresses_of(context.network, host)));
        status.addresses = addresses.unwrap_or_default();
    }
    let node = machine.node.map(|_| Verdict::yes(NODE_CONDITION, "NodeFound", "there is a Node of this name"));
    let other = machine.admitted().filter(|(identity, _)| *identity != member.identity);
    let approved = match other {
        Some((identity, _)) => Some(taken(machine.name, &identity.short())),
        None => approved(context, machine, "Approved").or_else(|| no_record(context, machine, member)),
    };
    // While there is a Node, the news are told there.
    let own = machine.node.is_none();
    let routes = routes(context, machine, "RoutesAccepted").filter(|_| own);
    let wishes = wishes(context, machine, "WishesAccepted").filter(|_| own);
    let mut events = Vec::new();
    if !own {
        status.conditions.retain(|condition| condition.type_ != REACHED_CONDITION);
    }
    for verdict in [node, approved, routes, wishes, reached].into_iter().flatten() {
        if conditions::set(&mut status.conditions, &verdict, None, context.now) && (own || other.is_some()) {
            events.extend(verdict.warning().map(|(reason, note)| event_of(member, true, reason, note)));
        }
    }
    if status == member.status {
        return None;
    }
    let effect = Effect::MemberStatus { target: target(member), status };
    Some(Action { effect, reason: "how it stands has changed".to_owned(), events })
}

/// A Member whose machine never said anything of itself.
fn no_record(context: &Context<'_>, machine: &Machine<'_>, member: &MemberView) -> Option<Verdict> {
    recorded_by(machine, member).filter(|by| context.now >= *by).map(|_| {
        let why = format!(
            "no record of this machine ever came, so it has no address; it joins with its token or by its Node, and if it \
             never will, run `keystone-mesh remove {}` on the control plane",
            machine.name
        );
        Verdict::unknown("Approved", readiness::NO_RECORD, why)
    })
}

/// When the record that comes with a Member should be there, where it is not.
fn recorded_by(machine: &Machine<'_>, member: &MemberView) -> Option<Now> {
    /// A join takes seconds, in milliseconds.
    const JOINING: u64 = 60_000;
    let silent = machine.node.is_none() && machine.standing == Standing::Silent;
    silent.then(|| member.created.saturating_add(JOINING))
}

/// A Member vouches for another machine than the one that has the name.
fn taken(name: &NodeName, known: &str) -> Verdict {
    let refusal = JoinRefusal::NameTaken { name: name.clone(), known: known.to_owned() };
    Verdict::no("Approved", conditions::reason_of(&refusal), refusal.to_string())
}

fn goes(machine: &Machine<'_>, leftover: &MemberView) -> Action {
    let why = machine.standing.cloud_gone();
    let note = format!("Deleted: {}", why.as_deref().unwrap_or("its Node was deleted"));
    let events = vec![event_of(leftover, false, "MemberDeleted", note.clone())];
    Action { effect: Effect::DeleteMember { target: target(leftover) }, reason: note, events }
}

/// Whether a machine is in the network, and why not; none where that is on its way.
fn approved(context: &Context<'_>, machine: &Machine<'_>, condition: &'static str) -> Option<Verdict> {
    let name = machine.name;
    Some(match &machine.standing {
        Standing::Admitted { identity, stranger: Some(found), .. } => Verdict::no(
            condition,
            "IdentityChanged",
            format!(
                "the record on this object is signed by {found}, but {identity} is approved under this name and stays in \
                 force; if the machine was reinstalled, run `keystone-mesh approve {name}` on the control plane"
            ),
        ),
        Standing::Admitted { host, .. } if approvals::stands(machine) => {
            let addresses = conditions::list(&addresses_of(context.network, *host));
            Verdict::yes(condition, "Approved", format!("in the network with {addresses}"))
        }
        Standing::Entering(identity) | Standing::Adopting(identity, _) => {
            let holder = Holder::Node(name.clone(), *identity);
            let exhausted = context.addresses.without.get(&holder)?;
            Verdict::no(condition, "AddressesExhausted", exhausted.to_string())
        }
        Standing::Waiting(identity) => Verdict::no(
            condition,
            "WaitingForApproval",
            format!(
                "nobody has let this machine in yet: compare its identity {identity} with `keystone-mesh status` on the \
                 machine, then run `keystone-mesh approve {name}` on the control plane"
            ),
        ),
        Standing::Refused(refusal) => Verdict::no(condition, conditions::reason_of(refusal), refusal.to_string()),
        Standing::Changed { vouched, found } => Verdict::no(
            condition,
            "IdentityChanged",
            format!(
                "the record on this object is signed by {found}, but the Member of this name is for {vouched}; if the \
                 machine was reinstalled, run `keystone-mesh approve {name}` on the control plane"
            ),
        ),
        Standing::Revoked(Revocation::CloudGone(_)) => {
            let why = machine.standing.cloud_gone().unwrap_or_default();
            Verdict::no(condition, "CloudGone", format!("out of the network: {why}"))
        }
        Standing::Revoked(Revocation::Earlier) => Verdict::no(
            condition,
            "Revoked",
            format!(
                "out of the network: its approval was taken back; run `keystone-mesh approve {name}` on the control plane \
                 to let it in again"
            ),
        ),
        Standing::Silent
        | Standing::Undecided(_)
        | Standing::Spending
        | Standing::Admitted { .. }
        | Standing::Leaving => {
            return None;
        }
    })
}

fn routes(context: &Context<'_>, machine: &Machine<'_>, condition: &'static str) -> Option<Verdict> {
    conditions::routes(condition, &context.routes.machines.get(machine.name)?.refused)
}

/// What people wrote on the object and what has no effect.
fn wishes(context: &Context<'_>, machine: &Machine<'_>, condition: &'static str) -> Option<Verdict> {
    let mesh = machine.carried()?;
    let unreadable = mesh.wish_faults.iter().map(ToString::to_string);
    let unknown = approvals::unknown_relays(context.network, machine).into_iter().map(|id| {
        format!("`relay-force`: {id} is no relay of this network; `keystone-mesh relay list` shows those that are")
    });
    let faults: Vec<String> = unreadable.chain(unknown).collect();
    let reason = (!faults.is_empty()).then_some("WishRefused");
    conditions::told(condition, reason, &faults, "everything that people wrote has its effect")
}

fn target(member: &MemberView) -> Target {
    Target { name: member.name.clone(), uid: member.uid.clone() }
}

fn event_of(member: &MemberView, warning: bool, reason: &'static str, note: String) -> Event {
    let (name, uid) = (member.name.to_string(), member.uid.clone());
    Event { regarding: Regarding::Member, name, uid, warning, reason, note: conditions::cut(note.into()).into_owned() }
}
