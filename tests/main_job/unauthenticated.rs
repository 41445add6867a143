//! Unauthenticated and misbehaving peers: too many connections, slow ones, malformed requests.
//!
//! `AUDITGATE_TESTS_CONNECTIONS` is the number of slow connections (400 by default),
//! `AUDITGATE_TESTS_REQUESTS` the number of random and of mutated requests (2000 of each by
//! default).

use std::io::Write as _;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};

use crate::harness::client::{Answer, Client, request};
use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::machine;
use crate::harness::programs::run;
use crate::harness::site::{PATH, Site, TOKEN};
use crate::harness::{SetOnDrop, TEST_TIMEOUT, gzip, wait_until};

const HERE: [u8; 4] = [127, 0, 0, 1];
const ELSEWHERE: [u8; 4] = [127, 0, 0, 2];

fn number_from(variable: &str, default: usize) -> usize {
    std::env::var(variable).map_or(default, |number| number.parse().expect("a number"))
}

fn closed(reason: &str) -> String {
    format!("auditgate_http_connections_closed_total{{reason=\"{reason}\"}}")
}

fn assert_accepted(client: &mut Client, site: &Site, number: u64) {
    let receipt = Receipt::of(&client.post(None, site.producer.event(number).as_bytes()));
    assert_eq!((receipt.accepted, receipt.quarantined), (1, 0));
}

#[test]
fn the_oldest_unauthenticated_connection_is_evicted_for_a_new_one() {
    let site = Site::new().plain().limits("connections = 8");
    let daemon = Daemon::start(&site);
    // Half of the connections may be unauthenticated.
    let mut clients: Vec<Client> = (0..4).map(|_| daemon.connect()).collect();
    for number in 0..4 {
        clients.push(daemon.connect());
        daemon.wait_for_count(&closed("evicted"), number + 1);
        assert_eq!(clients.remove(0).rest(), b"");
        assert!(clients.iter_mut().all(Client::is_open));
    }
    // The other half is for authenticated connections, which unauthenticated ones do not evict.
    for (number, client) in (0..).zip(&mut clients) {
        assert_accepted(client, &site, number);
    }
    let more: Vec<Client> = (0..20).map(|_| daemon.connect()).collect();
    daemon.wait_for_count(&closed("evicted"), 4 + 16);
    for (number, client) in (10..).zip(&mut clients) {
        assert_accepted(client, &site, number);
    }
    drop(more);
    let metrics = daemon.metrics();
    assert_eq!(metrics["auditgate_http_authorized_connections"], "4");
    assert_eq!(metrics[&closed("per_peer_limit")], "0");
}

#[test]
fn an_address_evicts_only_its_own_unauthenticated_connections() {
    let site = Site::new().plain().limits("connections = 64\nconnections_per_peer = 2");
    let daemon = Daemon::start(&site);
    let mut other = daemon.connect_from(ELSEWHERE);
    let mut first = daemon.connect();
    let mut flood: Vec<Client> = (0..10).map(|_| daemon.connect()).collect();
    daemon.wait_for_count(&closed("per_peer_limit"), 9);
    assert_eq!(first.rest(), b"");
    assert_accepted(&mut other, &site, 0);
    // The limit per address does not apply to authenticated connections.
    let mut senders: Vec<Client> = Vec::new();
    for number in 1..11 {
        senders.push(daemon.connect());
        assert_accepted(senders.last_mut().unwrap(), &site, number);
    }
    for (number, sender) in (11..).zip(&mut senders) {
        assert_accepted(sender, &site, number);
    }
    // The first sender evicted an unauthenticated connection; once authenticated, it left the slot
    // to the next one.
    wait_until("one unauthenticated connection is left", || {
        match flood.iter_mut().map(Client::is_open).filter(|is_open| *is_open).count() {
            1 => Ok(()),
            left => Err(left.to_string()),
        }
    });
    assert_eq!(daemon.metrics()[&closed("evicted")], "0");
}

#[test]
fn a_slow_connection_is_closed_without_an_answer() {
    let site = Site::new().limits("request_timeout = \"3s\"");
    let daemon = Daemon::start(&site);
    let begun = Instant::now();
    let silent = TcpStream::connect(daemon.address).unwrap();
    let mut half_a_hello = TcpStream::connect(daemon.address).unwrap();
    half_a_hello.write_all(&[0x16, 3, 1, 2, 0, 1]).unwrap();
    daemon.wait_for_count(&closed("handshake_timeout"), 2);
    drop((silent, half_a_hello));

    let mut garbage = TcpStream::connect(daemon.address).unwrap();
    garbage.write_all(b"neither TLS nor HTTP\r\n").unwrap();
    daemon.wait_for_count(&closed("handshake_failed"), 1);

    // The whole header has one deadline, even if its bytes arrive steadily.
    let mut trickle = daemon.connect();
    let head = format!("POST {PATH} HTTP/1.1\r\nHost: localhost\r\nX: {}", "x".repeat(10_000));
    let ended = head.as_bytes().iter().position(|byte| {
        std::thread::sleep(Duration::from_millis(20));
        trickle.try_send(&[*byte]).is_err() || !trickle.is_open()
    });
    assert!(ended.is_some());
    assert_eq!(trickle.rest(), b"");
    daemon.wait_for_count(&closed("header_timeout"), 1);

    let mut slow = daemon.connect();
    slow.send(&request("POST", PATH, &[("Authorization", TOKEN), ("Content-Length", "1000")], b"x"));
    assert_eq!(slow.rest(), b"");
    daemon.wait_for_count(&closed("body_too_slow"), 1);

    let mut cut = daemon.connect();
    cut.send(&request("POST", PATH, &[("Authorization", TOKEN), ("Content-Length", "1000")], b"x"));
    cut.cut();
    assert_eq!(cut.rest(), b"");
    daemon.wait_for_count(&closed("cut_off"), 1);
    assert!(begun.elapsed() < TEST_TIMEOUT);
    assert_accepted(&mut daemon.connect(), &site, 0);
}

#[test]
fn a_connection_that_does_not_read_its_answers_is_closed() {
    let site = Site::new().plain().limits("request_timeout = \"3s\"");
    let daemon = Daemon::start(&site);
    let mut client = daemon.connect();
    let requests = request("GET", "/nowhere", &[], b"").repeat(1000);
    while client.try_send(&requests).is_ok() {}
    daemon.wait_for_count(&closed("answer_timeout"), 1);
    assert_accepted(&mut daemon.connect(), &site, 0);
}

#[test]
fn a_shortage_of_descriptors_is_survived() {
    if !machine::are_there(&[("prlimit is not installed", &["prlimit", "--version"])]) {
        return;
    }
    let site = Site::new();
    let daemon = Daemon::start(&site);
    assert_accepted(&mut daemon.connect(), &site, 0);
    daemon.settle();
    let open = std::fs::read_dir(format!("/proc/{}/fd", daemon.process())).unwrap().count();
    let limit = |files: usize| {
        let process = daemon.process().to_string();
        run(std::process::Command::new("prlimit").args(["--pid", &process, &format!("--nofile={files}:")]));
    };
    limit(open + 12);
    let flood: Vec<TcpStream> =
        (0..60).map(|_| TcpStream::connect(daemon.address).expect("the kernel's queue has room")).collect();
    wait_until("descriptors run out", || {
        let said = daemon.log().iter().filter(|line| line.contains("code=\"accept-failing\"")).count();
        if said > 0 { Ok(()) } else { Err("not logged".to_owned()) }
    });
    // The oldest unauthenticated connections are evicted, and a genuine sender is served while the
    // others remain.
    assert_accepted(&mut daemon.connect(), &site, 1);
    let said = daemon.log().iter().filter(|line| line.contains("code=\"accept-failing\"")).count();
    assert!(said <= 2, "it was logged {said} times");
    drop(flood);
    limit(open + 200);
    assert_accepted(&mut daemon.connect(), &site, 2);
    daemon.settle();
    assert_eq!(site.verified(), site.producer.events(0..3));
}

/// Sends bytes, and reads everything that the daemon sends until it closes the connection.
fn exchange(daemon: &Daemon<'_>, bytes: &[u8]) -> Vec<u8> {
    let mut client = daemon.connect();
    // The daemon may close the connection before the last byte.
    let _ = client.try_send(bytes);
    client.cut();
    client.rest()
}

#[test]
fn ambiguous_requests_are_refused_and_counted() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let start = format!("POST {PATH} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {TOKEN}\r\n");
    let event = site.producer.event(0);
    let length = event.len();
    let smuggled = format!("{start}Content-Length: {length}\r\n\r\n{event}");
    let shapes = [
        format!("{start}Content-Length: 0\r\nContent-Length: {length}\r\n\r\n"),
        format!("{start}Content-Length: +0\r\n\r\n"),
        format!("{start}Content-Length: 5, 6\r\n\r\n"),
        format!("{start}Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
        format!("{start}Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n"),
        format!("{start}X: y\r\n Content-Length: 5\r\n\r\n"),
        format!("{start}X: y\r\n\tfolded\r\n\r\n"),
        format!("{start}X: y\rContent-Length: 0\r\n\r\n"),
        start.replace("HTTP/1.1", "HTTP/2.0") + "\r\n",
        "\0\0\0\0".to_owned(),
    ];
    let count = |source: &str| -> u64 {
        daemon.metrics()[&format!("auditgate_http_requests_total{{code=\"400\",source=\"{source}\"}}")]
            .parse()
            .unwrap()
    };
    for (number, shape) in (1..).zip(&shapes) {
        // The bytes behind it are never parsed as a request.
        let answered = exchange(&daemon, format!("{shape}{smuggled}").as_bytes());
        let text = String::from_utf8(answered).unwrap();
        assert!(text.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{shape:?}: {text}");
        assert!(text.contains("content-type: application/problem+json\r\n"), "{text}");
        assert!(text.contains("connection: close\r\n"), "{text}");
        assert_eq!(text.matches("HTTP/1.1 ").count() - text.matches("an HTTP/1.1 ").count(), 1, "{text}");
        wait_until("it is counted", || {
            let counted = count("") + count("us");
            assert!(counted <= number, "{shape:?}");
            if counted == number { Ok(()) } else { Err(counted.to_string()) }
        });
    }
    // Both lengths: the chunks count, and the connection is closed after them (RFC 9112, section
    // 6.1).
    for both in [
        format!("Content-Length: {length}\r\nTransfer-Encoding: chunked"),
        format!("Transfer-Encoding: chunked\r\nContent-Length: {length}"),
    ] {
        let answered =
            exchange(&daemon, format!("{start}{both}\r\n\r\n1\r\n\n\r\n0\r\n\r\n{smuggled}").as_bytes());
        let text = String::from_utf8(answered).unwrap();
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.contains("connection: close\r\n"), "{text}");
        assert_eq!(text.matches("HTTP/1.1 ").count(), 1, "{text}");
    }
    // A body of malformed chunks gets no answer, and nothing of it is kept.
    for chunks in ["0x0\r\n\r\n", "-0\r\n\r\n", "1\r\nxx\r\n0\r\n\r\n", "0;a\nb\r\n\r\n"] {
        let broken = format!("{start}Transfer-Encoding: chunked\r\n\r\n{chunks}{smuggled}");
        assert_eq!(exchange(&daemon, broken.as_bytes()), b"", "{chunks:?}");
    }
    let huge = format!("{start}X: {}\r\n\r\n", "x".repeat(20_000));
    let text = String::from_utf8_lossy(&exchange(&daemon, huge.as_bytes())).into_owned();
    assert!(text.starts_with("HTTP/1.1 431 ") && text.contains("application/problem+json"), "{text}");
    daemon.wait_for_count("auditgate_http_requests_total{code=\"431\",source=\"us\"}", 1);
    daemon.settle();
    assert_eq!((site.read("verified.log"), site.read("quarantine.jsonl")), (vec![], vec![]));
    assert_accepted(&mut daemon.connect(), &site, 0);
}

/// Latencies of a genuine sender's batches.
struct Latencies(Vec<Duration>);

impl Latencies {
    /// Sends batches, each on a new connection, until `stop` is set and at least `least` have been
    /// sent.
    fn of(daemon: &Daemon<'_>, least: usize, stop: &AtomicBool) -> Self {
        let mut latencies = Vec::new();
        for number in 0.. {
            let event = daemon.site.producer.event(number);
            let begun = Instant::now();
            let answer = daemon.connect().try_post(PATH, None, event.as_bytes());
            latencies.push(begun.elapsed());
            let status = answer.as_ref().map(|answer: &Answer| answer.status).map_err(ToString::to_string);
            assert_eq!(status, Ok(200), "batch {}", latencies.len());
            if latencies.len() >= least && stop.load(Ordering::Relaxed) {
                break;
            }
        }
        latencies.sort();
        Self(latencies)
    }

    fn p99(&self) -> Duration {
        self.0[(self.0.len() - 1) * 99 / 100]
    }
}

/// Calls `disturb` while a genuine sender sends. All of its batches must be accepted, and not much
/// later than those of another sender to another daemon at the same time, which other load on the
/// machine slows down as much.
fn assert_sender_undisturbed(daemon: &Daemon<'_>, what: &str, disturb: impl FnOnce()) {
    let other_site = Site::new();
    let other = Daemon::start(&other_site);
    let stop = AtomicBool::new(false);
    let (disturbed, baseline) = std::thread::scope(|scope| {
        let senders = [daemon, &other].map(|to| scope.spawn(|| Latencies::of(to, 100, &stop)));
        let end = SetOnDrop(&stop);
        disturb();
        drop(end);
        let [disturbed, baseline] = senders.map(|sender| sender.join().unwrap());
        (disturbed, baseline)
    });
    eprintln!(
        "{what}: {} batches, p99 {:?}, longest {:?}; to another daemon: p99 {:?}",
        disturbed.0.len(),
        disturbed.p99(),
        disturbed.0.last().unwrap(),
        baseline.p99()
    );
    let allowed = Duration::from_secs(1).max(10 * baseline.p99());
    assert!(disturbed.p99() < allowed, "{what}: {:?}", disturbed.p99());
}

#[test]
fn slow_unauthenticated_connections_do_not_disturb_a_genuine_sender() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let connections = number_from("AUDITGATE_TESTS_CONNECTIONS", 400);
    assert_sender_undisturbed(&daemon, &format!("{connections} slow connections"), || {
        let (mut silent, mut slow) = (Vec::new(), Vec::new());
        for number in 0..connections {
            let address = if number % 2 == 0 { HERE } else { ELSEWHERE };
            match number / 2 % 4 {
                0 => silent.push(daemon.socket_from(address)),
                1 => {
                    let mut socket = daemon.socket_from(address);
                    let _ = socket.write_all(&[0x16, 3, 1, 2, 0, 1]);
                    silent.push(socket);
                }
                kind => {
                    let mut client = daemon.connect_from(address);
                    let head = match kind {
                        2 => format!("POST {PATH} HTTP/1.1\r\nHost: localhost\r\nX: ").into_bytes(),
                        _ => request("POST", PATH, &[("Content-Length", "1000")], b"x"),
                    };
                    let _ = client.try_send(&head);
                    slow.push(client);
                }
            }
        }
        // Those that are still open send a few more bytes, one at a time.
        for _ in 0..3 {
            for client in &mut slow {
                let _ = client.try_send(b"x");
            }
        }
        drop(silent);
    });
    let metrics = daemon.metrics();
    let number = |series: &str| metrics[series].parse::<usize>().unwrap();
    assert!(number(&closed("per_peer_limit")) + number(&closed("evicted")) > 0);
    daemon.settle();
}

#[test]
fn slow_bodies_with_a_token_do_not_disturb_a_genuine_sender() {
    let site = Site::new().limits("request_timeout = \"4s\"");
    let daemon = Daemon::start(&site);
    assert_sender_undisturbed(&daemon, "64 slow bodies with a token", || {
        let mut slow: Vec<Client> = (0..64)
            .map(|_| {
                let mut client = daemon.connect();
                let headers = [("Authorization", TOKEN), ("Content-Length", "1000000")];
                client.send(&request("POST", PATH, &headers, b"x"));
                client
            })
            .collect();
        daemon.wait_for_count(&closed("body_too_slow"), 64);
        assert!(slow.iter_mut().all(|client| client.rest().is_empty()));
    });
    assert_eq!(daemon.metrics()["auditgate_in_flight_bytes"], "0");
}

/// Returns the name and labels of every series.
fn series(daemon: &Daemon<'_>) -> Vec<String> {
    daemon.metrics().into_keys().collect()
}

fn assert_unharmed(daemon: &Daemon<'_>, site: &Site, before: &[String]) {
    assert_eq!(series(daemon), before);
    for (name, value) in daemon.metrics() {
        let is_5xx = name.starts_with("auditgate_http_requests_total{code=\"5");
        assert!(!is_5xx || value == "0", "{name} {value}");
    }
    assert!(!daemon.log().iter().any(|line| line.contains("panicked")));
    assert_accepted(&mut daemon.connect(), site, 1000);
}

const METHODS: [&str; 9] = ["POST", "POST", "POST", "GET", "PUT", "HEAD", "OPTIONS", "DELETE", "X-Y"];
const PATHS: [&str; 8] =
    [PATH, PATH, PATH, "/", "/konnect/us/", "/konnect/us?a=b", "/%00/..//", "http://other/konnect/us"];
const FIELDS: [(&str, &str); 20] = [
    ("Authorization", TOKEN),
    ("Authorization", TOKEN),
    ("Authorization", TOKEN),
    ("Authorization", "Bearer x"),
    ("Authorization", ""),
    ("Content-Type", "text/plain"),
    ("Content-Type", "application/json"),
    ("Content-Encoding", "gzip"),
    ("Content-Encoding", "application/gzip"),
    ("Content-Encoding", "br"),
    ("Expect", "100-continue"),
    ("Expect", "a miracle"),
    ("Connection", "close"),
    ("Connection", "Upgrade"),
    ("Upgrade", "h2c"),
    ("X-Forwarded-For", "\u{ff}\u{fe}"),
    ("Transfer-Encoding", "chunked"),
    ("Content-Length", "18446744073709551616"),
    ("Trailer", "X"),
    ("Cookie", "a=b; c=d"),
];

fn random_request(site: &Site, random: &mut StdRng) -> Vec<u8> {
    let event = site.producer.event(random.random_range(0..100)).into_bytes();
    let body: Vec<u8> = match random.random_range(0..5) {
        0 => Vec::new(),
        1 => gzip(&event),
        2 => (0..random.random_range(0..500)).map(|_| random.random()).collect(),
        _ => event,
    };
    let length = body.len().to_string();
    let mut fields: Vec<(&str, &str)> =
        (0..random.random_range(0..6)).map(|_| *FIELDS.choose(random).unwrap()).collect();
    if random.random_ratio(9, 10) {
        fields.push(("Content-Length", &length));
    }
    request(METHODS.choose(random).unwrap(), PATHS.choose(random).unwrap(), &fields, &body)
}

#[test]
fn random_requests_do_no_harm() {
    let site = Site::new().plain();
    let daemon = Daemon::start(&site);
    let before = series(&daemon);
    let requests = number_from("AUDITGATE_TESTS_REQUESTS", 2000);
    let mut random = StdRng::seed_from_u64(5);
    for number in 0..requests {
        let bytes = random_request(&site, &mut random);
        let answered = exchange(&daemon, &bytes);
        assert!(!answered.windows(10).any(|window| window == b"HTTP/1.1 5"), "request {number}");
    }
    assert_unharmed(&daemon, &site, &before);
}

#[test]
fn mutated_requests_do_no_harm() {
    let site = Site::new().plain();
    let daemon = Daemon::start(&site);
    let before = series(&daemon);
    let requests = number_from("AUDITGATE_TESTS_REQUESTS", 2000);
    let mut random = StdRng::seed_from_u64(6);
    let insertions: [&[u8]; 12] = [
        b"\r\n",
        b"\n",
        b"\r",
        b"\0",
        b" ",
        b"\t",
        b":",
        b"\r\n\r\n",
        b"0\r\n\r\n",
        b"chunked",
        b"Content-Length: 5\r\n",
        b"\xff",
    ];
    for number in 0..requests {
        let mut bytes = random_request(&site, &mut random);
        for _ in 0..random.random_range(1..4) {
            let at = random.random_range(0..bytes.len());
            match random.random_range(0..5) {
                0 => bytes[at] = random.random(),
                1 => drop(bytes.splice(at..at, insertions.choose(&mut random).unwrap().iter().copied())),
                2 => drop(bytes.remove(at)),
                3 => {
                    let again = bytes[at..].to_vec();
                    bytes.extend(again);
                }
                _ => bytes.truncate(at.max(1)),
            }
            if bytes.is_empty() {
                bytes.push(b'x');
            }
        }
        let answered = exchange(&daemon, &bytes);
        assert!(!answered.windows(10).any(|window| window == b"HTTP/1.1 5"), "request {number}");
    }
    assert_unharmed(&daemon, &site, &before);
}
