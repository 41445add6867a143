//! The receiver as a sink: lines are signed, compressed and posted in batches.
//!
//! Lines are signed when they are posted and not when they are read: what has waited for weeks gets
//! the key of the day, and a batch that is posted again after a change of the key is still the same
//! events, since a receiver knows an event by its signed bytes. At least once: a batch whose answer
//! was lost is posted again, and its lines are duplicates at the receiver.

use std::collections::VecDeque;
use std::io::{Error, ErrorKind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use tokio::runtime::Handle;

use super::status::SpoolStatus;
use crate::clock::Clock;
use crate::deliver::sink::{Item, Sink, SinkError};
use crate::ledger::{Position, Resume};
use crate::net::{Bytes, ClientError};
use crate::send::{
    Batch, BatchLimits, Builder, Collector, Delivered, LONGEST_RETRY_AFTER, Poster, RateLimiter, SendError,
    SigningKey, Undelivered, sign_line,
};
use crate::wire::batch::{encode, lines};
use crate::wire::event::Reason;

/// The key that signs now; none where lines are sent as they are.
pub type CurrentKey = Arc<RwLock<Option<Arc<SigningKey>>>>;

/// Time before the next attempt after a refusal that no repetition changes.
const PAUSE: Duration = Duration::from_secs(30);

/// Bytes of an event where batches are limited by their number of events: what is collected before
/// a flush need not be exact.
const TYPICAL_EVENT: usize = 512;

/// Keeps lines aside that the receiver will never take.
pub(super) type SetAside = Box<dyn Fn(&[u8], Reason, String) -> Result<(), String> + Send>;

/// Where batches are posted, and how: until they are delivered, whatever the builder's number of
/// attempts is, and signed by the spool's key.
pub struct Target {
    poster: Poster,
    limits: BatchLimits,
    /// Number of batches in flight; their order is kept with 1 only.
    connections: usize,
    rate: Option<RateLimiter>,
}

impl Target {
    /// Takes the settings of a sender, and the maximum number of events a second.
    ///
    /// # Errors
    /// [`SendError::Tls`] and [`SendError::Authorization`].
    pub fn new(receiver: Builder, rate: Option<f64>) -> Result<Self, SendError> {
        let (limits, connections) = (receiver.batch, receiver.connections.get());
        let rate = rate.map(RateLimiter::new);
        Ok(Self { poster: receiver.into_poster()?, limits, connections, rate })
    }
}

/// The target of the next post, where it is another one.
pub(super) type NextTarget = Arc<Mutex<Option<Target>>>;

/// Settings of the deliveries.
pub(super) struct PostOptions {
    pub(super) target: Target,
    pub(super) next: NextTarget,
    pub(super) key: CurrentKey,
    pub(super) status: Arc<SpoolStatus>,
    pub(super) set_aside: SetAside,
    pub(super) runtime: Handle,
    pub(super) clock: Clock,
}

/// The sink.
pub(super) struct PostSink {
    options: PostOptions,
    /// Batches that are to be posted, the oldest first.
    batches: VecDeque<Batch>,
    /// The batch that is being filled.
    open: Collector,
    /// Time at which its first line was collected.
    opened_at: Option<Instant>,
    /// Bytes of everything that was collected.
    collected: usize,
}

/// What to do with a batch after a post.
enum Outcome {
    /// The receiver has it.
    Delivered(Delivered),
    /// The receiver refuses it, and would take others.
    Refused(Undelivered),
    /// It is posted again.
    Failed(SinkError),
}

impl PostSink {
    pub(super) fn new(options: PostOptions) -> Self {
        Self { options, batches: VecDeque::new(), open: Collector::default(), opened_at: None, collected: 0 }
    }

    fn close_batch(&mut self) {
        self.batches.extend(self.open.take());
        self.opened_at = None;
    }

    /// Posts as many batches at once as there are connections, and keeps those that were not taken.
    fn post_some(&mut self) -> Result<(), SinkError> {
        if let Some(next) = self.options.next.lock().take() {
            self.options.target = next;
        }
        let count = self.options.target.connections.min(self.batches.len());
        let batches: Vec<Batch> = self.batches.drain(..count).collect();
        if let Some(rate) = &mut self.options.target.rate {
            let events = batches.iter().map(|batch| batch.events).sum();
            std::thread::sleep(rate.wait(events, Instant::now()));
        }
        let key = self.options.key.read().clone();
        let posts: Vec<_> = batches
            .iter()
            .map(|batch| {
                let (poster, key, body) =
                    (self.options.target.poster.clone(), key.clone(), Bytes::from(batch.body.clone()));
                self.options.runtime.spawn(async move {
                    let encoded = tokio::task::spawn_blocking(move || encode(&signed(&body, key.as_deref())))
                        .await
                        .map_err(Error::other);
                    let body = encoded.flatten().map_err(Undelivered::Encode)?;
                    let attempt = poster.attempt(body.into()).await;
                    Ok((attempt.result, attempt.retry_after))
                })
            })
            .collect();
        let mut failed = None;
        let mut rest = Vec::new();
        for (batch, post) in batches.into_iter().zip(posts) {
            let posted =
                self.options.runtime.block_on(post).map_err(|error| Undelivered::Encode(Error::other(error)));
            let (result, retry_after) = match posted.flatten() {
                Ok(posted) => posted,
                Err(error) => (Err(error), None),
            };
            match self.settle(&batch, result, retry_after) {
                Outcome::Delivered(_) => {}
                Outcome::Refused(error) => {
                    let (parts, problem) = self.take_apart(&batch, &error);
                    rest.extend(parts);
                    failed = failed.or(problem);
                }
                Outcome::Failed(error) => {
                    rest.push(batch);
                    failed = failed.or(Some(error));
                }
            }
        }
        rest.into_iter().rev().for_each(|batch| self.batches.push_front(batch));
        failed.map_or(Ok(()), Err)
    }

    /// Records the result of a post, and decides what follows.
    fn settle(
        &self,
        batch: &Batch,
        result: Result<Delivered, Undelivered>,
        retry_after: Option<Duration>,
    ) -> Outcome {
        let code = match &result {
            Ok(delivered) => Some(delivered.status),
            Err(error) => error.status(),
        };
        let outcome = match result {
            Ok(delivered) => Outcome::Delivered(delivered),
            Err(error @ Undelivered::Refused { status: 400 | 413 | 422, .. }) => Outcome::Refused(error),
            Err(error) => {
                let is_final = is_final(&error);
                let kind = match &error {
                    _ if is_final => ErrorKind::InvalidInput,
                    Undelivered::NoAnswer(ClientError::Connect { .. }) => ErrorKind::ConnectionRefused,
                    Undelivered::NoAnswer(ClientError::Timeout { .. }) => ErrorKind::TimedOut,
                    Undelivered::NoAnswer(ClientError::Interrupted { .. }) => ErrorKind::ConnectionReset,
                    _ => ErrorKind::Other,
                };
                let asked = retry_after.map(|asked| asked.min(LONGEST_RETRY_AFTER));
                let retry_after = if is_final { Some(PAUSE) } else { asked };
                let cause = Error::new(kind, error.to_string());
                Outcome::Failed(SinkError { retry_after, ..SinkError::new("cannot post".to_owned(), cause) })
            }
        };
        let now = (self.options.clock.wall)();
        self.options.status.update(|state| {
            state.last_attempt_at = Some(now);
            state.last_response_code = code;
            (state.last_error, state.is_paused) = match &outcome {
                Outcome::Delivered(_) => (None, false),
                Outcome::Refused(error) => (Some(error.to_string()), false),
                Outcome::Failed(error) => {
                    (Some(error.cause.to_string()), error.cause.kind() == ErrorKind::InvalidInput)
                }
            };
            if let Outcome::Delivered(delivered) = &outcome {
                state.batches += 1;
                state.events += batch.events as u64;
                state.receipts.add(delivered.receipt.unwrap_or_default());
            }
        });
        if let Outcome::Delivered(Delivered { receipt: Some(receipt), .. }) = &outcome
            && receipt.quarantined > 0
        {
            tracing::warn!(
                code = "spool-quarantined",
                lines = receipt.quarantined,
                "the receiver has put {lines} lines into its quarantine; its output says why",
                lines = receipt.quarantined
            );
        }
        outcome
    }

    /// Halves a batch that is too large for the receiver, and sets aside what it will never take.
    fn take_apart(&self, batch: &Batch, error: &Undelivered) -> (Vec<Batch>, Option<SinkError>) {
        let is_too_large = error.status() == Some(413);
        if is_too_large && batch.events > 1 {
            let mut halves = [Collector::default(), Collector::default()];
            for (at, line) in lines_of(batch).enumerate() {
                halves[usize::from(at >= batch.events / 2)].push(line);
            }
            return (halves.iter_mut().filter_map(Collector::take).collect(), None);
        }
        let reason = if is_too_large { Reason::LineTooLong } else { Reason::Malformed };
        for (at, line) in lines_of(batch).enumerate() {
            if let Err(cause) = (self.options.set_aside)(line, reason, error.to_string()) {
                let mut rest = Collector::default();
                lines_of(batch).skip(at).for_each(|line| rest.push(line));
                let failed = SinkError::new("cannot set lines aside".to_owned(), Error::other(cause));
                return (rest.take().into_iter().collect(), Some(failed));
            }
            self.options.status.update(|state| state.refused += 1);
        }
        tracing::error!(
            code = "spool-refused",
            events = batch.events,
            "the receiver will not take {events} lines, which are set aside: {error}",
            events = batch.events
        );
        (Vec::new(), None)
    }
}

impl Sink for PostSink {
    fn resume(&mut self, last: &Resume) -> Result<Resume, SinkError> {
        self.batches.clear();
        self.open = Collector::default();
        (self.opened_at, self.collected) = (None, 0);
        Ok(last.clone())
    }

    fn push(&mut self, item: &Item<'_>) {
        if !self.open.fits(item.raw, &self.options.target.limits) {
            self.close_batch();
        }
        self.opened_at.get_or_insert_with(Instant::now);
        self.open.push(item.raw);
        self.collected += item.raw.len();
        if self.open.is_full(&self.options.target.limits) {
            self.close_batch();
        }
    }

    fn collected(&self) -> usize {
        self.collected
    }

    fn chunk(&self) -> usize {
        let BatchLimits { events, bytes, .. } = self.options.target.limits;
        bytes.min(events.saturating_mul(TYPICAL_EVENT)).saturating_mul(self.options.target.connections)
    }

    fn flush(&mut self, behind: Position, at_once: bool) -> Result<Option<Resume>, SinkError> {
        let lingers =
            self.opened_at.is_some_and(|opened| opened.elapsed() < self.options.target.limits.linger);
        if !at_once && lingers && self.batches.is_empty() {
            return Ok(None);
        }
        self.close_batch();
        while !self.batches.is_empty() {
            self.post_some()?;
        }
        self.collected = 0;
        Ok(Some(Resume { position: behind, mark: Vec::new() }))
    }
}

/// Returns whether no repetition changes an error, until an operator does.
fn is_final(error: &Undelivered) -> bool {
    match error {
        // A server or a proxy that is down or overloaded, or was too slow.
        Undelivered::Refused { status: 408 | 425 | 429 | 500..=599, .. } => false,
        Undelivered::Refused { .. } => true,
        error => error.concerns_every_batch(),
    }
}

fn lines_of(batch: &Batch) -> impl Iterator<Item = &[u8]> {
    lines(&batch.body)
}

/// Signs each line of a body.
fn signed(body: &[u8], key: Option<&SigningKey>) -> Vec<u8> {
    let Some(key) = key else { return body.to_vec() };
    let mut signed = Collector::default();
    for line in lines(body) {
        let mut line = line.to_vec();
        // A line that is no event was never taken into the spool; the receiver would say so.
        let _ = sign_line(&mut line, key);
        signed.push(&line);
    }
    signed.take().map_or_else(Vec::new, |batch| batch.body)
}

#[cfg(test)]
mod tests;
