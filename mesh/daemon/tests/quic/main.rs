//! The QUIC side over loopback, with real endpoints: identities, relays, streams to the control plane.

#![expect(clippy::unwrap_used, reason = "a failed step of a test is a failed test")]

mod gateway;
mod identity;
mod relay_abuse;
mod relay_life;
mod relay_packets;
mod world;
