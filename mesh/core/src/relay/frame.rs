//! What a QUIC datagram between a client and a relay carries (RFC 9221 gives the datagram, this the inside).
//!
//! ```text
//!   Data      1 | peer (32) | packet ...                                       33 bytes, then a whole packet
//!   Fragment  2 | peer (32) | id (2) | offset (2) | total (2) | part ...       39 bytes, then a part of one
//! ```
//!
//! `peer` is the destination on the way to the relay and the source on the way from it. Numbers are big-endian. A
//! packet that does not fit the connection's current largest datagram is split into parts of about equal size, so
//! that the parts fit the receiver's connection too; where they do not, the relay splits them again: the offsets stay
//! those of the whole packet. The relay also splits a whole packet that fits the sender's path but not the receiver's.
//! It takes ids with [`RELAY_ID`] set for these, senders take the others, so the two never meet in one packet.

use crate::key::NodeId;

/// Bytes in front of the packet in a Data frame.
pub const DATA_HEADER: usize = 33;
/// Bytes in front of the part in a Fragment frame.
pub const FRAGMENT_HEADER: usize = 39;
/// The largest packet that is carried, in bytes: the largest common jumbo frame with some room.
pub const MAX_PACKET: usize = 9216;
/// The smallest datagram that frames are split into; less would be all header. QUIC guarantees over 1,100 bytes.
pub const MIN_DATAGRAM: usize = 128;
/// Set in the ids that the relay gives.
pub const RELAY_ID: u16 = 0x8000;

const TYPE_DATA: u8 = 1;
const TYPE_FRAGMENT: u8 = 2;

/// Why bytes are no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Shorter than its header, or nothing after it.
    #[error("a frame of {0} bytes is too short")]
    Short(usize),
    /// The first byte is no known type.
    #[error("unknown frame type {0}")]
    UnknownType(u8),
    /// A packet larger than [`MAX_PACKET`].
    #[error("a packet of {0} bytes is larger than {MAX_PACKET}")]
    TooLarge(usize),
    /// A fragment that lies (partly) outside of its packet.
    #[error("a fragment of {length} bytes at {offset} does not lie in a packet of {total} bytes")]
    OutOfBounds {
        /// Where the part begins.
        offset: usize,
        /// Bytes of the part.
        length: usize,
        /// Bytes of the whole packet.
        total: usize,
    },
}

/// One frame; the packet or part is borrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// A whole packet.
    Data {
        /// Destination towards the relay, source from it.
        peer: NodeId,
        /// The packet, 1 to [`MAX_PACKET`] bytes.
        packet: &'a [u8],
    },
    /// A part of a packet.
    Fragment {
        /// Destination towards the relay, source from it.
        peer: NodeId,
        /// Where the part belongs.
        place: Place,
        /// The part, at least one byte.
        part: &'a [u8],
    },
}

/// Where a part belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Names the packet among those of one sender in flight.
    pub id: u16,
    /// The part's first byte in the packet.
    pub offset: u16,
    /// Bytes of the whole packet, 1 to [`MAX_PACKET`].
    pub total: u16,
}

impl<'a> Frame<'a> {
    /// Reads a datagram.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, FrameError> {
        let short = FrameError::Short(bytes.len());
        let (&kind, rest) = bytes.split_first().ok_or(short)?;
        if kind != TYPE_DATA && kind != TYPE_FRAGMENT {
            return Err(FrameError::UnknownType(kind));
        }
        let (peer, rest) = rest.split_first_chunk::<32>().ok_or(short)?;
        let peer = NodeId::from_bytes(*peer);
        if kind == TYPE_DATA {
            return match rest.len() {
                0 => Err(short),
                1..=MAX_PACKET => Ok(Self::Data { peer, packet: rest }),
                length => Err(FrameError::TooLarge(length)),
            };
        }
        let (numbers, part) = rest.split_first_chunk::<6>().ok_or(short)?;
        let [id, offset, total] = [0, 2, 4].map(|at| u16::from_be_bytes([numbers[at], numbers[at + 1]]));
        if part.is_empty() {
            return Err(short);
        }
        if usize::from(total) > MAX_PACKET {
            return Err(FrameError::TooLarge(total.into()));
        }
        if usize::from(offset) + part.len() > usize::from(total) {
            return Err(FrameError::OutOfBounds { offset: offset.into(), length: part.len(), total: total.into() });
        }
        Ok(Self::Fragment { peer, place: Place { id, offset, total }, part })
    }

    /// Writes the frame's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.encoded_len());
        match self {
            Self::Data { peer, packet } => {
                bytes.push(TYPE_DATA);
                bytes.extend_from_slice(peer.as_bytes());
                bytes.extend_from_slice(packet);
            }
            Self::Fragment { peer, place, part } => {
                bytes.push(TYPE_FRAGMENT);
                bytes.extend_from_slice(peer.as_bytes());
                for number in [place.id, place.offset, place.total] {
                    bytes.extend_from_slice(&number.to_be_bytes());
                }
                bytes.extend_from_slice(part);
            }
        }
        bytes
    }

    /// Bytes that [`Frame::encode`] gives.
    pub fn encoded_len(&self) -> usize {
        match self {
            Self::Data { packet, .. } => DATA_HEADER + packet.len(),
            Self::Fragment { part, .. } => FRAGMENT_HEADER + part.len(),
        }
    }

    /// The destination or source.
    pub fn peer(&self) -> NodeId {
        match self {
            Self::Data { peer, .. } | Self::Fragment { peer, .. } => *peer,
        }
    }

    /// The same frame for another peer: what the relay does with it.
    #[must_use]
    pub fn readdressed(self, peer: NodeId) -> Self {
        match self {
            Self::Data { packet, .. } => Self::Data { peer, packet },
            Self::Fragment { place, part, .. } => Self::Fragment { peer, place, part },
        }
    }

    /// The frames of at most `max_datagram` bytes that carry the same: the frame itself where it fits, otherwise
    /// fragments. `id` is for a whole packet that must be split; a fragment keeps its own. Refuses packets beyond
    /// [`MAX_PACKET`] and datagrams below [`MIN_DATAGRAM`].
    pub fn split(self, id: u16, max_datagram: usize) -> Result<Split<'a>, FrameError> {
        let (peer, place, bytes) = match self {
            Self::Data { packet: [], .. } => return Err(FrameError::Short(DATA_HEADER)),
            Self::Data { peer, packet } => {
                let total = u16::try_from(packet.len()).ok().filter(|_| packet.len() <= MAX_PACKET);
                let total = total.ok_or(FrameError::TooLarge(packet.len()))?;
                (peer, Place { id, offset: 0, total }, packet)
            }
            Self::Fragment { peer, place, part } => (peer, place, part),
        };
        if self.encoded_len() <= max_datagram {
            return Ok(Split { whole: Some(self), peer, place, rest: &[], chunk: 1 });
        }
        if max_datagram < MIN_DATAGRAM {
            return Err(FrameError::Short(max_datagram));
        }
        let pieces = bytes.len().div_ceil(max_datagram - FRAGMENT_HEADER);
        Ok(Split { whole: None, peer, place, rest: bytes, chunk: bytes.len().div_ceil(pieces) })
    }
}

/// The frames that [`Frame::split`] gives.
#[derive(Clone, Debug)]
pub struct Split<'a> {
    whole: Option<Frame<'a>>,
    peer: NodeId,
    place: Place,
    rest: &'a [u8],
    chunk: usize,
}

impl<'a> Iterator for Split<'a> {
    type Item = Frame<'a>;

    fn next(&mut self) -> Option<Frame<'a>> {
        if let Some(frame) = self.whole.take() {
            return Some(frame);
        }
        if self.rest.is_empty() {
            return None;
        }
        let (part, rest) = self.rest.split_at(self.chunk.min(self.rest.len()));
        let frame = Frame::Fragment { peer: self.peer, place: self.place, part };
        self.rest = rest;
        // Parts lie within `total`, a u16, so their lengths fit as well.
        self.place.offset = self.place.offset.saturating_add(u16::try_from(part.len()).unwrap_or(u16::MAX));
        Some(frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn peer(byte: u8) -> NodeId {
        NodeId::from_bytes([byte; 32])
    }

    #[test]
    fn a_packet_that_fits_stays_whole() {
        let packet = [7; 1000];
        let frames: Vec<_> = Frame::Data { peer: peer(1), packet: &packet }.split(5, 1033).unwrap().collect();
        assert_eq!(frames, [Frame::Data { peer: peer(1), packet: &packet }]);
    }

    #[test]
    fn a_packet_that_does_not_fit_is_cut_into_equal_parts() {
        let packet = [7; 1312];
        let frames: Vec<_> = Frame::Data { peer: peer(1), packet: &packet }.split(5, 1162).unwrap().collect();
        assert_eq!(frames.iter().map(Frame::encoded_len).collect::<Vec<_>>(), [695, 695]);
    }

    #[test]
    fn what_is_no_frame_is_refused_with_the_reason() {
        assert_eq!(Frame::decode(&[]), Err(FrameError::Short(0)));
        assert_eq!(Frame::decode(&[9; 50]), Err(FrameError::UnknownType(9)));
        assert_eq!(Frame::decode(&[1; DATA_HEADER]), Err(FrameError::Short(33)));
        assert_eq!(Frame::decode(&[2; FRAGMENT_HEADER]), Err(FrameError::Short(39)));
        assert_eq!(Frame::decode(&[1; DATA_HEADER + MAX_PACKET + 1]), Err(FrameError::TooLarge(MAX_PACKET + 1)));
        let place = Place { id: 0, offset: 90, total: 100 };
        let outside = Frame::Fragment { peer: peer(1), place, part: &[0; 11] }.encode();
        assert_eq!(Frame::decode(&outside), Err(FrameError::OutOfBounds { offset: 90, length: 11, total: 100 }));
        assert!(Frame::Data { peer: peer(1), packet: &[] }.split(0, 1200).is_err());
        assert!(Frame::Data { peer: peer(1), packet: &[0; 500] }.split(0, 100).is_err());
    }

    proptest! {
        #[test]
        fn frames_round_trip_and_never_exceed_the_datagram(
            packet in prop::collection::vec(any::<u8>(), 1..4000),
            first in MIN_DATAGRAM..2000usize,
            second in MIN_DATAGRAM..2000usize,
        ) {
            let mut rebuilt = vec![0; packet.len()];
            for frame in (Frame::Data { peer: peer(1), packet: &packet }).split(3, first).unwrap() {
                let bytes = frame.encode();
                prop_assert!(bytes.len() <= first);
                let seen = Frame::decode(&bytes).unwrap();
                prop_assert_eq!(seen, frame);
                for again in seen.readdressed(peer(2)).split(RELAY_ID | 3, second).unwrap() {
                    let bytes = again.encode();
                    prop_assert!(bytes.len() <= second);
                    match Frame::decode(&bytes).unwrap() {
                        Frame::Data { packet: whole, .. } => rebuilt.copy_from_slice(whole),
                        Frame::Fragment { place, part, peer: from } => {
                            prop_assert_eq!(from, peer(2));
                            let at = usize::from(place.offset);
                            rebuilt[at..at + part.len()].copy_from_slice(part);
                        }
                    }
                }
            }
            prop_assert_eq!(rebuilt, packet);
        }

        #[test]
        fn rubbish_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0u8..4) {
            if let Some(first) = bytes.first_mut() { *first = kind; }
            if let Ok(frame) = Frame::decode(&bytes) {
                prop_assert_eq!(frame.encode(), bytes.clone());
                prop_assert!(frame.split(1, MIN_DATAGRAM).is_ok());
            }
        }
    }
}
