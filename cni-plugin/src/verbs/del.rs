//! DEL: whatever is still there goes; what is not there is no error.

use super::attachment;
use crate::apply::Apply;
use crate::delegate;
use crate::ipam::Store;
use crate::kernel::Kernel;
use crate::spec::{Call, Config, Error, Ipam, Result, Verb};

/// Neither the network namespace nor the previous result nor the facts are asked: the attachment's name says all.
pub(super) fn del(call: &Call, config: &Config) -> Result<()> {
    let name = attachment(call, config).host_name();
    // The interface first: an address is given to somebody else only when nothing answers for it.
    let link = Kernel::host().and_then(|mut kernel| kernel.delete_pair(&name).map(|_found| ()));
    let own = if link.is_ok() { release(config, &name) } else { Ok(()) };
    let delegated = match &config.ipam {
        Ipam::Delegated(plugin) => delegate::call(plugin, Verb::Del, call, config).map(|_nothing| ()),
        Ipam::Own(_) => Ok(()),
    };
    all([link, own, delegated])
}

/// Also where another plugin gives out addresses now: this pod may be older than the configuration.
fn release(config: &Config, name: &str) -> Result<()> {
    match Store::open_existing(&config.data_dir, &config.network)? {
        Some(mut store) => store.release(name),
        None => Ok(()),
    }
}

/// The first error, with the others behind it.
pub(super) fn all<const N: usize>(outcomes: [Result<()>; N]) -> Result<()> {
    let errors: Vec<Error> = outcomes.into_iter().filter_map(Result::err).collect();
    let mut errors = errors.into_iter();
    match errors.next() {
        Some(first) => Err(errors.fold(first, |first, more| first.with_details(more))),
        None => Ok(()),
    }
}
