//! The contract of a sink.
//!
//! # Durability
//!
//! [`Sink::push_all`] only collects. [`Sink::flush`] writes everything collected so far and, at
//! once or a little later, makes it safe against power loss; then it returns the position that is
//! safe and a mark: an opaque note about where that is. The ledger keeps the mark together with the
//! position, and forgets a batch only after the flush that made it safe.
//!
//! # Retry
//!
//! A flush that fails may have done any part of its work. What was collected stays collected, and
//! the worker calls [`Sink::prepare`] and flush again until both succeed; a sink that can tell what
//! it already has must not store it twice. When what was written before can no longer be trusted,
//! the error has [`SinkError::must_resume`] set: the sink is resumed from the last safe position.
//!
//! # Restart
//!
//! After a restart, [`Sink::resume`] gets the last position and mark that the ledger kept, and
//! returns where the sink really is. From there the worker pushes everything again, in the same
//! order and with the same content. A sink that keeps a position of its own is never behind the
//! ledger's and may be ahead; one that does not returns the ledger's, and compares what it is given
//! with what it has.

use std::time::Duration;

use crate::ledger::{Position, Resume};
use crate::wire::event::Verdict;
use crate::wire::record::{self, Accepted, Quarantined};

/// One line to deliver.
#[derive(Clone, Copy, Debug)]
pub struct Item<'a> {
    /// The position behind the line, which is reached when the line is safe.
    pub behind: Position,
    /// Time at which its batch arrived, in milliseconds since the Unix epoch.
    pub received_at: i64,
    /// Configured name of its source.
    pub source: &'a str,
    /// Verdict on the line.
    pub verdict: &'a Verdict,
    /// ID of the key that verified it, if one did.
    pub key_id: Option<&'a str>,
    /// The line as it was received, without its terminator.
    pub raw: &'a [u8],
}

impl Item<'_> {
    /// Appends the line's record, with its `\n`: see [`crate::wire::record`].
    pub fn write_record(&self, out: &mut Vec<u8>) {
        let Self { received_at, source, key_id, raw, .. } = *self;
        match self.verdict {
            Verdict::Rejected { reason, detail } => {
                let record = Quarantined { received_at, source, reason: *reason, detail, raw };
                record::write_quarantined(out, &record);
            }
            Verdict::Verified { .. } | Verdict::Unverified => {
                record::write_accepted(out, &Accepted { received_at, source, key_id, raw });
            }
        }
    }
}

/// Error of a sink's operation, which is retried.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {cause}")]
pub struct SinkError {
    /// The operation and its object.
    pub what: String,
    /// The system's error.
    pub cause: std::io::Error,
    /// Nothing that was written since the last safe position can be trusted: it must all be pushed
    /// again.
    pub must_resume: bool,
    /// Time that the destination asks to wait for before the next attempt.
    pub retry_after: Option<Duration>,
}

impl SinkError {
    /// Creates an error after which the same operation can be retried.
    pub fn new(what: String, cause: std::io::Error) -> Self {
        Self { what, cause, must_resume: false, retry_after: None }
    }
}

/// A destination for lines. The module's documentation has the contract.
pub trait Sink: Send {
    /// Opens the destination, at the start and after [`SinkError::must_resume`]; nothing is
    /// collected then. `last` is what the ledger kept, its mark empty for a new sink. The returned
    /// position must be durable in the ledger before anything is written.
    ///
    /// # Errors
    /// When the destination cannot be opened; the worker retries.
    fn resume(&mut self, last: &Resume) -> Result<Resume, SinkError>;

    /// Runs maintenance before each flush, and about once a second while the sink is idle:
    /// rotation, reopening, expiry. If lines go to another file from now on, returns the new mark
    /// and the position that is safe by then: they must be durable in the ledger before the next
    /// flush.
    ///
    /// # Errors
    /// When that failed; the worker retries.
    fn prepare(&mut self) -> Result<Option<Resume>, SinkError> {
        Ok(None)
    }

    /// Collects a line.
    fn push(&mut self, item: &Item<'_>);

    /// Collects lines, in their order. Many at once may be rendered on several cores.
    fn push_all(&mut self, items: &[Item<'_>]) {
        items.iter().for_each(|item| self.push(item));
    }

    /// Returns the number of collected bytes.
    fn collected(&self) -> usize;

    /// Returns the number of collected bytes from which on a flush is worth its cost.
    fn chunk(&self) -> usize {
        1 << 20
    }

    /// Writes what was collected, which is everything that the sink takes before `behind`. Returns
    /// the position before which everything is safe, and its mark; none when nothing more is safe
    /// than before, which a later flush will then report. `at_once` says that no later flush will
    /// come.
    ///
    /// # Errors
    /// When it failed; nothing that was collected is lost, unless the sink has to be resumed.
    fn flush(&mut self, behind: Position, at_once: bool) -> Result<Option<Resume>, SinkError>;

    /// Called at intervals when nothing waits, with nothing collected, for work that is not urgent.
    /// It should take no longer than a second or two, and handles its own failures.
    fn idle(&mut self) {}

    /// Returns the number of lines that were truncated since the last call. Called after each
    /// flush.
    fn take_truncated(&mut self) -> u64 {
        0
    }
}
