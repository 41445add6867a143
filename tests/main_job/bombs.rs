//! Small bodies that inflate to large ones or cause much work.

use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use flate2::Compression;
use flate2::write::GzEncoder;
use rand::Rng as _;

use crate::harness::client::request;
use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::records::{objects, quarantine};
use crate::harness::sign;
use crate::harness::site::{PATH, Site, source};
use crate::harness::{SetOnDrop, body, gzip};

const MIB: usize = 1 << 20;
const DECODED: usize = 64 * MIB;

/// Maximum number of lines of a body.
const LINES: usize = 100_000;

/// Maximum growth of the daemon's memory: `limits.in_flight` and 64 MiB, in KiB.
const MAX_GROWTH: u64 = (256 + 64) << 10;

/// Compresses that many zeros into one gzip member, as small as possible.
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

/// Posts a body, checks that the daemon's peak memory grew by less than twice the decoded limit,
/// and returns the status.
fn status_within_memory(daemon: &Daemon<'_>, what: &str, bytes: &[u8]) -> u16 {
    let before = daemon.memory("VmHWM:");
    let status = daemon.post(Some("gzip"), bytes).status;
    let grown = daemon.memory("VmHWM:") - before;
    eprintln!("{what}: {} bytes, status {status}, peak memory grew by {grown} KiB", bytes.len());
    assert!(grown < 2 * (DECODED as u64 / 1024), "{what}: peak memory grew by {grown} KiB");
    status
}

#[test]
fn a_bomb_is_refused_within_the_memory_of_a_batch() {
    let member = zeros(DECODED);
    let ten_gibibytes = member.repeat(160);
    assert!(ten_gibibytes.len() < 16 * MIB);

    // Refused while it is inflated.
    let site = Site::new().limits("body = \"16MiB\"");
    let daemon = Daemon::start(&site);
    daemon.deliver(&site.producer.events(0..10));
    let one_more = [member.clone(), gzip(b"\0")].concat();
    assert_eq!(status_within_memory(&daemon, "64 MiB and a byte in two members", &one_more), 413);
    assert_eq!(status_within_memory(&daemon, "64 MiB and a byte", &zeros(DECODED + 1)), 413);
    assert_eq!(status_within_memory(&daemon, "10 GiB", &ten_gibibytes), 413);
    // A body compressed twice has the same caps in both inflations.
    let nested = gzip(&ten_gibibytes);
    assert_eq!(status_within_memory(&daemon, "10 GiB in gzip in gzip", &nested), 413);
    let nothing = gzip(&gzip(b"").repeat(4 << 20));
    assert_eq!(status_within_memory(&daemon, "80 MiB of members without a byte", &nothing), 413);
    assert_eq!(daemon.deliver(&site.producer.events(10..20)).accepted, 10);
    daemon.settle();
    assert_eq!(site.verified().len(), 20);
    drop(daemon);

    // With the default limits, refused by its compressed size.
    let site = Site::new();
    let daemon = Daemon::start(&site);
    assert_eq!(status_within_memory(&daemon, "10 GiB, default limits", &ten_gibibytes), 413);
    // Exactly at the limit it is a batch of one line that is too long.
    let receipt = Receipt::of(&daemon.post(Some("gzip"), &member));
    assert_eq!(receipt, Receipt { quarantined: 1, ..Receipt::default() });
}

#[test]
fn sixty_four_bombs_at_once_are_refused_within_the_budget() {
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
    assert!(grown < MAX_GROWTH, "peak memory grew by {grown} KiB");

    // Without a token no body is read.
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
    // One line is an event, or the body would be kept whole as undecodable.
    let mut lines: Vec<String> = (0..100_000).map(|number| format!("no event {number}")).collect();
    lines[99_999] = "{}".to_owned();
    let receipt = daemon.deliver(&lines);
    assert_eq!(receipt, Receipt { quarantined: 100_000, ..Receipt::default() });
    daemon.settle();
    let written = site.read("quarantine.jsonl");
    let kept = quarantine(&written);
    assert_eq!(kept.len(), 1);
    assert_eq!((&*kept[0].reason, kept[0].raw.as_slice()), ("malformed", body(&lines).as_slice()));
    assert_eq!(
        objects(&written)[0]["detail"],
        "100000 lines of the body are rejected: malformed 99999, unsigned 1"
    );
    let again = daemon.deliver(&lines);
    assert_eq!(again, Receipt { duplicates: 100_000, ..Receipt::default() });

    let one_more = [body(&lines), b"one more\n".to_vec()].concat();
    assert_eq!(daemon.post(Some("gzip"), &gzip(&one_more)).status, 413);
}

/// Returns a compressed body of short lines. Only the first, which is an event, occurs more than
/// once over all bodies.
fn short_lines(number: usize) -> Vec<u8> {
    let mut lines = b"{}\n".to_vec();
    for line in number * LINES + 1..(number + 1) * LINES {
        writeln!(lines, "{line:x}").unwrap();
    }
    gzip(&lines)
}

/// Posts bodies concurrently and, at the same time, one genuine event after the other. Returns the
/// statuses of the bodies, the times that the events took, shortest first, and the statuses of the
/// events.
fn post_beside_a_genuine_sender(
    daemon: &Daemon<'_>,
    (path, bodies): (&str, &[Vec<u8>]),
) -> (Vec<u16>, Vec<Duration>, Vec<u16>) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (begun, has_begun) = mpsc::channel();
        let genuine = scope.spawn({
            let done = &done;
            move || {
                let (mut times, mut statuses) = (Vec::new(), Vec::new());
                while !done.load(Ordering::Relaxed) {
                    let start = Instant::now();
                    let event = daemon.site.producer.event(statuses.len() as u64);
                    statuses.push(daemon.post(None, event.as_bytes()).status);
                    times.push(start.elapsed());
                    let _ = begun.send(());
                }
                times.sort();
                (times, statuses)
            }
        });
        let end = SetOnDrop(&done);
        has_begun.recv().unwrap();
        let post = |body| move || daemon.post_to(path, Some("gzip"), body).status;
        let posting: Vec<_> = bodies.iter().map(|body| scope.spawn(post(body))).collect();
        let statuses = posting.into_iter().map(|posting| posting.join().unwrap()).collect();
        drop(end);
        let (times, genuine) = genuine.join().unwrap();
        (statuses, times, genuine)
    })
}

fn count(statuses: &[u16], status: u16) -> usize {
    statuses.iter().filter(|found| **found == status).count()
}

#[test]
fn short_lines_stay_within_the_memory_budget_and_delay_no_sender() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    daemon.deliver(&site.producer.events(100_000..100_010));
    let before = daemon.memory("VmHWM:");
    let mut bodies: Vec<_> = (0..20).map(short_lines).collect();
    // 232 bytes that inflate to a hundred thousand lines.
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(b"{}\n").unwrap();
    encoder.write_all(&b"a\n".repeat(LINES - 1)).unwrap();
    let tiny = encoder.finish().unwrap();
    assert!(tiny.len() < 512, "{}", tiny.len());
    bodies.resize(80, tiny);

    let start = Instant::now();
    let (statuses, times, genuine) = post_beside_a_genuine_sender(&daemon, (PATH, &bodies));
    let (all_of_it, longest) = (start.elapsed(), times[times.len() - 1]);
    let grown = daemon.memory("VmHWM:") - before;
    let taken = count(&statuses, 200);
    eprintln!(
        "{taken} of {} bodies taken, memory grew by {grown} KiB; {} genuine batches in {all_of_it:?}, the slowest \
         took {longest:?}",
        bodies.len(),
        genuine.len()
    );
    assert!(grown < MAX_GROWTH, "memory grew by {grown} KiB");
    assert!(taken > 0 && taken + count(&statuses, 429) == statuses.len(), "{statuses:?}");
    assert_eq!(count(&genuine, 200) + count(&genuine, 429), genuine.len(), "{genuine:?}");
    assert!(count(&genuine, 200) > count(&genuine, 429), "{genuine:?}");
    // On a slow machine, a quarter of the whole time.
    let allowed = Duration::from_secs(20).max(all_of_it / 4);
    assert!(longest < allowed, "a genuine batch took {longest:?} of {all_of_it:?}");
    daemon.settle();
    assert_eq!(site.verified().len(), 10 + count(&genuine, 200));
}

/// Posts bodies concurrently with a genuine sender's events. All must be accepted, and no event may
/// take a quarter of the time that the bodies take.
#[expect(clippy::print_stderr, reason = "the numbers are the test's report")]
fn assert_no_sender_is_delayed(what: &str, daemon: &Daemon<'_>, path: &str, bodies: &[Vec<u8>]) {
    let start = Instant::now();
    let (statuses, times, genuine) = post_beside_a_genuine_sender(daemon, (path, bodies));
    let all_of_it = start.elapsed();
    let (median, late, longest) =
        (times[times.len() / 2], times[times.len() * 99 / 100], times[times.len() - 1]);
    eprintln!(
        "{what}: {} genuine batches in {all_of_it:.1?}, median {median:.1?}, p99 {late:.1?}, slowest {longest:.1?}",
        genuine.len()
    );
    assert!(statuses.iter().chain(&genuine).all(|status| *status == 200), "{statuses:?} {genuine:?}");
    assert!(longest < all_of_it / 4, "{what}: a genuine batch took {longest:?} of {all_of_it:?}");
}

/// Number of lines in each expensive body; `AUDITGATE_TESTS_WORK` can set it to up to 99,000.
fn lines_per_body(default: u64) -> u64 {
    std::env::var("AUDITGATE_TESTS_WORK").map_or(default, |lines| lines.parse().unwrap())
}

/// Returns a compressed body of short signed events with these numbers.
fn short_events(producer: &sign::Producer, numbers: std::ops::Range<u64>) -> Vec<u8> {
    let lines: Vec<_> = numbers.map(|number| producer.sign_json(&format!("{{\"rt\":{number}}}"))).collect();
    gzip(&body(&lines))
}

#[test]
fn signatures_by_unknown_keys_delay_no_sender() {
    let unknown = sign::Producer::new(200);
    for (keys, lines) in [(1, 20_000), (4, 5000), (128, 300)] {
        let lines = lines_per_body(lines);
        let body = |number: u64| short_events(&unknown, number * lines..(number + 1) * lines);
        let site = Site::new().limits("body = \"16MiB\"");
        let daemon = Daemon::start(&site);
        // A key set lists at most 64 keys: those of the first one are retired then.
        for first in (1..=keys).step_by(64) {
            let listed: Vec<_> =
                (first..=keys.min(first + 63)).map(|number| sign::Producer::new(number).public()).collect();
            let listed: Vec<_> = listed.iter().map(|key| ("key", key)).collect();
            site.write("jwks.json", sign::jwks(&listed));
            daemon.signal("HUP");
            daemon.wait_for_count("auditgate_jwks_keys{source=\"us\"}", u64::from(keys.min(first + 63)));
        }
        let bodies: Vec<_> = (0..4).map(body).collect();
        assert_no_sender_is_delayed(
            &format!("4 bodies by an unknown key, {keys} keys"),
            &daemon,
            PATH,
            &bodies,
        );
        daemon.settle();
        assert!(quarantine(&site.read("quarantine.jsonl")).len() >= 4);
    }
}

#[test]
fn large_bodies_leave_memory_to_small_ones() {
    // A few such bodies fit at a time; those that wait for too long get a 429.
    let limits = "body = \"4MiB\"\ndecoded = \"4MiB\"\nlines = 20000\nin_flight = \"24MiB\"";
    let site = Site::new().limits(limits);
    let daemon = Daemon::start(&site);
    let unknown = sign::Producer::new(200);
    let body = short_events(&unknown, 0..8_000);
    let start = Instant::now();
    let (statuses, times, genuine) = post_beside_a_genuine_sender(&daemon, (PATH, &vec![body; 32]));
    let (all_of_it, longest) = (start.elapsed(), times[times.len() - 1]);
    eprintln!(
        "{} of 32 large bodies taken in {all_of_it:.1?}, the slowest of {} genuine batches took {longest:.1?}",
        count(&statuses, 200),
        genuine.len()
    );
    assert_eq!(count(&statuses, 200) + count(&statuses, 429), 32, "{statuses:?}");
    assert!(count(&statuses, 200) > 0, "{statuses:?}");
    assert_eq!(count(&genuine, 200), genuine.len(), "{genuine:?}");
    assert!(longest < all_of_it / 4, "a genuine batch took {longest:?} of {all_of_it:?}");
}

#[test]
fn malformed_lines_and_another_source_delay_no_sender() {
    let lines = lines_per_body(20_000);
    let site = Site::new().limits("body = \"16MiB\"");
    let site = site.sources(&(source("us", PATH, "") + &source("other", "/other", "")));
    let daemon = Daemon::start(&site);
    let bodies: Vec<_> = (0..64).map(short_lines).collect();
    assert_no_sender_is_delayed("64 bodies of malformed lines", &daemon, PATH, &bodies);
    let genuine = |number: u64| short_events(&site.producer, number * lines..(number + 1) * lines);
    let bodies: Vec<_> = (0..4).map(genuine).collect();
    assert_no_sender_is_delayed("4 genuine bodies of another source", &daemon, "/other", &bodies);
}

#[test]
fn bodies_that_cannot_be_decoded_are_held_once() {
    const BODIES: usize = 64;
    // The ledger and a sink hold such a body in the eighth of the budget that batches do not get;
    // with a budget of this size that leaves a margin for the allocator.
    const IN_FLIGHT: u64 = 384;
    let site = Site::new().limits(&format!("in_flight = \"{IN_FLIGHT}MiB\""));
    let daemon = Daemon::start(&site);
    let before = daemon.memory("VmHWM:");
    // As large as allowed, and damaged at the very end.
    let mut bytes = vec![0; (8 << 20) - 16_384];
    rand::rng().fill_bytes(&mut bytes);
    let bodies: Vec<Vec<u8>> = (0..BODIES)
        .map(|number| {
            bytes[..8].copy_from_slice(&number.to_le_bytes());
            let mut encoder = GzEncoder::new(Vec::new(), Compression::none());
            encoder.write_all(&bytes).unwrap();
            let mut body = encoder.finish().unwrap();
            let end = body.len();
            body[end - 1] ^= 1;
            body
        })
        .collect();
    let (statuses, _, genuine) = post_beside_a_genuine_sender(&daemon, (PATH, &bodies));
    let grown = daemon.memory("VmHWM:") - before;
    eprintln!("{} of {BODIES} bodies taken, memory grew by {grown} KiB", count(&statuses, 400));
    assert!(grown < (IN_FLIGHT + 64) << 10, "memory grew by {grown} KiB");
    assert!(count(&statuses, 400) > 0, "{statuses:?}");
    assert_eq!(count(&statuses, 400) + count(&statuses, 429), BODIES, "{statuses:?}");
    assert_eq!(count(&genuine, 500), 0, "{genuine:?}");
}

#[test]
fn bodies_that_arrive_side_by_side_take_little_more_than_their_size() {
    const BODIES: usize = 64;
    const PIECES: usize = 32;
    let piece = [b'x'; 64 << 10];
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let before = daemon.memory("VmHWM:");
    let mut clients: Vec<_> = (0..BODIES).map(|_| daemon.connect()).collect();
    clients.iter_mut().for_each(|client| client.begin_post(PIECES * piece.len() + 1));
    for _ in 0..PIECES {
        clients.iter_mut().for_each(|client| client.send(&piece));
    }
    let arrived = BODIES * PIECES * piece.len();
    daemon.wait_for_count("auditgate_in_flight_bytes", arrived as u64);
    let grown = daemon.memory("VmHWM:") - before;
    eprintln!("{} KiB arrived, memory grew by {grown} KiB", arrived >> 10);
    assert!(grown < (arrived as u64 >> 10) + (16 << 10), "memory grew by {grown} KiB");
}

#[test]
fn a_batch_of_maximum_size_fits_into_the_minimum_budget() {
    // Seven eighths of it: 8 KiB, 64 KiB, 1000 lines of 256 bytes, and 128 KiB.
    let limits = |in_flight: &str| {
        format!(
            "body = \"8KiB\"\ndecoded = \"64KiB\"\nline = \"64KiB\"\nlines = 1000\nin_flight = \"{in_flight}\""
        )
    };
    let site = Site::new().limits(&limits("515KiB"));
    let daemon = Daemon::start(&site);
    let mut lines = b"{}\n".to_vec();
    for line in 1..1000 {
        writeln!(lines, "{line}").unwrap();
    }
    lines.resize(64 << 10, b' ');
    let body = gzip(&lines);
    assert!(body.len() < 8192, "{}", body.len());
    for _ in 0..3 {
        let receipt = Receipt::of(&daemon.post(Some("gzip"), &body));
        assert_eq!(receipt.duplicates + receipt.quarantined, 1000);
    }
    daemon.terminate();
}
