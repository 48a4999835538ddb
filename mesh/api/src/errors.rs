//! Errors of the API in words that a person can act on: one line with the whole cause, and what to do.
//!
//! A connection that fails is told by its innermost cause, which lies below half a dozen layers that only say that it
//! failed. What the API server itself answered is given as it stands.

use std::error::Error as StdError;
use std::fmt;
use std::io;

use k8s_openapi::jiff::Timestamp;
use kube::Error;
use rustls::CertificateError;
use rustls::pki_types::UnixTime;
use tower::BoxError;
use tower::util::MapErrLayer;

/// An error of the API in words.
pub fn words(error: &Error) -> String {
    if let Error::Api(status) = error {
        return answered(status.code, if status.message.is_empty() { &status.reason } else { &status.message });
    }
    if let Error::Service(error) = error
        && error.is::<Unreachable>()
    {
        return error.to_string();
    }
    format!("the API server cannot be reached: {}", cause_of(error))
}

fn answered(code: u16, said: &str) -> String {
    match code {
        401 => format!(
            "the API server does not accept the credentials ({said}): the token or certificate has expired or was \
             withdrawn, or is another cluster's"
        ),
        // The authorizer names user, verb and resource; an admission policy names itself and needs no role.
        403 if said.contains("cannot") => {
            format!("the API server forbids it: {said}; the chart's roles grant what is needed")
        }
        403 => format!("the API server forbids it: {said}"),
        _ => format!("the API server answered {code}: {said}"),
    }
}

/// A connection to the API server that failed.
#[derive(Debug)]
struct Unreachable {
    server: String,
    cause: BoxError,
}

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the API server at {} cannot be reached: {}", self.server, cause_of(&*self.cause))
    }
}

impl StdError for Unreachable {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&*self.cause)
    }
}

/// Makes a client's failed connections say to where.
pub fn naming(server: String) -> MapErrLayer<impl Fn(BoxError) -> BoxError + Clone> {
    MapErrLayer::new(move |cause: BoxError| match cause.downcast::<Error>() {
        // A request that was not even sent.
        Ok(error) => error as BoxError,
        Err(cause) => Unreachable { server: server.clone(), cause }.into(),
    })
}

fn cause_of(error: &(dyn StdError + 'static)) -> String {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(known) = known(error) {
            return known;
        }
        // An io::Error passes over what it carries.
        let carried = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = carried.map(|carried| carried as &(dyn StdError + 'static)).or_else(|| error.source());
    }
    chain(error)
}

/// Causes of which it is known what to do.
#[expect(clippy::wildcard_enum_match_arm, reason = "of the system's many errors these few are a connection's")]
fn known(error: &(dyn StdError + 'static)) -> Option<String> {
    if let Some(rustls::Error::InvalidCertificate(error)) = error.downcast_ref() {
        return Some(certificate(error));
    }
    let error = error.downcast_ref::<io::Error>().filter(|error| error.get_ref().is_none())?;
    let advice = match error.kind() {
        io::ErrorKind::ConnectionRefused => "nothing listens there; is it running, and is this its address?",
        io::ErrorKind::TimedOut => "is this its address, and is there a way to it?",
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => "this host has no way to it",
        _ => return None,
    };
    Some(format!("{error}: {advice}"))
}

#[expect(clippy::wildcard_enum_match_arm, reason = "the others are told in rustls' words")]
fn certificate(error: &CertificateError) -> String {
    match error {
        CertificateError::NotValidForNameContext { expected, presented } => {
            let expected = expected.to_str();
            format!(
                "its certificate does not name {expected}, only {}; add {expected} to it (k3s: --tls-san {expected}; kubeadm: \
                 apiServer.certSANs), or use an address that it names",
                presented.join(", ")
            )
        }
        CertificateError::ExpiredContext { not_after, .. } => {
            format!("its certificate ended at {}; renew it, or set this host's clock if that is wrong", time(*not_after))
        }
        CertificateError::NotValidYetContext { not_before, .. } => {
            format!("its certificate begins at {} only; is this host's clock right?", time(*not_before))
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "its certificate is not signed by the authority that these credentials name: they are another cluster's or from \
             before its authority changed, or something else answers there"
                .to_owned()
        }
        error => format!("its certificate is not accepted: {error}"),
    }
}

fn time(at: UnixTime) -> String {
    let seconds = i64::try_from(at.as_secs()).unwrap_or(i64::MAX);
    Timestamp::from_second(seconds).map_or_else(|_| format!("second {seconds}"), |time| time.to_string())
}

/// An error with its causes. The outer ones of a connection that fails only say that it does.
pub fn chain(error: &dyn StdError) -> String {
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
