//! The rows of a SQLite sink, read back to be verified again. Never writes, and never keeps a
//! transaction open from one call to the next, so that the daemon can go on writing and emptying
//! its log.

use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use rusqlite::types::{ToSqlOutput, Value, ValueRef};
use rusqlite::{Connection, ErrorCode, OpenFlags, Row, params};

use super::fields::FIELDS;
use super::row::{self, columns};
use super::schema;
use crate::wire::event::Reason;
use crate::wire::line::Line;

/// The first bytes of a SQLite database (<https://www.sqlite.org/fileformat2.html>, section 1.3).
pub const MAGIC: &[u8; 16] = b"SQLite format 3\0";

/// Kind of a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatabaseKind {
    /// A sink's, or another with a table `events`: only the table counts, whatever else the file
    /// says of itself.
    Events,
    /// It has no table yet, as far as the file shows: there may have been one in a log that is no
    /// longer with it.
    Nothing,
    /// Another program's.
    Other,
}

/// Returns the kind of a database. Asks SQLite, since the table may still be in the log only.
///
/// # Errors
/// When it cannot be opened.
pub fn database_kind(path: &Path) -> rusqlite::Result<DatabaseKind> {
    connect(path).and_then(|connection| examine(&connection))
}

/// Reason why a database cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There are no events to read.
    #[error(
        "it is a database without a table `events`: another program made it, or it was copied without its log (the \
         file of the same name with `-wal`), which has what was written last; copy both"
    )]
    NoEvents,
    /// Its log needs an index, which SQLite cannot write into its directory.
    #[error(
        "it has a log (the file of the same name with `-wal`), and SQLite must be able to write an index of it next to \
         it ({0}); copy both files to a directory that you can write to, and check the copy"
    )]
    NoIndex(rusqlite::Error),
    /// A table of it is not as a sink creates it.
    #[error("its table `{0}` is not as a SQLite sink makes it: {1}")]
    OtherColumns(&'static str, String),
    /// An error of SQLite.
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
}

/// A row of the table `events`.
#[derive(Debug)]
pub struct EventRow {
    /// Its `id`.
    pub id: i64,
    /// The line as it was received.
    pub raw: Vec<u8>,
    /// ID of the key that verified it, according to the row.
    pub key_id: Option<String>,
    /// `raw` is text and not a blob.
    is_text: bool,
    verified: Value,
    format: Value,
    extra: Value,
    fields: Vec<Value>,
}

impl EventRow {
    /// Returns whether the row says that a key verified its line. False is a line that a policy
    /// accepted.
    pub fn says_verified(&self) -> bool {
        self.verified != Value::Integer(0)
    }

    /// Returns the first column that does not follow from the row's raw line; none when all do.
    /// `received_at` and `source` follow from nothing, and the caller, which knows the keys,
    /// compares `key_id` and what [`Self::says_verified`].
    pub fn difference(&self, line: &Line<'_>) -> Option<&'static str> {
        let event = line.event();
        let (fields, extra) = columns(&event);
        let extra = extra.map_or(Value::Null, Value::Text);
        let format = Value::Text(line.format().as_str().to_owned());
        // No LIKE finds a blob, and none finds what follows a NUL character in text.
        let must_be_text = matches!(row::raw(&self.raw), ToSqlOutput::Borrowed(ValueRef::Text(_)));
        let common = [
            ("raw", self.is_text == must_be_text),
            ("verified", matches!(self.verified, Value::Integer(0 | 1))),
            ("format", self.format == format),
            ("extra", self.extra == extra),
        ];
        let different = common.into_iter().find(|(_, is_right)| !is_right).map(|(name, _)| name);
        different.or_else(|| {
            let mut pairs = FIELDS.iter().zip(fields.iter().zip(&self.fields));
            pairs.find(|(_, (wanted, stored))| !is_same(wanted, stored)).map(|((name, _), _)| *name)
        })
    }
}

/// A row of the table `quarantine`.
#[derive(Debug)]
pub struct QuarantineRow {
    /// Its `id`.
    pub id: i64,
    /// The line as it was received.
    pub raw: Vec<u8>,
    /// Time at which its batch arrived, in milliseconds since the Unix epoch.
    pub received_at: i64,
    /// The configured name of its source.
    pub source: String,
    /// Reason of the rejection.
    pub reason: String,
    /// Description of the error.
    pub detail: String,
    /// Its reason is one of [`Reason`].
    pub has_known_reason: bool,
}

/// A database of a sink, opened for reading, with the rows that it had then.
pub struct Database {
    connection: Connection,
    events: Cursor,
    quarantine: Option<Cursor>,
    /// Number of quarantined lines.
    pub quarantined: u64,
}

/// Progress of reading the rows of a table.
struct Cursor {
    /// Rows between two `id`s, in their order.
    select: String,
    /// The `id` of the last row that was read.
    behind: Option<i64>,
    /// The greatest `id`, when there is a row.
    last: Option<i64>,
}

impl Cursor {
    fn new(connection: &Connection, table: &str, columns: &str) -> rusqlite::Result<Self> {
        let select =
            format!("SELECT id, raw, {columns} FROM {table} WHERE id >= ?1 AND id <= ?2 ORDER BY id");
        connection.prepare(&select)?;
        let last = connection.query_row(&format!("SELECT max(id) FROM {table}"), [], |row| row.get(0))?;
        Ok(Self { select, behind: None, last })
    }

    /// Returns the next rows: at most `rows`, and not many more than `bytes` of raw lines.
    fn next<T>(
        &mut self,
        connection: &Connection,
        (rows, bytes): (usize, usize),
        make: impl Fn(i64, Vec<u8>, &Row<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<Vec<T>> {
        let mut read = Vec::new();
        let first = self.behind.map_or(Some(i64::MIN), |behind| behind.checked_add(1));
        let (Some(first), Some(last)) = (first, self.last) else { return Ok(read) };
        let mut select = connection.prepare_cached(&self.select)?;
        let mut found = select.query(params![first, last])?;
        let mut size = 0;
        while read.len() < rows
            && size < bytes
            && let Some(row) = found.next()?
        {
            let (id, raw) = (row.get("id")?, raw(row)?);
            size += raw.len();
            read.push(make(id, raw, row)?);
            self.behind = Some(id);
        }
        Ok(read)
    }
}

impl Database {
    /// Opens a database. Another process may write to it meanwhile. On a read-only file system,
    /// where SQLite cannot put its index of the log, it is read as a file that does not change;
    /// there must be no log then.
    ///
    /// # Errors
    /// When it cannot be opened, or has no events.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let connection = match connect(path) {
            Err(error) if is_read_only(&error) && has_log(path) => return Err(OpenError::NoIndex(error)),
            result => result?,
        };
        Self::over(connection)
    }

    fn over(connection: Connection) -> Result<Self, OpenError> {
        if examine(&connection)? != DatabaseKind::Events {
            return Err(OpenError::NoEvents);
        }
        let other_columns = |table| {
            move |error| match error {
                rusqlite::Error::SqlInputError { msg, .. } => OpenError::OtherColumns(table, msg),
                other => other.into(),
            }
        };
        let names: Vec<&str> = FIELDS.iter().map(|(name, _)| *name).collect();
        let columns = format!("key_id, verified, format, extra, {}", names.join(", "));
        let events = Cursor::new(&connection, "events", &columns).map_err(other_columns("events"))?;
        let (mut quarantine, mut quarantined) = (None, 0);
        if has_table(&connection, "quarantine")? {
            let cursor = Cursor::new(&connection, "quarantine", "received_at, source, reason, detail");
            quarantine = Some(cursor.map_err(other_columns("quarantine"))?);
            quarantined = connection.query_row("SELECT count(*) FROM quarantine", [], |row| row.get(0))?;
        }
        Ok(Self { connection, events, quarantine, quarantined })
    }

    /// Returns the next rows in the order of their `id`: at most `rows`, and not many more than
    /// `bytes` of raw lines. None are returned only after the last one; [`Self::damage`] says
    /// whether these were all.
    ///
    /// # Errors
    /// When the database cannot be read; see [`is_damage`].
    pub fn next(&mut self, rows: usize, bytes: usize) -> rusqlite::Result<Vec<EventRow>> {
        self.events.next(&self.connection, (rows, bytes), stored)
    }

    /// Returns the next rows of the table `quarantine`; bounded, and failing, like [`Self::next`].
    ///
    /// # Errors
    /// When the database cannot be read; see [`is_damage`].
    pub fn next_refused(&mut self, rows: usize, bytes: usize) -> rusqlite::Result<Vec<QuarantineRow>> {
        let Some(quarantine) = &mut self.quarantine else { return Ok(Vec::new()) };
        quarantine.next(&self.connection, (rows, bytes), |id, raw, row| {
            let text = |name: &str| -> rusqlite::Result<String> {
                Ok(match row.get_ref(name)? {
                    ValueRef::Text(text) => String::from_utf8_lossy(text).into_owned(),
                    // A table that another program created.
                    _ => String::new(),
                })
            };
            let reason = text("reason")?;
            let has_known_reason = Reason::ALL.iter().any(|known| known.as_str() == reason);
            let received_at = row.get_ref("received_at")?.as_i64().unwrap_or_default();
            let (source, detail) = (text("source")?, text("detail")?);
            Ok(QuarantineRow { id, raw, received_at, source, reason, detail, has_known_reason })
        })
    }

    /// Returns, once all rows are read, what shows that rows may be missing among or after them:
    /// SQLite silently skips some kinds of damage, such as a page that was replaced by another one.
    /// Reads the whole file, and keeps a transaction open meanwhile: the daemon can go on writing,
    /// but not empty its log.
    ///
    /// # Errors
    /// When the database cannot be read; see [`is_damage`].
    pub fn damage(&self) -> rusqlite::Result<Option<String>> {
        // A row may also have been deleted since, by `retain`; then there is none left to reach.
        let last: Option<i64> = self.connection.query_row(
            "SELECT max(id) FROM events WHERE id <= ?1",
            [self.events.last],
            |row| row.get(0),
        )?;
        if last > self.events.behind {
            let (last, behind) = (last.unwrap_or_default(), self.reached());
            return Ok(Some(format!(
                "there are rows up to id {last}, but none can be read after id {behind}"
            )));
        }
        // Whatever the file says of itself: a program that changes its tables can change that too.
        if let Some(what) = schema::difference(&self.connection)? {
            return Ok(Some(format!("its tables are not as a SQLite sink makes them: {what}")));
        }
        let said: String = self.connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
        // It names the database before it says what is wrong.
        let what = said.rsplit('\n').next().unwrap_or(&said);
        Ok((said != "ok").then(|| format!("rows may be missing among those that were read: {what}")))
    }

    /// Returns the `id` of the last row that was read; 0 before the first.
    pub fn reached(&self) -> i64 {
        self.events.behind.unwrap_or_default().max(0)
    }
}

/// Opens a database for reading only.
fn connect(path: &Path) -> rusqlite::Result<Connection> {
    match connect_with(path, "mode=ro") {
        Err(error) if is_read_only(&error) && !has_log(path) => connect_with(path, "immutable=1"),
        result => result,
    }
}

fn connect_with(path: &Path, how: &str) -> rusqlite::Result<Connection> {
    let flags =
        OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
    let connection = Connection::open_with_flags(format!("file:{}?{how}", escaped(path)), flags)?;
    connection.busy_timeout(schema::BUSY_TIMEOUT)?;
    // The first read opens the file and its log.
    connection.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
    Ok(connection)
}

fn examine(connection: &Connection) -> rusqlite::Result<DatabaseKind> {
    let application: i32 = connection.pragma_query_value(None, "application_id", |row| row.get(0))?;
    if has_table(connection, "events")? || application == schema::APPLICATION_ID {
        return Ok(DatabaseKind::Events);
    }
    let is_empty = connection.query_row("SELECT count(*) = 0 FROM sqlite_schema", [], |row| row.get(0))?;
    Ok(if is_empty { DatabaseKind::Nothing } else { DatabaseKind::Other })
}

/// Returns whether there is a table or view of that name.
fn has_table(connection: &Connection, name: &str) -> rusqlite::Result<bool> {
    const HAS: &str =
        "SELECT count(*) > 0 FROM sqlite_schema WHERE type IN ('table', 'view') AND lower(name) = ?1";
    connection.query_row(HAS, [name], |row| row.get(0))
}

/// Counts events by their name, the most frequent first.
pub const COUNT_BY_NAME: &str = "SELECT name, count(*) FROM events GROUP BY name ORDER BY 2 DESC";

/// Returns what [`COUNT_BY_NAME`] finds.
///
/// # Errors
/// When the database cannot be read.
pub fn count_by_name(path: &Path) -> rusqlite::Result<Vec<(String, u64)>> {
    let connection = connect(path)?;
    let mut count = connection.prepare(COUNT_BY_NAME)?;
    count.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
}

/// Returns whether an error says that the file's contents are wrong, and not that reading them
/// failed.
pub fn is_damage(error: &rusqlite::Error) -> bool {
    match error.sqlite_error_code() {
        Some(code) => matches!(code, ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase),
        None => true,
    }
}

fn raw(row: &Row<'_>) -> rusqlite::Result<Vec<u8>> {
    Ok(match row.get_ref("raw")? {
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => bytes.to_vec(),
        // A table that another program created; such a line is malformed.
        _ => Vec::new(),
    })
}

fn stored(id: i64, raw: Vec<u8>, row: &Row<'_>) -> rusqlite::Result<EventRow> {
    let is_text = matches!(row.get_ref("raw")?, ValueRef::Text(_));
    let key_id = match row.get_ref("key_id")? {
        ValueRef::Text(text) => Some(String::from_utf8_lossy(text).into_owned()),
        _ => None,
    };
    let value = |name: &str| row.get_ref(name).map(owned);
    Ok(EventRow {
        id,
        raw,
        key_id,
        is_text,
        verified: value("verified")?,
        format: value("format")?,
        extra: value("extra")?,
        fields: FIELDS.iter().map(|(name, _)| value(name)).collect::<Result<_, _>>()?,
    })
}

/// Converts a value. Text that is not UTF-8 becomes a blob, which no column of ours ever is.
fn owned(value: ValueRef<'_>) -> Value {
    match value {
        ValueRef::Null => Value::Null,
        ValueRef::Integer(number) => Value::Integer(number),
        ValueRef::Real(number) => Value::Real(number),
        ValueRef::Text(text) => match std::str::from_utf8(text) {
            Ok(text) => Value::Text(text.to_owned()),
            Err(_) => Value::Blob(text.to_vec()),
        },
        ValueRef::Blob(bytes) => Value::Blob(bytes.to_vec()),
    }
}

fn is_same(wanted: &ToSqlOutput<'_>, stored: &Value) -> bool {
    match wanted {
        ToSqlOutput::Borrowed(wanted) => *wanted == ValueRef::from(stored),
        ToSqlOutput::Owned(wanted) => wanted == stored,
        _ => false,
    }
}

fn is_read_only(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly))
}

fn has_log(path: &Path) -> bool {
    let mut log = path.as_os_str().to_owned();
    log.push("-wal");
    Path::new(&log).metadata().is_ok_and(|metadata| metadata.len() > 0)
}

/// Returns a path as part of a URI (<https://www.sqlite.org/uri.html>). An absolute one, since
/// `file:a//b` means a host.
fn escaped(path: &Path) -> String {
    const OTHERS: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'.').remove(b'-').remove(b'_');
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    percent_encode(path.as_os_str().as_bytes(), OTHERS).to_string()
}

#[cfg(test)]
mod tests;
