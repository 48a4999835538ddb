//! Probe datagrams: parse, verify, and encode again. The target knows the pair's key and writes the right MAC, so that
//! the body is read too; a wrong MAC must always be refused.

#![no_main]

use std::sync::LazyLock;

use hmac::{Hmac, Mac as _};
use keystone_fuzz::sample::secret;
use keystone_mesh_core::probe::{MAX_PUNCH_ADDRESSES, Message, ProbeError, ProbeKey, Unverified};
use libfuzzer_sys::fuzz_target;
use sha2::Sha256;

const MAC_LEN: usize = 16;
/// Header, flags, count, eight IPv6 addresses, MAC.
const LONGEST: usize = 28 + 2 + MAX_PUNCH_ADDRESSES * 19 + MAC_LEN;

struct Keys {
    ours: ProbeKey,
    theirs: ProbeKey,
    raw: [u8; 32],
}

static KEYS: LazyLock<Keys> = LazyLock::new(|| {
    let (a, b) = (secret(1).wireguard(0), secret(2).wireguard(0));
    Keys {
        ours: ProbeKey::agree(&a, &b.public_key()).expect("honest keys"),
        theirs: ProbeKey::agree(&b, &a.public_key()).expect("honest keys"),
        raw: a.agree(&b.public_key()).expect("honest keys").derive(b"keystone-mesh 1 probe"),
    }
});

fuzz_target!(|data: &[u8]| {
    let Ok(shown) = Unverified::parse(data) else { return };
    let (authenticated, mac) = data.split_at(data.len() - MAC_LEN);
    let right = right_mac(authenticated);
    assert_eq!(shown.verify(&KEYS.ours) == Err(ProbeError::BadMac), mac != right, "the MAC decides");

    let sealed = [authenticated, &right].concat();
    let unverified = Unverified::parse(&sealed).expect("the shape does not depend on the MAC");
    assert_eq!(unverified.sender(), shown.sender());
    let probe = match unverified.verify(&KEYS.theirs) {
        Ok(probe) => probe,
        Err(ProbeError::Body(_)) => return,
        Err(other) => panic!("an authentic probe of a good shape is refused: {other}"),
    };
    if let Message::Punch { addresses, .. } = &probe.message {
        assert!(addresses.len() <= MAX_PUNCH_ADDRESSES);
    }
    let len = u16::try_from(sealed.len()).unwrap_or(u16::MAX);
    let again = probe.encode(&KEYS.ours, len);
    assert!((usize::from(len)..=LONGEST.max(len.into())).contains(&again.len()), "{} for {len}", again.len());
    let read = Unverified::parse(&again).expect("what is encoded parses").verify(&KEYS.theirs);
    assert_eq!(read, Ok(probe));
});

fn right_mac(message: &[u8]) -> [u8; MAC_LEN] {
    let mut hmac = Hmac::<Sha256>::new_from_slice(&KEYS.raw).expect("HMAC takes keys of any length");
    hmac.update(message);
    *hmac.finalize().into_bytes().first_chunk().expect("SHA-256 gives 32 bytes")
}
