//! One thread per sink: read batches in commit order, push, flush, advance; when the sink fails, back off and
//! try again, for ever.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::RngExt as _;

use super::sink::{Item, Sink, SinkError};
use crate::ledger::{Body, Delivered, Ledger, Next, Position, Resume, Stored, Subscription};
use crate::wire::batch::Packing;
use crate::wire::event::Verdict;

/// What a worker tells about its sink. Called on the worker's thread.
pub trait Watcher: Send {
    /// So many lines are safe in the sink now.
    fn delivered(&self, sink: &str, events: u64);
    /// The sink had to cut so many lines to fit its limits.
    fn truncated(&self, sink: &str, lines: u64);
    /// The sink failed, and will be tried again.
    fn failed(&self, sink: &str, error: &SinkError);
    /// It works again.
    fn recovered(&self, sink: &str);
}

/// A sink and everything that its thread needs.
pub struct Worker {
    /// What the sink takes.
    pub subscription: Subscription,
    /// Where it is written to.
    pub sink: Box<dyn Sink>,
    /// Where batches come from and positions go to.
    pub ledger: Ledger,
    /// Who hears about it.
    pub watcher: Box<dyn Watcher>,
    /// Set when the process ends: the worker does not start over with a sink that fails.
    pub stop: Arc<AtomicBool>,
}

/// A flush is due at this many collected bytes, and whenever nothing more waits.
const CHUNK: usize = 1 << 20;

/// How long a worker sleeps at most without looking whether it should end.
const PATIENCE: Duration = Duration::from_secs(1);

const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// The ledger is gone, or the process ends.
struct Ended;

impl Worker {
    /// Delivers until the ledger's feed is closed and everything in it is delivered, or until `stop` is set.
    pub fn run(mut self) {
        // Whoever ends a worker has the position of the last flush in the ledger, so that there is nothing
        // to clean up.
        let _ = self.deliver();
    }

    fn deliver(&mut self) -> Result<(), Ended> {
        let name = self.subscription.sink.clone();
        let outbox =
            self.until_it_works(|worker| worker.ledger.outbox().map_err(|cause| unreadable(&cause)))?;
        let last = self.ledger.resume(&name).cloned().ok_or(Ended)?;
        let mut position = self.until_it_works(|worker| worker.open(&last))?;
        let mut progress = Delivered::default();
        let mut reached = position;
        loop {
            let patience = if reached == position { PATIENCE } else { Duration::ZERO };
            let next = self.until_it_works(|_| {
                outbox.next(reached.batch, patience).map_err(|cause| unreadable(&cause))
            })?;
            let ended = matches!(next, Next::Closed);
            if let Next::Batch(batch) = next {
                reached = self.push(&batch, reached, &mut progress)?;
                if self.sink.collected() < CHUNK {
                    continue;
                }
            }
            let is_idle = reached == position;
            if !is_idle {
                position = reached;
                self.settle(position, &mut progress)?;
            }
            if (ended && is_idle) || self.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
        }
    }

    /// Collects the wanted lines of a batch from a position on, flushing in between where it is long. Returns
    /// the position behind it.
    fn push(&mut self, batch: &Stored, from: Position, progress: &mut Delivered) -> Result<Position, Ended> {
        let first_line = if batch.position == from.batch { from.line } else { 0 };
        let behind = Position { batch: batch.position + 1, line: 0 };
        if batch.wanted(&self.subscription, first_line).next().is_none() {
            return Ok(behind);
        }
        let (packing, inflated) = self.until_it_works(|_| unpack(batch))?;
        let subscription = self.subscription.clone();
        let mut wanted = batch.wanted(&subscription, first_line).peekable();
        for (index, line) in packing.lines(&inflated).enumerate() {
            let Some((_, verdict)) = wanted.next_if(|(wanted, _)| *wanted == index) else {
                continue;
            };
            let key_id = match verdict {
                Verdict::Verified { key } => batch.key_ids.get(*key).map(String::as_str),
                _ => None,
            };
            let behind_line =
                Position { batch: batch.position, line: u32::try_from(index + 1).unwrap_or(u32::MAX) };
            self.sink.push(&Item {
                behind: behind_line,
                received_at: batch.received_at,
                source: &batch.source,
                verdict,
                key_id,
                raw: line,
            });
            progress.events += 1;
            progress.received_at = batch.received_at;
            if self.sink.collected() >= CHUNK && wanted.peek().is_some() {
                self.settle(behind_line, progress)?;
            }
        }
        Ok(behind)
    }

    /// Flushes, and lets the ledger know.
    fn settle(&mut self, position: Position, progress: &mut Delivered) -> Result<(), Ended> {
        let mark = self.until_it_works(|worker| worker.sink.flush(position))?;
        self.watcher.delivered(&self.subscription.sink, progress.events);
        let truncated = self.sink.take_truncated();
        if truncated > 0 {
            self.watcher.truncated(&self.subscription.sink, truncated);
        }
        self.ledger.advance(&self.subscription.sink, position, mark, std::mem::take(progress));
        Ok(())
    }

    /// Opens the sink, and makes durable where it is before anything is written.
    fn open(&mut self, last: &Resume) -> Result<Position, SinkError> {
        let opened = self.sink.resume(last)?;
        let position = opened.position;
        if opened != *last {
            self.ledger
                .advance_now(&self.subscription.sink, position, opened.mark)
                .map_err(|cause| unreadable(&cause))?;
        }
        Ok(position)
    }

    /// Tries until it succeeds, waiting longer each time: twice as long, jittered, at most half a minute.
    fn until_it_works<T>(
        &mut self,
        mut attempt: impl FnMut(&mut Self) -> Result<T, SinkError>,
    ) -> Result<T, Ended> {
        let mut wait = FIRST_WAIT;
        let mut failed = false;
        loop {
            match attempt(self) {
                Ok(done) => {
                    if failed {
                        self.watcher.recovered(&self.subscription.sink);
                    }
                    return Ok(done);
                }
                Err(error) => {
                    failed = true;
                    self.watcher.failed(&self.subscription.sink, &error);
                }
            }
            self.sleep(wait.mul_f64(rand::rng().random_range(0.5..1.0)))?;
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }

    /// Sleeps in small pieces, so that the end of the process is noticed.
    fn sleep(&self, mut rest: Duration) -> Result<(), Ended> {
        while !rest.is_zero() {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Ended);
            }
            let piece = rest.min(Duration::from_millis(100));
            std::thread::sleep(piece);
            rest -= piece;
        }
        Ok(())
    }
}

/// The inflated body of a batch, and how its lines are found in it.
fn unpack(batch: &Stored) -> Result<(Packing, Arc<Vec<u8>>), SinkError> {
    let damaged = |why: &str| SinkError {
        what: format!("cannot read batch {} from the ledger", batch.position),
        cause: std::io::Error::other(why.to_owned()),
    };
    let packing = |code| Packing::from_code(code).ok_or_else(|| damaged("an unknown packing"));
    match &batch.body {
        Body::Decoded { packing: code, bytes } => Ok((packing(*code)?, Arc::clone(bytes))),
        Body::Packed { packing: code, bytes } => {
            let packing = packing(*code)?;
            let inflated = packing.unpack(bytes).map_err(|error| damaged(&error.to_string()))?;
            Ok((packing, Arc::new(inflated)))
        }
    }
}

fn unreadable(cause: &dyn std::fmt::Display) -> SinkError {
    SinkError { what: "cannot use the ledger".to_owned(), cause: std::io::Error::other(cause.to_string()) }
}
