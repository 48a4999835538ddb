//! The fields of IPv4 (RFC 791) and IPv6 (RFC 8200) headers that the data plane reads.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
/// Bytes of an IPv4 header without options.
pub(crate) const V4_LEN: usize = 20;
/// Bytes of an IPv6 header without extensions.
pub(crate) const V6_LEN: usize = 40;

/// The destination of an IP packet whose length field agrees with its length; none where the packet is malformed.
pub fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => {
            let header = packet.first_chunk::<V4_LEN>()?;
            let header_len = usize::from(header[0] & 0x0f) * 4;
            let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
            let sound = header_len >= V4_LEN && header_len <= total && total == packet.len();
            sound.then(|| Ipv4Addr::new(header[16], header[17], header[18], header[19]).into())
        }
        6 => {
            let header = packet.first_chunk::<V6_LEN>()?;
            let payload = usize::from(u16::from_be_bytes([header[4], header[5]]));
            let address: [u8; 16] = *header.last_chunk()?;
            (payload + V6_LEN == packet.len()).then(|| Ipv6Addr::from(address).into())
        }
        _ => None,
    }
}

/// Where source and destination stand, in either version.
pub(crate) fn address_range(version: u8) -> std::ops::Range<usize> {
    if version == 4 { 12..20 } else { 8..40 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_read_and_wrong_lengths_refused() {
        let mut v4 = [0u8; 24];
        v4[0] = 0x45;
        v4[3] = 24;
        v4[16..20].copy_from_slice(&[10, 98, 0, 7]);
        assert_eq!(destination(&v4), Some("10.98.0.7".parse().unwrap()));
        assert_eq!(destination(&v4[..23]), None);
        v4[0] = 0x44;
        assert_eq!(destination(&v4), None);

        let mut v6 = [0u8; 48];
        v6[0] = 0x60;
        v6[5] = 8;
        v6[24] = 0xfd;
        v6[39] = 9;
        assert_eq!(destination(&v6), Some("fd00::9".parse().unwrap()));
        assert_eq!(destination(&v6[..47]), None);
        assert_eq!(destination(&[]), None);
        assert_eq!(destination(&[0x50; 60]), None);
    }
}
