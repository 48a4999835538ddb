//! Whether a Node is reached through the mesh: the condition `MeshReady` and the startup taint.
//!
//! ```text
//!            reached                       unreached for `unready_after`
//!   (none) ─────────> True ──────────────────────────────────────────────> False
//!      │                ^ │                  reached for `ready_after`       │
//!      │                │ └─< silence for `report_life` >─> Unknown          │
//!      └─> Unknown ─────┴────────────────────────────────────────────────────┘
//! ```
//!
//! The taint is put on a fresh Node before its first condition is written, and lifted when the condition is True. A
//! Node with the condition has been seen to, so a Node that was ready once never gets the taint again.

use k8s_openapi::api::core::v1::Taint;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use keystone_mesh_api::{READY_CONDITION, STARTUP_TAINT};

use super::action::{Action, Effect, Target};
use super::approvals;
use super::census::{Machine, Standing};
use super::conditions::Verdict;
use crate::view::{ClusterView, Evidence, MemberView, NodeView, Now, REACHED_CONDITION, millis};

/// A Node that is younger is told nothing before it has the taint, in milliseconds. Putting it on takes some of them; an
/// API server that refuses it keeps nobody from reading the conditions for longer.
const TAINTING: u64 = 10_000;

/// A Member that is absent for longer is counted, in milliseconds: a day is more than a journey or a night.
pub(super) const ABSENT: u64 = 24 * 3_600_000;
/// The reason of a Member's condition that says that its machine never published a record.
pub(super) const NO_RECORD: &str = "NoRecord";

/// What there is to do about a Node's readiness.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Readiness {
    /// The condition as it is to be; none where it stays.
    pub(super) verdict: Option<Verdict>,
    /// Puts on or lifts the taint.
    pub(super) taints: Option<Action>,
    /// Whether the Node's other conditions wait for the taint, so that all of them cost one write.
    pub(super) taint_first: bool,
    /// When time alone will have changed the answer.
    pub(super) again_at: Option<Now>,
}

/// Decides about a Node that is not being deleted.
pub(super) fn judge(view: &ClusterView, machine: &Machine<'_>, node: &NodeView, now: Now) -> Readiness {
    let tainted = node.taints.iter().any(|taint| taint.key == STARTUP_TAINT);
    let current = node.conditions.get(READY_CONDITION).map(|condition| condition.status.as_str());
    if tainted && current == Some("True") {
        let wanted = node.taints.iter().filter(|taint| taint.key != STARTUP_TAINT).cloned().collect();
        let reason = "the mesh reaches it: the startup taint is lifted";
        return Readiness { taints: Some(set_taints(node, wanted, reason)), ..Readiness::default() };
    }
    if !tainted && current.is_none() && wants_taint(view, node, now) {
        let taint = Taint { key: STARTUP_TAINT.to_owned(), effect: "NoSchedule".to_owned(), ..Taint::default() };
        let wanted = node.taints.iter().cloned().chain([taint]).collect();
        let reason = "it is fresh and the mesh does not reach it yet: the startup taint keeps pods off it";
        let told_at = Some(node.created.saturating_add(TAINTING)).filter(|told_at| now < *told_at);
        let taints = Some(set_taints(node, wanted, reason));
        return Readiness { verdict: None, taints, taint_first: told_at.is_some(), again_at: told_at };
    }
    let (verdict, again_at) = verdict(view, machine, current, now);
    Readiness { verdict, taints: None, taint_first: false, again_at }
}

/// Nodes of the control plane are where the others are reached from; what runs there must not wait for the mesh.
fn wants_taint(view: &ClusterView, node: &NodeView, now: Now) -> bool {
    let settings = view.settings();
    settings.startup_taint && !node.is_control_plane() && now.saturating_sub(node.created) < settings.fresh
}

fn set_taints(node: &NodeView, wanted: Vec<Taint>, reason: &str) -> Action {
    let target = Target { name: node.name.clone(), uid: node.uid.clone() };
    Action {
        effect: Effect::NodeTaints { target, seen: node.taints.clone(), wanted },
        reason: reason.to_owned(),
        events: Vec::new(),
    }
}

/// Decides about a Member that is no Node. Only that it is out of reach is told, and that this is over: nothing waits for
/// such a machine, and one that is switched off at night is no news.
pub(super) fn of_member(
    view: &ClusterView,
    machine: &Machine<'_>,
    member: &MemberView,
    now: Now,
) -> (Option<Verdict>, Option<Now>) {
    if machine.node.is_some() || !approvals::stands(machine) {
        return (None, None);
    }
    let settings = view.settings();
    let told = member.status.conditions.iter().any(|one| one.type_ == REACHED_CONDITION && one.status == "False");
    let after = |since: Now, wait: u64, then: Verdict| {
        let due = since.saturating_add(wait);
        if now >= due { (Some(then), None) } else { (None, Some(due)) }
    };
    match (view.reports().evidence(machine.name, now, settings.report_life), told) {
        (Evidence::Unreached(since), false) => {
            let why = format!(
                "the control plane does not reach this machine; if it is gone for good, run `keystone-mesh remove {}` there",
                machine.name
            );
            after(since, settings.unready_after, Verdict::no(REACHED_CONDITION, "Unreached", why))
        }
        (Evidence::Reached(since), true) => {
            let well = "the control plane reaches it through the mesh";
            after(since, settings.ready_after, Verdict::yes(REACHED_CONDITION, "Reached", well))
        }
        (Evidence::Reached(_), false) | (Evidence::Unreached(_), true) | (Evidence::Silence(_), _) => (None, None),
    }
}

/// Since when a Member that is no Node is absent: it is out of reach, or never said anything of itself.
pub(super) fn absent_since(machine: &Machine<'_>) -> Option<Now> {
    let member = machine.member.filter(|_| machine.node.is_none())?;
    let bad = |one: &&Condition| (one.type_ == REACHED_CONDITION && one.status == "False") || one.reason == NO_RECORD;
    member.status.conditions.iter().filter(bad).map(|one| millis(&one.last_transition_time)).min()
}

fn verdict(
    view: &ClusterView,
    machine: &Machine<'_>,
    current: Option<&str>,
    now: Now,
) -> (Option<Verdict>, Option<Now>) {
    match &machine.standing {
        Standing::Admitted { .. } if approvals::stands(machine) => evidence(view, machine, current, now),
        Standing::Waiting(_) | Standing::Refused(_) | Standing::Changed { .. } | Standing::Revoked(_) => {
            let why = "the node is not in the network; see the condition MeshApproved";
            (Some(Verdict::no(READY_CONDITION, "NotApproved", why)), None)
        }
        Standing::Silent
        | Standing::Undecided(_)
        | Standing::Spending
        | Standing::Entering(_)
        | Standing::Adopting(..)
        | Standing::Admitted { .. }
        | Standing::Leaving => (None, None),
    }
}

fn evidence(
    view: &ClusterView,
    machine: &Machine<'_>,
    current: Option<&str>,
    now: Now,
) -> (Option<Verdict>, Option<Now>) {
    let settings = view.settings();
    let ready = || Verdict::yes(READY_CONDITION, "Reached", "its peers reach it through the mesh");
    let unready = || {
        let why = "its peers do not reach it through the mesh; `keystone-mesh doctor` on the node tells why";
        Verdict::no(READY_CONDITION, "Unreached", why)
    };
    let no_report = || {
        let why = "no peer reports on it; is the status listener (status_listen) of a control-plane node's daemon on?";
        Verdict::unknown(READY_CONDITION, "NoReport", why)
    };
    // What has to be so for a while is decided again when the while is over.
    let after = |since: Now, wait: u64, then: Verdict, until: Option<Verdict>| {
        let due = since.saturating_add(wait);
        if now >= due { (Some(then), None) } else { (until, Some(due)) }
    };
    let evidence = view.reports().evidence(machine.name, now, settings.report_life);
    let first = current.is_none().then(no_report);
    match (evidence, current) {
        (Evidence::Reached(since), Some("False")) => after(since, settings.ready_after, ready(), None),
        (Evidence::Reached(_), _) => (Some(ready()), None),
        (Evidence::Unreached(_), Some("False")) => (Some(unready()), None),
        (Evidence::Unreached(since), _) => after(since, settings.unready_after, unready(), first),
        (Evidence::Silence(Some(since)), Some("True" | "False")) => {
            after(since, settings.report_life, no_report(), None)
        }
        (Evidence::Silence(None), Some("True" | "False")) => (None, None),
        (Evidence::Silence(_), _) => (Some(no_report()), None),
    }
}
