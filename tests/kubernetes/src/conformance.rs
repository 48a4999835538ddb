//! Kubernetes' own end-to-end tests, run by ginkgo against a cluster of ours and read from its report.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use keystone_lab::wait;
use serde::{Deserialize, Serialize};

use crate::{ApiServer, Assets};

/// How often it is asked whether the tests have ended.
const POLL: Duration = Duration::from_millis(500);

/// Lines of the tests' output that an error quotes.
const QUOTED_LINES: usize = 30;

/// Which specs are run, and how.
#[derive(Clone, Debug)]
pub struct Selection {
    /// What a spec's name must match (a regular expression).
    pub focus: String,
    /// What it must not match.
    pub skip: String,
    /// How many run at a time.
    pub processes: u32,
    /// How long all of them may take together.
    pub patience: Duration,
    /// How many nodes the tests may use.
    pub nodes: usize,
}

impl Selection {
    /// Every conformance test of networking that neither needs the cluster for itself nor breaks it.
    pub fn conformance(nodes: usize) -> Self {
        Self::new(r"\[sig-network\].*\[Conformance\]", r"\[Serial\]|\[Disruptive\]", nodes)
    }

    /// Every test of NetworkPolicy, but for those of SCTP.
    pub fn network_policy(nodes: usize) -> Self {
        Self::new(r"\[sig-network\].*Netpol", r"SCTP|\[Serial\]|\[Disruptive\]", nodes)
    }

    fn new(focus: &str, skip: &str, nodes: usize) -> Self {
        let (focus, skip) = (focus.to_owned(), skip.to_owned());
        Self { focus, skip, processes: 4, patience: Duration::from_secs(3600), nodes }
    }
}

/// How a spec ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// All that it claims is so.
    Passed,
    /// It found that the cluster is not as it should be for it.
    Skipped,
    /// Not selected, or never come to.
    Pending,
    /// Something is not so.
    Failed,
    /// It crashed.
    Panicked,
    /// It was ended from outside.
    Interrupted,
    /// As an unwanted end of the whole run.
    Aborted,
    /// It took longer than it may.
    Timedout,
}

/// One spec and what came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Spec {
    /// Its whole name.
    pub name: String,
    /// How it ended.
    pub state: State,
    /// How long it took.
    pub seconds: f64,
    /// What was not so, where it failed.
    pub failure: Option<String>,
}

impl ApiServer {
    /// Runs the tests on the API server's machine and returns those that were selected, by name. A failed spec is no
    /// error; a run that brings no report is.
    pub fn run_tests(&self, selection: &Selection) -> Result<Vec<Spec>> {
        let assets = Assets::find_tests()?;
        let folder = self.folder().join("e2e");
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        let report = folder.join("report.json");
        let mut command = Command::new(assets.program("ginkgo"));
        command.current_dir(&folder).env("HOME", &folder);
        command.arg(format!("--procs={}", selection.processes));
        command.arg(format!("--timeout={}s", selection.patience.as_secs()));
        command.arg(format!("--focus={}", selection.focus)).arg(format!("--skip={}", selection.skip));
        command.args(["--no-color", "--succinct", "--json-report=report.json"]).arg("--output-dir").arg(&folder);
        command.arg(assets.program("e2e.test")).arg("--");
        command.arg(format!("--kubeconfig={}", self.kubectl_config().display()));
        command.arg(format!("--kubectl-path={}", self.program("kubectl").display()));
        command.arg(format!("--num-nodes={}", selection.nodes));
        command.args(["--provider=skeleton", "--minStartupPods=0", "--disable-log-dump"]);
        let mut tests = self.spawn("e2e", &mut command)?;
        // ginkgo itself ends the tests at their deadline, and then writes its report.
        let deadline = selection.patience + Duration::from_secs(60);
        wait::until("the tests have ended", deadline, POLL, || tests.ended())?;
        let text = fs::read_to_string(&report);
        let text = text.with_context(|| format!("the tests left no report:\n{}", tests.log_tail(QUOTED_LINES)))?;
        let specs = read_report(&text)?;
        if specs.is_empty() {
            bail!("no spec matches {:?}:\n{}", selection.focus, tests.log_tail(QUOTED_LINES));
        }
        Ok(specs)
    }
}

/// ginkgo's report (types.Report of onsi/ginkgo/v2), as far as it is read here.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Report {
    spec_reports: Option<Vec<SpecReport>>,
    special_suite_failure_reasons: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SpecReport {
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    leaf_node_text: String,
    state: State,
    /// Nanoseconds.
    run_time: u64,
    #[serde(default)]
    failure: Failure,
    /// How often it was tried: 0 where it was not selected.
    #[serde(default)]
    num_attempts: u32,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Failure {
    #[serde(default)]
    message: String,
}

fn read_report(text: &str) -> Result<Vec<Spec>> {
    let reports: Vec<Report> = serde_json::from_str(text).context("read ginkgo's report")?;
    let mut specs = Vec::new();
    for report in reports {
        // Set-up and tear-down of the whole suite are no specs, but nothing is worth anything where they fail.
        let found = report.spec_reports.unwrap_or_default();
        for suite in found.iter().filter(|spec| spec.leaf_node_type != "It") {
            if !matches!(suite.state, State::Passed | State::Skipped | State::Pending) {
                bail!("{} of the tests failed: {}", suite.leaf_node_type, suite.failure.message);
            }
        }
        specs.extend(found.into_iter().filter_map(spec));
        if specs.is_empty()
            && let Some(reasons) = report.special_suite_failure_reasons.filter(|reasons| !reasons.is_empty())
        {
            bail!("the tests did not run: {}", reasons.join("; "));
        }
    }
    specs.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(specs)
}

fn spec(report: SpecReport) -> Option<Spec> {
    if report.leaf_node_type != "It" || report.num_attempts == 0 {
        return None;
    }
    let words = report.container_hierarchy_texts.into_iter().flatten().chain([report.leaf_node_text]);
    Some(Spec {
        name: words.collect::<Vec<_>>().join(" "),
        state: report.state,
        seconds: Duration::from_nanos(report.run_time).as_secs_f64(),
        failure: Some(report.failure.message).filter(|message| !message.is_empty()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_becomes_the_specs_that_were_run() {
        let text = r#"[{"SuitePath": "/x", "SpecReports": [
            {"LeafNodeType": "SynchronizedBeforeSuite", "LeafNodeText": "", "State": "passed", "RunTime": 5},
            {"ContainerHierarchyTexts": ["[sig-network] B"], "LeafNodeType": "It", "LeafNodeText": "works", "State": "passed", "RunTime": 1500000000, "NumAttempts": 1},
            {"ContainerHierarchyTexts": ["[sig-network] A"], "LeafNodeType": "It", "LeafNodeText": "fails", "State": "timedout", "RunTime": 1, "NumAttempts": 1, "Failure": {"Message": "no answer"}},
            {"ContainerHierarchyTexts": ["[sig-network] C"], "LeafNodeType": "It", "LeafNodeText": "is not meant", "State": "skipped", "RunTime": 0}
        ]}]"#;
        let specs = read_report(text).unwrap();
        assert_eq!(specs.len(), 2);
        assert_eq!((specs[0].name.as_str(), specs[0].state), ("[sig-network] A fails", State::Timedout));
        assert_eq!(specs[0].failure.as_deref(), Some("no answer"));
        assert!((specs[1].seconds - 1.5).abs() < 1e-9);
    }

    #[test]
    fn a_suite_that_did_not_start_is_an_error() {
        let failed = r#"[{"SpecReports": [{"LeafNodeType": "SynchronizedBeforeSuite", "LeafNodeText": "", "State": "failed", "RunTime": 5, "Failure": {"Message": "no nodes"}}]}]"#;
        assert!(read_report(failed).unwrap_err().to_string().contains("no nodes"));
        let empty = r#"[{"SpecReports": null, "SpecialSuiteFailureReasons": ["no specs"]}]"#;
        read_report(empty).unwrap_err();
    }
}
