//! The network configuration on stdin.
//!
//! Every key is known or refused by its name, but for those that runtimes add (`runtimeConfig`, `prevResult`, `cni.dev/*`):
//! a misspelt option is told at the first pod and not looked for after the first outage.

use std::path::PathBuf;

use ipnet::IpNet;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{Code, Dns, Error, Result, Version};
use crate::attachment::Mac;
use crate::facts;

/// Where leases are kept, unless the configuration says otherwise.
pub const DEFAULT_DATA_DIR: &str = "/var/lib/cni/keystone-cni";

/// The name of this plugin, also as the `type` of its IPAM.
const PLUGIN: &str = "keystone-cni";

/// The smallest MTU of IPv4 (RFC 791) and the largest of Linux' veth.
const MTU: std::ops::RangeInclusive<u32> = 68..=65535;

/// A directory is named after the network; a file name has 255 bytes at most.
const MAX_NETWORK_NAME: usize = 200;

/// A key of a configuration that is used here, as docs/cni.md has it.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// What holds without it; empty where it has to be there.
    pub default: &'static str,
    /// What it does.
    pub meaning: &'static str,
}

const fn key(name: &'static str, default: &'static str, meaning: &'static str) -> Key {
    Key { name, default, meaning }
}

/// All of them; a key of an object is written with a dot.
pub const KEYS: [Key; 10] = [
    key("cniVersion", "", "the version of CNI: 0.3.0, 0.3.1, 0.4.0, 1.0.0 or 1.1.0; GC and STATUS need 1.1.0"),
    key("name", "", "the network's name; leases are kept by it"),
    key("type", "", "`keystone-cni`"),
    key(
        "mode",
        "`pod-network`",
        "`pod-network` gives pods their interface; `helper` stands last in another plugin's list and fits that plugin's \
         interface to the mesh",
    ),
    key("mtu", "the facts'", "MTU of pods' interfaces in bytes, 68 to 65535; 1280 and more with IPv6"),
    key("facts", "`/run/keystone-mesh/pods.json`", "where the daemon writes what it knows about pods"),
    key("dataDir", "`/var/lib/cni/keystone-cni`", "where leases are kept"),
    key(
        "ipam.type",
        "`keystone-cni`",
        "who gives out addresses: this plugin, or another IPAM plugin in `CNI_PATH`, `host-local` for example",
    ),
    key(
        "ipam.ranges",
        "the node's pod CIDRs",
        "prefixes for pods, several of either family; a pod gets one address of each family",
    ),
    key(
        "runtimeConfig",
        "",
        "from the runtime: `ips` and `mac` that a pod asks for, where `capabilities` announces them",
    ),
];

/// Keys that the specification or runtimes put in and that need nothing from us.
const FOREIGN_KEYS: [&str; 4] = ["args", "capabilities", "dns", "cniVersions"];

/// One network, as its administrator and the runtime describe it.
#[derive(Debug, Clone)]
pub struct Config {
    /// The version that the result has to have.
    pub version: Version,
    /// Name of the network, fit to name a directory.
    pub network: String,
    /// What this plugin is in the network.
    pub mode: Mode,
    /// MTU of pods in bytes, instead of the facts'.
    pub mtu: Option<u32>,
    /// Where the daemon's facts are.
    pub facts: PathBuf,
    /// Where leases are kept.
    pub data_dir: PathBuf,
    /// Who gives out addresses.
    pub ipam: Ipam,
    /// Handed on to the runtime as it is.
    pub dns: Dns,
    /// What the runtime asks for one container.
    pub runtime: RuntimeConfig,
    /// The result of the plugins before us, or of ADD.
    pub previous: Option<Value>,
    /// GC: what stays.
    pub valid: Option<Vec<ValidAttachment>>,
    /// The configuration as it came, for delegated plugins.
    pub raw: Vec<u8>,
}

/// What the plugin is in its network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// It gives pods their interface.
    #[default]
    PodNetwork,
    /// It stands last in somebody else's list and fits their interface to the mesh.
    Helper,
}

/// Who gives out addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ipam {
    /// This plugin, from these ranges, or from the pod CIDRs of the facts where there are none.
    Own(Vec<IpNet>),
    /// Another plugin, by the name of its program.
    Delegated(String),
}

/// Capabilities that the runtime may use for one container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct RuntimeConfig {
    /// Addresses asked for, one of a family at most; with or without a prefix length.
    pub ips: Vec<String>,
    /// The hardware address asked for.
    pub mac: Option<Mac>,
}

/// An attachment that GC keeps.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ValidAttachment {
    /// The container.
    #[serde(rename = "containerID")]
    pub container: String,
    /// Its interface.
    pub ifname: String,
}

impl Config {
    /// Reads and checks a configuration. The errors name the key.
    pub fn parse(raw: Vec<u8>) -> Result<Self> {
        let mut keys: Map<String, Value> = serde_json::from_slice(&raw).map_err(|error| {
            Error::new(Code::Decode, format!("the network configuration on stdin is no JSON object: {error}"))
        })?;
        let version = version_of(&keys)?;
        reject_unknown("", &keys, |key| is_ours(key) || FOREIGN_KEYS.contains(&key) || is_injected(key))?;
        let network: String = take(&mut keys, "name")?
            .ok_or_else(|| invalid("the configuration has no \"name\": give the network one"))?;
        if !is_name(&network) || network.len() > MAX_NETWORK_NAME {
            return Err(invalid(format!(
                "the network's \"name\" is {network:?}: up to {MAX_NETWORK_NAME} letters, digits, `_`, `.`, `-`, beginning with a letter or digit"
            )));
        }
        let config = Self {
            version,
            network,
            mode: take(&mut keys, "mode")?.unwrap_or_default(),
            mtu: take(&mut keys, "mtu")?,
            facts: absolute(&mut keys, "facts", facts::DEFAULT_PATH)?,
            data_dir: absolute(&mut keys, "dataDir", DEFAULT_DATA_DIR)?,
            ipam: ipam(take(&mut keys, "ipam")?.unwrap_or_default())?,
            dns: take(&mut keys, "dns")?.unwrap_or_default(),
            runtime: take(&mut keys, "runtimeConfig")?.unwrap_or_default(),
            previous: keys.remove("prevResult").filter(|previous| !previous.is_null()),
            valid: valid(&mut keys)?,
            raw,
        };
        match config.mtu {
            Some(mtu) if !MTU.contains(&mtu) => {
                Err(invalid(format!("\"mtu\" is {mtu}: it has to be between {} and {}", MTU.start(), MTU.end())))
            }
            _ => Ok(config),
        }
    }

    /// The version that an answer to `raw` should have, however wrong the rest is.
    pub fn version_of(raw: &[u8]) -> Version {
        let keys: Option<Map<String, Value>> = serde_json::from_slice(raw).ok();
        keys.and_then(|keys| version_of(&keys).ok()).unwrap_or(Version::LATEST)
    }
}

/// The form that the specification gives to container IDs and names of networks.
pub(super) fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|first| first.is_ascii_alphanumeric())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

fn version_of(keys: &Map<String, Value>) -> Result<Version> {
    match keys.get("cniVersion") {
        Some(Value::String(version)) => Version::parse(version),
        Some(other) => Err(Error::new(
            Code::Decode,
            format!("\"cniVersion\" is {other}: it has to be text, \"1.1.0\" for example"),
        )),
        None => Err(Error::new(Code::IncompatibleVersion, "the configuration has no \"cniVersion\": add \"1.1.0\"")),
    }
}

/// A key's part before the dot: what is inside an object is looked at with the object.
fn is_ours(key: &str) -> bool {
    KEYS.iter().any(|known| known.name.split('.').next() == Some(key))
}

/// `cni.dev/*` is the specification's own; the rest is what libcni adds for one call.
fn is_injected(key: &str) -> bool {
    key.starts_with("cni.dev/") || matches!(key, "runtimeConfig" | "prevResult")
}

fn reject_unknown(place: &str, keys: &Map<String, Value>, known: impl Fn(&str) -> bool) -> Result<()> {
    let Some((key, value)) = keys.iter().find(|(key, _)| !known(key)) else { return Ok(()) };
    let mut shown = value.to_string();
    if shown.len() > 200 {
        shown.truncate(shown.floor_char_boundary(200));
        shown.push_str("...");
    }
    Err(Error::new(
        Code::UnsupportedField,
        format!(
            "the configuration's key \"{place}{key}\" with the value {shown} is not known: remove it, or correct its name"
        ),
    ))
}

fn take<T: DeserializeOwned>(keys: &mut Map<String, Value>, key: &str) -> Result<Option<T>> {
    take_from("", keys, key)
}

fn take_from<T: DeserializeOwned>(place: &str, keys: &mut Map<String, Value>, key: &str) -> Result<Option<T>> {
    match keys.remove(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => serde_json::from_value(value)
            .map(Some)
            .map_err(|error| invalid(format!("the configuration's \"{place}{key}\" is not as it should be: {error}"))),
    }
}

fn absolute(keys: &mut Map<String, Value>, key: &str, default: &str) -> Result<PathBuf> {
    let path: PathBuf = take(keys, key)?.unwrap_or_else(|| default.into());
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(invalid(format!("\"{key}\" is {path:?}: it has to be an absolute path")))
    }
}

fn ipam(mut keys: Map<String, Value>) -> Result<Ipam> {
    let plugin: Option<String> = take_from("ipam.", &mut keys, "type")?;
    match plugin {
        Some(plugin) if plugin != PLUGIN => {
            // It becomes the name of a program that is searched in CNI_PATH.
            if is_name(&plugin) {
                Ok(Ipam::Delegated(plugin))
            } else {
                Err(invalid(format!("\"ipam.type\" is {plugin:?}, which is no name of a plugin")))
            }
        }
        Some(_) | None => {
            reject_unknown("ipam.", &keys, |key| key == "ranges")?;
            let ranges: Vec<IpNet> = take_from("ipam.", &mut keys, "ranges")?.unwrap_or_default();
            Ok(Ipam::Own(ranges))
        }
    }
}

/// GC's list. libcni writes an empty one as null; a missing one is never taken for an empty one, which would remove all.
fn valid(keys: &mut Map<String, Value>) -> Result<Option<Vec<ValidAttachment>>> {
    const KEY: &str = "cni.dev/valid-attachments";
    if keys.get(KEY).is_some_and(Value::is_null) { Ok(Some(Vec::new())) } else { take(keys, KEY) }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(Code::InvalidConfig, message)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(change: impl FnOnce(&mut Map<String, Value>)) -> Result<Config> {
        let mut config = json!({ "cniVersion": "1.1.0", "name": "pods", "type": "keystone-cni" });
        change(config.as_object_mut().unwrap());
        Config::parse(config.to_string().into_bytes())
    }

    fn with(key: &str, value: Value) -> Result<Config> {
        let mut value = Some(value);
        parse(|config| {
            config.insert(key.into(), value.take().unwrap());
        })
    }

    #[test]
    fn three_keys_make_a_network() {
        let config = parse(|_| {}).unwrap();
        assert_eq!(config.ipam, Ipam::Own(vec![]));
        assert_eq!((config.mode, config.mtu), (Mode::PodNetwork, None));
        assert_eq!(config.facts.to_str(), Some(facts::DEFAULT_PATH));
    }

    #[test]
    fn what_runtimes_add_is_no_unknown_key() {
        for key in ["cni.dev/attachments", "cni.dev/anything", "args", "capabilities"] {
            assert!(with(key, json!({})).is_ok(), "{key}");
        }
        let runtime = json!({ "ips": ["10.0.0.9/24"], "mac": "02:00:00:00:00:09", "portMappings": [{}] });
        let config = with("runtimeConfig", runtime).unwrap();
        assert_eq!(config.runtime.ips, ["10.0.0.9/24"]);
        assert_eq!(config.runtime.mac.unwrap().to_string(), "02:00:00:00:00:09");
    }

    #[test]
    fn an_unknown_key_is_refused_by_name_and_value() {
        let error = with("ipMasq", json!(true)).unwrap_err();
        assert!(error.is(Code::UnsupportedField), "{error}");
        assert!(error.message.contains("\"ipMasq\"") && error.message.contains("true"), "{error}");
        let error = with("ipam", json!({ "type": "keystone-cni", "subnet": "10.0.0.0/24" })).unwrap_err();
        assert!(error.is(Code::UnsupportedField) && error.message.contains("ipam.subnet"), "{error}");
        let error = with("x", json!("é".repeat(10_000))).unwrap_err();
        assert!(error.message.len() < 500);
    }

    #[test]
    fn each_wrong_value_has_its_code_and_names_its_key() {
        for (key, value, code) in [
            ("cniVersion", json!("0.2.0"), Code::IncompatibleVersion),
            ("cniVersion", json!("2.0.0"), Code::IncompatibleVersion),
            ("cniVersion", json!(1.1), Code::Decode),
            ("name", json!("../pods"), Code::InvalidConfig),
            ("name", json!(""), Code::InvalidConfig),
            ("mtu", json!(67), Code::InvalidConfig),
            ("mtu", json!(65536), Code::InvalidConfig),
            ("mtu", json!("1280"), Code::InvalidConfig),
            ("mode", json!("helpful"), Code::InvalidConfig),
            ("facts", json!("pods.json"), Code::InvalidConfig),
            ("dataDir", json!(7), Code::InvalidConfig),
            ("ipam", json!({ "type": "../../bin/sh" }), Code::InvalidConfig),
            ("ipam", json!({ "type": "keystone-cni", "ranges": ["10.0.0.0"] }), Code::InvalidConfig),
            ("ipam", json!([]), Code::InvalidConfig),
            ("runtimeConfig", json!({ "mac": "zz" }), Code::InvalidConfig),
            ("cni.dev/valid-attachments", json!([{ "containerID": "a" }]), Code::InvalidConfig),
        ] {
            let error = with(key, value.clone()).unwrap_err();
            assert!(error.is(code), "{key}: {value}: {error}");
            let named = if key.starts_with("cniVersion") { "CNI" } else { key };
            assert!(error.message.to_lowercase().contains(&named.to_lowercase()), "{key}: {value}: {error}");
        }
        assert!(Config::parse(b"{".to_vec()).unwrap_err().is(Code::Decode));
        assert!(Config::parse(b"[]".to_vec()).unwrap_err().is(Code::Decode));
        assert!(Config::parse(vec![0xff]).unwrap_err().is(Code::Decode));
    }

    #[test]
    fn a_list_of_valid_attachments_that_is_missing_is_not_an_empty_one() {
        assert_eq!(parse(|_| {}).unwrap().valid, None);
        assert_eq!(with("cni.dev/valid-attachments", Value::Null).unwrap().valid, Some(vec![]));
        let one = with("cni.dev/valid-attachments", json!([{ "containerID": "a", "ifname": "eth0" }])).unwrap();
        assert_eq!(one.valid.unwrap()[0].container, "a");
    }

    #[test]
    fn an_error_answers_in_the_version_that_was_asked() {
        assert_eq!(Config::version_of(br#"{"cniVersion":"0.4.0","name":3}"#), Version::V0_4_0);
        assert_eq!(Config::version_of(b"nonsense"), Version::LATEST);
    }
}
