//! `kill -9` at any moment loses nothing that was promised and repeats nothing.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rand::RngExt as _;

use crate::harness::client::request;
use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::records::objects;
use crate::harness::site::{PATH, Site, TOKEN, lines, sink};
use crate::harness::{body, gzip};

const ROUNDS: u32 = 50;
const CONNECTIONS: u32 = 4;

/// What was posted, and which batches were promised.
#[derive(Default)]
struct Record {
    posted: HashSet<String>,
    promised: Vec<Vec<String>>,
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
        let length = bytes.len().to_string();
        let headers = [
            ("Authorization", TOKEN),
            ("Content-Type", "text/plain"),
            ("Content-Encoding", "application/gzip"),
            ("Content-Length", &length),
        ];
        record.lock().unwrap().posted.extend(batch.iter().cloned());
        let answer: io::Result<_> =
            client.try_send(&request("POST", PATH, &headers, &bytes)).and_then(|()| client.try_answer());
        let mut record = record.lock().unwrap();
        match answer {
            Ok(answer) => {
                assert_eq!(Receipt::of(&answer).accepted, size, "{answer:?}");
                record.promised.push(batch);
            }
            Err(_) => {
                record.without_answer.push(batch);
                return;
            }
        }
    }
}

#[test]
fn fifty_kills_lose_nothing_and_repeat_nothing() {
    let site = Site::new().sinks(
        &[
            sink("verified", "raw", "\"verified\""),
            sink("events", "json", "\"verified\""),
            sink("quarantine", "json", "\"quarantine\""),
        ]
        .concat(),
    );
    let (next, record) = (AtomicU64::new(0), Mutex::new(Record::default()));
    for _ in 0..ROUNDS {
        let daemon = Daemon::start(&site);
        std::thread::scope(|scope| {
            for _ in 0..CONNECTIONS {
                scope.spawn(|| stream(&daemon, &next, &record));
            }
            // Not a wait for anything: the moment of the kill is what varies.
            std::thread::sleep(Duration::from_micros(rand::rng().random_range(0..250_000)));
            daemon.signal("KILL");
        });
        daemon.kill9();
    }

    let mut record = record.into_inner().unwrap();
    let answered = record.promised.len();
    // Whoever got no answer sends again. Some of these batches were committed and some were not.
    let daemon = Daemon::start(&site);
    daemon.settle();
    check(&site, &record);
    let (mut accepted, mut duplicates) = (0, 0);
    for batch in std::mem::take(&mut record.without_answer) {
        let receipt = daemon.deliver(&batch);
        assert!(
            receipt.accepted == 0 || receipt.duplicates == 0,
            "half of a batch had been committed: {receipt:?}"
        );
        accepted += receipt.accepted;
        duplicates += receipt.duplicates;
        record.promised.push(batch);
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
    assert!(answered > ROUNDS as usize, "too little happened between the kills");
}

/// Every promised event is in both files once, batches are whole, and nothing else is there.
fn check(site: &Site, record: &Record) {
    let raw = site.verified();
    let from_json: Vec<String> = objects(&site.read("events.jsonl"))
        .into_iter()
        .map(|record| record["raw"].as_str().unwrap().to_owned())
        .collect();
    assert!(raw == from_json, "both sinks have the same events in the same order");
    let _ = lines(&site.read("events.jsonl"));
    let mut times: BTreeMap<&str, u32> = BTreeMap::new();
    for line in &raw {
        assert!(record.posted.contains(line), "nobody posted {line}");
        *times.entry(line).or_default() += 1;
    }
    assert!(times.values().all(|times| *times == 1), "an event was delivered twice");
    for batch in &record.promised {
        assert!(batch.iter().all(|line| times.contains_key(line.as_str())), "a promised event is missing");
    }
    for batch in &record.without_answer {
        let there = batch.iter().filter(|line| times.contains_key(line.as_str())).count();
        assert!(there == 0 || there == batch.len(), "{there} of {} events of a batch", batch.len());
    }
}
