//! At each named step of the commit and of the delivery a fault is injected, failed and failed but persisted, into
//! the real daemon: it goes on by itself or ends with 74, or it is killed at that moment, and nothing is lost,
//! doubled or torn.
//!
//! The faults come from `faults.c`, which is preloaded; what it can do is described there. With
//! `AUDITGATE_TESTS_FAULTS=TEXT` only those are played whose name holds the text.

use std::cell::RefCell;
use std::collections::HashSet;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use rusqlite::Connection;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::harness::client::{Answer, Client, request};
use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::machine::{self, Need};
use crate::harness::programs::{self, auditgate, beside};
use crate::harness::sign::cef;
use crate::harness::site::{PATH, Site, TOKEN, lines, sink};
use crate::harness::syslog::SyslogServer;
use crate::harness::{PATIENCE, body, wait_until};

/// A step that can fail.
struct Step {
    name: &'static str,
    /// The system call, by its name in `faults.c`.
    call: &'static str,
    /// Of its file; empty for a socket.
    glob: &'static str,
    /// Only once a file of that name was made.
    after: &'static str,
    faults: &'static [Fault],
    when: When,
    process: Process,
}

/// How it fails: mode and error, by their names in `faults.c`.
type Fault = (&'static str, &'static str);

/// What brings the step about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// Batches that follow each other at once.
    Posting,
    /// Batches of a megabyte: 16 MiB of log bring a checkpoint.
    PostingMuch,
    /// The checkpoint that gives the space of a delivered backlog back.
    Shrinking,
    /// Batches, each of which is delivered before the next comes.
    Delivering,
    /// What the daemon does with a batch after the 200.
    AfterThe200,
    /// The last sink gets what the others have and the ledger has noted.
    LastSink,
    /// The first batch after the syslog server closed its connections.
    Reconnecting,
    /// SIGTERM.
    Terminating,
    /// A start after an orderly end.
    Starting,
    /// A start after a kill, while nothing waits.
    StartingAfterAKill,
}

/// What the step's failure does to the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Process {
    GoesOn,
    /// With exit code 74; then it is started again.
    Ends,
}

use Process::{Ends, GoesOn};
use When::{
    AfterThe200, Delivering, LastSink, Posting, PostingMuch, Reconnecting, Shrinking, Starting,
    StartingAfterAKill, Terminating,
};

const WRITE: &[Fault] = &[("failed", "EIO"), ("failed", "ENOSPC"), ("half", "ENOSPC"), ("persisted", "EIO")];
const TWICE: &[Fault] = &[("failed", "EIO"), ("persisted", "EIO")];
const CONNECT: &[Fault] = &[("failed", "ECONNREFUSED"), ("persisted", "ETIMEDOUT")];
const SEND: &[Fault] = &[("failed", "ECONNRESET"), ("half", "EPIPE"), ("persisted", "ECONNRESET")];

const LEDGER: &[Step] = &[
    step("write a batch to the log", "write", "*/ledger.db-wal", WRITE, Posting, GoesOn),
    step("sync the log", "sync", "*/ledger.db-wal", TWICE, Posting, Ends),
    step("write a checkpoint", "write", "*/ledger.db", TWICE, PostingMuch, GoesOn),
    step("sync a checkpoint", "sync", "*/ledger.db", TWICE, PostingMuch, GoesOn),
    step("sync the checkpoint after a backlog", "sync", "*/ledger.db", TWICE, Shrinking, GoesOn),
    step("write a sink's position", "write", "*/ledger.db-wal", WRITE, AfterThe200, GoesOn),
    step("sync a sink's position", "sync", "*/ledger.db-wal", TWICE, AfterThe200, Ends),
    step("write what is forgotten", "write", "*/ledger.db-wal", WRITE, LastSink, GoesOn),
    step("sync what is forgotten", "sync", "*/ledger.db-wal", TWICE, LastSink, Ends),
    step("write the last checkpoint", "write", "*/ledger.db", WRITE, Terminating, GoesOn),
    step("sync the last checkpoint", "sync", "*/ledger.db", TWICE, Terminating, GoesOn),
    step("remove the log", "unlink", "*/ledger.db-wal", TWICE, Terminating, GoesOn),
    step("make the log", "create", "*/ledger.db-wal", TWICE, Starting, Ends),
    step("sync the log that is there", "sync", "*/ledger.db-wal", TWICE, StartingAfterAKill, Ends),
];

const ANSWER: &[Step] = &[step("send the 200", "send", "", SEND, Posting, GoesOn)];

const FILE: &[Step] = &[
    step("write lines", "write", "*/verified.log", WRITE, Delivering, GoesOn),
    step("sync lines", "sync", "*/verified.log", TWICE, Delivering, GoesOn),
    step("rename the full file", "rename", "*/verified.log", TWICE, Delivering, GoesOn),
    step("sync the new name", "directory-sync-after-rename", "*/verified.log", TWICE, Delivering, GoesOn),
    step("make the next file", "create", "*/verified.log", TWICE, Delivering, GoesOn),
    step("set the next file's mode", "chmod", "*/verified.log", TWICE, Delivering, GoesOn),
    step(
        "sync the next file's name",
        "directory-sync-after-create",
        "*/verified.log",
        TWICE,
        Delivering,
        GoesOn,
    ),
    Step {
        after: "*/verified.log",
        ..step("write the mark of the next file", "write", "*/ledger.db-wal", WRITE, Delivering, GoesOn)
    },
    Step {
        after: "*/verified.log",
        ..step("sync the mark of the next file", "sync", "*/ledger.db-wal", TWICE, Delivering, Ends)
    },
];

const COMPRESSION: &[Step] = &[
    step("make the packed file", "create", "*.zst.unfinished", TWICE, Delivering, GoesOn),
    step("set its mode", "chmod", "*.zst.unfinished", TWICE, Delivering, GoesOn),
    step("write it", "write", "*.zst.unfinished", WRITE, Delivering, GoesOn),
    step("sync it", "sync", "*.zst.unfinished", TWICE, Delivering, GoesOn),
    step("rename it", "rename", "*.zst.unfinished", TWICE, Delivering, GoesOn),
    step("sync its name", "directory-sync-after-rename", "*.zst.unfinished", TWICE, Delivering, GoesOn),
    step("remove the plain file", "unlink", "*/verified.log.*Z-????", TWICE, Delivering, GoesOn),
];

const SQLITE: &[Step] = &[
    step("write rows to the log", "write", "*/events.db-wal", WRITE, Delivering, GoesOn),
    step("sync the log", "sync", "*/events.db-wal", TWICE, Delivering, GoesOn),
    step("write a checkpoint", "write", "*/events.db", TWICE, PostingMuch, GoesOn),
    step("sync a checkpoint", "sync", "*/events.db", TWICE, PostingMuch, GoesOn),
    step("write the last checkpoint", "write", "*/events.db", WRITE, Terminating, GoesOn),
    step("sync the log that is there", "sync", "*/events.db-wal", TWICE, StartingAfterAKill, GoesOn),
    step("sync the last checkpoint", "sync", "*/events.db", TWICE, Terminating, GoesOn),
    step("remove the log", "unlink", "*/events.db-wal", TWICE, Terminating, GoesOn),
    step("make the log", "create", "*/events.db-wal", TWICE, Starting, GoesOn),
    step("sync the log that was made", "sync", "*/events.db-wal", TWICE, Starting, GoesOn),
];

const SYSLOG: &[Step] = &[
    step("connect", "connect", "", CONNECT, Reconnecting, GoesOn),
    step("send messages", "send", "", SEND, Delivering, GoesOn),
];

const fn step(
    name: &'static str,
    call: &'static str,
    glob: &'static str,
    faults: &'static [Fault],
    when: When,
    process: Process,
) -> Step {
    Step { name, call, glob, after: "", faults, when, process }
}

/// Further lines of the file sink. A batch has about 20 KiB.
const SMALL_FILES: &str = "rotate = { size = \"30KiB\" }\n";
const SMALL_FILES_SYNCED_LATER: &str =
    "rotate = { size = \"30KiB\" }\nfsync = \"interval\"\nfsync_interval = \"20ms\"\n";
const SMALL_PACKED_FILES: &str = "rotate = { size = \"30KiB\", compress = \"zstd\" }\n";
const LARGE_FILES: &str = "rotate = { size = \"1MiB\" }\n";

#[test]
fn of_the_ledger() {
    inject_each("ledger", LEDGER, LARGE_FILES);
}

#[test]
fn of_the_answer() {
    inject_each("answer", ANSWER, LARGE_FILES);
}

#[test]
fn of_a_file_that_is_synced_at_once() {
    inject_each("file", FILE, SMALL_FILES);
}

#[test]
fn of_a_file_that_is_synced_later() {
    inject_each("file, synced later", FILE, SMALL_FILES_SYNCED_LATER);
}

#[test]
fn of_compression() {
    inject_each("compression", COMPRESSION, SMALL_PACKED_FILES);
}

#[test]
fn of_the_database() {
    inject_each("database", SQLITE, LARGE_FILES);
}

#[test]
fn of_syslog() {
    inject_each("syslog", SYSLOG, LARGE_FILES);
}

/// Each fault of each step, with a daemon that lives and with one that is killed when it strikes.
fn inject_each(group: &str, steps: &[Step], file: &str) {
    /// They wait for the daemon most of the time.
    const AT_ONCE: usize = 6;
    if !machine::are_there(&[CC]) {
        return;
    }
    let chosen = std::env::var("AUDITGATE_TESTS_FAULTS").unwrap_or_default();
    let cases: Vec<(String, Case<'_>)> = steps
        .iter()
        .flat_map(|step| step.faults.iter().map(move |fault| (step, *fault)))
        .flat_map(|(step, fault)| [false, true].map(|is_killed| Case { step, fault, is_killed, file }))
        .map(|case| (format!("{group}: {case}"), case))
        .filter(|(name, _)| name.contains(&chosen))
        .collect();
    let (next, results) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some((name, case)) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let since = Instant::now();
                    let outcome = catch_unwind(AssertUnwindSafe(|| case.run())).map_err(|panic| {
                        let text = panic.downcast_ref::<String>().cloned();
                        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                            .unwrap_or_else(|| "a panic without words".to_owned())
                    });
                    results.lock().unwrap().push((name, outcome, since.elapsed()));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap();
    results.sort_by_key(|(name, ..)| cases.iter().position(|(known, _)| known == *name));
    let mut table = String::new();
    for (name, outcome, took) in &results {
        let said = match outcome {
            Ok(outcome) => outcome.as_str(),
            Err(failure) => &format!("FAILED: {failure}"),
        };
        table += &format!("{name:<75} {:>5.1} s  {said}\n", took.as_secs_f64());
    }
    eprint!("{table}");
    let failures: Vec<_> = table.lines().filter(|line| line.contains("FAILED: ")).collect();
    assert!(failures.is_empty(), "{} of {} faults:\n{}", failures.len(), results.len(), failures.join("\n"));
}

/// One fault of one step.
struct Case<'t> {
    step: &'t Step,
    fault: Fault,
    /// The daemon is killed as soon as it struck.
    is_killed: bool,
    file: &'t str,
}

impl std::fmt::Display for Case<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (mode, error) = self.fault;
        let kill = if self.is_killed { ", kill -9" } else { "" };
        write!(f, "{}, {mode} ({error}){kill}", self.step.name)
    }
}

/// How many events an ordinary batch has.
const BATCH: u64 = 40;

impl Case<'_> {
    /// Plays it; tells what the process did.
    fn run(&self) -> String {
        let server = SyslogServer::start_anywhere();
        let port = server.address.port();
        let sinks = [
            sink("verified", "raw", "\"verified\"") + self.file,
            "[sinks.search]\ntype = \"sqlite\"\nstream = [\"verified\", \"quarantine\"]\npath = \"events.db\"\n"
                .to_owned(),
            format!(
                "[sinks.siem]\ntype = \"syslog\"\naddress = \"tcp://127.0.0.1:{port}\"\nmax_size = \"1MiB\"\n"
            ),
        ];
        let site = Site::new().plain().sinks(&sinks.concat());
        let daemon = Daemon::start_by(&site, self.command(&site));
        let mut play = Play {
            case: self,
            site: &site,
            server: &server,
            daemon,
            posted: Vec::new(),
            days: 0,
            ends: 0,
            sender: RefCell::default(),
            visitor: RefCell::default(),
        };
        for _ in 0..2 {
            play.post(BATCH);
        }
        play.settle();
        server.wait_for(&play.posted);
        play.provoke();
        assert!(!play.arm().exists(), "the fault has not struck");
        let must_end = self.is_killed || self.step.process == Ends;
        if must_end && play.ends == 0 {
            play.wait_for_the_end();
            play.revive();
        }
        let ends = play.ends;
        play.go_on();
        // Two more rotations: what failed is tried again after the next.
        for _ in 0..4 {
            play.post(BATCH);
        }
        play.go_on();
        play.replay();
        assert_eq!(play.ends, ends, "it ended again, without a fault");
        play.check_at_end();
        if ends == 0 { "went on".to_owned() } else { "ended and was started again".to_owned() }
    }

    fn command(&self, site: &Site) -> Command {
        let (mode, error) = self.fault;
        let mut command = auditgate();
        command
            .args(["serve", "--config"])
            .arg(site.path("config.toml"))
            .env("LD_PRELOAD", preloaded())
            .env("FAULT_CALL", self.step.call)
            .env("FAULT_PATH", self.step.glob)
            .env("FAULT_MODE", mode)
            .env("FAULT_ERRNO", error)
            .env("FAULT_ARM", site.path("arm"));
        if !self.step.after.is_empty() {
            command.env("FAULT_AFTER", self.step.after);
        }
        command
    }
}

/// What [`preloaded`] needs.
pub(crate) const CC: Need = ("cc is not installed", &["cc", "--version"]);

/// `faults.c`, compiled once.
pub(crate) fn preloaded() -> PathBuf {
    static COMPILED: OnceLock<tempfile::TempDir> = OnceLock::new();
    let directory = COMPILED.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"]);
        programs::run(compiler.arg(directory.path().join("faults.so")).arg(beside("faults.c")).arg("-ldl"));
        directory
    });
    directory.path().join("faults.so")
}

/// A case that is being played.
struct Play<'s> {
    case: &'s Case<'s>,
    site: &'s Site,
    server: &'s SyslogServer,
    daemon: Daemon<'s>,
    /// Every event, in the order in which they were first posted.
    posted: Vec<String>,
    /// Each batch is of another day, for which the ledger makes a partition of its fingerprints.
    days: u64,
    /// How often the daemon ended otherwise than by SIGTERM.
    ends: u32,
    /// Connections are kept: the system remembers each for a minute, in a table that the syslog sink reads.
    sender: RefCell<Option<Client>>,
    visitor: RefCell<Option<Client>>,
}

impl Play<'_> {
    fn arm(&self) -> PathBuf {
        self.site.path("arm")
    }

    fn has_struck(&self) -> bool {
        !self.arm().exists()
    }

    /// From now on the fault strikes, and the daemon is killed then if that is the case.
    fn make_arm(&self, port: u16) {
        let unfinished = self.site.path("arm.unfinished");
        std::fs::write(&unfinished, port.to_string()).unwrap();
        std::fs::rename(unfinished, self.arm()).unwrap();
        self.lie_in_wait();
    }

    fn lie_in_wait(&self) {
        if !self.case.is_killed {
            return;
        }
        let process = Pid::from_raw(self.daemon.process().try_into().unwrap()).unwrap();
        // It means this process and no later one of the same number.
        let process = pidfd_open(process, PidfdFlags::empty()).unwrap();
        let arm = self.arm();
        std::thread::spawn(move || {
            while arm.exists() {
                std::thread::sleep(Duration::from_micros(200));
            }
            let _ = pidfd_send_signal(process, Signal::KILL);
        });
    }

    /// Does what brings the step about until the fault has struck.
    fn provoke(&mut self) {
        const MOST: usize = 60;
        let step = self.case.step;
        let port = if step.name == "send the 200" { self.daemon.address } else { self.server.address }.port();
        match step.when {
            Posting | PostingMuch | Delivering => {
                self.make_arm(port);
                for _ in 0..MOST {
                    if step.when == PostingMuch {
                        self.post_much();
                    } else {
                        self.post(BATCH);
                    }
                    if step.when == Delivering {
                        wait_until(PATIENCE, "the batch is delivered", || {
                            if self.has_struck() { Ok(()) } else { self.is_settled() }
                        });
                    }
                    if self.has_struck() {
                        return;
                    }
                }
            }
            AfterThe200 | LastSink => {
                // However fast the other sinks are, one has to wait until the fault is ready.
                let other = Connection::open(self.site.path("events.db")).unwrap();
                other.execute_batch("BEGIN IMMEDIATE").unwrap();
                self.post(BATCH);
                if step.when == LastSink {
                    wait_until(PATIENCE, "the ledger has the other sinks' positions", || {
                        self.others_are_noted()
                    });
                }
                self.make_arm(port);
                other.execute_batch("ROLLBACK").unwrap();
            }
            Shrinking => {
                // More than the ledger gives back in its own time, while one sink does not take it.
                const BATCHES: usize = 36;
                let other = Connection::open(self.site.path("events.db")).unwrap();
                other.execute_batch("BEGIN IMMEDIATE").unwrap();
                for _ in 0..BATCHES {
                    self.post_much();
                }
                // The log is empty afterwards, so that no commit brings a checkpoint before.
                let ledger = Connection::open(self.site.path("data/ledger.db")).unwrap();
                ledger.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
                drop(ledger);
                self.make_arm(port);
                other.execute_batch("ROLLBACK").unwrap();
            }
            Reconnecting => {
                self.make_arm(port);
                self.server.close_connections();
                self.post(BATCH);
            }
            Terminating => {
                self.make_arm(port);
                self.hang_up();
                self.daemon.signal("TERM");
                let status = self.wait_for_the_end();
                if self.case.is_killed && status.signal() == Some(9) {
                    self.revive();
                } else {
                    assert_eq!(status.code(), Some(0), "the daemon ended with {status}");
                    self.ends += u32::from(self.case.is_killed);
                    self.start();
                }
            }
            Starting | StartingAfterAKill => {
                if step.when == Starting {
                    self.terminate();
                } else {
                    self.daemon.signal("KILL");
                    self.wait_for_the_end();
                }
                std::fs::write(self.arm(), "").unwrap();
                self.daemon = Daemon::spawn(self.site, self.case.command(self.site));
                self.lie_in_wait();
                if self.daemon.listens().is_err() {
                    self.revive();
                }
            }
        }
        wait_until(PATIENCE, "the fault strikes", || {
            if self.has_struck() { Ok(()) } else { Err(format!("{:?}", self.daemon.exit_status())) }
        });
    }

    /// Waits until every sink has everything.
    fn settle(&self) {
        wait_until(PATIENCE, "every sink has everything", || self.is_settled());
    }

    fn is_settled(&self) -> Result<(), String> {
        let metrics = self.ask("/metrics").map_err(|error| error.to_string())?;
        let metrics = String::from_utf8(metrics.body).unwrap();
        let mut pending = metrics.lines().filter(|line| line.starts_with("auditgate_sink_pending_events"));
        match pending.find(|line| !line.ends_with(" 0")) {
            None => Ok(()),
            Some(waiting) => Err(waiting.to_owned()),
        }
    }

    fn ask(&self, path: &str) -> io::Result<Answer> {
        let connect = || Client::connect(self.daemon.admin, None);
        exchange(&self.visitor, connect, &request("GET", path, &[], b""))
    }

    fn others_are_noted(&self) -> Result<(), String> {
        let ledger = Connection::open(self.site.path("data/ledger.db")).unwrap();
        let behind =
            "SELECT count(*) FROM sink WHERE name <> 'search' AND batch <= (SELECT max(position) FROM batch)";
        match ledger.query_row(behind, [], |row| row.get::<_, i64>(0)) {
            Ok(0) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    }

    fn post(&mut self, events: u64) {
        let first = self.next_day();
        self.post_lines(self.site.producer.events(first..first + events));
    }

    /// The number of the first event of the next batch; numbers are milliseconds.
    fn next_day(&mut self) -> u64 {
        self.days += 1;
        self.days * 86_400_000
    }

    /// A megabyte in a few events.
    fn post_much(&mut self) {
        let first = self.next_day();
        let padding = "x".repeat(200 << 10);
        let event = |number| {
            let line = cef(number, &format!("rt={}", 1_684_454_619_000 + number));
            self.site.producer.sign_cef(&format!("{line}{padding}"))
        };
        self.post_lines((first..first + 5).map(event).collect());
    }

    /// Posts a batch until it gets a 200, as Konnect does, and starts the daemon again when it has ended.
    fn post_lines(&mut self, batch: Vec<String>) {
        let bytes = body(&batch);
        let events = batch.len() as u64;
        self.posted.extend(batch);
        let since = Instant::now();
        let mut was_sent = false;
        loop {
            assert!(since.elapsed() < PATIENCE, "the batch gets no 200");
            match self.attempt(&bytes) {
                Ok(answer) if answer.status == 200 => {
                    let Receipt { accepted, duplicates, quarantined } = Receipt::of(&answer);
                    assert_eq!(accepted + duplicates, events);
                    assert!(accepted == 0 || duplicates == 0, "half of the batch was known");
                    assert_eq!(quarantined, 0);
                    // Only the answer went wrong, unless it was whole and the next batch met a connection that ended.
                    let is_answer = self.case.step.name == "send the 200" && self.case.fault.0 != "persisted";
                    let must_be_known = was_sent && is_answer && !self.case.is_killed;
                    assert!(!must_be_known || duplicates == events, "the batch was forgotten");
                    return;
                }
                Ok(answer) => assert!(matches!(answer.status, 429 | 500), "{answer:?}"),
                Err(_) => was_sent = true,
            }
            // A sender's pause, not a wait for anything.
            std::thread::sleep(Duration::from_millis(20));
            self.revive();
        }
    }

    /// Everything comes again after a start, and the ledger knows it.
    fn replay(&mut self) {
        self.terminate();
        self.start();
        for batch in self.posted.chunks(20) {
            let receipt = Receipt::of(&self.attempt(&body(batch)).unwrap());
            let duplicates = batch.len() as u64;
            assert_eq!(receipt, Receipt { duplicates, ..Receipt::default() }, "known events are new again");
        }
    }

    fn attempt(&self, bytes: &[u8]) -> io::Result<Answer> {
        let length = bytes.len().to_string();
        let headers =
            [("Authorization", TOKEN), ("Content-Type", "text/plain"), ("Content-Length", length.as_str())];
        exchange(&self.sender, || self.daemon.try_connect(), &request("POST", PATH, &headers, bytes))
    }

    fn wait_for_the_end(&mut self) -> ExitStatus {
        self.hang_up();
        wait_until(PATIENCE, "the daemon ends", || self.daemon.exit_status().ok_or("it runs".to_owned()))
    }

    /// Starts the daemon again if it has ended, as it may only have because of the fault.
    fn revive(&mut self) {
        let Some(status) = self.daemon.exit_status() else { return };
        assert!(self.has_struck() && self.ends == 0, "the daemon ended with {status}, without a fault");
        let may_end = match status.signal() {
            Some(signal) => signal == 9 && self.case.is_killed,
            None => status.code() == Some(74) && self.case.step.process == Ends,
        };
        assert!(may_end, "the daemon ended with {status}: {:?}", self.daemon.log().last());
        self.ends += 1;
        self.lose_names();
        self.start();
    }

    fn terminate(&mut self) {
        self.hang_up();
        self.daemon.signal("TERM");
        let status = self.wait_for_the_end();
        assert_eq!(status.code(), Some(0), "the daemon ended with {status}");
    }

    fn hang_up(&self) {
        self.sender.take();
        self.visitor.take();
    }

    fn start(&mut self) {
        self.hang_up();
        self.daemon = Daemon::start_by(self.site, self.case.command(self.site));
    }

    /// The daemon is gone, and so are names in a directory whose sync failed: as after a power loss.
    fn lose_names(&self) {
        let Ok(names) = std::fs::read_to_string(self.site.path("arm.names")) else { return };
        match names.lines().collect::<Vec<_>>()[..] {
            ["create", name, ..] => std::fs::remove_file(name).unwrap(),
            ["rename", old, new] => std::fs::rename(new, old).unwrap(),
            _ => panic!("{names}"),
        }
        std::fs::remove_file(self.site.path("arm.names")).unwrap();
    }

    /// Delivers everything, is ready and at rest, and none of that for a batch that comes.
    fn go_on(&mut self) {
        self.settle();
        wait_until(PATIENCE, "the daemon is ready", || {
            let answer = self.ask("/readyz").map_err(|error| error.to_string())?;
            if answer.status == 200 { Ok(()) } else { Err(String::from_utf8(answer.body).unwrap()) }
        });
        // What was delivered would be lost with the name of its file.
        let is_durable = self.case.step.glob != "*/verified.log" || !self.site.path("arm.names").exists();
        assert!(is_durable, "lines were delivered to a file whose name was never synced");
        const WINDOW: Duration = Duration::from_millis(100);
        let mut from = (Instant::now(), self.busy_time());
        wait_until(PATIENCE, "the daemon is at rest", || {
            let passed = from.0.elapsed();
            if passed < WINDOW {
                return Err("just now".to_owned());
            }
            let busy = self.busy_time().saturating_sub(from.1);
            from = (Instant::now(), self.busy_time());
            if busy < passed / 2 { Ok(()) } else { Err(format!("busy for {busy:?} of {passed:?}")) }
        });
        let complaints = self.daemon.log().iter().filter(|line| line.contains("ERROR")).count();
        assert!(complaints < 20, "{complaints} errors were logged");
    }

    /// How long its threads ran or wanted to run so far (schedstat in proc(5)).
    fn busy_time(&self) -> Duration {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.daemon.process())).unwrap();
        let nanoseconds = threads
            .filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok())
            .flat_map(|line| {
                line.split_whitespace()
                    .take(2)
                    .map(|number| number.parse::<u64>().unwrap())
                    .collect::<Vec<_>>()
            })
            .sum();
        Duration::from_nanos(nanoseconds)
    }

    /// Ends the daemon and looks at everything that it leaves.
    fn check_at_end(&mut self) {
        let Self { case, site, server, .. } = *self;
        let packs = case.file.contains("compress");
        if packs {
            wait_until(PATIENCE, "every rotated file is packed", || {
                let plain: Vec<_> =
                    site.rotated("verified.log").into_iter().filter(|name| !name.ends_with(".zst")).collect();
                if plain.is_empty() { Ok(()) } else { Err(format!("{plain:?}")) }
            });
        }
        self.terminate();
        let posted = &self.posted;
        assert!(!site.path("arm.names").exists(), "the directory was not synced again after its sync failed");

        for name in site.rotated("verified.log").into_iter().chain(["verified.log".to_owned()]) {
            let mode = site.path(&name).metadata().unwrap().permissions().mode() & 0o7777;
            assert_eq!(mode, 0o640, "{name} is open to {mode:o}");
        }
        let mut delivered = Vec::new();
        for name in site.rotated("verified.log") {
            let bytes = site.read(&name);
            let bytes = if packs { zstd::decode_all(&bytes[..]).unwrap() } else { bytes };
            delivered.extend(lines(&bytes));
        }
        delivered.extend(lines(&site.read("verified.log")));
        assert_same("the files", &delivered, posted);

        let database = Connection::open(site.path("events.db")).unwrap();
        assert_sound(&database);
        let mut rows = database.prepare("SELECT raw FROM events ORDER BY id").unwrap();
        let rows: Vec<String> = rows.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
        assert_same("the database", &rows, posted);
        let others: i64 =
            database.query_row("SELECT count(*) FROM quarantine", [], |row| row.get(0)).unwrap();
        assert_eq!(others, 0);

        let ledger = Connection::open(site.path("data/ledger.db")).unwrap();
        assert_sound(&ledger);
        let waiting: i64 = ledger.query_row("SELECT count(*) FROM batch", [], |row| row.get(0)).unwrap();
        assert_eq!(waiting, 0, "batches are left in the ledger");

        server.wait_for(posted);
        let known: HashSet<&String> = posted.iter().collect();
        let received = server.messages();
        let foreign = received.iter().filter(|message| !known.contains(message)).count();
        assert_eq!(foreign, 0, "messages that nobody posted");
    }
}

/// A request and its answer on the connection that is kept, or on a new one after a failure.
fn exchange(
    kept: &RefCell<Option<Client>>,
    connect: impl FnOnce() -> io::Result<Client>,
    request: &[u8],
) -> io::Result<Answer> {
    let mut client = kept.take().map_or_else(connect, Ok)?;
    client.try_send(request)?;
    let answer = client.try_answer()?;
    if answer.header("connection") != Some("close") {
        kept.replace(Some(client));
    }
    Ok(answer)
}

/// Each event once and in order.
fn assert_same(place: &str, found: &[String], posted: &[String]) {
    if found == posted {
        return;
    }
    let (there, known): (HashSet<_>, HashSet<_>) = (found.iter().collect(), posted.iter().collect());
    panic!(
        "{place}: {} lines for {} events; {} missing, {} doubled, {} foreign",
        found.len(),
        posted.len(),
        known.difference(&there).count(),
        found.len() - there.len(),
        there.difference(&known).count()
    );
}

fn assert_sound(database: &Connection) {
    let sound: String = database.pragma_query_value(None, "integrity_check", |row| row.get(0)).unwrap();
    assert_eq!(sound, "ok", "{:?}", database.path());
}
