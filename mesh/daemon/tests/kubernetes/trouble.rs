//! What a person is told when the API server cannot be spoken with: by real failures, in one line.

use anyhow::{Result, bail};
use k8s_openapi::api::core::v1::Node;
use keystone_kubelab::{Access as Credentials, ApiServer, Options, with_api_server};
use keystone_mesh::kube_api::access::Access;
use keystone_mesh::kube_api::words;
use kube::Api;
use kube::api::ListParams;

use crate::world::*;

/// Why these credentials list no Nodes.
fn told(credentials: &Credentials) -> Result<String> {
    told_with(access_of(credentials, "trouble")?)
}

fn told_with(access: Access) -> Result<String> {
    run(async move {
        match Api::<Node>::all(access.client().await?).list(&ListParams::default()).await {
            Ok(_) => bail!("it was allowed"),
            Err(error) => Ok(words(&error)),
        }
    })
}

fn expect(told: &str, parts: &[&str]) {
    for part in parts {
        assert!(told.contains(part), "`{part}` is not in: {told}");
    }
    assert!(!told.contains('\n'), "more than a line: {told}");
}

/// The administrator's credentials, where the authority is one that signed nothing.
fn strangers_authority(server: &ApiServer) -> Result<Access> {
    let dir = std::env::temp_dir();
    server.write_server_certificate(&dir, "stranger", "stranger", "192.0.2.1".parse()?)?;
    let mut kubeconfig = server.admin().kubeconfig();
    kubeconfig["clusters"][0]["cluster"]["certificate-authority-data"] = serde_json::Value::Null;
    kubeconfig["clusters"][0]["cluster"]["certificate-authority"] = dir.join("stranger.crt").to_str().into();
    let file = dir.join("stranger.kubeconfig");
    std::fs::write(&file, kubeconfig.to_string())?;
    Ok(Access::find(Some(&file), None)?)
}

#[test]
fn each_failure_says_its_cause_and_what_to_do() {
    let name = "trouble::each_failure_says_its_cause_and_what_to_do";
    with_api_server(name, Options::default(), |server| {
        let admin = server.admin().clone();
        let refused = told(&admin.clone().at("https://127.0.0.1:6444"))?;
        expect(&refused, &["https://127.0.0.1:6444", "onnection refused", "is this its address?"]);

        let other_name = told(&admin.clone().at("https://127.0.0.2:6443"))?;
        expect(&other_name, &["does not name 127.0.0.2", "127.0.0.1", "--tls-san 127.0.0.2", "apiServer.certSANs"]);

        let no_name = told(&admin.clone().at("https://api.invalid:6443"))?;
        expect(&no_name, &["https://api.invalid:6443", "lookup"]);

        let stranger = told_with(strangers_authority(server)?)?;
        expect(&stranger, &["https://127.0.0.1:6443", "not signed by the authority", "another cluster's"]);

        let nobody = told(&server.user("nobody", None)?)?;
        expect(&nobody, &["nobody", "cannot list resource \"nodes\"", "the chart's roles"]);

        let gone = server.service_account("keystone-mesh", "gone")?;
        server.kubectl(&["delete", "serviceaccount", "--namespace", "keystone-mesh", "gone"])?;
        let gone = told(&gone)?;
        expect(&gone, &["does not accept the credentials", "expired or was withdrawn"]);

        server.let_certificate_end()?;
        let deadline = std::time::Instant::now() + PATIENCE;
        let ended = loop {
            match told(&admin) {
                Ok(told) => break told,
                Err(error) if std::time::Instant::now() > deadline => return Err(error),
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(200)),
            }
        };
        expect(&ended, &["its certificate ended at 20", "renew it", "clock"]);
        Ok(())
    });
}
