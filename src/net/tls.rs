//! TLS client configuration: the trusted authorities of outgoing connections.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::{fmt, io};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WantsClientCert, WebPkiServerVerifier};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, ConfigBuilder, DigitallySignedStruct, InconsistentKeys, OtherError,
    RootCertStore, SignatureScheme,
};
use sha2::{Digest as _, Sha256};

/// Reason why there is no TLS client configuration. Each can be fixed by the operator of this
/// machine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The file cannot be read or is not PEM.
    #[error("cannot read certificate authorities from {path}: {cause}")]
    Unreadable {
        /// The PEM file.
        path: PathBuf,
        /// The underlying error.
        cause: String,
    },
    /// The file was read but holds no certificate.
    #[error("{path} holds no certificate: a PEM file with CERTIFICATE sections is needed")]
    Empty {
        /// The PEM file.
        path: PathBuf,
    },
    /// A section of the file is not a usable certificate.
    #[error("certificate {position} in {path} cannot be used as an authority: {cause}")]
    Unusable {
        /// The PEM file.
        path: PathBuf,
        /// Number of the certificate in the file, from 1.
        position: usize,
        /// The underlying error.
        cause: String,
    },
    /// The system offers no certificate authority at all.
    #[error("this system has no certificate authorities{}: install ca-certificates or name a ca", because(.cause))]
    NoSystemRoots {
        /// The first error of the search, if any.
        cause: Option<String>,
    },
    /// A file of the client certificate cannot be read, is not PEM, or holds nothing of the kind.
    #[error("cannot read the client's {what} from {path}: {cause}")]
    Identity {
        /// `certificate` or `private key`.
        what: &'static str,
        /// The PEM file.
        path: PathBuf,
        /// The underlying error.
        cause: String,
    },
    /// The client certificate and its key do not belong together, or cannot be used.
    #[error("the client certificate {cert} cannot be used with the key {key}: {cause}")]
    Pair {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// The underlying error.
        cause: String,
    },
    /// The TLS library refused the settings; a bug in auditgate.
    #[error("cannot set up TLS: {0}")]
    Setup(String),
}

/// Creates a configuration that verifies the server and offers no client certificate, for TLS 1.2
/// and 1.3.
///
/// Only the authorities in the PEM file `ca` are trusted; without one, those of the system
/// (`SSL_CERT_FILE` and `SSL_CERT_DIR` are honoured). Read once: a later change of the files needs
/// a new configuration. Blocks on the file system.
///
/// # Errors
/// See [`TlsError`].
pub fn client_tls(ca: Option<&Path>) -> Result<ClientConfig, TlsError> {
    client_tls_as(ca, None)
}

/// Client identity for a server that asks for one: two PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The certificate, then its intermediates.
    pub cert: PathBuf,
    /// Its private key, unencrypted.
    pub key: PathBuf,
}

/// What an outgoing connection trusts, and what it offers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientOptions {
    /// PEM file with the only authorities to trust; without it, the system's.
    pub ca: Option<PathBuf>,
    /// Client certificate for a server that asks for one.
    pub identity: Option<Identity>,
    /// Keys of which the server's certificate must have one, besides being trusted; any when empty.
    pub pins: Vec<Pin>,
    /// URL of the HTTP proxy to use instead of those of the environment.
    pub proxy: Option<String>,
}

/// SHA-256 of a public key (the DER of its `SubjectPublicKeyInfo`, RFC 7469, section 2.4), written
/// as curl's `--pinnedpubkey` does: `sha256//BASE64`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Pin([u8; 32]);

/// A text that is not a [`Pin`].
#[derive(Debug, thiserror::Error)]
#[error("not the SHA-256 of a public key; write it as sha256//BASE64, 44 characters of base64")]
pub struct InvalidPin;

impl FromStr for Pin {
    type Err = InvalidPin;

    fn from_str(text: &str) -> Result<Self, InvalidPin> {
        let digest = text.strip_prefix("sha256//").and_then(|digest| STANDARD.decode(digest).ok());
        digest.and_then(|digest| digest.try_into().ok()).map(Self).ok_or(InvalidPin)
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256//{}", STANDARD.encode(self.0))
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Verifies a server as usual, and then its key.
#[derive(Debug)]
struct PinnedVerifier {
    inner: Arc<WebPkiServerVerifier>,
    pins: Vec<Pin>,
}

impl ServerCertVerifier for PinnedVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified =
            self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        let key = ParsedCertificate::try_from(end_entity)?.subject_public_key_info();
        let pin = Pin(Sha256::digest(&key).into());
        if self.pins.contains(&pin) {
            return Ok(verified);
        }
        let cause = io::Error::other(format!("its public key {pin} is not one of the pinned ones"));
        Err(CertificateError::Other(OtherError(Arc::new(cause))).into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Creates a configuration like [`client_tls_as`], for a server whose key is pinned.
///
/// # Errors
/// See [`TlsError`].
pub(super) fn client_tls_with(options: &ClientOptions) -> Result<ClientConfig, TlsError> {
    let mut config = client_tls_as(options.ca.as_deref(), options.identity.as_ref())?;
    if !options.pins.is_empty() {
        let roots = roots(options.ca.as_deref())?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
            .build()
            .map_err(|error| TlsError::Setup(error.to_string()))?;
        let verifier = PinnedVerifier { inner, pins: options.pins.clone() };
        config.dangerous().set_certificate_verifier(Arc::new(verifier));
    }
    Ok(config)
}

/// Creates a configuration like [`client_tls`], which also offers a client certificate to a server
/// that asks for one.
///
/// # Errors
/// See [`TlsError`].
pub fn client_tls_as(ca: Option<&Path>, identity: Option<&Identity>) -> Result<ClientConfig, TlsError> {
    let trusting = trusting(roots(ca)?)?;
    let Some(Identity { cert, key }) = identity else {
        return Ok(trusting.with_no_client_auth());
    };
    let unreadable = |what, path: &Path| {
        let path = path.to_owned();
        move |cause: pem::Error| TlsError::Identity { what, path, cause: cause.to_string() }
    };
    let chain = CertificateDer::pem_file_iter(cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(unreadable("certificate", cert))?;
    let secret = PrivateKeyDer::from_pem_file(key).map_err(unreadable("private key", key))?;
    trusting.with_client_auth_cert(chain, secret).map_err(|cause| TlsError::Pair {
        cert: cert.clone(),
        key: key.clone(),
        cause: describe(&cause),
    })
}

/// Creates a configuration that trusts no authority, for a client that only ever speaks plain HTTP.
pub(super) fn trusting_no_authority() -> Result<ClientConfig, TlsError> {
    Ok(trusting(RootCertStore::empty())?.with_no_client_auth())
}

fn trusting(roots: RootCertStore) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, TlsError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(|error| TlsError::Setup(error.to_string()))?
        .with_root_certificates(roots))
}

/// Returns the authorities to trust.
fn roots(ca: Option<&Path>) -> Result<RootCertStore, TlsError> {
    match ca {
        Some(path) => roots_from_file(path),
        None => {
            let found = rustls_native_certs::load_native_certs();
            system_roots(found.certs, found.errors.first().map(ToString::to_string))
        }
    }
}

fn roots_from_file(path: &Path) -> Result<RootCertStore, TlsError> {
    let unreadable =
        |cause: pem::Error| TlsError::Unreadable { path: path.to_owned(), cause: cause.to_string() };
    let mut roots = RootCertStore::empty();
    for (index, certificate) in CertificateDer::pem_file_iter(path).map_err(unreadable)?.enumerate() {
        roots.add(certificate.map_err(unreadable)?).map_err(|cause| TlsError::Unusable {
            path: path.to_owned(),
            position: index + 1,
            cause: describe(&cause),
        })?;
    }
    if roots.is_empty() {
        return Err(TlsError::Empty { path: path.to_owned() });
    }
    Ok(roots)
}

/// Returns the system's authorities. The store may hold some certificates that cannot be parsed;
/// the others still count.
fn system_roots(
    found: Vec<CertificateDer<'static>>,
    cause: Option<String>,
) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found);
    if roots.is_empty() {
        return Err(TlsError::NoSystemRoots { cause });
    }
    Ok(roots)
}

/// Returns a description of an error for people. The library's own has names of Rust in it for many
/// causes, such as `UnknownIssuer` or `Other(OtherError(CaUsedAsEndEntity))`.
pub(crate) fn describe(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(cause) => describe_certificate(cause),
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            "the key belongs to another certificate".to_owned()
        }
        rustls::Error::General(text) => text.clone(),
        other => other.to_string(),
    }
}

fn describe_certificate(error: &CertificateError) -> String {
    let text = match error {
        CertificateError::UnknownIssuer => "no trusted authority issued it",
        CertificateError::BadEncoding => "it is malformed",
        CertificateError::BadSignature => "no trusted authority signed it",
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "it has expired",
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => "it is not valid yet",
        CertificateError::NotValidForName => "it is not valid for this name",
        CertificateError::NotValidForNameContext { expected, presented } => {
            // Each is the library's debug text of a name: `DnsName("localhost")`.
            let names: Vec<&str> = presented
                .iter()
                .map(|name| {
                    name.split_once('(').map_or(name.as_str(), |(_, name)| name.trim_end_matches(')'))
                })
                .map(|name| name.trim_matches('"'))
                .collect();
            let names = if names.is_empty() { "no name".to_owned() } else { names.join(", ") };
            return format!("it is not valid for {}, but for {names}", expected.to_str());
        }
        // What `openssl req -x509` makes, unless it is told otherwise.
        CertificateError::Other(cause) if cause.to_string().contains("CaUsedAsEndEntity") => {
            "it is that of an authority (CA:TRUE), and a server needs one that an authority has issued to it"
        }
        CertificateError::Other(cause) => return words(&cause.to_string()),
        other => return words(&other.to_string()),
    };
    text.to_owned()
}

/// Returns a name of Rust such as `CaUsedAsEndEntity` in words, and any other text as it is.
fn words(text: &str) -> String {
    if !text.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return text.to_owned();
    }
    let mut all = String::new();
    for character in text.chars() {
        if character.is_ascii_uppercase() && !all.is_empty() {
            all.push(' ');
        }
        all.push(character.to_ascii_lowercase());
    }
    all
}

fn because(cause: &Option<String>) -> String {
    cause.as_ref().map(|cause| format!(" ({cause})")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_authorities_of_the_system_the_error_says_what_to_do() {
        let message = system_roots(Vec::new(), None).unwrap_err().to_string();
        assert!(message.contains("install ca-certificates or name a ca"), "{message}");
        let message = system_roots(Vec::new(), Some("no /etc/ssl".to_owned())).unwrap_err().to_string();
        assert!(message.contains("(no /etc/ssl)"), "{message}");
    }

    #[test]
    fn an_invalid_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        assert!(matches!(client_tls(Some(&path)), Err(TlsError::Unreadable { .. })));
        std::fs::write(&path, "no PEM at all\n").unwrap();
        assert!(matches!(client_tls(Some(&path)), Err(TlsError::Empty { .. })));
        std::fs::write(&path, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
        let error = client_tls(Some(&path)).unwrap_err();
        assert!(matches!(error, TlsError::Unusable { position: 1, .. }));
        assert!(error.to_string().contains("ca.pem"));
        assert!(error.to_string().ends_with("it is malformed"), "{error}");
    }

    #[test]
    fn no_description_of_an_error_has_names_of_rust_in_it() {
        let other = |name: &str| rustls::OtherError(Arc::new(io::Error::other(name.to_owned())));
        let for_name = CertificateError::NotValidForNameContext {
            expected: "a.test".try_into().unwrap(),
            presented: vec!["DnsName(\"b.test\")".to_owned(), "IpAddress(127.0.0.1)".to_owned()],
        };
        for (error, text) in [
            (CertificateError::UnknownIssuer, "no trusted authority issued it"),
            (
                CertificateError::Other(other("CaUsedAsEndEntity")),
                "it is that of an authority (CA:TRUE), and a server needs one that an authority has issued to it",
            ),
            (CertificateError::Other(other("UnsupportedNameType")), "unsupported name type"),
            (CertificateError::UnhandledCriticalExtension, "unhandled critical extension"),
            (for_name, "it is not valid for a.test, but for b.test, 127.0.0.1"),
        ] {
            assert_eq!(describe(&error.into()), text);
        }
    }
}
