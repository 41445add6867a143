//! What an operator changes about sinks while events wait for them, and what others do to their places.

use std::process::Output;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::machine::ReservedPort;
use crate::harness::programs::auditgate;
use crate::harness::site::{PATH, Site, sink, source};
use crate::harness::syslog::SyslogServer;
use crate::harness::{PATIENCE, body, wait_until};

/// Two sources, two files, and a syslog sink with further lines whose server is at a port.
fn site(port: &ReservedPort, more: &str) -> Site {
    let port = port.number();
    let siem = format!("[sinks.siem]\ntype = \"syslog\"\naddress = \"tcp://127.0.0.1:{port}\"\n{more}\n");
    let files = sink("verified", "raw", "\"verified\"") + &sink("quarantine", "json", "\"quarantine\"");
    Site::new().sources(&(source("us", PATH, "") + &source("eu", "/eu", ""))).sinks(&(files + &siem))
}

fn run(site: &Site, command: &[&str]) -> Output {
    auditgate().args(command).arg("--config").arg(site.path("config.toml")).output().unwrap()
}

/// Runs a command that must end with a code, and say these words on stderr (or, for 0, on stdout).
fn ends(site: &Site, command: &[&str], code: i32, words: &[&str]) {
    let output = run(site, command);
    let said = if code == 0 { &output.stdout } else { &output.stderr };
    let said = String::from_utf8_lossy(said);
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    for word in words {
        assert!(said.contains(word), "`{word}` is not in: {said}");
    }
}

fn pending(daemon: &Daemon<'_>, sink: &str) -> String {
    daemon.metrics()[&format!("auditgate_sink_pending_events{{sink=\"{sink}\"}}")].clone()
}

/// Waits until nothing but what a dead server shall have is undelivered.
fn files_settle(daemon: &Daemon<'_>) {
    wait_until(PATIENCE, "the files have everything", || {
        let left = [pending(daemon, "verified"), pending(daemon, "quarantine")];
        if left == ["0", "0"] { Ok(()) } else { Err(format!("{left:?}")) }
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
    files_settle(&daemon);
    daemon.terminate();

    let site = site.edit("sources = [\"us\"]", "sources = [\"eu\"]");
    let refusal = ["sink `siem`", "5 events", "put it back", "`auditgate forget-sink siem`"];
    ends(&site, &["serve"], 78, &refusal);
    let site = site.edit("sources = [\"eu\"]", "stream = [\"quarantine\"]");
    ends(&site, &["serve"], 78, &refusal);
    // More is taken from now on.
    let site = site.edit("stream = [\"quarantine\"]", "sources = [\"eu\", \"us\"]");
    let daemon = Daemon::start(&site);
    assert_eq!(pending(&daemon, "siem"), "5");
    post(&daemon, "/eu", &events[5..]);
    let server = SyslogServer::start(&port);
    daemon.settle();
    daemon.terminate();
    wait_until(PATIENCE, "the server has every event once", || {
        let messages = server.messages();
        if messages == events { Ok(()) } else { Err(format!("{messages:?}")) }
    });
    // Nothing waits: then it may take less.
    let site = site.edit("sources = [\"eu\", \"us\"]", "sources = [\"eu\"]");
    Daemon::start(&site).terminate();
}

#[test]
fn events_are_given_up_only_when_they_are_in_the_way_or_by_force() {
    let port = ReservedPort::new();
    let site = site(&port, "");
    let forget = ["forget-sink", "siem"];
    ends(&site, &forget, 74, &["there is no ledger", "data_dir"]);
    assert!(!site.path("data").exists());

    let daemon = Daemon::start(&site);
    let events = site.producer.events(0..5);
    post(&daemon, PATH, &events[..3]);
    post(&daemon, "/eu", &events[3..]);
    files_settle(&daemon);
    ends(&site, &forget, 74, &["stop it first"]);
    daemon.terminate();
    ends(&site, &["forget-sink", "sime"], 1, &["no sink `sime`"]);
    ends(&site, &forget, 1, &["configured", "5 events", "--force"]);

    let site = site.edit("type = \"syslog\"\n", "type = \"syslog\"\nsources = [\"eu\"]\n");
    ends(&site, &["serve"], 78, &["3 events"]);
    ends(&site, &forget, 0, &["gave up 3 events"]);
    let daemon = Daemon::start(&site);
    assert_eq!(pending(&daemon, "siem"), "2");
    daemon.terminate();
    ends(&site, &["forget-sink", "--force", "siem"], 0, &["forgot sink siem and 2 events"]);
    let daemon = Daemon::start(&site);
    assert_eq!(pending(&daemon, "siem"), "0");
    daemon.terminate();
}

#[test]
fn a_ledger_that_is_taken_away_promises_nothing_more() {
    for is_asked in [true, false] {
        let site = Site::new();
        let mut daemon = Daemon::start(&site);
        daemon.deliver(&site.producer.events(0..2));
        std::fs::rename(site.path("data"), site.path("elsewhere")).unwrap();
        if is_asked {
            let batch = body(&site.producer.events(2..4));
            // An answer, or none because the daemon has ended by itself before or meanwhile; but no promise.
            let answer = daemon.try_connect().and_then(|mut client| client.try_post(PATH, None, &batch));
            assert!(answer.as_ref().map_or(true, |answer| answer.status == 500), "{answer:?}");
        }
        let status =
            wait_until(PATIENCE, "the daemon ends", || daemon.exit_status().ok_or("it runs".to_owned()));
        assert_eq!(status.code(), Some(74));
        daemon.says("was removed or replaced while it was in use");
        daemon.says("put back");
        drop(daemon);
        // Back in its place, it goes on where it was.
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
fn a_database_that_cannot_be_used_holds_up_no_other_sink() {
    let sinks = sink("verified", "raw", "\"verified\"")
        + &sink("quarantine", "json", "\"quarantine\"")
        + "[sinks.search]\ntype = \"sqlite\"\npath = \"search.db\"\n";
    let site = Site::new().sinks(&sinks);
    let events = site.producer.events(0..6);
    let start = Instant::now();
    let daemon = Daemon::start(&site);
    let usual = start.elapsed();
    daemon.deliver(&events[..2]);
    daemon.settle();
    daemon.terminate();

    let locked = Connection::open(site.path("search.db")).unwrap();
    locked
        .execute_batch("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE; DELETE FROM events WHERE 0")
        .unwrap();
    let start = Instant::now();
    let daemon = Daemon::start(&site);
    let took = start.elapsed();
    assert!(took < usual + Duration::from_secs(4), "{took:?}, usually {usual:?}");
    daemon.says("cannot be used now");
    daemon.deliver(&events[2..4]);
    files_settle(&daemon);
    assert_eq!(pending(&daemon, "search"), "2");
    locked.execute_batch("ROLLBACK").unwrap();
    locked.close().unwrap();
    daemon.settle();
    daemon.terminate();

    // Something else is in its place, for a while.
    std::fs::rename(site.path("search.db"), site.path("kept.db")).unwrap();
    std::fs::create_dir(site.path("search.db")).unwrap();
    let daemon = Daemon::start(&site);
    daemon.deliver(&events[4..]);
    files_settle(&daemon);
    std::fs::remove_dir(site.path("search.db")).unwrap();
    std::fs::rename(site.path("kept.db"), site.path("search.db")).unwrap();
    daemon.settle();
    daemon.terminate();
    let database = Connection::open(site.path("search.db")).unwrap();
    let mut find = database.prepare("SELECT raw FROM events ORDER BY id").unwrap();
    let rows: Vec<String> = find.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
    assert_eq!(rows, events);

    // What never gets better by itself.
    site.write("text", "2026-01-01 a log line\n".repeat(100));
    let site = site.edit("search.db", "text");
    ends(&site, &["serve"], 78, &["sink `search`", "no SQLite database"]);
}
