//! Opening a database: its pragmas, its version, and which files are not ours. The tables are in
//! [`super::steps`].

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};

use super::super::sink::SinkError;
use super::steps::{STEPS, Step};
use crate::database;

/// "aude": marks the file as ours (`PRAGMA application_id`), and not as the ledger.
pub(super) const APPLICATION_ID: i32 = 0x6175_6465;

/// Time that a write waits for another program that writes.
pub(super) const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// An open database, and which file it is in.
pub(super) struct Open {
    pub(super) connection: Connection,
    device: u64,
    inode: u64,
}

impl Open {
    /// Returns whether the path still leads to the file. SQLite would continue in a deleted file.
    pub(super) fn is_at(&self, path: &Path) -> bool {
        path.metadata().is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == (self.device, self.inode))
    }
}

/// Opens the database, creates it or migrates it to this version.
///
/// # Errors
/// When it cannot be used. A file that is not a database of ours is left as it is.
pub(super) fn open(path: &Path) -> Result<Open, SinkError> {
    make_file(path).map_err(|cause| SinkError::new(what("make", path), cause))?;
    let mut open = connect(path)?;
    let version = examine(&open.connection, path)?;
    let mode = database::prepare(&open.connection, BUSY_TIMEOUT).map_err(failed("open", path))?;
    if mode != "wal" {
        // SQLite needs memory that processes share, which a network file system does not provide.
        let why = format!("its journal mode stays `{mode}` instead of `wal`; put it on a local disk");
        return Err(SinkError::new(what("use", path), io::Error::other(why)));
    }
    migrate_file(&mut open.connection, version, path).map_err(failed("make tables in", path))?;
    Ok(open)
}

/// Opens an existing file, and reads nothing of it.
pub(super) fn connect(path: &Path) -> Result<Open, SinkError> {
    must_be_file(path)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(failed("open", path))?;
    let metadata = path.metadata().map_err(|cause| SinkError::new(what("inspect", path), cause))?;
    Ok(Open { connection, device: metadata.dev(), inode: metadata.ino() })
}

/// Opens an existing database of ours for a change of its rows, and migrates nothing: a daemon of
/// another version may be writing to it.
///
/// # Errors
/// When it cannot be used.
pub(super) fn open_existing(path: &Path) -> Result<Connection, SinkError> {
    let Open { connection, .. } = connect(path)?;
    if examine(&connection, path)? == 0 {
        return Err(refused(path, "it has no tables yet".to_owned()));
    }
    database::prepare(&connection, BUSY_TIMEOUT).map_err(failed("open", path))?;
    Ok(connection)
}

/// Checks whether [`open`] would refuse the file at a path. Changes nothing; a missing file is
/// fine.
///
/// # Errors
/// What is wrong with it; the cause is [`io::ErrorKind::InvalidData`] when it is not a database of
/// ours.
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

/// Converts an error of SQLite.
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

/// Creates an empty file, which is an empty database. Created by hand for its mode, which SQLite
/// gives to its log too. An existing file is not even opened: closing it would drop the locks of
/// this process on it (fcntl(2)).
fn make_file(path: &Path) -> io::Result<()> {
    match File::options().create_new(true).write(true).mode(0o640).open(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Checks that the path leads to a regular file. SQLite does not report anything else, and would
/// wait forever for the other end of a pipe.
fn must_be_file(path: &Path) -> Result<(), SinkError> {
    let metadata = path.metadata().map_err(|cause| SinkError::new(what("inspect", path), cause))?;
    if metadata.is_file() {
        return Ok(());
    }
    let found = if metadata.is_dir() { "a directory" } else { "not a regular file" };
    let why = format!("it is {found}; give the sink the path of a file");
    Err(SinkError::new(what("use", path), io::Error::other(why)))
}

/// Creates an error that another attempt does not fix.
fn refused(path: &Path, why: String) -> SinkError {
    SinkError::new(what("use", path), io::Error::new(io::ErrorKind::InvalidData, why))
}

/// Returns the version of the tables; 0 for a database without any.
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
            refuse("the file is not an SQLite database; give the sink another path".to_owned())
        } else {
            failed("read", path)(error)
        }
    })?;
    match usize::try_from(version) {
        Ok(0) if application == 0 && objects == 0 => Ok(0),
        Ok(known @ 1..=LATEST) if application == i64::from(APPLICATION_ID) => {
            match difference(connection).map_err(failed("read", path))? {
                None => Ok(known),
                Some(what) => Err(refuse(format!(
                    "its tables are not as auditgate makes them: {what}; put views, indexes and triggers into a \
                     database of your own, or give the sink another path"
                ))),
            }
        }
        _ if application == i64::from(APPLICATION_ID) => Err(refuse(format!(
            "it has schema version {version}, and this auditgate knows {LATEST}; use the newer auditgate, or \
             give the sink another path"
        ))),
        _ => Err(refuse("it belongs to another program; give the sink another path".to_owned())),
    }
}

const LATEST: usize = STEPS.len();

/// Returns what distinguishes the tables, indexes, views and triggers of a database from those that
/// a sink creates for the version that it names; none when they are the same. What `ANALYZE` leaves
/// does not count.
pub(super) fn difference(connection: &Connection) -> rusqlite::Result<Option<String>> {
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let Some(steps) =
        usize::try_from(version).ok().filter(|version| *version > 0).and_then(|version| STEPS.get(..version))
    else {
        return Ok(Some(format!(
            "schema version {version} is none of 1 to {LATEST}, which this auditgate knows"
        )));
    };
    let mut made = Connection::open_in_memory()?;
    migrate(&mut made, 0, steps)?;
    let (found, wanted) = (objects(connection)?, objects(&made)?);
    let describe = |(kind, name): &Object, what: &str| Some(format!("the {kind} `{name}` {what}"));
    for (object, sql) in &wanted {
        match found.get(object) {
            None => return Ok(describe(object, "is missing")),
            Some(other) if other != sql => return Ok(describe(object, "was changed")),
            Some(_) => {}
        }
    }
    Ok(found
        .keys()
        .find(|object| !wanted.contains_key(*object))
        .and_then(|object| describe(object, "was added")))
}

/// Type and name of something in a database.
type Object = (String, String);

/// The table that it belongs to, and its definition.
type Definition = (String, Option<String>);

/// Returns everything in a database but the tables of `ANALYZE`
/// (<https://www.sqlite.org/fileformat2.html>, section 2.6). They are recognised by their whole
/// name and type, since anyone who can write the schema can give a trigger a similar name.
fn objects(connection: &Connection) -> rusqlite::Result<BTreeMap<Object, Definition>> {
    let mut read = connection.prepare(
        "SELECT type, name, tbl_name, sql FROM sqlite_schema \
         WHERE NOT (type = 'table' AND name IN ('sqlite_stat1', 'sqlite_stat2', 'sqlite_stat3', 'sqlite_stat4'))",
    )?;
    let objects = read.query_map([], |row| Ok(((row.get(0)?, row.get(1)?), (row.get(2)?, row.get(3)?))))?;
    objects.collect()
}

/// Brings a database to this version, and logs it when there are events that this takes time for.
fn migrate_file(connection: &mut Connection, version: usize, path: &Path) -> rusqlite::Result<()> {
    if version == 0 || version >= LATEST {
        return migrate(connection, version, &STEPS);
    }
    let (start, path) = (Instant::now(), path.display());
    let rows: i64 = connection.query_row("SELECT count(*) FROM events", [], |row| row.get(0))?;
    tracing::info!(
        code = "database-migrating",
        %path,
        rows,
        "migrating {path} with {rows} events to schema version {LATEST}; events for it wait in the ledger meanwhile"
    );
    migrate(connection, version, &STEPS)?;
    let seconds = start.elapsed().as_secs();
    tracing::info!(code = "database-migrated", %path, seconds, "migrated {path} in {seconds} s");
    Ok(())
}

/// Takes the steps from a version on, all of them or none.
fn migrate(connection: &mut Connection, version: usize, steps: &[Step]) -> rusqlite::Result<()> {
    if version >= steps.len() {
        return Ok(());
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for step in &steps[version..] {
        step(&transaction)?;
    }
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    transaction.pragma_update(None, "user_version", steps.len() as u64)?;
    transaction.commit()
}

#[cfg(test)]
mod tests {
    use super::super::stored::Database;
    use super::*;

    fn version(connection: &Connection) -> i64 {
        connection.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap()
    }

    #[test]
    fn a_step_is_taken_wholly_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.db");
        let mut open = open(&path).unwrap();
        assert_eq!(version(&open.connection), 3);
        let insert = "INSERT INTO quarantine VALUES (1, 2, 'us', 'malformed', 'x', 'raw')";
        open.connection.execute(insert, []).unwrap();
        let add: Step = |connection| connection.execute_batch("ALTER TABLE quarantine ADD COLUMN note TEXT");
        let steps = [&STEPS[..], &[add]].concat();
        migrate(&mut open.connection, 3, &steps).unwrap();
        assert_eq!(version(&open.connection), 4);
        let read = "SELECT raw FROM quarantine WHERE note IS NULL";
        assert_eq!(open.connection.query_row(read, [], |row| row.get::<_, String>(0)).unwrap(), "raw");

        // A step that fails leaves everything as it was.
        let fail: Step = |connection| connection.execute_batch("CREATE TABLE new (x) STRICT");
        let steps = [&steps[..], &[fail]].concat();
        assert!(migrate(&mut open.connection, 4, &steps).is_err());
        assert_eq!(version(&open.connection), 4);
    }

    /// Returns all rows of `events`, each as one text.
    fn rows(connection: &Connection) -> Vec<String> {
        let mut select = connection.prepare("SELECT * FROM events ORDER BY id").unwrap();
        let count = select.column_count();
        let names: Vec<String> = select.column_names().map(str::to_owned).collect();
        let text = |row: &rusqlite::Row<'_>| {
            let value = |at: usize| row.get::<_, rusqlite::types::Value>(at).unwrap();
            (0..count).map(|at| format!("{}={:?};", names[at], value(at))).collect::<String>()
        };
        select.query_map([], |row| Ok(text(row))).unwrap().collect::<Result<_, _>>().unwrap()
    }

    #[test]
    fn a_migrated_database_keeps_its_rows_and_has_the_schema_of_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.db");
        let insert = |raw: &str| {
            format!(
                "INSERT INTO events (received_at, source, verified, format, raw) VALUES (1, 'us', 1, 'cef', {raw})"
            )
        };
        let mut old = Connection::open(&path).unwrap();
        migrate(&mut old, 0, &STEPS[..1]).unwrap();
        old.execute_batch(&insert("'line'")).unwrap();
        assert!(old.execute_batch(&insert("x'ff'")).is_err());
        assert_eq!(difference(&old), Ok(None));
        // It can be checked before it is migrated.
        let read = || {
            let mut stored = Database::open(&path).unwrap();
            assert_eq!(stored.next(9, usize::MAX).unwrap().len(), 1);
            assert_eq!(stored.damage(), Ok(None));
        };
        read();
        migrate(&mut old, 1, &STEPS[..2]).unwrap();
        read();
        // Also rows that no sink writes: what was changed must not look right afterwards.
        for more in [
            "x'ff'",
            "'rt=1767323045678 request=/v2/teams'",
            "'both rt=1767323045678 request=/v2/teams request=/v2/teams'",
            "'a' || char(4) || 'rt=1767323045678'",
            "'rt=1767323045678 request=/v2/teams'",
        ] {
            old.execute_batch(&insert(more)).unwrap();
        }
        old.execute_batch(
            "UPDATE events SET rt = 1767323045678, request = '/v2/teams', sig = '3045678 request', query = '' WHERE id > 2;
             UPDATE events SET user_agent = 'x', key_id = 'k', extra = '{}', status = 9223372036854775807 WHERE id = 6;
             UPDATE events SET id = -5, received_at = 9223372036854775807 WHERE id = 4;
             UPDATE events SET id = 9223372036854775807, received_at = -1, trace_id = 'x' WHERE id = 5;
             INSERT INTO quarantine VALUES (1, 2, 'us', 'malformed', 'x', 'raw')",
        )
        .unwrap();
        let before = rows(&old);
        assert_eq!(before.len(), 6);
        drop(old);
        let open = open(&path).unwrap();
        assert_eq!(rows(&open.connection), before);
        assert_eq!(difference(&open.connection), Ok(None));
        let checked: String =
            open.connection.pragma_query_value(None, "integrity_check", |row| row.get(0)).unwrap();
        assert_eq!(checked, "ok");
        let names = "SELECT group_concat(name) FROM sqlite_schema WHERE name LIKE 'former%'";
        assert_eq!(open.connection.query_row(names, [], |row| row.get::<_, Option<String>>(0)), Ok(None));
    }

    #[test]
    fn a_changed_schema_is_refused() {
        for (change, what) in [
            (
                "CREATE TRIGGER t BEFORE INSERT ON event_rows BEGIN SELECT RAISE(IGNORE); END",
                "the trigger `t` was added",
            ),
            (
                "DROP INDEX events_denied; CREATE INDEX events_denied ON event_rows (time) WHERE granted = 2",
                "the index `events_denied` was changed",
            ),
            ("DROP INDEX events_failed", "the index `events_failed` is missing"),
            ("ALTER TABLE event_rows ADD COLUMN more TEXT", "the table `event_rows` was changed"),
            (
                "DROP VIEW events; CREATE VIEW events AS SELECT * FROM event_rows",
                "the view `events` was changed",
            ),
            (
                "DROP VIEW events; CREATE TABLE events AS SELECT * FROM event_rows",
                "the view `events` is missing",
            ),
            ("CREATE TABLE notes (x)", "the table `notes` was added"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("events.db");
            open(&path).unwrap().connection.execute_batch(change).unwrap();
            for error in [open(&path).map(|_| ()).unwrap_err(), check(&path).unwrap_err()] {
                assert_eq!(error.cause.kind(), io::ErrorKind::InvalidData, "{error}");
                assert!(error.to_string().contains(what), "{change}: {error}");
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.db");
        open(&path).unwrap().connection.execute_batch("ANALYZE").unwrap();
        assert!(open(&path).is_ok());
    }

    #[test]
    fn a_file_of_another_program_is_refused_and_not_changed() {
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
        refused("text", "the file is not an SQLite database; give");
        let other = Connection::open(dir.path().join("other")).unwrap();
        other.execute_batch("CREATE TABLE t (x)").unwrap();
        refused("other", "it belongs to another program; give");
        drop(open(&dir.path().join("newer")).unwrap());
        let newer = Connection::open(dir.path().join("newer")).unwrap();
        newer.pragma_update(None, "user_version", 4).unwrap();
        newer.close().unwrap();
        refused("newer", "it has schema version 4, and this auditgate knows 3; use");
    }

    #[test]
    fn a_path_that_is_not_a_regular_file_is_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        // Not by a program: while that starts, it holds the locks of all open files, which other tests take.
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        for (path, found) in [(dir.path(), "a directory"), (&pipe, "not a regular file")] {
            for error in [open(path).map(|_| ()).unwrap_err(), check(path).unwrap_err()] {
                // A later attempt may succeed, once a file is there.
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
    fn an_empty_file_and_an_interrupted_creation_are_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.db");
        check(&path).unwrap();
        assert!(!path.exists());
        std::fs::write(&path, "").unwrap();
        check(&path).unwrap();
        let connection = Connection::open(&path).unwrap();
        database::prepare(&connection, BUSY_TIMEOUT).unwrap();
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
