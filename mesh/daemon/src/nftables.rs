//! The kernel's packet filter, as one table that is ours.
//!
//! ```text
//!   Table (core) ──► changes from what is there ──► one batch ──► kernel: all of it, at one instant, or nothing
//!        ▲                    ▲
//!     desired            remembered while the generation is ours, else read
//! ```
//!
//! The kernel counts a generation up with every transaction, of whoever. What we left is remembered with its generation,
//! so that a change of one element costs one message; when somebody else was there since, everything is read again. Every
//! batch names the generation that it was made for, and the kernel refuses it when that has passed. Other tables are
//! neither read nor touched.
//!
//! Written to the kernel's own interface (nfnetlink, `linux/netfilter/nf_tables.h`) and without libnftnl, because the
//! image holds one static program. All calls block, for as long as the kernel takes.

mod encode;
mod read;
mod socket;
mod wire;

use std::collections::BTreeMap;
use std::io;

use keystone_mesh_core::nftables::{Change, Present, Table, changes, removal};

use self::encode::Batch;
use self::socket::Socket;

/// How often a transaction is made anew when others change the packet filter at the same time.
const TRIES: u32 = 20;

/// Why a table is not as it should be. The kernel then still has what it had before.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// The kernel cannot be asked.
    #[error("nftables: cannot {doing}: {error}")]
    Socket {
        /// What was tried.
        doing: &'static str,
        /// The system's answer.
        error: io::Error,
    },
    /// The kernel did not take something.
    #[error("nftables: the kernel refuses {object} in the table inet {table}: {error}{}", others(*.more))]
    Refused {
        /// The table.
        table: String,
        /// What it is about.
        object: String,
        /// The kernel's answer.
        error: io::Error,
        /// How many more things it refused in the same transaction.
        more: usize,
    },
    /// The kernel's answer does not read.
    #[error("nftables: the kernel's answer about {0} does not read")]
    Answer(&'static str),
    /// Others never stop changing the packet filter.
    #[error("nftables: others changed the packet filter during each of {TRIES} tries")]
    Contended,
}

fn others(more: usize) -> String {
    if more == 0 { String::new() } else { format!(" (and {more} more)") }
}

impl NftError {
    /// Whether the same may work when it is tried again, because somebody else was in between.
    fn is_race(&self) -> bool {
        match self {
            Self::Socket { error, .. } | Self::Refused { error, .. } => {
                // ERESTART: the generation has passed. EINTR: a dump was overtaken. EAGAIN: a module was loaded.
                matches!(error.raw_os_error(), Some(libc::ERESTART | libc::EINTR | libc::EAGAIN))
            }
            Self::Answer(_) | Self::Contended => false,
        }
    }

    /// Whether the kernel refused something for what it is, so that making the table anew may help.
    fn is_refusal(&self) -> bool {
        match self {
            Self::Refused { error, .. } => error.raw_os_error() != Some(libc::EPERM) && !self.is_race(),
            Self::Socket { .. } | Self::Answer(_) | Self::Contended => false,
        }
    }
}

/// What an apply did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Steps of the transaction; elements of one set are one step. 0: everything was as it should be.
    pub changes: usize,
    /// Bytes of the transaction.
    pub bytes: usize,
    /// Whether the table had to be made anew.
    pub anew: bool,
}

/// One table of the `inet` family in the network namespace of whoever opens it.
#[derive(Debug)]
pub struct KernelTable {
    name: String,
    socket: Socket,
    /// The generation that was ours, and what the table was then; none: there was no table.
    known: Option<(u32, Option<Present>)>,
}

impl KernelTable {
    /// Opens the way to the table of this name, which need not be there.
    pub fn open(name: &str) -> Result<Self, NftError> {
        Ok(Self { name: name.to_owned(), socket: Socket::open()?, known: None })
    }

    /// Makes the table as `desired`, in one transaction.
    pub fn apply(&mut self, desired: Table) -> Result<Applied, NftError> {
        let applied = match self.transact(Some(&desired), false) {
            // A difference that the kernel does not take is no reason to stay as it is.
            Err(error) if error.is_refusal() => {
                tracing::warn!(%error, "the table is made anew");
                Applied { anew: true, ..self.transact(Some(&desired), true)? }
            }
            result => result?,
        };
        if let Some((_, present)) = self.known.as_mut().filter(|_| applied.changes > 0) {
            *present = Some(desired.into());
        }
        Ok(applied)
    }

    /// Takes the table away. Whether there was one.
    pub fn remove(&mut self) -> Result<bool, NftError> {
        let applied = self.transact(None, false)?;
        if let Some((_, present)) = &mut self.known {
            *present = None;
        }
        Ok(applied.changes > 0)
    }

    /// Whether nobody has changed the packet filter since this table was applied or read.
    pub fn is_untouched(&mut self) -> bool {
        let generation = read::generation(&mut self.socket);
        self.known.as_ref().is_some_and(|(known, _)| generation.is_ok_and(|generation| generation == *known))
    }

    /// What the kernel has; none where there is no such table.
    pub fn read(&mut self) -> Result<Option<Present>, NftError> {
        self.known = None;
        tried(|| self.look())?;
        Ok(self.known.as_ref().and_then(|(_, present)| present.clone()))
    }

    fn transact(&mut self, desired: Option<&Table>, anew: bool) -> Result<Applied, NftError> {
        tried(|| self.transact_once(desired, anew))
    }

    fn transact_once(&mut self, desired: Option<&Table>, anew: bool) -> Result<Applied, NftError> {
        static TO_REPLACE: Present = Present { sets: BTreeMap::new(), chains: BTreeMap::new(), foreign: true };
        self.look()?;
        let (generation, present) = self.known.as_ref().map_or((0, None), |(g, present)| (*g, present.as_ref()));
        let present = if anew { present.map(|_| &TO_REPLACE) } else { present };
        let steps = match desired {
            Some(desired) => changes(present, desired),
            None => removal(present),
        };
        if steps.is_empty() {
            return Ok(Applied::default());
        }
        let batch = Batch::new(&self.name, generation, &steps);
        let applied = Applied { changes: steps.len(), bytes: batch.bytes().len(), anew };
        let refused = self.socket.transact(batch.bytes())?;
        if let Some((first, error)) = refused.first() {
            let error = io::Error::from_raw_os_error(*error);
            let object = batch.message(*first).map_or_else(|| "the transaction".to_owned(), |at| described(&steps[at]));
            // What is there is in doubt.
            self.known = None;
            return Err(NftError::Refused { table: self.name.clone(), object, error, more: refused.len() - 1 });
        }
        if let Some((generation, _)) = &mut self.known {
            // It counts transactions, and leaves out 0 (`nft_base_seq_inc` in the kernel's nf_tables_api.c). Were it otherwise, the
            // next look would find another generation and read everything.
            *generation = generation.checked_add(1).unwrap_or(1);
        }
        Ok(applied)
    }

    /// Makes sure that what is known is of the present generation.
    fn look(&mut self) -> Result<(), NftError> {
        let generation = read::generation(&mut self.socket)?;
        if self.known.as_ref().is_none_or(|(known, _)| *known != generation) {
            self.known = None;
            let present = read::table(&mut self.socket, &self.name)?;
            self.known = Some((generation, present));
        }
        Ok(())
    }
}

/// Tries again what others interrupted.
fn tried<T>(mut attempt: impl FnMut() -> Result<T, NftError>) -> Result<T, NftError> {
    for _ in 0..TRIES {
        match attempt() {
            Err(error) if error.is_race() => tracing::debug!(%error, "once more"),
            result => return result,
        }
    }
    Err(NftError::Contended)
}

/// What a step is about.
fn described(step: &Change<'_>) -> String {
    match step {
        Change::AddTable => "the table itself".to_owned(),
        Change::DeleteTable => "the end of the table".to_owned(),
        Change::AddSet(name, _) => format!("the set {name}"),
        Change::DeleteSet(name) => format!("the end of the set {name}"),
        Change::AddElements(name, shape, elements) => match elements.first() {
            Some((first, _)) => format!("elements of {name}, from {} on", first.display(&shape.key)),
            None => format!("elements of {name}"),
        },
        Change::DeleteElements(name, ..) => format!("the end of elements of {name}"),
        Change::AddChain(name, _) => format!("the chain {name}"),
        Change::DeleteChain(name) => format!("the end of the chain {name}"),
        Change::FlushChain(name) => format!("the end of the rules of {name}"),
        Change::AddRule(name, rule) => format!("the rule `{rule}` of {name}"),
    }
}
