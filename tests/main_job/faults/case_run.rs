//! One case: a daemon into which a fault is injected at one step.

use std::cell::RefCell;
use std::collections::HashSet;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use rusqlite::Connection;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::steps::{Fault, Process, Step, Trigger};
use crate::harness::client::{Answer, Client};
use crate::harness::daemon::{Daemon, Receipt, serve};
use crate::harness::database::{assert_intact, raw_events};
use crate::harness::fault;
use crate::harness::sign::cef;
use crate::harness::site::{PATH, Site, lines, sink, sqlite_sink, syslog_sink};
use crate::harness::syslog::SyslogServer;
use crate::harness::{TEST_TIMEOUT, body, wait_until};

/// One fault of one step.
pub(super) struct Case<'t> {
    pub(super) step: &'t Step,
    pub(super) fault: Fault,
    /// The daemon is killed as soon as the fault has happened.
    pub(super) is_killed: bool,
    /// Further lines of the file sink.
    pub(super) file: &'t str,
}

impl std::fmt::Display for Case<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (mode, error) = self.fault;
        let kill = if self.is_killed { ", kill -9" } else { "" };
        write!(f, "{}, {mode} ({error}){kill}", self.step.name)
    }
}

/// Number of events in an ordinary batch.
const BATCH: u64 = 40;

impl Case<'_> {
    /// Runs the case, and returns what the process did.
    pub(super) fn run(&self) -> String {
        let server = SyslogServer::start_anywhere();
        let port = server.address.port();
        let sinks = [
            sink("verified", "raw", "\"verified\"") + self.file,
            sqlite_sink("events.db", "[\"verified\", \"quarantine\"]"),
            syslog_sink(&format!("tcp://127.0.0.1:{port}"), "max_size = \"1MiB\"\n"),
        ];
        let site = Site::new().plain().sinks(&sinks.concat());
        let daemon = Daemon::start_by(&site, self.command(&site));
        let mut run = CaseRun {
            case: self,
            site: &site,
            server: &server,
            daemon,
            posted: Vec::new(),
            days: 0,
            exits: 0,
            sender: RefCell::default(),
            admin_client: RefCell::default(),
        };
        for _ in 0..2 {
            run.post(BATCH);
        }
        run.settle();
        server.wait_for(&run.posted);
        run.trigger_step();
        assert!(!run.arm_path().exists(), "the fault has not happened");
        let must_exit = self.is_killed || self.step.process == Process::Ends;
        if must_exit && run.exits == 0 {
            run.wait_for_exit();
            run.restart_if_exited();
        }
        let exits = run.exits;
        run.assert_recovered();
        // Two more rotations: what failed is retried after the next one.
        for _ in 0..4 {
            run.post(BATCH);
        }
        run.assert_recovered();
        run.replay();
        assert_eq!(run.exits, exits, "it exited again, without a fault");
        run.check_at_end();
        if exits == 0 { "went on".to_owned() } else { "exited and was restarted".to_owned() }
    }

    fn command(&self, site: &Site) -> Command {
        let (mode, error) = self.fault;
        let mut command = serve(site);
        let Step { call, path, .. } = *self.step;
        fault::Fault { call, path, mode, error }.inject(&mut command, &site.path("arm"));
        if !self.step.after.is_empty() {
            command.env("FAULT_AFTER", self.step.after);
        }
        command
    }
}
/// A running case.
struct CaseRun<'s> {
    case: &'s Case<'s>,
    site: &'s Site,
    server: &'s SyslogServer,
    daemon: Daemon<'s>,
    /// Every event, in the order of first posting.
    posted: Vec<String>,
    /// Number of batches. Each has a day of its own, for which the ledger makes a partition of its
    /// fingerprints.
    days: u64,
    /// Number of exits that were not requested by SIGTERM.
    exits: u32,
    /// Connections are reused: the system remembers each for a minute, in a table that the syslog
    /// sink reads.
    sender: RefCell<Option<Client>>,
    admin_client: RefCell<Option<Client>>,
}

impl CaseRun<'_> {
    fn arm_path(&self) -> PathBuf {
        self.site.path("arm")
    }

    fn has_happened(&self) -> bool {
        !self.arm_path().exists()
    }

    /// Lets the fault happen from now on, and the daemon be killed then if the case says so.
    fn arm_fault(&self, port: u16) {
        let unfinished = self.site.path("arm.unfinished");
        std::fs::write(&unfinished, port.to_string()).unwrap();
        std::fs::rename(unfinished, self.arm_path()).unwrap();
        self.kill_at_fault();
    }

    fn kill_at_fault(&self) {
        if !self.case.is_killed {
            return;
        }
        let process = Pid::from_raw(self.daemon.process().try_into().unwrap()).unwrap();
        // Refers to this process and not to a later one with the same id.
        let process = pidfd_open(process, PidfdFlags::empty()).unwrap();
        let arm = self.arm_path();
        std::thread::spawn(move || {
            while arm.exists() {
                std::thread::sleep(Duration::from_micros(200));
            }
            let _ = pidfd_send_signal(process, Signal::KILL);
        });
    }

    /// Makes the daemon take the step until the fault has happened.
    fn trigger_step(&mut self) {
        const MAX_BATCHES: usize = 60;
        let step = self.case.step;
        let port = if step.name == "send the 200" { self.daemon.address } else { self.server.address }.port();
        match step.trigger {
            Trigger::Posting | Trigger::PostingMegabytes | Trigger::Delivering => {
                self.arm_fault(port);
                for _ in 0..MAX_BATCHES {
                    if step.trigger == Trigger::PostingMegabytes {
                        self.post_megabyte();
                    } else {
                        self.post(BATCH);
                    }
                    if step.trigger == Trigger::Delivering {
                        wait_until("the batch is delivered", || {
                            if self.has_happened() { Ok(()) } else { self.is_settled() }
                        });
                    }
                    if self.has_happened() {
                        return;
                    }
                }
            }
            Trigger::AfterThe200 | Trigger::LastSink => {
                // One sink is held back until the fault is armed, however fast the others are.
                let other = Connection::open(self.site.path("events.db")).unwrap();
                other.execute_batch("BEGIN IMMEDIATE").unwrap();
                self.post(BATCH);
                if step.trigger == Trigger::LastSink {
                    wait_until("the ledger has the other sinks' positions", || {
                        self.other_positions_are_recorded()
                    });
                }
                self.arm_fault(port);
                other.execute_batch("ROLLBACK").unwrap();
            }
            Trigger::AfterAReader => {
                // Fewer megabytes than cause a checkpoint, and more than do.
                const BEFORE: usize = 3;
                const AFTER: usize = 18;
                for _ in 0..BEFORE {
                    self.post_megabyte();
                }
                self.settle();
                let name = if step.path == "*/ledger.db" { "data/ledger.db" } else { "events.db" };
                let reader = Connection::open(self.site.path(name)).unwrap();
                reader.execute_batch("BEGIN; SELECT * FROM sqlite_schema").unwrap();
                for _ in 0..AFTER {
                    self.post_megabyte();
                }
                self.settle();
                // A part of a checkpoint syncs nothing.
                self.arm_fault(port);
                reader.execute_batch("COMMIT").unwrap();
                self.post(BATCH);
                if step.process == Process::GoesOn && !self.case.is_killed {
                    // What SQLite counts on outlasts the sink's connection while another is open.
                    wait_until("the sink waits for the reader to close the database", || {
                        let report = self.ask("/readyz").map_err(|error| error.to_string())?;
                        let report = String::from_utf8(report.body).unwrap();
                        if report.contains("close it in every other process") { Ok(()) } else { Err(report) }
                    });
                }
            }
            Trigger::Shrinking => {
                // More than the ledger frees without a checkpoint of its own, while one sink is
                // held back.
                const BATCHES: usize = 36;
                let other = Connection::open(self.site.path("events.db")).unwrap();
                other.execute_batch("BEGIN IMMEDIATE").unwrap();
                for _ in 0..BATCHES {
                    self.post_megabyte();
                }
                // Empties the log, so that no commit causes a checkpoint before.
                let ledger = Connection::open(self.site.path("data/ledger.db")).unwrap();
                ledger.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
                drop(ledger);
                self.arm_fault(port);
                other.execute_batch("ROLLBACK").unwrap();
            }
            Trigger::Reconnecting => {
                self.arm_fault(port);
                self.server.close_connections();
                self.post(BATCH);
            }
            Trigger::Terminating => {
                self.arm_fault(port);
                self.close_connections();
                self.daemon.signal("TERM");
                let status = self.wait_for_exit();
                if self.case.is_killed && status.signal() == Some(9) {
                    self.restart_if_exited();
                } else {
                    assert_eq!(status.code(), Some(0), "the daemon ended with {status}");
                    self.exits += u32::from(self.case.is_killed);
                    self.start();
                }
            }
            Trigger::Starting | Trigger::StartingAfterKill => {
                if step.trigger == Trigger::Starting {
                    self.terminate();
                } else {
                    self.daemon.signal("KILL");
                    self.wait_for_exit();
                }
                std::fs::write(self.arm_path(), "").unwrap();
                self.daemon = Daemon::spawn(self.site, self.case.command(self.site));
                self.kill_at_fault();
                if self.daemon.listens().is_err() {
                    self.restart_if_exited();
                }
            }
        }
        wait_until("the fault happens", || {
            if self.has_happened() { Ok(()) } else { Err(format!("{:?}", self.daemon.exit_status())) }
        });
    }

    /// Waits until every sink has delivered everything.
    fn settle(&self) {
        wait_until("every sink has delivered everything", || self.is_settled());
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
        exchange(&self.admin_client, connect, |client| client.try_get(path))
    }

    fn other_positions_are_recorded(&self) -> Result<(), String> {
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

    /// Returns the number of the next batch's first event; numbers are milliseconds.
    fn next_day(&mut self) -> u64 {
        self.days += 1;
        self.days * 86_400_000
    }

    /// Posts a megabyte in a few events, of which the database can share none.
    fn post_megabyte(&mut self) {
        let first = self.next_day();
        let event = |number| {
            let padding = format!("{number:08}").repeat(25 << 10);
            let line = cef(number, &format!("rt={}", 1_684_454_619_000 + number));
            self.site.producer.sign_cef(&format!("{line}{padding}"))
        };
        self.post_lines((first..first + 5).map(event).collect());
    }

    /// Posts a batch until it gets a 200, as Konnect does, and restarts the daemon if it has
    /// exited.
    fn post_lines(&mut self, batch: Vec<String>) {
        let bytes = body(&batch);
        let events = batch.len() as u64;
        self.posted.extend(batch);
        let since = Instant::now();
        let mut was_sent = false;
        loop {
            assert!(since.elapsed() < TEST_TIMEOUT, "the batch gets no 200");
            match self.attempt(&bytes) {
                Ok(answer) if answer.status == 200 => {
                    let Receipt { accepted, duplicates, quarantined } = Receipt::of(&answer);
                    assert_eq!(accepted + duplicates, events);
                    assert!(accepted == 0 || duplicates == 0, "a part of the batch was known");
                    assert_eq!(quarantined, 0);
                    // Only the answer failed, unless it was complete and the next batch found the
                    // connection closed.
                    let is_answer = self.case.step.name == "send the 200" && self.case.fault.0 != "persisted";
                    let must_be_known = was_sent && is_answer && !self.case.is_killed;
                    assert!(!must_be_known || duplicates == events, "the batch was forgotten");
                    return;
                }
                Ok(answer) => assert!(matches!(answer.status, 429 | 500), "{answer:?}"),
                Err(_) => was_sent = true,
            }
            // A sender's delay between retries; the test waits for nothing here.
            std::thread::sleep(Duration::from_millis(20));
            self.restart_if_exited();
        }
    }

    /// Posts everything again after a restart: the ledger knows it.
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
        exchange(&self.sender, || self.daemon.try_connect(), |client| client.try_post(PATH, None, bytes))
    }

    fn wait_for_exit(&mut self) -> ExitStatus {
        self.close_connections();
        self.daemon.wait_for_exit()
    }

    /// Restarts the daemon if it has exited, which only the fault may cause.
    fn restart_if_exited(&mut self) {
        let Some(status) = self.daemon.exit_status() else { return };
        assert!(self.has_happened() && self.exits == 0, "the daemon exited with {status}, without a fault");
        let may_exit = match status.signal() {
            Some(signal) => signal == 9 && self.case.is_killed,
            None => status.code() == Some(74) && self.case.step.process == Process::Ends,
        };
        assert!(may_exit, "the daemon exited with {status}: {:?}", self.daemon.log().last());
        self.exits += 1;
        self.lose_names();
        self.start();
    }

    fn terminate(&mut self) {
        self.close_connections();
        self.daemon.signal("TERM");
        let status = self.wait_for_exit();
        assert_eq!(status.code(), Some(0), "the daemon ended with {status}");
    }

    fn close_connections(&self) {
        self.sender.take();
        self.admin_client.take();
    }

    fn start(&mut self) {
        self.close_connections();
        self.daemon = Daemon::start_by(self.site, self.case.command(self.site));
    }

    /// Takes back changes of names in a directory whose sync failed, as a power loss does.
    fn lose_names(&self) {
        let Ok(names) = std::fs::read_to_string(self.site.path("arm.names")) else { return };
        match names.lines().collect::<Vec<_>>()[..] {
            ["create", name, ..] => std::fs::remove_file(name).unwrap(),
            ["rename", old, new] => std::fs::rename(new, old).unwrap(),
            _ => panic!("{names}"),
        }
        std::fs::remove_file(self.site.path("arm.names")).unwrap();
    }

    /// Checks that the daemon delivers everything, becomes ready and idle, without another batch.
    fn assert_recovered(&mut self) {
        self.settle();
        wait_until("the daemon is ready", || {
            let answer = self.ask("/readyz").map_err(|error| error.to_string())?;
            if answer.status == 200 { Ok(()) } else { Err(String::from_utf8(answer.body).unwrap()) }
        });
        // Delivered lines would be lost with the name of their file.
        let is_durable = self.case.step.path != "*/verified.log" || !self.site.path("arm.names").exists();
        assert!(is_durable, "lines were delivered to a file whose name was never synced");
        const WINDOW: Duration = Duration::from_millis(100);
        let mut from = (Instant::now(), self.busy_time());
        wait_until("the daemon is idle", || {
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

    /// Returns how long the daemon's threads have been running or runnable (schedstat in proc(5)).
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

    /// Stops the daemon and checks every file that it leaves.
    fn check_at_end(&mut self) {
        let Self { case, site, server, .. } = *self;
        let is_compressed = case.file.contains("compress");
        if is_compressed {
            wait_until("every rotated file is compressed", || {
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
            assert_eq!(mode, 0o640, "{name} has the mode {mode:o}");
        }
        let mut delivered = Vec::new();
        for name in site.rotated("verified.log") {
            let bytes = site.read(&name);
            let bytes = if is_compressed { zstd::decode_all(&bytes[..]).unwrap() } else { bytes };
            delivered.extend(lines(&bytes));
        }
        delivered.extend(lines(&site.read("verified.log")));
        assert_same("the files", &delivered, posted);

        let database = Connection::open(site.path("events.db")).unwrap();
        assert_intact(&database);
        assert_same("the database", &raw_events(&database), posted);
        let others: i64 =
            database.query_row("SELECT count(*) FROM quarantine", [], |row| row.get(0)).unwrap();
        assert_eq!(others, 0);

        let ledger = Connection::open(site.path("data/ledger.db")).unwrap();
        assert_intact(&ledger);
        let waiting: i64 = ledger.query_row("SELECT count(*) FROM batch", [], |row| row.get(0)).unwrap();
        assert_eq!(waiting, 0, "batches are left in the ledger");

        server.wait_for(posted);
        let known: HashSet<&String> = posted.iter().collect();
        let received = server.messages();
        let unknown = received.iter().filter(|message| !known.contains(message)).count();
        assert_eq!(unknown, 0, "messages that were never posted");
    }
}

/// Sends a request and reads its response, on the open connection or else on a new one.
fn exchange(
    open: &RefCell<Option<Client>>,
    connect: impl FnOnce() -> io::Result<Client>,
    send: impl FnOnce(&mut Client) -> io::Result<Answer>,
) -> io::Result<Answer> {
    let mut client = open.take().map_or_else(connect, Ok)?;
    let answer = send(&mut client)?;
    if answer.header("connection") != Some("close") {
        open.replace(Some(client));
    }
    Ok(answer)
}

/// Checks that each event is there once, in order.
fn assert_same(place: &str, found: &[String], posted: &[String]) {
    if found == posted {
        return;
    }
    let (there, known): (HashSet<_>, HashSet<_>) = (found.iter().collect(), posted.iter().collect());
    panic!(
        "{place}: {} lines for {} events; {} missing, {} repeated, {} unknown",
        found.len(),
        posted.len(),
        known.difference(&there).count(),
        found.len() - there.len(),
        there.difference(&known).count()
    );
}
