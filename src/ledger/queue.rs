//! What waits for the writer: batches in the order in which they came, except that rubbish does not hold up the
//! rest.
//!
//! A batch most of whose lines were rejected is rubbish here. It is as durable as any other before it is answered,
//! and it goes when nothing else waits, or after a while when something does; but between two transactions
//! of rubbish everything else has its turn. One connection's batches do not overtake each other, since a sender waits
//! for its answer before it sends the next.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::{Batch, CommitError, Receipt};
use crate::wire::event::Verdict;

/// How somebody is told what became of his wish.
pub(super) type Answer<T> = oneshot::Sender<Result<T, CommitError>>;

/// A batch and who waits for its receipt.
pub(super) type Commit = (Batch, Answer<Receipt>);

/// At most this many bytes of bodies in one transaction, so that no request waits for the whole world.
const GROUP_BYTES: usize = 32 << 20;

/// At most this many lines in one transaction, or one batch: each takes some microseconds, and the disk's cache
/// must hold what they change.
const GROUP_LINES: usize = 20_000;

/// So long rubbish waits for everything else.
const MANNERS: Duration = Duration::from_secs(1);

/// The batches that wait.
#[derive(Default)]
pub(super) struct Queue {
    worthy: VecDeque<Commit>,
    rubbish: VecDeque<(Instant, Commit)>,
    /// The last group began with rubbish.
    was_rubbish: bool,
}

impl Queue {
    pub(super) fn push(&mut self, commit: Commit, now: Instant) {
        if is_rubbish(&commit.0) {
            self.rubbish.push_back((now, commit));
        } else {
            self.worthy.push_back(commit);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.worthy.is_empty() && self.rubbish.is_empty()
    }

    /// What shares the next transaction: as much as may, and at least one batch if there is any.
    pub(super) fn group(&mut self, now: Instant) -> Vec<Commit> {
        let is_overdue = self.rubbish.front().is_some_and(|(since, _)| now - *since >= MANNERS);
        let mut group = Group::default();
        if self.was_rubbish || !is_overdue {
            while self.worthy.front().is_some_and(|(batch, _)| group.takes(batch)) {
                group.commits.extend(self.worthy.pop_front());
            }
        }
        self.was_rubbish = group.commits.is_empty();
        while self.rubbish.front().is_some_and(|(_, (batch, _))| group.takes(batch)) {
            group.commits.extend(self.rubbish.pop_front().map(|(_, commit)| commit));
        }
        group.commits
    }
}

#[derive(Default)]
struct Group {
    commits: Vec<Commit>,
    bytes: usize,
    lines: usize,
}

impl Group {
    /// Whether a batch is one of it, which it then has to become.
    fn takes(&mut self, batch: &Batch) -> bool {
        let (bytes, lines) = (self.bytes + batch.body.len(), self.lines + batch.entries.len());
        let takes = self.commits.is_empty() || (bytes <= GROUP_BYTES && lines <= GROUP_LINES);
        if takes {
            (self.bytes, self.lines) = (bytes, lines);
        }
        takes
    }
}

fn is_rubbish(batch: &Batch) -> bool {
    let rejected = |verdict: &Verdict| matches!(verdict, Verdict::Rejected { .. });
    batch.entries.iter().filter(|entry| rejected(&entry.verdict)).count() * 2 > batch.entries.len()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::oneshot;

    use super::*;
    use crate::ledger::{Entry, Identifier};
    use crate::wire::event::Reason;

    /// A batch with a name and so many lines of each kind.
    fn commit(name: &str, worthy: usize, rejected: usize) -> Commit {
        let identity = Identifier::new([0; 32]).reject("us", b"a");
        let verdict = Verdict::Rejected { reason: Reason::Unsigned, detail: "".into() };
        let mut entries = vec![Entry { verdict: Verdict::Unverified, identity: identity.clone() }; worthy];
        entries.extend(vec![Entry { verdict, identity }; rejected]);
        let batch = Batch {
            source: name.into(),
            received_at: 0,
            body: Vec::new(),
            packing: 0,
            decoded: None,
            key_ids: Arc::new([]),
            entries,
        };
        (batch, oneshot::channel().0)
    }

    fn names(group: &[Commit]) -> Vec<&str> {
        group.iter().map(|(batch, _)| &*batch.source).collect()
    }

    #[test]
    fn a_group_is_bounded_by_lines_and_by_bytes() {
        let now = Instant::now();
        let mut queue = Queue::default();
        for (name, lines) in
            [("a", GROUP_LINES - 1), ("b", 1), ("c", 1), ("d", GROUP_LINES), ("e", 5 * GROUP_LINES)]
        {
            queue.push(commit(name, lines, 0), now);
        }
        for expected in [&["a", "b"][..], &["c"], &["d"], &["e"], &[]] {
            assert_eq!(names(&queue.group(now)), expected);
        }
        for name in ["a", "b", "c"] {
            let (mut batch, answer) = commit(name, 1, 0);
            batch.body = vec![0; GROUP_BYTES / 2];
            queue.push((batch, answer), now);
        }
        assert_eq!(names(&queue.group(now)), ["a", "b"]);
        assert_eq!(names(&queue.group(now)), ["c"]);
        assert!(queue.is_empty());
    }

    #[test]
    fn rubbish_goes_behind_and_in_the_end_by_turns() {
        let now = Instant::now();
        let mut queue = Queue::default();
        for name in ["r1", "r2", "r3"] {
            queue.push(commit(name, 1, GROUP_LINES), now);
        }
        queue.push(commit("small rubbish", 0, 1), now);
        for name in ["a", "b"] {
            queue.push(commit(name, GROUP_LINES / 2, GROUP_LINES / 2), now);
        }
        assert_eq!(names(&queue.group(now)), ["a"]);
        let later = now + MANNERS;
        assert_eq!(names(&queue.group(later)), ["r1"], "it has waited long enough");
        assert_eq!(names(&queue.group(later)), ["b"], "but the others wait for one batch of it only");
        assert_eq!(names(&queue.group(later)), ["r2"]);
        queue.push(commit("c", 1, 0), later);
        assert_eq!(names(&queue.group(later)), ["c"]);
        assert_eq!(names(&queue.group(later)), ["r3"]);
        queue.push(commit("d", 1, 0), later);
        assert_eq!(names(&queue.group(later)), ["d", "small rubbish"], "what fits may share");
        assert!(queue.group(later).is_empty());
    }
}
