//! The one thread that writes: it takes every message that waits, puts them into one transaction,
//! and answers after the fsync (group commit).
//!
//! On failure: a failed statement or a full disk rolls the transaction back, and every request in
//! it gets the error. A failed fsync ends the ledger: the kernel may have dropped the pages and
//! will not report it again, so what is on the disk is not known; after the restart, recovery reads
//! it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rusqlite::{Connection, ErrorCode};
use tokio::sync::oneshot;

use super::batch::{CommitReceipt, Committed};
use super::delivery::{self, Appended, Backlog, Deleted};
use super::error::{CommitError, Failed};
use super::evict::Eviction;
use super::file_identity::FileIdentity;
use super::lines::Counts;
use super::outbox::{Body, Feed, StoredBatch};
use super::queue::{Answer, Commit, Queue};
use super::seen::{Seen, Window};
use super::subscription::{Position, Skipped, Subscription};
use super::verdicts::Verdicts;
use crate::clock::Clock;
use crate::database;
use crate::log_throttle::log_throttled;

pub(super) enum Message {
    /// Commits a batch.
    Commit(Box<Commit>),
    /// Records a sink's position, and answers when that is durable, if a reply is wanted.
    Advance { sink: String, position: Position, mark: Vec<u8>, reply: Option<Answer<()>> },
    /// Answers, to show that the writer is alive.
    Ping(oneshot::Sender<()>),
    /// Sets windows and limits, from the next transaction on.
    Adjust { windows: BTreeMap<String, Window>, limit: Backlog },
    /// Writes what is left and ends.
    Close,
}

pub(super) struct Parts {
    pub(super) connection: Connection,
    pub(super) inbox: Receiver<Message>,
    pub(super) failure: oneshot::Sender<Failed>,
    pub(super) files: FileIdentity,
    pub(super) feed: Arc<Feed>,
    pub(super) gauges: Arc<Gauges>,
    /// The backlog at which batches are refused.
    pub(super) limit: Backlog,
    /// Maximum number of bytes that a worker has in hand.
    pub(super) in_hand_bytes: u64,
    pub(super) subscriptions: Vec<Subscription>,
    pub(super) windows: BTreeMap<String, Window>,
    pub(super) clock: Clock,
}

pub(super) struct Writer {
    parts: Parts,
    seen: Seen,
    eviction: Eviction,
    /// Batches for the next transactions.
    queue: Queue,
    /// Positions to record: the newest of each sink.
    advances: BTreeMap<String, (Position, Vec<u8>)>,
    /// Time at which they are recorded, if no batch comes before.
    advances_due: Option<Instant>,
    last_housekeeping: Instant,
    /// There is something to do: one step of housekeeping was not enough, or many bytes have been
    /// deleted.
    more_housekeeping: bool,
    /// Bytes of batches that were deleted since the last step.
    freed_bytes: u64,
}

/// Maximum delay before positions are recorded without a commit: a sync each, which the next batch
/// would have to wait for. Longer than a sync, so that busy senders bring the commit; short enough
/// for a sink that may have little in hand and waits for this.
pub(super) const ADVANCE_DELAY: Duration = Duration::from_millis(20);

/// Time between two searches for expired fingerprints and free pages.
const HOUSEKEEPING_INTERVAL: Duration = Duration::from_secs(30);

/// Number of free pages that one step of housekeeping returns to the file system: 2 MiB. They fit
/// SQLite's cache, which otherwise writes them all to the log before they are removed.
const SHRINK_PAGES: i64 = 512;

/// Number of deleted bytes from which on housekeeping does not wait for its time.
const FREED_BYTES: u64 = 32 << 20;

/// Pause between two steps of housekeeping, in which requests go first.
const HOUSEKEEPING_PAUSE: Duration = Duration::from_millis(10);

/// Time between two checks that the ledger's files are at their paths, while nothing else is to be
/// done. After a failed write, the time between two attempts to write.
const DISK_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Size of a large compressed batch, in bytes.
const PROBE_BYTES: u32 = 1 << 20;

impl Writer {
    pub(super) fn new(parts: Parts) -> rusqlite::Result<Self> {
        let seen = Seen::new(&parts.connection, parts.windows.clone(), parts.clock.clone())?;
        parts.gauges.set_backlog(delivery::weigh(&parts.connection)?);
        let eviction = Eviction::new(parts.limit, parts.in_hand_bytes, &parts.subscriptions);
        Ok(Self {
            parts,
            seen,
            eviction,
            queue: Queue::default(),
            advances: BTreeMap::new(),
            advances_due: None,
            last_housekeeping: Instant::now(),
            more_housekeeping: false,
            freed_bytes: 0,
        })
    }

    /// Works until [`Message::Close`], until every handle is dropped, or until the disk cannot be
    /// trusted.
    pub(super) fn run(mut self) {
        let mut closing = false;
        loop {
            let unwritable = self.parts.gauges.unwritable.load(Ordering::Relaxed);
            let timeout = if closing || !self.queue.is_empty() {
                Duration::ZERO
            } else if unwritable {
                DISK_CHECK_INTERVAL
            } else if self.more_housekeeping || self.must_evict() {
                HOUSEKEEPING_PAUSE
            } else if let Some(due) = self.advances_due {
                due.saturating_duration_since(Instant::now())
            } else {
                DISK_CHECK_INTERVAL
            };
            let first = match self.parts.inbox.recv_timeout(timeout) {
                Ok(message) => Some(message),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => Some(Message::Close),
            };
            let waiting = self.gather(first, &mut closing);
            let commits = self.queue.group();
            let mut result =
                self.transact(commits, waiting).and_then(|()| self.checkpoint(database::CHECKPOINT_PAGES));
            if closing && self.queue.is_empty() && result.is_ok() {
                self.parts.feed.close();
                return;
            }
            if result.is_ok()
                && (self.more_housekeeping || self.last_housekeeping.elapsed() >= HOUSEKEEPING_INTERVAL)
            {
                result = self.run_housekeeping();
            }
            if let Err(failed) = result {
                let _ = self.parts.failure.send(failed);
                self.parts.feed.close();
                return;
            }
        }
    }

    /// Takes everything that waits now. After [`Message::Close`] nothing is taken any more.
    fn gather(&mut self, first: Option<Message>, closing: &mut bool) -> Vec<Answer<()>> {
        let mut waiting = Vec::new();
        let mut next = first;
        while let Some(message) = next.filter(|_| !*closing) {
            match message {
                Message::Commit(commit) => self.queue.push(*commit),
                Message::Advance { sink, position, mark, reply } => {
                    self.advances.insert(sink, (position, mark));
                    let delay = if reply.is_some() { Duration::ZERO } else { ADVANCE_DELAY };
                    let due = Instant::now() + delay;
                    self.advances_due = Some(self.advances_due.map_or(due, |earlier| earlier.min(due)));
                    waiting.extend(reply);
                }
                Message::Ping(reply) => {
                    let _ = reply.send(());
                }
                Message::Adjust { windows, limit } => {
                    self.seen.adjust(windows);
                    self.eviction = Eviction::new(limit, self.parts.in_hand_bytes, &self.parts.subscriptions);
                }
                Message::Close => {
                    *closing = true;
                    self.advances_due = self.advances_due.map(|_| Instant::now());
                }
            }
            next = self.parts.inbox.try_recv().ok();
        }
        waiting
    }

    /// Runs one transaction for all of it, then answers. No answer, not even a failure, is sent
    /// when the ledger's files are no longer where the next start will look for them.
    fn transact(&mut self, mut commits: Vec<Commit>, waiting: Vec<Answer<()>>) -> Result<(), Failed> {
        let probing = self.parts.gauges.unwritable.load(Ordering::Relaxed);
        let began = Instant::now();
        let is_idle = commits.is_empty() && self.advances_due.is_none_or(|due| due > began);
        if is_idle && !probing && !self.must_evict() {
            return self.is_in_place();
        }
        let written = self.write(&mut commits);
        self.is_in_place()?;
        match written {
            Ok(written) => {
                // The point of no return: from here on the batches are promised, whatever happens.
                let is_proof = !commits.is_empty();
                self.publish(commits, written, began);
                for reply in waiting {
                    let _ = reply.send(Ok(()));
                }
                if !probing {
                    return Ok(());
                }
                match if is_proof { Ok(()) } else { self.probe() } {
                    Ok(()) => {
                        self.parts.gauges.unwritable.store(false, Ordering::Relaxed);
                        tracing::info!(
                            code = "ledger-writable",
                            "the ledger can be written again; batches are accepted"
                        );
                        Ok(())
                    }
                    Err(error) if is_lost(&error) => Err(Failed::Untrusted(describe(&error))),
                    Err(_) => Ok(()),
                }
            }
            Err(error) => {
                let text = describe(&error);
                self.parts.gauges.unwritable.store(true, Ordering::Relaxed);
                if !probing {
                    tracing::error!(
                        code = "ledger-unwritable",
                        "cannot write the ledger: {cause}; batches are refused until a write succeeds",
                        cause = text
                    );
                }
                let lost = is_lost(&error) || !self.roll_back();
                self.seen.forget_cached();
                self.eviction.start_again();
                for Commit { reply, .. } in commits {
                    let _ = reply.send(Err(CommitError::Storage(text.clone())));
                }
                for reply in waiting {
                    let _ = reply.send(Err(CommitError::Storage(text.clone())));
                }
                if lost { Err(Failed::Untrusted(text)) } else { Ok(()) }
            }
        }
    }

    /// Checks that the ledger's files are at their paths.
    fn is_in_place(&self) -> Result<(), Failed> {
        self.parts.files.check().map_err(|path| Failed::Gone(path.to_owned()))
    }

    /// Writes the transaction itself. Nothing outside the database changes here, except that the
    /// batches give up the verdicts on their lines.
    fn write(&mut self, commits: &mut [Commit]) -> rusqlite::Result<Written> {
        let Parts { connection, subscriptions, gauges, .. } = &self.parts;
        connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        let now = self.seen.check_clock(connection)?;
        let mut written = Written { backlog: gauges.backlog(), ..Written::default() };
        let batches: Vec<_> =
            commits.iter().map(|Commit { batch, .. }| (&*batch.source, &batch.lines)).collect();
        let duplicates = self.seen.insert_all(connection, &batches, now, &gauges.progress)?;
        for (Commit { batch, .. }, duplicates) in commits.iter_mut().zip(duplicates) {
            let (verdicts, counts) = batch.lines.take(&duplicates);
            let appended = delivery::append(connection, batch, &verdicts, &counts, subscriptions)?;
            if let Some(appended) = &appended {
                written.backlog += appended.weight;
                self.eviction.appended();
            }
            if let Some(checkpoint) = &batch.checkpoint {
                delivery::keep_checkpoint(connection, checkpoint)?;
            }
            written.batches.push((counts, verdicts, appended));
            gauges.progress.fetch_add(1, Ordering::Relaxed);
        }
        for (sink, (position, mark)) in &self.advances {
            written.deleted.add(delivery::advance(connection, sink, *position, mark)?);
            self.eviction.moved();
        }
        written.backlog = written.backlog - written.deleted.weight;
        if self.eviction.is_due(written.backlog) {
            let evicted = self.eviction.evict(connection, written.backlog, subscriptions)?;
            written.backlog = written.backlog - evicted.deleted.weight;
            written.deleted.add(evicted.deleted);
            written.lost = evicted.lost;
        }
        connection.prepare_cached("COMMIT")?.execute([])?;
        Ok(written)
    }

    /// Tries whether a batch would find space, since a transaction that changes little or nothing
    /// may succeed on a full disk. What sinks have delivered is recorded before, as it may be what
    /// frees space.
    fn probe(&self) -> rusqlite::Result<()> {
        let connection = &self.parts.connection;
        connection.execute("INSERT OR REPLACE INTO meta VALUES ('probe', zeroblob(?1))", [PROBE_BYTES])?;
        connection.execute("DELETE FROM meta WHERE name = 'probe'", [])?;
        Ok(())
    }

    /// Publishes the batches to the workers, and answers the requests.
    fn publish(&mut self, commits: Vec<Commit>, written: Written, began: Instant) {
        let transaction = began.elapsed();
        let Parts { gauges, feed, .. } = &self.parts;
        let mut replies = Vec::with_capacity(commits.len());
        for (Commit { batch, reply, sent }, (counts, verdicts, appended)) in
            commits.into_iter().zip(written.batches)
        {
            if let Some(Appended { position, weight, streams }) = appended {
                let stored = StoredBatch {
                    position,
                    source: batch.source,
                    received_at: batch.received_at,
                    key_ids: batch.key_ids,
                    verdicts,
                    body: Body::Decoded { packing: batch.packing, bytes: batch.decoded },
                    bytes: weight.bytes,
                };
                // Before the answer: when every request is answered, the feed may be closed.
                feed.publish(stored, streams);
            }
            let receipt = CommitReceipt::new(counts);
            replies.push((reply, Committed { receipt, queued: began - sent, transaction }));
        }
        feed.remove(&written.deleted.batches);
        let advances = std::mem::take(&mut self.advances);
        self.advances_due = None;
        feed.record(advances.into_iter().map(|(sink, (position, _))| (sink, position)));
        gauges.set_backlog(written.backlog);
        gauges.add_skipped(written.lost);
        self.freed_bytes += written.deleted.weight.bytes;
        self.more_housekeeping |= self.freed_bytes >= FREED_BYTES;
        for (reply, committed) in replies {
            let _ = reply.send(Ok(committed));
        }
    }

    /// Returns whether batches must be evicted although none is committed.
    fn must_evict(&self) -> bool {
        self.eviction.is_due(self.parts.gauges.backlog())
    }

    /// Ends a transaction that failed; returns false when SQLite cannot.
    fn roll_back(&self) -> bool {
        self.parts.connection.is_autocommit() || self.parts.connection.execute_batch("ROLLBACK").is_ok()
    }

    /// Expires fingerprints and returns free pages, a little at a time.
    fn run_housekeeping(&mut self) -> Result<(), Failed> {
        let cleaned = self.clean_up();
        let was_busy = std::mem::replace(&mut self.more_housekeeping, matches!(cleaned, Ok(true)));
        self.freed_bytes = 0;
        if !self.more_housekeeping {
            self.last_housekeeping = Instant::now();
        }
        match cleaned {
            // The file itself becomes smaller when its log is copied into it.
            Ok(false) if was_busy => self.checkpoint(0),
            Ok(_) => Ok(()),
            Err(error) if is_lost(&error) => Err(Failed::Untrusted(describe(&error))),
            Err(error) => {
                tracing::warn!(
                    code = "ledger-cleanup-failed",
                    "cannot delete expired fingerprints or free pages of the ledger: {cause}; retrying in {seconds} s",
                    cause = describe(&error),
                    seconds = HOUSEKEEPING_INTERVAL.as_secs()
                );
                self.seen.forget_cached();
                Ok(())
            }
        }
    }

    /// Copies the log into the file when it has `pages` pages or more. The answers, which do not
    /// depend on it, are out. What could not be written is tried again later; the log still has it
    /// all.
    fn checkpoint(&self, pages: i64) -> Result<(), Failed> {
        let Err(error) = database::checkpoint(&self.parts.connection, pages) else { return Ok(()) };
        if is_lost(&error) {
            return Err(Failed::Untrusted(describe(&error)));
        }
        log_throttled!(
            warn,
            "ledger",
            code = "ledger-checkpoint-failed",
            "cannot copy the log of the ledger into its file: {cause}; retrying",
            cause = describe(&error)
        );
        Ok(())
    }

    /// Runs one step; returns true when there is more to do.
    fn clean_up(&mut self) -> rusqlite::Result<bool> {
        let connection = &self.parts.connection;
        let expired = self.seen.expire_some(connection)?;
        let shrunk = database::shrink(connection, SHRINK_PAGES)? > 0;
        Ok(shrunk || expired)
    }
}

/// Result of a transaction.
#[derive(Default)]
struct Written {
    batches: Vec<WrittenBatch>,
    deleted: Deleted,
    /// Losses of sinks.
    lost: BTreeMap<String, Skipped>,
    /// Weight of the table now.
    backlog: Backlog,
}

/// The counts of a batch, its verdicts, and its row, if it needed one.
type WrittenBatch = (Counts, Verdicts, Option<Appended>);

/// Returns whether nothing is known about what is on the disk after this error.
fn is_lost(error: &rusqlite::Error) -> bool {
    let is_damaged = |code| matches!(code, ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase);
    database::is_failed_sync(error) || error.sqlite_error_code().is_some_and(is_damaged)
}

fn describe(error: &rusqlite::Error) -> String {
    match error.sqlite_error() {
        Some(cause) => format!("{error} (SQLite code {})", cause.extended_code),
        None => error.to_string(),
    }
}

/// Values that can be read at any time.
#[derive(Debug, Default)]
pub(super) struct Gauges {
    pub(super) unwritable: AtomicBool,
    /// Increases while a transaction makes progress.
    pub(super) progress: AtomicU64,
    backlog: Mutex<Backlog>,
    /// Losses of each sink since they were last taken.
    skipped: Mutex<BTreeMap<String, Skipped>>,
}

impl Gauges {
    pub(super) fn backlog(&self) -> Backlog {
        *self.backlog.lock()
    }

    fn set_backlog(&self, backlog: Backlog) {
        *self.backlog.lock() = backlog;
    }

    pub(super) fn take_skipped(&self) -> BTreeMap<String, Skipped> {
        std::mem::take(&mut *self.skipped.lock())
    }

    fn add_skipped(&self, lost: BTreeMap<String, Skipped>) {
        let mut skipped = self.skipped.lock();
        for (sink, lost) in lost {
            skipped.entry(sink).or_default().add(lost);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::schema;

    #[test]
    fn the_ledger_shrinks_again_when_a_backlog_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.db");
        let connection = schema::open(&path).unwrap().connection;
        let pages = || connection.pragma_query_value(None, "page_count", |row| row.get::<_, i64>(0)).unwrap();
        let empty = pages();
        for _ in 0..64 {
            connection
                .execute(
                    "INSERT INTO batch (source, received_at, packing, verified, unverified, quarantined, \
                     quarantined_bytes, bytes, key_ids, verdicts, body) \
                     VALUES ('us', 0, 0, 1, 0, 0, 0, 1048577, '[]', x'02', zeroblob(1048576))",
                    [],
                )
                .unwrap();
        }
        let full = pages();
        assert!(full > 64 * 256);
        connection.execute("DELETE FROM batch", []).unwrap();
        let mut steps = 0;
        while database::shrink(&connection, SHRINK_PAGES).unwrap() > 0 {
            steps += 1;
        }
        assert!(pages() < empty + 4200, "{} of {full} pages are left after {steps} steps", pages());
        connection.pragma_update(None, "wal_checkpoint", "TRUNCATE").unwrap();
        assert!(std::fs::metadata(&path).unwrap().len() < 20 << 20);
        let sound: String = connection.pragma_query_value(None, "integrity_check", |row| row.get(0)).unwrap();
        assert_eq!(sound, "ok");
    }
}
