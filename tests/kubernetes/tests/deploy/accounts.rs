//! What each account may do: what it needs is allowed, what would hurt is not. That nothing is allowed which is not
//! needed either, tests of controller and daemon show, which compare with what the programs ask for.

use anyhow::{Result, ensure};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use keystone_kubelab::{Access, ApiServer, Options, with_api_server};
use keystone_mesh_api::{
    AGENT_ACCOUNT, CONTROLLER_ACCOUNT, GATEWAY_ACCOUNT, GROUP, LEADER_LEASE, NAMESPACE, NETWORK_CONFIG_MAP,
    NETWORK_KEY_SECRET,
};
use kube::Api;
use kube::api::PostParams;

use crate::{MANIFESTS, documents, install};

/// `VERB RESOURCE[/SUBRESOURCE][.GROUP] [NAMESPACE/NAME]`, as in `get configmaps keystone-mesh/x`.
fn attributes(question: &str) -> ResourceAttributes {
    let mut words = question.split(' ');
    let verb = words.next().map(str::to_owned);
    let resource = words.next().unwrap();
    let (resource, group) = resource.split_once('.').unwrap_or((resource, ""));
    let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
    let (namespace, name) = words.next().and_then(|at| at.split_once('/')).unwrap_or_default();
    let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    ResourceAttributes {
        verb,
        group: some(group),
        resource: some(resource),
        subresource: some(subresource),
        namespace: some(namespace),
        name: some(name),
        ..ResourceAttributes::default()
    }
}

fn may(server: &ApiServer, access: &Access, questions: &[String]) -> Result<Vec<bool>> {
    server.with_client(access, async |client| {
        let reviews = Api::<SelfSubjectAccessReview>::all(client);
        let mut answers = Vec::new();
        for question in questions {
            let spec = SelfSubjectAccessReviewSpec {
                resource_attributes: Some(attributes(question)),
                ..SelfSubjectAccessReviewSpec::default()
            };
            let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
            let answer = reviews.create(&PostParams::default(), &review).await?;
            answers.push(answer.status.is_some_and(|status| status.allowed));
        }
        Ok(answers)
    })
}

/// What every account is refused: it would be more than the mesh.
fn of_nobody() -> Vec<String> {
    let mut questions: Vec<String> = [
        "create nodes",
        "delete nodes",
        "update nodes",
        "deletecollection nodes",
        "get nodes/proxy",
        "create nodes/proxy",
        "update nodes/status",
        "list pods",
        "get pods kube-system/any",
        "create pods keystone-mesh/any",
        "create pods/exec keystone-mesh/any",
        "patch daemonsets.apps keystone-mesh/keystone-mesh",
        "patch deployments.apps keystone-mesh/keystone-controller",
        "create serviceaccounts/token keystone-mesh/keystone-controller",
        "create certificatesigningrequests.certificates.k8s.io",
        "patch clusterroles.rbac.authorization.k8s.io",
        "escalate clusterroles.rbac.authorization.k8s.io",
        "bind clusterroles.rbac.authorization.k8s.io",
        "create clusterrolebindings.rbac.authorization.k8s.io",
        "impersonate users",
        "impersonate serviceaccounts keystone-mesh/keystone-controller",
        "delete validatingadmissionpolicies.admissionregistration.k8s.io",
        "patch validatingadmissionpolicybindings.admissionregistration.k8s.io",
        "patch customresourcedefinitions.apiextensions.k8s.io",
        "delete leases.coordination.k8s.io keystone-mesh/keystone-controller",
        "update leases.coordination.k8s.io kube-node-lease/worker-1",
        "update configmaps kube-system/extension-apiserver-authentication",
        "delete configmaps keystone-mesh/keystone-mesh-network",
    ]
    .map(str::to_owned)
    .into();
    for verb in ["get", "list", "watch", "create", "update", "patch", "delete"] {
        questions.push(format!("{verb} secrets {NAMESPACE}/{NETWORK_KEY_SECRET}"));
        questions.push(format!("{verb} secrets"));
    }
    questions
}

#[test]
fn every_account_may_do_its_work_and_no_harm() {
    with_api_server("accounts::every_account_may_do_its_work_and_no_harm", Options::default(), |server| {
        install(server)?;
        let document = format!("{NAMESPACE}/{NETWORK_CONFIG_MAP}");
        let lease = format!("{NAMESPACE}/{LEADER_LEASE}");
        let ask = |account: &str, allowed: Vec<String>, refused: Vec<String>| {
            let access = server.service_account(NAMESPACE, account)?;
            for (questions, expected) in [(&allowed, true), (&refused, false), (&of_nobody(), false)] {
                for (question, answer) in questions.iter().zip(may(server, &access, questions)?) {
                    ensure!(answer == expected, "{account} may {question}: {answer}");
                }
            }
            Ok(())
        };

        ask(
            AGENT_ACCOUNT,
            vec![
                "list nodes".into(),
                "watch nodes".into(),
                "patch nodes".into(),
                format!("list members.{GROUP}"),
                format!("watch peers.{GROUP}"),
                format!("watch configmaps {document}"),
            ],
            vec![
                "patch nodes/status".into(),
                format!("create members.{GROUP}"),
                format!("patch members.{GROUP}"),
                format!("patch peers.{GROUP}"),
                format!("list jointokens.{GROUP}"),
                format!("patch configmaps {document}"),
                format!("create configmaps {NAMESPACE}/keystone-mesh-addresses-0"),
                format!("list configmaps {NAMESPACE}/"),
                format!("update leases.coordination.k8s.io {lease}"),
                "create events.events.k8s.io default/".into(),
            ],
        )?;
        ask(
            GATEWAY_ACCOUNT,
            vec![
                "patch nodes".into(),
                format!("create members.{GROUP}"),
                format!("create jointokens.{GROUP}"),
                format!("patch configmaps {document}"),
            ],
            vec![
                "patch nodes/status".into(),
                format!("patch members/status.{GROUP}"),
                format!("patch peers/status.{GROUP}"),
                format!("patch jointokens/status.{GROUP}"),
                format!("delete jointokens.{GROUP}"),
                format!("create peers.{GROUP}"),
                format!("update configmaps {NAMESPACE}/keystone-mesh-addresses-0"),
                format!("update leases.coordination.k8s.io {lease}"),
            ],
        )?;
        ask(
            CONTROLLER_ACCOUNT,
            vec![
                "patch nodes".into(),
                "patch nodes/status".into(),
                format!("patch members/status.{GROUP}"),
                format!("update configmaps {NAMESPACE}/keystone-mesh-addresses-0"),
                format!("update leases.coordination.k8s.io {lease}"),
                "create events.events.k8s.io default/".into(),
                "watch nodeclaims.karpenter.sh".into(),
            ],
            vec![
                format!("create members.{GROUP}"),
                format!("patch jointokens.{GROUP}"),
                format!("delete peers.{GROUP}"),
                format!("create configmaps {}/any", "kube-system"),
                "delete nodeclaims.karpenter.sh".into(),
            ],
        )
    });
}

#[test]
fn no_role_has_a_wildcard() {
    for object in documents(MANIFESTS) {
        for rule in object["rules"].as_array().into_iter().flatten() {
            assert!(!rule.to_string().contains("\"*\""), "{}: {rule}", object["metadata"]["name"]);
        }
    }
}
