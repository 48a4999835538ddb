//! The Kubernetes API as a client: how it is reached, and collections that are kept watched.
//!
//! Nothing here knows what the objects mean; `registry::kubernetes` does.

pub mod access;
pub mod watch;
mod words;

use kube::Error;

use self::words::chain;
pub use self::words::words;

/// The HTTP status with which the API server answered, where it did.
pub fn status_code(error: &Error) -> Option<u16> {
    if let Error::Api(status) = error { Some(status.code) } else { None }
}
