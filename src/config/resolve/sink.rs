//! One sink: its streams and sources, and its file, database or syslog server; and what must hold for all
//! sinks together.

use std::collections::HashMap;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use toml::Spanned;

use super::super::file::{self, OneOrMany, Size, Text};
use super::super::problem::suggest;
use super::super::{
    Compress, Every, FileFormat, Fsync, Owner, Rotate, Sink, SinkKind, Source, Stream, WhenFull,
};
use super::Resolver;
use crate::net::{self, Facility, Framing, Identity, SyslogAddress, SyslogAddressError};

const DEFAULT_MODE: u32 = 0o640;
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

impl Resolver<'_> {
    pub(super) fn sink(&mut self, name: &Text, table: file::Sink, known: &[String]) -> Option<Sink> {
        let at = name.span();
        let name = self.name(name, "sink");
        let shown = name.as_deref().unwrap_or("NAME");
        let within = format!("[sinks.{shown}]");

        let stream_at = table.stream.as_ref().map(Spanned::span);
        let streams = self.streams(table.stream);
        let sources = table.sources.map_or(Some(None), |names| self.sink_sources(names, known).map(Some));
        let when_full = table.when_full.map_or(Some(WhenFull::default()), |text| {
            self.word(&text, "when_full", &WhenFull::ALL, WhenFull::name)
        });
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
        Some(Sink { name: name?, kind: kind?, streams: streams?, sources: sources?, when_full: when_full? })
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

    fn output_file(&mut self, text: &Text) -> Option<PathBuf> {
        let path = self.path(text, "path")?;
        if text.get_ref().ends_with('/') || path.file_name().is_none() {
            let message = format!("`{}` is a directory, not a file", text.get_ref());
            self.findings.report(&text.span(), message, "add a file name");
            return None;
        }
        Some(path)
    }

    pub(super) fn unique_files(&mut self, sinks: &[(Range<usize>, Sink)], data_dir: Option<&Path>) {
        let ledger = data_dir.map(|data_dir| data_dir.join("ledger.db"));
        let lock = data_dir.map(|data_dir| real_path(&data_dir.join("lock")));
        let own = identities(ledger.as_deref().map(database_files).into_iter().flatten().chain(lock));
        let mut seen: HashMap<FileIdentity, &str> = HashMap::new();
        for (at, sink) in sinks {
            let (path, files) = match &sink.kind {
                SinkKind::File { path, .. } => (path, identities([real_path(path)])),
                SinkKind::Sqlite { path, .. } => (path, identities(database_files(path))),
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

    pub(super) fn every_stream_is_taken(
        &mut self,
        sources: &[(Range<usize>, Source)],
        sinks: &[(Range<usize>, Sink)],
    ) {
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
}

fn is_tls(address: &SyslogAddress) -> bool {
    matches!(address, SyslogAddress::Tls(_))
}

fn may_be_stream(address: &SyslogAddress) -> bool {
    !matches!(address, SyslogAddress::Udp(_))
}

/// What tells two output files apart. A file that exists may have several names (hard links); one that does not
/// exist yet has one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum FileIdentity {
    Name(PathBuf),
    File { device: u64, inode: u64 },
}

/// Of real paths.
fn identities(paths: impl IntoIterator<Item = PathBuf>) -> Vec<FileIdentity> {
    let both = |path: PathBuf| {
        let file = path.metadata().ok();
        let file = file.map(|file| FileIdentity::File { device: file.dev(), inode: file.ino() });
        [Some(FileIdentity::Name(path)), file]
    };
    paths.into_iter().flat_map(both).flatten().collect()
}

/// Where a path leads to, whether there is anything or not: without symbolic links and `..`. Opening a link to
/// nothing makes what it names.
fn real_path(path: &Path) -> PathBuf {
    follow(&std::path::absolute(path).unwrap_or_else(|_| path.to_owned()), &mut { LINKS })
}

/// Linux follows no more in one path (path_resolution(7)).
const LINKS: u32 = 40;

fn follow(path: &Path, links_left: &mut u32) -> PathBuf {
    let mut real = PathBuf::new();
    for component in path.components() {
        if component == Component::ParentDir {
            real.pop();
            continue;
        }
        real.push(component);
        if *links_left > 0
            && let Ok(target) = real.read_link()
        {
            *links_left -= 1;
            real.pop();
            real = follow(&real.join(target), links_left);
        }
    }
    real
}

/// A database and what SQLite puts beside it.
fn database_files(path: &Path) -> [PathBuf; 4] {
    let real = real_path(path);
    ["", "-wal", "-shm", "-journal"].map(|suffix| {
        let mut file = real.clone().into_os_string();
        file.push(suffix);
        file.into()
    })
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{GOOD, accepted, config, problems, refused, resolve_text};
    use super::*;
    use crate::config::Secrets;

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
    fn every_sink_holds_or_skips() {
        let with = |word: &str| format!("format = \"raw\"\nwhen_full = \"{word}\"");
        assert_eq!(config(GOOD).sinks[1].when_full, WhenFull::Hold);
        assert_eq!(accepted("format = \"raw\"", &with("hold")).sinks[1].when_full, WhenFull::Hold);
        assert_eq!(accepted("format = \"raw\"", &with("skip")).sinks[1].when_full, WhenFull::Skip);
        let syslog = with_syslog("address = \"udp://siem\"\nwhen_full = \"skip\"");
        assert_eq!(config(&syslog).sinks[2].when_full, WhenFull::Skip);
        let sqlite = GOOD.replace("\"file\"\npath = \"good.log\"", "\"sqlite\"\npath = \"good.db\"");
        let sqlite = sqlite.replace("format = \"raw\"", "when_full = \"skip\"");
        assert_eq!(config(&sqlite).sinks[1].when_full, WhenFull::Skip);
        refused(
            "format = \"raw\"",
            &with("drop"),
            "13: unknown word `drop` for `when_full`; known words: hold, skip",
        );
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
    fn a_shared_file_is_found_through_links() {
        use std::os::unix::fs::symlink;

        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let text = GOOD.replace("good.log", &root.join("a").display().to_string());
        let shared = |other: &str| {
            let text = text.replace("bad.jsonl", &root.join(other).display().to_string());
            if resolve_text(&text, Secrets::Require).is_ok() {
                return false;
            }
            let found = problems(&text);
            assert_eq!(found.len(), 1, "{found:#?}");
            let expected = "9: the sinks `bad` and `good` write to one file, ";
            assert!(found[0].starts_with(expected), "{found:#?}");
            true
        };
        std::fs::create_dir(root.join("real")).unwrap();
        symlink("real", root.join("link")).unwrap();
        symlink("real/a", root.join("a")).unwrap();
        symlink("missing", root.join("nowhere")).unwrap();
        symlink("circle", root.join("circle")).unwrap();
        for exists in [false, true] {
            assert_eq!(root.join("real/a").exists(), exists);
            assert!(shared("real/a") && shared("link/a") && shared("link/../link/a"), "{exists}");
            for other in ["link/b", "b", "link", "nowhere", "nowhere/a", "circle", "circle/a"] {
                assert!(!shared(other), "{other} {exists}");
            }
            std::fs::write(root.join("real/a"), "").unwrap();
        }
        std::fs::hard_link(root.join("real/a"), root.join("b")).unwrap();
        std::fs::write(root.join("c"), "").unwrap();
        assert!(shared("b") && !shared("c"));
    }

    #[test]
    fn the_ledger_is_found_through_links() {
        let directory = tempfile::tempdir().unwrap();
        let data_dir = directory.path().join("data");
        std::fs::create_dir(&data_dir).unwrap();
        std::fs::write(data_dir.join("ledger.db"), "").unwrap();
        let hard = directory.path().join("hard");
        std::fs::hard_link(data_dir.join("ledger.db"), &hard).unwrap();
        let soft = directory.path().join("soft");
        std::os::unix::fs::symlink("data/ledger.db-wal", &soft).unwrap();
        let good = GOOD.replacen("\"data\"", &format!("{data_dir:?}"), 1);
        let with = |path: &Path| good.replace("good.log", &path.display().to_string());
        for path in [&hard, &soft] {
            let found = problems(&with(path));
            assert_eq!(found.len(), 1, "{found:#?}");
            assert!(found[0].contains("the sink `good` writes to the ledger's own `"), "{found:#?}");
        }
        config(&with(&directory.path().join("other")));
    }
}
