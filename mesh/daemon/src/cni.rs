//! What the daemon does for pods: facts for the plugin, and the plugin's place on the node.
//!
//! ```text
//!   driver ── Status ──► facts ──► /run/keystone-mesh/pods.json ──► keystone-cni, which starts pods
//!                                        │
//!                                        └──► installer ──► 10-keystone.conflist, the plugin's program
//! ```
//!
//! Whoever runs the data plane writes the facts. The installer runs where the node's CNI directories are: in the agent's
//! pod, or in the daemon of a host. It needs nothing but the file, so both are the same code.

pub mod facts;
pub mod installer;
pub mod kernel;
pub mod layout;
pub mod service;
pub mod sysctl;

use std::sync::{Mutex, PoisonError};

/// Keeps what was said last. Every problem is logged once, when it comes.
fn tell(problems: &Mutex<Vec<String>>, said: Vec<String>) {
    let mut known = problems.lock().unwrap_or_else(PoisonError::into_inner);
    for problem in said.iter().filter(|problem| !known.contains(problem)) {
        tracing::warn!("{problem}");
    }
    *known = said;
}
