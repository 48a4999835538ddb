//! Parsing at the border: what all objects have in common.

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use keystone_mesh_api::LEDGER_PREFIX;
use keystone_mesh_core::NodeId;
use keystone_mesh_core::annotations::Decoded;
use keystone_mesh_core::node::{NameError, NodeName};

use super::{Now, ObjectFault};

/// What every named object has.
#[derive(Clone, Debug)]
pub(super) struct Meta {
    pub(super) name: NodeName,
    pub(super) uid: String,
    pub(super) created: Now,
    pub(super) deleting: bool,
}

impl Meta {
    pub(super) fn parse(meta: &ObjectMeta) -> Result<Self, ObjectFault> {
        let name = meta.name.as_deref().unwrap_or_default();
        Ok(Self {
            name: name.parse().map_err(|error: NameError| ObjectFault::Object(error.to_string()))?,
            uid: meta.uid.clone().unwrap_or_default(),
            created: meta.creation_timestamp.as_ref().map_or(0, millis),
            deleting: meta.deletion_timestamp.is_some(),
        })
    }
}

/// Milliseconds since 1970.
pub(crate) fn millis(time: &Time) -> Now {
    u64::try_from(time.0.as_millisecond()).unwrap_or(0)
}

/// What is wrong with the statements that an object carries.
pub(super) fn statement_faults(mesh: &Decoded, ours: NodeId) -> Vec<ObjectFault> {
    let mut faults = Vec::new();
    faults.extend(mesh.record.as_ref().err().cloned().map(ObjectFault::from));
    match &mesh.approval {
        Ok(Some(signed)) if signed.get().network != ours => {
            faults.push(ObjectFault::OtherNetwork { found: signed.get().network, ours });
        }
        Ok(_) => {}
        Err(malformed) => faults.push(malformed.clone().into()),
    }
    faults.extend(mesh.wish_faults.iter().cloned().map(ObjectFault::from));
    faults
}

/// The identity whose record an object carries.
pub(super) fn identity_of(mesh: &Decoded) -> Option<NodeId> {
    mesh.record.as_ref().ok()?.as_ref().map(|signed| signed.get().identity)
}

pub(super) fn page_number(name: &str) -> Option<u32> {
    name.strip_prefix(LEDGER_PREFIX)?.parse().ok()
}

/// Networks in text, without host bits; those that do not read are told.
pub(super) fn networks(texts: &[String], field: &str, faults: &mut Vec<ObjectFault>) -> Vec<IpNet> {
    let mut good = Vec::with_capacity(texts.len());
    for text in texts {
        match text.parse::<IpNet>() {
            Ok(net) => good.push(net.trunc()),
            Err(_) => faults.push(ObjectFault::Object(format!(
                "`{field}`: `{}` is not a network; expected one as in 10.42.1.0/24",
                text.chars().take(60).collect::<String>().escape_debug()
            ))),
        }
    }
    good
}
