//! What ADD answers, in every version.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Code, Error, Result, Version};

/// A successful ADD, ours or that of the plugins before us.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Success {
    /// Interfaces that were made, on both sides.
    pub interfaces: Vec<Interface>,
    /// Addresses of the container.
    pub ips: Vec<Ip>,
    /// Routes in the container.
    pub routes: Vec<Route>,
    /// Name servers; nothing of ours.
    pub dns: Dns,
}

/// An interface of a result.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its hardware address as text.
    pub mac: String,
    /// Its MTU in bytes.
    pub mtu: Option<u32>,
    /// Path of its network namespace; empty on the host.
    pub sandbox: String,
}

/// An address of a result.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Ip {
    /// With its prefix length.
    pub address: IpNet,
    /// The gateway.
    #[serde(default)]
    pub gateway: Option<IpAddr>,
    /// Index into [`Success::interfaces`].
    #[serde(default)]
    pub interface: Option<usize>,
}

/// A route of a result.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Route {
    /// Destination.
    pub dst: IpNet,
    /// Next hop.
    #[serde(default)]
    pub gw: Option<IpAddr>,
    /// The largest packet in bytes on this route, where it differs from the interface's.
    #[serde(default)]
    pub mtu: Option<u32>,
}

/// Name servers, as the specification has them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Addresses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// The local domain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Search list.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Options of the resolver.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl Success {
    /// Reads a result; `of` says whose, for the error.
    pub fn parse(of: &str, json: &Value) -> Result<Self> {
        let result: Self = Self::deserialize(json)
            .map_err(|error| Error::new(Code::Decode, format!("{of} is no CNI result: {error}")))?;
        match result.ips.iter().filter_map(|ip| ip.interface).find(|index| *index >= result.interfaces.len()) {
            Some(index) => Err(Error::new(
                Code::Decode,
                format!("{of} has an address of interface {index}, and {} interfaces", result.interfaces.len()),
            )),
            None => Ok(result),
        }
    }

    /// What goes to stdout.
    pub fn to_json(&self, version: Version) -> Value {
        json!({
            "cniVersion": version.as_str(),
            "interfaces": self.interfaces.iter().map(|interface| interface.to_json(version)).collect::<Vec<_>>(),
            "ips": self.ips.iter().map(|ip| ip.to_json(version)).collect::<Vec<_>>(),
            "routes": self.routes.iter().map(|route| route.to_json(version)).collect::<Vec<_>>(),
            "dns": self.dns,
        })
    }
}

impl Interface {
    fn to_json(&self, version: Version) -> Value {
        let mut json = Map::new();
        json.insert("name".into(), self.name.clone().into());
        if !self.mac.is_empty() {
            json.insert("mac".into(), self.mac.clone().into());
        }
        if let Some(mtu) = self.mtu.filter(|_| version.has_mtu()) {
            json.insert("mtu".into(), mtu.into());
        }
        if !self.sandbox.is_empty() {
            json.insert("sandbox".into(), self.sandbox.clone().into());
        }
        json.into()
    }
}

impl Ip {
    fn to_json(&self, version: Version) -> Value {
        let mut json = Map::new();
        if version.addresses_have_family() {
            json.insert("version".into(), if self.address.addr().is_ipv4() { "4" } else { "6" }.into());
        }
        json.insert("address".into(), self.address.to_string().into());
        if let Some(gateway) = self.gateway {
            json.insert("gateway".into(), gateway.to_string().into());
        }
        if let Some(interface) = self.interface {
            json.insert("interface".into(), interface.into());
        }
        json.into()
    }
}

impl Route {
    fn to_json(&self, version: Version) -> Value {
        let mut json = Map::new();
        json.insert("dst".into(), self.dst.to_string().into());
        if let Some(gw) = self.gw {
            json.insert("gw".into(), gw.to_string().into());
        }
        if let Some(mtu) = self.mtu.filter(|_| version.has_mtu()) {
            json.insert("mtu".into(), mtu.into());
        }
        json.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn success() -> Success {
        Success {
            interfaces: vec![
                Interface {
                    name: "ks0".into(),
                    mac: "02:6b:73:00:00:01".into(),
                    mtu: Some(1280),
                    sandbox: String::new(),
                },
                Interface { name: "eth0".into(), mac: String::new(), mtu: Some(1280), sandbox: "/run/netns/a".into() },
            ],
            ips: vec![Ip {
                address: "10.244.1.2/32".parse().unwrap(),
                gateway: Some("169.254.1.1".parse().unwrap()),
                interface: Some(1),
            }],
            routes: vec![Route {
                dst: "0.0.0.0/0".parse().unwrap(),
                gw: Some("169.254.1.1".parse().unwrap()),
                mtu: None,
            }],
            dns: Dns::default(),
        }
    }

    #[test]
    fn old_versions_name_the_family_and_new_ones_the_mtu() {
        for version in Version::ALL {
            let json = success().to_json(version);
            assert_eq!(json["cniVersion"], version.as_str());
            assert_eq!(json["ips"][0].get("version").is_some(), version <= Version::V0_4_0, "{version:?}");
            assert_eq!(json["interfaces"][1].get("mtu").is_some(), version == Version::V1_1_0, "{version:?}");
            assert_eq!(json["interfaces"][0].get("sandbox"), None);
            assert_eq!(json["dns"], json!({}));
        }
    }

    #[test]
    fn a_result_is_read_back_whatever_else_is_in_it() {
        let mut json = success().to_json(Version::V1_1_0);
        assert_eq!(Success::parse("it", &json).unwrap(), success());
        json["interfaces"][0]["socketPath"] = "/run/x".into();
        json["unknown"] = 1.into();
        assert_eq!(Success::parse("it", &json).unwrap(), success());
    }

    #[test]
    fn an_address_of_an_interface_that_is_not_listed_is_a_fault() {
        let mut json = success().to_json(Version::V1_0_0);
        json["ips"][0]["interface"] = 2.into();
        assert!(Success::parse("prevResult", &json).unwrap_err().message.contains("interface 2"));
        json["ips"][0]["interface"] = (-1).into();
        assert!(Success::parse("prevResult", &json).unwrap_err().is(Code::Decode));
    }
}
