//! The SQLite sink: one row an event, exactly once across kills, restarts and failed writes.
//!
//! The rows of a flush and the position behind them are one transaction, so that the database
//! itself says what it has, together with the ID of the ledger whose position it is. Opening reads
//! that, at the start and after every failure alike, and rows that are there already are not
//! written again.
//!
//! Other processes may read while we write, at any time (WAL); a reader that never ends only keeps
//! the log from being emptied. A second writer makes a flush wait, then fail and be retried.

mod common;
mod fields;
mod retention;
mod row;
mod schema;
mod steps;
pub mod stored;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension as _, TransactionBehavior, params};
use serde::{Deserialize, Serialize};

use self::common::Commons;
use self::retention::Retention;
use self::row::Row;
use self::schema::{Open, failed};
use super::sink::{Item, Sink, SinkError};
use crate::clock::Clock;
use crate::database;
use crate::ledger::{Position, Resume};
use crate::log_throttle::log_throttled;
use crate::quantity::time;

/// Options of an SQLite sink: its database, and the age up to which rows are kept.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct SqliteOptions {
    /// The database, which need not exist; its directory must. No other sink writes to it.
    pub path: PathBuf,
    /// Time from the arrival of a row to its deletion: 1 ms to 3650 d. Default never.
    #[serde(default, with = "time")]
    pub retain: Option<Duration>,
}

/// A database that events are inserted into.
pub struct SqliteSink {
    path: PathBuf,
    ledger: [u8; 16],
    retention: Option<Retention>,
    open: Option<Open>,
    commons: Commons,
    /// A write failed: the state of the connection can no longer be trusted.
    distrusted: bool,
    /// The sync of a checkpoint failed: the database must be recovered from its log.
    must_recover: bool,
    /// Everything before it is in the database, as far as we know.
    reached: Position,
    collected: Vec<Row>,
    collected_bytes: usize,
}

/// Checks whether a sink could use the file at a path, without changing it. A missing file is fine.
///
/// # Errors
/// What is wrong with it; the cause is [`io::ErrorKind::InvalidData`] when it is not a database of
/// a SQLite sink, or one of a newer version.
pub fn check(path: &Path) -> Result<(), SinkError> {
    schema::check(path)
}

/// Number of rows that are deleted in one transaction: few, so that a flush never waits long.
const STEP: usize = 500;

/// Maximum number of transactions in which an idle sink deletes rows.
const IDLE_STEPS: usize = 100;

/// Number of pages that are returned to the file system in one transaction.
const SHRINK_PAGES: i64 = 256;

impl SqliteSink {
    /// Creates a sink for a path, whose directory must exist. Opens nothing yet.
    ///
    /// `ledger` is the ID of the ledger that events come from. Rows that arrived longer than
    /// `retain` ago are deleted, if it is given; the clock is used for that alone, and trusted only
    /// as far as the rows in the database or a week of running confirm it.
    pub fn new(options: SqliteOptions, ledger: [u8; 16], clock: Clock) -> Self {
        let SqliteOptions { path, retain } = options;
        Self {
            path,
            ledger,
            retention: retain.map(|retain| Retention::new(retain, clock)),
            open: None,
            commons: Commons::default(),
            distrusted: false,
            must_recover: false,
            reached: Position::default(),
            collected: Vec::new(),
            collected_bytes: 0,
        }
    }

    /// Makes the database ready for a transaction: it is open, and was opened again after a failure;
    /// a long log was copied into it.
    fn get_ready(&mut self) -> Result<(), SinkError> {
        if let Some(open) = &self.open
            && !open.is_at(&self.path)
        {
            let path = self.path.display();
            log_throttled!(
                warn,
                &path.to_string(),
                code = "database-moved",
                %path,
                "{path} was renamed or removed by another process; writing continues in a new database"
            );
            self.open = None;
            self.must_recover = false;
        }
        if self.distrusted || self.open.is_none() {
            self.reopen()?;
        }
        let Some(open) = &self.open else { return Ok(()) };
        database::checkpoint(&open.connection, database::CHECKPOINT_PAGES).map_err(|error| {
            self.must_recover = database::is_failed_sync(&error);
            failed("copy the log into", &self.path)(error)
        })
    }

    /// Opens the database again, which syncs its log, and reads its position.
    ///
    /// The old connection is closed only afterwards, unless the database must be recovered. While one
    /// is open, SQLite does not recover the log, in which a transaction whose sync failed may look
    /// committed.
    fn reopen(&mut self) -> Result<(), SinkError> {
        if self.must_recover && self.path.exists() {
            self.recover()?;
        }
        let mut fresh = schema::open(&self.path)?;
        self.reached = self.catch_up(&mut fresh.connection).map_err(failed("read", &self.path))?;
        self.open = Some(fresh);
        // What a transaction wrote that then failed is gone.
        self.commons.forget();
        self.distrusted = false;
        Ok(())
    }

    /// Makes SQLite start from the whole log, which has everything.
    fn recover(&mut self) -> Result<(), SinkError> {
        self.open = None;
        let fresh = schema::connect(&self.path)?;
        let cause = match database::has_recovered(&fresh.connection) {
            Ok(true) => {
                self.must_recover = false;
                return Ok(());
            }
            Ok(false) => "it is still open".to_owned(),
            // What was lost may be what SQLite reads first.
            Err(error) => error.to_string(),
        };
        // Stays open, so that no other connection is the last one, which would write to the file.
        self.open = Some(fresh);
        Err(self.error("recover", format!("{cause}; close it in every other process")))
    }

    fn catch_up(&self, connection: &mut Connection) -> rusqlite::Result<Position> {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let stored = transaction
            .query_row("SELECT ledger, batch, line FROM delivered", [], |row| {
                Ok((row.get::<_, Vec<u8>>(0)?, Position { batch: row.get(1)?, line: row.get(2)? }))
            })
            .optional()?;
        let reached = match stored {
            Some((ledger, position)) if ledger == self.ledger => position.max(self.reached),
            Some(_) => {
                let path = self.path.display();
                log_throttled!(
                    warn,
                    &path.to_string(),
                    code = "database-of-other-ledger",
                    %path,
                    "the events in {path} came from another ledger, or the ledger was recreated; delivery continues \
                     from the ledger's position"
                );
                self.reached
            }
            None => self.reached,
        };
        transaction.execute(
            "INSERT INTO delivered VALUES (0, ?1, ?2, ?3) \
             ON CONFLICT DO UPDATE SET ledger = excluded.ledger, batch = excluded.batch, line = excluded.line",
            params![self.ledger, reached.batch, reached.line],
        )?;
        transaction.commit()?;
        Ok(reached)
    }

    /// Writes what was collected and the position to the database, all or nothing.
    fn write(&mut self, behind: Position) -> Result<(), SinkError> {
        self.get_ready()?;
        let Some(open) = &mut self.open else {
            return Err(self.error("write to", "it is not open"));
        };
        let missing = self.collected.iter().filter(|row| row.behind > self.reached);
        match insert(&mut open.connection, &mut self.commons, &self.ledger, missing, behind) {
            Ok(true) => Ok(()),
            Ok(false) => {
                let why = "another auditgate took it over (give each its own), or a trigger of another program keeps \
                           its table `delivered` as it is";
                Err(self.error("write to", why))
            }
            Err(rusqlite::Error::StatementChangedRows(_)) => {
                let why = "an insert did not add one row; remove the trigger that another program put there";
                Err(self.error("write to", why))
            }
            Err(error) => Err(failed("write to", &self.path)(error)),
        }
    }

    /// Deletes expired rows and shrinks the file, a little at a time. A failure is retried later.
    fn run_housekeeping(&mut self, steps: usize) {
        if let Err(error) = self.clean_up(steps) {
            let path = self.path.display();
            log_throttled!(
                warn,
                &path.to_string(),
                code = "database-expiry-failed",
                %path,
                "expired events stay in {path}: {error}; retrying"
            );
            self.distrusted = true;
        }
    }

    fn clean_up(&mut self, steps: usize) -> Result<(), SinkError> {
        let mut cutoff = None;
        for _ in 0..steps {
            self.get_ready()?;
            let Self { path, retention, open: Some(Open { connection, .. }), commons, .. } = self else {
                break;
            };
            let delete_some = || -> rusqlite::Result<usize> {
                if let (Some(retention), None) = (retention, cutoff) {
                    cutoff = Some(retention.cutoff(connection, path)?);
                }
                let deleted = cutoff.map_or(Ok(0), |cutoff| delete_some(connection, commons, cutoff))?;
                // There is free space without `retain` too, after a migration.
                Ok(deleted + database::shrink(connection, SHRINK_PAGES)?)
            };
            if delete_some().map_err(failed("delete expired events from", path))? == 0 {
                break;
            }
        }
        Ok(())
    }

    fn error(&self, verb: &str, why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> SinkError {
        let what = format!("cannot {verb} the database {}", self.path.display());
        SinkError::new(what, io::Error::other(why))
    }
}

impl Sink for SqliteSink {
    fn resume(&mut self, last: &Resume) -> Result<Resume, SinkError> {
        self.collected.clear();
        self.collected_bytes = 0;
        self.reached = last.position;
        self.reopen()?;
        Ok(Resume { position: self.reached, mark: Vec::new() })
    }

    fn push(&mut self, item: &Item<'_>) {
        let row = Row::new(item);
        self.collected_bytes += row.size();
        self.collected.push(row);
    }

    fn collected(&self) -> usize {
        self.collected_bytes
    }

    fn flush(&mut self, behind: Position, _at_once: bool) -> Result<Option<Resume>, SinkError> {
        let rows = self.collected.len();
        // The ledger's position may run ahead of ours over batches that this sink does not take.
        if rows > 0 {
            if let Err(error) = self.write(behind) {
                self.distrusted = true;
                return Err(error);
            }
            self.collected.clear();
            self.collected_bytes = 0;
        }
        self.reached = self.reached.max(behind);
        // At least as many rows are deleted as were inserted, so that a busy database does not grow
        // without limit.
        self.run_housekeeping(rows.div_ceil(STEP) + 1);
        Ok(Some(Resume { position: behind, mark: Vec::new() }))
    }

    fn idle(&mut self) {
        self.run_housekeeping(IDLE_STEPS);
    }
}

/// Inserts the rows in one transaction. Returns false, and writes nothing, when the database holds
/// another ledger's position now.
fn insert<'a>(
    connection: &mut Connection,
    commons: &mut Commons,
    ledger: &[u8; 16],
    rows: impl Iterator<Item = &'a Row>,
    behind: Position,
) -> rusqlite::Result<bool> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let noted = transaction
        .prepare_cached("UPDATE delivered SET batch = ?2, line = ?3 WHERE ledger = ?1")?
        .execute(params![ledger, behind.batch, behind.line])?;
    if noted == 0 {
        return Ok(false);
    }
    for row in rows {
        // A trigger could suppress it, and the row would count as delivered.
        match row.insert(&transaction, commons)? {
            1 => {}
            changed => return Err(rusqlite::Error::StatementChangedRows(changed)),
        }
    }
    transaction.commit()?;
    Ok(true)
}

/// Deletes the oldest rows that arrived before `cutoff`; returns their number.
fn delete_some(connection: &Connection, commons: &mut Commons, cutoff: i64) -> rusqlite::Result<usize> {
    const DELETE_EVENTS: &str = "DELETE FROM event_rows WHERE id IN \
         (SELECT id FROM event_rows WHERE received_at < ?1 ORDER BY received_at LIMIT ?2)";
    let deleted = connection.prepare_cached(DELETE_EVENTS)?.execute(params![cutoff, STEP])?;
    let shared = common::delete_some(connection, cutoff, STEP)?;
    if shared > 0 {
        // Events that waited longer than `retain` would refer to them.
        commons.forget();
    }
    Ok(deleted + shared + delete_some_quarantined(connection, cutoff)?)
}

fn delete_some_quarantined(connection: &Connection, cutoff: i64) -> rusqlite::Result<usize> {
    const DELETE: &str = "DELETE FROM quarantine WHERE id IN \
         (SELECT id FROM quarantine WHERE received_at < ?1 ORDER BY received_at LIMIT ?2)";
    connection.prepare_cached(DELETE)?.execute(params![cutoff, STEP])
}

/// Deletes the quarantined lines of a sink's database that arrived before `cutoff` (milliseconds
/// since the Unix epoch), and shrinks the file; returns their number. The daemon may be writing to
/// the database: each transaction is small, so that it never waits long.
///
/// # Errors
/// When the database cannot be used or written. What was deleted before stays deleted.
pub fn prune_quarantine(path: &Path, cutoff: i64) -> Result<u64, SinkError> {
    let connection = schema::open_existing(path)?;
    let mut deleted = 0;
    let mut work = || -> rusqlite::Result<()> {
        loop {
            let some = delete_some_quarantined(&connection, cutoff)?;
            deleted += some as u64;
            if some + database::shrink(&connection, SHRINK_PAGES)? == 0 {
                break;
            }
            database::checkpoint(&connection, database::CHECKPOINT_PAGES)?;
        }
        database::checkpoint(&connection, 0)
    };
    work().map_err(failed("delete quarantined lines from", path))?;
    Ok(deleted)
}

#[cfg(test)]
mod tests;
