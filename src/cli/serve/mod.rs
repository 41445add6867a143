//! `auditgate serve`: the daemon. The only place where the parts are put together: which part gets
//! which, in which order they start, and in which order they end.
//!
//! Start: configuration, log, certificates, keys, ledger, sockets, sinks, then readiness. An error
//! that the operator can fix stops the start with one line.
//!
//! End: no new connection; requests finish; sinks get what is committed; the ledger is closed. What
//! a sink cannot take by the deadline stays in the ledger for the next start.

mod announce;
mod batches;
mod reload;
pub(in crate::cli) mod sender;
mod sink_status;
mod sinks;
mod skipped;
pub(in crate::cli) mod sockets;
mod sources;
mod status;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use tokio::runtime::Handle;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::{Semaphore, oneshot, watch};

use self::batches::RequestWatcher;
use self::reload::Reload;
use self::sink_status::SinkStatus;
use self::skipped::Skips;
use self::sockets::{Admin, Inherited};
use self::sources::Sources;
use self::status::{DaemonStatus, Parts};
use crate::cli::checks::{self, Severity};
use crate::cli::config_file::ConfigFile;
use crate::cli::exit::Failure;
use crate::clock::Clock;
use crate::config::{self, Config, Secrets, Tls};
use crate::deliver::workers::Workers;
use crate::ingest::{Ingest, Limits, Source};
use crate::ledger::{Backlog, Failed, Ledger, LedgerOptions, OpenError, Running, Window};
use crate::memory_budget::MemoryBudget;
use crate::observe::health::{self, Health};
use crate::observe::metrics::Metrics;
use crate::observe::{admin, logging, systemd};
use crate::receive::connection_limit::ConnectionLimit;
use crate::receive::listener::Listener;
use crate::receive::request::{BodyDeadline, IN_WORK, Rules, Service};
use crate::receive::tls::Certificates;
use crate::secret::Secret;
use crate::wire::batch::Caps;

/// Runs the daemon until SIGTERM or SIGINT.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    #[command(flatten)]
    pub config: ConfigFile,
}

/// Time for which a quarantined line counts as a duplicate.
const REJECT_WINDOW: Duration = Duration::from_secs(86_400);

/// Time for which a batch waits for memory before it is refused with 429.
const MEMORY_TIMEOUT: Duration = Duration::from_secs(5);

/// Time between two checks of the certificate's files.
const CERTIFICATE_CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// Deadline of a handshake, of a header and of taking a response, unless `limits.request_timeout`
/// is shorter.
const SHORT_DEADLINE: Duration = Duration::from_secs(30);

/// Minimum average rate of a body, in bytes per second, and the time before it applies.
const MIN_BODY_RATE: u64 = 4096;
const BODY_GRACE: Duration = Duration::from_secs(5);

/// Time for the sinks to take what is committed, after the requests have finished.
const SINK_DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs the daemon. Returns after an orderly shutdown.
///
/// # Errors
/// 78 for the configuration and the files that it names, 74 for sockets and disks.
pub fn run(args: &Args) -> Result<(), Failure> {
    let inherited = Inherited::from_environment()?;
    let config = args.config.load(Secrets::Require)?;
    let log = logging::start(&config.log.level, config.log.format).map_err(Failure::config)?;
    let result = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::io(format!("cannot start threads: {error}")))
        .and_then(|runtime| {
            let result = runtime.block_on(serve(config, inherited, log));
            // What still runs on a blocking thread has no reader any more.
            runtime.shutdown_timeout(Duration::from_secs(1));
            result
        });
    result.map_err(logged)
}

/// Logs why the daemon ends, after which nothing more is to be printed.
fn logged(Failure { exit, message }: Failure) -> Failure {
    for line in message.lines() {
        tracing::error!(code = "daemon-failed", "{line}");
    }
    Failure::reported(exit)
}

async fn serve(config: Config, mut inherited: Inherited, log: logging::Handle) -> Result<(), Failure> {
    let certificates = certificates(&config.listen.tls)?;
    let sources: Vec<String> = config.sources.keys().cloned().collect();
    let sinks: Vec<String> = config.sinks.keys().cloned().collect();
    let metrics = Metrics::new(&sources, &sinks).map_err(Failure::bug)?;
    let metrics = Arc::new(metrics);
    let health = Arc::new(Health::new());
    let (stop, stopped) = watch::channel(false);
    // The admin endpoint outlives the drain, so that `/readyz` can report it.
    let (end_admin, admin_ends) = watch::channel(false);

    announce::starting(&config);
    check(&config)?;
    let (ledger, mut running) = open_ledger(&config)?;
    announce::sinks(&config, &ledger);
    let sources = Sources::load(&config, &metrics, stopped.clone()).await.map_err(Failure::config)?;
    let socket = inherited.listen(config.listen.address).await?;
    let Admin { socket: admin_socket, file: _admin_file } = inherited.admin(&config.admin.address).await?;
    announce::admin(&admin_socket, &config.admin.address);

    config.warnings().for_each(|warning| tracing::warn!(code = "sink-config-risky", "{warning}"));
    let sink_status = Arc::new(SinkStatus::new(Arc::clone(&metrics), Arc::clone(&health)));
    let workers = start_workers(&config, &ledger, &sink_status)?;
    let skips = Arc::new(Skips::new(Arc::clone(&metrics), ledger.clone()));
    scrape(&metrics, &skips, &ledger, &config);
    let reported = Arc::clone(&health);
    metrics.before_render(Box::new(move |metrics| {
        metrics.health(reported.ready().is_ok(), reported.warnings().len() as u64);
    }));
    let admin_token = Arc::new(RwLock::new(config.admin.token.clone()));
    let (in_force, watched) = watch::channel(Arc::new(InForce::of(&config, &sources)));
    let scheme = if certificates.is_some() { "https" } else { "http" };
    let address = socket.local_addr().unwrap_or(config.listen.address);
    let parts = Parts {
        metrics: Arc::clone(&metrics),
        health: Arc::clone(&health),
        sinks: Arc::clone(&sink_status),
        ledger: ledger.clone(),
        certificates: certificates.clone(),
        in_force: watched.clone(),
    };
    let status =
        DaemonStatus::new(&config.file, format!("{scheme}://{address}"), status::sinks(&config), parts);
    let reported = Arc::clone(&status);
    let pages = admin::Pages {
        metrics: Arc::clone(&metrics),
        health: Arc::clone(&health),
        status: Box::new(move || reported.report()),
        authorise: admin_authorisation(Arc::clone(&admin_token)),
    };
    let admin = tokio::spawn(admin::serve(admin_socket, pages, admin_ends));
    tokio::spawn(watch_health(
        Arc::clone(&health),
        Arc::clone(&status),
        sink_status,
        ledger.clone(),
        certificates.clone(),
        watched,
    ));
    tokio::spawn(Arc::clone(&skips).keep_reporting());

    let ingest = Ingest::new(ledger.clone(), limits(&config));
    let service = Arc::new(service(rules(&config, &sources, &ingest, memory_budget(&config)), &metrics));
    let connection_limit =
        ConnectionLimit::new(config.limits.connections, config.limits.connections_per_peer);
    let data_dir = config.data_dir.clone();
    let reload = Reload {
        // Moved, so that no copy of a token outlives it.
        config,
        sources,
        service: Arc::clone(&service),
        connection_limit: connection_limit.clone(),
        ingest,
        certificates: certificates.clone(),
        ledger: ledger.clone(),
        metrics: Arc::clone(&metrics),
        log,
        admin_token,
        health: Arc::clone(&health),
        status,
        in_force,
        warned_at: None,
    };
    let listener = listener(connection_limit, certificates, service, &metrics);
    // Before the log says that it listens: a signal that comes at once must find its handler.
    let signals = Signals::listen();
    let serving = tokio::spawn(listener.serve(socket, stopped.clone()));
    health.started();
    systemd::ready(&health.summary());
    let watched = ledger.clone();
    tokio::spawn(systemd::watchdog(async move || watched.answers().await));

    let lost = tokio::select! {
        () = until_stopped(signals, reload) => None,
        failed = &mut running.failed => {
            Some(failed.unwrap_or_else(|_| Failed::Untrusted("its thread ended".to_owned())))
        }
    };
    if let Some(failed) = lost {
        health.draining();
        return Err(ledger_failed(&failed, &data_dir));
    }

    tracing::info!(
        code = "stopping",
        "stopping: no new connection is accepted; requests finish, then sinks get what is committed"
    );
    systemd::stopping();
    health.draining();
    let _ = stop.send(true);
    if !serving.await.unwrap_or(false) {
        tracing::warn!(
            code = "requests-unfinished",
            "some requests did not finish in the time for stopping; their senders will retry them"
        );
    }
    tokio::task::spawn_blocking(move || workers.finish(&ledger, running, Some(SINK_DRAIN_TIMEOUT)))
        .await
        .map_err(|error| Failure::bug(format!("the drain ended early: {error}")))?;
    skips.report_rest();
    let _ = end_admin.send(true);
    let _ = admin.await;
    tracing::info!(code = "stopped", "stopped");
    Ok(())
}

fn ledger_failed(failed: &Failed, data_dir: &Path) -> Failure {
    let data_dir = data_dir.display();
    Failure::io(match failed {
        Failed::Untrusted(_) => format!(
            "{failed}; nothing more is accepted, and what was is recovered from {data_dir} at the next start"
        ),
        Failed::Gone(_) => format!(
            "{failed}; nothing more is accepted; put back what was in {data_dir}, as it was, before the next \
             start: without it, undelivered events are lost, and known ones count as new"
        ),
    })
}

/// Logs what an operator has to fix.
///
/// # Errors
/// What keeps the daemon from starting. Another problem does not: while it refuses batches, events
/// are lost.
fn check(config: &Config) -> Result<(), Failure> {
    let (fatal, rest): (Vec<_>, Vec<_>) =
        checks::at_start(config).into_iter().partition(|finding| finding.severity == Severity::Fatal);
    if !fatal.is_empty() {
        let fatal: Vec<_> = fatal.iter().map(ToString::to_string).collect();
        return Err(Failure::config(fatal.join("\n")));
    }
    for finding in rest {
        tracing::warn!(code = "check-failed", "{finding}");
    }
    Ok(())
}

/// Returns the check of the admin endpoint's token. Without a configured token every client is
/// allowed.
fn admin_authorisation(token: Arc<RwLock<Option<Secret>>>) -> admin::Authorise {
    Box::new(move |presented| match &*token.read() {
        None => true,
        Some(token) => presented.is_some_and(|presented| token.matches(presented)),
    })
}

/// Signals that the daemon handles.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Signals {
    /// Installs the handlers. Returns none when the system refuses.
    fn listen() -> Option<Self> {
        let (Ok(terminate), Ok(interrupt), Ok(hang_up)) =
            (signal(SignalKind::terminate()), signal(SignalKind::interrupt()), signal(SignalKind::hangup()))
        else {
            tracing::error!(
                code = "signals-unavailable",
                "signals cannot be received; the daemon runs on, and only SIGKILL will end it"
            );
            return None;
        };
        Some(Self { terminate, interrupt, hang_up })
    }
}

/// Waits for SIGTERM or SIGINT. Meanwhile SIGHUP reloads, and replaced certificates are loaded: on
/// a thread of its own, since a file may be on a disk that does not answer.
async fn until_stopped(signals: Option<Signals>, reload: Reload) {
    let Some(Signals { mut terminate, mut interrupt, hang_up }) = signals else {
        return std::future::pending().await;
    };
    let runtime = Handle::current();
    let (_stopped, stop) = oneshot::channel();
    tokio::task::spawn_blocking(move || runtime.block_on(follow(hang_up, reload, stop)));
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Reloads until the sender of `stop` is dropped.
async fn follow(mut hang_up: Signal, mut reload: Reload, mut stop: oneshot::Receiver<()>) {
    let mut ticks = tokio::time::interval(CERTIFICATE_CHECK_INTERVAL);
    loop {
        tokio::select! {
            _ = &mut stop => return,
            _ = hang_up.recv() => {
                systemd::reloading();
                reload.all().await;
                // A shutdown that has begun meanwhile has its own status.
                if stop.try_recv() == Err(TryRecvError::Empty) {
                    systemd::ready(&reload.health.summary());
                }
            }
            _ = ticks.tick() => reload.check_certificates(),
        }
    }
}

/// Returns how long each source's events are remembered.
fn windows(config: &Config) -> BTreeMap<String, Window> {
    let window = |source: &config::Source| Window { events: source.dedup.window, rejects: REJECT_WINDOW };
    config.sources.iter().map(|(name, source)| (name.clone(), window(source))).collect()
}

/// Returns the backlog at which batches are refused.
fn backlog(limits: Limits) -> Backlog {
    Backlog { bytes: limits.backlog, quarantine_bytes: limits.quarantine_share() }
}

fn open_ledger(config: &Config) -> Result<(Ledger, Running), Failure> {
    let options = LedgerOptions {
        data_dir: config.data_dir.clone(),
        subscriptions: config.sinks.iter().map(|(name, sink)| sink.subscription(name)).collect(),
        backlog: backlog(limits(config)),
        windows: windows(config),
        clock: Clock::system(),
    };
    Ledger::open(options).map_err(|error| match error {
        OpenError::Orphaned { .. }
        | OpenError::Narrowed { .. }
        | OpenError::KindChanged { .. }
        | OpenError::NoParent { .. }
        | OpenError::TooNew { .. } => Failure::config(error),
        OpenError::InUse(_)
        | OpenError::Missing(_)
        | OpenError::Io { .. }
        | OpenError::Database { .. }
        | OpenError::NoSpace { .. } => Failure::io(error),
    })
}

fn start_workers(config: &Config, ledger: &Ledger, status: &Arc<SinkStatus>) -> Result<Workers, Failure> {
    let mut workers = Workers::default();
    for (name, sink) in &config.sinks {
        let made = sinks::make(name, sink, ledger)?;
        workers
            .start(sink.subscription(name), made, ledger, Box::new(Arc::clone(status)))
            .map_err(|error| Failure::io(format!("cannot start a thread: {error}")))?;
    }
    Ok(workers)
}

fn limits(config: &Config) -> Limits {
    let limits = &config.limits;
    Limits {
        caps: Caps { decoded: limits.decoded, lines: limits.lines },
        line: limits.line,
        backlog: limits.backlog,
    }
}

fn certificates(tls: &Tls) -> Result<Option<Arc<Certificates>>, Failure> {
    let Tls::Files(files) = tls else { return Ok(None) };
    Ok(Some(Arc::new(Certificates::load(files.clone(), reload::now()).map_err(Failure::config)?)))
}

/// Returns the rules by which requests are answered.
fn rules(config: &Config, sources: &Sources, ingest: &Ingest, memory: MemoryBudget) -> Rules {
    Rules {
        routes: sources.routes(),
        ingest: ingest.with_limits(limits(config)),
        memory,
        body_limit: config.limits.body,
        body_deadline: BodyDeadline {
            grace: BODY_GRACE,
            min_rate: MIN_BODY_RATE,
            total: config.limits.request_timeout,
        },
        deadline: SHORT_DEADLINE.min(config.limits.request_timeout),
        idle_timeout: config.limits.idle_timeout,
        proxies: config.listen.proxy_protocol.clone(),
    }
}

fn memory_budget(config: &Config) -> MemoryBudget {
    MemoryBudget::new(config.limits.in_flight, MEMORY_TIMEOUT)
}

fn service(rules: Rules, metrics: &Arc<Metrics>) -> Service {
    Service {
        rules: RwLock::new(Arc::new(rules)),
        now: Clock::system().wall,
        observer: Box::new(RequestWatcher::new(Arc::clone(metrics))),
        in_work: Arc::new(Semaphore::new(IN_WORK)),
    }
}

fn listener(
    connection_limit: ConnectionLimit,
    certificates: Option<Arc<Certificates>>,
    service: Arc<Service>,
    metrics: &Arc<Metrics>,
) -> Listener {
    let (connections, ends) = (Arc::clone(metrics), Arc::clone(metrics));
    let (seen, served) = (connection_limit.clone(), Arc::clone(&service));
    metrics.before_render(Box::new(move |metrics| {
        metrics.authorized_connections(seen.counts().1 as u64);
        metrics.in_flight_bytes(served.in_force().memory.used() as u64);
    }));
    Listener {
        scheme: if certificates.is_some() { "https" } else { "http" },
        tls: certificates,
        connections: connection_limit,
        service,
        connected: Box::new(move || Box::new(connections.connection_opened())),
        ended: Box::new(move |reason| ends.connection_ended(reason)),
    }
}

/// Registers values that are read at each rendering of the metrics.
fn scrape(metrics: &Metrics, skips: &Arc<Skips>, ledger: &Ledger, config: &Config) {
    let skips = Arc::clone(skips);
    let ledger = ledger.clone();
    let sinks: Vec<String> = config.sinks.keys().cloned().collect();
    let now = Clock::system().wall;
    metrics.before_render(Box::new(move |metrics| {
        metrics.ledger_bytes(ledger.bytes());
        skips.count();
        for sink in &sinks {
            // When the table cannot be read, the last value stays.
            let Ok(pending) = ledger.pending(sink) else { continue };
            let age = pending.oldest.map_or(0, |oldest| (now() - oldest).max(0));
            metrics.sink_pending(sink, pending.events, seconds(age));
        }
    }));
}

/// Part of the configuration that readiness and `/status` depend on and a reload can change.
struct InForce {
    sources: Vec<Arc<Source>>,
    /// Path of each source's requests.
    paths: BTreeMap<String, String>,
    limits: Limits,
}

impl InForce {
    fn of(config: &Config, sources: &Sources) -> Self {
        let path = |(name, source): (&String, &config::Source)| (name.clone(), source.path.clone());
        Self {
            sources: sources.all().cloned().collect(),
            paths: config.sources.iter().map(path).collect(),
            limits: limits(config),
        }
    }
}

/// Updates readiness and the history of `/status` from the state of the parts, once a second.
async fn watch_health(
    health: Arc<Health>,
    status: Arc<DaemonStatus>,
    sink_status: Arc<SinkStatus>,
    ledger: Ledger,
    certificates: Option<Arc<Certificates>>,
    in_force: watch::Receiver<Arc<InForce>>,
) {
    let mut every_second = tokio::time::interval(Duration::from_secs(1));
    let mut known: Vec<String> = Vec::new();
    // The start tells the first one.
    let mut told = health::RECEIVING.to_owned();
    loop {
        every_second.tick().await;
        sink_status.check();
        status.tick();
        let in_force = Arc::clone(&in_force.borrow());
        let InForce { sources, limits, .. } = &*in_force;
        let state = |is_bad: bool, problem: &str| if is_bad { Err(problem.to_owned()) } else { Ok(()) };
        health.set("ledger", state(ledger.is_unwritable(), "the ledger cannot be written; see the log"));
        let Backlog { bytes: all, quarantine_bytes: quarantined } = ledger.backlog();
        health.set(
            "backlog",
            state(all >= limits.backlog, "undelivered events fill limits.backlog; check the sinks"),
        );
        health.set(
            "quarantine",
            state(
                quarantined >= limits.quarantine_share(),
                "undelivered quarantined lines fill their share of limits.backlog; check their sink",
            ),
        );
        let end = certificates.as_ref().and_then(|certificates| certificates.not_after());
        health.set(
            "certificate",
            state(
                end.is_some_and(|end| end < reload::now()),
                "the certificate has expired, and Konnect does not repeat what fails because of it; renew it",
            ),
        );
        let mut conditions = Vec::with_capacity(sources.len());
        for source in sources {
            let keyless = source.keys.as_ref().is_some_and(|keys| keys.current().is_none());
            let condition = format!("source {}", source.name);
            health.set(&condition, state(keyless, "no verification key has been loaded yet; see the log"));
            conditions.push(condition);
        }
        // A source that is no longer configured has no condition any more.
        known.iter().filter(|known| !conditions.contains(known)).for_each(|gone| health.clear(gone));
        known = conditions;
        let summary = health.summary();
        if summary != told && !health.is_starting() {
            systemd::status(&summary);
            told = summary;
        }
    }
}

/// Converts milliseconds to seconds.
#[expect(clippy::cast_precision_loss, reason = "a metric needs no more than 53 bits of milliseconds")]
fn seconds(milliseconds: i64) -> f64 {
    milliseconds as f64 / 1000.0
}
