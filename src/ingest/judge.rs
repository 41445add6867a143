//! Verdicts on lines: what each line is, whether a key made its signature, and how it is recognised
//! when it comes again.

use std::borrow::Cow;
use std::sync::atomic::Ordering;

use super::{DedupKey, Policy, Source};
use crate::ledger::{Entry, Identifier};
use crate::trust::jwks::KeySet;
use crate::trust::verify::{self, Claim};
use crate::wire::event::class::EventClass;
use crate::wire::event::{Malformed, Reason, Verdict};
use crate::wire::line::Line;
use crate::wire::signature::{self, Reading, SignatureError, Signed};

/// Maximum size of a chunk, in lines and in bytes: it bounds the cost of one step.
const CHUNK_LINES: usize = verify::BATCH_SIZE;
const CHUNK_BYTES: usize = 1 << 20;

/// Maximum number of checks of a body's signatures with another than the likeliest key. A line that
/// no key has matched by then is rejected like one that no key matches: only a body made for that
/// needs more, and it would hold its memory for minutes.
const MOST_REPEATS: usize = 250_000;

/// Maximum length of the detail of a malformed line, in bytes.
const LONGEST_DETAIL: usize = 120;

/// Judges the lines of one body.
pub(super) struct Judge<'a> {
    source: &'a Source,
    keys: Vec<[u8; 32]>,
    identifier: &'a Identifier,
    /// Maximum length of a line, in bytes.
    longest: usize,
}

/// A line before its signature was checked: what is needed of it, and not its fields, which take
/// more memory than the line.
enum Opened<'a> {
    Rejected(Verdict),
    Unverified(EventParts<'a>),
    /// The next claim decides.
    Claimed(EventParts<'a>),
}

/// What a line's identity and the counters are made of.
struct EventParts<'a> {
    /// The signed bytes, or the line itself.
    first: Reading<'a>,
    /// The signed bytes where another message was signed.
    second: Option<Reading<'a>>,
    time: Option<i64>,
    class: EventClass,
    /// Organisation and trace ID, where the source dedups by these.
    trace: Option<(String, String)>,
}

/// Results for the lines of a body.
#[derive(Default)]
pub(super) struct Judgement {
    /// One for each line, in their order.
    pub(super) entries: Vec<Option<Entry>>,
    /// Times of the accepted lines, in milliseconds since the Unix epoch.
    pub(super) times: Vec<i64>,
    /// Number of lines that a known key signed.
    pub(super) verified: u64,
    /// Number of lines whose signature no known key made.
    pub(super) unknown: u64,
    /// Number of lines that go to quarantine, by reason.
    pub(super) rejects: [u64; Reason::ALL.len()],
    /// Number of checks of signatures with another than the likeliest key.
    repeats: usize,
}

impl Judgement {
    /// Creates the result for a body that is kept in one piece.
    pub(super) fn of_no_line() -> Self {
        let mut rejects = [0; Reason::ALL.len()];
        rejects[Reason::UndecodableBody as usize] = 1;
        Self { rejects, ..Self::default() }
    }

    /// Returns whether there are lines, and none of them is an event.
    pub(super) fn has_no_event(&self) -> bool {
        let malformed = self.rejects[Reason::Malformed as usize];
        malformed > 0 && malformed == self.entries.len() as u64
    }

    fn add(&mut self, entry: Entry) {
        match &entry.verdict {
            Verdict::Verified { .. } => self.verified += 1,
            Verdict::Rejected { reason, .. } => self.rejects[*reason as usize] += 1,
            Verdict::Unverified => {}
        }
        self.entries.push(Some(entry));
    }
}

impl<'a> Judge<'a> {
    pub(super) fn new(
        source: &'a Source,
        keys: Option<&KeySet>,
        identifier: &'a Identifier,
        longest: usize,
    ) -> Self {
        let keys = keys.iter().flat_map(|keys| keys.keys()).map(|key| *key.bytes()).collect();
        Self { source, keys, identifier, longest }
    }

    /// Judges that many lines in chunks. `step` is called before each step with its cost, in
    /// signature checks.
    pub(super) fn judge_all<'l>(
        &self,
        lines: impl Iterator<Item = &'l [u8]>,
        count: usize,
        step: &mut dyn FnMut(u64),
    ) -> Judgement {
        // Exactly what memory was reserved for, and never twice as much for a moment.
        let mut judgement = Judgement {
            entries: Vec::with_capacity(count),
            times: Vec::with_capacity(count),
            ..Judgement::default()
        };
        let mut chunk = Vec::with_capacity(CHUNK_LINES);
        let mut bytes = 0;
        for line in lines {
            bytes += line.len();
            chunk.push(line);
            if chunk.len() >= CHUNK_LINES || bytes >= CHUNK_BYTES {
                self.judge(&chunk, &mut judgement, step);
                chunk.clear();
                bytes = 0;
            }
        }
        self.judge(&chunk, &mut judgement, step);
        if judgement.verified + judgement.unknown > 0 {
            self.source.expects_bad.store(judgement.unknown > 0, Ordering::Relaxed);
        }
        judgement
    }

    /// Judges some lines, in their order.
    fn judge(&self, lines: &[&[u8]], judgement: &mut Judgement, step: &mut dyn FnMut(u64)) {
        // Parsing a line costs a few microseconds.
        step(lines.len() as u64 / 16);
        let mut claims = Vec::with_capacity(lines.len());
        let opened: Vec<Opened<'_>> = lines.iter().map(|line| self.open(line, &mut claims)).collect();
        let is_bad = judgement.unknown > 0 || self.source.expects_bad.load(Ordering::Relaxed);
        let together = if is_bad { verify::GROUP } else { CHUNK_LINES };
        let mut before = |count: usize, is_repeat| {
            if is_repeat {
                judgement.repeats += count;
            }
            step(count as u64);
            judgement.repeats <= MOST_REPEATS
        };
        let mut random = rand::rng();
        let fits = verify::verify_in_steps(&claims, &self.keys, together, &mut random, &mut before);
        let mut fits = fits.into_iter();
        for (bytes, opened) in lines.iter().zip(opened) {
            let (verdict, parts) = match opened {
                Opened::Rejected(verdict) => (verdict, None),
                Opened::Unverified(parts) => (Verdict::Unverified, Some((parts.first, parts))),
                Opened::Claimed(parts) => match fits.next().flatten() {
                    Some(fit) => {
                        let content = parts.second.filter(|_| fit.second).unwrap_or(parts.first);
                        (Verdict::Verified { key: fit.key }, Some((content, parts)))
                    }
                    None => {
                        judgement.unknown += 1;
                        (rejected(Reason::BadSignature, "no trusted key made this signature"), None)
                    }
                },
            };
            let source = &self.source.name;
            let (class, identity) = match parts {
                Some((content, EventParts { time, class, trace, .. })) => {
                    judgement.times.extend(time);
                    let verified = matches!(verdict, Verdict::Verified { .. });
                    let identity = match trace {
                        Some((organisation, trace)) => self.identifier.trace(source, &organisation, &trace),
                        None => {
                            self.identifier.event(source, verified, (content.before, content.after), time)
                        }
                    };
                    (Some(class), identity)
                }
                None => (None, self.identifier.reject(source, bytes)),
            };
            judgement.add(Entry { verdict, class, identity });
        }
    }

    /// Parses a line as far as that goes without a key.
    fn open<'l>(&self, bytes: &'l [u8], claims: &mut Vec<Claim<'l>>) -> Opened<'l> {
        let reject = |reason, detail| Opened::Rejected(Verdict::Rejected { reason, detail });
        if bytes.len() > self.longest {
            let detail = format!("{} bytes, and `limits.line` is {}", bytes.len(), self.longest);
            return reject(Reason::LineTooLong, detail.into());
        }
        match open(bytes) {
            Judgeable::Malformed(Malformed(detail)) => reject(Reason::Malformed, shortened(detail)),
            Judgeable::Unsigned(_) if self.source.policy == Policy::Require => {
                reject(Reason::Unsigned, UNSIGNED.into())
            }
            Judgeable::Unsigned(line) => Opened::Unverified(self.parts(&line)),
            Judgeable::BadlySigned(line, _) | Judgeable::Signed(line, _)
                if self.source.policy == Policy::Off =>
            {
                Opened::Unverified(self.parts(&line))
            }
            Judgeable::BadlySigned(_, error) => reject(Reason::BadSignature, error.to_string().into()),
            Judgeable::Signed(line, claim) => {
                claims.push(claim);
                Opened::Claimed(self.parts(&line))
            }
        }
    }

    fn parts<'l>(&self, line: &Line<'l>) -> EventParts<'l> {
        let trace = (self.source.dedup_by == DedupKey::TraceId).then(|| line.trace()).flatten();
        EventParts {
            first: line.content(),
            second: line.signed().and_then(|signed| signed.second),
            time: line.time(),
            class: line.class(),
            trace: trace.map(|(organisation, trace)| (organisation.into_owned(), trace.into_owned())),
        }
    }
}

/// A line as far as it can be judged without a key.
#[derive(Debug)]
pub enum Judgeable<'a> {
    /// It is not an event.
    Malformed(Malformed),
    /// It carries no signature.
    Unsigned(Line<'a>),
    /// Its signature's text is not a signature.
    BadlySigned(Line<'a>, SignatureError),
    /// The keys decide.
    Signed(Line<'a>, Claim<'a>),
}

/// Detail of a line without a signature.
pub const UNSIGNED: &str = "the line has no signature";

/// Parses a line without its terminator, as far as that goes without a key.
pub fn open(bytes: &[u8]) -> Judgeable<'_> {
    let line = match Line::parse(bytes) {
        Ok(line) => line,
        Err(malformed) => return Judgeable::Malformed(malformed),
    };
    let Some(signed) = line.signed() else { return Judgeable::Unsigned(line) };
    match claim(signed) {
        Ok(claim) => Judgeable::Signed(line, claim),
        Err(error) => Judgeable::BadlySigned(line, error),
    }
}

/// Returns what a line's signature claims: that one of its readings was signed.
///
/// # Errors
/// When the signature's text is not a signature.
fn claim<'a>(signed: &Signed<'a>) -> Result<Claim<'a>, SignatureError> {
    let parts = |reading: Reading<'a>| (reading.before, reading.after);
    let signature = signature::decode(signed.value)?;
    Ok(Claim { signature, first: parts(signed.first), second: signed.second.map(parts) })
}

/// Returns a detail that takes no more memory than was reserved for: it may hold what the sender
/// wrote.
fn shortened(detail: Cow<'static, str>) -> Cow<'static, str> {
    match detail {
        Cow::Owned(detail) if detail.capacity() > LONGEST_DETAIL => {
            let mut end = detail.len().min(LONGEST_DETAIL);
            while !detail.is_char_boundary(end) {
                end -= 1;
            }
            Cow::Owned(detail[..end].to_owned())
        }
        short => short,
    }
}

fn rejected(reason: Reason, detail: &'static str) -> Verdict {
    Verdict::Rejected { reason, detail: detail.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Lines;
    use crate::memory_budget;

    #[test]
    fn a_line_takes_no_more_memory_than_is_reserved_for_it() {
        // Includes the overhead of allocating a detail.
        let detail = LONGEST_DETAIL + 2 * size_of::<usize>();
        let judged = size_of::<Option<Entry>>() + size_of::<i64>();
        assert!(judged + detail <= memory_budget::LINE);
        // When batches are made of them, only a few have a detail.
        assert!(judged + Lines::LINE_BYTES <= memory_budget::LINE);
    }

    #[test]
    fn a_detail_is_truncated_to_its_reserved_memory() {
        let long = |letter: &str| Cow::Owned(letter.repeat(100_000));
        assert_eq!(shortened(long("a")).into_owned(), "a".repeat(LONGEST_DETAIL));
        let shortened = shortened(long("€")).into_owned();
        assert_eq!(shortened, "€".repeat(LONGEST_DETAIL / 3));
        assert!(shortened.capacity() <= LONGEST_DETAIL);
    }
}
