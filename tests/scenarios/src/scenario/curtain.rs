//! What comes after a story: the logs if it failed, its document, and a lab that stays up on request.

use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result};
use serde_json::Value;

use super::stage::Stage;
use keystone_lab::sandbox::{Place, SCRATCH};

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
pub(super) fn stay_up(stage: &Stage, place: Place) -> Result<()> {
    let own_user = place.own_user_namespace;
    let (who, user) = if own_user { ("this user", " --user --preserve-credentials") } else { ("root", "") };
    let mut text = format!("\nThe lab stays up until Ctrl-C. A shell on each host, from another terminal, as {who}:\n");
    for name in stage.host_names() {
        let script = shell_script(stage, name)?;
        text += &format!(
            "  {name:12} nsenter --target {}{user} --mount --net --pid {}\n",
            place.outer_pid,
            script.display()
        );
    }
    let _closed = io::stderr().lock().write_all(text.as_bytes());
    loop {
        thread::park();
    }
}

/// Writes a script that runs a shell, or its arguments as a command, on a host; `keystone-mesh` is on its PATH there and
/// speaks with the daemon of that host.
fn shell_script(stage: &Stage, host: &str) -> Result<PathBuf> {
    let folder = Path::new(SCRATCH).join("shell");
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let mut text = format!("#!/bin/sh\nexport PATH=\"$PATH:/usr/sbin:/sbin\" PS1='{host}# '\n");
    for node in stage.nodes().filter(|node| node.host().name() == host) {
        for (variable, value) in node.environment() {
            text += &format!("export {variable}=\"{}\"\n", value.to_string_lossy());
        }
    }
    text += &format!("[ $# -gt 0 ] || set -- bash --norc\nexec ip netns exec {host} \"$@\"\n");
    let script = folder.join(host);
    fs::write(&script, text).with_context(|| format!("write {}", script.display()))?;
    fs::set_permissions(&script, Permissions::from_mode(0o755)).context("make the script executable")?;
    Ok(script)
}
