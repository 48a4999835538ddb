//! Keys: one secret per node, and what is derived from it.
//!
//! A node keeps one 32-byte [`Secret`]. Its Ed25519 [`Identity`] (TLS raw public key, signatures over records) and its
//! WireGuard [`PrivateKey`] are derived from it by HKDF-SHA256 (RFC 5869) with distinct labels, so that one file is
//! all there is to protect and to back up. The identity never changes; the WireGuard key has a generation and rotates,
//! because the identity signs whichever is current.
//!
//! Text forms: WireGuard keys are standard Base64, as in `wg(8)`; identities are lower-case Base32 without padding
//! (RFC 4648), 52 characters, so that they survive file names, DNS labels and being read aloud.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use curve25519_dalek::scalar::clamp_integer;
use curve25519_dalek::{EdwardsPoint, MontgomeryPoint, Scalar};
use data_encoding::{Encoding, Specification};
use ed25519_dalek::hazmat::{ExpandedSecretKey, raw_sign};
use ed25519_dalek::{Signer as _, SigningKey, VerifyingKey};
use hkdf::Hkdf;
use sha2::{Sha256, Sha512};
use zeroize::{Zeroize, ZeroizeOnDrop};

const IDENTITY_LABEL: &[u8] = b"keystone-mesh 1 identity";
const WIREGUARD_LABEL: &[u8] = b"keystone-mesh 1 wireguard";
const PROOF_LABEL: &[u8] = b"keystone-mesh 1 key proof";

/// Why a key's text or bytes were refused. Never contains the key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The text is not in the alphabet of its encoding.
    #[error("not a valid {what}: expected {expected}")]
    Encoding {
        /// What was being read.
        what: &'static str,
        /// The form that is expected.
        expected: &'static str,
    },
    /// The text decodes to another number of bytes.
    #[error("not a valid {what}: {actual} bytes where {wanted} are expected (truncated?)")]
    Length {
        /// What was being read.
        what: &'static str,
        /// Bytes expected.
        wanted: usize,
        /// Bytes found.
        actual: usize,
    },
    /// 32 bytes that are no point on the curve.
    #[error("not an identity: the bytes are not an Ed25519 public key")]
    NotAPoint,
}

/// A node's one secret: 32 random bytes that never leave it.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Secret([u8; 32]);

impl Secret {
    /// Takes 32 bytes from a cryptographic random source.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes, for the state file.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The node's Ed25519 identity.
    pub fn identity(&self) -> Identity {
        let mut seed = self.derive(IDENTITY_LABEL, 0);
        let identity = Identity(SigningKey::from_bytes(&seed));
        seed.zeroize();
        identity
    }

    /// The node's WireGuard key of a generation (0 for the first).
    pub fn wireguard(&self, generation: u32) -> PrivateKey {
        PrivateKey(self.derive(WIREGUARD_LABEL, generation))
    }

    fn derive(&self, label: &[u8], generation: u32) -> [u8; 32] {
        let mut out = [0; 32];
        Hkdf::<Sha256>::new(None, &self.0)
            .expand_multi_info(&[label, &generation.to_be_bytes()], &mut out)
            .expect("32 bytes are within HKDF-SHA256's limit of 255 blocks");
        out
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// An Ed25519 key pair (RFC 8032): signs records, and is the TLS raw public key (RFC 7250) of every QUIC connection.
#[derive(Clone)]
pub struct Identity(SigningKey);

impl Identity {
    /// Takes the 32-byte private seed of RFC 8032, as [`Identity::seed`] gave it.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(seed))
    }

    /// The private seed: for the one place beside the node's state where a network key may be, the controller's Secret.
    pub fn seed(&self) -> zeroize::Zeroizing<[u8; 32]> {
        zeroize::Zeroizing::new(self.0.to_bytes())
    }

    /// The public half.
    pub fn id(&self) -> NodeId {
        NodeId(self.0.verifying_key().to_bytes())
    }

    /// Signs a message.
    pub fn sign(&self, message: &[u8]) -> Signature {
        Signature(self.0.sign(message).to_bytes())
    }

    /// The private key as PKCS #8 version 1 (RFC 8410), for rustls.
    pub fn to_pkcs8(&self) -> Vec<u8> {
        const PREFIX: [u8; 16] =
            [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
        [&PREFIX[..], &self.0.to_bytes()].concat()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({}, ..)", self.id())
    }
}

/// SubjectPublicKeyInfo of an Ed25519 key (RFC 8410) up to the 32 key bytes.
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// A node's identity: the public half of its Ed25519 key. The network key is the control plane's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId([u8; 32]);

impl NodeId {
    /// Takes 32 bytes as they are. Bytes that are no point verify no signature.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Whether `signature` over `message` was made by this identity (RFC 8032, strict).
    pub fn verify(&self, message: &[u8], signature: &Signature) -> bool {
        let Ok(key) = VerifyingKey::from_bytes(&self.0) else { return false };
        key.verify_strict(message, &ed25519_dalek::Signature::from_bytes(&signature.0)).is_ok()
    }

    /// The key as DER SubjectPublicKeyInfo, what TLS carries as a raw public key.
    pub fn to_spki(&self) -> Vec<u8> {
        [&SPKI_PREFIX[..], &self.0].concat()
    }

    /// Reads [`NodeId::to_spki`]'s form.
    pub fn from_spki(der: &[u8]) -> Result<Self, KeyError> {
        let key = der
            .strip_prefix(&SPKI_PREFIX[..])
            .ok_or(KeyError::Encoding { what: "raw public key", expected: "an Ed25519 SubjectPublicKeyInfo" })?;
        let bytes =
            key.try_into().map_err(|_| KeyError::Length { what: "raw public key", wanted: 32, actual: key.len() })?;
        VerifyingKey::from_bytes(&bytes).map_err(|_| KeyError::NotAPoint)?;
        Ok(Self(bytes))
    }

    /// The first 8 characters, for logs and tables.
    pub fn short(&self) -> String {
        let mut text = self.to_string();
        text.truncate(8);
        text
    }
}

fn base32() -> &'static Encoding {
    static ENCODING: std::sync::OnceLock<Encoding> = std::sync::OnceLock::new();
    ENCODING.get_or_init(|| {
        let mut spec = Specification::new();
        spec.symbols.push_str("abcdefghijklmnopqrstuvwxyz234567");
        spec.translate.from.push_str("ABCDEFGHIJKLMNOPQRSTUVWXYZ");
        spec.translate.to.push_str("abcdefghijklmnopqrstuvwxyz");
        spec.encoding().expect("the alphabet is a valid Base32 specification")
    })
}

/// Encodes bytes as lower-case Base32 without padding.
pub(crate) fn encode_base32(bytes: &[u8]) -> String {
    base32().encode(bytes)
}

/// Decodes [`encode_base32`]'s form, in either case.
pub(crate) fn decode_base32(text: &str) -> Option<Vec<u8>> {
    base32().decode(text.as_bytes()).ok()
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&encode_base32(&self.0))
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeId({})", self.short())
    }
}

impl FromStr for NodeId {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let bytes = decode_base32(text.trim())
            .ok_or(KeyError::Encoding { what: "identity", expected: "52 characters a-z and 2-7" })?;
        let actual = bytes.len();
        let bytes = bytes.try_into().map_err(|_| KeyError::Length { what: "identity", wanted: 32, actual })?;
        VerifyingKey::from_bytes(&bytes).map_err(|_| KeyError::NotAPoint)?;
        Ok(Self(bytes))
    }
}

/// An Ed25519 signature, 64 bytes; Base64 as text.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Signature([u8; 64]);

impl Signature {
    /// Takes 64 bytes as they are.
    pub fn from_bytes(bytes: [u8; 64]) -> Self {
        Self(bytes)
    }

    /// The 64 bytes.
    pub fn as_bytes(&self) -> &[u8; 64] {
        &self.0
    }
}

/// A WireGuard private key (X25519, RFC 7748).
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct PrivateKey([u8; 32]);

impl PrivateKey {
    /// Takes 32 bytes as they are; X25519 clamps them.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes, for the WireGuard engine.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The public half.
    pub fn public_key(&self) -> PublicKey {
        PublicKey(x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from(self.0)).to_bytes())
    }

    /// Proves that whoever is `identity` has this key: see [`PublicKey::is_proved`].
    pub fn prove(&self, identity: NodeId) -> Signature {
        let scalar = Scalar::from_bytes_mod_order(clamp_integer(self.0));
        let mut point = EdwardsPoint::mul_base(&scalar).compress().to_bytes();
        // An X25519 key does not say which of two points it is. XEdDSA takes the one with the sign bit clear.
        let scalar = if point[31] >> 7 == 1 { -scalar } else { scalar };
        point[31] &= 0x7f;
        let mut hash_prefix = [0; 32];
        Hkdf::<Sha256>::new(None, &self.0)
            .expand(PROOF_LABEL, &mut hash_prefix)
            .expect("32 bytes are within HKDF-SHA256's limit of 255 blocks");
        let public = VerifyingKey::from_bytes(&point).expect("a multiple of the base point is a point");
        let expanded = ExpandedSecretKey { scalar, hash_prefix };
        Signature(raw_sign::<Sha512>(&expanded, &proof_message(identity), &public).to_bytes())
    }

    /// The X25519 shared secret with a peer, or none where the peer's key is of low order.
    pub fn agree(&self, peer: &PublicKey) -> Option<SharedSecret> {
        let shared =
            x25519_dalek::StaticSecret::from(self.0).diffie_hellman(&x25519_dalek::PublicKey::from(*peer.as_bytes()));
        shared.was_contributory().then(|| SharedSecret(shared.to_bytes()))
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

/// What two WireGuard keys agree on; key material for keys that both ends derive.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct SharedSecret([u8; 32]);

impl SharedSecret {
    /// Derives a 32-byte key for one purpose (HKDF-SHA256, RFC 5869).
    pub fn derive(&self, label: &[u8]) -> [u8; 32] {
        let mut out = [0; 32];
        Hkdf::<Sha256>::new(None, &self.0)
            .expand(label, &mut out)
            .expect("32 bytes are within HKDF-SHA256's limit of 255 blocks");
        out
    }
}

impl fmt::Debug for SharedSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedSecret(..)")
    }
}

/// What a key signs to prove that `identity` has it.
fn proof_message(identity: NodeId) -> [u8; PROOF_LABEL.len() + 32] {
    let mut message = [0; PROOF_LABEL.len() + 32];
    message[..PROOF_LABEL.len()].copy_from_slice(PROOF_LABEL);
    message[PROOF_LABEL.len()..].copy_from_slice(&identity.0);
    message
}

/// A WireGuard public key (X25519).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// Takes 32 bytes as they are.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Whether `proof` shows that whoever is `identity` has the private half of this key. The identity's own signature
    /// says only that it claims to. The proof is a signature by the X25519 key itself, as XEdDSA makes it (Perrin, The
    /// XEdDSA and VXEdDSA Signature Schemes, 2016).
    pub fn is_proved(&self, identity: NodeId, proof: &Signature) -> bool {
        let point = MontgomeryPoint(self.0).to_edwards(0).map(|point| point.compress().to_bytes());
        let public = point.and_then(|point| VerifyingKey::from_bytes(&point).ok());
        let proof = ed25519_dalek::Signature::from_bytes(&proof.0);
        public.is_some_and(|public| public.verify_strict(&proof_message(identity), &proof).is_ok())
    }
}

/// A WireGuard preshared key: 32 bytes mixed into the handshake.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct PresharedKey([u8; 32]);

impl PresharedKey {
    /// Takes 32 bytes as they are.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes, for the WireGuard engine.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey(..)")
    }
}

fn base64_array<const N: usize>(what: &'static str, expected: &'static str, text: &str) -> Result<[u8; N], KeyError> {
    let bytes = BASE64.decode(text.trim()).map_err(|_| KeyError::Encoding { what, expected })?;
    let actual = bytes.len();
    bytes.try_into().map_err(|_| KeyError::Length { what, wanted: N, actual })
}

impl FromStr for PublicKey {
    type Err = KeyError;
    fn from_str(text: &str) -> Result<Self, KeyError> {
        Ok(Self(base64_array("WireGuard public key", "44 characters of Base64, as `wg pubkey` prints", text)?))
    }
}

impl FromStr for PrivateKey {
    type Err = KeyError;
    fn from_str(text: &str) -> Result<Self, KeyError> {
        Ok(Self(base64_array("WireGuard private key", "44 characters of Base64, as `wg genkey` prints", text)?))
    }
}

impl FromStr for PresharedKey {
    type Err = KeyError;
    fn from_str(text: &str) -> Result<Self, KeyError> {
        Ok(Self(base64_array("preshared key", "44 characters of Base64, as `wg genpsk` prints", text)?))
    }
}

impl FromStr for Signature {
    type Err = KeyError;
    fn from_str(text: &str) -> Result<Self, KeyError> {
        Ok(Self(base64_array("signature", "88 characters of Base64", text)?))
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64.encode(self.0))
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Signature(..)")
    }
}

macro_rules! serde_as_text {
    ($($t:ty),*) => {$(
        impl serde::Serialize for $t {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl<'de> serde::Deserialize<'de> for $t {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str> as serde::Deserialize>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
pub(crate) use serde_as_text;

serde_as_text!(NodeId, PublicKey, Signature);

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(byte: u8) -> Secret {
        Secret::from_bytes([byte; 32])
    }

    #[test]
    fn identity_and_wireguard_keys_are_stable_and_distinct() {
        let a = secret(1);
        assert_eq!(a.identity().id(), secret(1).identity().id());
        assert_ne!(a.identity().id(), secret(2).identity().id());
        assert_ne!(a.wireguard(0).public_key(), a.wireguard(1).public_key());
        assert_ne!(a.wireguard(0).as_bytes(), &a.derive(IDENTITY_LABEL, 0));
    }

    #[test]
    fn text_forms_round_trip_and_truncation_is_named() {
        let id = secret(3).identity().id();
        let text = id.to_string();
        assert_eq!(text.len(), 52);
        assert_eq!(text.parse(), Ok(id));
        assert_eq!(text.to_uppercase().parse(), Ok(id));
        assert!(matches!(text[..50].parse::<NodeId>(), Err(KeyError::Encoding { .. } | KeyError::Length { .. })));
        let key = secret(3).wireguard(0).public_key();
        assert_eq!(key.to_string().parse(), Ok(key));
        assert!("AAAA".parse::<PublicKey>().unwrap_err().to_string().contains("truncated"));
    }

    #[test]
    fn signatures_verify_only_for_their_signer_and_message() {
        let signature = secret(1).identity().sign(b"hello");
        assert!(secret(1).identity().id().verify(b"hello", &signature));
        assert!(!secret(1).identity().id().verify(b"hellp", &signature));
        assert!(!secret(2).identity().id().verify(b"hello", &signature));
    }

    #[test]
    fn spki_round_trips_and_refuses_other_keys() {
        let id = secret(4).identity().id();
        assert_eq!(NodeId::from_spki(&id.to_spki()), Ok(id));
        assert!(NodeId::from_spki(&id.to_spki()[1..]).is_err());
        assert!(NodeId::from_spki(&[]).is_err());
    }

    #[test]
    fn debug_shows_no_secret() {
        let s = secret(7);
        let shown = format!("{s:?} {:?} {:?} {:?}", s.identity(), s.wireguard(0), PresharedKey::from_bytes([7; 32]));
        assert!(!shown.contains("7, 7"), "{shown}");
        assert!(!shown.contains(&BASE64.encode([7; 32])), "{shown}");
    }

    #[test]
    fn both_ends_agree() {
        let (a, b) = (secret(1).wireguard(0), secret(2).wireguard(0));
        let ab = a.agree(&b.public_key()).unwrap().derive(b"x");
        let ba = b.agree(&a.public_key()).unwrap().derive(b"x");
        assert_eq!(ab, ba);
        assert!(a.agree(&PublicKey::from_bytes([0; 32])).is_none());
    }

    #[test]
    fn a_wireguard_key_is_proved_by_its_owner_for_its_own_identity_alone() {
        for byte in 0..40 {
            let secret = Secret::from_bytes([byte; 32]);
            let (id, key) = (secret.identity().id(), secret.wireguard(0));
            let proof = key.prove(id);
            assert!(key.public_key().is_proved(id, &proof), "{byte}");
            let thief = Secret::from_bytes([byte + 1; 32]);
            assert!(!key.public_key().is_proved(thief.identity().id(), &proof), "a copied proof");
            assert!(
                !key.public_key().is_proved(thief.identity().id(), &thief.wireguard(0).prove(thief.identity().id()))
            );
            assert!(!key.public_key().is_proved(id, &secret.identity().sign(&proof_message(id))));
        }
        let proof = Signature::from_bytes([0; 64]);
        for point in [[0; 32], [1; 32], [0xff; 32]] {
            assert!(!PublicKey::from_bytes(point).is_proved(NodeId::from_bytes([0; 32]), &proof));
        }
    }
}
