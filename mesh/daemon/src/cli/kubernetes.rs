//! `kubernetes secret` and `approve`.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use base64::Engine as _;
use k8s_openapi::api::core::v1::Node;
use keystone_mesh_api::{GATEWAY_MANAGER, Member, MemberSpec, NETWORK_KEY_FIELD, NETWORK_KEY_SECRET};
use keystone_mesh_core::annotations;
use keystone_mesh_core::directory::Carrier;
use keystone_mesh_core::node::{NodeName, NodeRecord};
use kube::api::{Api, DeleteParams, PostParams, Preconditions};
use kube::{Client, ResourceExt as _};
use zeroize::Zeroizing;

use super::ApproveArgs;
use super::output::{complain_of, print, print_json};
use crate::config::Places;
use crate::kube_api::access::Access;
use crate::kube_api::words;
use crate::state::StateDir;

/// Fewer characters of an identity could be another's by chance, or by somebody's effort.
const SHORTEST_FINGERPRINT: usize = 8;

/// Prints what the controller needs to sign for the network.
pub(super) fn secret(places: &Places, namespace: &str) -> anyhow::Result<()> {
    let state = StateDir::read_only(&places.state_dir);
    let control_plane = state.membership()?.is_some_and(|membership| membership.control_plane);
    ensure!(control_plane, "this machine is not the control plane of a network; run this on that host");
    let secret = state.secret()?.context("the secret is missing")?;
    let seed = Zeroizing::new(base64::engine::general_purpose::STANDARD.encode(*secret.identity().seed()));
    // A Secret's data is Base64 once more; as stringData the API server does that. The DaemonSet's pods need the label where
    // the cluster's default level is a stricter one.
    let manifest = Zeroizing::new(format!(
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {namespace}\n  labels:\n    \
         pod-security.kubernetes.io/enforce: privileged\n---\napiVersion: v1\nkind: Secret\nmetadata:\n  name: \
         {NETWORK_KEY_SECRET}\n  namespace: {namespace}\ntype: Opaque\nstringData:\n  {NETWORK_KEY_FIELD}: {}\n",
        *seed
    ));
    complain_of(
        "This is the network's signing key: whoever has it lets machines in. Pipe it to `kubectl apply --server-side --filename -`, \
         and keep it in no file. The controller reads it; run that on control-plane nodes alone.\n",
    );
    print(&manifest)
}

/// Lets a machine in: makes the Member that vouches for the identity which waits.
pub(super) async fn approve(args: &ApproveArgs) -> anyhow::Result<()> {
    for route in &args.routes {
        ensure!(route.trunc() == *route, "--route {route} has host bits set; did you mean {}?", route.trunc());
    }
    let access = Access::find(args.kubeconfig.clone().or_else(own_kubeconfig).as_deref(), None)?;
    let client = access.client().await?;
    let waiting = waiting(&client, &args.name).await?;
    let identity = waiting.identity.to_string();
    if let Some(wanted) = &args.identity {
        check_fingerprint(wanted, &identity, &args.name)?;
    }
    let members = Api::<Member>::all(client);
    let there = members.get_opt(args.name.as_str()).await.map_err(|error| anyhow::anyhow!(words(&error)))?;
    let spec = MemberSpec {
        identity: identity.clone(),
        token: None,
        routes: args.routes.iter().map(ToString::to_string).collect(),
    };
    match there {
        Some(member) if member.spec.identity == identity && args.routes.is_empty() => {}
        Some(member) => {
            if member.spec.identity != identity && args.identity.is_none() {
                bail!(
                    "`{name}` is a member with another identity, {}; the machine that is there has {identity}. If it was \
                     reinstalled or replaced, compare that with `keystone-mesh status` on it and run `keystone-mesh approve {name} \
                     --identity {identity}`",
                    member.spec.identity,
                    name = args.name
                );
            }
            // A Member's identity cannot be changed: another identity is another machine, and another Member.
            let preconditions = Some(Preconditions { uid: member.uid(), resource_version: None });
            let params = DeleteParams { preconditions, ..DeleteParams::default() };
            members.delete(args.name.as_str(), &params).await.map_err(|error| anyhow::anyhow!(words(&error)))?;
            create(&members, &args.name, spec, &member).await?;
        }
        None => create(&members, &args.name, spec, &Member::default_for(&args.name)).await?,
    }
    if args.json {
        return print_json(&serde_json::json!({ "name": args.name, "identity": identity, "routes": args.routes }));
    }
    print(&format!(
        "`{}` is let in with identity {identity}; the controller gives it its addresses (kubectl get members)\n",
        args.name
    ))
}

/// Makes the Member; the annotations of the one in whose place it comes stay, for a machine that is no Node.
async fn create(members: &Api<Member>, name: &NodeName, spec: MemberSpec, before: &Member) -> anyhow::Result<()> {
    let mut member = Member::new(name.as_str(), spec);
    member.metadata.annotations.clone_from(&before.metadata.annotations);
    let params = PostParams { field_manager: Some(GATEWAY_MANAGER.into()), ..PostParams::default() };
    let created = members.create(&params, &member).await;
    created.map(drop).map_err(|error| anyhow::anyhow!(words(&error)))
}

trait Bare {
    fn default_for(name: &NodeName) -> Self;
}

impl Bare for Member {
    fn default_for(name: &NodeName) -> Self {
        Self::new(name.as_str(), MemberSpec::default())
    }
}

/// The record that stands on the Node of this name, or on its Member.
async fn waiting(client: &Client, name: &NodeName) -> anyhow::Result<NodeRecord> {
    let node = Api::<Node>::all(client.clone()).get_metadata_opt(name.as_str()).await;
    let node = node.map_err(|error| anyhow::anyhow!(words(&error)))?.map(|node| node.metadata);
    let (carrier, metadata) = match node {
        Some(metadata) => (Carrier::Node, metadata),
        None => {
            let member = Api::<Member>::all(client.clone()).get_metadata_opt(name.as_str()).await;
            let member = member.map_err(|error| anyhow::anyhow!(words(&error)))?;
            let member = member.with_context(|| format!("there is neither a Node nor a Member `{name}`"))?;
            (Carrier::Member, member.metadata)
        }
    };
    let what = if carrier == Carrier::Node { "Node" } else { "Member" };
    let record = annotations::record(name, &metadata.annotations.unwrap_or_default());
    let record = record.with_context(|| format!("the record on the {what} `{name}` cannot be used"))?;
    let record = record.with_context(|| {
        format!("no daemon has published a record on the {what} `{name}` yet; is `keystone-mesh` running there?")
    })?;
    Ok(record.get().clone())
}

fn check_fingerprint(wanted: &str, found: &str, name: &NodeName) -> anyhow::Result<()> {
    ensure!(
        wanted.len() >= SHORTEST_FINGERPRINT,
        "--identity {wanted}: give at least {SHORTEST_FINGERPRINT} characters, as `keystone-mesh status` shows them on the machine"
    );
    ensure!(
        found.starts_with(wanted),
        "the machine that waits as `{name}` has the identity {found}, not {wanted}; nothing was changed. Look at `keystone-mesh \
         status` on the machine: if it shows another one, somebody else has written on that object"
    );
    Ok(())
}

/// A person's own kubeconfig.
fn own_kubeconfig() -> Option<PathBuf> {
    if std::env::var_os("KUBECONFIG").is_some() {
        return None;
    }
    let path = Path::new(&std::env::var_os("HOME")?).join(".kube/config");
    path.exists().then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_that_is_short_or_anothers_is_refused() {
        let name = "w".parse().unwrap();
        let found = "abcdefgh234567";
        assert!(check_fingerprint("abcdefgh", found, &name).is_ok());
        assert!(check_fingerprint(found, found, &name).is_ok());
        assert!(check_fingerprint("abc", found, &name).unwrap_err().to_string().contains("at least 8"));
        assert!(check_fingerprint("abcdefgi", found, &name).unwrap_err().to_string().contains("nothing was changed"));
    }
}
