//! GC: exactly what belongs to no attachment that the runtime names goes.

use std::collections::BTreeSet;

use super::del::all;
use crate::apply::Apply;
use crate::attachment::{Attachment, interface_group};
use crate::delegate;
use crate::ipam::Store;
use crate::kernel::Kernel;
use crate::spec::{Call, Code, Config, Error, Ipam, Result, Verb};

pub(super) fn gc(call: &Call, config: &Config) -> Result<()> {
    let Some(valid) = &config.valid else {
        return Err(Error::new(
            Code::InvalidConfig,
            "GC came without \"cni.dev/valid-attachments\": the runtime has to name what stays; nothing was removed",
        ));
    };
    let attachment = |valid: &crate::spec::ValidAttachment| Attachment {
        network: config.network.clone(),
        container: valid.container.clone(),
        ifname: valid.ifname.clone(),
    };
    let kept: BTreeSet<String> = valid.iter().map(|valid| attachment(valid).host_name()).collect();
    let links = remove_links(&config.network, &kept);
    // As in DEL: no address is free before its interface is gone.
    let leases = if links.is_ok() { release(config, &kept) } else { Ok(()) };
    let delegated = match &config.ipam {
        Ipam::Delegated(plugin) => delegate::call(plugin, Verb::Gc, call, config).map(|_nothing| ()),
        Ipam::Own(_) => Ok(()),
    };
    all([links, leases, delegated])
}

/// Routes and neighbours go with their interface.
fn remove_links(network: &str, kept: &BTreeSet<String>) -> Result<()> {
    let mut kernel = Kernel::host()?;
    let mut outcome = Ok(());
    for name in kernel.host_pairs(interface_group(network))? {
        if !kept.contains(&name) {
            outcome = all([outcome, kernel.delete_pair(&name).map(|_found| ())]);
        }
    }
    outcome
}

fn release(config: &Config, kept: &BTreeSet<String>) -> Result<()> {
    match Store::open_existing(&config.data_dir, &config.network)? {
        Some(mut store) => store.keep_only(kept),
        None => Ok(()),
    }
}
