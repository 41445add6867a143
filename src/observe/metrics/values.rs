//! Values of the series, for `/status`: the same numbers as `/metrics`, from the same counters.

use super::{LineOutcome, Metrics};

/// Values of a source's series.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SourceValues {
    /// Number of lines by what became of them, in the order of [`LineOutcome::ALL`].
    pub lines: [u64; LineOutcome::ALL.len()],
    /// Number of recorded delays.
    pub delays: u64,
    /// Sum of the recorded delays in seconds.
    pub delay_sum: f64,
    /// Time at which the last event was accepted, in seconds since the Unix epoch; 0 before the
    /// first.
    pub last_event: i64,
    /// Number of keys in use, the retired ones included.
    pub keys: i64,
    /// Number of retired keys in use.
    pub retired_keys: i64,
    /// Time at which the key set was last read, in seconds since the Unix epoch; 0 before the first
    /// time.
    pub keys_refreshed: i64,
    /// Number of failed refreshes of the key set.
    pub key_errors: u64,
}

/// Values of a sink's series.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SinkValues {
    /// Number of events and quarantined lines that the sink holds safely.
    pub delivered: u64,
    /// Number of events and quarantined lines of the batches that wait for it.
    pub pending: i64,
    /// Age of the oldest batch that waits, in seconds; 0 when none waits.
    pub oldest_pending: f64,
    /// Number of failed attempts.
    pub errors: u64,
    /// Number of lines that were truncated.
    pub truncated: u64,
    /// Number of lines that the sink lost.
    pub skipped: u64,
}

impl Metrics {
    /// Runs the callbacks of [`Metrics::before_render`].
    pub fn refresh(&self) {
        for hook in self.before_render.read().iter() {
            hook(self);
        }
    }

    /// Returns the values of a source; zeros for one that is not configured.
    pub fn source_values(&self, source: &str) -> SourceValues {
        let Some(series) = self.source(source) else { return SourceValues::default() };
        SourceValues {
            lines: LineOutcome::ALL.map(|outcome| series.events[outcome as usize].get()),
            delays: series.delay.get_sample_count(),
            delay_sum: series.delay.get_sample_sum(),
            last_event: series.last_event.get(),
            keys: series.jwks_keys.get(),
            retired_keys: series.jwks_retired_keys.get(),
            keys_refreshed: series.jwks_refreshed.get(),
            key_errors: series.jwks_refresh_errors.get(),
        }
    }

    /// Returns the values of a sink as of the last [`Metrics::refresh`]; zeros for one that is not
    /// configured.
    pub fn sink_values(&self, sink: &str) -> SinkValues {
        let Some(series) = self.sink(sink) else { return SinkValues::default() };
        SinkValues {
            delivered: series.delivered.get(),
            pending: series.pending.get(),
            oldest_pending: series.oldest_pending.get(),
            errors: series.errors.get(),
            truncated: series.truncated.get(),
            skipped: series.skipped.get(),
        }
    }

    /// Returns the size of the ledger's files in bytes, as of the last [`Metrics::refresh`].
    pub fn ledger_bytes_value(&self) -> i64 {
        self.ledger_bytes.get()
    }

    /// Returns the number of new configurations and certificates that could not be used.
    pub fn reload_errors(&self) -> u64 {
        self.reload_errors.get()
    }
}
