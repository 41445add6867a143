//! State of each sink for the log, the metrics, `/readyz` and `/status`.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::clock::Clock;
use crate::deliver::sink::SinkError;
use crate::deliver::worker::Watcher;
use crate::log_throttle::log_throttled;
use crate::observe::health::Health;
use crate::observe::metrics::Metrics;
use crate::observe::status::{ErrorReport, SinkReport};

/// Time after which a sink that still fails is logged again.
const REMINDER_INTERVAL: Duration = Duration::from_secs(3600);

/// Duration of a sink's operation from which on it is reported as stuck: it may never return.
const STUCK_AFTER: Duration = Duration::from_secs(30);

/// The state of every sink.
pub(super) struct SinkStatus {
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    sinks: Mutex<BTreeMap<String, State>>,
}

#[derive(Default)]
struct State {
    /// Start of the operation in progress.
    busy_since: Option<Instant>,
    is_stuck: bool,
    outage: Option<Outage>,
    /// Kept when the sink works again.
    last_error: Option<ErrorReport>,
}

/// Failures without a success in between.
struct Outage {
    since: Instant,
    logged: Instant,
    failures: u64,
}

impl SinkStatus {
    pub(super) fn new(metrics: Arc<Metrics>, health: Arc<Health>) -> Self {
        Self { metrics, health, sinks: Mutex::default() }
    }

    /// Reports the sinks that are stuck. Must be called every second.
    pub(super) fn check(&self) {
        for (sink, state) in self.sinks.lock().iter_mut() {
            let is_stuck = state.busy_since.is_some_and(|since| since.elapsed() >= STUCK_AFTER);
            if is_stuck && !state.is_stuck {
                let seconds = STUCK_AFTER.as_secs();
                tracing::error!(
                    code = "sink-stuck",
                    sink,
                    seconds,
                    "sink \"{sink}\" is stuck: the system has not answered an operation for {seconds} s; its events \
                     wait in the ledger"
                );
                let problem = format!("an operation has taken more than {} s", STUCK_AFTER.as_secs());
                self.health.set(&condition(sink), Err(problem));
            }
            state.is_stuck |= is_stuck;
        }
    }

    /// Adds what is known about a sink's failures to its report. `now` is in seconds since the Unix
    /// epoch.
    pub(super) fn describe(&self, sink: &str, now: i64, report: &mut SinkReport) {
        let sinks = self.sinks.lock();
        let Some(state) = sinks.get(sink) else { return };
        let ago = |since: Instant| now - i64::try_from(since.elapsed().as_secs()).unwrap_or(0);
        report.failing_since = state.outage.as_ref().map(|outage| ago(outage.since));
        report.stuck_since = state.busy_since.filter(|_| state.is_stuck).map(ago);
        report.last_error.clone_from(&state.last_error);
    }
}

/// Returns what an operator can do about a sink's error.
fn advice(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "make room on the sink's disk; delivery then continues by itself"
        }
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "let the daemon's user write there: owner and mode of the directory, ReadWritePaths= of the unit"
        }
        ErrorKind::NotFound | ErrorKind::NotADirectory => {
            "create the directory, or start the service that owns the socket"
        }
        ErrorKind::ConnectionRefused => "start the server, or correct the sink's address and port",
        ErrorKind::TimedOut
        | ErrorKind::HostUnreachable
        | ErrorKind::NetworkUnreachable
        | ErrorKind::NetworkDown
        | ErrorKind::AddrNotAvailable => "check the route, the firewall and the server",
        ErrorKind::ConnectionReset
        | ErrorKind::ConnectionAborted
        | ErrorKind::BrokenPipe
        | ErrorKind::UnexpectedEof => "look at the log of the server, which closes the connection",
        ErrorKind::InvalidData | ErrorKind::InvalidInput => {
            "correct what the error names; nothing else will make it work"
        }
        _ => "correct what the error names; it is retried",
    }
}

fn condition(sink: &str) -> String {
    format!("sink {sink}")
}

impl Watcher for Arc<SinkStatus> {
    fn working(&self, sink: &str, is_working: bool) {
        let mut sinks = self.sinks.lock();
        if !sinks.contains_key(sink) {
            sinks.insert(sink.to_owned(), State::default());
        }
        let Some(state) = sinks.get_mut(sink) else { return };
        state.busy_since = is_working.then(Instant::now);
        if !is_working && std::mem::take(&mut state.is_stuck) {
            tracing::info!(
                code = "sink-unstuck",
                sink,
                "sink \"{sink}\" is no longer stuck; delivery continues"
            );
            self.health.clear(&condition(sink));
        }
    }

    fn delivered(&self, sink: &str, events: u64) {
        self.metrics.sink_delivered(sink, events);
    }

    fn truncated(&self, sink: &str, lines: u64) {
        log_throttled!(
            warn,
            sink,
            code = "sink-lines-truncated",
            sink,
            lines,
            "sink \"{sink}\": {lines} lines were longer than its max_size and were sent truncated"
        );
        self.metrics.sink_truncated(sink, lines);
    }

    fn failed(&self, sink: &str, error: &SinkError) {
        self.metrics.sink_error(sink);
        self.health.set(&condition(sink), Err(error.to_string()));
        let mut sinks = self.sinks.lock();
        let Some(state) = sinks.get_mut(sink) else { return };
        state.last_error = Some(ErrorReport {
            time: (Clock::system().wall)() / 1000,
            error: error.to_string(),
            advice: advice(error.cause.kind()).to_owned(),
        });
        let now = Instant::now();
        match &mut state.outage {
            None => {
                state.outage = Some(Outage { since: now, logged: now, failures: 1 });
                log_throttled!(
                    error,
                    sink,
                    code = "sink-failing",
                    sink,
                    "sink \"{sink}\" failed: {error}; its events wait in the ledger, and it is retried"
                );
            }
            Some(outage) => {
                outage.failures += 1;
                if now.duration_since(outage.logged) >= REMINDER_INTERVAL {
                    outage.logged = now;
                    let (failures, minutes) = (outage.failures, outage.since.elapsed().as_secs() / 60);
                    tracing::error!(
                        code = "sink-still-failing",
                        sink,
                        failures,
                        minutes,
                        "sink \"{sink}\" has failed for {minutes} min ({failures} times): {error}; its events wait \
                         in the ledger, and it is retried"
                    );
                }
                tracing::debug!(sink, failures = outage.failures, %error, "the sink failed again");
            }
        }
    }

    fn recovered(&self, sink: &str) {
        self.health.clear(&condition(sink));
        if let Some(outage) = self.sinks.lock().get_mut(sink).and_then(|state| state.outage.take()) {
            let (failures, seconds) = (outage.failures, outage.since.elapsed().as_secs());
            log_throttled!(
                info,
                sink,
                code = "sink-recovered",
                sink,
                failures,
                seconds,
                "sink \"{sink}\" works again after {failures} failures in {seconds} s; delivery continues"
            );
        }
    }
}
