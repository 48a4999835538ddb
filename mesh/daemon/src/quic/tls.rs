//! TLS 1.3 with raw public keys (RFC 7250): an identity is the key, there are no certificates, names or dates.
//!
//! A client knows whom it wants and pins that key. A server takes any Ed25519 key: TLS proves that the client holds
//! it, and what its holder may do is decided later. The same configurations serve QUIC and TLS over a spliced stream.

use std::sync::{Arc, OnceLock};

use keystone_mesh_core::{Identity, NodeId};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible, ServerConfig,
    SignatureScheme, version,
};

/// What is spoken inside a connection, agreed on by ALPN (RFC 7301).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// A byte stream to the control plane.
    Gateway,
    /// A client of a relay.
    Relay,
}

impl Protocol {
    /// Every protocol.
    pub const ALL: [Self; 2] = [Self::Gateway, Self::Relay];

    /// The ALPN name.
    pub fn alpn(self) -> &'static [u8] {
        match self {
            Self::Gateway => b"keystone-gateway/1",
            Self::Relay => b"keystone-relay/1",
        }
    }

    /// Reads an ALPN name.
    pub fn from_alpn(name: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|protocol| protocol.alpn() == name)
    }
}

/// A client's configuration for one connection, and the key that the server showed in it.
#[derive(Clone, Debug)]
pub struct PinnedClient {
    /// For rustls or quinn.
    pub config: Arc<ClientConfig>,
    shown: Arc<OnceLock<NodeId>>,
}

impl PinnedClient {
    /// The key that the server showed, once it did; it need not be the pinned one.
    pub fn shown(&self) -> Option<NodeId> {
        self.shown.get().copied()
    }
}

/// A configuration for one connection to the server with the key `server`, which must speak `protocol`.
pub fn client(identity: &Identity, server: NodeId, protocol: Protocol) -> PinnedClient {
    let shown = Arc::new(OnceLock::new());
    let verifier = PinnedServer { expected: server, shown: shown.clone(), provider: provider() };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])
        .expect("ring supports TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(certified_key(identity))));
    config.alpn_protocols = vec![protocol.alpn().to_vec()];
    // Every connection proves the key anew, and no name goes over the wire.
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    PinnedClient { config: Arc::new(config), shown }
}

/// A configuration for servers of these protocols.
pub fn server(identity: &Identity, protocols: &[Protocol]) -> Arc<ServerConfig> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])
        .expect("ring supports TLS 1.3")
        .with_client_cert_verifier(Arc::new(AnyIdentity { provider: provider() }))
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(certified_key(identity))));
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.alpn().to_vec()).collect();
    config.send_tls13_tickets = 0;
    Arc::new(config)
}

/// The name that rustls wants for every server. It is neither sent nor checked: the pinned key is the name.
pub fn server_name() -> ServerName<'static> {
    ServerName::try_from(SERVER_NAME).expect("a constant that is a DNS name")
}

/// [`server_name`] as quinn wants it.
pub(crate) const SERVER_NAME: &str = "keystone.invalid";

/// The identity in what a finished handshake gives as the peer's certificates.
pub fn peer_identity(certificates: &[CertificateDer<'_>]) -> Option<NodeId> {
    let [key] = certificates else { return None };
    NodeId::from_spki(key).ok()
}

fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(ring::default_provider())).clone()
}

fn certified_key(identity: &Identity) -> Arc<CertifiedKey> {
    let key = PrivatePkcs8KeyDer::from(identity.to_pkcs8());
    let key = ring::sign::any_eddsa_type(&key).expect("an Identity is an Ed25519 key in PKCS #8");
    Arc::new(CertifiedKey::new(vec![CertificateDer::from(identity.id().to_spki())], key))
}

#[derive(Debug)]
struct PinnedServer {
    expected: NodeId,
    shown: Arc<OnceLock<NodeId>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let shown = NodeId::from_spki(end_entity).map_err(|_| CertificateError::BadEncoding)?;
        let shown = *self.shown.get_or_init(|| shown);
        if shown == self.expected {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_signature(&self.provider, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[derive(Debug)]
struct AnyIdentity {
    provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for AnyIdentity {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        NodeId::from_spki(end_entity).map_err(|_| CertificateError::BadEncoding)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_signature(&self.provider, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

fn verify_signature(
    provider: &CryptoProvider,
    message: &[u8],
    key: &CertificateDer<'_>,
    dss: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    if dss.scheme != SignatureScheme::ED25519 {
        return Err(CertificateError::BadSignature.into());
    }
    let key = SubjectPublicKeyInfoDer::from(key.as_ref());
    verify_tls13_signature_with_raw_key(message, &key, dss, &provider.signature_verification_algorithms)
}
