//! `auditgate demo`: the whole main job on loopback in one go, with the real daemon and the real
//! sender.

mod daemon;
mod files;

use std::fs;
use std::io::{self, IsTerminal as _, Read as _, Seek as _, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::sync::mpsc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::RngExt as _;

use super::exit::Failure;
use super::{keygen, verify};
use crate::clock::Clock;
use crate::config::{self, Secrets};
use crate::deliver::sqlite::stored;
use crate::escape::escape;
use crate::net::Endpoint;
use crate::send::sample::Samples;
use crate::send::{self, BatchLimits, Report, Sender, SigningKey, Summary};
use crate::wire::event::{Event, Format};
use daemon::Daemon;
use files::{configuration, failed, free_port, write_private};

/// Runs the whole main job on this machine's loopback, and exits.
///
/// Makes a certificate authority, a server certificate, a signing key, a token and a configuration
/// in DIR, starts the daemon, sends sample events through the sender over TLS (among them repeats, a
/// tampered line, an unsigned one and a malformed one), and shows what came out. A second run uses
/// what is there.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Where everything is kept; a second run goes on there
    #[arg(long, value_name = "DIR", default_value = "auditgate-demo")]
    pub dir: PathBuf,

    /// Number of different events to send
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub events: usize,

    /// How the events are spelled: cef, json or cps
    #[arg(long, value_name = "FORMAT", default_value = "cef")]
    pub format: Format,
}

/// Maximum number of lines in a batch, so that a run has several batches.
const BATCH: usize = 250;

/// Maximum number of events that are sent a second time.
const REPEATS: usize = 25;

/// Number of columns of the longest line that is printed, paths apart.
const COLUMNS: usize = 100;

/// Runs the demo.
///
/// # Errors
/// 74 when a file, a socket or the daemon fails, 70 when what came out is not what went in.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let is_coloured = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let mut page = Page { out, is_coloured };
    let site = Site::prepare(args, &mut page)?;
    site.run(args, &mut page)
}

/// What is printed.
struct Page<'o> {
    out: &'o mut dyn Write,
    is_coloured: bool,
}

impl Page<'_> {
    fn heading(&mut self, text: &str) -> Result<(), Failure> {
        if self.is_coloured {
            self.line(&format!("\n\x1b[1m{text}\x1b[0m"))
        } else {
            self.line(&format!("\n{text}"))
        }
    }

    fn line(&mut self, text: &str) -> Result<(), Failure> {
        let written = writeln!(self.out, "{text}");
        written.map_err(|error| Failure::io(format!("cannot write to standard output: {error}")))
    }

    /// Prints a text of any length below each other.
    fn wrapped(&mut self, text: &str) -> Result<(), Failure> {
        let mut line = String::new();
        for word in text.split(' ') {
            if line.chars().count() + word.chars().count() + 4 > COLUMNS {
                self.line(&format!("   {line}"))?;
                line.clear();
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
        self.line(&format!("   {line}"))
    }

    /// Prints a command, each argument on a line of its own where they do not fit into one.
    fn command(&mut self, parts: &[String]) -> Result<(), Failure> {
        let line = parts.join(" ");
        if line.chars().count() + 3 <= COLUMNS {
            return self.line(&format!("   {line}"));
        }
        self.line(&format!("   {}", parts.join(" \\\n      ")))
    }
}

/// The demo's directory, ready.
struct Site {
    dir: PathBuf,
    address: SocketAddr,
    token: String,
    key: SigningKey,
    verified_before: u64,
    quarantine_before: u64,
}

impl Site {
    fn prepare(args: &Args, page: &mut Page<'_>) -> Result<Self, Failure> {
        let dir = args.dir.clone();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(failed("make", &dir))?;
        let dir = dir.canonicalize().map_err(failed("find", &dir))?;
        page.heading(&format!("1. Everything is kept in {}", args.dir.display()))?;

        if !dir.join("key.pem").exists() {
            files::certificates(&dir)?;
        }
        let key_file = dir.join("signing-key.pem");
        if !key_file.exists() {
            keygen::run(&keygen::Args { dir: dir.clone() }, &mut io::sink())?;
        }
        let key = SigningKey::read(&key_file).map_err(Failure::io)?;
        let token_file = dir.join("token");
        if !token_file.exists() {
            let secret = URL_SAFE_NO_PAD.encode(rand::rng().random::<[u8; 32]>());
            write_private(&token_file, &format!("Bearer {secret}\n"))?;
        }
        let token = fs::read_to_string(&token_file).map_err(failed("read", &token_file))?.trim().to_owned();
        let config_file = dir.join("config.toml");
        if !config_file.exists() {
            let text = configuration(free_port()?, free_port()?);
            fs::write(&config_file, text).map_err(failed("write", &config_file))?;
        }
        for (files, what) in [
            ("ca.pem, cert.pem, key.pem", "a certificate authority, and the server's certificate from it"),
            ("signing-key.pem, jwks.json", "the producer's Ed25519 key, and its public half"),
            ("token", "what the producer must send as Authorization"),
            ("config.toml", "the daemon's configuration"),
        ] {
            page.line(&format!("   {files:<27} {what}"))?;
        }
        let config = config::load(&config_file, &|name| std::env::var_os(name), Secrets::Require);
        let address = config.map_err(Failure::config)?.listen.address;
        TcpListener::bind(address).map_err(|error| {
            Failure::io(format!(
                "cannot listen on {address}: {error}; end the daemon that runs there, or use another --dir"
            ))
        })?;
        let size = |name: &str| fs::metadata(dir.join(name)).map_or(0, |metadata| metadata.len());
        let (verified_before, quarantine_before) = (size("verified.log"), size("quarantine.jsonl"));
        Ok(Self { dir, address, token, key, verified_before, quarantine_before })
    }

    fn run(&self, args: &Args, page: &mut Page<'_>) -> Result<(), Failure> {
        let daemon = Daemon::start(&self.dir)?;
        page.heading(&format!("2. The daemon listens on {}", self.url()))?;

        let repeats = args.events.min(REPEATS);
        page.heading(&format!(
            "3. The sender posts {} events as {}, {repeats} of them twice, and three bad lines:",
            args.events, args.format
        ))?;
        let summary = self.send(self.traffic(args)?, page)?;
        if let Some(failed) = summary.failed.first() {
            return Err(Failure::io(format!("batch {} was not delivered: {}", failed.number, failed.error)));
        }
        daemon.stop()?;
        page.heading("4. The daemon was ended with SIGTERM: it first delivered what it had.")?;
        let verified = self.added("verified.log", self.verified_before)?;
        let lines: Vec<&str> = verified.lines().collect();
        page.line(&format!("   verified.log has {} new lines, exactly as they were sent:", lines.len()))?;
        for line in lines.iter().take(2) {
            page.line(&format!("   {}", shortened(line, COLUMNS - 3)))?;
        }
        let quarantine = self.added("quarantine.jsonl", self.quarantine_before)?;
        page.line("   quarantine.jsonl has the bad ones, each with its reason:")?;
        for line in quarantine.lines() {
            let value: serde_json::Value = serde_json::from_str(line).map_err(Failure::bug)?;
            let text = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
            page.line(&format!("   {:<13}  {}", text("reason"), shortened(&text("detail"), COLUMNS - 18)))?;
        }
        let (accepted, quarantined) = (summary.receipts.accepted, quarantine.lines().count());
        let all_quarantined = self.added("quarantine.jsonl", 0)?.lines().count();
        self.verify(args, all_quarantined - quarantined + 1, page)?;
        self.query(args, page)?;

        if (accepted, lines.len(), quarantined) != (args.events as u64, args.events, 3) {
            return Err(Failure::bug(format!(
                "{} events were sent, {accepted} accepted, {} written and {quarantined} quarantined",
                args.events,
                lines.len()
            )));
        }
        self.next_commands(args, page)
    }

    fn url(&self) -> String {
        format!("https://{}/konnect/demo", self.address)
    }

    /// Makes the lines to send, in their order.
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
        let bad = [
            tampered(spell(&next()?, Some(&self.key))?),
            spell(&next()?, None)?,
            // A number of its own, or the second run of the demo would find it a duplicate.
            format!("this line is not an event, number {:016x}", rand::rng().random::<u64>()).into_bytes(),
        ];
        let middle = lines.len() / 2;
        lines.splice(middle..middle, bad);
        lines.extend(repeated);
        Ok(lines)
    }

    fn send(&self, lines: Vec<Vec<u8>>, page: &mut Page<'_>) -> Result<Summary, Failure> {
        let endpoint: Endpoint = self.url().parse().map_err(Failure::bug)?;
        let (reports, settled) = mpsc::channel();
        let builder = Sender::builder(endpoint)
            .authorization(self.token.clone())
            .ca(self.dir.join("ca.pem"))
            .batch(BatchLimits { events: BATCH, ..BatchLimits::default() })
            .observer(Box::new(move |report| {
                let _ = reports.send(in_words(report));
            }));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Failure::io(format!("cannot start the sender: {error}")))?;
        let summary = runtime.block_on(async {
            let sender = builder.build().map_err(Failure::io)?;
            for line in lines {
                // The report of its batch says what became of it.
                drop(sender.enqueue_line(line).await.map_err(Failure::io)?);
            }
            sender.close().await.map_err(Failure::io)
        })?;
        for report in settled {
            page.wrapped(&report)?;
        }
        Ok(summary)
    }

    /// Returns what this run added to a file.
    fn added(&self, name: &str, from: u64) -> Result<String, Failure> {
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

    /// Verifies the output, and explains what is wrong with the tampered line of the quarantine.
    fn verify(&self, args: &Args, tampered: usize, page: &mut Page<'_>) -> Result<(), Failure> {
        page.heading("5. auditgate verify proves the lines again, offline:")?;
        let check = |explain, files| {
            let jwks = vec![self.dir.join("jwks.json").display().to_string()];
            let check = verify::Args {
                jwks,
                config: None,
                ca: None,
                skip_quarantine: false,
                json: false,
                quiet: false,
                since: None,
                until: None,
                explain,
                files,
            };
            let mut said = Vec::new();
            let result = verify::run(&check, &mut said);
            (result, String::from_utf8_lossy(&said).into_owned())
        };
        let (proved, said) = check(None, vec![self.dir.join("verified.log")]);
        page.line(&format!("   verified.log: {}", said.trim_end()))?;
        proved?;

        let tampered = format!("quarantine.jsonl:{tampered}");
        page.heading("6. And auditgate verify --explain says what is wrong with the tampered line:")?;
        let (_, said) = check(Some(self.dir.join(&tampered).display().to_string()), Vec::new());
        for finding in said.lines().filter_map(|line| line.strip_prefix("- ")).take(1) {
            page.wrapped(finding)?;
        }
        page.command(&[
            format!("{} verify", program()),
            format!("--jwks {}/jwks.json", args.dir.display()),
            format!("--explain {}/{tampered}", args.dir.display()),
        ])
    }

    /// Asks the SQLite sink.
    fn query(&self, args: &Args, page: &mut Page<'_>) -> Result<(), Failure> {
        let path = self.dir.join("events.db");
        page.heading("7. events.db, a SQLite sink, answers questions, such as which events are how many:")?;
        let counts = stored::count_by_name(&path)
            .map_err(|error| Failure::io(format!("cannot read {}: {error}", path.display())))?;
        for (name, count) in counts {
            page.line(&format!("   {count:>7}  {}", shortened(&name, COLUMNS - 12)))?;
        }
        let database = format!("sqlite3 {}/events.db", args.dir.display());
        page.command(&[database, format!("\"{}\"", stored::COUNT_BY_NAME)])
    }

    fn next_commands(&self, args: &Args, page: &mut Page<'_>) -> Result<(), Failure> {
        let (dir, program) = (args.dir.display(), program());
        page.heading("To go on from here, start the daemon in one terminal:")?;
        page.command(&[format!("{program} serve --config {dir}/config.toml")])?;
        page.heading("and in others watch the output, send, and verify:")?;
        page.command(&[format!("tail -F {dir}/verified.log")])?;
        page.command(&[
            format!("{program} send --to {}", self.url()),
            format!("--ca {dir}/ca.pem"),
            format!("--authorization-file {dir}/token"),
            format!("--key {dir}/signing-key.pem --generate 100"),
        ])?;
        page.command(&[format!("{program} verify --jwks {dir}/jwks.json"), format!("{dir}/verified.log")])
    }
}

/// The program as it was called.
fn program() -> String {
    std::env::args().next().unwrap_or_else(|| "auditgate".to_owned())
}

/// Says what became of a batch.
fn in_words(report: &Report) -> String {
    let answer = match &report.result {
        Ok(delivered) => match delivered.receipt {
            Some(send::Receipt { accepted, duplicates, quarantined }) => {
                let parts = [(accepted, "new"), (duplicates, "known already"), (quarantined, "quarantined")];
                let parts = parts.iter().filter(|(lines, _)| *lines > 0);
                let parts: Vec<_> = parts.map(|(lines, what)| format!("{lines} {what}")).collect();
                format!("200, safe on disk: {}", parts.join(", "))
            }
            None => "200".to_owned(),
        },
        Err(error) => error.to_string(),
    };
    format!("batch {} of {} lines: {answer}", report.number, report.events)
}

/// Changes one digit of the trace ID.
fn tampered(mut line: Vec<u8>) -> Vec<u8> {
    if let Some(at) = memchr::memmem::find(&line, b"trace_id").and_then(|at| {
        let digit = line[at..].iter().position(u8::is_ascii_digit)?;
        Some(at + digit)
    }) {
        line[at] = if line[at] == b'9' { b'1' } else { line[at] + 1 };
    }
    line
}

/// The beginning of a text, safe for a terminal.
fn shortened(text: &str, columns: usize) -> String {
    let text = escape(text);
    match text.char_indices().nth(columns) {
        Some(_) => format!("{}…", text.chars().take(columns - 1).collect::<String>()),
        None => text.into_owned(),
    }
}
