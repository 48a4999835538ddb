//! What a cloud controller does for fresh Nodes, where the cluster's is off.
//!
//! An approved Node gets a provider ID where it has none (Hetzner's controller takes a Node without one for deleted),
//! the topology labels that follow from provider ID and location, an instance type where its autoscaler knows it, and
//! its mesh addresses where the kubelet found none of its own. Once the view shows all of that, the taint of the absent
//! cloud provider is lifted. What is set already is never changed.
//!
//! | provider ID | region | zone |
//! | --- | --- | --- |
//! | `aws:///eu-west-1a/i-0abc` | `eu-west-1` | `eu-west-1a` |
//! | `hcloud://123`, others | from the location | from the location |
//! | none, location `eu-west-1/eu-west-1a` | `eu-west-1` | `eu-west-1a` |
//! | none, location `office` | `office` | `office` |
//! | none, no location | `home` | `home` |

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::NodeAddress;
use keystone_mesh_core::admission::addresses_of;
use keystone_mesh_core::network::Network;
use keystone_mesh_core::node::NodeName;

use super::action::{Action, Effect, Target};
use super::approvals;
use super::census::{Census, Machine};
use crate::view::{ClusterView, INSTANCE_TYPE, NodeView, REGION, ZONE};

/// Put on by a kubelet that expects a cloud controller.
const UNINITIALIZED: &str = "node.cloudprovider.kubernetes.io/uninitialized";
/// Where a Node stands of which nobody says it.
const HOME: &str = "home";
/// Scheme of our provider IDs: no cloud's controller takes a foreign one for its own.
const SCHEME: &str = "keystone";

/// Initialises Nodes, one step after the other. The taints of those that are `busy` change already.
pub(super) fn act(
    view: &ClusterView,
    network: &Network,
    census: &Census<'_>,
    busy: &BTreeSet<NodeName>,
) -> Vec<Action> {
    if !view.settings().node_init {
        return Vec::new();
    }
    let clouds = Clouds::of(view);
    let machines = census.machines.values().filter(|machine| approvals::stands(machine));
    machines
        .filter_map(|machine| {
            let node = machine.node.filter(|node| !node.deleting)?;
            let host = machine.admitted()?.1;
            let steps = [labels(&clouds, machine, node), addresses(network, node, host)];
            let mut steps: Vec<Action> = steps.into_iter().flatten().collect();
            if steps.is_empty() && !busy.contains(machine.name) {
                steps.extend(done(node));
            }
            Some(steps)
        })
        .flatten()
        .collect()
}

/// What autoscalers know of machines.
struct Clouds<'a> {
    provider_ids: BTreeMap<&'a str, &'a str>,
    types_by_node: BTreeMap<&'a str, &'a str>,
    types_by_provider: BTreeMap<&'a str, &'a str>,
}

impl<'a> Clouds<'a> {
    fn of(view: &'a ClusterView) -> Self {
        let mut clouds =
            Self { provider_ids: BTreeMap::new(), types_by_node: BTreeMap::new(), types_by_provider: BTreeMap::new() };
        for claim in view.claims().filter(|claim| claim.gone.is_none()) {
            let (node, id) = (claim.node.as_deref(), claim.provider_id.as_deref());
            clouds.provider_ids.extend(node.zip(id));
            clouds.types_by_node.extend(node.zip(claim.instance_type.as_deref()));
            clouds.types_by_provider.extend(id.zip(claim.instance_type.as_deref()));
        }
        clouds
    }
}

fn labels(clouds: &Clouds<'_>, machine: &Machine<'_>, node: &NodeView) -> Option<Action> {
    let location = node.mesh.wishes.location.as_ref().map(|location| location.as_str());
    let name = node.name.as_str();
    let known = node.provider_id.clone().or_else(|| clouds.provider_ids.get(name).map(|id| (*id).to_owned()));
    let id = known.unwrap_or_else(|| format!("{SCHEME}://{}/{name}", location.unwrap_or(HOME)));
    let mut wanted: BTreeMap<String, String> = BTreeMap::new();
    if let Some((region, zone)) = topology(&id, name, location) {
        wanted.insert(REGION.to_owned(), region);
        wanted.insert(ZONE.to_owned(), zone);
    }
    let of_machine =
        clouds.types_by_provider.get(id.as_str()).or_else(|| clouds.types_by_node.get(machine.name.as_str()));
    wanted.extend(of_machine.map(|kind| (INSTANCE_TYPE.to_owned(), (*kind).to_owned())));
    wanted.retain(|label, _| !node.labels.contains_key(label));
    let provider_id = node.provider_id.is_none().then_some(id);
    if wanted.is_empty() && provider_id.is_none() {
        return None;
    }
    let target = Target { name: node.name.clone(), uid: node.uid.clone() };
    let reason = "initialises it: provider ID and labels that are absent".to_owned();
    Some(Action { effect: Effect::NodeInit { target, labels: wanted, provider_id }, reason, events: Vec::new() })
}

/// Region and zone that a provider ID tells; else those that the location tells.
fn topology(provider_id: &str, name: &str, location: Option<&str>) -> Option<(String, String)> {
    let (scheme, rest) = provider_id.split_once("://")?;
    let of_aws = || {
        let zone = rest.trim_start_matches('/').split('/').next()?;
        Some((aws_region(zone)?, zone.to_owned()))
    };
    let own = || rest.strip_suffix(name)?.strip_suffix('/');
    match scheme {
        "aws" => of_aws(),
        SCHEME => own().map(split),
        _ => location.map(split),
    }
    .filter(|(region, zone)| is_label_value(region) && is_label_value(zone))
}

/// The region of an AWS zone: `us-gov-west-1a` and the local zone `us-west-2-lax-1a` are of `us-gov-west-1` and
/// `us-west-2`: everything up to the first number.
fn aws_region(zone: &str) -> Option<String> {
    let mut words = Vec::new();
    for word in zone.split('-') {
        let digits: String = word.chars().take_while(char::is_ascii_digit).collect();
        if !digits.is_empty() {
            words.push(digits);
            return (words.len() > 2).then(|| words.join("-"));
        }
        words.push(word.to_owned());
    }
    None
}

/// `REGION/ZONE`, or one word that is both.
fn split(location: &str) -> (String, String) {
    let (region, zone) = location.split_once('/').unwrap_or((location, location));
    (region.to_owned(), zone.replace('/', "."))
}

fn is_label_value(text: &str) -> bool {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    text.len() <= 63
        && edge(text.chars().next())
        && edge(text.chars().last())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

/// The mesh addresses, where the kubelet waits for a cloud controller to tell it any.
fn addresses(network: &Network, node: &NodeView, host: u32) -> Option<Action> {
    let waits = node.taints.iter().any(|taint| taint.key == UNINITIALIZED);
    if !waits || node.addresses.iter().any(|address| address.type_ == "InternalIP") {
        return None;
    }
    let of = |type_: &str, address: String| NodeAddress { type_: type_.to_owned(), address };
    let mesh = addresses_of(network, host).into_iter().map(|net| of("InternalIP", net.addr().to_string()));
    let mut addresses: Vec<NodeAddress> = mesh.chain(node.addresses.iter().cloned()).collect();
    if !addresses.iter().any(|address| address.type_ == "Hostname") {
        addresses.push(of("Hostname", node.name.to_string()));
    }
    let target = Target { name: node.name.clone(), uid: node.uid.clone() };
    let reason = "initialises it: it has no address but those of the mesh".to_owned();
    Some(Action { effect: Effect::NodeAddresses { target, addresses }, reason, events: Vec::new() })
}

/// Lifts the taint of the absent cloud provider.
fn done(node: &NodeView) -> Option<Action> {
    let wanted: Vec<_> = node.taints.iter().filter(|taint| taint.key != UNINITIALIZED).cloned().collect();
    if wanted.len() == node.taints.len() {
        return None;
    }
    let target = Target { name: node.name.clone(), uid: node.uid.clone() };
    let reason = "it is initialised".to_owned();
    Some(Action {
        effect: Effect::NodeTaints { target, seen: node.taints.clone(), wanted },
        reason,
        events: Vec::new(),
    })
}
