//! Creates the configured sinks.

use crate::cli::exit::Failure;
use crate::clock::Clock;
use crate::config::{self, SinkKind};
use crate::deliver::file::{FileSink, OwnerIds};
use crate::deliver::sink::Sink;
use crate::deliver::sqlite::SqliteSink;
use crate::deliver::syslog::SyslogSink;
use crate::ledger::Ledger;

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
