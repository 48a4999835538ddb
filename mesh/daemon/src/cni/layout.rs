//! What should be in a node's CNI directories, given what is there: a decision without IO.
//!
//! | mode | in the configuration directory |
//! | --- | --- |
//! | `pod-network` | our own list, [`CONFLIST`], once the mesh is ready; it stays when the mesh is away for a while |
//! | `helper` | an entry of ours at the end of the list that the runtime takes, which is somebody else's |
//! | `underlay`, `none` | nothing of ours |
//!
//! **What is ours**, and everything else is left alone: a file that says so under [`MARK`] (runtimes read over a key that
//! they do not know), and entries of our helper in others' lists. The plugin's program stays where it was copied: pods
//! of before are taken down by it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use keystone_cni::facts::Ready;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Our own list. Of several the runtime takes the first by name, so others come after 10.
pub const CONFLIST: &str = "10-keystone.conflist";
/// The plugin's program, and its type in lists.
pub const PLUGIN: &str = "keystone-cni";
/// The reference plugin that follows ours where it is installed: host ports.
pub const PORTMAP: &str = "portmap";

/// The key of a list that tells whose it is, and our name under it.
pub const MARK: (&str, &str) = ("managedBy", "keystone-mesh");

/// The version that every runtime and plugin in use speaks, and the one that has STATUS and GC.
const VERSIONS: [&str; 2] = ["1.0.0", "1.1.0"];

/// The endings of configurations (libcni).
const ENDINGS: [&str; 3] = [".conflist", ".conf", ".json"];

/// How often a file is put back that somebody else takes away again: a second later, then always twice as long, up to a
/// minute. Who insists wins, and is told of.
const INSIST: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// How pods get their network on this node.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Somebody else's matter: nothing of ours is there.
    #[default]
    None,
    /// The mesh is the pods' network.
    PodNetwork,
    /// Our plugin helps another's network: it is chained last, for MTU and mesh routes.
    Helper,
    /// Another's network runs on top of the mesh: nodes know each other by mesh addresses.
    Underlay,
}

impl Mode {
    /// Whether the mesh carries packets of pods, unless the configuration says otherwise.
    pub fn routes_pods(self) -> bool {
        match self {
            Self::None | Self::PodNetwork => true,
            Self::Helper | Self::Underlay => false,
        }
    }
}

/// What is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The mode.
    pub mode: Mode,
    /// Where the plugin finds the facts, where that is not its default.
    pub facts: Option<String>,
    /// What the node has.
    pub ready: Ready,
}

/// What is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Configurations by name: those that the runtime looks at.
    pub files: BTreeMap<String, String>,
    /// Whether the plugin's program is there and is this release's.
    pub program: bool,
    /// The versions that the portmap plugin speaks; none: it is not there.
    pub portmap: Option<Vec<String>>,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Copies the plugin's program, in one step.
    CopyProgram,
    /// Writes a configuration, in one step.
    Write {
        /// Its name.
        name: String,
        /// Its text.
        text: String,
    },
    /// Removes a configuration of ours.
    Remove(String),
}

/// What to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// In this order.
    pub ops: Vec<Op>,
    /// What is not as it should be, a sentence each.
    pub problems: Vec<String>,
    /// When to look again though nothing changed.
    pub again_at: Option<Instant>,
}

/// The decider, which remembers what it put back.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// When each file was last written, and how often it was put back soon after.
    written: BTreeMap<String, (Instant, u32)>,
}

impl Layout {
    /// Decides.
    pub fn decide(&mut self, wanted: &Wanted, found: &Found, now: Instant) -> Decision {
        let mut decision = Decision::default();
        let mut files = BTreeMap::new();
        for (name, text) in &found.files {
            match serde_json::from_str::<Value>(text) {
                Ok(list) => drop(files.insert(name.as_str(), list)),
                // The runtime stumbles over it by itself; it is told here where ours would come after it.
                Err(error) => {
                    decision.problems.push(format!("{name} is no valid configuration ({error}); it is left alone"));
                }
            }
        }
        if matches!(wanted.mode, Mode::PodNetwork | Mode::Helper) && !found.program {
            decision.ops.push(Op::CopyProgram);
        }
        let target = self.place_list(wanted, found, &files, now, &mut decision);
        self.place_helper(wanted, &files, target, now, &mut decision);
        decision
    }

    /// Writes or removes our own list. Gives back the list to which a helper belongs.
    fn place_list<'a>(
        &mut self,
        wanted: &Wanted,
        found: &Found,
        files: &BTreeMap<&'a str, Value>,
        now: Instant,
        decision: &mut Decision,
    ) -> Option<&'a str> {
        let ours = files.get(CONFLIST).is_some_and(is_ours);
        let foreign = found.files.contains_key(CONFLIST) && !ours;
        let first = files.keys().copied().find(|name| !(*name == CONFLIST && ours));
        match wanted.mode {
            Mode::PodNetwork if foreign => decision.problems.push(format!(
                "{CONFLIST} is there and not ours (it has no `{}: {}`); move it away, or choose another --cni-mode",
                MARK.0, MARK.1
            )),
            Mode::PodNetwork => {
                if let Some(first) = first.filter(|name| *name < CONFLIST) {
                    decision.problems.push(format!(
                        "{first} comes before {CONFLIST}, so the runtime takes that network and not the mesh; remove the other \
                         network, or choose --cni-mode helper or underlay"
                    ));
                }
                // Once it is there it stays: a pod that is made while the mesh is away is better than none.
                if ours || wanted.ready.all() {
                    let list = own_list(wanted, found);
                    if files.get(CONFLIST) != Some(&list) {
                        self.write(CONFLIST, &list, now, decision);
                    }
                }
            }
            Mode::None | Mode::Helper | Mode::Underlay if ours => decision.ops.push(Op::Remove(CONFLIST.to_owned())),
            Mode::None | Mode::Helper | Mode::Underlay => {}
        }
        first.filter(|_| wanted.mode == Mode::Helper)
    }

    /// Puts our entry at the end of the target, and takes it out of every other list.
    fn place_helper(
        &mut self,
        wanted: &Wanted,
        files: &BTreeMap<&str, Value>,
        target: Option<&str>,
        now: Instant,
        decision: &mut Decision,
    ) {
        let ready = wanted.ready.mesh_address && wanted.ready.peer;
        for (&name, list) in files {
            let there = entries(list).is_some_and(|plugins| plugins.iter().any(is_helper));
            let wants = target == Some(name) && (there || ready);
            if !wants && !there {
                continue;
            }
            let Some(plugins) = entries(list) else {
                decision.problems.push(format!(
                    "{name}, which the runtime takes, is the configuration of a single plugin; a helper can only be chained to a \
                     list (.conflist)"
                ));
                continue;
            };
            let mut plugins: Vec<Value> = plugins.iter().filter(|plugin| !is_helper(plugin)).cloned().collect();
            if wants {
                plugins.push(plugin(wanted));
            }
            let mut changed = list.clone();
            changed["plugins"] = plugins.into();
            if changed != *list {
                self.write(name, &changed, now, decision);
            }
        }
        if wanted.mode == Mode::Helper && target.is_none() {
            decision
                .problems
                .push("there is no network yet to which the helper could be chained; it waits for one".to_owned());
        }
    }

    /// Writes a file, or says when: not at once where it was written a moment ago and somebody changed it since.
    fn write(&mut self, name: &str, list: &Value, now: Instant, decision: &mut Decision) {
        let (due, times) = match self.written.get(name) {
            None => (now, 0),
            Some((at, times)) => (*at + INSIST.0.saturating_mul(1 << times.min(&6)).min(INSIST.1), times + 1),
        };
        // A change long after the last one is no quarrel.
        let quiet = self.written.get(name).is_some_and(|(at, _)| now.saturating_duration_since(*at) > INSIST.1 * 2);
        if due > now {
            decision.again_at = Some(decision.again_at.map_or(due, |at| at.min(due)));
            if times > 2 {
                decision.problems.push(format!(
                    "somebody else keeps changing {name}; it is put right again, later each time (Cilium: set `cni.exclusive` to \
                     false)"
                ));
            }
            return;
        }
        self.written.insert(name.to_owned(), (now, if quiet { 0 } else { times }));
        let text = format!("{list:#}\n");
        decision.ops.push(Op::Write { name: name.to_owned(), text });
    }
}

/// Whether the runtime looks at a file of this name.
pub fn is_configuration(name: &str) -> bool {
    !name.starts_with('.') && ENDINGS.iter().any(|ending| name.ends_with(ending))
}

fn own_list(wanted: &Wanted, found: &Found) -> Value {
    let mut plugins = vec![plugin(wanted)];
    if found.portmap.is_some() {
        plugins.push(json!({ "type": PORTMAP, "capabilities": { "portMappings": true } }));
    }
    // Every plugin of a list is called with one version.
    let spoken =
        |version: &&&str| found.portmap.as_ref().is_none_or(|spoken| spoken.iter().any(|one| one == **version));
    let versions: Vec<&str> = VERSIONS.iter().filter(spoken).copied().collect();
    json!({
        "cniVersion": VERSIONS[0],
        "cniVersions": if versions.is_empty() { vec![VERSIONS[0]] } else { versions },
        "name": "keystone",
        MARK.0: MARK.1,
        "plugins": plugins,
    })
}

fn plugin(wanted: &Wanted) -> Value {
    let mut plugin = json!({ "type": PLUGIN });
    if let Some(facts) = &wanted.facts {
        plugin["facts"] = facts.as_str().into();
    }
    if wanted.mode == Mode::Helper {
        plugin["mode"] = "helper".into();
    }
    plugin
}

fn is_ours(list: &Value) -> bool {
    list.get(MARK.0).and_then(Value::as_str) == Some(MARK.1)
}

fn entries(list: &Value) -> Option<&Vec<Value>> {
    list.get("plugins").and_then(Value::as_array)
}

fn is_helper(plugin: &Value) -> bool {
    let says = |key: &str, value: &str| plugin.get(key).and_then(Value::as_str) == Some(value);
    says("type", PLUGIN) && says("mode", "helper")
}

#[cfg(test)]
mod tests;
