//! The spool for programs that send their own events.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;

use super::{Deliveries, Intake, RECEIVER, Spool, SpoolError, SpoolOptions, Target, prepare};
use crate::clock::Clock;
use crate::deliver::sink::SinkError;
use crate::deliver::worker::Watcher;
use crate::ledger::Pending;
use crate::send::{BatchLimits, Builder, OwnRuntime, SendError, line};
use crate::wire::event::{Event, Format};

/// Name of the only input.
const PROGRAM: &str = "program";

/// A sender with a spool: an event that it has taken survives the end of the program, a crash and a
/// power loss, and weeks without a receiver. Many tasks and threads can share it by reference.
///
/// ```no_run
/// use std::path::Path;
/// use std::time::Duration;
///
/// use auditgate::send::{SigningKey, complete};
/// use auditgate::wire::event::{Event, Value};
/// use auditgate::{send, spool};
///
/// # async fn produce() -> Result<(), Box<dyn std::error::Error>> {
/// let receiver = send::Sender::builder("https://audit.example.com:8443/konnect/us".parse()?)
///     .authorization("Bearer abc")
///     .signing_key(SigningKey::read(Path::new("keys/signing-key.pem"))?);
/// let sender = spool::Sender::open(Path::new("/var/lib/example/audit"), 1 << 30, receiver)?;
///
/// let mut event = Event::new();
/// event.set("name", Value::Text("Ingress".to_owned()));
/// complete(&mut event, 1_767_323_045_678);
/// // When this returns, the event is on the disk.
/// sender.enqueue(&event).await?;
///
/// let waiting = sender.close(Duration::from_secs(5)).await?;
/// println!("{waiting} events wait for the next start");
/// # Ok(())
/// # }
/// ```
///
/// Events are signed when they are posted. A batch is posted until the receiver has it, in the order
/// of the events unless [`Builder::connections`] says otherwise; [`Builder::retry`] and the
/// observers have no effect here. An event that the receiver will never take is set aside in
/// `rejects.jsonl` in the directory. What happens is logged with [`tracing`], and
/// [`deliveries`](Sender::deliveries) has the present state.
///
/// It has threads of its own and needs no runtime. Dropping it closes it as well, without time for
/// posts, and blocks for that.
pub struct Sender {
    intake: Intake,
    /// Taken when it is closed.
    spool: Option<Spool>,
    format: Format,
    limits: BatchLimits,
    /// Behind the spool, whose posts it runs.
    runtime: OwnRuntime,
}

/// What happens is in the log and in [`Deliveries`].
pub(super) struct Unwatched;

impl Watcher for Unwatched {
    fn working(&self, _sink: &str, _is_working: bool) {}
    fn delivered(&self, _sink: &str, _events: u64) {}
    fn truncated(&self, _sink: &str, _lines: u64) {}
    fn failed(&self, _sink: &str, _error: &SinkError) {}
    fn recovered(&self, _sink: &str) {}
}

impl Sender {
    /// Opens the spool of a directory, which is created if only its parent exists and which no other
    /// process uses, and begins to post what waits in it. At `size` bytes that wait,
    /// [`enqueue`](Self::enqueue) waits too.
    ///
    /// # Errors
    /// [`SpoolError::Open`], and [`SpoolError::Send`] for the settings of the receiver.
    pub fn open(directory: &Path, size: u64, mut receiver: Builder) -> Result<Self, SpoolError> {
        let runtime = OwnRuntime::start().map_err(SendError::Thread)?;
        let (format, limits) = (receiver.format, receiver.batch);
        let options = SpoolOptions {
            data_dir: directory.to_owned(),
            size,
            inputs: vec![PROGRAM.to_owned()],
            key: Arc::new(RwLock::new(receiver.signing_key.take().map(Arc::new))),
            target: Target::new(receiver, None)?,
            clock: Clock::system(),
        };
        let spool = {
            let _inside = runtime.handle().enter();
            Spool::open(options, &|| Box::new(Unwatched), Arc::new(|_, _| {}))?
        };
        Ok(Self { intake: spool.intake.clone(), spool: Some(spool), format, limits, runtime })
    }

    /// Takes an event: returns when it is on the disk, and waits while the spool is full. An event
    /// that was taken before is not taken twice, since a receiver would not either.
    ///
    /// A future that is dropped may have taken the event.
    ///
    /// # Errors
    /// [`SpoolError::Send`] for an event that has no form in the sender's format,
    /// [`SpoolError::Storage`] and [`SpoolError::Closed`].
    pub async fn enqueue(&self, event: &Event) -> Result<(), SpoolError> {
        self.commit(vec![self.line(event)?]).await
    }

    fn line(&self, event: &Event) -> Result<Vec<u8>, SendError> {
        let line = line(self.format, event, None)?;
        self.limits.admit(&line)?;
        Ok(line)
    }

    /// Takes lines in one transaction.
    async fn commit(&self, lines: Vec<Vec<u8>>) -> Result<(), SpoolError> {
        let intake = self.intake.clone();
        let commit = self.runtime.handle().spawn(async move {
            intake.room().await;
            let batch = prepare::events(&intake.ledger, &PROGRAM.into(), (intake.clock.wall)(), &lines);
            intake.ledger.commit(batch).await
        });
        commit.await.map_err(|_| SpoolError::Closed)??;
        Ok(())
    }

    /// Takes an event as [`enqueue`](Self::enqueue) does, in a program without a runtime.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// On a thread of an asynchronous runtime, which it would block.
    pub fn blocking_enqueue(&self, event: &Event) -> Result<(), SpoolError> {
        self.runtime.handle().block_on(self.enqueue(event))
    }

    /// Returns what is known about the deliveries since the spool was opened.
    pub fn deliveries(&self) -> Deliveries {
        self.intake.status.read()
    }

    /// Returns the number of events that the receiver does not have yet. Reads the disk.
    ///
    /// # Errors
    /// [`SpoolError::Storage`].
    pub fn waiting(&self) -> Result<u64, SpoolError> {
        number(self.intake.ledger.pending(RECEIVER))
    }

    /// Gives the posts of what waits that time, and closes the spool. Returns the number of events
    /// that wait for the next start.
    ///
    /// # Errors
    /// [`SpoolError::Storage`] when what waits cannot be read.
    pub async fn close(mut self, time: Duration) -> Result<u64, SpoolError> {
        let spool = self.spool.take().ok_or(SpoolError::Closed)?;
        let closed = self.runtime.handle().spawn_blocking(move || spool.close(Some(time)));
        number(closed.await.map_err(|_| SpoolError::Closed)?)
    }

    /// Closes the spool as [`close`](Self::close) does, in a program without a runtime.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As [`blocking_enqueue`](Self::blocking_enqueue).
    pub fn blocking_close(self, time: Duration) -> Result<u64, SpoolError> {
        let runtime = self.runtime.handle().clone();
        runtime.block_on(self.close(time))
    }
}

fn number(pending: Result<Pending, rusqlite::Error>) -> Result<u64, SpoolError> {
    pending.map(|pending| pending.events).map_err(|error| SpoolError::Storage(error.to_string()))
}

impl Drop for Sender {
    fn drop(&mut self) {
        if let Some(spool) = self.spool.take() {
            let _ = spool.close(Some(Duration::ZERO));
        }
    }
}

/// Time for the posts of what an audit layer leaves behind.
#[cfg(feature = "layer")]
const LAYER_DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

#[cfg(feature = "layer")]
impl crate::send::layer::Destination for Sender {
    /// Number of events that wait for the next start.
    type Summary = u64;
    type Error = SpoolError;

    /// In one transaction: a service that logs much is not held by the disk at each event.
    async fn take(&self, events: &[Event]) -> u64 {
        let lines: Vec<_> = events.iter().filter_map(|event| self.line(event).ok()).collect();
        let taken = lines.len();
        let is_committed = taken == 0 || self.commit(lines).await.is_ok();
        (events.len() - if is_committed { taken } else { 0 }) as u64
    }

    /// Gives the posts five seconds.
    async fn close(self) -> Result<u64, SpoolError> {
        Self::close(self, LAYER_DRAIN_TIMEOUT).await
    }
}

#[cfg(test)]
mod tests;
