//! `auditgate demo`: the whole main job on loopback in one go, with the real daemon and the real sender.

use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::RngExt as _;
use rustix::process::{Pid, Signal, kill_process};

use super::exit::Failure;
use super::{keygen, verify};
use crate::clock::Clock;
use crate::escape::escape;
use crate::net::Endpoint;
use crate::send::sample::Samples;
use crate::send::{self, BatchLimits, Options, Sender, SigningKey, Summary};
use crate::wire::event::{Event, Format};

/// Runs the whole main job on this machine's loopback, and exits.
///
/// Makes a certificate authority, a server certificate, a signing key, a token and a configuration in DIR, starts
/// the daemon, sends sample events through the sender over TLS (among them repeats, a tampered line, an unsigned
/// one and a malformed one), and shows what came out.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Where everything is kept; a second run goes on there
    #[arg(long, value_name = "DIR", default_value = "auditgate-demo")]
    pub dir: PathBuf,

    /// How many different events are sent
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub events: usize,

    /// How the events are spelled: cef, json or cps
    #[arg(long, value_name = "FORMAT", default_value = "cef")]
    pub format: Format,
}

/// Events in one batch, so that a story has several.
const BATCH: usize = 250;

/// How many events are sent a second time.
const REPEATS: usize = 25;

/// How long the daemon may take to start.
const START: Duration = Duration::from_secs(30);

/// Tells the story.
///
/// # Errors
/// 74 when a file, a socket or the daemon fails, 70 when what came out is not what went in.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let story = Story::prepare(args, out)?;
    story.tell(args, out)
}

/// The demo's directory, ready.
struct Story {
    dir: PathBuf,
    port: u16,
    token: String,
    key: SigningKey,
    verified_before: u64,
    quarantine_before: u64,
}

impl Story {
    fn prepare(args: &Args, out: &mut dyn Write) -> Result<Self, Failure> {
        let dir = args.dir.clone();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(failed("make", &dir))?;
        let dir = dir.canonicalize().map_err(failed("find", &dir))?;
        say(out, &format!("1. Everything is kept in {}", args.dir.display()))?;

        certificates(&dir)?;
        say(
            out,
            "   ca.pem, cert.pem, key.pem   a certificate authority and the server's certificate from it",
        )?;
        let key_file = dir.join("signing-key.pem");
        if !key_file.exists() {
            keygen::run(&keygen::Args { dir: dir.clone() }, &mut io::sink())?;
        }
        let key = SigningKey::read(&key_file).map_err(Failure::io)?;
        say(out, "   signing-key.pem, jwks.json  the producer's Ed25519 key, and its published half")?;
        let token_file = dir.join("token");
        if !token_file.exists() {
            let secret = URL_SAFE_NO_PAD.encode(rand::rng().random::<[u8; 32]>());
            write_private(&token_file, &format!("Bearer {secret}\n"))?;
        }
        let token = fs::read_to_string(&token_file).map_err(failed("read", &token_file))?.trim().to_owned();
        say(out, "   token                       what the producer must send as Authorization")?;
        let (port, admin) = (free_port()?, free_port()?);
        let config_file = dir.join("config.toml");
        fs::write(&config_file, configuration(port, admin)).map_err(failed("write", &config_file))?;
        say(out, "   config.toml                 the daemon's configuration")?;

        let size = |name: &str| fs::metadata(dir.join(name)).map_or(0, |metadata| metadata.len());
        let (verified_before, quarantine_before) = (size("verified.log"), size("quarantine.jsonl"));
        Ok(Self { dir, port, token, key, verified_before, quarantine_before })
    }

    fn tell(&self, args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
        let daemon = Daemon::start(&self.dir)?;
        say(out, &format!("\n2. The daemon listens on https://127.0.0.1:{}/konnect/demo", self.port))?;

        let traffic = self.traffic(args)?;
        let repeats = args.events.min(REPEATS);
        say(
            out,
            &format!(
                "\n3. The sender posts {} events as {}, {repeats} of them twice, and a tampered, an unsigned and a malformed line:",
                args.events, args.format
            ),
        )?;
        let summary = self.send(traffic, out)?;
        if let Some(failed) = summary.failed.first() {
            return Err(Failure::io(format!("batch {} was not delivered: {}", failed.number, failed.error)));
        }

        daemon.stop()?;
        say(out, "\n4. The daemon was stopped with SIGTERM: it delivered what it had and ended.")?;
        let verified = self.written("verified.log", self.verified_before)?;
        let lines: Vec<&str> = verified.lines().collect();
        say(
            out,
            &format!("   verified.log has {} new lines, exactly as they were sent. The first:", lines.len()),
        )?;
        for line in lines.iter().take(3) {
            say(out, &format!("     {}", shortened(line, 150)))?;
        }
        let quarantine = self.written("quarantine.jsonl", self.quarantine_before)?;
        say(out, "   quarantine.jsonl has the others, with the reason:")?;
        for line in quarantine.lines() {
            let value: serde_json::Value = serde_json::from_str(line).map_err(Failure::bug)?;
            let text = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
            say(out, &format!("     {:<13} {}", text("reason"), shortened(&text("detail"), 60)))?;
            say(out, &format!("                   {}", shortened(&text("raw"), 100)))?;
        }

        say(out, "\n5. The file proves itself again, offline (auditgate verify):")?;
        write!(out, "   ").map_err(|error| unwritable(&error))?;
        let check = verify::Args {
            jwks: vec![self.dir.join("jwks.json").display().to_string()],
            ca: None,
            json: false,
            since: None,
            until: None,
            explain: None,
            files: vec![self.dir.join("verified.log")],
        };
        verify::run(&check, out)?;

        let accepted = summary.receipts.accepted;
        if (accepted, lines.len(), quarantine.lines().count()) != (args.events as u64, args.events, 3) {
            return Err(Failure::bug(format!(
                "{} events were sent, {accepted} accepted, {} written and {} quarantined",
                args.events,
                lines.len(),
                quarantine.lines().count()
            )));
        }
        self.outlook(args, out)
    }

    /// The lines of the story, in the order in which they are sent.
    fn traffic(&self, args: &Args) -> Result<Vec<Vec<u8>>, Failure> {
        let now = Clock::system().wall;
        let mut samples = Samples::new(rand::rng(), || now());
        let mut next = || samples.next().ok_or_else(|| Failure::bug("the samples ended"));
        let spell = |event: &Event, key| send::line(args.format, event, key).map_err(Failure::bug);
        let mut lines = Vec::with_capacity(args.events + REPEATS + 3);
        for _ in 0..args.events {
            lines.push(spell(&next()?, Some(&self.key))?);
        }
        let repeated: Vec<_> = lines.iter().take(REPEATS).cloned().collect();
        let odd = [
            tampered(spell(&next()?, Some(&self.key))?),
            spell(&next()?, None)?,
            // A number of its own, or the second run of the demo would find it a duplicate.
            format!("this line is no event, number {:016x}", rand::rng().random::<u64>()).into_bytes(),
        ];
        let middle = lines.len() / 2;
        lines.splice(middle..middle, odd);
        lines.extend(repeated);
        Ok(lines)
    }

    fn send(&self, lines: Vec<Vec<u8>>, out: &mut dyn Write) -> Result<Summary, Failure> {
        let endpoint = Endpoint::parse(&format!("https://127.0.0.1:{}/konnect/demo", self.port));
        let mut options = Options::new(endpoint.map_err(Failure::bug)?);
        options.authorization = Some(self.token.clone());
        options.ca = Some(self.dir.join("ca.pem"));
        options.batch = BatchLimits { events: BATCH, ..BatchLimits::default() };
        let (reports, receipts) = mpsc::channel();
        options.observer = Some(Box::new(move |report| {
            let outcome = match &report.result {
                Ok(delivered) => match &delivered.receipt {
                    Some(receipt) => format!(
                        "200, accepted {}, duplicates {}, quarantined {}",
                        receipt.accepted, receipt.duplicates, receipt.quarantined
                    ),
                    None => "200".to_owned(),
                },
                Err(error) => error.to_string(),
            };
            let _ = reports.send(format!("   batch {}: {} events: {outcome}", report.number, report.events));
        }));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Failure::io(format!("cannot start: {error}")))?;
        let summary = runtime.block_on(async {
            let sender = Sender::new(options).map_err(Failure::io)?;
            for line in lines {
                sender.send_line(line).await.map_err(Failure::io)?;
            }
            sender.close().await.map_err(Failure::io)
        })?;
        for receipt in receipts {
            say(out, &receipt)?;
        }
        Ok(summary)
    }

    /// What this run added to a file.
    fn written(&self, name: &str, from: u64) -> Result<String, Failure> {
        let path = self.dir.join(name);
        let read = || {
            let mut file = fs::File::open(&path)?;
            file.seek(io::SeekFrom::Start(from))?;
            let mut text = Vec::new();
            file.read_to_end(&mut text)?;
            Ok(String::from_utf8_lossy(&text).into_owned())
        };
        read().map_err(failed("read", &path))
    }

    fn outlook(&self, args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
        let dir = args.dir.display();
        let program = std::env::args().next().unwrap_or_else(|| "auditgate".to_owned());
        say(out, "\nTo go on from here:")?;
        say(out, &format!("   {program} serve --config {dir}/config.toml"))?;
        say(
            out,
            &format!(
                "   {program} send --to https://127.0.0.1:{}/konnect/demo --ca {dir}/ca.pem \\\n      \
                 --authorization-file {dir}/token --key {dir}/signing-key.pem --generate 100",
                self.port
            ),
        )?;
        say(out, &format!("   tail -F {dir}/verified.log"))?;
        say(out, &format!("   {program} verify --jwks {dir}/jwks.json {dir}/verified.log"))
    }
}

/// The daemon as a child: this same program.
struct Daemon {
    child: Child,
}

impl Daemon {
    /// Starts it and waits until it listens. Its log goes to `daemon.log`.
    fn start(dir: &Path) -> Result<Self, Failure> {
        let program = std::env::current_exe()
            .map_err(|error| Failure::io(format!("cannot find this program: {error}")))?;
        let log_path = dir.join("daemon.log");
        let mut log = fs::File::create(&log_path).map_err(failed("write", &log_path))?;
        let mut child = Command::new(program)
            .args(["serve", "--config"])
            .arg(dir.join("config.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| Failure::io(format!("cannot start the daemon: {error}")))?;
        let (told, listening) = mpsc::channel();
        if let Some(stderr) = child.stderr.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    let _ = writeln!(log, "{line}");
                    let _ = told.send(line);
                }
            });
        }
        let daemon = Self { child };
        let mut last = String::new();
        let deadline = std::time::Instant::now() + START;
        loop {
            match listening.recv_timeout(deadline.saturating_duration_since(std::time::Instant::now())) {
                Ok(line) if line.contains("listening on ") => return Ok(daemon),
                Ok(line) => last = line,
                // It ended, or it hangs: dropping it sees to that.
                Err(_) => return Err(Failure::io(format!("the daemon did not start; it said: {last}"))),
            }
        }
    }

    /// Ends it as systemd would.
    fn stop(mut self) -> Result<(), Failure> {
        let stopped = |what: &dyn std::fmt::Display| Failure::io(format!("the daemon did not stop: {what}"));
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| stopped(&"it has no process number"))?;
        kill_process(pid, Signal::TERM).map_err(|error| stopped(&error))?;
        let status = self.child.wait().map_err(|error| stopped(&error))?;
        if status.success() { Ok(()) } else { Err(stopped(&status)) }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// One digit of the trace ID is another one now.
fn tampered(mut line: Vec<u8>) -> Vec<u8> {
    if let Some(at) = memchr::memmem::find(&line, b"trace_id").and_then(|at| {
        let digit = line[at..].iter().position(u8::is_ascii_digit)?;
        Some(at + digit)
    }) {
        line[at] = if line[at] == b'9' { b'1' } else { line[at] + 1 };
    }
    line
}

/// A certificate authority for this directory, and a server certificate from it for loopback, a year long.
fn certificates(dir: &Path) -> Result<(), Failure> {
    let made = || -> Result<(String, String, String), rcgen::Error> {
        let year = time::OffsetDateTime::now_utc() + time::Duration::days(365);
        let mut authority = rcgen::CertificateParams::default();
        authority.distinguished_name.push(rcgen::DnType::CommonName, "auditgate demo CA");
        authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        authority.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
        authority.not_after = year;
        let authority_key = rcgen::KeyPair::generate()?;
        let authority_certificate = authority.self_signed(&authority_key)?;
        let issuer = rcgen::Issuer::new(authority, authority_key);
        let names = ["localhost".to_owned(), Ipv4Addr::LOCALHOST.to_string()];
        let mut server = rcgen::CertificateParams::new(names)?;
        server.distinguished_name.push(rcgen::DnType::CommonName, "localhost");
        server.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
        server.not_after = year;
        let server_key = rcgen::KeyPair::generate()?;
        let server_certificate = server.signed_by(&server_key, &issuer)?;
        let authority = authority_certificate.pem();
        // The server's first, then its issuer's.
        let chain = format!("{}{authority}", server_certificate.pem());
        Ok((authority, chain, server_key.serialize_pem()))
    };
    let (authority, certificate, key) = made().map_err(Failure::bug)?;
    for (name, text) in [("ca.pem", authority), ("cert.pem", certificate)] {
        let path = dir.join(name);
        fs::write(&path, text).map_err(failed("write", &path))?;
    }
    write_private(&dir.join("key.pem"), &key)
}

fn configuration(port: u16, admin: u16) -> String {
    format!(
        r#"# Written by `auditgate demo`; the next run writes it anew.
data_dir = "data"

[listen]
address = "127.0.0.1:{port}"
tls = {{ cert = "cert.pem", key = "key.pem" }}

[admin]
address = "127.0.0.1:{admin}"

[sources.demo]
path = "/konnect/demo"
authorization = {{ file = "token" }}
jwks = {{ file = "jwks.json" }}

[sinks.verified]
type = "file"
path = "verified.log"
format = "raw"

[sinks.rejects]
type = "file"
stream = "quarantine"
path = "quarantine.jsonl"
format = "json"
"#
    )
}

/// A port that nobody has at this moment.
fn free_port() -> Result<u16, Failure> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|socket| socket.local_addr())
        .map(|address| address.port())
        .map_err(|error| Failure::io(format!("cannot find a free port: {error}")))
}

fn write_private(path: &Path, text: &str) -> Result<(), Failure> {
    let mut options = fs::File::options();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(path).and_then(|mut file| file.write_all(text.as_bytes())).map_err(failed("write", path))
}

fn failed<'a>(what: &'a str, path: &'a Path) -> impl Fn(io::Error) -> Failure + 'a {
    move |error| Failure::io(format!("cannot {what} {}: {error}", path.display()))
}

fn say(out: &mut dyn Write, text: &str) -> Result<(), Failure> {
    writeln!(out, "{text}").map_err(|error| unwritable(&error))
}

fn unwritable(error: &io::Error) -> Failure {
    Failure::io(format!("cannot write to standard output: {error}"))
}

/// The beginning of a text, safe for a terminal.
fn shortened(text: &str, length: usize) -> String {
    let text = escape(text);
    match text.char_indices().nth(length) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.into_owned(),
    }
}
