//! From the tables as written to the configuration: defaults, paths, secrets, and every check that needs
//! more than the shape of one value.
//!
//! Nothing stops at the first problem. A function that returns `None` has reported why.

use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Spanned;

use super::file::{self, Size, Text};
use super::problem::{Findings, Problem, suggest};
use super::{
    Admin, AdminAddress, Config, Environment, LONGEST_SOCKET_PATH, Limits, Listen, Log, LogFormat, Secrets,
    Sink, Source, Tls, quantity,
};
use crate::memory_budget;
use crate::observe::logging;

#[cfg(test)]
mod fixture;
mod sink;
mod source;

const DEFAULT_ADMIN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9464);
const DEFAULT_LEVEL: &str = "info";

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
            && admin.address == AdminAddress::Tcp(listen.address)
            && listen.address.port() != 0
            && let Some(at) = admin_at.or(listen_at)
        {
            let message = format!("[listen] and [admin] both want the address {}", listen.address);
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
        let file::Listen { address, tls, proxy_protocol } = table.into_inner();
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
        let hint = "remove it, or name your proxies' networks";
        let proxies = self.networks(proxy_protocol, "proxy_protocol", "names no proxy", hint);
        Some(Listen { address: address?, tls: tls?, proxy_protocol: proxies? })
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
                if let Some(address) = address.filter(|address| !is_loopback(address)) {
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
            file::Tls::Files(file::TlsFiles { cert, key, client_ca, client_names }) => {
                let names_at = client_names.as_ref().map(Spanned::span);
                if let Some(at) = names_at.as_ref().filter(|_| client_ca.is_none()) {
                    let hint = "name the authority that certifies clients as `client_ca`";
                    self.findings.report(at, "`client_names` without `client_ca`", hint);
                }
                let client_names: Vec<String> =
                    client_names.into_iter().flat_map(Spanned::into_inner).map(Spanned::into_inner).collect();
                if let Some(at) = names_at.filter(|_| client_names.is_empty()) {
                    let hint = "remove it to let in everybody whom the authority certified";
                    self.findings.report(&at, "`client_names` names nobody", hint);
                }
                let client_ca = client_ca.map_or(Some(None), |text| self.path(&text, "client_ca").map(Some));
                let cert = self
                    .required(cert, &at, "cert", "`tls` of [listen]", FORMS)
                    .and_then(|text| self.path(&text, "cert"));
                let key = self
                    .required(key, &at, "key", "`tls` of [listen]", FORMS)
                    .and_then(|text| self.path(&text, "key"));
                Some(Tls::Files { cert: cert?, key: key?, client_ca: client_ca?, client_names })
            }
        }
    }

    fn admin(&mut self, table: file::Admin) -> Option<Admin> {
        let at = table.address.as_ref().map(Spanned::span);
        let address = match &table.address {
            None => Some(AdminAddress::Tcp(DEFAULT_ADMIN)),
            Some(text) => self.admin_address(text),
        };
        let is_protected = table.token.is_some();
        let token = table.token.map_or(Some(None), |token| self.bearer_token(token, "[admin]").map(Some));
        if let (Some(AdminAddress::Tcp(address)), Some(at)) = (&address, at)
            && !is_protected
            && !is_loopback(address)
        {
            let message =
                format!("[admin] without `token` at `{address}`, which other machines may be able to reach");
            let hint = "add token = { file = \"PATH\" }, or use 127.0.0.1:9464 or unix:///PATH";
            self.findings.report(&at, message, hint);
            return None;
        }
        Some(Admin { address: address?, token: token? })
    }

    fn admin_address(&mut self, text: &Text) -> Option<AdminAddress> {
        let Some(path) = text.get_ref().strip_prefix("unix://") else {
            return self.address(text, "127.0.0.1:9464").map(AdminAddress::Tcp);
        };
        let problem = if !path.starts_with('/') || path.ends_with('/') || path.contains('\0') {
            "has no absolute path"
        } else if path.len() > LONGEST_SOCKET_PATH {
            "is longer than the 107 bytes that a socket's path may have"
        } else {
            return Some(AdminAddress::Unix(path.into()));
        };
        let message = format!("`{}` {problem}", text.get_ref());
        self.findings.report(&text.span(), message, "write one such as \"unix:///run/auditgate/admin.sock\"");
        None
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
        let connections_per_peer = self.count(
            table.connections_per_peer.as_ref(),
            "connections_per_peer",
            default.connections_per_peer,
        );
        let request_timeout =
            self.time(table.request_timeout.as_ref(), "request_timeout", default.request_timeout);
        let idle_timeout = self.time(table.idle_timeout.as_ref(), "idle_timeout", default.idle_timeout);
        let in_flight = self.bytes(table.in_flight.as_ref(), "in_flight", default.in_flight);
        let backlog = self.size(table.backlog.as_ref(), "backlog", default.backlog);

        let written = |size: &Option<Spanned<Size>>| size.as_ref().map(Spanned::span);
        self.ordered(
            ("line", line, written(&table.line)),
            ("decoded", decoded, written(&table.decoded)),
            "no line could ever be that long",
        );
        self.fits_memory(body, decoded, lines, in_flight, table);
        Some(Limits {
            body: body?,
            decoded: decoded?,
            line: line?,
            lines: lines?,
            connections: connections?,
            connections_per_peer: connections_per_peer?,
            request_timeout: request_timeout?,
            idle_timeout: idle_timeout?,
            in_flight: in_flight?,
            backlog: backlog?,
        })
    }

    /// A batch that is as large as it may be fits into `in_flight`; a limit that did not resolve is in order.
    fn fits_memory(
        &mut self,
        body: Option<usize>,
        decoded: Option<usize>,
        lines: Option<usize>,
        in_flight: Option<usize>,
        table: &file::Limits,
    ) {
        let (Some(body), Some(decoded), Some(lines), Some(in_flight)) = (body, decoded, lines, in_flight)
        else {
            return;
        };
        let needed = memory_budget::needed(body, decoded, lines);
        let least = needed.saturating_add(needed / 7 + 1);
        let written = |size: &Option<Spanned<Size>>| size.as_ref().map(Spanned::span);
        let at = written(&table.in_flight)
            .or_else(|| written(&table.decoded))
            .or_else(|| written(&table.body))
            .or_else(|| table.lines.as_ref().map(Spanned::span));
        // The defaults are in order, so that at least one was written.
        if let Some(at) = at.filter(|_| needed > memory_budget::largest(in_flight)) {
            self.findings.report(
                &at,
                format!(
                    "`in_flight` ({}) is too small for the largest batch: `body` ({}), `decoded` ({}) and {} B for each \
                     of `lines` ({lines}) are held together and may take seven eighths of it, so such a batch could never be taken",
                    size(in_flight),
                    size(body),
                    size(decoded),
                    memory_budget::LINE,
                ),
                format!(
                    "raise `in_flight` to {} or more, or lower one of the others in [limits]",
                    size(least.div_ceil(1 << 20) << 20)
                ),
            );
        }
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
            let (small, large) = (size(small), size(large));
            self.findings.report(
                &at,
                format!("`{smaller}` ({small}) is larger than `{larger}` ({large}): {consequence}"),
                format!("raise `{larger}` or lower `{smaller}` in [limits]"),
            );
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

/// For IPv4-mapped IPv6 addresses too.
fn is_loopback(address: &SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

fn size(bytes: usize) -> String {
    u64::try_from(bytes).map_or_else(|_| bytes.to_string(), quantity::display_size)
}

#[cfg(test)]
mod tests {
    use super::super::{Dedup, DedupBy, JwksOrigin, Signatures, Stream};
    use super::fixture::{GOOD, accepted, config, problems, refused, resolve_text};
    use super::*;

    #[test]
    fn what_is_not_written_has_its_default() {
        let config = config(GOOD);
        assert_eq!(config.file, Path::new("/nonexistent/base/config.toml"));
        assert_eq!(config.data_dir, Path::new("/nonexistent/base/data"));
        assert!(matches!(config.listen.tls, Tls::Off));
        assert_eq!(config.admin.address, AdminAddress::Tcp("127.0.0.1:9464".parse().unwrap()));
        assert!(config.admin.token.is_none());
        assert_eq!((config.log.level.as_str(), config.log.format), ("info", LogFormat::Human));
        assert_eq!(config.limits, Limits::default());
        let source = &config.sources[0];
        assert_eq!((source.name.as_str(), source.path.as_str()), ("us", "/us"));
        assert!(source.authorization[0].matches(b"Bearer abc"));
        assert_eq!(source.signatures, Signatures::Require);
        assert_eq!(source.dedup, Dedup { by: DedupBy::Event, window: Duration::from_secs(8 * 86_400) });
        let Some(JwksOrigin::Url { url, refresh, ca: None, token: None }) =
            source.jwks.as_ref().map(|jwks| &jwks.origin)
        else {
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
            admin = { address = "0.0.0.0:1", token = { value = "look" } }
            log = { level = "info,auditgate::trust=debug", format = "json" }
            limits = { body = 1024, decoded = "2KiB", line = "1KiB", lines = 7, connections = 8, connections_per_peer = 3,
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
        let Tls::Files { cert, key, .. } = &config.listen.tls else { panic!("{config:?}") };
        assert_eq!((cert.as_path(), key.as_path()), (&*base.join("tls/cert.pem"), Path::new("/key.pem")));
        assert_eq!((config.limits.body, config.limits.decoded, config.limits.lines), (1024, 2048, 7));
        assert_eq!((config.limits.connections, config.limits.connections_per_peer), (8, 3));
        assert_eq!(config.limits.request_timeout, Duration::from_secs(9));
        assert_eq!(config.limits.backlog, 5 << 30);
        assert_eq!(config.admin.address, AdminAddress::Tcp("0.0.0.0:1".parse().unwrap()));
        assert!(config.admin.token.as_ref().unwrap().matches(b"look"));
        let [a, b, c] = config.sources.as_slice() else { panic!("{config:?}") };
        assert!(a.authorization[0].matches(b"Bearer env") && a.authorization[1].matches(b"Splunk x"));
        assert!(
            matches!(a.jwks.as_ref().map(|jwks| &jwks.origin), Some(JwksOrigin::File(file)) if *file == base.join("jwks.json"))
        );
        assert_eq!(a.dedup.by, DedupBy::TraceId);
        assert!(b.jwks.is_none());
        assert!(
            matches!(c.jwks.as_ref().map(|jwks| &jwks.origin), Some(JwksOrigin::Url { ca: Some(_), token: Some(token), .. }) if token.matches(b"t"))
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
        let mutual = "tls = { cert = \"c\", key = \"k\", client_ca = \"a\", client_names = [\"n\"] }";
        accepted("tls = \"off\"", mutual);
        let without = mutual.replace("client_ca = \"a\", ", "");
        refused("tls = \"off\"", &without, "4: `client_names` without `client_ca`; name the authority");
        refused("tls = \"off\"", &mutual.replace("\"n\"", ""), "4: `client_names` names nobody; remove it");
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
    fn the_admin_endpoint_is_for_this_machine_unless_it_has_a_token() {
        let admin = |lines: &str| format!("[admin]\n{lines}\n[sources.us]");
        let accepted = |lines: &str| accepted("[sources.us]", &admin(lines)).admin;
        let refused = |lines: &str, expected: &str| refused("[sources.us]", &admin(lines), expected);
        for address in ["0.0.0.0:1", "192.0.2.1:1", "[::]:1", "[2001:db8::1]:1"] {
            refused(
                &format!("address = \"{address}\""),
                &format!(
                    "6: [admin] without `token` at `{address}`, which other machines may be able to reach; add"
                ),
            );
            accepted(&format!("address = \"{address}\"\ntoken = {{ value = \"t\" }}"));
        }
        accepted("address = \"[::1]:1\"");
        accepted("address = \"[::ffff:127.0.0.1]:1\"");
        let admin =
            accepted("address = \"unix:///run/auditgate/admin.sock\"\ntoken = { env = \"TOKEN_ONLY\" }");
        assert_eq!(admin.address, AdminAddress::Unix("/run/auditgate/admin.sock".into()));
        assert!(admin.token.unwrap().matches(b"env"));
        for path in ["", "run/a.sock", "/", "/run/auditgate/"] {
            let address = format!("unix://{path}");
            refused(
                &format!("address = \"{address}\""),
                &format!("6: `{address}` has no absolute path; write"),
            );
        }
        let longest = format!("unix:///{}", "x".repeat(LONGEST_SOCKET_PATH - 1));
        accepted(&format!("address = \"{longest}\""));
        refused(
            &format!("address = \"{longest}x\""),
            &format!("6: `{longest}x` is longer than the 107 bytes"),
        );
        refused("token = {}", "6: the secret has no origin");
        refused(
            "token = { value = \"Bearer t\" }",
            "6: the token of [admin] contains a space; write the token alone",
        );
        // What is missing on this machine protects nonetheless.
        let text = GOOD.replace(
            "[sources.us]",
            "[admin]\naddress = \"0.0.0.0:1\"\ntoken = { file = \"none\" }\n[sources.us]",
        );
        assert!(resolve_text(&text, Secrets::SkipMissing).unwrap().admin.token.is_some());
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
        refused("connections_per_peer = 0", "6: 0 is no number for `connections_per_peer`");
        refused("request_timeout = \"0s\"", "6: `0s` is no time for `request_timeout`; write at least 1ms");
        refused(
            "request_timeout = \"1w\"",
            "6: `1w` is no time for `request_timeout`; write a number and one of ms",
        );
        refused(
            "decoded = \"1KiB\"",
            "6: `line` (256KiB) is larger than `decoded` (1KiB): no line could ever be that long",
        );
        let too_small =
            |written: &str| format!("6: `in_flight` ({written}) is too small for the largest batch: ");
        refused("body = \"300MiB\"", &too_small("256MiB"));
        refused("in_flight = \"32MiB\"", &too_small("32MiB"));
        refused("lines = 1000000", &too_small("256MiB"));
        refused(
            "in_flight = \"64MiB\"\nbody = \"64MiB\"",
            "6: `in_flight` (64MiB) is too small for the largest batch: `body` (64MiB), `decoded` (64MiB) and 256 B for \
             each of `lines` (100000) are held together and may take seven eighths of it, so such a batch could never be taken; raise \
             `in_flight` to 175MiB or more",
        );
        accepted("[sources.us]", &limits("in_flight = \"175MiB\"\nbody = \"64MiB\""));
        accepted("[sources.us]", &limits("decoded = \"190MiB\"\nline = \"190MiB\""));
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
}
