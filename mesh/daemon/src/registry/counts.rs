//! What a gateway counts. A session begins seldom, so a lock does.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use keystone_mesh_core::gateway::{Refusal, ToGateway};
use serde::{Deserialize, Serialize};

/// The code of whoever was let in, among those of refusals.
pub const ACCEPTED: &str = "accepted";
/// The code of those whose own is one too many.
const OTHER: &str = "other";
/// Codes that are told apart. There are about 20; some come from conditions, which others may write.
const MAX_CODES: usize = 40;

/// What a session begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opening {
    Join,
    Attach,
    Other,
}

impl Opening {
    pub(super) fn of(message: &ToGateway) -> Self {
        match message {
            ToGateway::Join { .. } => Self::Join,
            ToGateway::Attach { .. } => Self::Attach,
            ToGateway::Publish { .. } | ToGateway::Leave => Self::Other,
        }
    }
}

/// A gateway's counters and gauges at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct GatewaySnapshot {
    /// Sessions, at present.
    pub sessions: usize,
    /// Joins by token, by code: `accepted`, or why not.
    pub joins: BTreeMap<String, u64>,
    /// Sessions of members that began, by code: `accepted`, or why not.
    pub attaches: BTreeMap<String, u64>,
    /// Sessions refused because there were too many.
    pub full: u64,
}

/// A gateway's counters.
#[derive(Debug, Default)]
pub(super) struct GatewayCounters(Mutex<GatewaySnapshot>);

impl GatewayCounters {
    pub(super) fn opened<T>(&self, opening: Opening, result: &Result<T, Refusal>) {
        let code = result.as_ref().map_or_else(|refusal| refusal.code.as_str(), |_| ACCEPTED);
        let mut counts = self.lock();
        let codes = match opening {
            Opening::Join => &mut counts.joins,
            Opening::Attach => &mut counts.attaches,
            Opening::Other => return,
        };
        let code = if codes.len() < MAX_CODES || codes.contains_key(code) { code } else { OTHER };
        *codes.entry(code.to_owned()).or_default() += 1;
    }

    pub(super) fn full(&self) {
        self.lock().full += 1;
    }

    pub(super) fn snapshot(&self, sessions: usize) -> GatewaySnapshot {
        GatewaySnapshot { sessions, ..self.lock().clone() }
    }

    fn lock(&self) -> MutexGuard<'_, GatewaySnapshot> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_told_apart_up_to_a_number() {
        let counters = GatewayCounters::default();
        counters.opened(Opening::Join, &Ok(()));
        for number in 0..1000 {
            let refusal = Refusal { code: format!("reason-{}", number % 100), message: String::new() };
            counters.opened(Opening::Join, &Err::<(), _>(refusal));
        }
        let counted = counters.snapshot(3);
        assert_eq!((counted.sessions, counted.joins[ACCEPTED]), (3, 1));
        assert_eq!(counted.joins.values().sum::<u64>(), 1001, "none is lost");
        assert!(counted.joins.len() <= MAX_CODES + 1 && counted.joins[OTHER] > 0);
    }
}
