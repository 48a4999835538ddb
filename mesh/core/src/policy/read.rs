//! Policies as the API server gives them.
//!
//! The API server has validated them, but it may be another version's. What does not read, and a word that is not known
//! (which might narrow what is allowed), takes away the smallest piece that it stands in, and never the isolation.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Operator, Peer, Policy, Port, Requirement, Rule, SCTP, Selector, TCP, UDP};

impl Policy {
    /// Reads a policy's `spec`.
    pub fn read(spec: &Value) -> Self {
        let mut faults = Vec::new();
        let (ingress, egress) = directions(spec, &mut faults);
        let pods = read_selector(spec.get("podSelector"), "spec.podSelector").unwrap_or_else(|fault| {
            faults.push(format!("{fault}; every pod of the namespace is taken as selected"));
            Selector::default()
        });
        let ingress = ingress.then(|| rules(spec, "ingress", "from", &mut faults));
        let egress = egress.then(|| rules(spec, "egress", "to", &mut faults));
        Self { pods, ingress, egress, faults }
    }
}

/// Whether it is about ingress, and whether about egress.
fn directions(spec: &Value, faults: &mut Vec<String>) -> (bool, bool) {
    let mut about = (false, false);
    for one in list(spec.get("policyTypes")) {
        match one.as_str() {
            Some("Ingress") => about.0 = true,
            Some("Egress") => about.1 = true,
            Some(_) | None => {
                faults.push(format!("spec.policyTypes: {one} is not known; it is taken as Ingress and Egress"));
                about = (true, true);
            }
        }
    }
    match about {
        // Without types it is about ingress, and about egress where it says something of that.
        (false, false) => (true, list(spec.get("egress")).next().is_some()),
        about => about,
    }
}

fn rules(spec: &Value, direction: &str, peers: &str, faults: &mut Vec<String>) -> Vec<Rule> {
    let mut rules = Vec::new();
    if spec.get(direction).is_some_and(|rules| !rules.is_null() && !rules.is_array()) {
        faults.push(format!("spec.{direction}: not a list"));
    }
    for (place, rule) in list(spec.get(direction)).enumerate() {
        let at = format!("spec.{direction}[{place}]");
        match read_rule(rule, peers, &at, faults) {
            Ok(rule) => rules.push(rule),
            Err(fault) => faults.push(fault),
        }
    }
    rules
}

fn read_rule(rule: &Value, peers: &str, at: &str, faults: &mut Vec<String>) -> Result<Rule, String> {
    let known = |key: &String| key == peers || key == "ports";
    let fields = rule.as_object().ok_or_else(|| format!("{at}: not an object"))?;
    if let Some(unknown) = fields.keys().find(|key| !known(key)) {
        return Err(format!("{at}: `{unknown}` is not known"));
    }
    let peers_at = format!("{at}.{peers}");
    let ports_at = format!("{at}.ports");
    Ok(Rule {
        peers: pieces(fields.get(peers), &peers_at, read_peer, faults)?,
        ports: pieces(fields.get("ports"), &ports_at, read_port, faults)?,
    })
}

/// The pieces of a list that read. An absent or empty list is none and means everything; a list of which nothing reads is
/// a list without pieces and means nothing.
fn pieces<T>(
    value: Option<&Value>,
    at: &str,
    read: fn(&Value, &str) -> Result<T, String>,
    faults: &mut Vec<String>,
) -> Result<Option<Vec<T>>, String> {
    let values = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(values)) if values.is_empty() => return Ok(None),
        Some(Value::Array(values)) => values,
        Some(_) => return Err(format!("{at}: not a list")),
    };
    let mut pieces = Vec::with_capacity(values.len());
    for (place, value) in values.iter().enumerate() {
        match read(value, &format!("{at}[{place}]")) {
            Ok(piece) => pieces.push(piece),
            Err(fault) => faults.push(fault),
        }
    }
    Ok(Some(pieces))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawPeer {
    pod_selector: Option<Value>,
    namespace_selector: Option<Value>,
    ip_block: Option<RawBlock>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBlock {
    cidr: String,
    except: Option<Vec<String>>,
}

fn read_peer(value: &Value, at: &str) -> Result<Peer, String> {
    let raw: RawPeer = parsed(value, at)?;
    match raw {
        RawPeer { pod_selector: None, namespace_selector: None, ip_block: Some(block) } => {
            let net = read_net(&block.cidr, &format!("{at}.ipBlock.cidr"))?;
            let except = block.except.unwrap_or_default();
            let except = except.iter().map(|net| read_net(net, &format!("{at}.ipBlock.except")));
            Ok(Peer::Block { net, except: except.collect::<Result<_, _>>()? })
        }
        RawPeer { ip_block: Some(_), .. } => Err(format!("{at}: ipBlock stands alone or not at all")),
        RawPeer { pod_selector: None, namespace_selector: None, ip_block: None } => {
            Err(format!("{at}: it names nobody; use podSelector, namespaceSelector or ipBlock"))
        }
        RawPeer { pod_selector, namespace_selector, ip_block: None } => {
            let namespaces = namespace_selector
                .map(|selector| read_selector(Some(&selector), &format!("{at}.namespaceSelector")))
                .transpose()?;
            let pods = read_selector(pod_selector.as_ref(), &format!("{at}.podSelector"))?;
            Ok(Peer::Pods { namespaces, pods })
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawPort {
    protocol: Option<String>,
    port: Option<Value>,
    end_port: Option<u16>,
}

fn read_port(value: &Value, at: &str) -> Result<Port, String> {
    let raw: RawPort = parsed(value, at)?;
    let protocol = match raw.protocol.as_deref() {
        None | Some("TCP") => TCP,
        Some("UDP") => UDP,
        Some("SCTP") => SCTP,
        Some(other) => return Err(format!("{at}: protocol `{other}` is not one of TCP, UDP and SCTP")),
    };
    match (raw.port, raw.end_port) {
        (None, None) => Ok(Port::Range(protocol, 0, u16::MAX)),
        (Some(Value::String(name)), None) => Ok(Port::Named(protocol, name)),
        (Some(Value::Number(number)), end) => {
            let low = number.as_u64().and_then(|number| u16::try_from(number).ok());
            let low = low.filter(|low| *low > 0).ok_or_else(|| format!("{at}: port {number} is not 1 to 65535"))?;
            match end.unwrap_or(low) {
                high if high >= low => Ok(Port::Range(protocol, low, high)),
                high => Err(format!("{at}: endPort {high} is before port {low}")),
            }
        }
        (Some(other), None) => Err(format!("{at}: port {other} is neither a number nor a name")),
        (None | Some(_), Some(_)) => Err(format!("{at}: endPort goes with a port that is a number")),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawSelector {
    match_labels: Option<BTreeMap<String, String>>,
    match_expressions: Option<Vec<RawRequirement>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRequirement {
    key: String,
    operator: String,
    values: Option<BTreeSet<String>>,
}

/// A selector that is absent is one without requirements.
fn read_selector(value: Option<&Value>, at: &str) -> Result<Selector, String> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(Selector::default()) };
    let raw: RawSelector = parsed(value, at)?;
    let labels = raw.match_labels.into_iter().flatten();
    let labels = labels.map(|(key, value)| Requirement { key, operator: Operator::In(BTreeSet::from([value])) });
    let mut requirements: Vec<_> = labels.collect();
    for RawRequirement { key, operator, values } in raw.match_expressions.into_iter().flatten() {
        let operator = match (operator.as_str(), values.filter(|values| !values.is_empty())) {
            ("In", Some(values)) => Operator::In(values),
            ("NotIn", Some(values)) => Operator::NotIn(values),
            ("Exists", None) => Operator::Exists,
            ("DoesNotExist", None) => Operator::DoesNotExist,
            (operator, _) => {
                return Err(format!(
                    "{at}: operator `{operator}` of label `{key}`: there are In and NotIn with values, Exists and \
                     DoesNotExist without"
                ));
            }
        };
        requirements.push(Requirement { key, operator });
    }
    // The same requirements in another order are the same selector.
    requirements.sort_unstable();
    requirements.dedup();
    Ok(Selector(requirements))
}

fn read_net(text: &str, at: &str) -> Result<IpNet, String> {
    text.parse::<IpNet>().map(|net| net.trunc()).map_err(|_| format!("{at}: `{text}` is not a CIDR"))
}

fn parsed<T: DeserializeOwned>(value: &Value, at: &str) -> Result<T, String> {
    serde_json::from_value(value.clone()).map_err(|error| format!("{at}: {error}"))
}

fn list(value: Option<&Value>) -> impl Iterator<Item = &Value> {
    value.and_then(Value::as_array).into_iter().flatten()
}
