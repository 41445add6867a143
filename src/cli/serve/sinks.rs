//! Creates the configured sinks.

use crate::cli::exit::Failure;
use crate::clock::Clock;
use crate::config::{self, Compress, Config, Every, FileFormat, Fsync, Owner, SinkKind, WhenFull};
use crate::deliver::file::{self, FileSink, Rendering};
use crate::deliver::sink::Sink;
use crate::deliver::sqlite::{self, SqliteSink};
use crate::deliver::syslog::{self, SyslogSink};
use crate::ledger::{Ledger, Subscription};

/// Refuses a sink that can never work: its directory is missing, or its database belongs to another
/// program. What may get better by itself, such as a database that another program has locked, does
/// not stop the start: the other sinks need not wait for it.
pub(super) fn check(config: &Config) -> Result<(), Failure> {
    for sink in &config.sinks {
        let Some(path) = sink.kind.path() else { continue };
        let directory = path.parent().unwrap_or(path);
        // `data_dir` is created when the ledger is opened.
        if !directory.is_dir() && directory != config.data_dir {
            return Err(Failure::config(format!(
                "sink `{}` writes to {}, but {} is no directory; make it, writable for this user",
                sink.name,
                path.display(),
                directory.display()
            )));
        }
        if let SinkKind::Sqlite { path, .. } = &sink.kind {
            match sqlite::check(path) {
                Ok(()) => {}
                Err(error) if error.cause.kind() == std::io::ErrorKind::InvalidData => {
                    return Err(Failure::config(format!("sink `{}`: {error}", sink.name)));
                }
                Err(error) => {
                    let sink = sink.name.as_str();
                    tracing::warn!(
                        code = "sink-unavailable-at-start",
                        sink,
                        "sink \"{sink}\" cannot be used now: {error}; its events wait in the ledger, and it is \
                         retried"
                    );
                }
            }
        }
    }
    Ok(())
}

/// Returns what the ledger knows about a sink.
pub(in crate::cli) fn subscription(sink: &config::Sink) -> Subscription {
    Subscription {
        sink: sink.name.clone(),
        kind: sink.kind.name(),
        streams: sink.streams.clone(),
        sources: sink.sources.clone(),
        skips: sink.when_full == WhenFull::Skip,
    }
}

pub(super) fn make(sink: &config::Sink, ledger: &Ledger) -> Result<Box<dyn Sink>, Failure> {
    Ok(match &sink.kind {
        SinkKind::File { path, format, rotate, fsync, mode, owner } => {
            Box::new(FileSink::new(file::Options {
                path: path.clone(),
                rendering: match format {
                    FileFormat::Raw => Rendering::Raw,
                    FileFormat::Json => Rendering::Json,
                },
                rotation: rotation(rotate),
                syncing: match fsync {
                    Fsync::Batch => file::Syncing::EachFlush,
                    Fsync::Interval(interval) => file::Syncing::Every(*interval),
                },
                mode: *mode,
                owner: owner_ids(&sink.name, owner.as_ref())?,
                now: Clock::system().wall,
            }))
        }
        SinkKind::Sqlite { path, retain } => {
            Box::new(SqliteSink::new(path.clone(), *retain, ledger.id(), Clock::system()))
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
            let options = syslog::Options {
                address: address.clone(),
                ca: ca.clone(),
                identity: identity.clone(),
                framing: *framing,
                facility: *facility,
                app_name: app_name.clone(),
                structured_data: *structured_data,
                max_size: *max_size,
            };
            let named = |error| Failure::config(format!("sink `{}`: {error}", sink.name));
            Box::new(SyslogSink::new(options).map_err(named)?)
        }
    })
}

fn rotation(rotate: &config::Rotate) -> file::Rotation {
    file::Rotation {
        size: rotate.size,
        every: rotate.every.map(|every| match every {
            Every::Hourly => file::Period::Hourly,
            Every::Daily => file::Period::Daily,
        }),
        keep: rotate.keep,
        compress: rotate.compress.map(|compress| match compress {
            Compress::Zstd => file::Compression::Zstd,
            Compress::Gzip => file::Compression::Gzip,
        }),
    }
}

/// Returns the numbers of a user and a group that are given by name or number.
fn owner_ids(sink: &str, owner: Option<&Owner>) -> Result<(Option<u32>, Option<u32>), Failure> {
    let unknown = |what: &str, name: &str| {
        Failure::config(format!("sink `{sink}`: this machine has no {what} `{name}`"))
    };
    let user = |name: &str| uzers::get_user_by_name(name).map(|user| user.uid());
    let group = |name: &str| uzers::get_group_by_name(name).map(|group| group.gid());
    let number = |name: Option<&String>, what: &str, known: &dyn Fn(&str) -> Option<u32>| {
        name.map(|name| name.parse().ok().or_else(|| known(name)).ok_or_else(|| unknown(what, name)))
            .transpose()
    };
    let (named_user, named_group) =
        owner.map_or((None, None), |owner| (owner.user.as_ref(), owner.group.as_ref()));
    Ok((number(named_user, "user", &user)?, number(named_group, "group", &group)?))
}
