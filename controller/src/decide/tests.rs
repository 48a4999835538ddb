//! Decisions against a model of the API server.

mod admission;
mod model;
mod operation;
mod random;
mod world;
