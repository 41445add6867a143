//! Input lines as a batch of the ledger.

use std::sync::Arc;

use super::input::{Chunk, InputLine, Origin};
use crate::escape::escape;
use crate::ledger::{Batch, Checkpoint, Entry, Ledger, Lines};
use crate::log_throttle::log_throttled;
use crate::send::{Collector, line, prepare};
use crate::wire::batch::{Coding, Packing, encode};
use crate::wire::event::{Format, Reason, Verdict};
use crate::wire::line::Line;

/// What becomes of the lines of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treatment {
    /// Each is written as an event in that format, or as it came, to be signed.
    Events(Option<Format>),
    /// Each carries a signature, and stays as it is.
    Relay,
}

/// A line for the ledger.
struct Prepared {
    bytes: Vec<u8>,
    verdict: Verdict,
}

/// Makes the batch of a chunk. Lines that cannot be sent are rejected, and logged.
pub(super) fn batch(
    ledger: &Ledger,
    name: &Arc<str>,
    chunk: &Chunk,
    treatment: Treatment,
    now: i64,
) -> Batch {
    let mut body = Collector::default();
    let mut entries = Vec::with_capacity(chunk.lines.len());
    for input in &chunk.lines {
        if input.bytes.trim_ascii().is_empty() && !input.is_truncated {
            continue;
        }
        let Prepared { bytes, verdict } = prepared(input, treatment, now);
        let entry = match verdict {
            Verdict::Rejected { ref detail, .. } => {
                log_throttled!(
                    warn,
                    name,
                    code = "input-line-rejected",
                    input = &**name,
                    "a line cannot be sent and is set aside: {problem}",
                    problem = escape(detail)
                );
                // With its place: two bad lines that look the same are both kept.
                let placed = [detail.as_bytes(), b"\n", &bytes].concat();
                Entry { class: None, identity: ledger.identifier().reject(name, &placed), verdict }
            }
            _ => accepted(ledger, name, &bytes),
        };
        entries.push(Some(entry));
        body.push(&bytes);
    }
    let checkpoint = chunk.checkpoint.clone();
    let checkpoint = checkpoint.map(|state| Checkpoint { input: Arc::clone(name), state });
    of_lines(name, now, body, entries, checkpoint)
}

/// Makes the batch of events that are lines already.
pub(super) fn events(ledger: &Ledger, name: &Arc<str>, now: i64, lines: &[Vec<u8>]) -> Batch {
    let mut body = Collector::default();
    lines.iter().for_each(|line| body.push(line));
    let entries = lines.iter().map(|line| Some(accepted(ledger, name, line))).collect();
    of_lines(name, now, body, entries, None)
}

fn accepted(ledger: &Ledger, name: &str, line: &[u8]) -> Entry {
    let parsed = Line::parse(line).ok();
    let time = parsed.as_ref().and_then(Line::time);
    let identity = ledger.identifier().event(name, false, (line, b""), time);
    Entry { verdict: Verdict::Unverified, class: parsed.map(|line| line.class()), identity }
}

/// Makes the batch of a line that the receiver will not take.
pub(super) fn rejected(
    ledger: &Ledger,
    name: &str,
    now: i64,
    line: &[u8],
    reason: Reason,
    detail: String,
) -> Batch {
    let identity = ledger.identifier().reject(name, line);
    let verdict = Verdict::Rejected { reason, detail: detail.into() };
    let mut body = Collector::default();
    body.push(line);
    of_lines(&name.into(), now, body, vec![Some(Entry { verdict, class: None, identity })], None)
}

fn of_lines(
    name: &Arc<str>,
    now: i64,
    mut body: Collector,
    entries: Vec<Option<Entry>>,
    checkpoint: Option<Checkpoint>,
) -> Batch {
    let decoded = Arc::new(body.take().map_or_else(Vec::new, |batch| batch.body));
    let (packing, packed) = match encode(&decoded) {
        Ok(packed) => (Packing::Lines(Coding::Gzip), Arc::new(packed)),
        // Compressing only saves space.
        Err(_) => (Packing::Lines(Coding::Identity), Arc::clone(&decoded)),
    };
    Batch {
        source: Arc::clone(name),
        received_at: now,
        body: packed,
        packing,
        decoded,
        key_ids: Arc::new([]),
        lines: Lines::new(entries),
        checkpoint,
    }
}

/// Returns the line to send, or the line as it is and why it cannot be sent.
fn prepared(input: &InputLine, treatment: Treatment, now: i64) -> Prepared {
    let InputLine { origin, bytes, is_truncated } = input;
    let reject = |reason, problem: String| Prepared {
        bytes: bytes.clone(),
        verdict: Verdict::Rejected { reason, detail: described(origin, &problem).into() },
    };
    if *is_truncated {
        let problem = format!("it is longer than allowed; this is its beginning of {} bytes", bytes.len());
        return reject(Reason::LineTooLong, problem);
    }
    let sent = match treatment {
        Treatment::Events(format) => prepare(bytes, format, now)
            .and_then(|(format, event)| line(format, &event, None).map_err(|error| error.to_string())),
        Treatment::Relay => match Line::parse(bytes) {
            Ok(parsed) if parsed.signed().is_some() => Ok(bytes.clone()),
            Ok(_) => return reject(Reason::Unsigned, "it carries no signature to relay".to_owned()),
            Err(malformed) => Err(malformed.to_string()),
        },
    };
    match sent {
        Ok(bytes) => Prepared { bytes, verdict: Verdict::Unverified },
        Err(problem) => reject(Reason::Malformed, problem),
    }
}

fn described(origin: &Origin, problem: &str) -> String {
    format!("{origin}: {problem}")
}
