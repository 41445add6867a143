//! The rows of a SQLite sink, read back by whoever wants to prove them. Never writes, and never keeps a
//! transaction open from one call to the next, so that the daemon can go on writing and emptying its log.

use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rusqlite::types::{ToSqlOutput, Value, ValueRef};
use rusqlite::{Connection, ErrorCode, OpenFlags, Row, params};

use super::row::{FIELDS, columns};
use super::schema;
use crate::wire::line::Line;

/// The first bytes of a SQLite database (<https://www.sqlite.org/fileformat2.html>, section 1.3).
pub const MAGIC: &[u8; 16] = b"SQLite format 3\0";

/// Whether a sink of ours made a database. SQLite is asked, for what says so may still be in its log.
///
/// # Errors
/// When it cannot be opened.
pub fn is_ours(path: &Path) -> rusqlite::Result<bool> {
    Ok(Database::open(path)?.is_some())
}

/// A row of the table `events`.
#[derive(Debug)]
pub struct Stored {
    /// Its `id`.
    pub id: i64,
    /// The line as it was received.
    pub raw: Vec<u8>,
    /// The key that the row says verified it.
    pub key_id: Option<String>,
    verified: Value,
    format: Value,
    extra: Value,
    fields: Vec<Value>,
}

impl Stored {
    /// Whether the row says that a key verified its line. False is what a policy let through.
    pub fn says_verified(&self) -> bool {
        self.verified != Value::Integer(0)
    }

    /// The first column that does not follow from the row's raw line; none when all do. `received_at` and `source`
    /// follow from nothing, and whoever knows the keys compares `key_id` and what [`Self::says_verified`].
    pub fn difference(&self, line: &Line<'_>) -> Option<&'static str> {
        let event = line.event();
        let (fields, extra) = columns(&event);
        let extra = extra.map_or(Value::Null, Value::Text);
        let format = Value::Text(line.format().as_str().to_owned());
        let common = [
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

/// A database of a sink, opened for reading, with the rows that it had then.
pub struct Database {
    connection: Connection,
    select: String,
    /// The last row that was read.
    behind: i64,
    last: i64,
    /// How many quarantined lines it holds beside its events.
    pub quarantined: u64,
}

impl Database {
    /// Opens it. Another process may write to it meanwhile. On a file system that cannot be written, where SQLite
    /// has no place for its index of the log, it is read as a file that does not change; a log must not be there
    /// then. None when no sink of ours made it.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(path: &Path) -> rusqlite::Result<Option<Self>> {
        match Self::open_with(path, "mode=ro") {
            Err(error) if is_read_only(&error) && !has_log(path) => Self::open_with(path, "immutable=1"),
            result => result,
        }
    }

    fn open_with(path: &Path, how: &str) -> rusqlite::Result<Option<Self>> {
        let flags =
            OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
        let connection = Connection::open_with_flags(format!("file:{}?{how}", escaped(path)), flags)?;
        connection.busy_timeout(schema::BUSY)?;
        let application: i32 = connection.pragma_query_value(None, "application_id", |row| row.get(0))?;
        if application != schema::APPLICATION_ID {
            return Ok(None);
        }
        let names: Vec<&str> = FIELDS.iter().map(|(name, _)| *name).collect();
        let select = format!(
            "SELECT id, raw, key_id, verified, format, extra, {} FROM events WHERE id > ?1 AND id <= ?2 ORDER BY id",
            names.join(", ")
        );
        let last = connection.query_row("SELECT coalesce(max(id), 0) FROM events", [], |row| row.get(0))?;
        let quarantined = connection.query_row("SELECT count(*) FROM quarantine", [], |row| row.get(0))?;
        Ok(Some(Self { connection, select, behind: i64::MIN, last, quarantined }))
    }

    /// The next rows in the order of their `id`: at most `rows`, and not many more than `bytes` of raw lines. None
    /// are left when there are none.
    ///
    /// # Errors
    /// When the database cannot be read; see [`is_damage`].
    pub fn next(&mut self, rows: usize, bytes: usize) -> rusqlite::Result<Vec<Stored>> {
        let mut select = self.connection.prepare_cached(&self.select)?;
        let mut found = select.query(params![self.behind, self.last])?;
        let mut read = Vec::new();
        let mut size = 0;
        while read.len() < rows
            && size < bytes
            && let Some(row) = found.next()?
        {
            let stored = stored(row)?;
            self.behind = stored.id;
            size += stored.raw.len();
            read.push(stored);
        }
        Ok(read)
    }

    /// The `id` of the last row that was read; 0 before the first.
    pub fn reached(&self) -> i64 {
        self.behind.max(0)
    }
}

/// Whether an error says that the file's contents are wrong, and not that reading them failed.
pub fn is_damage(error: &rusqlite::Error) -> bool {
    match error.sqlite_error_code() {
        Some(code) => matches!(code, ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase),
        None => true,
    }
}

fn stored(row: &Row<'_>) -> rusqlite::Result<Stored> {
    let raw = match row.get_ref("raw")? {
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => bytes.to_vec(),
        // A table that somebody else made; such a line is malformed.
        _ => Vec::new(),
    };
    let key_id = match row.get_ref("key_id")? {
        ValueRef::Text(text) => Some(String::from_utf8_lossy(text).into_owned()),
        _ => None,
    };
    let value = |name: &str| row.get_ref(name).map(owned);
    Ok(Stored {
        id: row.get("id")?,
        raw,
        key_id,
        verified: value("verified")?,
        format: value("format")?,
        extra: value("extra")?,
        fields: FIELDS.iter().map(|(name, _)| value(name)).collect::<Result<_, _>>()?,
    })
}

/// Text that is not UTF-8 becomes a blob, which no column of ours ever is.
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

/// A path as part of a URI (<https://www.sqlite.org/uri.html>). An absolute one, since `file:a//b` means a host.
fn escaped(path: &Path) -> String {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut out = String::new();
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b'/' | b'.' | b'-' | b'_' => out.push(char::from(*byte)),
            byte if byte.is_ascii_alphanumeric() => out.push(char::from(*byte)),
            byte => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAW: &str = r#"{"rt":5,"status":200,"x":"y"}"#;

    /// A database under a name that a URI has to escape, with rows of that ID.
    fn database(dir: &Path, ids: &[i64]) -> std::path::PathBuf {
        let path = dir.join("a b?mode=rwc#%41.db");
        let open = schema::open(&path).unwrap();
        for id in ids {
            let insert = "INSERT INTO events (id, received_at, source, verified, key_id, format, rt, status, extra, raw) \
                          VALUES (?1, 7, 'us', 1, 'k', 'json', 5, 200, '{\"event\":{\"x\":\"y\"}}', ?2)";
            open.connection.execute(insert, params![id, RAW]).unwrap();
        }
        path
    }

    #[test]
    fn rows_come_in_portions_in_the_order_of_their_id() {
        let dir = tempfile::tempdir().unwrap();
        let path = database(dir.path(), &[9, 1, 4, 7, 2]);
        for how in ["mode=ro", "immutable=1"] {
            let mut database = Database::open_with(&path, how).unwrap().unwrap();
            let mut next = |rows, bytes| -> Vec<i64> {
                database.next(rows, bytes).unwrap().iter().map(|row| row.id).collect()
            };
            assert_eq!(next(2, usize::MAX), [1, 2]);
            assert_eq!(next(9, 1), [4]);
            assert_eq!(next(9, usize::MAX), [7, 9]);
            assert!(next(9, usize::MAX).is_empty());
            assert_eq!(database.reached(), 9);
        }
        assert!(Database::open(&dir.path().join("gone.db")).is_err());
    }

    #[test]
    fn rows_that_come_later_are_not_read_and_do_not_wait() {
        let dir = tempfile::tempdir().unwrap();
        let path = database(dir.path(), &[1, 2]);
        let mut reader = Database::open(&path).unwrap().unwrap();
        assert_eq!(reader.next(1, usize::MAX).unwrap().len(), 1);
        let writer = Connection::open(&path).unwrap();
        let insert = "INSERT INTO events (id, received_at, source, verified, format, raw) VALUES (3, 7, 'us', 1, 'json', '{}')";
        writer.execute(insert, []).unwrap();
        // Nothing of the reader's keeps the log from being emptied.
        let busy: i64 = writer.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0)).unwrap();
        assert_eq!(busy, 0);
        let rest: Vec<i64> = reader.next(9, usize::MAX).unwrap().iter().map(|row| row.id).collect();
        assert_eq!(rest, [2]);
    }

    #[test]
    fn every_column_must_follow_from_the_raw_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = database(dir.path(), &[1]);
        let line = Line::parse(RAW.as_bytes()).unwrap();
        let difference = || Database::open(&path).unwrap().unwrap().next(1, 1).unwrap()[0].difference(&line);
        assert_eq!(difference(), None);
        let writer = Connection::open(&path).unwrap();
        for (column, wrong) in [
            ("verified", "2"),
            ("format", "'cef'"),
            ("extra", "NULL"),
            ("status", "201"),
            ("rt", "NULL"),
            ("act", "''"),
        ] {
            writer.execute_batch("CREATE TEMP TABLE kept AS SELECT * FROM events").unwrap();
            writer.execute_batch(&format!("UPDATE events SET {column} = {wrong}")).unwrap();
            assert_eq!(difference(), Some(column));
            let restore =
                format!("UPDATE events SET {column} = (SELECT {column} FROM kept); DROP TABLE kept");
            writer.execute_batch(&restore).unwrap();
            assert_eq!(difference(), None);
        }
    }
}
