//! SQLite databases as a reader opens them.

use rusqlite::Connection;

/// Returns the raw lines of a sink's table of events, in order.
pub(crate) fn raw_events(database: &Connection) -> Vec<String> {
    let mut find = database.prepare("SELECT raw FROM events ORDER BY id").unwrap();
    find.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap()
}

/// Checks a database's integrity.
pub(crate) fn assert_intact(database: &Connection) {
    let result: String = database.pragma_query_value(None, "integrity_check", |row| row.get(0)).unwrap();
    assert_eq!(result, "ok", "{:?}", database.path());
}
