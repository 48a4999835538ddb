//! What comes after a story: the logs if it failed, its document, and a lab that stays up on request.

use std::io::{self, Write};
use std::thread;

use anyhow::{Context, Result};
use serde_json::Value;

use super::stage::Stage;
use crate::sandbox::Place;

/// Lines of each daemon's log that a failure shows.
const LOG_LINES: usize = 25;

/// Says on stderr what failed, and how each daemon's log ends.
pub(super) fn report_failure(stage: &Stage, err: &anyhow::Error) {
    let mut text = format!("\nkeystone-lab: {err:#}\n");
    for node in stage.nodes() {
        let tail = node.log_tail(LOG_LINES);
        if !tail.is_empty() {
            text += &format!("  the log of {} ends:\n{tail}", node.name());
        }
    }
    // Nobody may read stderr; the exit status tells too.
    let _closed = io::stderr().lock().write_all(text.as_bytes());
}

/// Prints one JSON document on stdout.
pub(super) fn print_document(document: &Value) -> Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, document).context("print the document")?;
    out.write_all(b"\n").context("print the document")
}

/// Prints how to get into each host, and stays until the lifeline ends the process (Ctrl-C outside).
pub(super) fn stay_up(stage: &Stage, place: Place) -> ! {
    let who = if place.own_user_namespace { "this user" } else { "root" };
    let user = if place.own_user_namespace { " --user --preserve-credentials" } else { "" };
    let mut text = format!("\nThe lab stays up until Ctrl-C. A shell on each host, from another terminal, as {who}:\n");
    for name in stage.host_names() {
        text += &format!(
            "  {name:12} nsenter --target {}{user} --mount --net --pid ip netns exec {name} bash\n",
            place.outer_pid
        );
    }
    for node in stage.nodes() {
        text += &format!("  in the shell of {:12} {}\n", node.host().name(), node.status_command());
    }
    let _closed = io::stderr().lock().write_all(text.as_bytes());
    loop {
        thread::park();
    }
}
