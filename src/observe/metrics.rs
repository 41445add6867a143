//! The daemon's Prometheus metrics, each declared once.
//!
//! Every series exists from the start and none is added later: a label value comes from the
//! configuration or from a closed list, so that no sender can grow the memory of the daemon or of
//! the Prometheus server, and a counter is 0 before its first event, as `rate()` needs it. Call
//! sites name a source or a sink, never a label; the handle of each series is looked up here.
//!
//! Recording never fails and never blocks for long: a series is an atomic number.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use prometheus::core::{Collector, Desc};
use prometheus::proto::{Counter, MetricFamily};
use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};
use rustix::time::{ClockId, clock_gettime};

use crate::receive::close_reason::CloseReason;

pub mod values;

/// The `Content-Type` of [`Metrics::render`]: Prometheus's text exposition format, version 0.0.4.
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// The statuses that the receiver can answer, ascending. A status that is not listed is not
/// counted.
pub const STATUS_CODES: [u16; 11] = [200, 400, 401, 403, 404, 405, 413, 415, 429, 431, 500];

/// Buckets in seconds. A request ends within its timeout, 30 s unless configured otherwise.
const REQUEST_BUCKETS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// Buckets in seconds. Fine around Konnect's 15 s of retries; the upper end distinguishes a replay
/// job (up to 7 days, Konnect's retention) from an outage.
const DELAY_BUCKETS: [f64; 14] =
    [1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 300.0, 900.0, 3_600.0, 14_400.0, 86_400.0, 345_600.0, 691_200.0];

/// Buckets in seconds, from a commit on an NVMe disk to one on a disk that is about to fail.
const COMMIT_BUCKETS: [f64; 16] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Maximum delay that is recorded, in seconds: one year. The sender writes the time that a delay is
/// counted from, and one absurd value must not dominate the histogram's sum.
const LONGEST_DELAY: f64 = 366.0 * 86_400.0;

/// LineOutcome of one line: the closed list behind the label `outcome`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LineOutcome {
    /// Committed for delivery.
    Accepted,
    /// Already committed within the source's window.
    Duplicate,
    /// Quarantined: neither CEF nor JSON nor CPS.
    Malformed,
    /// Quarantined: no key verifies it.
    BadSignature,
    /// Quarantined: the source requires a signature.
    Unsigned,
    /// Quarantined: longer than `limits.line`.
    LineTooLong,
    /// Quarantined: the whole body could not be decoded; counts as one.
    UndecodableBody,
}

impl LineOutcome {
    /// Every outcome, in the order of declaration.
    pub const ALL: [Self; 7] = [
        Self::Accepted,
        Self::Duplicate,
        Self::Malformed,
        Self::BadSignature,
        Self::Unsigned,
        Self::LineTooLong,
        Self::UndecodableBody,
    ];

    /// Returns the value of the label, which for a quarantined line is also the `reason` in the
    /// quarantine.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Duplicate => "duplicate",
            Self::Malformed => "malformed",
            Self::BadSignature => "bad_signature",
            Self::Unsigned => "unsigned",
            Self::LineTooLong => "line_too_long",
            Self::UndecodableBody => "undecodable_body",
        }
    }
}

/// Reason why metrics could not be set up or rendered. Always a bug.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// Two declarations contradict each other, or a name is not valid.
    #[error("the metrics could not be registered ({0}); this is a bug, please report it")]
    Register(#[source] prometheus::Error),
    /// The text encoder refused a series.
    #[error("the metrics could not be written as text ({0}); this is a bug, please report it")]
    Encode(#[source] prometheus::Error),
}

/// A callback of [`Metrics::before_render`].
pub type BeforeRender = Box<dyn Fn(&Metrics) + Send + Sync>;

/// Every metric of the daemon, in a registry of its own. Shared behind an `Arc` by the callers of
/// the stages, which write it, and the admin endpoint, which renders it.
pub struct Metrics {
    registry: Registry,
    source_families: SourceFamilies,
    sources: RwLock<HashMap<String, Arc<SourceSeries>>>,
    unrouted: RequestSeries,
    sinks: HashMap<String, SinkSeries>,
    connections: IntGauge,
    authorized_connections: IntGauge,
    connections_closed: [IntCounter; CloseReason::ALL.len()],
    in_flight_bytes: IntGauge,
    commit_duration: Histogram,
    commit_queue: Histogram,
    ledger_bytes: IntGauge,
    certificate_not_after: IntGauge,
    reload_errors: IntCounter,
    before_render: RwLock<Vec<BeforeRender>>,
}

/// Series of the requests to one source's path, or to none.
struct RequestSeries {
    by_code: [IntCounter; STATUS_CODES.len()],
    duration: Histogram,
}

/// Families with a series for each source.
struct SourceFamilies {
    requests: RequestFamilies,
    events: IntCounterVec,
    delay: HistogramVec,
    last_event: IntGaugeVec,
    byte_order_marks: IntCounterVec,
    jwks_keys: IntGaugeVec,
    jwks_retired_keys: IntGaugeVec,
    jwks_changes: IntCounterVec,
    jwks_refreshed: IntGaugeVec,
    jwks_refresh_errors: IntCounterVec,
}

impl SourceFamilies {
    fn of(&self, name: &str) -> SourceSeries {
        SourceSeries {
            requests: self.requests.of(name),
            events: LineOutcome::ALL.map(|outcome| self.events.with_label_values(&[name, outcome.as_str()])),
            delay: self.delay.with_label_values(&[name]),
            last_event: self.last_event.with_label_values(&[name]),
            byte_order_marks: self.byte_order_marks.with_label_values(&[name]),
            jwks_keys: self.jwks_keys.with_label_values(&[name]),
            jwks_retired_keys: self.jwks_retired_keys.with_label_values(&[name]),
            jwks_changes: self.jwks_changes.with_label_values(&[name]),
            jwks_refreshed: self.jwks_refreshed.with_label_values(&[name]),
            jwks_refresh_errors: self.jwks_refresh_errors.with_label_values(&[name]),
        }
    }
}

struct SourceSeries {
    requests: RequestSeries,
    events: [IntCounter; LineOutcome::ALL.len()],
    delay: Histogram,
    last_event: IntGauge,
    byte_order_marks: IntCounter,
    jwks_keys: IntGauge,
    jwks_retired_keys: IntGauge,
    jwks_changes: IntCounter,
    jwks_refreshed: IntGauge,
    jwks_refresh_errors: IntCounter,
}

struct SinkSeries {
    delivered: IntCounter,
    pending: IntGauge,
    oldest_pending: Gauge,
    errors: IntCounter,
    truncated: IntCounter,
    skipped: IntCounter,
}

impl Metrics {
    /// Declares every metric and creates every series, for the configured names of sources and
    /// sinks.
    ///
    /// # Errors
    /// [`MetricsError::Register`] when the declarations below contradict each other.
    pub fn new(sources: &[String], sinks: &[String]) -> Result<Self, MetricsError> {
        let registry = Registry::new();
        let declare = Declarations(&registry);

        let requests = RequestFamilies {
            total: declare.counters(
                "auditgate_http_requests_total",
                "Requests answered, by status; the source is empty when the path is no source's.",
                &["source", "code"],
            )?,
            duration: declare.histograms(
                "auditgate_http_request_duration_seconds",
                "Time from a request's header until its response is ready to be written.",
                &["source"],
                &REQUEST_BUCKETS,
            )?,
        };
        let connections =
            declare.gauge("auditgate_http_connections", "Connections open at the receiving listener.")?;
        let authorized_connections = declare
            .gauge("auditgate_http_authorized_connections", "Those of them that have shown a valid token.")?;
        let closed = declare.counters(
            "auditgate_http_connections_closed_total",
            "Connections that ended at the receiving listener, by how they did.",
            &["reason"],
        )?;
        let in_flight_bytes = declare.gauge(
            "auditgate_in_flight_bytes",
            "Memory that batches in work have reserved, of limits.in_flight.",
        )?;

        let events = declare.counters(
            "auditgate_events_total",
            "Lines received in committed batches, by what became of them.",
            &["source", "outcome"],
        )?;
        let delay = declare.histograms(
            "auditgate_event_delay_seconds",
            "Arrival minus the event's own time (rt), between 0 and one year.",
            &["source"],
            &DELAY_BUCKETS,
        )?;
        let last_event = declare.gauges(
            "auditgate_last_event_timestamp_seconds",
            "Unix time at which the last event was accepted; 0 before the first.",
            &["source"],
        )?;

        let byte_order_marks = declare.counters(
            "auditgate_byte_order_marks_total",
            "Bodies with a byte order mark in front, which was dropped.",
            &["source"],
        )?;

        let commit_duration = declare.histogram(
            "auditgate_commit_duration_seconds",
            "Time that the ledger's transaction with a batch took, with its fsync.",
            &COMMIT_BUCKETS,
        )?;
        let commit_queue = declare.histogram(
            "auditgate_commit_queue_seconds",
            "Time that a batch waited for the ledger's transaction to begin.",
            &COMMIT_BUCKETS,
        )?;
        let ledger_bytes =
            declare.gauge("auditgate_ledger_bytes", "Size of the ledger's files on disk in bytes.")?;

        let delivered = declare.counters(
            "auditgate_sink_events_total",
            "Events and quarantined lines that the sink holds safely.",
            &["sink"],
        )?;
        let pending = declare.gauges(
            "auditgate_sink_pending_events",
            "Events and quarantined lines of the batches that the sink does not have wholly.",
            &["sink"],
        )?;
        let oldest_pending = declare.float_gauges(
            "auditgate_sink_oldest_pending_seconds",
            "Age of the oldest batch that waits for the sink; 0 when none waits.",
            &["sink"],
        )?;
        let sink_errors = declare.counters(
            "auditgate_sink_errors_total",
            "Attempts to write to the sink that failed and are tried again.",
            &["sink"],
        )?;
        let sink_truncated = declare.counters(
            "auditgate_sink_truncated_total",
            "Events and quarantined lines that were cut to fit the sink's max_size.",
            &["sink"],
        )?;
        let sink_skipped = declare.counters(
            "auditgate_sink_skipped_events_total",
            "Events and quarantined lines that the sink lost because it did not keep up and may skip.",
            &["sink"],
        )?;

        let jwks_keys = declare.gauges(
            "auditgate_jwks_keys",
            "Public keys in use, retired ones included; 0 while none is loaded or where signatures are off.",
            &["source"],
        )?;
        let jwks_retired_keys = declare.gauges(
            "auditgate_jwks_retired_keys",
            "Public keys in use that the key set no longer lists: trusted for retired_for.",
            &["source"],
        )?;
        let jwks_changes = declare.counters(
            "auditgate_jwks_changes_total",
            "Times that the key set listed other keys than before.",
            &["source"],
        )?;
        let jwks_refreshed = declare.gauges(
            "auditgate_jwks_refreshed_timestamp_seconds",
            "Unix time at which the key set was last read from its origin; 0 before the first time.",
            &["source"],
        )?;
        let jwks_refresh_errors = declare.counters(
            "auditgate_jwks_refresh_errors_total",
            "Attempts to refresh the key set that failed; the former keys stay in use.",
            &["source"],
        )?;
        let reload_errors = declare.counter(
            "auditgate_config_reload_errors_total",
            "New configurations and certificates that could not be used; the former ones stay in force.",
        )?;
        let certificate_not_after = declare.gauge(
            "auditgate_tls_certificate_not_after_timestamp_seconds",
            "Unix time at which the served certificate expires; 0 without TLS.",
        )?;

        declare
            .gauges("auditgate_build_info", "Always 1; the label is the running version.", &["version"])?
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .set(1);
        declare.process()?;

        let sink_series = |name: &String| SinkSeries {
            delivered: delivered.with_label_values(&[name]),
            pending: pending.with_label_values(&[name]),
            oldest_pending: oldest_pending.with_label_values(&[name]),
            errors: sink_errors.with_label_values(&[name]),
            truncated: sink_truncated.with_label_values(&[name]),
            skipped: sink_skipped.with_label_values(&[name]),
        };
        let metrics = Self {
            unrouted: requests.of(""),
            source_families: SourceFamilies {
                requests,
                events,
                delay,
                last_event,
                byte_order_marks,
                jwks_keys,
                jwks_retired_keys,
                jwks_changes,
                jwks_refreshed,
                jwks_refresh_errors,
            },
            sources: RwLock::default(),
            sinks: sinks.iter().map(|name| (name.clone(), sink_series(name))).collect(),
            connections,
            authorized_connections,
            connections_closed: CloseReason::ALL.map(|reason| closed.with_label_values(&[reason.as_str()])),
            in_flight_bytes,
            commit_duration,
            commit_queue,
            ledger_bytes,
            certificate_not_after,
            reload_errors,
            before_render: RwLock::default(),
            registry,
        };
        for source in sources {
            metrics.add_source(source);
        }
        Ok(metrics)
    }

    /// Creates the series of a source that was configured later; those of a source that was removed
    /// stay.
    pub fn add_source(&self, name: &str) {
        let mut sources = self.sources.write();
        sources.entry(name.to_owned()).or_insert_with(|| Arc::new(self.source_families.of(name)));
    }

    /// Counts a new configuration or a new certificate that could not be used.
    pub fn config_reload_error(&self) {
        self.reload_errors.inc();
    }

    /// Counts one answered request. `source` is `None` when no source has the path; `code` is one
    /// of [`STATUS_CODES`]; `elapsed` is the time from the request's header to the end of the
    /// response.
    pub fn http_request(&self, source: Option<&str>, code: u16, elapsed: Duration) {
        let source = source.map(|name| self.source(name));
        let series = match &source {
            None => Some(&self.unrouted),
            Some(source) => source.as_ref().map(|source| &source.requests),
        };
        let code = STATUS_CODES.iter().position(|&known| known == code);
        debug_assert!(code.is_some(), "a status outside STATUS_CODES was answered");
        if let (Some(series), Some(code)) = (series, code) {
            series.by_code[code].inc();
            series.duration.observe(elapsed.as_secs_f64());
        }
    }

    /// Counts a connection as open until the guard is dropped.
    #[must_use = "the connection counts as closed when the guard is dropped"]
    pub fn connection_opened(&self) -> ConnectionGuard {
        self.connections.inc();
        ConnectionGuard { connections: self.connections.clone() }
    }

    /// Counts a connection that ended.
    pub fn connection_ended(&self, reason: CloseReason) {
        self.connections_closed[reason as usize].inc();
    }

    /// Sets the number of open connections that have shown a valid token.
    pub fn authorized_connections(&self, connections: u64) {
        self.authorized_connections.set(saturate(connections));
    }

    /// Sets the bytes that batches in progress have reserved.
    pub fn in_flight_bytes(&self, bytes: u64) {
        self.in_flight_bytes.set(saturate(bytes));
    }

    /// Counts `n` lines of a committed batch.
    pub fn events(&self, source: &str, outcome: LineOutcome, n: u64) {
        if let Some(series) = self.source(source) {
            series.events[outcome as usize].inc_by(n);
        }
    }

    /// Records the delays of events, in seconds, for a whole batch at once: some 10 ns an event,
    /// and the shared series is touched once. A sender whose clock is ahead counts as 0, and
    /// nothing as more than a year.
    pub fn event_delays(&self, source: &str, seconds: &[f64]) {
        if let Some(series) = self.source(source) {
            let local = series.delay.local();
            for delay in seconds {
                // A NaN would stay in the sum forever.
                let delay = if delay.is_nan() { 0.0 } else { delay.clamp(0.0, LONGEST_DELAY) };
                local.observe(delay);
            }
            local.flush();
        }
    }

    /// Counts a body with a byte order mark in front.
    pub fn byte_order_mark(&self, source: &str) {
        if let Some(series) = self.source(source) {
            series.byte_order_marks.inc();
        }
    }

    /// Sets when the source's last event was accepted, in seconds since the Unix epoch, by our
    /// clock.
    pub fn last_event(&self, source: &str, unix_seconds: u64) {
        if let Some(series) = self.source(source) {
            series.last_event.set(saturate(unix_seconds));
        }
    }

    /// Records how long a batch waited for a transaction of the ledger, and how long that took.
    pub fn commit(&self, queued: Duration, transaction: Duration) {
        self.commit_queue.observe(queued.as_secs_f64());
        self.commit_duration.observe(transaction.as_secs_f64());
    }

    /// Sets the size of the ledger's files in bytes.
    pub fn ledger_bytes(&self, bytes: u64) {
        self.ledger_bytes.set(saturate(bytes));
    }

    /// Counts `n` events (or quarantined lines) that the sink reported as safe.
    pub fn sink_delivered(&self, sink: &str, n: u64) {
        if let Some(series) = self.sink(sink) {
            series.delivered.inc_by(n);
        }
    }

    /// Sets what waits for the sink: the number of events, and the age of the oldest in seconds (0
    /// when none waits).
    pub fn sink_pending(&self, sink: &str, events: u64, oldest_seconds: f64) {
        if let Some(series) = self.sink(sink) {
            series.pending.set(saturate(events));
            series.oldest_pending.set(oldest_seconds);
        }
    }

    /// Counts one failed attempt to write to the sink.
    pub fn sink_error(&self, sink: &str) {
        if let Some(series) = self.sink(sink) {
            series.errors.inc();
        }
    }

    /// Counts `n` events (or quarantined lines) that were truncated to fit the sink.
    pub fn sink_truncated(&self, sink: &str, n: u64) {
        if let Some(series) = self.sink(sink) {
            series.truncated.inc_by(n);
        }
    }

    /// Counts `n` events (or quarantined lines) that the sink lost.
    pub fn sink_skipped(&self, sink: &str, n: u64) {
        if let Some(series) = self.sink(sink) {
            series.skipped.inc_by(n);
        }
    }

    /// Sets the number of keys in use, and of the retired ones among them.
    pub fn jwks_keys(&self, source: &str, keys: u64, retired: u64) {
        if let Some(series) = self.source(source) {
            series.jwks_keys.set(saturate(keys));
            series.jwks_retired_keys.set(saturate(retired));
        }
    }

    /// Records that the key set was read from its origin, at a time in seconds since the Unix
    /// epoch.
    pub fn jwks_refreshed(&self, source: &str, unix_seconds: u64, changed: bool) {
        if let Some(series) = self.source(source) {
            series.jwks_refreshed.set(saturate(unix_seconds));
            series.jwks_changes.inc_by(u64::from(changed));
        }
    }

    /// Counts one failed refresh of the source's key set.
    pub fn jwks_refresh_error(&self, source: &str) {
        if let Some(series) = self.source(source) {
            series.jwks_refresh_errors.inc();
        }
    }

    /// Sets when the served certificate expires, in seconds since the Unix epoch.
    pub fn certificate_not_after(&self, unix_seconds: u64) {
        self.certificate_not_after.set(saturate(unix_seconds));
    }

    /// Adds a callback that updates values before each rendering, in the order of the calls. It
    /// runs on a thread of the admin endpoint: it must not take long, and must call neither this
    /// nor [`Metrics::render`].
    pub fn before_render(&self, hook: BeforeRender) {
        self.before_render.write().push(hook);
    }

    /// Runs the callbacks, then writes every series in the format named by [`CONTENT_TYPE`].
    ///
    /// # Errors
    /// [`MetricsError::Encode`] when a series cannot be written.
    pub fn render(&self) -> Result<Vec<u8>, MetricsError> {
        self.refresh();
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).map_err(MetricsError::Encode)?;
        Ok(text)
    }

    fn source(&self, name: &str) -> Option<Arc<SourceSeries>> {
        let series = self.sources.read().get(name).cloned();
        debug_assert!(series.is_some(), "no source of this name is configured");
        series
    }

    fn sink(&self, name: &str) -> Option<&SinkSeries> {
        let series = self.sinks.get(name);
        debug_assert!(series.is_some(), "no sink of this name is configured");
        series
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// An open connection; dropping it counts the connection as closed, however it ended.
#[derive(Debug)]
pub struct ConnectionGuard {
    connections: IntGauge,
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.connections.dec();
    }
}

/// The two families that also have series for requests to no source.
struct RequestFamilies {
    total: IntCounterVec,
    duration: HistogramVec,
}

impl RequestFamilies {
    fn of(&self, source: &str) -> RequestSeries {
        RequestSeries {
            by_code: STATUS_CODES
                .map(|code| self.total.with_label_values(&[source, code.to_string().as_str()])),
            duration: self.duration.with_label_values(&[source]),
        }
    }
}

/// Creates a metric and registers it, so that none can be created and forgotten.
struct Declarations<'a>(&'a Registry);

impl Declarations<'_> {
    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, MetricsError> {
        self.enter(IntGauge::new(name, help))
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter, MetricsError> {
        self.enter(IntCounter::new(name, help))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, MetricsError> {
        self.enter(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    fn float_gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<GaugeVec, MetricsError> {
        self.enter(GaugeVec::new(Opts::new(name, help), labels))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, MetricsError> {
        self.enter(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Result<Histogram, MetricsError> {
        self.enter(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())))
    }

    fn histograms(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: &[f64],
    ) -> Result<HistogramVec, MetricsError> {
        self.enter(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels))
    }

    /// Registers the standard `process_*` metrics, which are read from /proc.
    #[cfg(target_os = "linux")]
    fn process(&self) -> Result<(), MetricsError> {
        let process = prometheus::process_collector::ProcessCollector::for_self();
        self.0.register(Box::new(Process(process))).map_err(MetricsError::Register)
    }

    #[cfg(not(target_os = "linux"))]
    fn process(&self) -> Result<(), MetricsError> {
        Ok(())
    }

    /// Registers a metric. The registry keeps one handle and the caller the other, both to the same
    /// series.
    fn enter<C: Collector + Clone + 'static>(
        &self,
        metric: prometheus::Result<C>,
    ) -> Result<C, MetricsError> {
        let metric = metric.map_err(MetricsError::Register)?;
        self.0.register(Box::new(metric.clone())).map_err(MetricsError::Register)?;
        Ok(metric)
    }
}

fn saturate(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// The standard metrics of a process, with fractions of a second in its CPU time, which the crate
/// drops.
#[cfg(target_os = "linux")]
struct Process(prometheus::process_collector::ProcessCollector);

#[cfg(target_os = "linux")]
impl Collector for Process {
    fn desc(&self) -> Vec<&Desc> {
        self.0.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let used = clock_gettime(ClockId::ProcessCPUTime);
        let used = Duration::try_from(used).unwrap_or_default();
        let mut families = self.0.collect();
        for family in families.iter_mut().filter(|family| family.name() == "process_cpu_seconds_total") {
            for metric in family.mut_metric() {
                let mut counter = Counter::default();
                counter.set_value(used.as_secs_f64());
                metric.set_counter(counter);
            }
        }
        families
    }
}

#[cfg(test)]
mod tests;
