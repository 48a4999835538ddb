//! What people and records write as text: what is read shows itself in a form that reads the same, and a refusal
//! repeats no more than a line of what it refuses.

#![no_main]

use std::fmt::{Debug, Display};
use std::str::FromStr;

use ipnet::IpNet;
use keystone_mesh_core::key::PresharedKey;
use keystone_mesh_core::node::NodeName;
use keystone_mesh_core::path::{Candidate, Nat};
use keystone_mesh_core::relay::{HostPort, RelayAddr, Rendezvous};
use keystone_mesh_core::token::{NamePattern, TokenId, TokenSecret};
use keystone_mesh_core::{NodeId, PrivateKey, PublicKey, Signature};
use libfuzzer_sys::fuzz_target;

/// Characters of the longest refusal: a sentence, and some of the text.
const MAX_REFUSAL: usize = 500;

fuzz_target!(|data: &[u8]| {
    if let Ok(id) = NodeId::from_spki(data) {
        assert_eq!(id.to_spki(), data);
        assert_eq!(id.to_string().parse(), Ok(id));
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    shows_itself::<Candidate>(text);
    shows_itself::<Nat>(text);
    shows_itself::<NodeId>(text);
    shows_itself::<NodeName>(text);
    shows_itself::<PublicKey>(text);
    shows_itself::<Rendezvous>(text);
    shows_itself::<Signature>(text);
    shows_itself::<TokenId>(text);
    if let Some(relay) = shows_itself::<RelayAddr>(text) {
        assert!((1..=8).contains(&relay.addrs.len()));
    }
    if let Some(place) = shows_itself::<HostPort>(text) {
        assert_ne!(place.port(), 0);
        assert!(place.literal().is_none_or(|addr| HostPort::from(addr) == place));
    }
    // Secrets have no Display.
    let _ = text.parse::<PrivateKey>();
    let _ = text.parse::<PresharedKey>();
    let _ = text.parse::<TokenSecret>();
    if let Some((pattern, name)) = text.split_once(' ')
        && let (Some(parsed), Ok(node)) = (shows_itself::<NamePattern>(pattern), name.parse::<NodeName>())
    {
        assert_eq!(parsed.matches(&node), fits(pattern.as_bytes(), name.as_bytes()), "{pattern} {name}");
    }
    let _ = text.parse::<IpNet>();
});

fn shows_itself<T: FromStr<Err: Display> + Display + PartialEq + Debug>(text: &str) -> Option<T> {
    match text.parse::<T>() {
        Ok(value) => {
            let shown = value.to_string();
            assert_eq!(shown.parse::<T>().ok().as_ref(), Some(&value), "`{text}` shows as `{shown}`");
            Some(value)
        }
        Err(error) => {
            let refusal = error.to_string();
            assert!(refusal.chars().count() <= MAX_REFUSAL, "{} characters: {refusal}", refusal.chars().count());
            None
        }
    }
}

/// Whether a pattern fits, by the textbook's table: `row[t]` says whether the pattern so far fits `text[..t]`.
fn fits(pattern: &[u8], text: &[u8]) -> bool {
    let mut row: Vec<bool> = (0..=text.len()).map(|t| t == 0).collect();
    for &c in pattern {
        let mut next = vec![c == b'*' && row[0]; text.len() + 1];
        for t in 1..=text.len() {
            next[t] = if c == b'*' { row[t] || next[t - 1] } else { row[t - 1] && (c == b'?' || c == text[t - 1]) };
        }
        row = next;
    }
    row[text.len()]
}
