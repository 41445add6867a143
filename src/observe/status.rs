//! The report of `/status`: what the daemon is doing, for people and their scripts.
//!
//! It holds no secret: no token, no key, and no URL that could have a password in it. Times are in
//! seconds since the Unix epoch; counters count from the start of the process and are those of
//! `/metrics`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::health::Problem;

/// The whole report.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct StatusReport {
    /// Version of the daemon.
    pub version: String,
    /// Time of the report.
    pub time: i64,
    /// Time at which the daemon started.
    pub started_at: i64,
    /// Whether it is ready for deliveries, as `/readyz` says.
    pub ready: bool,
    /// Reasons why it is not ready.
    pub problems: Vec<Problem>,
    /// What needs attention although it is ready.
    pub warnings: Vec<Problem>,
    /// The configuration in force.
    pub configuration: ConfigurationReport,
    /// Address of the receiving listener, such as `https://0.0.0.0:8443`.
    pub listener: String,
    /// The listener's certificate; none without TLS.
    pub certificate: Option<CertificateReport>,
    /// The ledger.
    pub ledger: LedgerReport,
    /// The sources by name.
    pub sources: Vec<SourceReport>,
    /// The sinks by name.
    pub sinks: Vec<SinkReport>,
    /// Reasons for which lines were quarantined, the latest first.
    pub quarantine: Vec<QuarantineReport>,
    /// The last hour.
    pub history: HistoryReport,
    /// Of a sender: its deliveries, in the words of Konnect's API; none of a receiver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub webhook: Option<WebhookReport>,
}

/// Deliveries of a sender.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct WebhookReport {
    /// Always true: a sender that runs delivers.
    pub webhook_enabled: bool,
    /// `active`, or `inactive` after a failure until a batch is taken.
    pub webhook_status: String,
    /// Time of the last post (RFC 3339); none before the first.
    pub last_attempt_at: Option<String>,
    /// Status of the last response; none where there was none.
    pub last_response_code: Option<u16>,
    /// Error of the last post; none when it succeeded.
    pub last_response_message: Option<String>,
    /// No repetition changes the error: someone has to act.
    pub is_paused: bool,
    /// Number of events that the receiver has taken.
    pub delivered: u64,
    /// Number of them that it accepted, as its receipts say.
    pub accepted: u64,
    /// Number of them that it had before.
    pub duplicates: u64,
    /// Number of them that it has put into its quarantine.
    pub quarantined: u64,
    /// Number of lines that it refused and that were set aside.
    pub refused: u64,
    /// Number of inputs that wait for room in the spool.
    pub held_inputs: u64,
}

/// The configuration in force.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct ConfigurationReport {
    /// Its file.
    pub file: String,
    /// Time at which it was loaded: at the start, or by the last successful reload.
    pub loaded_at: i64,
    /// Time of the last attempt to reload; none before the first.
    pub reload_at: Option<i64>,
    /// Why the last attempt failed; none when it succeeded, or before the first.
    pub reload_error: Option<String>,
    /// Number of new configurations and certificates that could not be used.
    pub reload_errors: u64,
}

/// The listener's certificate.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct CertificateReport {
    /// Its subject, and the DNS names, e-mail addresses and URIs that it is for.
    pub names: Vec<String>,
    /// Time at which it or an intermediate expires; none when that cannot be read.
    pub not_after: Option<i64>,
}

/// The ledger.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct LedgerReport {
    /// Bytes of its files on disk.
    pub bytes: i64,
    /// Bytes that are committed and not delivered to every sink.
    pub backlog_bytes: u64,
    /// Number of them at which batches are refused: `limits.backlog`.
    pub backlog_limit_bytes: u64,
    /// Bytes of undelivered quarantined lines, which are part of the backlog.
    pub quarantine_bytes: u64,
    /// Number of them at which batches are refused.
    pub quarantine_limit_bytes: u64,
}

/// A source.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct SourceReport {
    /// Its name in the configuration.
    pub name: String,
    /// Path of its requests.
    pub path: String,
    /// Policy for signatures, as in the configuration.
    pub signatures: String,
    /// Time at which the last event was accepted; none before the first.
    pub last_event_at: Option<i64>,
    /// Lines a second in the last minute, whatever became of them.
    pub minute_rate: f64,
    /// Lines a second in the last hour, whatever became of them.
    pub hour_rate: f64,
    /// Number of lines by what became of them: `accepted`, `duplicate`, and the reasons for
    /// quarantine.
    pub lines: BTreeMap<String, u64>,
    /// Mean delay of the last hour's events, in seconds; none without an event.
    pub mean_delay_seconds: Option<f64>,
    /// Its keys; none where signatures are off.
    pub keys: Option<KeysReport>,
}

/// Keys of a source.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct KeysReport {
    /// Number of keys in use, the retired ones included.
    pub count: i64,
    /// Number of them that the key set no longer lists.
    pub retired: i64,
    /// Time at which the key set was last read from its origin; none before the first time.
    pub refreshed_at: Option<i64>,
    /// Number of attempts to read it that failed.
    pub refresh_errors: u64,
    /// Why the last attempt failed; none when it succeeded.
    pub refresh_error: Option<ErrorReport>,
}

/// A sink.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct SinkReport {
    /// Its name in the configuration.
    pub name: String,
    /// Its type: `file`, `sqlite` or `syslog`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Path or address that it writes to.
    pub target: String,
    /// Number of lines of the batches that wait for it.
    pub pending: i64,
    /// Age of the oldest batch that waits, in seconds; 0 when none waits.
    pub oldest_pending_seconds: f64,
    /// Number of lines that it holds safely.
    pub delivered: u64,
    /// Lines a second that it has taken in the last minute.
    pub minute_rate: f64,
    /// Number of failed attempts.
    pub errors: u64,
    /// Number of lines that were truncated to fit.
    pub truncated: u64,
    /// Number of lines that it lost because it did not keep up and may skip.
    pub skipped: u64,
    /// Time since which every attempt has failed; none when it works.
    pub failing_since: Option<i64>,
    /// Time since which an operation has not returned; none when it is not stuck.
    pub stuck_since: Option<i64>,
    /// The last error, also of a sink that works again.
    pub last_error: Option<ErrorReport>,
}

/// An error.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct ErrorReport {
    /// Time at which it happened.
    pub time: i64,
    /// What failed, on what and why.
    pub error: String,
    /// What to do.
    pub advice: String,
}

/// Lines that were quarantined for one reason.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct QuarantineReport {
    /// Name of the source.
    pub source: String,
    /// The reason.
    pub reason: String,
    /// Number of lines.
    pub total: u64,
    /// Number of lines in the last hour.
    pub last_hour: u64,
    /// Time of the last one, to within ten seconds; none if it is not known.
    pub last_at: Option<i64>,
}

/// Points of the charts, oldest first; the newest is at most one interval old.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct HistoryReport {
    /// Time between two points, in seconds.
    pub interval_seconds: u64,
    /// By the source's name.
    pub sources: BTreeMap<String, SourceChart>,
    /// By the sink's name.
    pub sinks: BTreeMap<String, SinkChart>,
}

/// Points of a source.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct SourceChart {
    /// Lines a second.
    pub rates: Vec<f64>,
    /// Mean delay in seconds; none where no event came.
    pub delays: Vec<Option<f64>>,
}

/// Points of a sink.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct SinkChart {
    /// Lines that waited.
    pub pending: Vec<i64>,
    /// Age of the oldest batch that waited, in seconds.
    pub oldest: Vec<f64>,
}
