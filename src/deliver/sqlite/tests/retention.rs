//! Which rows `retain` deletes, and by which clock.

use super::*;
use crate::clock::tests::Times;

#[test]
fn expired_rows_are_deleted_in_steps_and_the_file_shrinks() {
    let fixture = Fixture::new();
    let times = Times::new(NOW);
    let retain = Duration::from_secs(90 * 86_400);
    let mut sink =
        SqliteSink::new(SqliteOptions { path: fixture.path(), retain: Some(retain) }, LEDGER, times.clock());
    sink.resume(&fixture.last).unwrap();
    let rejected = Verdict::Rejected { reason: Reason::Malformed, detail: "x".into() };
    let old = NOW - 83 * DAY;
    for line in 0..2_400 {
        let raw = format!(r#"{{"user_agent":"{}"}}"#, "x".repeat(2_000));
        let verdict = if line % 2 == 0 { &Verdict::Unverified } else { &rejected };
        push_raw(&mut sink, line, old, verdict, raw.as_bytes());
    }
    sink.flush(at(2_400), false).unwrap();
    let count = || {
        number(&fixture.reader(), "SELECT (SELECT count(*) FROM events) + (SELECT count(*) FROM quarantine)")
    };
    assert_eq!(count(), 2_400);
    let pages = number(&fixture.reader(), "PRAGMA page_count");
    // One millisecond before they expire, by a clock that has run for a week.
    times.advance(7 * DAY);
    sink.idle();
    assert_eq!(count(), 2_400);
    times.advance(1);
    push_raw(&mut sink, 2_400, NOW, &Verdict::Unverified, b"{}");
    sink.flush(at(2_401), false).unwrap();
    // Two steps for each table.
    assert_eq!(count(), 2_401 - 4 * 500);
    sink.idle();
    assert_eq!(count(), 1);
    assert!(number(&fixture.reader(), "PRAGMA page_count") < pages / 3);
}

#[test]
fn only_old_quarantined_rows_are_pruned_beside_a_writing_sink() {
    let fixture = Fixture::new();
    let mut sink = SqliteSink::new(
        SqliteOptions { path: fixture.path(), retain: None },
        LEDGER,
        Times::new(NOW).clock(),
    );
    sink.resume(&fixture.last).unwrap();
    let rejected = Verdict::Rejected { reason: Reason::Malformed, detail: "x".into() };
    for line in 0..1_200 {
        push_raw(&mut sink, line, NOW, &rejected, b"x");
    }
    push_raw(&mut sink, 1_200, NOW + 1, &rejected, b"newer");
    push_raw(&mut sink, 1_201, NOW, &Verdict::Unverified, b"{}");
    sink.flush(at(1_202), false).unwrap();
    assert_eq!(prune_quarantine(&fixture.path(), NOW + 1).unwrap(), 1_200);
    assert_eq!(prune_quarantine(&fixture.path(), NOW + 1).unwrap(), 0);
    push_raw(&mut sink, 1_202, NOW, &Verdict::Unverified, b"{}");
    sink.flush(at(1_203), false).unwrap();
    let count = |table: &str| number(&fixture.reader(), &format!("SELECT count(*) FROM {table}"));
    assert_eq!((count("events"), count("quarantine")), (2, 1));
    // Nothing is created, and nothing of another program is changed.
    let other = fixture.path().with_extension("other");
    assert!(prune_quarantine(&other, NOW).is_err());
    assert!(!other.exists());
    let tables =
        "CREATE TABLE quarantine (id INTEGER PRIMARY KEY, received_at); INSERT INTO quarantine VALUES (1, 1)";
    Connection::open(&other).unwrap().execute_batch(tables).unwrap();
    assert!(prune_quarantine(&other, NOW).is_err());
    assert_eq!(number(&Connection::open(&other).unwrap(), "SELECT count(*) FROM quarantine"), 1);
}

/// Returns a sink that keeps rows for 90 days, started at `start` by the wall clock, and its
/// clock's times.
fn started_at(fixture: &Fixture, start: i64) -> (SqliteSink, Times) {
    let times = Times::new(start);
    let retain = Duration::from_secs(90 * 86_400);
    let mut sink =
        SqliteSink::new(SqliteOptions { path: fixture.path(), retain: Some(retain) }, LEDGER, times.clock());
    sink.resume(&fixture.last).unwrap();
    (sink, times)
}

/// Inserts an event of each of these days, with the day as its `query`, from the line `line` on.
fn insert_days(sink: &mut SqliteSink, line: &mut u32, days: impl Iterator<Item = i64>) {
    for day in days {
        let raw = format!(r#"{{"query":"{day}"}}"#);
        push_raw(sink, *line, NOW + day * DAY, &Verdict::Unverified, raw.as_bytes());
        *line += 1;
    }
    sink.flush(at(*line), false).unwrap();
}

fn days(days: impl Iterator<Item = i64>) -> Vec<String> {
    days.map(|day| day.to_string()).collect()
}

#[test]
fn a_clock_that_is_wrong_at_a_start_deletes_no_evidence() {
    let fixture = Fixture::new();
    let mut line = 0;
    let (mut sink, _) = started_at(&fixture, NOW);
    insert_days(&mut sink, &mut line, -80..=0);
    drop(sink);
    // Restarts with the clock 200 days ahead, each with a new event.
    for days_later in [200, 201, 203] {
        let (mut sink, times) = started_at(&fixture, NOW + days_later * DAY);
        sink.idle();
        insert_days(&mut sink, &mut line, days_later..=days_later);
        times.advance(2 * DAY);
        sink.idle();
    }
    assert_eq!(fixture.stored(), days((-80..=0).chain([200, 201, 203])));
    // The clock is right again: rows expire, and events from the future prove no time.
    let (mut sink, _) = started_at(&fixture, NOW + 5 * DAY);
    insert_days(&mut sink, &mut line, 1..=5);
    let (mut sink, _) = started_at(&fixture, NOW + 15 * DAY);
    insert_days(&mut sink, &mut line, 6..=15);
    assert_eq!(fixture.stored(), days((-75..=0).chain([200, 201, 203]).chain(1..=15)));
}

#[test]
fn with_a_correct_clock_expired_rows_are_deleted() {
    let fixture = Fixture::new();
    let mut line = 0;
    let (mut sink, _) = started_at(&fixture, NOW);
    insert_days(&mut sink, &mut line, -80..=0);
    // A restart every other day, and an event every day: exact to the day.
    for day in (1..=20).step_by(2) {
        let (mut sink, _) = started_at(&fixture, NOW + (day + 1) * DAY);
        insert_days(&mut sink, &mut line, day..=day + 1);
    }
    assert_eq!(fixture.stored(), days(-70..=20));
    // The daemon was stopped for a month. Then a restart every day for a week.
    for day in 50..=56 {
        let (mut sink, _) = started_at(&fixture, NOW + day * DAY);
        insert_days(&mut sink, &mut line, day..=day);
        assert_eq!(fixture.stored()[..3], days(-69..=-67), "only one more day has certainly passed");
    }
    let (mut sink, _) = started_at(&fixture, NOW + 57 * DAY);
    insert_days(&mut sink, &mut line, 57..=57);
    assert_eq!(fixture.stored(), days((-33..=20).chain(50..=57)));
}

#[test]
fn rows_expire_without_new_events_too() {
    let fixture = Fixture::new();
    let mut line = 0;
    let (mut sink, _) = started_at(&fixture, NOW);
    insert_days(&mut sink, &mut line, -80..=0);
    let (mut sink, times) = started_at(&fixture, NOW + 60 * DAY);
    sink.idle();
    times.advance(7 * DAY - 1);
    sink.idle();
    assert_eq!(fixture.stored(), days(-80..=0));
    times.advance(1);
    sink.idle();
    assert_eq!(fixture.stored(), days(-23..=0));
    times.advance(23 * DAY + 1);
    sink.idle();
    assert_eq!(fixture.stored(), [""; 0]);
}

#[test]
fn a_clock_that_jumps_is_treated_like_a_restart() {
    let fixture = Fixture::new();
    let mut line = 0;
    let times = Times::new(NOW);
    let retain = Duration::from_secs(90 * 86_400);
    let mut sink =
        SqliteSink::new(SqliteOptions { path: fixture.path(), retain: Some(retain) }, LEDGER, times.clock());
    sink.resume(&fixture.last).unwrap();
    insert_days(&mut sink, &mut line, -80..=0);
    times.advance(8 * DAY);
    sink.idle();
    times.wall.fetch_add(3650 * DAY, Ordering::SeqCst);
    for _ in 0..6 {
        sink.idle();
        times.advance(DAY);
    }
    assert_eq!(fixture.stored(), days(-80..=0));
    // The clock jumps back.
    times.wall.fetch_sub(3650 * DAY, Ordering::SeqCst);
    insert_days(&mut sink, &mut line, 1..=14);
    assert_eq!(fixture.stored(), days(-76..=14));
}

#[test]
fn rows_that_are_kept_for_less_than_a_day_survive_a_wrong_clock_too() {
    let fixture = Fixture::new();
    let start = |ahead: i64| {
        let clock = Times::new(NOW + ahead).clock();
        let mut sink = SqliteSink::new(
            SqliteOptions { path: fixture.path(), retain: Some(Duration::from_secs(3600)) },
            LEDGER,
            clock,
        );
        sink.resume(&fixture.last).unwrap();
        sink
    };
    let mut sink = start(0);
    push(&mut sink, 0..3);
    sink.flush(at(3), false).unwrap();
    drop(sink);
    let mut sink = start(200 * DAY);
    sink.idle();
    assert_eq!(fixture.stored(), numbered(3));
    let mut sink = start(3_600_000);
    // Half an hour has certainly passed; then an event of the present arrives.
    sink.idle();
    assert_eq!(fixture.stored(), numbered(3));
    push_raw(&mut sink, 3, NOW + 3_600_001, &Verdict::Unverified, br#"{"query":"3"}"#);
    sink.flush(at(4), false).unwrap();
    assert_eq!(fixture.stored(), numbered(4), "not expired yet, to the millisecond");
    let mut sink = start(3_600_001);
    sink.idle();
    assert_eq!(fixture.stored(), ["3"]);
}
