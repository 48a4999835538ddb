//! What the controller counts, and the descriptions that docs/metrics.md is held to.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

/// Before every name.
pub const PREFIX: &str = "keystone_controller";

/// The result of a write that was done and changed nothing; it is counted as done, too.
pub const FUTILE: &str = "futile";

/// A label of one name.
macro_rules! label {
    ($(#[$doc:meta])* $type:ident { $field:ident }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
        pub struct $type {
            /// The label's value.
            pub $field: String,
        }

        impl $type {
            /// The label with this value.
            pub fn of(value: impl ToString) -> Self {
                Self { $field: value.to_string() }
            }
        }
    };
}

label!(
    /// In which state a thing is.
    State { state }
);
label!(
    /// Which resource of the API, in the plural.
    Resource { resource }
);
label!(
    /// Which node reports.
    Reporter { node }
);

/// Which kind of action, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ActionLabels {
    /// The kind.
    pub kind: &'static str,
    /// `done`, `conflict`, `gone`, `refused`, `failed`, `dropped` or [`FUTILE`].
    pub result: &'static str,
}

/// Where an error of the API came up, and its code.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ErrorLabels {
    /// `watch`, `write` or `event`.
    pub during: &'static str,
    /// The HTTP status code; `none` where no answer came.
    pub code: String,
}

/// What became of asking a reporter.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PollLabels {
    /// `ok`, `timeout`, `refused` or `malformed`.
    pub result: &'static str,
}

/// A name, type and help text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// As it is scraped; counters with `_total`.
    pub name: String,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// What it means.
    pub help: &'static str,
}

/// Every instrument. Clones share the values.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Nodes by what became of their approval.
    pub nodes: Family<State, Gauge>,
    /// Nodes by `MeshReady`.
    pub ready_nodes: Family<State, Gauge>,
    /// Plain peers by readiness.
    pub peers: Family<State, Gauge>,
    /// Join tokens by state.
    pub join_tokens: Family<State, Gauge>,
    /// Members that are no Nodes and were absent for a day or longer.
    pub absent_members: Gauge,
    /// Routes that were asked for and are not given.
    pub refused_routes: Gauge,
    /// Objects with something that does not read, by resource.
    pub faulty_objects: Family<Resource, Gauge>,
    /// Addresses of the network by state.
    pub addresses: Family<State, Gauge>,
    /// Watched objects, by resource.
    pub objects: Family<Resource, Gauge>,
    /// Objects that could not be read at all, by resource.
    pub malformed: Family<Resource, Counter>,
    /// Watches that had to be opened again.
    pub watch_restarts: Family<Resource, Counter>,
    /// How long one decision took.
    pub reconcile_duration: Histogram,
    /// Actions by kind and result.
    pub actions: Family<ActionLabels, Counter>,
    /// How long a write took.
    pub write_duration: Histogram,
    /// Actions that wait for their turn.
    pub queued: Gauge,
    /// Writes that wait for the API server's answer.
    pub in_flight: Gauge,
    /// Errors of the API by code.
    pub api_errors: Family<ErrorLabels, Counter>,
    /// Whether this replica leads.
    pub leader: Gauge,
    /// Whether somebody leads, as this replica sees it.
    pub leader_seen: Gauge,
    /// Questions to reporters by result.
    pub polls: Family<PollLabels, Counter>,
    /// When each reporter last answered.
    pub last_report: Family<Reporter, Gauge<f64, AtomicU64>>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            nodes: Family::default(),
            ready_nodes: Family::default(),
            peers: Family::default(),
            join_tokens: Family::default(),
            absent_members: Gauge::default(),
            refused_routes: Gauge::default(),
            faulty_objects: Family::default(),
            addresses: Family::default(),
            objects: Family::default(),
            malformed: Family::default(),
            watch_restarts: Family::default(),
            // A pass over 50 nodes is far below a millisecond, one over 5,000 some tens of them.
            reconcile_duration: Histogram::new([0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0]),
            actions: Family::default(),
            write_duration: Histogram::new([0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0]),
            queued: Gauge::default(),
            in_flight: Gauge::default(),
            api_errors: Family::default(),
            leader: Gauge::default(),
            leader_seen: Gauge::default(),
            polls: Family::default(),
            last_report: Family::default(),
        }
    }
}

impl Metrics {
    /// Registers every instrument and describes it.
    pub fn register(&self, registry: &mut Registry) -> Vec<Description> {
        let registry = registry.sub_registry_with_prefix(PREFIX);
        let mut table = Table { registry, rows: Vec::new() };
        table.gauge("nodes", "Nodes and members by what became of their approval", &self.nodes);
        table.gauge("ready_nodes", "Nodes by their condition MeshReady: true, false or unknown", &self.ready_nodes);
        table.gauge("peers", "Plain WireGuard peers by readiness: true or false", &self.peers);
        table.gauge("join_tokens", "Join tokens by state: usable, expired, used-up or revoked", &self.join_tokens);
        table.gauge("addresses", "IPv4 mesh addresses by state: held or free", &self.addresses);
        table.gauge(
            "absent_members",
            "Members that are no Nodes and were out of reach, or without a record, for a day or longer",
            &self.absent_members,
        );
        table.gauge("refused_routes", "Routes that were asked for and are not given", &self.refused_routes);
        table.gauge(
            "faulty_objects",
            "Objects that carry something which does not read, by resource",
            &self.faulty_objects,
        );
        table.gauge("objects", "Objects that are watched, by resource", &self.objects);
        table.counter("malformed", "Objects that could not be read at all, by resource", &self.malformed);
        table.counter("watch_restarts", "Watches that failed and were opened again, by resource", &self.watch_restarts);
        table.histogram(
            "reconcile_duration_seconds",
            "How long it took to decide about the whole cluster",
            &self.reconcile_duration,
        );
        table.counter(
            "actions",
            "Writes that were decided, by kind and by result: done, conflict, gone, refused, failed or dropped; futile are those of done that changed nothing",
            &self.actions,
        );
        table.histogram("write_duration_seconds", "How long the API server took for a write", &self.write_duration);
        table.gauge("queue_depth", "Writes that wait for their turn", &self.queued);
        table.gauge("in_flight", "Writes that wait for the API server's answer", &self.in_flight);
        table.counter(
            "api_errors",
            "Errors of the Kubernetes API by occasion (watch, write, event) and HTTP status code",
            &self.api_errors,
        );
        table.gauge("leader", "1 on the replica that leads", &self.leader);
        table.gauge(
            "leader_seen",
            "1 where this replica leads or sees that another one renews the Lease",
            &self.leader_seen,
        );
        table.counter(
            "report_polls",
            "Questions to reporting nodes by result: ok, timeout, refused or malformed",
            &self.polls,
        );
        table.gauge("last_report_timestamp_seconds", "When a reporting node last answered", &self.last_report);
        table.rows
    }
}

/// Every instrument's name, type and help.
pub fn descriptions() -> Vec<Description> {
    Metrics::default().register(&mut Registry::default())
}

/// The registry in the OpenMetrics text format.
pub fn encode(registry: &Registry) -> String {
    let mut text = String::new();
    text::encode(&mut text, registry).expect("a String takes everything");
    text
}

struct Table<'a> {
    registry: &'a mut Registry,
    rows: Vec<Description>,
}

impl Table<'_> {
    fn counter(&mut self, name: &'static str, help: &'static str, metric: &(impl Metric + Clone)) {
        self.add(name, "_total", "counter", help, metric);
    }

    fn gauge(&mut self, name: &'static str, help: &'static str, metric: &(impl Metric + Clone)) {
        self.add(name, "", "gauge", help, metric);
    }

    fn histogram(&mut self, name: &'static str, help: &'static str, metric: &(impl Metric + Clone)) {
        self.add(name, "", "histogram", help, metric);
    }

    fn add(
        &mut self,
        name: &'static str,
        suffix: &str,
        kind: &'static str,
        help: &'static str,
        metric: &(impl Metric + Clone),
    ) {
        self.registry.register(name, help, metric.clone());
        self.rows.push(Description { name: format!("{PREFIX}_{name}{suffix}"), kind, help });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_in_docs_has_the_very_metrics() {
        let page = include_str!("../../docs/metrics.md");
        let (_, section) = page.split_once("<!-- controller: begin -->\n").unwrap();
        let (section, _) = section.split_once("<!-- controller: end -->").unwrap();
        let cells = |row: &str| row.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
        let rows: Vec<Vec<String>> = section.lines().skip(2).map(cells).collect();
        let told: Vec<[&str; 3]> = rows.iter().map(|row| [row[0].trim_matches('`'), &row[1], &row[3]]).collect();
        let described = descriptions();
        let helps: Vec<String> = described.iter().map(|metric| format!("{}.", metric.help)).collect();
        let expected: Vec<[&str; 3]> =
            described.iter().zip(&helps).map(|(metric, help)| [&metric.name, metric.kind, help]).collect();
        assert_eq!(told, expected);
    }

    #[test]
    fn every_description_is_what_a_scrape_says() {
        let metrics = Metrics::default();
        metrics.nodes.get_or_create(&State::of("approved")).set(1);
        metrics.ready_nodes.get_or_create(&State::of("true")).set(1);
        metrics.peers.get_or_create(&State::of("true")).set(1);
        metrics.join_tokens.get_or_create(&State::of("usable")).set(1);
        metrics.faulty_objects.get_or_create(&Resource::of("node")).set(1);
        metrics.addresses.get_or_create(&State::of("free")).set(1);
        metrics.objects.get_or_create(&Resource::of("nodes")).set(1);
        metrics.malformed.get_or_create(&Resource::of("nodes")).inc();
        metrics.watch_restarts.get_or_create(&Resource::of("nodes")).inc();
        metrics.actions.get_or_create(&ActionLabels { kind: "approve", result: "done" }).inc();
        metrics.api_errors.get_or_create(&ErrorLabels { during: "watch", code: "410".into() }).inc();
        metrics.polls.get_or_create(&PollLabels { result: "ok" }).inc();
        metrics.last_report.get_or_create(&Reporter::of("home")).set(1.0);
        let mut registry = Registry::default();
        let rows = metrics.register(&mut registry);
        let scrape = encode(&registry);
        for Description { name, kind, help } in rows {
            let family = name.strip_suffix("_total").unwrap_or(&name);
            assert!(scrape.contains(&format!("# HELP {family} {help}.\n# TYPE {family} {kind}\n")), "{name}: {scrape}");
            assert!(scrape.contains(&format!("\n{name}")), "{name}: {scrape}");
        }
    }
}
