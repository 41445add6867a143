//! Certificates and what the listener offers with them: TLS 1.2 and 1.3 (RFC 5246, RFC 8446), HTTP/1.1 only. They
//! are replaced while the daemon runs; what is wrong with the new ones never costs the old ones.

mod clients;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::RwLock;
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
    /// The file of the clients' authorities.
    #[error("cannot use {path} as the authority of clients: {cause}")]
    ClientCa {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// It could be served, and no client would believe it.
    #[error("the certificate {path} is not in order: {cause}")]
    Doubtful {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: String,
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

/// The files of the listener's identity, and of those whom it lets in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// PEM: the server's certificate, then its intermediates.
    pub cert: PathBuf,
    /// PEM: its private key.
    pub key: PathBuf,
    /// PEM: the authorities of clients; every client must show a certificate then.
    pub client_ca: Option<PathBuf>,
    /// What a client's certificate must be for, if anything: see [`Certificates`].
    pub client_names: Vec<String>,
}

/// What the listener serves, replaced while it serves. A connection keeps what it began with.
///
/// With `client_names`, a client's certificate must have one of them: its subject (RFC 4514), or a DNS name, e-mail
/// address or URI among its alternative names, compared exactly.
#[derive(Debug)]
pub struct Certificates {
    current: RwLock<Current>,
}

#[derive(Clone, Debug)]
struct Current {
    files: Files,
    /// What the files looked like when they were loaded.
    stamps: Stamps,
    /// What they looked like when they were found to be bad.
    overlooked: Option<Stamps>,
    config: Arc<ServerConfig>,
    not_after: Option<i64>,
}

/// Device, inode, size and time of change: a file with the same is taken for the same.
type Stamp = (u64, u64, u64, i64, i64);

type Stamps = Vec<Option<Stamp>>;

impl Certificates {
    /// Loads what is to be served. What is doubtful about it (it has expired, its chain is out of order) is said in
    /// the log: a daemon that serves it can still be looked at.
    ///
    /// # Errors
    /// See [`TlsError`].
    pub fn load(files: Files, now: i64) -> Result<Self, TlsError> {
        let (current, doubt) = Current::load(files, now)?;
        if let Some(doubt) = doubt {
            tracing::error!("{doubt}; clients may refuse it");
        }
        Ok(Self { current: RwLock::new(current) })
    }

    /// For the next connection.
    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.read().config)
    }

    /// When the first of the server's certificate and its intermediates expires, in seconds since the Unix epoch; none when it does not say so in
    /// the way of RFC 5280.
    pub fn not_after(&self) -> Option<i64> {
        self.current.read().not_after
    }

    /// Takes the files up that are served, if they have changed: whether they have. Bad ones are complained about
    /// once, and looked at again when they change again. `now` is in seconds since the Unix epoch.
    ///
    /// # Errors
    /// As for [`Certificates::replace`].
    pub fn follow(&self, now: i64) -> Result<bool, TlsError> {
        let (files, stamps) = {
            let current = self.current.read();
            // Before they are read: what changes meanwhile has changed again.
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

    /// Checks other files, or the same ones in their present state, and serves them from the next connection on.
    /// `now` is in seconds since the Unix epoch.
    ///
    /// # Errors
    /// See [`TlsError`]; an expired certificate and a chain out of order are errors, too, unless they are what is
    /// served already. Then everything stays as it is.
    pub fn replace(&self, files: Files, now: i64) -> Result<(), TlsError> {
        if self.current.read().serves(&files) {
            return Ok(());
        }
        let (fresh, doubt) = Current::load(files, now)?;
        if let Some(doubt) = doubt {
            return Err(doubt);
        }
        *self.current.write() = fresh;
        Ok(())
    }
}

impl Current {
    /// Whether these files, as they are, have been taken up.
    fn serves(&self, files: &Files) -> bool {
        self.files == *files && self.stamps == stamps(files)
    }

    /// With what is doubtful about it.
    fn load(files: Files, now: i64) -> Result<(Self, Option<TlsError>), TlsError> {
        // Before they are read: a change meanwhile is seen afterwards.
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
        let doubt = doubt(cert, &chain, now);
        if is_alone(&chain) {
            tracing::warn!(
                path = %cert.display(),
                "the certificate stands alone in its file, without the one of its issuer; clients that do not know the \
                 issuer refuse it: append the intermediate certificates"
            );
        }
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
        // The strongest that both know, whatever the client would rather have.
        config.ignore_client_order = true;
        Ok((Self { stamps, overlooked: None, config: Arc::new(config), not_after, files }, doubt))
    }
}

fn stamps(files: &Files) -> Stamps {
    use std::os::unix::fs::MetadataExt as _;
    let stamp = |path: &PathBuf| {
        let found = std::fs::metadata(path).ok()?;
        Some((found.dev(), found.ino(), found.len(), found.mtime(), found.mtime_nsec()))
    };
    [Some(&files.cert), Some(&files.key), files.client_ca.as_ref()].into_iter().flatten().map(stamp).collect()
}

/// What will make clients refuse a chain that can be served.
fn doubt(path: &Path, chain: &[CertificateDer<'_>], now: i64) -> Option<TlsError> {
    // What cannot be taken apart is for others to judge.
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

/// Whether there is a single certificate, which is not its own issuer.
fn is_alone(chain: &[CertificateDer<'_>]) -> bool {
    let [only] = chain else { return false };
    x509_cert::Certificate::from_der(only)
        .is_ok_and(|only| only.tbs_certificate().issuer() != only.tbs_certificate().subject())
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
        let server = |cert: &Path, key: &Path| {
            let (cert, key) = (cert.to_owned(), key.to_owned());
            Certificates::load(Files { cert, key, client_ca: None, client_names: Vec::new() }, 0)
        };
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

    /// Writes a certificate valid in `years`, signed by an authority or by itself, and its key.
    fn write(
        dir: &Path,
        name: &str,
        years: [i32; 2],
        by: Option<&rcgen::Issuer<'_, rcgen::KeyPair>>,
    ) -> String {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut parameters = rcgen::CertificateParams::new([format!("{name}.example.com")]).unwrap();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
        parameters.not_before = rcgen::date_time_ymd(years[0], 1, 1);
        parameters.not_after = rcgen::date_time_ymd(years[1], 1, 1);
        let made = match by {
            Some(issuer) => parameters.signed_by(&key, issuer).unwrap(),
            None => parameters.self_signed(&key).unwrap(),
        };
        std::fs::write(dir.join(format!("{name}.pem")), made.pem()).unwrap();
        std::fs::write(dir.join(format!("{name}-key.pem")), key.serialize_pem()).unwrap();
        made.pem()
    }

    #[test]
    fn a_bad_replacement_is_named_and_the_old_goes_on() {
        // The year 2020.
        const NOW: i64 = 1_590_000_000;
        let dir = tempfile::tempdir().unwrap();
        let files = |name: &str| Files {
            cert: dir.path().join(format!("{name}.pem")),
            key: dir.path().join(format!("{name}-key.pem")),
            client_ca: None,
            client_names: Vec::new(),
        };
        let ca_key = rcgen::KeyPair::generate().unwrap();
        let mut parameters = rcgen::CertificateParams::default();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        parameters.distinguished_name.push(rcgen::DnType::CommonName, "the authority");
        let ca = parameters.self_signed(&ca_key).unwrap();
        let issuer = rcgen::Issuer::from_params(&parameters, ca_key);
        write(dir.path(), "good", [2019, 2030], None);
        write(dir.path(), "new", [2019, 2031], Some(&issuer));
        write(dir.path(), "old", [2010, 2019], None);
        write(dir.path(), "early", [2025, 2030], None);
        let own = write(dir.path(), "chain", [2019, 2030], Some(&issuer));
        let certificates = Certificates::load(files("good"), NOW).unwrap();
        let end = certificates.not_after();
        std::fs::write(dir.path().join("chain.pem"), own.clone() + &own).unwrap();
        let mut foreign = files("new");
        foreign.key = files("good").key;
        for (bad, why) in [
            (files("old"), "expired on 2019-01-01"),
            (files("early"), "not valid before 2025-01-01"),
            (files("chain"), "certificate 2 in it does not come from the issuer of certificate 1"),
            (files("missing"), "No such file"),
            (foreign, "KeyMismatch"),
            (Files { client_ca: Some(files("old").key), ..files("new") }, "as the authority of clients"),
        ] {
            let error = certificates.replace(bad, NOW).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
            assert_eq!((certificates.not_after(), &certificates.current.read().files), (end, &files("good")));
        }
        std::fs::write(dir.path().join("chain.pem"), own + &ca.pem()).unwrap();
        certificates.replace(files("chain"), NOW).unwrap();
        certificates.replace(files("new"), NOW).unwrap();
        assert_ne!(certificates.not_after(), end);
        assert!(!certificates.follow(NOW).unwrap());
        write(dir.path(), "new", [2019, 2032], None);
        assert!(certificates.follow(NOW).unwrap());
        assert!(!certificates.follow(NOW).unwrap());
        // A bad one is complained about once, here; who reloads everything hears it each time.
        let served = certificates.not_after();
        std::fs::write(dir.path().join("new.pem"), "").unwrap();
        assert!(certificates.follow(NOW).is_err());
        assert!(!certificates.follow(NOW).unwrap());
        assert!(certificates.replace(files("new"), NOW).is_err());
        assert_eq!(certificates.not_after(), served);
        write(dir.path(), "new", [2019, 2033], None);
        assert!(certificates.follow(NOW).unwrap());
    }

    #[test]
    fn what_is_served_already_keeps_nothing_from_being_reloaded() {
        // The year 2020.
        const NOW: i64 = 1_590_000_000;
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "old", [2010, 2019], None);
        let path = |name: &str| dir.path().join(name);
        let old = Files {
            cert: path("old.pem"),
            key: path("old-key.pem"),
            client_ca: None,
            client_names: Vec::new(),
        };
        // At the start even what has expired is served.
        let certificates = Certificates::load(old.clone(), NOW).unwrap();
        certificates.replace(old.clone(), NOW).unwrap();
        write(dir.path(), "old", [2010, 2018], None);
        assert!(certificates.replace(old, NOW).is_err());
    }

    #[test]
    fn a_change_while_bad_files_are_looked_at_is_seen_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        write(dir.path(), "one", [2019, 2030], None);
        write(dir.path(), "two", [2019, 2031], None);
        let files = Files {
            cert: path("one.pem"),
            key: path("one-key.pem"),
            client_ca: None,
            client_names: Vec::new(),
        };
        let certificates = Certificates::load(files, 1_590_000_000).unwrap();
        let end = certificates.not_after();
        // Half of a renewal; the other half comes while the first is being read.
        std::fs::rename(path("two.pem"), path("one.pem")).unwrap();
        let former = std::fs::read(path("one-key.pem")).unwrap();
        std::fs::remove_file(path("one-key.pem")).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(path("one-key.pem")).status().unwrap().success());
        std::thread::scope(|scope| {
            let followed = scope.spawn(|| certificates.follow(1_590_000_000));
            // Opened when the other end is.
            let mut half = std::fs::File::options().write(true).open(path("one-key.pem")).unwrap();
            std::fs::rename(path("two-key.pem"), path("one-key.pem")).unwrap();
            std::io::Write::write_all(&mut half, &former).unwrap();
            drop(half);
            assert!(followed.join().unwrap().is_err());
        });
        assert!(certificates.follow(1_590_000_000).unwrap());
        assert_ne!(certificates.not_after(), end);
    }

    #[test]
    fn the_end_is_that_of_the_first_to_expire() {
        let dir = tempfile::tempdir().unwrap();
        let own = write(dir.path(), "leaf", [2019, 2030], None);
        let other = write(dir.path(), "intermediate", [2019, 2021], None);
        std::fs::write(dir.path().join("leaf.pem"), own + &other).unwrap();
        let path = |name: &str| dir.path().join(name);
        let files = Files {
            cert: path("leaf.pem"),
            key: path("leaf-key.pem"),
            client_ca: None,
            client_names: Vec::new(),
        };
        let end = rcgen::date_time_ymd(2021, 1, 1).unix_timestamp();
        assert_eq!(Certificates::load(files, 1_590_000_000).unwrap().not_after(), Some(end));
    }
}
