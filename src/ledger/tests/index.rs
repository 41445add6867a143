//! The dedup index compared with a simple model, its order on disk, and its migration.

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;

use proptest::prelude::*;

use super::*;
use crate::ledger::identity::Kind;
use crate::ledger::seen::Seen;

const DAY: i64 = 24 * HOUR;

/// The window of events in seconds, and that of rejected lines.
const WINDOWS: [i64; 2] = [2 * 86_400, 86_400];

/// An index in memory, and what it should remember.
struct Compared {
    connection: rusqlite::Connection,
    seen: Seen,
    times: Times,
    /// When each line was last accepted, in seconds.
    model: HashMap<(usize, u16), Accepted>,
    jumped_at: Option<i64>,
}

#[derive(Clone, Copy)]
struct Accepted {
    at: i64,
    /// It had expired at some time, and may have been forgotten then.
    may_be_gone: bool,
}

#[derive(Clone, Debug)]
enum Step {
    /// A transaction: lines of batches, each with the index of its source. It is rolled back, or not.
    Transaction(Vec<(usize, Vec<u16>)>, bool),
    /// Hours go by.
    Advance(i64),
    /// The clock jumps by hours.
    Jump(i64),
    Expire,
    Restart,
}

const SOURCES: [&str; 2] = ["eu", "us"];

fn windows() -> BTreeMap<String, Window> {
    let [events, rejects] = WINDOWS.map(|seconds| Duration::from_secs(seconds.unsigned_abs()));
    SOURCES.map(|source| (source.to_owned(), Window { events, rejects })).into()
}

/// Returns the identity of a numbered line: of each kind some, with equal and different times.
fn identity(source: usize, line: u16) -> Identity {
    let (identifier, source) = (Identifier::new([1; 32]), SOURCES[source]);
    let number = i64::from(line / 8);
    let content = line.to_le_bytes();
    let time = match line % 8 {
        0 => Some(NOON + number),
        1 => Some(NOON),
        // Around the days that are in reach, by and by, and out of reach.
        2 => Some(NOON + (number % 40 - 20) * DAY + number),
        // At midnight.
        3 => Some(NOON / DAY * DAY + (number % 6 - 3) * DAY),
        4 => Some(i64::MAX - number),
        5 => None,
        6 => return identifier.trace(source, "org", &line.to_string()),
        _ => return identifier.reject(source, &content),
    };
    identifier.event(source, true, (&content, b""), time)
}

impl Compared {
    fn new() -> Self {
        let mut connection = rusqlite::Connection::open_in_memory().unwrap();
        schema::migrate(&mut connection, 0).unwrap();
        let times = Times::new(NOON);
        let seen = Seen::new(&connection, windows(), times.clock()).unwrap();
        Self { connection, seen, times, model: HashMap::new(), jumped_at: None }
    }

    /// Returns the second before which acceptances of a line do not count.
    fn expired(&self, identity: &Identity, now: i64) -> i64 {
        let window = WINDOWS[usize::from(identity.kind == Kind::Reject)];
        if self.jumped_at.is_some_and(|jumped_at| now < jumped_at + window) { i64::MIN } else { now - window }
    }

    fn now(&self) -> i64 {
        self.times.wall.load(Ordering::SeqCst) / 1000
    }

    fn note_expired(&mut self) {
        let now = self.now();
        let mut model = std::mem::take(&mut self.model);
        for ((source, line), accepted) in &mut model {
            accepted.may_be_gone |= accepted.at < self.expired(&identity(*source, *line), now);
        }
        self.model = model;
    }

    fn run(&mut self, step: &Step) {
        match step {
            Step::Transaction(batches, is_kept) => self.transact(batches, *is_kept),
            Step::Advance(hours) => self.times.advance(hours * HOUR),
            Step::Jump(hours) => {
                self.times.wall.fetch_add(hours * HOUR, Ordering::SeqCst);
                self.jumped_at = Some(self.now());
                // Seen in its time, and not with the next advance.
                self.seen.check_clock(&self.connection).unwrap();
            }
            Step::Expire => while self.seen.expire_some(&self.connection).unwrap() {},
            Step::Restart => {
                self.seen = Seen::new(&self.connection, windows(), self.times.clock()).unwrap();
            }
        }
        self.note_expired();
    }

    fn transact(&mut self, batches: &[(usize, Vec<u16>)], is_kept: bool) {
        let prepared: Vec<Lines> = batches.iter().map(|(source, lines)| prepare(*source, lines)).collect();
        let input: Vec<_> =
            batches.iter().zip(&prepared).map(|((source, _), lines)| (SOURCES[*source], lines)).collect();
        self.connection.execute_batch("BEGIN").unwrap();
        let now = self.seen.check_clock(&self.connection).unwrap();
        let progress = AtomicU64::new(0);
        let found = self.seen.insert_all(&self.connection, &input, now, &progress).unwrap();
        assert!(progress.into_inner() > 0 || batches.iter().all(|(_, lines)| lines.is_empty()));
        let before = self.model.clone();
        for ((source, lines), duplicates) in batches.iter().zip(found) {
            assert!(duplicates.is_empty() || duplicates.contains(&true));
            for (index, line) in lines.iter().enumerate() {
                let is_duplicate = duplicates.get(index) == Some(&true);
                let identity = identity(*source, *line);
                match self.model.get(&(*source, *line)) {
                    Some(last) if last.at >= self.expired(&identity, now) => {
                        assert!(is_duplicate || last.may_be_gone, "{line} is taken twice");
                    }
                    _ => assert!(!is_duplicate, "{line} is lost"),
                }
                if !is_duplicate {
                    self.model.insert((*source, *line), Accepted { at: now, may_be_gone: false });
                }
            }
        }
        if is_kept {
            self.connection.execute_batch("COMMIT").unwrap();
        } else {
            self.connection.execute_batch("ROLLBACK").unwrap();
            self.seen.forget_cached();
            self.model = before;
        }
    }
}

/// Returns a batch's lines, each with a verified verdict.
fn prepare(source: usize, lines: &[u16]) -> Lines {
    let entry = |line: &u16| {
        let verdict = Verdict::Verified { key: 0 };
        Some(Entry { verdict, class: None, identity: identity(source, *line) })
    };
    Lines::new(lines.iter().map(entry).collect())
}

/// Returns lines of a batch: neighbours in either order, or any, repeated ones included.
fn lines() -> impl Strategy<Value = Vec<u16>> {
    let lines = 0_u16..6000;
    prop_oneof![
        (lines.clone(), 1_u16..600, 1_u16..9)
            .prop_map(|(first, count, by)| (0..count).map(|number| first + number * by).collect()),
        (lines.clone(), 1_u16..600)
            .prop_map(|(first, count)| (0..count).rev().map(|number| first + number * 8).collect()),
        proptest::collection::vec(lines, 0..300),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let batches = proptest::collection::vec((0_usize..2, lines()), 1..5);
    prop_oneof![
        8 => (batches, proptest::bool::weighted(0.8))
            .prop_map(|(batches, is_kept)| Step::Transaction(batches, is_kept)),
        4 => (0_i64..30).prop_map(Step::Advance),
        1 => prop_oneof![-100_i64..-1, 1_i64..100].prop_map(Step::Jump),
        2 => Just(Step::Expire),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn exactly_what_was_accepted_within_the_window_is_a_duplicate(
        steps in proptest::collection::vec(step(), 1..40),
    ) {
        let mut compared = Compared::new();
        for step in &steps {
            compared.run(step);
            leaf::tests::all(&compared.connection);
        }
        // At last nothing is left.
        compared.times.advance(40 * DAY);
        compared.run(&Step::Expire);
        prop_assert_eq!(leaf::tests::all(&compared.connection), []);
    }
}

#[test]
fn many_events_of_one_moment_are_each_accepted_once() {
    let mut compared = Compared::new();
    for step in 0..20 {
        let lines: Vec<u16> = (0..400).map(|number| (step * 400 + number) * 8 + 1).collect();
        compared.transact(&[(0, lines.clone())], true);
        compared.transact(&[(0, lines)], true);
    }
    assert_eq!(leaf::tests::all(&compared.connection).len(), 8000);
}

#[test]
fn the_ids_of_partitions_stay_small() {
    let mut compared = Compared::new();
    let mut most = 0;
    for hour in 0_u16..1000 {
        compared.transact(&[(0, vec![hour * 8 + 5]), (1, vec![hour * 8 + 2])], true);
        compared.run(&Step::Advance(1));
        compared.run(&Step::Expire);
        let find = "SELECT max(id) FROM seen_partition";
        most = most.max(compared.connection.query_row(find, [], |row| row.get::<_, u32>(0)).unwrap());
    }
    assert!(most < 40, "{most}");
}

/// Inserts a row of the index as it was before version 4.
fn insert_old(database: &rusqlite::Connection, partition: u32, moment: u32, hash: [u8; 16], at: i64) {
    let mut key = [0; 24];
    key[..4].copy_from_slice(&partition.to_be_bytes());
    key[4..8].copy_from_slice(&moment.to_be_bytes());
    key[8..].copy_from_slice(&hash);
    database.execute("INSERT INTO seen VALUES (?1, ?2)", rusqlite::params![key, at]).unwrap();
}

#[test]
fn a_migration_keeps_what_was_seen() {
    const SEEN: i64 = NOON / 1000 - 8 * 86_400 + 60;
    let mut fixture = Fixture::new();
    fixture.close();
    for name in ["ledger.db", "lock"] {
        std::fs::remove_file(fixture.dir.path().join(name)).unwrap();
    }
    let database = rusqlite::Connection::open(fixture.dir.path().join("ledger.db")).unwrap();
    for sql in [schema::VERSION_1, schema::VERSION_2, schema::VERSION_3] {
        database.execute_batch(sql).unwrap();
    }
    let today = NOON / DAY;
    database
        .execute_batch(&format!(
            "INSERT INTO meta VALUES ('ledger_id', zeroblob(16)), ('identity_key', zeroblob(32));
             INSERT INTO seen_partition VALUES
                (3, 'us', 0, {today}, {last}, 691200), (4, 'us', 1, {SEEN}, {last}, 691200),
                (5, 'us', 2, {SEEN}, {last}, 691200), (900, 'us', 3, 0, {last}, 86400);
             PRAGMA user_version = 3; BEGIN",
            last = NOON / 1000 + 3600,
        ))
        .unwrap();
    // Events of today, some of them at midnight; events without a time or of a far day, some of them
    // at midnight; traces; rejected lines.
    let identifier = Identifier::new([0; 32]);
    let event = |line: i64, time| identifier.event("us", true, (&line.to_le_bytes(), b""), time);
    let times = |line: i64| {
        let moment = if line % 10 == 0 { 0 } else { line * 7 };
        match line % 3 {
            0 => Some(today * DAY + moment),
            1 => None,
            _ => Some((today - 1000) * DAY + moment),
        }
    };
    let mut entries = Vec::new();
    for line in 0..6000 {
        let time = times(line);
        let identity = event(line, time);
        let moment = time.map_or(0, |time| u32::try_from(time.rem_euclid(DAY)).unwrap());
        insert_old(&database, if line % 3 == 0 { 3 } else { 4 }, moment, identity.hash, SEEN);
        entries.push(Entry { verdict: Verdict::Verified { key: 0 }, class: None, identity });
        let identity = identifier.trace("us", "org", &line.to_string());
        insert_old(&database, 5, 0, identity.hash, SEEN);
        entries.push(Entry { verdict: Verdict::Verified { key: 0 }, class: None, identity });
    }
    for reject in 0..6000_u32 {
        let identity = identifier.reject("us", &reject.to_le_bytes());
        let group = u32::from_le_bytes(identity.hash[..4].try_into().unwrap()) % 8192;
        insert_old(&database, 900, group, identity.hash, NOON / 1000);
        let verdict = Verdict::Rejected { reason: Reason::Malformed, detail: "".into() };
        entries.push(Entry { verdict, class: None, identity });
    }
    database.execute_batch("COMMIT").unwrap();
    drop(database);
    fixture.reopen();
    assert_eq!(fixture.ledger().id(), [0; 16]);
    let lines = entries.len() as u64;
    assert_eq!(fixture.commit("us", entries.clone()).duplicates(), lines);
    let new = (6000..6030).map(|line| Entry { identity: event(line, times(line)), ..entries[0].clone() });
    assert_eq!(fixture.commit("us", new.collect()).accepted(), 30);
    // It expires when it would have.
    fixture.times.advance(59_000);
    assert_eq!(fixture.commit("us", entries[..12_000].to_vec()).duplicates(), 12_000);
    fixture.times.advance(2000);
    assert_eq!(fixture.commit("us", entries[..12_000].to_vec()).accepted(), 12_000);
    let connection = schema::open_reader(&fixture.ledger().shared.database).unwrap();
    // What is accepted again without a time of today belongs to a later generation.
    assert_eq!(leaf::tests::all(&connection).len(), 18_030 + 10_000);
}
