//! The kubernetes registry against a real API server.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod publish;
mod world;
