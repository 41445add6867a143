//! What a sink is, and what it promises.
//!
//! # Durability
//!
//! [`Sink::push`] only collects. [`Sink::flush`] writes everything collected so far and, at once or a little later,
//! makes it safe against power loss; then it returns the position that is safe and a mark: an opaque note about that place. The
//! ledger keeps the mark together with the position, and forgets a batch only after the flush that made it safe.
//!
//! # Retry
//!
//! A flush that fails may have done any part of its work. What was collected stays collected, and the worker
//! calls [`Sink::prepare`] and flush again until both succeed; a sink that can tell what it already has must not have it twice. When what
//! was written before cannot be trusted any more, the error says [`SinkError::start_over`]: the sink is resumed from
//! the last safe position.
//!
//! # Restart
//!
//! After a restart, [`Sink::resume`] gets the last position and mark that the ledger kept, and says where it
//! really is. From there the worker pushes everything again, in the same order and with the same content. A
//! sink that keeps a position of its own is never behind the ledger's and may be ahead; one that does not
//! returns the ledger's, and compares what it is given with what it has.

use crate::ledger::{Position, Resume};
use crate::wire::event::Verdict;
use crate::wire::record::{self, Accepted, Quarantined};

/// One line on its way out.
#[derive(Clone, Copy, Debug)]
pub struct Item<'a> {
    /// The position behind it: what is reached when this line is safe.
    pub behind: Position,
    /// When its batch arrived, in milliseconds since the Unix epoch.
    pub received_at: i64,
    /// The configured name of its source.
    pub source: &'a str,
    /// What was found out about it.
    pub verdict: &'a Verdict,
    /// The key that verified it, if one did.
    pub key_id: Option<&'a str>,
    /// The line as it came, without its terminator.
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

/// Why a sink could not do what it was asked; it is asked again.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {cause}")]
pub struct SinkError {
    /// What was tried, and where.
    pub what: String,
    /// The system's words.
    pub cause: std::io::Error,
    /// Nothing that was written since the last safe position can be trusted: it must all be pushed again.
    pub start_over: bool,
}

impl SinkError {
    /// A failure after which the same can be tried again.
    pub fn new(what: String, cause: std::io::Error) -> Self {
        Self { what, cause, start_over: false }
    }
}

/// A place for lines. See the module's documentation for what it promises.
pub trait Sink: Send {
    /// Opens the place, at the start and when starting over; nothing is collected then. `last` is what the
    /// ledger kept, its mark empty for a sink that is new. What comes back must be durable in the ledger before
    /// anything is written.
    ///
    /// # Errors
    /// When the place cannot be opened; the worker tries again.
    fn resume(&mut self, last: &Resume) -> Result<Resume, SinkError>;

    /// Sees to the place before each flush, and about once a second while nothing is to be done: a file is
    /// rotated, what is too old goes. When lines go to another place from now on, returns where that is and the
    /// position that is safe by then: it must be durable in the ledger before the next flush.
    ///
    /// # Errors
    /// When that failed; the worker tries again.
    fn prepare(&mut self) -> Result<Option<Resume>, SinkError> {
        Ok(None)
    }

    /// Collects a line.
    fn push(&mut self, item: &Item<'_>);

    /// Bytes that are collected.
    fn collected(&self) -> usize;

    /// How many collected bytes make a flush worth while.
    fn chunk(&self) -> usize {
        1 << 20
    }

    /// Writes what was collected, which is everything that the sink wants before `behind`. Returns the position before
    /// which everything is safe, and the mark of that place; none when nothing more is safe than before, which then
    /// comes in a flush to come. `at_once` says that there is no later.
    ///
    /// # Errors
    /// When it could not; nothing that was collected is lost, unless the sink has to start over.
    fn flush(&mut self, behind: Position, at_once: bool) -> Result<Option<Resume>, SinkError>;

    /// Called now and then when nothing waits, with nothing collected: for what is not urgent. It should take
    /// no longer than a second or two, and deals with its failures itself.
    fn idle(&mut self) {}

    /// How many lines had to be cut to fit since the last call. Asked for after a flush.
    fn take_truncated(&mut self) -> u64 {
        0
    }
}
