//! A NAT box as RFC 4787 describes them.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// Section 4.1: what an external port is given to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    EndpointIndependent,
    AddressAndPortDependent,
}

/// Section 5: from whom a mapping lets packets in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filtering {
    EndpointIndependent,
    AddressDependent,
    AddressAndPortDependent,
}

#[derive(Clone, Debug)]
pub struct Nat {
    pub public: IpAddr,
    pub mapping: Mapping,
    pub filtering: Filtering,
    pub timeout: Duration,
    /// Tries to give the inner port outside as well.
    pub preserves_ports: bool,
    next_port: u16,
    table: Vec<Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    inner: SocketAddr,
    /// Only of endpoint-dependent mappings.
    towards: Option<SocketAddr>,
    port: u16,
    sent_to: Vec<SocketAddr>,
    used: Instant,
}

impl Nat {
    pub fn new(public: IpAddr, mapping: Mapping, filtering: Filtering) -> Self {
        Self {
            public,
            mapping,
            filtering,
            timeout: Duration::from_secs(30),
            preserves_ports: false,
            next_port: 20_000,
            table: Vec::new(),
        }
    }

    pub fn outbound(&mut self, inner: SocketAddr, to: SocketAddr, now: Instant) -> SocketAddr {
        self.expire(now);
        let towards = match self.mapping {
            Mapping::EndpointIndependent => None,
            Mapping::AddressAndPortDependent => Some(to),
        };
        let at = self.table.iter().position(|entry| entry.inner == inner && entry.towards == towards);
        let at = at.unwrap_or_else(|| {
            let port = self.free_port(inner.port());
            self.table.push(Entry { inner, towards, port, sent_to: Vec::new(), used: now });
            self.table.len() - 1
        });
        let entry = &mut self.table[at];
        entry.used = now;
        if !entry.sent_to.contains(&to) {
            entry.sent_to.push(to);
        }
        SocketAddr::new(self.public, entry.port)
    }

    /// Where a packet to one of our ports goes. Packets from outside do not keep a mapping alive (section 4.3).
    pub fn inbound(&mut self, from: SocketAddr, port: u16, now: Instant) -> Option<SocketAddr> {
        self.expire(now);
        let entry = self.table.iter().find(|entry| entry.port == port)?;
        let passes = match self.filtering {
            Filtering::EndpointIndependent => true,
            Filtering::AddressDependent => entry.sent_to.iter().any(|to| to.ip() == from.ip()),
            Filtering::AddressAndPortDependent => entry.sent_to.contains(&from),
        };
        passes.then_some(entry.inner)
    }

    pub fn reboot(&mut self) {
        self.table.clear();
        self.next_port += 1000;
    }

    fn expire(&mut self, now: Instant) {
        let timeout = self.timeout;
        self.table.retain(|entry| now < entry.used + timeout);
    }

    fn free_port(&mut self, wanted: u16) -> u16 {
        if self.preserves_ports && self.table.iter().all(|entry| entry.port != wanted) {
            return wanted;
        }
        self.next_port += 1;
        self.next_port
    }
}
