//! Who may use a relay.
//!
//! A relay serves one network, named by its key. TLS has proved that the client holds the identity it shows; what
//! that identity may do is decided here. The approval itself (what it looks like, how it is signed) belongs to the
//! caller, who passes a check.
//!
//! | client | proof | may |
//! | --- | --- | --- |
//! | the network itself | its identity is the network key | everything; splices lead to it |
//! | a node | an approval signed by the network key for its identity | datagrams, a few splices |
//! | a joiner | none | one splice at a time to the network key, for a short while |

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use super::message::{Code, Refusal};
use super::quota::Quota;
use crate::key::NodeId;

/// What a client is to the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The control plane.
    Network,
    /// An approved node.
    Node,
    /// Someone without an approval, who may talk to the control plane to get one.
    Joiner,
}

/// What an admitted client may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// What the client is.
    pub role: Role,
    /// How much it may send.
    pub quota: Quota,
    /// Splices it may have open at once.
    pub splices: usize,
    /// How long it may stay; none means as long as it likes.
    pub lifetime: Option<Duration>,
}

impl Grant {
    /// Whether the client may send datagrams.
    pub fn datagrams(&self) -> bool {
        self.role != Role::Joiner
    }
}

/// Bounds and quotas of a relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdmissionLimits {
    /// Joiners at once.
    pub joiners: usize,
    /// Joiners at once from one address (an IPv6 /64 counts as one). A whole cloud may join through one NAT address.
    pub joiners_per_address: usize,
    /// How long a joiner may stay.
    pub joiner_lifetime: Duration,
    /// Quota of an approved node.
    pub node_quota: Quota,
    /// Splices of one node at once.
    pub node_splices: usize,
    /// Quota of a joiner.
    pub joiner_quota: Quota,
}

impl Default for AdmissionLimits {
    fn default() -> Self {
        Self {
            joiners: 512,
            joiners_per_address: 64,
            joiner_lifetime: Duration::from_secs(60),
            node_quota: Quota::NODE,
            node_splices: 4,
            joiner_quota: Quota::JOINER,
        }
    }
}

/// Decides who is admitted, and counts the joiners.
#[derive(Debug)]
pub struct Admission {
    network: NodeId,
    limits: AdmissionLimits,
    joiners: Occupancy,
}

impl Admission {
    /// A relay of the network with this key.
    pub fn new(network: NodeId, limits: AdmissionLimits) -> Self {
        let joiners = Occupancy::new(limits.joiners, limits.joiners_per_address);
        Self { network, limits, joiners }
    }

    /// The network key.
    pub fn network(&self) -> NodeId {
        self.network
    }

    /// Decides about a client that TLS has authenticated and that is seen at `from`. `verify` checks the approval.
    /// A credential that is shown must be good: nobody is quietly demoted to a joiner. After an answer with
    /// [`Role::Joiner`] the caller owes a [`Admission::handle_left`].
    pub fn handle_client(
        &mut self,
        client: NodeId,
        credential: Option<&[u8]>,
        from: IpAddr,
        verify: impl FnOnce(&[u8], NodeId) -> Result<(), Refusal>,
    ) -> Result<Grant, Refusal> {
        let node = Grant {
            role: Role::Node,
            quota: self.limits.node_quota,
            splices: self.limits.node_splices,
            lifetime: None,
        };
        if client == self.network {
            return Ok(Grant { role: Role::Network, ..node });
        }
        if let Some(credential) = credential {
            return verify(credential, client).map(|()| node);
        }
        self.joiners.enter(from).map_err(|full| {
            let message = match full {
                Full::Total => format!("{} joins are under way at this relay; try again soon", self.limits.joiners),
                Full::Address => {
                    format!("{} joins are under way from {from}; try again soon", self.limits.joiners_per_address)
                }
            };
            Refusal { code: Code::Busy, message }
        })?;
        Ok(Grant {
            role: Role::Joiner,
            quota: self.limits.joiner_quota,
            splices: 1,
            lifetime: Some(self.limits.joiner_lifetime),
        })
    }

    /// A client that was admitted with `role` has left.
    pub fn handle_left(&mut self, role: Role, from: IpAddr) {
        if role == Role::Joiner {
            self.joiners.leave(from);
        }
    }

    /// Joiners that are connected.
    pub fn joiners(&self) -> usize {
        self.joiners.total
    }
}

/// Decides whether a client may have its bytes spliced to `to`: only the network key is ever a destination.
pub fn check_splice(grant: &Grant, open: usize, network: NodeId, to: NodeId) -> Result<(), Refusal> {
    if to != network {
        let message = format!("streams lead to the network key {} only, not to {}", network.short(), to.short());
        return Err(Refusal { code: Code::NotAllowed, message });
    }
    if open >= grant.splices {
        let message = format!("{open} streams are open already, which is the most for a {:?}", grant.role);
        return Err(Refusal { code: Code::Busy, message });
    }
    Ok(())
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// All places are taken.
    Total,
    /// All places of this address are taken.
    Address,
}

/// Counts holders in total and per address, where an IPv6 /64 is one address: whoever has one has 2^64.
#[derive(Debug)]
pub struct Occupancy {
    total: usize,
    max: usize,
    max_per_address: usize,
    by_address: BTreeMap<IpAddr, usize>,
}

impl Occupancy {
    /// Nobody yet.
    pub fn new(max: usize, max_per_address: usize) -> Self {
        Self { total: 0, max, max_per_address, by_address: BTreeMap::new() }
    }

    /// Takes a place.
    pub fn enter(&mut self, from: IpAddr) -> Result<(), Full> {
        let held = self.by_address.get(&subscriber(from)).copied().unwrap_or(0);
        if held >= self.max_per_address {
            return Err(Full::Address);
        }
        if self.total >= self.max {
            return Err(Full::Total);
        }
        self.by_address.insert(subscriber(from), held + 1);
        self.total += 1;
        Ok(())
    }

    /// Gives a place back.
    pub fn leave(&mut self, from: IpAddr) {
        let address = subscriber(from);
        let Some(held) = self.by_address.get_mut(&address) else { return };
        *held -= 1;
        self.total -= 1;
        if *held == 0 {
            self.by_address.remove(&address);
        }
    }

    /// Places taken.
    pub fn total(&self) -> usize {
        self.total
    }
}

fn subscriber(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(byte: u8) -> NodeId {
        NodeId::from_bytes([byte; 32])
    }

    fn home() -> IpAddr {
        "192.0.2.1".parse().unwrap()
    }

    fn verify(credential: &[u8], _client: NodeId) -> Result<(), Refusal> {
        let bad = Refusal { code: Code::BadCredential, message: "the approval is signed by another key".into() };
        if credential == b"good" { Ok(()) } else { Err(bad) }
    }

    #[test]
    fn each_client_gets_the_role_that_it_proves() {
        let mut admission = Admission::new(id(9), AdmissionLimits::default());
        let mut role = |client, credential| {
            admission.handle_client(client, credential, home(), verify).map(|grant| grant.role).map_err(|r| r.code)
        };
        assert_eq!(role(id(9), None), Ok(Role::Network));
        assert_eq!(role(id(1), Some(b"good".as_slice())), Ok(Role::Node));
        assert_eq!(role(id(1), None), Ok(Role::Joiner));
        assert_eq!(role(id(1), Some(b"forged".as_slice())), Err(Code::BadCredential));
    }

    #[test]
    fn joiners_are_bounded_in_total_and_per_address() {
        let limits = AdmissionLimits { joiners: 3, joiners_per_address: 2, ..AdmissionLimits::default() };
        let mut admission = Admission::new(id(9), limits);
        let mut join = |from: &str| admission.handle_client(id(1), None, from.parse().unwrap(), verify);
        assert!(join("2001:db8::1").is_ok());
        assert!(join("2001:db8::2").is_ok());
        assert!(join("2001:db8::3").unwrap_err().message.contains("from 2001:db8::3"));
        assert!(join("2001:db8:0:1::1").is_ok());
        assert!(join("192.0.2.1").unwrap_err().message.starts_with("3 joins"));
        admission.handle_left(Role::Joiner, "2001:db8::9".parse().unwrap());
        assert_eq!(admission.joiners(), 2);
        assert!(admission.handle_client(id(1), None, home(), verify).is_ok());
    }

    #[test]
    fn a_joiner_reaches_the_network_key_only_and_once_at_a_time() {
        let mut admission = Admission::new(id(9), AdmissionLimits::default());
        let joiner = admission.handle_client(id(1), None, home(), verify).unwrap();
        assert!(!joiner.datagrams());
        assert_eq!(check_splice(&joiner, 0, id(9), id(9)), Ok(()));
        assert_eq!(check_splice(&joiner, 1, id(9), id(9)).unwrap_err().code, Code::Busy);
        assert_eq!(check_splice(&joiner, 0, id(9), id(2)).unwrap_err().code, Code::NotAllowed);
    }

    #[test]
    fn leaving_more_often_than_entering_does_no_harm() {
        let mut occupancy = Occupancy::new(2, 2);
        occupancy.leave(home());
        occupancy.enter(home()).unwrap();
        occupancy.leave(home());
        occupancy.leave(home());
        assert_eq!(occupancy.total(), 0);
    }
}
