//! State files: any bytes as a whole file, and any bytes behind the head line that belongs to them. The first byte
//! chooses the file.

#![no_main]

use std::fmt::Debug;
use std::fs;

use keystone_fuzz::Input;
use keystone_mesh::state::{Membership, Snapshot, StateDir, StateError};
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let choice = input.byte();
    match choice % 3 {
        0 => check::<Snapshot>("snapshot", choice, input.rest(), StateDir::snapshot),
        1 => check::<Membership>("membership", choice, input.rest(), StateDir::membership),
        _ => check_secret(choice, input.rest()),
    }
});

fn check<T: Serialize + DeserializeOwned + PartialEq + Debug>(
    kind: &str,
    choice: u8,
    bytes: &[u8],
    read: fn(&StateDir) -> Result<Option<T>, StateError>,
) {
    let value = match read_file(kind, choice, bytes, read) {
        Ok(value) => value.expect("the file is there"),
        Err(StateError::Damaged { .. }) => return,
        Err(other) => panic!("{other}"),
    };
    let written = serde_json::to_vec(&value).expect("what was read can be written");
    assert_eq!(serde_json::from_slice::<T>(&written).expect("and read again"), value);
}

fn check_secret(choice: u8, bytes: &[u8]) {
    match read_file("secret", choice, bytes, StateDir::secret) {
        Ok(secret) => drop(secret.expect("the file is there")),
        Err(StateError::Damaged { why, .. }) => assert!(why.len() < 500, "a refusal shows the file"),
        Err(other) => panic!("{other}"),
    }
}

fn read_file<T>(kind: &str, choice: u8, bytes: &[u8], read: impl Fn(&StateDir) -> T) -> T {
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory");
    let head = format!("keystone-mesh {kind} 1 crc32={:08x}\n", crc32fast::hash(bytes));
    let file = if choice & 0x80 == 0 { [head.as_bytes(), bytes].concat() } else { bytes.to_vec() };
    let path = dir.path().join(kind);
    fs::write(&path, file).expect("a file");
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("its mode");
    read(&StateDir::read_only(dir.path()))
}
