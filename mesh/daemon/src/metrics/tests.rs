use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::daemon::Around;
use super::*;
use crate::quic::relay_server::RelaySnapshot;
use crate::status::tests::sample;

const DOC: &str = include_str!("../../../../docs/metrics.md");

fn around(peers: usize) -> Around {
    Around { peers, refused: 0, now: Duration::from_secs(1_000_000) }
}

/// What stands between the marks of a section in docs/metrics.md.
fn section(name: &str) -> &'static str {
    let (_, rest) = DOC.split_once(&format!("<!-- {name}: begin -->\n")).expect("the section begins");
    rest.split_once(&format!("<!-- {name}: end -->")).expect("the section ends").0
}

fn table(metrics: &[Metric]) -> String {
    let mut text = "| metric | type | labels | meaning |\n| --- | --- | --- | --- |\n".to_owned();
    for Metric { name, kind, labels, help } in metrics {
        let labels = labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", ");
        let labels = if labels.is_empty() { " ".to_owned() } else { format!(" {labels} ") };
        text.push_str(&format!("| `{name}` | {kind} |{labels}| {help} |\n"));
    }
    text
}

#[test]
fn the_page_in_docs_has_the_very_tables() {
    for (name, metrics) in [
        ("daemon", &daemon::METRICS[..]),
        ("policy", &policy::METRICS),
        ("gateway", &gateway::METRICS),
        ("relay", &relay::METRICS),
        ("process", &process::METRICS),
    ] {
        let table = table(metrics);
        assert_eq!(section(name), table, "docs/metrics.md, section {name}, should be:\n{table}");
    }
}

#[test]
fn names_are_of_the_conventions() {
    let all = [&daemon::METRICS[..], &policy::METRICS, &gateway::METRICS, &relay::METRICS, &process::METRICS].concat();
    let mut names = BTreeSet::new();
    for metric in all {
        let name = metric.name;
        assert!(names.insert(name), "{name} is described twice");
        assert!(name.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{name}");
        assert_eq!(name.ends_with("_total"), metric.kind == Kind::Counter, "{name}");
        assert!(!["_ms", "_millis", "_kib", "_percent"].iter().any(|unit| name.contains(unit)), "{name}");
        assert!(metric.help.ends_with('.') && !metric.help.contains('|'), "{name}: {}", metric.help);
    }
}

/// Every name on a page.
fn names(text: &str) -> BTreeSet<&str> {
    text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect()
}

#[test]
fn a_page_has_every_metric_that_is_described_and_no_other() {
    let text = daemon::page(&sample(), around(100)).render(Format::Text);
    let all = [&daemon::METRICS[..], &policy::METRICS, &gateway::METRICS, &relay::METRICS, &process::METRICS].concat();
    assert_eq!(names(&text), all.iter().map(|metric| metric.name).collect());

    let text = relay::page(&RelaySnapshot::default()).render(Format::Text);
    let all = [&relay::METRICS[..], &process::METRICS].concat();
    assert_eq!(names(&text), all.iter().map(|metric| metric.name).collect());
}

#[test]
fn values_are_in_base_units_and_what_did_not_happen_is_zero() {
    let text = daemon::page(&sample(), around(100)).render(Format::Text);
    for line in [
        "keystone_mesh_ready 1.0",
        "keystone_mesh_approval{state=\"approved\"} 1.0",
        "keystone_mesh_approval{state=\"pending\"} 0.0",
        "keystone_mesh_nat_info{nat=\"endpoint-independent\"} 1.0",
        "keystone_mesh_peers{path=\"relayed\"} 1.0",
        "keystone_mesh_peers{path=\"idle\"} 0.0",
        "keystone_mesh_peer_rtt_seconds{peer=\"worker-sym\"} 0.003",
        "keystone_mesh_peer_last_handshake_timestamp_seconds{peer=\"worker-sym\"} 999970.0",
        "keystone_mesh_peer_received_bytes_total{peer=\"worker-pub\"} 2000.0",
        "keystone_mesh_peer_path{peer=\"worker-pub\",path=\"direct\"} 1.0",
        "keystone_mesh_relay_rtt_seconds{relay=\"198.51.100.9:51840\"} 0.003",
        "keystone_mesh_dropped_packets_total{reason=\"no_route\"} 7.0",
        "keystone_mesh_dropped_packets_total{reason=\"bad_tag\"} 0.0",
        "keystone_mesh_registry_up{kind=\"embedded\"} 1.0",
        "keystone_mesh_registry_stale_seconds 0.0",
        "keystone_mesh_node_faults{code=\"record\"} 1.0",
        "keystone_policy_policies 3.0",
        "keystone_policy_apply_seconds 0.012",
        "keystone_policy_last_applied_timestamp_seconds 999970.0",
        "keystone_policy_state{state=\"stale\"} 0.0",
        "keystone_gateway_joins_total{code=\"accepted\"} 0.0",
        "keystone_gateway_joins_total{code=\"token-unknown\"} 2.0",
        "keystone_relay_dropped_datagrams_total{reason=\"quota\"} 0.0",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
}

#[test]
fn a_lost_registry_shows_its_age() {
    let mut status = sample();
    status.registry.state = "stale".into();
    let text = daemon::page(&status, around(100)).render(Format::Text);
    assert!(text.contains("keystone_mesh_registry_up{kind=\"embedded\"} 0.0\n"), "{text}");
    assert!(text.contains("keystone_mesh_registry_stale_seconds 60.0\n"), "{text}");
}

#[test]
fn beyond_the_limit_there_are_totals_alone() {
    for (limit, expected) in [(2, true), (1, false), (0, false)] {
        let text = daemon::page(&sample(), around(limit)).render(Format::Text);
        assert_eq!(text.contains("keystone_mesh_peer_"), expected, "limit {limit}");
        assert!(text.contains("keystone_mesh_peers{path=\"direct\"} 1.0\n"));
    }
}

#[test]
fn two_peers_of_one_name_do_not_spoil_the_page() {
    let mut status = sample();
    status.peers[1].name = status.peers[0].name.clone();
    let text = daemon::page(&status, around(100)).render(Format::Text);
    assert_eq!(text.lines().filter(|line| line.starts_with("keystone_mesh_peer_rtt_seconds{")).count(), 1);
}

#[test]
fn openmetrics_is_given_to_whoever_asks_for_it() {
    let prometheus = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
    assert_eq!(Format::negotiate(Some(prometheus)), Format::OpenMetrics);
    assert_eq!(Format::negotiate(Some("*/*")), Format::Text);
    assert_eq!(Format::negotiate(None), Format::Text);
    let text = daemon::page(&sample(), around(100)).render(Format::OpenMetrics);
    assert!(
        text.contains("# TYPE keystone_mesh_path_changes counter\nkeystone_mesh_path_changes_total 4.0\n"),
        "{text}"
    );
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn prometheus_itself_finds_no_fault_with_a_page() {
    let mut status = sample();
    // Names of plain peers are whatever people write into the configuration.
    status.peers[0].name = "a \"laptop\"\\\n\u{1f4bb}".into();
    let page = daemon::page(&status, around(100)).render(Format::Text);
    let promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut promtool = match promtool {
        Ok(promtool) => promtool,
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "promtool: {error}, and in CI nothing is skipped");
            eprintln!("SKIPPED: promtool ({error}); Debian has it in `prometheus`");
            return;
        }
    };
    promtool.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.is_empty(), "{said}\n{page}");
}
