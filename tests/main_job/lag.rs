//! A sink that is down or far behind: it delays nobody, costs little memory, and gets everything in the end.

use std::collections::HashSet;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::faults::{CC, preloaded};
use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::machine::{self, ReservedPort};
use crate::harness::programs::auditgate;
use crate::harness::rsyslog::{self, Rsyslog};
use crate::harness::site::{Site, lines, sink};
use crate::harness::{PATIENCE, SetOnDrop, body, gzip, wait_until};

/// Events in one post.
const BATCH: usize = 1000;

/// A file sink beside a syslog server of this machine.
fn site(port: &ReservedPort) -> Site {
    let port = port.number();
    let siem =
        format!("[sinks.siem]\ntype = \"syslog\"\naddress = \"tls://localhost:{port}\"\nca = \"ca.pem\"\n");
    Site::new().sinks(
        &[sink("verified", "raw", "\"verified\""), sink("quarantine", "json", "\"quarantine\""), siem]
            .concat(),
    )
}

/// Posts batches that are ready to be sent, one after the other on one connection.
fn post(daemon: &Daemon<'_>, bodies: &[Vec<u8>]) {
    let mut client = daemon.connect();
    for body in bodies {
        let receipt = Receipt::of(&client.post(Some("application/gzip"), body));
        assert_eq!(receipt, Receipt { accepted: BATCH as u64, ..Receipt::default() });
    }
}

fn bodies(events: &[String]) -> Vec<Vec<u8>> {
    events.chunks(BATCH).map(|batch| gzip(&body(batch))).collect()
}

#[test]
fn a_dead_syslog_server_delays_nobody_and_gets_everything_in_order() {
    if !machine::are_there(&rsyslog::NEEDS) {
        return;
    }
    const EVENTS: u64 = 100_000;
    let port = ReservedPort::new();
    let site = site(&port);
    let events = site.producer.events(0..EVENTS + 10_000);
    let bodies = bodies(&events);
    let (before, down) = bodies.split_at(10);
    let daemon = Daemon::start(&site);

    let server = Rsyslog::start(&site, &port);
    post(&daemon, before);
    daemon.settle();
    let at_first = daemon.memory("VmRSS:");
    drop(server);

    let (over, most_lag, most_memory) = (AtomicBool::new(false), OnceLock::new(), OnceLock::new());
    std::thread::scope(|scope| {
        let end = SetOnDrop(&over);
        scope.spawn(|| {
            let (mut lag, mut memory) = (0.0_f64, 0);
            while !over.load(Ordering::Relaxed) {
                let metrics = daemon.metrics();
                lag = lag.max(
                    metrics["auditgate_sink_oldest_pending_seconds{sink=\"verified\"}"].parse().unwrap(),
                );
                memory = memory.max(daemon.memory("VmRSS:"));
            }
            most_lag.set(lag).unwrap();
            most_memory.set(memory).unwrap();
        });
        post(&daemon, down);
        // The server comes back behind all of it.
        wait_until(PATIENCE, "the file has everything", || {
            let pending = daemon.metrics()["auditgate_sink_pending_events{sink=\"verified\"}"].clone();
            if pending == "0" { Ok(()) } else { Err(pending) }
        });
        assert_ne!(daemon.metrics()["auditgate_sink_pending_events{sink=\"siem\"}"], "0");
        let _server = Rsyslog::start(&site, &port);
        daemon.settle();
        drop(end);
        // The last event is the last line: some of those before it may have come twice.
        let last = body(&events[events.len() - 1..]);
        wait_until(PATIENCE, "rsyslog has written everything", || {
            let received = site.read("received");
            if received.ends_with(&last) { Ok(()) } else { Err(format!("{} bytes", received.len())) }
        });
    });
    let (lag, memory) = (most_lag.into_inner().unwrap(), most_memory.into_inner().unwrap());
    eprintln!(
        "{EVENTS} events without syslog: file lag at most {lag} s; memory {at_first} KiB, then {memory} KiB"
    );
    daemon.terminate();

    let mut received = lines(&site.read("received"));
    // At least once: a chunk that was on its way when the server went can come again.
    let (all, mut seen) = (received.len(), HashSet::new());
    received.retain(|line| seen.insert(line.clone()));
    let first_wrong = received.iter().zip(&events).position(|(received, event)| received != event);
    let what = format!("{all} lines, {} different; the first that is wrong: {first_wrong:?}", seen.len());
    assert!(received == events, "everything, in order: {what}");
    assert_eq!(site.verified(), events);
    assert!(memory < at_first + (32 << 10), "memory grew from {at_first} to {memory} KiB");
}

/// A backlog of 64 MiB, or as many bytes as `AUDITGATE_TESTS_BACKLOG` says: in the time of its start and of what
/// it does meanwhile nothing depends on its size.
#[test]
fn a_large_backlog_holds_up_neither_the_start_nor_new_batches() {
    let wanted: u64 =
        std::env::var("AUDITGATE_TESTS_BACKLOG").map_or(64 << 20, |bytes| bytes.parse().unwrap());
    let site = Site::new().sinks(&sink("all", "json", "[\"verified\", \"quarantine\"]"));
    // The sink cannot be opened.
    std::fs::create_dir(site.path("all.jsonl")).unwrap();
    let daemon = Daemon::start(&site);
    let mut posted = 0;
    let mut client = daemon.connect();
    while daemon.metrics()["auditgate_ledger_bytes"].parse::<u64>().unwrap() < wanted {
        // As they are, so that the ledger has to keep them at their length.
        let batch = site.producer.events(posted..posted + 10_000);
        assert_eq!(Receipt::of(&client.post(None, &body(&batch))).accepted, 10_000);
        posted += 10_000;
    }
    daemon.kill9();

    let start = Instant::now();
    let daemon = Daemon::start(&site);
    let listening = start.elapsed();
    std::fs::remove_dir(site.path("all.jsonl")).unwrap();
    wait_until(PATIENCE, "it is ready", || match daemon.ask("/readyz").status {
        200 => Ok(()),
        status => Err(status.to_string()),
    });
    let ready = start.elapsed();
    let mut slowest = Duration::ZERO;
    let mut behind = Vec::new();
    let mut client = daemon.connect();
    let pending = || daemon.metrics()["auditgate_sink_pending_events{sink=\"all\"}"].parse::<u64>().unwrap();
    while pending() > 10_000 {
        let batch = site.producer.events(posted..posted + 10);
        let start = Instant::now();
        assert_eq!(Receipt::of(&client.post(Some("gzip"), &gzip(&body(&batch)))).accepted, 10);
        slowest = slowest.max(start.elapsed());
        posted += 10;
        behind.push(pending());
    }
    let caught_up = start.elapsed();
    daemon.settle();
    eprintln!(
        "a ledger of {wanted} bytes, {posted} events: listening after {listening:?}, ready after {ready:?}; {} batches \
         while it caught up for {caught_up:?}, the slowest took {slowest:?}; memory at most {} KiB",
        behind.len(),
        daemon.memory("VmHWM:"),
    );
    assert!(behind.len() > 3, "nothing was taken while it caught up");
    let bytes = || daemon.metrics()["auditgate_ledger_bytes"].parse::<u64>().unwrap();
    // What stays are the fingerprints, a quarter of free pages, which are soon used again, but 16 MiB of them in any case,
    // and SQLite's log, whose file is as large as it was once.
    let fingerprints = posted * 120;
    let log = || std::fs::metadata(site.path("data/ledger.db-wal")).map_or(0, |log| log.len());
    let stays = || fingerprints / 3 * 4 + (16 << 20) + log();
    wait_until(PATIENCE, "the ledger shrinks again", || {
        let (left, stays) = (bytes(), stays());
        if left < stays { Ok(()) } else { Err(format!("{left} bytes, not {stays}")) }
    });
    daemon.terminate();
    let written = crate::harness::records::objects(&site.read("all.jsonl"));
    assert_eq!(written.len() as u64, posted);
    for (number, record) in written.iter().enumerate().step_by(997) {
        assert_eq!(record["raw"].as_str().unwrap(), site.producer.event(number as u64));
    }
}

#[test]
fn a_sink_that_hangs_is_reported_and_does_not_keep_the_daemon_from_ending() {
    if !machine::are_there(&[CC]) {
        return;
    }
    let site = Site::new();
    let arm = site.path("arm");
    let mut command = auditgate();
    command
        .args(["serve", "--config"])
        .arg(site.path("config.toml"))
        .env("LD_PRELOAD", preloaded())
        .env("FAULT_CALL", "sync")
        .env("FAULT_PATH", "*/verified.log")
        .env("FAULT_MODE", "hung")
        .env("FAULT_ERRNO", "EIO")
        .env("FAULT_ARM", &arm);
    let daemon = Daemon::start_by(&site, command);
    let events = site.producer.events(0..20);
    daemon.deliver(&events[..10]);
    daemon.settle();
    std::fs::write(&arm, "").unwrap();
    daemon.deliver(&events[10..]);
    daemon.says("the sink is stuck");
    let ready = daemon.ask("/readyz");
    assert_eq!(ready.status, 503);
    assert!(String::from_utf8(ready.body).unwrap().contains("sink verified"));
    daemon.signal("TERM");
    let log = daemon.log_at_end();
    assert!(log.iter().any(|line| line.contains("left behind")), "{log:?}");

    let daemon = Daemon::start(&site);
    daemon.settle();
    daemon.terminate();
    assert_eq!(site.verified(), events);
}
