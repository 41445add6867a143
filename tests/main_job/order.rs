//! The order of system calls: commit, sync, answer; then for each sink write, sync, record the
//! position, delete.

use std::collections::{BTreeMap, HashMap};
use std::io::Read as _;
use std::net::TcpListener;

use rusqlite::Connection;

use crate::harness::daemon::Daemon;
use crate::harness::machine;
use crate::harness::programs::auditgate;
use crate::harness::site::{Site, sink, sqlite_sink, syslog_sink};
use crate::harness::wait_until;

/// A relevant step in a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Request,
    /// With the recorded positions: the first batch that each sink does not have completely.
    LedgerWriteBegins(Vec<(String, i64)>),
    LedgerSynced,
    AnswerBegins,
    SinkWriteBegins(&'static str),
    SinkSynced(&'static str),
}

/// Sinks, and the file that each one writes to.
const SINKS: [(&str, &str); 3] = [("all", "/all.jsonl"), ("search", "/search.db-wal"), ("siem", "")];

#[test]
fn a_sync_precedes_every_acknowledgement_and_every_deletion() {
    assert_order("");
}

#[test]
fn a_position_moves_only_after_the_sync_of_an_interval() {
    assert_order("fsync = \"interval\"\nfsync_interval = \"100ms\"\n");
}

fn assert_order(fsync: &str) {
    const STRACE: machine::Need = (
        "strace is not installed, or may not trace its own children",
        &["strace", "-D", "-f", "-o", "/dev/null", "true"],
    );
    if !machine::are_there(&[STRACE]) {
        return;
    }
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let reader = std::thread::spawn(move || {
        let mut received = Vec::new();
        server.accept().unwrap().0.read_to_end(&mut received).map(|_| received)
    });
    // Without TLS, so that the trace shows requests and answers.
    let streams = "[\"verified\", \"quarantine\"]";
    let sinks = [
        sink("all", "json", streams) + fsync,
        sqlite_sink("search.db", streams),
        syslog_sink(&format!("tcp://{address}"), ""),
    ];
    let site = Site::new().plain().sinks(&sinks.concat());
    let trace = site.path("trace");
    let mut command = machine::command("strace");
    // -D: the child is the daemon and strace its grandchild. -xx -s: whole pages of the ledger, in
    // hexadecimal.
    command.args(["-D", "-f", "-yy", "-xx", "-s", "4200", "-o"]).arg(&trace);
    command.args([
        "-e",
        "trace=fdatasync,fsync,write,writev,pwrite64,pwritev,sendto,sendmsg,recvfrom,read,readv",
    ]);
    command.arg(auditgate().get_program()).arg("serve").arg("--config").arg(site.path("config.toml"));
    let daemon = Daemon::start_by(&site, command);
    const BATCHES: u64 = 6;
    for batch in 0..BATCHES {
        let events = site.producer.events(batch * 10..batch * 10 + 10);
        assert_eq!(daemon.deliver(&events).accepted, 10);
        daemon.settle();
    }
    let process = daemon.process();
    daemon.terminate();
    assert!(!reader.join().unwrap().unwrap().is_empty());
    let text = wait_until("the trace is complete", || {
        let text = String::from_utf8_lossy(&std::fs::read(&trace).unwrap()).into_owned();
        let end = format!("{process} +++ exited with 0 +++");
        // strace pads the number.
        let complete = text.lines().any(|line| line.split_whitespace().eq(end.split_whitespace()));
        if complete { Ok(text) } else { Err("no end yet".to_owned()) }
    });

    let steps = steps(&text, &address.to_string());
    let count = |wanted: &dyn Fn(&Step) -> bool| steps.iter().filter(|step| wanted(step)).count() as u64;
    assert_eq!(count(&|step| *step == Step::Request), BATCHES, "{steps:?}");
    assert_eq!(count(&|step| *step == Step::AnswerBegins), BATCHES, "{steps:?}");
    for (sink, _) in SINKS {
        assert!(count(&|step| *step == Step::SinkWriteBegins(sink)) >= BATCHES, "{sink}: {steps:?}");
    }

    let mut commit = Commit::Idle;
    let mut sinks: BTreeMap<&str, Sink> = SINKS.iter().map(|(sink, ..)| (*sink, Sink::default())).collect();
    let mut answers = 0;
    for step in &steps {
        match step {
            Step::Request => commit = Commit::Idle,
            Step::LedgerWriteBegins(positions) => {
                // Positions of sinks may be recorded between a commit and its answer.
                if commit != Commit::Synced {
                    commit = Commit::Written;
                }
                for (sink, batch) in positions {
                    sinks.get_mut(sink.as_str()).unwrap().record(sink, *batch);
                }
            }
            Step::LedgerSynced if commit == Commit::Written => commit = Commit::Synced,
            Step::LedgerSynced => {}
            Step::AnswerBegins => {
                assert_eq!(commit, Commit::Synced, "a 200 without a synced commit before it: {steps:?}");
                answers += 1;
            }
            Step::SinkWriteBegins(sink) => {
                // The database's tables are created as soon as the daemon starts.
                let is_opened = *sink == "search" && answers == 0;
                assert!(
                    is_opened || commit != Commit::Idle,
                    "a sink had events before they were durable: {steps:?}"
                );
                // A message that was sent is all that can be observed.
                let is_safe = *sink == "siem";
                let sink = sinks.get_mut(sink).unwrap();
                (sink.is_written, sink.is_safe) = (true, is_safe);
            }
            Step::SinkSynced(sink) => sinks.get_mut(sink).unwrap().is_safe = true,
        }
    }
    assert_eq!(answers, BATCHES);
    for (name, sink) in sinks {
        assert!(sink.is_safe && sink.moves == BATCHES, "{name} {sink:?}: {steps:?}");
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Commit {
    Idle,
    Written,
    Synced,
}

/// State of a sink.
#[derive(Clone, Copy, Debug, Default)]
struct Sink {
    /// Events were written since the position moved.
    is_written: bool,
    /// The written events are synced.
    is_safe: bool,
    /// The position in the ledger, once it is known.
    recorded: Option<i64>,
    /// Number of times that the position moved.
    moves: u64,
}

impl Sink {
    fn record(&mut self, name: &str, batch: i64) {
        if self.recorded.is_some_and(|recorded| recorded < batch) {
            assert!(
                self.is_written && self.is_safe,
                "{name} moved to {batch} before that was safe: {self:?}"
            );
            self.moves += 1;
            self.is_written = false;
        }
        self.recorded = Some(batch);
    }
}

/// Parses strace's output. A write counts where it begins and a sync where it has succeeded, even
/// with calls of other threads in between.
fn steps(trace: &str, syslog: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut ledger = LedgerFiles::default();
    let mut unfinished: HashMap<&str, &str> = HashMap::new();
    for line in trace.lines() {
        let Some((thread, call)) = line.split_once(char::is_whitespace) else { continue };
        let call = call.trim_start();
        // `<... fdatasync resumed>) = 0` belongs to the thread's `fdatasync(9</path> <unfinished
        // ...>`.
        let (begun, ended) = if call.starts_with("<...") {
            (None, unfinished.remove(thread))
        } else if call.ends_with("<unfinished ...>") {
            unfinished.insert(thread, call);
            (Some(call), None)
        } else {
            (Some(call), Some(call))
        };
        let data = data(call);
        if data.starts_with(b"POST ") {
            steps.push(Step::Request);
        }
        let writes = ["write(", "writev(", "pwrite64(", "pwritev(", "sendto(", "sendmsg("];
        if let Some(call) = begun.filter(|call| writes.iter().any(|name| call.starts_with(name))) {
            // The admin endpoint's answers have another type.
            let is_json = data.windows(16).any(|window| window == b"application/json");
            if data.starts_with(b"HTTP/1.1 200 OK") && is_json {
                steps.push(Step::AnswerBegins);
            } else if is_file(call, "/data/ledger.db") {
                write_at(&mut ledger.database, call, &data);
            } else if is_file(call, "/data/ledger.db-wal") {
                write_at(&mut ledger.log, call, &data);
                steps.push(Step::LedgerWriteBegins(ledger.positions()));
            } else if call.contains(&format!("->{syslog}]>")) {
                steps.push(Step::SinkWriteBegins("siem"));
            } else if let Some((sink, _)) = SINKS[..2].iter().find(|(_, file)| is_file(call, file)) {
                steps.push(Step::SinkWriteBegins(sink));
            }
        }
        if let Some(begun) =
            ended.filter(|begun| begun.starts_with("fdatasync(") || begun.starts_with("fsync("))
        {
            assert!(call.trim_end().ends_with("= 0"), "a sync failed: {line}");
            if is_file(begun, "/data/ledger.db-wal") {
                steps.push(Step::LedgerSynced);
            } else if let Some((sink, _)) = SINKS[..2].iter().find(|(_, file)| is_file(begun, file)) {
                steps.push(Step::SinkSynced(sink));
            }
        }
    }
    steps
}

/// Returns whether the path of a call's file ends like this. strace prints paths in hexadecimal.
fn is_file(call: &str, end: &str) -> bool {
    let end: String = end.bytes().map(|byte| format!("\\x{byte:02x}")).collect();
    call.contains(&(end + ">"))
}

/// Returns the bytes that a call read or wrote, as far as strace prints them: `"\x41\x42"`.
fn data(call: &str) -> Vec<u8> {
    let Some(text) = call.split('"').nth(1) else { return Vec::new() };
    text.split("\\x").skip(1).filter_map(|byte| u8::from_str_radix(byte, 16).ok()).collect()
}

/// The contents of the ledger's files at a point of the trace.
#[derive(Default)]
struct LedgerFiles {
    database: Vec<u8>,
    log: Vec<u8>,
}

impl LedgerFiles {
    /// Returns the positions that a restart would find now; none before the tables exist.
    fn positions(&self) -> Vec<(String, i64)> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ledger.db");
        std::fs::write(&path, &self.database).unwrap();
        std::fs::write(directory.path().join("ledger.db-wal"), &self.log).unwrap();
        let connection = Connection::open(&path).unwrap();
        let Ok(mut find) = connection.prepare("SELECT name, batch FROM sink") else { return Vec::new() };
        let found = find.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
        found.collect::<Result<_, _>>().unwrap()
    }
}

/// Repeats `pwrite64(FILE, BYTES, LENGTH, OFFSET)`.
fn write_at(file: &mut Vec<u8>, call: &str, data: &[u8]) {
    let numbers = call.rsplit('"').next().unwrap();
    let offset = numbers.split(',').nth(2).unwrap().trim_matches(|other: char| !other.is_ascii_digit());
    let offset: usize = offset.split(')').next().unwrap().parse().unwrap();
    file.resize(file.len().max(offset + data.len()), 0);
    file[offset..offset + data.len()].copy_from_slice(data);
}
