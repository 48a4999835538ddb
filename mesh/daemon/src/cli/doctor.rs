//! `doctor`: what this host lacks, and why peers are not direct.

use std::process::ExitCode;

use super::inspect::fetch;
use super::output::{print, print_json};
use crate::config::Places;
use crate::preflight::{self, Finding};
use crate::state::StateDir;
use crate::status::Status;

pub(super) async fn run(places: &Places, json: bool) -> anyhow::Result<ExitCode> {
    let mut findings = preflight::host();
    findings.extend(state(places));
    let status = match fetch(places).await {
        Ok(status) => {
            findings.extend(daemon(&status));
            Some(status)
        }
        Err(error) => {
            findings.push(Finding { check: "daemon", ok: false, says: error.to_string() });
            None
        }
    };
    let healthy = findings.iter().all(|finding| finding.ok || finding.check == "ipv6");
    if json {
        print_json(&serde_json::json!({ "healthy": healthy, "findings": findings }))?;
    } else {
        print(&describe(&findings, status.as_ref()))?;
    }
    Ok(if healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn state(places: &Places) -> Vec<Finding> {
    let state = StateDir::read_only(&places.state_dir);
    let secret = match state.secret() {
        Ok(Some(_)) => Finding { check: "secret", ok: true, says: "the secret reads back".into() },
        Ok(None) => Finding { check: "secret", ok: true, says: "no secret yet: this machine is in no network".into() },
        Err(error) => Finding { check: "secret", ok: false, says: error.to_string() },
    };
    let membership = match state.membership() {
        Ok(Some(membership)) => {
            let role = if membership.control_plane { "its control plane" } else { "a member" };
            let says = format!("`{}`, {role}, of network {}", membership.name, membership.network);
            Finding { check: "membership", ok: true, says }
        }
        Ok(None) => Finding { check: "membership", ok: true, says: "in no network".into() },
        Err(error) => Finding { check: "membership", ok: false, says: error.to_string() },
    };
    vec![secret, membership]
}

fn daemon(status: &Status) -> Vec<Finding> {
    let mut findings = Vec::new();
    let registry = &status.registry;
    let why = registry.reason.as_deref().map_or(String::new(), |why| format!(": {why}"));
    let ok = registry.state != "stale";
    findings.push(Finding { check: "registry", ok, says: format!("{}, {}{why}", registry.kind, registry.state) });
    for relay in &status.relays {
        let why = relay.reason.as_deref().map_or(String::new(), |why| format!(": {why}"));
        let ok = relay.state != "down";
        findings.push(Finding { check: "relay", ok, says: format!("{} {}{why}", relay.address, relay.state) });
    }
    for warning in &status.warnings {
        findings.push(Finding { check: "warning", ok: false, says: warning.clone() });
    }
    findings
}

fn describe(findings: &[Finding], status: Option<&Status>) -> String {
    let mut text = String::new();
    for finding in findings {
        let mark = if finding.ok { "ok  " } else { "FAIL" };
        text.push_str(&format!("{mark}  {:<11} {}\n", finding.check, finding.says));
    }
    for peer in status.iter().flat_map(|status| &status.peers) {
        let Some(reason) = &peer.reason else { continue };
        text.push_str(&format!("\n{} is {}, not direct: {reason}\n", peer.name, peer.path));
        for line in &peer.tried {
            text.push_str(&format!("  {line}\n"));
        }
    }
    text
}
