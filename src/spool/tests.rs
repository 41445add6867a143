use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::time::Instant;

use tokio::runtime::Runtime;

use super::input::{InputLine, Origin};
use super::sender::Unwatched;
use super::*;
use crate::send::receiver::{Answer, Receiver};
use crate::send::{BatchLimits, SigningKey};
use crate::wire::line::Line;

/// An input of numbered lines, some of them bad. Its checkpoint is the number of the next line.
struct Numbered {
    next: u64,
    end: u64,
    line: fn(u64) -> String,
    read: Arc<AtomicUsize>,
}

impl Input for Numbered {
    fn resume(&mut self, checkpoint: Option<&[u8]>) -> io::Result<()> {
        self.next = checkpoint.map_or(1, |state| String::from_utf8_lossy(state).parse().unwrap());
        Ok(())
    }

    fn read(&mut self, _timeout: Duration) -> io::Result<Chunk> {
        let numbers = self.next..(self.next + 10).min(self.end);
        self.next = numbers.end;
        self.read.fetch_add(1, Ordering::SeqCst);
        let lines = numbers.map(|number| InputLine {
            origin: Origin { file: "app.log".into(), line: number },
            bytes: (self.line)(number).into_bytes(),
            is_truncated: false,
        });
        Ok(Chunk { lines: lines.collect(), checkpoint: Some(self.next.to_string().into_bytes()) })
    }

    fn is_at_end(&self) -> bool {
        self.next == self.end
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn open(runtime: &Runtime, dir: &Path, receiver: &Receiver, size: u64) -> Spool {
    let _inside = runtime.enter();
    let key = SigningKey::from_seed(&[7; 32]);
    let limits = BatchLimits { events: 7, bytes: 1 << 20, linger: Duration::ZERO };
    let options = SpoolOptions {
        data_dir: dir.join("spool"),
        size,
        inputs: vec!["app".to_owned()],
        target: Target::new(crate::send::Sender::builder(receiver.endpoint()).batch(limits), None).unwrap(),
        key: Arc::new(Some(Arc::new(key)).into()),
        clock: Clock::system(),
    };
    Spool::open(options, &|| Box::new(Unwatched), Arc::new(|_, _| {})).unwrap()
}

fn line(number: u64) -> String {
    format!(r#"{{"name":"Ingress","n":{number}}}"#)
}

fn input(end: u64, line: fn(u64) -> String) -> (Box<Numbered>, Arc<AtomicUsize>) {
    let read = Arc::<AtomicUsize>::default();
    (Box::new(Numbered { next: 0, end, line, read: Arc::clone(&read) }), read)
}

fn until(condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "it takes too long");
        std::thread::yield_now();
    }
}

/// Numbers of the posted lines, which must be signed and completed.
fn posted(receiver: &Receiver) -> Vec<u64> {
    let requests = receiver.requests();
    let lines = requests.iter().flat_map(crate::send::receiver::Request::lines);
    lines
        .map(|text| {
            let parsed = Line::parse(text.as_bytes()).unwrap();
            assert!(parsed.signed().is_some() && parsed.time().is_some(), "{text}");
            assert!(parsed.text("trace_id").is_some(), "{text}");
            parsed.text("n").unwrap().parse().unwrap()
        })
        .collect()
}

#[test]
fn an_input_is_read_once_across_restarts_and_its_lines_are_delivered_in_order() {
    let (runtime, dir) = (runtime(), tempfile::tempdir().unwrap());
    let receiver = Receiver::start([Answer::receipt(7, 0, 0)]);
    for end in [35, 36, 36, 90] {
        let mut spool = open(&runtime, dir.path(), &receiver, 1 << 20);
        spool.read("app", input(end, line).0, Treatment::Events(None)).unwrap();
        until(|| spool.is_at_end());
        assert_eq!(spool.close(None).unwrap(), Pending::default());
    }
    assert_eq!(posted(&receiver), (1..90).collect::<Vec<_>>());
}

#[test]
fn what_the_receiver_does_not_take_waits_for_the_next_start() {
    let (runtime, dir) = (runtime(), tempfile::tempdir().unwrap());
    let away = Receiver::start([Answer::HangUp]);
    let mut spool = open(&runtime, dir.path(), &away, 1 << 20);
    spool.read("app", input(50, line).0, Treatment::Events(None)).unwrap();
    until(|| spool.is_at_end());
    assert_eq!(spool.close(Some(Duration::ZERO)).unwrap().events, 49);

    let receiver = Receiver::start([Answer::receipt(7, 0, 0)]);
    let spool = open(&runtime, dir.path(), &receiver, 1 << 20);
    assert_eq!(spool.close(None).unwrap(), Pending::default());
    assert_eq!(posted(&receiver), (1..50).collect::<Vec<_>>());
}

#[test]
fn a_full_spool_holds_the_input() {
    let (runtime, dir) = (runtime(), tempfile::tempdir().unwrap());
    let away = Receiver::start([Answer::HangUp]);
    let mut spool = open(&runtime, dir.path(), &away, 4096);
    let (numbered, read) = input(100_000, line);
    spool.read("app", numbered, Treatment::Events(None)).unwrap();
    let status = spool.status();
    until(|| status.read().held_inputs == 1);
    let (reads, backlog) = (read.load(Ordering::SeqCst), spool.ledger().backlog().bytes);
    assert!(reads < 200 && (4096..8192).contains(&backlog), "{reads} {backlog}");
    spool.close(Some(Duration::ZERO)).unwrap();
    assert_eq!(read.load(Ordering::SeqCst), reads);
}

#[test]
fn lines_that_cannot_be_sent_are_set_aside_with_file_and_line() {
    let (runtime, dir) = (runtime(), tempfile::tempdir().unwrap());
    let receiver = Receiver::start([Answer::receipt(7, 0, 0)]);
    let mut spool = open(&runtime, dir.path(), &receiver, 1 << 20);
    let with_bad = |number| if number % 10 == 3 { "not an event".to_owned() } else { line(number) };
    spool.read("app", input(21, with_bad).0, Treatment::Events(None)).unwrap();
    until(|| spool.is_at_end());
    assert_eq!(spool.close(None).unwrap(), Pending::default());
    let good: Vec<u64> = (1..21).filter(|number| number % 10 != 3).collect();
    assert_eq!(posted(&receiver), good);
    let rejects = std::fs::read_to_string(dir.path().join("spool/rejects.jsonl")).unwrap();
    let rejects: Vec<&str> = rejects.lines().collect();
    assert_eq!(rejects.len(), 2, "{rejects:?}");
    assert!(
        rejects[0].contains("app.log, line 3: ") && rejects[1].contains("app.log, line 13: "),
        "{rejects:?}"
    );
    assert!(rejects[0].contains(r#""raw":"not an event""#), "{rejects:?}");
}

#[test]
fn relayed_lines_stay_as_they_are_and_must_be_signed() {
    let (runtime, dir) = (runtime(), tempfile::tempdir().unwrap());
    let receiver = Receiver::start([Answer::receipt(1, 0, 0)]);
    let mut spool = open(&runtime, dir.path(), &receiver, 1 << 20);
    let lines = |number| match number {
        1 => r#"{"a": 1,"sig":"abc"}"#.to_owned(),
        _ => line(number),
    };
    spool.read("app", input(3, lines).0, Treatment::Relay).unwrap();
    until(|| spool.is_at_end());
    spool.close(None).unwrap();
    let sent: Vec<_> = receiver.requests().iter().flat_map(crate::send::receiver::Request::lines).collect();
    assert_eq!(sent, [r#"{"a": 1,"sig":"abc"}"#]);
    let rejects = std::fs::read_to_string(dir.path().join("spool/rejects.jsonl")).unwrap();
    assert!(rejects.contains(r#""reason":"unsigned""#), "{rejects}");
}
