//! What happens when a sink does not keep up: `hold` refuses batches until it has, `skip` lets it lose its oldest.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::RngExt as _;

use crate::harness::client::{Answer, request};
use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::machine::ReservedPort;
use crate::harness::records::quarantine;
use crate::harness::site::{PATH, Site, TOKEN, lines, sink, whole_lines};
use crate::harness::syslog::SyslogServer;
use crate::harness::{PATIENCE, body, wait_until};

const BACKLOG: &str = "backlog = \"256KiB\"";

/// Events in a batch: about 5 KB.
const BATCH: u64 = 10;
const BATCH_LINES: usize = 10;

/// A syslog sink in front of a port.
fn siem(port: &ReservedPort, when_full: &str) -> String {
    let port = port.number();
    format!(
        "[sinks.siem]\ntype = \"syslog\"\naddress = \"tcp://127.0.0.1:{port}\"\nwhen_full = \"{when_full}\"\n"
    )
}

/// A site whose ledger is soon full, with a file and a quarantine besides the given sinks.
fn site(more: &str) -> Site {
    let sinks = [
        sink("verified", "raw", "\"verified\""),
        sink("quarantine", "json", "\"quarantine\""),
        more.to_owned(),
    ];
    Site::new().limits(BACKLOG).sinks(&sinks.concat())
}

fn come_back_in_half_a_minute(answer: &Answer) {
    assert_eq!((answer.status, answer.header("retry-after")), (429, Some("30")), "{answer:?}");
}

/// Waits until the daemon is not ready for this reason.
fn unready(daemon: &Daemon<'_>, condition: &str) {
    wait_until(PATIENCE, &format!("`{condition}` makes the daemon unready"), || {
        let answer = daemon.ask("/readyz");
        let said = String::from_utf8(answer.body).unwrap();
        let named = said.contains(&format!("\"condition\":\"{condition}\""));
        if answer.status == 503 && named { Ok(()) } else { Err(said) }
    });
}

fn ready(daemon: &Daemon<'_>) {
    wait_until(PATIENCE, "the daemon is ready", || match daemon.ask("/readyz").status {
        200 => Ok(()),
        status => Err(status.to_string()),
    });
}

/// A number of a sink's metrics.
fn number(daemon: &Daemon<'_>, family: &str, sink: &str) -> u64 {
    daemon.metrics()[&format!("auditgate_sink_{family}{{sink=\"{sink}\"}}")].parse().unwrap()
}

/// Posts batches that must all be taken, no faster than the sink `verified` can write.
fn post_all(daemon: &Daemon<'_>, events: &[String]) {
    for (posted, batch) in events.chunks(BATCH_LINES).enumerate() {
        assert_eq!(daemon.deliver_plain(batch).accepted, batch.len() as u64);
        if posted % 8 == 0 {
            wait_until(PATIENCE, "the sink that works has everything", || {
                match number(daemon, "pending_events", "verified") {
                    0 => Ok(()),
                    pending => Err(pending.to_string()),
                }
            });
        }
    }
}

/// The lines are some of the events, in their order, each once.
fn assert_part(lines: &[String], events: &[String]) {
    let mut rest = events.iter();
    for line in lines {
        assert!(rest.any(|event| event == line), "out of order, twice, or nobody's: {line}");
    }
}

/// Every line where it came first.
fn without_repeats(lines: Vec<String>) -> Vec<String> {
    let mut seen = HashSet::new();
    lines.into_iter().filter(|line| seen.insert(line.clone())).collect()
}

#[test]
fn a_dead_sink_that_holds_refuses_batches_until_it_is_back() {
    let port = ReservedPort::new();
    let site = site(&siem(&port, "hold"));
    let daemon = Daemon::start(&site);
    let mut taken = Vec::new();
    let refused = loop {
        let batch = site.producer.events(taken.len() as u64..taken.len() as u64 + BATCH);
        let answer = daemon.post(None, &body(&batch));
        if answer.status != 200 {
            come_back_in_half_a_minute(&answer);
            break batch;
        }
        taken.extend(batch);
        assert!(taken.len() < 2000, "the backlog does not fill up");
    };
    assert!(taken.len() > 300, "{}", taken.len());
    unready(&daemon, "backlog");
    unready(&daemon, "sink siem");
    // Only this one is stuck.
    wait_until(PATIENCE, "the other sink has everything", || {
        let found = whole_lines(&site.read("verified.log")).len();
        if found == taken.len() { Ok(()) } else { Err(found.to_string()) }
    });

    let server = SyslogServer::start(&port);
    wait_until(PATIENCE, "batches are taken again", || match daemon.post(None, &body(&refused)) {
        answer if answer.status == 200 => Ok(()),
        answer => Err(answer.status.to_string()),
    });
    taken.extend(refused);
    ready(&daemon);
    daemon.settle();
    assert_eq!(number(&daemon, "skipped_events_total", "siem"), 0);
    daemon.terminate();
    assert!(site.verified() == taken, "the file has every event once, in order");
    let received = wait_until(PATIENCE, "the server has every event", || {
        let received = without_repeats(server.messages());
        if received.len() == taken.len() { Ok(received) } else { Err(received.len().to_string()) }
    });
    assert!(received == taken, "the server has every event, in order");
}

#[test]
fn a_dead_sink_that_skips_refuses_nobody_and_gets_the_newest() {
    let port = ReservedPort::new();
    let site = site(&siem(&port, "skip"));
    let daemon = Daemon::start(&site);
    let start = Instant::now();
    let events = site.producer.events(0..3000);
    post_all(&daemon, &events);
    unready(&daemon, "sink siem");
    let (skipped, pending) =
        (number(&daemon, "skipped_events_total", "siem"), number(&daemon, "pending_events", "siem"));
    assert!(skipped > 1500 && skipped + pending == 3000, "{skipped} {pending}");
    let warnings = wait_until(PATIENCE, "the log says so", || {
        let log = daemon.log();
        let count = log.iter().filter(|line| line.contains("lost its oldest events")).count();
        if count > 0 { Ok(count as u64) } else { Err("not yet".to_owned()) }
    });
    assert!(warnings <= start.elapsed().as_secs() / 5 + 1, "{warnings} warnings");

    let server = SyslogServer::start(&port);
    daemon.settle();
    ready(&daemon);
    let delivered = number(&daemon, "events_total", "siem");
    assert_eq!(delivered + number(&daemon, "skipped_events_total", "siem"), 3000);
    assert_eq!(number(&daemon, "skipped_events_total", "verified"), 0);
    // All the counts of losses in the log together are the loss.
    let log = {
        daemon.signal("TERM");
        daemon.log_at_end()
    };
    let said: u64 = log
        .iter()
        .filter(|line| line.contains("lost its oldest events"))
        .map(|line| {
            let rest = line.split_once("events=").unwrap().1;
            rest.split_whitespace().next().unwrap().parse::<u64>().unwrap()
        })
        .sum();
    assert_eq!(said, skipped);
    assert!(site.verified() == events, "the other sink has every event once, in order");
    let received = wait_until(PATIENCE, "the server has what was delivered", || {
        let received = without_repeats(server.messages());
        if received.len() as u64 == delivered { Ok(received) } else { Err(received.len().to_string()) }
    });
    assert_part(&received, &events);
    // Apart from what may have been on its way, these are the newest.
    let newest = received.len() - 60;
    assert!(received[60..] == events[events.len() - newest..], "not the newest");
}

/// The sink `slow` cannot write: its file is renamed, and a directory is in its place.
fn block(site: &Site, round: u32) {
    // It need not be there: the daemon may not have made it anew before the last kill.
    let _ = std::fs::rename(site.path("slow.log"), site.path(format!("slow.log.{round:03}")));
    std::fs::create_dir(site.path("slow.log")).unwrap();
}

fn slow(more: &str) -> String {
    format!("{}when_full = \"skip\"\n{more}", sink("slow", "raw", "\"verified\""))
}

#[test]
fn a_file_that_skips_has_what_it_did_not_lose_once() {
    let site = site(&slow(""));
    std::fs::create_dir(site.path("slow.log")).unwrap();
    let daemon = Daemon::start(&site);
    let events = site.producer.events(0..3000);
    post_all(&daemon, &events[..2000]);
    unready(&daemon, "sink slow");
    let skipped = number(&daemon, "skipped_events_total", "slow");
    assert!(skipped > 1000, "{skipped}");
    std::fs::remove_dir(site.path("slow.log")).unwrap();
    daemon.settle();
    post_all(&daemon, &events[2000..]);
    daemon.settle();
    ready(&daemon);
    assert_eq!(number(&daemon, "skipped_events_total", "slow"), skipped, "nothing is lost without need");
    let delivered = number(&daemon, "events_total", "slow");
    daemon.terminate();
    assert_eq!(delivered + skipped, 3000);
    let written = lines(&site.read("slow.log"));
    assert_eq!(written.len() as u64, delivered);
    assert_part(&written, &events);
    assert!(site.verified() == events, "the other sink has every event once, in order");
}

/// Posts batches until the daemon is gone, each until it is taken or its answer is lost.
fn stream(daemon: &Daemon<'_>, next: &AtomicU64) {
    while let Ok(mut client) = daemon.try_connect() {
        let first = next.fetch_add(BATCH, Ordering::Relaxed);
        let batch = body(&daemon.site.producer.events(first..first + BATCH));
        let length = batch.len().to_string();
        let headers = [("Authorization", TOKEN), ("Content-Length", &length)];
        let sent = client.try_send(&request("POST", PATH, &headers, &batch));
        if let Ok(answer) = sent.and_then(|()| client.try_answer())
            && answer.status != 200
        {
            // The sink that holds is behind for a moment: the backlog is small.
            come_back_in_half_a_minute(&answer);
        }
    }
}

#[test]
fn kills_tear_and_double_nothing_where_a_sink_skips() {
    const ROUNDS: u32 = 30;
    // When the position is noted soon after the write, and when it lags.
    for more in ["", "fsync = \"interval\"\nfsync_interval = \"100ms\"\n"] {
        let site = site(&slow(more)).edit(BACKLOG, "backlog = \"96KiB\"");
        let next = AtomicU64::new(0);
        for round in 0..ROUNDS {
            // What the last kill interrupted is out of reach while the backlog fills up, for about 20 batches.
            block(&site, round);
            let daemon = Daemon::start(&site);
            let first = next.load(Ordering::Relaxed);
            std::thread::scope(|scope| {
                let _killed = daemon.kill_on_drop();
                scope.spawn(|| stream(&daemon, &next));
                wait_until(PATIENCE, "the backlog has been filled", || {
                    match (next.load(Ordering::Relaxed) - first) / BATCH {
                        posted if posted >= 30 => Ok(()),
                        posted => Err(format!("{posted} batches")),
                    }
                });
                std::fs::remove_dir(site.path("slow.log")).unwrap();
                wait_until(PATIENCE, "the sink writes", || match site.read("slow.log").len() {
                    0 => Err("nothing yet".to_owned()),
                    _ => Ok(()),
                });
                // Not a wait for anything: the moments are what varies.
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
        assert!(written.len() < all.len(), "nothing was skipped: too little happened");
        assert!(written.len() > all.len() / 100, "almost everything was skipped");
    }
}

/// Lines that nobody signed, about 5 KB a batch.
fn rubbish(number: u32) -> Vec<u8> {
    let unsigned = |text: String| format!("{{\"text\":\"{text}\"}}");
    body(&[unsigned(format!("{number}").repeat(1000)), unsigned(format!("{number:05}").repeat(500))])
}

#[test]
fn rubbish_fills_its_share_and_no_more() {
    let site = site("");
    std::fs::create_dir(site.path("quarantine.jsonl")).unwrap();
    let daemon = Daemon::start(&site);
    let mut sent = Vec::new();
    let refused = loop {
        let number = u32::try_from(sent.len()).unwrap();
        let answer = daemon.post(None, &rubbish(number));
        if answer.status != 200 {
            come_back_in_half_a_minute(&answer);
            break rubbish(number);
        }
        sent.push(rubbish(number));
        assert!(sent.len() < 100);
    };
    // A quarter of the backlog.
    assert!((10..40).contains(&sent.len()), "{}", sent.len());
    unready(&daemon, "quarantine");
    let mixed = [body(&site.producer.events(500..501)), b"rubbish\n".to_vec()].concat();
    come_back_in_half_a_minute(&daemon.post(None, &mixed));
    let events = site.producer.events(0..400);
    for batch in events.chunks(BATCH_LINES) {
        assert_eq!(daemon.deliver_plain(batch).accepted, BATCH);
    }
    std::fs::remove_dir(site.path("quarantine.jsonl")).unwrap();
    wait_until(PATIENCE, "rubbish is taken again", || match daemon.post(None, &refused) {
        answer if answer.status == 200 => Ok(()),
        answer => Err(answer.status.to_string()),
    });
    sent.push(refused);
    let receipt = Receipt::of(&daemon.post(None, &mixed));
    assert_eq!((receipt.accepted, receipt.quarantined), (1, 1));
    sent.push(b"rubbish\n".to_vec());
    ready(&daemon);
    daemon.settle();
    assert_eq!(site.verified().len(), 401);
    let raws: Vec<_> = quarantine(&site.read("quarantine.jsonl")).into_iter().map(|line| line.raw).collect();
    assert!(body(&raws) == sent.concat(), "every refused line once, in order");
}

#[test]
fn rubbish_for_a_sink_that_skips_refuses_nobody() {
    let site = Site::new().limits(BACKLOG).sinks(
        &[
            sink("verified", "raw", "\"verified\""),
            sink("quarantine", "json", "\"quarantine\""),
            "when_full = \"skip\"\n".to_owned(),
        ]
        .concat(),
    );
    std::fs::create_dir(site.path("quarantine.jsonl")).unwrap();
    let daemon = Daemon::start(&site);
    for number in 0..200 {
        assert_eq!(Receipt::of(&daemon.post(None, &rubbish(number))).quarantined, 2);
    }
    let skipped = number(&daemon, "skipped_events_total", "quarantine");
    assert!(skipped > 300, "{skipped}");
    assert_eq!(skipped + number(&daemon, "pending_events", "quarantine"), 400);
    assert_eq!(daemon.deliver(&site.producer.events(0..10)).accepted, 10);
    std::fs::remove_dir(site.path("quarantine.jsonl")).unwrap();
    daemon.settle();
    let delivered = number(&daemon, "events_total", "quarantine");
    assert_eq!(delivered + number(&daemon, "skipped_events_total", "quarantine"), 400);
    daemon.terminate();
    let raws: Vec<_> = quarantine(&site.read("quarantine.jsonl")).into_iter().map(|line| line.raw).collect();
    assert_eq!(raws.len() as u64, delivered);
    assert!((0..200).map(rubbish).collect::<Vec<_>>().concat().ends_with(&body(&raws[10..])), "the newest");
    assert_eq!(site.verified().len(), 10);
}
