//! A sink that is down or far behind: it delays no other sink, takes little memory, and gets every
//! event in the end.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::harness::daemon::{Daemon, Receipt, serve};
use crate::harness::fault::{self, Fault};
use crate::harness::machine::{self, ReservedPort};
use crate::harness::records::objects;
use crate::harness::rsyslog::{self, Rsyslog};
use crate::harness::site::{Site, lines, raw_sinks, sink, syslog_sink};
use crate::harness::{SetOnDrop, body, gzip, wait_until, without_repeats};

/// Number of events in a batch.
const BATCH: usize = 1000;

/// Returns a site with file sinks and a syslog sink.
fn site(port: &ReservedPort) -> Site {
    let address = format!("tls://localhost:{}", port.number());
    Site::new().sinks(&(raw_sinks() + &syslog_sink(&address, "ca = \"ca.pem\"\n")))
}

/// Posts bodies one after the other on one connection.
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
fn a_dead_syslog_server_delays_no_other_sink_and_gets_every_event_in_order() {
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
        // The server restarts after all of them.
        wait_until("the file has every event", || match daemon.sink_metric("pending_events", "verified") {
            0 => Ok(()),
            pending => Err(pending.to_string()),
        });
        assert_ne!(daemon.sink_metric("pending_events", "siem"), 0);
        let _server = Rsyslog::start(&site, &port);
        daemon.settle();
        drop(end);
        // The last event is the last line; earlier ones may have been sent twice.
        let last = body(&events[events.len() - 1..]);
        wait_until("rsyslog has written everything", || {
            let received = site.read("received");
            if received.ends_with(&last) { Ok(()) } else { Err(format!("{} bytes", received.len())) }
        });
    });
    let (lag, memory) = (most_lag.into_inner().unwrap(), most_memory.into_inner().unwrap());
    eprintln!(
        "{EVENTS} events without syslog: file lag at most {lag} s; memory {at_first} KiB, then {memory} KiB"
    );
    daemon.terminate();

    let received = lines(&site.read("received"));
    // At least once: a chunk that was in flight when the server stopped is sent again.
    let all = received.len();
    let received = without_repeats(received);
    let first_wrong = received.iter().zip(&events).position(|(received, event)| received != event);
    let what = format!("{all} lines, {} distinct; the first wrong one: {first_wrong:?}", received.len());
    assert!(received == events, "every event, in order: {what}");
    assert_eq!(site.verified(), events);
    assert!(memory < at_first + (32 << 10), "memory grew from {at_first} to {memory} KiB");
}

/// A backlog of 64 MiB, or as many bytes as `AUDITGATE_TESTS_BACKLOG` says. Neither the time of the
/// start nor that of new batches depends on its size.
#[test]
fn a_large_backlog_delays_neither_the_start_nor_new_batches() {
    let wanted: u64 =
        std::env::var("AUDITGATE_TESTS_BACKLOG").map_or(64 << 20, |bytes| bytes.parse().unwrap());
    let site = Site::new().sinks(&sink("all", "json", "[\"verified\", \"quarantine\"]"));
    // The sink cannot be opened.
    std::fs::create_dir(site.path("all.jsonl")).unwrap();
    let daemon = Daemon::start(&site);
    let mut posted = 0;
    let mut client = daemon.connect();
    while daemon.metric("auditgate_ledger_bytes") < wanted {
        // Uncompressed, so that the ledger stores them at full length.
        let batch = site.producer.events(posted..posted + 10_000);
        assert_eq!(Receipt::of(&client.post(None, &body(&batch))).accepted, 10_000);
        posted += 10_000;
    }
    daemon.kill9();

    let start = Instant::now();
    let daemon = Daemon::start(&site);
    let listening = start.elapsed();
    std::fs::remove_dir(site.path("all.jsonl")).unwrap();
    daemon.wait_until_ready();
    let ready = start.elapsed();
    let mut slowest = Duration::ZERO;
    let mut behind = Vec::new();
    let mut client = daemon.connect();
    let pending = || daemon.sink_metric("pending_events", "all");
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
    assert!(behind.len() > 3, "no batch was accepted while it caught up");
    let bytes = || daemon.metric("auditgate_ledger_bytes");
    // The ledger keeps the fingerprints, a quarter of free pages but at least 16 MiB, and SQLite's
    // log, whose file never shrinks.
    let fingerprints = posted * 48;
    let log = || std::fs::metadata(site.path("data/ledger.db-wal")).map_or(0, |log| log.len());
    let stays = || fingerprints / 3 * 4 + (16 << 20) + log();
    wait_until("the ledger shrinks again", || {
        let (left, stays) = (bytes(), stays());
        if left < stays { Ok(()) } else { Err(format!("{left} bytes, not {stays}")) }
    });
    daemon.terminate();
    let written = objects(&site.read("all.jsonl"));
    assert_eq!(written.len() as u64, posted);
    for (number, record) in written.iter().enumerate().step_by(997) {
        assert_eq!(record["raw"].as_str().unwrap(), site.producer.event(number as u64));
    }
}

#[test]
fn a_sink_that_hangs_is_reported_and_does_not_prevent_the_exit() {
    if !machine::are_there(&[fault::CC]) {
        return;
    }
    let site = Site::new();
    let arm = site.path("arm");
    let mut command = serve(&site);
    let fault = Fault { call: "sync", path: "*/verified.log", mode: "hung", error: "EIO" };
    fault.inject(&mut command, &arm);
    let daemon = Daemon::start_by(&site, command);
    let events = site.producer.events(0..20);
    daemon.deliver(&events[..10]);
    daemon.settle();
    std::fs::write(&arm, "").unwrap();
    daemon.deliver(&events[10..]);
    daemon.wait_for_log("code=\"sink-stuck\"");
    let ready = daemon.ask("/readyz");
    assert_eq!(ready.status, 503);
    assert!(String::from_utf8(ready.body).unwrap().contains("sink verified"));
    daemon.signal("TERM");
    let log = daemon.log_at_end();
    assert!(log.iter().any(|line| line.contains("code=\"sink-abandoned\"")), "{log:?}");

    let daemon = Daemon::start(&site);
    daemon.settle();
    daemon.terminate();
    assert_eq!(site.verified(), events);
}
