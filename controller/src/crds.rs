//! The CustomResourceDefinitions, as `keystone-controller crds` prints them and deploy/crds/ holds them.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use keystone_mesh_api::{JoinToken, Member, Peer};
use kube::CustomResourceExt;

/// Every definition.
pub fn all() -> Vec<CustomResourceDefinition> {
    [JoinToken::crd(), Member::crd(), Peer::crd()].map(described).into()
}

/// A definition as YAML, what `kubectl apply -f` takes.
pub fn yaml(definition: &CustomResourceDefinition) -> Result<String, serde_yaml_ng::Error> {
    serde_yaml_ng::to_string(definition)
}

/// The file of a definition in deploy/crds/.
pub fn file_name(definition: &CustomResourceDefinition) -> String {
    format!("{}.yaml", definition.spec.names.plural)
}

/// The derived schema describes the spec's type and calls the whole "auto-generated"; `kubectl explain` shows the whole
/// first, so the words go there.
fn described(mut definition: CustomResourceDefinition) -> CustomResourceDefinition {
    for version in &mut definition.spec.versions {
        let Some(root) = version.schema.as_mut().and_then(|schema| schema.open_api_v3_schema.as_mut()) else {
            continue;
        };
        let spec = root.properties.as_mut().and_then(|properties| properties.get_mut("spec"));
        root.description = spec.and_then(|spec| spec.description.replace("What is asked for.".to_owned()));
    }
    definition
}
