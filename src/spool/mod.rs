//! The producer's lines on disk until the receiver has them: inputs are read, completed and
//! committed to a ledger, from which one sink posts them.
//!
//! It is the receiver's ledger used the other way. A line and the checkpoint of its input are one
//! transaction, so that after a crash each input is read from where the ledger has it; a line is
//! forgotten only after the receiver's 200. Lines that cannot be sent are the quarantine: a file
//! sink takes them.

#[doc(hidden)]
pub mod input;
mod post;
mod prepare;
mod sender;
mod status;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::Handle;

use self::input::{Chunk, Input};
#[doc(hidden)]
pub use self::post::{CurrentKey, Target};
use self::post::{NextTarget, PostOptions, PostSink};
#[doc(hidden)]
pub use self::prepare::Treatment;
use self::prepare::{batch, rejected};
pub use self::sender::Sender;
pub use self::status::Deliveries;
#[doc(hidden)]
pub use self::status::SpoolStatus;
use crate::clock::Clock;
use crate::deliver::file::{FileOptions, FileSink, Rendering};
use crate::deliver::worker::Watcher;
use crate::deliver::workers::Workers;
use crate::ledger::{
    Backlog, CommitError, CommitReceipt, Failed, Ledger, LedgerOptions, OpenError, Pending, Running,
    Subscription, Window,
};
use crate::log_throttle::log_throttled;
use crate::send::SendError;
use crate::wire::event::Stream;

/// Name of the sink that posts.
#[doc(hidden)]
pub const RECEIVER: &str = "receiver";
/// Name of the sink of the lines that cannot be sent.
#[doc(hidden)]
pub const REJECTS: &str = "rejects";
/// File of these lines, in the spool's directory.
#[doc(hidden)]
pub const REJECTS_FILE: &str = "rejects.jsonl";

/// Time for which a line is remembered. An input that shows a line again, such as a file that was
/// copied, or a producer that writes again after its own crash, sends it once; a receiver would
/// say so anyway, but only while it remembers.
const WINDOW: Duration = Duration::from_secs(8 * 86_400);

/// Maximum time that an input waits for a line, between two checks of whether the spool ends.
const READ_TIMEOUT: Duration = Duration::from_millis(500);

/// Pause of an input while the spool is full or cannot be written, or after it failed.
const HELD_PAUSE: Duration = Duration::from_millis(200);

/// Settings of a spool.
#[doc(hidden)]
pub struct SpoolOptions {
    /// Directory of the ledger and of the lines that cannot be sent.
    pub data_dir: PathBuf,
    /// Bytes that may wait; at that, no input is read.
    pub size: u64,
    /// Names of the inputs.
    pub inputs: Vec<String>,
    /// Where lines are posted.
    pub target: Target,
    /// The key that signs.
    pub key: CurrentKey,
    /// The clocks.
    pub clock: Clock,
}

/// An open spool.
#[doc(hidden)]
pub struct Spool {
    ledger: Ledger,
    running: Running,
    workers: Workers,
    inputs: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    status: Arc<SpoolStatus>,
    intake: Intake,
    next_target: NextTarget,
}

/// Reason why a spool cannot be opened or does not take an event.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpoolError {
    /// Its directory cannot be used.
    #[error(transparent)]
    Open(Box<dyn std::error::Error + Send + Sync>),
    /// The settings of the sender cannot be used, or the event cannot be written as a line.
    #[error(transparent)]
    Send(#[from] SendError),
    /// The disk cannot be written, as when it is full, or read. An event that was to be taken is not
    /// in the spool; a later attempt may succeed.
    #[error("the disk of the spool failed: {0}")]
    Storage(String),
    /// The spool was closed, or what is on the disk can no longer be trusted: open it again. It is
    /// not known whether the event is in it.
    #[error("the spool is closed; open it again")]
    Closed,
}

impl From<OpenError> for SpoolError {
    fn from(error: OpenError) -> Self {
        Self::Open(Box::new(error))
    }
}

impl From<CommitError> for SpoolError {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::Storage(cause) => Self::Storage(cause),
            CommitError::Closed => Self::Closed,
        }
    }
}

/// What the thread of an input needs.
#[derive(Clone)]
struct Intake {
    ledger: Ledger,
    size: u64,
    runtime: Handle,
    clock: Clock,
    stop: Arc<AtomicBool>,
    status: Arc<SpoolStatus>,
    taken: Taken,
}

/// Is told of what was committed of an input.
#[doc(hidden)]
pub type Taken = Arc<dyn Fn(&str, &CommitReceipt) + Send + Sync>;

impl Spool {
    /// Opens the spool and begins to post what is in it.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(
        options: SpoolOptions,
        watcher: &dyn Fn() -> Box<dyn Watcher>,
        taken: Taken,
    ) -> Result<Self, OpenError> {
        let runtime = Handle::current();
        let subscription = |sink: &str, kind, stream| Subscription {
            sink: sink.to_owned(),
            kind,
            streams: vec![stream],
            sources: None,
            skips: false,
        };
        let receiver = subscription(RECEIVER, "http", Stream::Unverified);
        let rejects = subscription(REJECTS, "file", Stream::Quarantine);
        let window = Window { events: WINDOW, rejects: WINDOW };
        // Rejected lines have no share of their own: the inputs are the operator's.
        let (ledger, running) = Ledger::open(LedgerOptions {
            data_dir: options.data_dir.clone(),
            subscriptions: vec![receiver.clone(), rejects.clone()],
            backlog: Backlog { bytes: options.size, quarantine_bytes: options.size },
            windows: options.inputs.iter().map(|input| (input.clone(), window)).collect::<BTreeMap<_, _>>(),
            clock: options.clock.clone(),
        })?;
        let status = Arc::<SpoolStatus>::default();
        let stop = Arc::<AtomicBool>::default();
        let intake = Intake {
            ledger: ledger.clone(),
            size: options.size,
            runtime: runtime.clone(),
            clock: options.clock.clone(),
            stop: Arc::clone(&stop),
            status: Arc::clone(&status),
            taken,
        };
        let next_target = NextTarget::default();
        let aside = intake.clone();
        let input = options.inputs.first().cloned().unwrap_or_default();
        let sink = PostSink::new(PostOptions {
            target: options.target,
            next: Arc::clone(&next_target),
            key: options.key,
            status: Arc::clone(&status),
            set_aside: Box::new(move |line, reason, detail| {
                let batch = rejected(&aside.ledger, &input, (aside.clock.wall)(), line, reason, detail);
                let committed = aside.runtime.block_on(aside.ledger.commit(batch));
                committed.map(|_| ()).map_err(|error| error.to_string())
            }),
            runtime,
            clock: options.clock.clone(),
        });
        let mut workers = Workers::default();
        let no_thread = |cause| OpenError::Io { path: options.data_dir.clone(), cause };
        workers.start(receiver, Box::new(sink), &ledger, watcher()).map_err(no_thread)?;
        let mut file = FileOptions::new(options.data_dir.join(REJECTS_FILE), Rendering::Json);
        file.fill_in(true);
        let file = FileSink::new(file, (None, None), options.clock.wall);
        workers.start(rejects, Box::new(file), &ledger, watcher()).map_err(no_thread)?;
        Ok(Self { ledger, running, workers, inputs: Vec::new(), stop, status, intake, next_target })
    }

    /// Continues an input where the spool has it, and reads it on a thread of its own.
    ///
    /// # Errors
    /// When it cannot be opened or continued, or the system gives no thread.
    pub fn read(&mut self, name: &str, mut input: Box<dyn Input>, treatment: Treatment) -> io::Result<()> {
        let checkpoint = self.ledger.checkpoint(name).map_err(io::Error::other)?;
        input.resume(checkpoint.as_deref())?;
        let (intake, name) = (self.intake.clone(), Arc::<str>::from(name));
        let thread = std::thread::Builder::new()
            .name(format!("input {name}"))
            .spawn(move || intake.run(&name, &mut *input, treatment))?;
        self.inputs.push(thread);
        Ok(())
    }

    /// Changes where lines are posted, from the next post on.
    pub fn retarget(&self, target: Target) {
        *self.next_target.lock() = Some(target);
    }

    /// Returns what is known about the deliveries.
    pub fn status(&self) -> Arc<SpoolStatus> {
        Arc::clone(&self.status)
    }

    /// Returns the ledger, for its numbers.
    pub fn ledger(&self) -> Ledger {
        self.ledger.clone()
    }

    /// Returns whether every input has ended.
    pub fn is_at_end(&self) -> bool {
        self.inputs.iter().all(JoinHandle::is_finished)
    }

    /// Resolves when the ledger can no longer be used, with the reason.
    pub async fn failed(&mut self) -> Failed {
        let failed = (&mut self.running.failed).await;
        failed.unwrap_or_else(|_| Failed::Untrusted("its thread ended".to_owned()))
    }

    /// Ends the inputs, gives the posts a limited time, or all that they need, and closes the
    /// spool. Returns what still waits for the receiver. Blocks.
    ///
    /// # Errors
    /// When what waits cannot be read.
    pub fn close(self, time: Option<Duration>) -> Result<Pending, rusqlite::Error> {
        self.stop.store(true, Ordering::Relaxed);
        for input in self.inputs {
            let _ = input.join();
        }
        self.workers.finish(&self.ledger, self.running, time);
        self.ledger.pending(RECEIVER)
    }
}

impl Intake {
    /// Reads an input until it ends or the spool does. A chunk is read only after the one before is
    /// committed.
    fn run(&self, name: &Arc<str>, input: &mut dyn Input, treatment: Treatment) {
        while !self.stop.load(Ordering::Relaxed) && !input.is_at_end() {
            if !self.wait_for_room(name) {
                return;
            }
            match input.read(READ_TIMEOUT) {
                Ok(chunk) if chunk == Chunk::default() => {}
                Ok(chunk) => {
                    if self.take(name, &chunk, treatment).is_err() {
                        return;
                    }
                }
                Err(error) => {
                    log_throttled!(
                        warn,
                        name,
                        code = "input-failed",
                        input = &**name,
                        "input \"{name}\": {error}; retrying"
                    );
                    std::thread::sleep(HELD_PAUSE);
                }
            }
        }
    }

    /// Waits while the spool is full. Returns false when it ends meanwhile.
    fn wait_for_room(&self, name: &str) -> bool {
        if !self.is_full() {
            return true;
        }
        log_throttled!(
            warn,
            name,
            code = "spool-full",
            input = name,
            "the spool is full; input \"{name}\" is not read until the receiver has taken some of it"
        );
        self.status.update(|state| state.held_inputs += 1);
        while self.is_full() && !self.stop.load(Ordering::Relaxed) {
            std::thread::sleep(HELD_PAUSE);
        }
        self.status.update(|state| state.held_inputs -= 1);
        !self.is_full()
    }

    fn is_full(&self) -> bool {
        self.ledger.backlog().bytes >= self.size
    }

    /// Resolves when the spool is not full.
    async fn room(&self) {
        while self.is_full() {
            tokio::time::sleep(HELD_PAUSE).await;
        }
    }

    /// Commits a chunk, however often that must be tried.
    fn take(&self, name: &Arc<str>, chunk: &Chunk, treatment: Treatment) -> Result<(), CommitError> {
        loop {
            let batch = batch(&self.ledger, name, chunk, treatment, (self.clock.wall)());
            match self.runtime.block_on(self.ledger.commit(batch)) {
                Ok(committed) => {
                    (self.taken)(name, &committed.receipt);
                    return Ok(());
                }
                Err(CommitError::Storage(_)) if !self.stop.load(Ordering::Relaxed) => {
                    std::thread::sleep(HELD_PAUSE);
                }
                // Not committed, or it is not known: the input is read again from its checkpoint.
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests;
