//! A directory with everything a daemon needs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WantsClientCert;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::{ClientConfig, ConfigBuilder};

use super::sign::Producer;

/// Value of `Authorization`.
pub(crate) const TOKEN: &str = "Splunk s3cr/et token=";

/// Path of the default source.
pub(crate) const PATH: &str = "/konnect/us";

/// A directory with certificates, keys and a configuration. It is removed when this is dropped.
pub(crate) struct Site {
    directory: tempfile::TempDir,
    /// The producer whose key the default source trusts.
    pub(crate) producer: Producer,
    /// TLS configuration of a client that trusts the daemon.
    pub(crate) client: Arc<ClientConfig>,
    is_plain: bool,
    limits: String,
    sources: String,
    sinks: String,
}

impl Site {
    /// A site with a source `us` that requires signatures, a raw file of verified events, and a
    /// quarantine.
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let producer = Producer::new(1);
        std::fs::write(directory.path().join("jwks.json"), producer.jwks()).unwrap();
        let client = certificates(directory.path());
        let site = Self {
            directory,
            producer,
            client,
            is_plain: false,
            limits: String::new(),
            sources: source("us", PATH, ""),
            sinks: raw_sinks(),
        };
        site.configure();
        site
    }

    /// Sets the lines of `[limits]`.
    pub(crate) fn limits(mut self, limits: &str) -> Self {
        self.limits = limits.to_owned();
        self.configure();
        self
    }

    /// Sets the tables of sources, see [`source`].
    pub(crate) fn sources(mut self, sources: &str) -> Self {
        self.sources = sources.to_owned();
        self.configure();
        self
    }

    /// Sets the tables of sinks, see [`sink`].
    pub(crate) fn sinks(mut self, sinks: &str) -> Self {
        self.sinks = sinks.to_owned();
        self.configure();
        self
    }

    /// Turns TLS off.
    pub(crate) fn plain(mut self) -> Self {
        self.is_plain = true;
        self.configure();
        self
    }

    pub(crate) fn is_plain(&self) -> bool {
        self.is_plain
    }

    /// Returns a path in the directory.
    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Reads a file in the directory; a missing file is empty.
    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        match std::fs::read(self.path(name)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => panic!("{name}: {error}"),
        }
    }

    /// Writes a file in the directory.
    pub(crate) fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), contents).unwrap();
    }

    /// Returns the raw lines of the rotated files of `verified.log`, then its own.
    pub(crate) fn verified(&self) -> Vec<String> {
        lines(&self.with_rotated("verified.log"))
    }

    /// Returns the names of a file's rotated files, oldest first.
    pub(crate) fn rotated(&self, name: &str) -> Vec<String> {
        let prefix = format!("{name}.");
        let mut names: Vec<String> = std::fs::read_dir(self.directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|found| found.starts_with(&prefix))
            .collect();
        names.sort();
        names
    }

    /// Reads the rotated files of a file, oldest first, then the file. Rotated files must hold
    /// whole lines.
    pub(crate) fn with_rotated(&self, name: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        for name in self.rotated(name) {
            bytes.extend(self.read(&name));
            assert!(bytes.is_empty() || bytes.ends_with(b"\n"), "the last line of {name} is torn");
        }
        bytes.extend(self.read(name));
        bytes
    }

    /// Replaces text in the configuration; the text must occur in it.
    pub(crate) fn edit(self, from: &str, to: &str) -> Self {
        self.reconfigure(from, to);
        self
    }

    /// Replaces text in the configuration, possibly of a running daemon.
    pub(crate) fn reconfigure(&self, from: &str, to: &str) {
        let text = String::from_utf8(self.read("config.toml")).unwrap();
        assert!(text.contains(from), "{from} is not in {text}");
        self.write("config.toml", text.replacen(from, to, 1));
    }

    fn configure(&self) {
        let tls = if self.is_plain { "\"off\"" } else { "{ cert = \"cert.pem\", key = \"key.pem\" }" };
        let Self { limits, sources, sinks, .. } = self;
        self.write(
            "config.toml",
            format!(
                "data_dir = \"data\"\n\n[listen]\naddress = \"127.0.0.1:0\"\ntls = {tls}\n\n[admin]\naddress = \
                 \"127.0.0.1:0\"\n\n[limits]\n{limits}\n{sources}\n{sinks}"
            ),
        );
    }
}

/// Returns the table of a source that trusts `jwks.json`, with further lines.
pub(crate) fn source(name: &str, path: &str, more: &str) -> String {
    let jwks = if more.contains("jwks") { "" } else { "jwks = { file = \"jwks.json\" }" };
    format!(
        "[sources.{name}]\npath = \"{path}\"\nauthorization = {{ value = \"{TOKEN}\" }}\n{jwks}\n{more}\n"
    )
}

/// Returns the table of a file sink; its file is `NAME.log` or `NAME.jsonl`.
pub(crate) fn sink(name: &str, format: &str, streams: &str) -> String {
    let extension = if format == "raw" { "log" } else { "jsonl" };
    format!(
        "[sinks.{name}]\ntype = \"file\"\nstream = {streams}\npath = \"{name}.{extension}\"\nformat = \
         \"{format}\"\n"
    )
}

/// Returns the table of a SQLite sink `search`.
pub(crate) fn sqlite_sink(path: &str, streams: &str) -> String {
    format!("[sinks.search]\ntype = \"sqlite\"\npath = \"{path}\"\nstream = {streams}\n")
}

/// Returns the table of a syslog sink `siem`, with further lines.
pub(crate) fn syslog_sink(address: &str, more: &str) -> String {
    format!("[sinks.siem]\ntype = \"syslog\"\naddress = \"{address}\"\n{more}")
}

/// Returns the tables of two file sinks: `verified`, raw, and `quarantine`.
pub(crate) fn raw_sinks() -> String {
    sink("verified", "raw", "\"verified\"") + &sink("quarantine", "json", "\"quarantine\"")
}

/// Returns the tables of three file sinks: those of [`raw_sinks`], and `events`, which has verified
/// events as JSON.
pub(crate) fn raw_and_json_sinks() -> String {
    raw_sinks() + &sink("events", "json", "\"verified\"")
}

/// Returns the lines of a file that holds whole lines only.
pub(crate) fn lines(bytes: &[u8]) -> Vec<String> {
    let text = std::str::from_utf8(bytes).expect("lines of text");
    assert!(text.is_empty() || text.ends_with('\n'), "the last line is torn: {text:?}");
    text.lines().map(str::to_owned).collect()
}

/// Returns the whole lines of a file that is still being written.
pub(crate) fn whole_lines(bytes: &[u8]) -> Vec<String> {
    let end = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
    lines(&bytes[..end])
}

/// Writes a CA (`ca.pem`, `ca-key.pem`) and the daemon's certificate from it (`cert.pem`,
/// `key.pem`); returns the TLS configuration of a client that trusts the CA.
pub(crate) fn certificates(directory: &Path) -> Arc<ClientConfig> {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut parameters = rcgen::CertificateParams::default();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    parameters.distinguished_name.push(rcgen::DnType::CommonName, "Test CA");
    parameters.key_usages.push(rcgen::KeyUsagePurpose::KeyCertSign);
    let ca = parameters.self_signed(&ca_key).unwrap();
    let issuer = rcgen::Issuer::from_params(&parameters, &ca_key);

    let key = rcgen::KeyPair::generate().unwrap();
    let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
    let certificate = rcgen::CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();

    std::fs::write(directory.join("ca.pem"), ca.pem()).unwrap();
    std::fs::write(directory.join("ca-key.pem"), ca_key.serialize_pem()).unwrap();
    std::fs::write(directory.join("cert.pem"), certificate.pem()).unwrap();
    std::fs::write(directory.join("key.pem"), key.serialize_pem()).unwrap();

    Arc::new(trust(directory).with_no_client_auth())
}

/// Replaces the daemon's certificate by one from the same CA that has expired.
pub(crate) fn expire_certificate(directory: &Path) {
    let mut parameters = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
    parameters.not_before = rcgen::date_time_ymd(2020, 1, 1);
    parameters.not_after = rcgen::date_time_ymd(2021, 1, 1);
    let (certificate, key) = certify(directory, &parameters);
    std::fs::write(directory.join("cert.pem"), certificate.pem()).unwrap();
    std::fs::write(directory.join("key.pem"), key.serialize_pem()).unwrap();
}

/// Issues a certificate by the CA of a directory, for a new key.
fn certify(directory: &Path, parameters: &rcgen::CertificateParams) -> (rcgen::Certificate, rcgen::KeyPair) {
    let ca_key = std::fs::read_to_string(directory.join("ca-key.pem")).unwrap();
    let ca_key = rcgen::KeyPair::from_pem(&ca_key).unwrap();
    let mut ca = rcgen::CertificateParams::default();
    ca.distinguished_name.push(rcgen::DnType::CommonName, "Test CA");
    let issuer = rcgen::Issuer::from_params(&ca, &ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    (parameters.signed_by(&key, &issuer).unwrap(), key)
}

/// Returns the TLS configuration of a client with a certificate for that name, issued by the CA of
/// a directory.
pub(crate) fn client_with_certificate(site: &Site, certified_in: &Path, name: &str) -> Arc<ClientConfig> {
    let parameters = rcgen::CertificateParams::new([name.to_owned()]).unwrap();
    let (certificate, key) = certify(certified_in, &parameters);
    let private = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
    let chain = vec![certificate.der().clone()];
    Arc::new(trust(&site.path("")).with_client_auth_cert(chain, private).unwrap())
}

/// Begins the TLS configuration of a client that trusts the CA of a directory.
fn trust(directory: &Path) -> ConfigBuilder<ClientConfig, WantsClientCert> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(directory.join("ca.pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
}
