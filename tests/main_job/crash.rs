//! `kill -9` at any moment loses no acknowledged event and repeats none.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use rand::RngExt as _;

use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::database::{assert_intact, raw_events};
use crate::harness::machine::{self, ReservedPort};
use crate::harness::records::objects;
use crate::harness::rsyslog::{self, Rsyslog};
use crate::harness::site::{PATH, Site, sink, sqlite_sink, syslog_sink, whole_lines};
use crate::harness::{body, gzip, wait_until};

const CONNECTIONS: u32 = 4;

/// Number of kills of each test: 50, or what `AUDITGATE_TESTS_KILLS` says.
fn rounds() -> u32 {
    std::env::var("AUDITGATE_TESTS_KILLS").map_or(50, |rounds| rounds.parse().unwrap())
}

/// What was posted, and which batches were acknowledged.
#[derive(Default)]
struct Record {
    posted: HashSet<String>,
    acknowledged: Vec<Vec<String>>,
    without_answer: Vec<Vec<String>>,
}

/// Posts batches on one connection until it breaks.
fn stream(daemon: &Daemon<'_>, next: &AtomicU64, record: &Mutex<Record>) {
    let Ok(mut client) = daemon.try_connect() else { return };
    loop {
        let size = rand::rng().random_range(1..=40);
        let first = next.fetch_add(size, Ordering::Relaxed);
        let batch = daemon.site.producer.events(first..first + size);
        let bytes = gzip(&body(&batch));
        record.lock().unwrap().posted.extend(batch.iter().cloned());
        let answer = client.try_post(PATH, Some("application/gzip"), &bytes);
        let mut record = record.lock().unwrap();
        match answer {
            Ok(answer) => {
                assert_eq!(Receipt::of(&answer).accepted, size, "{answer:?}");
                record.acknowledged.push(batch);
            }
            Err(_) => {
                record.without_answer.push(batch);
                return;
            }
        }
    }
}

#[test]
fn kills_lose_nothing_and_repeat_nothing() {
    let site = kill_again_and_again(["", ""], |_, _| ());
    assert_eq!(site.rotated("verified.log").len(), 0);
}

#[test]
fn kills_around_rotations_lose_nothing_and_repeat_nothing() {
    let raw = "rotate = { size = \"100KiB\" }\n";
    let json = "rotate = { size = \"150KiB\" }\nfsync = \"interval\"\nfsync_interval = \"50ms\"\n";
    let site = kill_again_and_again([raw, json], |_, _| ());
    for (name, size) in [("verified.log", 100 << 10), ("events.jsonl", 150 << 10)] {
        let rotated = site.rotated(name);
        assert!(rotated.len() > 10, "only {} rotations", rotated.len());
        for file in rotated {
            // After a crash the interrupted write is completed in the same file, which may exceed
            // the size by one chunk.
            assert!(site.read(&file).len() <= size * 2, "{file} is too large");
        }
    }
}

#[test]
fn kills_while_files_are_renamed_lose_nothing_and_repeat_nothing() {
    let renamed = AtomicU64::new(0);
    kill_again_and_again(["", "fsync = \"interval\"\n"], |site, round| {
        let name = if round % 2 == 0 { "verified.log" } else { "events.jsonl" };
        let number = renamed.fetch_add(1, Ordering::Relaxed);
        // The file may be missing if it was renamed just before the last kill.
        let _ = std::fs::rename(site.path(name), site.path(format!("{name}.{number:06}")));
    });
}

#[test]
fn kills_with_every_kind_of_sink_lose_nothing() {
    if !machine::are_there(&rsyslog::NEEDS) {
        return;
    }
    let port = ReservedPort::new();
    let address = format!("tls://localhost:{}", port.number());
    let more = sqlite_sink("search.db", "\"verified\"") + &syslog_sink(&address, "ca = \"ca.pem\"\n");
    let server = OnceLock::new();
    let site = kill_again_and_again(["rotate = { size = \"300KiB\" }\n", &more], |site, _| {
        server.get_or_init(|| Rsyslog::start(site, &port));
    });
    let verified = site.verified();

    let database = rusqlite::Connection::open(site.path("search.db")).unwrap();
    assert_intact(&database);
    assert!(
        raw_events(&database) == verified,
        "the database has other events than the file, or in another order"
    );

    let received = wait_until("rsyslog has every event", || {
        let received = whole_lines(&site.read("received"));
        let known: HashSet<&String> = received.iter().collect();
        let missing = verified.iter().filter(|event| !known.contains(event)).count();
        if missing == 0 { Ok(received) } else { Err(format!("{missing} are missing")) }
    });
    let known: HashSet<&String> = verified.iter().collect();
    assert!(
        received.iter().all(|message| known.contains(message)),
        "rsyslog has a message that was never posted"
    );
    eprintln!("rsyslog has {} messages for {} events", received.len(), verified.len());
}

/// Kills the daemon repeatedly under a stream of posts, disturbs its files in between, and checks
/// the files at the end.
fn kill_again_and_again(more: [&str; 2], disturb: impl Fn(&Site, u32) + Sync) -> Site {
    let site = Site::new().sinks(
        &[
            sink("verified", "raw", "\"verified\""),
            more[0].to_owned(),
            sink("events", "json", "\"verified\""),
            more[1].to_owned(),
            sink("quarantine", "json", "\"quarantine\""),
        ]
        .concat(),
    );
    let (next, record) = (AtomicU64::new(0), Mutex::new(Record::default()));
    // Maximum of half a round's time.
    let mut microseconds = 125_000;
    for round in 0..rounds() {
        let daemon = Daemon::start(&site);
        let moment = || Duration::from_micros(rand::rng().random_range(0..microseconds));
        std::thread::scope(|scope| {
            let _killed = daemon.kill_on_drop();
            for _ in 0..CONNECTIONS {
                scope.spawn(|| stream(&daemon, &next, &record));
            }
            // Varies the moments; the test waits for nothing here.
            std::thread::sleep(moment());
            disturb(&site, round);
            std::thread::sleep(moment());
        });
        daemon.kill9();
        // A slow machine gets more time.
        if record.lock().unwrap().acknowledged.len() < 4 * (round as usize + 1) {
            microseconds = (microseconds * 2).min(8_000_000);
        }
    }

    let mut record = record.into_inner().unwrap();
    let answered = record.acknowledged.len();
    // Batches without an answer are sent again. Some of them were committed and some were not.
    let daemon = Daemon::start(&site);
    daemon.settle();
    check(&site, &record);
    let (mut accepted, mut duplicates) = (0, 0);
    for batch in std::mem::take(&mut record.without_answer) {
        let receipt = daemon.deliver(&batch);
        assert!(
            receipt.accepted == 0 || receipt.duplicates == 0,
            "a part of a batch had been committed: {receipt:?}"
        );
        accepted += receipt.accepted;
        duplicates += receipt.duplicates;
        record.acknowledged.push(batch);
    }
    daemon.settle();
    daemon.terminate();
    check(&site, &record);
    assert_eq!(site.verified().len(), record.posted.len());
    assert_eq!(site.read("quarantine.jsonl"), b"");
    eprintln!(
        "{answered} batches got a 200; {} events in all; of those sent again without an answer {accepted} were new, \
         {duplicates} known",
        record.posted.len()
    );
    assert!(answered > rounds() as usize, "too few batches between the kills");
    site
}

/// Checks that every acknowledged event is in both files once, that batches are whole, and that
/// nothing else is there.
fn check(site: &Site, record: &Record) {
    let raw = site.verified();
    let from_json: Vec<String> = objects(&site.with_rotated("events.jsonl"))
        .into_iter()
        .map(|record| record["raw"].as_str().unwrap().to_owned())
        .collect();
    assert!(raw == from_json, "both sinks have the same events in the same order");
    let mut times: BTreeMap<&str, u32> = BTreeMap::new();
    for line in &raw {
        assert!(record.posted.contains(line), "never posted: {line}");
        *times.entry(line).or_default() += 1;
    }
    assert!(times.values().all(|times| *times == 1), "an event was delivered twice");
    for batch in &record.acknowledged {
        assert!(
            batch.iter().all(|line| times.contains_key(line.as_str())),
            "an acknowledged event is missing"
        );
    }
    for batch in &record.without_answer {
        let there = batch.iter().filter(|line| times.contains_key(line.as_str())).count();
        assert!(there == 0 || there == batch.len(), "{there} of {} events of a batch", batch.len());
    }
}
