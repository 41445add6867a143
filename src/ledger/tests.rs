//! Tests of the ledger through its public interface.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::handle::PROGRESS;
use super::writer::ADVANCE_DELAY;
use super::*;
use crate::clock::tests::Times;
use crate::wire::batch::{Coding, Packing};
use crate::wire::event::{Reason, Stream, Verdict};

mod changes;
mod index;
mod skips;

const NOON: i64 = 1_700_000_000_000;
const HOUR: i64 = 3_600_000;

/// A ledger with clocks that the test advances.
struct Fixture {
    dir: tempfile::TempDir,
    times: Times,
    open: Option<(Ledger, Running)>,
    by_trace: bool,
    /// The first sink.
    first: Option<Subscription>,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut fixture = Self { dir, times: Times::new(NOON), open: None, by_trace: false, first: None };
        fixture.reopen();
        fixture
    }

    fn options(&self, sinks: &[&str]) -> LedgerOptions {
        let window = Window { events: Duration::from_secs(8 * 86_400), rejects: Duration::from_secs(86_400) };
        LedgerOptions {
            data_dir: self.dir.path().to_owned(),
            subscriptions: sinks.iter().map(|sink| file_sink(sink, &Stream::ALL, None)).collect(),
            backlog: Backlog { bytes: 1 << 30, quarantine_bytes: 1 << 28 },
            windows: BTreeMap::from([("us".to_owned(), window), ("eu".to_owned(), window)]),
            clock: self.times.clock(),
        }
    }

    fn close(&mut self) {
        if let Some((ledger, running)) = self.open.take() {
            ledger.close();
            running.thread.join().unwrap();
        }
    }

    fn reopen(&mut self) {
        self.change(self.options(&["all"]));
    }

    /// Restarts with another configuration.
    fn change(&mut self, options: LedgerOptions) {
        self.close();
        self.first = options.subscriptions.first().cloned();
        self.open = Some(Ledger::open(options).unwrap());
    }

    fn ledger(&self) -> &Ledger {
        &self.open.as_ref().unwrap().0
    }

    fn entry(&self, source: &str, line: &str, time: Option<i64>) -> Entry {
        let identifier = self.ledger().identifier();
        let identity = if self.by_trace {
            identifier.trace(source, "org", line.split(' ').next().unwrap())
        } else {
            identifier.event(source, true, (line.as_bytes(), b""), time)
        };
        Entry { verdict: Verdict::Verified { key: 0 }, class: None, identity }
    }

    fn batch(source: &str, entries: Vec<Entry>) -> Batch {
        let body = Arc::new(b"x\n".repeat(entries.len()));
        Batch {
            source: source.into(),
            received_at: NOON,
            decoded: Arc::clone(&body),
            body,
            packing: Packing::Lines(Coding::Identity),
            key_ids: Arc::from(["k".to_owned()]),
            lines: Lines::new(entries.into_iter().map(Some).collect()),
            checkpoint: None,
        }
    }

    fn commit(&self, source: &str, entries: Vec<Entry>) -> CommitReceipt {
        self.commit_batch(Self::batch(source, entries))
    }

    fn commit_batch(&self, batch: Batch) -> CommitReceipt {
        self.ledger().send_commit(batch).blocking_recv().unwrap().unwrap().receipt
    }

    fn commit_line(&self, line: &str, time: Option<i64>) -> u64 {
        self.commit("us", vec![self.entry("us", line, time)]).accepted()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.close();
    }
}

#[test]
fn an_event_is_accepted_once_across_restarts_and_batches() {
    let mut fixture = Fixture::new();
    let times = [Some(NOON), Some(NOON - 300 * 24 * HOUR), Some(-5), Some(i64::MAX), Some(i64::MIN), None];
    let entries = |fixture: &Fixture| -> Vec<Entry> {
        times.iter().enumerate().map(|(n, time)| fixture.entry("us", &n.to_string(), *time)).collect()
    };
    let mut twice = entries(&fixture);
    twice.extend(entries(&fixture));
    let receipt = fixture.commit("us", twice);
    assert_eq!((receipt.accepted(), receipt.duplicates()), (6, 6));
    fixture.reopen();
    for entry in entries(&fixture).into_iter().rev() {
        assert_eq!(fixture.commit("us", vec![entry]).duplicates(), 1);
    }
    assert_eq!(fixture.commit("eu", vec![fixture.entry("eu", "0", times[0])]).accepted(), 1);
}

#[test]
fn an_event_is_accepted_again_only_after_the_window() {
    for (time, by_trace) in [(Some(NOON), false), (None, false), (None, true)] {
        let mut fixture = Fixture::new();
        fixture.by_trace = by_trace;
        assert_eq!(fixture.commit_line("a", time), 1);
        // Newer lines in the same partition must neither extend nor shorten its window.
        for day in 1..=8 {
            if day % 3 == 0 {
                fixture.reopen();
            }
            fixture.times.advance(24 * HOUR - 1);
            assert_eq!(fixture.commit_line("a", time), 0, "day {day}");
            assert_eq!(fixture.commit_line(&format!("b{day} x"), time), 1);
        }
        fixture.times.advance(2 * HOUR);
        assert_eq!(fixture.commit_line("a", time), 1, "{time:?}");
        assert_eq!(fixture.commit_line("a", time), 0);
        assert_eq!(fixture.commit_line("b8 x", time), 0);
    }
}

#[test]
fn the_times_of_events_create_no_more_partitions_than_the_window_has_days() {
    let mut fixture = Fixture::new();
    let entries = |fixture: &Fixture, days: std::ops::Range<i64>| -> Vec<Entry> {
        days.map(|day| fixture.entry("us", &format!("{day}"), Some(NOON + day * 24 * HOUR))).collect()
    };
    assert_eq!(fixture.commit("us", entries(&fixture, -5000..5000)).accepted(), 10_000);
    fixture.reopen();
    assert_eq!(fixture.commit("us", entries(&fixture, -5000..5000)).duplicates(), 10_000);
    let connection = schema::open_reader(&fixture.ledger().shared.database).unwrap();
    let partitions: i64 =
        connection.query_row("SELECT count(*) FROM seen_partition", [], |row| row.get(0)).unwrap();
    assert!((10..=13).contains(&partitions), "{partitions}");
}

#[test]
fn an_event_stays_a_duplicate_when_its_day_enters_or_leaves_the_window() {
    // Each is accepted once, and repeated every day within its window.
    for day in [-12, -10, -9, -8, -1, 0, 1, 2, 4, 7] {
        let fixture = Fixture::new();
        let time = Some(NOON + day * 24 * HOUR);
        assert_eq!(fixture.commit_line("a", time), 1);
        for _ in 1..=7 {
            fixture.times.advance(24 * HOUR);
            assert_eq!(fixture.commit_line("a", time), 0, "{day}");
            // Another event may create the partition of this day.
            fixture.commit_line(&format!("b{day}"), time);
        }
    }
}

#[test]
fn an_event_stays_a_duplicate_when_the_clock_jumps() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.commit_line("a", Some(NOON)), 1);
    fixture.times.wall.fetch_add(30 * 24 * HOUR, Ordering::SeqCst);
    assert_eq!(fixture.commit_line("a", Some(NOON)), 0);
    fixture.reopen();
    assert_eq!(fixture.commit_line("a", Some(NOON)), 0);
    fixture.times.advance(8 * 24 * HOUR + HOUR);
    assert_eq!(fixture.commit_line("a", Some(NOON)), 1);
    fixture.times.wall.fetch_sub(60 * 24 * HOUR, Ordering::SeqCst);
    assert_eq!(fixture.commit_line("a", Some(NOON)), 0);
}

#[test]
fn a_rejected_line_is_a_duplicate_for_a_day_and_suppresses_no_event() {
    let fixture = Fixture::new();
    let reject = |fixture: &Fixture| fixture.reject("us", "a");
    assert_eq!(fixture.commit("us", vec![reject(&fixture), reject(&fixture)]).quarantined(), 1);
    assert_eq!(fixture.commit_line("a", Some(NOON)), 1);
    fixture.times.advance(24 * HOUR);
    assert_eq!(fixture.commit("us", vec![reject(&fixture)]).quarantined(), 0);
    fixture.times.advance(2000);
    assert_eq!(fixture.commit("us", vec![reject(&fixture)]).quarantined(), 1);
}

/// Returns a file sink that takes these streams, of these sources or of all.
fn file_sink(name: &str, streams: &[Stream], sources: Option<&[&str]>) -> Subscription {
    let sources = sources.map(|sources| sources.iter().map(|source| (*source).to_owned()).collect());
    Subscription { sink: name.to_owned(), kind: "file", streams: streams.to_vec(), sources, skips: false }
}

/// Returns the position of the batch that a sink takes next.
fn take(outbox: &mut Outbox, from: i64) -> Option<i64> {
    match outbox.next(from, Duration::ZERO).unwrap() {
        Next::Batch(batch, _) => Some(batch.position),
        Next::Full | Next::Nothing | Next::Closed => None,
    }
}

/// Returns that many distinct rejected lines, numbered from `first` on.
fn rejects(fixture: &Fixture, first: usize, lines: usize) -> Vec<Entry> {
    let verdict = Verdict::Rejected { reason: Reason::Malformed, detail: "no event".into() };
    let identity = |line: usize| fixture.ledger().identifier().reject("us", &line.to_le_bytes());
    (first..first + lines)
        .map(|line| Entry { verdict: verdict.clone(), class: None, identity: identity(line) })
        .collect()
}

#[test]
fn the_newest_rejected_lines_are_remembered_up_to_a_limit() {
    const STEP: usize = 50_000;
    let mut fixture = Fixture::new();
    let mut most = 0;
    let remembered = |fixture: &Fixture| -> usize {
        leaf::tests::all(&schema::open_reader(&fixture.ledger().shared.database).unwrap()).len()
    };
    assert_eq!(fixture.commit_line("an event", Some(NOON)), 1);
    for step in 0..14 {
        // First within a second, then over hours.
        fixture.times.advance(if step < 10 { 1 } else { HOUR });
        let receipt = fixture.commit("us", rejects(&fixture, step * STEP, STEP));
        assert_eq!(receipt.quarantined(), STEP as u64);
        most = most.max(remembered(&fixture));
        if step == 9 {
            fixture.reopen();
        }
    }
    assert!((200_000..=262_145).contains(&most), "{most}");
    let newest = rejects(&fixture, 10 * STEP, 4 * STEP);
    let mut groups = BTreeMap::<u64, u64>::new();
    for entry in &newest {
        *groups.entry(entry.identity.place() >> seen::GROUP_BITS).or_default() += 1;
    }
    let forgotten = groups.values().map(|lines| lines.saturating_sub(seen::REJECTS as u64)).sum::<u64>();
    assert!(forgotten > 0, "some groups have more of the newest than they keep");
    assert_eq!(fixture.commit("us", newest).quarantined(), forgotten, "the newest of each group are known");
    assert_eq!(fixture.commit_line("an event", Some(NOON)), 0, "events are not forgotten instead");
    // Of the lines of the same second, any may be kept.
    let oldest = fixture.commit("us", rejects(&fixture, 0, 1000)).quarantined();
    assert!(oldest > 500, "of the oldest only {oldest} are forgotten");
}

#[test]
fn of_equal_rejected_lines_in_a_batch_the_first_is_new() {
    let fixture = Fixture::new();
    let mut twice = rejects(&fixture, 0, 3);
    twice.extend(rejects(&fixture, 0, 3));
    assert_eq!(fixture.commit("us", twice).quarantined(), 3);
    let mut outbox = fixture.outbox();
    let Ok(Next::Batch(batch, _)) = outbox.next(0, Duration::ZERO) else { panic!("there is a batch") };
    assert_eq!(
        batch.verdicts.iter().map(|verdict| verdict.is_some()).collect::<Vec<_>>(),
        [[true; 3], [false; 3]].concat()
    );
}

#[test]
fn the_details_of_rejected_lines_count_as_quarantine_bytes() {
    let fixture = Fixture::new();
    fixture.commit("us", rejects(&fixture, 0, 100));
    let Backlog { bytes: all, quarantine_bytes: quarantined } = fixture.ledger().backlog();
    assert_eq!(all, quarantined);
}

#[test]
fn a_small_commit_does_not_wait_for_all_large_ones_before_it() {
    let fixture = Fixture::new();
    let batches: Vec<_> = (0..20).map(|step| rejects(&fixture, step * 20_000, 20_000)).collect();
    // Blocks the writer until all commits are queued.
    let blocker = rusqlite::Connection::open(&fixture.ledger().shared.database).unwrap();
    blocker.execute_batch("BEGIN IMMEDIATE").unwrap();
    let commit = |entries| fixture.ledger().send_commit(Fixture::batch("us", entries));
    let large: Vec<_> = batches.into_iter().map(commit).collect();
    let genuine = commit(vec![fixture.entry("us", "a", Some(NOON))]);
    blocker.execute_batch("ROLLBACK").unwrap();
    assert_eq!(genuine.blocking_recv().unwrap().unwrap().receipt.accepted(), 1);
    for answer in large {
        assert_eq!(answer.blocking_recv().unwrap().unwrap().receipt.quarantined(), 20_000);
    }
    let mut outbox = fixture.outbox();
    let lines: Vec<usize> = (1..=21)
        .map(|position| match outbox.next(position, Duration::ZERO) {
            Ok(Next::Batch(batch, _)) => batch.verdicts.iter().count(),
            _ => panic!("there is a batch"),
        })
        .collect();
    assert_ne!(lines[20], 1, "the small batch was committed after all large ones: {lines:?}");
}

#[test]
fn a_close_writes_the_commits_before_it() {
    let mut fixture = Fixture::new();
    let answers: Vec<_> = (0..3)
        .map(|step| {
            fixture.ledger().send_commit(Fixture::batch("us", rejects(&fixture, step * 20_000, 20_000)))
        })
        .collect();
    fixture.close();
    for answer in answers {
        assert_eq!(answer.blocking_recv().unwrap().unwrap().receipt.quarantined(), 20_000);
    }
}

#[tokio::test]
async fn the_writer_counts_as_alive_while_a_transaction_makes_progress() {
    let fixture = Fixture::new();
    let gauges = Arc::clone(&fixture.ledger().shared.gauges);
    // Another connection writes: the transaction waits and makes no progress.
    let blocker = rusqlite::Connection::open(&fixture.ledger().shared.database).unwrap();
    blocker.execute_batch("BEGIN IMMEDIATE").unwrap();
    let commit =
        fixture.ledger().send_commit(Fixture::batch("us", vec![fixture.entry("us", "a", Some(NOON))]));
    // Until the writer has received the commit, it answers the next message.
    let mut tries = 0;
    let answers = loop {
        let mut answers = Box::pin(fixture.ledger().answers());
        if tokio::time::timeout(4 * PROGRESS, &mut answers).await.is_err() {
            break answers;
        }
        tries += 1;
        assert!(tries < 1000, "it hangs");
    };
    gauges.progress.fetch_add(1, Ordering::Relaxed);
    assert!(tokio::time::timeout(100 * PROGRESS, answers).await.unwrap(), "a line was written");
    blocker.execute_batch("ROLLBACK").unwrap();
    assert_eq!(commit.await.unwrap().unwrap().receipt.accepted(), 1);
}

#[test]
fn an_unverified_copy_does_not_suppress_the_verified_line() {
    let fixture = Fixture::new();
    let unverified = fixture.ledger().identifier().event("us", false, (b"a", b""), Some(NOON));
    let receipt =
        fixture.commit("us", vec![Entry { verdict: Verdict::Unverified, class: None, identity: unverified }]);
    assert_eq!(receipt.accepted(), 1);
    assert_eq!(fixture.commit_line("a", Some(NOON)), 1);
}

#[test]
fn batches_wait_for_their_sink_in_order_and_are_deleted_after_delivery() {
    let mut fixture = Fixture::new();
    for n in 0..3 {
        fixture.commit_line(&format!("{n}"), Some(NOON));
    }
    assert_eq!(fixture.commit_line("0", Some(NOON)), 0);
    for restart in [false, true] {
        if restart {
            fixture.reopen();
        }
        let mut outbox = fixture.outbox();
        assert_eq!([1, 2, 3, 4].map(|from| take(&mut outbox, from)), [Some(1), Some(2), Some(3), None]);
        assert_eq!(fixture.ledger().pending("all").unwrap().events, 3);
    }
    assert!(fixture.ledger().backlog().bytes > 0);
    fixture.ledger().advance_now("all", Position { batch: 3, line: 0 }, b"mark".to_vec()).unwrap();
    assert_eq!(fixture.ledger().pending("all").unwrap().events, 1);
    fixture.reopen();
    let resume = fixture.ledger().resume("all").unwrap().unwrap();
    assert_eq!((resume.position, resume.mark.as_slice()), (Position { batch: 3, line: 0 }, &b"mark"[..]));
    assert_eq!(fixture.ledger().pending("all").unwrap().events, 1);
    fixture.ledger().advance_now("all", Position { batch: 4, line: 0 }, Vec::new()).unwrap();
    assert_eq!(fixture.ledger().backlog(), Backlog::default());
    fixture.reopen();
    // Positions continue although the table is empty.
    fixture.commit_line("3", Some(NOON));
    assert_eq!(take(&mut fixture.outbox(), 0), Some(4));
}

#[test]
fn progress_of_a_sink_is_recorded_with_the_next_batch() {
    let mut fixture = Fixture::new();
    let at = |batch, line| Position { batch, line };
    let recorded = |fixture: &Fixture| fixture.ledger().resume("all").unwrap().unwrap().position;
    let advance = |fixture: &Fixture, position| fixture.ledger().advance("all", position, Vec::new());
    fixture.commit_line("1", Some(NOON));
    let began = Instant::now();
    advance(&fixture, at(1, 1));
    while recorded(&fixture) != at(1, 1) {
        std::thread::yield_now();
    }
    assert!(began.elapsed() >= ADVANCE_DELAY, "in a transaction of its own, at once");
    advance(&fixture, at(2, 0));
    fixture.commit_line("2", Some(NOON));
    assert_eq!(recorded(&fixture), at(2, 0));
    advance(&fixture, at(2, 1));
    fixture.reopen();
    assert_eq!(recorded(&fixture), at(2, 1), "at the end");
}

#[test]
fn a_sink_that_is_removed_or_changed_with_events_waiting_is_refused() {
    let mut fixture = Fixture::new();
    fixture.commit_line("a", Some(NOON));
    fixture.close();
    let refused = Ledger::open(fixture.options(&["other"])).err().unwrap();
    assert!(matches!(&refused, OpenError::Orphaned { sink, pending: 1 } if sink == "all"), "{refused}");
    let mut changed = fixture.options(&["all"]);
    changed.subscriptions[0].kind = "syslog";
    assert!(matches!(Ledger::open(changed).err().unwrap(), OpenError::KindChanged { .. }));
    let forget = || Ledger::forget_sink(fixture.dir.path(), "all", None, false).unwrap();
    assert_eq!([forget(), forget()], [Forgetting::All { given_up: 1 }, Forgetting::Unknown]);
    fixture.change(fixture.options(&["other"]));
    assert_eq!(fixture.ledger().resume("other").unwrap().unwrap().position, Position { batch: 2, line: 0 });
}

impl Fixture {
    fn reject(&self, source: &str, line: &str) -> Entry {
        Entry {
            verdict: Verdict::Rejected { reason: Reason::Unsigned, detail: "no signature".into() },
            class: None,
            identity: self.ledger().identifier().reject(source, line.as_bytes()),
        }
    }

    /// Returns options with one sink, `all`, that takes these streams of these sources.
    fn taking(&self, streams: &[Stream], sources: Option<&[&str]>) -> LedgerOptions {
        LedgerOptions { subscriptions: vec![file_sink("all", streams, sources)], ..self.options(&[]) }
    }

    fn outbox(&self) -> Outbox {
        self.ledger().outbox(self.first.as_ref().unwrap()).unwrap()
    }

    /// Returns the batch and line of everything that the first sink gets from its position on.
    fn handed_out(&self) -> Vec<(i64, usize)> {
        self.handed_out_to(self.first.as_ref().unwrap())
    }

    /// Returns the batch and line of everything that a sink gets from its position on.
    fn handed_out_to(&self, subscription: &Subscription) -> Vec<(i64, usize)> {
        let mut outbox = self.ledger().outbox(subscription).unwrap();
        let resume = self.ledger().resume(&subscription.sink).unwrap().unwrap();
        let Position { mut batch, mut line } = resume.position;
        let mut found = Vec::new();
        while let Next::Batch(next, streams) = outbox.next(batch, Duration::ZERO).unwrap() {
            line = if next.position == batch { line } else { 0 };
            found.extend(next.lines(streams, line).map(|(line, _)| (next.position, line)));
            (batch, line) = (next.position + 1, 0);
        }
        found
    }
}

#[test]
fn a_sink_that_takes_less_is_refused_while_what_it_took_waits() {
    let mut fixture = Fixture::new();
    // Batch 1, which is delivered in part, and batch 2.
    for source in ["us", "eu"] {
        let entries = vec![fixture.entry(source, "a", None), fixture.reject(source, "b")];
        fixture.commit(source, entries);
    }
    let refused = |fixture: &mut Fixture, options: LedgerOptions, expected: u64| {
        fixture.close();
        match Ledger::open(options).err() {
            Some(OpenError::Narrowed { sink, pending }) => {
                assert_eq!((sink.as_str(), pending), ("all", expected));
            }
            other => panic!("{other:?}"),
        }
    };
    let us_verified = fixture.taking(&[Stream::Verified], Some(&["us"]));
    refused(&mut fixture, us_verified.clone(), 3);
    let us = fixture.taking(&Stream::ALL, Some(&["us"]));
    refused(&mut fixture, us.clone(), 2);
    let renamed = fixture.taking(&Stream::ALL, Some(&["eu", "usa"]));
    refused(&mut fixture, renamed, 2);
    let verified = fixture.taking(&[Stream::Verified], None);
    refused(&mut fixture, verified.clone(), 2);
    // The same streams and sources, written differently.
    let both = fixture.taking(&Stream::ALL.map(|stream| stream), Some(&["us", "eu"]));
    fixture.change(both);
    let both =
        fixture.taking(&[Stream::Quarantine, Stream::Unverified, Stream::Verified], Some(&["eu", "us"]));
    fixture.change(both);
    assert_eq!(fixture.handed_out(), [(1, 0), (1, 1), (2, 0), (2, 1)]);

    fixture.ledger().advance_now("all", Position { batch: 1, line: 1 }, Vec::new()).unwrap();
    refused(&mut fixture, us_verified.clone(), 3);
    let all = fixture.options(&["all"]);
    fixture.change(all);
    fixture.ledger().advance_now("all", Position { batch: 2, line: 1 }, Vec::new()).unwrap();
    refused(&mut fixture, verified.clone(), 1);
    let all = fixture.options(&["all"]);
    fixture.change(all);
    fixture.ledger().advance_now("all", Position { batch: 3, line: 0 }, Vec::new()).unwrap();
    // Nothing waits that it took and no longer wants.
    fixture.change(us_verified);
    fixture.commit("us", vec![fixture.reject("us", "c"), fixture.entry("us", "c", None)]);
    assert_eq!(fixture.ledger().pending("all").unwrap().events, 1);
    // It takes less than what is there, but nothing that it gives up waits for it.
    let us_verified = fixture.taking(&[Stream::Verified], Some(&["us"]));
    fixture.change(us_verified);
    let nothing = fixture.taking(&[Stream::Quarantine], None);
    refused(&mut fixture, nothing, 1);
}

#[test]
fn a_sink_that_takes_more_gets_only_later_batches_of_it() {
    let mut fixture = Fixture::new();
    let us = fixture.taking(&[Stream::Verified], Some(&["us"]));
    fixture.close();
    assert_eq!(
        Ledger::forget_sink(fixture.dir.path(), "all", None, false).unwrap(),
        Forgetting::All { given_up: 0 }
    );
    fixture.change(us);
    let post = |fixture: &Fixture, line: &str| {
        for source in ["us", "eu"] {
            fixture.commit(source, vec![fixture.entry(source, line, None), fixture.reject(source, line)]);
        }
    };
    post(&fixture, "a");
    let verified = fixture.taking(&[Stream::Verified], None);
    fixture.change(verified);
    post(&fixture, "b");
    let all = fixture.options(&["all"]);
    fixture.change(all);
    post(&fixture, "c");
    // No sink takes anything of the first batch of the other source, so it is not stored.
    let expected = [(1, 0), (2, 0), (3, 0), (4, 0), (4, 1), (5, 0), (5, 1)];
    for restart in [false, true] {
        if restart {
            fixture.reopen();
        }
        assert_eq!(fixture.handed_out(), expected, "{restart}");
        assert_eq!(fixture.ledger().pending("all").unwrap().events, 7);
    }
    // Lines that it did not take then do not prevent the change now.
    fixture.ledger().advance_now("all", Position { batch: 4, line: 0 }, Vec::new()).unwrap();
    let us = fixture.taking(&Stream::ALL, Some(&["us"]));
    fixture.close();
    assert!(matches!(Ledger::open(us).err(), Some(OpenError::Narrowed { pending: 2, .. })));
    fixture.reopen();
    assert_eq!(fixture.handed_out(), expected[3..]);
}

#[test]
fn forget_sink_gives_up_events_that_prevent_a_start_and_by_force_all() {
    let mut fixture = Fixture::new();
    fixture.commit("us", vec![fixture.entry("us", "a", None)]);
    fixture.commit("eu", vec![fixture.entry("eu", "a", None), fixture.reject("eu", "a")]);
    let forget = |options: &LedgerOptions, by_force| {
        Ledger::forget_sink(&options.data_dir, "all", Some(&options.subscriptions[0]), by_force)
    };
    let (all, us) = (fixture.options(&["all"]), fixture.taking(&Stream::ALL, Some(&["us"])));
    assert!(matches!(forget(&all, true), Err(OpenError::InUse(_))));
    fixture.close();
    assert_eq!(forget(&all, false).unwrap(), Forgetting::Refused { pending: 3 });
    assert_eq!(forget(&us, false).unwrap(), Forgetting::NoLongerWanted { given_up: 2 });
    assert_eq!(forget(&us, false).unwrap(), Forgetting::Refused { pending: 1 });
    fixture.change(us.clone());
    assert_eq!(fixture.handed_out(), [(1, 0)]);
    fixture.close();
    let mut syslog = us.clone();
    syslog.subscriptions[0].kind = "syslog";
    assert_eq!(forget(&us, true).unwrap(), Forgetting::All { given_up: 1 });
    fixture.change(us);
    fixture.close();
    assert_eq!(forget(&syslog, false).unwrap(), Forgetting::All { given_up: 0 });

    let missing = fixture.dir.path().join("missing");
    let options = LedgerOptions { data_dir: missing.clone(), ..all };
    assert!(matches!(forget(&options, true), Err(OpenError::Missing(path)) if path.starts_with(&missing)));
    assert!(!missing.exists());
    std::fs::create_dir(&missing).unwrap();
    assert!(matches!(forget(&options, true), Err(OpenError::Missing(_))));
    assert_eq!(std::fs::read_dir(&missing).unwrap().count(), 0);
}

#[test]
fn a_migration_keeps_the_waiting_events_of_each_sink() {
    for version in [1, 2] {
        let mut fixture = Fixture::new();
        fixture.close();
        for name in ["ledger.db", "lock"] {
            std::fs::remove_file(fixture.dir.path().join(name)).unwrap();
        }
        let database = rusqlite::Connection::open(fixture.dir.path().join("ledger.db")).unwrap();
        database.execute_batch(schema::VERSION_1).unwrap();
        database
            .execute_batch(
                "INSERT INTO meta VALUES ('ledger_id', zeroblob(16)), ('identity_key', zeroblob(32));
                 INSERT INTO batch VALUES (2, 'us', 4, 0, 1, 0, 0, 0, 7, '[\"k\"]', x'0200', x'61');
                 INSERT INTO batch VALUES (3, 'us', 5, 0, 1, 1, 0, 0, 7, '[\"k\"]', x'020001', x'61');
                 INSERT INTO batch VALUES (4, 'eu', 6, 0, 1, 0, 1, 0, 7, '[\"k\"]', x'0200100000', x'61');
                 INSERT INTO batch VALUES (5, 'us', 7, 0, 1, 0, 1, 0, 7, '[\"k\"]', x'0200100000', x'61');
                 INSERT INTO sink VALUES ('all', 'file', 3, 1, x'6d61726b');
                 PRAGMA user_version = 1",
            )
            .unwrap();
        if version == 2 {
            database.execute_batch(schema::VERSION_2).unwrap();
            database
                .execute_batch(
                    r#"INSERT INTO sink VALUES ('good', 'file', 2, 0, x'', '{"streams":["verified"],"sources":null}');
                       INSERT INTO sink VALUES ('us', 'file', 4, 0, x'', '{"streams":["verified"],"sources":["us"]}');
                       INSERT INTO sink VALUES ('more', 'file', 3, 0, x'',
                         '{"streams":["quarantine","verified"],"sources":null,"earlier":[
                           {"before":4,"streams":["verified"],"sources":["eu"]},
                           {"before":5,"streams":["quarantine","verified","unverified"],"sources":null}]}');
                       INSERT INTO meta VALUES ('in_flight_bytes', 7);
                       PRAGMA user_version = 2"#,
                )
                .unwrap();
        }
        drop(database);
        let names: &[&str] = if version == 1 { &["all"] } else { &["all", "good", "us", "more"] };
        fixture.change(fixture.options(names));
        assert_eq!(fixture.ledger().id(), [0; 16]);
        let resume = fixture.ledger().resume("all").unwrap().unwrap();
        assert_eq!((resume.position, resume.mark.as_slice()), (Position { batch: 3, line: 1 }, &b"mark"[..]));
        assert_eq!(fixture.handed_out(), [(3, 1), (4, 0), (4, 1), (5, 0), (5, 1)]);
        let pending = |sink| fixture.ledger().pending(sink).unwrap();
        assert_eq!(pending("all"), Pending { events: 6, oldest: Some(5) });
        if version == 2 {
            assert_eq!(pending("good"), Pending { events: 4, oldest: Some(4) });
            assert_eq!(pending("us"), Pending { events: 1, oldest: Some(7) });
            assert_eq!(pending("more"), Pending { events: 4, oldest: Some(6) });
        }
        assert_eq!(fixture.commit_line("a", None), 1);
        assert_eq!(fixture.handed_out().last(), Some(&(6, 0)));
    }
}

#[test]
fn nothing_is_acknowledged_after_a_file_of_the_ledger_was_renamed_or_replaced() {
    for name in ["lock", "ledger.db", "ledger.db-wal", ""] {
        for is_replaced in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let mut fixture = Fixture::new();
            fixture.commit_line("a", None);
            let from = fixture.dir.path().join(name);
            let to = dir.path().join("elsewhere");
            std::fs::rename(&from, &to).unwrap();
            if is_replaced && name.is_empty() {
                std::fs::create_dir(&from).unwrap();
                for name in ["lock", "ledger.db", "ledger.db-wal"] {
                    std::fs::copy(to.join(name), from.join(name)).unwrap();
                }
            } else if is_replaced {
                std::fs::copy(&to, &from).unwrap();
            }
            // With a commit, and idle.
            if is_replaced {
                let batch = Fixture::batch("us", vec![fixture.entry("us", "b", None)]);
                assert!(fixture.ledger().send_commit(batch).blocking_recv().is_err(), "{name}");
            }
            let (ledger, running) = fixture.open.take().unwrap();
            let Ok(Failed::Gone(path)) = running.failed.blocking_recv() else { panic!("{name}") };
            assert!(path.starts_with(&from), "{}", path.display());
            running.thread.join().unwrap();
            drop(ledger);
        }
    }
}

#[test]
fn two_daemons_do_not_share_a_directory() {
    let fixture = Fixture::new();
    assert!(matches!(Ledger::open(fixture.options(&["all"])).err().unwrap(), OpenError::InUse(_)));
}
