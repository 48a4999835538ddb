//! The kubernetes registry against a real API server.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::wildcard_enum_match_arm, reason = "a test waits for one event of many")]

mod agent;
mod approver;
mod command;
mod credentials;
mod handover;
mod join;
mod outage;
mod peer;
mod publish;
mod trouble;
mod world;
