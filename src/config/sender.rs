//! The configuration of the sender as a service: `auditgate send --config FILE`.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ::time::OffsetDateTime;
use ::time::format_description::well_known::Rfc3339;
use serde::{Deserialize, Deserializer, Serialize};

use super::check::{self, is_name};
use super::document::Document;
use super::{Admin, AdminAddress, ConfigError, LONGEST_SOCKET_PATH, Log, Problem, Secrets, socket_address};
use crate::net::{ClientOptions, Endpoint, Identity, Pin};
use crate::quantity::{by_text, count, parsed, size, time};
use crate::secret::{Environment, Secret};
use crate::wire::event::Format;

/// The effective configuration of a sender. All paths are absolute.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SenderConfig {
    /// The file that this was loaded from.
    #[serde(skip)]
    pub file: PathBuf,
    /// The directory of the spool and of the lines that cannot be sent; required.
    pub data_dir: PathBuf,
    /// Bytes that may wait in the spool; at that, the inputs are not read. Default 4 GiB.
    #[serde(default = "spool_size", with = "size")]
    pub spool_size: u64,
    /// Format of the events; by default as they came, plain objects as JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Treatment of signatures. Default [`Signatures::Sign`].
    #[serde(default)]
    pub signatures: Signatures,
    /// Where lines are posted; required.
    pub receiver: Receiver,
    /// Keys to sign with; present where `signatures` is [`Signatures::Sign`], and only there.
    pub signing: Option<Signing>,
    /// Sources of lines by name: at least one. Names are as those of the receiver's sources.
    #[serde(default)]
    pub inputs: BTreeMap<String, Input>,
    /// Socket for metrics, health and status. Default 127.0.0.1:9465.
    #[serde(default = "admin")]
    pub admin: Admin,
    /// The service's own log.
    #[serde(default)]
    pub log: Log,
}

/// Treatment of signatures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Signatures {
    /// Each event is signed; a signature that it had is replaced.
    #[default]
    Sign,
    /// Lines are signed already, and passed through untouched; others are set aside.
    Relay,
    /// Events are sent without a signature.
    Off,
}

/// Where lines are posted, and how.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct Receiver {
    /// https, or http on loopback. Required.
    pub url: Endpoint,
    /// Value of the `Authorization` header, scheme included.
    pub authorization: Option<Secret>,
    /// PEM file with the only authorities to trust; without it, the system's.
    pub ca: Option<PathBuf>,
    /// Client certificate and its intermediates, in PEM; with `key`.
    pub cert: Option<PathBuf>,
    /// Its private key, in PEM.
    pub key: Option<PathBuf>,
    /// SHA-256 of the public keys that the server's certificate may have, as `sha256//BASE64`; any
    /// by default. The certificate must be trusted as well.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pin: Vec<Pin>,
    /// URL of the HTTP proxy to use instead of those of the environment.
    pub proxy: Option<String>,
    /// Maximum number of events in one batch. Default 500.
    #[serde(default = "batch_events", with = "count")]
    pub batch_events: usize,
    /// Maximum number of bytes in one batch, before compression. Default 1 MiB.
    #[serde(default = "batch_bytes", with = "size")]
    pub batch_bytes: usize,
    /// Maximum time that an event waits for others to share its batch: 1 ms to 3650 d. Default 250 ms.
    #[serde(default = "linger", with = "time")]
    pub linger: Duration,
    /// Maximum number of batches in flight; with more than one their order is not kept. Default 1.
    #[serde(default = "one", with = "count")]
    pub connections: usize,
    /// Maximum number of events a second; any by default.
    #[serde(default, with = "count")]
    pub rate: Option<usize>,
    /// Timeout of one post: 1 ms to 3650 d. Default 30 s.
    #[serde(default = "timeout", with = "time")]
    pub timeout: Duration,
}

/// Keys to sign with, and where their public halves are published.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct Signing {
    /// At least one. Of those whose time has come, the one with the latest time signs; all are
    /// published.
    pub keys: Vec<SigningKeyOptions>,
    /// File to which the key set is written whenever it changes; none by default.
    pub jwks: Option<PathBuf>,
    /// Address on which the key set is served over plain HTTP at `/jwks.json`; none by default.
    #[serde(default, deserialize_with = "jwks_address", skip_serializing_if = "Option::is_none")]
    pub serve_jwks: Option<SocketAddr>,
}

/// One signing key: an Ed25519 key in PKCS#8 PEM.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    expecting = "a table such as { file = \"signing-key.pem\" } or { credential = \"NAME\" }"
)]
#[derive(Default)]
pub struct SigningKeyOptions {
    /// Its file.
    pub file: Option<PathBuf>,
    /// Name of the systemd credential that is the file.
    pub credential: Option<String>,
    /// Time from which it signs; from the beginning without one.
    pub from: Option<SigningStart>,
}

/// Time from which a key signs (RFC 3339).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SigningStart(pub OffsetDateTime);

/// A source of lines. serde has the keys of its type below `type`; in the file they stand among the
/// others.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct Input {
    /// Type, and the options of the type.
    #[serde(rename = "type")]
    pub kind: InputKind,
}

/// The types of inputs.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum InputKind {
    /// Files that grow and are rotated.
    File(FileInput),
    /// A datagram socket: one message is one or several lines.
    UnixDatagram(SocketInput),
    /// A stream socket.
    UnixStream(SocketInput),
    /// Standard input, of a sender on a command line only.
    #[serde(skip)]
    Stdin,
}

/// Files that are followed.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct FileInput {
    /// A file, a pattern with `*` or `?` in its last part, or a directory, which means the files in
    /// it. Required.
    pub path: PathBuf,
    /// Where files begin that are there at the first start. Default [`Start::Beginning`].
    #[serde(default)]
    pub start: Start,
}

/// Where a file begins that is there at the first start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Start {
    /// With its first line.
    #[default]
    Beginning,
    /// With what is appended from then on.
    End,
}

/// A socket for producers on this machine.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct SocketInput {
    /// Its file, at most 107 bytes. Required.
    pub path: PathBuf,
    /// Permission bits of the file. Default 0660.
    #[serde(default = "socket_mode", with = "crate::quantity::octal")]
    pub mode: u32,
}

impl SenderConfig {
    /// Reads and checks a configuration file and the secrets that it names: see [`super::load`].
    ///
    /// # Errors
    /// The file cannot be read, or anything in it is wrong: all that can be found at once is
    /// reported.
    pub fn load(
        file: &Path,
        environment: Environment<'_>,
        secrets: Secrets,
    ) -> Result<SenderConfig, ConfigError> {
        super::load_text(file, |text, absolute| read(text, absolute, environment, secrets))
    }

    /// Returns whether a file is the configuration of a sender: whether it has a table `receiver`.
    /// One that cannot be read is not.
    pub fn is_in(file: &Path) -> bool {
        let text = std::fs::read_to_string(file).map(zeroize::Zeroizing::new).unwrap_or_default();
        text.lines().any(|line| {
            let line = line.trim_start();
            line.starts_with("[receiver]") || line.starts_with("receiver.") || line.starts_with("receiver =")
        })
    }
}

/// Reads the text of the file with the absolute path `file`.
pub(super) fn read(
    text: &str,
    file: PathBuf,
    environment: Environment<'_>,
    secrets: Secrets,
) -> Result<SenderConfig, Vec<Problem>> {
    let mut document = Document::parse(text, file.parent().unwrap_or(Path::new("/")))?;
    let config = document.decode::<SenderConfig>().map(|config| {
        let mut config = SenderConfig { file, ..config };
        if !document.is_written(&["admin", "address"]) {
            config.admin.address = admin().address;
        }
        if let Some(token) = &mut config.admin.token {
            check::secret(&["admin"], &["token"], token, &mut document, environment, secrets);
        }
        if let Some(authorization) = &mut config.receiver.authorization {
            check::secret(
                &["receiver"],
                &["authorization"],
                authorization,
                &mut document,
                environment,
                secrets,
            );
        }
        check_all(&config, &mut document);
        config
    });
    let problems = document.into_problems();
    config.filter(|_| problems.is_empty()).ok_or(problems)
}

/// Checks what options have to do with each other.
fn check_all(config: &SenderConfig, document: &mut Document<'_>) {
    check::admin(&config.admin, document);
    receiver(&config.receiver, document);
    match (&config.signing, config.signatures) {
        (None, Signatures::Sign) => {
            let problem = "missing table [signing], without which no event can be signed; add signing = { keys = [{ file = \
                           \"signing-key.pem\" }] }, or write signatures = \"relay\" or \"off\" above the first table";
            document.check(&[], &["signatures", "signing"], problem);
        }
        (Some(_), Signatures::Relay | Signatures::Off) => {
            let problem = "[signing] without signatures = \"sign\": no key would be used; remove one of them";
            document.check(&[], &["signatures", "signing"], problem);
        }
        (Some(signing), Signatures::Sign) => keys(signing, document),
        (None, _) => {}
    }
    if config.signatures == Signatures::Relay && config.format.is_some() {
        let problem =
            "`format` with signatures = \"relay\": signed lines are not written anew; remove one of them";
        document.check(&[], &["format", "signatures"], problem);
    }
    if config.inputs.is_empty() {
        let problem = "there is no input; add a table [inputs.NAME] for each file or socket";
        document.check(&["inputs"], &[], problem);
    }
    let mut paths: BTreeMap<&Path, &str> = BTreeMap::new();
    for (name, input) in &config.inputs {
        let table = ["inputs", name];
        is_name(name, "an input", &table, document);
        let path = input.kind.path();
        if let Some(first) = paths.insert(path, name)
            && !document.is_wrong(&["inputs", name, "path"])
        {
            let problem =
                format!("the inputs `{first}` and `{name}` share the path {}; remove one", path.display());
            document.check(&table, &["path"], problem);
        }
        if !matches!(input.kind, InputKind::File(_)) && path.as_os_str().len() > LONGEST_SOCKET_PATH {
            let problem =
                format!("the path of the socket in [inputs.{name}] is longer than 107 bytes; shorten it");
            document.check(&table, &["path"], problem);
        }
    }
}

fn receiver(receiver: &Receiver, document: &mut Document<'_>) {
    if receiver.cert.is_some() != receiver.key.is_some() {
        let problem = "`cert` and `key` belong together; add the other one, or remove both";
        document.check(&["receiver"], &["cert", "key"], problem);
    }
}

fn keys(signing: &Signing, document: &mut Document<'_>) {
    for (index, key) in signing.keys.iter().enumerate() {
        let element = format!("keys.{index}");
        if key.file.is_some() == key.credential.is_some() {
            let problem =
                "a signing key has one origin; write { file = \"PATH\" } or { credential = \"NAME\" }";
            document.check(&["signing"], &[&element, "keys"], problem);
        }
        if signing.keys[..index].iter().any(|other| other.from == key.from) {
            let problem = "two signing keys begin at the same time; give the new one a time such as from = \
                           \"2026-12-01T00:00:00Z\"";
            document.check(&["signing"], &[&element, "keys"], problem);
        }
    }
    if signing.keys.iter().all(|key| key.from.is_some()) {
        let problem = "every signing key has a `from`, so that none signs before the first of them; remove the `from` of \
                       the oldest";
        document.check(&["signing"], &["keys"], problem);
    }
}

impl Receiver {
    /// Returns what its connections trust and offer.
    pub fn client_options(&self) -> ClientOptions {
        let identity = self.cert.clone().zip(self.key.clone()).map(|(cert, key)| Identity { cert, key });
        ClientOptions { ca: self.ca.clone(), identity, pins: self.pin.clone(), proxy: self.proxy.clone() }
    }
}

impl InputKind {
    /// Returns its file, pattern, directory or socket.
    pub fn path(&self) -> &Path {
        match self {
            Self::Stdin => Path::new("-"),
            Self::File(FileInput { path, .. }) => path,
            Self::UnixDatagram(SocketInput { path, .. }) | Self::UnixStream(SocketInput { path, .. }) => path,
        }
    }

    /// Returns the word in the configuration.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Stdin => "stdin",
            Self::File(_) => "file",
            Self::UnixDatagram(_) => "unix-datagram",
            Self::UnixStream(_) => "unix-stream",
        }
    }
}

by_text!(SigningStart, |text: &str| {
    let wrong = |_| format!("`{text}` is not a time; write one such as \"2026-12-01T00:00:00Z\"");
    OffsetDateTime::parse(text, &Rfc3339).map(Self).map_err(wrong)
});

impl fmt::Display for SigningStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.format(&Rfc3339).map_err(|_| fmt::Error)?)
    }
}

by_text!(Pin, |text: &str| text.parse().map_err(|error| format!("{error}")));

by_text!(Format, |text: &str| text.parse().map_err(|error| format!("{error}")));

fn jwks_address<'de, D: Deserializer<'de>>(written: D) -> Result<Option<SocketAddr>, D::Error> {
    parsed(written, |text| socket_address(text, "127.0.0.1:9466").map(Some))
}

/// Not the receiver's, so that both can run on one machine with their defaults.
fn admin() -> Admin {
    Admin { address: AdminAddress::Tcp((Ipv4Addr::LOCALHOST, 9465).into()), token: None }
}

fn spool_size() -> u64 {
    4 << 30
}

fn batch_events() -> usize {
    500
}

fn batch_bytes() -> usize {
    1 << 20
}

fn linger() -> Duration {
    Duration::from_millis(250)
}

fn one() -> usize {
    1
}

fn timeout() -> Duration {
    Duration::from_secs(30)
}

fn socket_mode() -> u32 {
    0o660
}

#[cfg(test)]
mod tests;
