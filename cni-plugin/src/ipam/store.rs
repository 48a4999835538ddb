//! Who holds which address, on disk.
//!
//! ```text
//!   /var/lib/cni/keystone-cni/pods/            one directory for each network
//!     lock                                     flock(2) by whoever reads or writes
//!     boot        -> 3fa1..                    the boot in which these leases were given
//!     last        -> 10.244.1.2,fd00:244:1::2  where the round goes on
//!     holders/ks39a7199053c6 -> c1 eth0 10.244.1.2,fd00:244:1::2 default/web-0
//!     addresses/10.244.1.2   -> ks39a7199053c6
//!     addresses/fd00:244:1::2 -> ks39a7199053c6
//! ```
//!
//! An entry is a symbolic link whose target is its content. It is made by one system call, whole or not at all, in a
//! directory that refuses a second one of the same name: nobody sees half an entry, whenever a writer is killed, and one
//! damaged entry is one container's matter.
//!
//! The holder is written before its addresses and removed after them. So an address that somebody holds always has a holder
//! that names it, and a kill between the two leaves a holder whose release finds everything. No pod outlives a boot:
//! leases of an earlier one are thrown away by the first ADD, so nothing has to reach the disk before ADD returns, and
//! a power cut leaks no address.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::Pool;
use crate::attachment::{Attachment, is_host_name};
use crate::plan::Family;
use crate::spec::{Code, Error, Result};

/// Where the kernel names the boot: a random number, another one after each start.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Stands in a holder's entry where the pod is not known.
const NO_POD: &str = "-";

/// Addresses that one attachment holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// ID of the container.
    pub container: String,
    /// Its interface.
    pub ifname: String,
    /// Its addresses, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// `NAMESPACE/NAME` of the pod, where the runtime told.
    pub pod: Option<String>,
}

/// Something in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A lease, with the name of its interface on the host.
    Lease(String, Lease),
    /// What is no lease. It takes no address from anybody else, and none is given out over it.
    Damaged(Damage),
}

/// An entry that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Where.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// The leases of one network, locked until this is dropped.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    _lock: File,
}

/// Names of the networks that have leases in `data_dir`.
pub fn networks(data_dir: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> = list(data_dir)?.into_iter().filter(|name| data_dir.join(name).is_dir()).collect();
    names.sort_unstable();
    Ok(names)
}

impl Store {
    /// Opens the store of a network for giving out addresses: makes it where it is missing and throws away what an earlier
    /// boot left. Waits for whoever has it.
    pub fn open(data_dir: &Path, network: &str) -> Result<Self> {
        let dir = data_dir.join(network);
        let store = match lock(&dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                for part in ["holders", "addresses"] {
                    let part = dir.join(part);
                    fs::create_dir_all(&part).map_err(|error| Error::io(part.display(), &error))?;
                }
                lock(&dir)
            }
            locked => locked,
        };
        let store = store.map_err(|error| unusable(&dir, &error))?;
        store.forget_earlier_boots()?;
        Ok(store)
    }

    /// Opens the store of a network if there is one.
    pub fn open_existing(data_dir: &Path, network: &str) -> Result<Option<Self>> {
        let dir = data_dir.join(network);
        match lock(&dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            locked => locked.map(Some).map_err(|error| unusable(&dir, &error)),
        }
    }

    /// The lease of an attachment.
    pub fn get(&self, attachment: &Attachment) -> Result<Option<Lease>> {
        let path = self.holder(&attachment.host_name());
        match read_link(&path).map_err(|error| Error::io(path.display(), &error))? {
            Content::Missing => Ok(None),
            content @ (Content::Target(_) | Content::Unreadable(_)) => Ok(Some(parse_lease(&path, content)?)),
        }
    }

    /// Gives an attachment one address out of each pool, and says whether it had none before: a lease without an interface,
    /// as a killed ADD leaves it, is given again. `wanted` are addresses that have to be among them.
    pub fn lease(
        &mut self,
        attachment: &Attachment,
        pools: &[Pool],
        wanted: &[IpAddr],
        pod: Option<&str>,
    ) -> Result<(Vec<IpAddr>, bool)> {
        let name = attachment.host_name();
        let before = self.get(attachment)?;
        let kept = before.as_ref().filter(|lease| self.still_fits(&name, lease, pools, wanted));
        if let Some(lease) = kept {
            return Ok((lease.addresses.clone(), false));
        }
        if before.is_some() {
            self.release(&name)?;
        }
        let last = self.last();
        let addresses: Vec<IpAddr> =
            pools.iter().map(|pool| self.choose(pool, wanted, &last)).collect::<Result<_>>()?;
        let lease = Lease {
            container: attachment.container.clone(),
            ifname: attachment.ifname.clone(),
            addresses,
            pod: pod.map(str::to_owned),
        };
        if let Err(error) = self.write(&name, &lease) {
            return Err(match self.release(&name) {
                Ok(_) => error,
                Err(left) => error.with_details(left),
            });
        }
        Ok((lease.addresses, true))
    }

    /// Gives back what the attachment with this interface on the host holds, whatever of it is there.
    pub fn release(&mut self, name: &str) -> Result<()> {
        let holder = self.holder(name);
        let content = read_link(&holder).map_err(|error| Error::io(holder.display(), &error))?;
        let addresses = match parse_lease(&holder, content) {
            // Nobody holds an address without a holder's entry.
            Err(damage) if !damage.is_there() => return Ok(()),
            Err(_) => self.addresses_of(name)?,
            Ok(lease) => lease.addresses,
        };
        for address in addresses {
            let path = self.address(address);
            let content = read_link(&path).map_err(|error| Error::io(path.display(), &error))?;
            if matches!(content, Content::Target(target) if target == name) {
                remove(&path)?;
            }
        }
        remove(&holder)
    }

    /// Removes everything that belongs to none of the interfaces `kept`, damaged entries too. What cannot be removed is told
    /// at the end.
    pub fn keep_only(&mut self, kept: &BTreeSet<String>) -> Result<()> {
        let mut failed = Vec::new();
        for name in self.names("holders")? {
            if !kept.contains(&name) {
                let released = if is_host_name(&name) { self.release(&name) } else { remove(&self.holder(&name)) };
                failed.extend(released.err());
            }
        }
        for name in self.names("addresses")? {
            let path = self.dir.join("addresses").join(&name);
            let held = matches!(read_link(&path), Ok(Content::Target(target)) if kept.contains(&target));
            if !held {
                failed.extend(remove(&path).err());
            }
        }
        let mut failed = failed.into_iter();
        match failed.next() {
            Some(first) => Err(failed.fold(first, |error, more| error.with_details(more))),
            None => Ok(()),
        }
    }

    /// Everything in the store, by the order of names.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for name in self.names("holders")? {
            let path = self.holder(&name);
            let content = read_link(&path).unwrap_or_else(|error| Content::Unreadable(error.to_string()));
            entries.push(match parse_lease(&path, content) {
                Ok(lease) => Entry::Lease(name, lease),
                Err(damage) => Entry::Damaged(damage),
            });
        }
        for name in self.names("addresses")? {
            let path = self.dir.join("addresses").join(&name);
            let content = read_link(&path).unwrap_or_else(|error| Content::Unreadable(error.to_string()));
            entries.extend(address_damage(&path, &name, content).map(Entry::Damaged));
        }
        Ok(entries)
    }

    /// True if the address is this holder's.
    pub fn holds(&self, name: &str, address: IpAddr) -> bool {
        matches!(read_link(&self.address(address)), Ok(Content::Target(target)) if target == name)
    }

    fn still_fits(&self, name: &str, lease: &Lease, pools: &[Pool], wanted: &[IpAddr]) -> bool {
        lease.addresses.len() == pools.len()
            && lease
                .addresses
                .iter()
                .zip(pools)
                .all(|(address, pool)| pool.contains(*address) && self.holds(name, *address))
            && wanted.iter().all(|address| lease.addresses.contains(address))
    }

    fn choose(&self, pool: &Pool, wanted: &[IpAddr], last: &[IpAddr]) -> Result<IpAddr> {
        let of_family =
            |addresses: &[IpAddr]| addresses.iter().copied().find(|address| Family::of(*address) == pool.family());
        if let Some(wanted) = of_family(wanted) {
            return if self.is_free(wanted)? {
                Ok(wanted)
            } else {
                Err(Error::new(
                    Code::NoAddress,
                    format!("{wanted}, which was asked for, is taken: {}", self.who_has(wanted)),
                ))
            };
        }
        for candidate in pool.behind(of_family(last)) {
            if self.is_free(candidate)? {
                return Ok(candidate);
            }
        }
        Err(Error::new(
            Code::NoAddress,
            format!(
                "all {} addresses of the node's pod CIDRs are taken: `keystone-cni ipam list` shows by whom; give the node another pod CIDR",
                pool.size()
            ),
        ))
    }

    /// An entry of any kind takes its address.
    fn is_free(&self, address: IpAddr) -> Result<bool> {
        let path = self.address(address);
        match fs::symlink_metadata(&path) {
            Ok(_) => Ok(false),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
            Err(error) => Err(Error::io(path.display(), &error)),
        }
    }

    fn who_has(&self, address: IpAddr) -> String {
        match read_link(&self.address(address)) {
            Ok(Content::Target(name)) => match read_link(&self.holder(&name)) {
                Ok(Content::Target(holder)) => format!("by {holder}"),
                _ => format!("by {name}"),
            },
            _ => format!("by a damaged entry, {}", self.address(address).display()),
        }
    }

    fn write(&self, name: &str, lease: &Lease) -> Result<()> {
        let addresses = joined(&lease.addresses);
        let pod = lease.pod.as_deref().unwrap_or(NO_POD);
        let target = format!("{} {} {addresses} {pod}", lease.container, lease.ifname);
        make(&self.holder(name), &target)?;
        for address in &lease.addresses {
            make(&self.address(*address), name)?;
        }
        replace(&self.dir.join("last"), &addresses)
    }

    /// Where the round goes on. It is only a hint: without it the round begins anew.
    fn last(&self) -> Vec<IpAddr> {
        match read_link(&self.dir.join("last")) {
            Ok(Content::Target(target)) => target.split(',').filter_map(|address| address.parse().ok()).collect(),
            _ => Vec::new(),
        }
    }

    fn forget_earlier_boots(&self) -> Result<()> {
        let boot = fs::read_to_string(BOOT_ID).map_err(|error| Error::io(BOOT_ID, &error))?;
        let path = self.dir.join("boot");
        let boot = boot.trim_end();
        match read_link(&path) {
            Ok(Content::Target(found)) if found == boot => return Ok(()),
            Ok(Content::Target(found)) if found.len() == boot.len() => {
                for part in ["addresses", "holders"] {
                    for name in self.names(part)? {
                        remove(&self.dir.join(part).join(name))?;
                    }
                }
            }
            // A store that was just made, or an entry that is damaged: nothing says that the leases are old.
            _ => {}
        }
        replace(&path, boot)
    }

    fn addresses_of(&self, name: &str) -> Result<Vec<IpAddr>> {
        let held = self.names("addresses")?.into_iter().filter_map(|address| address.parse().ok());
        Ok(held.filter(|address| self.holds(name, *address)).collect())
    }

    fn names(&self, part: &str) -> Result<Vec<String>> {
        let mut names = list(&self.dir.join(part))?;
        names.sort_unstable();
        Ok(names)
    }

    fn holder(&self, name: &str) -> PathBuf {
        self.dir.join("holders").join(name)
    }

    fn address(&self, address: IpAddr) -> PathBuf {
        self.dir.join("addresses").join(address.to_string())
    }
}

/// What a path holds.
enum Content {
    Missing,
    Target(String),
    Unreadable(String),
}

impl Damage {
    fn is_there(&self) -> bool {
        !self.reason.is_empty()
    }
}

impl From<Damage> for Error {
    fn from(damage: Damage) -> Self {
        Self::new(
            Code::Store,
            format!(
                "the lease {} is damaged: {}; DEL of its container or GC removes it",
                damage.path.display(),
                damage.reason
            ),
        )
    }
}

fn parse_lease(path: &Path, content: Content) -> std::result::Result<Lease, Damage> {
    let damaged = |reason: String| Damage { path: path.into(), reason };
    let target = match content {
        Content::Missing => return Err(damaged(String::new())),
        Content::Unreadable(reason) => return Err(damaged(reason)),
        Content::Target(target) => target,
    };
    let no_lease = || damaged(format!("{target:?} is no lease"));
    let [container, ifname, addresses, pod] =
        target.split(' ').collect::<Vec<_>>().try_into().map_err(|_| no_lease())?;
    let addresses = addresses.split(',').map(str::parse).collect::<std::result::Result<_, _>>();
    Ok(Lease {
        container: container.into(),
        ifname: ifname.into(),
        addresses: addresses.map_err(|_| no_lease())?,
        pod: Some(pod.to_owned()).filter(|pod| pod != NO_POD),
    })
}

fn address_damage(path: &Path, name: &str, content: Content) -> Option<Damage> {
    let reason = match content {
        Content::Missing => return None,
        Content::Unreadable(reason) => reason,
        Content::Target(_) if name.parse::<IpAddr>().is_err() => "its name is no address".into(),
        Content::Target(target) if !is_host_name(&target) => format!("{target:?} is no holder"),
        Content::Target(_) => return None,
    };
    Some(Damage { path: path.into(), reason })
}

/// A directory that is there gets its lock file, and nothing else is made.
fn lock(dir: &Path) -> io::Result<Store> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(dir.join("lock"))?;
    file.lock()?;
    Ok(Store { dir: dir.into(), _lock: file })
}

fn unusable(dir: &Path, error: &io::Error) -> Error {
    let is_damaged = matches!(error.kind(), ErrorKind::NotADirectory | ErrorKind::IsADirectory);
    let code = if is_damaged { Code::Store } else { Code::Io };
    Error::new(code, format!("the store of addresses {} cannot be used: {error}", dir.display()))
}

fn read_link(path: &Path) -> io::Result<Content> {
    match fs::read_link(path) {
        Ok(target) => Ok(match target.into_os_string().into_string() {
            Ok(target) => Content::Target(target),
            Err(target) => Content::Unreadable(format!("{target:?} is no text")),
        }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Content::Missing),
        // EINVAL of readlink(2).
        Err(error) if error.kind() == ErrorKind::InvalidInput => {
            Ok(Content::Unreadable("it is no symbolic link".into()))
        }
        Err(error) => Err(error),
    }
}

fn make(path: &Path, target: &str) -> Result<()> {
    match symlink(target, path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Err(Error::new(Code::Store, format!("the store of addresses has lost {}: {error}", path.display())))
        }
        made => made.map_err(|error| Error::io(path.display(), &error)),
    }
}

fn replace(path: &Path, target: &str) -> Result<()> {
    let beside = path.with_extension("next");
    // A killed writer may have left its own.
    remove(&beside)?;
    make(&beside, target)?;
    fs::rename(&beside, path).map_err(|error| Error::io(path.display(), &error))
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == ErrorKind::IsADirectory => Err(Error::new(
            Code::Store,
            format!("{} is a directory where a lease should be: remove it", path.display()),
        )),
        removed => removed.map_err(|error| Error::io(path.display(), &error)),
    }
}

fn list(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| unusable(dir, &error))?,
    };
    let names = entries.map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()));
    names.collect::<io::Result<_>>().map_err(|error| unusable(dir, &error))
}

fn joined(addresses: &[IpAddr]) -> String {
    addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(",")
}
