//! A batch to commit, and the proof that it was committed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::lines::{Counts, Lines};
use crate::wire::batch::Packing;
use crate::wire::event::Reason;
use crate::wire::event::class::EventClass;

/// One judged body, ready to be committed.
#[derive(Debug)]
pub struct Batch {
    /// The configured name of its source.
    pub source: Arc<str>,
    /// Time at which it arrived, in milliseconds since the Unix epoch.
    pub received_at: i64,
    /// The body as it was received.
    pub body: Arc<Vec<u8>>,
    /// Packing by which the body is taken apart again.
    pub packing: Packing,
    /// The inflated body, so that sinks need not inflate it again.
    pub decoded: Arc<Vec<u8>>,
    /// The key IDs that verdicts refer to.
    pub key_ids: Arc<[String]>,
    /// Its lines.
    pub lines: Lines,
    /// State of the input that its lines came from, to be kept with them.
    pub checkpoint: Option<Checkpoint>,
}

/// State of an input behind the lines of a batch: where it continues after a restart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Name of the input.
    pub input: Arc<str>,
    /// The state, which only the input can read.
    pub state: Vec<u8>,
}

/// Proof that every line of a batch is durably committed. Only the writer creates one, after the
/// fsync.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommitReceipt {
    accepted: u64,
    classes: BTreeMap<EventClass, u64>,
    duplicates: u64,
    rejected: [u64; Reason::ALL.len()],
}

/// A receipt, and how long the commit took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// The proof.
    pub receipt: CommitReceipt,
    /// Time until the transaction began.
    pub queued: Duration,
    /// Duration of the transaction, with its fsync.
    pub transaction: Duration,
}

impl CommitReceipt {
    /// Creates the proof. Called by the writer, after the fsync.
    pub(super) fn new(counts: Counts) -> Self {
        let accepted = counts.accepted();
        let Counts { classes, duplicates, rejected, .. } = counts;
        Self { accepted, classes, duplicates, rejected }
    }

    /// Adds rejected lines that a single record holds, which has this receipt.
    pub fn add_record(&mut self, record: &Self, lines: [u64; Reason::ALL.len()]) {
        if record.duplicates > 0 {
            self.duplicates += lines.iter().sum::<u64>();
        } else {
            self.rejected = lines;
        }
    }

    /// Returns the number of new accepted lines.
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Returns the numbers of new accepted lines, by class.
    pub fn classes(&self) -> impl Iterator<Item = (EventClass, u64)> {
        self.classes.iter().map(|(class, lines)| (*class, *lines))
    }

    /// Returns the number of lines that had been committed before.
    pub fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// Returns the number of lines.
    pub fn lines(&self) -> u64 {
        self.accepted + self.duplicates + self.quarantined()
    }

    /// Returns the number of new quarantined lines.
    pub fn quarantined(&self) -> u64 {
        self.rejected.iter().sum()
    }

    /// Returns the numbers of new quarantined lines, by reason.
    pub fn rejected(&self) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL.into_iter().zip(self.rejected)
    }
}
