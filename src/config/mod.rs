//! The configuration: the operator's file as the options of the parts.
//!
//! Each part has a type for its own options, which serde reads and writes; [`Config`] combines
//! them. `document` reads the file into them and collects all problems, and `check` does the checks
//! beyond serde, such as whether options contradict each other. A [`Config`] that exists is
//! consistent; certificates, keys and key sets are loaded by the parts that use them.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use zeroize::Zeroizing;

use self::document::Document;
use crate::deliver::file::FileOptions;
use crate::deliver::sqlite::SqliteOptions;
use crate::deliver::syslog::SyslogOptions;
use crate::ingest::{DedupKey, Policy};
use crate::ledger::Subscription;
use crate::observe::logging;
use crate::quantity::{by_text, count, parsed, size, time};
use crate::receive::tls::Files;
use crate::secret::{Environment, Secret};
use crate::trust::keyring::JwksOptions;
use crate::wire::event::Stream;

mod check;
mod document;
mod layout;
mod outputs;
mod problem;
pub mod sender;

pub use problem::{ConfigError, Problem};

/// Default file of `serve` and `check-config`.
pub const DEFAULT_FILE: &str = "/etc/auditgate/config.toml";

/// The effective configuration. All paths are absolute.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The file that this was loaded from.
    #[serde(skip)]
    pub file: PathBuf,
    /// The directory of the ledger and the key cache; required.
    pub data_dir: PathBuf,
    /// Socket for batches; required.
    pub listen: Listen,
    /// Socket for metrics, health and status.
    #[serde(default)]
    pub admin: Admin,
    /// The daemon's own log.
    #[serde(default)]
    pub log: Log,
    /// Limits on what senders may use.
    #[serde(default)]
    pub limits: Limits,
    /// Senders by name: at least one, paths unique. A name is 1 to 64 of `A-Z a-z 0-9 _ . -`,
    /// but not `.` or `..`.
    #[serde(default)]
    pub sources: BTreeMap<String, Source>,
    /// Outputs of events by name: at least one, files unique. Names are as those of sources.
    /// Together they take every stream that the sources can make.
    #[serde(default)]
    pub sinks: BTreeMap<String, Sink>,
}

/// The socket for batches.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct Listen {
    /// IP address and port; port 0 lets the system choose. Required.
    #[serde(deserialize_with = "listen_address")]
    pub address: SocketAddr,
    /// Required.
    pub tls: Tls,
    /// Networks of the proxies whose connections begin with a PROXY header; none by default.
    #[serde(default, with = "networks", skip_serializing_if = "Vec::is_empty")]
    pub proxy_protocol: Vec<IpNet>,
}

/// Protection of a sender's connection.
#[derive(Clone, Debug, PartialEq)]
pub enum Tls {
    /// `"off"`: not at all; only with a loopback address.
    Off,
    /// TLS with the certificate chain and key of these PEM files, which are not read here.
    Files(Files),
}

/// The socket for metrics, health and status: plain HTTP.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct Admin {
    /// Default 127.0.0.1:9464.
    pub address: AdminAddress,
    /// A bearer token (RFC 6750), without the word `Bearer`, that every request must show. None by
    /// default, and never none with an address that other machines can reach.
    pub token: Option<Secret>,
}

impl Default for Admin {
    fn default() -> Self {
        Self { address: AdminAddress::Tcp((Ipv4Addr::LOCALHOST, 9464).into()), token: None }
    }
}

/// Address of the admin endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdminAddress {
    /// IP address and port; port 0 lets the system choose.
    Tcp(SocketAddr),
    /// `unix:///PATH`: a stream socket of that absolute path, of at most [`LONGEST_SOCKET_PATH`]
    /// bytes.
    Unix(PathBuf),
}

/// Bytes of the path of a Unix socket (unix(7): `sun_path` with its terminating null byte has 108).
pub const LONGEST_SOCKET_PATH: usize = 107;

/// The daemon's own log.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct Log {
    /// `tracing` filter directives that are known to parse, such as `info,auditgate::trust=debug`.
    /// Default `info`.
    #[serde(deserialize_with = "level")]
    pub level: String,
    /// Default [`logging::Format::Human`].
    pub format: logging::Format,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: logging::Format::default() }
    }
}

/// Limits on what senders may use. `line <= decoded` holds, and the largest batch fits into
/// `in_flight` ([`crate::memory_budget::needed`]). Every size is at least 1 byte and at most 1 PiB,
/// every count at least 1 and at most `u32::MAX`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct Limits {
    /// Bytes of one request's body as received. Default 8 MiB.
    #[serde(with = "size")]
    pub body: usize,
    /// Bytes of one body after gunzip. Default 64 MiB.
    #[serde(with = "size")]
    pub decoded: usize,
    /// Bytes of one line without its terminator. Default 256 KiB.
    #[serde(with = "size")]
    pub line: usize,
    /// Lines of one body. Default 100 000.
    #[serde(with = "count")]
    pub lines: usize,
    /// Connections at the same time. Half of them are kept for those that have shown a valid token.
    /// Default 512.
    #[serde(with = "count")]
    pub connections: usize,
    /// Connections of one address, among these, that have not shown a valid token. Default 128.
    #[serde(with = "count")]
    pub connections_per_peer: usize,
    /// Time from the first byte of a request to the last of its body: 1 ms to 3650 d. Default 30 s.
    #[serde(with = "time")]
    pub request_timeout: Duration,
    /// Time that a connection may wait for its next request: 1 ms to 3650 d. Default 75 s, above
    /// the 60 s of common balancers.
    #[serde(with = "time")]
    pub idle_timeout: Duration,
    /// Bytes of all batches in work together. Default 256 MiB.
    #[serde(with = "size")]
    pub in_flight: usize,
    /// Bytes committed to the ledger but not yet delivered. Default 4 GiB.
    #[serde(with = "size")]
    pub backlog: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body: 8 << 20,
            decoded: 64 << 20,
            line: 256 << 10,
            lines: 100_000,
            connections: 512,
            connections_per_peer: 128,
            request_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(75),
            in_flight: 256 << 20,
            backlog: 4 << 30,
        }
    }
}

/// One sender: a region, a portal or another producer.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct Source {
    /// Path of its requests, compared exactly: begins with `/`, holds only characters legal in
    /// a path (RFC 3986, section 3.3), unique. Required.
    #[serde(deserialize_with = "request_path")]
    pub path: String,
    /// Values of the `Authorization` header that are let in: at least one, required.
    pub authorization: Vec<Secret>,
    /// Networks that it may send from; any when there is none.
    #[serde(default, with = "networks", skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<IpNet>,
    /// Keys that verify its signatures; present unless `signatures` is off.
    pub jwks: Option<JwksOptions>,
    /// Policy for signatures. Default [`Policy::Require`].
    #[serde(default)]
    pub signatures: Policy,
    /// Rule by which events are duplicates.
    #[serde(default)]
    pub dedup: Dedup,
}

/// Rule by which events are duplicates, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, expecting = "a table such as { by = \"event\", window = \"8d\" }")]
pub struct Dedup {
    /// Default [`DedupKey::Event`]; [`DedupKey::TraceId`] only where signatures are required.
    pub by: DedupKey,
    /// Time for which an accepted event is remembered, by our clock: 1 ms to 3650 d. Default 8 d, a
    /// day more than Konnect can replay.
    #[serde(with = "time")]
    pub window: Duration,
}

impl Default for Dedup {
    fn default() -> Self {
        Self { by: DedupKey::default(), window: Duration::from_secs(8 * 86_400) }
    }
}

/// One output of events. serde has the keys of its type below `type`; in the file they stand
/// among the others.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct Sink {
    /// Type, and the options of the type.
    #[serde(rename = "type")]
    pub kind: SinkKind,
    /// Streams that it takes: at least one, each once. Default [`Stream::Verified`] alone.
    #[serde(rename = "stream", default = "verified_alone")]
    pub streams: Vec<Stream>,
    /// Names of the sources that it takes from, each of them in [`Config::sources`]; all by
    /// default.
    pub sources: Option<Vec<String>>,
    /// Policy for a full backlog. Default [`WhenFull::Hold`].
    #[serde(default)]
    pub when_full: WhenFull,
}

/// The types of sinks.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SinkKind {
    /// Lines appended to a file.
    File(FileOptions),
    /// Rows of a database.
    Sqlite(SqliteOptions),
    /// RFC 5424 messages to a server or a daemon.
    Syslog(SyslogOptions),
}

/// Policy for when `limits.backlog` is nearly full of what a sink does not have yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenFull {
    /// Nothing is lost; batches are refused when the backlog is full.
    #[default]
    Hold,
    /// The sink loses the oldest lines that wait for it.
    Skip,
}

/// Treatment of a secret that is not on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Secrets {
    /// Report it as a problem.
    Require,
    /// Leave it unread, to check a file away from the machine that it is for. Such a secret matches
    /// nothing.
    SkipMissing,
}

/// Reads and checks a configuration file and the secrets that it names.
///
/// `environment` looks up environment variables: `&|name| std::env::var_os(name)` outside tests.
/// Relative paths are taken from the directory of `file`.
///
/// # Errors
/// The file cannot be read, or anything in it is wrong: all that can be found at once is reported.
pub fn load(file: &Path, environment: Environment<'_>, secrets: Secrets) -> Result<Config, ConfigError> {
    load_text(file, |text, absolute| read(text, absolute, environment, secrets))
}

/// Gives the text of a file and its absolute path to `read`.
fn load_text<T>(
    file: &Path,
    read: impl FnOnce(&str, PathBuf) -> Result<T, Vec<Problem>>,
) -> Result<T, ConfigError> {
    let fail = |problems| ConfigError::new(file, problems);
    let fail_whole = |line, message: String| fail(vec![Problem { line, message }]);
    let bytes = std::fs::read(file).map(Zeroizing::new).map_err(|error| {
        let hint = "create it, starting from config.example.toml, or name another";
        fail_whole(None, format!("cannot read the configuration file: {error}; {hint}"))
    })?;
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        let line = problem::line_of(&bytes, error.valid_up_to());
        fail_whole(Some(line), "not UTF-8, as TOML has to be; save the file as UTF-8".to_owned())
    })?;
    let absolute = std::path::absolute(file).map_err(|error| {
        let hint = "name the file by its absolute path";
        fail_whole(None, format!("cannot find the current directory: {error}; {hint}"))
    })?;
    read(text, absolute).map_err(fail)
}

/// Reads the text of the file with the absolute path `file`.
fn read(
    text: &str,
    file: PathBuf,
    environment: Environment<'_>,
    secrets: Secrets,
) -> Result<Config, Vec<Problem>> {
    let mut document = Document::parse(text, file.parent().unwrap_or(Path::new("/")))?;
    let config = document.decode::<Config>().map(|config| {
        let mut config = Config { file, ..config };
        config.fill_in();
        check::secrets(&mut config, &mut document, environment, secrets);
        check::all(&config, &mut document);
        config
    });
    let problems = document.into_problems();
    config.filter(|_| problems.is_empty()).ok_or(problems)
}

impl Config {
    /// Fills in the defaults that depend on other options.
    fn fill_in(&mut self) {
        self.sources.values_mut().filter_map(|source| source.jwks.as_mut()).for_each(JwksOptions::fill_in);
        for sink in self.sinks.values_mut() {
            match &mut sink.kind {
                SinkKind::File(options) => options.fill_in(sink.streams == [Stream::Quarantine]),
                SinkKind::Sqlite(_) => {}
                SinkKind::Syslog(options) => options.fill_in(),
            }
        }
    }

    /// Returns the reasons why sinks may lose verified events although nothing fails.
    pub fn warnings(&self) -> impl Iterator<Item = String> {
        self.sinks.iter().filter_map(|(name, sink)| {
            let SinkKind::File(FileOptions { rotate, .. }) = &sink.kind else { return None };
            let keep = rotate.as_ref()?.keep?;
            let is_mixed = sink.streams.contains(&Stream::Verified) && sink.streams.len() > 1;
            is_mixed.then(|| {
                format!(
                    "sink `{name}` keeps {keep} rotated files and takes verified events together with other lines: a token \
                     holder could rotate verified events away with unsigned lines; give these a sink of their own, \
                     or remove `keep`"
                )
            })
        })
    }
}

impl Sink {
    /// Returns what the ledger has to know about the sink.
    pub fn subscription(&self, name: &str) -> Subscription {
        Subscription {
            sink: name.to_owned(),
            kind: self.kind.name(),
            streams: self.streams.clone(),
            sources: self.sources.clone(),
            skips: self.when_full == WhenFull::Skip,
        }
    }
}

impl SinkKind {
    /// Returns the word in the configuration.
    pub fn name(&self) -> &'static str {
        match self {
            Self::File(_) => "file",
            Self::Sqlite(_) => "sqlite",
            Self::Syslog(_) => "syslog",
        }
    }

    /// Returns the file or database that it writes to, if any.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::File(FileOptions { path, .. }) | Self::Sqlite(SqliteOptions { path, .. }) => Some(path),
            Self::Syslog(_) => None,
        }
    }
}

impl<'de> Deserialize<'de> for Tls {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TlsVisitor;
        impl<'de> Visitor<'de> for TlsVisitor {
            type Value = Tls;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("{ cert = \"PATH\", key = \"PATH\" } or \"off\"")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<Tls, E> {
                let unknown =
                    || E::custom("unknown word; write { cert = \"PATH\", key = \"PATH\" } or \"off\"");
                (word == "off").then_some(Tls::Off).ok_or_else(unknown)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Tls, A::Error> {
                Files::deserialize(MapAccessDeserializer::new(map)).map(Tls::Files)
            }
        }
        deserializer.deserialize_any(TlsVisitor)
    }
}

impl Serialize for Tls {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => out.serialize_str("off"),
            Self::Files(files) => files.serialize(out),
        }
    }
}

by_text!(AdminAddress, AdminAddress::parse);

impl AdminAddress {
    fn parse(text: &str) -> Result<Self, String> {
        let Some(path) = text.strip_prefix("unix://") else {
            return socket_address(text, "127.0.0.1:9464").map(Self::Tcp);
        };
        let problem = if !path.starts_with('/') || path.ends_with('/') || path.contains('\0') {
            "has no absolute path"
        } else if path.len() > LONGEST_SOCKET_PATH {
            "is longer than the 107 bytes that a socket's path may have"
        } else {
            return Ok(Self::Unix(path.into()));
        };
        Err(format!("`{text}` {problem}; write one such as \"unix:///run/auditgate/admin.sock\""))
    }
}

impl fmt::Display for AdminAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

fn socket_address(text: &str, example: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| format!("`{text}` is not an IP address with a port; write one such as \"{example}\""))
}

fn listen_address<'de, D: Deserializer<'de>>(written: D) -> Result<SocketAddr, D::Error> {
    parsed(written, |text| socket_address(text, "0.0.0.0:8443"))
}

fn level<'de, D: Deserializer<'de>>(written: D) -> Result<String, D::Error> {
    parsed(written, |text| logging::check_level(text).map(|()| text.to_owned()))
}

fn request_path<'de, D: Deserializer<'de>>(written: D) -> Result<String, D::Error> {
    // RFC 3986, section 3.3: pchar and the slash.
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@%/".contains(&byte);
    parsed(written, |path| {
        let hint = if !path.starts_with('/') {
            "begin it with `/`"
        } else if path.contains(['?', '#']) {
            "leave out the query and the fragment"
        } else if !path.bytes().all(legal) {
            "use letters, digits and `-`, `_`, `.`, `/` only, and no spaces"
        } else {
            return Ok(path.to_owned());
        };
        Err(format!("`{path}` is not the path of a request; {hint}"))
    })
}

fn verified_alone() -> Vec<Stream> {
    vec![Stream::Verified]
}

/// Networks or single addresses as texts, without a bit set beyond their length.
mod networks {
    use super::*;

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(written: D) -> Result<Vec<IpNet>, D::Error> {
        let hint = "write an address, or a network such as 192.0.2.0/24 or 2001:db8::/32";
        let texts = Vec::<String>::deserialize(written)?;
        let networks = texts.iter().map(|text| {
            let network = text.parse().ok().or_else(|| text.parse::<IpAddr>().map(IpNet::from).ok());
            // `10.0.0.1/8` is more likely a slip than a wish.
            let network = network.map(as_ipv4).filter(|network| network.addr() == network.network());
            network.ok_or_else(|| de::Error::custom(format!("`{text}` is not a network; {hint}")))
        });
        networks.collect()
    }

    pub(super) fn serialize<S: Serializer>(networks: &[IpNet], out: S) -> Result<S::Ok, S::Error> {
        out.collect_seq(networks.iter().map(ToString::to_string))
    }

    /// Returns an IPv4-mapped IPv6 network (RFC 4291, section 2.5.5.2) as IPv4, as peers' addresses
    /// are compared.
    fn as_ipv4(network: IpNet) -> IpNet {
        let IpNet::V6(mapped) = network else { return network };
        let length = mapped.prefix_len().checked_sub(96);
        match (mapped.addr().to_ipv4_mapped(), length) {
            (Some(address), Some(length)) => Ipv4Net::new(address, length).map_or(network, IpNet::V4),
            _ => network,
        }
    }
}

#[cfg(test)]
mod tests;
