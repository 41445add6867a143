//! The ledger as its users see it.

use std::sync::atomic::AtomicI64;

use super::*;

mod skips;

const NOON: i64 = 1_700_000_000_000;
const HOUR: i64 = 3_600_000;

/// A ledger whose clocks the test moves.
struct Bench {
    dir: tempfile::TempDir,
    wall: Arc<AtomicI64>,
    steady: Arc<AtomicI64>,
    open: Option<(Ledger, Running)>,
    by_trace: bool,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut bench = Self {
            dir,
            wall: Arc::new(AtomicI64::new(NOON)),
            steady: Arc::new(AtomicI64::new(0)),
            open: None,
            by_trace: false,
        };
        bench.reopen();
        bench
    }

    fn options(&self, sinks: &[&str]) -> Options {
        let (wall, steady) = (Arc::clone(&self.wall), Arc::clone(&self.steady));
        let window = Window { events: Duration::from_secs(8 * 86_400), rejects: Duration::from_secs(86_400) };
        Options {
            data_dir: self.dir.path().to_owned(),
            subscriptions: sinks
                .iter()
                .map(|sink| Subscription {
                    sink: (*sink).to_owned(),
                    kind: "file",
                    streams: Stream::ALL.to_vec(),
                    sources: None,
                    skips: false,
                })
                .collect(),
            backlog: Backlog { bytes: 1 << 30, quarantine_bytes: 1 << 28 },
            windows: BTreeMap::from([("us".to_owned(), window), ("eu".to_owned(), window)]),
            clock: Clock {
                wall: Arc::new(move || wall.load(Ordering::SeqCst)),
                steady: Arc::new(move || {
                    Duration::from_millis(steady.load(Ordering::SeqCst).try_into().unwrap())
                }),
            },
        }
    }

    fn close(&mut self) {
        if let Some((ledger, running)) = self.open.take() {
            ledger.close();
            running.thread.join().unwrap();
        }
    }

    fn reopen(&mut self) {
        self.close();
        self.open = Some(Ledger::open(self.options(&["all"])).unwrap());
    }

    fn ledger(&self) -> &Ledger {
        &self.open.as_ref().unwrap().0
    }

    /// Time passes: both clocks agree.
    fn pass(&self, milliseconds: i64) {
        self.wall.fetch_add(milliseconds, Ordering::SeqCst);
        self.steady.fetch_add(milliseconds, Ordering::SeqCst);
    }

    fn entry(&self, source: &str, line: &str, time: Option<i64>) -> Entry {
        let identifier = self.ledger().identifier();
        let identity = if self.by_trace {
            identifier.trace(source, "org", line.split(' ').next().unwrap())
        } else {
            identifier.event(source, true, (line.as_bytes(), b""), time)
        };
        Entry { verdict: Verdict::Verified { key: 0 }, identity }
    }

    fn batch(source: &str, entries: Vec<Entry>) -> Batch {
        let body: Vec<u8> = b"x\n".repeat(entries.len());
        Batch {
            source: source.into(),
            received_at: NOON,
            decoded: Some(Arc::new(body.clone())),
            body,
            packing: 0,
            key_ids: Arc::from(["k".to_owned()]),
            entries,
        }
    }

    fn commit(&self, source: &str, entries: Vec<Entry>) -> Receipt {
        self.ledger().send_commit(Self::batch(source, entries)).blocking_recv().unwrap().unwrap()
    }

    fn commit_line(&self, line: &str, time: Option<i64>) -> u64 {
        self.commit("us", vec![self.entry("us", line, time)]).accepted()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.close();
    }
}

#[test]
fn an_event_is_accepted_once_across_restarts_and_batches() {
    let mut bench = Bench::new();
    let times = [Some(NOON), Some(NOON - 300 * 24 * HOUR), Some(-5), Some(i64::MAX), Some(i64::MIN), None];
    let entries = |bench: &Bench| -> Vec<Entry> {
        times.iter().enumerate().map(|(n, time)| bench.entry("us", &n.to_string(), *time)).collect()
    };
    let mut twice = entries(&bench);
    twice.extend(entries(&bench));
    let receipt = bench.commit("us", twice);
    assert_eq!((receipt.accepted(), receipt.duplicates()), (6, 6));
    bench.reopen();
    for entry in entries(&bench).into_iter().rev() {
        assert_eq!(bench.commit("us", vec![entry]).duplicates(), 1);
    }
    assert_eq!(bench.commit("eu", vec![bench.entry("eu", "0", times[0])]).accepted(), 1);
}

#[test]
fn an_event_is_new_again_only_after_its_window() {
    for (time, by_trace) in [(Some(NOON), false), (None, false), (None, true)] {
        let mut bench = Bench::new();
        bench.by_trace = by_trace;
        assert_eq!(bench.commit_line("a", time), 1);
        // Newer lines in the same partition must not keep it, nor lose it.
        for day in 1..=8 {
            if day % 3 == 0 {
                bench.reopen();
            }
            bench.pass(24 * HOUR - 1);
            assert_eq!(bench.commit_line("a", time), 0, "day {day}");
            assert_eq!(bench.commit_line(&format!("b{day} x"), time), 1);
        }
        bench.pass(2 * HOUR);
        assert_eq!(bench.commit_line("a", time), 1, "{time:?}");
        assert_eq!(bench.commit_line("a", time), 0);
        assert_eq!(bench.commit_line("b8 x", time), 0);
    }
}

#[test]
fn a_jump_of_the_clock_makes_nothing_new() {
    let mut bench = Bench::new();
    assert_eq!(bench.commit_line("a", Some(NOON)), 1);
    bench.wall.fetch_add(30 * 24 * HOUR, Ordering::SeqCst);
    assert_eq!(bench.commit_line("a", Some(NOON)), 0);
    bench.reopen();
    assert_eq!(bench.commit_line("a", Some(NOON)), 0);
    bench.pass(8 * 24 * HOUR + HOUR);
    assert_eq!(bench.commit_line("a", Some(NOON)), 1);
    bench.wall.fetch_sub(60 * 24 * HOUR, Ordering::SeqCst);
    assert_eq!(bench.commit_line("a", Some(NOON)), 0);
}

#[test]
fn a_rejected_line_is_a_duplicate_for_a_day_and_suppresses_no_event() {
    let bench = Bench::new();
    let reject = |bench: &Bench| Entry {
        verdict: Verdict::Rejected { reason: Reason::Unsigned, detail: "no signature".into() },
        identity: bench.ledger().identifier().reject("us", b"a"),
    };
    assert_eq!(bench.commit("us", vec![reject(&bench), reject(&bench)]).quarantined(), 1);
    assert_eq!(bench.commit_line("a", Some(NOON)), 1);
    bench.pass(24 * HOUR);
    assert_eq!(bench.commit("us", vec![reject(&bench)]).quarantined(), 0);
    bench.pass(2000);
    assert_eq!(bench.commit("us", vec![reject(&bench)]).quarantined(), 1);
}

/// So many different lines for the quarantine, from a number on.
fn rejects(bench: &Bench, first: usize, lines: usize) -> Vec<Entry> {
    let verdict = Verdict::Rejected { reason: Reason::Malformed, detail: "no event".into() };
    let identity = |line: usize| bench.ledger().identifier().reject("us", &line.to_le_bytes());
    (first..first + lines).map(|line| Entry { verdict: verdict.clone(), identity: identity(line) }).collect()
}

#[test]
fn rubbish_is_remembered_within_a_bound_and_the_newest_of_it() {
    const STEP: usize = 50_000;
    let mut bench = Bench::new();
    let mut most = 0;
    let remembered = |bench: &Bench| -> usize {
        let connection = schema::open_reader(&bench.ledger().shared.database).unwrap();
        connection.query_row("SELECT count(*) FROM seen", [], |row| row.get(0)).unwrap()
    };
    assert_eq!(bench.commit_line("an event", Some(NOON)), 1);
    for step in 0..14 {
        // All within a second of the clock, and then over hours.
        bench.pass(if step < 10 { 1 } else { HOUR });
        let receipt = bench.commit("us", rejects(&bench, step * STEP, STEP));
        assert_eq!(receipt.quarantined(), STEP as u64);
        most = most.max(remembered(&bench));
        if step == 9 {
            bench.reopen();
        }
    }
    assert!((350_000..600_000).contains(&most), "{most}");
    assert_eq!(
        bench.commit("us", rejects(&bench, 9 * STEP, 5 * STEP)).quarantined(),
        0,
        "the newest are known"
    );
    assert_eq!(bench.commit_line("an event", Some(NOON)), 0, "events are not forgotten for it");
    assert_eq!(bench.commit("us", rejects(&bench, 0, 1)).quarantined(), 1, "the oldest are not");
}

#[test]
fn of_the_same_bad_lines_in_a_batch_the_first_is_new() {
    let bench = Bench::new();
    let mut twice = rejects(&bench, 0, 3);
    twice.extend(rejects(&bench, 0, 3));
    assert_eq!(bench.commit("us", twice).quarantined(), 3);
    let outbox = bench.ledger().outbox("all").unwrap();
    let Ok(Next::Batch(batch)) = outbox.next(0, Duration::ZERO) else { panic!("there is a batch") };
    assert_eq!(
        batch.verdicts.iter().map(Option::is_some).collect::<Vec<_>>(),
        [[true; 3], [false; 3]].concat()
    );
}

#[test]
fn what_is_wrong_with_lines_counts_as_quarantine_too() {
    let bench = Bench::new();
    bench.commit("us", rejects(&bench, 0, 100));
    let (all, quarantined) = bench.ledger().backlog();
    assert_eq!(all, quarantined);
}

#[test]
fn a_commit_does_not_wait_for_all_rubbish_before_it() {
    let bench = Bench::new();
    let commit = |entries| bench.ledger().send_commit(Bench::batch("us", entries));
    let mut rubbish: Vec<_> = (0..20).map(|step| commit(rejects(&bench, step * 20_000, 20_000))).collect();
    let genuine = commit(vec![bench.entry("us", "a", Some(NOON))]);
    assert_eq!(genuine.blocking_recv().unwrap().unwrap().accepted(), 1);
    assert!(rubbish[19].try_recv().is_err(), "much of the rubbish still waits");
    for answer in rubbish {
        assert_eq!(answer.blocking_recv().unwrap().unwrap().quarantined(), 20_000);
    }
}

#[test]
fn a_close_writes_what_came_before_it() {
    let mut bench = Bench::new();
    let answers: Vec<_> = (0..3)
        .map(|step| bench.ledger().send_commit(Bench::batch("us", rejects(&bench, step * 20_000, 20_000))))
        .collect();
    bench.close();
    for answer in answers {
        assert_eq!(answer.blocking_recv().unwrap().unwrap().quarantined(), 20_000);
    }
}

#[tokio::test]
async fn the_writer_answers_while_a_transaction_goes_forward() {
    let bench = Bench::new();
    let gauges = Arc::clone(&bench.ledger().shared.gauges);
    // Somebody else writes: the transaction waits, and nothing goes forward.
    let blocker = rusqlite::Connection::open(&bench.ledger().shared.database).unwrap();
    blocker.execute_batch("BEGIN IMMEDIATE").unwrap();
    let commit = bench.ledger().send_commit(Bench::batch("us", vec![bench.entry("us", "a", Some(NOON))]));
    // Until it has been taken, it is the next message that answers.
    while bench.ledger().answers_within(4 * PROGRESS).await {}
    let answers = bench.ledger().answers();
    tokio::pin!(answers);
    assert!(tokio::time::timeout(4 * PROGRESS, &mut answers).await.is_err(), "it hangs");
    gauges.progress.fetch_add(1, Ordering::Relaxed);
    assert!(tokio::time::timeout(100 * PROGRESS, answers).await.unwrap(), "a line was written");
    blocker.execute_batch("ROLLBACK").unwrap();
    assert_eq!(commit.await.unwrap().unwrap().accepted(), 1);
}

impl Ledger {
    async fn answers_within(&self, patience: Duration) -> bool {
        tokio::time::timeout(patience, self.answers()).await.unwrap_or(false)
    }
}

#[test]
fn an_unverified_copy_does_not_suppress_the_verified_line() {
    let bench = Bench::new();
    let unverified = bench.ledger().identifier().event("us", false, (b"a", b""), Some(NOON));
    let receipt = bench.commit("us", vec![Entry { verdict: Verdict::Unverified, identity: unverified }]);
    assert_eq!(receipt.accepted(), 1);
    assert_eq!(bench.commit_line("a", Some(NOON)), 1);
}

#[test]
fn batches_wait_for_their_sink_in_order_and_are_forgotten_behind_it() {
    let mut bench = Bench::new();
    for n in 0..3 {
        bench.commit_line(&format!("{n}"), Some(NOON));
    }
    assert_eq!(bench.commit_line("0", Some(NOON)), 0);
    let position = |outbox: &Outbox, from| match outbox.next(from, Duration::ZERO).unwrap() {
        Next::Batch(batch) => Some(batch.position),
        Next::Full | Next::Nothing | Next::Closed => None,
    };
    for restart in [false, true] {
        if restart {
            bench.reopen();
        }
        let outbox = bench.ledger().outbox("all").unwrap();
        assert_eq!([1, 2, 3, 4].map(|from| position(&outbox, from)), [Some(1), Some(2), Some(3), None]);
        assert_eq!(bench.ledger().pending("all").events, 3);
    }
    assert!(bench.ledger().backlog().0 > 0);
    bench.ledger().advance_now("all", Position { batch: 3, line: 0 }, b"mark".to_vec(), None).unwrap();
    assert_eq!(bench.ledger().pending("all").events, 1);
    bench.reopen();
    let resume = bench.ledger().resume("all").unwrap();
    assert_eq!((resume.position, resume.mark.as_slice()), (Position { batch: 3, line: 0 }, &b"mark"[..]));
    assert_eq!(bench.ledger().pending("all").events, 1);
    bench.ledger().advance_now("all", Position { batch: 4, line: 0 }, Vec::new(), None).unwrap();
    assert_eq!(bench.ledger().backlog(), (0, 0));
    bench.reopen();
    // Positions go on where they were although the table is empty.
    bench.commit_line("3", Some(NOON));
    assert_eq!(position(&bench.ledger().outbox("all").unwrap(), 0), Some(4));
}

#[test]
fn a_sink_that_is_removed_or_changed_with_events_waiting_is_refused() {
    let mut bench = Bench::new();
    bench.commit_line("a", Some(NOON));
    bench.close();
    let refused = Ledger::open(bench.options(&["other"])).err().unwrap();
    assert!(matches!(&refused, OpenError::Orphaned { sink, pending: 1 } if sink == "all"), "{refused}");
    let mut changed = bench.options(&["all"]);
    changed.subscriptions[0].kind = "syslog";
    assert!(matches!(Ledger::open(changed).err().unwrap(), OpenError::KindChanged { .. }));
    assert_eq!(Ledger::forget_sink(bench.dir.path(), "all").unwrap(), Some(1));
    assert_eq!(Ledger::forget_sink(bench.dir.path(), "all").unwrap(), None);
    bench.open = Some(Ledger::open(bench.options(&["other"])).unwrap());
    assert_eq!(bench.ledger().resume("other").unwrap().position, Position { batch: 2, line: 0 });
}

#[test]
fn two_daemons_do_not_share_a_directory() {
    let bench = Bench::new();
    assert!(matches!(Ledger::open(bench.options(&["all"])).err().unwrap(), OpenError::InUse(_)));
}
