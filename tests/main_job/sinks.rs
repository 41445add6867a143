//! Changes of the configuration of sinks while events wait for them, and of their files by other
//! processes.

use std::process::Output;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::database::raw_events;
use crate::harness::machine::ReservedPort;
use crate::harness::programs::auditgate;
use crate::harness::site::{PATH, Site, raw_sinks, source, sqlite_sink, syslog_sink};
use crate::harness::syslog::SyslogServer;
use crate::harness::{assert_contains, body, wait_until};

/// Returns a site with two sources, two file sinks, and a syslog sink with further lines whose
/// server is at a port.
fn site(port: &ReservedPort, more: &str) -> Site {
    let siem = syslog_sink(&format!("tcp://127.0.0.1:{}", port.number()), &format!("{more}\n"));
    Site::new().sources(&(source("us", PATH, "") + &source("eu", "/eu", ""))).sinks(&(raw_sinks() + &siem))
}

fn run(site: &Site, command: &[&str]) -> Output {
    auditgate().args(command).arg("--config").arg(site.path("config.toml")).output().unwrap()
}

/// Runs a command, and checks its exit code and the words on stderr (or, for 0, on stdout).
fn assert_exit(site: &Site, command: &[&str], code: i32, words: &[&str]) {
    let output = run(site, command);
    let said = if code == 0 { &output.stdout } else { &output.stderr };
    let said = String::from_utf8_lossy(said);
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    assert_contains(&said, words);
}

fn pending(daemon: &Daemon<'_>, sink: &str) -> u64 {
    daemon.sink_metric("pending_events", sink)
}

/// Waits until the file sinks have delivered everything.
fn wait_for_files(daemon: &Daemon<'_>) {
    wait_until("the file sinks have delivered everything", || {
        let left = [pending(daemon, "verified"), pending(daemon, "quarantine")];
        if left == [0, 0] { Ok(()) } else { Err(format!("{left:?}")) }
    });
}

fn post(daemon: &Daemon<'_>, path: &str, events: &[String]) {
    let receipt = Receipt::of(&daemon.post_to(path, None, &body(events)));
    assert_eq!(receipt.accepted, events.len() as u64);
}

#[test]
fn a_sink_that_takes_less_does_not_lose_what_waits_for_it() {
    let port = ReservedPort::new();
    let site = site(&port, "sources = [\"us\"]");
    let daemon = Daemon::start(&site);
    let events = site.producer.events(0..8);
    post(&daemon, PATH, &events[..5]);
    wait_for_files(&daemon);
    daemon.terminate();

    let site = site.edit("sources = [\"us\"]", "sources = [\"eu\"]");
    let refusal = ["sink `siem`", "5 events", "put it back", "`auditgate forget-sink siem`"];
    assert_exit(&site, &["serve"], 78, &refusal);
    let site = site.edit("sources = [\"eu\"]", "stream = [\"quarantine\"]");
    assert_exit(&site, &["serve"], 78, &refusal);
    // From now on it takes more.
    let site = site.edit("stream = [\"quarantine\"]", "sources = [\"eu\", \"us\"]");
    let daemon = Daemon::start(&site);
    assert_eq!(pending(&daemon, "siem"), 5);
    post(&daemon, "/eu", &events[5..]);
    let server = SyslogServer::start(&port);
    daemon.settle();
    daemon.terminate();
    wait_until("the server has every event once", || {
        let messages = server.messages();
        if messages == events { Ok(()) } else { Err(format!("{messages:?}")) }
    });
    // Nothing waits, so it may take less.
    let site = site.edit("sources = [\"eu\", \"us\"]", "sources = [\"eu\"]");
    Daemon::start(&site).terminate();
}

#[test]
fn forget_sink_gives_up_only_events_that_prevent_a_start_unless_forced() {
    let port = ReservedPort::new();
    let site = site(&port, "");
    let forget = ["forget-sink", "siem"];
    assert_exit(&site, &forget, 74, &["there is no ledger", "data_dir"]);
    assert!(!site.path("data").exists());

    let daemon = Daemon::start(&site);
    let events = site.producer.events(0..5);
    post(&daemon, PATH, &events[..3]);
    post(&daemon, "/eu", &events[3..]);
    wait_for_files(&daemon);
    assert_exit(&site, &forget, 74, &["stop it first"]);
    daemon.terminate();
    assert_exit(&site, &["forget-sink", "sime"], 1, &["no sink `sime`"]);
    assert_exit(&site, &forget, 1, &["configured", "5 events", "--force"]);

    let site = site.edit("type = \"syslog\"\n", "type = \"syslog\"\nsources = [\"eu\"]\n");
    assert_exit(&site, &["serve"], 78, &["3 events"]);
    assert_exit(&site, &forget, 0, &["gave up 3 events"]);
    let daemon = Daemon::start(&site);
    assert_eq!(pending(&daemon, "siem"), 2);
    daemon.terminate();
    assert_exit(&site, &["forget-sink", "--force", "siem"], 0, &["forgot sink siem and 2 events"]);
    let daemon = Daemon::start(&site);
    assert_eq!(pending(&daemon, "siem"), 0);
    daemon.terminate();
}

#[test]
fn a_ledger_whose_directory_was_renamed_acknowledges_nothing() {
    for is_posted_to in [true, false] {
        let site = Site::new();
        let mut daemon = Daemon::start(&site);
        daemon.deliver(&site.producer.events(0..2));
        std::fs::rename(site.path("data"), site.path("elsewhere")).unwrap();
        if is_posted_to {
            let batch = body(&site.producer.events(2..4));
            // A 500, or no answer because the daemon has exited already; but no 200.
            let answer = daemon.try_connect().and_then(|mut client| client.try_post(PATH, None, &batch));
            assert!(answer.as_ref().map_or(true, |answer| answer.status == 500), "{answer:?}");
        }
        assert_eq!(daemon.wait_for_exit().code(), Some(74));
        daemon.wait_for_log("was removed or replaced while it was in use");
        daemon.wait_for_log("put back");
        drop(daemon);
        // Once it has been renamed back, the daemon continues.
        assert!(!site.path("data").exists());
        std::fs::rename(site.path("elsewhere"), site.path("data")).unwrap();
        let daemon = Daemon::start(&site);
        assert_eq!(daemon.deliver(&site.producer.events(0..2)).duplicates, 2);
        daemon.deliver(&site.producer.events(2..4));
        daemon.settle();
        daemon.terminate();
        assert_eq!(site.verified(), site.producer.events(0..4));
    }
}

#[test]
fn a_database_that_cannot_be_used_delays_no_other_sink() {
    let site = Site::new().sinks(&(raw_sinks() + &sqlite_sink("search.db", "\"verified\"")));
    let events = site.producer.events(0..6);
    let start = Instant::now();
    let daemon = Daemon::start(&site);
    let usual = start.elapsed();
    daemon.deliver(&events[..2]);
    daemon.settle();
    daemon.terminate();

    let locked = Connection::open(site.path("search.db")).unwrap();
    locked
        .execute_batch("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE; DELETE FROM event_rows WHERE 0")
        .unwrap();
    let start = Instant::now();
    let daemon = Daemon::start(&site);
    let took = start.elapsed();
    assert!(took < usual + Duration::from_secs(4), "{took:?}, usually {usual:?}");
    daemon.wait_for_log("code=\"check-failed\"");
    daemon.deliver(&events[2..4]);
    wait_for_files(&daemon);
    assert_eq!(pending(&daemon, "search"), 2);
    locked.execute_batch("ROLLBACK").unwrap();
    locked.close().unwrap();
    daemon.settle();
    daemon.terminate();

    // For a while a directory is in the place of the database.
    std::fs::rename(site.path("search.db"), site.path("kept.db")).unwrap();
    std::fs::create_dir(site.path("search.db")).unwrap();
    let daemon = Daemon::start(&site);
    daemon.deliver(&events[4..]);
    wait_for_files(&daemon);
    std::fs::remove_dir(site.path("search.db")).unwrap();
    std::fs::rename(site.path("kept.db"), site.path("search.db")).unwrap();
    daemon.settle();
    daemon.terminate();
    let database = Connection::open(site.path("search.db")).unwrap();
    assert_eq!(raw_events(&database), events);

    // A file that is not a database never becomes one.
    site.write("text", "2026-01-01 a log line\n".repeat(100));
    let site = site.edit("search.db", "text");
    assert_exit(&site, &["serve"], 78, &["sink `search`", "not an SQLite database"]);
}
