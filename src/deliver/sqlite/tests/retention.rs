//! What `retain` deletes, and by which clock.

use std::sync::atomic::AtomicI64;

use super::*;

/// A clock that the test moves.
fn clock() -> (Clock, Arc<AtomicI64>, Arc<AtomicI64>) {
    let (wall, steady) = (Arc::new(AtomicI64::new(NOW)), Arc::new(AtomicI64::new(0)));
    let (wall_hand, steady_hand) = (Arc::clone(&wall), Arc::clone(&steady));
    let clock = Clock {
        wall: Arc::new(move || wall.load(Ordering::SeqCst)),
        steady: Arc::new(move || Duration::from_millis(steady.load(Ordering::SeqCst).try_into().unwrap())),
    };
    (clock, wall_hand, steady_hand)
}

#[test]
fn expired_rows_go_in_steps_and_the_file_shrinks() {
    let fixture = Fixture::new();
    let (clock, wall, steady) = clock();
    let retain = Duration::from_secs(90 * 86_400);
    let mut sink = SqliteSink::new(fixture.path(), Some(retain), LEDGER, clock);
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
    // Just not expired, to the millisecond, by a clock that has run for a week.
    for hand in [&wall, &steady] {
        hand.fetch_add(7 * DAY, Ordering::SeqCst);
    }
    sink.idle();
    assert_eq!(count(), 2_400);
    wall.fetch_add(1, Ordering::SeqCst);
    steady.fetch_add(1, Ordering::SeqCst);
    push_raw(&mut sink, 2_400, NOW, &Verdict::Unverified, b"{}");
    sink.flush(at(2_401), false).unwrap();
    // Two steps in each table.
    assert_eq!(count(), 2_401 - 4 * 500);
    sink.idle();
    assert_eq!(count(), 1);
    assert!(number(&fixture.reader(), "PRAGMA page_count") < pages / 3);
}

/// A sink that keeps rows for 90 days, started anew when the wall clock says `wall`; and its clock.
fn started_at(fixture: &Fixture, start: i64) -> (SqliteSink, impl Fn(i64)) {
    let (clock, wall, steady) = clock();
    wall.store(start, Ordering::SeqCst);
    let retain = Duration::from_secs(90 * 86_400);
    let mut sink = SqliteSink::new(fixture.path(), Some(retain), LEDGER, clock);
    sink.resume(&fixture.last).unwrap();
    let wait = move |time| {
        wall.fetch_add(time, Ordering::SeqCst);
        steady.fetch_add(time, Ordering::SeqCst);
    };
    (sink, wait)
}

/// Inserts an event of each of those days, which is its `query` too; the last one is reached at `line`.
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
    // Started again and again with the clock 200 days ahead, and events come.
    for days_later in [200, 201, 203] {
        let (mut sink, wait) = started_at(&fixture, NOW + days_later * DAY);
        sink.idle();
        insert_days(&mut sink, &mut line, days_later..=days_later);
        wait(2 * DAY);
        sink.idle();
    }
    assert_eq!(fixture.stored(), days((-80..=0).chain([200, 201, 203])));
    // The clock is right again: what expires expires, and what is from the future says nothing.
    let (mut sink, _) = started_at(&fixture, NOW + 5 * DAY);
    insert_days(&mut sink, &mut line, 1..=5);
    let (mut sink, _) = started_at(&fixture, NOW + 15 * DAY);
    insert_days(&mut sink, &mut line, 6..=15);
    assert_eq!(fixture.stored(), days((-75..=0).chain([200, 201, 203]).chain(1..=15)));
}

#[test]
fn a_clock_that_is_right_deletes_what_has_expired() {
    let fixture = Fixture::new();
    let mut line = 0;
    let (mut sink, _) = started_at(&fixture, NOW);
    insert_days(&mut sink, &mut line, -80..=0);
    // Started anew every other day, with an event a day: exact to the day.
    for day in (1..=20).step_by(2) {
        let (mut sink, _) = started_at(&fixture, NOW + (day + 1) * DAY);
        insert_days(&mut sink, &mut line, day..=day + 1);
    }
    assert_eq!(fixture.stored(), days(-70..=20));
    // Nothing for a month, and the daemon was stopped. Then a week with starts every day.
    for day in 50..=56 {
        let (mut sink, _) = started_at(&fixture, NOW + day * DAY);
        insert_days(&mut sink, &mut line, day..=day);
        assert_eq!(fixture.stored()[..3], days(-69..=-67), "one day more has gone by for sure");
    }
    let (mut sink, _) = started_at(&fixture, NOW + 57 * DAY);
    insert_days(&mut sink, &mut line, 57..=57);
    assert_eq!(fixture.stored(), days((-33..=20).chain(50..=57)));
}

#[test]
fn a_source_that_fell_silent_is_forgotten_in_time() {
    let fixture = Fixture::new();
    let mut line = 0;
    let (mut sink, _) = started_at(&fixture, NOW);
    insert_days(&mut sink, &mut line, -80..=0);
    let (mut sink, wait) = started_at(&fixture, NOW + 60 * DAY);
    sink.idle();
    wait(7 * DAY - 1);
    sink.idle();
    assert_eq!(fixture.stored(), days(-80..=0));
    wait(1);
    sink.idle();
    assert_eq!(fixture.stored(), days(-23..=0));
    wait(23 * DAY + 1);
    sink.idle();
    assert_eq!(fixture.stored(), [""; 0]);
}

#[test]
fn a_clock_that_jumps_is_as_good_as_a_start() {
    let fixture = Fixture::new();
    let mut line = 0;
    let (clock, wall, steady) = clock();
    let retain = Duration::from_secs(90 * 86_400);
    let mut sink = SqliteSink::new(fixture.path(), Some(retain), LEDGER, clock);
    sink.resume(&fixture.last).unwrap();
    insert_days(&mut sink, &mut line, -80..=0);
    for hand in [&wall, &steady] {
        hand.fetch_add(8 * DAY, Ordering::SeqCst);
    }
    sink.idle();
    wall.fetch_add(3650 * DAY, Ordering::SeqCst);
    for _ in 0..6 {
        sink.idle();
        for hand in [&wall, &steady] {
            hand.fetch_add(DAY, Ordering::SeqCst);
        }
    }
    assert_eq!(fixture.stored(), days(-80..=0));
    // And back.
    wall.fetch_sub(3650 * DAY, Ordering::SeqCst);
    insert_days(&mut sink, &mut line, 1..=14);
    assert_eq!(fixture.stored(), days(-76..=14));
}

#[test]
fn rows_that_are_kept_for_less_than_a_day_survive_a_wrong_clock_too() {
    let fixture = Fixture::new();
    let start = |ahead: i64| {
        let (clock, wall, _) = clock();
        wall.fetch_add(ahead, Ordering::SeqCst);
        let mut sink = SqliteSink::new(fixture.path(), Some(Duration::from_secs(3600)), LEDGER, clock);
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
    // Half an hour has gone by for sure, and then there is an event of this moment.
    sink.idle();
    assert_eq!(fixture.stored(), numbered(3));
    push_raw(&mut sink, 3, NOW + 3_600_001, &Verdict::Unverified, br#"{"query":"3"}"#);
    sink.flush(at(4), false).unwrap();
    assert_eq!(fixture.stored(), numbered(4), "not expired yet, to the millisecond");
    let mut sink = start(3_600_001);
    sink.idle();
    assert_eq!(fixture.stored(), ["3"]);
}
