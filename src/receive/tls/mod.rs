//! Certificates and TLS settings of the listener: TLS 1.2 and 1.3 (RFC 5246, RFC 8446), HTTP/1.1
//! only. Certificates are replaced while the daemon runs; an error in the new ones never costs the
//! old ones.

mod clients;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::RwLock;
use rustls::ServerConfig;
use rustls::pki_types::pem::{Error as PemError, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_cert::der::Decode as _;
use x509_cert::ext::pkix::{BasicConstraints, SubjectAltName};

use crate::net::tls;

/// Reason why the listener's TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The certificate file.
    #[error(
        "cannot read the certificate {path}: {cause}; it must be a PEM file, the server's certificate first"
    )]
    Certificate {
        /// The file.
        path: PathBuf,
        /// The underlying error.
        cause: PemCause,
    },
    /// The key file.
    #[error("cannot read the private key {path}: {cause}; it must be an unencrypted PEM file")]
    Key {
        /// The file.
        path: PathBuf,
        /// The underlying error.
        cause: PemCause,
    },
    /// They do not belong together, or the key is of an unsupported kind.
    #[error("the certificate {cert} cannot be used with the key {key}: {}", tls::describe(.cause))]
    Pair {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// The underlying error.
        cause: rustls::Error,
    },
    /// The file of the clients' authorities.
    #[error("cannot use {path} as the authority of clients: {cause}")]
    ClientCa {
        /// The file.
        path: PathBuf,
        /// The underlying error.
        cause: String,
    },
    /// The chain can be served, but clients will refuse it.
    #[error("the certificate {path} is not in order: {cause}")]
    Doubtful {
        /// The file.
        path: PathBuf,
        /// The underlying error.
        cause: String,
    },
}

/// Error of a PEM file (RFC 7468).
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

/// Files of the listener's identity, and of the authorities whose clients it admits.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// PEM: the server's certificate, then its intermediates.
    pub cert: PathBuf,
    /// PEM: its private key.
    pub key: PathBuf,
    /// PEM: the authorities of clients. With it, every client must show a certificate.
    pub client_ca: Option<PathBuf>,
    /// Names of which a client's certificate must have one, if any: see [`Certificates`]. Only with
    /// `client_ca`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub client_names: Vec<String>,
}

/// The certificates of the listener, replaced while it serves. A connection keeps those it began
/// with.
///
/// With `client_names`, a client's certificate must have one of them: its subject (RFC 4514), or a
/// DNS name, e-mail address or URI among its alternative names, compared exactly.
#[derive(Debug)]
pub struct Certificates {
    current: RwLock<Current>,
}

/// Result of [`Certificates::examine`].
#[derive(Debug)]
pub struct Examined {
    /// Reason why clients refuse the certificate.
    pub doubt: Option<String>,
    /// Reasons why some clients refuse it and others do not, one line each.
    pub weaknesses: Vec<String>,
    /// See [`Certificates::not_after`].
    pub not_after: Option<i64>,
}

#[derive(Clone, Debug)]
struct Current {
    files: Files,
    /// Stamps of the files when they were loaded.
    stamps: Stamps,
    /// Stamps of the files when they were found to be bad.
    overlooked: Option<Stamps>,
    config: Arc<ServerConfig>,
    not_after: Option<i64>,
    names: Vec<String>,
    /// Reasons why some clients refuse the certificate and others do not.
    weaknesses: Vec<String>,
}

/// Device, inode, size and time of the last change, that of its rights included: a file with the same
/// stamp is taken for the same.
type Stamp = (u64, u64, u64, i64, i64);

type Stamps = Vec<Option<Stamp>>;

impl Certificates {
    /// Loads the certificates. A doubtful one (it has expired, its chain is out of order) is logged
    /// and served all the same: a daemon that serves it can still be examined.
    ///
    /// # Errors
    /// See [`TlsError`].
    pub fn load(files: Files, now: i64) -> Result<Self, TlsError> {
        let (current, doubt) = Current::load(files, now)?;
        if let Some(doubt) = doubt {
            tracing::error!(code = "certificate-doubtful", "{doubt}; clients may refuse it");
        }
        current.log_weaknesses();
        Ok(Self { current: RwLock::new(current) })
    }

    /// Loads the files as [`Certificates::load`] does; returns why clients may refuse the certificate
    /// instead of logging it.
    ///
    /// # Errors
    /// See [`TlsError`].
    pub fn examine(files: Files, now: i64) -> Result<Examined, TlsError> {
        let (current, doubt) = Current::load(files, now)?;
        let doubt = doubt.map(|doubt| doubt.to_string());
        Ok(Examined { doubt, weaknesses: current.weaknesses, not_after: current.not_after })
    }

    /// Returns the TLS configuration for the next connection.
    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.read().config)
    }

    /// Returns when the first of the server's certificate and its intermediates expires, in seconds
    /// since the Unix epoch; none when it cannot be read as RFC 5280 defines it.
    pub fn not_after(&self) -> Option<i64> {
        self.current.read().not_after
    }

    /// Returns the names of the server's certificate, for people: its subject, and the DNS names, e-mail
    /// addresses and URIs among its alternative names; none when it cannot be read as RFC 5280 defines it.
    pub fn names(&self) -> Vec<String> {
        self.current.read().names.clone()
    }

    /// Loads the files again if they have changed, and returns whether they have. Bad ones are
    /// reported once, and examined again when they change again. `now` is in seconds since the Unix
    /// epoch.
    ///
    /// # Errors
    /// As for [`Certificates::replace`].
    pub fn follow(&self, now: i64) -> Result<bool, TlsError> {
        let (files, stamps) = {
            let current = self.current.read();
            // Before the files are read: what changes meanwhile has changed again.
            let stamps = stamps(&current.files);
            if stamps == current.stamps || Some(&stamps) == current.overlooked.as_ref() {
                return Ok(false);
            }
            (current.files.clone(), stamps)
        };
        self.replace(files, now).map(|()| true).inspect_err(|_| {
            self.current.write().overlooked = Some(stamps);
        })
    }

    /// Checks other files, or the same ones in their present state, and serves them from the next
    /// connection on. `now` is in seconds since the Unix epoch.
    ///
    /// # Errors
    /// See [`TlsError`]; an expired certificate and a chain out of order are errors, too, unless
    /// they are served already. Then nothing changes.
    pub fn replace(&self, files: Files, now: i64) -> Result<(), TlsError> {
        if self.current.read().serves(&files) {
            return Ok(());
        }
        let (fresh, doubt) = Current::load(files, now)?;
        if let Some(doubt) = doubt {
            return Err(doubt);
        }
        fresh.log_weaknesses();
        *self.current.write() = fresh;
        Ok(())
    }
}

impl Current {
    fn log_weaknesses(&self) {
        for weakness in &self.weaknesses {
            tracing::warn!(code = "certificate-weak", "{weakness}");
        }
    }

    /// Returns whether these files, as they are, are served.
    fn serves(&self, files: &Files) -> bool {
        self.files == *files && self.stamps == stamps(files)
    }

    /// Loads the files. Also returns what is doubtful about them.
    fn load(files: Files, now: i64) -> Result<(Self, Option<TlsError>), TlsError> {
        // Before the files are read: a change meanwhile is seen afterwards.
        let stamps = stamps(&files);
        let Files { cert, key, client_ca, client_names } = &files;
        let unreadable = |cause: PemError| TlsError::Certificate { path: cert.clone(), cause: cause.into() };
        let chain = CertificateDer::pem_file_iter(cert)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(unreadable)?;
        if chain.is_empty() {
            return Err(unreadable(PemError::NoItemsFound));
        }
        let not_after = chain.iter().filter_map(|certificate| not_after(certificate)).min();
        let names = chain.first().map(|leaf| clients::names(leaf)).unwrap_or_default();
        let doubt = doubt(cert, &chain, now);
        let weaknesses = weaknesses(cert, &chain);
        let private = PrivateKeyDer::from_pem_file(key)
            .map_err(|cause| TlsError::Key { path: key.clone(), cause: cause.into() })?;
        let pair = |cause| TlsError::Pair { cert: cert.clone(), key: key.clone(), cause };
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(pair)?;
        let builder = match client_ca {
            Some(ca) => builder.with_client_cert_verifier(clients::verifier(ca, client_names, provider)?),
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_single_cert(chain, private).map_err(pair)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // The strongest cipher suite that both know, whatever the client prefers.
        config.ignore_client_order = true;
        Ok((
            Self { stamps, overlooked: None, config: Arc::new(config), not_after, names, files, weaknesses },
            doubt,
        ))
    }
}

fn stamps(files: &Files) -> Stamps {
    use std::os::unix::fs::MetadataExt as _;
    let stamp = |path: &PathBuf| {
        let found = std::fs::metadata(path).ok()?;
        Some((found.dev(), found.ino(), found.len(), found.ctime(), found.ctime_nsec()))
    };
    [Some(&files.cert), Some(&files.key), files.client_ca.as_ref()].into_iter().flatten().map(stamp).collect()
}

/// Returns the reason why clients will refuse a chain that can be served, if any.
fn doubt(path: &Path, chain: &[CertificateDer<'_>], now: i64) -> Option<TlsError> {
    // A certificate that cannot be parsed here is left to the clients.
    let chain: Vec<_> = chain
        .iter()
        .map(|certificate| x509_cert::Certificate::from_der(certificate))
        .collect::<Result<_, _>>()
        .ok()?;
    let doubt = |cause: String| Some(TlsError::Doubtful { path: path.to_owned(), cause });
    for (number, certificate) in chain.iter().enumerate() {
        let named = certificate.tbs_certificate();
        let validity = named.validity();
        let moment = |time: x509_cert::time::Time| i64::try_from(time.to_unix_duration().as_secs()).ok();
        if moment(validity.not_after).is_some_and(|end| end < now) {
            return doubt(format!("certificate {} in it expired on {}", number + 1, validity.not_after));
        }
        if moment(validity.not_before).is_some_and(|start| start > now) {
            return doubt(format!(
                "certificate {} in it is not valid before {}",
                number + 1,
                validity.not_before
            ));
        }
        if let Some(next) = chain.get(number + 1)
            && named.issuer() != next.tbs_certificate().subject()
        {
            return doubt(format!(
                "certificate {} in it does not come from the issuer of certificate {}; the server's comes first, then \
                 each one's issuer",
                number + 2,
                number + 1
            ));
        }
    }
    None
}

/// Returns the reasons why some clients refuse a certificate that others take.
fn weaknesses(path: &Path, chain: &[CertificateDer<'_>]) -> Vec<String> {
    let path = path.display();
    let Some(leaf) = chain.first().and_then(|leaf| x509_cert::Certificate::from_der(leaf).ok()) else {
        return Vec::new();
    };
    let leaf = leaf.tbs_certificate();
    let mut found = Vec::new();
    if chain.len() == 1 && leaf.issuer() != leaf.subject() {
        found.push(format!(
            "{path} holds one certificate, without the one of its issuer; clients that do not know the issuer refuse \
             it: append the intermediate certificates"
        ));
    }
    // RFC 5280, section 4.2.1.9.
    if leaf.get_extension::<BasicConstraints>().is_ok_and(|found| found.is_some_and(|(_, is)| is.ca)) {
        found.push(format!(
            "the certificate {path} is that of a certificate authority, as `openssl req -x509` makes it; many clients \
             refuse it for a server: issue one from it without CA:TRUE"
        ));
    }
    // RFC 9525, section 6.3: the common name does not count.
    if leaf.get_extension::<SubjectAltName>().is_ok_and(|names| names.is_none()) {
        found.push(format!(
            "the certificate {path} has no subject alternative name, which clients compare with the host in the URL: \
             issue one with the name that senders use"
        ));
    }
    found
}

/// Returns the end of a certificate's validity (RFC 5280, section 4.1.2.5).
fn not_after(certificate: &[u8]) -> Option<i64> {
    let certificate = x509_cert::Certificate::from_der(certificate).ok()?;
    let end = certificate.tbs_certificate().validity().not_after.to_unix_duration();
    i64::try_from(end.as_secs()).ok()
}

#[cfg(test)]
mod tests;
