//! Checks beyond serde: secrets that cannot be read, and options that contradict each other.

use std::collections::HashMap;
use std::net::SocketAddr;

use super::document::Document;
use super::problem::suggest;
use super::{Admin, AdminAddress, Config, Limits, Secrets, Sink, SinkKind, Source, Tls, outputs};
use crate::deliver::file::Rendering;
use crate::ingest::{DedupKey, Policy};
use crate::memory_budget;
use crate::quantity::display_size;
use crate::secret::{Environment, Secret};

/// Reads the secrets of a configuration.
pub(super) fn secrets(
    config: &mut Config,
    document: &mut Document<'_>,
    environment: Environment<'_>,
    secrets: Secrets,
) {
    let mut read = |table: &[&str], keys: &[&str], read: &mut Secret| {
        secret(table, keys, read, document, environment, secrets);
    };
    if let Some(token) = &mut config.admin.token {
        read(&["admin"], &["token"], token);
    }
    for (name, source) in &mut config.sources {
        for (index, secret) in source.authorization.iter_mut().enumerate() {
            let element = format!("authorization.{index}");
            read(&["sources", name], &[&element, "authorization"], secret);
        }
        if let Some(token) = source.jwks.as_mut().and_then(|jwks| jwks.token.as_mut()) {
            read(&["sources", name, "jwks"], &["token"], token);
        }
    }
}

/// Reads one secret. `keys` lead to it, with its place in an array if it is in one.
pub(super) fn secret(
    table: &[&str],
    keys: &[&str],
    secret: &mut Secret,
    document: &mut Document<'_>,
    environment: Environment<'_>,
    secrets: Secrets,
) {
    match secret.read(environment) {
        Err(error) if error.is_absence() && secrets == Secrets::SkipMissing => {}
        Err(error) => document.check(table, keys, error),
        // RFC 6750, section 2.1: no white space in a token, so this has its scheme before it.
        Ok(()) if keys.ends_with(&["token"]) && secret.expose().contains(&b' ') => {
            let owner = table.join(".");
            let problem = format!(
                "the token of [{owner}] contains a space; write the token alone, without the word Bearer"
            );
            document.check(table, keys, problem);
        }
        Ok(()) => {}
    }
}

/// Checks what options have to do with each other.
pub(super) fn all(config: &Config, document: &mut Document<'_>) {
    listen_and_admin(config, document);
    limits(&config.limits, document);
    if config.sources.is_empty() {
        let problem = "there is no source; add a table [sources.NAME] for each sender";
        document.check(&["sources"], &[], problem);
    }
    if config.sinks.is_empty() {
        document.check(&["sinks"], &[], "there is no sink; add a table [sinks.NAME] for each output");
    }
    for (name, sink) in &config.sinks {
        sink_alone(name, sink, config, document);
    }
    let mut paths: HashMap<&str, &str> = HashMap::new();
    for (name, source) in &config.sources {
        source_alone(name, source, document);
        // One slash at the end makes no other path. What stands for a wrong one is shared by
        // no other source.
        let path = &source.path;
        if !document.is_wrong(&["sources", name, "path"])
            && let Some(first) = paths.insert(path.strip_suffix('/').unwrap_or(path), name)
        {
            let problem =
                format!("the sources `{first}` and `{name}` share the path `{path}`; give each its own path");
            document.check(&["sources", name], &["path"], problem);
        }
        every_stream_is_taken(name, source, config, document);
    }
    outputs::are_distinct(config, document);
}

fn listen_and_admin(config: &Config, document: &mut Document<'_>) {
    let Config { listen, admin, .. } = config;
    if admin.address == AdminAddress::Tcp(listen.address) && listen.address.port() != 0 {
        let address = listen.address;
        let problem =
            format!("[listen] and [admin] both want the address {address}; give one of them another port");
        document.check(&[], &["admin.address", "listen.address"], problem);
    }
    match &listen.tls {
        Tls::Off if !is_loopback(&listen.address) => {
            let problem = format!(
                "tls = \"off\" with `{}`, which is not a loopback address; configure cert and key, or listen on \
                 127.0.0.1 behind a proxy",
                listen.address
            );
            document.check(&["listen"], &["address", "tls"], problem);
        }
        Tls::Files(files) if files.client_ca.is_none() && !files.client_names.is_empty() => {
            let problem = "`client_names` without `client_ca`; name the authority that certifies clients as `client_ca`";
            document.check(&["listen", "tls"], &["client_names", "client_ca"], problem);
        }
        _ => {}
    }
    self::admin(admin, document);
}

/// Checks the admin endpoint.
pub(super) fn admin(admin: &Admin, document: &mut Document<'_>) {
    if let AdminAddress::Tcp(address) = &admin.address
        && admin.token.is_none()
        && !is_loopback(address)
    {
        let problem = format!(
            "[admin] without `token` at `{address}`, which other machines may be able to reach; add token = \
             {{ file = \"PATH\" }}, or use 127.0.0.1:9464 or unix:///PATH"
        );
        document.check(&["admin"], &["address", "token"], problem);
    }
}

fn limits(limits: &Limits, document: &mut Document<'_>) {
    let Limits { body, decoded, line, lines, in_flight, .. } = limits;
    if line > decoded {
        let problem = format!(
            "`line` ({}) is larger than `decoded` ({}): no line could ever be that long; raise `decoded` or lower `line` \
             in [limits]",
            size(*line),
            size(*decoded)
        );
        document.check(&["limits"], &["decoded", "line"], problem);
    }
    let needed = memory_budget::needed(*body, *decoded, *lines);
    if needed > memory_budget::largest(*in_flight) {
        let least = needed.saturating_add(needed / 7 + 1);
        let problem = format!(
            "`in_flight` ({}) is too small for the largest batch: `body` ({}), `decoded` ({}) and {} B for each of \
             `lines` ({lines}) are held together and may take seven eighths of it, so such a batch could never be \
             taken; raise `in_flight` to {} or more, or lower one of the others in [limits]",
            size(*in_flight),
            size(*body),
            size(*decoded),
            memory_budget::LINE,
            size(least.div_ceil(1 << 20) << 20)
        );
        document.check(&["limits"], &["in_flight", "decoded", "body", "lines"], problem);
    }
}

fn source_alone(name: &str, source: &Source, document: &mut Document<'_>) {
    let table = ["sources", name];
    is_name(name, "a source", &table, document);
    match &source.jwks {
        Some(jwks) => {
            jwks.check(&mut |keys, problem| document.check(&["sources", name, "jwks"], keys, problem));
        }
        None if source.signatures == Policy::Off => {}
        None => {
            let problem = format!(
                "missing key `jwks` in [sources.{name}], without which no signature can be checked; add jwks = {{ url = \
                 \"https://…/jwks.json\" }}, or write signatures = \"off\""
            );
            document.check(&table, &["signatures", "jwks"], problem);
        }
    }
    if source.dedup.by == DedupKey::TraceId && source.signatures != Policy::Require {
        let problem = "by = \"trace_id\" without signatures = \"require\": an unsigned event could hide a good one; \
                       write by = \"event\" or require signatures";
        document.check(&table, &["dedup.by", "signatures"], problem);
    }
}

fn every_stream_is_taken(name: &str, source: &Source, config: &Config, document: &mut Document<'_>) {
    // A sink that is wrong might be the one that takes the stream.
    if document.is_wrong(&["sinks"]) || config.sinks.is_empty() {
        return;
    }
    for stream in source.signatures.streams() {
        if !config.sinks.iter().any(|(sink, options)| options.subscription(sink).wants(name, *stream)) {
            let stream = stream.as_str();
            let problem = format!(
                "no sink takes the stream `{stream}` of source `{name}`: a 200 would lose lines; add `{stream}` to the \
                 `stream` of a sink that takes from `{name}`"
            );
            document.check(&["sources", name], &["signatures"], problem);
        }
    }
}

fn sink_alone(name: &str, sink: &Sink, config: &Config, document: &mut Document<'_>) {
    let table = ["sinks", name];
    is_name(name, "a sink", &table, document);
    for (index, stream) in sink.streams.iter().enumerate() {
        if sink.streams[..index].contains(stream) {
            let problem = format!("`stream` names `{}` twice; name it once", stream.as_str());
            document.check(&table, &["stream"], problem);
        }
    }
    let mut misspelt = false;
    for (index, source) in sink.sources.iter().flatten().enumerate() {
        if !config.sources.contains_key(source) && !document.is_wrong(&["sources", source]) {
            let known: Vec<&str> = config.sources.keys().map(String::as_str).collect();
            let hint = suggest(source, "sources", &known);
            let problem = format!("`sources` names the unknown source `{source}`; {hint}");
            document.check(&table, &[&format!("sources.{index}"), "sources"], problem);
            misspelt = true;
        }
    }
    if misspelt {
        document.distrust(&["sinks", name, "sources"]);
    }
    let mut check = |keys: &[&str], problem: String| document.check(&table, keys, problem);
    match &sink.kind {
        SinkKind::File(options) => {
            if options.format == Rendering::Raw && sink.streams.len() > 1 {
                let problem = format!(
                    "format = \"raw\" with several streams in [sinks.{name}]: nothing would tell them apart; write \
                     format = \"json\", or a sink for each stream"
                );
                check(&["stream", "format"], problem);
            }
            options.check(&mut check);
        }
        SinkKind::Sqlite(_) => {}
        SinkKind::Syslog(options) => options.check(&mut check),
    }
}

/// Checks the name of a table.
pub(super) fn is_name(name: &str, what: &str, table: &[&str], document: &mut Document<'_>) {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    if !(1..=64).contains(&name.len()) || !name.bytes().all(legal) || name == "." || name == ".." {
        let hint = "use 1 to 64 of the letters A to Z and a to z, digits, `_`, `.` and `-`";
        document.check(table, &[], format!("`{name}` is not a name for {what}; {hint}"));
    }
}

/// Returns whether an address is loopback, also as an IPv4-mapped IPv6 address.
fn is_loopback(address: &SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

fn size(bytes: usize) -> String {
    u64::try_from(bytes).map_or_else(|_| bytes.to_string(), display_size)
}
