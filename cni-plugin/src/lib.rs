//! The CNI plugin of Keystone Mesh: gives pods their network.
//!
//! A container runtime starts the program once for each thing it wants, so the program is small, single-threaded and
//! without a memory of its own; what it knows is in the configuration, in the daemon's [`facts`] and in the leases on disk.
//!
//! ```text
//!   program ── environment, stdin ──▶ spec   Call, Config                 parsed once
//!                                      │
//!                                    verbs   ADD, DEL, CHECK, GC, STATUS
//!                    ┌─────────────────┼──────────────────┐
//!                  ipam              plan               kernel
//!             Pool: which are     steps, as a value;   carries them out by netlink;
//!             Store: whose        apply: back on       reads what is there
//!                                 failure
//! ```
//!
//! `docs/cni.md` has the options and errors, `docs/decisions/0012-pods-on-routed-links.md` the reasons.

pub mod apply;
pub mod attachment;
mod delegate;
pub mod facts;
pub mod ipam;
pub mod kernel;
mod list;
mod netlink;
pub mod plan;
pub mod program;
pub mod spec;
mod sys;
mod sysctl;
pub mod verbs;
