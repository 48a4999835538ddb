//! Who gets and gives back addresses: edits of the ledger.
//!
//! An edit is a whole page under compare and swap. Nothing is approved from it before the view shows it acknowledged,
//! so a lost edit costs one more pass and a lost race gives no address twice.

use std::collections::{BTreeMap, BTreeSet};

use keystone_mesh_core::ledger::{Exhausted, Holder, Ledger};
use keystone_mesh_core::network::Network;
use keystone_mesh_core::node::NodeName;

use super::action::{Action, Effect};
use super::census::{Census, Machine, Standing};
use crate::view::{ClusterView, Now};

/// What the ledger needs.
#[derive(Debug, Default)]
pub(super) struct Addresses<'a> {
    pub(super) actions: Vec<Action>,
    /// The acknowledged host number of each plain peer.
    pub(super) peers: BTreeMap<&'a NodeName, u32>,
    /// Who goes without, because none is left.
    pub(super) without: BTreeMap<Holder, Exhausted>,
}

/// Decides about the ledger. `peers` are the plain peers that need an address, the eldest first.
pub(super) fn assign<'a>(
    view: &'a ClusterView,
    network: &Network,
    census: &Census<'_>,
    peers: &[&NodeName],
    now: Now,
) -> Addresses<'a> {
    let mut book = Book {
        network,
        stored: view.ledger(),
        wanted: None,
        now: now / 1000,
        caught_up: now >= view.caught_up_at(),
        changes: Changes::default(),
    };
    let mut addresses = Addresses::default();
    book.settle(view, census);
    let mut machines: Vec<&Machine<'_>> = census.machines.values().collect();
    machines.sort_by_key(|machine| (machine.created(), machine.name));
    for machine in machines {
        if let Err((holder, exhausted)) = book.enter(machine) {
            addresses.without.insert(holder, exhausted);
        }
    }
    for &name in peers {
        let holder = Holder::Peer(name.clone());
        if let Err(exhausted) = book.claim(&holder) {
            addresses.without.insert(holder, exhausted);
        }
    }
    for (host, holder) in view.ledger().live() {
        match holder {
            Holder::Peer(name) => drop(addresses.peers.entry(name).or_insert(host)),
            Holder::Node(..) => {}
        }
    }
    addresses.actions = book.edits(view);
    addresses
}

/// The ledger as it is to be.
struct Book<'a> {
    network: &'a Network,
    stored: &'a Ledger,
    /// A copy, from the first change on: most passes change nothing.
    wanted: Option<Ledger>,
    /// Seconds since 1970.
    now: u64,
    /// Whether what is absent is gone, also where it was never seen.
    caught_up: bool,
    changes: Changes,
}

/// For people, what changes.
#[derive(Default)]
struct Changes {
    claimed: Vec<String>,
    released: Vec<String>,
}

impl Book<'_> {
    /// Gives back what nobody is there for. A holder with two numbers, as a race between two controllers can leave
    /// one, keeps the one that it was approved with.
    fn settle(&mut self, view: &ClusterView, census: &Census<'_>) {
        let mut seen: BTreeSet<&Holder> = BTreeSet::new();
        let mut doubled: BTreeSet<&Holder> = BTreeSet::new();
        for (_, holder) in view.ledger().live() {
            if !seen.insert(holder) {
                doubled.insert(holder);
            }
        }
        for holder in seen {
            let stays = match holder {
                Holder::Node(name, id) => match census.machines.get(name).map(|machine| &machine.standing) {
                    Some(Standing::Admitted { identity, .. } | Standing::Entering(identity)) => identity == id,
                    // What is not decided keeps what it has.
                    Some(Standing::Undecided(_) | Standing::Spending | Standing::Adopting(..)) => true,
                    Some(
                        Standing::Silent
                        | Standing::Waiting(_)
                        | Standing::Refused(_)
                        | Standing::Changed { .. }
                        | Standing::Revoked(_)
                        | Standing::Leaving,
                    ) => false,
                    None => !self.caught_up && !view.was_seen_off(holder),
                },
                Holder::Peer(name) => {
                    view.peers().contains_key(name) || (!self.caught_up && !view.was_seen_off(holder))
                }
            };
            if !stays {
                self.release(holder);
            } else if doubled.contains(holder) {
                self.keep_one(holder, census);
            }
        }
    }

    fn keep_one(&mut self, holder: &Holder, census: &Census<'_>) {
        let approved = match holder {
            Holder::Node(name, _) => census.machines.get(name).and_then(Machine::admitted).map(|(_, host)| host),
            Holder::Peer(_) => None,
        };
        let Some(host) = approved.or_else(|| self.stored.held_by(holder)) else { return };
        self.release(holder);
        self.wanted().adopt(host, holder);
    }

    fn enter(&mut self, machine: &Machine<'_>) -> Result<(), (Holder, Exhausted)> {
        match machine.standing {
            Standing::Entering(identity) => {
                let holder = Holder::Node(machine.name.clone(), identity);
                self.claim(&holder).map_err(|exhausted| (holder, exhausted))
            }
            Standing::Adopting(identity, host) => {
                let holder = Holder::Node(machine.name.clone(), identity);
                if self.wanted().adopt(host, &holder) {
                    self.changes.claimed.push(format!("{holder} (it had {host} before)"));
                    return Ok(());
                }
                // Another has it since this pass began: a number of its own, then.
                self.claim(&holder).map_err(|exhausted| (holder, exhausted))
            }
            Standing::Silent
            | Standing::Waiting(_)
            | Standing::Refused(_)
            | Standing::Changed { .. }
            | Standing::Undecided(_)
            | Standing::Spending
            | Standing::Admitted { .. }
            | Standing::Revoked(_)
            | Standing::Leaving => Ok(()),
        }
    }

    fn claim(&mut self, holder: &Holder) -> Result<(), Exhausted> {
        if self.wanted.as_ref().unwrap_or(self.stored).held_by(holder).is_none() {
            let (network, now) = (self.network, self.now);
            self.wanted().claim(network, holder, now)?;
            self.changes.claimed.push(holder.to_string());
        }
        Ok(())
    }

    fn release(&mut self, holder: &Holder) {
        let now = self.now;
        self.wanted().release(holder, now);
        self.changes.released.push(holder.to_string());
    }

    fn wanted(&mut self) -> &mut Ledger {
        self.wanted.get_or_insert_with(|| self.stored.clone())
    }

    fn edits(self, view: &ClusterView) -> Vec<Action> {
        let Some(wanted) = self.wanted else { return Vec::new() };
        let reason = self.changes.to_string();
        let edits = wanted.edits_since(self.stored);
        let action = |edit: keystone_mesh_core::ledger::PageEdit| Action {
            effect: Effect::Ledger { resource_version: view.page_version(edit.page).map(str::to_owned), edit },
            reason: reason.clone(),
            events: Vec::new(),
        };
        edits.into_iter().map(action).collect()
    }
}

impl std::fmt::Display for Changes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        /// Enough to recognise a case; a burst has hundreds.
        const SHOWN: usize = 3;
        for (what, list) in [("claims for", &self.claimed), ("releases of", &self.released)] {
            if let Some(first) = list.get(..list.len().min(SHOWN)).filter(|first| !first.is_empty()) {
                write!(f, "{} {what} {}; ", list.len(), first.join(", "))?;
            }
        }
        Ok(())
    }
}
