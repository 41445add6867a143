//! The one thread that writes: it takes every message that waits, puts them into one transaction, and answers
//! after the fsync (group commit).
//!
//! What happens when it fails: a failed statement or a full disk rolls the transaction back, and everybody in
//! it hears so. A failed fsync ends the ledger: the kernel may have dropped the pages and will not say so
//! again, so what is on the disk is not known; after the restart, recovery reads it.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode};
use tokio::sync::oneshot;

use super::claims::Claims;
use super::interest::Interest;
use super::outbox::{self, Body, Feed, Forgotten, Stored, Weight};
use super::place::Place;
use super::queue::{Answer, Commit, Queue};
use super::seen::Seen;
use super::skip::{GivenUp, Skipping};
use super::{
    Batch, Clock, CommitError, Delivered, Failed, Gauges, Position, Receipt, Resume, Skipped, Window,
};
use crate::database;
use crate::wire::event::{Stream, Verdict};

pub(super) enum Message {
    /// Commit a batch.
    Commit(Box<Batch>, Answer<Receipt>),
    /// Note how far a sink has come, and answer when that is durable, if somebody waits.
    Advance {
        sink: String,
        position: Position,
        mark: Vec<u8>,
        /// None when what waits for it is to be counted anew.
        delivered: Option<Delivered>,
        reply: Option<Answer<()>>,
    },
    /// Answer, as a sign of life.
    Ping(oneshot::Sender<()>),
    /// From the next transaction on, remember and keep by these.
    Adjust { windows: BTreeMap<String, Window>, limit: Weight },
    /// Write what is left and end.
    Close,
}

pub(super) struct Parts {
    pub(super) connection: Connection,
    pub(super) inbox: Receiver<Message>,
    pub(super) failure: oneshot::Sender<Failed>,
    pub(super) place: Place,
    pub(super) feed: Arc<Feed>,
    pub(super) claims: Arc<BTreeMap<String, Claims>>,
    pub(super) gauges: Arc<Gauges>,
    /// Where batches are refused.
    pub(super) limit: Weight,
    pub(super) interests: Arc<[Interest]>,
    pub(super) windows: BTreeMap<String, Window>,
    pub(super) clock: Clock,
}

pub(super) struct Writer {
    parts: Parts,
    seen: Seen,
    skipping: Skipping,
    /// Batches for the next transactions.
    queue: Queue,
    /// Advances that nobody waits for: the newest of each sink.
    advances: BTreeMap<String, (Position, Vec<u8>)>,
    /// Sinks that are somewhere else than was thought.
    recount: Vec<String>,
    last_housekeeping: Instant,
    /// There is something to do: more than one step of housekeeping does, or much has become free.
    more_housework: bool,
    /// Some batch may be there that every sink has.
    must_forget: bool,
    /// What batches took that were forgotten since the last step.
    freed_bytes: u64,
}

/// Positions ride along with the next commit, or go on their own after this time.
const ADVANCE_DELAY: Duration = Duration::from_millis(100);

/// How often expired fingerprints and free pages are looked for.
const HOUSEKEEPING: Duration = Duration::from_secs(30);

/// Number of free pages that one step of housekeeping gives back: 2 MiB. They fit SQLite's cache, which otherwise
/// writes them all to the log before they go.
const SHRINK_PAGES: i64 = 512;

/// When so much has become free, housekeeping does not wait for its time.
const FREED_BYTES: u64 = 32 << 20;

/// Between two steps of housekeeping requests go first.
const HOUSEWORK_PAUSE: Duration = Duration::from_millis(10);

/// How often it is looked whether the ledger's files are in their place, while nothing else is to be done. After a
/// failed write, it is also tried as often whether writing works again.
const LOOK: Duration = Duration::from_secs(1);

/// The size of a large batch, compressed.
const PROBE_BYTES: u32 = 1 << 20;

impl Writer {
    pub(super) fn new(parts: Parts) -> rusqlite::Result<Self> {
        let seen = Seen::new(&parts.connection, parts.windows.clone(), parts.clock.clone())?;
        let weight = outbox::weigh(&parts.connection)?;
        parts.gauges.set_weight(weight);
        for interest in &*parts.interests {
            let sink = &interest.subscription.sink;
            let position = outbox::position(&parts.connection, sink)?;
            let wants = |batch, source: &str, stream| interest.wants(batch, source, stream);
            let pending = outbox::pending(&parts.connection, &wants, position)?;
            parts.gauges.pending().insert(sink.clone(), pending);
        }
        let skipping = Skipping::new(parts.limit, &parts.interests);
        Ok(Self {
            parts,
            seen,
            skipping,
            queue: Queue::default(),
            advances: BTreeMap::new(),
            recount: Vec::new(),
            last_housekeeping: Instant::now(),
            more_housework: false,
            must_forget: true,
            freed_bytes: 0,
        })
    }

    /// Works until [`Message::Close`], until every handle is gone, or until the disk cannot be trusted.
    pub(super) fn run(mut self) {
        let mut closing = false;
        loop {
            let unwritable = self.parts.gauges.unwritable.load(Ordering::Relaxed);
            let patience = if closing || !self.queue.is_empty() {
                Duration::ZERO
            } else if !unwritable && (self.more_housework || self.must_forget) {
                HOUSEWORK_PAUSE
            } else if !self.advances.is_empty() || self.must_give_up() {
                ADVANCE_DELAY
            } else {
                LOOK
            };
            let first = match self.parts.inbox.recv_timeout(patience) {
                Ok(message) => Some(message),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => Some(Message::Close),
            };
            let waiting = self.gather(first, &mut closing);
            let commits = self.queue.group();
            let mut result = self.transact(commits, waiting);
            if closing && self.queue.is_empty() && result.is_ok() {
                self.parts.feed.close();
                return;
            }
            if result.is_ok() && (self.more_housework || self.last_housekeeping.elapsed() >= HOUSEKEEPING) {
                result = self.keep_house();
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
                Message::Commit(batch, reply) => self.queue.push((*batch, reply)),
                Message::Advance { sink, position, mark, delivered, reply } => {
                    match delivered {
                        Some(delivered) => self.parts.gauges.delivered(&sink, delivered),
                        None => self.recount.push(sink.clone()),
                    }
                    self.advances.insert(sink, (position, mark));
                    waiting.extend(reply);
                }
                Message::Ping(reply) => {
                    let _ = reply.send(());
                }
                Message::Adjust { windows, limit } => {
                    self.seen.adjust(windows);
                    self.skipping = Skipping::new(limit, &self.parts.interests);
                }
                Message::Close => *closing = true,
            }
            next = self.parts.inbox.try_recv().ok();
        }
        waiting
    }

    /// One transaction for all of it, then the answers; none, not even to say that it failed, when the ledger's
    /// files are no longer where the next start will look for them.
    fn transact(&mut self, mut commits: Vec<Commit>, waiting: Vec<Answer<()>>) -> Result<(), Failed> {
        let probing = self.parts.gauges.unwritable.load(Ordering::Relaxed);
        let is_idle = commits.is_empty() && self.advances.is_empty();
        if is_idle && !probing && !self.must_forget && !self.must_give_up() {
            return self.is_in_place();
        }
        let claims = Arc::clone(&self.parts.claims);
        let written = self.write(&mut commits, &claims);
        self.is_in_place()?;
        match written {
            Ok(written) => {
                // The point of no return: from here on the batches are promised, whatever happens.
                let is_proof = !commits.is_empty();
                let advances = std::mem::take(&mut self.advances);
                let delivered: Vec<(String, Position)> =
                    advances.iter().map(|(sink, (position, _))| (sink.clone(), *position)).collect();
                for (sink, (position, mark)) in advances {
                    self.parts.gauges.noted().insert(sink, Resume { position, mark });
                }
                self.freed_bytes += written.forgotten.weight.bytes;
                self.must_forget = written.forgotten.more;
                self.more_housework |= self.freed_bytes >= FREED_BYTES;
                self.publish(commits, written);
                for (sink, position) in delivered {
                    if let Some(claims) = claims.get(&sink) {
                        claims.deliver(position);
                    }
                }
                self.count_anew();
                for reply in waiting {
                    let _ = reply.send(Ok(()));
                }
                if !probing {
                    return Ok(());
                }
                match if is_proof { Ok(()) } else { self.probe() } {
                    Ok(()) => {
                        self.parts.gauges.unwritable.store(false, Ordering::Relaxed);
                        tracing::info!("the ledger can be written again");
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
                        cause = text,
                        "the ledger could not write; batches are refused until it can"
                    );
                }
                let lost = is_lost(&error) || !self.roll_back();
                self.seen.forget_cached();
                for (_, reply) in commits {
                    let _ = reply.send(Err(CommitError::Storage(text.clone())));
                }
                for reply in waiting {
                    let _ = reply.send(Err(CommitError::Storage(text.clone())));
                }
                if lost { Err(Failed::Untrusted(text)) } else { Ok(()) }
            }
        }
    }

    /// Looks for the ledger's files.
    fn is_in_place(&self) -> Result<(), Failed> {
        self.parts.place.check().map_err(|path| Failed::Gone(path.to_owned()))
    }

    /// The transaction itself. Nothing outside the database changes here, except that the batches give up their
    /// entries.
    fn write<'a>(
        &mut self,
        commits: &mut [Commit],
        claims: &'a BTreeMap<String, Claims>,
    ) -> rusqlite::Result<Written<'a>> {
        let connection = &self.parts.connection;
        connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        let now = self.seen.look_at_the_clock(connection)?;
        let mut written = Written {
            batches: Vec::with_capacity(commits.len()),
            forgotten: Forgotten::default(),
            given_up: None,
        };
        let mut weight = self.parts.gauges.weight();
        for (batch, _) in commits.iter_mut() {
            let progress = &self.parts.gauges.progress;
            let is_new = self.seen.insert_all(connection, &batch.source, &batch.entries, now, progress)?;
            let mut receipt = Receipt::default();
            let verdicts: Vec<Option<Verdict>> = std::mem::take(&mut batch.entries)
                .into_iter()
                .zip(is_new)
                .map(|(entry, is_new)| {
                    let verdict = entry?.verdict;
                    receipt.count(&verdict, is_new);
                    is_new.then_some(verdict)
                })
                .collect();
            // Nothing new, nothing to deliver: no row.
            let row = if verdicts.iter().any(Option::is_some) {
                let quarantine_bytes = quarantine_bytes(batch, &verdicts);
                let (position, added) = outbox::append(connection, batch, &verdicts, quarantine_bytes)?;
                weight += added;
                Some((position, added))
            } else {
                None
            };
            written.batches.push((receipt, verdicts, row));
        }
        if !self.advances.is_empty() {
            for (sink, (position, mark)) in &self.advances {
                outbox::record(connection, sink, *position, mark)?;
            }
            self.skipping.moved();
        }
        if !self.advances.is_empty() || self.must_forget {
            written.forgotten = outbox::forget(connection)?;
            weight -= written.forgotten.weight;
        }
        let (gauges, advances) = (&self.parts.gauges, &self.advances);
        let position = |sink: &str| match advances.get(sink) {
            Some((position, _)) => Some(*position),
            None => gauges.noted().get(sink).map(|noted| noted.position),
        };
        written.given_up =
            self.skipping.give_up(connection, weight, &self.parts.interests, position, claims)?;
        connection.prepare_cached("COMMIT")?.execute([])?;
        Ok(written)
    }

    /// Whether a batch would find room: tried out, since a transaction that changes little or nothing may
    /// succeed on a full disk. What sinks have delivered is noted before, as it may be what makes room.
    fn probe(&self) -> rusqlite::Result<()> {
        let connection = &self.parts.connection;
        connection.execute("INSERT OR REPLACE INTO meta VALUES ('probe', zeroblob(?1))", [PROBE_BYTES])?;
        connection.execute("DELETE FROM meta WHERE name = 'probe'", [])?;
        Ok(())
    }

    /// Tells the workers and the requests.
    fn publish(&mut self, commits: Vec<Commit>, written: Written<'_>) {
        let gauges = &self.parts.gauges;
        // All at once, so that nobody is refused for what is going anyhow.
        let mut added = Weight::default();
        let mut replies = Vec::with_capacity(commits.len());
        for ((batch, reply), (receipt, verdicts, row)) in commits.into_iter().zip(written.batches) {
            if let Some((position, weight)) = row {
                added += weight;
                let stored = Stored {
                    position,
                    source: batch.source,
                    received_at: batch.received_at,
                    key_ids: batch.key_ids,
                    verdicts,
                    body: Body::Decoded { packing: batch.packing, bytes: batch.decoded },
                    weight,
                };
                gauges.committed(&self.parts.interests, &stored);
                self.parts.feed.publish(stored);
            }
            replies.push((reply, receipt));
        }
        let mut gone = written.forgotten.weight;
        if let Some(given_up) = &written.given_up {
            gone += given_up.weight;
            self.parts.feed.remove(&given_up.batches);
        }
        let mut weight = gauges.weight();
        weight += added;
        weight -= gone;
        gauges.set_weight(weight);
        if let Some(mut given_up) = written.given_up {
            self.skipping.settle(&mut given_up);
            self.count_skipped(&given_up);
        }
        for (reply, receipt) in replies {
            let _ = reply.send(Ok(receipt));
        }
        self.parts.feed.forget_before(written.forgotten.reached);
    }

    /// Whether batches have to be given up although nobody commits any.
    fn must_give_up(&self) -> bool {
        self.skipping.is_due(self.parts.gauges.weight())
    }

    /// Counts what sinks lost.
    fn count_skipped(&self, given_up: &GivenUp<'_>) {
        let gauges = &self.parts.gauges;
        for interest in &*self.parts.interests {
            let sink = &interest.subscription.sink;
            let Some(lost) = given_up.lost.get(sink) else { continue };
            gauges.skipped().entry(sink.clone()).or_default().add(*lost);
            let position = gauges.noted().get(sink).map(|noted| noted.position).unwrap_or_default();
            let wants = |batch, source: &str, stream| interest.wants(batch, source, stream);
            let oldest = outbox::oldest(&self.parts.connection, &wants, position);
            if let Some(pending) = gauges.pending().get_mut(sink) {
                pending.events = pending.events.saturating_sub(lost.events);
                // Unknown only when the table cannot be read; then it keeps its former value.
                pending.oldest = oldest.unwrap_or(pending.oldest).filter(|_| pending.events > 0);
            }
        }
    }

    /// Counts what waits for sinks that are somewhere else than was thought.
    fn count_anew(&mut self) {
        for sink in std::mem::take(&mut self.recount) {
            let interest = self.parts.interests.iter().find(|known| known.subscription.sink == sink);
            let noted = self.parts.gauges.noted().get(&sink).map(|noted| noted.position);
            let (Some(interest), Some(position)) = (interest, noted) else { continue };
            let wants = |batch, source: &str, stream| interest.wants(batch, source, stream);
            match outbox::pending(&self.parts.connection, &wants, position) {
                Ok(pending) => {
                    self.parts.gauges.pending().insert(sink, pending);
                }
                Err(error) => {
                    tracing::warn!(sink, cause = describe(&error), "what waits for the sink is not known");
                }
            }
        }
    }

    /// Ends a transaction that failed; false when SQLite does not know how.
    fn roll_back(&self) -> bool {
        self.parts.connection.is_autocommit() || self.parts.connection.execute_batch("ROLLBACK").is_ok()
    }

    /// Expires fingerprints and gives free pages back, a little at a time.
    fn keep_house(&mut self) -> Result<(), Failed> {
        let cleaned = self.clean_up();
        let was_busy = std::mem::replace(&mut self.more_housework, matches!(cleaned, Ok(true)));
        self.freed_bytes = 0;
        if !self.more_housework {
            self.last_housekeeping = Instant::now();
        }
        let result = match cleaned {
            Err(error) if is_lost(&error) => return Err(Failed::Untrusted(describe(&error))),
            // The file itself becomes smaller when its log is copied into it. A sync of it that fails loses nothing:
            // the log still has it all, and the next checkpoint copies it again.
            Ok(false) if was_busy => database::checkpoint(&self.parts.connection),
            result => result.map(drop),
        };
        if let Err(error) = result {
            tracing::warn!(
                cause = describe(&error),
                "expired fingerprints or free pages could not be given up"
            );
            self.seen.forget_cached();
        }
        Ok(())
    }

    /// One step; true when there is more to do.
    fn clean_up(&mut self) -> rusqlite::Result<bool> {
        let connection = &self.parts.connection;
        let expired = self.seen.expire_some(connection)?;
        let shrunk = database::shrink(connection, SHRINK_PAGES)? > 0;
        Ok(shrunk || expired)
    }
}

/// What a transaction wrote.
struct Written<'a> {
    batches: Vec<WrittenBatch>,
    forgotten: Forgotten,
    given_up: Option<GivenUp<'a>>,
}

/// A batch's receipt, its verdicts, none for what is not delivered with it, and its row, if it needed one.
type WrittenBatch = (Receipt, Vec<Option<Verdict>>, Option<(i64, Weight)>);

/// The quarantined part of a batch's bytes: of its body by its share of the lines, and what is wrong with each.
fn quarantine_bytes(batch: &Batch, verdicts: &[Option<Verdict>]) -> u64 {
    let quarantined =
        verdicts.iter().flatten().filter(|verdict| verdict.stream() == Stream::Quarantine).count();
    let share = batch.body.len() * quarantined / verdicts.len().max(1);
    share as u64 + outbox::rejections_bytes(verdicts)
}

/// After these nothing is known about what is on the disk.
fn is_lost(error: &rusqlite::Error) -> bool {
    const FSYNC: i32 = rusqlite::ffi::SQLITE_IOERR_FSYNC;
    const DIR_FSYNC: i32 = rusqlite::ffi::SQLITE_IOERR_DIR_FSYNC;
    match error.sqlite_error() {
        Some(cause) => {
            matches!(cause.extended_code, FSYNC | DIR_FSYNC)
                || matches!(cause.code, ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)
        }
        None => false,
    }
}

fn describe(error: &rusqlite::Error) -> String {
    match error.sqlite_error() {
        Some(cause) => format!("{error} (SQLite code {})", cause.extended_code),
        None => error.to_string(),
    }
}

impl Gauges {
    pub(super) fn pending(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, super::Pending>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn noted(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Resume>> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn skipped(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Skipped>> {
        self.skipped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is in the table. Only the writer changes it.
    fn weight(&self) -> Weight {
        Weight {
            bytes: self.backlog_bytes.load(Ordering::Relaxed),
            quarantine_bytes: self.quarantine_bytes.load(Ordering::Relaxed),
        }
    }

    fn set_weight(&self, weight: Weight) {
        self.backlog_bytes.store(weight.bytes, Ordering::Relaxed);
        self.quarantine_bytes.store(weight.quarantine_bytes, Ordering::Relaxed);
    }

    fn committed(&self, interests: &[Interest], stored: &Stored) {
        let mut pending = self.pending();
        for Interest { subscription, .. } in interests {
            let events = stored.wanted(subscription, 0).count() as u64;
            if let Some(pending) = pending.get_mut(&subscription.sink).filter(|_| events > 0) {
                pending.events += events;
                pending.oldest.get_or_insert(stored.received_at);
            }
        }
    }

    fn delivered(&self, sink: &str, delivered: Delivered) {
        if let Some(pending) = self.pending().get_mut(sink).filter(|_| delivered.events > 0) {
            pending.events = pending.events.saturating_sub(delivered.events);
            pending.oldest = (pending.events > 0).then_some(delivered.received_at);
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
