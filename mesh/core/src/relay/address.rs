//! How the places to meet are written: gateways as `HOST:PORT`, relays as `KEY@HOST:PORT[,HOST:PORT]`.
//!
//! A gateway is the control plane itself, so its key is the network key that everyone has pinned. A relay is someone
//! else and carries its key in its address. Hosts are names or addresses; names are resolved at each attempt, because
//! a home connection changes its address.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use crate::io::excerpt;
use crate::key::{KeyError, NodeId, serde_as_text};

/// Addresses that one relay may have.
const MAX_ADDRESSES: usize = 8;

/// Why an address was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Not `HOST:PORT`.
    #[error("not an address: `{0}`; expected `HOST:PORT`, with IPv6 in brackets as in `[2001:db8::1]:51840`")]
    HostPort(String),
    /// No `@`.
    #[error("not a relay: `{0}`; expected `KEY@HOST:PORT`, as `keystone-mesh relay` prints it")]
    NoKey(String),
    /// The part before the `@` is no identity.
    #[error("the relay's key: {0}")]
    Key(#[source] KeyError),
    /// More than eight addresses.
    #[error("a relay has at most {MAX_ADDRESSES} addresses, not {0}")]
    TooMany(usize),
}

/// A host, by name or address, and a UDP port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPort {
    host: String,
    port: u16,
}

impl HostPort {
    /// The name or address, IPv6 without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port, never 0.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The socket address, where the host is an address.
    pub fn literal(&self) -> Option<SocketAddr> {
        self.host.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, self.port))
    }
}

impl From<SocketAddr> for HostPort {
    fn from(addr: SocketAddr) -> Self {
        Self { host: addr.ip().to_canonical().to_string(), port: addr.port() }
    }
}

impl FromStr for HostPort {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let refused = || AddressError::HostPort(excerpt(text));
        if let Ok(addr) = text.parse::<SocketAddr>() {
            return if addr.port() == 0 { Err(refused()) } else { Ok(addr.into()) };
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(refused)?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(refused)?;
        // RFC 1123 names, and the underscore that some private zones have.
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        if host.is_empty() || host.len() > 253 || !host.chars().all(plain) {
            return Err(refused());
        }
        Ok(Self { host: host.to_ascii_lowercase(), port })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.literal() {
            Some(addr) => write!(f, "{addr}"),
            None => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// A relay: its identity, and where it is. As text `KEY@HOST:PORT[,HOST:PORT]`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelayAddr {
    /// The identity that its TLS must show.
    pub id: NodeId,
    /// Its addresses, one to eight; all are tried.
    pub addrs: Vec<HostPort>,
}

impl FromStr for RelayAddr {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (key, addrs) = text.split_once('@').ok_or_else(|| AddressError::NoKey(excerpt(text)))?;
        let id = key.parse().map_err(AddressError::Key)?;
        let addrs = addrs.split(',').map(str::parse).collect::<Result<Vec<_>, _>>()?;
        if addrs.len() > MAX_ADDRESSES { Err(AddressError::TooMany(addrs.len())) } else { Ok(Self { id, addrs }) }
    }
}

impl fmt::Display for RelayAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@", self.id)?;
        for (index, addr) in self.addrs.iter().enumerate() {
            write!(f, "{}{addr}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

/// A place where the control plane can be met: itself, or through a relay. As text, what has an `@` is a relay.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rendezvous {
    /// The control plane's own address.
    Gateway(HostPort),
    /// A relay that the control plane is connected to.
    Relay(RelayAddr),
}

impl FromStr for Rendezvous {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if text.contains('@') { text.parse().map(Self::Relay) } else { text.parse().map(Self::Gateway) }
    }
}

impl fmt::Display for Rendezvous {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gateway(addr) => addr.fmt(f),
            Self::Relay(relay) => relay.fmt(f),
        }
    }
}

serde_as_text!(HostPort, RelayAddr, Rendezvous);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn text_round_trips() {
        let key = crate::key::Secret::from_bytes([1; 32]).identity().id();
        for text in ["relay.example:51840", "192.0.2.1:1", "[2001:db8::1]:51840"] {
            assert_eq!(text.parse::<HostPort>().unwrap().to_string(), text);
            let relay = format!("{key}@{text},other.example:9");
            assert_eq!(relay.parse::<RelayAddr>().unwrap().to_string(), relay);
            assert!(matches!(relay.parse(), Ok(Rendezvous::Relay(_))));
            assert!(matches!(text.parse(), Ok(Rendezvous::Gateway(_))));
        }
    }

    #[test]
    fn rubbish_is_refused_with_the_form_that_is_expected() {
        for text in ["", "host", "host:0", "host:70000", ":5", "2001:db8::1:x", "ho st:5", "a/b:5"] {
            let error = text.parse::<HostPort>().unwrap_err();
            assert!(error.to_string().contains("HOST:PORT"), "{error}");
        }
        assert!("relay.example:5".parse::<RelayAddr>().unwrap_err().to_string().contains("KEY@HOST:PORT"));
        assert!(matches!("short@relay.example:5".parse::<RelayAddr>(), Err(AddressError::Key(_))));
    }

    proptest! {
        #[test]
        fn rubbish_never_panics(text in ".{0,60}") {
            if let Ok(place) = text.parse::<Rendezvous>() {
                prop_assert_eq!(place.to_string().parse(), Ok(place));
            }
        }
    }
}
