//! The Internet checksum (RFC 1071): the one's complement of the one's complement sum of 16-bit words.
//!
//! Sums are carried as partial sums in native byte order, which RFC 1071 section 2 (B) allows, and folded once.

/// Adds `bytes` to a partial sum. All parts but the last must have an even length.
pub fn sum(bytes: &[u8], initial: u64) -> u64 {
    // 64-bit words with the carries collected aside are still a sum modulo 2^16 - 1. Two accumulators, so that two
    // chains of carries run side by side.
    let (mut a, mut b) = (u128::from(initial), 0u128);
    let mut pairs = bytes.chunks_exact(16);
    for pair in &mut pairs {
        a += u128::from(u64::from_ne_bytes(pair[..8].try_into().expect("8 bytes")));
        b += u128::from(u64::from_ne_bytes(pair[8..].try_into().expect("8 bytes")));
    }
    let mut words = pairs.remainder().chunks_exact(2);
    for word in &mut words {
        a += u128::from(u16::from_ne_bytes(word.try_into().expect("2 bytes")));
    }
    if let [odd] = words.remainder() {
        a += u128::from(u16::from_ne_bytes([*odd, 0]));
    }
    fold_to_64(a + b)
}

/// The partial sum of the pseudo header of TCP and UDP (RFC 9293 section 3.1, RFC 8200 section 8.1). `addresses` are
/// source and destination as they stand in the IP header, `len` is the length of the transport header and payload.
pub fn pseudo_header(addresses: &[u8], protocol: u8, len: usize) -> u64 {
    let len = u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes();
    sum(&[len[0], len[1], len[2], len[3], 0, protocol], sum(addresses, 0))
}

/// Folds a partial sum to the 16 bits that a partially computed checksum field holds.
pub fn fold(sum: u64) -> [u8; 2] {
    let mut sum = (sum >> 32) + (sum & 0xffff_ffff);
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    (sum as u16).to_ne_bytes()
}

/// The checksum field for a partial sum.
pub fn finish(sum: u64) -> [u8; 2] {
    let [high, low] = fold(sum);
    [!high, !low]
}

/// As [`finish`], for UDP and its kin: zero would mean "none" and is sent as its equal, 0xffff (RFC 768).
pub fn finish_nonzero(sum: u64) -> [u8; 2] {
    match finish(sum) {
        [0, 0] => [0xff, 0xff],
        other => other,
    }
}

fn fold_to_64(sum: u128) -> u64 {
    let (low, carry) = (sum as u64).overflowing_add((sum >> 64) as u64);
    low + u64::from(carry)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 1071's definition, word by word.
    fn reference(bytes: &[u8]) -> [u8; 2] {
        let mut sum: u32 = 0;
        for word in bytes.chunks(2) {
            sum += u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0));
            sum = (sum >> 16) + (sum & 0xffff);
        }
        (!(sum as u16)).to_be_bytes()
    }

    #[test]
    fn the_example_of_the_rfc_holds() {
        assert_eq!(fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7], 0)), [0xdd, 0xf2]);
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            prop_assert_eq!(finish(sum(&bytes, 0)), reference(&bytes));
        }

        #[test]
        fn parts_add_up(bytes in prop::collection::vec(any::<u8>(), 0..500), at in 0usize..250) {
            let (head, tail) = bytes.split_at((at * 2).min(bytes.len() & !1));
            prop_assert_eq!(finish(sum(tail, sum(head, 0))), finish(sum(&bytes, 0)));
        }

        #[test]
        fn a_sum_full_of_carries_is_right(words in prop::collection::vec(prop_oneof![Just(0xffu8), any::<u8>()], 0..400)) {
            prop_assert_eq!(finish(sum(&words, 0)), reference(&words));
        }
    }
}
