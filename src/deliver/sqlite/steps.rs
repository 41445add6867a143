//! The tables, and the steps from each version of them to the next.
//!
//! The view `events` shows accepted lines, verified or not as `verified` says; rejected lines are in
//! `quarantine`, a table of its own, so that no query for events can ever be answered with a forged
//! line. Where the columns of `events` come from is in [`super::common`].

use rusqlite::Connection;
use rusqlite::types::{ToSqlOutput, ValueRef};

use super::common::{Commons, GIVEN, Values};
use super::fields::FIELDS;

/// Brings the tables from one version to the next.
pub(super) type Step = fn(&Connection) -> rusqlite::Result<()>;

/// Each step brings the tables from the version of its index to the next (`PRAGMA user_version`). A
/// step that was released is never changed.
pub(super) const STEPS: [Step; 3] = [
    |connection| connection.execute_batch(VERSION_1),
    |connection| connection.execute_batch(VERSION_2),
    version_3,
];

/// Times are in milliseconds since the Unix epoch. `time` is the event's own, or that of its
/// arrival where its `rt` cannot be read, so that no query by time misses an event. `extra` holds
/// what has no column as `{"ambiguous":[…],"event":{…}}`; it is NULL when there is nothing. `raw`
/// of a quarantined line is TEXT, or BLOB where it is not UTF-8. `raw` is the last column, since it
/// is long and rarely read.
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

/// Lets `raw` of an event be a BLOB, where no text can hold the line (not UTF-8, or with a NUL
/// character). No content changes, so the definition is written in place
/// (<https://www.sqlite.org/lang_altertable.html>, section 7): copying a large table would keep the
/// sink from starting for minutes.
const VERSION_2: &str = "
    PRAGMA writable_schema = ON;
    UPDATE sqlite_schema SET sql = replace(sql, 'raw TEXT NOT NULL', 'raw ANY NOT NULL') WHERE name = 'events';
    PRAGMA writable_schema = RESET;
";

/// The tables behind the view `events`; [`super::common`] says how a row is divided. An event costs
/// a third of what it does in one table with all columns, and much less to insert.
///
/// The index by `trace_id` is divided into blocks of 65,536 rows. Trace IDs are random: an index of
/// them alone is written all over, and slower the larger it is, while the last block stays in
/// memory. A search by `trace_id` looks into each block, which SQLite only considers
/// (<https://www.sqlite.org/optoverview.html>, section 12) where the table of `ANALYZE` says that
/// blocks are few and large. The numbers there are not those of this database, and need not be.
///
/// The view has no join, so that a query which needs only columns of an index reads only the index:
/// SQLite leaves out an unused join, but not below an aggregate.
const VERSION_3: &str = "
    DROP INDEX events_time;
    DROP INDEX events_received_at;
    DROP INDEX events_trace_id;
    DROP INDEX events_principal_id;
    DROP INDEX events_denied;
    DROP INDEX events_failed;
    ALTER TABLE events RENAME TO former_events;
    CREATE TABLE event_common (
        id INTEGER PRIMARY KEY,
        received_at INTEGER NOT NULL,
        source TEXT NOT NULL,
        verified INTEGER NOT NULL,
        key_id TEXT,
        format TEXT NOT NULL,
        cef_version TEXT,
        event_vendor TEXT,
        event_product TEXT,
        event_version TEXT,
        event_class_id TEXT,
        name TEXT,
        severity INTEGER,
        org_id TEXT,
        portal_id TEXT,
        principal_name TEXT,
        actor_id TEXT,
        kong_initiated INTEGER,
        src TEXT,
        action TEXT,
        act TEXT,
        status INTEGER,
        user_agent TEXT,
        extra TEXT,
        template TEXT
    ) STRICT;
    CREATE INDEX event_common_received_at ON event_common (received_at);
    CREATE TABLE event_rows (
        id INTEGER PRIMARY KEY,
        block INTEGER NOT NULL AS (id >> 16) VIRTUAL,
        time INTEGER NOT NULL AS (coalesce(rt, received_at)) VIRTUAL,
        common_id INTEGER NOT NULL,
        received_at INTEGER NOT NULL,
        rt INTEGER,
        granted INTEGER,
        success INTEGER,
        event_ts TEXT,
        trace_id TEXT,
        principal_id TEXT,
        request TEXT,
        query TEXT,
        sig TEXT,
        raw ANY
    ) STRICT;
    CREATE INDEX events_time ON event_rows (time);
    CREATE INDEX events_received_at ON event_rows (received_at);
    CREATE INDEX events_trace_id ON event_rows (block, trace_id);
    CREATE INDEX events_principal_id ON event_rows (principal_id, time);
    CREATE INDEX events_denied ON event_rows (time) WHERE granted = 0;
    CREATE INDEX events_failed ON event_rows (time) WHERE success = 0;
    CREATE VIEW events AS SELECT
        events.id,
        events.time,
        events.received_at,
        (SELECT source FROM event_common WHERE id = common_id) AS source,
        (SELECT verified FROM event_common WHERE id = common_id) AS verified,
        (SELECT key_id FROM event_common WHERE id = common_id) AS key_id,
        (SELECT format FROM event_common WHERE id = common_id) AS format,
        events.event_ts,
        events.rt,
        (SELECT cef_version FROM event_common WHERE id = common_id) AS cef_version,
        (SELECT event_vendor FROM event_common WHERE id = common_id) AS event_vendor,
        (SELECT event_product FROM event_common WHERE id = common_id) AS event_product,
        (SELECT event_version FROM event_common WHERE id = common_id) AS event_version,
        (SELECT event_class_id FROM event_common WHERE id = common_id) AS event_class_id,
        (SELECT name FROM event_common WHERE id = common_id) AS name,
        (SELECT severity FROM event_common WHERE id = common_id) AS severity,
        (SELECT org_id FROM event_common WHERE id = common_id) AS org_id,
        (SELECT portal_id FROM event_common WHERE id = common_id) AS portal_id,
        events.trace_id,
        events.principal_id,
        (SELECT principal_name FROM event_common WHERE id = common_id) AS principal_name,
        (SELECT actor_id FROM event_common WHERE id = common_id) AS actor_id,
        (SELECT kong_initiated FROM event_common WHERE id = common_id) AS kong_initiated,
        (SELECT src FROM event_common WHERE id = common_id) AS src,
        events.success,
        (SELECT action FROM event_common WHERE id = common_id) AS action,
        events.granted,
        (SELECT act FROM event_common WHERE id = common_id) AS act,
        (SELECT status FROM event_common WHERE id = common_id) AS status,
        events.request,
        events.query,
        (SELECT user_agent FROM event_common WHERE id = common_id) AS user_agent,
        events.sig,
        (SELECT extra FROM event_common WHERE id = common_id) AS extra,
        coalesce(events.raw, replace(replace(replace(replace(replace(replace(
            (SELECT template FROM event_common WHERE id = common_id),
            char(1), coalesce(events.event_ts, '')),
            char(2), coalesce(events.query, '')),
            char(3), coalesce(events.request, '')),
            char(4), coalesce(events.rt, '')),
            char(5), coalesce(events.sig, '')),
            char(6), coalesce(events.trace_id, ''))) AS raw
    FROM event_rows AS events;
    ANALYZE event_common;
    DELETE FROM sqlite_stat1;
    INSERT INTO sqlite_stat1 VALUES
        ('event_common', 'event_common_received_at', '100000 10'),
        ('event_rows', 'events_time', '50000000 3'),
        ('event_rows', 'events_received_at', '50000000 100'),
        ('event_rows', 'events_trace_id', '50000000 65536 3'),
        ('event_rows', 'events_principal_id', '50000000 50000 3'),
        ('event_rows', 'events_denied', '1000000 1'),
        ('event_rows', 'events_failed', '1000000 1');
";

/// Divides the rows of the former table `events`, as they are: nothing is parsed again. Takes some
/// 15 s of CPU for a million rows, and space for both until the old table is dropped. The indexes
/// are there before the rows, since to sort 50 million of them for an index takes gigabytes of
/// memory.
fn version_3(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute_batch(VERSION_3)?;
    let fields = FIELDS.map(|(name, _)| name).join(", ");
    let select =
        format!("SELECT id, received_at, raw, {}, {fields} FROM former_events ORDER BY id", GIVEN.join(", "));
    let mut select = connection.prepare(&select)?;
    let mut rows = select.query([])?;
    let mut commons = Commons::default();
    while let Some(row) = rows.next()? {
        let column = |at: usize| row.get_ref(at).unwrap_or(ValueRef::Null);
        let values = Values {
            received_at: row.get(1)?,
            raw: ToSqlOutput::Borrowed(column(2)),
            given: std::array::from_fn(|at| ToSqlOutput::Borrowed(column(3 + at))),
            fields: std::array::from_fn(|at| ToSqlOutput::Borrowed(column(3 + GIVEN.len() + at))),
        };
        match commons.insert(connection, Some(row.get(0)?), &values)? {
            1 => {}
            changed => return Err(rusqlite::Error::StatementChangedRows(changed)),
        }
    }
    drop(rows);
    drop(select);
    connection.execute_batch("DROP TABLE former_events")
}
