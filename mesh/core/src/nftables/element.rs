//! Elements of sets: keys as the kernel holds them in its registers.

use std::cmp::Ordering;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::DataType;

/// The longest key of ours: two IPv6 addresses.
const MAX_KEY: usize = 32;

/// A key: its parts in network byte order, each padded with zeros to a multiple of four bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    length: u8,
    bytes: [u8; MAX_KEY],
}

impl Key {
    /// A key of these bytes; none where they are too many.
    pub fn new(parts: &[u8]) -> Option<Self> {
        let mut bytes = [0; MAX_KEY];
        bytes.get_mut(..parts.len())?.copy_from_slice(parts);
        Some(Self { length: u8::try_from(parts.len()).ok()?, bytes })
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length.into()]
    }

    /// The key after this one, as a number; none after the last.
    pub fn next(mut self) -> Option<Self> {
        for byte in self.bytes[..self.length.into()].iter_mut().rev() {
            *byte = byte.wrapping_add(1);
            if *byte != 0 {
                return Some(self);
            }
        }
        None
    }

    /// The key before this one, as a number; none before the first.
    pub fn previous(mut self) -> Option<Self> {
        for byte in self.bytes[..self.length.into()].iter_mut().rev() {
            *byte = byte.wrapping_sub(1);
            if *byte != u8::MAX {
                return Some(self);
            }
        }
        None
    }

    /// The last key of this length.
    pub fn last(length: usize) -> Option<Self> {
        Self::new([u8::MAX; MAX_KEY].get(..length)?)
    }

    fn push(&mut self, part: &[u8]) {
        let start = usize::from(self.length);
        self.bytes[start..start + part.len()].copy_from_slice(part);
        self.length += u8::try_from(part.len().next_multiple_of(4)).expect("a part has sixteen bytes at most");
    }

    const EMPTY: Self = Self { length: 0, bytes: [0; MAX_KEY] };
}

impl Ord for Key {
    fn cmp(&self, other: &Self) -> Ordering {
        self.bytes().cmp(other.bytes())
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// An element: a key, or all keys between two, both included. In a concatenation every part has a range of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Element {
    /// The key, or the first.
    pub low: Key,
    /// The key again, or the last.
    pub high: Key,
}

impl Element {
    /// One address.
    pub fn address(address: IpAddr) -> Self {
        Self::EMPTY.and_address(address)
    }

    /// All addresses of a prefix.
    pub fn prefix(net: IpNet) -> Self {
        Self { low: Self::address(net.network()).low, high: Self::address(net.broadcast()).low }
    }

    /// All addresses between two of one family, both included.
    pub fn addresses(low: IpAddr, high: IpAddr) -> Self {
        Self { low: Self::address(low).low, high: Self::address(high).low }
    }

    /// Ports of one protocol, both ends included: `inet_proto . inet_service`.
    pub fn ports(protocol: u8, low: u16, high: u16) -> Self {
        Self::EMPTY.and_ports(protocol, low, high)
    }

    /// Itself with an address behind it.
    pub fn and_address(self, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => self.and(&v4.octets(), &v4.octets()),
            IpAddr::V6(v6) => self.and(&v6.octets(), &v6.octets()),
        }
    }

    /// Itself with ports of one protocol behind it.
    pub fn and_ports(self, protocol: u8, low: u16, high: u16) -> Self {
        self.and(&[protocol], &[protocol]).and(&low.to_be_bytes(), &high.to_be_bytes())
    }

    /// Whether each part of `key` is within its range. `types` are those of the set.
    pub fn contains(&self, key: &Key, types: &[DataType]) -> bool {
        let mut start = 0;
        types.iter().all(|part| {
            let range = start..start + part.padded();
            start = range.end;
            let [low, high, key] = [&self.low, &self.high, key].map(|key| &key.bytes[range.clone()]);
            low <= key && key <= high
        })
    }

    /// As nft(8) writes it.
    pub fn display<'a>(&'a self, types: &'a [DataType]) -> impl fmt::Display + 'a {
        Shown { element: self, types }
    }

    const EMPTY: Self = Self { low: Key::EMPTY, high: Key::EMPTY };

    fn and(mut self, low: &[u8], high: &[u8]) -> Self {
        self.low.push(low);
        self.high.push(high);
        self
    }
}

struct Shown<'a> {
    element: &'a Element,
    types: &'a [DataType],
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut start = 0;
        for (place, part) in self.types.iter().enumerate() {
            let range = start..start + part.length();
            start += part.padded();
            let [low, high] = [&self.element.low, &self.element.high].map(|key| &key.bytes[range.clone()]);
            if place > 0 {
                f.write_str(" . ")?;
            }
            show(f, *part, low)?;
            if low != high {
                f.write_str("-")?;
                show(f, *part, high)?;
            }
        }
        Ok(())
    }
}

fn show(f: &mut fmt::Formatter<'_>, part: DataType, bytes: &[u8]) -> fmt::Result {
    match part {
        DataType::Ipv4 => {
            <[u8; 4]>::try_from(bytes).map_or(Ok(()), |octets| fmt::Display::fmt(&Ipv4Addr::from(octets), f))
        }
        DataType::Ipv6 => {
            <[u8; 16]>::try_from(bytes).map_or(Ok(()), |octets| fmt::Display::fmt(&Ipv6Addr::from(octets), f))
        }
        DataType::Protocol | DataType::Port => {
            write!(f, "{}", bytes.iter().fold(0_u32, |number, byte| number << 8 | u32::from(*byte)))
        }
    }
}
