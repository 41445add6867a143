//! The producer's side of the wire: events are formatted, signed, batched, compressed, posted and
//! posted again, as Kong Konnect does it.
//!
//! ```no_run
//! use std::path::Path;
//!
//! use auditgate::net::Endpoint;
//! use auditgate::send::{Sender, SigningKey, complete};
//! use auditgate::wire::event::{Event, Value};
//!
//! # async fn produce() -> Result<(), Box<dyn std::error::Error>> {
//! let endpoint: Endpoint = "https://audit.example.com:8443/konnect/us".parse()?;
//! let sender = Sender::builder(endpoint)
//!     .authorization("Bearer abc")
//!     .signing_key(SigningKey::read(Path::new("keys/signing-key.pem"))?)
//!     .build()?;
//!
//! let mut event = Event::new();
//! event.set("name", Value::Text("Ingress".to_owned()));
//! event.set("rt", Value::Number("1767323045678".to_owned()));
//! event.set("trace_id", Value::Text("4891823477".to_owned()));
//! event.set("user_agent", Value::Text("example/1.0".to_owned()));
//! event.set("src", Value::Text("192.0.2.7".to_owned()));
//! complete(&mut event, 1_767_323_045_678);
//! // When this returns, the receiver has the event.
//! let delivered = sender.send(&event).await?;
//! println!("{:?}", delivered.receipt);
//!
//! let summary = sender.close().await?;
//! assert_eq!(summary.events, summary.delivered);
//! # Ok(())
//! # }
//! ```
//!
//! One background task owns the batch that is being filled and every post. [`Sender::enqueue`] hands
//! it a line through a bounded queue and waits while the queue is full, so that a slow receiver
//! slows the producer instead of filling its memory; it returns a [`Delivery`], which resolves when
//! the receiver has the event. [`Sender::send`] does both. Many that wait at the same time share
//! batches. A batch that cannot be delivered does not stop the next.
//!
//! [`blocking::Sender`] is for programs without a runtime, and `layer::AuditLayer` (feature `layer`)
//! for events of [`tracing`](https://docs.rs/tracing).

mod batch;
pub mod blocking;
mod builder;
mod complete;
#[cfg(test)]
mod exchanges;
#[cfg(feature = "layer")]
pub mod layer;
mod own_runtime;
mod post;
#[cfg(feature = "spool")]
mod rate;
#[cfg(test)]
pub(crate) mod receiver;
mod retry;
#[doc(hidden)]
pub mod sample;
mod sign;

use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until};

pub use batch::{BatchLimits, LineError};
pub use builder::Builder;
pub use complete::complete;
pub use post::{Delivered, Receipt, RetryObserver, Retrying, Undelivered};
pub use retry::Retry;
pub use sign::{KeyError, SignError, SigningKey, line};
#[doc(hidden)]
pub use sign::{prepare, sign_line};

pub use crate::wire::cef::WriteError;

use crate::net::{Endpoint, TlsError};
use crate::wire::event::{Event, Format};
pub(crate) use batch::{Batch, Collector};
#[cfg(feature = "spool")]
pub(crate) use own_runtime::OwnRuntime;
pub(crate) use post::Poster;
#[cfg(feature = "spool")]
pub(crate) use rate::RateLimiter;
#[cfg(feature = "spool")]
pub(crate) use retry::LONGEST_RETRY_AFTER;

/// Number of lines that are queued between [`Sender::send`] and the batch. Enough to keep the batch
/// filling while the producer pauses; few enough that even the longest lines stay within some
/// hundred MiB.
const QUEUED_LINES: usize = 128;

/// Called with the report of each batch, in the order in which they were settled. It runs on the
/// task that fills the batches, so it must not block.
pub type Observer = Box<dyn FnMut(&Report) + Send>;

/// Result of one batch.
#[derive(Debug)]
#[non_exhaustive]
pub struct Report {
    /// Its number, from 1, in the order of sending.
    pub number: u64,
    /// Number of events in it.
    pub events: usize,
    /// Number of posts.
    pub attempts: u32,
    /// Time from the first post to the last response, with the pauses between.
    pub latency: Duration,
    /// Its lines, each with its terminator, before compression.
    pub lines: Vec<u8>,
    /// The response, or why the batch was given up.
    pub result: Result<Delivered, Arc<Undelivered>>,
}

/// A batch that could not be delivered. Its lines are in the [`Report`] that the observer received.
#[derive(Debug)]
#[non_exhaustive]
pub struct Failed {
    /// Its number, from 1, in the order of sending.
    pub number: u64,
    /// Number of events in it.
    pub events: usize,
    /// Number of posts.
    pub attempts: u32,
    /// Error of the last post.
    pub error: Arc<Undelivered>,
}

/// Totals of a sender.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Summary {
    /// Number of batches.
    pub batches: u64,
    /// Number of events in them.
    pub events: u64,
    /// Number of these that are in delivered batches.
    pub delivered: u64,
    /// The sum of all receipts.
    pub receipts: Receipt,
    /// Number of delivered events that no receipt accounts for, as with a receiver of another make, or
    /// where the response was interrupted behind its status.
    pub without_receipt: u64,
    /// The batches that could not be delivered, in the order in which they were given up.
    pub failed: Vec<Failed>,
}

/// Reason why a sender cannot be created, or does not take an event.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// [`Builder::authorization`] cannot be the value of a header (RFC 9110, section 5.5).
    #[error(
        "the authorization holds a line break or another control character, which no HTTP header can carry"
    )]
    Authorization,
    /// There is no TLS configuration to call out with.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// [`Builder::build`] was called outside a tokio runtime.
    #[error("a sender needs a tokio runtime with time and I/O enabled")]
    NoRuntime,
    /// The system gives no thread for a [`blocking::Sender`].
    #[error("cannot start a thread for the sender: {0}")]
    Thread(std::io::Error),
    /// The event cannot be written as a line. Nothing was queued.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// The line cannot be sent. Nothing was queued.
    #[error("the line cannot be sent: {0}")]
    Line(#[from] LineError),
    /// The batch with the event was given up, for that reason.
    #[error(transparent)]
    Undelivered(Arc<Undelivered>),
    /// The background task has ended, because the runtime shut down or the observer panicked. What
    /// was not reported may or may not have been delivered.
    #[error("the sender has stopped: its runtime was shut down or its observer panicked")]
    Stopped,
}

/// Sends events to one endpoint. Many tasks can share it by reference.
///
/// Dropping it lets the background task send what is queued for as long as the runtime lives, but
/// the result is lost; [`close`](Sender::close) it instead.
pub struct Sender {
    lines: mpsc::Sender<Queued>,
    task: JoinHandle<Summary>,
    format: Format,
    signing_key: Option<SigningKey>,
    limits: BatchLimits,
}

/// A line in the queue, and where its result is wanted.
struct Queued {
    line: Vec<u8>,
    waiter: oneshot::Sender<Settled>,
}

/// Result of the batch of a line.
type Settled = Result<Delivered, Arc<Undelivered>>;

/// A queued event: resolves when the receiver has it, or when its batch is given up. Dropping it
/// changes nothing about the delivery.
///
/// # Errors
/// [`SendError::Undelivered`] and [`SendError::Stopped`].
#[derive(Debug)]
#[must_use = "only its result says whether the receiver has the event"]
pub struct Delivery(oneshot::Receiver<Settled>);

impl Future for Delivery {
    type Output = Result<Delivered, SendError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map(|settled| match settled {
            Ok(settled) => settled.map_err(SendError::Undelivered),
            Err(_) => Err(SendError::Stopped),
        })
    }
}

impl Sender {
    /// Returns the settings of a sender to a URL, with their defaults.
    pub fn builder(endpoint: Endpoint) -> Builder {
        Builder::new(endpoint)
    }

    /// Formats, signs and queues an event, and waits until the receiver has it: until its batch got
    /// a 2xx, retries and [`BatchLimits::linger`] included. A `sig` that the event has is replaced.
    /// A future that is dropped after the event was queued does not take it back.
    ///
    /// # Errors
    /// [`SendError::Sign`], [`SendError::Line`], [`SendError::Undelivered`] and
    /// [`SendError::Stopped`].
    pub async fn send(&self, event: &Event) -> Result<Delivered, SendError> {
        self.enqueue(event).await?.await
    }

    /// Formats, signs and queues an event; waits while the queue is full. A future that is dropped
    /// before it is ready has queued nothing.
    ///
    /// # Errors
    /// [`SendError::Sign`], [`SendError::Line`] and [`SendError::Stopped`].
    pub async fn enqueue(&self, event: &Event) -> Result<Delivery, SendError> {
        self.enqueue_line(line(self.format, event, self.signing_key.as_ref())?).await
    }

    /// Queues a line, without its terminator, as it is; waits while the queue is full. A future
    /// that is dropped before it is ready has queued nothing.
    ///
    /// # Errors
    /// [`SendError::Line`] and [`SendError::Stopped`].
    pub async fn enqueue_line(&self, line: Vec<u8>) -> Result<Delivery, SendError> {
        self.limits.admit(&line)?;
        let (waiter, settled) = oneshot::channel();
        self.lines.send(Queued { line, waiter }).await.map_err(|_| SendError::Stopped)?;
        Ok(Delivery(settled))
    }

    /// Sends what is left and waits until every batch is delivered or given up, retries included.
    ///
    /// # Errors
    /// [`SendError::Stopped`].
    pub async fn close(self) -> Result<Summary, SendError> {
        drop(self.lines);
        self.task.await.map_err(|_| SendError::Stopped)
    }
}

/// The batches in flight and the totals of the others.
struct Dispatch {
    poster: Poster,
    connections: usize,
    under_way: JoinSet<(Report, Vec<oneshot::Sender<Settled>>)>,
    /// Where the results of the lines in the batch that is being filled are wanted.
    waiters: Vec<oneshot::Sender<Settled>>,
    observer: Option<Observer>,
    summary: Summary,
}

/// Runs the background task: fills batches until the last [`Sender`] is dropped.
async fn run(mut queue: mpsc::Receiver<Queued>, limits: BatchLimits, mut dispatch: Dispatch) -> Summary {
    let mut collector = Collector::default();
    let mut deadline = None;
    loop {
        let linger = async {
            match deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => pending().await,
            }
        };
        let next = tokio::select! {
            // What is queued goes before the deadline, so that a linger of zero still fills
            // batches.
            biased;
            Some(settled) = dispatch.under_way.join_next() => {
                dispatch.settle(settled);
                continue;
            }
            line = queue.recv() => line.map(Some),
            () = linger => Some(None),
        };
        match next {
            Some(Some(Queued { line, waiter })) => {
                if !collector.fits(&line, &limits) {
                    dispatch.start(collector.take()).await;
                    deadline = None;
                }
                collector.push(&line);
                dispatch.waiters.push(waiter);
                if collector.is_full(&limits) {
                    dispatch.start(collector.take()).await;
                    deadline = None;
                } else if deadline.is_none() {
                    deadline = Some(after(limits.linger));
                }
            }
            Some(None) => {
                dispatch.start(collector.take()).await;
                deadline = None;
            }
            None => {
                dispatch.start(collector.take()).await;
                dispatch.finish(0).await;
                return dispatch.summary;
            }
        }
    }
}

/// Returns the end of a linger time, bounded by what tokio's clock can hold.
fn after(linger: Duration) -> Instant {
    const A_YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    Instant::now() + linger.min(A_YEAR)
}

impl Dispatch {
    /// Waits for a free connection and starts the delivery.
    async fn start(&mut self, batch: Option<Batch>) {
        let Some(batch) = batch else { return };
        self.finish(self.connections - 1).await;
        self.summary.batches += 1;
        let (number, events, poster) = (self.summary.batches, batch.events, self.poster.clone());
        let waiters = std::mem::take(&mut self.waiters);
        self.under_way.spawn(async move {
            let began = Instant::now();
            let (attempts, lines, result) = poster.deliver(number, batch).await;
            let (latency, result) = (began.elapsed(), result.map_err(Arc::new));
            (Report { number, events, attempts, latency, lines, result }, waiters)
        });
    }

    /// Waits until no more than that many deliveries are under way.
    async fn finish(&mut self, remaining: usize) {
        while self.under_way.len() > remaining
            && let Some(settled) = self.under_way.join_next().await
        {
            self.settle(settled);
        }
    }

    fn settle(&mut self, settled: Result<(Report, Vec<oneshot::Sender<Settled>>), tokio::task::JoinError>) {
        let (report, waiters) = match settled {
            Ok(settled) => settled,
            // Nothing cancels a delivery but the end of the runtime, which also ends this task; a
            // panic is a bug and must not pass for a batch that never was.
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => return,
            },
        };
        if let Some(observer) = &mut self.observer {
            observer(&report);
        }
        let Report { number, events, attempts, result, .. } = report;
        for waiter in waiters {
            // A delivery that was dropped is not waited for.
            let _ = waiter.send(result.clone());
        }
        let summary = &mut self.summary;
        let count = u64::try_from(events).unwrap_or(u64::MAX);
        summary.events += count;
        match result {
            Ok(Delivered { receipt, .. }) => {
                summary.delivered += count;
                match receipt {
                    Some(receipt) => summary.receipts.add(receipt),
                    None => summary.without_receipt += count,
                }
            }
            Err(error) => summary.failed.push(Failed { number, events, attempts, error }),
        }
    }
}

impl Receipt {
    /// Adds receipts. The numbers come from a foreign host, so they may be anything.
    pub(crate) fn add(&mut self, other: Self) {
        self.accepted = self.accepted.saturating_add(other.accepted);
        self.duplicates = self.duplicates.saturating_add(other.duplicates);
        self.quarantined = self.quarantined.saturating_add(other.quarantined);
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::sync::{Arc, Mutex};

    use super::receiver::{Answer, Receiver};
    use super::*;

    const LIMITS: BatchLimits = BatchLimits { events: 500, bytes: 1 << 20, linger: Duration::MAX };

    fn builder(receiver: &Receiver) -> Builder {
        Sender::builder(receiver.endpoint())
            .batch(LIMITS)
            .retry(Retry { minimum: Duration::ZERO, ..Retry::default() })
    }

    fn sizes(receiver: &Receiver) -> Vec<usize> {
        receiver.requests().iter().map(|request| request.lines().len()).collect()
    }

    #[tokio::test]
    async fn events_arrive_signed_in_order_and_in_batches() {
        let receiver = Receiver::start([Answer::receipt(4, 0, 0), Answer::receipt(1, 2, 1)]);
        let key = SigningKey::from_seed(&[1; 32]);
        let events: Vec<Event> = sample::Samples::new(rand::rng(), || 1_767_323_045_678).take(8).collect();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        let mut builder = builder(&receiver);
        builder =
            builder.batch(BatchLimits { events: 4, ..LIMITS }).format(Format::Json).signing_key(key.clone());
        builder = builder.observer(Box::new(move |report| {
            sink.lock().unwrap().push((report.number, report.events, report.attempts, report.lines.len()));
        }));
        let sender = builder.build().unwrap();
        for event in &events {
            drop(sender.enqueue(event).await.unwrap());
        }
        let summary = sender.close().await.unwrap();
        let arrived: Vec<String> = receiver.requests().iter().flat_map(receiver::Request::lines).collect();
        let wanted: Vec<String> = events
            .iter()
            .map(|event| String::from_utf8(line(Format::Json, event, Some(&key)).unwrap()).unwrap())
            .collect();
        assert_eq!(arrived, wanted);
        assert_eq!((summary.batches, summary.events, summary.delivered), (2, 8, 8));
        assert_eq!(summary.receipts, Receipt { accepted: 5, duplicates: 2, quarantined: 1 });
        let bytes = |lines: &[String]| lines.iter().map(|line| line.len() + 1).sum::<usize>();
        assert_eq!(*seen.lock().unwrap(), [(1, 4, 1, bytes(&wanted[..4])), (2, 4, 1, bytes(&wanted[4..]))]);
    }

    #[tokio::test]
    async fn no_body_is_longer_than_its_limit() {
        let receiver = Receiver::start([Answer::receipt(0, 0, 0)]);
        let mut builder = builder(&receiver);
        builder = builder.batch(BatchLimits { bytes: 10, ..LIMITS });
        let sender = builder.build().unwrap();
        for line in ["aaaa", "bbbb", "cccccc", "dd", "eeeeeeeee", "f"] {
            drop(sender.enqueue_line(line.into()).await.unwrap());
        }
        let error = sender.enqueue_line(b"gggggggggg".to_vec()).await.unwrap_err();
        assert!(matches!(error, SendError::Line(LineError::TooLong { bytes: 11, limit: 10 })), "{error}");
        sender.close().await.unwrap();
        assert_eq!(sizes(&receiver), [2, 2, 1, 1]);
    }

    #[tokio::test]
    async fn a_lingering_event_is_sent_without_another_one() {
        let receiver = Receiver::start([Answer::receipt(1, 0, 0)]);
        let (settled, mut reports) = mpsc::unbounded_channel();
        let mut builder = builder(&receiver);
        builder = builder.batch(BatchLimits { linger: Duration::ZERO, ..LIMITS });
        builder = builder.observer(Box::new(move |report| settled.send(report.events).unwrap()));
        let sender = builder.build().unwrap();
        for _ in 0..2 {
            drop(sender.enqueue_line(b"x".to_vec()).await.unwrap());
            assert_eq!(reports.recv().await, Some(1));
        }
        assert_eq!(sender.close().await.unwrap().batches, 2);
    }

    #[tokio::test]
    async fn a_lost_batch_is_listed_and_does_not_stop_the_others() {
        let receiver = Receiver::start([Answer::new(400, "", "no"), Answer::new(200, "", "thanks")]);
        let mut builder = builder(&receiver);
        builder = builder.batch(BatchLimits { events: 2, ..LIMITS });
        let sender = builder.build().unwrap();
        for line in ["a", "b", "c"] {
            drop(sender.enqueue_line(line.into()).await.unwrap());
        }
        let summary = sender.close().await.unwrap();
        assert_eq!((summary.batches, summary.events, summary.delivered), (2, 3, 1));
        assert_eq!(summary.without_receipt, 1);
        let [failed] = summary.failed.as_slice() else { panic!("{summary:?}") };
        assert_eq!((failed.number, failed.events, failed.attempts), (1, 2, 1));
        assert!(failed.error.to_string().ends_with("answered 400 (no)"), "{}", failed.error);
    }

    #[tokio::test]
    async fn several_connections_deliver_everything() {
        let receiver = Receiver::start([Answer::new(500, "", ""), Answer::receipt(1, 0, 0)]);
        let mut builder = builder(&receiver);
        builder =
            builder.batch(BatchLimits { events: 1, ..LIMITS }).connections(NonZeroUsize::new(4).unwrap());
        let sender = builder.build().unwrap();
        for number in 0..20 {
            drop(sender.enqueue_line(number.to_string().into()).await.unwrap());
        }
        let summary = sender.close().await.unwrap();
        assert_eq!((summary.delivered, summary.receipts.accepted), (20, 20));
        assert_eq!(receiver.requests().len(), 21);
    }

    #[tokio::test]
    async fn a_panic_of_the_observer_is_an_error() {
        let receiver = Receiver::start([Answer::receipt(1, 0, 0)]);
        let mut builder = builder(&receiver);
        builder = builder.observer(Box::new(|_| panic!("observer")));
        let sender = builder.build().unwrap();
        drop(sender.enqueue_line(b"x".to_vec()).await.unwrap());
        assert!(matches!(sender.close().await, Err(SendError::Stopped)));
    }

    #[test]
    fn a_sender_needs_a_runtime() {
        let receiver = Receiver::start([]);
        assert!(matches!(builder(&receiver).build(), Err(SendError::NoRuntime)));
    }
}
