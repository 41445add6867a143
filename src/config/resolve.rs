//! From the tables as written to the configuration: defaults, paths, secrets, and every check that needs
//! more than the shape of one value.
//!
//! Nothing stops at the first problem. A function that returns `None` has reported why.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use toml::Spanned;

use super::file::{self, OneOrMany, Size, Text};
use super::problem::{Findings, Problem, suggest};
use super::secret::Origin;
use super::{
    Admin, Compress, Config, Dedup, DedupBy, Environment, Every, FileFormat, Fsync, Jwks, Limits, Listen,
    Log, LogFormat, Owner, Rotate, Secret, Secrets, Signatures, Sink, SinkKind, Source, Stream, Tls,
    quantity,
};
use crate::net::{self, Endpoint, Facility, Framing, Identity, SyslogAddress, SyslogAddressError};
use crate::observe::logging;

const DEFAULT_ADMIN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9464);
const DEFAULT_LEVEL: &str = "info";
const DEFAULT_MODE: u32 = 0o640;
const DEFAULT_REFRESH: Duration = Duration::from_secs(3600);
const DEFAULT_APP_NAME: &str = "auditgate";
/// Bytes. What a receiver should take at least (RFC 5426, section 3.2).
const UDP_SIZE: usize = 2 << 10;
/// Bytes. What rsyslog takes unless told otherwise.
const UNIX_SIZE: usize = 8 << 10;
/// Bytes. What syslog-ng takes unless told otherwise; it breaks a connection with a longer frame, which would
/// come again for ever.
const STREAM_SIZE: usize = 64 << 10;
/// Bytes: the largest payload of UDP over IPv4.
const LARGEST_DATAGRAM: usize = 65_507;
/// Bytes, for a server that was told to take more.
const LARGEST_IN_STREAM: usize = 16 << 20;
const DEFAULT_WINDOW: Duration = Duration::from_secs(8 * 86_400);

/// Checks everything and fills in the defaults. `path` is the absolute path of the file, `text` its text.
///
/// # Errors
/// All problems that were found; never an empty list.
pub(super) fn resolve(
    written: file::File,
    text: &str,
    path: PathBuf,
    environment: Environment<'_>,
    secrets: Secrets,
) -> Result<Config, Vec<Problem>> {
    let base = path.parent().unwrap_or(Path::new("/")).to_owned();
    let mut resolver = Resolver { findings: Findings::new(text), base, environment, secrets };
    let config = resolver.config(written, path);
    match config {
        Some(config) if resolver.findings.is_empty() => Ok(config),
        _ => Err(resolver.findings.into_problems()),
    }
}

struct Resolver<'a> {
    findings: Findings<'a>,
    /// The directory that relative paths start from.
    base: PathBuf,
    environment: Environment<'a>,
    secrets: Secrets,
}

impl Resolver<'_> {
    fn config(&mut self, written: file::File, file: PathBuf) -> Option<Config> {
        if written.data_dir.is_none() {
            self.findings.report_missing(
                "missing key `data_dir`",
                "add data_dir = \"/var/lib/auditgate\" above the first table",
            );
        }
        let data_dir = written.data_dir.and_then(|text| self.path(&text, "data_dir"));
        if written.listen.is_none() {
            self.findings.report_missing("missing table [listen]", "add it with the keys address and tls");
        }
        let admin_at = written.admin.address.as_ref().map(Spanned::span);
        let listen_at = written.listen.as_ref().map(Spanned::span);
        let listen = written.listen.and_then(|table| self.listen(table));
        let admin = self.admin(written.admin);
        if let (Some(listen), Some(admin)) = (&listen, &admin)
            && listen.address == admin.address
            && listen.address.port() != 0
            && let Some(at) = admin_at.or(listen_at)
        {
            let message = format!("[listen] and [admin] both want the address {}", admin.address);
            self.findings.report(&at, message, "give one of them another port");
        }
        let log = self.log(written.log);
        let limits = self.limits(&written.limits);

        let known: Vec<String> = written.sources.iter().map(|(name, _)| name.get_ref().clone()).collect();
        let sinks_written = written.sinks.len();
        let sources: Vec<(Range<usize>, Source)> = written
            .sources
            .into_iter()
            .filter_map(|(name, source)| Some((name.span(), self.source(&name, source)?)))
            .collect();
        let sinks: Vec<(Range<usize>, Sink)> = written
            .sinks
            .into_iter()
            .filter_map(|(name, sink)| Some((name.span(), self.sink(&name, sink, &known)?)))
            .collect();
        if known.is_empty() {
            self.findings.report_missing("there is no source", "add a table [sources.NAME] for each sender");
        }
        if sinks_written == 0 {
            self.findings.report_missing("there is no sink", "add a table [sinks.NAME] for each output");
        }
        self.unique_paths(&sources);
        self.unique_files(&sinks, data_dir.as_deref());
        // A sink that did not resolve might be the one that takes the stream.
        if sinks_written != 0 && sinks.len() == sinks_written {
            self.every_stream_is_taken(&sources, &sinks);
        }
        Some(Config {
            file,
            data_dir: data_dir?,
            listen: listen?,
            admin: admin?,
            log: log?,
            limits: limits?,
            sources: sources.into_iter().map(|(_, source)| source).collect(),
            sinks: sinks.into_iter().map(|(_, sink)| sink).collect(),
        })
    }

    fn listen(&mut self, table: Spanned<file::Listen>) -> Option<Listen> {
        let at = table.span();
        let file::Listen { address, tls } = table.into_inner();
        let address_at = address.as_ref().map(Spanned::span);
        let address = self
            .required(address, &at, "address", "[listen]", "such as address = \"0.0.0.0:8443\"")
            .and_then(|text| self.address(&text, "0.0.0.0:8443"));
        let tls = self.required(
            tls,
            &at,
            "tls",
            "[listen]",
            "such as tls = { cert = \"cert.pem\", key = \"key.pem\" }",
        );
        let tls = tls.and_then(|tls| self.tls(tls, address.as_ref(), address_at.as_ref()));
        Some(Listen { address: address?, tls: tls? })
    }

    fn tls(
        &mut self,
        tls: Spanned<file::Tls>,
        address: Option<&SocketAddr>,
        address_at: Option<&Range<usize>>,
    ) -> Option<Tls> {
        const FORMS: &str = "write { cert = \"PATH\", key = \"PATH\" } or \"off\"";

        let at = tls.span();
        match tls.into_inner() {
            file::Tls::Word(word) if word == "off" => {
                // Loopback, for IPv4-mapped IPv6 addresses too.
                if let Some(address) = address.filter(|address| !address.ip().to_canonical().is_loopback()) {
                    let message = format!("tls = \"off\" with `{address}`, which is not a loopback address");
                    let hint = "configure cert and key, or listen on 127.0.0.1 behind a proxy";
                    self.findings.report(address_at.unwrap_or(&at), message, hint);
                    return None;
                }
                Some(Tls::Off)
            }
            file::Tls::Word(_) => {
                self.findings.report(&at, "unknown word for `tls` in [listen]", FORMS);
                None
            }
            file::Tls::Files(file::TlsFiles { cert, key }) => {
                let cert = self
                    .required(cert, &at, "cert", "`tls` of [listen]", FORMS)
                    .and_then(|text| self.path(&text, "cert"));
                let key = self
                    .required(key, &at, "key", "`tls` of [listen]", FORMS)
                    .and_then(|text| self.path(&text, "key"));
                Some(Tls::Files { cert: cert?, key: key? })
            }
        }
    }

    fn admin(&mut self, table: file::Admin) -> Option<Admin> {
        let address =
            table.address.map_or(Some(DEFAULT_ADMIN), |text| self.address(&text, "127.0.0.1:9464"))?;
        Some(Admin { address })
    }

    fn log(&mut self, table: file::Log) -> Option<Log> {
        let level = table.level.map_or_else(|| Some(DEFAULT_LEVEL.to_owned()), |text| self.level(text));
        let format = table.format.map_or(Some(LogFormat::default()), |text| {
            self.word(&text, "format", &LogFormat::ALL, LogFormat::name)
        });
        Some(Log { level: level?, format: format? })
    }

    fn level(&mut self, text: Text) -> Option<String> {
        let at = text.span();
        let text = text.into_inner();
        if let Some(wrong) = logging::wrong_directive(&text) {
            let hint = "write off, error, warn, info, debug or trace, or \"info,MODULE=LEVEL\"";
            self.findings.report(&at, format!("`{wrong}` is no log level"), hint);
            return None;
        }
        Some(text)
    }

    fn limits(&mut self, table: &file::Limits) -> Option<Limits> {
        let default = Limits::default();
        let body = self.bytes(table.body.as_ref(), "body", default.body);
        let decoded = self.bytes(table.decoded.as_ref(), "decoded", default.decoded);
        let line = self.bytes(table.line.as_ref(), "line", default.line);
        let lines = self.count(table.lines.as_ref(), "lines", default.lines);
        let connections = self.count(table.connections.as_ref(), "connections", default.connections);
        let request_timeout =
            self.time(table.request_timeout.as_ref(), "request_timeout", default.request_timeout);
        let in_flight = self.bytes(table.in_flight.as_ref(), "in_flight", default.in_flight);
        let backlog = self.size(table.backlog.as_ref(), "backlog", default.backlog);

        let written = |size: &Option<Spanned<Size>>| size.as_ref().map(Spanned::span);
        self.ordered(
            ("line", line, written(&table.line)),
            ("decoded", decoded, written(&table.decoded)),
            "no line could ever be that long",
        );
        for smaller in [("body", body, written(&table.body)), ("decoded", decoded, written(&table.decoded))] {
            let larger = ("in_flight", in_flight, written(&table.in_flight));
            self.ordered(smaller, larger, "a batch of that size would be answered 429 for ever");
        }
        Some(Limits {
            body: body?,
            decoded: decoded?,
            line: line?,
            lines: lines?,
            connections: connections?,
            request_timeout: request_timeout?,
            in_flight: in_flight?,
            backlog: backlog?,
        })
    }

    /// Both are (key, value, place where written); a limit that did not resolve is in order.
    fn ordered(
        &mut self,
        (smaller, small, small_at): (&str, Option<usize>, Option<Range<usize>>),
        (larger, large, large_at): (&str, Option<usize>, Option<Range<usize>>),
        consequence: &str,
    ) {
        if let (Some(small), Some(large)) = (small, large)
            && small > large
            // The defaults are in order, so that at least one of the two was written.
            && let Some(at) = large_at.or(small_at)
        {
            let show = |bytes: usize| {
                u64::try_from(bytes).map_or_else(|_| bytes.to_string(), quantity::display_size)
            };
            let (small, large) = (show(small), show(large));
            self.findings.report(
                &at,
                format!("`{smaller}` ({small}) is larger than `{larger}` ({large}): {consequence}"),
                format!("raise `{larger}` or lower `{smaller}` in [limits]"),
            );
        }
    }

    fn source(&mut self, name: &Text, table: file::Source) -> Option<Source> {
        let at = name.span();
        let name = self.name(name, "source");
        let shown = name.as_deref().unwrap_or("NAME");
        let within = format!("[sources.{shown}]");

        let hint = format!("such as path = \"/konnect/{shown}\"");
        let path =
            self.required(table.path, &at, "path", &within, &hint).and_then(|text| self.request_path(text));
        let hint = format!("such as authorization = {{ file = \"tokens/{shown}\" }}");
        let authorization = self
            .required(table.authorization, &at, "authorization", &within, &hint)
            .and_then(|one_or_many| self.authorization(one_or_many));
        let signatures_at = table.signatures.as_ref().map(Spanned::span);
        let signatures = table.signatures.map_or(Some(Signatures::default()), |text| {
            self.word(&text, "signatures", &Signatures::ALL, Signatures::name)
        });
        let jwks = match table.jwks {
            Some(jwks) => self.jwks(jwks).map(Some),
            None if signatures.is_none_or(|word| word == Signatures::Off) => Some(None),
            None => {
                self.findings.report(
                    signatures_at.as_ref().unwrap_or(&at),
                    format!("missing key `jwks` in {within}, without which no signature can be checked"),
                    "add jwks = { url = \"https://…/jwks.json\" }, or write signatures = \"off\"",
                );
                None
            }
        };
        let dedup = self.dedup(&table.dedup.unwrap_or_default(), signatures);
        Some(Source {
            name: name?,
            path: path?,
            authorization: authorization?,
            jwks: jwks?,
            signatures: signatures?,
            dedup: dedup?,
        })
    }

    fn authorization(&mut self, written: Spanned<OneOrMany<file::Secret>>) -> Option<Vec<Secret>> {
        let at = written.span();
        let OneOrMany(forms) = written.into_inner();
        if forms.is_empty() {
            let hint = "name at least one, or nobody could send";
            self.findings.report(&at, "`authorization` is an empty array", hint);
            return None;
        }
        let secrets: Vec<Option<Secret>> = forms.into_iter().map(|form| self.secret(form, &at)).collect();
        secrets.into_iter().collect()
    }

    /// `around` is the place to name when the form itself is empty.
    fn secret(&mut self, form: file::Secret, around: &Range<usize>) -> Option<Secret> {
        const FORMS: &str = "write { file = \"PATH\" }, { env = \"NAME\" }, { credential = \"NAME\" } or \
                             { value = \"SECRET\" }";

        let (origin, at) = match (form.file, form.env, form.credential, form.value) {
            (Some(path), None, None, None) => (Origin::File(self.path(&path, "file")?), path.span()),
            (None, Some(name), None, None) => {
                let at = name.span();
                (Origin::Environment(name.into_inner()), at)
            }
            (None, None, Some(name), None) => {
                let at = name.span();
                (Origin::Credential(name.into_inner()), at)
            }
            (None, None, None, Some(value)) => {
                let at = value.span();
                (Origin::Value(value.into_inner().0), at)
            }
            (None, None, None, None) => {
                self.findings.report(around, "the secret has no origin", FORMS);
                return None;
            }
            (file, env, credential, value) => {
                let texts = [file, env, credential];
                let spans =
                    texts.iter().flatten().map(Spanned::span).chain(value.as_ref().map(Spanned::span));
                let at = spans.min_by_key(|span| span.start).unwrap_or_else(|| around.clone());
                self.findings.report(&at, "the secret has more than one origin", FORMS);
                return None;
            }
        };
        match origin.read(self.environment) {
            Ok(secret) => Some(secret),
            Err(error) if error.is_absence() && self.secrets == Secrets::SkipMissing => {
                Some(Secret::unread())
            }
            Err(error) => {
                self.findings.report(&at, error.to_string(), error.hint());
                None
            }
        }
    }

    fn jwks(&mut self, table: Spanned<file::Jwks>) -> Option<Jwks> {
        const FORMS: &str = "write { url = \"https://…\" } or { file = \"PATH\" }";

        let at = table.span();
        let file::Jwks { file, url, refresh, ca, token } = table.into_inner();
        match (file, url) {
            (Some(file), None) => {
                let only_url = [
                    ("refresh", refresh.as_ref().map(Spanned::span)),
                    ("ca", ca.as_ref().map(Spanned::span)),
                    ("token", token.as_ref().map(Spanned::span)),
                ];
                for (key, written) in only_url {
                    if let Some(at) = written {
                        let message = format!("`{key}` with a `jwks` that is a file");
                        self.findings.report(&at, message, format!("remove `{key}`, or use url"));
                    }
                }
                self.path(&file, "file").map(Jwks::File)
            }
            (None, Some(url)) => {
                let url_at = url.span();
                let url = Endpoint::parse(url.get_ref())
                    .map_err(|error| {
                        let hint = "use an https:// URL; http:// is for loopback only";
                        self.findings.report(&url_at, format!("`url` of `jwks`: {error}"), hint);
                    })
                    .ok();
                let refresh = self.time(refresh.as_ref(), "refresh", DEFAULT_REFRESH);
                let ca = ca.map_or(Some(None), |text| self.path(&text, "ca").map(Some));
                let token = token.map_or(Some(None), |token| self.bearer_token(token).map(Some));
                Some(Jwks::Url { url: url?, refresh: refresh?, ca: ca?, token: token? })
            }
            (None, None) => {
                self.findings.report(&at, "`jwks` has neither `url` nor `file`", FORMS);
                None
            }
            (Some(_), Some(_)) => {
                self.findings.report(&at, "`jwks` has both `url` and `file`", FORMS);
                None
            }
        }
    }

    fn bearer_token(&mut self, token: Spanned<file::Secret>) -> Option<Secret> {
        let at = token.span();
        let secret = self.secret(token.into_inner(), &at)?;
        // RFC 6750, section 2.1: no white space in a token, so this has its scheme before it.
        if secret.expose().contains(&b' ') {
            let message = "the token of `jwks` contains a space";
            self.findings.report(&at, message, "write the token alone, without the word Bearer");
            return None;
        }
        Some(secret)
    }

    fn dedup(&mut self, table: &file::Dedup, signatures: Option<Signatures>) -> Option<Dedup> {
        let by = table
            .by
            .as_ref()
            .map_or(Some(DedupBy::default()), |text| self.word(text, "by", &DedupBy::ALL, DedupBy::name));
        let window = self.time(table.window.as_ref(), "window", DEFAULT_WINDOW);
        if by == Some(DedupBy::TraceId)
            && signatures.is_some_and(|word| word != Signatures::Require)
            && let Some(at) = table.by.as_ref().map(Spanned::span)
        {
            self.findings.report(
                &at,
                "by = \"trace_id\" without signatures = \"require\": an unsigned event could hide a good one",
                "write by = \"event\" or require signatures",
            );
        }
        Some(Dedup { by: by?, window: window? })
    }

    fn sink(&mut self, name: &Text, table: file::Sink, known: &[String]) -> Option<Sink> {
        let at = name.span();
        let name = self.name(name, "sink");
        let shown = name.as_deref().unwrap_or("NAME");
        let within = format!("[sinks.{shown}]");

        let stream_at = table.stream.as_ref().map(Spanned::span);
        let streams = self.streams(table.stream);
        let sources = table.sources.map_or(Some(None), |names| self.sink_sources(names, known).map(Some));
        let kind = match table.kind {
            file::SinkKind::File(file) => {
                let hint = format!("such as path = \"/var/log/auditgate/{shown}.log\"");
                let path = self
                    .required(file.path, &at, "path", &within, &hint)
                    .and_then(|text| self.output_file(&text));
                let format = self
                    .required(file.format, &at, "format", &within, "write format = \"raw\" or \"json\"")
                    .and_then(|text| self.word(&text, "format", &FileFormat::ALL, FileFormat::name));
                if let (Some(FileFormat::Raw), Some(streams)) = (format, &streams)
                    && streams.len() > 1
                {
                    self.findings.report(
                        stream_at.as_ref().unwrap_or(&at),
                        format!(
                            "format = \"raw\" with several streams in {within}: nothing would tell them apart"
                        ),
                        "write format = \"json\", or a sink for each stream",
                    );
                }
                let rotate = self.rotate(file.rotate.unwrap_or_default());
                let fsync = self.fsync(file.fsync.as_ref(), file.fsync_interval.as_ref());
                let mode = file.mode.map_or(Some(DEFAULT_MODE), |text| self.mode(&text));
                let owner = file.owner.map_or(Some(None), |text| self.owner(&text).map(Some));
                match (path, format, rotate, fsync, mode, owner) {
                    (Some(path), Some(format), Some(rotate), Some(fsync), Some(mode), Some(owner)) => {
                        Some(SinkKind::File { path, format, rotate, fsync, mode, owner })
                    }
                    _ => None,
                }
            }
            file::SinkKind::Sqlite(sqlite) => {
                let hint = format!("such as path = \"/var/lib/auditgate/{shown}.db\"");
                let path = self
                    .required(sqlite.path, &at, "path", &within, &hint)
                    .and_then(|text| self.output_file(&text));
                let retain = sqlite
                    .retain
                    .map_or(Some(None), |text| self.time(Some(&text), "retain", Duration::ZERO).map(Some));
                path.zip(retain).map(|(path, retain)| SinkKind::Sqlite { path, retain })
            }
            file::SinkKind::Syslog(table) => self.syslog(*table, &at, &within),
        };
        Some(Sink { name: name?, kind: kind?, streams: streams?, sources: sources? })
    }

    fn rotate(&mut self, table: file::Rotate) -> Option<Rotate> {
        let size = table.size.as_ref().map_or(Some(None), |size| self.size(Some(size), "size", 0).map(Some));
        let every = table
            .every
            .map_or(Some(None), |text| self.word(&text, "every", &Every::ALL, Every::name).map(Some));
        let keep = table.keep.as_ref().map_or(Some(None), |keep| self.count(Some(keep), "keep", 0).map(Some));
        let compress = table.compress.map_or(Some(None), |text| {
            self.word(&text, "compress", &Compress::ALL, Compress::name).map(Some)
        });
        Some(Rotate { size: size?, every: every?, keep: keep?, compress: compress? })
    }

    fn fsync(&mut self, word: Option<&Text>, interval: Option<&Text>) -> Option<Fsync> {
        const DEFAULT: Duration = Duration::from_secs(1);
        let word = match word {
            None => "batch",
            Some(word) => self.word(word, "fsync", &["batch", "interval"], |word| word)?,
        };
        if word == "interval" {
            return self.time(interval, "fsync_interval", DEFAULT).map(Fsync::Interval);
        }
        if let Some(interval) = interval {
            let message = "`fsync_interval` without fsync = \"interval\"".to_owned();
            self.findings.report(&interval.span(), message, "write fsync = \"interval\", or remove it");
            return None;
        }
        Some(Fsync::Batch)
    }

    fn mode(&mut self, text: &Text) -> Option<u32> {
        let mode = u32::from_str_radix(text.get_ref(), 8).ok().filter(|mode| (0o200..=0o777).contains(mode));
        if mode.is_none() {
            let message = format!("`{}` is no file mode", text.get_ref());
            self.findings.report(&text.span(), message, "write an octal text such as \"0640\"");
        }
        mode
    }

    fn owner(&mut self, text: &Text) -> Option<Owner> {
        let (user, group) = text.get_ref().split_once(':').unwrap_or((text.get_ref(), ""));
        let part = |part: &str| (!part.is_empty()).then(|| part.to_owned());
        let owner = Owner { user: part(user), group: part(group) };
        if owner.user.is_none() && owner.group.is_none() || group.contains(':') {
            let message = format!("`{}` is no owner", text.get_ref());
            self.findings.report(&text.span(), message, "write \"user:group\", \"user\" or \":group\"");
            return None;
        }
        Some(owner)
    }

    fn syslog(&mut self, table: file::SyslogSink, at: &Range<usize>, within: &str) -> Option<SinkKind> {
        let hint = "such as address = \"tls://siem.example.com:6514\"";
        let address = self.required(table.address, at, "address", within, hint)?;
        let address = self.syslog_address(&address)?;
        self.belongs_to(&address, &table.ca, "ca", is_tls, "tls://");
        self.belongs_to(&address, &table.cert, "cert", is_tls, "tls://");
        self.belongs_to(&address, &table.key, "key", is_tls, "tls://");
        self.belongs_to(&address, &table.framing, "framing", may_be_stream, "tcp://, tls:// and unix://");

        let ca = table.ca.map_or(Some(None), |text| self.path(&text, "ca").map(Some));
        let identity = match (table.cert, table.key) {
            (None, None) => Some(None),
            (Some(cert), Some(key)) => {
                let (cert, key) = (self.path(&cert, "cert"), self.path(&key, "key"));
                cert.zip(key).map(|(cert, key)| Some(Identity { cert, key }))
            }
            (Some(alone), None) | (None, Some(alone)) => {
                let message = format!("only one of `cert` and `key` in {within}");
                self.findings.report(&alone.span(), message, "a client certificate needs both");
                None
            }
        };
        let framing = match (table.framing, &address) {
            (Some(text), _) => self.word(&text, "framing", &Framing::ALL, Framing::name),
            (None, SyslogAddress::Unix(_)) => Some(Framing::Newline),
            (None, _) => Some(Framing::OctetCounting),
        };
        let facility = table.facility.map_or(Some(Facility::LOCAL0), |text| {
            self.word(&text, "facility", &Facility::ALL, Facility::name)
        });
        let app_name = match table.app_name {
            None => Some(DEFAULT_APP_NAME.to_owned()),
            Some(text) if net::is_app_name(text.get_ref()) => Some(text.into_inner()),
            Some(text) => {
                let hint = format!("use 1 to {} ASCII characters, no space", net::LONGEST_APP_NAME);
                self.findings.report(&text.span(), "`app_name` cannot stand in a syslog header", hint);
                None
            }
        };
        let max_size = self.syslog_max_size(table.max_size.as_ref(), &address);
        Some(SinkKind::Syslog {
            address,
            ca: ca?,
            identity: identity?,
            framing: framing?,
            facility: facility?,
            app_name: app_name?,
            structured_data: table.structured_data.unwrap_or(false),
            max_size: max_size?,
        })
    }

    fn syslog_address(&mut self, text: &Text) -> Option<SyslogAddress> {
        SyslogAddress::parse(text.get_ref())
            .map_err(|error| {
                let hint = match error {
                    SyslogAddressError::NoPort(_) => "add the server's, such as :514 or :601",
                    SyslogAddressError::Path(_) => "write it with three slashes, as in unix:///dev/log",
                    _ => "write one such as tls://siem.example.com:6514 or unix:///dev/log",
                };
                self.findings.report(&text.span(), error.to_string(), hint);
            })
            .ok()
    }

    /// A key that has a meaning with some addresses only.
    fn belongs_to(
        &mut self,
        address: &SyslogAddress,
        written: &Option<Text>,
        key: &str,
        has_it: fn(&SyslogAddress) -> bool,
        schemes: &str,
    ) {
        if let Some(text) = written.as_ref().filter(|_| !has_it(address)) {
            let message = format!("`{key}` with the address {address}");
            self.findings.report(&text.span(), message, format!("`{key}` is for {schemes} only: remove it"));
        }
    }

    fn syslog_max_size(&mut self, size: Option<&Spanned<Size>>, address: &SyslogAddress) -> Option<usize> {
        let (default, largest) = match address {
            SyslogAddress::Udp(_) => (UDP_SIZE, LARGEST_DATAGRAM),
            SyslogAddress::Unix(_) => (UNIX_SIZE, LARGEST_DATAGRAM),
            SyslogAddress::Tcp(_) | SyslogAddress::Tls(_) => (STREAM_SIZE, LARGEST_IN_STREAM),
        };
        let bytes = self.bytes(size, "max_size", default)?;
        let possible = net::SMALLEST_MAX_SIZE..=largest;
        if let Some(size) = size.filter(|_| !possible.contains(&bytes)) {
            let message = format!("`max_size` cannot be {bytes}B with the address {address}");
            let hint = format!("write a size from {}B to {largest}B", net::SMALLEST_MAX_SIZE);
            self.findings.report(&size.span(), message, hint);
            return None;
        }
        Some(bytes)
    }

    fn streams(&mut self, written: Option<Spanned<OneOrMany<String>>>) -> Option<Vec<Stream>> {
        let Some(written) = written else {
            return Some(vec![Stream::Verified]);
        };
        let at = written.span();
        let OneOrMany(words) = written.into_inner();
        if words.is_empty() {
            self.findings.report(
                &at,
                "`stream` is an empty array",
                "name at least one stream, or remove the key",
            );
            return None;
        }
        let mut streams = Vec::new();
        let mut sound = true;
        for word in words {
            let word = Spanned::new(at.clone(), word);
            match self.word(&word, "stream", &Stream::ALL, Stream::as_str) {
                Some(stream) if streams.contains(&stream) => {
                    let message = format!("`stream` names `{}` twice", stream.as_str());
                    self.findings.report(&at, message, "name it once");
                }
                Some(stream) => streams.push(stream),
                None => sound = false,
            }
        }
        sound.then_some(streams)
    }

    fn sink_sources(&mut self, written: Spanned<Vec<Text>>, known: &[String]) -> Option<Vec<String>> {
        if written.get_ref().is_empty() {
            let hint = "name at least one source, or remove the key to take from all";
            self.findings.report(&written.span(), "`sources` is an empty array", hint);
            return None;
        }
        let mut names = Vec::new();
        let mut sound = true;
        for name in written.into_inner() {
            if known.contains(name.get_ref()) {
                names.push(name.into_inner());
            } else {
                let message = format!("`sources` names the unknown source `{}`", name.get_ref());
                let hint = suggest(name.get_ref(), "sources", known.iter().map(String::as_str));
                self.findings.report(&name.span(), message, hint);
                sound = false;
            }
        }
        sound.then_some(names)
    }

    fn unique_paths(&mut self, sources: &[(Range<usize>, Source)]) {
        let mut seen: HashMap<&str, &Source> = HashMap::new();
        for (at, source) in sources {
            if let Some(first) = seen.insert(&source.path, source) {
                self.findings.report(
                    at,
                    format!(
                        "the sources `{}` and `{}` share the path `{}`",
                        first.name, source.name, source.path
                    ),
                    "give each its own path",
                );
            }
        }
    }

    fn unique_files(&mut self, sinks: &[(Range<usize>, Sink)], data_dir: Option<&Path>) {
        let ledger = data_dir.map(|data_dir| data_dir.join("ledger.db"));
        let lock = data_dir.map(|data_dir| identity(&data_dir.join("lock")));
        let own: Vec<PathBuf> =
            ledger.as_deref().map(database_files).into_iter().flatten().chain(lock).collect();
        let mut seen: HashMap<PathBuf, &str> = HashMap::new();
        for (at, sink) in sinks {
            let (path, files) = match &sink.kind {
                SinkKind::File { path, .. } => (path, vec![identity(path)]),
                SinkKind::Sqlite { path, .. } => (path, database_files(path).to_vec()),
                SinkKind::Syslog { .. } => continue,
            };
            if files.iter().any(|file| own.contains(file)) {
                let message =
                    format!("the sink `{}` writes to the ledger's own `{}`", sink.name, path.display());
                self.findings.report(at, message, "give it another file");
            }
            let first = files.iter().find_map(|file| seen.get(file));
            if let Some(first) = first {
                self.findings.report(
                    at,
                    format!(
                        "the sinks `{first}` and `{}` write to one file, `{}`",
                        sink.name,
                        path.display()
                    ),
                    "give each its own file, or make it one sink with a list of streams",
                );
            }
            seen.extend(files.into_iter().map(|file| (file, sink.name.as_str())));
        }
    }

    fn every_stream_is_taken(&mut self, sources: &[(Range<usize>, Source)], sinks: &[(Range<usize>, Sink)]) {
        for (at, source) in sources {
            for stream in source.signatures.streams() {
                if sinks.iter().any(|(_, sink)| sink.takes(&source.name, *stream)) {
                    continue;
                }
                let (source, stream) = (&source.name, stream.as_str());
                self.findings.report(
                    at,
                    format!(
                        "no sink takes the stream `{stream}` of source `{source}`: a 200 would lose lines"
                    ),
                    format!("add `{stream}` to the `stream` of a sink that takes from `{source}`"),
                );
            }
        }
    }

    fn required<T>(
        &mut self,
        value: Option<T>,
        at: &Range<usize>,
        key: &str,
        within: &str,
        hint: &str,
    ) -> Option<T> {
        if value.is_none() {
            self.findings.report(at, format!("missing key `{key}` in {within}"), hint);
        }
        value
    }

    fn name(&mut self, name: &Text, what: &str) -> Option<String> {
        let text = name.get_ref();
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
        let sound = (1..=64).contains(&text.len()) && text.bytes().all(legal) && text != "." && text != "..";
        if !sound {
            let hint = "use 1 to 64 of the letters A to Z and a to z, digits, `_`, `.` and `-`";
            self.findings.report(&name.span(), format!("`{text}` is no name for a {what}"), hint);
        }
        sound.then(|| text.clone())
    }

    fn address(&mut self, text: &Text, example: &str) -> Option<SocketAddr> {
        let address = text.get_ref().parse().ok();
        if address.is_none() {
            let message = format!("`{}` is not an IP address with a port", text.get_ref());
            self.findings.report(&text.span(), message, format!("write one such as \"{example}\""));
        }
        address
    }

    /// An absolute path; nothing need exist there.
    fn path(&mut self, text: &Text, key: &str) -> Option<PathBuf> {
        let path = text.get_ref();
        if path.is_empty() || path.contains('\0') {
            let message = format!("`{key}` is not a path");
            self.findings.report(
                &text.span(),
                message,
                "write the path of a file, absolute or from this file's directory",
            );
            return None;
        }
        // Drops `.` and doubled slashes; `..` stays, for it may follow a symbolic link.
        Some(self.base.join(path).components().collect())
    }

    fn output_file(&mut self, text: &Text) -> Option<PathBuf> {
        let path = self.path(text, "path")?;
        if text.get_ref().ends_with('/') || path.file_name().is_none() {
            let message = format!("`{}` is a directory, not a file", text.get_ref());
            self.findings.report(&text.span(), message, "add a file name");
            return None;
        }
        Some(path)
    }

    fn request_path(&mut self, text: Text) -> Option<String> {
        // RFC 3986, section 3.3: pchar and the slash.
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@%/".contains(&byte);

        let path = text.get_ref();
        let hint = if !path.starts_with('/') {
            "begin it with `/`"
        } else if path.contains(['?', '#']) {
            "leave out the query and the fragment"
        } else if !path.bytes().all(legal) {
            "use letters, digits and `-`, `_`, `.`, `/` only, and no spaces"
        } else {
            return Some(text.into_inner());
        };
        self.findings.report(&text.span(), format!("`{path}` is no path of a request"), hint);
        None
    }

    fn word<T: Copy>(&mut self, text: &Text, key: &str, all: &[T], name: fn(T) -> &'static str) -> Option<T> {
        let found = all.iter().copied().find(|word| name(*word) == text.get_ref());
        if found.is_none() {
            let message = format!("unknown word `{}` for `{key}`", text.get_ref());
            let hint = suggest(text.get_ref(), "words", all.iter().map(|word| name(*word)));
            self.findings.report(&text.span(), message, hint);
        }
        found
    }

    fn time(&mut self, text: Option<&Text>, key: &str, default: Duration) -> Option<Duration> {
        let Some(text) = text else {
            return Some(default);
        };
        quantity::parse_time(text.get_ref())
            .map_err(|hint| {
                let message = format!("`{}` is no time for `{key}`", text.get_ref());
                self.findings.report(&text.span(), message, hint);
            })
            .ok()
    }

    fn size(&mut self, size: Option<&Spanned<Size>>, key: &str, default: u64) -> Option<u64> {
        let Some(size) = size else {
            return Some(default);
        };
        let Size(text) = size.get_ref();
        quantity::parse_size(text)
            .map_err(|hint| {
                self.findings.report(&size.span(), format!("`{text}` is no size for `{key}`"), hint);
            })
            .ok()
    }

    /// A size that has to fit into memory.
    fn bytes(&mut self, size: Option<&Spanned<Size>>, key: &str, default: usize) -> Option<usize> {
        let Some(size) = size else {
            return Some(default);
        };
        let bytes = usize::try_from(self.size(Some(size), key, 0)?).ok();
        if bytes.is_none() {
            let message = format!("`{key}` is more than this machine can address");
            self.findings.report(&size.span(), message, "write a smaller size");
        }
        bytes
    }

    fn count(&mut self, count: Option<&Spanned<i64>>, key: &str, default: usize) -> Option<usize> {
        let Some(count) = count else {
            return Some(default);
        };
        let checked = u32::try_from(*count.get_ref()).ok().filter(|count| *count > 0);
        if checked.is_none() {
            let message = format!("{} is no number for `{key}`", count.get_ref());
            self.findings.report(
                &count.span(),
                message,
                format!("write a whole number from 1 to {}", u32::MAX),
            );
        }
        checked.and_then(|count| usize::try_from(count).ok())
    }
}

fn is_tls(address: &SyslogAddress) -> bool {
    matches!(address, SyslogAddress::Tls(_))
}

fn may_be_stream(address: &SyslogAddress) -> bool {
    !matches!(address, SyslogAddress::Udp(_))
}

/// What tells two output files apart: the file itself where it exists, else its name in its real directory,
/// else the path with `..` taken out.
fn identity(path: &Path) -> PathBuf {
    let in_real_directory = || {
        let directory = path.parent()?.canonicalize().ok()?;
        Some(directory.join(path.file_name().unwrap_or(OsStr::new(""))))
    };
    path.canonicalize().ok().or_else(in_real_directory).unwrap_or_else(|| {
        path.components().fold(PathBuf::new(), |mut clean, component| {
            if component == Component::ParentDir {
                clean.pop();
            } else {
                clean.push(component);
            }
            clean
        })
    })
}

/// A database and what SQLite puts beside it.
fn database_files(path: &Path) -> [PathBuf; 4] {
    let real = identity(path);
    ["", "-wal", "-shm", "-journal"].map(|suffix| {
        let mut file = real.clone().into_os_string();
        file.push(suffix);
        file.into()
    })
}

#[cfg(test)]
mod tests {
    use super::super::file::parse;
    use super::*;

    /// One source and two sinks with which nothing is wrong, on known lines.
    const GOOD: &str = r#"data_dir = "data"
[listen]
address = "127.0.0.1:8443"
tls = "off"
[sources.us]
path = "/us"
authorization = { value = "Bearer abc" }
jwks = { url = "https://us.example.com/jwks.json" }
[sinks.good]
type = "file"
path = "good.log"
format = "raw"
[sinks.bad]
type = "file"
path = "bad.jsonl"
format = "json"
stream = "quarantine"
"#;

    fn resolve_text(text: &str, secrets: Secrets) -> Result<Config, Vec<Problem>> {
        let environment = |name: &str| (name == "TOKEN").then(|| "Bearer env".into());
        parse(text).and_then(|written| {
            resolve(written, text, PathBuf::from("/nonexistent/base/config.toml"), &environment, secrets)
        })
    }

    fn config(text: &str) -> Config {
        resolve_text(text, Secrets::Require).unwrap_or_else(|problems| panic!("{problems:#?}"))
    }

    /// The problems as `LINE: message; hint`, line 0 for those without one.
    fn problems(text: &str) -> Vec<String> {
        let mut problems = resolve_text(text, Secrets::Require).expect_err("all is well");
        problems.sort_by_key(|problem| problem.line);
        let show = |Problem { line, message, hint }: &Problem| {
            format!("{}: {message}; {}", line.unwrap_or(0), hint.as_deref().unwrap_or("no hint"))
        };
        problems.iter().map(show).collect()
    }

    /// GOOD with a replacement has exactly one problem, which begins with `expected`.
    #[track_caller]
    fn refused(from: &str, to: &str, expected: &str) {
        assert!(GOOD.contains(from), "{from}");
        let found = problems(&GOOD.replacen(from, to, 1));
        assert_eq!(found.len(), 1, "{found:#?}");
        assert!(found[0].starts_with(expected), "{found:#?}");
    }

    #[track_caller]
    fn accepted(from: &str, to: &str) -> Config {
        assert!(GOOD.contains(from), "{from}");
        config(&GOOD.replacen(from, to, 1))
    }

    #[test]
    fn what_is_not_written_has_its_default() {
        let config = config(GOOD);
        assert_eq!(config.file, Path::new("/nonexistent/base/config.toml"));
        assert_eq!(config.data_dir, Path::new("/nonexistent/base/data"));
        assert!(matches!(config.listen.tls, Tls::Off));
        assert_eq!(config.admin.address, "127.0.0.1:9464".parse().unwrap());
        assert_eq!((config.log.level.as_str(), config.log.format), ("info", LogFormat::Human));
        assert_eq!(config.limits, Limits::default());
        let source = &config.sources[0];
        assert_eq!((source.name.as_str(), source.path.as_str()), ("us", "/us"));
        assert!(source.authorization[0].matches(b"Bearer abc"));
        assert_eq!(source.signatures, Signatures::Require);
        assert_eq!(source.dedup, Dedup { by: DedupBy::Event, window: Duration::from_secs(8 * 86_400) });
        let Some(Jwks::Url { url, refresh, ca: None, token: None }) = &source.jwks else {
            panic!("{source:?}");
        };
        assert_eq!(url.to_string(), "https://us.example.com/jwks.json");
        assert_eq!(*refresh, Duration::from_secs(3600));
        let names: Vec<&str> = config.sinks.iter().map(|sink| sink.name.as_str()).collect();
        assert_eq!(names, ["bad", "good"]);
        assert_eq!(config.sinks[1].streams, [Stream::Verified]);
        assert_eq!(config.sinks[1].sources, None);
    }

    #[test]
    fn everything_can_be_written() {
        let config = config(
            r#"
            data_dir = "/data"
            listen = { address = "[::]:8443", tls = { cert = "tls/./cert.pem", key = "/key.pem" } }
            admin = { address = "0.0.0.0:1" }
            log = { level = "info,auditgate::trust=debug", format = "json" }
            limits = { body = 1024, decoded = "2KiB", line = "1KiB", lines = 7, connections = 8,
                       request_timeout = "9s", in_flight = "1GiB", backlog = "5GiB" }
            [sources.a]
            path = "/a"
            authorization = [{ env = "TOKEN" }, { value = "Splunk x" }]
            jwks = { file = "jwks.json" }
            signatures = "require"
            dedup = { by = "trace_id", window = "1d" }
            [sources.b]
            path = "/b"
            authorization = { value = "Bearer b" }
            signatures = "off"
            [sources.c]
            path = "/c"
            authorization = { value = "Bearer c" }
            jwks = { url = "http://127.0.0.1:1/jwks", refresh = "5m", ca = "ca.pem", token = { value = "t" } }
            signatures = "accept-unsigned"
            [sinks.all]
            type = "file"
            path = "all"
            format = "json"
            stream = ["verified", "unverified", "quarantine"]
            sources = ["a", "b", "c"]
            "#,
        );
        let base = Path::new("/nonexistent/base");
        let Tls::Files { cert, key } = &config.listen.tls else { panic!("{config:?}") };
        assert_eq!((cert.as_path(), key.as_path()), (&*base.join("tls/cert.pem"), Path::new("/key.pem")));
        assert_eq!((config.limits.body, config.limits.decoded, config.limits.lines), (1024, 2048, 7));
        assert_eq!(config.limits.request_timeout, Duration::from_secs(9));
        assert_eq!(config.limits.backlog, 5 << 30);
        let [a, b, c] = config.sources.as_slice() else { panic!("{config:?}") };
        assert!(a.authorization[0].matches(b"Bearer env") && a.authorization[1].matches(b"Splunk x"));
        assert!(matches!(&a.jwks, Some(Jwks::File(file)) if *file == base.join("jwks.json")));
        assert_eq!(a.dedup.by, DedupBy::TraceId);
        assert!(b.jwks.is_none());
        assert!(
            matches!(&c.jwks, Some(Jwks::Url { ca: Some(_), token: Some(token), .. }) if token.matches(b"t"))
        );
        assert_eq!(config.sinks[0].streams, Stream::ALL);
        assert_eq!(config.sinks[0].sources.as_deref().unwrap(), ["a", "b", "c"]);
    }

    #[test]
    fn an_empty_file_tells_all_that_is_missing() {
        let found = problems("");
        let messages: Vec<&str> = found.iter().map(|text| text.split(';').next().unwrap()).collect();
        assert_eq!(
            messages,
            [
                "0: missing key `data_dir`",
                "0: missing table [listen]",
                "0: there is no source",
                "0: there is no sink"
            ]
        );
    }

    #[test]
    fn every_missing_key_is_told_with_its_table() {
        let found = problems("data_dir = \"d\"\n[listen]\n[sources.s]\n[sinks.k]\ntype = \"file\"\n");
        for expected in [
            "2: missing key `address` in [listen]",
            "2: missing key `tls` in [listen]",
            "3: missing key `path` in [sources.s]",
            "3: missing key `authorization` in [sources.s]",
            "3: missing key `jwks` in [sources.s]",
            "4: missing key `path` in [sinks.k]",
            "4: missing key `format` in [sinks.k]",
        ] {
            assert!(found.iter().any(|text| text.starts_with(expected)), "{expected} in {found:#?}");
        }
        assert_eq!(found.len(), 7, "{found:#?}");
        refused("tls = \"off\"", "tls = { cert = \"c\" }", "4: missing key `key` in `tls` of [listen]");
        refused("\"data\"", "\"\"", "1: `data_dir` is not a path");
    }

    #[test]
    fn problems_of_all_parts_are_reported_together() {
        let text = GOOD
            .replace("127.0.0.1:8443", "localhost:8443")
            .replace("\"/us\"", "\"us\"")
            .replace("\"raw\"", "\"row\"")
            + "[limits]\nline = \"1GB\"\nlines = 0\n";
        let lines: Vec<String> =
            problems(&text).iter().map(|text| text.split(':').next().unwrap().to_owned()).collect();
        assert_eq!(lines, ["3", "6", "12", "19", "20"]);
    }

    #[test]
    fn plain_http_is_for_loopback() {
        refused(
            "127.0.0.1:8443",
            "0.0.0.0:8443",
            "3: tls = \"off\" with `0.0.0.0:8443`, which is not a loopback address; configure cert and key",
        );
        accepted("127.0.0.1:8443", "[::1]:8443");
        accepted("127.0.0.1:8443", "[::ffff:127.0.0.1]:0");
        refused("tls = \"off\"", "tls = \"on\"", "4: unknown word for `tls` in [listen]");
    }

    #[test]
    fn addresses_are_ip_addresses_with_ports_and_differ() {
        refused("127.0.0.1:8443", "localhost:8443", "3: `localhost:8443` is not an IP address with a port");
        refused("127.0.0.1:8443", "127.0.0.1", "3: `127.0.0.1` is not");
        refused(
            "127.0.0.1:8443",
            "127.0.0.1:9464",
            "2: [listen] and [admin] both want the address 127.0.0.1:9464",
        );
        refused("[sources.us]", "[admin]\naddress = \"x\"\n[sources.us]", "6: `x` is not an IP address");
        accepted("127.0.0.1:8443\"", "127.0.0.1:0\"\n");
    }

    #[test]
    fn log_levels_are_checked() {
        let log = |level: &str| format!("[log]\nlevel = \"{level}\"\n[sources.us]");
        refused("[sources.us]", &log("inof"), "6: `inof` is no log level; write off, error");
        refused("[sources.us]", &log("info,hyper"), "6: `hyper` is no log level; write off");
        refused("[sources.us]", &log(""), "6: `` is no log level; write off");
        refused("[sources.us]", &log("info,hyper=loud"), "6: `hyper=loud` is no log level; write off");
        for level in ["off", "WARN", "info,hyper=debug", "auditgate::trust=trace"] {
            assert_eq!(accepted("[sources.us]", &log(level)).log.level, level);
        }
        refused(
            "[sources.us]",
            "[log]\nformat = \"jsn\"\n[sources.us]",
            "6: unknown word `jsn` for `format`; did you mean `json`?",
        );
    }

    #[test]
    fn limits_are_positive_and_in_order() {
        let limits = |lines: &str| format!("[limits]\n{lines}\n[sources.us]");
        let refused = |lines: &str, expected: &str| refused("[sources.us]", &limits(lines), expected);
        refused(
            "body = \"8MB\"",
            "6: `8MB` is no size for `body`; write a number and one of B, KiB, MiB, GiB",
        );
        refused("backlog = 0", "6: `0` is no size for `backlog`; write at least 1B");
        refused("body = -1", "6: `-1` is no size for `body`");
        refused("lines = 0", "6: 0 is no number for `lines`; write a whole number from 1 to 4294967295");
        refused("connections = -5", "6: -5 is no number for `connections`");
        refused("request_timeout = \"0s\"", "6: `0s` is no time for `request_timeout`; write at least 1ms");
        refused(
            "request_timeout = \"1w\"",
            "6: `1w` is no time for `request_timeout`; write a number and one of ms",
        );
        refused(
            "decoded = \"1KiB\"",
            "6: `line` (256KiB) is larger than `decoded` (1KiB): no line could ever be that long",
        );
        refused("body = \"300MiB\"", "6: `body` (300MiB) is larger than `in_flight` (256MiB)");
        refused("in_flight = \"32MiB\"", "6: `decoded` (64MiB) is larger than `in_flight` (32MiB)");
        accepted("[sources.us]", &limits("decoded = \"256MiB\"\nline = \"256MiB\"\nbody = \"256MiB\""));
    }

    #[test]
    fn source_paths_are_paths_and_unique() {
        for path in ["us", "", "/us?x=1", "/us#x", "/u s", "/ü", "https://x/us"] {
            refused("\"/us\"", &format!("\"{path}\""), &format!("6: `{path}` is no path of a request; "));
        }
        accepted("\"/us\"", "\"/a%20b/c-d_e.f~g\"");
        let twin = "[sources.eu]\npath = \"/us\"\nauthorization = { env = \"TOKEN\" }\njwks.file = \"j\"\n";
        assert_eq!(
            problems(&(GOOD.to_owned() + twin)),
            ["5: the sources `eu` and `us` share the path `/us`; give each its own path"]
        );
    }

    #[test]
    fn names_are_plain() {
        for name in ["a b", "", "..", "ü", &"x".repeat(65)] {
            refused(
                "[sources.us]",
                &format!("[sources.\"{name}\"]"),
                &format!("5: `{name}` is no name for a source"),
            );
            refused(
                "[sinks.good]",
                &format!("[sinks.\"{name}\"]"),
                &format!("9: `{name}` is no name for a sink"),
            );
        }
        accepted("[sources.us]", "[sources.\"A.b_c-9\"]");
        accepted("[sources.us]", &format!("[sources.{}]", "x".repeat(64)));
    }

    #[test]
    fn a_source_says_who_may_send() {
        let secret = "{ value = \"Bearer abc\" }";
        refused(secret, "[]", "7: `authorization` is an empty array");
        refused(secret, "{}", "7: the secret has no origin; write { file");
        refused(secret, "[{ value = \"x\" }, {}]", "7: the secret has no origin");
        refused(secret, "{ value = \"x\", env = \"y\" }", "7: the secret has more than one origin");
        refused(secret, "{ value = \"\" }", "7: the secret is empty");
        refused(secret, "{ value = \"a\\nb\" }", "7: the secret contains a control character");
        refused(secret, "{ value = \" a\" }", "7: the secret begins or ends with white space");
        refused(
            secret,
            "[\n{ value = \"x\" },\n{ env = \"NONE\" }]",
            "9: the environment variable `NONE` is not set; set",
        );
        refused(secret, "{ credential = \"us\" }", "7: the credential `us` was not passed");
        refused(
            secret,
            "{ file = \"tokens/us\" }",
            "7: cannot read the secret file `/nonexistent/base/tokens/us`: No such file or directory \
             (os error 2); create `/nonexistent/base/tokens/us` and let the daemon's user read it",
        );
    }

    #[test]
    fn missing_secrets_can_be_left_unread_but_wrong_ones_not() {
        for form in ["{ file = \"tokens/us\" }", "{ env = \"NONE\" }", "{ credential = \"us\" }"] {
            let text = GOOD.replace("{ value = \"Bearer abc\" }", form);
            let config = resolve_text(&text, Secrets::SkipMissing).unwrap();
            assert!(!config.sources[0].authorization[0].matches(b""));
        }
        let text = GOOD.replace("Bearer abc", "");
        assert!(resolve_text(&text, Secrets::SkipMissing).is_err());
    }

    #[test]
    fn key_sets_are_required_and_come_from_one_place() {
        let jwks = "jwks = { url = \"https://us.example.com/jwks.json\" }";
        refused(
            jwks,
            "",
            "5: missing key `jwks` in [sources.us], without which no signature can be checked; add jwks",
        );
        refused(jwks, "jwks = {}", "8: `jwks` has neither `url` nor `file`");
        refused(jwks, "jwks = { url = \"https://x\", file = \"y\" }", "8: `jwks` has both");
        refused(
            jwks,
            "jwks = { file = \"y\", refresh = \"1h\" }",
            "8: `refresh` with a `jwks` that is a file",
        );
        refused(jwks, "jwks = { url = \"http://us.example.com/\" }", "8: `url` of `jwks`: ");
        refused(jwks, "jwks = { url = \"nonsense\" }", "8: `url` of `jwks`: ");
        refused(
            jwks,
            "jwks = { url = \"https://x/\", refresh = \"0s\" }",
            "8: `0s` is no time for `refresh`",
        );
        refused(jwks, "jwks = { url = \"https://x/\", token = {} }", "8: the secret has no origin");
        refused(
            jwks,
            "jwks = { url = \"https://x/\", token = { value = \"Bearer x\" } }",
            "8: the token of `jwks` contains a space; write the token alone",
        );
        accepted(jwks, "jwks = { url = \"http://localhost:1/\" }");
    }

    #[test]
    fn words_are_known_ones() {
        let next = "[sinks.good]";
        refused(
            next,
            "signatures = \"requird\"\n[sinks.good]",
            "9: unknown word `requird` for `signatures`; did you mean `require`?",
        );
        refused(
            next,
            "dedup = { by = \"trace-id\" }\n[sinks.good]",
            "9: unknown word `trace-id` for `by`; did you mean `trace_id`?",
        );
        refused(next, "dedup = { window = \"0d\" }\n[sinks.good]", "9: `0d` is no time for `window`");
        refused(
            "\"quarantine\"",
            "\"rejects\"",
            "17: unknown word `rejects` for `stream`; known words: verified, unverified, quarantine",
        );
        refused("\"raw\"", "\"text\"", "12: unknown word `text` for `format`; known words: raw, json");
    }

    #[test]
    fn trace_ids_are_believed_only_when_signed() {
        for signatures in ["off", "accept-unsigned"] {
            let written =
                format!("signatures = \"{signatures}\"\ndedup = {{ by = \"trace_id\" }}\n[sinks.good]");
            let text = GOOD
                .replace("[sinks.good]", &written)
                .replace("\"quarantine\"", "[\"quarantine\", \"unverified\"]");
            let found = problems(&text);
            assert_eq!(found.len(), 1, "{found:#?}");
            assert!(
                found[0].starts_with("10: by = \"trace_id\" without signatures = \"require\""),
                "{found:#?}"
            );
        }
    }

    #[test]
    fn every_stream_has_a_sink() {
        refused(
            "stream = \"quarantine\"",
            "stream = \"verified\"",
            "5: no sink takes the stream `quarantine` of source `us`: a 200 would lose lines; add",
        );
        let unsigned = GOOD.replace("[sinks.good]", "signatures = \"accept-unsigned\"\n[sinks.good]");
        assert!(problems(&unsigned)[0].starts_with("5: no sink takes the stream `unverified`"));
        let off = GOOD.replace("[sinks.good]", "signatures = \"off\"\n[sinks.good]");
        assert!(problems(&off)[0].starts_with("5: no sink takes the stream `unverified`"));
        let off = off.replace("format = \"raw\"", "format = \"raw\"\nstream = \"unverified\"");
        assert_eq!(config(&off).sinks[1].streams, [Stream::Unverified]);

        let other =
            "[sources.eu]\npath = \"/eu\"\nauthorization = { value = \"x\" }\njwks = { file = \"j\" }\n";
        let limited = GOOD.replace("format = \"raw\"", "format = \"raw\"\nsources = [\"us\"]") + other;
        let found = problems(&limited);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert!(found[0].starts_with("19: no sink takes the stream `verified` of source `eu`"), "{found:#?}");
    }

    #[test]
    fn a_sink_that_is_wrong_does_not_make_its_stream_untaken() {
        refused("path = \"bad.jsonl\"", "path = \"\"", "15: `path` is not a path");
    }

    #[test]
    fn sinks_name_known_sources_and_streams_once() {
        refused(
            "format = \"raw\"",
            "format = \"raw\"\nsources = [\"su\", \"us\"]",
            "13: `sources` names the unknown source `su`; ",
        );
        refused("format = \"raw\"", "format = \"raw\"\nsources = []", "13: `sources` is an empty array");
        refused("\"quarantine\"", "[]", "17: `stream` is an empty array");
        refused(
            "\"quarantine\"",
            "[\"quarantine\", \"quarantine\"]",
            "17: `stream` names `quarantine` twice",
        );
    }

    /// GOOD with a syslog sink at its end, whose `type` is on line 19.
    fn with_syslog(lines: &str) -> String {
        format!("{GOOD}[sinks.siem]\ntype = \"syslog\"\n{lines}\n")
    }

    #[test]
    fn a_syslog_sink_has_defaults_that_fit_its_address() {
        for (address, shown, framing, max_size) in [
            ("udp://siem", "udp://siem:514", Framing::OctetCounting, 2048),
            ("tcp://siem:601", "tcp://siem:601", Framing::OctetCounting, 65_536),
            ("tls://siem", "tls://siem:6514", Framing::OctetCounting, 65_536),
            ("unix:///dev/log", "unix:///dev/log", Framing::Newline, 8192),
        ] {
            let config = config(&with_syslog(&format!("address = \"{address}\"")));
            let SinkKind::Syslog { address, ca, identity, framing: with, facility, app_name, .. } =
                &config.sinks[2].kind
            else {
                panic!("{config:?}");
            };
            assert_eq!((address.to_string().as_str(), *with), (shown, framing));
            assert_eq!(
                (ca, identity, facility.name(), app_name.as_str()),
                (&None, &None, "local0", "auditgate")
            );
            assert!(matches!(
                config.sinks[2].kind,
                SinkKind::Syslog { structured_data: false, max_size: found, .. } if found == max_size
            ));
        }
        let config = config(&with_syslog(
            "address = \"tls://[::1]:7\"\nca = \"ca.pem\"\ncert = \"c.pem\"\nkey = \"/k.pem\"\n\
             framing = \"newline\"\nfacility = \"authpriv\"\napp_name = \"gate-1\"\n\
             structured_data = true\nmax_size = \"1MiB\"\nstream = [\"verified\", \"quarantine\"]",
        ));
        let SinkKind::Syslog { identity: Some(identity), ca: Some(ca), .. } = &config.sinks[2].kind else {
            panic!("{config:?}");
        };
        assert_eq!(ca, Path::new("/nonexistent/base/ca.pem"));
        assert_eq!(identity.cert, Path::new("/nonexistent/base/c.pem"));
        assert_eq!(identity.key, Path::new("/k.pem"));
    }

    #[test]
    fn a_syslog_sink_s_keys_fit_its_address() {
        #[track_caller]
        fn refused(lines: &str, expected: &str) {
            let found = problems(&with_syslog(lines));
            assert_eq!(found.len(), 1, "{found:#?}");
            assert!(found[0].starts_with(expected), "{found:#?}");
        }
        refused("", "18: missing key `address` in [sinks.siem]; such as");
        refused("address = \"siem:514\"", "20: `siem:514` does not begin with udp://");
        refused(
            "address = \"tcp://siem\"",
            "20: `tcp://siem` has no port, and plain TCP has no usual one; add",
        );
        refused(
            "address = \"unix://dev/log\"",
            "20: `unix://dev/log` has no absolute path; write it with three",
        );
        let udp = "address = \"udp://siem\"\n";
        let tcp = "address = \"tcp://siem:1\"\n";
        let tls = "address = \"tls://siem\"\n";
        for key in ["ca", "cert", "key"] {
            let found = problems(&with_syslog(&format!("{tcp}{key} = \"x\"")));
            let expected = format!("21: `{key}` with the address tcp://siem:1; `{key}` is for tls:// only");
            assert!(found[0].starts_with(&expected), "{found:#?}");
        }
        refused(&format!("{udp}framing = \"newline\""), "21: `framing` with the address udp://siem:514");
        refused(&format!("{tls}cert = \"x\""), "21: only one of `cert` and `key` in [sinks.siem]; a client");
        refused(&format!("{tls}key = \"x\""), "21: only one of `cert` and `key`");
        refused(&format!("{tcp}framing = \"lf\""), "21: unknown word `lf` for `framing`; known words: octet");
        refused(&format!("{tcp}facility = \"local8\""), "21: unknown word `local8` for `facility`; did you");
        refused(&format!("{tcp}app_name = \"a b\""), "21: `app_name` cannot stand in a syslog header; use 1");
        refused(&format!("{tcp}max_size = 479"), "21: `max_size` cannot be 479B with the address tcp://");
        refused(
            &format!("{udp}max_size = \"64KiB\""),
            "21: `max_size` cannot be 65536B with the address udp",
        );
        refused(&format!("{tcp}max_size = \"17MiB\""), "21: `max_size` cannot be 17825792B");
    }

    #[test]
    fn a_file_is_rotated_and_synced_as_asked() {
        let with = |more: &str| format!("format = \"raw\"\n{more}");
        let file = |more: &str| {
            let config = accepted("format = \"raw\"", &with(more));
            let SinkKind::File { rotate, fsync, mode, owner, .. } = &config.sinks[1].kind else {
                panic!("of type file");
            };
            (*rotate, *fsync, *mode, owner.clone())
        };
        assert_eq!(file(""), (Rotate::default(), Fsync::Batch, 0o640, None));
        let rotate = Rotate {
            size: Some(256 << 20),
            every: Some(Every::Daily),
            keep: Some(14),
            compress: Some(Compress::Zstd),
        };
        let written = "rotate = { size = \"256MiB\", every = \"daily\", keep = 14, compress = \"zstd\" }\nfsync = \"interval\"\nmode = \"0600\"\nowner = \"audit:adm\"";
        let owner = Owner { user: Some("audit".into()), group: Some("adm".into()) };
        assert_eq!(file(written), (rotate, Fsync::Interval(Duration::from_secs(1)), 0o600, Some(owner)));
        for (more, problem) in [
            ("rotate = { every = \"weekly\" }", "13: unknown word `weekly` for `every`"),
            ("rotate = { keep = 0 }", "13: 0 is no number for `keep`"),
            ("rotate = { size = \"0B\" }", "13: "),
            ("fsync_interval = \"1s\"", "13: `fsync_interval` without"),
            ("mode = \"0888\"", "13: `0888` is no file mode"),
            ("mode = \"0040\"", "13: `0040` is no file mode"),
            ("owner = \":\"", "13: `:` is no owner"),
        ] {
            refused("format = \"raw\"", &with(more), problem);
        }
    }

    #[test]
    fn raw_is_for_one_stream() {
        let text = GOOD.replace("format = \"json\"", "format = \"raw\"");
        assert_eq!(config(&text).sinks[0].streams, [Stream::Quarantine]);
        let text = text.replace("\"quarantine\"", "[\"quarantine\", \"verified\"]");
        assert!(problems(&text)[0].starts_with("17: format = \"raw\" with several streams in [sinks.bad]"));
    }

    #[test]
    fn two_sinks_never_share_a_file() {
        for path in ["good.log", "./good.log", "x/../good.log", "/nonexistent/base//good.log"] {
            refused("bad.jsonl", path, "9: the sinks `bad` and `good` write to one file, ");
        }
        refused("bad.jsonl", "bad/", "15: `bad/` is a directory, not a file");
        refused("bad.jsonl", "..", "15: `..` is a directory, not a file");
    }

    #[test]
    fn a_database_has_its_files_to_itself() {
        let sqlite = "type = \"sqlite\"\npath = \"good.db\"\nretain = \"90d\"";
        let good = GOOD.replace("type = \"file\"\npath = \"good.log\"\nformat = \"raw\"", sqlite);
        let kind = config(&good).sinks[1].kind.clone();
        assert!(
            matches!(&kind, SinkKind::Sqlite { path, retain: Some(retain) }
                if path == Path::new("/nonexistent/base/good.db") && retain.as_secs() == 90 * 86_400),
            "{kind:?}"
        );
        let kind = config(&good.replace("retain = \"90d\"\n", "")).sinks[1].kind.clone();
        assert!(matches!(kind, SinkKind::Sqlite { retain: None, .. }));
        for (from, to, expected) in [
            ("90d", "0d", "12: `0d` is no time for `retain`; "),
            ("path = \"good.db\"\n", "", "9: missing key `path` in [sinks.good]; "),
            ("good.db", "good.db/", "11: `good.db/` is a directory, not a file; "),
            ("bad.jsonl", "x/../good.db", "9: the sinks `bad` and `good` write to one file, "),
            ("bad.jsonl", "good.db-wal", "9: the sinks `bad` and `good` write to one file, "),
            ("good.db", "data/ledger.db", "9: the sink `good` writes to the ledger's own `"),
            ("bad.jsonl", "data/ledger.db-shm", "13: the sink `bad` writes to the ledger's own `"),
            ("bad.jsonl", "data/lock", "13: the sink `bad` writes to the ledger's own `"),
        ] {
            assert!(good.contains(from), "{from}");
            let found = problems(&good.replacen(from, to, 1));
            assert_eq!(found.len(), 1, "{found:#?}");
            assert!(found[0].starts_with(expected), "{found:#?}");
        }
    }

    #[test]
    fn a_shared_file_is_found_through_symbolic_links() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        std::fs::create_dir(root.join("real")).unwrap();
        std::os::unix::fs::symlink("real", root.join("link")).unwrap();
        assert_eq!(identity(&root.join("real/a")), identity(&root.join("link/a")));
        assert_ne!(identity(&root.join("real/a")), identity(&root.join("link/b")));
        std::fs::write(root.join("real/a"), "").unwrap();
        std::os::unix::fs::symlink("real/a", root.join("b")).unwrap();
        assert_eq!(identity(&root.join("real/a")), identity(&root.join("b")));
    }
}
