//! The metrics that have a series for each source or sink, and how a metric is declared.

use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry,
};

use super::{LineOutcome, MetricsError, STATUS_CODES};
use crate::wire::event::class::{EventKind, EventSeverity};

/// Buckets in seconds. A request ends within its timeout, 30 s unless configured otherwise.
const REQUEST_BUCKETS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// Buckets in seconds. Fine around Konnect's 15 s of retries; the upper end distinguishes a replay
/// job (up to 7 days, Konnect's retention) from an outage.
const DELAY_BUCKETS: [f64; 14] =
    [1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 300.0, 900.0, 3_600.0, 14_400.0, 86_400.0, 345_600.0, 691_200.0];

/// Creates a metric and registers it, so that none can be created and forgotten.
pub(super) struct Declarations<'a>(pub(super) &'a Registry);

impl Declarations<'_> {
    pub(super) fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, MetricsError> {
        self.enter(IntGauge::new(name, help))
    }

    pub(super) fn counter(&self, name: &str, help: &str) -> Result<IntCounter, MetricsError> {
        self.enter(IntCounter::new(name, help))
    }

    pub(super) fn gauges(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntGaugeVec, MetricsError> {
        self.enter(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    pub(super) fn float_gauges(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<GaugeVec, MetricsError> {
        self.enter(GaugeVec::new(Opts::new(name, help), labels))
    }

    pub(super) fn counters(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntCounterVec, MetricsError> {
        self.enter(IntCounterVec::new(Opts::new(name, help), labels))
    }

    pub(super) fn histogram(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
    ) -> Result<Histogram, MetricsError> {
        self.enter(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())))
    }

    pub(super) fn histograms(
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
    pub(super) fn process(&self) -> Result<(), MetricsError> {
        let process = super::process::Process::new().map_err(MetricsError::Register)?;
        self.0.register(Box::new(process)).map_err(MetricsError::Register)
    }

    #[cfg(not(target_os = "linux"))]
    pub(super) fn process(&self) -> Result<(), MetricsError> {
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

/// The two families that also have series for requests to no source.
pub(super) struct RequestFamilies {
    total: IntCounterVec,
    duration: HistogramVec,
}

/// Series of the requests to one source's path, or to none.
pub(super) struct RequestSeries {
    pub(super) by_code: [IntCounter; STATUS_CODES.len()],
    pub(super) duration: Histogram,
}

impl RequestFamilies {
    fn declare(declare: &Declarations<'_>) -> Result<Self, MetricsError> {
        Ok(Self {
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
        })
    }

    pub(super) fn of(&self, source: &str) -> RequestSeries {
        RequestSeries {
            by_code: STATUS_CODES
                .map(|code| self.total.with_label_values(&[source, code.to_string().as_str()])),
            duration: self.duration.with_label_values(&[source]),
        }
    }
}

/// Families with a series for each source.
pub(super) struct SourceFamilies {
    pub(super) requests: RequestFamilies,
    body_duration: HistogramVec,
    queue_duration: HistogramVec,
    received_bytes: IntCounterVec,
    decoded_bytes: IntCounterVec,
    events: IntCounterVec,
    accepted: IntCounterVec,
    delay: HistogramVec,
    last_event: IntGaugeVec,
    byte_order_marks: IntCounterVec,
    jwks_keys: IntGaugeVec,
    jwks_retired_keys: IntGaugeVec,
    jwks_changes: IntCounterVec,
    jwks_refreshed: IntGaugeVec,
    jwks_refresh_errors: IntCounterVec,
}

/// Series of one source.
pub(super) struct SourceSeries {
    pub(super) requests: RequestSeries,
    pub(super) body_duration: Histogram,
    pub(super) queue_duration: Histogram,
    pub(super) received_bytes: IntCounter,
    pub(super) decoded_bytes: IntCounter,
    pub(super) events: [IntCounter; LineOutcome::ALL.len()],
    pub(super) accepted: [[IntCounter; EventSeverity::ALL.len()]; EventKind::ALL.len()],
    pub(super) delay: Histogram,
    pub(super) last_event: IntGauge,
    pub(super) byte_order_marks: IntCounter,
    pub(super) jwks_keys: IntGauge,
    pub(super) jwks_retired_keys: IntGauge,
    pub(super) jwks_changes: IntCounter,
    pub(super) jwks_refreshed: IntGauge,
    pub(super) jwks_refresh_errors: IntCounter,
}

impl SourceFamilies {
    pub(super) fn declare(declare: &Declarations<'_>) -> Result<Self, MetricsError> {
        Ok(Self {
            requests: RequestFamilies::declare(declare)?,
            body_duration: declare.histograms(
                "auditgate_http_body_duration_seconds",
                "Part of a request's time in which its body arrived, for bodies that arrived whole.",
                &["source"],
                &REQUEST_BUCKETS,
            )?,
            queue_duration: declare.histograms(
                "auditgate_http_queue_duration_seconds",
                "Part of a request's time in which its batch waited for memory, a core, keys or the ledger.",
                &["source"],
                &REQUEST_BUCKETS,
            )?,
            received_bytes: declare.counters(
                "auditgate_received_bytes_total",
                "Bytes of the bodies that arrived whole, as sent, those of refused batches too.",
                &["source"],
            )?,
            decoded_bytes: declare.counters(
                "auditgate_decoded_bytes_total",
                "Bytes of the committed batches after inflating.",
                &["source"],
            )?,
            events: declare.counters(
                "auditgate_events_total",
                "Lines received in committed batches, by what became of them.",
                &["source", "outcome"],
            )?,
            accepted: declare.counters(
                "auditgate_accepted_events_total",
                "The accepted ones of them, by kind and by the severity that Konnect gave them.",
                &["source", "kind", "severity"],
            )?,
            delay: declare.histograms(
                "auditgate_event_delay_seconds",
                "Arrival minus the event's own time (rt), between 0 and one year.",
                &["source"],
                &DELAY_BUCKETS,
            )?,
            last_event: declare.gauges(
                "auditgate_last_event_timestamp_seconds",
                "Unix time at which the last event was accepted; 0 before the first.",
                &["source"],
            )?,
            byte_order_marks: declare.counters(
                "auditgate_byte_order_marks_total",
                "Bodies with a byte order mark in front, which was dropped.",
                &["source"],
            )?,
            jwks_keys: declare.gauges(
                "auditgate_jwks_keys",
                "Public keys in use, retired ones included; 0 while none is loaded or where signatures are \
                 off.",
                &["source"],
            )?,
            jwks_retired_keys: declare.gauges(
                "auditgate_jwks_retired_keys",
                "Public keys in use that the key set no longer lists: trusted for retired_for.",
                &["source"],
            )?,
            jwks_changes: declare.counters(
                "auditgate_jwks_changes_total",
                "Times that the key set listed other keys than before.",
                &["source"],
            )?,
            jwks_refreshed: declare.gauges(
                "auditgate_jwks_refreshed_timestamp_seconds",
                "Unix time at which the key set was last read from its origin; 0 before the first time.",
                &["source"],
            )?,
            jwks_refresh_errors: declare.counters(
                "auditgate_jwks_refresh_errors_total",
                "Attempts to refresh the key set that failed; the former keys stay in use.",
                &["source"],
            )?,
        })
    }

    pub(super) fn of(&self, name: &str) -> SourceSeries {
        let accepted = |kind: EventKind, severity: EventSeverity| {
            self.accepted.with_label_values(&[name, kind.as_str(), severity.as_str()])
        };
        SourceSeries {
            requests: self.requests.of(name),
            body_duration: self.body_duration.with_label_values(&[name]),
            queue_duration: self.queue_duration.with_label_values(&[name]),
            received_bytes: self.received_bytes.with_label_values(&[name]),
            decoded_bytes: self.decoded_bytes.with_label_values(&[name]),
            events: LineOutcome::ALL.map(|outcome| self.events.with_label_values(&[name, outcome.as_str()])),
            accepted: EventKind::ALL.map(|kind| EventSeverity::ALL.map(|severity| accepted(kind, severity))),
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

/// Families with a series for each sink.
pub(super) struct SinkFamilies {
    delivered: IntCounterVec,
    pending: IntGaugeVec,
    oldest_pending: GaugeVec,
    errors: IntCounterVec,
    truncated: IntCounterVec,
    skipped: IntCounterVec,
}

/// Series of one sink.
pub(super) struct SinkSeries {
    pub(super) delivered: IntCounter,
    pub(super) pending: IntGauge,
    pub(super) oldest_pending: Gauge,
    pub(super) errors: IntCounter,
    pub(super) truncated: IntCounter,
    pub(super) skipped: IntCounter,
}

impl SinkFamilies {
    pub(super) fn declare(declare: &Declarations<'_>) -> Result<Self, MetricsError> {
        Ok(Self {
            delivered: declare.counters(
                "auditgate_sink_events_total",
                "Events and quarantined lines that the sink holds safely.",
                &["sink"],
            )?,
            pending: declare.gauges(
                "auditgate_sink_pending_events",
                "Events and quarantined lines of the batches that the sink does not have wholly.",
                &["sink"],
            )?,
            oldest_pending: declare.float_gauges(
                "auditgate_sink_oldest_pending_seconds",
                "Age of the oldest batch that waits for the sink; 0 when none waits.",
                &["sink"],
            )?,
            errors: declare.counters(
                "auditgate_sink_errors_total",
                "Attempts to write to the sink that failed and are tried again.",
                &["sink"],
            )?,
            truncated: declare.counters(
                "auditgate_sink_truncated_total",
                "Events and quarantined lines that were cut to fit the sink's max_size.",
                &["sink"],
            )?,
            skipped: declare.counters(
                "auditgate_sink_skipped_events_total",
                "Events and quarantined lines that the sink lost because it did not keep up and may skip.",
                &["sink"],
            )?,
        })
    }

    pub(super) fn of(&self, name: &str) -> SinkSeries {
        SinkSeries {
            delivered: self.delivered.with_label_values(&[name]),
            pending: self.pending.with_label_values(&[name]),
            oldest_pending: self.oldest_pending.with_label_values(&[name]),
            errors: self.errors.with_label_values(&[name]),
            truncated: self.truncated.with_label_values(&[name]),
            skipped: self.skipped.with_label_values(&[name]),
        }
    }
}
