//! The tables, the pragmas and the versions between which we migrate.

use std::path::Path;
use std::time::Duration;

use rand::RngExt as _;
use rusqlite::{Connection, OpenFlags, OptionalExtension as _, params};

use super::error::OpenError;
use super::seen;
use crate::database;

/// Time to wait for a lock that another connection holds.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// "audg": marks the file as ours (`PRAGMA application_id`).
const APPLICATION_ID: i32 = 0x6175_6467;

/// Each step brings the tables from the version of its index to the next (`PRAGMA user_version`). A
/// step that was released is never changed.
const STEPS: [fn(&Connection) -> rusqlite::Result<()>; 4] = [
    |connection| connection.execute_batch(VERSION_1),
    |connection| connection.execute_batch(VERSION_2),
    |connection| connection.execute_batch(VERSION_3),
    |connection| {
        connection.execute_batch(VERSION_4)?;
        seen::migrate(connection)?;
        connection.execute_batch("DROP TABLE seen")
    },
];

/// Stores fingerprints a few hundred to a row (see [`leaf`](super::leaf)). Before, each was a row of
/// `seen`.
pub(super) const VERSION_4: &str =
    "CREATE TABLE seen_leaf (id INTEGER PRIMARY KEY, entries BLOB NOT NULL) STRICT";

/// Stores what waits for a sink as a row for each stream of a batch (see
/// [`delivery`](super::delivery)). Before, it was every batch behind the sink's position, of the
/// streams and sources that it took now and earlier.
pub(super) const VERSION_3: &str = "
    CREATE TABLE delivery (
        batch INTEGER NOT NULL,
        sink TEXT NOT NULL,
        stream INTEGER NOT NULL,
        events INTEGER NOT NULL,
        PRIMARY KEY (batch, sink, stream)
    ) STRICT, WITHOUT ROWID;
    WITH
        line (batch, source, stream, name, events) AS (
            SELECT position, source, 0, 'verified', verified FROM batch
            UNION ALL SELECT position, source, 1, 'unverified', unverified FROM batch
            UNION ALL SELECT position, source, 2, 'quarantine', quarantined FROM batch
        ),
        wish (sink, before, streams, sources) AS (
            SELECT name, 9223372036854775807, wants ->> 'streams', wants ->> 'sources' FROM sink
            UNION ALL
            SELECT name, value ->> 'before', value ->> 'streams', value ->> 'sources'
            FROM sink, json_each(wants, '$.earlier')
        )
    INSERT INTO delivery
        SELECT line.batch, sink.name, stream, events FROM sink JOIN line ON line.batch >= sink.batch
        WHERE events > 0 AND NOT EXISTS (
            SELECT 1 FROM wish WHERE wish.sink = sink.name AND line.batch < before AND (
                (streams IS NOT NULL AND line.name NOT IN (SELECT value FROM json_each(streams)))
                OR (sources IS NOT NULL AND line.source NOT IN (SELECT value FROM json_each(sources)))
            )
        );
    DELETE FROM batch WHERE NOT EXISTS (SELECT 1 FROM delivery WHERE delivery.batch = position);
    ALTER TABLE sink DROP COLUMN wants;
    DELETE FROM meta WHERE name = 'in_flight_bytes';
";

/// Adds what a sink takes, as JSON.
pub(super) const VERSION_2: &str = "ALTER TABLE sink ADD COLUMN wants TEXT";

/// `seen.key` is partition (4 bytes), milliseconds within the partition's day or a rejected line's
/// group (4 bytes), hash (16 bytes), all big-endian. Times are in seconds in
/// `seen` and its partitions, in milliseconds elsewhere. `batch_summary` lets a start count what
/// waits without reading any body.
pub(super) const VERSION_1: &str = "
    CREATE TABLE meta (name TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE seen (key BLOB PRIMARY KEY, accepted_at INTEGER NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE seen_partition (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        source TEXT NOT NULL,
        kind INTEGER NOT NULL,
        bucket INTEGER NOT NULL,
        last_insert INTEGER NOT NULL,
        window INTEGER NOT NULL,
        UNIQUE (source, kind, bucket)
    ) STRICT;
    CREATE TABLE batch (
        position INTEGER PRIMARY KEY AUTOINCREMENT,
        source TEXT NOT NULL,
        received_at INTEGER NOT NULL,
        packing INTEGER NOT NULL,
        verified INTEGER NOT NULL,
        unverified INTEGER NOT NULL,
        quarantined INTEGER NOT NULL,
        quarantined_bytes INTEGER NOT NULL,
        bytes INTEGER NOT NULL,
        key_ids TEXT NOT NULL,
        verdicts BLOB NOT NULL,
        body BLOB NOT NULL
    ) STRICT;
    CREATE INDEX batch_summary ON batch (
        position, source, received_at, bytes, quarantined_bytes, verified, unverified, quarantined
    );
    CREATE TABLE sink (
        name TEXT PRIMARY KEY,
        kind TEXT NOT NULL,
        batch INTEGER NOT NULL,
        line INTEGER NOT NULL,
        mark BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;
";

/// An open database.
pub(super) struct Opened {
    pub(super) connection: Connection,
    pub(super) ledger_id: [u8; 16],
    pub(super) identity_key: [u8; 32],
    /// Position of the newest batch ever committed, forgotten ones included.
    pub(super) last_position: i64,
}

/// Opens or creates the database.
pub(super) fn open(path: &Path) -> Result<Opened, OpenError> {
    let refused = |cause| OpenError::Database { path: path.to_owned(), cause };
    let mut connection = Connection::open(path).map_err(refused)?;
    restrict(path)?;
    database::prepare(&connection, BUSY_TIMEOUT).map_err(refused)?;
    connection.set_prepared_statement_cache_capacity(32);
    let version = version(&connection, path)?;
    if (1..STEPS.len()).contains(&version) {
        tracing::info!(
            code = "ledger-migration",
            "the ledger {path} is migrated from schema version {version} to {present}; that can take a second for each \
             million events of the dedup window",
            path = path.display(),
            present = STEPS.len()
        );
    }
    migrate(&mut connection, version).map_err(refused)?;
    let meta =
        |name: &str| connection.query_row("SELECT value FROM meta WHERE name = ?1", [name], |row| row.get(0));
    let ledger_id = meta("ledger_id").map_err(refused)?;
    let identity_key = connection
        .query_row("SELECT value FROM meta WHERE name = 'identity_key'", [], |row| row.get(0))
        .map_err(refused)?;
    let last_position = last_position(&connection).map_err(refused)?;
    Ok(Opened { connection, ledger_id, identity_key, last_position })
}

/// Opens the database for reading only, unless its tables are of an older version.
pub(super) fn open_to_check(path: &Path) -> Result<Option<Connection>, OpenError> {
    let refused = |cause| OpenError::Database { path: path.to_owned(), cause };
    let connection = open_reader(path).map_err(refused)?;
    let is_current = version(&connection, path)? == STEPS.len();
    Ok(is_current.then_some(connection))
}

/// Returns the version of the tables, if it is a known one.
fn version(connection: &Connection, path: &Path) -> Result<usize, OpenError> {
    let found: i64 = connection
        .query_row("SELECT user_version FROM pragma_user_version", [], |row| row.get(0))
        .map_err(|cause| OpenError::Database { path: path.to_owned(), cause })?;
    let known = STEPS.len();
    match usize::try_from(found) {
        Ok(version) if version <= known => Ok(version),
        _ => Err(OpenError::TooNew { path: path.to_owned(), found, known }),
    }
}

/// Opens the database a second time, for reading only.
pub(super) fn open_reader(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(
        path,
        OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    Ok(connection)
}

/// Returns the position of the newest batch ever committed.
pub(super) fn last_position(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .query_row("SELECT seq FROM sqlite_sequence WHERE name = 'batch'", [], |row| row.get(0))
        .optional()
        .map(|found| found.unwrap_or(0))
}

/// Takes the steps from a version on, all of them or none; 0 is an empty database.
pub(super) fn migrate(connection: &mut Connection, version: usize) -> rusqlite::Result<()> {
    if version == STEPS.len() {
        return Ok(());
    }
    let transaction = connection.transaction()?;
    for step in &STEPS[version..] {
        step(&transaction)?;
    }
    if version == 0 {
        let mut random = rand::rng();
        let (ledger_id, identity_key) = (random.random::<[u8; 16]>(), random.random::<[u8; 32]>());
        transaction.execute(
            "INSERT INTO meta VALUES ('ledger_id', ?1), ('identity_key', ?2)",
            params![ledger_id, identity_key],
        )?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    }
    transaction.pragma_update(None, "user_version", STEPS.len() as u64)?;
    transaction.commit()
}

/// Restricts the database to its owner: it holds whole events and the key of the fingerprints.
/// SQLite gives its log files the mode of the database.
fn restrict(path: &Path) -> Result<(), OpenError> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .map_err(|cause| OpenError::Io { path: path.to_owned(), cause })
}
