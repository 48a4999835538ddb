//! A container runtime as far as plugins see one: it runs the plugins of a list with the environment and the configuration
//! that the specification says, keeps results, and nothing else. Also what tests look at: namespaces, links, routes.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::{env, fs};

use anyhow::{Context, Result, anyhow, bail};
use keystone_lab::tool;
use serde_json::{Value, json};

/// Where Debian has the reference plugins.
pub(crate) const REFERENCE: &str = "/usr/lib/cni";

/// Where named network namespaces are.
pub(crate) const NETNS: &str = "/run/netns";

/// One network: a list of plugins, called in order for ADD and CHECK and in reverse for DEL.
#[derive(Clone)]
pub(crate) struct Network {
    pub(crate) version: String,
    pub(crate) name: String,
    pub(crate) plugins: Vec<Value>,
    /// Directories of plugins, in order.
    pub(crate) path: Vec<PathBuf>,
    pub(crate) runtime_config: Value,
}

/// An error that a plugin printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) code: u64,
    pub(crate) message: String,
    pub(crate) details: String,
}

pub(crate) type Answer = std::result::Result<Value, Refused>;

/// What a call is about.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) container: &'a str,
    pub(crate) netns: &'a str,
    pub(crate) ifname: &'a str,
}

impl<'a> Target<'a> {
    /// `eth0` of a container in the namespace of the same name.
    pub(crate) fn of(container: &'a str, netns: &'a str) -> Self {
        Self { container, netns, ifname: "eth0" }
    }
}

impl Network {
    /// Our plugin alone, with a version and a directory for leases.
    pub(crate) fn ours(plugin: &Path, version: &str, options: Value) -> Self {
        let mut config = json!({ "type": "keystone-cni" });
        merge(&mut config, options);
        let directory = plugin.parent().expect("a program is in a directory").to_owned();
        Self {
            version: version.into(),
            name: "pods".into(),
            plugins: vec![config],
            path: vec![directory, REFERENCE.into()],
            runtime_config: json!({}),
        }
    }

    pub(crate) fn then(mut self, plugin: Value) -> Self {
        self.plugins.push(plugin);
        self
    }

    pub(crate) fn add(&self, target: Target<'_>) -> Answer {
        let mut previous = Value::Null;
        for plugin in &self.plugins {
            previous = self.call("ADD", plugin, target, &json!({ "prevResult": previous }))?;
        }
        Ok(previous)
    }

    pub(crate) fn del(&self, target: Target<'_>, previous: &Value) -> Answer {
        for plugin in self.plugins.iter().rev() {
            self.call("DEL", plugin, target, &json!({ "prevResult": previous }))?;
        }
        Ok(Value::Null)
    }

    pub(crate) fn check(&self, target: Target<'_>, previous: &Value) -> Answer {
        for plugin in &self.plugins {
            self.call("CHECK", plugin, target, &json!({ "prevResult": previous }))?;
        }
        Ok(Value::Null)
    }

    /// GC of the first plugin; `valid` are pairs of container and interface.
    pub(crate) fn gc(&self, valid: &[(&str, &str)]) -> Answer {
        let valid: Vec<Value> =
            valid.iter().map(|(container, ifname)| json!({ "containerID": container, "ifname": ifname })).collect();
        let more = json!({ "cni.dev/valid-attachments": valid });
        self.call("GC", &self.plugins[0], Target { container: "", netns: "", ifname: "" }, &more)
    }

    pub(crate) fn status(&self) -> Answer {
        self.call("STATUS", &self.plugins[0], Target { container: "", netns: "", ifname: "" }, &json!({}))
    }

    /// Starts one plugin; the configuration is written, the answer not yet read.
    pub(crate) fn start(&self, verb: &str, plugin: &Value, target: Target<'_>, more: &Value) -> Result<Child> {
        let mut config = json!({ "cniVersion": self.version, "name": self.name });
        merge(&mut config, plugin.clone());
        merge(&mut config, more.clone());
        if config["prevResult"].is_null() {
            config.as_object_mut().context("a configuration is an object")?.remove("prevResult");
        }
        if plugin.get("capabilities").is_some() {
            config["runtimeConfig"] = self.runtime_config.clone();
        }
        let name = plugin["type"].as_str().context("a plugin has a type")?;
        let program = self.path.iter().map(|directory| directory.join(name)).find(|program| program.is_file());
        let program = program.with_context(|| format!("no plugin {name} in {:?}", self.path))?;
        let mut command = Command::new(program);
        command.env_clear().env("PATH", tool::search_path()).env("CNI_COMMAND", verb);
        command.env("CNI_PATH", env::join_paths(&self.path)?);
        for (variable, value) in
            [("CNI_CONTAINERID", target.container), ("CNI_IFNAME", target.ifname), ("CNI_NETNS", target.netns)]
        {
            if !value.is_empty() {
                command.env(variable, value);
            }
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut stdin = child.stdin.take().ok_or_else(|| anyhow!("a child without stdin"))?;
        // A plugin that is killed meanwhile does not read it.
        let _unread = stdin.write_all(config.to_string().as_bytes());
        Ok(child)
    }

    pub(crate) fn call(&self, verb: &str, plugin: &Value, target: Target<'_>, more: &Value) -> Answer {
        let answer = self.start(verb, plugin, target, more).and_then(finish);
        answer.unwrap_or_else(|error| Err(Refused { code: 0, message: format!("{error:#}"), details: String::new() }))
    }
}

/// Waits for a plugin and reads what it says.
pub(crate) fn finish(child: Child) -> Result<Answer> {
    let output = child.wait_with_output()?;
    if output.status.success() {
        let empty = output.stdout.trim_ascii().is_empty();
        return Ok(Ok(if empty { Value::Null } else { serde_json::from_slice(&output.stdout)? }));
    }
    let error: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr)))?;
    let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
    let code = error["code"].as_u64().context("an error has a code")?;
    Ok(Err(Refused { code, message: text("msg"), details: text("details") }))
}

fn merge(into: &mut Value, from: Value) {
    if let (Some(into), Value::Object(from)) = (into.as_object_mut(), from) {
        into.extend(from);
    }
}

/// Makes a named network namespace and gives its path.
pub(crate) fn netns(name: &str) -> Result<String> {
    tool::feed(Command::new("ip").args(["netns", "add", name]), "")?;
    Ok(format!("{NETNS}/{name}"))
}

/// Removes a named network namespace.
pub(crate) fn remove_netns(name: &str) -> Result<()> {
    tool::feed(Command::new("ip").args(["netns", "delete", name]), "").map(|_| ())
}

/// What `ip -json ARGUMENTS` shows, on the host or in a namespace. What is not there is an empty list.
pub(crate) fn ip(netns: Option<&str>, arguments: &str) -> Result<Vec<Value>> {
    let mut command = Command::new("ip");
    if let Some(netns) = netns {
        command.args(["-n", netns.rsplit('/').next().unwrap_or(netns)]);
    }
    let shown = tool::feed(command.args(["-json", "-details"]).args(arguments.split_whitespace()), "")?;
    if shown.trim().is_empty() { Ok(Vec::new()) } else { Ok(serde_json::from_str(&shown)?) }
}

/// Does something with `ip`.
pub(crate) fn ip_do(netns: Option<&str>, arguments: &str) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(netns) = netns {
        command.args(["-n", netns.rsplit('/').next().unwrap_or(netns)]);
    }
    tool::feed(command.args(arguments.split_whitespace()), "").map(|_| ())
}

/// Names of the host's interfaces of pods.
pub(crate) fn host_links() -> Result<Vec<String>> {
    let links = ip(None, "link show")?;
    let names = links.iter().filter_map(|link| link["ifname"].as_str());
    Ok(names.filter(|name| name.starts_with("ks")).map(str::to_owned).collect())
}

/// Destinations of the host's routes to pods.
pub(crate) fn host_routes() -> Result<Vec<String>> {
    let both = [ip(None, "-4 route show proto 153")?, ip(None, "-6 route show proto 153")?].concat();
    Ok(both.iter().filter_map(|route| route["dst"].as_str().map(str::to_owned)).collect())
}

/// Names of the entries in a directory; none where it is missing.
pub(crate) fn files(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort_unstable();
    names
}

/// Runs a program in a namespace; its output where it succeeds.
pub(crate) fn inside(netns: &str, program: &str) -> Result<String> {
    let name = netns.rsplit('/').next().unwrap_or(netns);
    let output = Command::new("nsenter")
        .env("PATH", tool::search_path())
        .arg(format!("--net={NETNS}/{name}"))
        .args(["sh", "-c", program])
        .output()?;
    if !output.status.success() {
        bail!("{program}: {}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
