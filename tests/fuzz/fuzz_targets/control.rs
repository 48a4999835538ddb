//! Requests and answers on the control socket, one a line.

#![no_main]

use keystone_mesh::control::{Answer, Request};
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

fuzz_target!(|data: &[u8]| {
    check::<Request>(data);
    check::<Answer>(data);
});

fn check<T: Serialize + DeserializeOwned>(line: &[u8]) {
    let Ok(value) = serde_json::from_slice::<T>(line) else { return };
    let written = serde_json::to_string(&value).expect("what was read can be written");
    assert!(!written.contains('\n'), "one line");
    let again: T = serde_json::from_str(&written).expect("and read again");
    assert_eq!(serde_json::to_string(&again).expect("as before"), written);
}
