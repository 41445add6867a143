//! Cost of the whole main job, from the post over TLS to the durable 200 and the file, compared
//! with bare batch verification of the same lines. The two run alternately, so that a noisy machine
//! disturbs both.
//!
//! `cargo bench --bench main_job [-- ROUNDS]`. Prints server CPU per event and its share of bare
//! verification. Figures are CPU time (`/proc/PID/stat`, all threads), not wall time.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a bench stops at the first surprise")]

mod bare;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use auditgate::trust::verify::Claim;
use auditgate::wire::batch;
use ed25519_dalek::{Signer as _, SigningKey};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

const EVENTS_A_BATCH: usize = 500;
const CONNECTIONS: usize = 4;
const BATCHES: usize = 160;

/// A signed line, as the producer writes it.
struct Line {
    message: Vec<u8>,
    signature: [u8; 64],
    bytes: Vec<u8>,
}

fn main() {
    let rounds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(3_u64);
    let key = SigningKey::from_bytes(&[7; 32]);
    println!(
        "{EVENTS_A_BATCH} events a batch, {CONNECTIONS} connections, {BATCHES} batches, {rounds} rounds"
    );
    let mut shares = Vec::new();
    for round in 0..rounds {
        let lines: Vec<Line> = (0..BATCHES * EVENTS_A_BATCH)
            .map(|number| line(&key, round * 1_000_000 + number as u64))
            .collect();
        let bare = bare(&key, &lines);
        let daemon = Daemon::start(&key);
        let (whole, wall) = daemon.whole_path(&lines);
        drop(daemon);
        let share = bare / whole;
        println!(
            "round {round}: whole path {whole:6.2} µs CPU an event ({:.0} events/s), bare verification {bare:6.2} µs, share {share:.2}",
            lines.len() as f64 / wall.as_secs_f64(),
        );
        shares.push(share);
    }
    shares.sort_by(f64::total_cmp);
    println!("median: bare verification is {:.2} of the whole path", shares[shares.len() / 2]);
}

/// CPU microseconds an event for batch verification and nothing else, on as many threads as there
/// are cores.
fn bare(key: &SigningKey, lines: &[Line]) -> f64 {
    let before = cpu("self");
    bare::verify_all(key, lines, EVENTS_A_BATCH, |line| Claim {
        signature: line.signature,
        first: (&line.message, &[]),
        second: None,
    });
    (cpu("self") - before).as_secs_f64() * 1e6 / lines.len() as f64
}

fn line(key: &SigningKey, number: u64) -> Line {
    let message = format!(
        "2025-05-19T00:03:39Z konghq.com CEF:0|KongInc|Konnect|1.0|KongGateway|Ingress|1|rt={} src=127.0.0.6 \
         request=/konnect-api/api/control_planes/1c026712-c17d-4e30-ac27-53a6cdc56b9c/services act=POST \
         status=200 org_id=b065b594-6afc-4658-9101-5d9cf3f36b7b principal_id=87655c36-8d63-48fe-9a1e-{number:012x} \
         user_agent=Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/537.36 trace_id={} query={{}}",
        1_747_613_019_000 + number,
        1_146_381_705_542_353_508 + number / 3,
    )
    .into_bytes();
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
}

impl Daemon {
    fn start(key: &SigningKey) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        std::fs::write(path.join("cert.pem"), made.cert.pem()).unwrap();
        std::fs::write(path.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
        let document = auditgate::trust::jwks::document(&[(None, key.verifying_key().to_bytes())]);
        std::fs::write(path.join("jwks.json"), document).unwrap();
        std::fs::write(path.join("config.toml"), CONFIG).unwrap();
        let unit = include_str!("../systemd/auditgate.service");
        let environment = unit.lines().filter_map(|line| line.strip_prefix("Environment=")?.split_once('='));
        let mut child = Command::new(env!("CARGO_BIN_EXE_auditgate"))
            .envs(environment)
            .args(["serve", "--config"])
            .arg(path.join("config.toml"))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
        let port = log
            .find_map(|line| {
                let line = line.unwrap();
                let (_, rest) = line.split_once("listening on https://127.0.0.1:")?;
                Some(rest.split_whitespace().next()?.parse().unwrap())
            })
            .expect("the daemon did not start");
        std::thread::spawn(move || log.for_each(drop));
        let mut roots = RootCertStore::empty();
        roots.add(made.cert.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Self { child, dir, port, tls: Arc::new(tls) }
    }

    /// CPU microseconds an event of the server, from the first post until the last line is in the
    /// file; and the wall time.
    fn whole_path(&self, lines: &[Line]) -> (f64, Duration) {
        let bodies: Vec<Vec<u8>> = lines
            .chunks(EVENTS_A_BATCH)
            .map(|batch| {
                let text: Vec<u8> =
                    batch.iter().flat_map(|line| line.bytes.iter().chain(b"\n")).copied().collect();
                batch::encode(&text).unwrap()
            })
            .collect();
        let size: usize = lines.iter().map(|line| line.bytes.len() + 1).sum();
        let process = self.child.id().to_string();
        let (before, start) = (cpu(&process), Instant::now());
        std::thread::scope(|scope| {
            for part in bodies.chunks(bodies.len().div_ceil(CONNECTIONS)) {
                scope.spawn(move || self.post(part));
            }
        });
        let file = self.dir.path().join("verified.log");
        while file.metadata().unwrap().len() < size as u64 {
            assert!(start.elapsed() < Duration::from_secs(120), "the file does not fill up");
            std::thread::sleep(Duration::from_millis(5));
        }
        let wall = start.elapsed();
        ((cpu(&process) - before).as_secs_f64() * 1e6 / lines.len() as f64, wall)
    }

    fn post(&self, bodies: &[Vec<u8>]) {
        let name = ServerName::try_from("localhost").unwrap();
        let session = ClientConnection::new(Arc::clone(&self.tls), name).unwrap();
        let mut stream = StreamOwned::new(session, TcpStream::connect(("127.0.0.1", self.port)).unwrap());
        for body in bodies {
            let head = format!(
                "POST /us HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer bench\r\nContent-Type: text/plain\r\n\
                 Content-Encoding: application/gzip\r\nContent-Length: {}\r\n\r\n",
                body.len()
            );
            stream.write_all(head.as_bytes()).unwrap();
            stream.write_all(body).unwrap();
            stream.flush().unwrap();
            let mut answer = Vec::new();
            let wanted = format!("{{\"accepted\":{EVENTS_A_BATCH},\"duplicates\":0,\"quarantined\":0}}");
            while !answer.ends_with(wanted.as_bytes()) {
                let mut piece = [0; 1024];
                let read = stream.read(&mut piece).unwrap();
                assert!(read > 0, "no 200: {}", String::from_utf8_lossy(&answer));
                answer.extend_from_slice(&piece[..read]);
            }
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// User and system time of a process with all its threads (proc_pid_stat(5), fields 14 and 15).
fn cpu(process: &str) -> Duration {
    let stat = std::fs::read_to_string(Path::new("/proc").join(process).join("stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum();
    // A tick is 10 ms on every Linux that Rust's standard library runs on.
    Duration::from_millis(ticks * 10)
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
[sinks.verified]
type = "file"
path = "verified.log"
format = "raw"
[sinks.rejects]
type = "file"
stream = "quarantine"
path = "rejects.jsonl"
format = "json"
"#;
