//! A sink that does not keep up: with `hold` batches are refused until it has caught up, with
//! `skip` it loses the oldest events.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::RngExt as _;

use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::machine::ReservedPort;
use crate::harness::records::quarantine;
use crate::harness::site::{PATH, Site, lines, raw_sinks, sink, syslog_sink, whole_lines};
use crate::harness::syslog::SyslogServer;
use crate::harness::{body, wait_until, without_repeats};

const BACKLOG: &str = "backlog = \"256KiB\"";

/// Number of events in a batch, which has about 5 KB.
const BATCH: u64 = 10;
const BATCH_LINES: usize = 10;

/// Returns the table of a syslog sink whose server is at a port.
fn siem(port: &ReservedPort, when_full: &str) -> String {
    let address = format!("tcp://127.0.0.1:{}", port.number());
    syslog_sink(&address, &format!("when_full = \"{when_full}\"\n"))
}

/// Returns a site with a small backlog, a raw file and a quarantine besides these sinks.
fn site(more: &str) -> Site {
    Site::new().limits(BACKLOG).sinks(&(raw_sinks() + more))
}

/// Waits until the daemon is not ready because of this condition.
fn wait_until_unready(daemon: &Daemon<'_>, condition: &str) {
    daemon.wait_until_unready(&format!("\"condition\":\"{condition}\""));
}

/// Posts batches that must all be accepted, no faster than the sink `verified` can write.
fn post_all(daemon: &Daemon<'_>, events: &[String]) {
    for (posted, batch) in events.chunks(BATCH_LINES).enumerate() {
        assert_eq!(daemon.deliver_plain(batch).accepted, batch.len() as u64);
        if posted % 8 == 0 {
            wait_until("the working sink has delivered everything", || {
                match daemon.sink_metric("pending_events", "verified") {
                    0 => Ok(()),
                    pending => Err(pending.to_string()),
                }
            });
        }
    }
}

/// Checks that the lines are some of the events, in order, each once.
fn assert_part(lines: &[String], events: &[String]) {
    let mut rest = events.iter();
    for line in lines {
        assert!(rest.any(|event| event == line), "out of order, repeated, or never posted: {line}");
    }
}

#[test]
fn with_hold_a_dead_sink_refuses_batches_until_it_recovers() {
    let port = ReservedPort::new();
    let site = site(&siem(&port, "hold"));
    let daemon = Daemon::start(&site);
    let mut taken = Vec::new();
    let refused = loop {
        let batch = site.producer.events(taken.len() as u64..taken.len() as u64 + BATCH);
        let answer = daemon.post(None, &body(&batch));
        if answer.status != 200 {
            answer.assert_retry_after_30_s();
            break batch;
        }
        taken.extend(batch);
        assert!(taken.len() < 2000, "the backlog does not fill up");
    };
    assert!(taken.len() > 300, "{}", taken.len());
    wait_until_unready(&daemon, "backlog");
    wait_until_unready(&daemon, "sink siem");
    // Only this sink is stuck.
    wait_until("the other sink has delivered everything", || {
        let found = whole_lines(&site.read("verified.log")).len();
        if found == taken.len() { Ok(()) } else { Err(found.to_string()) }
    });

    let server = SyslogServer::start(&port);
    wait_until("batches are accepted again", || match daemon.post(None, &body(&refused)) {
        answer if answer.status == 200 => Ok(()),
        answer => Err(answer.status.to_string()),
    });
    taken.extend(refused);
    daemon.wait_until_ready();
    // The backlog goes out in about 60 pieces with a second between them: two waits, not one.
    wait_until("half of it is delivered", || {
        let pending = daemon.sink_metric("pending_events", "siem");
        if pending <= taken.len() as u64 / 2 { Ok(()) } else { Err(pending.to_string()) }
    });
    daemon.settle();
    assert_eq!(daemon.sink_metric("skipped_events_total", "siem"), 0);
    daemon.terminate();
    assert!(site.verified() == taken, "the file has every event once, in order");
    let received = wait_until("the server has every event", || {
        let received = without_repeats(server.messages());
        if received.len() == taken.len() { Ok(received) } else { Err(received.len().to_string()) }
    });
    assert!(received == taken, "the server has every event, in order");
}

#[test]
fn with_skip_a_dead_sink_refuses_no_batch_and_gets_the_newest_events() {
    let port = ReservedPort::new();
    let site = site(&siem(&port, "skip"));
    let daemon = Daemon::start(&site);
    let start = Instant::now();
    let events = site.producer.events(0..3000);
    post_all(&daemon, &events);
    wait_until_unready(&daemon, "sink siem");
    let (skipped, pending) =
        (daemon.sink_metric("skipped_events_total", "siem"), daemon.sink_metric("pending_events", "siem"));
    assert!(skipped > 1500 && skipped + pending == 3000, "{skipped} {pending}");
    let warnings = wait_until("the loss is logged", || {
        let log = daemon.log();
        let count = log.iter().filter(|line| line.contains("code=\"sink-events-skipped\"")).count();
        if count > 0 { Ok(count as u64) } else { Err("not yet".to_owned()) }
    });
    assert!(warnings <= start.elapsed().as_secs() / 5 + 1, "{warnings} warnings");

    let server = SyslogServer::start(&port);
    daemon.settle();
    daemon.wait_until_ready();
    let delivered = daemon.sink_metric("events_total", "siem");
    assert_eq!(delivered + daemon.sink_metric("skipped_events_total", "siem"), 3000);
    assert_eq!(daemon.sink_metric("skipped_events_total", "verified"), 0);
    // The losses in the log add up to the metric.
    daemon.signal("TERM");
    let log = daemon.log_at_end();
    let logged: u64 = log
        .iter()
        .filter(|line| line.contains("code=\"sink-events-skipped\""))
        .map(|line| {
            let rest = line.split_once("events=").unwrap().1;
            rest.split_whitespace().next().unwrap().parse::<u64>().unwrap()
        })
        .sum();
    assert_eq!(logged, skipped);
    assert!(site.verified() == events, "the other sink has every event once, in order");
    let received = wait_until("the server has what was delivered", || {
        let received = without_repeats(server.messages());
        if received.len() as u64 == delivered { Ok(received) } else { Err(received.len().to_string()) }
    });
    assert_part(&received, &events);
    // Apart from those that may have been in flight, these are the newest.
    let newest = received.len() - 60;
    assert!(received[60..] == events[events.len() - newest..], "not the newest");
}

/// Keeps the sink `slow` from writing: its file is renamed, and a directory takes its place.
fn block(site: &Site, round: u32) {
    // The file may be missing: the daemon may not have created it before the last kill.
    let _ = std::fs::rename(site.path("slow.log"), site.path(format!("slow.log.{round:03}")));
    std::fs::create_dir(site.path("slow.log")).unwrap();
}

fn slow(more: &str) -> String {
    format!("{}when_full = \"skip\"\n{more}", sink("slow", "raw", "\"verified\""))
}

#[test]
fn with_skip_a_file_has_every_event_it_did_not_lose_once() {
    let site = site(&slow(""));
    std::fs::create_dir(site.path("slow.log")).unwrap();
    let daemon = Daemon::start(&site);
    let events = site.producer.events(0..3000);
    post_all(&daemon, &events[..2000]);
    wait_until_unready(&daemon, "sink slow");
    let skipped = daemon.sink_metric("skipped_events_total", "slow");
    assert!(skipped > 1000, "{skipped}");
    std::fs::remove_dir(site.path("slow.log")).unwrap();
    daemon.settle();
    post_all(&daemon, &events[2000..]);
    daemon.settle();
    daemon.wait_until_ready();
    assert_eq!(daemon.sink_metric("skipped_events_total", "slow"), skipped, "nothing more is lost");
    let delivered = daemon.sink_metric("events_total", "slow");
    daemon.terminate();
    assert_eq!(delivered + skipped, 3000);
    let written = lines(&site.read("slow.log"));
    assert_eq!(written.len() as u64, delivered);
    assert_part(&written, &events);
    assert!(site.verified() == events, "the other sink has every event once, in order");
}

/// Posts batches, each on a new connection, until the daemon exits.
fn stream(daemon: &Daemon<'_>, next: &AtomicU64) {
    while let Ok(mut client) = daemon.try_connect() {
        let first = next.fetch_add(BATCH, Ordering::Relaxed);
        let batch = body(&daemon.site.producer.events(first..first + BATCH));
        if let Ok(answer) = client.try_post(PATH, None, &batch)
            && answer.status != 200
        {
            // The sink with `hold` is behind for a moment: the backlog is small.
            answer.assert_retry_after_30_s();
        }
    }
}

#[test]
fn with_skip_kills_tear_and_repeat_nothing() {
    const ROUNDS: u32 = 30;
    // With positions that are recorded soon after the write, and with positions that lag.
    for more in ["", "fsync = \"interval\"\nfsync_interval = \"100ms\"\n"] {
        let site = site(&slow(more)).edit(BACKLOG, "backlog = \"96KiB\"");
        let next = AtomicU64::new(0);
        for round in 0..ROUNDS {
            // The backlog fills up, in about 20 batches, while the file with the interrupted write
            // is out of reach.
            block(&site, round);
            let daemon = Daemon::start(&site);
            let first = next.load(Ordering::Relaxed);
            std::thread::scope(|scope| {
                let _killed = daemon.kill_on_drop();
                scope.spawn(|| stream(&daemon, &next));
                wait_until("the backlog has been filled", || {
                    match (next.load(Ordering::Relaxed) - first) / BATCH {
                        posted if posted >= 30 => Ok(()),
                        posted => Err(format!("{posted} batches")),
                    }
                });
                std::fs::remove_dir(site.path("slow.log")).unwrap();
                wait_until("the sink writes", || match site.read("slow.log").len() {
                    0 => Err("nothing yet".to_owned()),
                    _ => Ok(()),
                });
                // Varies the moment of the kill; the test waits for nothing here.
                std::thread::sleep(Duration::from_micros(rand::rng().random_range(0..50_000)));
            });
            daemon.kill9();
        }
        let daemon = Daemon::start(&site);
        let first = next.load(Ordering::Relaxed);
        let last = site.producer.events(first..first + BATCH);
        assert_eq!(daemon.deliver_plain(&last).accepted, BATCH);
        daemon.settle();
        daemon.terminate();
        let (all, written) = (site.verified(), lines(&site.with_rotated("slow.log")));
        assert_part(&written, &all);
        assert!(written.ends_with(&last) && all.ends_with(&last));
        eprintln!("{} of {} events are in the file", written.len(), all.len());
        assert!(written.len() < all.len(), "nothing was skipped");
        assert!(written.len() > all.len() / 100, "almost everything was skipped");
    }
}

/// Returns a batch of unsigned lines, with about 5 KB.
fn unsigned_batch(number: u32) -> Vec<u8> {
    let unsigned = |text: String| format!("{{\"text\":\"{text}\"}}");
    body(&[unsigned(format!("{number}").repeat(1000)), unsigned(format!("{number:05}").repeat(500))])
}

#[test]
fn rejected_lines_fill_their_share_of_the_backlog_and_no_more() {
    let site = site("");
    std::fs::create_dir(site.path("quarantine.jsonl")).unwrap();
    let daemon = Daemon::start(&site);
    let mut sent = Vec::new();
    let refused = loop {
        let number = u32::try_from(sent.len()).unwrap();
        let answer = daemon.post(None, &unsigned_batch(number));
        if answer.status != 200 {
            answer.assert_retry_after_30_s();
            break unsigned_batch(number);
        }
        sent.push(unsigned_batch(number));
        assert!(sent.len() < 100);
    };
    // A quarter of the backlog.
    assert!((10..40).contains(&sent.len()), "{}", sent.len());
    wait_until_unready(&daemon, "quarantine");
    let mixed = [body(&site.producer.events(500..501)), b"not an event\n".to_vec()].concat();
    daemon.post(None, &mixed).assert_retry_after_30_s();
    let events = site.producer.events(0..400);
    for batch in events.chunks(BATCH_LINES) {
        assert_eq!(daemon.deliver_plain(batch).accepted, BATCH);
    }
    std::fs::remove_dir(site.path("quarantine.jsonl")).unwrap();
    wait_until("rejected lines are accepted again", || match daemon.post(None, &refused) {
        answer if answer.status == 200 => Ok(()),
        answer => Err(answer.status.to_string()),
    });
    sent.push(refused);
    let receipt = Receipt::of(&daemon.post(None, &mixed));
    assert_eq!((receipt.accepted, receipt.quarantined), (1, 1));
    sent.push(b"not an event\n".to_vec());
    daemon.wait_until_ready();
    daemon.settle();
    assert_eq!(site.verified().len(), 401);
    let raws: Vec<_> = quarantine(&site.read("quarantine.jsonl")).into_iter().map(|line| line.raw).collect();
    assert!(body(&raws) == sent.concat(), "every rejected line once, in order");
}

#[test]
fn with_skip_rejected_lines_refuse_no_batch() {
    let site = Site::new().limits(BACKLOG).sinks(&(raw_sinks() + "when_full = \"skip\"\n"));
    std::fs::create_dir(site.path("quarantine.jsonl")).unwrap();
    let daemon = Daemon::start(&site);
    for number in 0..200 {
        assert_eq!(Receipt::of(&daemon.post(None, &unsigned_batch(number))).quarantined, 2);
    }
    let skipped = daemon.sink_metric("skipped_events_total", "quarantine");
    assert!(skipped > 300, "{skipped}");
    assert_eq!(skipped + daemon.sink_metric("pending_events", "quarantine"), 400);
    assert_eq!(daemon.deliver(&site.producer.events(0..10)).accepted, 10);
    std::fs::remove_dir(site.path("quarantine.jsonl")).unwrap();
    daemon.settle();
    let delivered = daemon.sink_metric("events_total", "quarantine");
    assert_eq!(delivered + daemon.sink_metric("skipped_events_total", "quarantine"), 400);
    daemon.terminate();
    let raws: Vec<_> = quarantine(&site.read("quarantine.jsonl")).into_iter().map(|line| line.raw).collect();
    assert_eq!(raws.len() as u64, delivered);
    assert!(
        (0..200).map(unsigned_batch).collect::<Vec<_>>().concat().ends_with(&body(&raws[10..])),
        "the newest"
    );
    assert_eq!(site.verified().len(), 10);
}
