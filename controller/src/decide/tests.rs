//! Decisions against a model of the API server.

mod admission;
mod init;
mod model;
mod plain;
mod random;
mod readiness;
mod routes;
mod tampering;
mod world;
