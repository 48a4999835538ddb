//! Pod Security: the namespace admits what it claims, and which stricter level which part would pass.

use anyhow::{Result, bail};
use k8s_openapi::api::core::v1::Pod;
use keystone_kubelab::{ApiServer, Options, with_api_server};
use kube::Api;
use kube::api::PostParams;
use serde_json::{Value, json};

use crate::{install, shipped};

/// What the level `level` says of a pod of this template: nothing where it admits it.
fn violations(server: &ApiServer, level: &str, template: &Value) -> Result<Vec<String>> {
    let namespace = format!("level-{level}");
    let admitted = server.with_client(server.admin(), async |client| {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "probe"}, "spec": template["spec"]}))?;
        let dry = PostParams { dry_run: true, ..PostParams::default() };
        Ok(Api::<Pod>::namespaced(client, &namespace).create(&dry, &pod).await.map(drop))
    })?;
    let said = match admitted {
        Ok(()) => return Ok(Vec::new()),
        Err(kube::Error::Api(status)) => status.message,
        Err(error) => return Err(error.into()),
    };
    let Some((_, list)) = said.split_once(&format!("violates PodSecurity \"{level}:latest\": ")) else {
        bail!("something else than Pod Security refused it: {said}");
    };
    // `host namespaces (hostNetwork=true), restricted volume types (...)`
    Ok(list.split("), ").map(|part| part.split(" (").next().unwrap_or(part).to_owned()).collect())
}

#[test]
fn the_namespace_admits_its_pods_and_claims_no_more_than_is_needed() {
    let name = "pod_security::the_namespace_admits_its_pods_and_claims_no_more_than_is_needed";
    with_api_server(name, Options::default(), |server| {
        install(server)?;
        let namespace = shipped("Namespace", "keystone-mesh");
        assert_eq!(namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"], "privileged");
        for level in ["privileged", "baseline", "restricted"] {
            let mut copy = namespace.clone();
            copy["metadata"]["name"] = format!("level-{level}").into();
            copy["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] = level.into();
            server.apply(&copy.to_string())?;
            for account in ["keystone-mesh", "keystone-controller"] {
                server.service_account(&format!("level-{level}"), account)?;
            }
        }

        let agent = &shipped("DaemonSet", "keystone-mesh")["spec"]["template"];
        assert_eq!(violations(server, "privileged", agent)?, [""; 0]);
        assert_eq!(
            violations(server, "baseline", agent)?,
            ["non-default capabilities", "host namespaces", "hostPath volumes", "probe or lifecycle host"]
        );

        // The controller needs the host's network, and probes that come by it; else it is as restricted as can be.
        let mut controller = shipped("Deployment", "keystone-controller")["spec"]["template"].clone();
        assert_eq!(violations(server, "privileged", &controller)?, [""; 0]);
        for level in ["baseline", "restricted"] {
            assert_eq!(
                violations(server, level, &controller)?,
                ["host namespaces", "probe or lifecycle host"],
                "{level}"
            );
        }
        let spec = controller["spec"].as_object_mut().unwrap();
        spec.remove("hostNetwork");
        for probe in ["livenessProbe", "readinessProbe"] {
            spec_probe(&mut controller, probe).remove("host");
        }
        assert_eq!(violations(server, "restricted", &controller)?, [""; 0]);
        Ok(())
    });
}

fn spec_probe<'a>(template: &'a mut Value, probe: &str) -> &'a mut serde_json::Map<String, Value> {
    template["spec"]["containers"][0][probe]["httpGet"].as_object_mut().unwrap()
}
