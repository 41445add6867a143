//! Batches that wait for the writer. Small ones share transactions in the order in which they came;
//! a large one gets a transaction of its own, and between two of these the small ones get one. The
//! batches of one connection do not overtake each other, since a sender waits for its response
//! before it sends the next.

use std::collections::VecDeque;
use std::time::Instant;

use tokio::sync::oneshot;

use super::batch::{Batch, Committed};
use super::error::CommitError;

/// Channel for the result of a request to the writer.
pub(super) type Answer<T> = oneshot::Sender<Result<T, CommitError>>;

/// A batch, the channel for its receipt, and when it was sent.
pub(super) struct Commit {
    pub(super) batch: Batch,
    pub(super) reply: Answer<Committed>,
    pub(super) sent: Instant,
}

/// Maximum size of the bodies in one transaction, in bytes, where there is more than one.
const GROUP_BYTES: usize = 32 << 20;

/// Maximum number of lines in one transaction, where there is more than one batch. Each line takes
/// some microseconds, and the disk's cache must hold what they change.
const GROUP_LINES: usize = 20_000;

/// The waiting batches.
#[derive(Default)]
pub(super) struct Queue {
    small: VecDeque<Commit>,
    large: VecDeque<Commit>,
    /// The last transaction was a large batch's.
    was_large: bool,
}

impl Queue {
    pub(super) fn push(&mut self, commit: Commit) {
        let is_large = commit.batch.body.len() > GROUP_BYTES || commit.batch.lines.len() > GROUP_LINES / 2;
        if is_large { self.large.push_back(commit) } else { self.small.push_back(commit) }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.small.is_empty() && self.large.is_empty()
    }

    /// Returns the batches of the next transaction: at least one batch if there is any.
    pub(super) fn group(&mut self) -> Vec<Commit> {
        self.was_large = !self.large.is_empty() && (self.small.is_empty() || !self.was_large);
        if self.was_large {
            return self.large.pop_front().into_iter().collect();
        }
        let (mut bytes, mut lines) = (0, 0);
        let fits = |Commit { batch, .. }: &&Commit| {
            bytes += batch.body.len();
            lines += batch.lines.len();
            bytes <= GROUP_BYTES && lines <= GROUP_LINES
        };
        let count = self.small.iter().take_while(fits).count();
        self.small.drain(..count).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::ledger::lines::Lines;
    use crate::wire::batch::{Coding, Packing};

    /// Returns a commit of a named batch with that many lines and bytes.
    fn commit(name: &str, lines: usize, bytes: usize) -> Commit {
        let body = Arc::new(vec![0; bytes]);
        let batch = Batch {
            source: name.into(),
            received_at: 0,
            decoded: Arc::clone(&body),
            body,
            packing: Packing::Lines(Coding::Identity),
            key_ids: Arc::new([]),
            lines: Lines::new(vec![None; lines]),
            checkpoint: None,
        };
        Commit { batch, reply: oneshot::channel().0, sent: Instant::now() }
    }

    fn names(group: &[Commit]) -> Vec<&str> {
        group.iter().map(|commit| &*commit.batch.source).collect()
    }

    #[test]
    fn a_group_is_bounded_by_lines_and_by_bytes() {
        let mut queue = Queue::default();
        for (name, lines, bytes) in [
            ("a", GROUP_LINES / 2, 0),
            ("b", GROUP_LINES / 2, 0),
            ("c", 1, GROUP_BYTES / 2),
            ("d", 1, GROUP_BYTES / 2),
            ("e", 1, GROUP_BYTES),
        ] {
            queue.push(commit(name, lines, bytes));
        }
        for expected in [&["a", "b"][..], &["c", "d"], &["e"], &[]] {
            assert_eq!(names(&queue.group()), expected);
        }
        assert!(queue.is_empty());
    }

    #[test]
    fn small_batches_wait_for_at_most_one_large_one() {
        let mut queue = Queue::default();
        for (name, lines, bytes) in
            [("l1", GROUP_LINES, 0), ("l2", 5 * GROUP_LINES, 0), ("l3", 1, 2 * GROUP_BYTES), ("a", 1, 0)]
        {
            queue.push(commit(name, lines, bytes));
        }
        assert_eq!(names(&queue.group()), ["l1"]);
        assert_eq!(names(&queue.group()), ["a"]);
        queue.push(commit("b", 1, 0));
        assert_eq!(names(&queue.group()), ["l2"]);
        assert_eq!(names(&queue.group()), ["b"]);
        assert_eq!(names(&queue.group()), ["l3"]);
        assert!(queue.group().is_empty() && queue.is_empty());
    }
}
