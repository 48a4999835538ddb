//! `doctor`: what this host lacks, why it is not in the mesh, and why peers are not direct.

use std::process::ExitCode;

use super::inspect::{self, fetch};
use super::output::{print, print_json};
use crate::config::Places;
use crate::preflight::{self, Finding};
use crate::state::StateDir;
use crate::status::{Approval, Status};

pub(super) async fn run(places: &Places, json: bool) -> anyhow::Result<ExitCode> {
    let mut findings = preflight::host();
    findings.extend(state(places));
    let status = match fetch(places).await {
        Ok(status) => {
            if !status.node.pod_cidrs.is_empty() {
                findings.extend(preflight::forwarding(&status.node.interface));
            }
            findings.extend(daemon(&status));
            Some(status)
        }
        Err(error) => {
            findings.push(Finding { check: "daemon", ok: false, says: error.to_string() });
            None
        }
    };
    let healthy = findings.iter().all(|finding| finding.ok || is_note(finding));
    if json {
        print_json(&serde_json::json!({ "healthy": healthy, "findings": findings }))?;
    } else {
        print(&describe(&findings, status.as_ref()))?;
    }
    Ok(if healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whether it is good to know, but nothing that this host has to have put right.
fn is_note(finding: &Finding) -> bool {
    matches!(finding.check, "ipv6" | "other node" | "forward")
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
    let node = &status.node;
    let why = node.approval_reason.as_deref().map_or(String::new(), |why| format!(": {why}"));
    let let_in = matches!(node.approval, Approval::Approved | Approval::None);
    findings.push(Finding { check: "approval", ok: let_in, says: format!("{}{why}", node.approval.label()) });
    findings.push(registry(status));
    let not_ready = status.not_ready();
    let says = not_ready.clone().unwrap_or_else(|| "this node carries traffic of the mesh".into());
    findings.push(Finding { check: "ready", ok: not_ready.is_none(), says });
    for relay in &status.relays {
        let why = relay.reason.as_deref().map_or(String::new(), |why| format!(": {why}"));
        let ok = relay.state != "down";
        findings.push(Finding { check: "relay", ok, says: format!("{} {}{why}", relay.address, relay.state) });
    }
    for warning in &status.warnings {
        findings.push(Finding { check: "warning", ok: false, says: warning.clone() });
    }
    for fault in &status.faults {
        findings.push(Finding { check: "other node", ok: false, says: fault.says.clone() });
    }
    findings
}

fn registry(status: &Status) -> Finding {
    let registry = &status.registry;
    let mut says = inspect::registry(registry);
    let ok = registry.state != "stale";
    if !ok {
        says.push_str(
            "; what is known stays in force, and no node can join or be approved here until it is heard again",
        );
    }
    Finding { check: "registry", ok, says }
}

fn describe(findings: &[Finding], status: Option<&Status>) -> String {
    let mut text = String::new();
    for finding in findings {
        let mark = match (finding.ok, is_note(finding)) {
            (true, _) => "ok  ",
            (false, true) => "note",
            (false, false) => "FAIL",
        };
        text.push_str(&format!("{mark}  {:<11} {}\n", finding.check, finding.says));
    }
    for peer in status.iter().flat_map(|status| &status.peers) {
        let Some(reason) = &peer.reason else { continue };
        let path = if peer.path == "none" { "not reached" } else { peer.path.as_str() };
        text.push_str(&format!("\n{} is {path}, not direct: {reason}\n", peer.name));
        for line in &peer.tried {
            text.push_str(&format!("  {line}\n"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::tests::sample;

    fn find<'a>(findings: &'a [Finding], check: &str) -> &'a Finding {
        findings.iter().find(|finding| finding.check == check).unwrap()
    }

    #[test]
    fn a_node_that_is_not_approved_is_told_the_command() {
        let mut status = sample();
        status.node.approval = Approval::Pending;
        status.node.approval_reason = Some("run `keystone-mesh approve home` on the control plane".into());
        let findings = daemon(&status);
        let approval = find(&findings, "approval");
        assert!(!approval.ok && approval.says.contains("keystone-mesh approve home"), "{}", approval.says);
        assert!(!find(&findings, "ready").ok);
    }

    #[test]
    fn a_lost_registry_says_since_when_and_what_that_means() {
        let mut status = sample();
        (status.registry.state, status.registry.since_s) = ("stale".into(), 7200.0);
        let findings = daemon(&status);
        let registry = find(&findings, "registry");
        assert!(!registry.ok && registry.says.starts_with("embedded, stale for 2 h; what is known stays in force"));
        assert!(find(&findings, "ready").ok, "it goes on");
    }

    #[test]
    fn the_fault_of_another_node_is_a_note_and_does_not_make_this_host_unhealthy() {
        let findings = daemon(&sample());
        assert!(findings.iter().all(|finding| finding.ok || is_note(finding)));
        assert!(describe(&findings, None).contains("note  other node  worker-odd: broken\n"));
    }
}
