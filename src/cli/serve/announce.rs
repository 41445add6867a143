//! What the daemon logs about itself at the start.

use crate::cli::version;
use crate::config::{AdminAddress, Config, Sink, SinkKind, Source};
use crate::ingest::Policy;
use crate::ledger::Ledger;
use crate::observe::admin;

/// Logs the program, the configuration and the sources.
pub(super) fn starting(config: &Config) {
    let (version, file, data_dir) =
        (env!("CARGO_PKG_VERSION"), config.file.display(), config.data_dir.display());
    tracing::info!(
        code = "starting",
        version,
        commit = version::COMMIT,
        "auditgate {version} starts with the configuration {file} and its data in {data_dir}"
    );
    for (source, Source { path, signatures, jwks, .. }) in &config.sources {
        let policy = match signatures {
            Policy::Require => "signatures are required",
            Policy::AcceptUnsigned => "unsigned events are let through as unverified",
            Policy::Off => "signatures are not verified",
        };
        let keys = jwks.as_ref().map_or_else(String::new, |jwks| format!(", keys from {}", jwks.origin()));
        tracing::info!(code = "source-configured", source, "source \"{source}\": {path}, {policy}{keys}");
    }
}

/// Logs the sinks and what waits for them.
pub(super) fn sinks(config: &Config, ledger: &Ledger) {
    for (sink, options) in &config.sinks {
        let destination = destination(options);
        let streams: Vec<_> = options.streams.iter().map(|stream| stream.as_str()).collect();
        let streams = streams.join(", ");
        let waiting = ledger.pending(sink).map_or(0, |pending| pending.events);
        tracing::info!(
            code = "sink-configured",
            sink,
            waiting,
            "sink \"{sink}\": {destination} takes {streams}; {waiting} events wait for it"
        );
    }
}

/// Returns where a sink's events go.
fn destination(sink: &Sink) -> String {
    let kind = sink.kind.name();
    match &sink.kind {
        SinkKind::File(options) => format!("{kind} {}", options.path.display()),
        SinkKind::Sqlite(options) => format!("{kind} {}", options.path.display()),
        SinkKind::Syslog(options) => format!("{kind} {}", options.address),
    }
}

/// Logs where the admin endpoint is.
pub(super) fn admin(socket: &admin::Socket, wanted: &AdminAddress) {
    let address = match socket {
        admin::Socket::Unix(_) => Ok(wanted.to_string()),
        admin::Socket::Tcp(socket) => socket.local_addr().map(|address| format!("http://{address}")),
    };
    if let Ok(address) = address {
        tracing::info!(code = "admin-listening", "admin endpoint on {address}");
    }
}
