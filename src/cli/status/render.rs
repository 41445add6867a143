//! The report as text for a terminal of 80 columns, the most important first.

use std::fmt::{Display, Write as _};

use crate::escape::escape;
use crate::observe::status::{
    CertificateReport, ConfigurationReport, ErrorReport, KeysReport, LedgerReport, QuarantineReport,
    SinkReport, SourceReport, StatusReport, WebhookReport,
};
use crate::wire::record::time_stamp;

/// Width in characters.
const WIDTH: usize = 80;

/// Width of the names at the left.
const NAME: usize = 18;

/// Indent of what belongs to the row above.
const INDENT: &str = "  ";

/// Indent behind the words at the end of the report.
const FACT: usize = 15;

/// Returns the whole report.
pub(super) fn report(report: &StatusReport) -> String {
    let mut page = Page { text: String::new(), now: report.time };
    page.state(report);
    page.sources(&report.sources);
    page.sinks(&report.sinks);
    page.quarantine(&report.quarantine);
    page.text.push('\n');
    match &report.webhook {
        Some(webhook) => page.webhook(webhook),
        None => page.certificate(report.certificate.as_ref()),
    }
    page.ledger(&report.ledger);
    page.configuration(&report.configuration);
    if report.webhook.is_none() {
        page.fact("listener", &report.listener);
    }
    page.text
}

/// Returns a text with escapes, in lines of at most 80 characters.
pub(super) fn lines(text: &str) -> String {
    let mut page = Page { text: String::new(), now: 0 };
    page.wrapped("", "", text);
    page.text
}

/// Returns what replaces the content of a terminal with this many lines (0: unknown) by a text. The
/// last line stays free, since a full one would scroll.
pub(super) fn screen(text: &str, rows: usize, is_first: bool) -> String {
    let most = if rows == 0 { usize::MAX } else { rows.saturating_sub(1) };
    let mut frame = String::from(if is_first { "\x1b[2J\x1b[H" } else { "\x1b[H" });
    let total = text.lines().count();
    let shown = if total > most { most.saturating_sub(1) } else { total };
    for line in text.lines().take(shown) {
        // Cleared before it is written: behind a full line the cursor is still on its last character.
        frame.push_str("\x1b[K");
        frame.push_str(line);
        frame.push('\n');
    }
    if shown < total {
        // Writing into a string cannot fail.
        let _ = writeln!(frame, "\x1b[K... {} more lines", total - shown);
    }
    frame.push_str("\x1b[J");
    frame
}

struct Page {
    text: String,
    /// Time of the report.
    now: i64,
}

impl Page {
    fn state(&mut self, report: &StatusReport) {
        let state = if report.ready { "ready" } else { "NOT READY" };
        let up = duration(self.now - report.started_at);
        let time = time_stamp(self.now * 1000);
        let time = time.get(..19).unwrap_or_default().replace('T', " ");
        let version = &report.version;
        self.wrapped("", INDENT, &format!("auditgate {version} is {state}; running for {up}, at {time} UTC"));
        for problem in &report.problems {
            self.wrapped("problem: ", INDENT, &problem.to_string());
        }
        for warning in &report.warnings {
            self.wrapped("warning: ", INDENT, &warning.to_string());
        }
    }

    fn sources(&mut self, sources: &[SourceReport]) {
        const WIDTHS: [usize; 6] = [12, 9, 8, 10, 11, 12];
        self.text.push('\n');
        self.row(
            "SOURCE",
            WIDTHS,
            ["last event", "/s 1min", "/s 1h", "accepted", "duplicate", "quarantined"],
        );
        for source in sources {
            let lines = |outcome: &str| source.lines.get(outcome).copied().unwrap_or_default();
            let (accepted, duplicates) = (lines("accepted"), lines("duplicate"));
            let quarantined = source.lines.values().sum::<u64>() - accepted - duplicates;
            let last = source.last_event_at.map_or("never".to_owned(), |at| self.ago(at));
            self.row(
                &source.name,
                WIDTHS,
                [
                    &last,
                    &rate(source.minute_rate),
                    &rate(source.hour_rate),
                    &count(accepted),
                    &count(duplicates),
                    &count(quarantined),
                ],
            );
            self.source_details(source);
        }
    }

    fn source_details(&mut self, source: &SourceReport) {
        let keys = match &source.keys {
            None => String::new(),
            Some(KeysReport { count: 0, .. }) => "; NO KEYS".to_owned(),
            Some(KeysReport { count, retired, refreshed_at, .. }) => {
                let retired = if *retired > 0 { format!(" ({retired} retired)") } else { String::new() };
                let read =
                    refreshed_at.map_or("from the cache".to_owned(), |at| format!("read {}", self.ago(at)));
                format!("; {count} {}{retired} {read}", if *count == 1 { "key" } else { "keys" })
            }
        };
        let delay =
            source.mean_delay_seconds.map_or(String::new(), |delay| format!("; mean delay {}", time(delay)));
        let text = format!("{}; signatures: {}{keys}{delay}", source.path, source.signatures);
        self.wrapped(INDENT, "    ", &text);
        if let Some(error) = source.keys.as_ref().and_then(|keys| keys.refresh_error.as_ref()) {
            self.error("keys not refreshed", error);
        }
    }

    fn sinks(&mut self, sinks: &[SinkReport]) {
        const WIDTHS: [usize; 5] = [12, 12, 14, 12, 12];
        self.text.push('\n');
        self.row("SINK", WIDTHS, ["pending", "oldest", "delivered", "/s 1min", "errors"]);
        for sink in sinks {
            let oldest = if sink.pending == 0 { "-".to_owned() } else { time(sink.oldest_pending_seconds) };
            self.row(
                &sink.name,
                WIDTHS,
                [
                    &count(sink.pending.unsigned_abs()),
                    &oldest,
                    &count(sink.delivered),
                    &rate(sink.minute_rate),
                    &count(sink.errors),
                ],
            );
            let mut text = format!("{} {}", sink.kind, sink.target);
            for (lines, what) in [(sink.truncated, "truncated"), (sink.skipped, "LOST (skipped)")] {
                if lines > 0 {
                    let _ = write!(text, "; {} {what}", count(lines));
                }
            }
            self.wrapped(INDENT, "    ", &text);
            if let Some(since) = sink.stuck_since {
                let text = format!(
                    "STUCK for {}: the system does not answer an operation; check the disk or the mount",
                    duration(self.now - since)
                );
                self.wrapped(INDENT, "    ", &text);
            }
            match (&sink.last_error, sink.failing_since) {
                (Some(error), Some(since)) => {
                    self.error(&format!("FAILING for {}", duration(self.now - since)), error);
                }
                (Some(ErrorReport { time, error, .. }), None) => {
                    self.wrapped(
                        INDENT,
                        "    ",
                        &format!("works again; last error {}: {error}", self.ago(*time)),
                    );
                }
                (None, _) => {}
            }
        }
    }

    fn quarantine(&mut self, reasons: &[QuarantineReport]) {
        const WIDTHS: [usize; 4] = [18, 12, 14, 16];
        if reasons.is_empty() {
            return;
        }
        self.text.push('\n');
        self.row("QUARANTINED FROM", WIDTHS, ["reason", "lines", "last hour", "last"]);
        for line in reasons {
            let last = line.last_at.map_or("-".to_owned(), |at| self.ago(at));
            self.row(&line.source, WIDTHS, [&line.reason, &count(line.total), &count(line.last_hour), &last]);
        }
    }

    /// Writes the deliveries of a sender.
    fn webhook(&mut self, webhook: &WebhookReport) {
        let WebhookReport {
            webhook_status, last_attempt_at, accepted, duplicates, quarantined, refused, ..
        } = webhook;
        let mut state = webhook_status.clone();
        if webhook.is_paused {
            state.push_str(", PAUSED until the cause is fixed");
        }
        if let Some(at) = last_attempt_at {
            state.push_str(&format!("; last post at {at}"));
        }
        if let Some(code) = webhook.last_response_code {
            state.push_str(&format!(", status {code}"));
        }
        self.fact("webhook", &state);
        if let Some(message) = &webhook.last_response_message {
            self.fact("", message);
        }
        self.fact(
            "receipts",
            &format!(
                "accepted {accepted}, duplicates {duplicates}, quarantined {quarantined}, set aside {refused}"
            ),
        );
    }

    fn certificate(&mut self, certificate: Option<&CertificateReport>) {
        let Some(CertificateReport { names, not_after }) = certificate else {
            self.fact("certificate", "none: TLS is off");
            return;
        };
        let end = match not_after {
            None => "its end cannot be read".to_owned(),
            Some(end) => {
                let date = time_stamp(end.saturating_mul(1000));
                let date = date.get(..10).unwrap_or(&date);
                match end - self.now {
                    left @ 0.. => format!("valid for {}, until {date}", duration(left)),
                    left => format!("EXPIRED {} ago, on {date}; renew it", duration(-left)),
                }
            }
        };
        let names = if names.is_empty() { String::new() } else { format!("; {}", names.join(", ")) };
        self.fact("certificate", &format!("{end}{names}"));
    }

    fn ledger(&mut self, ledger: &LedgerReport) {
        let LedgerReport {
            bytes,
            backlog_bytes,
            backlog_limit_bytes,
            quarantine_bytes,
            quarantine_limit_bytes,
        } = *ledger;
        let text = format!(
            "{}; backlog {} of {}, of it quarantined {} of {}",
            size(bytes.unsigned_abs()),
            size(backlog_bytes),
            size(backlog_limit_bytes),
            size(quarantine_bytes),
            size(quarantine_limit_bytes)
        );
        self.fact("ledger", &text);
    }

    fn configuration(&mut self, configuration: &ConfigurationReport) {
        let ConfigurationReport { file, loaded_at, reload_at, reload_error, .. } = configuration;
        self.fact("configuration", &format!("{file}, loaded {}", self.ago(*loaded_at)));
        if let (Some(at), Some(error)) = (reload_at, reload_error) {
            self.fact("", &format!("last reload FAILED {}: {error}", self.ago(*at)));
        }
    }

    fn error(&mut self, what: &str, error: &ErrorReport) {
        let ErrorReport { time, error, advice } = error;
        self.wrapped(INDENT, "    ", &format!("{what}; last error {}: {error}", self.ago(*time)));
        self.wrapped("    what to do: ", "    ", advice);
    }

    /// Writes a name, and cells aligned to the right. A name that does not fit has a line of its
    /// own.
    fn row<const N: usize>(&mut self, name: &str, widths: [usize; N], cells: [&str; N]) {
        let name = escape(name);
        let is_long = name.chars().count() >= NAME;
        if is_long {
            self.wrapped("", "", &name);
        }
        let mut line = format!("{:NAME$}", if is_long { "" } else { &name });
        for (cell, width) in cells.iter().zip(widths) {
            let _ = write!(line, "{:>width$}", escape(cell));
        }
        self.line(line.trim_end());
    }

    /// Writes a word, and text behind it.
    fn fact(&mut self, word: &str, text: &str) {
        self.wrapped(&format!("{word:FACT$}"), &" ".repeat(FACT), text);
    }

    /// Writes a text with escapes: `first` before its first line, `rest` before the others. It is
    /// broken at spaces, and within a word that is longer than a line.
    fn wrapped(&mut self, first: &str, rest: &str, text: &str) {
        let text = escape(text);
        let mut line = first.to_owned();
        let mut used = line.chars().count();
        let mut is_empty = true;
        for word in text.split(' ').filter(|word| !word.is_empty()) {
            let mut word: Vec<char> = word.chars().collect();
            if !is_empty && used + 1 + word.len() > WIDTH {
                self.line(&std::mem::replace(&mut line, rest.to_owned()));
                (used, is_empty) = (rest.chars().count(), true);
            }
            if !is_empty {
                line.push(' ');
                used += 1;
            }
            while used + word.len() > WIDTH {
                line.extend(word.drain(..WIDTH - used));
                self.line(&std::mem::replace(&mut line, rest.to_owned()));
                used = rest.chars().count();
            }
            used += word.len();
            line.extend(word);
            is_empty = false;
        }
        self.line(&line);
    }

    fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }

    fn ago(&self, at: i64) -> String {
        format!("{} ago", duration(self.now - at))
    }
}

/// Returns a number of lines: exact below a billion.
fn count(lines: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let scaled = |unit: f64, name: &str| format!("{:.1} {name}", lines as f64 / unit);
    match lines {
        0..1_000_000_000 => lines.to_string(),
        1_000_000_000..1_000_000_000_000 => scaled(1e9, "G"),
        1_000_000_000_000..1_000_000_000_000_000 => scaled(1e12, "T"),
        _ => scaled(1e15, "P"),
    }
}

fn rate(rate: f64) -> String {
    match rate {
        0.0 => "0".to_owned(),
        ..0.01 => "<0.01".to_owned(),
        ..10.0 => format!("{rate:.2}"),
        ..10_000_000.0 => format!("{rate:.0}"),
        _ => format!("{rate:.0e}"),
    }
}

/// Returns a time in seconds, with a fraction where it is short.
fn time(seconds: f64) -> String {
    #[expect(clippy::cast_possible_truncation, reason = "a conversion to an integer saturates")]
    let whole = seconds as i64;
    if seconds < 10.0 { format!("{seconds:.1} s") } else { duration(whole) }
}

/// Returns a duration in its largest unit, rounded down.
fn duration(seconds: i64) -> String {
    match seconds.max(0) {
        seconds @ ..120 => format!("{seconds} s"),
        seconds @ ..7_200 => format!("{} min", seconds / 60),
        seconds @ ..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

fn size(bytes: u64) -> impl Display {
    bytesize::ByteSize::b(bytes).display().iec()
}

#[cfg(test)]
mod tests;
