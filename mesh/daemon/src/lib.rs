//! Keystone Mesh: the daemon, the relay, the join service and the CLI.
//!
//! Drivers only: they turn the world into inputs for `keystone-mesh-core` and its outputs into effects.

pub mod config;
pub mod dataplane;
pub mod kernel;
pub mod quic;
pub mod state;
pub mod store;
pub mod sys;
