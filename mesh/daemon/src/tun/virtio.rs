//! The header before every packet on a TUN device opened with `IFF_VNET_HDR`.
//!
//! It is `struct virtio_net_hdr` (virtio 1.2 section 5.1.6, `linux/virtio_net.h`), ten bytes in native byte order. It
//! says what the kernel left undone on a packet it hands over (checksum, segmentation) and, the other way, what we
//! leave to the kernel.

/// Bytes of the header.
pub const HEADER_LEN: usize = 10;

const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 4;
const GSO_UDP: u8 = 5;
/// Set beside the type where the first segment carries CWR; segmentation needs no hint for that.
const GSO_ECN: u8 = 0x80;

/// What kind of super packet follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Gso {
    /// A packet as it goes on a wire.
    #[default]
    None,
    /// TCP over IPv4, to be cut into segments.
    Tcp4,
    /// TCP over IPv6, to be cut into segments.
    Tcp6,
    /// UDP over either, to be cut into datagrams (USO).
    Udp,
}

/// The decoded header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct VirtioHeader {
    /// The checksum field holds only the pseudo header's sum; the rest is to be added.
    pub needs_checksum: bool,
    /// Whether and how the packet is to be segmented.
    pub gso: Gso,
    /// Bytes of all headers; a hint, not to be relied on.
    pub header_len: u16,
    /// Payload bytes per segment.
    pub gso_size: u16,
    /// Where checksumming starts: the transport header.
    pub checksum_start: u16,
    /// Where the checksum field is, counted from `checksum_start`.
    pub checksum_offset: u16,
}

/// Why a header was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VirtioError {
    /// Fewer than ten bytes.
    #[error("{0} bytes where a virtio header of {HEADER_LEN} is expected")]
    Truncated(usize),
    /// A kind of segmentation that was not asked for with `TUNSETOFFLOAD`.
    #[error("segmentation type {0:#x} was not asked for")]
    UnknownGso(u8),
}

impl VirtioHeader {
    /// Reads the header at the start of `bytes`.
    pub fn decode(bytes: &[u8]) -> Result<Self, VirtioError> {
        let &[flags, gso, h0, h1, g0, g1, s0, s1, o0, o1, ..] = bytes else {
            return Err(VirtioError::Truncated(bytes.len()));
        };
        let gso = match gso & !GSO_ECN {
            GSO_NONE => Gso::None,
            GSO_TCP4 => Gso::Tcp4,
            GSO_TCP6 => Gso::Tcp6,
            GSO_UDP => Gso::Udp,
            other => return Err(VirtioError::UnknownGso(other)),
        };
        Ok(Self {
            needs_checksum: flags & NEEDS_CHECKSUM != 0,
            gso,
            header_len: u16::from_ne_bytes([h0, h1]),
            gso_size: u16::from_ne_bytes([g0, g1]),
            checksum_start: u16::from_ne_bytes([s0, s1]),
            checksum_offset: u16::from_ne_bytes([o0, o1]),
        })
    }

    /// The ten bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let gso = match self.gso {
            Gso::None => GSO_NONE,
            Gso::Tcp4 => GSO_TCP4,
            Gso::Tcp6 => GSO_TCP6,
            Gso::Udp => GSO_UDP,
        };
        let [h0, h1] = self.header_len.to_ne_bytes();
        let [g0, g1] = self.gso_size.to_ne_bytes();
        let [s0, s1] = self.checksum_start.to_ne_bytes();
        let [o0, o1] = self.checksum_offset.to_ne_bytes();
        [if self.needs_checksum { NEEDS_CHECKSUM } else { 0 }, gso, h0, h1, g0, g1, s0, s1, o0, o1]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_plain_packet_has_a_header_of_zeros() {
        assert_eq!(VirtioHeader::default().encode(), [0; HEADER_LEN]);
        assert_eq!(VirtioHeader::decode(&[0; HEADER_LEN]), Ok(VirtioHeader::default()));
    }

    #[test]
    fn truncated_and_unknown_headers_are_refused() {
        assert_eq!(VirtioHeader::decode(&[0; 9]), Err(VirtioError::Truncated(9)));
        assert_eq!(VirtioHeader::decode(&[0, 3, 0, 0, 0, 0, 0, 0, 0, 0]), Err(VirtioError::UnknownGso(3)));
    }

    proptest! {
        #[test]
        fn what_is_accepted_round_trips(bytes in prop::array::uniform10(any::<u8>())) {
            if let Ok(header) = VirtioHeader::decode(&bytes) {
                prop_assert_eq!(VirtioHeader::decode(&header.encode()), Ok(header));
            }
        }
    }
}
