//! The recipe: decode, parse, verify, commit. The only file that knows the order.
//!
//! The work on the bytes happens on a blocking thread, in steps, before each of which it may have
//! to wait for a core. Nothing here answers a request: a [`CommitReceipt`] or a [`Rejection`] is
//! returned, and the caller decides what to answer.

mod cores;
mod judge;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use self::cores::{CoreGuard, Cores};
use self::judge::{Judge, Judgement};
pub use self::judge::{Judgeable, UNSIGNED, open};
use crate::ledger::{Batch, CommitError, CommitReceipt, Committed, Entry, Identifier, Ledger, Lines};
use crate::memory_budget::{self, MemoryPermit};
use crate::trust::jwks::KeySet;
use crate::trust::keyring::{KeyRing, RefreshOutcome};
use crate::wire::batch::{Caps, Coding, DecodeError, Packing, decode};
use crate::wire::event::{Reason, Stream, Verdict};

/// Policy for the signatures of a source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Every line must be signed.
    #[default]
    Require,
    /// A line without a signature is accepted as unverified; a signature that is there must be
    /// valid.
    AcceptUnsigned,
    /// No signature is checked.
    Off,
}

impl Policy {
    /// Returns the streams that such a source can write to.
    pub fn streams(self) -> &'static [Stream] {
        match self {
            Self::Require => &[Stream::Verified, Stream::Quarantine],
            Self::AcceptUnsigned => &[Stream::Verified, Stream::Unverified, Stream::Quarantine],
            Self::Off => &[Stream::Unverified, Stream::Quarantine],
        }
    }
}

/// Key by which two lines are the same event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DedupKey {
    /// The same signed bytes.
    #[default]
    Event,
    /// The same trace ID within an organisation, or the same signed bytes where there is none.
    TraceId,
}

/// A configured source, as far as its lines are concerned.
pub struct Source {
    /// The configured name.
    pub name: Arc<str>,
    /// Policy for its signatures.
    pub policy: Policy,
    /// Criterion of a duplicate.
    pub dedup_by: DedupKey,
    /// The trusted keys; none only where no signature is checked.
    pub keys: Option<Arc<KeyRing>>,
    /// The last body had a signature that no known key made, so the next one may have one too.
    expects_bad: AtomicBool,
}

/// One received body.
pub struct Delivery {
    /// Its source.
    pub source: Arc<Source>,
    /// Time at which it had arrived, in milliseconds since the Unix epoch.
    pub received_at: i64,
    /// Name of its coding, as the sender gave it.
    pub declared_coding: Option<String>,
    /// The bytes.
    pub body: Vec<u8>,
    /// Memory of the bytes; inflating them and judging the lines take more.
    pub memory: MemoryPermit,
}

/// Limits of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Limits of the whole body.
    pub caps: Caps,
    /// Maximum length of one line, in bytes.
    pub line: usize,
    /// Maximum number of committed and undelivered bytes, over all batches.
    pub backlog: u64,
}

impl Limits {
    /// Returns the share of the backlog for quarantined lines, in bytes, so that rejected lines
    /// cannot crowd out verified events.
    pub fn quarantine_share(&self) -> u64 {
        self.backlog / 4
    }
}

/// A batch that was committed.
#[derive(Debug)]
pub struct Ingested {
    /// Proof of the commit.
    pub receipt: CommitReceipt,
    /// Times of the accepted lines, in milliseconds since the Unix epoch.
    pub times: Vec<i64>,
    /// Time that each of its commits waited, and time that it took.
    pub commits: Vec<(Duration, Duration)>,
    /// The body began with a byte order mark, which was dropped.
    pub had_byte_order_mark: bool,
    /// Size of the body after inflating, in bytes.
    pub decoded_bytes: u64,
    /// Time for which it waited altogether: for memory, a core, keys and its commits.
    pub queued: Duration,
}

/// Reason why a batch was not committed as lines.
#[derive(Debug, thiserror::Error)]
pub enum Rejection {
    /// The sender's fault: an unknown coding.
    #[error("unknown content coding")]
    UnknownCoding,
    /// The sender's fault, or a limit that is too small.
    #[error("{0}")]
    TooLarge(DecodeError),
    /// The sender's fault. The body is in quarantine, as the receipt proves.
    #[error("{detail}")]
    Undecodable {
        /// Description of the error.
        detail: String,
        /// Proof that it was kept.
        receipt: CommitReceipt,
    },
    /// Overload: there is no memory at the moment.
    #[error("no memory for the batch")]
    NoMemory,
    /// The operator's: a limit that is too small for the batch, even if it were alone.
    #[error("the batch needs more memory than `limits.in_flight`")]
    NeverEnoughMemory,
    /// The operator's: sinks do not keep up.
    #[error("the backlog is full")]
    BacklogFull,
    /// The operator's: no key has been loaded yet.
    #[error("no key has been loaded yet")]
    NoKeys,
    /// The operator's: no line fits a known key, and whether there are new keys cannot be found
    /// out.
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

/// The recipe with everything that it needs.
#[derive(Clone)]
pub struct Ingest {
    ledger: Ledger,
    limits: Limits,
    cores: Arc<Cores>,
    inflating: Arc<Mutex<()>>,
}

/// Maximum number of rejected lines of a body that get a record each. A body with more is one
/// record as a whole, so that rejected lines never make up most of a transaction, of the dedup
/// index or of the memory.
const MOST_REJECTS: u64 = 1000;

impl Ingest {
    /// Creates the recipe over a ledger.
    pub fn new(ledger: Ledger, limits: Limits) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { ledger, limits, cores: Arc::new(Cores::new(cores)), inflating: Arc::default() }
    }

    /// Returns the same recipe with other limits, on the same cores.
    pub fn with_limits(&self, limits: Limits) -> Self {
        Self { limits, ..self.clone() }
    }

    /// Checks whether a batch of a source could be taken now, before its body is read.
    ///
    /// # Errors
    /// The reason why it could not.
    pub fn may_take(&self, source: &Source) -> Result<(), Rejection> {
        if self.ledger.is_unwritable() {
            return Err(Rejection::Unwritable);
        }
        if self.ledger.backlog().bytes >= self.limits.backlog {
            return Err(Rejection::BacklogFull);
        }
        source.keys_in_force().map(|_| ())
    }

    /// Takes a body. Dropping the future does not undo a commit; run it detached from the
    /// connection.
    ///
    /// # Errors
    /// See [`Rejection`].
    pub async fn take(&self, delivery: Delivery) -> Result<Ingested, Rejection> {
        let arrived = Instant::now();
        let source = Arc::clone(&delivery.source);
        let keys = source.keys_in_force()?;
        let by = keys.clone();
        let mut queued = delivery.memory.waited();
        let mut judged = self
            .work(delivery.body.len(), move |work| work.decode_and_judge(delivery, by.as_deref()))
            .await??;
        queued += judged.waited;
        if judged.judgement.unknown > 0
            && let Some(ring) = &source.keys
        {
            // No event is rejected before the keys that are listed by now were looked for.
            let asked = Instant::now();
            let outcome = ring.look_again(arrived, judged.judgement.verified > 0).await;
            queued += asked.elapsed();
            let fresh = ring.current();
            if let Some(fresh) = fresh.filter(|fresh| Some(fresh) != keys.as_ref()) {
                let size = judged.body.bytes.len();
                drop(judged.batches);
                judged = self.work(size, move |work| work.judge(judged.body, Some(&fresh))).await?;
                queued += judged.waited;
            }
            let Judgement { unknown, verified, .. } = judged.judgement;
            if outcome == RefreshOutcome::Unavailable && unknown > 0 && verified == 0 {
                return Err(Rejection::UnknownKeys);
            }
        }
        let rejects = judged.judgement.rejects;
        if rejects.iter().any(|count| *count > 0)
            && self.ledger.backlog().quarantine_bytes >= self.limits.quarantine_share()
        {
            return Err(Rejection::BacklogFull);
        }
        let had_byte_order_mark = judged.body.had_byte_order_mark;
        let decoded_bytes = judged.body.bytes.len() as u64;
        let JudgedBody { batches: Batches { record, lines }, undecodable, judgement, body, .. } = judged;
        let (times, Body { memory: _memory, .. }) = (judgement.times, body);
        // Each is durable by itself, and recognised when the sender repeats the body: they need no
        // common transaction.
        let mut commits = Vec::new();
        let mut commit = async |batch: Option<Batch>| -> Result<_, CommitError> {
            let Some(batch) = batch else { return Ok(None) };
            let Committed { receipt, queued, transaction } = self.ledger.commit(batch).await?;
            commits.push((queued, transaction));
            Ok(Some(receipt))
        };
        let record = commit(record).await?;
        let mut receipt = commit(lines).await?.unwrap_or_default();
        if let Some(record) = record {
            receipt.add_record(&record, rejects);
        }
        match undecodable {
            Some(detail) => Err(Rejection::Undecodable { detail, receipt }),
            None => {
                queued += commits.iter().map(|(queued, _)| *queued).sum::<Duration>();
                Ok(Ingested { receipt, times, commits, had_byte_order_mark, decoded_bytes, queued })
            }
        }
    }

    /// Works on the bytes of a body, of which this number is known at first.
    async fn work<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce(Work) -> T + Send + 'static,
    ) -> Result<T, Rejection> {
        let (cores, runtime, limits) = (Arc::clone(&self.cores), Handle::current(), self.limits);
        let (identifier, inflating) = (self.ledger.identifier().clone(), Arc::clone(&self.inflating));
        let work = move || {
            // Going over 16 KiB costs about as much as a signature check.
            let core = cores.begin(bytes as u64 >> 14);
            work(Work { core, runtime, limits, identifier, inflating })
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| Rejection::Bug)
    }
}

impl Source {
    /// Creates a source that has received nothing yet.
    pub fn new(name: Arc<str>, policy: Policy, dedup_by: DedupKey, keys: Option<Arc<KeyRing>>) -> Self {
        Self { name, policy, dedup_by, keys, expects_bad: AtomicBool::new(false) }
    }

    /// Returns the keys that judge its lines; none where no signature is checked.
    fn keys_in_force(&self) -> Result<Option<Arc<KeySet>>, Rejection> {
        match (self.policy, &self.keys) {
            (Policy::Off, _) => Ok(None),
            (_, Some(ring)) => ring.current().map(Some).ok_or(Rejection::NoKeys),
            (_, None) => Err(Rejection::NoKeys),
        }
    }
}

/// Work on a body, on a blocking thread.
struct Work {
    core: CoreGuard,
    runtime: Handle,
    limits: Limits,
    identifier: Identifier,
    /// Held while a large body is inflated, so that no two wait for the memory that the other
    /// holds.
    inflating: Arc<Mutex<()>>,
}

/// A body, inflated where that is possible.
struct Body {
    source: Arc<Source>,
    received_at: i64,
    packed: Arc<Vec<u8>>,
    packing: Packing,
    bytes: Arc<Vec<u8>>,
    lines: usize,
    had_byte_order_mark: bool,
    /// Held until the batch is committed.
    memory: MemoryPermit,
}

/// A body whose every line has its verdict.
struct JudgedBody {
    body: Body,
    /// Its entries are in the batches.
    judgement: Judgement,
    batches: Batches,
    /// Description of the error of the body as a whole.
    undecodable: Option<String>,
    /// Time for which the work on it waited.
    waited: Duration,
}

/// Batches to commit of a body.
struct Batches {
    /// The body in one piece.
    record: Option<Batch>,
    lines: Option<Batch>,
}

impl Work {
    fn decode_and_judge(
        mut self,
        delivery: Delivery,
        keys: Option<&KeySet>,
    ) -> Result<JudgedBody, Rejection> {
        let Delivery { source, received_at, declared_coding, body, mut memory } = delivery;
        let coding = Coding::of(declared_coding.as_deref(), &body).map_err(|_| Rejection::UnknownCoding)?;
        let (mut refused, caps) = (None, self.limits.caps);
        let (inflating, mut alone) = (Arc::clone(&self.inflating), None);
        let mut grow = |memory: &mut MemoryPermit, bytes| {
            if alone.is_none() && memory.would_be_large(bytes) {
                alone = Some(self.core.release_while(|| inflating.lock()));
            }
            self.grow(memory, bytes)
        };
        let decoded = decode(&body, coding, caps, &mut |bytes| {
            refused = grow(&mut memory, bytes).err();
            refused.is_none()
        });
        let packed = Arc::new(body);
        let whole = |bytes, packing, lines, had_byte_order_mark| {
            let packed = Arc::clone(&packed);
            Body { source, received_at, packed, packing, bytes, lines, had_byte_order_mark, memory }
        };
        match decoded {
            Ok(decoded) => {
                let had_byte_order_mark = decoded.has_byte_order_mark();
                let lines = decoded.line_count();
                let bytes = Arc::new(decoded.into_bytes());
                let mut body = whole(bytes, Packing::Lines(coding), lines, had_byte_order_mark);
                grow(&mut body.memory, lines.saturating_mul(memory_budget::LINE))?;
                drop(alone);
                Ok(self.judge(body, keys))
            }
            Err(DecodeError::Undecodable(detail)) => {
                let body = whole(Arc::clone(&packed), Packing::Whole(Coding::Identity), 1, false);
                Ok(self.pack(body, keys, Judgement::of_no_line(), Some(detail)))
            }
            Err(DecodeError::NoMemory) => Err(refused.unwrap_or(Rejection::NoMemory)),
            Err(error @ (DecodeError::TooLarge(_) | DecodeError::TooManyLines(_))) => {
                Err(Rejection::TooLarge(error))
            }
        }
    }

    /// Acquires memory, and releases the core while it waits.
    fn grow(&mut self, memory: &mut MemoryPermit, bytes: usize) -> Result<(), Rejection> {
        if !memory.could_grow(bytes) {
            return Err(Rejection::NeverEnoughMemory);
        }
        let is_grown =
            memory.try_grow(bytes) || self.core.release_while(|| self.runtime.block_on(memory.grow(bytes)));
        if is_grown { Ok(()) } else { Err(Rejection::NoMemory) }
    }

    fn judge(mut self, mut body: Body, keys: Option<&KeySet>) -> JudgedBody {
        let judge = Judge::new(&body.source, keys, &self.identifier, self.limits.line);
        let core = &mut self.core;
        let mut judgement =
            judge.judge_all(body.packing.lines(&body.bytes), body.lines, &mut |cost| core.step(cost));
        let mut undecodable = None;
        if judgement.has_no_event() {
            // Its lines alone would say nothing: it is kept as it is.
            body.packing = body.packing.whole();
            undecodable = Some(format!("no line of the body is an event: {}", looks_like(&body.bytes)));
            judgement = Judgement::of_no_line();
        }
        self.pack(body, keys, judgement, undecodable)
    }

    /// Makes the batches of a body. Here and not where they are committed, since it is work for each
    /// line.
    fn pack(
        &self,
        body: Body,
        keys: Option<&KeySet>,
        mut judgement: Judgement,
        undecodable: Option<String>,
    ) -> JudgedBody {
        let batch = |packing, key_ids, entries| Batch {
            source: Arc::clone(&body.source.name),
            received_at: body.received_at,
            body: Arc::clone(&body.packed),
            packing,
            decoded: Arc::clone(&body.bytes),
            key_ids,
            lines: Lines::new(entries),
            checkpoint: None,
        };
        let record = |packing, reason, detail: String| {
            let verdict = Verdict::Rejected { reason, detail: detail.into() };
            let identity = self.identifier.reject(&body.source.name, &body.bytes);
            batch(
                packing,
                Arc::new([]) as Arc<[String]>,
                vec![Some(Entry { verdict, class: None, identity })],
            )
        };
        let (mut whole, mut lines) = (None, None);
        let (mut entries, rejects) = (std::mem::take(&mut judgement.entries), judgement.rejects);
        if let Some(detail) = &undecodable {
            whole = Some(record(body.packing, Reason::UndecodableBody, detail.clone()));
        } else {
            let count: u64 = rejects.iter().sum();
            if count > MOST_REJECTS {
                let is_rejected = |entry: &Entry| matches!(entry.verdict, Verdict::Rejected { .. });
                entries.iter_mut().for_each(|entry| drop(entry.take_if(|entry| is_rejected(entry))));
                let by_reason = || Reason::ALL.into_iter().zip(rejects).filter(|(_, count)| *count > 0);
                let reason = by_reason().max_by_key(|(_, count)| *count);
                let reason = reason.map_or(Reason::Malformed, |(reason, _)| reason);
                let counts: Vec<String> =
                    by_reason().map(|(reason, count)| format!("{reason} {count}")).collect();
                let detail = format!("{count} lines of the body are rejected: {}", counts.join(", "));
                whole = Some(record(body.packing.whole(), reason, detail));
            }
            let keys = keys.iter().flat_map(|keys| keys.keys());
            let key_ids = keys.map(|key| key.id().to_owned()).collect();
            lines = Some(batch(body.packing, key_ids, entries));
        }
        let batches = Batches { record: whole, lines };
        JudgedBody { body, judgement, batches, undecodable, waited: self.core.waited() }
    }
}

/// Describes a body that holds no event, which helps to find its sender.
fn looks_like(body: &[u8]) -> &'static str {
    /// Maximum number of bytes that are examined.
    const START: usize = 1 << 20;
    let start = &body[..body.len().min(START)];
    let mut json = serde_json::Deserializer::from_slice(start).into_iter::<serde::de::IgnoredAny>();
    let is_json = |value: Result<_, serde_json::Error>| match value {
        Ok(_) => true,
        Err(error) => error.is_eof() && start.len() < body.len(),
    };
    if matches!(body.trim_ascii_start(), [b'{' | b'[', ..]) && json.all(is_json) {
        "it looks like JSON spread over lines or in an array; send one object a line"
    } else if start.contains(&0) || std::str::from_utf8(start).is_err_and(|error| error.error_len().is_some())
    {
        "it looks like binary data"
    } else if body.trim_ascii_start().starts_with(b"<") {
        "it looks like HTML or XML"
    } else {
        "it looks like other text; check what this sender sends here"
    }
}

#[cfg(test)]
mod tests;
