//! Tables of the kernel's packet filter (nf_tables) as values, and the changes from one to the next.
//!
//! ```text
//!   policies, facts ──► Table ──┐
//!                               ├─► changes() ──► one transaction: all of it or nothing
//!   kernel ──► Present ─────────┘
//! ```
//!
//! Only what our tables need is here: sets and verdict maps over addresses, protocols and ports, and rules that look
//! something up and then decide. A [`Table`] prints itself in the syntax of nft(8). How it is written to the kernel is the
//! driver's business; so is reading, which yields what the kernel keeps of a rule: its [`Mark`].

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use sha2::{Digest as _, Sha256};

pub use self::changes::{Change, Present, PresentChain, PresentSet, changes, removal};
pub use self::element::{Element, Key};
use crate::kernel::Family;

mod changes;
mod element;

/// The longest comment of a rule or set that nft(8) shows, in bytes.
pub const MAX_COMMENT: usize = 127;

/// A table of the `inet` family: its chains see both IPv4 and IPv6.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Its name.
    pub name: String,
    /// Its sets and maps, by name.
    pub sets: BTreeMap<String, Set>,
    /// Its chains, by name.
    pub chains: BTreeMap<String, Chain>,
}

/// The type of one part of a key, as nft(8) names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DataType {
    /// `ipv4_addr`.
    Ipv4,
    /// `ipv6_addr`.
    Ipv6,
    /// `inet_proto`: the protocol above IP.
    Protocol,
    /// `inet_service`: a port.
    Port,
}

impl DataType {
    /// Its length in bytes.
    pub fn length(self) -> usize {
        match self {
            Self::Ipv4 => 4,
            Self::Ipv6 => 16,
            Self::Protocol => 1,
            Self::Port => 2,
        }
    }

    /// Its length in a concatenation, whose parts begin at multiples of four bytes.
    pub fn padded(self) -> usize {
        self.length().next_multiple_of(4)
    }

    /// The type of a family's addresses.
    pub fn address(family: Family) -> Self {
        match family {
            Family::V4 => Self::Ipv4,
            Family::V6 => Self::Ipv6,
        }
    }
}

/// Something of a packet that can be looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Field {
    /// The source address; only packets of this family have it.
    Source(Family),
    /// The destination address; only packets of this family have it.
    Destination(Family),
    /// The protocol above IP.
    Protocol,
    /// The destination port of TCP, UDP and SCTP: bytes 2 and 3 of what follows the IP header.
    DestinationPort,
}

impl Field {
    /// Its type.
    pub fn data_type(self) -> DataType {
        match self {
            Self::Source(family) | Self::Destination(family) => DataType::address(family),
            Self::Protocol => DataType::Protocol,
            Self::DestinationPort => DataType::Port,
        }
    }
}

/// What sets have in common with those in the kernel: two sets of different shape cannot become one another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The parts of a key; several are a concatenation.
    pub key: Vec<DataType>,
    /// Whether elements are ranges.
    pub ranges: bool,
    /// Whether each element has a verdict.
    pub verdicts: bool,
}

/// A set, or a verdict map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// What its elements are.
    pub shape: Shape,
    /// What it is for, for whoever lists it; [`MAX_COMMENT`] bytes at most.
    pub comment: String,
    /// Its elements. Ranges neither overlap nor touch each other.
    pub elements: BTreeMap<Element, Option<Verdict>>,
}

impl Set {
    /// A set of single keys.
    pub fn of_keys(key: Vec<DataType>, comment: &str, elements: impl IntoIterator<Item = Element>) -> Self {
        Self::new(Shape { key, ranges: false, verdicts: false }, comment, elements)
    }

    /// A set of ranges, which must neither overlap nor touch.
    pub fn of_ranges(key: Vec<DataType>, comment: &str, elements: impl IntoIterator<Item = Element>) -> Self {
        Self::new(Shape { key, ranges: true, verdicts: false }, comment, elements)
    }

    /// An empty verdict map of single addresses.
    pub fn verdicts(family: Family, comment: &str) -> Self {
        Self::new(Shape { key: vec![DataType::address(family)], ranges: false, verdicts: true }, comment, [])
    }

    fn new(shape: Shape, comment: &str, elements: impl IntoIterator<Item = Element>) -> Self {
        let elements = elements.into_iter().map(|element| (element, None)).collect();
        Self { shape, comment: shortened(comment, MAX_COMMENT).to_owned(), elements }
    }
}

/// A chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Where the kernel enters it; none for a chain that others jump to.
    pub hook: Option<Hook>,
    /// Its rules, in order.
    pub rules: Vec<Rule>,
}

/// Where the kernel enters a chain. What reaches such a chain's end is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// What is forwarded, after its destination was translated: `type filter hook forward priority filter`.
    Forward,
    /// What leaves, its source about to be translated: `type nat hook postrouting priority srcnat`.
    SourceNat,
}

/// A rule: if everything matches, something is done.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// What has to match.
    pub matches: Vec<Match>,
    /// What is done then.
    pub action: Action,
    /// Why, for whoever lists it; [`MAX_COMMENT`] bytes at most.
    pub comment: String,
}

impl Rule {
    /// A rule with its comment, which is cut to the length that is shown.
    pub fn new(matches: Vec<Match>, action: Action, comment: &str) -> Self {
        Self { matches, action, comment: shortened(comment, MAX_COMMENT).to_owned() }
    }

    /// What tells this rule from others.
    pub fn mark(&self) -> Mark {
        let mut mark = [0; 16];
        let text = format!("{MARK_VERSION} {self}");
        mark.copy_from_slice(&Sha256::digest(text)[..16]);
        Mark(mark)
    }
}

/// Counts up when the same rule is to be written to the kernel in another way, so that old ones are replaced.
const MARK_VERSION: u32 = 1;

/// A rule's fingerprint, which the kernel keeps beside it: it gives rules back as a program of its own machine.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(pub [u8; 16]);

impl fmt::Debug for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A condition.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Match {
    /// The packet belongs to a connection that was accepted, or is an error about one.
    Replies,
    /// It leaves by another interface than this.
    NotOutBy(String),
    /// Its protocol is this one, and its destination port between these two, both included.
    Ports {
        /// The protocol's number; one that has ports.
        protocol: u8,
        /// The first port.
        low: u16,
        /// The last port.
        high: u16,
    },
    /// What the fields say, one after the other, is in the set; or, negated, is not. Negated or not, a packet that lacks a
    /// field does not match.
    In {
        /// What is looked up.
        fields: Vec<Field>,
        /// The set.
        set: String,
        /// Whether it has to be absent.
        negated: bool,
    },
}

impl Match {
    /// That a field is in a set.
    pub fn is_in(field: Field, set: &str) -> Self {
        Self::In { fields: vec![field], set: set.to_owned(), negated: false }
    }

    /// That a field is not in a set.
    pub fn not_in(field: Field, set: &str) -> Self {
        Self::In { fields: vec![field], set: set.to_owned(), negated: true }
    }
}

/// What a rule does.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// Decides.
    Verdict(Verdict),
    /// Counts, and drops.
    CountedDrop,
    /// Does as the map says about the field; nothing where the map says nothing.
    AsMapped(Field, String),
    /// Gives the packet the address of the interface it leaves by.
    Masquerade,
}

/// A decision.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// This table lets it pass.
    Accept,
    /// It is gone.
    Drop,
    /// Back to where the chain was jumped to from.
    Return,
    /// On to a chain, and back from there.
    Jump(String),
}

impl Verdict {
    /// The chain that it leads to.
    pub fn chain(&self) -> Option<&str> {
        match self {
            Self::Jump(chain) => Some(chain),
            Self::Accept | Self::Drop | Self::Return => None,
        }
    }
}

/// The beginning of a text, cut between characters.
fn shortened(text: &str, most: usize) -> &str {
    let mut end = most.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

// --- as nft(8) writes it ---

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "table inet {} {{", self.name)?;
        for (name, set) in &self.sets {
            let (kind, value) = if set.shape.verdicts { ("map", " : verdict") } else { ("set", "") };
            let flags = if set.shape.ranges { "; flags interval" } else { "" };
            writeln!(f, "  {kind} {name} {{ type {}{value}{flags}; elements = {{", Joined(&set.shape.key))?;
            for (element, verdict) in &set.elements {
                write!(f, "    {}", element.display(&set.shape.key))?;
                match verdict {
                    Some(verdict) => writeln!(f, " : {verdict},")?,
                    None => writeln!(f, ",")?,
                }
            }
            writeln!(f, "  }} }}")?;
        }
        for (name, chain) in &self.chains {
            writeln!(f, "  chain {name} {{")?;
            match chain.hook {
                Some(Hook::Forward) => writeln!(f, "    type filter hook forward priority filter; policy accept;")?,
                Some(Hook::SourceNat) => writeln!(f, "    type nat hook postrouting priority srcnat; policy accept;")?,
                None => {}
            }
            for rule in &chain.rules {
                writeln!(f, "    {rule}")?;
            }
            writeln!(f, "  }}")?;
        }
        writeln!(f, "}}")
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for matched in &self.matches {
            write!(f, "{matched} ")?;
        }
        write!(f, "{}", self.action)?;
        if self.comment.is_empty() { Ok(()) } else { write!(f, " comment {:?}", self.comment) }
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Replies => f.write_str("ct state established,related"),
            Self::NotOutBy(name) => write!(f, "oifname != {name:?}"),
            Self::Ports { protocol, low: 0, high: u16::MAX } => write!(f, "meta l4proto {protocol}"),
            Self::Ports { protocol, low, high } if low == high => write!(f, "meta l4proto {protocol} th dport {low}"),
            Self::Ports { protocol, low, high } => write!(f, "meta l4proto {protocol} th dport {low}-{high}"),
            Self::In { fields, set, negated } => {
                write!(f, "{} {}@{set}", Joined(fields), if *negated { "!= " } else { "" })
            }
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Verdict(verdict) => verdict.fmt(f),
            Self::CountedDrop => f.write_str("counter drop"),
            Self::AsMapped(field, map) => write!(f, "{field} vmap @{map}"),
            Self::Masquerade => f.write_str("masquerade"),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept => f.write_str("accept"),
            Self::Drop => f.write_str("drop"),
            Self::Return => f.write_str("return"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
        }
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source(Family::V4) => "ip saddr",
            Self::Source(Family::V6) => "ip6 saddr",
            Self::Destination(Family::V4) => "ip daddr",
            Self::Destination(Family::V6) => "ip6 daddr",
            Self::Protocol => "meta l4proto",
            Self::DestinationPort => "th dport",
        })
    }
}

impl fmt::Display for DataType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "ipv4_addr",
            Self::Ipv6 => "ipv6_addr",
            Self::Protocol => "inet_proto",
            Self::Port => "inet_service",
        })
    }
}

/// Parts of a concatenation.
struct Joined<'a, T>(&'a [T]);

impl<T: fmt::Display> fmt::Display for Joined<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, part) in self.0.iter().enumerate() {
            if place > 0 {
                f.write_str(" . ")?;
            }
            part.fmt(f)?;
        }
        Ok(())
    }
}

/// The family of an address.
pub fn family_of(address: IpAddr) -> Family {
    if address.is_ipv4() { Family::V4 } else { Family::V6 }
}
