//! Conditions: what the controller thinks, told once.
//!
//! A condition is written only where status, reason or message differ from what stands there, so every text is made of
//! what is decided and of nothing that moves by itself.

use std::borrow::Cow;
use std::fmt::Display;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::NodeCondition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use keystone_mesh_core::admission::JoinRefusal;
use keystone_mesh_core::token::TokenRefusal;

use super::routes::RouteRefusal;
use crate::view::Now;

/// Longest message, in bytes: Events take 1024 (events.k8s.io/v1).
const MAX_MESSAGE: usize = 1024;

/// What is thought of one aspect of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) condition: &'static str,
    /// `True`, `False` or `Unknown`.
    pub(super) status: &'static str,
    pub(super) reason: &'static str,
    pub(super) message: Cow<'static, str>,
}

impl Verdict {
    pub(super) fn yes(condition: &'static str, reason: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self { condition, status: "True", reason, message: cut(message.into()) }
    }

    pub(super) fn no(condition: &'static str, reason: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self { condition, status: "False", reason, message: cut(message.into()) }
    }

    pub(super) fn unknown(
        condition: &'static str,
        reason: &'static str,
        message: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self { condition, status: "Unknown", reason, message: cut(message.into()) }
    }

    /// Reason and note of the Event that goes with it, where it is bad news.
    pub(super) fn warning(&self) -> Option<(&'static str, String)> {
        (self.status == "False").then(|| (self.reason, self.message.clone().into_owned()))
    }
}

/// A refusal's code as the reason of a condition: `token-used-up` is `TokenUsedUp`, and the gateway turns it back.
pub(super) fn reason_of(refusal: &JoinRefusal) -> &'static str {
    match refusal {
        JoinRefusal::Token(TokenRefusal::Unknown) => "TokenUnknown",
        JoinRefusal::Token(TokenRefusal::Expired(_)) => "TokenExpired",
        JoinRefusal::Token(TokenRefusal::UsedUp) => "TokenUsedUp",
        JoinRefusal::Token(TokenRefusal::Revoked) => "TokenRevoked",
        JoinRefusal::Token(TokenRefusal::NameNotAllowed { .. }) => "NameNotAllowed",
        JoinRefusal::WrongIdentity => "WrongIdentity",
        JoinRefusal::NameTaken { .. } => "NameTaken",
        JoinRefusal::IdentityKnown(_) => "IdentityKnown",
        JoinRefusal::KeyTaken(_) => "KeyTaken",
        JoinRefusal::RouteNotAllowed { .. } => "RouteNotAllowed",
        JoinRefusal::RouteOverlap { .. } => "RouteOverlap",
        JoinRefusal::AddressesExhausted(_) => "AddressesExhausted",
    }
}

/// What there is to say about routes: nothing where none ever was refused.
pub(super) fn routes(condition: &'static str, refused: &[RouteRefusal]) -> Option<Verdict> {
    told(condition, refused.first().map(RouteRefusal::reason), refused, "every network that is wanted leads to it")
}

/// Bad news about a list of things, or that all is well; the latter is worth telling only where the former stands.
pub(super) fn told(
    condition: &'static str,
    reason: Option<&'static str>,
    faults: &[impl Display],
    well: &'static str,
) -> Option<Verdict> {
    Some(match reason {
        Some(reason) => Verdict::no(condition, reason, join(faults)),
        None => Verdict::yes(condition, ALL_WELL, well),
    })
}

/// The reason of a condition that tells of the end of bad news. It is not written where there was none.
pub(super) const ALL_WELL: &str = "Accepted";

/// Sets a Node's condition; none where it stands already.
pub(super) fn of_node(current: Option<&NodeCondition>, verdict: &Verdict, now: Now) -> Option<NodeCondition> {
    if current.is_none() && verdict.reason == ALL_WELL {
        return None;
    }
    let same_status = current.filter(|current| current.status == verdict.status);
    let same = same_status.filter(|current| {
        current.reason.as_deref() == Some(verdict.reason) && current.message.as_deref() == Some(&*verdict.message)
    });
    if same.is_some() {
        return None;
    }
    let since = same_status.and_then(|current| current.last_transition_time.clone()).unwrap_or_else(|| time(now));
    Some(NodeCondition {
        type_: verdict.condition.to_owned(),
        status: verdict.status.to_owned(),
        reason: Some(verdict.reason.to_owned()),
        message: Some(verdict.message.clone().into_owned()),
        last_transition_time: Some(since),
        last_heartbeat_time: Some(time(now)),
    })
}

/// Sets a condition of one of our resources. Whether status or reason changed.
pub(super) fn set(conditions: &mut Vec<Condition>, verdict: &Verdict, generation: Option<i64>, now: Now) -> bool {
    let current = conditions.iter_mut().find(|condition| condition.type_ == verdict.condition);
    let Some(current) = current else {
        if verdict.reason == ALL_WELL {
            return false;
        }
        conditions.push(Condition {
            type_: verdict.condition.to_owned(),
            status: verdict.status.to_owned(),
            reason: verdict.reason.to_owned(),
            message: verdict.message.clone().into_owned(),
            observed_generation: generation,
            last_transition_time: time(now),
        });
        return true;
    };
    let news = current.status != verdict.status || current.reason != verdict.reason;
    if current.status != verdict.status {
        current.last_transition_time = time(now);
    }
    verdict.status.clone_into(&mut current.status);
    verdict.reason.clone_into(&mut current.reason);
    verdict.message.as_ref().clone_into(&mut current.message);
    current.observed_generation = generation;
    news
}

/// Whether a condition is there and True.
pub(super) fn is_true(conditions: &[Condition], type_: &str) -> bool {
    conditions.iter().any(|condition| condition.type_ == type_ && condition.status == "True")
}

/// Addresses without their prefix lengths.
pub(super) fn hosts(nets: &[IpNet]) -> Vec<String> {
    nets.iter().map(|net| net.addr().to_string()).collect()
}

/// Addresses for people.
pub(super) fn list(nets: &[IpNet]) -> String {
    hosts(nets).join(" and ")
}

fn join(items: &[impl Display]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Cuts a text to what an Event takes.
pub(super) fn cut(text: Cow<'static, str>) -> Cow<'static, str> {
    if text.len() <= MAX_MESSAGE {
        return text;
    }
    let end = text.floor_char_boundary(MAX_MESSAGE - 3);
    format!("{}...", &text[..end]).into()
}

/// Kubernetes tells times to the second.
pub(super) fn time(now: Now) -> Time {
    let seconds = i64::try_from(now / 1000).unwrap_or(0);
    Time(Timestamp::from_second(seconds).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_the_codes_of_refusals_in_camel_case() {
        let refusals = [
            JoinRefusal::Token(TokenRefusal::Unknown),
            JoinRefusal::Token(TokenRefusal::Expired(1)),
            JoinRefusal::Token(TokenRefusal::UsedUp),
            JoinRefusal::Token(TokenRefusal::Revoked),
            JoinRefusal::WrongIdentity,
            JoinRefusal::IdentityKnown("a".parse().unwrap()),
            JoinRefusal::KeyTaken("a".parse().unwrap()),
            JoinRefusal::AddressesExhausted("10.0.0.0/8".parse().unwrap()),
        ];
        for refusal in refusals {
            let words = refusal.code().split('-').map(|word| word[..1].to_uppercase() + &word[1..]);
            assert_eq!(reason_of(&refusal), words.collect::<String>());
        }
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        let long = cut("ü".repeat(2000).into());
        assert!(long.len() <= MAX_MESSAGE && long.ends_with("..."));
        assert_eq!(cut("short".into()), "short");
    }
}
