//! Framing of messages on a byte stream: a length as four bytes, big-endian, then so many bytes of JSON.
//!
//! The decoder is incremental: bytes go in as they come, whole messages come out. It never holds more than one
//! message of the largest allowed size plus what was put in with one call.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Bytes of the length in front of each message.
pub const LENGTH_BYTES: usize = 4;
/// The largest message that any stream may carry, in bytes. A stream may set a smaller limit.
pub const MAX_MESSAGE: usize = 1 << 20;

/// Why a frame was refused. A stream that gave one is out of step and must be closed.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The announced or given message is larger than the stream allows.
    #[error("a message of {length} bytes where at most {limit} are allowed")]
    TooLarge {
        /// Bytes announced.
        length: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// The bytes are not the JSON that is expected here.
    #[error("not a valid message: {0}")]
    Json(#[source] serde_json::Error),
}

/// Encodes one message with its length.
pub fn encode<T: Serialize>(message: &T, limit: usize) -> Result<Vec<u8>, WireError> {
    let mut frame = vec![0; LENGTH_BYTES];
    serde_json::to_writer(&mut frame, message).map_err(WireError::Json)?;
    let length = frame.len() - LENGTH_BYTES;
    let announced = u32::try_from(length).ok().filter(|_| length <= limit.min(MAX_MESSAGE));
    let Some(announced) = announced else {
        return Err(WireError::TooLarge { length, limit: limit.min(MAX_MESSAGE) });
    };
    frame[..LENGTH_BYTES].copy_from_slice(&announced.to_be_bytes());
    Ok(frame)
}

/// Reads the four bytes of a length, and refuses more than `limit`.
pub fn decode_length(bytes: [u8; LENGTH_BYTES], limit: usize) -> Result<usize, WireError> {
    let limit = limit.min(MAX_MESSAGE);
    let length = usize::try_from(u32::from_be_bytes(bytes)).unwrap_or(usize::MAX);
    if length > limit { Err(WireError::TooLarge { length, limit }) } else { Ok(length) }
}

/// Reads the bytes of one message, without its length.
pub fn decode_message<T: DeserializeOwned>(body: &[u8]) -> Result<T, WireError> {
    serde_json::from_slice(body).map_err(WireError::Json)
}

/// Takes bytes as they come and gives whole messages.
#[derive(Debug)]
pub struct Decoder {
    buffer: Vec<u8>,
    limit: usize,
}

impl Decoder {
    /// A decoder for messages of at most `limit` bytes ([`MAX_MESSAGE`] at most).
    pub fn new(limit: usize) -> Self {
        Self { buffer: Vec::new(), limit: limit.min(MAX_MESSAGE) }
    }

    /// Adds bytes from the stream.
    pub fn handle_bytes(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, or none until more bytes come. Call it until it gives none.
    pub fn poll_message<T: DeserializeOwned>(&mut self) -> Result<Option<T>, WireError> {
        let Some((length, rest)) = self.buffer.split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let length = decode_length(*length, self.limit)?;
        let Some(body) = rest.get(..length) else { return Ok(None) };
        let message = decode_message(body)?;
        self.buffer.drain(..LENGTH_BYTES + length);
        Ok(Some(message))
    }

    /// Whether the stream may end here: no part of a message is waiting for the rest.
    pub fn is_at_boundary(&self) -> bool {
        self.buffer.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_its_bytes_arrive() {
        let mut decoder = Decoder::new(100);
        decoder.handle_bytes(&101u32.to_be_bytes());
        let error = decoder.poll_message::<String>().unwrap_err();
        assert_eq!(error.to_string(), "a message of 101 bytes where at most 100 are allowed");
        assert!(matches!(encode(&"x".repeat(200), 100), Err(WireError::TooLarge { length: 202, limit: 100 })));
    }

    #[test]
    fn other_json_is_refused_with_the_reason() {
        let mut decoder = Decoder::new(MAX_MESSAGE);
        decoder.handle_bytes(&encode(&"text", MAX_MESSAGE).unwrap());
        let error = decoder.poll_message::<u32>().unwrap_err();
        assert!(error.to_string().contains("invalid type"), "{error}");
    }

    proptest! {
        #[test]
        fn messages_survive_any_cutting_of_the_stream(
            messages in prop::collection::vec(".{0,40}", 0..8),
            cuts in prop::collection::vec(1usize..20, 1..20),
        ) {
            let stream: Vec<u8> = messages.iter().flat_map(|m| encode(m, MAX_MESSAGE).unwrap()).collect();
            let (mut decoder, mut got, mut rest) = (Decoder::new(MAX_MESSAGE), Vec::new(), &stream[..]);
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                decoder.handle_bytes(now);
                while let Some(message) = decoder.poll_message::<String>().unwrap() { got.push(message); }
                rest = later;
            }
            prop_assert_eq!(got, messages);
            prop_assert!(decoder.is_at_boundary());
        }

        #[test]
        fn rubbish_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = Decoder::new(64);
            decoder.handle_bytes(&bytes);
            while let Ok(Some(_)) = decoder.poll_message::<serde_json::Value>() {}
        }
    }
}
