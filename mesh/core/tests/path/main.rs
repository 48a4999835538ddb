//! Scenario tests of the path machine in virtual time.
#![allow(clippy::unwrap_used, unreachable_pub, missing_docs, reason = "tests")]

#[path = "../world/mod.rs"]
mod world;

mod failures;
mod nats;
mod quiet;
mod random;
