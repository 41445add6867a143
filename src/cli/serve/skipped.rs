//! Events that sinks lost by `when_full = "skip"`: counted exactly, and logged at intervals.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::ledger::{Ledger, Skipped};
use crate::observe::metrics::Metrics;
use crate::wire::record::time_stamp;

/// Reports the ledger's losses in the metrics and the log.
pub(super) struct Skips {
    metrics: Arc<Metrics>,
    ledger: Ledger,
    reports: Mutex<BTreeMap<String, Report>>,
}

/// Losses of a sink.
#[derive(Default)]
struct Report {
    /// Events that are not logged yet.
    unreported: Skipped,
    /// Time of the last message.
    reported: Option<Instant>,
}

/// Minimum time between two messages about a sink.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

impl Skips {
    pub(super) fn new(metrics: Arc<Metrics>, ledger: Ledger) -> Self {
        Self { metrics, ledger, reports: Mutex::default() }
    }

    /// Counts what was lost since the last call.
    pub(super) fn count(&self) {
        let mut reports = self.reports.lock();
        for (sink, skipped) in self.ledger.take_skipped() {
            self.metrics.sink_skipped(&sink, skipped.events);
            reports.entry(sink).or_default().unreported.add(skipped);
        }
    }

    /// Counts and logs until the end of the process.
    pub(super) async fn keep_reporting(self: Arc<Self>) {
        let mut every_second = tokio::time::interval(Duration::from_secs(1));
        loop {
            every_second.tick().await;
            self.count();
            self.report(|reported| reported.elapsed() >= REPORT_INTERVAL);
        }
    }

    /// Logs what is left, at the end.
    pub(super) fn report_rest(&self) {
        self.count();
        self.report(|_| true);
    }

    fn report(&self, is_time: impl Fn(Instant) -> bool) {
        for (sink, report) in self.reports.lock().iter_mut() {
            if report.unreported.events == 0 || !report.reported.is_none_or(&is_time) {
                continue;
            }
            let Skipped { events, oldest, newest } = std::mem::take(&mut report.unreported);
            report.reported = Some(Instant::now());
            tracing::warn!(
                code = "sink-events-skipped",
                sink,
                events,
                arrived_from = time_stamp(oldest),
                arrived_to = time_stamp(newest),
                "sink \"{sink}\" did not keep up and the backlog was nearly full: its {events} oldest events are \
                 dropped, as when_full = \"skip\" says"
            );
        }
    }
}
