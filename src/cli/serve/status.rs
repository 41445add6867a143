//! Assembles the report of `/status` from the state of the parts, and keeps the last hour of their
//! counters.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::watch;

use super::InForce;
use super::sink_status::SinkStatus;
use crate::cli::version::VERSION;
use crate::clock::Clock;
use crate::config::{Config, SinkKind};
use crate::ingest::{Policy, Source};
use crate::ledger::{Backlog, Ledger};
use crate::observe::health::Health;
use crate::observe::history::{self, History};
use crate::observe::metrics::values::{SinkValues, SourceValues};
use crate::observe::metrics::{LineOutcome, Metrics};
use crate::observe::status::{
    CertificateReport, ConfigurationReport, ErrorReport, HistoryReport, KeysReport, LedgerReport,
    QuarantineReport, SinkReport, SourceReport, StatusReport,
};
use crate::receive::tls::Certificates;

/// The state of the whole daemon, for `/status`.
pub(super) struct DaemonStatus {
    parts: Parts,
    /// The report as it was at the start: what never changes is in it.
    at_start: StatusReport,
    reload: Mutex<LastReload>,
    history: Mutex<History>,
    is_sampling: AtomicBool,
    clock: Clock,
}

/// Parts whose state is reported.
pub(super) struct Parts {
    pub(super) metrics: Arc<Metrics>,
    pub(super) health: Arc<Health>,
    pub(super) sinks: Arc<SinkStatus>,
    pub(super) ledger: Ledger,
    pub(super) certificates: Option<Arc<Certificates>>,
    pub(super) in_force: watch::Receiver<Arc<InForce>>,
}

/// The last attempt to reload.
#[derive(Default)]
struct LastReload {
    at: Option<i64>,
    error: Option<String>,
    loaded_at: i64,
}

impl DaemonStatus {
    /// Creates the status of a daemon that starts now, and takes the first sample: rates count from
    /// here.
    pub(super) fn new(file: &Path, listener: String, sinks: Vec<SinkReport>, parts: Parts) -> Arc<Self> {
        let clock = Clock::system();
        let started_at = (clock.wall)() / 1000;
        let at_start = StatusReport {
            version: VERSION.to_owned(),
            started_at,
            configuration: ConfigurationReport {
                file: file.display().to_string(),
                ..ConfigurationReport::default()
            },
            listener,
            sinks,
            ..StatusReport::default()
        };
        let status = Arc::new(Self {
            parts,
            at_start,
            reload: Mutex::new(LastReload { loaded_at: started_at, ..LastReload::default() }),
            history: Mutex::default(),
            is_sampling: AtomicBool::new(false),
            clock,
        });
        status.sample();
        status
    }

    /// Takes a sample if one is due; called every second. On a thread of its own, since the ledger
    /// may be on a disk that does not answer.
    pub(super) fn tick(self: &Arc<Self>) {
        if self.history.lock().is_due((self.clock.steady)()) && !self.is_sampling.swap(true, Ordering::AcqRel)
        {
            let this = Arc::clone(self);
            tokio::task::spawn_blocking(move || {
                this.sample();
                this.is_sampling.store(false, Ordering::Release);
            });
        }
    }

    /// Records the result of an attempt to reload.
    pub(super) fn reloaded(&self, result: Result<(), &String>) {
        let now = self.now();
        let mut last = self.reload.lock();
        last.at = Some(now);
        last.error = result.err().cloned();
        if result.is_ok() {
            last.loaded_at = now;
        }
    }

    fn now(&self) -> i64 {
        (self.clock.wall)() / 1000
    }

    fn sample(&self) {
        let Parts { metrics, in_force, .. } = &self.parts;
        let in_force = Arc::clone(&in_force.borrow());
        metrics.refresh();
        let sources = in_force.sources.iter();
        let sources = sources.map(|source| (source.name.to_string(), metrics.source_values(&source.name)));
        let sinks = self.at_start.sinks.iter();
        let sinks = sinks.map(|sink| (sink.name.clone(), metrics.sink_values(&sink.name)));
        let (sources, sinks) = (sources.collect(), sinks.collect());
        self.history.lock().record((self.clock.steady)(), self.now(), &sources, &sinks);
    }

    /// Returns the report. Reads the ledger, so it blocks on the disk.
    pub(super) fn report(&self) -> StatusReport {
        let Parts { metrics, health, certificates, in_force, .. } = &self.parts;
        let in_force = Arc::clone(&in_force.borrow());
        metrics.refresh();
        let now = Now { wall: self.now(), steady: (self.clock.steady)() };
        let history = self.history.lock();
        let sources: BTreeMap<&str, (&Arc<Source>, SourceValues)> = in_force
            .sources
            .iter()
            .map(|source| (&*source.name, (source, metrics.source_values(&source.name))))
            .collect();
        let mut quarantine = Vec::new();
        let mut report = StatusReport {
            time: now.wall,
            problems: health.ready().err().unwrap_or_default(),
            warnings: health.warnings(),
            configuration: self.configuration(),
            certificate: certificates.as_ref().map(|certificates| CertificateReport {
                names: certificates.names(),
                not_after: certificates.not_after(),
            }),
            ledger: self.ledger(&in_force),
            history: HistoryReport {
                interval_seconds: history::INTERVAL.as_secs(),
                sources: sources
                    .keys()
                    .map(|name| ((*name).to_owned(), history.source_chart(name)))
                    .collect(),
                sinks: BTreeMap::new(),
            },
            ..self.at_start.clone()
        };
        report.ready = report.problems.is_empty();
        for (name, (source, values)) in sources {
            let path = in_force.paths.get(name).cloned().unwrap_or_default();
            report.sources.push(source_report(source, path, &values, &history, now, &mut quarantine));
        }
        for sink in &mut report.sinks {
            let values = metrics.sink_values(&sink.name);
            let SinkValues { delivered, pending, oldest_pending, errors, truncated, skipped } = values;
            *sink = SinkReport {
                pending,
                oldest_pending_seconds: oldest_pending,
                delivered,
                minute_rate: history.sink_rate(&sink.name, now.steady, &values),
                errors,
                truncated,
                skipped,
                ..std::mem::take(sink)
            };
            let name = sink.name.clone();
            self.parts.sinks.describe(&name, now.wall, sink);
            report.history.sinks.insert(name.clone(), history.sink_chart(&name));
        }
        quarantine.sort_by_key(|line| std::cmp::Reverse((line.last_at, line.total)));
        report.quarantine = quarantine;
        report
    }

    fn configuration(&self) -> ConfigurationReport {
        let LastReload { at, error, loaded_at } = &*self.reload.lock();
        ConfigurationReport {
            file: self.at_start.configuration.file.clone(),
            loaded_at: *loaded_at,
            reload_at: *at,
            reload_error: error.clone(),
            reload_errors: self.parts.metrics.reload_errors(),
        }
    }

    fn ledger(&self, in_force: &InForce) -> LedgerReport {
        let Backlog { bytes, quarantine_bytes } = self.parts.ledger.backlog();
        LedgerReport {
            bytes: self.parts.metrics.ledger_bytes_value(),
            backlog_bytes: bytes,
            backlog_limit_bytes: in_force.limits.backlog,
            quarantine_bytes,
            quarantine_limit_bytes: in_force.limits.quarantine_share(),
        }
    }
}

/// The time of a report.
#[derive(Clone, Copy)]
struct Now {
    /// Seconds since the Unix epoch.
    wall: i64,
    steady: std::time::Duration,
}

/// Returns the report of a source, and appends its quarantined lines to `quarantine`.
fn source_report(
    source: &Source,
    path: String,
    values: &SourceValues,
    history: &History,
    now: Now,
    quarantine: &mut Vec<QuarantineReport>,
) -> SourceReport {
    let activity = history.source(&source.name, now.steady, now.wall, values);
    for (at, outcome) in LineOutcome::ALL.into_iter().enumerate() {
        let is_quarantined = !matches!(outcome, LineOutcome::Accepted | LineOutcome::Duplicate);
        if is_quarantined && values.lines[at] > 0 {
            quarantine.push(QuarantineReport {
                source: source.name.to_string(),
                reason: outcome.as_str().to_owned(),
                total: values.lines[at],
                last_hour: activity.hour_lines[at],
                last_at: activity.last[at],
            });
        }
    }
    let lines = LineOutcome::ALL.iter().zip(values.lines);
    SourceReport {
        name: source.name.to_string(),
        path,
        signatures: match source.policy {
            Policy::Require => "require",
            Policy::AcceptUnsigned => "accept-unsigned",
            Policy::Off => "off",
        }
        .to_owned(),
        last_event_at: known(values.last_event),
        minute_rate: activity.minute_rate,
        hour_rate: activity.hour_rate,
        lines: lines.map(|(outcome, lines)| (outcome.as_str().to_owned(), lines)).collect(),
        mean_delay_seconds: activity.mean_delay,
        keys: source.keys.as_ref().map(|keys| KeysReport {
            count: values.keys,
            retired: values.retired_keys,
            refreshed_at: known(values.keys_refreshed),
            refresh_errors: values.key_errors,
            refresh_error: keys.failure().map(|failure| ErrorReport {
                time: i64::try_from(failure.unix_seconds).unwrap_or(i64::MAX),
                error: failure.error,
                advice: match keys.current() {
                    Some(_) => "correct what the error names; the keys loaded before stay in use meanwhile",
                    None => "correct what the error names; batches get 429 until there are keys",
                }
                .to_owned(),
            }),
        }),
    }
}

/// Returns a time that is 0 while it is not known.
fn known(time: i64) -> Option<i64> {
    (time != 0).then_some(time)
}

/// Returns what never changes of the sinks.
pub(super) fn sinks(config: &Config) -> Vec<SinkReport> {
    let sink = |(name, sink): (&String, &crate::config::Sink)| SinkReport {
        name: name.clone(),
        kind: sink.kind.name().to_owned(),
        target: target(&sink.kind),
        ..SinkReport::default()
    };
    config.sinks.iter().map(sink).collect()
}

/// Returns where a sink writes to.
fn target(kind: &SinkKind) -> String {
    match kind {
        SinkKind::File(options) => options.path.display().to_string(),
        SinkKind::Sqlite(options) => options.path.display().to_string(),
        SinkKind::Syslog(options) => options.address.to_string(),
    }
}
