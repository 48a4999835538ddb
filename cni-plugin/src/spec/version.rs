//! Versions of CNI and what differs between them.

use serde_json::{Value, json};

use super::{Code, Error, Result};

/// A version of the specification that is spoken here, oldest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 0.3.0, the same on the wire as 0.3.1.
    V0_3_0,
    /// 0.3.1: addresses in a list, with their interface.
    V0_3_1,
    /// 0.4.0: CHECK, and the previous result in DEL.
    V0_4_0,
    /// 1.0.0: addresses no longer say their family.
    V1_0_0,
    /// 1.1.0: GC and STATUS, the MTU of interfaces and routes.
    V1_1_0,
}

impl Version {
    /// All of them, oldest first.
    pub const ALL: [Self; 5] = [Self::V0_3_0, Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];

    /// The newest.
    pub const LATEST: Self = Self::V1_1_0;

    /// As configurations write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// The version that `text` names.
    pub fn parse(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|version| version.as_str() == text).ok_or_else(|| {
            let spoken = Self::ALL.map(Self::as_str).join(", ");
            Error::new(
                Code::IncompatibleVersion,
                format!("CNI version {text:?} is not spoken here: set \"cniVersion\" to one of {spoken}"),
            )
        })
    }

    /// The answer to VERSION.
    pub fn supported() -> Value {
        json!({ "cniVersion": Self::LATEST.as_str(), "supportedVersions": Self::ALL.map(Self::as_str) })
    }

    /// Results give each address its family as `"version": "4"`.
    pub fn addresses_have_family(self) -> bool {
        self <= Self::V0_4_0
    }

    /// Interfaces and routes may carry an MTU.
    pub fn has_mtu(self) -> bool {
        self >= Self::V1_1_0
    }

    /// The runtime may call CHECK.
    pub fn has_check(self) -> bool {
        self >= Self::V0_4_0
    }

    /// The runtime may call GC and STATUS.
    pub fn has_gc_and_status(self) -> bool {
        self >= Self::V1_1_0
    }
}
