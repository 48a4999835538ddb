//! The controller's program against a real API server, each test in a sandbox of its own.

#![expect(clippy::unwrap_used, reason = "a test may fail wherever it likes")]
#![expect(clippy::print_stdout, reason = "figures of a run are worth reading")]

mod accounts;
mod approval;
mod crds;
mod effects;
mod outages;
mod pods;
mod races;
mod scale;
mod storms;
mod world;
