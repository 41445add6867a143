//! Cost of the ledger: the writer thread's CPU time for an event, and the space of the dedup index.
//!
//! `cargo bench --bench ledger [-- EVENTS [ORDER]]`. Fills an empty ledger with that many events, by
//! default 1,000,000, and commits more: new ones, the same again, new ones with their bodies, and
//! these again. An order is `ascending` (by default), `descending`, `random`, `same` (every event
//! has the same time), `undated` or `trace`.
//!
//! Four connections send batches of 500, each as soon as its last one is committed, so that batches
//! of neighbouring times arrive in no fixed order. A body takes 130 bytes an event, about as much as
//! signed events do that are compressed.

#![expect(clippy::unwrap_used, reason = "a bench stops at the first surprise")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use auditgate::clock::Clock;
use auditgate::ledger::{
    Backlog, Batch, Entry, Identity, Ledger, LedgerOptions, Lines, Position, Subscription, Window,
};
use auditgate::wire::batch::{Coding, Packing};
use auditgate::wire::event::{Stream, Verdict};
use rand::RngExt as _;

const EVENTS_A_BATCH: u64 = 500;
const BODY_BYTES_AN_EVENT: usize = 130;
const CONNECTIONS: usize = 4;

/// Time of the first event, in milliseconds since the Unix epoch, at the start of a day.
const START: i64 = 1_699_920_000_000;

/// Time between two events. 100 million of them take a little less than the window.
const STEP_MILLISECONDS: u64 = 5;

const WINDOW: Duration = Duration::from_secs(8 * 86_400);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let events: u64 = arguments.first().map_or(1_000_000, |events| events.parse().unwrap());
    let order = arguments.get(1).map_or("ascending", String::as_str);
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    println!("{events} events, {order}, {EVENTS_A_BATCH} a batch, {CONNECTIONS} connections");
    let more = (events / 10).clamp(100_000, 1_000_000);
    let mut bench = Bench::open(dir.path(), order, events + 2 * more);
    let empty = bench.bytes();
    bench.measure("fill", 0..events, false);
    bench = bench.reopen("with them");
    println!("on disk: {:.1} bytes an event", (bench.bytes() - empty) as f64 / events as f64);
    bench.measure("new", events..events + more, false);
    bench.measure("repeated", events..events + more, false);
    bench.measure("new, with bodies", events + more..events + 2 * more, true);
    bench.measure("repeated, with bodies", events + more..events + 2 * more, true);
    bench.ledger.close();
}

struct Bench {
    ledger: Ledger,
    writer: std::thread::JoinHandle<()>,
    dir: std::path::PathBuf,
    order: String,
    /// Number of all events.
    events: u64,
    wall: Arc<AtomicI64>,
}

impl Bench {
    fn open(dir: &Path, order: &str, events: u64) -> Self {
        let subscription = Subscription {
            sink: "file".to_owned(),
            kind: "file",
            streams: vec![Stream::Unverified],
            sources: None,
            skips: false,
        };
        let wall = Arc::new(AtomicI64::new(START));
        let shown = Arc::clone(&wall);
        let options = LedgerOptions {
            data_dir: dir.join("data"),
            subscriptions: vec![subscription],
            backlog: Backlog { bytes: 1 << 30, quarantine_bytes: 1 << 28 },
            windows: BTreeMap::from([("us".to_owned(), Window { events: WINDOW, rejects: WINDOW })]),
            clock: Clock {
                wall: Arc::new(move || shown.load(Ordering::Relaxed)),
                // As the wall clock does not jump.
                steady: {
                    let shown = Arc::clone(&wall);
                    Arc::new(move || Duration::from_millis(shown.load(Ordering::Relaxed).abs_diff(START)))
                },
            },
        };
        let start = Instant::now();
        let (ledger, running) = Ledger::open(options).unwrap();
        println!("opened in {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
        Self { ledger, writer: running.thread, dir: dir.to_owned(), order: order.to_owned(), events, wall }
    }

    /// Closes the ledger, which copies its log into the database, and opens it again.
    fn reopen(self, what: &str) -> Self {
        self.ledger.close();
        self.writer.join().unwrap();
        drop(self.ledger);
        print!("{what}: ");
        let wall = self.wall.load(Ordering::Relaxed);
        let bench = Self::open(&self.dir, &self.order, self.events);
        bench.wall.store(wall, Ordering::Relaxed);
        bench
    }

    fn bytes(&self) -> u64 {
        self.ledger.bytes()
    }

    /// Commits events. Their bodies wait for the sink until it has recorded them.
    fn measure(&self, what: &str, events: std::ops::Range<u64>, with_bodies: bool) {
        let next = AtomicU64::new(events.start / EVENTS_A_BATCH);
        let duplicates = AtomicU64::new(0);
        let kept = AtomicI64::new(0);
        let (before, start) = (writer_time(), Instant::now());
        std::thread::scope(|scope| {
            for _ in 0..CONNECTIONS {
                scope.spawn(|| {
                    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                    loop {
                        let batch = next.fetch_add(1, Ordering::Relaxed);
                        if batch >= events.end / EVENTS_A_BATCH {
                            break;
                        }
                        let committed = runtime.block_on(self.ledger.commit(self.batch(batch, with_bodies)));
                        let receipt = committed.unwrap().receipt;
                        duplicates.fetch_add(receipt.duplicates(), Ordering::Relaxed);
                        // A body without a new line is not kept. Only one phase has bodies with new ones.
                        if with_bodies
                            && receipt.accepted() > 0
                            && let kept = kept.fetch_add(1, Ordering::Relaxed)
                            && kept % 16 == 0
                        {
                            let behind = Position { batch: kept, line: 0 };
                            self.ledger.advance("file", behind, Vec::new());
                        }
                    }
                });
            }
        });
        let count = (events.end - events.start) as f64;
        println!(
            "{what}: {:.3} µs of the writer's CPU an event, {:.0} events/s, {} duplicates, {} of memory at most",
            (writer_time() - before).as_secs_f64() * 1e6 / count,
            count / start.elapsed().as_secs_f64(),
            duplicates.into_inner(),
            memory(),
        );
    }

    fn batch(&self, batch: u64, with_body: bool) -> Batch {
        let numbers = batch * EVENTS_A_BATCH..(batch + 1) * EVENTS_A_BATCH;
        // Its lines are sent as soon as they are there.
        let now = self.time(numbers.end);
        self.wall.fetch_max(now, Ordering::Relaxed);
        let entries: Vec<Option<Entry>> = numbers
            .map(|number| {
                let verdict = if with_body { Verdict::Unverified } else { Verdict::Verified { key: 0 } };
                Some(Entry { verdict, class: None, identity: self.identity(number) })
            })
            .collect();
        let mut body = vec![0; if with_body { BODY_BYTES_AN_EVENT * entries.len() } else { 0 }];
        rand::rng().fill(&mut body[..]);
        let body = Arc::new(body);
        Batch {
            source: "us".into(),
            received_at: now,
            body: Arc::clone(&body),
            packing: Packing::Lines(Coding::Gzip),
            decoded: body,
            key_ids: Arc::from(["k".to_owned()]),
            lines: Lines::new(entries),
            checkpoint: None,
        }
    }

    fn identity(&self, number: u64) -> Identity {
        let identifier = self.ledger.identifier();
        let line = number.to_le_bytes();
        let time = match self.order.as_str() {
            "ascending" => Some(self.time(number)),
            "descending" => Some(self.time(self.events - number)),
            // A permutation of the times within a window: the constant is odd.
            "random" => Some(self.time(number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % self.events)),
            "same" => Some(START),
            "trace" => return identifier.trace("us", "org", &number.to_string()),
            _ => None,
        };
        identifier.event("us", true, (&line, b""), time)
    }

    fn time(&self, number: u64) -> i64 {
        START + i64::try_from(number * STEP_MILLISECONDS).unwrap()
    }
}

/// CPU time of the writer's thread so far.
fn writer_time() -> Duration {
    let is_writer = |thread: &Path| {
        std::fs::read_to_string(thread.join("comm")).is_ok_and(|name| name.trim() == "ledger")
    };
    // A thread that was just started may not have its name yet.
    let writer = loop {
        let mut threads = std::fs::read_dir("/proc/self/task").unwrap().map(|thread| thread.unwrap().path());
        if let Some(writer) = threads.find(|thread| is_writer(thread)) {
            break writer;
        }
    };
    let text = std::fs::read_to_string(writer.join("schedstat")).unwrap();
    Duration::from_nanos(text.split_whitespace().next().unwrap().parse().unwrap())
}

/// Peak of the process's memory, as the kernel writes it.
fn memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().to_owned()
}
