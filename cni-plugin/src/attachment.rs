//! One interface of one container in one network: what its names and numbers are.
//!
//! They are computed from the attachment alone. So DEL finds everything when nothing is left to tell it, and a pod that
//! is made again has the interface it had.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, de};
use sha2::{Digest, Sha256};

/// What the names of interfaces on the host begin with. Also known to the daemon, which keeps such interfaces' addresses
/// out of its candidates.
pub const HOST_PREFIX: &str = "ks";

/// The hardware address of every interface on the host side: locally administered, then `ks` in ASCII. It may be the same
/// for all, because each is alone on its link with its pod; and it is fixed, so that a pod can be told before it asks.
pub const HOST_MAC: Mac = Mac([0x02, 0x6b, 0x73, 0, 0, 1]);

/// Digits of the hash in a name: 48 bits, so that with 1,000 pods on a node two meet once in 500 million nodes.
const HASH_BYTES: usize = 6;

/// One interface of one container in one network.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attachment {
    /// Name of the network.
    pub network: String,
    /// ID of the container.
    pub container: String,
    /// Name of the interface in it.
    pub ifname: String,
}

impl Attachment {
    /// Name of the interface on the host.
    pub fn host_name(&self) -> String {
        let digits: String = self.hash()[..HASH_BYTES].iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{HOST_PREFIX}{digits}")
    }

    /// The hardware address in the pod, locally administered.
    pub fn pod_mac(&self) -> Mac {
        let hash = self.hash();
        let tail: [u8; 5] = hash[HASH_BYTES..HASH_BYTES + 5].try_into().expect("five bytes of a hash");
        Mac([0x02, tail[0], tail[1], tail[2], tail[3], tail[4]])
    }

    /// The parts are of forms without a zero byte, so that no two attachments have the same text.
    fn hash(&self) -> [u8; 32] {
        let parts = [self.network.as_str(), &self.container, &self.ifname];
        Sha256::digest(parts.join("\0")).into()
    }
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of container {} in network {}", self.ifname, self.container, self.network)
    }
}

/// The number that marks all interfaces of a network on the host (`IFLA_GROUP`), so that GC tells networks apart even
/// where the leases are lost. Never 0, which is every other interface's.
pub fn interface_group(network: &str) -> u32 {
    let hash = Sha256::digest(network);
    u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]]) | 1
}

/// True for names that [`Attachment::host_name`] makes.
pub fn is_host_name(name: &str) -> bool {
    name.strip_prefix(HOST_PREFIX).is_some_and(|digits| {
        digits.len() == 2 * HASH_BYTES && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// A hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str = "a hardware address has six bytes like 02:00:5e:00:53:01";
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or(FORM)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| FORM)?;
        }
        if parts.next().is_some() {
            return Err(FORM);
        }
        if bytes[0] & 1 == 1 || bytes == [0; 6] {
            return Err("an interface cannot have a multicast or zero hardware address");
        }
        Ok(Self(bytes))
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment(network: &str, container: &str, ifname: &str) -> Attachment {
        Attachment { network: network.into(), container: container.into(), ifname: ifname.into() }
    }

    #[test]
    fn names_and_addresses_are_the_same_at_every_call() {
        let eth0 = attachment("pods", "c1", "eth0");
        assert_eq!(eth0.host_name(), "ks39a7199053c6");
        assert_eq!(eth0.pod_mac().to_string().len(), 17);
        assert!(is_host_name(&eth0.host_name()));
        assert_eq!(eth0.host_name().len(), 14);
        assert_eq!(eth0.pod_mac(), attachment("pods", "c1", "eth0").pod_mac());
    }

    #[test]
    fn another_part_makes_another_name() {
        let names = [
            attachment("pods", "c1", "eth0"),
            attachment("pods", "c1", "eth1"),
            attachment("pods", "c2", "eth0"),
            attachment("pod", "sc1", "eth0"),
        ]
        .map(|each| each.host_name());
        let unique: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(unique.len(), names.len());
    }

    #[test]
    fn foreign_names_are_not_ours() {
        for name in ["ks0", "ksmesh0", "ks39a7199053cG", "ks39a7199053c60", "eth0", "KS61b36f7b9fea"] {
            assert!(!is_host_name(name), "{name}");
        }
    }

    #[test]
    fn hardware_addresses_are_read_strictly() {
        assert_eq!("02:00:5e:00:53:01".parse(), Ok(Mac([2, 0, 0x5e, 0, 0x53, 1])));
        for text in
            ["", "02:00:5e:00:53", "02:00:5e:00:53:01:02", "2:0:5e:0:53:1", "03:00:5e:00:53:01", "00:00:00:00:00:00"]
        {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
    }
}
