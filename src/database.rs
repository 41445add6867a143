//! Settings of our SQLite databases: durable, readable while they are written, and able to shrink.
//! For the ledger and the SQLite sink.

use std::fs::File;
use std::io::ErrorKind;
use std::time::Duration;

use rusqlite::Connection;
use rusqlite::config::DbConfig;

/// Size of the log that causes a [`checkpoint`], in pages: 16 MiB, so that not every other commit
/// causes one.
pub const CHECKPOINT_PAGES: i64 = 4096;

/// Sets up a connection that writes, before its first table is created. Returns the journal mode of
/// the database; anything but `wal` means that SQLite could not switch to it.
///
/// # Errors
/// When the database cannot be opened, or the file is not a database.
pub fn prepare(connection: &Connection, busy: Duration) -> rusqlite::Result<String> {
    /// Value of `PRAGMA auto_vacuum`.
    const INCREMENTAL: i64 = 2;
    connection.busy_timeout(busy)?;
    // Only takes effect before the first table is created; lets the file shrink step by step.
    if connection.pragma_query_value(None, "auto_vacuum", |row| row.get::<_, i64>(0))? != INCREMENTAL {
        connection.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
    }
    // Readers are never blocked, and never block us.
    let mode = connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))?;
    sync_log(connection)?;
    // A log that could only be opened for reading would refuse the first commit, and each that
    // follows.
    connection.execute_batch("BEGIN IMMEDIATE; COMMIT")?;
    // Every commit is synced before it counts: it survives power loss.
    connection.pragma_update(None, "synchronous", "FULL")?;
    // SQLite would not report the errors of its own checkpoints; see `checkpoint`.
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    connection.pragma_update(None, "journal_size_limit", 16 << 20)?;
    // In KiB. Pages that are used together are stored together, and the system has a cache of its
    // own.
    connection.pragma_update(None, "cache_size", -4 * 1024)?;
    connection.pragma_update(None, "temp_store", "MEMORY")?;
    connection.pragma_update(None, "trusted_schema", false)?;
    Ok(mode)
}

/// Syncs the log. An earlier process may have been killed between a write and its sync: what is
/// read from the log then counts as committed, and a power loss could take it back.
fn sync_log(connection: &Connection) -> rusqlite::Result<()> {
    let Some(path) = connection.path() else { return Ok(()) };
    match File::open(format!("{path}-wal")).and_then(|log| log.sync_all()) {
        // Where there is none, the file system is without shared memory, and SQLite keeps no such log.
        Err(error) if error.kind() != ErrorKind::NotFound => {
            let cause = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_IOERR_FSYNC);
            Err(rusqlite::Error::SqliteFailure(cause, Some(format!("cannot sync {path}-wal: {error}"))))
        }
        _ => Ok(()),
    }
}

/// Returns at most `pages` pages to the file system, when more than that and more than a quarter of
/// the file is free: fewer are soon used again. Returns their number.
///
/// # Errors
/// When the database cannot be written.
pub fn shrink(connection: &Connection, pages: i64) -> rusqlite::Result<usize> {
    let read = |name: &str| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let (free, all) = (read("freelist_count")?, read("page_count")?);
    if free <= pages || free <= all / 4 {
        return Ok(0);
    }
    // Each step of this statement frees one page.
    let mut vacuum = connection.prepare_cached(&format!("PRAGMA incremental_vacuum({pages})"))?;
    let mut rows = vacuum.query([])?;
    let mut freed = 0;
    while rows.next()?.is_some() {
        freed += 1;
    }
    Ok(freed)
}

/// Copies the log into the file when it has `pages` pages or more, as far as no reader needs it,
/// without waiting for one. Only then does the file become smaller by what [`shrink`] freed.
///
/// # Errors
/// When the database cannot be written or synced. The log still has it all, but after a failed sync
/// the connection must be closed, and the next one must have recovered: see [`has_recovered`].
pub fn checkpoint(connection: &Connection, pages: i64) -> rusqlite::Result<()> {
    if connection.query_row("PRAGMA wal_checkpoint(NOOP)", [], |row| row.get::<_, i64>(1))? < pages {
        return Ok(());
    }
    let result = connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
    if result.as_ref().is_err_and(is_failed_sync) {
        leave_log(connection, true)?;
    }
    result
}

/// Returns whether this is the error of a sync: the system may have dropped what it could not write,
/// and will not report it again.
pub fn is_failed_sync(error: &rusqlite::Error) -> bool {
    const SYNC: i32 = rusqlite::ffi::SQLITE_IOERR_FSYNC;
    const DIRECTORY_SYNC: i32 = rusqlite::ffi::SQLITE_IOERR_DIR_FSYNC;
    error.sqlite_error().is_some_and(|cause| matches!(cause.extended_code, SYNC | DIRECTORY_SYNC))
}

/// Returns whether SQLite starts from the whole log, and counts on nothing that is in the file
/// already. It counts on what it copied up to a reader, without having synced it, and a sync that
/// fails later makes the system drop that. It forgets this when no connection, of any process, is
/// open any more; until then closing this one leaves the log as it is.
///
/// # Errors
/// When SQLite cannot read the log. Then, too, closing leaves the log as it is.
pub fn has_recovered(connection: &Connection) -> rusqlite::Result<bool> {
    leave_log(connection, true)?;
    let state = |row: &rusqlite::Row<'_>| Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(2)?));
    let (busy, copied) = connection.query_row("PRAGMA wal_checkpoint(NOOP)", [], state)?;
    let has_recovered = busy == 0 && copied <= 0;
    leave_log(connection, !has_recovered)?;
    Ok(has_recovered)
}

/// Sets whether this connection, if it is closed last, leaves the log as it is.
fn leave_log(connection: &Connection, leaves: bool) -> rusqlite::Result<()> {
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, leaves).map(drop)
}
