//! `keystone-cni ipam list`: who holds which address on this node.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::ipam::{Entry, Store, networks};
use crate::spec::{Code, Error, Result};

/// The directory that configurations have unless they say otherwise.
const DATA_DIR: &str = crate::spec::DEFAULT_DATA_DIR;

/// The list, as the options want it.
pub(crate) fn list(options: &[&str]) -> Result<String> {
    let (mut data_dir, mut as_json) = (PathBuf::from(DATA_DIR), false);
    let mut options = options.iter();
    while let Some(option) = options.next() {
        match (*option, options.next().copied()) {
            ("--data-dir", Some(dir)) => data_dir = dir.into(),
            ("--output" | "-o", Some("json")) => as_json = true,
            ("--output" | "-o", Some("table")) => as_json = false,
            (option, _) => {
                let message = format!("{option:?} is not understood: ipam list [--data-dir DIR] [--output table|json]");
                return Err(Error::new(Code::InvalidEnvironment, message));
            }
        }
    }
    let mut entries = Vec::new();
    for network in networks(&data_dir)? {
        // A network whose store cannot be opened does not hide the others.
        let found = Store::open_existing(&data_dir, &network).and_then(|store| match store {
            Some(store) => store.entries(),
            None => Ok(Vec::new()),
        });
        match found {
            Ok(found) => entries.extend(found.into_iter().map(|entry| (network.clone(), entry))),
            Err(error) => entries.push((network.clone(), damaged(data_dir.join(&network), error.message))),
        }
    }
    Ok(if as_json { format!("{:#}\n", json(&entries)) } else { table(&entries) })
}

fn damaged(path: PathBuf, reason: String) -> Entry {
    Entry::Damaged(crate::ipam::Damage { path, reason })
}

fn json(entries: &[(String, Entry)]) -> Value {
    let (mut leases, mut damaged) = (Vec::new(), Vec::new());
    for (network, entry) in entries {
        match entry {
            Entry::Lease(interface, lease) => leases.push(json!({
                "network": network, "addresses": lease.addresses, "container": lease.container,
                "ifname": lease.ifname, "hostInterface": interface, "pod": lease.pod,
            })),
            Entry::Damaged(damage) => damaged.push(json!({
                "network": network, "path": damage.path.display().to_string(), "reason": damage.reason,
            })),
        }
    }
    json!({ "leases": leases, "damaged": damaged })
}

fn table(entries: &[(String, Entry)]) -> String {
    let mut rows = vec![["NETWORK", "ADDRESSES", "POD", "CONTAINER", "INTERFACE", "HOST INTERFACE"].map(str::to_owned)];
    let mut damages = String::new();
    for (network, entry) in entries {
        match entry {
            Entry::Lease(interface, lease) => {
                let addresses: Vec<String> = lease.addresses.iter().map(ToString::to_string).collect();
                let container = lease.container.get(..12).unwrap_or(&lease.container);
                rows.push([
                    network.clone(),
                    addresses.join(","),
                    lease.pod.clone().unwrap_or_else(|| "-".into()),
                    container.into(),
                    lease.ifname.clone(),
                    interface.clone(),
                ]);
            }
            Entry::Damaged(damage) => {
                damages.push_str(&format!("damaged: {}: {}; GC removes it\n", damage.path.display(), damage.reason));
            }
        }
    }
    let widths: Vec<usize> = (0..6).map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0)).collect();
    let lines = rows.iter().map(|row| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    });
    lines.chain([damages]).collect()
}
