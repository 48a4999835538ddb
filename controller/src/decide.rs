//! What to do about a cluster: a pure function of its view and the time.
//!
//! ```text
//!   watches ──> ClusterView ──> reconcile(view, now) ──> actions ──> API server
//!                    ^                                                  │
//!                    └──────────── what it acknowledged <───────────────┘
//! ```
//!
//! The same view and time give the same actions; once they are applied there are none.

mod action;
mod census;

pub use action::{Action, Decision, Effect, Event, Gauges, Regarding, Target};

use crate::view::{ClusterView, Now, Reporter};

/// Decides what to do.
pub fn reconcile(view: &ClusterView, now: Now) -> Decision {
    let _ = (view, now);
    Decision::default()
}

/// Whom to ask, over the mesh, which peers they reach: the daemons of approved control-plane nodes; where there are
/// none, up to three others.
pub fn reporters(view: &ClusterView) -> Vec<Reporter> {
    let _ = view;
    Vec::new()
}
