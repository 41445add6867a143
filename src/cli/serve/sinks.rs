//! Creates the configured sinks.

use crate::cli::exit::Failure;
use crate::clock::Clock;
use crate::config::{self, Config, SinkKind};
use crate::deliver::file::{FileSink, OwnerIds};
use crate::deliver::sink::Sink;
use crate::deliver::sqlite::{self, SqliteSink};
use crate::deliver::syslog::SyslogSink;
use crate::ledger::Ledger;

/// Refuses a sink that can never work: its directory is missing, or its database belongs to another
/// program. What may get better by itself, such as a database that another program has locked, does
/// not stop the start: the other sinks need not wait for it.
pub(super) fn check(config: &Config) -> Result<(), Failure> {
    for (name, sink) in &config.sinks {
        let Some(path) = sink.kind.path() else { continue };
        let directory = path.parent().unwrap_or(path);
        // `data_dir` is created when the ledger is opened.
        if !directory.is_dir() && directory != config.data_dir {
            return Err(Failure::config(format!(
                "sink `{name}` writes to {}, but {} is not a directory; make it, writable for this user",
                path.display(),
                directory.display()
            )));
        }
        if let SinkKind::Sqlite(_) = &sink.kind {
            match sqlite::check(path) {
                Ok(()) => {}
                Err(error) if error.cause.kind() == std::io::ErrorKind::InvalidData => {
                    return Err(Failure::config(format!("sink `{name}`: {error}")));
                }
                Err(error) => {
                    let sink = name;
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

pub(super) fn make(name: &str, sink: &config::Sink, ledger: &Ledger) -> Result<Box<dyn Sink>, Failure> {
    Ok(match &sink.kind {
        SinkKind::File(options) => {
            let owner = owner_ids(name, options.owner.as_deref().unwrap_or_default())?;
            Box::new(FileSink::new(options.clone(), owner, Clock::system().wall))
        }
        SinkKind::Sqlite(options) => Box::new(SqliteSink::new(options.clone(), ledger.id(), Clock::system())),
        SinkKind::Syslog(options) => {
            let named = |error| Failure::config(format!("sink `{name}`: {error}"));
            Box::new(SyslogSink::new(options.clone()).map_err(named)?)
        }
    })
}

/// Returns the numbers of an owner's user and group, which are given by name or by number.
fn owner_ids(sink: &str, owner: &str) -> Result<OwnerIds, Failure> {
    let user = |name: &str| uzers::get_user_by_name(name).map(|user| user.uid());
    let group = |name: &str| uzers::get_group_by_name(name).map(|group| group.gid());
    let number = |what: &str, name: &str, known: &dyn Fn(&str) -> Option<u32>| {
        let unknown = || Failure::config(format!("sink `{sink}`: this machine has no {what} `{name}`"));
        (!name.is_empty()).then(|| name.parse().ok().or_else(|| known(name)).ok_or_else(unknown)).transpose()
    };
    let (named_user, named_group) = owner.split_once(':').unwrap_or((owner, ""));
    Ok((number("user", named_user, &user)?, number("group", named_group, &group)?))
}
