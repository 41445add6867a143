//! Delivery of lines, whatever reads them: options, the run, and what it prints.

use std::borrow::Cow;
use std::cell::RefCell;
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, IsTerminal as _, Read as _, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::sync::mpsc;
use zeroize::Zeroizing;

use super::super::exit::Failure;
use super::display;
use super::load::Latencies;
use crate::escape::escape;
use crate::net::{ClientOptions, Endpoint, HeaderValue, Identity, Pin};
use crate::send::{BatchLimits, Delivered, RateLimiter, Report, Retry, Retrying, SendError, Sender, Summary};

/// Environment variable with the `Authorization` value, used when no argument gives one.
pub(super) const AUTHORIZATION_VARIABLE: &str = "AUDITGATE_AUTHORIZATION";
/// Maximum length of an `Authorization` value. A longer file is something else.
const MAX_AUTHORIZATION_BYTES: u64 = 64 * 1024;
/// Number of lines that the reading thread hands over together at most, and of such groups that are
/// queued.
const TOGETHER: usize = 64;
const READ_AHEAD: usize = 2;

/// Where lines are sent, and how.
#[derive(clap::Args, Clone, Debug)]
pub struct Delivery {
    /// Where to post: https, or http on loopback
    #[arg(long, value_name = "URL", required = true)]
    pub to: Option<String>,

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

    /// A PEM file with the client certificate for a server that asks for one
    #[arg(long, value_name = "FILE", requires = "client_key")]
    pub client_cert: Option<PathBuf>,

    /// A PEM file with the private key of the client certificate
    #[arg(long, value_name = "FILE", requires = "client_cert")]
    pub client_key: Option<PathBuf>,

    /// The SHA-256 of a public key that the server's certificate may have, as sha256//BASE64; can be
    /// given several times
    #[arg(long = "pin", value_name = "DIGEST")]
    pub pins: Vec<Pin>,

    /// The URL of the HTTP proxy to use instead of the one in HTTPS_PROXY or ALL_PROXY
    #[arg(long, value_name = "URL")]
    pub proxy: Option<String>,

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

    /// How many events are sent a second at most
    #[arg(long, value_name = "N", value_parser = rate)]
    pub rate: Option<f64>,

    /// How often a batch is sent again
    #[arg(long, value_name = "N", default_value_t = Retry::default().retries)]
    pub retries: u32,

    /// How long one post may take
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "30s")]
    pub timeout: Duration,

    /// Exit with 1 when lines were quarantined
    #[arg(long)]
    pub strict: bool,

    /// Print nothing on standard output, and no retries
    #[arg(long)]
    pub quiet: bool,
}

/// Output of a run, which tests replace.
pub(in crate::cli) struct Console<'a> {
    pub(in crate::cli) out: &'a mut dyn Write,
    pub(in crate::cli) complaints: &'a mut dyn Write,
    /// Shows that a batch waits; hidden where standard error is not a terminal.
    pub(in crate::cli) waiting: ProgressBar,
    /// What is printed on `out` is read on the same terminal as the errors.
    pub(in crate::cli) is_one_terminal: bool,
}

impl<'a> Console<'a> {
    /// Returns the console of this process, whose standard error is `complaints`.
    pub(in crate::cli) fn new(out: &'a mut dyn Write, complaints: &'a mut dyn Write) -> Self {
        let waiting = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{msg}") {
            waiting.set_style(style);
        }
        let is_one_terminal = io::stdout().is_terminal() && io::stderr().is_terminal();
        Self { out, complaints, waiting, is_one_terminal }
    }
}

/// Takes what the reading thread reads.
pub(in crate::cli) struct Feed {
    queue: mpsc::Sender<Vec<Fed>>,
    /// What was read and is handed over together: waking the other thread for each line would cost
    /// more than signing it.
    read: RefCell<Vec<Fed>>,
    limiter: Option<RefCell<RateLimiter>>,
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
pub(in crate::cli) struct Origin {
    pub(in crate::cli) file: Arc<str>,
    pub(in crate::cli) line: u64,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, line {}", self.file, self.line)
    }
}

/// The receiver of the lines is gone: the run has ended, and has said why.
pub(in crate::cli) struct Hangup;

impl Feed {
    /// Hands over what an input line became: the lines to send, or why it cannot be sent.
    ///
    /// # Errors
    /// When the run has ended.
    pub(in crate::cli) fn give(
        &self,
        origin: &Origin,
        treated: Result<Vec<Vec<u8>>, String>,
    ) -> Result<(), Hangup> {
        let origin = || origin.clone();
        match treated {
            Ok(lines) => lines.into_iter().try_for_each(|line| {
                if let Some(limiter) = &self.limiter {
                    let wait = limiter.borrow_mut().wait(1, Instant::now());
                    if !wait.is_zero() {
                        self.flush()?;
                    }
                    std::thread::sleep(wait);
                }
                self.send(Fed::Line { line, origin: origin() })
            }),
            Err(problem) => self.send(Fed::Bad { origin: origin(), problem }),
        }
    }

    /// Ends the input with a file that cannot be read any further.
    ///
    /// # Errors
    /// When the run has ended.
    pub(in crate::cli) fn unreadable(&self, problem: String) -> Result<(), Hangup> {
        self.send(Fed::Unreadable(problem))
    }

    fn send(&self, fed: Fed) -> Result<(), Hangup> {
        self.read.borrow_mut().push(fed);
        if self.read.borrow().len() < TOGETHER { Ok(()) } else { self.flush() }
    }

    /// Hands over what was read, before the reading thread waits for more.
    ///
    /// # Errors
    /// When the run has ended.
    pub(in crate::cli) fn flush(&self) -> Result<(), Hangup> {
        let read = self.read.take();
        if read.is_empty() { Ok(()) } else { self.queue.blocking_send(read).map_err(|_| Hangup) }
    }
}

/// News from the sender.
enum News {
    Settled {
        number: u64,
        shown: String,
        events: usize,
        is_delivered: bool,
        latency: Duration,
        /// Every other batch would be refused too, for this reason.
        refused: Option<String>,
    },
    Retrying {
        number: u64,
        shown: String,
    },
}

/// Delivers the lines that `read` hands over, on a thread of its own. `is_load`: throughput and
/// latencies are printed at the end.
///
/// # Errors
/// As [`super::run`].
pub(in crate::cli) fn deliver(
    delivery: &Delivery,
    environment: &dyn Fn(&str) -> Option<OsString>,
    console: Console<'_>,
    is_load: bool,
    read: impl FnOnce(&Feed) -> Result<(), Hangup> + Send + 'static,
) -> Result<(), Failure> {
    let limiter = delivery.rate.map(|rate| RefCell::new(RateLimiter::new(rate)));
    let (settled, news) = mpsc::unbounded_channel();
    let retrying = settled.clone();
    // The receiver of the news is gone only when the run has failed already.
    let mut builder = Sender::builder(delivery.endpoint()?)
        .connection(delivery.client_options())
        .batch(BatchLimits {
            events: delivery.batch_events.get(),
            bytes: delivery.batch_bytes.get(),
            linger: delivery.linger,
        })
        .retry(Retry { retries: delivery.retries, ..Retry::default() })
        .connections(delivery.connections)
        .timeout(delivery.timeout)
        .observer(Box::new(move |report| _ = settled.send(News::settled(report))))
        .retry_observer(Arc::new(move |retry: &Retrying<'_>| _ = retrying.send(News::retrying(retry))));
    if let Some(value) = authorization(delivery, environment)? {
        builder = builder.authorization(value);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::io(format!("cannot start the runtime: {error}")))?;
    // Dropping the runtime ends every post: nothing is sent after this function has returned.
    runtime.block_on(async move {
        let sender = builder.build().map_err(|error| match error {
            SendError::Tls(error) => Failure::config(error),
            error => Failure::bug(error),
        })?;
        let (feed, fed) = mpsc::channel(READ_AHEAD);
        // Not joined: it ends with its input, or when its lines are no longer taken, and a read
        // from a silent terminal cannot be interrupted.
        std::thread::Builder::new()
            .name("input".to_owned())
            // Whichever side ended the run has reported why.
            .spawn(move || {
                let feed = Feed { queue: feed, read: RefCell::default(), limiter };
                _ = read(&feed).and_then(|()| feed.flush());
            })
            .map_err(|error| Failure::io(format!("cannot start a thread for the input: {error}")))?;
        let run = Run {
            console,
            is_quiet: delivery.quiet,
            is_strict: delivery.strict,
            waiting: None,
            unwritable: None,
            bad_lines: 0,
            unreadable: None,
            delivered: 0,
            began: Instant::now(),
            latencies: is_load.then(Latencies::default),
        };
        run.go(sender, fed, news).await
    })
}

impl Delivery {
    /// Returns what its connections trust and offer.
    pub(super) fn client_options(&self) -> ClientOptions {
        let identity =
            self.client_cert.clone().zip(self.client_key.clone()).map(|(cert, key)| Identity { cert, key });
        ClientOptions { ca: self.ca.clone(), identity, pins: self.pins.clone(), proxy: self.proxy.clone() }
    }

    /// Returns the receiver.
    ///
    /// # Errors
    /// 2 when it is not a URL that lines can be sent to.
    pub(in crate::cli) fn endpoint(&self) -> Result<Endpoint, Failure> {
        // Not by clap, which would repeat a password in the URL.
        Endpoint::parse(self.to.as_deref().unwrap_or_default())
            .map_err(|error| Failure::usage(format!("--to: {error}")))
    }
}

/// Returns the value from the argument, the file or the variable, in this order.
pub(super) fn authorization(
    delivery: &Delivery,
    environment: &dyn Fn(&str) -> Option<OsString>,
) -> Result<Option<String>, Failure> {
    if let Some(value) = &delivery.authorization {
        return Ok(Some(String::from_utf8_lossy(value.as_bytes()).into_owned()));
    }
    let (text, origin) = if let Some(path) = &delivery.authorization_file {
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

fn rate(text: &str) -> Result<f64, &'static str> {
    match text.parse() {
        Ok(rate) if (0.001..=1e9).contains(&rate) => Ok(rate),
        _ => Err("write a number of events a second, such as 100"),
    }
}

pub(super) fn size(text: &str) -> Result<NonZeroUsize, &'static str> {
    const NOTATION: &str = "write a number and one of B, KiB, MiB, GiB, such as 1MiB";
    let unit = text.trim_start_matches(|character: char| character.is_ascii_digit() || character == '.');
    if !["", "B", "KiB", "MiB", "GiB"].contains(&unit) {
        return Err(NOTATION);
    }
    let bytes = text.parse::<ByteSize>().map_err(|_| NOTATION)?.as_u64();
    usize::try_from(bytes).ok().and_then(NonZeroUsize::new).ok_or(NOTATION)
}

/// A run in progress: hands lines to the sender and prints the news.
struct Run<'a> {
    console: Console<'a>,
    is_quiet: bool,
    is_strict: bool,
    /// The batch that is shown as waiting.
    waiting: Option<u64>,
    /// Error of standard output; delivering the events matters more, so the run goes on.
    unwritable: Option<io::Error>,
    bad_lines: u64,
    unreadable: Option<String>,
    /// Number of events that were delivered so far.
    delivered: u64,
    began: Instant,
    /// The latencies so far, where they are reported at the end.
    latencies: Option<Latencies>,
}

impl Run<'_> {
    async fn go(
        mut self,
        sender: Sender,
        mut fed: mpsc::Receiver<Vec<Fed>>,
        mut news: mpsc::UnboundedReceiver<News>,
    ) -> Result<(), Failure> {
        loop {
            let group = tokio::select! {
                Some(news) = news.recv() => {
                    self.tell(news)?;
                    continue;
                }
                next = fed.recv() => next,
            };
            let Some(group) = group else { break };
            for fed in group {
                match fed {
                    Fed::Line { line, origin } => self.hand_on(&sender, line, &origin, &mut news).await?,
                    Fed::Bad { origin, problem } => self.complain(&origin, &problem),
                    // Nothing follows.
                    Fed::Unreadable(problem) => self.unreadable = Some(problem),
                }
            }
        }
        // Without this, the reports that arrive while closing would be printed all at once.
        let closing = sender.close();
        tokio::pin!(closing);
        let summary = loop {
            tokio::select! {
                biased;
                Some(news) = news.recv() => self.tell(news)?,
                summary = &mut closing => break summary.map_err(Failure::bug)?,
            }
        };
        while let Ok(news) = news.try_recv() {
            self.tell(news)?;
        }
        let latencies = self.latencies.take();
        if let Some(load) =
            latencies.and_then(|latencies| latencies.report(self.delivered, self.began.elapsed()))
        {
            self.print(&load);
        }
        self.print(&shown_summary(&summary));
        self.end(&summary)
    }

    /// Hands a line to the sender, whose queue may be full while a batch waits.
    async fn hand_on(
        &mut self,
        sender: &Sender,
        line: Vec<u8>,
        origin: &Origin,
        news: &mut mpsc::UnboundedReceiver<News>,
    ) -> Result<(), Failure> {
        let sending = sender.enqueue_line(line);
        tokio::pin!(sending);
        let sent = loop {
            tokio::select! {
                biased;
                sent = &mut sending => break sent,
                Some(news) = news.recv() => self.tell(news)?,
            }
        };
        match sent {
            // The report of its batch says what became of it.
            Ok(_) => Ok(()),
            Err(SendError::Line(problem)) => {
                self.complain(origin, &problem.to_string());
                Ok(())
            }
            Err(error) => Err(Failure::bug(error)),
        }
    }

    /// Prints news.
    ///
    /// # Errors
    /// When every other batch would be refused as well.
    fn tell(&mut self, news: News) -> Result<(), Failure> {
        match news {
            News::Retrying { number, shown } if !self.is_quiet => {
                self.waiting = Some(number);
                self.console.waiting.set_message(shown);
            }
            News::Retrying { .. } => {}
            News::Settled { number, shown, events, is_delivered, latency, refused } => {
                if self.waiting == Some(number) {
                    self.waiting = None;
                    self.console.waiting.set_message("");
                }
                self.print(&shown);
                let events = u64::try_from(events).unwrap_or(u64::MAX);
                if is_delivered {
                    self.delivered += events;
                    if let Some(latencies) = &mut self.latencies {
                        latencies.add(latency);
                    }
                }
                if let Some(reason) = refused {
                    self.console.waiting.finish_and_clear();
                    return Err(Failure::finding(format!(
                        "{reason}; the receiver would refuse every batch, so sending has stopped at batch {number}: {} \
                         delivered before it, {} refused, the rest not sent",
                        count(self.delivered, "event"),
                        count(events, "event"),
                    )));
                }
            }
        }
        Ok(())
    }

    fn print(&mut self, text: &str) {
        if self.unwritable.is_none() && !self.is_quiet {
            let Console { out, waiting, .. } = &mut self.console;
            let written = waiting.suspend(|| writeln!(out, "{text}").and_then(|()| out.flush()));
            self.unwritable = written.err();
        }
    }

    fn complain(&mut self, origin: &Origin, problem: &str) {
        self.bad_lines += 1;
        self.say(&format!("{origin}: cannot be sent: {}", escape(problem)));
    }

    /// Writes a line to standard error.
    fn say(&mut self, text: &str) {
        let Console { complaints, waiting, .. } = &mut self.console;
        // When standard error is closed too, the exit code and the count at the end still tell.
        let _ = waiting.suspend(|| writeln!(complaints, "{text}"));
    }

    fn end(mut self, summary: &Summary) -> Result<(), Failure> {
        self.console.waiting.finish_and_clear();
        let mut problems = Vec::new();
        if let Some(first) = summary.failed.first() {
            // The line of the batch, on the same terminal, has the reason.
            let reason = if self.console.is_one_terminal && !self.is_quiet {
                format!("is batch {}", first.number)
            } else {
                format!("because {}", escape(&first.error.to_string()))
            };
            problems.push(format!(
                "{} in {} of {} could not be delivered, the first {reason}",
                count(summary.events - summary.delivered, "event"),
                summary.failed.len(),
                count(summary.batches, "batch"),
            ));
        }
        if summary.receipts.quarantined > 0 {
            let quarantined = format!(
                "{} of {} quarantined; the receiver's output of the stream `quarantine` has the reasons (there: auditgate \
                 quarantine list)",
                summary.receipts.quarantined,
                count(summary.delivered, "line"),
            );
            if self.is_strict {
                problems.push(quarantined);
            } else {
                self.say(&format!("auditgate: warning: {quarantined}"));
            }
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

impl News {
    fn settled(report: &Report) -> Self {
        let refused = report.result.as_ref().err().filter(|error| error.concerns_every_batch());
        Self::Settled {
            number: report.number,
            shown: shown(report),
            events: report.events,
            is_delivered: report.result.is_ok(),
            latency: report.latency,
            // An error can repeat what the receiver's certificate says.
            refused: refused.map(|error| escape(&error.to_string()).into_owned()),
        }
    }

    fn retrying(retry: &Retrying<'_>) -> Self {
        let Retrying { number, attempt, attempts, pause, error, .. } = retry;
        let seconds = pause.as_millis().div_ceil(1000);
        let shown = format!(
            "batch {number}: {}; retrying in {seconds} s (attempt {attempt} of {attempts})",
            escape(&error.to_string())
        );
        Self::Retrying { number: *number, shown }
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
            let attempts = count(*attempts, "attempt");
            let shown = format!("batch {number}: {events}, not delivered, {attempts}");
            match error.concerns_every_batch() {
                // The run ends with it.
                true => shown,
                false => format!("{shown}: {}", escape(&error.to_string())),
            }
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

pub(super) fn count(number: impl TryInto<u64>, noun: &str) -> String {
    let number = number.try_into().unwrap_or(u64::MAX);
    let plural = match (number, noun) {
        (1, _) => Cow::Borrowed(noun),
        (_, "batch") => Cow::Borrowed("batches"),
        _ => Cow::Owned(format!("{noun}s")),
    };
    format!("{number} {plural}")
}
