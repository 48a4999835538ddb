//! Keystone Mesh: the daemon, the relay, the join service and the CLI.
//!
//! Drivers only: they turn the world into inputs for `keystone-mesh-core` and its outputs into effects.

pub mod agent;
pub mod cli;
pub mod clock;
pub mod cni;
pub mod config;
pub mod control;
pub mod daemon;
pub mod dataplane;
pub mod http;
pub mod join;
pub mod kernel;
pub mod kube_api;
pub mod lifeline;
pub mod member;
pub mod metrics;
pub mod nftables;
pub mod policy;
pub mod preflight;
pub mod quic;
pub mod registry;
pub mod relay;
pub mod service;
pub mod signals;
pub mod state;
pub mod status;
pub mod store;
pub mod sys;
pub mod tun;
pub mod udp;
pub mod wg_quick;
