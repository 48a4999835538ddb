//! Calling the IPAM plugin that a configuration names instead of ours.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;
use serde_json::Value;

use crate::spec::{Call, Code, Config, Error, Result, Success, Verb};

/// An error as plugins print it.
#[derive(Deserialize)]
struct Failure {
    code: u32,
    msg: String,
    #[serde(default)]
    details: String,
}

/// Calls `plugin` for `verb` with our own configuration and environment, as the specification wants it.
pub(crate) fn call(plugin: &str, verb: Verb, call: &Call, config: &Config) -> Result<Value> {
    let program = find(plugin, &call.path)?;
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        Error::new(Code::Delegate, format!("the IPAM plugin {} {what}: {error}", program.display()))
    };
    let mut child = Command::new(&program)
        .env("CNI_COMMAND", verb.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(|error| failed("cannot be started", &error))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A plugin that does not read its configuration says why itself.
        let _unread = stdin.write_all(&config.raw);
    }
    let output = child.wait_with_output().map_err(|error| failed("cannot be waited for", &error))?;
    if output.status.success() {
        // DEL, CHECK, GC and STATUS say nothing.
        if output.stdout.trim_ascii().is_empty() {
            return Ok(Value::Null);
        }
        return serde_json::from_slice(&output.stdout).map_err(|error| failed("did not answer in JSON", &error));
    }
    match serde_json::from_slice::<Failure>(&output.stdout) {
        Ok(failure) => {
            Err(Error { code: failure.code, message: format!("{plugin}: {}", failure.msg), details: failure.details })
        }
        Err(_) => Err(failed("failed without an error of its own", &output.status)),
    }
}

/// ADD: the addresses and routes that the plugin gives.
pub(crate) fn add(plugin: &str, our: &Call, config: &Config) -> Result<Success> {
    let answer = call(plugin, Verb::Add, our, config)?;
    let result = Success::parse(&format!("the answer of the IPAM plugin {plugin}"), &answer)?;
    if result.ips.is_empty() {
        return Err(Error::new(Code::Delegate, format!("the IPAM plugin {plugin} gave no address")));
    }
    Ok(result)
}

fn find(plugin: &str, path: &[PathBuf]) -> Result<PathBuf> {
    let program = path.iter().map(|directory| directory.join(plugin)).find(|program| program.is_file());
    program.ok_or_else(|| {
        let places: Vec<String> = path.iter().map(|directory| Path::display(directory).to_string()).collect();
        let places = if places.is_empty() { "CNI_PATH, which is empty".into() } else { places.join(", ") };
        Error::new(
            Code::Delegate,
            format!("the IPAM plugin {plugin} is not in {places}: install it, or remove \"ipam\" for our own"),
        )
    })
}
