//! `auditgate send`: events from files, from standard input or generated, to a receiver.
//!
//! A thread reads, formats and signs; the runtime batches, posts and reports, so that a batch is
//! sent when its linger time is over even while standard input is silent.

use std::borrow::Cow;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytesize::ByteSize;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::sync::mpsc;
use zeroize::Zeroizing;

use super::exit::Failure;
use crate::escape::escape;
use crate::net::{Endpoint, HeaderValue};
use crate::send::{
    BatchLimits, Delivered, Options, Report, Retry, SendError, Sender, SigningKey, Summary, complete, line,
    sample,
};
use crate::verify::read::unpacked;
use crate::wire::batch::{Coding, Packing};
use crate::wire::event::{Format, Reason};
use crate::wire::line::Line;
use crate::wire::record;

/// Environment variable with the `Authorization` value, used when no argument gives one.
const AUTHORIZATION_VARIABLE: &str = "AUDITGATE_AUTHORIZATION";
/// Maximum length of an `Authorization` value. A longer file is something else.
const MAX_AUTHORIZATION_BYTES: u64 = 64 * 1024;
/// Number of lines that are queued between the reading thread and the sender.
const READ_AHEAD: usize = 64;

/// Sends events to a receiver, signed, batched and compressed as Kong Konnect does it.
///
/// A batch that gets no answer, a 429 or a 500 is sent again after 1 s, 2 s and so on, or when the
/// receiver says. One line is printed for each batch, and a summary at the end.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Files with one event a line, plain or compressed (gzip, zstd; recognised by their first
    /// bytes); `-`, the default, is standard input
    #[arg(value_name = "FILE", conflicts_with = "generate")]
    pub files: Vec<PathBuf>,

    /// Where to post: https, or http on loopback
    #[arg(long, value_name = "URL")]
    pub to: String,

    /// The key to sign with: an Ed25519 key in PKCS#8 PEM, as `auditgate keygen` writes it
    #[arg(long, value_name = "FILE", conflicts_with = "unsigned")]
    pub key: Option<PathBuf>,

    /// Send events without a signature
    #[arg(long)]
    pub unsigned: bool,

    /// Generate N sample events instead of reading any
    #[arg(long, value_name = "N")]
    pub generate: Option<u64>,

    /// Generate the same sample events each time, apart from their times
    #[arg(long, value_name = "N", requires = "generate")]
    pub seed: Option<u64>,

    /// How events are spelled: cef, json or cps [default: as they came; cef for sample events]
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<Format>,

    /// What the files hold
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = InputFormat::Events)]
    pub input_format: InputFormat,

    /// A file with the value of the Authorization header, such as `Bearer abc`
    #[arg(long, value_name = "FILE", conflicts_with = "authorization")]
    pub authorization_file: Option<PathBuf>,

    /// The value of the Authorization header; other users can see it among the processes, so prefer
    /// the file or the variable AUDITGATE_AUTHORIZATION
    #[arg(long, value_name = "VALUE", value_parser = authorization_value)]
    pub authorization: Option<HeaderValue>,

    /// A PEM file with the certificate authorities to trust instead of the system's
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,

    /// Maximum number of events in one batch
    #[arg(long, value_name = "N", default_value = "500")]
    pub batch_events: NonZeroUsize,

    /// Maximum number of bytes in one batch, before compression
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "1MiB")]
    pub batch_bytes: NonZeroUsize,

    /// How long an event waits for others to share its batch
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "1s")]
    pub linger: Duration,

    /// How many batches are in flight at a time; with more than one their order is not kept
    #[arg(long, value_name = "N", default_value = "1")]
    pub connections: NonZeroUsize,

    /// How often a batch is sent again
    #[arg(long, value_name = "N", default_value_t = Retry::default().retries)]
    pub retries: u32,

    /// How long one post may take
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "30s")]
    pub timeout: Duration,

    /// Print nothing on standard output
    #[arg(long)]
    pub quiet: bool,
}

/// Content of the input lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum InputFormat {
    /// Events in CEF, JSON or CPS, each signed anew
    Events,
    /// Lines that are sent as they are
    Raw,
    /// Lines of a quarantine file, whose `raw` is sent as it is
    Quarantine,
}

/// Sends everything, and prints to `out` the result of each batch. Input lines that cannot be sent
/// are reported on standard error, and the others are still sent.
///
/// # Errors
/// A batch that was not delivered or a bad input line (exit code 1), arguments that contradict each
/// other (2), a file that cannot be read (74), an unusable key, certificate authority or
/// authorization (78).
pub fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let mut complaints = io::stderr();
    let console = Console { stdin: Box::new(io::stdin()), out, complaints: &mut complaints };
    send(args, &|name| std::env::var_os(name), console)
}

/// Input and output of a run, which tests replace.
struct Console<'a> {
    stdin: Box<dyn Read + Send>,
    out: &'a mut dyn Write,
    complaints: &'a mut dyn Write,
}

fn send(
    args: &Args,
    environment: &dyn Fn(&str) -> Option<OsString>,
    console: Console<'_>,
) -> Result<(), Failure> {
    let treatment = treatment(args)?;
    // Not by clap, which would repeat a password in the URL.
    let endpoint = Endpoint::parse(&args.to).map_err(|error| Failure::usage(format!("--to: {error}")))?;
    let (settled, reports) = mpsc::unbounded_channel();
    let options = Options {
        authorization: authorization(args, environment)?,
        ca: args.ca.clone(),
        batch: BatchLimits {
            events: args.batch_events.get(),
            bytes: args.batch_bytes.get(),
            linger: args.linger,
        },
        retry: Retry { retries: args.retries, ..Retry::default() },
        connections: args.connections,
        timeout: args.timeout,
        observer: Some(Box::new(move |report| {
            // The receiver is gone only when the run has failed already.
            let _ = settled.send(shown(report));
        })),
        ..Options::new(endpoint)
    };
    let Console { stdin, out, complaints } = console;
    let input = Input::open(args, stdin)?;
    let longest = longest_input_line(args.batch_bytes.get(), &treatment);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::io(format!("cannot start the runtime: {error}")))?;
    let out: Option<&mut dyn Write> = if args.quiet { None } else { Some(out) };
    runtime.block_on(async move {
        let sender = Sender::new(options).map_err(|error| match error {
            SendError::Tls(error) => Failure::config(error),
            error => Failure::bug(error),
        })?;
        let (feed, fed) = mpsc::channel(READ_AHEAD);
        // Not joined: it ends with its input, or when its lines are no longer taken, and a read
        // from a silent terminal cannot be interrupted.
        std::thread::Builder::new()
            .name("input".to_owned())
            .spawn(move || input.read(&treatment, longest, &feed))
            .map_err(|error| Failure::io(format!("cannot start a thread for the input: {error}")))?;
        Run { out, complaints, unwritable: None, bad_lines: 0, unreadable: None }
            .go(sender, fed, reports)
            .await
    })
}

/// Way in which an input line becomes a line to send.
enum Treatment {
    Events { format: Option<Format>, key: Option<Box<SigningKey>> },
    Raw,
    Quarantine,
}

fn treatment(args: &Args) -> Result<Treatment, Failure> {
    let treatment = match args.input_format {
        InputFormat::Events => {
            let key = match (&args.key, args.unsigned) {
                (Some(path), _) => Some(Box::new(SigningKey::read(path).map_err(Failure::config)?)),
                (None, true) => None,
                (None, false) => {
                    return Err(Failure::usage("there is no key to sign with: add --key FILE or --unsigned"));
                }
            };
            return Ok(Treatment::Events { format: args.format, key });
        }
        InputFormat::Raw => Treatment::Raw,
        InputFormat::Quarantine => Treatment::Quarantine,
    };
    if args.generate.is_some() || args.key.is_some() || args.unsigned || args.format.is_some() {
        return Err(Failure::usage(
            "raw and quarantine lines are sent as they are: leave out --generate, --key, --unsigned and --format",
        ));
    }
    Ok(treatment)
}

/// Returns the value from the argument, the file or the variable, in this order.
fn authorization(
    args: &Args,
    environment: &dyn Fn(&str) -> Option<OsString>,
) -> Result<Option<String>, Failure> {
    if let Some(value) = &args.authorization {
        return Ok(Some(String::from_utf8_lossy(value.as_bytes()).into_owned()));
    }
    let (text, origin) = if let Some(path) = &args.authorization_file {
        let unreadable = |error: &dyn std::fmt::Display| {
            Failure::config(format!("cannot read the authorization from {}: {error}", display(path)))
        };
        let mut text = Zeroizing::new(String::new());
        let file = File::open(path).map_err(|error| unreadable(&error))?;
        file.take(MAX_AUTHORIZATION_BYTES).read_to_string(&mut text).map_err(|error| unreadable(&error))?;
        (text, display(path))
    } else if let Some(value) = environment(AUTHORIZATION_VARIABLE) {
        let text = value.into_string().map_err(|_| {
            Failure::config(format!("the variable {AUTHORIZATION_VARIABLE} is not valid UTF-8"))
        })?;
        (Zeroizing::new(text), format!("the variable {AUTHORIZATION_VARIABLE}"))
    } else {
        return Ok(None);
    };
    authorization_value(text.trim())
        .map(|_| Some(text.trim().to_owned()))
        .map_err(|problem| Failure::config(format!("the authorization in {origin} {problem}")))
}

fn authorization_value(text: &str) -> Result<HeaderValue, &'static str> {
    if text.is_empty() {
        return Err("is empty");
    }
    let mut value = HeaderValue::from_bytes(text.as_bytes())
        .map_err(|_| "holds a control character, which no HTTP header can carry")?;
    value.set_sensitive(true);
    Ok(value)
}

fn size(text: &str) -> Result<NonZeroUsize, &'static str> {
    const NOTATION: &str = "write a number and one of B, KiB, MiB, GiB, such as 1MiB";
    let unit = text.trim_start_matches(|character: char| character.is_ascii_digit() || character == '.');
    if !["", "B", "KiB", "MiB", "GiB"].contains(&unit) {
        return Err(NOTATION);
    }
    let bytes = text.parse::<ByteSize>().map_err(|_| NOTATION)?.as_u64();
    usize::try_from(bytes).ok().and_then(NonZeroUsize::new).ok_or(NOTATION)
}

/// Returns the maximum length of an input line, in bytes. A record spells some bytes in six, and
/// has some members around them. A record of a whole body may be as long as the default of
/// `limits.decoded`.
fn longest_input_line(batch_bytes: usize, treatment: &Treatment) -> usize {
    const BODY: usize = 64 << 20;
    let raw = if matches!(treatment, Treatment::Quarantine) { batch_bytes.max(BODY) } else { batch_bytes };
    raw.saturating_mul(6).saturating_add(64 * 1024)
}

/// Origin of the lines. Everything is open already, so that a missing file stops the run before its
/// first post.
enum Input {
    Files(Vec<(String, Box<dyn Read + Send>)>),
    Samples { count: u64, seed: Option<u64> },
}

/// Message of the reading thread.
enum Fed {
    /// A line to send, and its position.
    Line { line: Vec<u8>, origin: Origin },
    /// A line that cannot be sent, and why.
    Bad { origin: Origin, problem: String },
    /// A file that cannot be read any further.
    Unreadable(String),
}

/// Position of a line.
#[derive(Clone)]
struct Origin {
    file: std::sync::Arc<str>,
    line: u64,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, line {}", self.file, self.line)
    }
}

/// The receiver of the lines is gone.
struct Hangup;

impl Input {
    fn open(args: &Args, stdin: Box<dyn Read + Send>) -> Result<Self, Failure> {
        if let Some(count) = args.generate {
            return Ok(Self::Samples { count, seed: args.seed });
        }
        let mut stdin = Some(stdin);
        let dash = [PathBuf::from("-")];
        let paths = if args.files.is_empty() { &dash[..] } else { &args.files[..] };
        let mut files: Vec<(String, Box<dyn Read + Send>)> = Vec::new();
        for path in paths {
            if path.as_os_str() == "-" {
                let stdin =
                    stdin.take().ok_or_else(|| Failure::usage("standard input (-) is named twice"))?;
                files.push(("standard input".to_owned(), stdin));
            } else {
                let unreadable = |problem: &dyn std::fmt::Display| {
                    Failure::io(format!("cannot read {}: {problem}", display(path)))
                };
                let file = File::open(path).map_err(|error| unreadable(&error))?;
                if file.metadata().is_ok_and(|metadata| metadata.is_dir()) {
                    return Err(unreadable(&"it is a directory"));
                }
                files.push((display(path), Box::new(file)));
            }
        }
        Ok(Self::Files(files))
    }

    fn read(self, treatment: &Treatment, longest: usize, feed: &mpsc::Sender<Fed>) {
        // Whichever side ended the run has reported why.
        let _ = match self {
            Self::Samples { count, seed } => generate(count, seed, treatment, feed),
            Self::Files(files) => files
                .into_iter()
                .try_for_each(|(name, file)| read_file(&name, file, treatment, longest, feed)),
        };
    }
}

fn generate(
    count: u64,
    seed: Option<u64>,
    treatment: &Treatment,
    feed: &mpsc::Sender<Fed>,
) -> Result<(), Hangup> {
    let rng = seed.map_or_else(rand::make_rng, StdRng::seed_from_u64);
    let mut samples = sample::Samples::new(rng, now);
    let (format, key) = match treatment {
        Treatment::Events { format, key } => (format.unwrap_or(Format::Cef), key.as_deref()),
        Treatment::Raw | Treatment::Quarantine => return Ok(()),
    };
    let file = std::sync::Arc::from("sample events");
    for number in 1..=count {
        let Some(event) = samples.next() else { break };
        let origin = Origin { file: std::sync::Arc::clone(&file), line: number };
        let line = line(format, &event, key);
        give(feed, origin, line.map(|line| vec![line]).map_err(|error| error.to_string()))?;
    }
    Ok(())
}

fn read_file(
    name: &str,
    file: Box<dyn Read + Send>,
    treatment: &Treatment,
    longest: usize,
    feed: &mpsc::Sender<Fed>,
) -> Result<(), Hangup> {
    // Here and not when it is opened: a pipe may stay empty for a long time.
    let unpacked = match unpacked(BufReader::with_capacity(64 * 1024, file)) {
        Ok((_, unpacked)) => unpacked,
        Err(error) => {
            let problem = format!("cannot read {name}: {error}");
            return feed.blocking_send(Fed::Unreadable(problem)).map_err(|_| Hangup);
        }
    };
    let mut lines =
        Lines { reader: BufReader::with_capacity(64 * 1024, unpacked), longest, buffer: Vec::new() };
    let name: std::sync::Arc<str> = std::sync::Arc::from(name);
    for number in 1.. {
        let origin = Origin { file: std::sync::Arc::clone(&name), line: number };
        let treated = match lines.next() {
            Ok(None) => break,
            Ok(Some(Ok(text))) if crate::wire::batch::lines(text).next().is_none() => continue,
            Ok(Some(Ok(text))) => treatment.apply(text),
            Ok(Some(Err(TooLong))) => Err(format!("it is longer than {longest} bytes")),
            Err(error) => {
                let problem = format!("cannot read {name} beyond line {}: {error}", number - 1);
                return feed.blocking_send(Fed::Unreadable(problem)).map_err(|_| Hangup);
            }
        };
        give(feed, origin, treated)?;
    }
    Ok(())
}

fn give(
    feed: &mpsc::Sender<Fed>,
    origin: Origin,
    treated: Result<Vec<Vec<u8>>, String>,
) -> Result<(), Hangup> {
    let send = |fed| feed.blocking_send(fed).map_err(|_| Hangup);
    match treated {
        Ok(lines) => lines.into_iter().try_for_each(|line| send(Fed::Line { line, origin: origin.clone() })),
        Err(problem) => send(Fed::Bad { origin, problem }),
    }
}

impl Treatment {
    /// Returns the lines to send for an input line, or what is wrong with it.
    fn apply(&self, text: &[u8]) -> Result<Vec<Vec<u8>>, String> {
        match self {
            Self::Raw => Ok(vec![text.to_vec()]),
            Self::Quarantine => {
                let Some(record::Saved { raw, kind: record::Kind::Quarantined { reason } }) =
                    record::read(text)
                else {
                    return Err(
                        "it is not a quarantine record; for other lines use --input-format raw".to_owned()
                    );
                };
                if reason == Reason::UndecodableBody.as_str() && raw.contains(&b'\n') {
                    return Err("it is a body without an event, whose lines say nothing alone".to_owned());
                }
                // A body of which many lines were rejected is one record.
                Ok(Packing::Lines(Coding::Identity).lines(&raw).map(<[u8]>::to_vec).collect())
            }
            Self::Events { format, key } => {
                let parsed = Line::parse(text).map_err(|malformed| malformed.to_string())?;
                let mut event = parsed.event();
                let format = format.unwrap_or(parsed.format());
                // A CEF line shows whether it has a class; the other formats may lack the whole
                // header.
                if format == Format::Cef {
                    complete(&mut event, now());
                }
                let line = line(format, &event, key.as_deref());
                line.map(|line| vec![line]).map_err(|error| error.to_string())
            }
        }
    }
}

/// Reader of lines of bounded length, without `\n` or `\r\n`.
struct Lines {
    reader: BufReader<Box<dyn Read + Send>>,
    longest: usize,
    buffer: Vec<u8>,
}

/// A line is longer than allowed; it has been skipped.
struct TooLong;

impl Lines {
    /// Returns the next line, or none at the end.
    fn next(&mut self) -> io::Result<Option<Result<&[u8], TooLong>>> {
        self.buffer.clear();
        let limit = u64::try_from(self.longest).unwrap_or(u64::MAX).saturating_add(2);
        if self.reader.by_ref().take(limit).read_until(b'\n', &mut self.buffer)? == 0 {
            return Ok(None);
        }
        let whole = self.buffer.ends_with(b"\n");
        let text = self.buffer.strip_suffix(b"\n").unwrap_or(&self.buffer);
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        if text.len() <= self.longest {
            return Ok(Some(Ok(text)));
        }
        if !whole {
            self.reader.skip_until(b'\n')?;
        }
        Ok(Some(Err(TooLong)))
    }
}

/// A run in progress: hands lines to the sender and prints the reports.
struct Run<'a> {
    out: Option<&'a mut dyn Write>,
    complaints: &'a mut dyn Write,
    /// Error of standard output; delivering the events matters more, so the run goes on.
    unwritable: Option<io::Error>,
    bad_lines: u64,
    unreadable: Option<String>,
}

impl Run<'_> {
    async fn go(
        mut self,
        sender: Sender,
        mut fed: mpsc::Receiver<Fed>,
        mut reports: mpsc::UnboundedReceiver<String>,
    ) -> Result<(), Failure> {
        loop {
            tokio::select! {
                Some(report) = reports.recv() => self.print(&report),
                next = fed.recv() => match next {
                    Some(Fed::Line { line, origin }) => match sender.send_line(line).await {
                        Ok(()) => {}
                        Err(SendError::Line(problem)) => self.complain(&origin, &problem.to_string()),
                        Err(error) => return Err(Failure::bug(error)),
                    },
                    Some(Fed::Bad { origin, problem }) => self.complain(&origin, &problem),
                    Some(Fed::Unreadable(problem)) => {
                        self.unreadable = Some(problem);
                        break;
                    }
                    None => break,
                },
            }
        }
        // Without this, the reports that arrive while closing would be printed all at once.
        let closing = sender.close();
        tokio::pin!(closing);
        let summary = loop {
            tokio::select! {
                biased;
                Some(report) = reports.recv() => self.print(&report),
                summary = &mut closing => break summary.map_err(Failure::bug)?,
            }
        };
        while let Ok(report) = reports.try_recv() {
            self.print(&report);
        }
        self.print(&shown_summary(&summary));
        self.end(&summary)
    }

    fn print(&mut self, text: &str) {
        if self.unwritable.is_none()
            && let Some(out) = &mut self.out
        {
            self.unwritable = writeln!(out, "{text}").and_then(|()| out.flush()).err();
        }
    }

    fn complain(&mut self, origin: &Origin, problem: &str) {
        self.bad_lines += 1;
        // When standard error is closed too, the exit code and the count at the end still tell.
        let _ = writeln!(self.complaints, "{origin}: cannot be sent: {}", escape(problem));
    }

    fn end(self, summary: &Summary) -> Result<(), Failure> {
        let mut problems = Vec::new();
        if let Some(first) = summary.failed.first() {
            problems.push(format!(
                "{} in {} of {} could not be delivered, the first because {}",
                count(summary.events - summary.delivered, "event"),
                summary.failed.len(),
                count(summary.batches, "batch"),
                escape(&first.error.to_string())
            ));
        }
        if self.bad_lines > 0 {
            problems.push(format!("{} could not be sent", count(self.bad_lines, "input line")));
        }
        if let Some(problem) = self.unreadable {
            problems.insert(0, format!("{problem}; the lines before it were handed to the sender"));
            return Err(Failure::io(problems.join("; ")));
        }
        if !problems.is_empty() {
            return Err(Failure::finding(problems.join("; ")));
        }
        match self.unwritable {
            Some(error) => Err(Failure::io(format!(
                "everything was delivered, but standard output cannot be written: {error}"
            ))),
            None => Ok(()),
        }
    }
}

fn shown(report: &Report) -> String {
    let Report { number, events, attempts, .. } = report;
    let events = count(*events, "event");
    match &report.result {
        Ok(Delivered { status, receipt: Some(receipt) }) => format!(
            "batch {number}: {events}, {status}, accepted {}, duplicates {}, quarantined {}",
            receipt.accepted, receipt.duplicates, receipt.quarantined
        ),
        Ok(Delivered { status, receipt: None }) => format!("batch {number}: {events}, {status}, no receipt"),
        Err(error) => {
            // An error can repeat what the receiver's certificate says.
            let (attempts, error) = (count(*attempts, "attempt"), error.to_string());
            format!("batch {number}: {events}, not delivered, {attempts}: {}", escape(&error))
        }
    }
}

fn shown_summary(summary: &Summary) -> String {
    let mut text = format!(
        "{} in {}: accepted {}, duplicates {}, quarantined {}",
        count(summary.events, "event"),
        count(summary.batches, "batch"),
        summary.receipts.accepted,
        summary.receipts.duplicates,
        summary.receipts.quarantined
    );
    if summary.without_receipt > 0 {
        text.push_str(&format!(", without a receipt {}", summary.without_receipt));
    }
    if summary.events > summary.delivered {
        text.push_str(&format!(", not delivered {}", summary.events - summary.delivered));
    }
    text
}

fn count(number: impl TryInto<u64>, noun: &str) -> String {
    let number = number.try_into().unwrap_or(u64::MAX);
    let plural = match (number, noun) {
        (1, _) => Cow::Borrowed(noun),
        (_, "batch") => Cow::Borrowed("batches"),
        _ => Cow::Owned(format!("{noun}s")),
    };
    format!("{number} {plural}")
}

fn display(path: &Path) -> String {
    escape(&path.to_string_lossy()).into_owned()
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
