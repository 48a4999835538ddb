//! Join tokens.
//!
//! A token is one line that a person copies to a machine: the network key to pin, an id and a secret, and the ways to
//! the control plane. The control plane keeps only a hash of the secret, with the token's life, its remaining uses and
//! what it may be used for. The text carries a checksum, so that a mistyped or truncated token is told from a wrong one
//! before anything is sent.

use std::fmt;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use zeroize::ZeroizeOnDrop;

use crate::io::excerpt;
use crate::key::{NodeId, decode_base32, encode_base32, serde_as_text};
use crate::node::NodeName;
use crate::relay::address::Rendezvous;

const PREFIX: &str = "ksm1";
/// Bytes of a secret: 160 bits, so that a plain hash is enough to store it.
pub const SECRET_LEN: usize = 20;
/// Most ways to the control plane in a token.
const MAX_RENDEZVOUS: usize = 8;

/// Names a token in lists and logs; no secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId([u8; 8]);

impl TokenId {
    /// Takes 8 random bytes.
    pub fn from_bytes(bytes: [u8; 8]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&encode_base32(&self.0))
    }
}

impl FromStr for TokenId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        decode_base32(text)
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| "not a token id: expected 13 characters, as `keystone-mesh token list` shows".to_owned())
    }
}

/// A token's secret.
#[derive(Clone, PartialEq, Eq, ZeroizeOnDrop)]
pub struct TokenSecret([u8; SECRET_LEN]);

impl TokenSecret {
    /// Takes random bytes.
    pub fn from_bytes(bytes: [u8; SECRET_LEN]) -> Self {
        Self(bytes)
    }

    /// What the control plane keeps.
    pub fn hash(&self) -> TokenHash {
        TokenHash(Sha256::new().chain_update(b"keystone-mesh 1 token").chain_update(self.0).finalize().into())
    }

    fn to_text(&self) -> String {
        encode_base32(&self.0)
    }
}

impl fmt::Debug for TokenSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenSecret(..)")
    }
}

impl FromStr for TokenSecret {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        decode_base32(text)
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| "not a token secret".to_owned())
    }
}

impl Serialize for TokenSecret {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.to_text())
    }
}

impl<'de> Deserialize<'de> for TokenSecret {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Hash of a token's secret; compared in constant time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenHash([u8; 32]);

impl TokenHash {
    /// Whether `secret` is the one that was hashed. Takes the same time wherever they differ.
    pub fn matches(&self, secret: &TokenSecret) -> bool {
        self.0.ct_eq(&secret.hash().0).into()
    }
}

impl fmt::Display for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&encode_base32(&self.0))
    }
}

impl FromStr for TokenHash {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        decode_base32(text)
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| "not the hash of a token: expected 52 characters a-z, 2-7".to_owned())
    }
}

/// A whole token, as the joiner reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// The network key to pin.
    pub network: NodeId,
    /// Which token this is.
    pub id: TokenId,
    /// Proof that the joiner was given it.
    pub secret: TokenSecret,
    /// Ways to the control plane, at most 8.
    pub rendezvous: Vec<Rendezvous>,
}

/// Why a token's text was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Another kind of text altogether.
    #[error("this is not a join token: one begins with `{PREFIX}` (make one with `keystone-mesh token create`)")]
    NotAToken,
    /// A character that no token has.
    #[error("the token has a character at position {0} that no token has; copy it again, whole")]
    Character(usize),
    /// Cut off.
    #[error("the token is truncated; copy it again, whole")]
    Truncated,
    /// The checksum does not fit.
    #[error("the token is mistyped: its checksum does not fit; copy it again, whole")]
    Mistyped,
    /// Made by a version that knows more.
    #[error("the token has a part that this version does not know; update keystone-mesh on this machine")]
    TooNew,
}

impl Token {
    /// The text, which is secret. Shown once.
    pub fn encode(&self) -> String {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend_from_slice(self.network.as_bytes());
        bytes.extend_from_slice(&self.id.0);
        bytes.extend_from_slice(&self.secret.0);
        for way in self.rendezvous.iter().take(MAX_RENDEZVOUS) {
            // A relay with many long names can be longer than a token has room for; the other ways remain.
            let text = way.to_string();
            let Ok(length) = u16::try_from(text.len()) else { continue };
            bytes.extend_from_slice(&length.to_be_bytes());
            bytes.extend_from_slice(text.as_bytes());
        }
        let checksum = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&checksum.to_be_bytes());
        format!("{PREFIX}{}", encode_base32(&bytes))
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        let body = text.strip_prefix(PREFIX).ok_or(TokenError::NotAToken)?;
        if let Some(position) = body.bytes().position(|b| !matches!(b, b'a'..=b'z' | b'2'..=b'7')) {
            return Err(TokenError::Character(PREFIX.len() + position + 1));
        }
        let bytes = decode_base32(body).ok_or(TokenError::Truncated)?;
        let (bytes, checksum) = bytes.split_last_chunk::<4>().ok_or(TokenError::Truncated)?;
        if crc32fast::hash(bytes) != u32::from_be_bytes(*checksum) {
            // A cut changes the checksum as surely as a typing error; the shortest token tells the plainest cuts.
            let shortest = 32 + 8 + SECRET_LEN;
            return Err(if bytes.len() < shortest { TokenError::Truncated } else { TokenError::Mistyped });
        }
        let (network, bytes) = bytes.split_first_chunk::<32>().ok_or(TokenError::Truncated)?;
        let (id, bytes) = bytes.split_first_chunk::<8>().ok_or(TokenError::Truncated)?;
        let (secret, mut rest) = bytes.split_first_chunk::<SECRET_LEN>().ok_or(TokenError::Truncated)?;
        let mut rendezvous = Vec::new();
        while !rest.is_empty() && rendezvous.len() < MAX_RENDEZVOUS {
            let (way, after) = rendezvous_from(rest)?;
            rendezvous.push(way);
            rest = after;
        }
        Ok(Self { network: NodeId::from_bytes(*network), id: TokenId(*id), secret: TokenSecret(*secret), rendezvous })
    }
}

fn rendezvous_from(bytes: &[u8]) -> Result<(Rendezvous, &[u8]), TokenError> {
    let (length, rest) = bytes.split_first_chunk::<2>().ok_or(TokenError::Truncated)?;
    let (text, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes(*length))).ok_or(TokenError::Truncated)?;
    let way = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).ok_or(TokenError::TooNew)?;
    Ok((way, rest))
}

/// Which node names a token is good for: `*` stands for any run of characters, `?` for one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamePattern(String);

impl NamePattern {
    /// Whether the whole name fits.
    pub fn matches(&self, name: &NodeName) -> bool {
        fits(self.0.as_bytes(), name.as_str().as_bytes())
    }
}

/// Greedy matching with one point of return, linear in the product of the lengths and without recursion.
fn fits(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, t));
                p += 1;
            }
            Some(&c) if c == b'?' || c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((after, from)) => {
                    star = Some((after, from + 1));
                    p = after;
                    t = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

impl FromStr for NamePattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.*?".contains(&b);
        if text.is_empty() || text.len() > 253 || !text.bytes().all(ok) {
            let shown = excerpt(text);
            return Err(format!(
                "`{shown}` is not a name pattern: use a-z, 0-9, `-`, `.`, `*` and `?`, as in `worker-*`"
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

serde_as_text!(TokenId, NamePattern);

/// A token as the control plane keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// Which token.
    pub id: TokenId,
    /// Hash of its secret.
    pub hash: TokenHash,
    /// When it was made, seconds since 1970.
    pub created: u64,
    /// When it ends, seconds since 1970; none never.
    pub expires: Option<u64>,
    /// How many more nodes may join with it; none any number.
    pub uses_left: Option<u32>,
    /// Which names it is good for; none any.
    pub names: Option<NamePattern>,
    /// Networks that a node which joins with it may be the way to.
    #[serde(default)]
    pub routes: Vec<IpNet>,
    /// Whether it was revoked.
    pub revoked: bool,
}

/// Why a token does not let a node in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefusal {
    /// No such token, or the secret is another. One answer for both, so that ids cannot be searched for.
    #[error("the control plane does not know this token; it was revoked long ago, or made for another network")]
    Unknown,
    /// Its life is over.
    #[error("the token expired {0} seconds ago; make another with `keystone-mesh token create`")]
    Expired(u64),
    /// All its uses are spent.
    #[error("the token is used up; make another with `keystone-mesh token create --uses N`")]
    UsedUp,
    /// It was taken back.
    #[error("the token was revoked; make another with `keystone-mesh token create`")]
    Revoked,
    /// It is for other names.
    #[error("the token is for nodes named `{pattern}`, not `{name}`")]
    NameNotAllowed {
        /// What the token allows.
        pattern: NamePattern,
        /// What was asked.
        name: NodeName,
    },
}

impl TokenRefusal {
    /// The stable code in answers and metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unknown => "token-unknown",
            Self::Expired(_) => "token-expired",
            Self::UsedUp => "token-used-up",
            Self::Revoked => "token-revoked",
            Self::NameNotAllowed { .. } => "name-not-allowed",
        }
    }
}

impl TokenRecord {
    /// Whether a node of this name may join with this secret at `now`, seconds since 1970.
    ///
    /// The secret is checked first: who does not have it learns nothing about the token.
    pub fn check(&self, secret: &TokenSecret, name: &NodeName, now: u64) -> Result<(), TokenRefusal> {
        if !self.hash.matches(secret) {
            return Err(TokenRefusal::Unknown);
        }
        if self.revoked {
            return Err(TokenRefusal::Revoked);
        }
        if let Some(expires) = self.expires
            && now >= expires
        {
            return Err(TokenRefusal::Expired(now - expires));
        }
        if self.uses_left == Some(0) {
            return Err(TokenRefusal::UsedUp);
        }
        match &self.names {
            Some(pattern) if !pattern.matches(name) => {
                Err(TokenRefusal::NameNotAllowed { pattern: pattern.clone(), name: name.clone() })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::tests::network;

    fn token() -> Token {
        let mut rendezvous = network(1).rendezvous();
        rendezvous.push(Rendezvous::Gateway("[2001:db8::1]:51840".parse().unwrap()));
        Token { network: network(1).id, id: TokenId([1; 8]), secret: TokenSecret([2; SECRET_LEN]), rendezvous }
    }

    fn stored() -> TokenRecord {
        TokenRecord {
            id: TokenId([1; 8]),
            hash: TokenSecret([2; SECRET_LEN]).hash(),
            created: 100,
            expires: Some(200),
            uses_left: Some(1),
            names: Some("worker-*".parse().unwrap()),
            routes: vec![],
            revoked: false,
        }
    }

    #[test]
    fn a_token_survives_its_text() {
        assert_eq!(token().encode().parse(), Ok(token()));
    }

    #[test]
    fn every_mistyped_character_and_every_cut_is_noticed() {
        let text = token().encode();
        for i in 4..text.len() {
            let mut typed = text.clone().into_bytes();
            typed[i] = if typed[i] == b'a' { b'b' } else { b'a' };
            assert!(String::from_utf8(typed).unwrap().parse::<Token>().is_err(), "position {i}");
            assert!(text[..i].parse::<Token>().is_err(), "cut at {i}");
        }
        assert_eq!("ksm1".parse::<Token>(), Err(TokenError::Truncated));
        assert_eq!("K10::server:x".parse::<Token>(), Err(TokenError::NotAToken));
        assert_eq!("ksm1ab!d".parse::<Token>(), Err(TokenError::Character(7)));
    }

    #[test]
    fn a_token_lets_in_only_whom_it_should() {
        let (secret, worker) = (TokenSecret([2; SECRET_LEN]), "worker-1".parse().unwrap());
        assert_eq!(stored().check(&secret, &worker, 150), Ok(()));
        assert_eq!(stored().check(&TokenSecret([3; SECRET_LEN]), &worker, 150), Err(TokenRefusal::Unknown));
        assert_eq!(stored().check(&secret, &worker, 260), Err(TokenRefusal::Expired(60)));
        let used = TokenRecord { uses_left: Some(0), ..stored() };
        assert_eq!(used.check(&secret, &worker, 150), Err(TokenRefusal::UsedUp));
        let revoked = TokenRecord { revoked: true, ..stored() };
        assert_eq!(revoked.check(&secret, &worker, 150), Err(TokenRefusal::Revoked));
        let other = stored().check(&secret, &"home".parse().unwrap(), 150);
        assert!(matches!(other, Err(TokenRefusal::NameNotAllowed { .. })));
    }

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, fit) in [
            ("worker-*", "worker-1", true),
            ("worker-*", "my-worker-1", false),
            ("*", "anything.at.all", true),
            ("w?-*-x", "w1-a-b-x", true),
            ("w?-*-x", "w1-a-b-y", false),
            ("a*b*c", "axxbyybzc", true),
        ] {
            assert_eq!(
                pattern.parse::<NamePattern>().unwrap().matches(&name.parse().unwrap()),
                fit,
                "{pattern} {name}"
            );
        }
        assert!("Worker".parse::<NamePattern>().is_err());
        let long = "X".repeat(10_000).parse::<NamePattern>().unwrap_err();
        assert!(long.len() < 300, "a refusal repeats no more than it needs to");
    }

    #[test]
    fn no_secret_in_debug_output() {
        let shown = format!("{:?} {:?}", token(), stored());
        assert!(!shown.contains(&token().secret.to_text()), "{shown}");
        assert!(shown.contains("TokenSecret(..)"));
    }
}
