//! What a sink is, and what it promises.
//!
//! # Durability
//!
//! [`Sink::push`] only collects. [`Sink::flush`] makes everything collected so far safe against power loss and
//! returns a mark: an opaque note about the place that was reached. The ledger keeps the mark together with the
//! position, and forgets a batch only after the flush that covered it.
//!
//! # Retry
//!
//! A flush that fails may have done any part of its work. What was collected stays collected, and the worker
//! calls flush again until it succeeds; a sink that can tell what it already has must not have it twice.
//!
//! # Restart
//!
//! After a restart, [`Sink::resume`] gets the last position and mark that the ledger kept, and says where it
//! really is. From there the worker pushes everything again, in the same order and with the same content. A
//! sink that keeps a position of its own is never behind the ledger's and may be ahead; one that does not
//! returns the ledger's, and compares what it is given with what it has.

use crate::ledger::{Position, Resume};
use crate::wire::event::Verdict;

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

/// Why a sink could not do what it was asked; it is asked again.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {cause}")]
pub struct SinkError {
    /// What was tried, and where.
    pub what: String,
    /// The system's words.
    pub cause: std::io::Error,
}

/// A place for lines. See the module's documentation for what it promises.
pub trait Sink: Send {
    /// Opens the place. `last` is what the ledger kept, its mark empty for a sink that is new. What comes back
    /// must be durable in the ledger before anything is written.
    ///
    /// # Errors
    /// When the place cannot be opened; the worker tries again.
    fn resume(&mut self, last: &Resume) -> Result<Resume, SinkError>;

    /// Collects a line.
    fn push(&mut self, item: &Item<'_>);

    /// Bytes that are collected.
    fn collected(&self) -> usize;

    /// Makes safe what was collected, which is everything that the sink wants before `behind`; returns the
    /// mark of the place that was reached.
    ///
    /// # Errors
    /// When it could not; nothing that was collected is lost.
    fn flush(&mut self, behind: Position) -> Result<Vec<u8>, SinkError>;

    /// How many lines had to be cut to fit since the last call. Asked for after a flush.
    fn take_truncated(&mut self) -> u64 {
        0
    }
}
