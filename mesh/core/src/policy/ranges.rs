//! Arithmetic of ranges: blocks with exceptions, and ports, as ranges that neither overlap nor touch.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::kernel::Family;
use crate::nftables::Element;

/// Numbers from one to another, both included.
pub(super) type Range = (u128, u128);

/// Sorted, and everything that overlaps or touches made one.
pub(super) fn united(mut ranges: Vec<Range>) -> Vec<Range> {
    ranges.sort_unstable();
    let mut united: Vec<Range> = Vec::with_capacity(ranges.len());
    for (low, high) in ranges {
        match united.last_mut() {
            Some(last) if low <= last.1.saturating_add(1) => last.1 = last.1.max(high),
            Some(_) | None => united.push((low, high)),
        }
    }
    united
}

/// What is left of a range without others.
pub(super) fn without(range: Range, others: Vec<Range>) -> Vec<Range> {
    let (mut low, high) = range;
    let mut left = Vec::new();
    for (from, to) in united(others) {
        if to < low || from > high {
            continue;
        }
        if from > low {
            left.push((low, from - 1));
        }
        match to.checked_add(1) {
            Some(next) => low = next,
            None => return left,
        }
    }
    if low <= high {
        left.push((low, high));
    }
    left
}

/// The addresses of a prefix, as numbers.
pub(super) fn of_prefix(net: IpNet) -> Range {
    (number(net.network()), number(net.broadcast()))
}

/// Prefixes of one family as elements of a set of ranges.
pub(crate) fn prefixes(family: Family, nets: impl IntoIterator<Item = IpNet>) -> Vec<Element> {
    let ranges = nets.into_iter().filter(|net| Family::of(net) == family).map(of_prefix).collect();
    united(ranges).into_iter().map(|range| element(family, range)).collect()
}

/// A range of addresses as an element.
pub(super) fn element(family: Family, (low, high): Range) -> Element {
    Element::addresses(address(family, low), address(family, high))
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => v6.into(),
    }
}

fn address(family: Family, number: u128) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(u32::try_from(number).unwrap_or(u32::MAX).into()),
        Family::V6 => IpAddr::V6(number.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_touches_is_one() {
        assert_eq!(united(vec![(5, 6), (1, 2), (3, 3), (9, 9), (8, 10)]), [(1, 3), (5, 6), (8, 10)]);
        assert_eq!(united(vec![(1, u128::MAX), (2, 3)]), [(1, u128::MAX)]);
    }

    #[test]
    fn exceptions_are_cut_out() {
        assert_eq!(without((0, 9), vec![(2, 3), (3, 4), (8, 20)]), [(0, 1), (5, 7)]);
        assert_eq!(without((0, 9), vec![(0, 9)]), []);
        assert_eq!(without((5, 9), vec![(0, 3), (10, 12)]), [(5, 9)]);
        assert_eq!(without((0, u128::MAX), vec![(1, u128::MAX)]), [(0, 0)]);
    }

    #[test]
    fn neighbouring_prefixes_become_one_range() {
        let nets = ["10.0.1.0/24", "10.0.0.0/24", "fd00::/64"].map(|net| net.parse().unwrap());
        let [range] = prefixes(Family::V4, nets)[..] else { panic!("one range") };
        assert_eq!(range, Element::prefix("10.0.0.0/23".parse().unwrap()));
    }
}
