//! The relay: frames, fragments, quotas.

pub mod address;
