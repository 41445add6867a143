//! Quarantined lines, read one after the other from files and databases.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{Reason, Window};
use crate::verify::judge::{Entry, Metadata};
use crate::verify::read::{Blocks, Fault, Kind as FileKind};
use crate::wire::record::{Kind, time_stamp};

/// A quarantined line.
pub(super) struct Record<'a> {
    /// Number of its line, or the `id` of its row.
    pub(super) number: u64,
    /// Time at which its batch arrived, in milliseconds since the Unix epoch; none when the record
    /// does not say it as the daemon does.
    pub(super) time: Option<i64>,
    pub(super) received_at: Cow<'a, str>,
    pub(super) source: &'a str,
    pub(super) reason: &'a str,
    pub(super) detail: &'a str,
    pub(super) raw: &'a [u8],
}

/// Which lines are wanted.
#[derive(Clone, Default)]
pub(super) struct Filter {
    /// Any, when it is empty.
    pub(super) reasons: Vec<Reason>,
    /// Any, when it is empty.
    pub(super) sources: Vec<String>,
    /// Time of the arrival.
    pub(super) window: Window,
}

impl Filter {
    fn wants(&self, record: &Record<'_>) -> bool {
        (self.reasons.is_empty() || self.reasons.iter().any(|reason| reason.as_str() == record.reason))
            && (self.sources.is_empty() || self.sources.iter().any(|source| source == record.source))
            && self.window.has(record.time)
    }
}

/// Reason why reading ended early.
#[derive(Debug)]
pub(super) enum Failed<E> {
    /// The file cannot be read any further.
    Unreadable(String),
    /// The caller wanted no more.
    Stopped(E),
}

/// Hands the lines that a filter wants to `each`, in the order of the file. Returns the number of
/// lines of a file that are not quarantined ones.
///
/// # Errors
/// A file that cannot be read to its end, or the first error of `each`.
pub(super) fn read<E>(
    path: &Path,
    filter: &Filter,
    mut each: impl FnMut(&Record<'_>) -> Result<(), E>,
) -> Result<u64, Failed<E>> {
    let mut blocks = Blocks::open(path, &Arc::default()).map_err(|fault| unreadable(path, fault))?;
    let mut others = 0;
    loop {
        let block = match blocks.quarantined_block() {
            Ok(Some(block)) => block,
            Ok(None) => return Ok(others),
            Err(fault) if fault.goes_on() => {
                others += 1;
                continue;
            }
            Err(fault) => return Err(unreadable(path, fault)),
        };
        for entry in &block.entries() {
            match record(entry) {
                Some(record) if filter.wants(&record) => each(&record).map_err(Failed::Stopped)?,
                Some(_) => {}
                None => others += 1,
            }
        }
    }
}

/// Returns whether a file is a database of a SQLite sink.
///
/// # Errors
/// [`Failed::Unreadable`].
pub(super) fn is_database<E>(path: &Path) -> Result<bool, Failed<E>> {
    let blocks = Blocks::open(path, &Arc::default()).map_err(|fault| unreadable(path, fault))?;
    Ok(blocks.kind() == FileKind::Sqlite)
}

fn unreadable<E>(path: &Path, fault: Fault) -> Failed<E> {
    let why = match fault {
        Fault::Unreadable(why) => why,
        Fault::Finding(finding) => format!("from line {} on: {}", finding.line, finding.reason),
    };
    Failed::Unreadable(format!("cannot read {}: {why}", path.display()))
}

fn record<'a>(entry: &'a Entry<'_>) -> Option<Record<'a>> {
    let (number, raw) = (entry.number, entry.raw.as_ref());
    match &entry.metadata {
        Metadata::Record(Kind::Quarantined(about)) => Some(Record {
            number,
            time: milliseconds(&about.received_at),
            received_at: Cow::Borrowed(&about.received_at),
            source: &about.source,
            reason: &about.reason,
            detail: &about.detail,
            raw,
        }),
        Metadata::Refused(row) => Some(Record {
            number,
            time: Some(row.received_at),
            received_at: Cow::Owned(time_stamp(row.received_at)),
            source: &row.source,
            reason: &row.reason,
            detail: &row.detail,
            raw,
        }),
        Metadata::Nothing | Metadata::Record(_) | Metadata::Row(_) => None,
    }
}

fn milliseconds(time: &str) -> Option<i64> {
    let time = OffsetDateTime::parse(time, &Rfc3339).ok()?;
    i64::try_from(time.unix_timestamp_nanos().div_euclid(1_000_000)).ok()
}
