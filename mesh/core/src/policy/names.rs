//! Names that are made from what a thing says.

use std::fmt::Write as _;

use sha2::{Digest as _, Sha256};

use crate::kernel::Family;

/// Bytes of the hash in a name: so many that nobody can write a policy whose set has the name of another's.
const BYTES: usize = 10;

/// `KIND4-HASH`, with the family's digit where there is one.
pub(super) fn name(kind: &str, family: Option<Family>, content: &str) -> String {
    let family = match family {
        None => "",
        Some(Family::V4) => "4",
        Some(Family::V6) => "6",
    };
    let mut name = format!("{kind}{family}-");
    for byte in &Sha256::digest(content)[..BYTES] {
        let _ = write!(name, "{byte:02x}");
    }
    name
}
