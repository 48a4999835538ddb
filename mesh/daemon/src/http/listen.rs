//! Where status is served, as people configure it.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// One place: `51842`, `127.0.0.1:51842`, `[::1]:51842`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenAt {
    /// A port on loopback and on this node's mesh addresses, whichever those are.
    Port(u16),
    /// Exactly this address.
    Address(SocketAddr),
}

/// Why a place was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no place to listen: give a port (loopback and mesh addresses), or an address with a port, as in \
     127.0.0.1:51842 or [::1]:51842"
)]
pub struct ListenError(String);

/// Every address that these places mean on a node with these mesh addresses.
pub fn addresses(places: &[ListenAt], mesh: &[IpAddr]) -> BTreeSet<SocketAddr> {
    let loopback: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    let mut all = BTreeSet::new();
    for place in places {
        match *place {
            ListenAt::Port(port) => all.extend(loopback.iter().chain(mesh).map(|ip| SocketAddr::new(*ip, port))),
            ListenAt::Address(address) => drop(all.insert(address)),
        }
    }
    all
}

/// Reads one place or a list of them; in TOML a port may stand as a number.
pub fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<ListenAt>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a port, an ADDRESS:PORT, or a list of them")]
    enum Given {
        Port(u16),
        Text(String),
        List(Vec<String>),
    }
    let texts = match Given::deserialize(deserializer)? {
        Given::Port(port) => return Ok(vec![ListenAt::Port(port)]),
        Given::Text(text) => vec![text],
        Given::List(texts) => texts,
    };
    texts.iter().map(|text| text.parse().map_err(serde::de::Error::custom)).collect()
}

impl FromStr for ListenAt {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Self, ListenError> {
        if let Ok(port) = text.parse() {
            return Ok(Self::Port(port));
        }
        /// What is shown of a text that is refused.
        const SHOWN: usize = 60;
        text.parse()
            .map(Self::Address)
            .map_err(|_| ListenError(text.chars().take(SHOWN).flat_map(char::escape_debug).collect()))
    }
}

impl fmt::Display for ListenAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(port) => write!(f, "{port}"),
            Self::Address(address) => write!(f, "{address}"),
        }
    }
}

impl Serialize for ListenAt {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct File {
        #[serde(deserialize_with = "one_or_many")]
        at: Vec<ListenAt>,
    }

    fn read(text: &str) -> Result<Vec<ListenAt>, String> {
        toml::from_str::<File>(text).map(|file| file.at).map_err(|error| error.to_string())
    }

    #[test]
    fn a_port_an_address_and_a_list_are_read() {
        let loopback = ListenAt::Address("127.0.0.1:51842".parse().unwrap());
        assert_eq!(read("at = 51842").unwrap(), [ListenAt::Port(51842)]);
        assert_eq!(read("at = '51842'").unwrap(), [ListenAt::Port(51842)]);
        assert_eq!(read("at = ['51842', '127.0.0.1:51842']").unwrap(), [ListenAt::Port(51842), loopback]);
        for wrong in ["at = 'everywhere'", "at = ['127.0.0.1']", "at = 70000", "at = true"] {
            let error = read(wrong).unwrap_err();
            assert!(error.contains("ADDRESS:PORT") || error.contains("[::1]:51842"), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_bare_port_means_loopback_and_the_mesh_and_nothing_else() {
        let mesh = ["10.98.0.7".parse().unwrap()];
        let all = addresses(&[ListenAt::Port(1), ListenAt::Address("192.0.2.1:2".parse().unwrap())], &mesh);
        let texts: Vec<String> = all.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["10.98.0.7:1", "127.0.0.1:1", "192.0.2.1:2", "[::1]:1"]);
    }
}
