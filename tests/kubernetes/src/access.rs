//! Who speaks with the API server, by which address, and how that is proved.

use std::path::Path;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::pki::{Certificate, write_secret};

/// Everything that a client needs: an address, the authority that the server must be signed by, and a credential.
#[derive(Clone)]
pub struct Access {
    server: String,
    authority: String,
    credential: Credential,
}

#[derive(Clone)]
enum Credential {
    Certificate(Certificate),
    Token(String),
}

impl Access {
    pub(crate) fn by_certificate(server: String, authority: &str, certificate: Certificate) -> Self {
        Self { server, authority: authority.to_owned(), credential: Credential::Certificate(certificate) }
    }

    pub(crate) fn by_token(server: String, authority: &str, token: String) -> Self {
        Self { server, authority: authority.to_owned(), credential: Credential::Token(token) }
    }

    /// The same, by another address of the server; one that its certificate names.
    #[must_use]
    pub fn at(mut self, server: &str) -> Self {
        server.clone_into(&mut self.server);
        self
    }

    /// `https://HOST:PORT`.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// The authority's certificate in PEM, as pods find it in `ca.crt`.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// The token, for a ServiceAccount.
    pub fn token(&self) -> Option<&str> {
        match &self.credential {
            Credential::Token(token) => Some(token),
            Credential::Certificate(_) => None,
        }
    }

    /// For `kube::Client::try_from`.
    pub fn config(&self) -> Result<kube::Config> {
        let url = self.server.parse().with_context(|| format!("parse {}", self.server))?;
        let mut config = kube::Config::new(url);
        config.root_cert = Some(vec![der(&self.authority)?]);
        // A test wants to see what the server says; a client that tries again by itself hides it.
        config.default_retry = false;
        match &self.credential {
            Credential::Certificate(certificate) => {
                config.auth_info.client_certificate_data = Some(BASE64.encode(&certificate.chain));
                config.auth_info.client_key_data = Some(BASE64.encode(&certificate.key).into());
            }
            Credential::Token(token) => config.auth_info.token = Some(token.clone().into()),
        }
        Ok(config)
    }

    /// The document that `--kubeconfig` takes; JSON, which is YAML too.
    pub fn kubeconfig(&self) -> Value {
        let user = match &self.credential {
            Credential::Certificate(certificate) => json!({
                "client-certificate-data": BASE64.encode(&certificate.chain),
                "client-key-data": BASE64.encode(&certificate.key),
            }),
            Credential::Token(token) => json!({ "token": token }),
        };
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{
                "name": "kubelab",
                "cluster": { "server": self.server, "certificate-authority-data": BASE64.encode(&self.authority) },
            }],
            "users": [{ "name": "user", "user": user }],
            "contexts": [{ "name": "kubelab", "context": { "cluster": "kubelab", "user": "user" } }],
            "current-context": "kubelab",
        })
    }

    /// Writes [`Self::kubeconfig`] to a file that only its owner reads.
    pub fn write_kubeconfig(&self, file: &Path) -> Result<()> {
        write_secret(file, &self.kubeconfig().to_string())
    }
}

fn der(pem: &str) -> Result<Vec<u8>> {
    let body: String = pem.lines().filter(|line| !line.starts_with("-----")).map(str::trim).collect();
    BASE64.decode(body).context("decode a certificate")
}
