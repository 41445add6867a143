//! The handle to the ledger, and how the ledger is opened.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::batch::{Batch, Committed};

use super::delivery::{self, Backlog};
use super::error::{CommitError, Failed, OpenError};
use super::file_identity::FileIdentity;
use super::identity::Identifier;
use super::outbox::{Feed, Outbox};
use super::queue::Commit;
use super::seen::Window;
use super::subscription::{Forgetting, Pending, Position, Resume, Skipped, Subscription};
use super::writer::{Gauges, Message, Parts, Writer};
use super::{registry, schema, spare_space};
use crate::clock::Clock;

/// Parameters of the ledger.
#[derive(Clone)]
pub struct LedgerOptions {
    /// Its directory. Created, for its owner only, when it is missing.
    pub data_dir: PathBuf,
    /// Every configured sink.
    pub subscriptions: Vec<Subscription>,
    /// The backlog at which batches are refused; sinks that skip lose some before.
    pub backlog: Backlog,
    /// Time for which each source's events are remembered.
    pub windows: BTreeMap<String, Window>,
    /// The clocks.
    pub clock: Clock,
}

/// Time between two looks at the progress of a long transaction.
pub(super) const PROGRESS: Duration = Duration::from_millis(100);

/// A handle to the ledger. Cheap to clone.
#[derive(Clone)]
pub struct Ledger {
    pub(super) shared: Arc<Shared>,
}

pub(super) struct Shared {
    messages: mpsc::Sender<Message>,
    identifier: Identifier,
    pub(super) database: PathBuf,
    id: [u8; 16],
    feed: Arc<Feed>,
    in_hand_bytes: u64,
    newest_at_start: i64,
    pub(super) gauges: Arc<Gauges>,
    /// Held while the ledger is open; the lock belongs to the open file.
    _lock: File,
}

/// The writer's thread, and the notice of its end.
pub struct Running {
    /// Ends when the ledger is closed.
    pub thread: JoinHandle<()>,
    /// Resolves when the ledger can no longer be used and the process must end, with the reason.
    pub failed: oneshot::Receiver<Failed>,
}

impl Ledger {
    /// Opens the ledger of a directory, creates or migrates its tables, registers the sinks and
    /// starts the writer.
    ///
    /// A new sink starts at the present: it gets what is committed from now on. So does one that
    /// takes more than before, with what is new to it.
    ///
    /// # Errors
    /// See [`OpenError`]. At most the tables were created or migrated then.
    pub fn open(options: LedgerOptions) -> Result<(Self, Running), OpenError> {
        make_directory(&options.data_dir)?;
        let (lock, lock_path) = lock(&options.data_dir)?;
        let database = database(&options.data_dir);
        let opened = open_with_spare_space(&options, &database)?;
        let refused = |cause| OpenError::Database { path: database.clone(), cause };
        let files = lock.metadata().and_then(|metadata| FileIdentity::of((&lock_path, &metadata), &database));
        let files = files.map_err(|cause| OpenError::Io { path: database.clone(), cause })?;
        let subscriptions = options.subscriptions;
        let in_hand_bytes = in_hand_bytes(options.backlog, subscriptions.len());
        let gauges = Arc::new(Gauges::default());
        let feed = Arc::new(Feed::new(opened.last_position));
        let (messages, inbox) = mpsc::channel();
        let (failure, failed) = oneshot::channel();
        let writer = Writer::new(Parts {
            connection: opened.connection,
            inbox,
            failure,
            files,
            feed: Arc::clone(&feed),
            gauges: Arc::clone(&gauges),
            limit: options.backlog,
            in_hand_bytes,
            subscriptions,
            windows: options.windows,
            clock: options.clock,
        })
        .map_err(refused)?;
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
            in_hand_bytes,
            newest_at_start: opened.last_position,
            gauges,
            _lock: lock,
        };
        Ok((Self { shared: Arc::new(shared) }, Running { thread, failed }))
    }

    /// Gives up the events that keep the daemon from starting with a sink: all that wait for it
    /// when it is no longer configured or now of another type, and those that it no longer takes
    /// when it takes less than before. By force, all that wait for it, whatever is configured. A
    /// directory without a ledger stays as it is.
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
        registry::forget_sink(&opened.connection, sink, configured, by_force)
            .map_err(|cause| OpenError::Database { path: database, cause })
    }

    /// Checks without changing anything whether [`Ledger::open`] would take the configured sinks, and
    /// returns whether a daemon works with the directory now. A ledger of an older schema version is
    /// not checked further.
    ///
    /// # Errors
    /// See [`OpenError`]; that it is in use is not one of them here.
    pub fn check(data_dir: &Path, subscriptions: &[Subscription]) -> Result<bool, OpenError> {
        let database = database(data_dir);
        if !database.exists() {
            return Ok(false);
        }
        let is_in_use = match lock(data_dir) {
            Ok(_) => false,
            Err(OpenError::InUse(_)) => true,
            Err(error) => return Err(error),
        };
        if let Some(connection) = schema::open_to_check(&database)? {
            registry::changes(&connection, subscriptions, &database)?;
        }
        Ok(is_in_use)
    }

    /// Returns the source of identities, by which lines are recognised.
    pub fn identifier(&self) -> &Identifier {
        &self.shared.identifier
    }

    /// Returns a random ID of this ledger, which sinks store with their data to notice that it was
    /// recreated.
    pub fn id(&self) -> [u8; 16] {
        self.shared.id
    }

    /// Commits a batch: returns after the fsync. Dropping the future does not undo it.
    ///
    /// # Errors
    /// See [`CommitError`].
    pub async fn commit(&self, batch: Batch) -> Result<Committed, CommitError> {
        self.send_commit(batch).await.map_err(|_| CommitError::Closed)?
    }

    /// Records that everything before `position` is safe in a sink, soon: with the next commit, or
    /// after 20 ms. A batch that every sink has is forgotten in the same transaction.
    pub fn advance(&self, sink: &str, position: Position, mark: Vec<u8>) {
        // A closed ledger means that the process ends, and at the next start the sink will find out
        // by itself what it has.
        let _ = self.send(Message::Advance { sink: sink.to_owned(), position, mark, reply: None });
    }

    /// Records the same, and returns when it is durable: for what a sink must know before it
    /// writes.
    ///
    /// # Errors
    /// See [`CommitError`].
    pub fn advance_now(&self, sink: &str, position: Position, mark: Vec<u8>) -> Result<(), CommitError> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Advance { sink: sink.to_owned(), position, mark, reply: Some(reply) })?;
        answer.blocking_recv().map_err(|_| CommitError::Closed)?
    }

    /// Changes how long events are remembered and how much may wait, from the next transaction on.
    /// What a worker may have in hand stays as it was at the start.
    pub fn adjust(&self, windows: BTreeMap<String, Window>, limit: Backlog) {
        let _ = self.send(Message::Adjust { windows, limit });
    }

    /// Returns where a sink continues: what was last recorded durably; none for one that is not
    /// configured.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn resume(&self, sink: &str) -> rusqlite::Result<Option<Resume>> {
        delivery::resume(&schema::open_reader(&self.shared.database)?, sink)
    }

    /// Returns the state of an input that was committed last.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn checkpoint(&self, input: &str) -> rusqlite::Result<Option<Vec<u8>>> {
        delivery::checkpoint(&schema::open_reader(&self.shared.database)?, input)
    }

    /// Returns the position of the newest batch that was committed before the ledger was opened; 0
    /// before the first.
    pub fn newest_at_start(&self) -> i64 {
        self.shared.newest_at_start
    }

    /// Opens a reader of undelivered batches, for the thread of one configured sink.
    ///
    /// # Errors
    /// When the database cannot be opened a second time.
    pub fn outbox(&self, subscription: &Subscription) -> rusqlite::Result<Outbox> {
        let Shared { database, feed, in_hand_bytes, .. } = &*self.shared;
        Outbox::open(database, subscription.clone(), Arc::clone(feed), *in_hand_bytes)
    }

    /// Returns the number of bytes that are committed and not delivered to every sink, and how many
    /// of them are quarantined lines.
    pub fn backlog(&self) -> Backlog {
        self.shared.gauges.backlog()
    }

    /// Returns whether the last write failed and none has succeeded since.
    pub fn is_unwritable(&self) -> bool {
        self.shared.gauges.unwritable.load(Ordering::Relaxed)
    }

    /// Returns what waits for a sink.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn pending(&self, sink: &str) -> rusqlite::Result<Pending> {
        // Not on a connection that stays open: the last one to close copies the log into the
        // database, and a reader cannot.
        delivery::pending(&schema::open_reader(&self.shared.database)?, sink)
    }

    /// Returns what sinks that skip have lost since the last call.
    pub fn take_skipped(&self) -> BTreeMap<String, Skipped> {
        self.shared.gauges.take_skipped()
    }

    /// Returns the size of the database and its log on disk, in bytes.
    pub fn bytes(&self) -> u64 {
        let mut log = self.shared.database.clone().into_os_string();
        log.push("-wal");
        [self.shared.database.as_path(), Path::new(&log)]
            .iter()
            .filter_map(|path| path.metadata().ok())
            .map(|metadata| metadata.len())
            .sum()
    }

    /// Returns whether the writer is alive: true as soon as it takes the next message, which it
    /// does after each transaction, or makes progress within one. While the writer hangs, this does
    /// not return; when it has ended, it returns false. Needs a runtime with a timer.
    pub async fn answers(&self) -> bool {
        let progress = || self.shared.gauges.progress.load(Ordering::Relaxed);
        let before = progress();
        let (reply, mut answer) = oneshot::channel();
        if self.send(Message::Ping(reply)).is_err() {
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

    /// Writes the pending positions and ends the writer. Workers that wait for batches are woken.
    pub fn close(&self) {
        let _ = self.send(Message::Close);
    }

    /// Wakes the workers and tells them that no batch will follow.
    pub fn close_feed(&self) {
        self.shared.feed.close();
    }

    /// Sends a batch to the writer. A closed ledger drops the sender, which the receiver notices.
    pub(super) fn send_commit(&self, batch: Batch) -> oneshot::Receiver<Result<Committed, CommitError>> {
        let (reply, answer) = oneshot::channel();
        let _ = self.send(Message::Commit(Box::new(Commit { batch, reply, sent: Instant::now() })));
        answer
    }

    fn send(&self, message: Message) -> Result<(), CommitError> {
        self.shared.messages.send(message).map_err(|_| CommitError::Closed)
    }
}

/// Returns the number of bytes that each worker may have in hand: altogether a quarter of what
/// quarantined lines may take, since it cannot be evicted.
fn in_hand_bytes(limit: Backlog, sinks: usize) -> u64 {
    const MOST: u64 = 16 << 20;
    (limit.quarantine_bytes.min(limit.bytes) / 4 / sinks.max(1) as u64).min(MOST)
}

/// Opens the database. On a full disk, the spare space is released for that.
fn open_with_spare_space(options: &LedgerOptions, database: &Path) -> Result<schema::Opened, OpenError> {
    let data_dir = &options.data_dir;
    let open = || {
        let opened = schema::open(database)?;
        registry::register(&opened.connection, &options.subscriptions, database)?;
        Ok(opened)
    };
    let opened = open();
    // An I/O error on a disk with space is not one that a second attempt would fix.
    let is_full = opened.as_ref().is_err_and(may_be_full) && spare_space::is_disk_full(data_dir);
    if !is_full {
        if opened.is_ok()
            && let Err(error) = spare_space::reserve(data_dir)
        {
            tracing::warn!(
                code = "spare-space-missing",
                "cannot reserve space in {path} for a start on a full disk: {error}; the next start tries again",
                path = data_dir.display()
            );
        }
        return opened;
    }
    let opened = if spare_space::release(data_dir) {
        tracing::warn!(
            code = "spare-space-used",
            "the disk of {path} is full; the ledger is opened in the space reserved for that, and batches are \
             refused until there is more",
            path = data_dir.display()
        );
        open()
    } else {
        opened
    };
    opened.map_err(|error| match error {
        OpenError::Database { path, cause } => OpenError::NoSpace { path, cause },
        error => error,
    })
}

/// Returns whether a full disk may be the cause: SQLite reports an I/O error where it concerns the
/// other files of the database.
fn may_be_full(error: &OpenError) -> bool {
    use rusqlite::ErrorCode::{CannotOpen, DiskFull, SystemIoFailure};
    let is_write = |code| matches!(code, CannotOpen | DiskFull | SystemIoFailure);
    matches!(error, OpenError::Database { cause, .. } if cause.sqlite_error_code().is_some_and(is_write))
}

fn database(data_dir: &Path) -> PathBuf {
    data_dir.join("ledger.db")
}

/// Creates the directory, for its owner only, and makes its name durable.
fn make_directory(data_dir: &Path) -> Result<(), OpenError> {
    use std::os::unix::fs::DirBuilderExt as _;
    if data_dir.is_dir() {
        return Ok(());
    }
    let parent = data_dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // A missing parent is a misspelt path or a disk that is not mounted: a ledger made there would
    // be an empty one.
    if !parent.is_dir() {
        return Err(OpenError::NoParent { data_dir: data_dir.to_owned(), parent: parent.to_owned() });
    }
    let made = std::fs::DirBuilder::new().mode(0o700).create(data_dir);
    made.and_then(|()| File::open(parent)?.sync_all())
        .map_err(|cause| OpenError::Io { path: data_dir.to_owned(), cause })
}

/// Locks the directory for this process. Returns the file that is locked and its path.
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
