//! What we have promised: which events were accepted, which batches are not delivered yet, and how far each
//! sink has come. One SQLite database in `data_dir`, and all state that matters is in it.
//!
//! Who owns what: one thread, the [`writer`], holds the only connection that writes; everybody else sends it
//! messages through the [`Ledger`]. A commit puts the new fingerprints ([`seen`]) and the batch ([`outbox`])
//! into one transaction; commits that wait at the same time share it and its fsync. Only then is a
//! [`Receipt`] made, and without one there is no 200.
//!
//! Durability: WAL with `synchronous=FULL`, so a committed transaction survives power loss. What a sink has
//! delivered may be recorded a little late (a sink finds out by itself what it has, see
//! `deliver::sink::Sink`), but a batch is never forgotten before every sink's own fsync.

mod claims;
mod interest;
mod outbox;
mod place;
mod queue;
mod reserve;
mod schema;
mod seen;
mod skip;
mod writer;

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::oneshot;

use claims::Claims;
use interest::Interest;
use outbox::Feed;
pub use outbox::{Body, Next, Outbox, Stored};
use place::Place;
pub use seen::{Identifier, Identity};

use crate::wire::batch::Packing;
use crate::wire::event::{Reason, Stream, Verdict};

/// The two clocks that expiry needs: the wall clock in milliseconds since the Unix epoch, and one that only
/// goes forward. Where they disagree, the wall clock has jumped.
#[derive(Clone)]
pub struct Clock {
    /// Milliseconds since the Unix epoch.
    pub wall: Arc<dyn Fn() -> i64 + Send + Sync>,
    /// Time since any fixed moment.
    pub steady: Arc<dyn Fn() -> Duration + Send + Sync>,
}

impl Clock {
    /// The machine's clocks.
    pub fn system() -> Self {
        let start = std::time::Instant::now();
        Self {
            wall: Arc::new(|| {
                let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                since.map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
            }),
            steady: Arc::new(move || start.elapsed()),
        }
    }
}

/// How long an accepted event of a source is remembered.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// For accepted events.
    pub events: Duration,
    /// For quarantined lines.
    pub rejects: Duration,
}

/// Which lines a sink wants. Sinks are known by name; the name is what their position is kept under.
#[derive(Clone, Debug)]
pub struct Subscription {
    /// The configured name.
    pub sink: String,
    /// The type of the sink, since a position means something to one type only.
    pub kind: &'static str,
    /// The streams it takes.
    pub streams: Vec<Stream>,
    /// The sources it takes; all when none are named.
    pub sources: Option<Vec<String>>,
    /// Whether it loses its oldest lines rather than letting the backlog become full.
    pub skips: bool,
}

impl Subscription {
    /// Whether it takes lines of that source and stream.
    pub fn wants(&self, source: &str, stream: Stream) -> bool {
        self.streams.contains(&stream)
            && self.sources.as_ref().is_none_or(|sources| sources.iter().any(|known| known == source))
    }
}

/// Bytes that may wait for sinks. Whoever commits looks at [`Ledger::backlog`]; the ledger itself refuses nothing.
#[derive(Clone, Copy, Debug)]
pub struct Backlog {
    /// Of all batches, as received.
    pub bytes: u64,
    /// Of quarantined lines.
    pub quarantine_bytes: u64,
}

/// What the ledger is opened with.
#[derive(Clone)]
pub struct Options {
    /// The directory it lives in. Created, for its owner only, when it is missing.
    pub data_dir: PathBuf,
    /// Every configured sink.
    pub subscriptions: Vec<Subscription>,
    /// Where batches are refused, and sinks that skip lose some before.
    pub backlog: Backlog,
    /// How long each source's events are remembered.
    pub windows: BTreeMap<String, Window>,
    /// The clocks.
    pub clock: Clock,
}

/// One line and what was found out about it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The verdict.
    pub verdict: Verdict,
    /// What it is recognised by when it comes again.
    pub identity: Identity,
}

/// One body, judged, ready to be committed.
#[derive(Debug)]
pub struct Batch {
    /// The configured name of its source.
    pub source: Arc<str>,
    /// When it arrived, in milliseconds since the Unix epoch.
    pub received_at: i64,
    /// The body as it came.
    pub body: Arc<Vec<u8>>,
    /// How to take the body apart again.
    pub packing: Packing,
    /// The inflated body, so that sinks need not inflate it again.
    pub decoded: Arc<Vec<u8>>,
    /// The key IDs that verdicts point at.
    pub key_ids: Arc<[String]>,
    /// One entry a line, in the order of the lines; none for a line that another batch has.
    pub entries: Vec<Option<Entry>>,
}

/// The proof that every line of a batch is durably committed. Only the writer makes one, after the fsync.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Receipt {
    accepted: u64,
    duplicates: u64,
    rejected: [u64; Reason::ALL.len()],
}

impl Receipt {
    /// Counts a line.
    fn count(&mut self, verdict: &Verdict, is_new: bool) {
        match verdict {
            _ if !is_new => self.duplicates += 1,
            Verdict::Verified { .. } | Verdict::Unverified => self.accepted += 1,
            Verdict::Rejected { reason, .. } => self.rejected[*reason as usize] += 1,
        }
    }

    /// Adds rejected lines that a single record holds, which has this receipt.
    pub fn add_record(&mut self, record: &Self, lines: [u64; Reason::ALL.len()]) {
        if record.duplicates > 0 {
            self.duplicates += lines.iter().sum::<u64>();
        } else {
            self.rejected = lines;
        }
    }

    /// Lines that are new and were let through.
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Lines that had been committed before.
    pub fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// Lines that are new in quarantine.
    pub fn quarantined(&self) -> u64 {
        self.rejected.iter().sum()
    }

    /// Lines that are new in quarantine, by reason.
    pub fn rejected(&self) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL.into_iter().zip(self.rejected)
    }
}

/// Why a commit gave no receipt. Nothing of the batch was kept, unless it says otherwise.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CommitError {
    /// The transaction was rolled back: no space, an I/O error. Worth another try.
    #[error("the ledger could not write: {0}")]
    Storage(String),
    /// The ledger is closed: the process ends. It is not known whether the batch was kept; recovery decides.
    #[error("the ledger is closed")]
    Closed,
}

/// Why the ledger cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another daemon has it.
    #[error("{0} is in use by another auditgate; each daemon needs a data_dir of its own")]
    InUse(PathBuf),
    /// The directory or a file in it cannot be used.
    #[error("cannot use {path}: {cause}")]
    Io {
        /// Which one.
        path: PathBuf,
        /// The system's words.
        cause: std::io::Error,
    },
    /// SQLite refuses it.
    #[error("cannot open the ledger {path}: {cause}")]
    Database {
        /// The database file.
        path: PathBuf,
        /// SQLite's words.
        cause: rusqlite::Error,
    },
    /// There is no space for what SQLite needs to open it.
    #[error(
        "cannot open the ledger {path}: its disk is full ({cause}); make some room there, 1 MiB or more, and start again"
    )]
    NoSpace {
        /// The database file.
        path: PathBuf,
        /// SQLite's words.
        cause: rusqlite::Error,
    },
    /// A later version of auditgate wrote it.
    #[error(
        "the ledger {path} has schema version {found}, and this auditgate knows {known}; use the newer auditgate"
    )]
    TooNew {
        /// The database file.
        path: PathBuf,
        /// Its version.
        found: i64,
        /// Ours.
        known: usize,
    },
    /// A sink is gone from the configuration although events wait for it.
    #[error(
        "sink `{sink}` is no longer configured, but {pending} events wait for it; configure it again, or give them up with `auditgate forget-sink {sink}`"
    )]
    Orphaned {
        /// The sink's name.
        sink: String,
        /// Events that it has not had.
        pending: u64,
    },
    /// A sink takes less than before although what it took waits for it.
    #[error(
        "sink `{sink}` takes less than before (`stream`, `sources`), and {pending} events wait for it that it no longer takes; put it back as it was until they are delivered, or give them up with `auditgate forget-sink {sink}`"
    )]
    Narrowed {
        /// The sink's name.
        sink: String,
        /// Events that it has not had and would not get.
        pending: u64,
    },
    /// There is no ledger, and none is to be made.
    #[error("there is no ledger {0}; look at `data_dir` in the configuration")]
    Missing(PathBuf),
    /// A sink's name now belongs to another type.
    #[error("sink `{sink}` was of type {was} and is now of type {is}; give the new sink another name")]
    KindChanged {
        /// The sink's name.
        sink: String,
        /// The type its position belongs to.
        was: String,
        /// The configured type.
        is: &'static str,
    },
}

/// How far a sink has come: every line before this one is safe in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// The first batch that is not wholly delivered.
    pub batch: i64,
    /// How many lines of that batch are.
    pub line: u32,
}

/// What a sink got since its last advance.
#[derive(Clone, Copy, Debug, Default)]
pub struct Delivered {
    /// Lines.
    pub events: u64,
    /// When the batch of the last of them arrived, in milliseconds since the Unix epoch.
    pub received_at: i64,
}

/// What a sink had recorded when the ledger was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resume {
    /// Where to go on.
    pub position: Position,
    /// What the sink itself noted about that place; empty for a new sink.
    pub mark: Vec<u8>,
}

/// What a sink lost because it did not keep up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Lines that it wanted.
    pub events: u64,
    /// When the oldest of them arrived, in milliseconds since the Unix epoch; 0 without any.
    pub oldest: i64,
    /// When the newest of them arrived; 0 without any.
    pub newest: i64,
}

impl Skipped {
    /// Adds what it lost besides.
    pub fn add(&mut self, more: Self) {
        if self.events == 0 {
            *self = more;
        } else if more.events > 0 {
            self.events += more.events;
            self.oldest = self.oldest.min(more.oldest);
            self.newest = self.newest.max(more.newest);
        }
    }
}

/// Counters that anybody may read at any time.
#[derive(Debug, Default)]
pub struct Gauges {
    backlog_bytes: AtomicU64,
    quarantine_bytes: AtomicU64,
    unwritable: AtomicBool,
    /// Counts up while a transaction goes forward.
    progress: AtomicU64,
    pending: Mutex<BTreeMap<String, Pending>>,
    /// What each sink lost since it was last asked for.
    skipped: Mutex<BTreeMap<String, Skipped>>,
    /// Where each sink is, as the table has it.
    noted: Mutex<BTreeMap<String, Resume>>,
}

/// What waits for one sink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// Lines that the sink wants and has not got.
    pub events: u64,
    /// When the oldest of them arrived, in milliseconds since the Unix epoch.
    pub oldest: Option<i64>,
}

/// What became of the wish to forget a sink, in events that it wanted and has not had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgetting {
    /// The ledger knows no sink of that name.
    Unknown,
    /// Nothing was given up: it is configured, and nothing is in the way of a start.
    Refused {
        /// What waits for it.
        pending: u64,
    },
    /// It is configured to take less than before. What it no longer takes was given up, the rest waits on.
    NoLongerWanted {
        /// What was given up.
        given_up: u64,
    },
    /// Everything was given up, and the sink is unknown from now on.
    All {
        /// What was given up. More than it wanted when the ledger does not know what that was.
        given_up: u64,
    },
}

/// Why a ledger ended by itself. The process must end, too.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failed {
    /// Nothing is known about what is on the disk. What was committed is recovered when it is opened again.
    #[error("the ledger cannot be trusted any more: {0}")]
    Untrusted(String),
    /// A file of it is gone from its path, or another one is there. What is committed is where that went.
    #[error("{0} was removed or replaced while it was in use")]
    Gone(PathBuf),
}

/// How often a transaction that lasts is looked at.
const PROGRESS: Duration = Duration::from_millis(100);

/// The handle through which everybody reaches the ledger. Cheap to clone.
#[derive(Clone)]
pub struct Ledger {
    shared: Arc<Shared>,
}

struct Shared {
    messages: mpsc::Sender<writer::Message>,
    identifier: Identifier,
    database: PathBuf,
    id: [u8; 16],
    feed: Arc<Feed>,
    claims: Arc<BTreeMap<String, Claims>>,
    interests: Arc<[Interest]>,
    gauges: Arc<Gauges>,
    /// Held for as long as the ledger lives; the lock is the open file's.
    _lock: File,
}

/// The writer's thread, and the news of its end.
pub struct Running {
    /// Ends with the ledger.
    pub thread: JoinHandle<()>,
    /// Resolves when the ledger can no longer be used and the process must end, with the reason.
    pub failed: oneshot::Receiver<Failed>,
}

impl Ledger {
    /// Opens the ledger of a directory, makes or migrates its tables, registers the sinks and starts the
    /// writer.
    ///
    /// A sink that is new starts at the present: it gets what is committed from now on. So does one that takes more
    /// than before, with what is new to it.
    ///
    /// # Errors
    /// See [`OpenError`]. At most the tables were made or migrated then.
    pub fn open(options: Options) -> Result<(Self, Running), OpenError> {
        make_directory(&options.data_dir)?;
        let (lock, lock_path) = lock(&options.data_dir)?;
        let database = database(&options.data_dir);
        let Prepared { opened, interests, resume, claims } = prepare_with_reserve(&options, &database)?;
        let interests: Arc<[Interest]> = interests.into();
        let place = lock.metadata().and_then(|metadata| Place::of((&lock_path, &metadata), &database));
        let place = place.map_err(|cause| OpenError::Io { path: database.clone(), cause })?;
        let claims = Arc::new(claims);
        let gauges = Arc::new(Gauges { noted: Mutex::new(resume), ..Gauges::default() });
        let feed = Arc::new(Feed::new(opened.last_position));
        let (messages, inbox) = mpsc::channel();
        let (failure, failed) = oneshot::channel();
        let writer = writer::Writer::new(writer::Parts {
            connection: opened.connection,
            inbox,
            failure,
            place,
            feed: Arc::clone(&feed),
            claims: Arc::clone(&claims),
            gauges: Arc::clone(&gauges),
            limit: options.backlog.into(),
            interests: Arc::clone(&interests),
            windows: options.windows,
            clock: options.clock,
        })
        .map_err(|cause| OpenError::Database { path: database.clone(), cause })?;
        let thread = std::thread::Builder::new()
            .name("ledger".to_owned())
            .spawn(move || writer.run())
            .map_err(|cause| OpenError::Io { path: database.clone(), cause })?;
        let shared = Shared {
            messages,
            identifier: Identifier::new(opened.identity_key),
            database,
            id: opened.ledger_id,
            feed,
            claims,
            interests,
            gauges,
            _lock: lock,
        };
        Ok((Self { shared: Arc::new(shared) }, Running { thread, failed }))
    }

    /// Gives up the events that keep the daemon from starting with a sink: all that wait for it when it is no longer
    /// configured or now of another type, and those that it no longer takes when it takes less than before. By
    /// force, all that wait for it, whatever is configured. A directory without a ledger stays as it is.
    ///
    /// # Errors
    /// When the ledger cannot be opened or written.
    pub fn forget_sink(
        data_dir: &Path,
        sink: &str,
        configured: Option<&Subscription>,
        by_force: bool,
    ) -> Result<Forgetting, OpenError> {
        let database = database(data_dir);
        if !database.is_file() {
            return Err(OpenError::Missing(database));
        }
        let _lock = lock(data_dir)?;
        let opened = schema::open(&database)?;
        outbox::forget_sink(&opened.connection, sink, configured, by_force)
            .map_err(|cause| OpenError::Database { path: database, cause })
    }

    /// Names what a line is recognised by.
    pub fn identifier(&self) -> &Identifier {
        &self.shared.identifier
    }

    /// A random name of this ledger, which sinks store beside their data to notice that it was recreated.
    pub fn id(&self) -> [u8; 16] {
        self.shared.id
    }

    /// Commits a batch: returns after the fsync. Dropping the future does not undo it.
    ///
    /// # Errors
    /// See [`CommitError`].
    pub async fn commit(&self, batch: Batch) -> Result<Receipt, CommitError> {
        self.send_commit(batch).await.map_err(|_| CommitError::Closed)?
    }

    /// Notes that everything before `position` is safe in a sink, soon: with the next commit, or within a
    /// tenth of a second. A batch that every sink has is forgotten in the same transaction.
    pub fn advance(&self, sink: &str, position: Position, mark: Vec<u8>, delivered: Delivered) {
        let sink = sink.to_owned();
        // A closed ledger means that the process ends, and the sink will find out by itself what it has.
        let delivered = Some(delivered);
        let _ = self.send(writer::Message::Advance { sink, position, mark, delivered, reply: None });
    }

    /// The same, and returns when it is durable: for what a sink must know before it writes. Without
    /// `delivered`, what waits for the sink is counted anew.
    ///
    /// # Errors
    /// See [`CommitError`].
    pub fn advance_now(
        &self,
        sink: &str,
        position: Position,
        mark: Vec<u8>,
        delivered: Option<Delivered>,
    ) -> Result<(), CommitError> {
        let (reply, answer) = oneshot::channel();
        let (sink, reply) = (sink.to_owned(), Some(reply));
        self.send(writer::Message::Advance { sink, position, mark, delivered, reply })?;
        answer.blocking_recv().map_err(|_| CommitError::Closed)?
    }

    /// Changes how long events are remembered and how much may wait, from the next transaction on. What a sink may
    /// have in flight stays as it was at the start.
    pub fn adjust(&self, windows: BTreeMap<String, Window>, limit: Backlog) {
        let _ = self.send(writer::Message::Adjust { windows, limit: limit.into() });
    }

    /// Where a sink goes on: what was last noted durably.
    pub fn resume(&self, sink: &str) -> Option<Resume> {
        self.shared.gauges.noted().get(sink).cloned()
    }

    /// The position of the newest batch that was ever committed; 0 before the first.
    pub fn newest_batch(&self) -> i64 {
        self.shared.feed.newest()
    }

    /// A reader of undelivered batches, for the thread of one configured sink.
    ///
    /// # Errors
    /// When the database cannot be opened a second time.
    pub fn outbox(&self, sink: &str) -> rusqlite::Result<Outbox> {
        let (feed, claims) = (Arc::clone(&self.shared.feed), Arc::clone(&self.shared.claims));
        let interest = self.shared.interests.iter().find(|interest| interest.subscription.sink == sink);
        Outbox::open(&self.shared.database, sink, interest.cloned(), feed, claims)
    }

    /// Bytes that are committed and not delivered to every sink, and how many of them are quarantined lines.
    pub fn backlog(&self) -> (u64, u64) {
        let gauges = &self.shared.gauges;
        (gauges.backlog_bytes.load(Ordering::Relaxed), gauges.quarantine_bytes.load(Ordering::Relaxed))
    }

    /// Whether the last write failed and none has succeeded since.
    pub fn is_unwritable(&self) -> bool {
        self.shared.gauges.unwritable.load(Ordering::Relaxed)
    }

    /// What waits for a sink.
    pub fn pending(&self, sink: &str) -> Pending {
        self.shared.gauges.pending().get(sink).copied().unwrap_or_default()
    }

    /// What sinks that skip have lost since the last call.
    pub fn take_skipped(&self) -> BTreeMap<String, Skipped> {
        std::mem::take(&mut *self.shared.gauges.skipped())
    }

    /// The size of the database and its log on disk, in bytes.
    pub fn bytes(&self) -> u64 {
        let mut log = self.shared.database.clone().into_os_string();
        log.push("-wal");
        [self.shared.database.as_path(), Path::new(&log)]
            .iter()
            .filter_map(|path| path.metadata().ok())
            .map(|metadata| metadata.len())
            .sum()
    }

    /// Whether the writer is there: true as soon as it takes the next message, which it does after each
    /// transaction, or goes forward within one. A writer that hangs leaves the question open, one that has ended
    /// answers false. To be asked on a runtime with a timer.
    pub async fn answers(&self) -> bool {
        let progress = || self.shared.gauges.progress.load(Ordering::Relaxed);
        let before = progress();
        let (reply, mut answer) = oneshot::channel();
        if self.send(writer::Message::Ping(reply)).is_err() {
            return false;
        }
        loop {
            match tokio::time::timeout(PROGRESS, &mut answer).await {
                Ok(answer) => return answer.is_ok(),
                Err(_) if progress() != before => return true,
                Err(_) => {}
            }
        }
    }

    /// Writes what is still to be noted and ends the writer. Workers that wait for batches are woken.
    pub fn close(&self) {
        let _ = self.send(writer::Message::Close);
    }

    /// Wakes the workers and lets them know that no batch will follow.
    pub fn close_feed(&self) {
        self.shared.feed.close();
    }

    /// A ledger that is closed drops the sender, which the receiver notices.
    fn send_commit(&self, batch: Batch) -> oneshot::Receiver<Result<Receipt, CommitError>> {
        let (reply, answer) = oneshot::channel();
        let _ = self.send(writer::Message::Commit(Box::new(batch), reply));
        answer
    }

    fn send(&self, message: writer::Message) -> Result<(), CommitError> {
        self.shared.messages.send(message).map_err(|_| CommitError::Closed)
    }
}

/// What the tables say at the start.
struct Prepared {
    opened: schema::Opened,
    interests: Vec<Interest>,
    resume: BTreeMap<String, Resume>,
    claims: BTreeMap<String, Claims>,
}

/// On a full disk the reserve makes room for what opening takes.
fn prepare_with_reserve(options: &Options, database: &Path) -> Result<Prepared, OpenError> {
    let data_dir = &options.data_dir;
    let prepared = prepare(options, database);
    // An I/O error on a disk with space is none that a second try would mend.
    let is_full = prepared.as_ref().is_err_and(may_be_full) && reserve::is_disk_full(data_dir);
    if !is_full {
        if prepared.is_ok()
            && let Err(error) = reserve::keep(data_dir)
        {
            tracing::warn!(%error, "no space can be kept in {} for a start on a full disk", data_dir.display());
        }
        return prepared;
    }
    let prepared = if reserve::give_way(data_dir) {
        tracing::warn!(
            "the disk of {} is full; the ledger is opened in the space kept for that",
            data_dir.display()
        );
        prepare(options, database)
    } else {
        prepared
    };
    prepared.map_err(|error| match error {
        OpenError::Database { path, cause } => OpenError::NoSpace { path, cause },
        error => error,
    })
}

fn prepare(options: &Options, database: &Path) -> Result<Prepared, OpenError> {
    let opened = schema::open(database)?;
    let (interests, resume) = outbox::register(&opened.connection, &options.subscriptions, database)?;
    let claims = outbox::claims(&opened.connection, &resume, options.backlog)
        .map_err(|cause| OpenError::Database { path: database.to_owned(), cause })?;
    Ok(Prepared { opened, interests, resume, claims })
}

/// Whether a full disk may be the cause: SQLite calls it an I/O error where it concerns the files beside the
/// database.
fn may_be_full(error: &OpenError) -> bool {
    use rusqlite::ErrorCode::{CannotOpen, DiskFull, SystemIoFailure};
    let is_write = |code| matches!(code, CannotOpen | DiskFull | SystemIoFailure);
    matches!(error, OpenError::Database { cause, .. } if cause.sqlite_error_code().is_some_and(is_write))
}

fn database(data_dir: &Path) -> PathBuf {
    data_dir.join("ledger.db")
}

fn make_directory(data_dir: &Path) -> Result<(), OpenError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(data_dir);
    made.map_err(|cause| OpenError::Io { path: data_dir.to_owned(), cause })
}

/// Takes the directory for this process alone. Returns the file that is locked and its path.
fn lock(data_dir: &Path) -> Result<(File, PathBuf), OpenError> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let path = data_dir.join("lock");
    let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = match file {
        Ok(file) => file,
        Err(cause) => return Err(OpenError::Io { path, cause }),
    };
    match file.try_lock() {
        Ok(()) => Ok((file, path)),
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse(data_dir.to_owned())),
        Err(TryLockError::Error(cause)) => Err(OpenError::Io { path, cause }),
    }
}

#[cfg(test)]
mod tests;
