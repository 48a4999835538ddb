//! Keystone Mesh: the daemon, the relay, the join service and the CLI.
//!
//! Drivers only: they turn the world into inputs for `keystone-mesh-core` and its outputs into effects.

pub mod dataplane;
pub mod kernel;
pub mod quic;
pub mod sys;
pub mod tun;
pub mod udp;
