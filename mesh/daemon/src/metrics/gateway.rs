//! The gateway's metrics.

use std::collections::BTreeMap;

use super::{Metric, Page};
use crate::registry::counts::{ACCEPTED, GatewaySnapshot};

const SESSIONS: Metric = Metric::gauge("keystone_gateway_sessions", &[], "Nodes that have a session with the gateway.");
const JOINS: Metric =
    Metric::counter("keystone_gateway_joins_total", &["code"], "Joins by token: `accepted`, or why not.");
const ATTACHES: Metric = Metric::counter(
    "keystone_gateway_attaches_total",
    &["code"],
    "Sessions of members that began: `accepted`, or why not.",
);
const FULL: Metric = Metric::counter(
    "keystone_gateway_refused_sessions_total",
    &[],
    "Sessions refused because there were too many at once.",
);

/// Every metric of a gateway, in the order of the page.
pub const METRICS: [Metric; 4] = [SESSIONS, JOINS, ATTACHES, FULL];

/// Adds a gateway's metrics.
pub fn add(page: &mut Page, gateway: &GatewaySnapshot) {
    let by_code = |counts: &BTreeMap<String, u64>| {
        let accepted = ([ACCEPTED.to_owned()], counts.get(ACCEPTED).copied().unwrap_or(0) as f64);
        let refused = counts.iter().filter(|(code, _)| *code != ACCEPTED);
        let refused = refused.map(|(code, count)| ([code.clone()], *count as f64));
        [accepted].into_iter().chain(refused).collect::<Vec<_>>()
    };
    page.add(&SESSIONS, gateway.sessions as f64);
    page.add_each(&JOINS, by_code(&gateway.joins));
    page.add_each(&ATTACHES, by_code(&gateway.attaches));
    page.add(&FULL, gateway.full as f64);
}
