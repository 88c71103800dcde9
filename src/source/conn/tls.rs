//! TLS to Postgres by libpq's rules, for every connection alike.
//!
//! The chain is verified when root certificates are there (`sslrootcert`, or `~/.postgresql/root.crt`), as libpq does even with
//! `sslmode=require`; the name only with `verify-full`. A server certificate that itself stands among the roots is trusted:
//! that is how a self-signed one is used.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::error::{Error, Result};

/// libpq's `sslmode`; `allow` is taken as `prefer`, which differs only in what is tried first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Disable,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// Where the root certificates come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Roots {
    /// Nothing is verified.
    None,
    /// A PEM file.
    File(PathBuf),
    /// The operating system's.
    System,
}

/// Everything that TLS needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ssl {
    pub mode: Mode,
    pub roots: Roots,
    /// Client certificate and key, PEM files.
    pub client: Option<(PathBuf, PathBuf)>,
    /// Whether the host's name is sent in clear in the handshake.
    pub sni: bool,
}

/// The handshake on a connection whose server has agreed to it.
///
/// # Errors
/// [`Error::Refused`] for unreadable files and for a certificate that does not pass; [`Error::Unreachable`] when the
/// connection breaks.
pub(super) async fn handshake(ssl: &Ssl, host: &str, tcp: TcpStream) -> Result<TlsStream<TcpStream>> {
    let name = ServerName::try_from(host.to_owned()).map_err(|_| {
        refused(format!("{host:?} is no name that a certificate can hold"), "a DNS name or an IP address")
    })?;
    let connector = TlsConnector::from(Arc::new(client_config(ssl)?));
    connector.connect(name, tcp).await.map_err(|e| match e.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
        Some(why) => refused(format!("{host}: {why}"), needed(ssl.mode)),
        None => Error::unreachable(format!("Postgres at {host} (TLS handshake)"), e),
    })
}

/// The refusal of a server that answers `N`.
pub(super) fn not_offered(what: &str) -> Error {
    Error::refused(
        "postgres_tls",
        format!("{what} does not offer TLS"),
        "TLS, because sslmode asks for it",
        "set ssl = on with a certificate in postgresql.conf, or sslmode=prefer",
    )
}

/// A refusal about certificates.
pub(super) fn refused(found: impl Into<String>, needed: &str) -> Error {
    Error::refused(
        "postgres_tls",
        found,
        needed,
        "mend sslrootcert, sslcert and sslkey, or give the server a version 3 certificate with its name as subjectAltName",
    )
}

fn needed(mode: Mode) -> &'static str {
    match mode {
        Mode::VerifyFull => "a certificate signed by sslrootcert that names the host in subjectAltName",
        _ => "a certificate signed by sslrootcert, and a client certificate where the server asks for one",
    }
}

fn client_config(ssl: &Ssl) -> Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Verifier::new(ssl, &provider)?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::fatal("setting up TLS", e))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match &ssl.client {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => {
            let private = PrivateKeyDer::from_pem_file(key).map_err(|e| unreadable(key, e))?;
            builder.with_client_auth_cert(certificates(cert)?, private).map_err(|e| unreadable(cert, e))?
        }
    };
    config.enable_sni = ssl.sni;
    Ok(config)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read.map_err(|e| unreadable(path, e))? {
        none if none.is_empty() => Err(unreadable(path, "no certificate in it")),
        some => Ok(some),
    }
}

fn unreadable(path: &Path, why: impl std::fmt::Display) -> Error {
    refused(format!("{}: {why}", path.display()), "a readable PEM file")
}

/// The certificates that the roots setting names.
fn load_roots(roots: &Roots) -> Result<Vec<CertificateDer<'static>>> {
    match roots {
        Roots::None => Ok(Vec::new()),
        Roots::File(path) => certificates(path),
        Roots::System => match rustls_native_certs::load_native_certs() {
            found if found.certs.is_empty() => {
                Err(refused("the system has no root certificates", "the package ca-certificates"))
            }
            found => Ok(found.certs),
        },
    }
}

#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    /// `None`: the chain is not verified.
    chain: Option<Arc<WebPkiServerVerifier>>,
    /// The roots themselves, for a server certificate that is one of them.
    roots: Vec<CertificateDer<'static>>,
    /// Whether the host's name must stand in the certificate.
    name: bool,
}

impl Verifier {
    fn new(ssl: &Ssl, provider: &Arc<CryptoProvider>) -> Result<Self> {
        let roots = load_roots(&ssl.roots)?;
        let mut store = RootCertStore::empty();
        // A root that webpki cannot parse can still be the server's own certificate.
        store.add_parsable_certificates(roots.iter().cloned());
        let chain = match store.is_empty() {
            true => None,
            false => Some(
                WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider.clone())
                    .build()
                    .map_err(|e| refused(e.to_string(), "root certificates"))?,
            ),
        };
        Ok(Self { provider: provider.clone(), chain, roots, name: ssl.mode == Mode::VerifyFull })
    }

    fn verifies(&self) -> bool {
        !self.roots.is_empty()
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.verifies() && !self.roots.iter().any(|root| root == end_entity) {
            let chain = self.chain.as_ref().ok_or(CertificateError::UnknownIssuer)?;
            match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp, now) {
                // webpki looks at the name last: the chain has passed.
                Err(rustls::Error::InvalidCertificate(
                    CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
                )) => {}
                other => _ = other?,
            }
        }
        if self.name {
            rustls::client::verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        if !self.verifies() {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        if !self.verifies() {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
