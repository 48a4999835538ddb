//! The controller of a Keystone Mesh.
//!
//! [`view`] is what the cluster looks like, each object parsed once; [`decide`] is what to do about it, a pure function
//! of the view and the time. Everything else drives: it feeds the view from watches and carries out the actions.
//!
//! ```text
//!   API server ──watch──> index ──view──> decide ──actions──> queue ──apply──> API server
//!                           ^                                            │
//!                           └────────── what was acknowledged <──────────┘
//! ```

#![forbid(unsafe_code)]

pub mod apply;
pub mod args;
pub mod crds;
pub mod decide;
pub mod driver;
pub mod events;
pub mod http;
pub mod index;
pub mod lease;
pub mod metrics;
pub mod queue;
pub mod reports;
pub mod run;
pub mod slim;
pub mod view;
pub mod watch;
