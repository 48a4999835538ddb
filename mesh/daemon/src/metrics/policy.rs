//! Metrics of the enforcement of network policies.

use std::time::Duration;

use super::{Metric, Page};
use crate::status::NetworkPolicy;

const STATE: Metric = Metric::gauge(
    "keystone_policy_state",
    &["state"],
    "1 for the state in which enforcement is: `waiting`, `current`, `stale` or `failed`.",
);
const POLICIES: Metric = Metric::gauge("keystone_policy_policies", &[], "Network policies of the cluster.");
const FAULTY: Metric = Metric::gauge(
    "keystone_policy_faulty_policies",
    &[],
    "Network policies that could be read in part only and allow less than they say.",
);
const ISOLATED: Metric =
    Metric::gauge("keystone_policy_isolated_pods", &[], "Pods of this node that network policies isolate.");
const WAITING: Metric =
    Metric::gauge("keystone_policy_waiting_pods", &[], "Those of the isolated pods that have no address yet.");
const APPLIES: Metric =
    Metric::counter("keystone_policy_applies_total", &[], "Transactions of network policies that the kernel took.");
const ERRORS: Metric =
    Metric::counter("keystone_policy_apply_errors_total", &[], "Those that could not be made or that it refused.");
const REPAIRS: Metric = Metric::counter(
    "keystone_policy_repairs_total",
    &[],
    "Transactions that put right what somebody else had changed.",
);
const SECONDS: Metric = Metric::gauge(
    "keystone_policy_apply_seconds",
    &[],
    "How long the last change took from being collected to being in force.",
);
const LAST: Metric = Metric::gauge(
    "keystone_policy_last_applied_timestamp_seconds",
    &[],
    "When the kernel was last known to have what it should, in seconds since 1970.",
);

/// Every metric of enforcement, in the order of the page.
pub const METRICS: [Metric; 10] = [STATE, POLICIES, FAULTY, ISOLATED, WAITING, APPLIES, ERRORS, REPAIRS, SECONDS, LAST];

/// Adds the metrics of enforcement. `now`: the time since 1970.
pub fn add(page: &mut Page, policy: &NetworkPolicy, now: Duration) {
    let state = |state: &str| ([state.to_owned()], f64::from(state == policy.state));
    page.add_each(&STATE, NetworkPolicy::STATES.map(state));
    page.add(&POLICIES, policy.policies as f64);
    page.add(&FAULTY, policy.faulty_policies as f64);
    page.add(&ISOLATED, policy.isolated_pods as f64);
    page.add(&WAITING, policy.waiting_pods as f64);
    page.add(&APPLIES, policy.applies as f64);
    page.add(&ERRORS, policy.errors as f64);
    page.add(&REPAIRS, policy.repairs as f64);
    page.add_each(&SECONDS, policy.apply_ms.map(|ms| ([], ms / 1e3)));
    // To the millisecond: two clocks were read, one after the other.
    let at = policy.last_applied_s.map(|ago| ((now.as_secs_f64() - ago) * 1e3).round() / 1e3);
    page.add_each(&LAST, at.map(|at| ([], at)));
}
