//! Committed batches and other answers, for the metrics and the log.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::seconds;
use crate::ingest::Ingested;
use crate::ledger::CommitReceipt;
use crate::log_throttle::log_throttled;
use crate::observe::metrics::{LineOutcome, Metrics};
use crate::receive::request;
use crate::wire::event::Reason;

/// Watches the requests for the metrics and the log.
pub(super) struct RequestWatcher {
    metrics: Arc<Metrics>,
    /// Sources that have sent a batch since the start.
    heard: Mutex<BTreeSet<String>>,
}

impl RequestWatcher {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self { metrics, heard: Mutex::default() }
    }

    /// Returns whether the source has sent nothing before.
    fn is_first(&self, source: &str) -> bool {
        let mut heard = self.heard.lock();
        !heard.contains(source) && heard.insert(source.to_owned())
    }

    fn count(&self, source: &str, receipt: &CommitReceipt) {
        self.metrics.events(source, LineOutcome::Accepted, receipt.accepted());
        self.metrics.events(source, LineOutcome::Duplicate, receipt.duplicates());
        for (reason, lines) in receipt.rejected() {
            self.metrics.events(source, reason.into(), lines);
            warn_quarantined(source, reason, lines, receipt);
        }
    }
}

impl request::Observer for RequestWatcher {
    fn answered(&self, source: Option<&str>, status: u16, elapsed: Duration) {
        self.metrics.http_request(source, status, elapsed);
    }

    fn arrived(&self, source: &str, bytes: u64, elapsed: Duration) {
        self.metrics.http_body(source, bytes, elapsed);
    }

    fn committed(&self, source: &str, batch: &Ingested, received_at: i64) {
        self.count(source, &batch.receipt);
        batch.commits.iter().for_each(|(queued, transaction)| self.metrics.commit(*queued, *transaction));
        if batch.had_byte_order_mark {
            self.metrics.byte_order_mark(source);
        }
        let delays: Vec<f64> =
            batch.times.iter().map(|time| seconds(received_at.saturating_sub(*time))).collect();
        self.metrics.event_delays(source, &delays);
        if batch.receipt.lines() > 0 && self.is_first(source) {
            let receipt = &batch.receipt;
            tracing::info!(
                code = "first-batch",
                source,
                "source \"{source}\": first batch since the start: {accepted} events accepted, {duplicates} \
                 duplicates, {quarantined} lines quarantined",
                accepted = receipt.accepted(),
                duplicates = receipt.duplicates(),
                quarantined = receipt.quarantined()
            );
        }
        if batch.receipt.accepted() > 0 {
            self.metrics.last_event(source, u64::try_from(received_at / 1000).unwrap_or(0));
        }
        for (class, lines) in batch.receipt.classes() {
            self.metrics.accepted_events(source, class, lines);
        }
        self.metrics.batch(source, batch.decoded_bytes, batch.queued);
        tracing::debug!(
            source,
            accepted = batch.receipt.accepted(),
            duplicates = batch.receipt.duplicates(),
            quarantined = batch.receipt.quarantined(),
            "a batch is committed"
        );
    }

    fn undecodable(&self, source: &str, receipt: &CommitReceipt) {
        self.count(source, receipt);
    }
}

/// Logs lines that were not accepted, with the likely cause.
fn warn_quarantined(source: &str, reason: Reason, lines: u64, receipt: &CommitReceipt) {
    if lines == 0 {
        return;
    }
    let all = receipt.lines();
    let cause = match reason {
        Reason::BadSignature if lines == all => "is this the key set of the region that sends here (`jwks`)?",
        Reason::BadSignature => {
            "they were changed on the way or signed with another key; `auditgate verify --explain` tells"
        }
        Reason::Unsigned => {
            "the sender does not sign them; only signatures = \"accept-unsigned\" lets such events through"
        }
        Reason::Malformed => "they are not CEF, JSON or CPS; does another program post here?",
        Reason::LineTooLong => "they are longer than limits.line",
        Reason::UndecodableBody => {
            "a body cannot be decoded, or holds no event; does another program post here?"
        }
    };
    let reason = reason.as_str();
    log_throttled!(
        warn,
        &format!("{source} {reason}"),
        code = "lines-quarantined",
        source,
        reason,
        lines,
        "source \"{source}\": {lines} of the {all} lines of a batch are quarantined as {reason}: {cause}"
    );
}
