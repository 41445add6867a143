//! Sinks with `when_full = "skip"`: which events they lose and keep, and which the others keep.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "the numbers of these tests are small and positive"
)]

use std::cell::Cell;

use super::*;

const LIMIT: u64 = 64_000;

/// Size of a batch's body, in bytes.
const SIZE: usize = 1000;

/// A ledger in which 64 batches fill the backlog and 16 the quarantine's share of it.
struct Full {
    fixture: Fixture,
    posted: Cell<i64>,
}

fn sink(name: &str, skips: bool, streams: &[Stream]) -> Subscription {
    Subscription { skips, ..file_sink(name, streams, None) }
}

fn siem() -> Subscription {
    sink("siem", true, &Stream::ALL)
}

impl Full {
    fn new(sinks: &[Subscription]) -> Self {
        let mut full = Self { fixture: Fixture::new(), posted: Cell::new(0) };
        full.reopen(sinks, LIMIT);
        full
    }

    /// Restarts with these sinks.
    fn reopen(&mut self, sinks: &[Subscription], limit: u64) {
        let mut options = self.fixture.options(&[]);
        options.subscriptions = sinks.to_vec();
        options.backlog = Backlog { bytes: limit, quarantine_bytes: limit / 4 };
        self.fixture.change(options);
    }

    fn ledger(&self) -> &Ledger {
        self.fixture.ledger()
    }

    /// Commits a batch with that many lines of each stream.
    fn post(&self, source: &str, lines: [usize; 3]) {
        self.try_post(source, lines, SIZE).unwrap();
    }

    fn try_post(&self, source: &str, lines: [usize; 3], size: usize) -> Result<Committed, CommitError> {
        let number = self.posted.get() + 1;
        self.posted.set(number);
        let verdicts = [
            Verdict::Verified { key: 0 },
            Verdict::Unverified,
            Verdict::Rejected { reason: Reason::Unsigned, detail: "".into() },
        ];
        let fixture = &self.fixture;
        let entries = verdicts.iter().zip(lines).flat_map(|(verdict, lines)| {
            (0..lines).map(move |line| Entry {
                verdict: verdict.clone(),
                ..fixture.entry(source, &format!("{number} {verdict:?} {line}"), None)
            })
        });
        let mut batch = Fixture::batch(source, entries.collect());
        batch.body = Arc::new(vec![b'x'; size]);
        batch.received_at = NOON + number;
        self.ledger().send_commit(batch).blocking_recv().unwrap()
    }

    fn posts(&self, batches: usize) {
        for _ in 0..batches {
            self.post("us", [3, 0, 0]);
        }
    }

    /// Returns the positions of the stored batches.
    fn left(&self) -> Vec<i64> {
        let connection = schema::open_reader(&self.ledger().shared.database).unwrap();
        let mut find = connection.prepare("SELECT position FROM batch ORDER BY position").unwrap();
        let found = find.query_map([], |row| row.get(0)).unwrap();
        found.collect::<rusqlite::Result<_>>().unwrap()
    }

    /// Returns the number of events that a sink has lost since the last call.
    fn lost(&self, sink: &str) -> u64 {
        self.ledger().take_skipped().get(sink).map_or(0, |skipped| skipped.events)
    }

    fn wait_until(&self, what: &str, condition: impl Fn() -> bool) {
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        while !condition() {
            assert!(std::time::Instant::now() < deadline, "timed out waiting until {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn the_oldest_batches_are_evicted_and_counted() {
    let full = Full::new(&[siem()]);
    let mut lost = 0;
    for posted in 1..=500 {
        full.posts(1);
        assert!(full.ledger().backlog().bytes < LIMIT);
        let left = full.left();
        // After the batches in flight none is missing in between, and many are left.
        let (in_flight, others) = left.split_at(left.len().min(3));
        assert_eq!(in_flight, &[1, 2, 3][..in_flight.len()]);
        assert!(others.windows(2).all(|pair| pair[0] + 1 == pair[1]) && left.last() == Some(&posted));
        assert!(left.len() as i64 >= posted.min(52), "{}", left.len());
        let skipped = full.ledger().take_skipped();
        if let Some(skipped) = skipped.get("siem") {
            assert_eq!(skipped.oldest, NOON + 4 + lost as i64 / 3);
            lost += skipped.events;
            assert_eq!(skipped.newest, NOON + 3 + lost as i64 / 3);
        }
        assert_eq!(lost, 3 * (posted as u64 - left.len() as u64));
        let pending = Pending { events: 3 * left.len() as u64, oldest: Some(NOON + left[0]) };
        assert_eq!(full.ledger().pending("siem").unwrap(), pending);
        let bytes: u64 = left.len() as u64 * (SIZE as u64 + 6);
        assert_eq!(full.ledger().backlog().bytes, bytes);
    }
    assert!(lost > 1000);
    // An evicted batch is not in memory either.
    full.ledger().advance_now("siem", Position { batch: 4, line: 0 }, Vec::new()).unwrap();
    assert_eq!(take(&mut full.fixture.outbox(), 4), Some(full.left()[0]));
}

#[test]
fn a_sink_with_hold_keeps_its_events() {
    let mut full = Full::new(&[siem(), sink("file", false, &[Stream::Verified])]);
    full.posts(100);
    assert_eq!(full.left().len(), 100);
    assert!(full.ledger().backlog().bytes > LIMIT);
    assert_eq!(full.lost("siem"), 0);
    // It does not keep batches without events for it.
    full.post("us", [0, 1, 0]);
    assert_eq!(full.left().len(), 100);
    assert_eq!(full.lost("siem"), 1);
    for restart in [false, true] {
        if restart {
            full.reopen(&[siem(), sink("file", false, &[Stream::Verified])], LIMIT);
        }
        full.ledger().advance_now("file", Position { batch: 31, line: 0 }, Vec::new()).unwrap();
        full.wait_until("batches that the other sink has are evicted", || full.left()[..2] == [1, 31]);
    }
    full.ledger().advance_now("file", Position { batch: 102, line: 0 }, Vec::new()).unwrap();
    // Eviction needs no further commit.
    full.wait_until("there is space", || full.ledger().backlog().bytes < LIMIT * 15 / 16);
    let left = full.left();
    // The first waiting batch may be in flight.
    assert_eq!((left[0], left[1]), (1, 102 - left.len() as i64), "{left:?}");
    assert!(left.len() > 50 && left.last() == Some(&100), "{left:?}");
    assert_eq!(full.ledger().pending("siem").unwrap().events, 3 * left.len() as u64);
}

#[test]
fn a_sink_that_is_changed_to_skip_evicts_at_the_start() {
    let mut full = Full::new(&[sink("siem", false, &Stream::ALL)]);
    full.posts(80);
    assert_eq!(full.left().len(), 80);
    full.reopen(&[siem()], LIMIT);
    full.wait_until("there is space", || full.ledger().backlog().bytes < LIMIT * 15 / 16);
    // Batches that may have been in flight stay.
    let left = full.left();
    assert_eq!(left[..3], [1, 2, 3]);
    assert!(left[4] > 10 && left.last() == Some(&80), "{left:?}");
    assert_eq!(full.lost("siem"), 3 * (80 - left.len() as u64));
}

#[test]
fn batches_in_flight_are_not_evicted_even_after_a_restart() {
    // The only sink may have three of these batches in flight: a quarter of the quarantine's share.
    let mut full = Full::new(&[siem()]);
    full.posts(10);
    {
        let mut outbox = full.fixture.outbox();
        assert_eq!([1, 2, 3, 4].map(|from| take(&mut outbox, from)), [Some(1), Some(2), Some(3), None]);
        // One batch is delivered, and one in part.
        let position = Position { batch: 2, line: 1 };
        full.ledger().advance_now("siem", position, b"mark".to_vec()).unwrap();
        assert_eq!(take(&mut outbox, 4), Some(4));
        full.posts(200);
        assert_eq!(full.left()[..3], [2, 3, 4]);
        // A restarted worker finds them.
        let mut outbox = full.fixture.outbox();
        assert_eq!([2, 3, 4].map(|from| take(&mut outbox, from)), [Some(2), Some(3), Some(4)]);
        let left = full.left();
        assert!(left[3] > 100);
        assert_eq!(full.lost("siem"), 3 * (210 - 1 - left.len() as u64));
        assert_eq!(full.ledger().pending("siem").unwrap().events, 3 * left.len() as u64);
        assert_eq!(full.ledger().pending("siem").unwrap().oldest, Some(NOON + 2));
    }
    for _ in 0..2 {
        full.reopen(&[siem()], LIMIT);
        full.posts(200);
        assert_eq!(full.left()[..3], [2, 3, 4]);
        assert!(full.ledger().backlog().bytes < LIMIT);
        assert_eq!(full.ledger().pending("siem").unwrap().events, 3 * full.left().len() as u64);
    }
    let mut outbox = full.fixture.outbox();
    assert_eq!([2, 3, 4].map(|from| take(&mut outbox, from)), [Some(2), Some(3), Some(4)]);
    // The sink gets more once the batches in flight are delivered.
    assert_eq!(take(&mut outbox, 5), None);
    full.ledger().advance_now("siem", Position { batch: 5, line: 0 }, Vec::new()).unwrap();
    assert_eq!(take(&mut outbox, 5), Some(full.left()[0]));
    assert!(full.left()[0] > 500);
}

#[test]
fn only_events_for_the_sink_count_as_lost() {
    let eu = Subscription { sources: Some(vec!["eu".to_owned()]), ..sink("eu", true, &[Stream::Verified]) };
    let full =
        Full::new(&[sink("good", true, &[Stream::Verified]), sink("bad", true, &[Stream::Quarantine]), eu]);
    for round in 0..100 {
        full.post(if round % 2 == 0 { "us" } else { "eu" }, [3, 2, 0]);
    }
    let lost =
        |counts: &BTreeMap<String, Skipped>, sink: &str| counts.get(sink).map_or(0, |lost| lost.events);
    let counts = full.ledger().take_skipped();
    let left = full.left();
    let gone = 100 - left.len() as u64;
    // The first batch of each sink may be in flight.
    assert!(gone > 30 && left[..3] == [1, 2, gone as i64 + 3]);
    assert_eq!(lost(&counts, "good"), 3 * gone);
    assert_eq!(lost(&counts, "eu"), 3 * (gone / 2));
    assert_eq!(lost(&counts, "bad"), 0);
    assert_eq!(full.ledger().pending("good").unwrap().events, 3 * left.len() as u64);
    assert_eq!(full.ledger().pending("eu").unwrap().events, 3 * (50 - gone / 2));
    assert_eq!(full.ledger().pending("bad").unwrap(), Pending::default());
}

#[test]
fn a_full_quarantine_evicts_no_verified_event() {
    let full = Full::new(&[siem()]);
    let mut verified = Vec::new();
    for round in 1..=90 {
        if round % 3 == 0 {
            full.post("us", [2, 0, 0]);
            verified.push(round);
        } else {
            full.post("us", [0, 0, 5]);
        }
        assert!(full.ledger().backlog().quarantine_bytes < LIMIT / 4);
    }
    let left = full.left();
    assert!(verified.iter().all(|batch| left.contains(batch)), "{left:?}");
    let rejected = left.len() - verified.len();
    assert!((12..16).contains(&rejected), "{rejected}");
    assert_eq!(full.lost("siem"), 5 * (60 - rejected as u64));
}

#[test]
fn a_failed_transaction_evicts_nothing() {
    let full = Full::new(&[siem()]);
    let mut committed = 0;
    let other = rusqlite::Connection::open(&full.ledger().shared.database).unwrap();
    other
        .execute_batch("CREATE TRIGGER broken BEFORE DELETE ON batch BEGIN SELECT RAISE(ABORT, 'no'); END")
        .unwrap();
    while full.try_post("us", [3, 0, 0], SIZE).is_ok() {
        committed += 1;
    }
    assert!(full.ledger().is_unwritable());
    assert_eq!(full.left(), Vec::from_iter(1..=committed));
    assert_eq!(full.lost("siem"), 0);
    assert_eq!(full.ledger().pending("siem").unwrap().events, 3 * committed as u64);
    let mut outbox = full.fixture.outbox();
    assert_eq!([1, 2].map(|from| take(&mut outbox, from)), [Some(1), Some(2)]);
    other.execute_batch("DROP TRIGGER broken").unwrap();
    full.wait_until("the ledger can be written", || !full.ledger().is_unwritable());
    full.posts(30);
    // Batches that were taken meanwhile stay.
    let left = full.left();
    assert!(left[..3] == [1, 2, 3] && left[3] > 4, "{left:?}");
    assert_eq!(full.lost("siem"), 3 * (committed as u64 + 30 - left.len() as u64));
}

#[test]
fn the_first_batch_stays_and_a_larger_one_is_evicted() {
    let full = Full::new(&[siem()]);
    full.posts(1);
    full.try_post("us", [3, 0, 0], LIMIT as usize * 2).unwrap();
    assert_eq!(full.left(), [1]);
    assert_eq!(full.lost("siem"), 3);
    full.ledger().advance_now("siem", Position { batch: 2, line: 0 }, Vec::new()).unwrap();
    assert_eq!(full.ledger().backlog(), Backlog::default());
    assert_eq!(full.ledger().pending("siem").unwrap(), Pending::default());
    // A waiting sink does not poll, and gets the next batch.
    let mut outbox = full.fixture.outbox();
    let start = std::time::Instant::now();
    assert!(matches!(outbox.next(1, Duration::from_millis(50)).unwrap(), Next::Nothing));
    assert!(start.elapsed() >= Duration::from_millis(50));
    full.posts(1);
    assert_eq!(take(&mut outbox, 1), Some(3));
}

#[test]
fn a_full_quarantine_hides_no_older_events_from_eviction() {
    let full = Full::new(&[siem()]);
    full.posts(30);
    // The eviction of quarantined batches passes over them.
    for _ in 0..40 {
        full.post("us", [0, 0, 5]);
    }
    full.posts(40);
    assert!(full.ledger().backlog().bytes < LIMIT);
    // The first three may be in flight.
    assert!(full.left()[3] > 10, "{:?}", full.left());
}
