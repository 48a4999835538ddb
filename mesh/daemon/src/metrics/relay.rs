//! The relay's metrics.

use keystone_mesh_core::relay::RelayDrop;

use super::{Metric, Page, process};
use crate::quic::relay_server::{REFUSALS, RelaySnapshot};

const INFO: Metric = Metric::gauge("keystone_relay_build_info", &["version"], "1; the version is in the label.");
const CLIENTS: Metric = Metric::gauge("keystone_relay_clients", &[], "Connected clients that exchange datagrams.");
const JOINERS: Metric = Metric::gauge("keystone_relay_joiners", &[], "Connected machines without an approval.");
const ADMITTED: Metric = Metric::counter(
    "keystone_relay_admitted_total",
    &["role"],
    "Connections admitted: of the network, nodes, joiners.",
);
const REFUSED: Metric = Metric::counter("keystone_relay_refused_total", &["code"], "Connections refused, by reason.");
const REPLACED: Metric = Metric::counter(
    "keystone_relay_replaced_total",
    &[],
    "Connections whose place another one with the same identity took.",
);
const CUT: Metric = Metric::counter("keystone_relay_joiners_cut_total", &[], "Joiners whose time was over.");
const MALFORMED: Metric =
    Metric::counter("keystone_relay_malformed_messages_total", &[], "Messages after the greeting that were none.");
const DATAGRAMS: Metric = Metric::counter("keystone_relay_forwarded_datagrams_total", &[], "Datagrams forwarded.");
const BYTES: Metric = Metric::counter(
    "keystone_relay_forwarded_bytes_total",
    &[],
    "Bytes of forwarded datagrams, frame headers included.",
);
const DROPS: Metric = Metric::counter(
    "keystone_relay_dropped_datagrams_total",
    &["reason"],
    "Datagrams dropped; `quota`: the sender's share was used up.",
);
const OPEN_SPLICES: Metric =
    Metric::gauge("keystone_relay_open_splices", &[], "Streams between a client and the control plane that are open.");
const SPLICES: Metric = Metric::counter("keystone_relay_splices_total", &[], "Streams that were spliced.");
const SPLICES_REFUSED: Metric =
    Metric::counter("keystone_relay_splices_refused_total", &["code"], "Streams that were refused, by reason.");
const SPLICED_BYTES: Metric =
    Metric::counter("keystone_relay_spliced_bytes_total", &[], "Bytes of spliced streams that ended, both ways.");

/// Every metric of a relay, in the order of the page.
pub const METRICS: [Metric; 15] = [
    INFO,
    CLIENTS,
    JOINERS,
    ADMITTED,
    REFUSED,
    REPLACED,
    CUT,
    MALFORMED,
    DATAGRAMS,
    BYTES,
    DROPS,
    OPEN_SPLICES,
    SPLICES,
    SPLICES_REFUSED,
    SPLICED_BYTES,
];

/// The page of a relay alone.
pub fn page(relay: &RelaySnapshot) -> Page {
    let mut page = Page::default();
    add(&mut page, relay);
    process::add(&mut page);
    page
}

/// Adds a relay's metrics: alone, or inside a daemon.
pub fn add(page: &mut Page, relay: &RelaySnapshot) {
    let by_code = |counts: &std::collections::BTreeMap<String, u64>| {
        REFUSALS.map(|(_, label)| ([label.to_owned()], counts.get(label).copied().unwrap_or(0) as f64))
    };
    let [network, node, joiner] = relay.admitted;
    let roles = [("network", network), ("node", node), ("joiner", joiner)];
    let drops = RelayDrop::ALL.iter().map(|reason| ([reason.label().to_owned()], relay.dropped(*reason) as f64));

    page.add_each(&INFO, [([env!("CARGO_PKG_VERSION").to_owned()], 1.0)]);
    page.add(&CLIENTS, relay.clients as f64);
    page.add(&JOINERS, relay.joiners as f64);
    page.add_each(&ADMITTED, roles.map(|(role, count)| ([role.to_owned()], count as f64)));
    page.add_each(&REFUSED, by_code(&relay.refused));
    page.add(&REPLACED, relay.replaced as f64);
    page.add(&CUT, relay.cut as f64);
    page.add(&MALFORMED, relay.malformed_messages as f64);
    page.add(&DATAGRAMS, relay.forwarded_datagrams as f64);
    page.add(&BYTES, relay.forwarded_bytes as f64);
    page.add_each(&DROPS, drops);
    page.add(&OPEN_SPLICES, relay.open_splices as f64);
    page.add(&SPLICES, relay.splices as f64);
    page.add_each(&SPLICES_REFUSED, by_code(&relay.splices_refused));
    page.add(&SPLICED_BYTES, relay.spliced_bytes as f64);
}
