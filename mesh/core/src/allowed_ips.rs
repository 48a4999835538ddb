//! Longest-prefix lookup over the peers' allowed IPs.
//!
//! Prefixes only ever nest or lie apart, so a set of them cuts the address space into disjoint ranges, each with one
//! answer. The table is that list, sorted by where a range starts; a lookup is one binary search over plain integers,
//! and the table is immutable, so that readers share it without a lock.
//!
//! ```text
//!   10.0.0.0/8  -> a          start          answer
//!   10.1.0.0/16 -> b          0.0.0.0        -
//!                             10.0.0.0       a
//!                             10.1.0.0       b
//!                             10.2.0.0       a
//!                             11.0.0.0       -
//! ```

use std::net::IpAddr;

use ipnet::IpNet;

/// An immutable map from prefixes to values; the longest prefix that contains an address wins.
#[derive(Clone, Debug)]
pub struct AllowedIps<V> {
    v4: Ranges<u32, V>,
    v6: Ranges<u128, V>,
}

impl<V: Copy> AllowedIps<V> {
    /// Builds the table. Host bits are ignored; of equal prefixes the last one counts, as with `wg set`.
    pub fn new(entries: impl IntoIterator<Item = (IpNet, V)>) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for (net, value) in entries {
            match net {
                IpNet::V4(net) => v4.push((net.network().to_bits(), net.broadcast().to_bits(), value)),
                IpNet::V6(net) => v6.push((net.network().to_bits(), net.broadcast().to_bits(), value)),
            }
        }
        Self { v4: Ranges::new(v4, |end| end.checked_add(1)), v6: Ranges::new(v6, |end| end.checked_add(1)) }
    }

    /// The value of the longest prefix that contains `addr`.
    pub fn get(&self, addr: IpAddr) -> Option<V> {
        match addr {
            IpAddr::V4(addr) => self.v4.get(addr.to_bits()),
            IpAddr::V6(addr) => self.v6.get(addr.to_bits()),
        }
    }
}

impl<V> Default for AllowedIps<V> {
    fn default() -> Self {
        Self { v4: Ranges::default(), v6: Ranges::default() }
    }
}

/// Disjoint ranges of one address family: `answers[i]` holds from `starts[i]` up to the next start.
#[derive(Clone, Debug)]
struct Ranges<K, V> {
    starts: Vec<K>,
    answers: Vec<Option<V>>,
}

impl<K: Copy + Ord, V: Copy> Ranges<K, V> {
    /// `nets` are (first address, last address, value); `next` is the address after another, if there is one.
    fn new(mut nets: Vec<(K, K, V)>, next: fn(K) -> Option<K>) -> Self {
        // Outer prefixes before the ones inside them. The sort is stable, so equal prefixes keep their order.
        nets.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
        let mut ranges = Self::default();
        let mut enclosing: Vec<(K, V)> = Vec::new();
        for &(first, last, value) in &nets {
            ranges.leave(&mut enclosing, next, |end| end < first);
            ranges.begin(first, Some(value));
            enclosing.push((last, value));
        }
        ranges.leave(&mut enclosing, next, |_| true);
        ranges
    }

    fn get(&self, addr: K) -> Option<V> {
        let after = self.starts.partition_point(|start| *start <= addr);
        self.answers[after.checked_sub(1)?]
    }

    /// Closes the innermost prefixes whose last address is `over`; what encloses them answers from there on.
    fn leave(&mut self, enclosing: &mut Vec<(K, V)>, next: fn(K) -> Option<K>, over: impl Fn(K) -> bool) {
        while let Some(&(end, _)) = enclosing.last()
            && over(end)
        {
            enclosing.pop();
            if let Some(start) = next(end) {
                self.begin(start, enclosing.last().map(|(_, value)| *value));
            }
        }
    }

    /// Starts a range; one that would be empty is overwritten.
    fn begin(&mut self, start: K, answer: Option<V>) {
        if self.starts.last() == Some(&start) {
            self.answers.pop();
        } else {
            self.starts.push(start);
        }
        self.answers.push(answer);
    }
}

impl<K, V> Default for Ranges<K, V> {
    fn default() -> Self {
        Self { starts: Vec::new(), answers: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use ipnet::{Ipv4Net, Ipv6Net};
    use proptest::prelude::*;

    use super::*;

    fn table(entries: &[(&str, u8)]) -> AllowedIps<u8> {
        AllowedIps::new(entries.iter().map(|(net, value)| (net.parse().unwrap(), *value)))
    }

    fn get(table: &AllowedIps<u8>, addr: &str) -> Option<u8> {
        table.get(addr.parse().unwrap())
    }

    #[test]
    fn the_longest_prefix_wins() {
        let t = table(&[("10.0.0.0/8", 1), ("10.1.0.0/16", 2), ("10.1.2.3/32", 3)]);
        assert_eq!(get(&t, "10.0.0.1"), Some(1));
        assert_eq!(get(&t, "10.1.0.0"), Some(2));
        assert_eq!(get(&t, "10.1.2.3"), Some(3));
        assert_eq!(get(&t, "10.1.2.4"), Some(2));
        assert_eq!(get(&t, "10.2.0.0"), Some(1));
        assert_eq!(get(&t, "11.0.0.0"), None);
        assert_eq!(get(&t, "9.255.255.255"), None);
    }

    #[test]
    fn the_ends_of_the_address_space_are_covered() {
        let t = table(&[("0.0.0.0/0", 1), ("255.255.255.255/32", 2), ("::/0", 3), ("ffff::/16", 4)]);
        assert_eq!(get(&t, "0.0.0.0"), Some(1));
        assert_eq!(get(&t, "255.255.255.255"), Some(2));
        assert_eq!(get(&t, "::"), Some(3));
        assert_eq!(get(&t, "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"), Some(4));
    }

    #[test]
    fn of_equal_prefixes_the_last_counts_and_families_stay_apart() {
        let t = table(&[("10.0.0.0/8", 1), ("10.99.99.99/8", 2)]);
        assert_eq!(get(&t, "10.0.0.1"), Some(2));
        assert_eq!(get(&t, "::10.0.0.1"), None);
        assert_eq!(get(&AllowedIps::default(), "10.0.0.1"), None);
    }

    /// What the table must agree with: look at every prefix.
    fn linear(entries: &[(IpNet, u8)], addr: IpAddr) -> Option<u8> {
        let longest = entries.iter().filter(|(net, _)| net.contains(&addr)).map(|(net, _)| net.prefix_len()).max()?;
        entries
            .iter()
            .rev()
            .find(|(net, _)| net.contains(&addr) && net.prefix_len() == longest)
            .map(|(_, value)| *value)
    }

    /// Addresses from a handful of bits, so that prefixes nest, touch and repeat.
    fn v4() -> impl Strategy<Value = Ipv4Addr> {
        (0u32..16, 0u32..16).prop_map(|(high, low)| Ipv4Addr::from_bits(high << 28 | low.wrapping_sub(8)))
    }

    fn v6() -> impl Strategy<Value = Ipv6Addr> {
        (0u128..16, 0u128..16).prop_map(|(high, low)| Ipv6Addr::from_bits(high << 124 | low.wrapping_sub(8)))
    }

    fn net() -> impl Strategy<Value = IpNet> {
        prop_oneof![
            (v4(), 0u8..=32).prop_map(|(addr, len)| Ipv4Net::new(addr, len).unwrap().into()),
            (v6(), 0u8..=128).prop_map(|(addr, len)| Ipv6Net::new(addr, len).unwrap().into()),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_a_linear_search(
            entries in prop::collection::vec((net(), any::<u8>()), 0..40),
            probes in prop::collection::vec(prop_oneof![v4().prop_map(IpAddr::from), v6().prop_map(IpAddr::from)], 1..60),
        ) {
            let table = AllowedIps::new(entries.iter().copied());
            let edges = entries.iter().flat_map(|(net, _)| [net.network(), net.broadcast()]);
            for addr in probes.iter().copied().chain(edges) {
                prop_assert_eq!(table.get(addr), linear(&entries, addr), "{}", addr);
            }
        }
    }
}
