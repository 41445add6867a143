//! What is committed, and the proof that it was.

use std::sync::Arc;
use std::time::Duration;

use super::identity::Identity;
use crate::wire::batch::Packing;
use crate::wire::event::{Reason, Verdict};

/// One line and what was found out about it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The verdict.
    pub verdict: Verdict,
    /// What it is recognised by when it comes again.
    pub identity: Identity,
}

/// One body, judged, ready to be committed.
#[derive(Debug)]
pub struct Batch {
    /// The configured name of its source.
    pub source: Arc<str>,
    /// When it arrived, in milliseconds since the Unix epoch.
    pub received_at: i64,
    /// The body as it came.
    pub body: Arc<Vec<u8>>,
    /// How to take the body apart again.
    pub packing: Packing,
    /// The inflated body, so that sinks need not inflate it again.
    pub decoded: Arc<Vec<u8>>,
    /// The key IDs that verdicts point at.
    pub key_ids: Arc<[String]>,
    /// One entry a line, in the order of the lines; none for a line that another batch has.
    pub entries: Vec<Option<Entry>>,
}

/// The proof that every line of a batch is durably committed. Only the writer makes one, after the fsync.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Receipt {
    accepted: u64,
    duplicates: u64,
    rejected: [u64; Reason::ALL.len()],
}

/// A receipt, and what it took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// The proof.
    pub receipt: Receipt,
    /// Until the transaction began.
    pub queued: Duration,
    /// The transaction, with its fsync.
    pub transaction: Duration,
}

impl Receipt {
    /// Counts a line.
    pub(super) fn count(&mut self, verdict: &Verdict, is_new: bool) {
        match verdict {
            _ if !is_new => self.duplicates += 1,
            Verdict::Verified { .. } | Verdict::Unverified => self.accepted += 1,
            Verdict::Rejected { reason, .. } => self.rejected[*reason as usize] += 1,
        }
    }

    /// Adds rejected lines that a single record holds, which has this receipt.
    pub fn add_record(&mut self, record: &Self, lines: [u64; Reason::ALL.len()]) {
        if record.duplicates > 0 {
            self.duplicates += lines.iter().sum::<u64>();
        } else {
            self.rejected = lines;
        }
    }

    /// Lines that are new and were let through.
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Lines that had been committed before.
    pub fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// Lines that are new in quarantine.
    pub fn quarantined(&self) -> u64 {
        self.rejected.iter().sum()
    }

    /// Lines that are new in quarantine, by reason.
    pub fn rejected(&self) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL.into_iter().zip(self.rejected)
    }
}
