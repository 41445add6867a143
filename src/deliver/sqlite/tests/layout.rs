//! How events share rows: that each comes back to the last byte, and what it costs.

use proptest::prelude::*;
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::*;
use crate::clock::tests::Times;
use crate::send::sample::Samples;
use crate::wire::event::{Event, Format, Value};
use crate::wire::{cef, json, signature};

fn raw_lines(connection: &Connection) -> Vec<Vec<u8>> {
    let mut select = connection.prepare("SELECT CAST(raw AS BLOB) FROM events ORDER BY id").unwrap();
    select.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap()
}

/// Checks that every column of every row follows from its line.
fn assert_rows_follow_from_lines(fixture: &Fixture) {
    let mut database = stored::Database::open(&fixture.path()).unwrap();
    loop {
        let rows = database.next(1000, usize::MAX).unwrap();
        for row in &rows {
            let line = crate::wire::line::Line::parse(&row.raw).unwrap();
            assert_eq!(row.difference(&line), None, "{}", String::from_utf8_lossy(&row.raw));
        }
        if rows.is_empty() {
            break;
        }
    }
    assert_eq!(database.damage().unwrap(), None);
}

fn sample_line(format: Format, event: &Event, signature: u8) -> Vec<u8> {
    let mut line = match format {
        Format::Cef => cef::write(event).unwrap(),
        Format::Json => json::write(event),
        Format::Cps => json::write_wrapped(event),
    };
    signature::insert(format, &mut line, &[signature; 64]);
    line
}

#[test]
fn sample_events_share_rows_and_come_back_to_the_last_byte() {
    let fixture = Fixture::new();
    let (mut sink, _) = fixture.sink();
    let mut now = NOW;
    let samples = Samples::new(StdRng::seed_from_u64(1), move || {
        now += 30;
        now
    });
    let formats = Format::ALL.into_iter().cycle();
    let signatures = (0..=250).cycle();
    let lines: Vec<Vec<u8>> = samples
        .zip(formats.zip(signatures))
        .map(|(event, (format, signature))| sample_line(format, &event, signature))
        .take(6_000)
        .collect();
    for (number, line) in (0..).zip(&lines) {
        let received_at = NOW + 30 * i64::from(number);
        push_raw(&mut sink, number, received_at, &Verdict::Verified { key: 0 }, line);
    }
    sink.flush(at(6_000), false).unwrap();
    assert_eq!(raw_lines(&fixture.reader()), lines);
    assert_rows_follow_from_lines(&fixture);
    assert_eq!(number(&fixture.reader(), "SELECT count(*) FROM event_rows WHERE raw IS NOT NULL"), 0);
    // Eight callers, six operations, three events and their outcomes, three formats.
    let shared = number(&fixture.reader(), "SELECT count(*) FROM event_common");
    assert!(shared < 1_200, "{shared}");
    let sql = "SELECT sum(pgsize) FROM dbstat WHERE name LIKE 'event%' AND name != 'event_common'";
    let bytes = fixture.reader().query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap() / 6_000;
    assert!(bytes < 500, "{bytes} bytes an event");
}

#[test]
fn what_only_looks_the_same_is_not_shared() {
    let fixture = Fixture::new();
    let (mut sink, _) = fixture.sink();
    // Without the values that differ, these are the same text; the `user_agent` is not.
    let first = r#"{"user_agent":"/v2/teams","request":"/v2/teams","rt":1767323045678}"#;
    let lines = [
        first.to_owned(),
        first.replace("/v2/teams", "/v2/users"),
        first.replace("1767323045678", "1767323045679"),
        // One value within another, and values that touch.
        r#"{"request":"/v2/1767323045678","rt":1767323045678,"query":"1767323045678"}"#.to_owned(),
        r#"{"request":"767323","query":"67323045","x":"1767323045678"}"#.to_owned(),
        // A character that stands for a value, in the line and in a value.
        "{\"user_agent\":\"a\u{7f}\",\"request\":\"/v2/te\\u0004ams\",\"rt\":1767323045678}".to_owned(),
        "{\"rt\":1767323045678,\"user_agent\":\"\u{fc}\"}".to_owned(),
        "Apr 14 05:39:08 konghq.com CEF:0|KongInc|Konnect|1.0|c|Ingress|1|rt=1767323045678 request=/v2/a\u{4}b \
         user_agent=\u{1}\u{2}\u{3}\u{5}\u{6} sig=abcdefgh"
            .to_owned(),
    ];
    for (number, line) in (0..).zip(&lines) {
        push_raw(&mut sink, number, NOW, &Verdict::Unverified, line.as_bytes());
    }
    sink.flush(at(8), false).unwrap();
    assert_eq!(raw_lines(&fixture.reader()), lines.each_ref().map(String::as_bytes));
    assert_rows_follow_from_lines(&fixture);
    let agents = texts(&fixture.reader(), "SELECT user_agent FROM events WHERE id IN (1, 2)");
    assert_eq!(agents, ["/v2/teams", "/v2/users"]);
    assert_eq!(number(&fixture.reader(), "SELECT count(DISTINCT common_id) FROM event_rows WHERE id < 4"), 2);
    assert_eq!(number(&fixture.reader(), "SELECT count(*) FROM event_rows WHERE raw IS NOT NULL"), 1);

    // Nor what another source sent, or another key verified.
    let mut push = |line: u32, source, key_id| {
        let verdict = &Verdict::Verified { key: 0 };
        let raw = first.as_bytes();
        sink.push(&Item { behind: at(line + 1), received_at: NOW, source, verdict, key_id, raw });
    };
    push(8, "eu", Some("k1"));
    push(9, "eu", Some("k2"));
    push(10, "us", Some("k1"));
    sink.flush(at(11), false).unwrap();
    let said = "SELECT source || verified || coalesce(key_id, '') FROM events WHERE id IN (1, 9, 10, 11)";
    assert_eq!(texts(&fixture.reader(), said), ["us0", "eu1k1", "eu1k2", "us1k1"]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn every_line_comes_back(
        events in prop::collection::vec(
            prop::collection::vec(("(request|query|sig|trace_id|event_ts|user_agent|name|new)", "[a-c\u{1}-\u{6}\u{fc}\"=|\\\\ ]{0,12}"), 0..6),
            1..40,
        ),
    ) {
        let fixture = Fixture::new();
        let (mut sink, _) = fixture.sink();
        let mut lines = Vec::new();
        for (number, fields) in (0..).zip(events) {
            let mut event = Event::new();
            event.set("rt", Value::Number((NOW + number % 3).to_string()));
            for (name, value) in fields {
                event.set(name, Value::Text(value));
            }
            lines.push(json::write(&event));
            if let Ok(line) = cef::write(&event) {
                lines.push(line);
            }
        }
        for (number, line) in (0..).zip(&lines) {
            push_raw(&mut sink, number, NOW, &Verdict::Unverified, line);
        }
        sink.flush(at(u32::try_from(lines.len()).unwrap()), false).unwrap();
        prop_assert_eq!(raw_lines(&fixture.reader()), lines);
        assert_rows_follow_from_lines(&fixture);
    }
}

#[test]
fn a_row_of_a_transaction_that_failed_is_not_shared() {
    let fixture = Fixture::new();
    let (mut sink, _) = fixture.sink();
    let other = Connection::open(fixture.path()).unwrap();
    let trigger = "CREATE TRIGGER spoil BEFORE INSERT ON event_rows WHEN new.query = '1' \
                   BEGIN SELECT raise(ABORT, 'spoilt'); END";
    other.execute_batch(trigger).unwrap();
    let lines = [r#"{"query":"0","name":"a"}"#, r#"{"query":"1","name":"a"}"#];
    for (number, line) in (0..).zip(lines) {
        push_raw(&mut sink, number, NOW, &Verdict::Unverified, line.as_bytes());
    }
    sink.flush(at(2), false).unwrap_err();
    other.execute_batch("DROP TRIGGER spoil").unwrap();
    sink.flush(at(2), false).unwrap();
    assert_eq!(raw_lines(&fixture.reader()), lines.map(str::as_bytes));
}

#[test]
fn what_events_share_expires_with_them() {
    let fixture = Fixture::new();
    let times = Times::new(NOW);
    let retain = Duration::from_millis(5 * DAY.unsigned_abs() + 1);
    let options = SqliteOptions { path: fixture.path(), retain: Some(retain) };
    let mut sink = SqliteSink::new(options, LEDGER, times.clock());
    sink.resume(&fixture.last).unwrap();
    let mut line = 0;
    let mut arrive = |sink: &mut SqliteSink, received_at: i64| {
        push_raw(sink, line, received_at, &Verdict::Unverified, br#"{"name":"a"}"#);
        line += 1;
        sink.flush(at(line), false).unwrap();
    };
    let counts = || {
        let reader = fixture.reader();
        let count = |table: &str| number(&reader, &format!("SELECT count(*) FROM {table}"));
        assert_eq!(number(&reader, "SELECT count(*) FROM events WHERE raw IS NULL OR name IS NULL"), 0);
        (count("event_rows"), count("event_common"))
    };
    // Shared for a day, and not with an earlier one, which a clock that was set back would give.
    for (after, wanted) in [
        (0, (1, 1)),
        (DAY - 1, (2, 1)),
        (DAY, (3, 2)),
        (2 * DAY - 1, (4, 2)),
        (DAY - 1, (5, 3)),
        (DAY, (6, 3)),
    ] {
        arrive(&mut sink, NOW + after);
        assert_eq!(counts(), wanted, "{after}");
    }
    times.advance(7 * DAY);
    sink.idle();
    assert_eq!(counts(), (1, 1), "what arrived last");
    times.advance(1);
    sink.idle();
    assert_eq!(counts(), (0, 0));
    // An event that waited for longer than `retain`.
    push_raw(&mut sink, 6, NOW + DAY, &Verdict::Unverified, br#"{"name":"a"}"#);
    let open = sink.open.as_mut().unwrap();
    assert!(insert(&mut open.connection, &mut sink.commons, &LEDGER, sink.collected.iter(), at(7)).unwrap());
    assert_eq!(counts(), (1, 1));
}

#[test]
fn a_trace_is_found_in_every_block() {
    let fixture = Fixture::new();
    let (mut sink, _) = fixture.sink();
    push(&mut sink, 0..30);
    for line in 30..40 {
        push_raw(&mut sink, line, NOW, &Verdict::Unverified, br#"{"trace_id":"3895213347334635099"}"#);
    }
    sink.flush(at(40), false).unwrap();
    drop(sink);
    let writer = Connection::open(fixture.path()).unwrap();
    writer.execute("UPDATE event_rows SET id = id * 30000", []).unwrap();
    let query = &documented_queries()[0];
    let found = writer.prepare(query).unwrap().query_map([], |_| Ok(())).unwrap().count();
    assert_eq!(found, 10);
    assert_eq!(number(&writer, "SELECT count(DISTINCT block) FROM event_rows"), 19);
}
