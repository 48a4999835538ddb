//! Which of the decided actions is carried out when.
//!
//! Every decision replaces what waited, so the newest wins and nothing outdated is ever sent. Of each part of an object
//! (its approval, its taints, its status) one write at most is under way; until its answer was seen nothing is decided
//! about that part, for the view may be behind. What failed rests, longer each time; so does what was done and is
//! wanted again at once, for then the write had no effect.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use crate::decide::{Action, Effect};

/// Writes under way at once: enough to approve a burst of 200 nodes in a second, few enough for a small API server.
pub const IN_FLIGHT: usize = 16;

/// A part of an object: what kind of write, and the object's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Part {
    /// The kind of write, as in metrics.
    pub kind: &'static str,
    /// The object.
    pub name: String,
}

impl Part {
    /// Which part an effect changes.
    pub fn of(effect: &Effect) -> Self {
        let (kind, name) = match effect {
            Effect::Ledger { edit, .. } => ("ledger", edit.page.to_string()),
            Effect::Approve { target, .. } => ("approve", target.name.to_string()),
            Effect::StatePeer { target, .. } => ("state-peer", target.name.to_string()),
            Effect::MemberStatus { target, .. } => ("member-status", target.name.to_string()),
            Effect::PeerStatus { target, .. } => ("peer-status", target.name.to_string()),
            Effect::TokenStatus { name, .. } => ("token-status", name.clone()),
            Effect::NodeConditions { target, .. } => ("node-conditions", target.name.to_string()),
            Effect::NodeTaints { target, .. } => ("node-taints", target.name.to_string()),
            Effect::NodeInit { target, .. } => ("node-init", target.name.to_string()),
            Effect::NodeAddresses { target, .. } => ("node-addresses", target.name.to_string()),
            Effect::DeleteMember { target } => ("delete-member", target.name.to_string()),
        };
        Self { kind, name }
    }
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It stands.
    Done,
    /// The object is not what it was when this was decided; the next decision knows.
    Conflict,
    /// The object is gone.
    Gone,
    /// The API server does not want it: a missing permission, an admission policy, an invalid value.
    Refused,
    /// No answer, or an error of the server.
    Failed,
    /// Leadership ended before it was sent.
    Dropped,
}

impl Outcome {
    /// The label in metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Conflict => "conflict",
            Self::Gone => "gone",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Dropped => "dropped",
        }
    }

    /// The first pause after it, and the longest.
    fn pauses(self) -> Option<(Duration, Duration)> {
        match self {
            Self::Done | Self::Dropped => None,
            // The watch brings the change in milliseconds; longer pauses are for a writer who fights us.
            Self::Conflict | Self::Gone => Some((Duration::from_millis(20), Duration::from_secs(5))),
            // Somebody has to change something first.
            Self::Refused => Some((Duration::from_secs(1), Duration::from_secs(300))),
            Self::Failed => Some((Duration::from_millis(200), Duration::from_secs(15))),
        }
    }
}

/// Pauses after a write that was done and changed nothing. The first is short, for the watch may just be behind (a
/// deletion is answered before it is seen); the longest are for an API server that leaves something out.
const FUTILE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(300));

#[derive(Clone, Copy, Debug)]
struct Rest {
    until: Instant,
    failures: u32,
}

/// The queue.
#[derive(Debug, Default)]
pub struct Queue {
    waiting: VecDeque<Action>,
    busy: BTreeSet<Part>,
    resting: BTreeMap<Part, Rest>,
    /// What was done since the last decision, and how often before in a row it came to nothing.
    done: BTreeMap<Part, (Effect, u32)>,
    /// When the first of the parts that rested at the last decision has done so.
    rested_at: Option<Instant>,
}

impl Queue {
    /// A decision was made: it replaces what waited. Returns which parts were written since the last one to no effect,
    /// for the very same is wanted again, and how many times in a row.
    pub fn handle_decision(&mut self, actions: Vec<Action>, now: Instant) -> Vec<(Part, u32)> {
        let (mut wanted, mut futile) = (BTreeSet::new(), Vec::new());
        let mut done = std::mem::take(&mut self.done);
        self.clear();
        for action in actions {
            let part = Part::of(&action.effect);
            if self.busy.contains(&part) || !wanted.insert(part.clone()) {
                continue;
            }
            if let Some((_, failures)) = done.remove(&part).filter(|(before, _)| action.effect.asks_the_same_as(before))
            {
                futile.push((part.clone(), self.rest(&part, failures, FUTILE, now)));
            }
            match self.resting.get(&part).map(|rest| rest.until).filter(|until| now < *until) {
                Some(until) => self.rested_at = Some(self.rested_at.map_or(until, |first| first.min(until))),
                None => self.waiting.push_back(action),
            }
        }
        // What nobody wants any longer is forgiven.
        self.resting.retain(|part, rest| now < rest.until || wanted.contains(part) || self.busy.contains(part));
        futile
    }

    /// The next write to send, which is under way from here on.
    pub fn take_next(&mut self) -> Option<Action> {
        if self.busy.len() >= IN_FLIGHT {
            return None;
        }
        let action = self.waiting.pop_front()?;
        self.busy.insert(Part::of(&action.effect));
        Some(action)
    }

    /// A write ended. What the answer says must be in the view before the next decision. Returns how many times in a
    /// row it came to nothing.
    pub fn handle_outcome(&mut self, effect: &Effect, outcome: Outcome, now: Instant) -> u32 {
        let part = Part::of(effect);
        self.busy.remove(&part);
        let failures = self.resting.remove(&part).map_or(0, |rest| rest.failures);
        if let Some(pauses) = outcome.pauses() {
            return self.rest(&part, failures, pauses, now);
        }
        if outcome == Outcome::Done {
            self.done.insert(part, (effect.clone(), failures));
        }
        0
    }

    /// A part rests, once more. Returns how often in a row.
    fn rest(&mut self, part: &Part, failures: u32, (first, longest): (Duration, Duration), now: Instant) -> u32 {
        let pause = first.saturating_mul(1 << failures.min(16)).min(longest);
        let failures = failures.saturating_add(1);
        self.resting.insert(part.clone(), Rest { until: now + pause, failures });
        failures
    }

    /// Nothing that waits is to be sent.
    pub fn clear(&mut self) {
        self.waiting.clear();
        self.done.clear();
        self.rested_at = None;
    }

    /// When something that is wanted has rested, so that it is time to decide again.
    pub fn rested_at(&self) -> Option<Instant> {
        self.rested_at
    }

    /// Writes that wait for their turn.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Writes under way.
    pub fn busy(&self) -> usize {
        self.busy.len()
    }
}

#[cfg(test)]
mod tests {
    use keystone_mesh_core::ledger::PageEdit;

    use super::*;

    fn page(page: u32, note: &str) -> Action {
        let edit = PageEdit { page, data: [("0".to_owned(), note.to_owned())].into() };
        Action { effect: Effect::Ledger { edit, resource_version: None }, reason: String::new(), events: vec![] }
    }

    fn effect(page_number: u32) -> Effect {
        page(page_number, "").effect
    }

    #[test]
    fn the_newest_decision_wins() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.handle_decision(vec![page(0, "old"), page(1, "old")], now);
        queue.handle_decision(vec![page(0, "new")], now);
        assert_eq!(queue.take_next(), Some(page(0, "new")));
        assert_eq!(queue.take_next(), None);
    }

    #[test]
    fn a_part_under_way_is_not_sent_again_until_its_answer_came() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.handle_decision(vec![page(0, "a")], now);
        assert!(queue.take_next().is_some());
        queue.handle_decision(vec![page(0, "a")], now);
        assert_eq!(queue.take_next(), None);
        queue.handle_outcome(&effect(0), Outcome::Done, now);
        queue.handle_decision(vec![page(0, "b")], now);
        assert_eq!(queue.take_next(), Some(page(0, "b")));
    }

    #[test]
    fn only_so_many_are_under_way() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.handle_decision((0..100).map(|number| page(number, "")).collect(), now);
        assert_eq!(std::iter::from_fn(|| queue.take_next()).count(), IN_FLIGHT);
        assert_eq!((queue.busy(), queue.waiting()), (IN_FLIGHT, 100 - IN_FLIGHT));
        queue.handle_outcome(&effect(3), Outcome::Failed, now);
        assert_eq!(std::iter::from_fn(|| queue.take_next()).count(), 1);
    }

    #[test]
    fn what_failed_rests_longer_each_time_and_a_success_forgives() {
        let (mut queue, mut now) = (Queue::default(), Instant::now());
        let mut pauses = Vec::new();
        for _ in 0..10 {
            queue.handle_decision(vec![page(0, "")], now);
            assert!(queue.take_next().is_some());
            queue.handle_outcome(&effect(0), Outcome::Failed, now);
            queue.handle_decision(vec![page(0, "")], now);
            assert_eq!(queue.take_next(), None, "it rests");
            let until = queue.rested_at().unwrap();
            pauses.push(until - now);
            now = until;
        }
        assert_eq!(pauses[..3], [200, 400, 800].map(Duration::from_millis));
        assert_eq!(*pauses.last().unwrap(), Duration::from_secs(15));
        queue.handle_decision(vec![page(0, "")], now);
        assert!(queue.take_next().is_some());
        queue.handle_outcome(&effect(0), Outcome::Done, now);
        queue.handle_decision(vec![], now);
        assert_eq!(queue.rested_at(), None);
    }

    #[test]
    fn what_is_done_and_wanted_again_at_once_rests_longer_each_time() {
        let (mut queue, mut now) = (Queue::default(), Instant::now());
        let mut pauses = Vec::new();
        queue.handle_decision(vec![page(0, "")], now);
        for round in 1..16 {
            assert!(queue.take_next().is_some());
            queue.handle_outcome(&effect(0), Outcome::Done, now);
            // A version of another time makes it no other write.
            let mut again = page(0, "");
            if let Effect::Ledger { resource_version, .. } = &mut again.effect {
                *resource_version = Some(round.to_string());
            }
            assert_eq!(queue.handle_decision(vec![again.clone()], now), [(Part::of(&again.effect), round)]);
            assert_eq!(queue.take_next(), None, "it rests");
            let until = queue.rested_at().unwrap();
            pauses.push(until - now);
            now = until;
            assert_eq!(queue.handle_decision(vec![again], now), []);
        }
        assert_eq!(pauses[..3], [200, 400, 800].map(Duration::from_millis));
        assert_eq!(*pauses.last().unwrap(), Duration::from_secs(300));
    }

    #[test]
    fn what_is_wanted_otherwise_or_later_does_not_rest() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.handle_decision(vec![page(0, "a")], now);
        queue.take_next().unwrap();
        queue.handle_outcome(&effect(0), Outcome::Done, now);
        assert_eq!(queue.handle_decision(vec![page(0, "b")], now), []);
        queue.take_next().unwrap();
        queue.handle_outcome(&page(0, "b").effect, Outcome::Done, now);
        // It had its effect, and was undone.
        assert_eq!(queue.handle_decision(vec![], now), []);
        assert_eq!(queue.handle_decision(vec![page(0, "b")], now), []);
        assert!(queue.take_next().is_some());
    }

    #[test]
    fn nothing_is_kept_of_what_nobody_wants() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.handle_decision(vec![page(0, "")], now);
        assert!(queue.take_next().is_some());
        queue.handle_outcome(&effect(0), Outcome::Conflict, now);
        queue.handle_decision(vec![], now + Duration::from_secs(1));
        assert!(queue.resting.is_empty() && queue.done.is_empty() && queue.busy.is_empty() && queue.waiting.is_empty());
    }
}
