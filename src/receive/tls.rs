//! Certificates and what the listener offers with them: TLS 1.2 and 1.3 (RFC 5246, RFC 8446), HTTP/1.1 only.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::{Error as PemError, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_cert::der::Decode as _;

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The certificate file.
    #[error(
        "cannot read the certificate {path}: {cause}; it must be a PEM file, the server's certificate first"
    )]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: PemCause,
    },
    /// The key file.
    #[error("cannot read the private key {path}: {cause}; it must be an unencrypted PEM file")]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: PemCause,
    },
    /// They do not belong together, or the key is of a kind that we cannot use.
    #[error("the certificate {cert} cannot be used with the key {key}: {cause}")]
    Pair {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What is wrong.
        cause: rustls::Error,
    },
}

/// What is wrong with a PEM file (RFC 7468).
#[derive(Debug, thiserror::Error)]
pub enum PemCause {
    /// The system cannot read it.
    #[error(transparent)]
    Io(std::io::Error),
    /// It holds no such section.
    #[error("no such section in it")]
    Nothing,
    /// A section cannot be decoded.
    #[error("it is damaged")]
    Damaged,
}

impl From<PemError> for PemCause {
    fn from(error: PemError) -> Self {
        match error {
            PemError::Io(error) => Self::Io(error),
            PemError::NoItemsFound => Self::Nothing,
            _ => Self::Damaged,
        }
    }
}

/// What the listener serves.
#[derive(Debug)]
pub struct Identity {
    /// For the listener.
    pub config: Arc<ServerConfig>,
    /// When the server's certificate expires, in seconds since the Unix epoch; none when it does not say so in
    /// the way of RFC 5280.
    pub not_after: Option<i64>,
}

/// Loads a certificate chain and its key.
///
/// # Errors
/// See [`TlsError`].
pub fn server(cert: &Path, key: &Path) -> Result<Identity, TlsError> {
    let unreadable = |cause: PemError| TlsError::Certificate { path: cert.to_owned(), cause: cause.into() };
    let chain = CertificateDer::pem_file_iter(cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(unreadable)?;
    let Some(own) = chain.first() else {
        return Err(unreadable(PemError::NoItemsFound));
    };
    let not_after = not_after(own);
    let private = PrivateKeyDer::from_pem_file(key)
        .map_err(|cause| TlsError::Key { path: key.to_owned(), cause: cause.into() })?;
    let pair = |cause| TlsError::Pair { cert: cert.to_owned(), key: key.to_owned(), cause };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(pair)?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(pair)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Identity { config: Arc::new(config), not_after })
}

/// The end of a certificate's validity (RFC 5280, section 4.1.2.5).
fn not_after(certificate: &[u8]) -> Option<i64> {
    let certificate = x509_cert::Certificate::from_der(certificate).ok()?;
    let end = certificate.tbs_certificate().validity().not_after.to_unix_duration();
    i64::try_from(end.as_secs()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_says_when_it_expires() {
        let expiring = |year| {
            let mut parameters = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
            parameters.not_before = rcgen::date_time_ymd(1970, 1, 1);
            parameters.not_after = rcgen::date_time_ymd(year, 2, 3);
            let made = parameters.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap();
            (made.der().to_vec(), parameters.not_after.unix_timestamp())
        };
        // The two spellings of a year, and the turn of the century that divides them.
        for year in [1999, 2000, 2049, 2050, 4096] {
            let (certificate, expected) = expiring(year);
            assert_eq!(not_after(&certificate), Some(expected), "{year}");
        }
        let (certificate, _) = expiring(2030);
        for cut in 0..certificate.len() {
            // Whatever is cut off: no panic.
            let _ = not_after(&certificate[..cut]);
        }
        assert_eq!(not_after(b""), None);
        assert_eq!(not_after(&[0x30, 0xff]), None);
    }

    #[test]
    fn each_fault_names_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let other = rcgen::KeyPair::generate().unwrap();
        std::fs::write(path("cert"), made.cert.pem()).unwrap();
        std::fs::write(path("key"), made.signing_key.serialize_pem()).unwrap();
        std::fs::write(path("other"), other.serialize_pem()).unwrap();
        std::fs::write(path("empty"), "").unwrap();
        assert!(server(&path("cert"), &path("key")).is_ok());
        for (cert, key, named, why) in [
            ("missing", "key", "missing", "No such file"),
            ("cert", "missing", "missing", "No such file"),
            ("empty", "key", "empty", "no such section"),
            ("cert", "empty", "empty", "no such section"),
            ("key", "key", "key", "no such section"),
            ("cert", "other", "other", "KeyMismatch"),
        ] {
            let error = server(&path(cert), &path(key)).unwrap_err().to_string();
            assert!(error.contains(named) && error.contains(why), "{error}");
        }
    }
}
