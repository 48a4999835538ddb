//! The Kubernetes API as a client: how it is reached, and collections that are kept watched.
//!
//! Nothing here knows what the objects mean; `registry::kubernetes` does.

pub mod access;
pub mod watch;

use kube::Error;

/// The HTTP status with which the API server answered, where it did.
pub fn status_code(error: &Error) -> Option<u16> {
    if let Error::Api(status) = error { Some(status.code) } else { None }
}

/// An error of the API in words that a person can act on.
pub fn words(error: &Error) -> String {
    let Error::Api(status) = error else { return format!("the API server cannot be reached: {}", chain(error)) };
    let said = if status.message.is_empty() { &status.reason } else { &status.message };
    match status.code {
        401 => format!("the API server does not accept the credentials ({said})"),
        403 => format!("the API server forbids it: {said}; the chart's roles grant what is needed"),
        _ => format!("the API server answered {}: {said}", status.code),
    }
}

/// An error with its causes. The outer ones of a connection that fails only say that it does.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = error.source();
    }
    text
}
