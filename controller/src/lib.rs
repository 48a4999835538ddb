//! The controller of a Keystone Mesh.

#![forbid(unsafe_code)]

pub mod crds;
pub mod lease;
pub mod metrics;
