//! Keys and files that a configuration names.

use super::super::exit::Failure;
use crate::config::{Config, Sink, SinkKind};
use crate::trust::jwks::KeySet;
use crate::trust::keyring;
use crate::verify::find::{Found, of_sink};
use crate::wire::event::Stream;

/// Returns the keys of all sources that are on this machine.
///
/// # Errors
/// 78 for keys that cannot be read or used.
pub(super) fn keys(config: &Config) -> Result<Vec<KeySet>, Failure> {
    let sources = config.sources.iter().filter_map(|(name, source)| Some((name, source.jwks.as_ref()?)));
    let sets = sources.filter_map(|(name, options)| {
        keyring::saved(name, options, &config.data_dir)
            .map_err(|error| {
                Failure::config(format!(
                    "source `{name}`: {error}; run this as a user who can read it, or name the keys with --jwks and the \
                     files instead of --config"
                ))
            })
            .transpose()
    });
    sets.collect()
}

/// Returns the files that the sinks have written and that hold what can be proved.
pub(super) fn files(config: &Config, skip_quarantine: bool) -> Found {
    let mut found = Found::default();
    for sink in config.sinks.values() {
        let Some(path) = sink.kind.path() else { continue };
        if let Some(why) = unproved(sink, skip_quarantine) {
            found.left_out.push((path.to_owned(), why));
            continue;
        }
        match &sink.kind {
            SinkKind::File(_) => match of_sink(path) {
                Ok(files) => found.files.extend(files.rotated.into_iter().chain(files.current)),
                Err(error) => found.unreadable.push((path.to_owned(), error)),
            },
            // It is made when the daemon first starts.
            SinkKind::Sqlite(_) if path.exists() => found.files.push(path.to_owned()),
            SinkKind::Sqlite(_) | SinkKind::Syslog(_) => {}
        }
    }
    found
}

/// Returns why no line of a sink has to prove itself; none where some have to.
fn unproved(sink: &Sink, skip_quarantine: bool) -> Option<&'static str> {
    let takes = |stream| sink.streams.contains(&stream);
    match (takes(Stream::Verified), takes(Stream::Quarantine)) {
        (true, _) => None,
        (false, true) if !skip_quarantine => None,
        (false, true) => Some("its sink takes no verified events, and quarantined lines are skipped"),
        (false, false) => Some("its sink takes only what was accepted without a check"),
    }
}
