//! The Kubernetes API as a client: how it is reached, and collections that are kept watched.
//!
//! Nothing here knows what the objects mean; `registry::kubernetes` does.

pub mod access;
pub mod watch;

pub use keystone_mesh_api::errors::words;
use kube::Error;

/// The HTTP status with which the API server answered, where it did.
pub fn status_code(error: &Error) -> Option<u16> {
    if let Error::Api(status) = error { Some(status.code) } else { None }
}
