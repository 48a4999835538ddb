//! The cluster's certificate authority and what it signs. Keys are on P-256, which is made in no time.

use std::fs::{self, File};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};

/// The names under which pods know the API server.
const SERVER_NAMES: [&str; 4] = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"];

/// A certificate and its key.
#[derive(Clone)]
pub(crate) struct Certificate {
    /// PEM.
    pub(crate) chain: String,
    /// PKCS #8 in PEM.
    pub(crate) key: String,
}

/// Signs the certificates of one cluster.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: Certificate,
}

impl Authority {
    pub(crate) fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "kubelab");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().context("make the authority's key")?;
        let signed = params.self_signed(&key).context("make the authority's certificate")?;
        let certificate = Certificate { chain: signed.pem(), key: key.serialize_pem() };
        Ok(Self { issuer: Issuer::new(params, key), certificate })
    }

    /// The authority's own certificate and key.
    pub(crate) fn certificate(&self) -> &Certificate {
        &self.certificate
    }

    /// What a server at `addresses` shows, besides on loopback.
    pub(crate) fn server(&self, common_name: &str, addresses: &[IpAddr]) -> Result<Certificate> {
        let names = SERVER_NAMES.map(str::to_owned).to_vec();
        let mut params = CertificateParams::new(names).context("name the server")?;
        params.subject_alt_names.push(SanType::IpAddress(Ipv4Addr::LOCALHOST.into()));
        params.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params)
    }

    /// What a server shows whose certificate ended an hour ago.
    pub(crate) fn ended(&self, common_name: &str) -> Result<Certificate> {
        let mut params = CertificateParams::new(SERVER_NAMES.map(str::to_owned).to_vec()).context("name the server")?;
        params.subject_alt_names.push(SanType::IpAddress(Ipv4Addr::LOCALHOST.into()));
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.not_after = (SystemTime::now() - Duration::from_secs(3600)).into();
        self.sign(params)
    }

    /// What `user`, a member of `group`, shows to the API server.
    pub(crate) fn client(&self, user: &str, group: Option<&str>) -> Result<Certificate> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, user);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params)
    }

    fn sign(&self, mut params: CertificateParams) -> Result<Certificate> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().context("make a key")?;
        let signed = params.signed_by(&key, &self.issuer).context("sign a certificate")?;
        Ok(Certificate { chain: signed.pem(), key: key.serialize_pem() })
    }
}

impl Certificate {
    /// Writes `NAME.crt` and `NAME.key` into `folder`, and returns their paths.
    pub(crate) fn write(&self, folder: &Path, name: &str) -> Result<(PathBuf, PathBuf)> {
        let (chain, key) = (folder.join(format!("{name}.crt")), folder.join(format!("{name}.key")));
        fs::write(&chain, &self.chain).with_context(|| format!("write {}", chain.display()))?;
        write_secret(&key, &self.key)?;
        Ok((chain, key))
    }
}

/// Writes the pair that signs and checks tokens of ServiceAccounts: `NAME.key` and `NAME.pub`.
pub(crate) fn write_token_keys(folder: &Path, name: &str) -> Result<(PathBuf, PathBuf)> {
    let pair = KeyPair::generate().context("make the key of tokens")?;
    let (key, public) = (folder.join(format!("{name}.key")), folder.join(format!("{name}.pub")));
    write_secret(&key, &pair.serialize_pem())?;
    fs::write(&public, pair.public_key_pem()).with_context(|| format!("write {}", public.display()))?;
    Ok((key, public))
}

/// Writes a file that only its owner reads.
pub(crate) fn write_secret(path: &Path, text: &str) -> Result<()> {
    let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path);
    let written = file.and_then(|mut file| file.write_all(text.as_bytes()));
    written.with_context(|| format!("write {}", path.display()))
}
