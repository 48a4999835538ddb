//! Which way a peer's packets go.

pub mod candidate;
pub use candidate::{Candidate, CandidateKind};
