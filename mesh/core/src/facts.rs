//! Signed statements as readable facts.
//!
//! A record, an approval and the network's document are each a handful of `key=value` facts: the values that stand in
//! Kubernetes annotations and in the gateway's JSON. One signature covers their canonical form: a line that names the
//! kind and version, then every fact as `key=value` and a newline, sorted by key. What is verified is the canonical
//! form of the *parsed* values, so a signature never covers anything else than what a reader acts on.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

use crate::key::{Identity, NodeId, Signature};

/// What was wrong with one field of a statement. A malformed statement is reported field by field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FieldError {
    /// The field is not there.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// The field's text is not what it must be.
    #[error("`{key}`: {why}")]
    Invalid {
        /// The field.
        key: &'static str,
        /// The reason, with what is expected.
        why: String,
    },
    /// The field has more elements or characters than a reader takes.
    #[error("`{key}`: more than {limit} {unit}")]
    TooLong {
        /// The field.
        key: &'static str,
        /// The bound.
        limit: usize,
        /// What is counted.
        unit: &'static str,
    },
    /// The statement is of a version that this program does not read.
    #[error("`{key}`: `{found}` was written by a newer keystone-mesh; upgrade this one to read it")]
    Newer {
        /// The field.
        key: &'static str,
        /// The version that was found.
        found: String,
    },
    /// The signature is not the signer's over these facts.
    #[error("the signature is not that of {signer} over these facts (forged, or changed since)")]
    BadSignature {
        /// Who should have signed.
        signer: NodeId,
    },
}

/// All that was wrong with a statement.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", join(.0, "; "))]
pub struct Malformed(pub Vec<FieldError>);

/// Longest text of one fact, in bytes: a record fits an annotation (256 KiB in all) and a gateway frame many times.
pub const MAX_FACT: usize = 4096;

/// Between the elements of a list.
const SEPARATOR: &str = ", ";

/// The facts of one statement, ready to be signed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts(BTreeMap<&'static str, String>);

impl Facts {
    /// Adds one fact; an empty text is no fact.
    pub fn set(mut self, key: &'static str, value: impl Display) -> Self {
        let value = value.to_string();
        if !value.is_empty() {
            self.0.insert(key, value);
        }
        self
    }

    /// Adds a list, its elements separated by a comma and a space; no element's text has both.
    pub fn set_list<T: Display>(self, key: &'static str, values: &[T]) -> Self {
        self.set(key, join(values, SEPARATOR))
    }

    /// The bytes that the signature covers. `kind` names statement and version, as in `record 1`.
    fn canonical(&self, kind: &str) -> Vec<u8> {
        let mut text = format!("keystone-mesh {kind}\n");
        for (key, value) in &self.0 {
            text.push_str(key);
            text.push('=');
            text.push_str(value);
            text.push('\n');
        }
        text.into_bytes()
    }

    /// Signs the facts.
    pub fn sign(&self, kind: &str, identity: &Identity) -> Signature {
        identity.sign(&self.canonical(kind))
    }

    /// Checks a signature over the facts.
    pub fn verify(&self, kind: &str, signer: NodeId, signature: &Signature) -> Result<(), FieldError> {
        if signer.verify(&self.canonical(kind), signature) { Ok(()) } else { Err(FieldError::BadSignature { signer }) }
    }

    /// The facts and their signature under `signature_key`, as they are stored and sent.
    pub fn into_map(self, signature_key: &str, signature: &Signature) -> BTreeMap<String, String> {
        let mut map: BTreeMap<String, String> =
            self.0.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        map.insert(signature_key.to_owned(), signature.to_string());
        map
    }
}

/// Reads facts out of a map of texts and collects what is wrong with them.
#[derive(Debug)]
pub struct Reader<'a> {
    map: &'a BTreeMap<String, String>,
    errors: Vec<FieldError>,
}

impl<'a> Reader<'a> {
    /// Starts to read.
    pub fn new(map: &'a BTreeMap<String, String>) -> Self {
        Self { map, errors: Vec::new() }
    }

    /// A fact that may be absent.
    pub fn optional<T: FromStr<Err: Display>>(&mut self, key: &'static str) -> Option<T> {
        let text = self.map.get(key)?;
        if text.len() > MAX_FACT {
            self.errors.push(FieldError::TooLong { key, limit: MAX_FACT, unit: "bytes" });
            return None;
        }
        text.parse().map_err(|why: T::Err| self.errors.push(FieldError::Invalid { key, why: why.to_string() })).ok()
    }

    /// A fact that must be there.
    pub fn required<T: FromStr<Err: Display>>(&mut self, key: &'static str) -> Option<T> {
        if !self.map.contains_key(key) {
            self.errors.push(FieldError::Missing(key));
        }
        self.optional(key)
    }

    /// A list as [`Facts::set_list`] writes it, of at most `limit` elements; empty where absent.
    pub fn list<T: FromStr<Err: Display>>(&mut self, key: &'static str, limit: usize) -> Vec<T> {
        let Some(text) = self.map.get(key) else { return Vec::new() };
        let parts: Vec<&str> = text.split(SEPARATOR).collect();
        if text.len() > MAX_FACT || parts.len() > limit {
            self.errors.push(FieldError::TooLong { key, limit, unit: "elements" });
            return Vec::new();
        }
        let mut values = Vec::with_capacity(parts.len());
        for part in parts {
            match part.parse() {
                Ok(value) => values.push(value),
                Err(why) => self.errors.push(FieldError::Invalid { key, why: T::Err::to_string(&why) }),
            }
        }
        values
    }

    /// Adds an error found by the caller.
    pub fn fault(&mut self, error: FieldError) {
        self.errors.push(error);
    }

    /// The value built from the fields, or everything that was wrong with them.
    pub fn finish<T>(self, value: Option<T>) -> Result<T, Malformed> {
        match value {
            Some(value) if self.errors.is_empty() => Ok(value),
            _ => Err(Malformed(self.errors)),
        }
    }
}

/// Joins displayed values.
pub fn join<T: Display>(values: &[T], separator: &str) -> String {
    values.iter().map(ToString::to_string).collect::<Vec<_>>().join(separator)
}

/// Implements serde for a signed statement as the map of its facts.
macro_rules! serde_as_facts {
    ($($t:ty),*) => {$(
        impl serde::Serialize for $t {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                self.to_map().serialize(s)
            }
        }
        impl<'de> serde::Deserialize<'de> for $t {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let map = std::collections::BTreeMap::<String, String>::deserialize(d)?;
                Self::from_map(&map).map_err(serde::de::Error::custom)
            }
        }
    )*};
}
pub(crate) use serde_as_facts;
