//! The recipe: decode, parse, verify, commit. The only file that knows the order.
//!
//! The work on the bytes happens on a blocking thread, at most one batch per core at a time. Nothing here
//! answers anybody: a [`Receipt`] or a [`Rejection`] comes back, and the caller decides what to say.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::ledger::{Batch, CommitError, Entry, Identifier, Ledger, Receipt};
use crate::room::{self, Reservation};
use crate::trust::jwks::KeySet;
use crate::trust::keyring::{KeyRing, Outlook};
use crate::trust::verify::{self, Claim, Fit};
use crate::wire::batch::{Caps, Coding, DecodeError, Decoded, Packing, decode};
use crate::wire::event::{Malformed, Reason, Verdict};
use crate::wire::line::Line;
use crate::wire::signature::{self, Reading, SignatureError, Signed};

/// What a source's signatures are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Every line must be signed.
    Require,
    /// A line without a signature passes as unverified; one with a signature must prove it.
    AcceptUnsigned,
    /// No signature is looked at.
    Off,
}

/// What makes two lines the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sameness {
    /// The same signed bytes.
    Event,
    /// The same trace ID within an organisation, or the same signed bytes where there is none.
    TraceId,
}

/// A configured source, as far as its lines are concerned.
pub struct Source {
    /// The configured name.
    pub name: Arc<str>,
    /// What its signatures are for.
    pub policy: Policy,
    /// What is a duplicate.
    pub sameness: Sameness,
    /// The keys we believe; none only where no signature is looked at.
    pub keys: Option<Arc<KeyRing>>,
}

/// One whole body on its way in.
pub struct Delivery {
    /// Where it came from.
    pub source: Arc<Source>,
    /// When it had arrived, in milliseconds since the Unix epoch.
    pub received_at: i64,
    /// The name of its coding as the sender gave it.
    pub declared_coding: Option<String>,
    /// The bytes.
    pub body: Vec<u8>,
    /// The room that the bytes take; inflating them and judging the lines take more of it.
    pub reservation: Reservation,
}

/// What a batch may be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Of the whole body.
    pub caps: Caps,
    /// Bytes of one line.
    pub line: usize,
    /// Committed and undelivered bytes, over all batches.
    pub backlog: u64,
}

impl Limits {
    /// What quarantined lines may take of the backlog, so that rubbish cannot crowd out verified events.
    pub fn quarantine_share(&self) -> u64 {
        self.backlog / 4
    }
}

/// A batch that was committed.
#[derive(Debug)]
pub struct Ingested {
    /// The proof.
    pub receipt: Receipt,
    /// The own times of the lines that were let through, in milliseconds since the Unix epoch.
    pub times: Vec<i64>,
    /// How long the commit took, the wait for its turn included.
    pub commit: Duration,
}

/// Why a batch was not committed as lines.
#[derive(Debug, thiserror::Error)]
pub enum Rejection {
    /// The sender's fault: a coding that we do not know.
    #[error("unknown content coding")]
    UnknownCoding,
    /// The sender's fault, or a limit that is too small.
    #[error("{0}")]
    TooLarge(DecodeError),
    /// The sender's fault. The body is in quarantine: the proof is here.
    #[error("{detail}")]
    Undecodable {
        /// What is wrong with it.
        detail: String,
        /// The proof that it was kept.
        receipt: Receipt,
    },
    /// Nobody's fault: too much at once.
    #[error("no room for the batch")]
    NoRoom,
    /// The operator's: a limit that is too small for the batch, even if it were alone.
    #[error("the batch needs more memory than `limits.in_flight`")]
    NeverRoom,
    /// The operator's: sinks do not keep up.
    #[error("the backlog is full")]
    BacklogFull,
    /// The operator's: no key has been loaded yet.
    #[error("no key has been loaded yet")]
    NoKeys,
    /// The operator's: no line fits a known key, and whether there are new keys cannot be found out.
    #[error("the signatures fit no known key, and no fresh key set can be had")]
    UnknownKeys,
    /// The machine's: the last write failed, and none has succeeded since.
    #[error("the ledger cannot be written")]
    Unwritable,
    /// Ours or the machine's.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// Ours.
    #[error("a bug: the work on the batch ended early")]
    Bug,
}

/// The recipe with its tools.
#[derive(Clone)]
pub struct Ingest {
    ledger: Ledger,
    limits: Limits,
    cores: Arc<Semaphore>,
    /// A turn, for long work: no more of it waits for a core than there are cores, so that short work waits for that
    /// much at most.
    long: Arc<Semaphore>,
    /// One permit for each line of rubbish that may wait for the ledger.
    rubbish: Arc<Semaphore>,
}

/// Lines are worked on in chunks of so many, or of so many bytes.
const CHUNK_LINES: usize = 1024;
const CHUNK_BYTES: usize = 1 << 20;

/// A body of so many bytes, or of so many lines, is long work.
const LONG_BYTES: usize = 256 << 10;
const LONG_LINES: usize = 10_000;

/// So long do many lines wait for their turn before their sender is told to come again. A large body has no such
/// bound: the room has bounded how many there are.
const TURN_PATIENCE: Duration = Duration::from_secs(15);

/// So many lines may wait for the ledger in batches most of whose lines were rejected; more of these are told to come
/// again. The ledger takes some seconds for them, in which they take memory that others need.
const RUBBISH_LINES: usize = 200_000;

/// What is wrong with a line is told in so many bytes at most.
const LONGEST_DETAIL: usize = 120;

impl Ingest {
    /// The recipe over a ledger.
    pub fn new(ledger: Ledger, limits: Limits) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let rubbish = Arc::new(Semaphore::new(RUBBISH_LINES));
        Self {
            ledger,
            limits,
            cores: Arc::new(Semaphore::new(cores)),
            long: Arc::new(Semaphore::new(cores)),
            rubbish,
        }
    }

    /// The same recipe with other limits, on the same cores.
    pub fn with_limits(&self, limits: Limits) -> Self {
        Self { limits, ..self.clone() }
    }

    /// Whether a batch of a source could be taken now: asked before its body is read.
    ///
    /// # Errors
    /// What stands in the way.
    pub fn may_take(&self, source: &Source) -> Result<(), Rejection> {
        if self.ledger.is_unwritable() {
            return Err(Rejection::Unwritable);
        }
        if self.ledger.backlog().0 >= self.limits.backlog {
            return Err(Rejection::BacklogFull);
        }
        source.judges().map(|_| ())
    }

    /// Takes a body in. Dropping the future does not undo a commit; run it detached from the connection.
    ///
    /// # Errors
    /// See [`Rejection`].
    pub async fn take(&self, delivery: Delivery) -> Result<Ingested, Rejection> {
        let arrived = Instant::now();
        let source = Arc::clone(&delivery.source);
        let keys = source.judges()?;
        let (identifier, limits) = (self.ledger.identifier().clone(), self.limits);
        let runtime = tokio::runtime::Handle::current();
        let by = keys.clone();
        let mut turn = self.turn_if(delivery.body.len() >= LONG_BYTES, Duration::MAX).await?;
        let inflated = {
            let (identifier, runtime) = (identifier.clone(), runtime.clone());
            self.on_a_core(move || inflate(delivery, &identifier, limits, &runtime)).await??
        };
        let mut judged = match inflated {
            Inflated::Whole(judged) => judged,
            Inflated::Lines(lines) => {
                if turn.is_none() {
                    turn = self.turn_if(lines.decoded.line_count() >= LONG_LINES, TURN_PATIENCE).await?;
                }
                self.on_a_core(move || judge(lines, by.as_deref(), &identifier, limits, &runtime)).await??
            }
        };
        drop(turn);
        if judged.unknown > 0
            && let Some(ring) = &source.keys
        {
            // Nothing is held against an event before the keys were looked for that are listed by now.
            let outlook = ring.look_again(arrived).await;
            let fresh = ring.current();
            if let Some(fresh) = fresh.filter(|fresh| Some(fresh) != keys.as_ref()) {
                let (identifier, source) = (self.ledger.identifier().clone(), Arc::clone(&source));
                let _turn = self.turn_if(judged.batch.entries.len() >= LONG_LINES, TURN_PATIENCE).await?;
                let again = move || judge_again(judged, &source, &fresh, &identifier, limits);
                judged = self.on_a_core(again).await?;
            }
            if outlook == Outlook::Unavailable && judged.unknown > 0 && judged.known == 0 {
                return Err(Rejection::UnknownKeys);
            }
        }
        if judged.rejects > 0 && self.ledger.backlog().1 >= self.limits.quarantine_share() {
            return Err(Rejection::BacklogFull);
        }
        let _turn = if judged.rejects * 2 > judged.batch.entries.len() {
            let lines = u32::try_from(judged.rejects.min(RUBBISH_LINES)).unwrap_or(u32::MAX);
            Some(self.rubbish.try_acquire_many(lines).map_err(|_| Rejection::NoRoom)?)
        } else {
            None
        };
        let start = Instant::now();
        let receipt = self.ledger.commit(judged.batch).await?;
        match judged.undecodable {
            Some(detail) => Err(Rejection::Undecodable { detail, receipt }),
            None => Ok(Ingested { receipt, times: judged.times, commit: start.elapsed() }),
        }
    }

    /// Waits until it is the turn of long work, which the permit is for; what is short need not wait.
    async fn turn_if(
        &self,
        is_long: bool,
        patience: Duration,
    ) -> Result<Option<OwnedSemaphorePermit>, Rejection> {
        if !is_long {
            return Ok(None);
        }
        match timeout(patience, Arc::clone(&self.long).acquire_owned()).await {
            Ok(turn) => turn.map(Some).map_err(|_| Rejection::Bug),
            Err(_) => Err(Rejection::NoRoom),
        }
    }

    /// Runs work on the bytes of a batch, at most one batch per core at a time.
    async fn on_a_core<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Rejection> {
        let core = Arc::clone(&self.cores).acquire_owned().await.map_err(|_| Rejection::Bug)?;
        let work = move || {
            let _core = core;
            work()
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| Rejection::Bug)
    }
}

impl Source {
    /// The keys that judge its lines; none where no signature is looked at.
    fn judges(&self) -> Result<Option<Arc<KeySet>>, Rejection> {
        match (self.policy, &self.keys) {
            (Policy::Off, _) => Ok(None),
            (_, Some(ring)) => ring.current().map(Some).ok_or(Rejection::NoKeys),
            (_, None) => Err(Rejection::NoKeys),
        }
    }
}

/// A batch whose every line has its verdict.
struct Judged {
    batch: Batch,
    packing: Packing,
    times: Vec<i64>,
    /// Lines for the quarantine.
    rejects: usize,
    /// Lines that a known key signed.
    known: usize,
    /// Lines whose signature fits no known key.
    unknown: usize,
    /// What is wrong with the body as a whole.
    undecodable: Option<String>,
    /// Until the batch is committed.
    _reservation: Reservation,
}

/// A body that was inflated, or cannot be.
enum Inflated {
    Lines(Lines),
    Whole(Judged),
}

/// An inflated body, within its caps.
struct Lines {
    delivery: Delivery,
    coding: Coding,
    decoded: Decoded,
}

fn inflate(
    mut delivery: Delivery,
    identifier: &Identifier,
    limits: Limits,
    runtime: &tokio::runtime::Handle,
) -> Result<Inflated, Rejection> {
    let coding = Coding::of(delivery.declared_coding.as_deref(), &delivery.body)
        .map_err(|_| Rejection::UnknownCoding)?;
    let mut refused = None;
    let reservation = &mut delivery.reservation;
    let mut grow = |bytes| {
        refused = grow(reservation, bytes, runtime).err();
        refused.is_none()
    };
    let decoded = match decode(&delivery.body, coding, limits.caps, &mut grow) {
        Ok(decoded) => decoded,
        Err(DecodeError::Undecodable(detail)) => {
            let packing = Packing::Whole(Coding::Identity);
            return Ok(Inflated::Whole(whole_body(delivery, packing, None, identifier, detail)));
        }
        Err(DecodeError::NoRoom) => return Err(refused.unwrap_or(Rejection::NoRoom)),
        Err(error @ (DecodeError::TooLarge(_) | DecodeError::TooManyLines(_))) => {
            return Err(Rejection::TooLarge(error));
        }
    };
    Ok(Inflated::Lines(Lines { delivery, coding, decoded }))
}

/// Waits for more room, on a blocking thread.
fn grow(
    reservation: &mut Reservation,
    bytes: usize,
    runtime: &tokio::runtime::Handle,
) -> Result<(), Rejection> {
    if !reservation.could_grow(bytes) {
        return Err(Rejection::NeverRoom);
    }
    if runtime.block_on(reservation.grow(bytes)) { Ok(()) } else { Err(Rejection::NoRoom) }
}

fn judge(
    lines: Lines,
    keys: Option<&KeySet>,
    identifier: &Identifier,
    limits: Limits,
    runtime: &tokio::runtime::Handle,
) -> Result<Judged, Rejection> {
    let Lines { mut delivery, coding, decoded } = lines;
    grow(&mut delivery.reservation, decoded.line_count().saturating_mul(room::LINE), runtime)?;
    let bench = Bench { source: &delivery.source, keys, identifier, longest: limits.line };
    let verdicts = bench.judge_all(decoded.lines(), decoded.line_count());
    let decoded = decoded.into_bytes();
    if verdicts.has_no_event() {
        // Its lines alone would say nothing to anybody: it is kept as it is.
        let detail = format!("no line of the body is an event: {}", looks_like(&decoded));
        return Ok(whole_body(delivery, Packing::Whole(coding), Some(decoded), identifier, detail));
    }
    let packing = Packing::Lines(coding);
    let batch = Batch {
        source: Arc::clone(&delivery.source.name),
        received_at: delivery.received_at,
        packing: packing.code(),
        body: delivery.body,
        decoded: Some(Arc::new(decoded)),
        key_ids: key_ids(keys),
        entries: Vec::new(),
    };
    Ok(verdicts.about(batch, packing, delivery.reservation))
}

/// Describes a body that holds no event, which helps to find its sender.
fn looks_like(body: &[u8]) -> &'static str {
    let mut json = serde_json::Deserializer::from_slice(body).into_iter::<serde::de::IgnoredAny>();
    if matches!(body.trim_ascii_start(), [b'{' | b'[', ..]) && json.all(|value| value.is_ok()) {
        "it looks like JSON spread over lines or in an array; send one object a line"
    } else if std::str::from_utf8(body).is_err() || body.contains(&0) {
        "it looks like binary data"
    } else if body.trim_ascii_start().starts_with(b"<") {
        "it looks like HTML or XML"
    } else {
        "it looks like other text; check what this sender sends here"
    }
}

/// The same batch by other keys.
fn judge_again(
    judged: Judged,
    source: &Source,
    keys: &KeySet,
    identifier: &Identifier,
    limits: Limits,
) -> Judged {
    let Judged { mut batch, packing, times, _reservation, .. } = judged;
    drop(times);
    let bench = Bench { source, keys: Some(keys), identifier, longest: limits.line };
    // What the first verdicts took is used again.
    let lines = std::mem::take(&mut batch.entries).len();
    let decoded = batch.decoded.as_deref().map_or(&batch.body, |decoded| decoded);
    let verdicts = bench.judge_all(packing.lines(decoded), lines);
    batch.key_ids = key_ids(Some(keys));
    verdicts.about(batch, packing, _reservation)
}

fn key_ids(keys: Option<&KeySet>) -> Arc<[String]> {
    keys.map_or_else(Vec::new, |keys| keys.keys().iter().map(|key| key.id().to_owned()).collect()).into()
}

/// A body that is kept in one piece, with what it inflates to where that is something else.
fn whole_body(
    delivery: Delivery,
    packing: Packing,
    decoded: Option<Vec<u8>>,
    identifier: &Identifier,
    detail: String,
) -> Judged {
    let entry = Entry {
        verdict: Verdict::Rejected { reason: Reason::UndecodableBody, detail: detail.clone().into() },
        identity: identifier.reject(&delivery.source.name, decoded.as_ref().unwrap_or(&delivery.body)),
    };
    let batch = Batch {
        source: Arc::clone(&delivery.source.name),
        received_at: delivery.received_at,
        packing: packing.code(),
        decoded: decoded.map(Arc::new),
        body: delivery.body,
        key_ids: Arc::new([]),
        entries: vec![entry],
    };
    Judged {
        batch,
        packing,
        times: Vec::new(),
        rejects: 1,
        known: 0,
        unknown: 0,
        undecodable: Some(detail),
        _reservation: delivery.reservation,
    }
}

/// Where lines are judged.
struct Bench<'a> {
    source: &'a Source,
    keys: Option<&'a KeySet>,
    identifier: &'a Identifier,
    longest: usize,
}

/// A line before its signature was checked.
enum Opened<'a> {
    /// It is decided already.
    Decided(Option<Line<'a>>, Verdict),
    /// The next claim decides.
    Claimed(Line<'a>),
}

/// What was found out about lines, in their order.
#[derive(Default)]
struct Verdicts {
    entries: Vec<Entry>,
    /// The own times of those that were let through.
    times: Vec<i64>,
    known: usize,
    unknown: usize,
}

impl Verdicts {
    /// Whether there are lines, and none of them is an event.
    fn has_no_event(&self) -> bool {
        let is_malformed =
            |entry: &Entry| matches!(entry.verdict, Verdict::Rejected { reason: Reason::Malformed, .. });
        !self.entries.is_empty() && self.entries.iter().all(is_malformed)
    }

    fn about(self, mut batch: Batch, packing: Packing, reservation: Reservation) -> Judged {
        let Self { entries, times, known, unknown } = self;
        let is_rejected = |entry: &&Entry| matches!(entry.verdict, Verdict::Rejected { .. });
        let rejects = entries.iter().filter(is_rejected).count();
        batch.entries = entries;
        Judged {
            batch,
            packing,
            times,
            rejects,
            known,
            unknown,
            undecodable: None,
            _reservation: reservation,
        }
    }
}

impl Bench<'_> {
    /// Judges that many lines in chunks, so that what that needs besides the lines stays small.
    fn judge_all<'a>(&self, lines: impl Iterator<Item = &'a [u8]>, count: usize) -> Verdicts {
        // As much as was reserved for, and never twice as much for a moment.
        let mut verdicts = Verdicts {
            entries: Vec::with_capacity(count),
            times: Vec::with_capacity(count),
            ..Verdicts::default()
        };
        let mut chunk = Vec::with_capacity(CHUNK_LINES);
        let mut bytes = 0;
        for line in lines {
            bytes += line.len();
            chunk.push(line);
            if chunk.len() >= CHUNK_LINES || bytes >= CHUNK_BYTES {
                self.judge(&chunk, &mut verdicts);
                chunk.clear();
                bytes = 0;
            }
        }
        self.judge(&chunk, &mut verdicts);
        verdicts
    }

    /// Judges some lines, in their order.
    fn judge(&self, lines: &[&[u8]], verdicts: &mut Verdicts) {
        let mut claims = Vec::with_capacity(lines.len());
        let opened: Vec<Opened<'_>> = lines.iter().map(|line| self.open(line, &mut claims)).collect();
        let keys: Vec<[u8; 32]> =
            self.keys.map_or_else(Vec::new, |keys| keys.keys().iter().map(|key| *key.bytes()).collect());
        let mut fits = verify::verify(&claims, &keys, &mut rand::rng()).into_iter();
        for (bytes, opened) in lines.iter().zip(opened) {
            let (line, verdict, content) = match opened {
                Opened::Decided(line, verdict) => {
                    let content = line.as_ref().map(Line::content);
                    (line, verdict, content)
                }
                Opened::Claimed(line) => {
                    let fit = fits.next().flatten();
                    let content = signed_bytes(&line, fit);
                    let verdict = match fit {
                        Some(fit) => {
                            verdicts.known += 1;
                            Verdict::Verified { key: fit.key }
                        }
                        None => {
                            verdicts.unknown += 1;
                            rejected(Reason::BadSignature, "no trusted key made this signature")
                        }
                    };
                    (Some(line), verdict, content)
                }
            };
            let identity = match (&verdict, line, content) {
                (Verdict::Verified { .. } | Verdict::Unverified, Some(line), Some(content)) => {
                    let time = line.time();
                    verdicts.times.extend(time);
                    let verified = matches!(verdict, Verdict::Verified { .. });
                    let trace = (self.source.sameness == Sameness::TraceId).then(|| line.trace()).flatten();
                    let source = &self.source.name;
                    match trace {
                        Some((organisation, trace)) => self.identifier.trace(source, &organisation, &trace),
                        None => {
                            self.identifier.event(source, verified, (content.before, content.after), time)
                        }
                    }
                }
                _ => self.identifier.reject(&self.source.name, bytes),
            };
            verdicts.entries.push(Entry { verdict, identity });
        }
    }

    /// Takes a line apart as far as it goes without a key.
    fn open<'a>(&self, bytes: &'a [u8], claims: &mut Vec<Claim<'a>>) -> Opened<'a> {
        if bytes.len() > self.longest {
            let detail = format!("{} bytes, and `limits.line` is {}", bytes.len(), self.longest);
            let reason = Reason::LineTooLong;
            return Opened::Decided(None, Verdict::Rejected { reason, detail: detail.into() });
        }
        match open(bytes) {
            Judgeable::Malformed(Malformed(detail)) => Opened::Decided(
                None,
                Verdict::Rejected { reason: Reason::Malformed, detail: shortened(detail) },
            ),
            Judgeable::Unsigned(line) if self.source.policy == Policy::Require => {
                Opened::Decided(Some(line), rejected(Reason::Unsigned, UNSIGNED))
            }
            Judgeable::Unsigned(line) => Opened::Decided(Some(line), Verdict::Unverified),
            Judgeable::BadlySigned(line, _) | Judgeable::Signed(line, _)
                if self.source.policy == Policy::Off =>
            {
                Opened::Decided(Some(line), Verdict::Unverified)
            }
            Judgeable::BadlySigned(line, error) => {
                let verdict =
                    Verdict::Rejected { reason: Reason::BadSignature, detail: error.to_string().into() };
                Opened::Decided(Some(line), verdict)
            }
            Judgeable::Signed(line, claim) => {
                claims.push(claim);
                Opened::Claimed(line)
            }
        }
    }
}

/// A line as far as it can be judged without a key.
#[derive(Debug)]
pub enum Judgeable<'a> {
    /// It is no event.
    Malformed(Malformed),
    /// It carries no signature.
    Unsigned(Line<'a>),
    /// What stands in the signature's place is none.
    BadlySigned(Line<'a>, SignatureError),
    /// The keys decide.
    Signed(Line<'a>, Claim<'a>),
}

/// What is said of a line without a signature.
pub const UNSIGNED: &str = "the line has no signature";

/// Takes a line without its terminator apart, as far as that goes without a key.
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

/// What a line's signature claims: that one of its readings was signed.
///
/// # Errors
/// When the signature's text is no signature.
fn claim<'a>(signed: &Signed<'a>) -> Result<Claim<'a>, SignatureError> {
    let parts = |reading: Reading<'a>| (reading.before, reading.after);
    let signature = signature::decode(signed.value)?;
    Ok(Claim { signature, first: parts(signed.first), second: signed.second.map(parts) })
}

/// The bytes that the fitting signature was made over.
fn signed_bytes<'a>(line: &Line<'a>, fit: Option<Fit>) -> Option<Reading<'a>> {
    let signed = line.signed()?;
    if fit?.second { signed.second } else { Some(signed.first) }
}

/// A detail that takes no more memory than was reserved for: it may hold what the sender wrote.
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

    #[test]
    fn a_line_takes_what_is_reserved_for_it() {
        // What allocating a detail costs besides, and what the ledger makes of an entry in the end.
        let detail = LONGEST_DETAIL + 2 * size_of::<usize>();
        let verdict = size_of::<Option<Verdict>>();
        assert!(size_of::<Entry>() + verdict + size_of::<i64>() + detail <= room::LINE);
    }

    #[test]
    fn a_detail_is_as_long_as_its_place() {
        let long = |letter: &str| Cow::Owned(letter.repeat(100_000));
        assert_eq!(shortened(long("a")).into_owned(), "a".repeat(LONGEST_DETAIL));
        let shortened = shortened(long("€")).into_owned();
        assert_eq!(shortened, "€".repeat(LONGEST_DETAIL / 3));
        assert!(shortened.capacity() <= LONGEST_DETAIL);
    }
}

#[cfg(test)]
mod accept_rule;

#[cfg(test)]
mod agreement;
