//! Tests of the SQLite sink through its public interface, and of the database through a reader's
//! connection.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::*;
use crate::deliver::worker::Worker;
use crate::deliver::worker::tests::{FailureLog, open_ledger};
use crate::ledger::{Batch, Entry, Lines};
use crate::wire::batch::{Coding, Packing};
use crate::wire::event::{Reason, Verdict};

mod layout;
mod retention;

const LEDGER: [u8; 16] = [7; 16];
const NOW: i64 = 1_800_000_000_000;
const DAY: i64 = 86_400_000;

struct Fixture {
    dir: tempfile::TempDir,
    /// Position and mark recorded in the ledger.
    last: Resume,
}

impl Fixture {
    fn new() -> Self {
        let last = Resume { position: Position { batch: 1, line: 0 }, mark: Vec::new() };
        Self { dir: tempfile::tempdir().unwrap(), last }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("events.db")
    }

    fn new_sink(&self) -> SqliteSink {
        SqliteSink::new(SqliteOptions { path: self.path(), retain: None }, LEDGER, Clock::system())
    }

    /// Returns a sink that has resumed, and the first line of batch 1 that it does not have.
    fn sink(&self) -> (SqliteSink, u32) {
        let mut sink = self.new_sink();
        let resumed = sink.resume(&self.last).unwrap();
        assert_eq!(resumed.position.batch, 1);
        (sink, resumed.position.line)
    }

    fn reader(&self) -> Connection {
        Connection::open_with_flags(self.path(), rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap()
    }

    /// Returns the `query` of all events, in the order of insertion.
    fn stored(&self) -> Vec<String> {
        texts(&self.reader(), "SELECT query FROM events ORDER BY id")
    }
}

fn texts(connection: &Connection, sql: &str) -> Vec<String> {
    let mut statement = connection.prepare(sql).unwrap();
    let rows = statement.query_map([], |row| row.get(0)).unwrap();
    rows.collect::<Result<_, _>>().unwrap()
}

fn number(connection: &Connection, sql: &str) -> i64 {
    connection.query_row(sql, [], |row| row.get(0)).unwrap()
}

fn at(line: u32) -> Position {
    Position { batch: 1, line }
}

fn push_raw(sink: &mut SqliteSink, line: u32, received_at: i64, verdict: &Verdict, raw: &[u8]) {
    let key_id = matches!(verdict, Verdict::Verified { .. }).then_some("k1");
    sink.push(&Item { behind: at(line + 1), received_at, source: "us", verdict, key_id, raw });
}

/// Pushes these lines of batch 1.
fn push(sink: &mut SqliteSink, lines: std::ops::Range<u32>) {
    for line in lines {
        let raw = format!(r#"{{"query":"{line}"}}"#);
        push_raw(sink, line, NOW, &Verdict::Verified { key: 0 }, raw.as_bytes());
    }
}

fn numbered(count: u32) -> Vec<String> {
    (0..count).map(|line| line.to_string()).collect()
}

#[test]
fn a_kill_loses_nothing_and_repeats_nothing() {
    let mut fixture = Fixture::new();
    let (mut sink, _) = fixture.sink();
    push(&mut sink, 0..3);
    assert!(sink.collected() > 0);
    sink.flush(at(3), false).unwrap();
    assert_eq!(sink.collected(), 0);
    fixture.last.position = at(3);
    // Killed with lines that were not flushed.
    push(&mut sink, 3..5);
    drop(sink);
    let (mut sink, from) = fixture.sink();
    assert_eq!(from, 3);
    push(&mut sink, from..5);
    sink.flush(at(5), false).unwrap();
    // Killed before the ledger recorded the position.
    drop(sink);
    let (mut sink, from) = fixture.sink();
    assert_eq!(from, 5);
    push(&mut sink, from..6);
    sink.flush(at(6), false).unwrap();
    assert_eq!(fixture.stored(), numbered(6));
}

#[test]
fn a_commit_that_failed_but_persisted_is_not_repeated() {
    let fixture = Fixture::new();
    let (mut sink, _) = fixture.sink();
    push(&mut sink, 0..4);
    let open = sink.open.as_mut().unwrap();
    // Only a part of the flush persisted, which is the hardest case.
    let rows = sink.collected.iter().take(3);
    assert!(insert(&mut open.connection, &mut sink.commons, &LEDGER, rows, at(3)).unwrap());
    sink.distrusted = true;
    sink.flush(at(4), false).unwrap();
    assert_eq!(fixture.stored(), numbered(4));
    assert!(!sink.distrusted);
}

#[test]
fn a_failed_write_is_rolled_back_and_repeated() {
    let fixture = Fixture::new();
    let (mut sink, _) = fixture.sink();
    let other = Connection::open(fixture.path()).unwrap();
    let trigger = "CREATE TRIGGER spoil BEFORE INSERT ON event_rows WHEN new.query = '3' \
                   BEGIN SELECT raise(ABORT, 'spoilt'); END";
    other.execute_batch(trigger).unwrap();
    push(&mut sink, 0..5);
    // After a failure the database is opened again, and its schema is checked.
    for expected in ["write to the database PATH: spoilt", "use the database PATH: its tables are not as"] {
        let error = sink.flush(at(5), false).unwrap_err().to_string();
        let expected = expected.replace("PATH", &fixture.path().display().to_string());
        assert!(error.starts_with(&format!("cannot {expected}")), "{error}");
        assert_eq!(fixture.stored(), [""; 0]);
        assert_eq!(number(&other, "SELECT line FROM delivered"), 0);
    }
    other.execute_batch("DROP TRIGGER spoil").unwrap();
    push(&mut sink, 5..6);
    sink.flush(at(6), false).unwrap();
    assert_eq!(fixture.stored(), numbered(6));
}

#[test]
fn a_row_that_a_trigger_discards_does_not_count_as_delivered() {
    for (event, what) in [
        ("INSERT ON event_rows", "an insert did not add one row; remove the trigger"),
        ("INSERT ON event_common", "an insert did not add one row; remove the trigger"),
        ("UPDATE ON delivered", "or a trigger of another program"),
    ] {
        let fixture = Fixture::new();
        let (mut sink, _) = fixture.sink();
        let other = Connection::open(fixture.path()).unwrap();
        let trigger = format!("CREATE TRIGGER swallow BEFORE {event} BEGIN SELECT raise(IGNORE); END");
        other.execute_batch(&trigger).unwrap();
        push(&mut sink, 0..2);
        for wanted in [what, "swallow"] {
            let error = format!("{:?}", sink.flush(at(2), false).unwrap_err());
            assert!(error.contains(wanted), "{error}");
        }
        assert_eq!(number(&other, "SELECT line FROM delivered"), 0);
        other.execute_batch("DROP TRIGGER swallow").unwrap();
        sink.flush(at(2), false).unwrap();
        assert_eq!(fixture.stored(), numbered(2));
    }
}

#[test]
fn a_second_writer_makes_a_flush_fail_and_loses_nothing() {
    let fixture = Fixture::new();
    let (mut sink, _) = fixture.sink();
    sink.open.as_ref().unwrap().connection.busy_timeout(Duration::from_millis(1)).unwrap();
    let other = Connection::open(fixture.path()).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    push(&mut sink, 0..2);
    assert!(sink.flush(at(2), false).unwrap_err().to_string().contains("locked"));
    other.execute_batch("ROLLBACK").unwrap();
    sink.flush(at(2), false).unwrap();
    assert_eq!(fixture.stored(), numbered(2));
}

#[test]
fn a_reader_never_blocks_the_sink_and_sees_one_snapshot() {
    let fixture = Fixture::new();
    let (mut sink, _) = fixture.sink();
    push(&mut sink, 0..1);
    sink.flush(at(1), false).unwrap();
    let reader = fixture.reader();
    reader.execute_batch("BEGIN").unwrap();
    let count = || number(&reader, "SELECT count(*) FROM events");
    assert_eq!(count(), 1);
    // Enough log for several checkpoints.
    let open = sink.open.as_ref().unwrap();
    open.connection.pragma_update(None, "wal_autocheckpoint", 10).unwrap();
    for line in 1..20 {
        let raw = format!(r#"{{"query":"{line}","user_agent":"{}"}}"#, "x".repeat(60_000));
        push_raw(&mut sink, line, NOW, &Verdict::Unverified, raw.as_bytes());
        sink.flush(at(line + 1), false).unwrap();
    }
    assert_eq!(count(), 1);
    reader.execute_batch("COMMIT").unwrap();
    assert_eq!(count(), 20);
    assert_eq!(fixture.stored(), numbered(20));
}

#[test]
fn the_position_of_a_new_ledger_counts() {
    let mut fixture = Fixture::new();
    let (mut sink, _) = fixture.sink();
    push(&mut sink, 0..9);
    sink.flush(at(9), false).unwrap();
    // The old ledger's daemon is still running by mistake: it must not write to the database any
    // more.
    let mut newer =
        SqliteSink::new(SqliteOptions { path: fixture.path(), retain: None }, [8; 16], Clock::system());
    assert_eq!(newer.resume(&fixture.last).unwrap(), fixture.last);
    push(&mut sink, 9..10);
    let error = sink.flush(at(10), false).unwrap_err().to_string();
    assert!(
        error.ends_with("or a trigger of another program keeps its table `delivered` as it is"),
        "{error}"
    );
    drop(sink);
    assert_eq!(fixture.stored(), numbered(9));
    // The ledger is ahead of the database after batches with nothing for this sink.
    fixture.last.position = Position { batch: 5, line: 2 };
    assert_eq!(newer.resume(&fixture.last).unwrap(), fixture.last);
}

#[test]
fn a_database_that_was_renamed_is_created_again() {
    let fixture = Fixture::new();
    let (mut sink, _) = fixture.sink();
    push(&mut sink, 0..2);
    sink.flush(at(2), false).unwrap();
    for suffix in ["", "-wal", "-shm"] {
        let name = format!("events.db{suffix}");
        std::fs::rename(fixture.dir.path().join(&name), fixture.dir.path().join(format!("old-{name}")))
            .unwrap();
    }
    push(&mut sink, 2..3);
    sink.flush(at(3), false).unwrap();
    assert_eq!(fixture.stored(), ["2"]);
    drop(sink);
    assert_eq!(fixture.sink().1, 3);
}

#[test]
fn batches_without_events_for_the_sink_cause_no_write() {
    let fixture = Fixture::new();
    let (mut sink, _) = fixture.sink();
    let reader = fixture.reader();
    let before = number(&reader, "PRAGMA data_version");
    sink.flush(at(7), false).unwrap();
    assert_eq!(number(&reader, "PRAGMA data_version"), before);
    push(&mut sink, 7..8);
    sink.flush(at(8), false).unwrap();
    assert_ne!(number(&reader, "PRAGMA data_version"), before);
    assert_eq!(number(&reader, "SELECT line FROM delivered"), 8);
}

#[test]
fn odd_values_never_fail_and_are_never_lost() {
    let fixture = Fixture::new();
    let (mut sink, _) = fixture.sink();
    let long = "ü".repeat(125 << 10);
    let cef = "Apr 14 05:39:08 konghq.com CEF:0|KongInc|Konnect|1.0|class|Ingress|1|";
    let ambiguous = format!(
        "{cef}rt=3958q3097698 src=1.2.3.4 trace_id=1 trace_id=2 status=200 user_agent=a\u{0}b granted=true sig=x"
    );
    let many = r#"{"rt":9223372036854775808,"status":"2e2","severity":-1,"success":"maybe","granted":false,"kong_initiated":true,"trace_id":18446744073709551616,"query":{"a":[1,{"b":"\ud800"}]},"portal_id":null,"ambiguous":["trace_id"],"x":1e400}"#;
    let lines = [ambiguous, many.to_owned(), format!(r#"{{"event":{{"user_agent":"{long}"}}}}"#)];
    for (index, raw) in lines.iter().enumerate() {
        let verdict = if index == 0 { Verdict::Verified { key: 3 } } else { Verdict::Unverified };
        push_raw(&mut sink, u32::try_from(index).unwrap(), NOW, &verdict, raw.as_bytes());
    }
    sink.flush(at(3), false).unwrap();
    let reader = fixture.reader();
    let mut read = reader.prepare("SELECT CAST(raw AS BLOB) FROM events ORDER BY id").unwrap();
    let raw: Vec<Vec<u8>> = read.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap();
    assert_eq!(raw, lines.each_ref().map(String::as_bytes));
    // The first line has a NUL character.
    assert_eq!(texts(&reader, "SELECT typeof(raw) FROM events ORDER BY id"), ["blob", "text", "text"]);

    let all = |id: i64| {
        let sql = format!(
            "SELECT json_array(time, rt, trace_id, status, severity, src, success, granted, kong_initiated, \
             portal_id, query, verified, key_id, format, source, received_at, event_ts, name, sig) \
             FROM events WHERE id = {id}"
        );
        texts(&reader, &sql).remove(0)
    };
    assert_eq!(
        all(1),
        format!(
            r#"[{NOW},null,null,200,1,"1.2.3.4",null,null,null,null,null,1,"k1","cef","us",{NOW},"Apr 14 05:39:08","Ingress","x"]"#
        )
    );
    assert_eq!(
        all(2),
        format!(
            r#"[{NOW},null,"18446744073709551616",null,-1,null,null,0,1,null,null,0,null,"json","us",{NOW},null,null,null]"#
        )
    );
    let extra: Vec<Option<String>> = reader
        .prepare("SELECT extra FROM events ORDER BY id")
        .unwrap()
        .query_map([], |row| row.get(0))
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();
    assert_eq!(
        extra[0].as_deref(),
        Some(r#"{"ambiguous":["granted","trace_id","user_agent"],"event":{"rt":"3958q3097698"}}"#)
    );
    assert_eq!(
        extra[1].as_deref(),
        Some(
            r#"{"event":{"ambiguous":["trace_id"],"query":{"a":[1,{"b":"\ud800"}]},"rt":9223372036854775808,"status":"2e2","success":"maybe","x":1e400}}"#
        )
    );
    assert_eq!(extra[2], None);
    assert_eq!(
        texts(&reader, "SELECT user_agent FROM events WHERE id IN (1, 3)"),
        [r"a\u0000b granted=true", &long]
    );
    assert_eq!(number(&reader, "SELECT count(*) FROM events WHERE json_valid(extra)"), 2);
    assert_eq!(number(&reader, "SELECT extra ->> '$.event.query.a[0]' FROM events WHERE id = 2"), 1);
}

#[test]
fn quarantined_lines_have_their_own_table_and_all_their_bytes() {
    let fixture = Fixture::new();
    let (mut sink, _) = fixture.sink();
    let lines: [&[u8]; 4] = [b"plain\0text", b"\xff\x00bin", b"", b"12"];
    for (index, raw) in lines.iter().enumerate() {
        let verdict = Verdict::Rejected { reason: Reason::ALL[index], detail: "why \u{1b}".into() };
        push_raw(&mut sink, u32::try_from(index).unwrap(), NOW, &verdict, raw);
    }
    // An accepted line that is not an event, which should be impossible.
    push_raw(&mut sink, 4, NOW, &Verdict::Unverified, b"no event");
    sink.flush(at(5), false).unwrap();
    let reader = fixture.reader();
    let mut read = reader.prepare("SELECT CAST(raw AS BLOB) FROM quarantine ORDER BY id").unwrap();
    let raw: Vec<Vec<u8>> = read.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap();
    assert_eq!(raw[..4], lines);
    let types = texts(&reader, "SELECT typeof(raw) FROM quarantine ORDER BY id");
    assert_eq!(types, ["blob", "blob", "text", "text", "text"]);
    let reasons = texts(&reader, "SELECT reason || source || received_at FROM quarantine ORDER BY id");
    assert_eq!(reasons[1], format!("bad_signatureus{NOW}"));
    assert_eq!(reasons[4], format!("malformedus{NOW}"));
    assert_eq!(number(&reader, "SELECT count(*) FROM events"), 0);
}

const QUERIES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/queries.md");

/// Returns the SQL of the commands in the document.
fn documented_queries() -> Vec<String> {
    let text = std::fs::read_to_string(QUERIES).unwrap();
    let command = "```sh\nsqlite3 -readonly -box /var/lib/auditgate/events.db \"";
    text.split(command).skip(1).map(|rest| rest.split_once("\"\n```").unwrap().0.to_owned()).collect()
}

#[test]
fn the_documented_queries_find_the_documented_rows_by_an_index() {
    let fixture = Fixture::new();
    let now = (Clock::system().wall)();
    let (mut sink, _) = fixture.sink();
    let mut line = 0;
    let mut event = |hours_ago: i64, fields: &str| {
        let rt = now - hours_ago * 3_600_000;
        let raw = format!(
            r#"{{"rt":{rt},"principal_id":"87655c36-8d63-48fe-9a1e-53b28dfbc19b","src":"192.0.2.{}",{fields}}}"#,
            line % 3
        );
        push_raw(&mut sink, line, now, &Verdict::Verified { key: 0 }, raw.as_bytes());
        line += 1;
    };
    for hours_ago in 0..100 {
        event(hours_ago, r#""name":"AUTHENTICATION_OUTCOME_FAILED","success":false,"trace_id":"1""#);
        event(hours_ago, r#""name":"Authz.portals","granted":false,"trace_id":"1""#);
        event(hours_ago, r#""name":"Authz.portals","granted":true,"trace_id":3895213347334635099"#);
    }
    sink.flush(at(300), false).unwrap();

    let reader = fixture.reader();
    let queries = documented_queries();
    let expected = [
        ("events_trace_id", 100),
        ("events_principal_id", 300),
        ("events_denied", 24),
        ("events_failed", 1),
        ("events_time", 24),
    ];
    assert_eq!(queries.len(), expected.len());
    for (query, (index, rows)) in queries.iter().zip(expected) {
        let mut statement = reader.prepare(&format!("EXPLAIN QUERY PLAN {query}")).unwrap();
        let plan: Vec<String> =
            statement.query_map([], |row| row.get(3)).unwrap().collect::<Result<_, _>>().unwrap();
        let search = format!("SEARCH events USING INDEX {index} (");
        assert!(plan[0].starts_with(&search), "{query}\n{plan:#?}");
        assert!(!plan.iter().any(|step| step.starts_with("SCAN")), "{query}\n{plan:#?}");
        let mut statement = reader.prepare(query).unwrap();
        let found = statement.query_map([], |_| Ok(())).unwrap().count();
        // An hour may begin during the test.
        assert!((rows..=rows + 1).contains(&found), "{query}\n{found} rows");
    }
}

#[test]
fn deletion_uses_its_index() {
    let fixture = Fixture::new();
    let (sink, _) = fixture.sink();
    let connection = &sink.open.as_ref().unwrap().connection;
    for (table, index) in
        [("event_rows", "events"), ("event_common", "event_common"), ("quarantine", "quarantine")]
    {
        let sql = format!(
            "EXPLAIN QUERY PLAN SELECT id FROM {table} WHERE received_at < 5 ORDER BY received_at LIMIT 500"
        );
        let mut statement = connection.prepare(&sql).unwrap();
        let plan: Vec<String> =
            statement.query_map([], |row| row.get(3)).unwrap().collect::<Result<_, _>>().unwrap();
        assert_eq!(plan.len(), 1, "{plan:#?}");
        assert!(plan[0].contains(&format!("COVERING INDEX {index}_received_at")), "{plan:#?}");
    }
}

/// Commits batches to the ledger in `data_dir`, and lets a worker deliver everything if `delivers`.
fn commit(fixture: &Fixture, data_dir: &str, batches: std::ops::Range<usize>, delivers: bool) {
    let (ledger, running, subscription) = open_ledger(&fixture.dir.path().join(data_dir));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for batch in batches {
        let lines: Vec<String> =
            (0..40).map(|line| format!(r#"{{"query":"{}"}}"#, batch * 40 + line)).collect();
        let entry = |(index, line): (usize, &String)| {
            Some(Entry {
                verdict: match index % 4 {
                    0 => Verdict::Unverified,
                    1 => Verdict::Rejected { reason: Reason::Unsigned, detail: "x".into() },
                    _ => Verdict::Verified { key: 0 },
                },
                class: None,
                identity: ledger.identifier().event("us", true, (line.as_bytes(), b""), None),
            })
        };
        let body = Arc::new(lines.join("\n").into_bytes());
        let batch = Batch {
            source: "us".into(),
            received_at: NOW,
            decoded: Arc::clone(&body),
            body,
            packing: Packing::Lines(Coding::Identity),
            key_ids: Arc::from(["k1".to_owned()]),
            lines: Lines::new(lines.iter().enumerate().map(entry).collect()),
            checkpoint: None,
        };
        runtime.block_on(ledger.commit(batch)).unwrap();
    }
    ledger.close_feed();
    let log = FailureLog::default();
    let worker = Worker {
        subscription,
        sink: Box::new(SqliteSink::new(
            SqliteOptions { path: fixture.path(), retain: None },
            ledger.id(),
            Clock::system(),
        )),
        ledger: ledger.clone(),
        watcher: Box::new(log.clone()),
        stop: Arc::clone(&log.stop),
    };
    if delivers {
        worker.run();
        assert_eq!(log.failures(), [""; 0]);
    }
    ledger.close();
    running.thread.join().unwrap();
}

#[test]
fn a_worker_delivers_once_over_restarts_and_a_stale_ledger() {
    let fixture = Fixture::new();
    commit(&fixture, "data", 0..5, false);
    // A copy of the ledger as it would be after a kill between the sink's commits and the ledger's.
    std::fs::create_dir(fixture.dir.path().join("stale")).unwrap();
    for file in std::fs::read_dir(fixture.dir.path().join("data")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), fixture.dir.path().join("stale").join(file.file_name())).unwrap();
    }
    commit(&fixture, "data", 0..0, true);
    commit(&fixture, "stale", 5..7, true);
    let wanted = |line: &usize| line % 4 > 1;
    let expected: Vec<String> = (0..280).filter(wanted).map(|line| line.to_string()).collect();
    assert_eq!(fixture.stored(), expected);
    assert_eq!(number(&fixture.reader(), "SELECT count(*) FROM quarantine"), 70);
    assert_eq!(
        number(&fixture.reader(), "SELECT count(*) FROM events WHERE verified AND key_id = 'k1'"),
        140
    );
}
