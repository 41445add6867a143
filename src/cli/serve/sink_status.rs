//! What the log, the metrics and `/readyz` say of each sink.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::deliver::sink::SinkError;
use crate::deliver::worker::Watcher;
use crate::log_throttle::log_seldom;
use crate::observe::health::Health;
use crate::observe::metrics::Metrics;

/// A sink that fails for so long is named in the log once more.
const REMINDER: Duration = Duration::from_secs(3600);

/// An operation of a sink that takes so long is reported: it may never come back.
const STUCK: Duration = Duration::from_secs(30);

/// The state of every sink.
pub(super) struct SinkStatus {
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    sinks: Mutex<BTreeMap<String, State>>,
}

#[derive(Default)]
struct State {
    /// When the operation began that the sink is at.
    busy_since: Option<Instant>,
    is_stuck: bool,
    outage: Option<Outage>,
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

    /// Reports the sinks that are stuck. To be called every second.
    pub(super) fn check(&self) {
        for (sink, state) in self.sinks.lock().iter_mut() {
            let is_stuck = state.busy_since.is_some_and(|since| since.elapsed() >= STUCK);
            if is_stuck && !state.is_stuck {
                tracing::error!(
                    sink,
                    seconds = STUCK.as_secs(),
                    "the sink is stuck: the system does not answer an operation; its events wait in the ledger"
                );
                let problem = format!("an operation has taken more than {} s", STUCK.as_secs());
                self.health.set(&condition(sink), Err(problem));
            }
            state.is_stuck |= is_stuck;
        }
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
            tracing::info!(sink, "the sink is not stuck any more");
            self.health.clear(&condition(sink));
        }
    }

    fn delivered(&self, sink: &str, events: u64) {
        self.metrics.sink_delivered(sink, events);
    }

    fn truncated(&self, sink: &str, lines: u64) {
        log_seldom!(warn, sink, sink, lines, "lines were longer than the sink's max_size and were truncated");
        self.metrics.sink_truncated(sink, lines);
    }

    fn failed(&self, sink: &str, error: &SinkError) {
        self.metrics.sink_error(sink);
        self.health.set(&condition(sink), Err(error.to_string()));
        let mut sinks = self.sinks.lock();
        let Some(state) = sinks.get_mut(sink) else { return };
        let now = Instant::now();
        match &mut state.outage {
            None => {
                state.outage = Some(Outage { since: now, logged: now, failures: 1 });
                log_seldom!(
                    error,
                    sink,
                    sink,
                    %error,
                    "the sink failed; its events wait in the ledger, and it is tried again"
                );
            }
            Some(outage) => {
                outage.failures += 1;
                if now.duration_since(outage.logged) >= REMINDER {
                    outage.logged = now;
                    let (failures, minutes) = (outage.failures, outage.since.elapsed().as_secs() / 60);
                    tracing::error!(sink, failures, minutes, %error, "the sink still fails; its events wait in the ledger");
                }
                tracing::debug!(sink, failures = outage.failures, %error, "the sink failed again");
            }
        }
    }

    fn recovered(&self, sink: &str) {
        self.health.clear(&condition(sink));
        if let Some(outage) = self.sinks.lock().get_mut(sink).and_then(|state| state.outage.take()) {
            let (failures, seconds) = (outage.failures, outage.since.elapsed().as_secs());
            log_seldom!(info, sink, sink, failures, seconds, "the sink works again");
        }
    }
}
