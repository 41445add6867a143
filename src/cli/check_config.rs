//! `auditgate check-config`: what is wrong with a configuration, or what it comes to.

use std::fmt::{self, Display, Write as _};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use super::exit::Failure;
use crate::config::{
    self, Config, DEFAULT_FILE, Fsync, Jwks, JwksOrigin, Owner, Rotate, Secret, Secrets, SinkKind, Tls,
    display_size, display_time,
};
use crate::escape::{escape, is_hazardous};
use crate::net::SyslogAddress;

/// Says what is wrong with a configuration, or prints the effective one.
///
/// Every problem comes with its line and a hint, and the exit code is then 78. Otherwise the configuration
/// is printed as TOML with all defaults filled in, all paths absolute and secrets masked. Certificates, keys
/// and key sets are not loaded.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The configuration file
    #[arg(value_name = "FILE", default_value = DEFAULT_FILE)]
    pub file: PathBuf,

    /// Check on a machine that does not hold the secrets: one that cannot be read is left unread
    #[arg(long)]
    pub skip_secrets: bool,
}

/// Checks the file and prints the effective configuration to `out`.
///
/// # Errors
/// The configuration's problems, one a line (exit code 78), or `out` that cannot be written (74).
pub fn run(args: &Args, out: &mut dyn io::Write) -> Result<(), Failure> {
    let secrets = if args.skip_secrets { Secrets::SkipMissing } else { Secrets::Require };
    let config =
        config::load(&args.file, &|name| std::env::var_os(name), secrets).map_err(Failure::config)?;
    for warning in config.sinks.iter().filter_map(config::Sink::warning) {
        // What cannot be said does not make the configuration wrong.
        let _ = writeln!(io::stderr(), "auditgate: warning: {}", escape(&warning));
    }
    let text = effective(&config).map_err(Failure::bug)?;
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| Failure::io(format!("cannot write the configuration to standard output: {error}")))
}

/// The configuration as TOML, in the order and notation of `config.example.toml`. By hand, because the
/// serialiser sorts the keys and takes every inline table apart.
fn effective(config: &Config) -> Result<String, fmt::Error> {
    let Config { file, data_dir, listen, admin, log, limits, sources, sinks } = config;
    let mut toml = String::new();
    let out = &mut toml;
    writeln!(out, "# The effective configuration of {}", quoted(file.to_string_lossy()))?;
    writeln!(out, "data_dir = {}", path(data_dir))?;

    writeln!(out, "\n[listen]\naddress = {}", quoted(listen.address))?;
    match &listen.tls {
        Tls::Off => writeln!(out, "tls = \"off\"")?,
        Tls::Files { cert, key, client_ca, client_names } => {
            write!(out, "tls = {{ cert = {}, key = {}", path(cert), path(key))?;
            if let Some(ca) = client_ca {
                write!(out, ", client_ca = {}", path(ca))?;
            }
            if !client_names.is_empty() {
                write!(out, ", client_names = [{}]", list(client_names.iter().map(quoted)))?;
            }
            writeln!(out, " }}")?;
        }
    }

    if !listen.proxy_protocol.is_empty() {
        writeln!(out, "proxy_protocol = [{}]", list(listen.proxy_protocol.iter().map(quoted)))?;
    }

    writeln!(out, "\n[admin]\naddress = {}", quoted(&admin.address))?;
    if let Some(token) = &admin.token {
        writeln!(out, "token = {}", secret(token))?;
    }

    writeln!(out, "\n[log]\nlevel = {}\nformat = {}", quoted(&log.level), quoted(log.format.name()))?;

    writeln!(out, "\n[limits]")?;
    writeln!(out, "body = {}", size(limits.body))?;
    writeln!(out, "decoded = {}", size(limits.decoded))?;
    writeln!(out, "line = {}", size(limits.line))?;
    writeln!(out, "lines = {}", limits.lines)?;
    writeln!(out, "connections = {}", limits.connections)?;
    writeln!(out, "connections_per_peer = {}", limits.connections_per_peer)?;
    writeln!(out, "request_timeout = {}", quoted(display_time(limits.request_timeout)))?;
    writeln!(out, "idle_timeout = {}", quoted(display_time(limits.idle_timeout)))?;
    writeln!(out, "in_flight = {}", size(limits.in_flight))?;
    writeln!(out, "backlog = {}", quoted(display_size(limits.backlog)))?;

    for source in sources {
        writeln!(out, "\n[sources.{}]", quoted(&source.name))?;
        writeln!(out, "path = {}", quoted(&source.path))?;
        match source.authorization.as_slice() {
            [only] => writeln!(out, "authorization = {}", secret(only))?,
            several => writeln!(out, "authorization = [{}]", list(several.iter().map(secret)))?,
        }
        if !source.allow.is_empty() {
            writeln!(out, "allow = [{}]", list(source.allow.iter().map(quoted)))?;
        }
        if let Some(jwks) = &source.jwks {
            self::jwks(out, jwks)?;
        }
        writeln!(out, "signatures = {}", quoted(source.signatures.name()))?;
        let (by, window) = (quoted(source.dedup.by.name()), quoted(display_time(source.dedup.window)));
        writeln!(out, "dedup = {{ by = {by}, window = {window} }}")?;
    }

    for sink in sinks {
        writeln!(out, "\n[sinks.{}]", quoted(&sink.name))?;
        match &sink.kind {
            SinkKind::File { path: file, format, rotate, fsync, mode, owner } => {
                let (file, format) = (path(file), quoted(format.name()));
                writeln!(out, "type = \"file\"\npath = {file}\nformat = {format}")?;
                writeln!(out, "rotate = {{ {} }}", list(rotation(rotate).into_iter()))?;
                match fsync {
                    Fsync::Batch => writeln!(out, "fsync = \"batch\"")?,
                    Fsync::Interval(interval) => {
                        let interval = quoted(display_time(*interval));
                        writeln!(out, "fsync = \"interval\"\nfsync_interval = {interval}")?;
                    }
                }
                writeln!(out, "mode = \"{mode:04o}\"")?;
                if let Some(Owner { user, group }) = owner {
                    let part = |part: &Option<String>| part.clone().unwrap_or_default();
                    writeln!(out, "owner = {}", quoted(format!("{}:{}", part(user), part(group))))?;
                }
            }
            SinkKind::Sqlite { path: file, retain } => {
                writeln!(out, "type = \"sqlite\"\npath = {}", path(file))?;
                if let Some(retain) = retain {
                    writeln!(out, "retain = {}", quoted(display_time(*retain)))?;
                }
            }
            SinkKind::Syslog {
                address,
                ca,
                identity,
                framing,
                facility,
                app_name,
                structured_data,
                max_size,
            } => {
                writeln!(out, "type = \"syslog\"\naddress = {}", quoted(address))?;
                if let Some(ca) = ca {
                    writeln!(out, "ca = {}", path(ca))?;
                }
                if let Some(identity) = identity {
                    writeln!(out, "cert = {}\nkey = {}", path(&identity.cert), path(&identity.key))?;
                }
                if !matches!(address, SyslogAddress::Udp(_)) {
                    writeln!(out, "framing = {}", quoted(framing.name()))?;
                }
                writeln!(out, "facility = {}\napp_name = {}", quoted(facility.name()), quoted(app_name))?;
                writeln!(out, "structured_data = {structured_data}\nmax_size = {}", size(*max_size))?;
            }
        }
        writeln!(out, "stream = [{}]", list(sink.streams.iter().map(|stream| quoted(stream.as_str()))))?;
        if let Some(sources) = &sink.sources {
            writeln!(out, "sources = [{}]", list(sources.iter().map(quoted)))?;
        }
        writeln!(out, "when_full = {}", quoted(sink.when_full.name()))?;
    }
    Ok(toml)
}

fn jwks(out: &mut String, jwks: &Jwks) -> fmt::Result {
    let Jwks { origin, pin, revoked, retired_for } = jwks;
    match origin {
        JwksOrigin::Keys(keys) => {
            let keys = keys.keys().iter().map(|key| quoted(key.x()));
            write!(out, "jwks = {{ keys = [{}]", list(keys))?;
        }
        JwksOrigin::File(file) => write!(out, "jwks = {{ file = {}", path(file))?,
        JwksOrigin::Url { url, refresh, ca, token } => {
            let (url, refresh) = (quoted(url), quoted(display_time(*refresh)));
            write!(out, "jwks = {{ url = {url}, refresh = {refresh}")?;
            if let Some(ca) = ca {
                write!(out, ", ca = {}", path(ca))?;
            }
            if let Some(token) = token {
                write!(out, ", token = {}", secret(token))?;
            }
        }
    }
    for (key, values) in [("pin", pin), ("revoked", revoked)] {
        if !values.is_empty() {
            write!(out, ", {key} = [{}]", list(values.iter().map(quoted)))?;
        }
    }
    writeln!(out, ", retired_for = {} }}", quoted(display_time(*retired_for)))
}

fn rotation(rotate: &Rotate) -> Vec<String> {
    let Rotate { size, every, keep, compress } = rotate;
    let size = size.map(|size| format!("size = {}", quoted(display_size(size))));
    let every = every.map(|every| format!("every = {}", quoted(every.name())));
    let keep = keep.map(|keep| format!("keep = {keep}"));
    let compress = compress.map(|compress| format!("compress = {}", quoted(compress.name())));
    [size, every, keep, compress].into_iter().flatten().collect()
}

fn path(path: &Path) -> String {
    quoted(path.to_string_lossy())
}

fn size(bytes: usize) -> String {
    u64::try_from(bytes).map_or_else(|_| bytes.to_string(), |bytes| quoted(display_size(bytes)))
}

fn secret(secret: &Secret) -> String {
    format!("{{ value = {} }}", quoted(secret))
}

fn list(items: impl Iterator<Item = String>) -> String {
    items.collect::<Vec<_>>().join(", ")
}

/// A TOML basic string that is safe on a terminal.
fn quoted(value: impl Display) -> String {
    let value = value.to_string();
    let mut text = String::with_capacity(value.len() + 2);
    text.push('"');
    for character in value.chars() {
        match character {
            '"' | '\\' => text.extend(['\\', character]),
            // Every character that disrupts is below U+10000, where four digits do.
            _ if is_hazardous(character) => text.push_str(&format!("\\u{:04X}", u32::from(character))),
            _ => text.push(character),
        }
    }
    text.push('"');
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::cli::exit::Exit;

    const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/config.example.toml");

    fn check(file: &Path, skip_secrets: bool) -> Result<String, Failure> {
        let mut out = Vec::new();
        run(&Args { file: file.to_owned(), skip_secrets }, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    /// Without the first line, which names the file.
    fn body(text: &str) -> &str {
        text.split_once('\n').unwrap().1
    }

    /// The keys of all tables, `sources.konnect-us.jwks.url` and so on.
    fn keys(table: &toml::Table, prefix: &str, found: &mut BTreeSet<String>) {
        for (key, value) in table {
            let key = format!("{prefix}{key}");
            if let Some(table) = value.as_table() {
                keys(table, &format!("{key}."), found);
            }
            found.insert(key);
        }
    }

    #[test]
    fn the_example_passes_without_its_secrets_and_shows_the_defaults() {
        let text = check(Path::new(EXAMPLE), true).unwrap();
        let effective: toml::Table = text.parse().unwrap();
        let example: toml::Table = std::fs::read_to_string(EXAMPLE).unwrap().parse().unwrap();
        assert_eq!(effective["limits"], example["limits"]);
        assert_eq!(effective["admin"], example["admin"]);
        assert_eq!(effective["log"], example["log"]);
        assert_eq!(effective["sources"]["konnect-us"]["dedup"], example["sources"]["konnect-us"]["dedup"]);
        assert_eq!(effective["sources"]["konnect-us"]["jwks"], example["sources"]["konnect-us"]["jwks"]);

        let (mut shown, mut written) = (BTreeSet::new(), BTreeSet::new());
        keys(&effective, "", &mut shown);
        keys(&example, "", &mut written);
        // The second sink leaves at their defaults what the first one explains.
        let added: Vec<_> =
            shown.difference(&written).filter(|key| !key.starts_with("sinks.rejects.")).collect();
        assert_eq!(added, ["sources.konnect-us.authorization.value"]);
    }

    #[test]
    fn what_the_example_shows_commented_out_is_right_too() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.toml");
        let text = std::fs::read_to_string(EXAMPLE).unwrap();
        // Prose has a space behind its `#`.
        let all: String = text
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(rest) if rest.starts_with(|first: char| first == '[' || first.is_ascii_lowercase()) => {
                    rest
                }
                _ => line,
            })
            .map(|line| format!("{line}\n"))
            .collect();
        std::fs::write(&file, &all).unwrap();
        let effective: toml::Table = check(&file, true).unwrap().parse().unwrap();
        let written: toml::Table = all.parse().unwrap();
        for (name, sink) in written["sinks"].as_table().unwrap() {
            for (key, value) in sink.as_table().unwrap().iter().filter(|(key, _)| *key != "stream") {
                assert_eq!(effective["sinks"][name].get(key), Some(value), "{name}.{key}");
            }
        }
        assert!(written["sinks"].get("siem").is_some());
    }

    #[test]
    fn the_examples_limits_are_the_defaults() {
        let directory = tempfile::tempdir().unwrap();
        let text = std::fs::read_to_string(EXAMPLE).unwrap();
        let short: String = text
            .lines()
            .filter(|line| {
                let limit = [
                    "body",
                    "decoded",
                    "lin",
                    "connections",
                    "connections_per_peer",
                    "request_timeout",
                    "in_flight",
                    "backlog",
                ];
                let others = ["level", "signatures", "dedup"];
                !limit.iter().chain(&others).any(|key| line.starts_with(key))
            })
            .map(|line| format!("{line}\n"))
            .collect();
        let file = directory.path().join("config.toml");
        std::fs::write(&file, short).unwrap();
        assert_eq!(body(&check(&file, true).unwrap()), body(&check(Path::new(EXAMPLE), true).unwrap()));
    }

    #[test]
    fn what_is_printed_loads_and_prints_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.toml");
        let text = r#"
            data_dir = "da\"ta\\\u202e"
            listen = { address = "[::1]:0", tls = "off" }
            admin = { address = "unix:///run/au\"dit/admin.sock", token = { value = "hush-6" } }
            log = { format = "json" }
            limits = { lines = 5, line = 1025, request_timeout = "90s", body = "1.5MiB" }
            [sources.us]
            path = "/us"
            authorization = [{ value = "hush-1" }, { value = "hush-2" }]
            jwks = { url = "https://x.test/", refresh = "90m", ca = "ca", token = { value = "hush-3" } }
            dedup = { by = "trace_id", window = "1500ms" }
            [sources."a.b"]
            path = "/ab"
            authorization = { value = "hush-4" }
            jwks = { file = "keys.json" }
            signatures = "accept-unsigned"
            [sources.off]
            path = "/off"
            authorization = { value = "hush-5" }
            signatures = "off"
            [sinks.good]
            type = "file"
            path = "good.log"
            format = "raw"
            sources = ["us", "a.b"]
            [sinks.rest]
            type = "file"
            path = "rest.jsonl"
            format = "json"
            stream = ["unverified", "quarantine"]
            [sinks.all]
            type = "sqlite"
            path = "all.db"
            retain = "36h"
            when_full = "skip"
            stream = ["verified", "unverified", "quarantine"]
            [sinks.us]
            type = "sqlite"
            path = "us.db"
            sources = ["us"]
            [sinks.siem]
            type = "syslog"
            address = "tls://siem.test"
            ca = "ca.pem"
            cert = "c.pem"
            key = "k.pem"
            structured_data = true
            [sinks.local]
            type = "syslog"
            address = "unix:///dev/log"
            [sinks.old]
            type = "syslog"
            address = "udp://[::1]"
        "#;
        std::fs::write(&file, text).unwrap();
        let first = check(&file, false).unwrap();
        assert!(!first.contains("hush"), "{first}");
        assert!(!first.contains('\u{202e}'), "{first}");
        assert!(first.contains("authorization = [{ value = \"***\" }, { value = \"***\" }]"), "{first}");
        assert!(
            first.contains("window = \"1500ms\"") && first.contains("request_timeout = \"90s\""),
            "{first}"
        );
        assert!(first.contains("line = \"1025B\"") && first.contains("body = \"1536KiB\""), "{first}");

        std::fs::write(&file, &first).unwrap();
        assert_eq!(check(&file, false).unwrap(), first);
    }

    #[test]
    fn problems_end_with_the_configurations_exit_code() {
        let failure = check(Path::new(EXAMPLE), false).unwrap_err();
        assert_eq!(failure.exit, Exit::Config);
        assert!(failure.message.contains("/etc/auditgate/tokens/us"), "{failure}");
        assert_eq!(failure.message.lines().count(), 1, "{failure}");
    }

    #[test]
    fn a_closed_output_is_an_error_of_output() {
        let mut full: &mut [u8] = &mut [];
        let args = Args { file: PathBuf::from(EXAMPLE), skip_secrets: true };
        assert_eq!(run(&args, &mut full).unwrap_err().exit, Exit::Io);
    }
}
