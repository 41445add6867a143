//! One thread per sink: read batches in commit order, push, flush, advance; when the sink fails,
//! back off and retry, forever.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::RngExt as _;

use super::sink::{Item, Sink, SinkError};
use crate::ledger::{Body, Ledger, Next, Outbox, Position, Resume, StoredBatch, Streams, Subscription};
use crate::wire::batch::{Coding, Packing};
use crate::wire::event::Verdict;

/// Observer of a worker. Called on the worker's thread.
pub trait Watcher: Send {
    /// Reports that the sink begins an operation, which may hang, or has returned from it.
    fn working(&self, sink: &str, is_working: bool);
    /// Reports the number of lines that have become safe in the sink.
    fn delivered(&self, sink: &str, events: u64);
    /// Reports the number of lines that the sink truncated to fit its limits.
    fn truncated(&self, sink: &str, lines: u64);
    /// Reports that the sink failed, and will be retried.
    fn failed(&self, sink: &str, error: &SinkError);
    /// Reports that the sink works again.
    fn recovered(&self, sink: &str);
}

/// A sink and everything that its thread needs.
pub struct Worker {
    /// The lines that the sink takes.
    pub subscription: Subscription,
    /// The sink.
    pub sink: Box<dyn Sink>,
    /// The source of batches and the record of positions.
    pub ledger: Ledger,
    /// Observer of the sink.
    pub watcher: Box<dyn Watcher>,
    /// Set when the process ends: the worker stops retrying.
    pub stop: Arc<AtomicBool>,
}

/// Maximum time that a worker waits for a batch, between two checks of `stop` and two runs of the
/// sink's maintenance.
const IDLE_WAIT: Duration = Duration::from_secs(1);

/// Time after which a sink is asked again to make written lines safe.
const UNSYNCED_WAIT: Duration = Duration::from_millis(50);

/// Minimum time between two calls of [`Sink::idle`].
const IDLE_INTERVAL: Duration = Duration::from_secs(60);

/// Number of received bytes that are handed to a sink at once, where that many wait: enough for
/// many cores to render. What they become is held beyond [`Sink::chunk`].
const TOGETHER: usize = 1 << 20;

const MIN_RETRY_DELAY: Duration = Duration::from_millis(100);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(30);

impl Worker {
    /// Delivers until the ledger's feed is closed and everything in it is delivered, or until
    /// `stop` is set.
    pub fn run(self) {
        let mut delivery = Delivery::of(self);
        // The last safe position is in the ledger, so that there is nothing to clean up.
        while let Err(Interrupted::Restart) = delivery.run() {}
    }
}

/// State of a running worker.
struct Delivery {
    worker: Worker,
    /// The sink has continued once.
    is_begun: bool,
    /// The next pause after a failure; none after a success.
    wait: Option<Duration>,
}

/// Progress of the delivery. Each position is at or behind the one before it.
struct Progress {
    /// Everything before it is safe in the sink, and recorded in the ledger now or soon.
    safe: Position,
    /// Everything before it was flushed.
    flushed: Position,
    /// Everything before it was pushed.
    pushed: Position,
    /// The first batch that was not taken from the ledger.
    taken: i64,
    /// What was flushed since `safe`: positions, and the number of lines before each.
    flushed_lines: Vec<(Position, u64)>,
    /// Number of lines that were pushed since `flushed`.
    pushed_lines: u64,
}

impl Progress {
    /// Creates the progress of a worker that starts: everything before `start` is safe, and nothing
    /// behind it was pushed yet.
    fn at(start: Position) -> Self {
        Self {
            safe: start,
            flushed: start,
            pushed: start,
            taken: start.batch,
            flushed_lines: Vec::new(),
            pushed_lines: 0,
        }
    }
}

/// Reason why the delivery stopped.
enum Interrupted {
    /// The ledger is closed, or the process ends.
    Ended,
    /// What was written since the last safe position cannot be trusted.
    Restart,
}

/// A batch that was taken from the ledger.
struct Held {
    batch: Arc<StoredBatch>,
    /// The lines that the sink gets: index and verdict.
    verdicts: Vec<(usize, Verdict)>,
    packing: Packing,
    /// Its inflated body.
    body: Arc<Vec<u8>>,
}

impl Held {
    /// Returns the lines that the sink gets.
    fn items(&self) -> impl Iterator<Item = Item<'_>> {
        let Self { batch, verdicts, packing, body } = self;
        let mut wanted = verdicts.iter().peekable();
        packing.lines(body).enumerate().filter_map(move |(index, raw)| {
            let (_, verdict) = wanted.next_if(|(wanted, _)| *wanted == index)?;
            let key_id = match verdict {
                Verdict::Verified { key } => batch.key_ids.get(*key).map(String::as_str),
                _ => None,
            };
            let behind =
                Position { batch: batch.position, line: u32::try_from(index + 1).unwrap_or(u32::MAX) };
            let StoredBatch { received_at, source, .. } = &**batch;
            Some(Item { behind, received_at: *received_at, source, verdict, key_id, raw })
        })
    }
}

impl Delivery {
    fn of(worker: Worker) -> Self {
        Self { worker, is_begun: false, wait: None }
    }

    fn run(&mut self) -> Result<(), Interrupted> {
        let (mut outbox, start) = self.open_with_retries()?;
        let mut progress = Progress::at(start);
        let mut last_idle = Instant::now();
        let mut held = Vec::new();
        loop {
            let timeout = match &progress {
                progress if !held.is_empty() || progress.pushed != progress.flushed => Duration::ZERO,
                progress if progress.flushed != progress.safe => UNSYNCED_WAIT,
                _ => IDLE_WAIT,
            };
            let next =
                self.retry(|_| outbox.next(progress.taken, timeout).map_err(|cause| unreadable(&cause)))?;
            let (mut may_follow, mut ended, mut is_full) = (false, false, false);
            match next {
                Next::Batch(batch, streams) => {
                    self.hold(batch, streams, &mut progress, &mut held)?;
                    if held.iter().map(|held: &Held| held.body.len()).sum::<usize>() < TOGETHER {
                        continue;
                    }
                    may_follow = true;
                }
                Next::Full => is_full = true,
                Next::Nothing => {}
                Next::Closed => ended = true,
            }
            self.push(&held, &mut progress)?;
            held.clear();
            if may_follow && self.worker.sink.collected() < self.worker.sink.chunk() {
                continue;
            }
            let is_idle = progress.pushed == progress.safe;
            if is_idle {
                self.prepare(&mut progress)?;
                // Nothing waits, so no flush will report it.
                self.recovered();
            } else {
                self.settle(&mut progress, ended || is_full)?;
            }
            if is_idle && last_idle.elapsed() >= IDLE_INTERVAL {
                self.worker.in_sink(|sink| sink.idle());
                last_idle = Instant::now();
            }
            if (ended && is_idle) || self.worker.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
        }
    }

    /// Takes the lines of some streams of a batch, to be pushed with those of others.
    fn hold(
        &mut self,
        batch: Arc<StoredBatch>,
        streams: Streams,
        progress: &mut Progress,
        held: &mut Vec<Held>,
    ) -> Result<(), Interrupted> {
        let from = progress.pushed;
        let first_line = if batch.position == from.batch { from.line } else { 0 };
        progress.taken = batch.position + 1;
        let verdicts: Vec<_> = batch.lines(streams, first_line).collect();
        let (packing, body) = if verdicts.is_empty() {
            (Packing::Lines(Coding::Identity), Arc::default())
        } else {
            self.retry(|_| unpack(&batch))?
        };
        held.push(Held { batch, verdicts, packing, body });
        Ok(())
    }

    /// Collects the lines of batches. Many lines are flushed in between.
    fn push(&mut self, held: &[Held], progress: &mut Progress) -> Result<(), Interrupted> {
        if held.is_empty() {
            return Ok(());
        }
        let (mut items, mut bytes) = (Vec::new(), 0);
        for item in held.iter().flat_map(Held::items) {
            let (collected, chunk) = (self.worker.sink.collected(), self.worker.sink.chunk());
            if bytes >= TOGETHER || collected + bytes >= chunk {
                self.push_all(&items, progress);
                items.clear();
                bytes = 0;
                if self.worker.sink.collected() >= chunk {
                    self.settle(progress, false)?;
                }
            }
            bytes += item.raw.len();
            items.push(item);
        }
        self.push_all(&items, progress);
        progress.pushed = Position { batch: progress.taken, line: 0 };
        Ok(())
    }

    /// Collects lines.
    fn push_all(&mut self, items: &[Item<'_>], progress: &mut Progress) {
        self.worker.sink.push_all(items);
        progress.pushed = items.last().map_or(progress.pushed, |item| item.behind);
        progress.pushed_lines += items.len() as u64;
    }

    /// Flushes, and records what is safe.
    fn settle(&mut self, progress: &mut Progress, at_once: bool) -> Result<(), Interrupted> {
        let behind = progress.pushed;
        let safe = loop {
            // Before each attempt: another file may not have the problem that the last attempt met.
            self.prepare(progress)?;
            match self.worker.in_sink(|sink| sink.flush(behind, at_once)) {
                Ok(safe) => break safe,
                Err(error) => self.back_off(&error)?,
            }
        };
        progress.flushed = behind;
        progress.flushed_lines.push((behind, std::mem::take(&mut progress.pushed_lines)));
        let truncated = self.worker.sink.take_truncated();
        if truncated > 0 {
            self.worker.watcher.truncated(&self.worker.subscription.sink, truncated);
        }
        if let Some(Resume { position, mark }) = safe {
            self.recovered();
            self.worker.ledger.advance(&self.worker.subscription.sink, position, mark);
            self.count(progress, position);
        }
        Ok(())
    }

    /// Runs the sink's maintenance (rotation, reopening) and records the resulting position.
    fn prepare(&mut self, progress: &mut Progress) -> Result<(), Interrupted> {
        if let Some(Resume { position, mark }) = self.retry(|worker| worker.in_sink(|sink| sink.prepare()))? {
            self.retry(|worker| worker.note(position, mark.clone()))?;
            self.count(progress, position);
        }
        Ok(())
    }

    /// Counts what is safe before a position.
    fn count(&self, progress: &mut Progress, position: Position) {
        let is_safe = |(behind, _): &(Position, u64)| *behind <= position;
        let delivered =
            progress.flushed_lines.iter().filter(|flushed| is_safe(flushed)).map(|(_, lines)| lines).sum();
        progress.flushed_lines.retain(|flushed| !is_safe(flushed));
        progress.safe = position;
        self.worker.watcher.delivered(&self.worker.subscription.sink, delivered);
    }

    /// Opens the sink at the position in the ledger, and records the sink's real one.
    fn open_with_retries(&mut self) -> Result<(Outbox, Position), Interrupted> {
        loop {
            match self.worker.open(self.is_begun) {
                Ok(opened) => {
                    self.is_begun = true;
                    return Ok(opened);
                }
                // Opening again is what a restart of the delivery does anyway.
                Err(error) => match self.back_off(&error) {
                    Err(Interrupted::Restart) | Ok(()) => {}
                    ended @ Err(Interrupted::Ended) => ended?,
                },
            }
        }
    }

    /// Retries until the attempt succeeds. While lines wait, only a flush shows that the sink works
    /// again.
    fn retry<T>(
        &mut self,
        mut attempt: impl FnMut(&mut Worker) -> Result<T, SinkError>,
    ) -> Result<T, Interrupted> {
        loop {
            match attempt(&mut self.worker) {
                Ok(done) => return Ok(done),
                Err(error) => self.back_off(&error)?,
            }
        }
    }

    fn recovered(&mut self) {
        if self.wait.take().is_some() {
            self.worker.watcher.recovered(&self.worker.subscription.sink);
        }
    }

    /// Waits after a failure: as the destination asked, or twice as long each time, jittered, at most
    /// half a minute. Then the same can be retried, unless the sink has to be resumed.
    fn back_off(&mut self, error: &SinkError) -> Result<(), Interrupted> {
        self.worker.watcher.failed(&self.worker.subscription.sink, error);
        let wait = self.wait.unwrap_or(MIN_RETRY_DELAY);
        self.wait = Some((wait * 2).min(MAX_RETRY_DELAY));
        let jittered = wait.mul_f64(rand::rng().random_range(0.5..1.0));
        let mut rest = error.retry_after.unwrap_or(jittered);
        // In small pieces, so that the end of the process is noticed.
        while !rest.is_zero() {
            if self.worker.stop.load(Ordering::Relaxed) {
                return Err(Interrupted::Ended);
            }
            let piece = rest.min(Duration::from_millis(100));
            std::thread::sleep(piece);
            rest -= piece;
        }
        if error.must_resume { Err(Interrupted::Restart) } else { Ok(()) }
    }
}

impl Worker {
    /// Runs an operation of the sink, and reports its start and end.
    fn in_sink<T>(&mut self, operation: impl FnOnce(&mut dyn Sink) -> T) -> T {
        self.watcher.working(&self.subscription.sink, true);
        let result = operation(&mut *self.sink);
        self.watcher.working(&self.subscription.sink, false);
        result
    }

    /// Opens the sink. At the first time it can have nothing that was committed since the start.
    fn open(&mut self, is_begun: bool) -> Result<(Outbox, Position), SinkError> {
        let last = self.ledger.resume(&self.subscription.sink).map_err(|cause| unreadable(&cause))?;
        let last = last.ok_or_else(|| unreadable(&"it does not know the sink"))?;
        let opened = self.in_sink(|sink| sink.resume(&last))?;
        let position = opened.position;
        let newest = self.ledger.newest_at_start();
        if !is_begun && position.batch > newest + 1 {
            // New commits would count as delivered. They wait instead, until the operator acts.
            let why = format!(
                "it already has batch {}, and the ledger ended with {newest} at the start: an older copy of data_dir was put \
                 back; put the newer one back, or give the sink a new name and a new destination",
                position.batch - 1
            );
            let what = format!("cannot continue with the sink {}", self.subscription.sink);
            return Err(SinkError::new(what, std::io::Error::other(why)));
        }
        if opened != last {
            self.note(position, opened.mark)?;
        }
        let outbox = self.ledger.outbox(&self.subscription).map_err(|cause| unreadable(&cause))?;
        Ok((outbox, position))
    }

    /// Records the sink's position durably, before it writes.
    fn note(&self, position: Position, mark: Vec<u8>) -> Result<(), SinkError> {
        let noted = self.ledger.advance_now(&self.subscription.sink, position, mark);
        noted.map_err(|cause| unreadable(&cause))
    }
}

/// Returns the inflated body of a batch, and how its lines are found in it.
fn unpack(batch: &StoredBatch) -> Result<(Packing, Arc<Vec<u8>>), SinkError> {
    let damaged = |why: &str| {
        let what = format!("cannot read batch {} from the ledger", batch.position);
        SinkError::new(what, std::io::Error::other(why.to_owned()))
    };
    match &batch.body {
        Body::Decoded { packing, bytes } => Ok((*packing, Arc::clone(bytes))),
        Body::Packed { packing, bytes } => {
            let inflated = packing.unpack(bytes).map_err(|error| damaged(&error.to_string()))?;
            Ok((*packing, Arc::new(inflated)))
        }
    }
}

fn unreadable(cause: &dyn std::fmt::Display) -> SinkError {
    SinkError::new("cannot use the ledger".to_owned(), std::io::Error::other(cause.to_string()))
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use super::*;
    use crate::clock::Clock;
    use crate::ledger::{Backlog, Batch, Entry, LedgerOptions, Lines, Running, Window};
    use crate::wire::event::{Stream, Verdict};

    /// A sink that has another position than the ledger recorded.
    struct OtherPosition(Position);

    impl Sink for OtherPosition {
        fn resume(&mut self, _last: &Resume) -> Result<Resume, SinkError> {
            Ok(Resume { position: self.0, mark: Vec::new() })
        }

        fn push(&mut self, _item: &Item<'_>) {}

        fn collected(&self) -> usize {
            0
        }

        fn flush(&mut self, behind: Position, _at_once: bool) -> Result<Option<Resume>, SinkError> {
            Ok(Some(Resume { position: behind, mark: Vec::new() }))
        }
    }

    /// Keeps the failures, and stops the worker at the first one.
    #[derive(Clone, Default)]
    pub(in crate::deliver) struct FailureLog {
        failures: Arc<Mutex<Vec<String>>>,
        pub(in crate::deliver) stop: Arc<AtomicBool>,
    }

    impl FailureLog {
        pub(in crate::deliver) fn failures(&self) -> Vec<String> {
            self.failures.lock().unwrap().clone()
        }
    }

    impl Watcher for FailureLog {
        fn working(&self, _sink: &str, _is_working: bool) {}
        fn delivered(&self, _sink: &str, _events: u64) {}
        fn recovered(&self, _sink: &str) {}
        fn truncated(&self, _sink: &str, _lines: u64) {}

        fn failed(&self, _sink: &str, error: &SinkError) {
            self.failures.lock().unwrap().push(error.to_string());
            self.stop.store(true, Ordering::Relaxed);
        }
    }

    /// Opens a ledger with one source, `us`, and one sink, `search`.
    pub(in crate::deliver) fn open_ledger(data_dir: &std::path::Path) -> (Ledger, Running, Subscription) {
        let window = Window { events: Duration::from_secs(60), rejects: Duration::from_secs(60) };
        let subscription = Subscription {
            sink: "search".to_owned(),
            kind: "sqlite",
            streams: vec![Stream::Verified, Stream::Quarantine],
            sources: None,
            skips: false,
        };
        let options = LedgerOptions {
            data_dir: data_dir.to_owned(),
            subscriptions: vec![subscription.clone()],
            backlog: Backlog { bytes: 1 << 30, quarantine_bytes: 1 << 28 },
            windows: BTreeMap::from([("us".to_owned(), window)]),
            clock: Clock::system(),
        };
        let (ledger, running) = Ledger::open(options).unwrap();
        (ledger, running, subscription)
    }

    /// A sink whose first flush fails, and which works again once it has been prepared.
    #[derive(Default)]
    struct FixedByPreparing {
        failed: bool,
        prepared: bool,
    }

    impl Sink for FixedByPreparing {
        fn resume(&mut self, last: &Resume) -> Result<Resume, SinkError> {
            Ok(last.clone())
        }

        fn prepare(&mut self) -> Result<Option<Resume>, SinkError> {
            self.prepared = self.failed;
            Ok(None)
        }

        fn push(&mut self, _item: &Item<'_>) {}

        fn collected(&self) -> usize {
            0
        }

        fn flush(&mut self, _behind: Position, _at_once: bool) -> Result<Option<Resume>, SinkError> {
            assert!(self.prepared || !self.failed, "the flush is retried without preparing");
            self.failed = true;
            if self.prepared {
                return Ok(None);
            }
            Err(SinkError::new("cannot write".to_owned(), std::io::ErrorKind::StorageFull.into()))
        }
    }

    #[test]
    fn a_sink_is_prepared_before_each_attempt() {
        let dir = tempfile::tempdir().unwrap();
        let (ledger, running, subscription) = open_ledger(dir.path());
        let worker = Worker {
            subscription,
            sink: Box::new(FixedByPreparing::default()),
            ledger: ledger.clone(),
            watcher: Box::new(FailureLog::default()),
            stop: Arc::default(),
        };
        let start = Position::default();
        let mut progress = Progress::at(start);
        assert!(Delivery::of(worker).settle(&mut progress, false).is_ok());
        ledger.close();
        running.thread.join().unwrap();
    }

    /// Commits a line with each failure, and stops the worker at the third one.
    struct Commits {
        ledger: Ledger,
        log: FailureLog,
    }

    impl Watcher for Commits {
        fn working(&self, _sink: &str, _is_working: bool) {}
        fn delivered(&self, _sink: &str, _events: u64) {}
        fn recovered(&self, _sink: &str) {}
        fn truncated(&self, _sink: &str, _lines: u64) {}

        fn failed(&self, sink: &str, error: &SinkError) {
            let line = Arc::new(format!("line {}", self.log.failures().len()).into_bytes());
            self.log.failed(sink, error);
            self.log.stop.store(self.log.failures().len() == 3, Ordering::Relaxed);
            let entry = Entry {
                verdict: Verdict::Verified { key: 0 },
                class: None,
                identity: self.ledger.identifier().event("us", true, (&line, b""), None),
            };
            let batch = Batch {
                source: "us".into(),
                received_at: 0,
                decoded: Arc::clone(&line),
                body: line,
                packing: Packing::Lines(Coding::Identity),
                key_ids: Arc::from(["k1".to_owned()]),
                lines: Lines::new(vec![Some(entry)]),
                checkpoint: None,
            };
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(self.ledger.commit(batch)).unwrap();
        }
    }

    #[test]
    fn commits_do_not_let_a_sink_catch_up_that_is_ahead_of_its_ledger() {
        let dir = tempfile::tempdir().unwrap();
        let (ledger, running, subscription) = open_ledger(dir.path());
        ledger.close_feed();
        let log = FailureLog::default();
        let worker = Worker {
            subscription,
            sink: Box::new(OtherPosition(Position { batch: 3, line: 0 })),
            ledger: ledger.clone(),
            watcher: Box::new(Commits { ledger: ledger.clone(), log: log.clone() }),
            stop: Arc::clone(&log.stop),
        };
        worker.run();
        assert_eq!(log.failures().len(), 3);
        assert_eq!(ledger.pending("search").unwrap().events, 3);
        ledger.close();
        running.thread.join().unwrap();
    }

    #[test]
    fn a_sink_that_is_ahead_of_its_ledger_stops_with_an_error() {
        for (batch, is_ahead) in [(1, false), (2, true), (900, true)] {
            let dir = tempfile::tempdir().unwrap();
            let (ledger, running, subscription) = open_ledger(dir.path());
            ledger.close_feed();
            let log = FailureLog::default();
            let worker = Worker {
                subscription,
                sink: Box::new(OtherPosition(Position { batch, line: 0 })),
                ledger: ledger.clone(),
                watcher: Box::new(log.clone()),
                stop: Arc::clone(&log.stop),
            };
            worker.run();
            let failures = log.failures();
            assert_eq!(failures.len(), usize::from(is_ahead), "{failures:?}");
            assert!(failures.iter().all(|error| error.contains("an older copy of data_dir")), "{failures:?}");
            // The ledger's own position has not changed.
            assert_eq!(ledger.resume("search").unwrap().unwrap().position, Position { batch: 1, line: 0 });
            ledger.close();
            running.thread.join().unwrap();
        }
    }
}
