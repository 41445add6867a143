//! `auditgate send --config FILE`: the sender as a service. The only place where its parts are put
//! together.
//!
//! Start: configuration, log, keys, spool, inputs, then readiness. End: the inputs are no longer
//! read, posts get a short time, and the spool is closed. What the receiver does not have waits in
//! it for the next start.

mod keys;
mod reload;

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue as Value};
use hyper::{Response, StatusCode};
use parking_lot::RwLock;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;

use self::keys::{SigningKeys, publish};
use self::reload::Changeable;
use super::sink_status::SinkStatus;
use super::sockets::{Admin, Inherited};
use super::status::{DaemonStatus, Parts};
use super::{
    InForce, SINK_DRAIN_TIMEOUT, Signals, admin_authorisation, announce, ledger_failed, logged, seconds,
};
use crate::cli::exit::Failure;
use crate::clock::Clock;
use crate::config::Secrets;
use crate::config::sender::{FileInput, InputKind, Receiver, SenderConfig, Signatures, SocketInput, Start};
use crate::ingest::{DedupKey, Limits, Policy, Source};
use crate::ledger::CommitReceipt;
use crate::observe::health::Health;
use crate::observe::metrics::{LineOutcome, Metrics};
use crate::observe::status::{SinkReport, StatusReport, WebhookReport};
use crate::observe::{admin, logging, systemd};
use crate::secret::Secret;
use crate::send::{BatchLimits, Sender};
use crate::spool::input::follow::{Follow, FollowOptions};
use crate::spool::input::socket::{DatagramSocket, StreamSocket};
use crate::spool::input::stream::Stream;
use crate::spool::input::{ChunkLimits, Input};
use crate::spool::{
    CurrentKey, Deliveries, RECEIVER, REJECTS, REJECTS_FILE, Spool, SpoolOptions, SpoolStatus, Target,
    Treatment,
};
use crate::wire::batch::Caps;

/// Time between two looks at the state of the parts.
const TICK: Duration = Duration::from_millis(500);

/// Way to run a sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cli) enum Mode {
    /// With an admin endpoint, and a reload on SIGHUP.
    Service,
    /// Until a signal, from the command line.
    Follow,
    /// Until everything that the inputs have is delivered.
    UntilEnd,
}

/// What a sender has done.
#[derive(Debug, Default)]
pub(in crate::cli) struct Finished {
    /// Number of events that were taken from the inputs.
    pub(in crate::cli) taken: u64,
    /// Number of events of the inputs that were known already.
    pub(in crate::cli) known: u64,
    /// Number of lines that cannot be sent.
    pub(in crate::cli) rejected: u64,
    /// The deliveries.
    pub(in crate::cli) deliveries: Deliveries,
    /// Number of events that wait in the spool.
    pub(in crate::cli) waiting: u64,
}

/// Runs the service of a configuration until SIGTERM or SIGINT.
///
/// # Errors
/// 78 for the configuration and the files that it names, 74 for sockets and disks.
pub(in crate::cli) fn run(file: &Path) -> Result<(), Failure> {
    let inherited = Inherited::from_environment()?;
    let config = load(file)?;
    run_as(config, inherited, Mode::Service).map(drop).map_err(logged)
}

/// Runs a sender.
///
/// # Errors
/// As [`run`].
pub(in crate::cli) fn run_as(
    config: SenderConfig,
    inherited: Inherited,
    mode: Mode,
) -> Result<Finished, Failure> {
    let log = logging::start(&config.log.level, config.log.format).map_err(Failure::config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::io(format!("cannot start threads: {error}")))?;
    let result = runtime.block_on(serve(config, inherited, mode, &log));
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

fn load(file: &Path) -> Result<SenderConfig, Failure> {
    SenderConfig::load(file, &|name| std::env::var_os(name), Secrets::Require).map_err(Failure::config)
}

async fn serve(
    config: SenderConfig,
    mut inherited: Inherited,
    mode: Mode,
    log: &logging::Handle,
) -> Result<Finished, Failure> {
    let inputs: Vec<String> = config.inputs.keys().cloned().collect();
    let sinks = [RECEIVER.to_owned(), REJECTS.to_owned()];
    let metrics = Arc::new(Metrics::new(&inputs, &sinks).map_err(Failure::bug)?);
    let health = Arc::new(Health::new());
    let (end, ends) = watch::channel(false);

    let (version, url) = (crate::cli::version::VERSION, &config.receiver.url);
    tracing::info!(code = "sender-starting", "auditgate {version} sends to {url}");
    let key = CurrentKey::default();
    let key_set = Arc::new(RwLock::new(String::new()));
    let keys = take_up_keys(&config, &key, &key_set)?;
    let admin_token = Arc::new(RwLock::new(config.admin.token.clone()));
    let sink_status = Arc::new(SinkStatus::new(Arc::clone(&metrics), Arc::clone(&health)));
    let mut spool = open(&config, key.clone(), &sink_status, &metrics)?;
    scrape(&metrics, &spool);
    let parts = Parts {
        metrics: Arc::clone(&metrics),
        health: Arc::clone(&health),
        sinks: Arc::clone(&sink_status),
        ledger: spool.ledger(),
        certificates: None,
        in_force: watch::channel(Arc::new(in_force(&config))).1,
    };
    let status = DaemonStatus::new(&config.file, String::new(), sink_reports(&config), parts);
    let mut admin = None;
    if mode == Mode::Service {
        let Admin { socket, file } = inherited.admin(&config.admin.address).await?;
        announce::admin(&socket, &config.admin.address);
        let pages = pages(&admin_token, &metrics, &health, &status, spool.status());
        admin = Some((tokio::spawn(admin::serve(socket, pages, ends.clone())), file));
    }
    if let Some(address) = config.signing.as_ref().and_then(|signing| signing.serve_jwks) {
        tokio::spawn(serve_key_set(address, Arc::clone(&key_set), ends).await?);
    }
    for (name, input) in &config.inputs {
        read(&mut spool, name, &input.kind, treatment(&config), mode)?;
    }

    let Some(Signals { mut terminate, mut interrupt, mut hang_up }) = Signals::listen() else {
        return Err(Failure::io("signals cannot be received"));
    };
    health.started();
    systemd::ready(&health.summary());
    let ledger = spool.ledger();
    tokio::spawn(systemd::watchdog(async move || ledger.answers().await));
    tracing::info!(code = "sender-started", inputs = inputs.len(), "the inputs are read");

    let (ledger, state) = (spool.ledger(), spool.status());
    let data_dir = config.data_dir.clone();
    let mut changeable = Changeable {
        config,
        keys,
        key,
        key_set,
        admin_token,
        log,
        health: Arc::clone(&health),
        status: Arc::clone(&status),
        metrics: Arc::clone(&metrics),
    };
    let mut ticks = tokio::time::interval(TICK);
    let mut ended = None;
    while ended.is_none() {
        tokio::select! {
            _ = terminate.recv() => ended = Some(SINK_DRAIN_TIMEOUT),
            _ = interrupt.recv() => ended = Some(SINK_DRAIN_TIMEOUT),
            failed = spool.failed() => {
                health.draining();
                return Err(ledger_failed(&failed, &data_dir));
            }
            _ = hang_up.recv(), if mode == Mode::Service => {
                systemd::reloading();
                changeable.reload(&spool);
                systemd::ready(&health.summary());
            }
            _ = ticks.tick() => {
                changeable.begin_due_key();
                sink_status.check();
                status.tick();
                watch_spool(&health, &state, ledger.is_unwritable());
                if mode == Mode::UntilEnd {
                    let is_done = spool.is_at_end()
                        && [RECEIVER, REJECTS]
                            .iter()
                            .all(|sink| ledger.pending(sink).is_ok_and(|pending| pending.events == 0));
                    if is_done || state.read().is_paused {
                        ended = Some(if is_done { SINK_DRAIN_TIMEOUT } else { Duration::ZERO });
                    }
                }
            }
        }
    }

    tracing::info!(code = "sender-stopping", "stopping: no input is read any more; posts get a short time");
    systemd::stopping();
    health.draining();
    let waiting = tokio::task::spawn_blocking(move || spool.close(ended)).await;
    let waiting = waiting.map_err(Failure::bug)?.map_err(Failure::io)?.events;
    let _ = end.send(true);
    if let Some((admin, _file)) = admin {
        let _ = admin.await;
    }
    tracing::info!(code = "sender-stopped", waiting, "stopped; {waiting} events wait for the next start");
    let mut finished = Finished { deliveries: state.read(), waiting, ..Finished::default() };
    for input in &inputs {
        let [taken, known, rejected @ ..] = metrics.source_values(input).lines;
        finished.taken += taken;
        finished.known += known;
        finished.rejected += rejected.iter().sum::<u64>();
    }
    Ok(finished)
}

fn in_force(config: &SenderConfig) -> InForce {
    let source =
        |name: &String| Arc::new(Source::new(name.as_str().into(), Policy::Off, DedupKey::Event, None));
    let path = |(name, input): (&String, &crate::config::sender::Input)| {
        (name.clone(), input.kind.path().display().to_string())
    };
    InForce {
        sources: config.inputs.keys().map(source).collect(),
        paths: config.inputs.iter().map(path).collect(),
        limits: Limits { caps: Caps::NONE, line: usize::MAX, backlog: config.spool_size },
    }
}

fn pages(
    admin_token: &Arc<RwLock<Option<Secret>>>,
    metrics: &Arc<Metrics>,
    health: &Arc<Health>,
    status: &Arc<DaemonStatus>,
    deliveries: Arc<SpoolStatus>,
) -> admin::Pages {
    let reported = Arc::clone(health);
    metrics.before_render(Box::new(move |metrics| {
        metrics.health(reported.ready().is_ok(), reported.warnings().len() as u64);
    }));
    let status = Arc::clone(status);
    admin::Pages {
        metrics: Arc::clone(metrics),
        health: Arc::clone(health),
        status: Box::new(move || StatusReport {
            webhook: Some(webhook(deliveries.read())),
            ..status.report()
        }),
        authorise: admin_authorisation(Arc::clone(admin_token)),
    }
}

/// Reads the signing keys, publishes them, and lets the right one sign.
fn take_up_keys(
    config: &SenderConfig,
    current: &CurrentKey,
    key_set: &RwLock<String>,
) -> Result<Option<SigningKeys>, Failure> {
    let Some(signing) = &config.signing else { return Ok(None) };
    let keys = SigningKeys::read(signing)?;
    let document = keys.key_set();
    if let Some(path) = &signing.jwks {
        publish(path, &document)?;
    }
    *key_set.write() = document;
    keys.take_up(current, OffsetDateTime::now_utc());
    Ok(Some(keys))
}

/// Returns where lines are posted.
fn target(receiver: &Receiver) -> Result<Target, Failure> {
    #[expect(clippy::cast_precision_loss, reason = "a rate is below 2^32")]
    let rate = receiver.rate.map(|rate| rate as f64);
    let limits =
        BatchLimits { events: receiver.batch_events, bytes: receiver.batch_bytes, linger: receiver.linger };
    let mut sender = Sender::builder(receiver.url.clone())
        .connection(receiver.client_options())
        .timeout(receiver.timeout)
        .batch(limits)
        .connections(NonZeroUsize::new(receiver.connections).unwrap_or(NonZeroUsize::MIN));
    if let Some(secret) = &receiver.authorization {
        let not_text = |_| Failure::config("receiver.authorization is not UTF-8");
        sender = sender.authorization(str::from_utf8(secret.expose()).map_err(not_text)?);
    }
    Target::new(sender, rate).map_err(Failure::config)
}

fn open(
    config: &SenderConfig,
    key: CurrentKey,
    sink_status: &Arc<SinkStatus>,
    metrics: &Arc<Metrics>,
) -> Result<Spool, Failure> {
    let options = SpoolOptions {
        data_dir: config.data_dir.clone(),
        size: config.spool_size,
        inputs: config.inputs.keys().cloned().collect(),
        target: target(&config.receiver)?,
        key,
        clock: Clock::system(),
    };
    let counted = Arc::clone(metrics);
    let taken = Arc::new(move |input: &str, receipt: &CommitReceipt| count(&counted, input, receipt));
    let watched = Arc::clone(sink_status);
    Spool::open(options, &|| Box::new(Arc::clone(&watched)), taken).map_err(Failure::config)
}

/// Counts what was committed of an input.
fn count(metrics: &Metrics, input: &str, receipt: &CommitReceipt) {
    metrics.events(input, LineOutcome::Accepted, receipt.accepted());
    metrics.events(input, LineOutcome::Duplicate, receipt.duplicates());
    for (reason, lines) in receipt.rejected() {
        metrics.events(input, reason.into(), lines);
    }
    if receipt.accepted() > 0 {
        let now = (Clock::system().wall)() / 1000;
        metrics.last_event(input, u64::try_from(now).unwrap_or(0));
    }
}

/// Registers values that are read at each rendering of the metrics.
fn scrape(metrics: &Metrics, spool: &Spool) {
    let (ledger, now) = (spool.ledger(), Clock::system().wall);
    metrics.before_render(Box::new(move |metrics| {
        metrics.ledger_bytes(ledger.bytes());
        for sink in [RECEIVER, REJECTS] {
            // When the table cannot be read, the last value stays.
            let Ok(pending) = ledger.pending(sink) else { continue };
            let age = pending.oldest.map_or(0, |oldest| (now() - oldest).max(0));
            metrics.sink_pending(sink, pending.events, seconds(age));
        }
    }));
}

/// Updates readiness from the state of the spool.
fn watch_spool(health: &Health, state: &SpoolStatus, is_unwritable: bool) {
    let unwritable = || Err("the spool cannot be written; see the log".to_owned());
    health.set("ledger", if is_unwritable { unwritable() } else { Ok(()) });
    let Deliveries { held_inputs, .. } = state.read();
    let full =
        || Err("the spool is full, and inputs are not read until the receiver takes events".to_owned());
    health.set("spool", if held_inputs > 0 { full() } else { Ok(()) });
}

fn treatment(config: &SenderConfig) -> Treatment {
    match config.signatures {
        Signatures::Sign | Signatures::Off => Treatment::Events(config.format),
        Signatures::Relay => Treatment::Relay,
    }
}

/// Begins to read an input.
fn read(
    spool: &mut Spool,
    name: &str,
    kind: &InputKind,
    treatment: Treatment,
    mode: Mode,
) -> Result<(), Failure> {
    let failed = |error| Failure::io(format!("input `{name}`: {error}"));
    let input: Box<dyn Input> = match kind {
        InputKind::File(FileInput { path, start }) => Box::new(Follow::new(FollowOptions {
            from_end: *start == Start::End,
            until_end: mode == Mode::UntilEnd,
            ..FollowOptions::new(path.clone())
        })),
        InputKind::Stdin => {
            let stdin = std::io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
            let stdin = std::fs::File::from(stdin);
            Box::new(Stream::new(stdin, "standard input", ChunkLimits::default()))
        }
        InputKind::UnixDatagram(SocketInput { path, mode }) => {
            Box::new(DatagramSocket::bind(path, *mode, ChunkLimits::default()).map_err(failed)?)
        }
        InputKind::UnixStream(SocketInput { path, mode }) => {
            Box::new(StreamSocket::bind(path, *mode, ChunkLimits::default()).map_err(failed)?)
        }
    };
    spool.read(name, input, treatment).map_err(failed)
}

fn sink_reports(config: &SenderConfig) -> Vec<SinkReport> {
    let report = |name: &str, kind: &str, target: String| SinkReport {
        name: name.to_owned(),
        kind: kind.to_owned(),
        target,
        ..SinkReport::default()
    };
    vec![
        report(RECEIVER, "http", config.receiver.url.to_string()),
        report(REJECTS, "file", config.data_dir.join(REJECTS_FILE).display().to_string()),
    ]
}

fn webhook(deliveries: Deliveries) -> WebhookReport {
    let time = |milliseconds: i64| {
        let nanoseconds = i128::from(milliseconds) * 1_000_000;
        OffsetDateTime::from_unix_timestamp_nanos(nanoseconds).ok()?.format(&Rfc3339).ok()
    };
    WebhookReport {
        webhook_enabled: true,
        webhook_status: if deliveries.last_error.is_some() { "inactive" } else { "active" }.to_owned(),
        last_attempt_at: deliveries.last_attempt_at.and_then(time),
        last_response_code: deliveries.last_response_code,
        last_response_message: deliveries.last_error,
        is_paused: deliveries.is_paused,
        delivered: deliveries.events,
        accepted: deliveries.receipts.accepted,
        duplicates: deliveries.receipts.duplicates,
        quarantined: deliveries.receipts.quarantined,
        refused: deliveries.refused,
        held_inputs: deliveries.held_inputs,
    }
}

/// Serves the key set over plain HTTP, for a receiver's `jwks = { url = … }`.
async fn serve_key_set(
    address: SocketAddr,
    key_set: Arc<RwLock<String>>,
    ends: watch::Receiver<bool>,
) -> Result<impl Future<Output = ()>, Failure> {
    let unusable = |error| Failure::io(format!("serve_jwks: cannot listen on {address}: {error}"));
    let socket = tokio::net::TcpListener::bind(address).await.map_err(unusable)?;
    let address = socket.local_addr().map_err(unusable)?;
    tracing::info!(code = "jwks-listening", "the key set is at http://{address}/jwks.json");
    let answer = admin::blocking(move |_, request| {
        let is_there = request.uri().path() == "/jwks.json";
        let body = if is_there { key_set.read().clone() } else { String::new() };
        let mut response = Response::new(Full::new(Bytes::from(body)));
        if is_there {
            response.headers_mut().insert(CONTENT_TYPE, Value::from_static("application/jwk-set+json"));
        } else {
            *response.status_mut() = StatusCode::NOT_FOUND;
        }
        response
    });
    Ok(admin::serve_answers(admin::Socket::Tcp(socket), answer, ends))
}
