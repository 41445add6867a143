//! Cost of the whole main job, from the post over TLS to the durable 200 and the file, compared
//! with bare batch verification of the same lines. Both run in each round, so that a noisy machine
//! disturbs both.
//!
//! `cargo bench --bench main_job [-- ROUNDS [CONNECTIONS [BATCHES]]]`, by default 3, 4 and 160.
//! Prints server CPU an event, and how many times bare verification that is, for each way in which
//! the daemon is run; then the latency of a lone batch, and of batches at half the peak load.
//! Figures are CPU time (`/proc/PID/stat`, all threads), not wall time, apart from latencies. Where
//! `fluent-bit` is in `PATH`, it is measured in the same run.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a bench stops at the first surprise")]

mod bare;
mod common;
mod fluent_bit;

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use auditgate::trust::verify::{Claim, verify_in_batches};
use auditgate::wire::batch;
use ed25519_dalek::{Signer as _, SigningKey};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::common::{cpu, event, median};

const EVENTS_A_BATCH: usize = 500;
const LONE_EVENTS: usize = 100;
const LONE_BATCHES: usize = 60;

/// A way to run the daemon, or a peer.
struct Way {
    name: &'static str,
    is_fluent_bit: bool,
    signatures: &'static str,
    format: &'static str,
    /// Number of cores that it may use; every core for none.
    cores: Option<usize>,
    /// Each batch has a line with a bad signature.
    has_bad_lines: bool,
    /// Everything has been received before.
    is_replay: bool,
}

const PLAIN: Way = Way {
    name: "raw file",
    is_fluent_bit: false,
    signatures: "require",
    format: "raw",
    cores: None,
    has_bad_lines: false,
    is_replay: false,
};

const WAYS: [Way; 11] = [
    PLAIN,
    Way { name: "raw file, on one core", cores: Some(1), ..PLAIN },
    Way { name: "raw file, on 8 cores", cores: Some(8), ..PLAIN },
    Way { name: "JSON file", format: "json", ..PLAIN },
    Way { name: "raw file, one bad line in each 500", has_bad_lines: true, ..PLAIN },
    Way { name: "replay of known events", is_replay: true, ..PLAIN },
    Way { name: "raw file, signatures = \"off\"", signatures: "off", ..PLAIN },
    Way { name: "JSON file, signatures = \"off\"", signatures: "off", format: "json", ..PLAIN },
    Way {
        name: "JSON file, \"off\", on 8 cores",
        signatures: "off",
        format: "json",
        cores: Some(8),
        ..PLAIN
    },
    Way { name: "Fluent Bit, JSON file", is_fluent_bit: true, ..PLAIN },
    Way { name: "Fluent Bit, JSON file, on one core", is_fluent_bit: true, cores: Some(1), ..PLAIN },
];

/// A signed line, as the producer writes it.
struct Line {
    message: Vec<u8>,
    signature: [u8; 64],
    bytes: Vec<u8>,
}

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let number = |at: usize, default| numbers.get(at).copied().unwrap_or(default);
    let (rounds, connections, batches) = (number(0, 3), number(1, 4), number(2, 160));
    let key = SigningKey::from_bytes(&[7; 32]);
    println!(
        "{EVENTS_A_BATCH} events a batch, {connections} connections, {batches} batches, {rounds} rounds; medians"
    );
    let all_cores = std::thread::available_parallelism().map_or(1, usize::from);
    let is_there = fluent_bit::is_installed();
    let can_run =
        |way: &Way| way.cores.is_none_or(|cores| cores < all_cores) && (is_there || !way.is_fluent_bit);
    let ways: Vec<Way> = WAYS.into_iter().filter(can_run).collect();
    let mut wholes: Vec<_> = ways.iter().map(|_| Vec::new()).collect();
    let (mut bares, mut lone, mut half) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        let lines = lines(&key, round, batches * EVENTS_A_BATCH);
        let bare = bare(&key, &lines);
        for (way, wholes) in ways.iter().zip(&mut wholes) {
            let daemon = Daemon::start(&key, way);
            let bodies = match way.is_fluent_bit {
                true => lines.chunks(EVENTS_A_BATCH).map(fluent_bit::body).collect(),
                false => bodies(&lines, EVENTS_A_BATCH, way.has_bad_lines),
            };
            let new = EVENTS_A_BATCH - usize::from(way.has_bad_lines);
            let mut whole = daemon.whole_path(&bodies, connections, [new, 0, EVENTS_A_BATCH - new]);
            if way.is_replay {
                whole = daemon.whole_path(&bodies, connections, [0, EVENTS_A_BATCH, 0]);
            }
            wholes.push((whole.cpu, whole.cpu / bare, whole.rate, whole.lag.as_secs_f64() * 1e3));
        }
        bares.push(bare);
        lone.push(lone_batches(&key, &lines));
        let peak = wholes[0].last().map_or(0.0, |whole: &(f64, f64, f64, f64)| whole.2);
        half.push(half_load(&key, &bodies(&lines, EVENTS_A_BATCH, false), connections, peak / 2.0));
    }
    println!("bare verification: {:.2} µs an event", median(bares));
    for (way, wholes) in ways.iter().zip(wholes) {
        let column = |of: fn(&(f64, f64, f64, f64)) -> f64| median(wholes.iter().map(of).collect());
        println!(
            "{:<36} {:5.2} µs an event, {:.2} of bare verification, {:6.0} events/s, the file is {:.0} ms behind",
            way.name,
            column(|whole| whole.0),
            column(|whole| whole.1),
            column(|whole| whole.2),
            column(|whole| whole.3),
        );
    }
    let column = |of: fn(&(f64, f64)) -> f64| median(lone.iter().map(of).collect());
    println!(
        "a lone batch of {LONE_EVENTS} events: answered after {:.2} ms (p50); one fdatasync and the bare verification \
         take {:.2} ms",
        column(|lone| lone.0),
        column(|lone| lone.1)
    );
    let column = |of: fn(&(f64, f64)) -> f64| median(half.iter().map(of).collect());
    println!(
        "at half the peak load: answered after {:.2} ms (p50), {:.2} ms (p99)",
        column(|half| half.0),
        column(|half| half.1)
    );
}

/// Signed lines of one round.
fn lines(key: &SigningKey, round: usize, count: usize) -> Vec<Line> {
    (0..count).map(|number| line(key, (round * 10_000_000 + number) as u64)).collect()
}

/// CPU microseconds an event for batch verification and nothing else, on as many threads as there
/// are cores.
fn bare(key: &SigningKey, lines: &[Line]) -> f64 {
    let before = cpu("self");
    bare::verify_all(key, lines, EVENTS_A_BATCH, claim);
    (cpu("self") - before).as_secs_f64() * 1e6 / lines.len() as f64
}

fn claim(line: &Line) -> Claim<'_> {
    Claim { signature: line.signature, first: (&line.message, &[]), second: None }
}

/// Median latency of a batch that is alone, and that of what it cannot do without: one fdatasync
/// after a write, and the verification. In milliseconds.
fn lone_batches(key: &SigningKey, lines: &[Line]) -> (f64, f64) {
    let lines = &lines[..LONE_EVENTS * LONE_BATCHES];
    let daemon = Daemon::start(key, &PLAIN);
    let bodies = bodies(lines, LONE_EVENTS, false);
    let mut latencies = Vec::new();
    let mut connection = daemon.connect();
    for body in &bodies {
        let start = Instant::now();
        post(&mut connection, body, [LONE_EVENTS, 0, 0]);
        latencies.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let mut file = File::create(daemon.dir.path().join("synced")).unwrap();
    let mut least = Vec::new();
    for (batch, body) in lines.chunks(LONE_EVENTS).zip(&bodies) {
        let start = Instant::now();
        file.write_all(body).unwrap();
        file.sync_data().unwrap();
        let public = [key.verifying_key().to_bytes()];
        let claims: Vec<_> = batch.iter().map(claim).collect();
        let fits = verify_in_batches(&claims, &public, LONE_EVENTS, &mut rand::rng());
        assert!(fits.iter().all(Option::is_some));
        least.push(start.elapsed().as_secs_f64() * 1e3);
    }
    (median(latencies), median(least))
}

/// Latencies, p50 and p99 in milliseconds, of batches that arrive at that rate of events a second,
/// whether or not the ones before have been answered. Each connection has posted one before: the
/// first handshakes of a process wait for the random numbers of its TLS library.
fn half_load(key: &SigningKey, bodies: &[Vec<u8>], connections: usize, rate: f64) -> (f64, f64) {
    let daemon = Daemon::start(key, &PLAIN);
    let interval = Duration::from_secs_f64(EVENTS_A_BATCH as f64 / rate);
    let (first, rest) = bodies.split_at(connections);
    let are_open = Barrier::new(connections);
    let mut latencies: Vec<f64> = std::thread::scope(|scope| {
        let senders: Vec<_> = (0..connections)
            .map(|sender| {
                let (daemon, are_open) = (&daemon, &are_open);
                scope.spawn(move || {
                    let mut connection = daemon.connect();
                    post(&mut connection, &first[sender], [EVENTS_A_BATCH, 0, 0]);
                    are_open.wait();
                    let start = Instant::now();
                    let mine = rest.iter().enumerate().skip(sender).step_by(connections);
                    let latency = |(at, body): (usize, &Vec<u8>)| {
                        let due = start + interval.mul_f64(at as f64);
                        std::thread::sleep(due.saturating_duration_since(Instant::now()));
                        post(&mut connection, body, [EVENTS_A_BATCH, 0, 0]);
                        due.elapsed().as_secs_f64() * 1e3
                    };
                    mine.map(latency).collect::<Vec<_>>()
                })
            })
            .collect();
        senders.into_iter().flat_map(|sender| sender.join().unwrap()).collect()
    });
    latencies.sort_by(f64::total_cmp);
    (latencies[latencies.len() / 2], latencies[latencies.len() * 99 / 100])
}

/// Compressed bodies of that many lines each.
fn bodies(lines: &[Line], together: usize, has_bad_lines: bool) -> Vec<Vec<u8>> {
    let body = |batch: &[Line]| {
        let mut text = Vec::new();
        for (at, line) in batch.iter().enumerate() {
            let start = text.len();
            text.extend_from_slice(&line.bytes);
            if has_bad_lines && at == together / 3 {
                // In the message, before its signature.
                text[start + 100] ^= 1;
            }
            text.push(b'\n');
        }
        batch::encode(&text).unwrap()
    };
    lines.chunks(together).map(body).collect()
}

fn line(key: &SigningKey, number: u64) -> Line {
    let message = event(number).into_bytes();
    let signature = key.sign(&message).to_bytes();
    let mut bytes = message.clone();
    auditgate::wire::signature::insert(auditgate::wire::event::Format::Cef, &mut bytes, &signature);
    Line { message, signature, bytes }
}

/// The real binary with a raw file sink.
struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
    port: u16,
    tls: Arc<ClientConfig>,
    is_fluent_bit: bool,
}

/// Starts the daemon with the configuration of a directory, and returns its port.
fn start(mut command: Command, dir: &Path) -> (Child, u16) {
    let unit = include_str!("../systemd/auditgate.service");
    let environment = unit.lines().filter_map(|line| line.strip_prefix("Environment=")?.split_once('='));
    command.envs(environment).args(["serve", "--config"]).arg(dir.join("config.toml"));
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
    let port = log
        .find_map(|line| {
            let line = line.unwrap();
            let (_, rest) = line.split_once("listening on https://127.0.0.1:")?;
            Some(rest.split_whitespace().next()?.parse().unwrap())
        })
        .expect("the daemon did not start");
    std::thread::spawn(move || log.for_each(drop));
    (child, port)
}

impl Daemon {
    fn start(key: &SigningKey, way: &Way) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        std::fs::write(path.join("cert.pem"), made.cert.pem()).unwrap();
        std::fs::write(path.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
        let document = auditgate::trust::jwks::document(&[(None, key.verifying_key().to_bytes())]);
        std::fs::write(path.join("jwks.json"), document).unwrap();
        let config = CONFIG.replace("SIGNATURES", way.signatures).replace("FORMAT", way.format);
        let stream = if way.signatures == "off" { "unverified" } else { "verified" };
        let config = config.replace("STREAM", stream);
        std::fs::write(path.join("config.toml"), config).unwrap();
        let program = if way.is_fluent_bit { fluent_bit::PROGRAM } else { env!("CARGO_BIN_EXE_auditgate") };
        let mut command = Command::new(if way.cores.is_some() { "taskset" } else { program });
        if let Some(cores) = way.cores {
            command.args(["--cpu-list", &format!("0-{}", cores - 1), program]);
        }
        let (child, port) = match way.is_fluent_bit {
            true => fluent_bit::start(command, path),
            false => start(command, path),
        };
        let mut roots = RootCertStore::empty();
        roots.add(made.cert.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Self { child, dir, port, tls: Arc::new(tls), is_fluent_bit: way.is_fluent_bit }
    }

    /// Posts the bodies, and waits until the last line is in the file.
    fn whole_path(&self, bodies: &[Vec<u8>], connections: usize, receipt: [usize; 3]) -> Whole {
        let process = self.child.id().to_string();
        let events = bodies.len() * receipt.iter().sum::<usize>();
        let (before, start) = (cpu(&process), Instant::now());
        std::thread::scope(|scope| {
            for part in bodies.chunks(bodies.len().div_ceil(connections)) {
                scope.spawn(move || {
                    let mut connection = self.connect();
                    let post = if self.is_fluent_bit { fluent_bit::post } else { post };
                    part.iter().for_each(|body| post(&mut connection, body, receipt));
                });
            }
        });
        let posted = Instant::now();
        let mut missing = bodies.len() * receipt[0];
        let mut file = File::open(self.dir.path().join("out.log")).unwrap();
        let mut piece = vec![0; 1 << 20];
        while missing > 0 {
            assert!(posted.elapsed() < Duration::from_secs(120), "the file does not fill up");
            match file.read(&mut piece).unwrap() {
                0 => std::thread::sleep(Duration::from_millis(2)),
                read => missing -= memchr::memchr_iter(b'\n', &piece[..read]).count(),
            }
        }
        Whole {
            cpu: (cpu(&process) - before).as_secs_f64() * 1e6 / events as f64,
            rate: events as f64 / (posted - start).as_secs_f64(),
            lag: posted.elapsed(),
        }
    }

    fn connect(&self) -> Connection {
        let name = ServerName::try_from("localhost").unwrap();
        let session = ClientConnection::new(Arc::clone(&self.tls), name).unwrap();
        let socket = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        socket.set_nodelay(true).unwrap();
        StreamOwned::new(session, socket)
    }
}

type Connection = StreamOwned<ClientConnection, TcpStream>;

/// What the whole path took.
struct Whole {
    /// CPU microseconds of the server for an event.
    cpu: f64,
    /// Events a second, from the first post to the last answer.
    rate: f64,
    /// Time from the last answer until the last line is in the file.
    lag: Duration,
}

/// Posts a body, of which so many lines are new, known and bad.
fn post(connection: &mut Connection, body: &[u8], [accepted, duplicates, quarantined]: [usize; 3]) {
    let head = format!(
        "POST /us HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer bench\r\nContent-Type: text/plain\r\n\
         Content-Encoding: application/gzip\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let wanted =
        format!("{{\"accepted\":{accepted},\"duplicates\":{duplicates},\"quarantined\":{quarantined}}}");
    exchange(connection, &head, body, &wanted);
}

/// Posts a body, and reads until the answer ends with these words.
fn exchange(connection: &mut Connection, head: &str, body: &[u8], wanted: &str) {
    connection.write_all(head.as_bytes()).unwrap();
    connection.write_all(body).unwrap();
    connection.flush().unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(wanted.as_bytes()) {
        let mut piece = [0; 1024];
        let read = connection.read(&mut piece).unwrap();
        assert!(read > 0, "no {wanted}: {}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&piece[..read]);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const CONFIG: &str = r#"
data_dir = "data"
[listen]
address = "127.0.0.1:0"
tls = { cert = "cert.pem", key = "key.pem" }
[admin]
address = "127.0.0.1:0"
[sources.us]
path = "/us"
authorization = { value = "Bearer bench" }
jwks = { file = "jwks.json" }
signatures = "SIGNATURES"
[sinks.all]
type = "file"
stream = "STREAM"
path = "out.log"
format = "FORMAT"
[sinks.rejects]
type = "file"
stream = "quarantine"
path = "rejects.jsonl"
format = "json"
"#;
