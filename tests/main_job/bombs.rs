//! Small bodies that become big ones, or much work.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::GzEncoder;

use crate::harness::client::request;
use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::records::quarantine;
use crate::harness::site::{PATH, Site};
use crate::harness::{body, gzip};

const MIB: usize = 1 << 20;
const DECODED: usize = 64 * MIB;

/// So many zeros as one gzip member, as small as it gets.
fn zeros(length: usize) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    let piece = vec![0; MIB];
    let mut left = length;
    while left > 0 {
        let now = left.min(MIB);
        encoder.write_all(&piece[..now]).unwrap();
        left -= now;
    }
    encoder.finish().unwrap()
}

/// Posts a body and returns the status, having checked that the daemon's peak of memory did not grow by twice
/// the decoded limit.
fn status_within_memory(daemon: &Daemon<'_>, what: &str, bytes: &[u8]) -> u16 {
    let before = daemon.memory("VmHWM:");
    let status = daemon.post(Some("gzip"), bytes).status;
    let grown = daemon.memory("VmHWM:") - before;
    eprintln!("{what}: {} bytes, status {status}, peak memory grew by {grown} KiB", bytes.len());
    assert!(grown < 2 * (DECODED as u64 / 1024), "{what}: peak memory grew by {grown} KiB");
    status
}

#[test]
fn a_bomb_is_refused_within_the_memory_that_a_batch_may_take() {
    let member = zeros(DECODED);
    let ten_gibibytes = member.repeat(160);
    assert!(ten_gibibytes.len() < 16 * MIB);

    // Inflation refuses it.
    let site = Site::new().limits("body = \"16MiB\"");
    let daemon = Daemon::start(&site);
    daemon.deliver(&site.producer.events(0..10));
    let one_more = [member.clone(), gzip(b"\0")].concat();
    assert_eq!(status_within_memory(&daemon, "64 MiB and a byte in two members", &one_more), 413);
    assert_eq!(status_within_memory(&daemon, "64 MiB and a byte", &zeros(DECODED + 1)), 413);
    assert_eq!(status_within_memory(&daemon, "10 GiB", &ten_gibibytes), 413);
    // gzip is undone once: what a bomb in a bomb holds is rubbish, not a second body.
    let nested = gzip(&ten_gibibytes);
    assert_eq!(status_within_memory(&daemon, "10 GiB in gzip in gzip", &nested), 200);
    assert_eq!(daemon.deliver(&site.producer.events(10..20)).accepted, 10);
    daemon.settle();
    assert_eq!(site.verified().len(), 20);
    drop(daemon);

    // By default its compressed size does.
    let site = Site::new();
    let daemon = Daemon::start(&site);
    assert_eq!(status_within_memory(&daemon, "10 GiB, default limits", &ten_gibibytes), 413);
    // Exactly at the limit it is a batch, of one line that is too long.
    let receipt = Receipt::of(&daemon.post(Some("gzip"), &member));
    assert_eq!(receipt, Receipt { quarantined: 1, ..Receipt::default() });
}

#[test]
fn sixty_four_bombs_at_once_are_refused_within_the_room() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    daemon.deliver(&site.producer.events(0..10));
    let member = zeros(DECODED);
    let bombs = [zeros(DECODED + 1), [member.as_slice(), &gzip(b"\0")].concat(), member.repeat(10)];
    let before = daemon.memory("VmHWM:");
    std::thread::scope(|scope| {
        for number in 0..64 {
            let (daemon, bomb) = (&daemon, &bombs[number % bombs.len()]);
            scope.spawn(move || assert_eq!(daemon.post(Some("gzip"), bomb).status, 413));
        }
    });
    let grown = daemon.memory("VmHWM:") - before;
    eprintln!("64 bombs: peak memory grew by {grown} KiB");
    assert!(grown < (64 + 256) * 1024, "peak memory grew by {grown} KiB");

    // Without a token nothing of them is read.
    let before = daemon.memory("VmHWM:");
    std::thread::scope(|scope| {
        for _ in 0..64 {
            let (daemon, length) = (&daemon, bombs[0].len().to_string());
            scope.spawn(move || {
                let mut client = daemon.connect();
                let headers = [
                    ("Authorization", "Bearer x"),
                    ("Content-Length", &length),
                    ("Content-Encoding", "gzip"),
                ];
                client.send(&request("POST", PATH, &headers, b""));
                assert_eq!(client.answer().status, 401);
            });
        }
    });
    assert!(daemon.memory("VmHWM:") - before < 32 * 1024);
    daemon.settle();
    assert_eq!(site.verified().len(), 10);
    assert_eq!(site.read("quarantine.jsonl"), b"");
}

#[test]
fn five_million_tiny_lines_are_refused() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(&b"a\n".repeat(5_000_000)).unwrap();
    let bytes = encoder.finish().unwrap();
    assert!(bytes.len() < 16 * 1024, "{}", bytes.len());
    assert_eq!(status_within_memory(&daemon, "five million lines", &bytes), 413);
    daemon.settle();
    assert_eq!(site.read("quarantine.jsonl"), b"");
}

#[test]
fn a_hundred_thousand_malformed_lines_are_a_batch() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let lines: Vec<String> = (0..100_000).map(|number| format!("rubbish {number}")).collect();
    let receipt = daemon.deliver(&lines);
    assert_eq!(receipt, Receipt { quarantined: 100_000, ..Receipt::default() });
    daemon.settle();
    let kept = quarantine(&site.read("quarantine.jsonl"));
    assert!(kept.iter().all(|record| record.reason == "malformed"));
    assert!(kept.iter().map(|record| record.raw.as_slice()).eq(lines.iter().map(String::as_bytes)));

    let one_more = [body(&lines), b"one more\n".to_vec()].concat();
    assert_eq!(daemon.post(Some("gzip"), &gzip(&one_more)).status, 413);
}
