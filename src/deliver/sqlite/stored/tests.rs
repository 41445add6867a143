use super::*;

const RAW: &str = r#"{"rt":5,"status":200,"x":"y"}"#;

/// Creates a database under a name that must be escaped in a URI, with rows of these ids.
fn database(dir: &Path, ids: &[i64]) -> std::path::PathBuf {
    let path = dir.join("a b?mode=rwc#%41.db");
    let open = schema::open(&path).unwrap();
    let insert = "INSERT INTO event_common (id, received_at, source, verified, key_id, format, status, extra, template) \
                  VALUES (1, 7, 'us', 1, 'k', 'json', 200, '{\"event\":{\"x\":\"y\"}}', ?1)";
    // As if `rt` were long enough to be left out.
    open.connection.execute(insert, params![RAW.replace('5', "\u{4}")]).unwrap();
    for id in ids {
        let insert = "INSERT INTO event_rows (id, common_id, received_at, rt) VALUES (?1, 1, 7, 5)";
        open.connection.execute(insert, params![id]).unwrap();
    }
    path
}

#[test]
fn rows_are_read_in_portions_by_id() {
    let dir = tempfile::tempdir().unwrap();
    let path = database(dir.path(), &[9, 1, i64::MAX, 4, 7, i64::MIN, 2]);
    for how in ["mode=ro", "immutable=1"] {
        let mut database = Database::over(connect_with(&path, how).unwrap()).unwrap();
        let mut next = |rows, bytes| -> Vec<i64> {
            database.next(rows, bytes).unwrap().iter().map(|row| row.id).collect()
        };
        assert_eq!(next(3, usize::MAX), [i64::MIN, 1, 2]);
        assert_eq!(next(9, 1), [4]);
        assert_eq!(next(9, usize::MAX), [7, 9, i64::MAX]);
        assert!(next(9, usize::MAX).is_empty());
        assert_eq!(database.reached(), i64::MAX);
        assert_eq!(database.damage().unwrap(), None);
    }
    assert!(Database::open(&dir.path().join("gone.db")).is_err());
}

#[test]
fn rows_inserted_later_are_not_read_and_the_writer_is_not_blocked() {
    let dir = tempfile::tempdir().unwrap();
    let path = database(dir.path(), &[1, 2]);
    let mut reader = Database::open(&path).unwrap();
    assert_eq!(reader.next(1, usize::MAX).unwrap().len(), 1);
    let writer = Connection::open(&path).unwrap();
    let insert = "INSERT INTO event_rows (id, common_id, received_at, raw) VALUES (3, 1, 7, '{}')";
    writer.execute(insert, []).unwrap();
    // The reader does not prevent the log from being truncated.
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
    let difference = || Database::open(&path).unwrap().next(1, 1).unwrap()[0].difference(&line);
    assert_eq!(difference(), None);
    let writer = Connection::open(&path).unwrap();
    for (table, column, wrong) in [
        ("event_rows", "raw", "(SELECT CAST(raw AS BLOB) FROM events)"),
        ("event_common", "verified", "2"),
        ("event_common", "format", "'cef'"),
        ("event_common", "extra", "NULL"),
        ("event_common", "status", "201"),
        ("event_common", "act", "''"),
        ("event_rows", "granted", "0"),
        ("event_rows", "event_ts", "''"),
    ] {
        writer.execute_batch(&format!("CREATE TEMP TABLE kept AS SELECT * FROM {table}")).unwrap();
        writer.execute_batch(&format!("UPDATE {table} SET {column} = {wrong}")).unwrap();
        assert_eq!(difference(), Some(column));
        let restore = format!("UPDATE {table} SET {column} = (SELECT {column} FROM kept); DROP TABLE kept");
        writer.execute_batch(&restore).unwrap();
        assert_eq!(difference(), None);
    }
    // The line is stored whole, and a column says something else.
    writer.execute("UPDATE event_rows SET raw = ?1, rt = NULL", [RAW]).unwrap();
    assert_eq!(difference(), Some("rt"));
    // The line is put together from the column, which changes what was signed.
    writer.execute("UPDATE event_rows SET raw = NULL, rt = 6", []).unwrap();
    let row = Database::open(&path).unwrap().next(1, 1).unwrap().remove(0);
    assert_eq!(row.raw, RAW.replace('5', "6").as_bytes());
    assert_eq!(row.difference(&line), Some("rt"));
    // What it shares is gone, and so is the line.
    writer.execute("DELETE FROM event_common", []).unwrap();
    assert!(Database::open(&path).unwrap().next(1, 1).unwrap()[0].raw.is_empty());
}

/// Reads all rows, and returns their number and the damage: an error of reading or a finding at the
/// end.
fn read_all(path: &Path) -> (usize, Option<String>) {
    let mut database = match Database::open(path) {
        Ok(database) => database,
        Err(error) => return (0, Some(error.to_string())),
    };
    let mut count = 0;
    loop {
        match database.next(1000, usize::MAX) {
            Ok(rows) if rows.is_empty() => break,
            Ok(rows) => count += rows.len(),
            Err(error) => return (count, Some(error.to_string())),
        }
    }
    let damage = database.damage().unwrap_or_else(|error| Some(error.to_string()));
    (count, damage)
}

#[test]
fn a_lost_page_is_always_reported() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("e.db");
    let open = schema::open(&path).unwrap();
    let insert = "INSERT INTO event_common (id, received_at, source, verified, format, template) \
                  VALUES (1, 1, 'us', 0, 'json', char(3)); \
                  WITH RECURSIVE n (id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n WHERE id < 300) \
                  INSERT INTO event_rows (id, common_id, received_at, request) \
                  SELECT id, 1, id, printf('%0600d', id) FROM n";
    open.connection.execute_batch(insert).unwrap();
    drop(open);
    let whole = std::fs::read(&path).unwrap();
    assert_eq!(read_all(&path), (300, None));
    let pages = whole.len() / 4096;
    let altered = dir.path().join("altered.db");
    let mut found_at_end = 0;
    for page in 1..pages {
        let (at, other) = (page * 4096, (page + 7) % (pages - 1) + 1);
        for alter in [
            |bytes: &mut [u8], at: usize, _: usize| bytes[at..at + 4096].fill(0),
            |bytes: &mut [u8], at: usize, other: usize| {
                bytes.copy_within(other * 4096..(other + 1) * 4096, at);
            },
            |bytes: &mut [u8], at: usize, _: usize| bytes[at + 3..at + 5].fill(0),
        ] {
            let mut bytes = whole.clone();
            alter(&mut bytes, at, other);
            if bytes == whole {
                continue;
            }
            std::fs::write(&altered, bytes).unwrap();
            let (count, damage) = read_all(&altered);
            assert!(
                count == 300 || damage.is_some(),
                "{count} rows without page {page}, and no damage reported"
            );
            found_at_end += usize::from(damage.is_some_and(|what| what.starts_with("rows may be missing")));
        }
    }
    // Otherwise reading alone finds all damage, and this test shows nothing.
    assert!(found_at_end > 0);
}

#[test]
fn a_database_is_recognised_by_its_tables_and_not_by_its_application_id() {
    let dir = tempfile::tempdir().unwrap();
    let path = database(dir.path(), &[1]);
    let writer = Connection::open(&path).unwrap();
    writer.pragma_update(None, "application_id", 0).unwrap();
    assert_eq!(database_kind(&path), Ok(DatabaseKind::Events));
    assert_eq!(read_all(&path), (1, None));
    for (name, tables, wanted) in [
        ("other", "CREATE TABLE others (raw)", DatabaseKind::Other),
        ("nothing", "PRAGMA user_version = 1", DatabaseKind::Nothing),
        ("view", "CREATE TABLE o (raw); CREATE VIEW Events AS SELECT raw FROM o", DatabaseKind::Events),
    ] {
        let path = dir.path().join(name);
        Connection::open(&path).unwrap().execute_batch(tables).unwrap();
        assert_eq!(database_kind(&path), Ok(wanted), "{name}");
        assert!(Database::open(&path).is_err());
    }
}

#[test]
fn a_copy_without_its_log_or_with_an_unusable_index_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("e.db");
    // The tables are in the log while the database is open.
    let open = schema::open(&path).unwrap();
    let copied = |name: &str, with_log: bool| {
        let to = dir.path().join(name);
        std::fs::copy(&path, &to).unwrap();
        if with_log {
            std::fs::copy(dir.path().join("e.db-wal"), dir.path().join(format!("{name}-wal"))).unwrap();
        }
        to
    };
    let alone = copied("alone.db", false);
    assert_eq!(database_kind(&alone), Ok(DatabaseKind::Nothing));
    assert!(matches!(Database::open(&alone), Err(OpenError::NoEvents)));
    let both = copied("both.db", true);
    assert_eq!(read_all(&both), (0, None));
    // As on a read-only file system, the index cannot be created: SQLite does not follow a link.
    let stuck = copied("stuck.db", true);
    std::os::unix::fs::symlink("gone", dir.path().join("stuck.db-shm")).unwrap();
    let error = Database::open(&stuck).err();
    assert!(matches!(error, Some(OpenError::NoIndex(_))), "{error:?}");
    drop(open);
}
