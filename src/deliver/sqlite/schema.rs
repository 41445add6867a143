//! The tables, the pragmas, the versions between which we migrate, and which files are none of ours.
//!
//! `events` holds what came through, verified or not as `verified` says; what was refused is in `quarantine`,
//! a table of its own, so that no query for events can ever be answered with a line that somebody made up.

use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};

use super::super::sink::SinkError;
use crate::database;

/// "aude": marks the file as ours (`PRAGMA application_id`), and not as the ledger.
pub(super) const APPLICATION_ID: i32 = 0x6175_6465;

/// Each step brings the tables from the version of its index to the next (`PRAGMA user_version`). A step that
/// was released is never changed.
const STEPS: [&str; 1] = [VERSION_1];

/// Times are in milliseconds since the Unix epoch. `time` is the event's own, or that of its arrival where
/// its `rt` cannot be read, so that no query by time misses an event. `extra` holds what has no column as
/// `{"ambiguous":[…],"event":{…}}`; it is NULL when there is nothing. `raw` of a quarantined line is TEXT, or
/// BLOB where it is not UTF-8. `raw` stands last, since it is long and seldom asked for.
const VERSION_1: &str = "
    CREATE TABLE events (
        id INTEGER PRIMARY KEY,
        time INTEGER NOT NULL AS (coalesce(rt, received_at)) VIRTUAL,
        received_at INTEGER NOT NULL,
        source TEXT NOT NULL,
        verified INTEGER NOT NULL,
        key_id TEXT,
        format TEXT NOT NULL,
        event_ts TEXT,
        rt INTEGER,
        cef_version TEXT,
        event_vendor TEXT,
        event_product TEXT,
        event_version TEXT,
        event_class_id TEXT,
        name TEXT,
        severity INTEGER,
        org_id TEXT,
        portal_id TEXT,
        trace_id TEXT,
        principal_id TEXT,
        principal_name TEXT,
        actor_id TEXT,
        kong_initiated INTEGER,
        src TEXT,
        success INTEGER,
        action TEXT,
        granted INTEGER,
        act TEXT,
        status INTEGER,
        request TEXT,
        query TEXT,
        user_agent TEXT,
        sig TEXT,
        extra TEXT,
        raw TEXT NOT NULL
    ) STRICT;
    CREATE INDEX events_time ON events (time);
    CREATE INDEX events_received_at ON events (received_at);
    CREATE INDEX events_trace_id ON events (trace_id);
    CREATE INDEX events_principal_id ON events (principal_id, time);
    CREATE INDEX events_denied ON events (time) WHERE granted = 0;
    CREATE INDEX events_failed ON events (time) WHERE success = 0;
    CREATE TABLE quarantine (
        id INTEGER PRIMARY KEY,
        received_at INTEGER NOT NULL,
        source TEXT NOT NULL,
        reason TEXT NOT NULL,
        detail TEXT NOT NULL,
        raw ANY NOT NULL
    ) STRICT;
    CREATE INDEX quarantine_received_at ON quarantine (received_at);
    CREATE TABLE delivered (
        id INTEGER PRIMARY KEY CHECK (id = 0),
        ledger BLOB NOT NULL,
        batch INTEGER NOT NULL,
        line INTEGER NOT NULL
    ) STRICT;
";

/// How long a write waits for another program that writes.
pub(super) const BUSY: Duration = Duration::from_secs(5);

/// An open database, and which file it is in.
pub(super) struct Open {
    pub(super) connection: Connection,
    device: u64,
    inode: u64,
}

impl Open {
    /// Whether the path still leads to the file. SQLite would go on in a file that was deleted.
    pub(super) fn is_at(&self, path: &Path) -> bool {
        path.metadata().is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == (self.device, self.inode))
    }
}

/// Opens the database, makes it or brings it to this version.
///
/// # Errors
/// When it cannot be used. What is no database of ours is left as it is.
pub(super) fn open(path: &Path) -> Result<Open, SinkError> {
    make_file(path).map_err(|cause| SinkError::new(what("make", path), cause))?;
    must_be_file(path)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags).map_err(failed("open", path))?;
    let version = examine(&connection, path)?;
    let mode = database::prepare(&connection, BUSY).map_err(failed("open", path))?;
    if mode != "wal" {
        // SQLite needs memory that processes share, which a network file system has not.
        let why = format!("its journal mode stays `{mode}` instead of `wal`; put it on a local disk");
        return Err(SinkError::new(what("use", path), io::Error::other(why)));
    }
    migrate(&mut connection, version, &STEPS).map_err(failed("make tables in", path))?;
    let metadata = path.metadata().map_err(|cause| SinkError::new(what("look at", path), cause))?;
    Ok(Open { connection, device: metadata.dev(), inode: metadata.ino() })
}

/// Says whether [`open`] would refuse what is at a path. Changes nothing there; nothing there is fine.
///
/// # Errors
/// What is wrong with it; the cause is [`io::ErrorKind::InvalidData`] when it is no database of ours.
pub(super) fn check(path: &Path) -> Result<(), SinkError> {
    if !path.exists() {
        return Ok(());
    }
    must_be_file(path)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(failed("open", path))?;
    connection.busy_timeout(Duration::from_millis(100)).map_err(failed("open", path))?;
    examine(&connection, path).map(|_| ())
}

/// Turns SQLite's words into the sink's.
pub(super) fn failed(verb: &str, path: &Path) -> impl FnOnce(rusqlite::Error) -> SinkError {
    let what = what(verb, path);
    move |error| {
        let cause = match error.sqlite_error() {
            Some(code) => io::Error::other(format!("{error} (SQLite code {})", code.extended_code)),
            None => io::Error::other(error),
        };
        SinkError::new(what, cause)
    }
}

fn what(verb: &str, path: &Path) -> String {
    format!("cannot {verb} the database {}", path.display())
}

/// An empty file is an empty database. Made by hand for its mode, which SQLite gives to its log too. An
/// existing file is not even opened: closing it would drop the locks of this process on it (fcntl(2)).
fn make_file(path: &Path) -> io::Result<()> {
    match File::options().create_new(true).write(true).mode(0o640).open(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// SQLite has no words of its own for what is no file, and would wait for ever for the other end of a pipe.
fn must_be_file(path: &Path) -> Result<(), SinkError> {
    let metadata = path.metadata().map_err(|cause| SinkError::new(what("look at", path), cause))?;
    if metadata.is_file() {
        return Ok(());
    }
    let found = if metadata.is_dir() { "a directory" } else { "no regular file" };
    let why = format!("it is {found}; give the sink the path of a file");
    Err(SinkError::new(what("use", path), io::Error::other(why)))
}

/// An error that trying again does not mend.
fn refused(path: &Path, why: String) -> SinkError {
    SinkError::new(what("use", path), io::Error::new(io::ErrorKind::InvalidData, why))
}

/// The version of the tables; 0 for a database without any.
fn examine(connection: &Connection, path: &Path) -> Result<usize, SinkError> {
    let refuse = |why| refused(path, why);
    let read = || {
        let pragma = |name| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
        let objects =
            connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get::<_, i64>(0))?;
        Ok((pragma("application_id")?, pragma("user_version")?, objects))
    };
    let (application, version, objects) = read().map_err(|error: rusqlite::Error| {
        if error.sqlite_error_code() == Some(ErrorCode::NotADatabase) {
            refuse("the file is no SQLite database; give the sink another path".to_owned())
        } else {
            failed("read", path)(error)
        }
    })?;
    match usize::try_from(version) {
        Ok(0) if application == 0 && objects == 0 => Ok(0),
        Ok(known @ 1..=LATEST) if application == i64::from(APPLICATION_ID) => Ok(known),
        _ if application == i64::from(APPLICATION_ID) => Err(refuse(format!(
            "it has schema version {version}, and this auditgate knows {LATEST}; use the newer auditgate, or \
             give the sink another path"
        ))),
        _ => Err(refuse("it belongs to another program; give the sink another path".to_owned())),
    }
}

const LATEST: usize = STEPS.len();

/// Takes the steps from a version on, all of them or none.
fn migrate(connection: &mut Connection, version: usize, steps: &[&str]) -> rusqlite::Result<()> {
    if version >= steps.len() {
        return Ok(());
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for step in &steps[version..] {
        transaction.execute_batch(step)?;
    }
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    transaction.pragma_update(None, "user_version", steps.len() as u64)?;
    transaction.commit()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(connection: &Connection) -> i64 {
        connection.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap()
    }

    #[test]
    fn tables_are_brought_from_version_1_to_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.db");
        let mut open = open(&path).unwrap();
        assert_eq!(version(&open.connection), 1);
        let insert = "INSERT INTO quarantine VALUES (1, 2, 'us', 'malformed', 'x', 'raw')";
        open.connection.execute(insert, []).unwrap();
        let steps = [VERSION_1, "ALTER TABLE quarantine ADD COLUMN note TEXT"];
        migrate(&mut open.connection, 1, &steps).unwrap();
        assert_eq!(version(&open.connection), 2);
        let read = "SELECT raw FROM quarantine WHERE note IS NULL";
        assert_eq!(open.connection.query_row(read, [], |row| row.get::<_, String>(0)).unwrap(), "raw");

        // A step that fails leaves everything as it was.
        let steps = [steps[0], steps[1], "CREATE TABLE new (x) STRICT"];
        assert!(migrate(&mut open.connection, 2, &steps).is_err());
        assert_eq!(version(&open.connection), 2);
    }

    #[test]
    fn what_is_not_ours_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |name: &str, expected: &str| {
            let path = dir.path().join(name);
            let before = std::fs::read(&path).unwrap();
            for error in [open(&path).map(|_| ()).unwrap_err(), check(&path).unwrap_err()] {
                assert_eq!(error.cause.kind(), io::ErrorKind::InvalidData, "{error}");
                let expected = format!("cannot use the database {}: {expected}", path.display());
                assert!(error.to_string().starts_with(&expected), "{error}");
            }
            assert_eq!(std::fs::read(&path).unwrap(), before);
        };
        std::fs::write(dir.path().join("text"), "2026-01-01 a log line\n".repeat(100)).unwrap();
        refused("text", "the file is no SQLite database; give");
        let other = Connection::open(dir.path().join("other")).unwrap();
        other.execute_batch("CREATE TABLE t (x)").unwrap();
        refused("other", "it belongs to another program; give");
        drop(open(&dir.path().join("newer")).unwrap());
        let newer = Connection::open(dir.path().join("newer")).unwrap();
        newer.pragma_update(None, "user_version", 2).unwrap();
        newer.close().unwrap();
        refused("newer", "it has schema version 2, and this auditgate knows 1; use");
    }

    #[test]
    fn what_is_no_file_is_refused_in_so_many_words() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        for (path, found) in [(dir.path(), "a directory"), (&pipe, "no regular file")] {
            for error in [open(path).map(|_| ()).unwrap_err(), check(path).unwrap_err()] {
                // Somebody may put a file there.
                assert_ne!(error.cause.kind(), io::ErrorKind::InvalidData, "{error}");
                let expected = format!(
                    "cannot use the database {}: it is {found}; give the sink the path of a file",
                    path.display()
                );
                assert_eq!(error.to_string(), expected);
            }
        }
    }

    #[test]
    fn an_empty_file_and_a_start_that_was_cut_short_are_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.db");
        check(&path).unwrap();
        assert!(!path.exists());
        std::fs::write(&path, "").unwrap();
        check(&path).unwrap();
        let connection = Connection::open(&path).unwrap();
        database::prepare(&connection, BUSY).unwrap();
        drop(connection);
        assert!(path.metadata().unwrap().len() > 0);
        check(&path).unwrap();
        let open = open(&path).unwrap();
        let pragma = |name| open.connection.pragma_query_value(None, name, |row| row.get(0));
        assert_eq!(pragma("auto_vacuum"), Ok(2));
        assert_eq!(pragma("synchronous"), Ok(2));
        assert!(open.is_at(&path));
        std::fs::rename(&path, dir.path().join("elsewhere")).unwrap();
        assert!(!open.is_at(&path));
    }
}
