//! Cost of the SQLite sink: CPU time and bytes an event, and the time of the documented queries, at
//! one or several sizes of the database.
//!
//! `cargo bench --bench sqlite [-- EVENTS...]`; 200000 events by default. Each number is a size to
//! which the database grows, in ascending order, such as `1000000 20000000`. The events are those
//! of `auditgate send --generate`, a hundred a second until now, pushed through the sink's own
//! interface and flushed as the daemon does it. CPU time is that of the sink's thread alone. The
//! queries are those of `docs/queries.md`, for a trace and a principal of the last hundred events,
//! each on a new connection: CPU time, the median of five.
//!
//! `--format cef|json|cps` chooses the format (default cef); `--dir DIR` keeps the database.

#![expect(clippy::unwrap_used, reason = "a bench stops at the first surprise")]

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use auditgate::clock::Clock;
use auditgate::deliver::sink::{Item, Sink as _};
use auditgate::deliver::sqlite::{SqliteOptions, SqliteSink};
use auditgate::ledger::{Position, Resume};
use auditgate::send::sample::Samples;
use auditgate::wire::event::{Event, Format, Verdict};
use auditgate::wire::{cef, json, signature};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use rustix::time::{ClockId, clock_gettime};

/// Milliseconds from one event to the next.
const INTERVAL: i64 = 10;

/// Number of events between two lines of progress on the cost.
const SECTION: usize = 1_000_000;

fn main() {
    let (mut sizes, mut format, mut kept) = (Vec::new(), Format::Cef, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--format" => {
                let name = arguments.next().unwrap();
                format = Format::ALL.into_iter().find(|format| format.as_str() == name).unwrap();
            }
            "--dir" => kept = arguments.next().map(PathBuf::from),
            other => sizes.extend(other.parse::<usize>()),
        }
    }
    if sizes.is_empty() {
        sizes.push(200_000);
    }
    let temporary = tempfile::tempdir().unwrap();
    let path = kept.as_deref().unwrap_or(temporary.path()).join("events.db");
    let mut bench = Bench::new(&path, format, sizes[sizes.len() - 1]);
    for size in sizes {
        bench.grow(size);
        println!(
            "{size} events of {} bytes: {:.0} bytes an event in the database",
            bench.line_bytes / bench.events.max(1),
            file_bytes(&path) as f64 / bench.events as f64
        );
        for (number, query) in queries(&bench.last).iter().enumerate() {
            let (rows, time) = timed(&path, query);
            println!("  query {}: {:9.2} ms, {rows} rows", number + 1, time.as_secs_f64() * 1e3);
        }
    }
}

struct Bench {
    sink: SqliteSink,
    format: Format,
    samples: Box<dyn Iterator<Item = Event>>,
    rng: StdRng,
    events: usize,
    line_bytes: usize,
    /// An event with a principal and a trace.
    last: Event,
}

impl Bench {
    fn new(path: &Path, format: Format, events: usize) -> Self {
        let start = (Clock::system().wall)() - i64::try_from(events).unwrap() * INTERVAL;
        let requests = Cell::new(0);
        let samples = Samples::new(StdRng::seed_from_u64(7), move || {
            // A request makes 2.9 events.
            requests.set(requests.get() + 1);
            start + requests.get() * INTERVAL * 29 / 10
        });
        let options = SqliteOptions { path: path.to_owned(), retain: None };
        let mut sink = SqliteSink::new(options, [7; 16], Clock::system());
        sink.resume(&Resume { position: Position { batch: 1, line: 0 }, mark: Vec::new() }).unwrap();
        Self {
            sink,
            format,
            samples: Box::new(samples),
            rng: StdRng::seed_from_u64(8),
            events: 0,
            line_bytes: 0,
            last: Event::new(),
        }
    }

    /// Delivers events until there are so many.
    fn grow(&mut self, size: usize) {
        let (mut section, mut cpu) = (self.events, Duration::ZERO);
        while self.events < size {
            let lines = self.lines(size);
            let before = thread_time();
            for (received_at, line) in &lines {
                self.events += 1;
                let behind = self.behind();
                let verdict = &Verdict::Verified { key: 0 };
                self.sink.push(&Item {
                    behind,
                    received_at: *received_at,
                    source: "konnect-us",
                    verdict,
                    key_id: Some("key-1"),
                    raw: line,
                });
            }
            self.sink.flush(self.behind(), true).unwrap();
            cpu += thread_time() - before;
            if self.events - section >= SECTION || self.events >= size {
                let micros = cpu.as_secs_f64() * 1e6 / (self.events - section) as f64;
                println!("  to {:9} events: {micros:6.2} µs CPU an event", self.events);
                (section, cpu) = (self.events, Duration::ZERO);
            }
        }
    }

    /// Returns the position behind the last event: each is a batch of its own.
    fn behind(&self) -> Position {
        Position { batch: i64::try_from(self.events).unwrap() + 1, line: 0 }
    }

    /// Makes as many lines as the worker collects for one flush.
    fn lines(&mut self, size: usize) -> Vec<(i64, Vec<u8>)> {
        let (mut lines, mut bytes) = (Vec::new(), 0);
        let mut received_at = 0;
        while bytes < self.sink.chunk() && self.events + lines.len() < size {
            let event = self.samples.next().unwrap();
            // Batches of a hundred.
            if lines.len() % 100 == 0 {
                received_at = event.text("rt").unwrap().parse::<i64>().unwrap() + 700;
            }
            let line = line(self.format, &event, &mut self.rng);
            bytes += line.len() + 150;
            self.line_bytes += line.len();
            lines.push((received_at, line));
            self.last = event;
        }
        lines
    }
}

/// Writes a line with a signature that only looks like one.
fn line(format: Format, event: &Event, rng: &mut StdRng) -> Vec<u8> {
    let mut line = match format {
        Format::Cef => cef::write(event).unwrap(),
        Format::Json => json::write(event),
        Format::Cps => json::write_wrapped(event),
    };
    let mut made = [0; 64];
    rng.fill(&mut made);
    signature::insert(format, &mut line, &made);
    line
}

/// Returns the SQL of the commands in the document, for a trace and a principal that there are.
fn queries(event: &Event) -> Vec<String> {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/queries.md")).unwrap();
    let command = "```sh\nsqlite3 -readonly -box /var/lib/auditgate/events.db \"";
    let queries = text.split(command).skip(1).map(|rest| rest.split_once("\"\n```").unwrap().0);
    queries
        .map(|query| {
            query
                .replace("3895213347334635099", &event.text("trace_id").unwrap())
                .replace("87655c36-8d63-48fe-9a1e-53b28dfbc19b", &event.text("principal_id").unwrap())
        })
        .collect()
}

fn timed(path: &Path, query: &str) -> (usize, Duration) {
    let mut times = [Duration::ZERO; 5];
    let mut rows = 0;
    for time in &mut times {
        let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
        let reader = rusqlite::Connection::open_with_flags(path, flags).unwrap();
        let start = thread_time();
        let mut statement = reader.prepare(query).unwrap();
        rows = statement.query_map([], |_| Ok(())).unwrap().count();
        *time = thread_time() - start;
    }
    times.sort();
    (rows, times[2])
}

fn file_bytes(path: &Path) -> u64 {
    path.metadata().unwrap().len()
}

fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.try_into().unwrap(), time.tv_nsec.try_into().unwrap())
}
