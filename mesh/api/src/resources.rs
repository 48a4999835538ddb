//! The custom resources.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// A list of networks. The API server refuses what is none, by a rule of bounded cost: 43 characters is the longest
/// IPv6 prefix in text.
fn networks<const MOST: u32>(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": MOST,
        "items": {"type": "string", "maxLength": 43},
        "x-kubernetes-validations": [{
            "rule": "self.all(network, isCIDR(network))",
            "message": "every entry has to be a network, as in 10.42.0.0/24 or fd00:42::/64",
        }],
    })
}

/// A machine that a token or a person let into the network, whether or not it is a Node (yet).
///
/// While there is no Node of the same name, the Member's annotations carry the machine's record and approval. The
/// gateway makes a Member for every join by token, `keystone-mesh approve` makes one for a Node that waits.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[kube(
    group = "mesh.keystone.cluster",
    version = "v1alpha1",
    kind = "Member",
    plural = "members",
    shortname = "meshmember",
    status = "MemberStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Addresses","type":"string","jsonPath":".status.addresses"}"#,
    printcolumn = r#"{"name":"Approved","type":"string","jsonPath":".status.conditions[?(@.type==\"Approved\")].status"}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type==\"Approved\")].reason"}"#,
    printcolumn = r#"{"name":"Reached","type":"string","jsonPath":".status.conditions[?(@.type==\"Reached\")].status"}"#,
    printcolumn = r#"{"name":"Token","type":"string","jsonPath":".spec.token","priority":1}"#,
    printcolumn = r#"{"name":"Identity","type":"string","jsonPath":".spec.identity","priority":1}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    validation = Rule::new("self.spec.identity == oldSelf.spec.identity").message(
        "the identity of a Member cannot be changed, another identity is another machine: delete the Member first"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct MemberSpec {
    /// The machine's identity, as `keystone-mesh status` shows it there. Cannot be changed: another identity is another
    /// machine.
    #[schemars(regex(pattern = r"^[a-z2-7]{52}$"))]
    pub identity: String,
    /// The join token that let it in, by id; none where a person did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[a-z2-7]{13}$"))]
    pub token: Option<String>,
    /// Networks that the machine may be the way to, beside its Node's podCIDRs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "networks::<64>")]
    pub routes: Vec<String>,
}

/// What the controller thinks of a Member.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MemberStatus {
    /// Its mesh addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
    /// `Approved`: whether the machine is in the network, and why (not). `Node`: whether there is a Node of its name.
    /// `Reached`: False where there is none and the control plane does not reach the machine.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// A machine with stock WireGuard: a laptop, a phone, another site.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[kube(
    group = "mesh.keystone.cluster",
    version = "v1alpha1",
    kind = "Peer",
    plural = "peers",
    shortname = "meshpeer",
    status = "PeerStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Addresses","type":"string","jsonPath":".status.addresses"}"#,
    printcolumn = r#"{"name":"Node","type":"string","jsonPath":".status.node"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].reason"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct PeerSpec {
    /// The machine's WireGuard public key, Base64.
    #[schemars(regex(pattern = r"^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw480]=$"))]
    pub public_key: String,
    /// The Node that serves it: it has to be reachable for the machine. Default: the control plane's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253), regex(pattern = r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$"))]
    pub node: Option<String>,
    /// Where the machine is reached, `HOST:PORT`. Without one it has to come first, as a phone does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 259), regex(pattern = r"^([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[1-9][0-9]{0,4}$"))]
    pub endpoint: Option<String>,
    /// Networks behind the machine, as of another site.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "networks::<32>")]
    pub routes: Vec<String>,
    /// Seconds between keepalives that the serving node sends, 1 to 65535. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub persistent_keepalive: Option<u16>,
}

/// What the controller thinks of a Peer.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PeerStatus {
    /// Its mesh addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
    /// The Node that serves it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// `Ready`: whether its statement is signed and with its node, and why (not).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// A join token. Its secret is kept nowhere; here is the hash, which lets nobody in. Named after the token's id.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[kube(
    group = "mesh.keystone.cluster",
    version = "v1alpha1",
    kind = "JoinToken",
    plural = "jointokens",
    status = "JoinTokenStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Uses","type":"integer","jsonPath":".spec.uses"}"#,
    printcolumn = r#"{"name":"Used","type":"integer","jsonPath":".status.used"}"#,
    printcolumn = r#"{"name":"Names","type":"string","jsonPath":".spec.namePattern"}"#,
    printcolumn = r#"{"name":"Expires","type":"string","jsonPath":".spec.expires"}"#,
    printcolumn = r#"{"name":"Revoked","type":"boolean","jsonPath":".spec.revoked"}"#,
    validation = Rule::new("self.spec.hash == oldSelf.spec.hash")
        .message("the hash of a JoinToken cannot be changed: make another with `keystone-mesh token create`"),
    validation = Rule::new("self.metadata.name.matches('^[a-z2-7]{13}$')")
        .message("a JoinToken is named after its token's id, 13 characters a-z and 2-7; `keystone-mesh token create` does it")
)]
#[serde(rename_all = "camelCase")]
pub struct JoinTokenSpec {
    /// Hash of the secret, as `TokenSecret::hash` gives it, in text form. Cannot be changed.
    #[schemars(length(min = 1, max = 128))]
    pub hash: String,
    /// Until when it is good; none for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<Time>,
    /// How many machines may join with it; none for any number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub uses: Option<u32>,
    /// Which node names it is good for; `*` and `?` stand for characters. None for every name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[-a-z0-9.*?]{1,253}$"))]
    pub name_pattern: Option<String>,
    /// Networks that its machines may be the way to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "networks::<64>")]
    pub routes: Vec<String>,
    /// Whether it was taken back.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub revoked: bool,
}

/// What became of a JoinToken.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct JoinTokenStatus {
    /// How many machines joined with it.
    #[serde(default)]
    pub used: u32,
    /// Which ones: a machine that asks again costs no second use. Of a token for any number, only those of late.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub joined: Vec<String>,
}
