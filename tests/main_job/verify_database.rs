//! `auditgate verify` on databases of SQLite sinks.

use rusqlite::Connection;

use crate::harness::daemon::Daemon;
use crate::harness::sign;
use crate::harness::site::{Site, sqlite_sink};
use crate::harness::verify::{assert_all_good, findings, report, stdout, verify, verify_with};

#[test]
fn a_database_is_checked_while_the_daemon_writes_it() {
    let site = Site::new().sinks(&sqlite_sink("events.db", "[\"verified\", \"quarantine\"]"));
    let daemon = Daemon::start(&site);
    let mut lines = site.producer.events(0..200);
    lines
        .push(site.producer.sign_json(r#"{"a":1,"a":2,"new":"field","success":"maybe","rt":1684454619000}"#));
    lines.push("not an event".to_owned());
    assert_eq!(daemon.deliver(&lines).accepted, 201);
    daemon.settle();
    assert_all_good(&verify(&site, &["events.db"]), 201);
    let (code, found) = report(&site, &["events.db"]);
    assert_eq!((code, &found["files"][0]["kind"]), (Some(0), &"sqlite".into()));
    assert_eq!(found["left_out"][0]["reason"], "1 lines in its table `quarantine`");
    assert_eq!(daemon.deliver(&site.producer.events(200..300)).accepted, 100);
    daemon.settle();
    assert_all_good(&verify(&site, &["events.db"]), 301);
    daemon.terminate();

    // A denial that was moved into the quarantine.
    let database = Connection::open(site.path("events.db")).unwrap();
    let genuine = "INSERT INTO quarantine (received_at, source, reason, detail, raw) \
                   SELECT received_at, source, 'bad_signature', '', raw FROM events WHERE id = 1";
    database.execute(genuine, []).unwrap();
    let (code, found) = report(&site, &["events.db"]);
    assert_eq!((code, &found["good_in_quarantine"], &found["good"]), (Some(0), &1.into(), &301.into()));
    database.execute("UPDATE quarantine SET reason = 'none' WHERE id = 2", []).unwrap();
    let (code, found) = report(&site, &["events.db"]);
    assert_eq!((code, &found["findings"][0]["line"]), (Some(1), &2.into()));
    database.execute("DELETE FROM quarantine WHERE id = 2", []).unwrap();
    drop(database);

    let (own, other) = (site.producer.public(), sign::Producer::new(2).public());
    site.write("jwks.json", sign::jwks(&[("key-1", &own), ("key-2", &other)]));
    // What several events share is changed for one of them.
    let alone = |id: i64, change: &str| {
        format!(
            "CREATE TEMP TABLE shared AS SELECT * FROM event_common \
               WHERE id = (SELECT common_id FROM event_rows WHERE id = {id}); \
             UPDATE shared SET id = 1000, {change}; INSERT INTO event_common SELECT * FROM shared; \
             UPDATE event_rows SET common_id = 1000 WHERE id = {id}"
        )
    };
    for (change, id, reason) in [
        (
            "UPDATE event_rows SET principal_id = 'x' WHERE id = 7".to_owned(),
            7,
            "the column `principal_id` says something else",
        ),
        (alone(8, "principal_name = 'x'"), 8, "the column `principal_name` says something else"),
        (alone(201, "extra = NULL"), 201, "the column `extra` says something else"),
        (alone(9, "key_id = 'key-2'"), 9, "names another key"),
        (alone(11, "template = replace(template, 'KongInc', 'KongInk')"), 11, "no given key"),
        // The line is put together from these, so that a change of one is a change of the line.
        ("UPDATE event_rows SET rt = rt + 1 WHERE id = 11".to_owned(), 11, "no given key"),
        ("UPDATE event_rows SET event_ts = '2023-05-19T00:03:38Z' WHERE id = 11".to_owned(), 11, "no given key"),
        (
            "UPDATE event_rows SET raw = (SELECT replace(raw, 'KongInc', 'KongInk') FROM events WHERE id = 11) \
             WHERE id = 11"
                .to_owned(),
            11,
            "no given key",
        ),
        // The line is stored whole, as that of an event for which putting it together would fail.
        (
            "UPDATE event_rows SET raw = (SELECT raw FROM events WHERE id = 13), rt = rt + 1 WHERE id = 13".to_owned(),
            13,
            "the column `rt` says something else",
        ),
    ] {
        std::fs::copy(site.path("events.db"), site.path("changed.db")).unwrap();
        let connection = Connection::open(site.path("changed.db")).unwrap();
        connection.execute_batch(&change).unwrap();
        assert_eq!(connection.changes(), 1);
        connection.close().unwrap();
        let (code, report) = report(&site, &["changed.db"]);
        assert_eq!(code, Some(1), "{change}");
        assert_eq!(findings(&report), [("changed.db".to_owned(), id, "bad".to_owned())]);
        assert!(report["findings"][0]["reason"].as_str().unwrap().contains(reason), "{report}");
        let output = verify_with(&site, &["--explain", &format!("changed.db:{id}")]);
        assert!(id == 11 || stdout(&output).contains("The raw line proves itself"), "{output:?}");
    }

    // A database of another program cannot be checked, which is an error and no finding.
    Connection::open(site.path("other.db")).unwrap().execute_batch("CREATE TABLE events (raw)").unwrap();
    assert_eq!(verify(&site, &["other.db"]).status.code(), Some(74));
    assert_eq!(verify(&site, &["data/ledger.db"]).status.code(), Some(74));
}

#[test]
fn a_database_with_a_hole_is_damaged() {
    let site = Site::new().sinks(&sqlite_sink("log/events.db", "[\"verified\", \"quarantine\"]"));
    std::fs::create_dir(site.path("log")).unwrap();
    let daemon = Daemon::start(&site);
    assert_eq!(daemon.deliver(&site.producer.events(0..400)).accepted, 400);
    daemon.settle();
    daemon.terminate();
    let path = site.path("log/events.db");
    let connection = Connection::open(&path).unwrap();
    // Without its `application_id` ("aude") a reader still recognises the database by its tables.
    connection.pragma_update(None, "application_id", 0).unwrap();
    connection.pragma_update(None, "journal_mode", "delete").unwrap();
    let root: usize = connection
        .query_row("SELECT rootpage FROM sqlite_schema WHERE name = 'event_rows'", [], |row| row.get(0))
        .unwrap();
    connection.close().unwrap();
    assert_all_good(&verify(&site, &["log"]), 400);
    // The table's root loses its last child but one (file format, section 1.6).
    let mut bytes = std::fs::read(&path).unwrap();
    let page = (root - 1) * 4096;
    assert_eq!(bytes[page], 5, "an interior page of a table");
    let cells = usize::from(u16::from_be_bytes([bytes[page + 3], bytes[page + 4]]));
    assert!(cells > 2);
    bytes[page + 3..page + 5].copy_from_slice(&u16::try_from(cells - 2).unwrap().to_be_bytes());
    std::fs::write(&path, bytes).unwrap();
    let (code, report) = report(&site, &["log"]);
    assert_eq!((code, &report["damaged"], &report["bad"]), (Some(1), &1.into(), &0.into()), "{report}");
    assert!(report["good"].as_u64().unwrap() < 400, "{report}");
    assert!(report["findings"][0]["reason"].as_str().unwrap().contains("rows may be missing"), "{report}");
}

/// Statements that empty the index over `granted` and keep its definition: it is filled under
/// another definition.
const EMPTIED: [&str; 3] = [
    "PRAGMA writable_schema = ON;
     UPDATE sqlite_schema SET sql = replace(sql, '= 0', '= 7') WHERE name = 'events_denied'",
    "REINDEX events_denied",
    "PRAGMA writable_schema = ON;
     UPDATE sqlite_schema SET sql = replace(sql, '= 7', '= 0') WHERE name = 'events_denied'",
];

#[test]
fn a_database_that_was_tampered_with_is_a_finding() {
    let site = Site::new().sinks(&sqlite_sink("events.db", "[\"verified\", \"quarantine\"]"));
    let daemon = Daemon::start(&site);
    let mut lines = site.producer.events(0..20);
    lines.push(site.producer.sign_json(r#"{"granted":false,"rt":1684454619000}"#));
    assert_eq!(daemon.deliver(&lines).accepted, 21);
    daemon.settle();
    daemon.terminate();
    assert_all_good(&verify(&site, &["events.db"]), 21);
    // Each entry has a connection of its own, so that it reads the schema that the previous one
    // left.
    let changed = |changes: &[&str]| {
        std::fs::copy(site.path("events.db"), site.path("changed.db")).unwrap();
        for change in changes {
            let connection = Connection::open(site.path("changed.db")).unwrap();
            connection.execute_batch(change).unwrap();
            connection.close().unwrap();
        }
        report(&site, &["changed.db"])
    };
    let whole_file = "damaged";
    let row = "bad";
    for (changes, verdict, reason) in [
        (&EMPTIED[..], whole_file, "events_denied"),
        (
            &["DROP INDEX events_denied; CREATE INDEX events_denied ON event_rows (time) WHERE granted = 7"],
            whole_file,
            "the index `events_denied` was changed",
        ),
        (&["DROP INDEX events_trace_id"], whole_file, "the index `events_trace_id` is missing"),
        (
            &["PRAGMA writable_schema = ON;
               UPDATE sqlite_schema SET sql = replace(sql, 'coalesce(rt, received_at)', '0') WHERE name = 'event_rows'",
              "REINDEX"],
            whole_file,
            "the table `event_rows` was changed",
        ),
        (
            &["PRAGMA writable_schema = ON;
               UPDATE sqlite_schema SET sql = sql || ' WHERE events.id < 5' WHERE name = 'events'"],
            whole_file,
            "the view `events` was changed",
        ),
        (&["ALTER TABLE event_rows ADD COLUMN more TEXT"], whole_file, "the table `event_rows` was changed"),
        (
            &["CREATE TRIGGER t BEFORE INSERT ON event_rows BEGIN SELECT RAISE(IGNORE); END"],
            whole_file,
            "the trigger `t` was added",
        ),
        // A name that SQLite reserves hides nothing.
        (
            &["PRAGMA writable_schema = ON;
               INSERT INTO sqlite_schema VALUES ('trigger', 'sqlite_stat_t', 'event_rows', 0,
                   'CREATE TRIGGER sqlite_stat_t BEFORE INSERT ON event_rows BEGIN SELECT RAISE(IGNORE); END')"],
            whole_file,
            "the trigger `sqlite_stat_t` was added",
        ),
        // Neither does another application_id or version.
        (
            &["PRAGMA application_id = 0; DROP INDEX events_trace_id"],
            whole_file,
            "the index `events_trace_id` is missing",
        ),
        (&["PRAGMA user_version = 1"], whole_file, "the index `events_denied` was changed"),
        (&["PRAGMA user_version = 2"], whole_file, "the index `events_denied` was changed"),
        (&["PRAGMA user_version = 0"], whole_file, "schema version 0"),
        (&["PRAGMA user_version = -1"], whole_file, "schema version -1"),
        (&["PRAGMA user_version = 9"], whole_file, "schema version 9"),
        // LIKE does not match a blob.
        (
            &["UPDATE event_rows SET raw = (SELECT CAST(raw AS BLOB) FROM events WHERE id = 7) WHERE id = 7"],
            row,
            "the column `raw`",
        ),
    ] {
        let (code, report) = changed(changes);
        assert_eq!(code, Some(1), "{changes:?}: {report}");
        let found: Vec<_> = findings(&report).into_iter().map(|(.., verdict)| verdict).collect();
        assert!(found.contains(&verdict.to_owned()), "{changes:?}: {report}");
        assert!(report["findings"].to_string().contains(reason), "{changes:?}: {report}");
    }
    // The tables of `ANALYZE` are no finding.
    assert_eq!(changed(&["ANALYZE"]).0, Some(0));
}
