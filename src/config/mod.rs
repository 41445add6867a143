//! The configuration, checked and resolved: what the rest of the program sees of the operator's file.
//!
//! Two steps: `file` is the TOML as written, `resolve` checks it, fills in the defaults and yields the
//! plain data here. A [`Config`] that exists is consistent in itself; whether certificates, keys and key
//! sets can be loaded is found out by the parts that load them.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use zeroize::Zeroizing;

use crate::net::{Endpoint, Facility, Framing, Identity, SyslogAddress};
use crate::trust::jwks::KeySet;
pub use crate::wire::event::Stream;

mod file;
mod problem;
mod quantity;
mod resolve;
mod secret;

pub use problem::{ConfigError, Problem};
pub(crate) use quantity::{display_size, display_time};
pub use secret::{Environment, MAX_SECRET, Secret, SecretError};

/// Where `serve` and `check-config` look unless told otherwise.
pub const DEFAULT_FILE: &str = "/etc/auditgate/config.toml";

/// The effective configuration. All paths are absolute.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The file that this was loaded from.
    pub file: PathBuf,
    /// The directory of the ledger and the key cache; required.
    pub data_dir: PathBuf,
    /// Where batches come in; required.
    pub listen: Listen,
    /// Where the operator looks in.
    pub admin: Admin,
    /// What the daemon says about itself.
    pub log: Log,
    /// What a sender may use up.
    pub limits: Limits,
    /// Who may send: at least one, sorted by name, names and paths unique.
    pub sources: Vec<Source>,
    /// Where events go: at least one, sorted by name, names and files unique. Together they take every
    /// stream that the sources can make.
    pub sinks: Vec<Sink>,
}

/// The socket for batches.
#[derive(Clone, Debug, PartialEq)]
pub struct Listen {
    /// IP address and port; port 0 lets the system choose. Required.
    pub address: SocketAddr,
    /// Required.
    pub tls: Tls,
    /// The networks of the proxies whose connections begin with a PROXY header; none by default.
    pub proxy_protocol: Vec<IpNet>,
}

/// How the connection of a sender is protected.
#[derive(Clone, Debug, PartialEq)]
pub enum Tls {
    /// Not at all; only with a loopback address.
    Off,
    /// With the certificate chain and key of these PEM files, which are not looked at here.
    Files {
        /// The certificate, then its intermediates.
        cert: PathBuf,
        /// The certificate's private key.
        key: PathBuf,
        /// The authorities of clients, each of whom must show a certificate then.
        client_ca: Option<PathBuf>,
        /// What a client's certificate must be for: a subject (RFC 4514), a DNS name, an e-mail address or a URI;
        /// anything when none is named. Only with `client_ca`.
        client_names: Vec<String>,
    },
}

/// The socket for metrics, health and status: plain HTTP.
#[derive(Clone, Debug, PartialEq)]
pub struct Admin {
    /// Default 127.0.0.1:9464.
    pub address: AdminAddress,
    /// A bearer token (RFC 6750), without the word `Bearer`, that every request must show. None by default, and
    /// never none with an address that other machines can reach.
    pub token: Option<Secret>,
}

/// Where the admin endpoint is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdminAddress {
    /// IP address and port; port 0 lets the system choose.
    Tcp(SocketAddr),
    /// `unix:///PATH`: a stream socket of that absolute path, of at most [`LONGEST_SOCKET_PATH`] bytes.
    Unix(PathBuf),
}

/// Bytes of the path of a Unix socket (unix(7): `sun_path` with its terminating null byte has 108).
pub const LONGEST_SOCKET_PATH: usize = 107;

impl fmt::Display for AdminAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

/// The daemon's own log.
#[derive(Clone, Debug, PartialEq)]
pub struct Log {
    /// `tracing` filter directives that are known to parse, such as `info,auditgate::trust=debug`.
    /// Default `info`.
    pub level: String,
    /// Default [`LogFormat::Human`].
    pub format: LogFormat,
}

/// How a line of the daemon's own log looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// `human`: for a reader at a terminal or in the journal.
    #[default]
    Human,
    /// `json`: one object a line.
    Json,
}

impl LogFormat {
    /// Every value, in the order of the documentation.
    pub const ALL: [Self; 2] = [Self::Human, Self::Json];

    /// The word in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Human => "human",
            Self::Json => "json",
        }
    }
}

/// What a sender may use up. `line <= decoded` holds, and the largest batch fits into `in_flight`
/// ([`crate::memory_budget::needed`]). Every size is at least 1 byte and at most 1 PiB, every count at least 1 and at most
/// `u32::MAX`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one request's body as received. Default 8 MiB.
    pub body: usize,
    /// Bytes of one body after gunzip. Default 64 MiB.
    pub decoded: usize,
    /// Bytes of one line without its terminator. Default 256 KiB.
    pub line: usize,
    /// Lines of one body. Default 100 000.
    pub lines: usize,
    /// Connections at the same time. Half of them are kept for those that have shown a valid token. Default 512.
    pub connections: usize,
    /// Of these, connections of one address that have not shown a valid token. Default 128.
    pub connections_per_peer: usize,
    /// From the first byte of a request to the last of its body: 1 ms to 3650 d. Default 30 s.
    pub request_timeout: Duration,
    /// How long a connection may wait for its next request: 1 ms to 3650 d. Default 75 s, above the 60 s of common
    /// balancers.
    pub idle_timeout: Duration,
    /// Bytes of all batches in work together. Default 256 MiB.
    pub in_flight: usize,
    /// Bytes committed to the ledger but not yet delivered. Default 4 GiB.
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
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// 1 to 64 of `A-Z a-z 0-9 _ . -`, but not `.` or `..`; unique.
    pub name: String,
    /// The path of its requests, compared exactly: begins with `/`, holds only characters legal in a path
    /// (RFC 3986, section 3.3), unique. Required.
    pub path: String,
    /// The values of the `Authorization` header that are let in: at least one, required.
    pub authorization: Vec<Secret>,
    /// The networks that it may send from; any when there is none.
    pub allow: Vec<IpNet>,
    /// The keys that its signatures are checked against; present unless `signatures` is off.
    pub jwks: Option<Jwks>,
    /// Default [`Signatures::Require`].
    pub signatures: Signatures,
    /// What counts as the same event.
    pub dedup: Dedup,
}

/// The keys that a source's signatures are checked against.
#[derive(Clone, Debug, PartialEq)]
pub struct Jwks {
    /// Where they come from.
    pub origin: JwksOrigin,
    /// Thumbprints (RFC 7638) or `kid`s of the only keys to trust; all when there is none.
    pub pin: Vec<String>,
    /// Thumbprints (RFC 7638) of keys that are not trusted any more.
    pub revoked: Vec<String>,
    /// How long a key that is no longer listed is trusted: 1 ms to 3650 d. Default 8 d.
    pub retired_for: Duration,
}

/// Where a source's key set comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum JwksOrigin {
    /// These keys and no others.
    Keys(KeySet),
    /// A file, not looked at here.
    File(PathBuf),
    /// A document to fetch.
    Url {
        /// https, or http on loopback.
        url: Endpoint,
        /// The time between two fetches: 1 ms to 3650 d. Default 1 h.
        refresh: Duration,
        /// A PEM file of the only CAs to trust, instead of the system's; not looked at here.
        ca: Option<PathBuf>,
        /// A bearer token (RFC 6750), without the word `Bearer`.
        token: Option<Secret>,
    },
}

/// What is asked of an event's signature.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Signatures {
    /// `require`: an unsigned event is quarantined.
    #[default]
    Require,
    /// `accept-unsigned`: an unsigned event passes as unverified; a wrong signature is quarantined.
    AcceptUnsigned,
    /// `off`: nothing is checked, every event passes as unverified.
    Off,
}

impl Signatures {
    /// Every value, in the order of the documentation.
    pub const ALL: [Self; 3] = [Self::Require, Self::AcceptUnsigned, Self::Off];

    /// The word in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Require => "require",
            Self::AcceptUnsigned => "accept-unsigned",
            Self::Off => "off",
        }
    }

    /// The streams that such a source can write to.
    pub fn streams(self) -> &'static [Stream] {
        match self {
            Self::Require => &[Stream::Verified, Stream::Quarantine],
            Self::AcceptUnsigned => &[Stream::Verified, Stream::Unverified, Stream::Quarantine],
            Self::Off => &[Stream::Unverified, Stream::Quarantine],
        }
    }
}

/// What counts as the same event, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dedup {
    /// Default [`DedupBy::Event`].
    pub by: DedupBy,
    /// How long an accepted event is remembered, by our clock: 1 ms to 3650 d. Default 8 d, a day more
    /// than Konnect can replay.
    pub window: Duration,
}

/// What tells two events apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DedupBy {
    /// `event`: the signed bytes.
    #[default]
    Event,
    /// `trace_id`: organisation and trace ID, one event a request; only where signatures are required.
    TraceId,
}

impl DedupBy {
    /// Every value, in the order of the documentation.
    pub const ALL: [Self; 2] = [Self::Event, Self::TraceId];

    /// The word in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Event => "event",
            Self::TraceId => "trace_id",
        }
    }
}

/// One place where events go.
#[derive(Clone, Debug, PartialEq)]
pub struct Sink {
    /// 1 to 64 of `A-Z a-z 0-9 _ . -`, but not `.` or `..`; unique.
    pub name: String,
    /// The rest of its configuration, by type.
    pub kind: SinkKind,
    /// What it takes: at least one, each once. Default [`Stream::Verified`] alone.
    pub streams: Vec<Stream>,
    /// The names of the sources that it takes from, each of them in [`Config::sources`]; all by default.
    pub sources: Option<Vec<String>>,
    /// Default [`WhenFull::Hold`].
    pub when_full: WhenFull,
}

impl Sink {
    /// Why it can lose what is verified although nothing fails; none when it cannot.
    pub fn warning(&self) -> Option<String> {
        let SinkKind::File { rotate: Rotate { keep: Some(keep), .. }, .. } = &self.kind else { return None };
        let is_mixed = self.streams.contains(&Stream::Verified) && self.streams.len() > 1;
        is_mixed.then(|| {
            format!(
                "sink `{}` keeps {keep} rotated files and takes verified events beside other lines: a token holder \
                 could rotate verified events away with unsigned lines; give these a sink of their own, or remove \
                 `keep`",
                self.name
            )
        })
    }

    /// Whether what `source` writes to `stream` goes here.
    pub fn takes(&self, source: &str, stream: Stream) -> bool {
        self.streams.contains(&stream)
            && self.sources.as_ref().is_none_or(|names| names.iter().any(|name| name == source))
    }
}

/// What happens when `limits.backlog` is nearly full of what a sink has not got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// `hold`: nothing is lost; when it is full, batches are refused.
    #[default]
    Hold,
    /// `skip`: the sink loses the oldest lines that wait for it.
    Skip,
}

impl WhenFull {
    /// Every value, in the order of the documentation.
    pub const ALL: [Self; 2] = [Self::Hold, Self::Skip];

    /// The word in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hold => "hold",
            Self::Skip => "skip",
        }
    }
}

/// The types of sinks.
#[derive(Clone, Debug, PartialEq)]
pub enum SinkKind {
    /// `file`: lines appended to a file.
    File {
        /// The file, which need not exist; no other sink writes to it. Required.
        path: PathBuf,
        /// Required.
        format: FileFormat,
        /// When it is rotated; never by default.
        rotate: Rotate,
        /// When it is synced.
        fsync: Fsync,
        /// The permission bits of files that are made. Default 0640.
        mode: u32,
        /// Whom files that are made belong to; by default the daemon's user and group.
        owner: Option<Owner>,
    },
    /// `sqlite`: rows of a database.
    Sqlite {
        /// The database, which need not exist; no other sink writes to it. Required.
        path: PathBuf,
        /// How long after its arrival a row is deleted: 1 ms to 3650 d. Default never.
        retain: Option<Duration>,
    },
    /// `syslog`: RFC 5424 messages to a server or a daemon.
    Syslog {
        /// Required.
        address: SyslogAddress,
        /// With `tls://`: a PEM file of the only CAs to trust, instead of the system's; not looked at here.
        ca: Option<PathBuf>,
        /// With `tls://`: the PEM files of a client certificate; not looked at here.
        identity: Option<Identity>,
        /// For streams. Default [`Framing::OctetCounting`], and [`Framing::Newline`] with `unix://`.
        framing: Framing,
        /// Default `local0`.
        facility: Facility,
        /// 1 to 48 printable ASCII characters without a space. Default `auditgate`.
        app_name: String,
        /// Default off.
        structured_data: bool,
        /// Bytes of a message; a longer one is cut: 480 B at least, and at most 65507 B with `udp://` and
        /// `unix://`, else 16 MiB. Default 2 KiB with `udp://`, 8 KiB with `unix://`, else 64 KiB.
        max_size: usize,
    },
}

impl SinkKind {
    /// The word in the configuration.
    pub fn name(&self) -> &'static str {
        match self {
            Self::File { .. } => "file",
            Self::Sqlite { .. } => "sqlite",
            Self::Syslog { .. } => "syslog",
        }
    }

    /// The file that it writes to, if it is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::File { path, .. } | Self::Sqlite { path, .. } => Some(path),
            Self::Syslog { .. } => None,
        }
    }
}

/// When a file is rotated, and what becomes of rotated files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rotate {
    /// Before it would be larger, in bytes.
    pub size: Option<u64>,
    /// When a new hour or day begins, in UTC.
    pub every: Option<Every>,
    /// How many rotated files are kept; all by default.
    pub keep: Option<usize>,
    /// How rotated files are compressed; not at all by default.
    pub compress: Option<Compress>,
}

/// A stretch of time that has a file of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Every {
    /// `hourly`
    Hourly,
    /// `daily`
    Daily,
}

impl Every {
    /// Every value, in the order of the documentation.
    pub const ALL: [Self; 2] = [Self::Daily, Self::Hourly];

    /// The word in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hourly => "hourly",
            Self::Daily => "daily",
        }
    }
}

/// How rotated files are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compress {
    /// `zstd`
    Zstd,
    /// `gzip`
    Gzip,
}

impl Compress {
    /// Every value, in the order of the documentation.
    pub const ALL: [Self; 2] = [Self::Zstd, Self::Gzip];

    /// The word in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zstd => "zstd",
            Self::Gzip => "gzip",
        }
    }
}

/// When a file is synced to the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fsync {
    /// `batch`: with each write. The default.
    #[default]
    Batch,
    /// `interval`: at most this long after a write. Nothing is lost in between, for the ledger keeps it until
    /// then.
    Interval(Duration),
}

/// A user and a group, by name or number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The user; left alone when not given.
    pub user: Option<String>,
    /// The group; left alone when not given.
    pub group: Option<String>,
}

/// How a line is written to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileFormat {
    /// `raw`: exactly as received; for one stream only.
    Raw,
    /// `json`: one object a line.
    Json,
}

impl FileFormat {
    /// Every value, in the order of the documentation.
    pub const ALL: [Self; 2] = [Self::Raw, Self::Json];

    /// The word in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Json => "json",
        }
    }
}

/// What to do about a secret that is not on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Secrets {
    /// It is a problem like any other.
    Require,
    /// Leave it unread, to check a file away from the machine that it is for. Such a secret matches
    /// nothing.
    SkipMissing,
}

/// Reads, checks and resolves a configuration file and the secrets that it names.
///
/// `environment` looks up environment variables: `&|name| std::env::var_os(name)` outside tests. Relative
/// paths are taken from the directory of `file`.
///
/// # Errors
/// The file cannot be read, or anything in it is wrong: all that can be found at once is reported.
pub fn load(file: &Path, environment: Environment<'_>, secrets: Secrets) -> Result<Config, ConfigError> {
    let fail = |problems| ConfigError::new(file, problems);
    let fail_whole = |line, message: String, hint: &str| {
        fail(vec![Problem { line, message, hint: Some(hint.to_owned()) }])
    };
    let bytes = std::fs::read(file).map(Zeroizing::new).map_err(|error| {
        let message = format!("cannot read the configuration file: {error}");
        fail_whole(None, message, "create it, starting from config.example.toml, or name another")
    })?;
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        let line = problem::line_of(&bytes, error.valid_up_to());
        fail_whole(Some(line), "not UTF-8, as TOML has to be".to_owned(), "save the file as UTF-8")
    })?;
    let absolute = std::path::absolute(file).map_err(|error| {
        let message = format!("cannot find the current directory: {error}");
        fail_whole(None, message, "name the file by its absolute path")
    })?;
    let written = file::parse(text).map_err(fail)?;
    resolve::resolve(written, text, absolute, environment, secrets).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(file: &Path) -> String {
        load(file, &|_| None, Secrets::Require).unwrap_err().to_string()
    }

    #[test]
    fn a_file_that_cannot_be_read_is_one_sentence() {
        assert_eq!(
            problem(Path::new("/nonexistent/config.toml")),
            "/nonexistent/config.toml: cannot read the configuration file: No such file or directory \
             (os error 2); create it, starting from config.example.toml, or name another"
        );
    }

    #[test]
    fn problems_name_the_file_and_the_line() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.toml");
        std::fs::write(&file, b"data_dir = \"x\"\n# \xff\n").unwrap();
        assert_eq!(
            problem(&file),
            format!("{}:2: not UTF-8, as TOML has to be; save the file as UTF-8", file.display())
        );
        std::fs::write(&file, "data_dir = \"x\"\nlimit = {}\n").unwrap();
        assert_eq!(
            problem(&file),
            format!(
                "{}:2: unknown key `limit` at the file's top level; did you mean `limits`?",
                file.display()
            )
        );
    }

    #[test]
    fn relative_paths_start_from_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.toml");
        std::fs::write(directory.path().join("token"), "Bearer abc\n").unwrap();
        let text = r#"
            data_dir = "data"
            listen = { address = "127.0.0.1:0", tls = "off" }
            [sources.s]
            path = "/s"
            authorization = { file = "token" }
            signatures = "off"
            [sinks.k]
            type = "file"
            path = "out/k.jsonl"
            format = "json"
            stream = ["unverified", "quarantine"]
        "#;
        std::fs::write(&file, text).unwrap();
        let config = load(&file, &|_| None, Secrets::Require).unwrap();
        assert_eq!(config.file, file);
        assert_eq!(config.data_dir, directory.path().join("data"));
        assert!(config.sources[0].authorization[0].matches(b"Bearer abc"));
        let SinkKind::File { path, format, .. } = &config.sinks[0].kind else { panic!("of type file") };
        assert_eq!((path, *format), (&directory.path().join("out/k.jsonl"), FileFormat::Json));
        assert!(config.sinks[0].takes("s", Stream::Unverified));
        assert!(!config.sinks[0].takes("s", Stream::Verified));
        assert!(!format!("{config:?}").contains("abc"));
    }
}
