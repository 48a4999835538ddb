//! Framed messages on a stream: however the bytes are cut, the same messages come out, and each survives being written
//! again. The first byte chooses the kind of message, and whether the rest is the stream itself or messages, one a
//! line, that still need their lengths.

#![no_main]

use std::fmt::Debug;

use keystone_fuzz::Input;
use keystone_mesh_core::gateway::{FromGateway, ToGateway};
use keystone_mesh_core::relay::message::{ClientMessage, RelayMessage};
use keystone_mesh_core::wire::{self, Decoder, LENGTH_BYTES, MAX_MESSAGE, WireError};
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let (kind, limit, chunk) = (input.byte(), input.number().into(), usize::from(input.byte()) + 1);
    let stream = if kind & 4 == 0 { input.rest().to_vec() } else { framed(input.rest()) };
    match kind % 4 {
        0 => check::<ToGateway>(&stream, chunk, limit),
        1 => check::<FromGateway>(&stream, chunk, limit),
        2 => check::<ClientMessage>(&stream, chunk, limit),
        _ => check::<RelayMessage>(&stream, chunk, limit),
    }
});

fn framed(lines: &[u8]) -> Vec<u8> {
    let frame = |line: &[u8]| [&u32::try_from(line.len()).expect("short").to_be_bytes(), line].concat();
    lines.split(|byte| *byte == b'\n').flat_map(frame).collect()
}

fn check<T: Serialize + DeserializeOwned + PartialEq + Debug>(stream: &[u8], chunk: usize, limit: usize) {
    let (at_once, end) = read::<T>(stream, stream.len().max(1), limit);
    let (in_chunks, same_end) = read::<T>(stream, chunk, limit);
    assert_eq!(at_once, in_chunks);
    assert_eq!(end, same_end);
    for message in at_once {
        let frame = wire::encode(&message, MAX_MESSAGE).expect("what was read can be written");
        assert_eq!(wire::decode_message::<T>(&frame[LENGTH_BYTES..]).expect("and read again"), message);
    }
}

/// How a stream ended.
#[derive(Debug, PartialEq)]
enum End {
    AtBoundary,
    WithinMessage,
    OutOfStep(String),
}

fn read<T: DeserializeOwned>(stream: &[u8], chunk: usize, limit: usize) -> (Vec<T>, End) {
    let mut decoder = Decoder::new(limit);
    let mut messages = Vec::new();
    for bytes in stream.chunks(chunk) {
        decoder.handle_bytes(bytes);
        loop {
            match decoder.poll_message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => {
                    if let WireError::TooLarge { length, limit } = &error {
                        assert!(length > limit);
                    }
                    return (messages, End::OutOfStep(error.to_string()));
                }
            }
        }
    }
    (messages, if decoder.is_at_boundary() { End::AtBoundary } else { End::WithinMessage })
}
