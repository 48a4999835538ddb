//! Join tokens: as text, and as the bytes behind it with the checksum that belongs to them. What is read is written
//! and read again to the same token, and a token never shows its secret.

#![no_main]

use data_encoding::BASE32_NOPAD;
use keystone_mesh_core::token::{Token, TokenError};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(token) = text.parse()
    {
        check(&token);
    }
    let sealed = [data, &crc32fast::hash(data).to_be_bytes()].concat();
    match format!("ksm1{}", BASE32_NOPAD.encode(&sealed).to_lowercase()).parse() {
        Ok(token) => check(&token),
        Err(TokenError::Truncated | TokenError::TooNew) => {}
        Err(error @ (TokenError::NotAToken | TokenError::Character(_) | TokenError::Mistyped)) => {
            panic!("the text is whole, and yet: {error}")
        }
    }
});

fn check(token: &Token) {
    assert!(token.rendezvous.len() <= 8);
    assert_eq!(token.encode().parse().as_ref(), Ok(token));
    let secret = serde_json::to_value(&token.secret).expect("a secret is a text");
    assert!(!format!("{token:?}").contains(secret.as_str().expect("a text")), "the secret is shown");
}
