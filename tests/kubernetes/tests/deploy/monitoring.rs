//! Rules and dashboard: every metric is one that the programs have, and a real Prometheus takes the rules.

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use keystone_lab::{Process, tool, wait};
use serde_json::Value;

use crate::{PATIENCE, POLL, can_go_on, documents, repository, run};

const RULES: &str = include_str!("../../../../deploy/monitoring/alerts.yaml");
const TESTS: &str = include_str!("../../../../deploy/monitoring/alerts.test.yaml");
const DASHBOARD: &str = include_str!("../../../../deploy/monitoring/dashboard.json");
const METRICS: &str = include_str!("../../../../docs/metrics.md");
const OPERATIONS: &str = include_str!("../../../../docs/operations.md");

/// Every name in docs/metrics.md, which tests of the programs hold to the code.
fn documented() -> BTreeSet<&'static str> {
    let rows = METRICS.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.filter_map(|row| row.split('`').next()).filter(|name| name.contains('_')).collect()
}

/// What of these queries looks like a metric of ours.
fn metrics_of<'a>(queries: impl IntoIterator<Item = &'a str>) -> BTreeSet<&'a str> {
    let words = queries.into_iter().flat_map(|query| query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'));
    words.filter(|word| word.starts_with("keystone_") || word.starts_with("process_")).collect()
}

/// Every alert: its name, and the rule.
fn alerts() -> Vec<(String, Value)> {
    let groups = documents(RULES).remove(0)["groups"].clone();
    let rules = groups.as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap().clone());
    rules.map(|rule| (rule["alert"].as_str().unwrap().to_owned(), rule)).collect()
}

fn assert_documented<'a>(queries: impl IntoIterator<Item = &'a str>) {
    let documented = documented();
    for metric in metrics_of(queries) {
        let of_histogram = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| metric.strip_suffix(suffix));
        let known = documented.contains(metric) || of_histogram.is_some_and(|family| documented.contains(family));
        assert!(known, "docs/metrics.md knows no {metric}");
    }
}

#[test]
fn alerts_speak_of_metrics_that_there_are_and_of_help_that_there_is() {
    let alerts = alerts();
    assert_documented(alerts.iter().map(|(_, rule)| rule["expr"].as_str().unwrap()));
    let headings = OPERATIONS.lines().filter_map(|line| line.strip_prefix("## "));
    let anchors: BTreeSet<String> = headings
        .map(|heading| {
            let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-'));
            kept.collect::<String>().to_lowercase().replace(' ', "-")
        })
        .collect();
    for (name, rule) in &alerts {
        let at = rule["annotations"]["runbook_url"].as_str().unwrap();
        let (page, anchor) = at.split_once('#').unwrap();
        assert!(page.ends_with("/docs/operations.md") && anchors.contains(anchor), "{name}: {at}");
        assert!(rule["labels"]["severity"].is_string() && rule["annotations"]["summary"].is_string(), "{name}");
        assert!(TESTS.contains(name.as_str()), "alerts.test.yaml never plays {name}");
    }
}

#[test]
fn the_dashboard_shows_metrics_that_there_are() {
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let queries = panels.iter().flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let queries: Vec<&str> = queries.map(|target| target["expr"].as_str().unwrap()).collect();
    assert!(queries.len() > 30);
    assert_documented(queries.iter().copied());
    assert_documented([dashboard["templating"].to_string().as_str()]);
    let ids: BTreeSet<i64> = panels.iter().map(|panel| panel["id"].as_i64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len());
}

#[test]
fn promtool_finds_no_fault_and_the_rules_do_what_their_tests_say() {
    if !has("promtool") {
        return;
    }
    let promtool = |arguments: &[&str]| {
        run(Command::new(tool::find("promtool").unwrap()).current_dir(repository("deploy/monitoring")).args(arguments))
    };
    promtool(&["check", "rules", "alerts.yaml"]).unwrap();
    let said = promtool(&["test", "rules", "alerts.test.yaml"]).unwrap();
    assert!(said.contains("SUCCESS"), "{said}");

    // As Prometheus itself parses them, the dashboard's queries are queries.
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let mut rules = String::from("groups:\n  - name: dashboard\n    rules:\n");
    for target in dashboard["panels"].as_array().unwrap().iter().flat_map(|panel| panel["targets"].as_array()).flatten()
    {
        let query = target["expr"].as_str().unwrap().replace("$__rate_interval", "5m").replace("$instance", ".*");
        rules.push_str(&format!(
            "      - {{record: 'a:b', labels: {{id: '{}'}}, expr: {}}}\n",
            rules.len(),
            Value::from(query)
        ));
    }
    let file = std::env::temp_dir().join(format!("keystone-dashboard-{}.yaml", std::process::id()));
    fs::write(&file, rules).unwrap();
    let checked = promtool(&["check", "rules", "--lint=none", file.to_str().unwrap()]);
    fs::remove_file(&file).unwrap();
    checked.unwrap();
}

#[test]
fn a_real_prometheus_loads_the_rules() {
    if !has("prometheus") {
        return;
    }
    let folder = std::env::temp_dir().join(format!("keystone-prometheus-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let loaded = load_rules(&folder);
    fs::remove_dir_all(&folder).unwrap();
    let mut loaded = loaded.unwrap();
    let mut shipped: Vec<String> = alerts().into_iter().map(|(name, _)| name).collect();
    loaded.sort();
    shipped.sort();
    assert_eq!(loaded, shipped);
}

/// The names of the alerts that a Prometheus has which was given the rules.
fn load_rules(folder: &std::path::Path) -> Result<Vec<String>> {
    let rules = repository("deploy/monitoring/alerts.yaml").canonicalize()?;
    let config = folder.join("prometheus.yaml");
    fs::write(&config, format!("rule_files: [{}]\n", rules.display()))?;
    // The port is free until Prometheus has it, as far as that can be had.
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    let mut command = Command::new(tool::find("prometheus").context("prometheus")?);
    command.arg("--config.file").arg(&config).arg("--storage.tsdb.path").arg(folder.join("data"));
    command.arg(format!("--web.listen-address=127.0.0.1:{port}")).stdin(Stdio::null());
    let mut prometheus = Process::start(&mut command, &folder.join("log"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = wait::until("Prometheus tells its rules", PATIENCE, POLL, || {
        if let Some(status) = prometheus.ended()? {
            anyhow::bail!("it ended ({status}): {}", prometheus.log_tail(20));
        }
        Ok(runtime.block_on(get(port, "/api/v1/rules")).ok().filter(|answer| answer["status"] == "success"))
    })?;
    let groups = answer["data"]["groups"].as_array().context("groups")?.iter();
    let rules = groups.flat_map(|group| group["rules"].as_array().into_iter().flatten());
    Ok(rules.filter_map(|rule| rule["name"].as_str()).map(str::to_owned).collect())
}

async fn get(port: u16, path: &str) -> Result<Value> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (_, body) = answer.split_once("\r\n\r\n").context("an answer")?;
    Ok(serde_json::from_str(body)?)
}

fn has(program: &str) -> bool {
    let missing = format!("{program} is not here; `make deps` installs Debian's package prometheus");
    can_go_on(tool::find(program).is_none().then_some(missing.as_str()))
}
