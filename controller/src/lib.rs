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

pub mod crds;
pub mod decide;
pub mod lease;
pub mod metrics;
pub mod view;
