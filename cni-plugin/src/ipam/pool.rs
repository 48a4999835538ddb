//! Which addresses pods may have: pure arithmetic on prefixes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::plan::Family;
use crate::spec::{Code, Error, Result};

/// Of one family: ranges that follow each other, gone through in a circle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    family: Family,
    ranges: Vec<Range>,
}

/// First and last address that is given out, as numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    first: u128,
    last: u128,
}

/// The pools of `prefixes`, one for each family that occurs, IPv4 first. `origin` names their source in errors.
pub fn pools(prefixes: &[IpNet], origin: &str) -> Result<Vec<Pool>> {
    for (place, prefix) in prefixes.iter().enumerate() {
        if prefix.addr() != prefix.network() {
            return Err(invalid(format!("{prefix} in {origin} has bits behind its prefix: write {}", prefix.trunc())));
        }
        if let Some(other) = prefixes[..place].iter().find(|other| overlap(other, prefix)) {
            return Err(invalid(format!("{prefix} in {origin} overlaps {other}: an address would be given out twice")));
        }
    }
    let mut pools = Vec::new();
    for family in [Family::V4, Family::V6] {
        let of_family = prefixes.iter().filter(|prefix| Family::of(prefix.addr()) == family);
        let ranges: Vec<Range> = of_family.map(|prefix| usable(prefix, origin)).collect::<Result<_>>()?;
        if !ranges.is_empty() {
            pools.push(Pool { family, ranges });
        }
    }
    Ok(pools)
}

impl Pool {
    /// The family of its addresses.
    pub fn family(&self) -> Family {
        self.family
    }

    /// True for addresses that this pool gives out.
    pub fn contains(&self, address: IpAddr) -> bool {
        Family::of(address) == self.family && self.place(number(address)).is_some()
    }

    /// How many addresses there are.
    pub fn size(&self) -> u128 {
        self.ranges.iter().fold(0, |sum, range| sum.saturating_add(range.last - range.first).saturating_add(1))
    }

    /// Every address once, beginning behind `last`: an address that was given back rests for a whole round, so that nobody
    /// takes a pod for the one before it.
    pub fn behind(&self, last: Option<IpAddr>) -> impl Iterator<Item = IpAddr> {
        let last = last.filter(|last| Family::of(*last) == self.family).map(number);
        let (start, from) = match last.and_then(|last| self.place(last).map(|place| (place, last))) {
            Some((place, last)) if last < self.ranges[place].last => (place, last + 1),
            Some((place, _)) => self.range_at(place + 1),
            None => self.range_at(0),
        };
        let count = self.ranges.len();
        let turn = (1..count).map(move |step| self.ranges[(start + step) % count]);
        let head = Range { first: from, last: self.ranges[start].last };
        let tail = self.ranges[start].first..from;
        let whole = std::iter::once(head).chain(turn).flat_map(|range| range.first..=range.last);
        whole.chain(tail).map(|number| address(self.family, number))
    }

    /// The range with this number, counted in a circle, and its first address.
    fn range_at(&self, place: usize) -> (usize, u128) {
        let place = place % self.ranges.len();
        (place, self.ranges[place].first)
    }

    fn place(&self, number: u128) -> Option<usize> {
        self.ranges.iter().position(|range| (range.first..=range.last).contains(&number))
    }
}

/// What a prefix gives to pods: all but the network's own address (in IPv6 the routers' anycast address, RFC 4291), the
/// first one, which people expect at a router, and IPv4's broadcast address.
fn usable(prefix: &IpNet, origin: &str) -> Result<Range> {
    let (network, broadcast) = (number(prefix.network()), number(prefix.broadcast()));
    let reserved_at_end = u128::from(prefix.addr().is_ipv4());
    let range = broadcast.checked_sub(reserved_at_end).zip(network.checked_add(2));
    match range.map(|(last, first)| Range { first, last }).filter(|range| range.first <= range.last) {
        Some(range) => Ok(range),
        None => Err(invalid(format!(
            "{prefix} in {origin} is too small for pods: its first two and, in IPv4, its last address are reserved; use a /{} or larger",
            prefix.max_prefix_len() - 2,
        ))),
    }
}

fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

fn address(family: Family, number: u128) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(u32::try_from(number).unwrap_or(u32::MAX)).into(),
        Family::V6 => Ipv6Addr::from_bits(number).into(),
    }
}

fn invalid(message: String) -> Error {
    Error::new(Code::InvalidConfig, message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pool(prefixes: &[&str]) -> Pool {
        let prefixes: Vec<IpNet> = prefixes.iter().map(|prefix| prefix.parse().unwrap()).collect();
        pools(&prefixes, "test").unwrap().remove(0)
    }

    fn order(pool: &Pool, last: Option<&str>) -> Vec<String> {
        pool.behind(last.map(|last| last.parse().unwrap())).take(20).map(|address| address.to_string()).collect()
    }

    #[test]
    fn network_first_and_broadcast_are_not_given_out() {
        assert_eq!(order(&pool(&["10.0.0.0/29"]), None), ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"]);
        assert_eq!(order(&pool(&["fd00::/126"]), None), ["fd00::2", "fd00::3"]);
        assert_eq!(order(&pool(&["10.0.0.0/30"]), None), ["10.0.0.2"]);
    }

    #[test]
    fn the_circle_goes_on_behind_the_last_one_and_through_every_range() {
        let pool = pool(&["10.0.0.0/30", "10.0.1.0/29", "10.0.2.0/30"]);
        let all = ["10.0.0.2", "10.0.1.2", "10.0.1.3", "10.0.1.4", "10.0.1.5", "10.0.1.6", "10.0.2.2"];
        for (place, last) in all.iter().enumerate() {
            let mut expected = all.to_vec();
            expected.rotate_left((place + 1) % all.len());
            assert_eq!(order(&pool, Some(last)), expected, "behind {last}");
        }
        assert_eq!(order(&pool, Some("192.0.2.1")), all);
        assert_eq!(pool.size(), 7);
    }

    #[test]
    fn each_family_has_its_pool() {
        let prefixes = ["fd00::/64", "10.0.0.0/24", "10.0.1.0/24"].map(|prefix| prefix.parse().unwrap());
        let pools = pools(&prefixes, "test").unwrap();
        assert_eq!(pools.iter().map(Pool::family).collect::<Vec<_>>(), [Family::V4, Family::V6]);
        assert!(pools[0].contains("10.0.1.7".parse().unwrap()) && !pools[0].contains("fd00::7".parse().unwrap()));
    }

    #[test]
    fn what_cannot_serve_is_refused_with_the_remedy() {
        for (prefixes, remedy) in [
            (&["10.0.0.0/31"][..], "/30"),
            (&["10.0.0.1/32"], "/30"),
            (&["fd00::/127"], "/126"),
            (&["10.0.0.5/24"], "write 10.0.0.0/24"),
            (&["10.0.0.0/24", "10.0.0.128/25"], "overlaps"),
        ] {
            let prefixes: Vec<IpNet> = prefixes.iter().map(|prefix| prefix.parse().unwrap()).collect();
            let error = pools(&prefixes, "test").unwrap_err();
            assert!(error.is(Code::InvalidConfig) && error.message.contains(remedy), "{error}");
        }
    }

    #[test]
    fn the_ends_of_the_number_space_do_no_harm() {
        assert_eq!(pool(&["255.255.255.0/24"]).size(), 253);
        assert_eq!(
            pool(&["0.0.0.0/0"]).behind(Some("255.255.255.254".parse().unwrap())).next(),
            Some("0.0.0.2".parse().unwrap())
        );
        assert_eq!(pool(&["::/0"]).size(), u128::MAX - 1);
        let top = pool(&["ffff:ffff:ffff:ffff::/64"]);
        assert!(top.behind(Some("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff".parse().unwrap())).next().is_some());
    }

    proptest! {
        #[test]
        fn every_address_comes_once_whereever_the_circle_begins(length in 24_u8..=30, other in 26_u8..=30, start in any::<u8>()) {
            let pool = pool(&[&format!("10.0.0.0/{length}"), &format!("10.9.0.0/{other}")]);
            let last = IpAddr::from([10, 0, 0, start]);
            let mut seen: Vec<IpAddr> = pool.behind(Some(last)).collect();
            let count = seen.len();
            prop_assert_eq!(count as u128, pool.size());
            if pool.contains(last) {
                prop_assert_eq!(seen.last(), Some(&last));
            }
            prop_assert!(seen.iter().all(|address| pool.contains(*address)));
            seen.sort_unstable();
            seen.dedup();
            prop_assert_eq!(seen.len(), count);
        }
    }
}
