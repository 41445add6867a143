//! The daemon's Prometheus metrics, each declared once.
//!
//! Every series exists from the start and none is added later: a label value comes from the
//! configuration or from a closed list, so that no sender can grow the memory of the daemon or of
//! the Prometheus server, and a counter is 0 before its first event, as `rate()` needs it. Call
//! sites name a source or a sink, never a label; the handle of each series is looked up here.
//!
//! Recording never fails and never blocks for long: a series is an atomic number.

mod families;
mod openmetrics;
#[cfg(target_os = "linux")]
mod process;
pub mod values;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use prometheus::{Encoder, Histogram, IntCounter, IntGauge, Registry, TextEncoder};

use self::families::{Declarations, RequestSeries, SinkFamilies, SinkSeries, SourceFamilies, SourceSeries};
use crate::receive::close_reason::CloseReason;
use crate::wire::event::Reason;
use crate::wire::event::class::EventClass;

/// Format of [`Metrics::render`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextFormat {
    /// Prometheus's text exposition format, version 0.0.4.
    Prometheus,
    /// OpenMetrics, version 1.0.
    OpenMetrics,
}

impl TextFormat {
    /// Returns the format for a client with this `Accept`: OpenMetrics if it names that at all, as
    /// Prometheus does.
    pub fn accepted(accept: &str) -> Self {
        let is_open = |range: &str| {
            let name = range.split(';').next().unwrap_or_default().trim();
            name.eq_ignore_ascii_case("application/openmetrics-text")
        };
        if accept.split(',').any(is_open) { Self::OpenMetrics } else { Self::Prometheus }
    }

    /// Returns the `Content-Type`.
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => prometheus::TEXT_FORMAT,
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// The statuses that the receiver can answer, ascending. A status that is not listed is not
/// counted.
pub const STATUS_CODES: [u16; 11] = [200, 400, 401, 403, 404, 405, 413, 415, 429, 431, 500];

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

impl From<Reason> for LineOutcome {
    fn from(reason: Reason) -> Self {
        match reason {
            Reason::Malformed => Self::Malformed,
            Reason::BadSignature => Self::BadSignature,
            Reason::Unsigned => Self::Unsigned,
            Reason::LineTooLong => Self::LineTooLong,
            Reason::UndecodableBody => Self::UndecodableBody,
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
    ready: IntGauge,
    warnings: IntGauge,
    before_render: RwLock<Vec<BeforeRender>>,
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

        let source_families = SourceFamilies::declare(&declare)?;
        let sink_families = SinkFamilies::declare(&declare)?;
        let closed = declare.counters(
            "auditgate_http_connections_closed_total",
            "Connections that ended at the receiving listener, by how they did.",
            &["reason"],
        )?;
        declare
            .gauges("auditgate_build_info", "Always 1; the label is the running version.", &["version"])?
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .set(1);
        declare.process()?;

        let metrics = Self {
            unrouted: source_families.requests.of(""),
            source_families,
            sources: RwLock::default(),
            sinks: sinks.iter().map(|name| (name.clone(), sink_families.of(name))).collect(),
            connections: declare
                .gauge("auditgate_http_connections", "Connections open at the receiving listener.")?,
            authorized_connections: declare.gauge(
                "auditgate_http_authorized_connections",
                "Those of them that have shown a valid token.",
            )?,
            connections_closed: CloseReason::ALL.map(|reason| closed.with_label_values(&[reason.as_str()])),
            in_flight_bytes: declare.gauge(
                "auditgate_in_flight_bytes",
                "Memory that batches in work have reserved, of limits.in_flight.",
            )?,
            commit_duration: declare.histogram(
                "auditgate_commit_duration_seconds",
                "Time that the ledger's transaction with a batch took, with its fsync.",
                &COMMIT_BUCKETS,
            )?,
            commit_queue: declare.histogram(
                "auditgate_commit_queue_seconds",
                "Time that a batch waited for the ledger's transaction to begin.",
                &COMMIT_BUCKETS,
            )?,
            ledger_bytes: declare
                .gauge("auditgate_ledger_bytes", "Size of the ledger's files on disk in bytes.")?,
            certificate_not_after: declare.gauge(
                "auditgate_tls_certificate_not_after_timestamp_seconds",
                "Unix time at which the served certificate expires; 0 without TLS.",
            )?,
            reload_errors: declare.counter(
                "auditgate_config_reload_errors_total",
                "New configurations and certificates that could not be used; the former ones stay in force.",
            )?,
            ready: declare.gauge("auditgate_ready", "1 while /readyz answers 200, otherwise 0.")?,
            warnings: declare.gauge(
                "auditgate_warnings",
                "Conditions that need attention although the daemon may be ready; /readyz names them.",
            )?,
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

    /// Counts a body that arrived whole: its size as sent, and how long it took.
    pub fn http_body(&self, source: &str, bytes: u64, elapsed: Duration) {
        if let Some(series) = self.source(source) {
            series.received_bytes.inc_by(bytes);
            series.body_duration.observe(elapsed.as_secs_f64());
        }
    }

    /// Counts a committed batch: its size after inflating, and how long it waited altogether.
    pub fn batch(&self, source: &str, decoded_bytes: u64, queued: Duration) {
        if let Some(series) = self.source(source) {
            series.decoded_bytes.inc_by(decoded_bytes);
            series.queue_duration.observe(queued.as_secs_f64());
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

    /// Counts `n` accepted events of one class. [`Metrics::events`] counts them too.
    pub fn accepted_events(&self, source: &str, class: EventClass, n: u64) {
        if let Some(series) = self.source(source) {
            series.accepted[class.kind as usize][class.severity as usize].inc_by(n);
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

    /// Sets whether the daemon is ready, and the number of conditions that need attention
    /// nevertheless.
    pub fn health(&self, is_ready: bool, warnings: u64) {
        self.ready.set(i64::from(is_ready));
        self.warnings.set(saturate(warnings));
    }

    /// Adds a callback that updates values before each rendering, in the order of the calls. It
    /// runs on a thread of the admin endpoint: it must not take long, and must call neither this
    /// nor [`Metrics::render`].
    pub fn before_render(&self, hook: BeforeRender) {
        self.before_render.write().push(hook);
    }

    /// Runs the callbacks, then writes every series.
    ///
    /// # Errors
    /// [`MetricsError::Encode`] when a series cannot be written.
    pub fn render(&self, format: TextFormat) -> Result<Vec<u8>, MetricsError> {
        self.refresh();
        if format == TextFormat::OpenMetrics {
            return Ok(openmetrics::encode(&self.registry.gather()).into_bytes());
        }
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

fn saturate(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
