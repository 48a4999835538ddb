//! Keystone Mesh: the daemon, the relay, the join service and the CLI.
//!
//! Drivers only: they turn the world into inputs for `keystone-mesh-core` and its outputs into effects.

pub mod clock;
pub mod config;
pub mod control;
pub mod dataplane;
pub mod kernel;
pub mod quic;
pub mod registry;
pub mod service;
pub mod state;
pub mod status;
pub mod store;
pub mod sys;
