//! Control groups for nodes. They are the one thing that a sandbox cannot keep to itself: every node's pods live below
//! `/keystone-kubelab-N/NODE` of the machine's hierarchies, where N is the sandbox's PID namespace, and whoever made the
//! sandbox [sweeps](sweep) after it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

/// Where the hierarchies are mounted: all in one (version 2), or each in a folder (version 1).
const MOUNTED: &str = "/sys/fs/cgroup";

/// How the folders of sandboxes begin.
const PREFIX: &str = "keystone-kubelab-";

/// The kernel takes the processes of an ended sandbox out of their groups a little later.
const SWEEPS: u32 = 50;
const SWEEP_EVERY: Duration = Duration::from_millis(20);

/// Makes the group of a node in every hierarchy; returns its path as `cgroupRoot` of a kubelet takes it.
pub(crate) fn create(node: &str) -> Result<String> {
    let group = format!("/{PREFIX}{}/{node}", own_namespace()?);
    for hierarchy in hierarchies()? {
        let mut folder = hierarchy;
        for part in group.split('/').skip(1) {
            let parent = folder.clone();
            folder = parent.join(part);
            fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
            // In version 1 a group has no CPU and no memory node until it is told.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if let Ok(inherited) = fs::read(parent.join(file)).map(|bytes| bytes.trim_ascii().to_owned())
                    && fs::read(folder.join(file)).is_ok_and(|bytes| bytes.trim_ascii().is_empty())
                {
                    let _version_2_inherits = fs::write(folder.join(file), inherited);
                }
            }
        }
    }
    Ok(group)
}

/// Removes the groups of sandboxes that have ended, of this or of any other run. Outside of a sandbox, as root.
pub fn sweep() {
    let hierarchies = hierarchies().unwrap_or_default();
    let groups = hierarchies.iter().filter_map(|hierarchy| fs::read_dir(hierarchy).ok()).flatten().flatten();
    let ours = groups.filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX)).map(|entry| entry.path());
    let ours: Vec<PathBuf> = ours.collect();
    if ours.is_empty() {
        return;
    }
    for _ in 0..SWEEPS {
        let alive = living_namespaces();
        let dead = ours.iter().filter(|group| namespace_of(group).is_some_and(|number| !alive.contains(number)));
        if dead.filter(|group| !remove(group)).count() == 0 {
            return;
        }
        thread::sleep(SWEEP_EVERY);
    }
}

fn namespace_of(group: &Path) -> Option<&str> {
    group.file_name()?.to_str()?.strip_prefix(PREFIX)
}

/// From the inside out; false if something is still in use.
fn remove(group: &Path) -> bool {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && !remove(&entry.path()) {
            return false;
        }
    }
    fs::remove_dir(group).is_ok() || !group.exists()
}

fn hierarchies() -> Result<Vec<PathBuf>> {
    if Path::new(MOUNTED).join("cgroup.controllers").exists() {
        return Ok(vec![PathBuf::from(MOUNTED)]);
    }
    let entries = fs::read_dir(MOUNTED).with_context(|| format!("read {MOUNTED}"))?;
    // cpu,cpuacct is one hierarchy and both names are links to it.
    let real = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    Ok(real.map(|entry| entry.path()).collect())
}

fn own_namespace() -> Result<String> {
    let link = fs::read_link("/proc/self/ns/pid").context("read /proc/self/ns/pid")?;
    number_in(&link).context("/proc/self/ns/pid is a number in brackets")
}

fn living_namespaces() -> BTreeSet<String> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(|process| number_in(&fs::read_link(process.path().join("ns/pid")).ok()?)).collect()
}

/// `pid:[NUMBER]`
fn number_in(link: &Path) -> Option<String> {
    let text = link.to_str()?;
    Some(text.split_once('[')?.1.strip_suffix(']')?.to_owned())
}
