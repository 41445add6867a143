//! Undelivered batches: one row a batch, read by each sink from its own position, forgotten when every sink
//! has passed.
//!
//! What was just committed is handed to the workers from memory, the [`Feed`]; the table is read only after a
//! restart and by a worker that lags.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension as _, params};

use super::{Batch, OpenError, Pending, Position, Resume, Subscription, schema};
use crate::wire::event::{Reason, Stream, Verdict};

/// A committed batch as sinks get it.
#[derive(Debug)]
pub struct Stored {
    /// Its place in the order of commits.
    pub position: i64,
    /// The configured name of its source.
    pub source: Arc<str>,
    /// When it arrived, in milliseconds since the Unix epoch.
    pub received_at: i64,
    /// The key IDs that verdicts point at.
    pub key_ids: Arc<[String]>,
    /// What became of each line, in the order of the lines; none for a duplicate.
    pub verdicts: Vec<Option<Verdict>>,
    /// The body.
    pub body: Body,
}

/// A committed body.
#[derive(Debug)]
pub enum Body {
    /// Inflated, from memory.
    Decoded {
        /// How to take it apart, as it was given to the commit.
        packing: u8,
        /// The bytes.
        bytes: Arc<Vec<u8>>,
    },
    /// As it came, from the table.
    Packed {
        /// How to take it apart, as it was given to the commit.
        packing: u8,
        /// The bytes.
        bytes: Vec<u8>,
    },
}

impl Stored {
    /// The lines that a sink wants from here on: their index and verdict.
    pub fn wanted<'a>(
        &'a self,
        subscription: &'a Subscription,
        from_line: u32,
    ) -> impl Iterator<Item = (usize, &'a Verdict)> {
        let wants = Stream::ALL.map(|stream| subscription.wants(&self.source, stream));
        self.verdicts
            .iter()
            .enumerate()
            .skip(from_line as usize)
            .filter_map(|(index, verdict)| Some((index, verdict.as_ref()?)))
            .filter(move |(_, verdict)| wants[verdict.stream() as usize])
    }

    fn memory(&self) -> usize {
        let body = match &self.body {
            Body::Decoded { bytes, .. } => bytes.len(),
            Body::Packed { bytes, .. } => bytes.len(),
        };
        body + self.verdicts.len() * size_of::<Option<Verdict>>()
    }
}

/// The newest batches in memory, and the news of new ones.
pub(super) struct Feed {
    state: Mutex<FeedState>,
    news: Condvar,
}

struct FeedState {
    recent: VecDeque<Arc<Stored>>,
    bytes: usize,
    /// Every batch up to this one is no longer (or never was) in `recent`.
    gone: i64,
    /// The newest committed batch.
    newest: i64,
    closed: bool,
}

/// What [`Feed`] keeps at most, in bytes.
const FEED_BYTES: usize = 2 << 20;

impl Feed {
    pub(super) fn new(newest: i64) -> Self {
        let state = FeedState { recent: VecDeque::new(), bytes: 0, gone: newest, newest, closed: false };
        Self { state: Mutex::new(state), news: Condvar::new() }
    }

    /// Called by the writer after each commit, in the order of positions.
    pub(super) fn publish(&self, batch: Stored) {
        let mut guard = self.state();
        let state = &mut *guard;
        state.newest = batch.position;
        state.bytes += batch.memory();
        state.recent.push_back(Arc::new(batch));
        while state.bytes > FEED_BYTES
            && let Some(oldest) = state.recent.pop_front()
        {
            state.bytes -= oldest.memory();
            state.gone = oldest.position;
        }
        self.news.notify_all();
    }

    /// Called by the writer when every sink has passed a position.
    pub(super) fn forget_before(&self, position: i64) {
        let mut guard = self.state();
        let state = &mut *guard;
        while let Some(oldest) = state.recent.front()
            && oldest.position < position
        {
            state.bytes -= oldest.memory();
            state.gone = oldest.position;
            state.recent.pop_front();
        }
    }

    pub(super) fn close(&self) {
        self.state().closed = true;
        self.news.notify_all();
    }

    pub(super) fn newest(&self) -> i64 {
        self.state().newest
    }

    fn state(&self) -> MutexGuard<'_, FeedState> {
        // The state is consistent between any two statements above.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One sink's way to read batches.
pub struct Outbox {
    feed: Arc<Feed>,
    connection: Connection,
}

/// What a wait for the next batch gave.
pub enum Next {
    /// The first batch at or behind the position.
    Batch(Arc<Stored>),
    /// Nothing yet.
    Nothing,
    /// Nothing, and nothing will follow.
    Closed,
}

impl Outbox {
    pub(super) fn open(database: &Path, feed: Arc<Feed>) -> rusqlite::Result<Self> {
        Ok(Self { feed, connection: schema::open_reader(database)? })
    }

    /// The first batch at or behind a position, waiting at most `patience` for it.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn next(&self, position: i64, patience: Duration) -> rusqlite::Result<Next> {
        let state = self.feed.state();
        let (state, _) = self
            .feed
            .news
            .wait_timeout_while(state, patience, |state| state.newest < position && !state.closed)
            .unwrap_or_else(PoisonError::into_inner);
        if state.newest < position {
            return Ok(if state.closed { Next::Closed } else { Next::Nothing });
        }
        if position > state.gone {
            let found = state.recent.iter().find(|batch| batch.position >= position);
            return Ok(found.map_or(Next::Nothing, |batch| Next::Batch(Arc::clone(batch))));
        }
        drop(state);
        Ok(read_one(&self.connection, position)?.map_or(Next::Nothing, |batch| Next::Batch(Arc::new(batch))))
    }
}

/// The first batch at or behind a position, as the table has it.
fn read_one(connection: &Connection, position: i64) -> rusqlite::Result<Option<Stored>> {
    let mut find = connection.prepare_cached(
        "SELECT position, source, received_at, packing, key_ids, verdicts, body \
         FROM batch WHERE position >= ?1 ORDER BY position LIMIT 1",
    )?;
    find.query_row([position], |row| {
        let source: String = row.get(1)?;
        let key_ids: String = row.get(4)?;
        let verdicts = row.get_ref(5)?.as_blob()?;
        Ok(Stored {
            position: row.get(0)?,
            source: source.into(),
            received_at: row.get(2)?,
            key_ids: serde_json::from_str::<Vec<String>>(&key_ids).unwrap_or_default().into(),
            verdicts: read_verdicts(verdicts),
            body: Body::Packed { packing: row.get(3)?, bytes: row.get(6)? },
        })
    })
    .optional()
}

/// What a batch adds to the gauges.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Weight {
    pub(super) bytes: u64,
    pub(super) quarantine_bytes: u64,
}

/// Puts a batch into the table.
pub(super) fn append(
    connection: &Connection,
    batch: &Batch,
    verdicts: &[Option<Verdict>],
    quarantine_bytes: u64,
) -> rusqlite::Result<(i64, Weight)> {
    let count = |stream| verdicts.iter().flatten().filter(|verdict| verdict.stream() == stream).count();
    let written = write_verdicts(verdicts);
    let key_ids = serde_json::to_string(&*batch.key_ids).unwrap_or_default();
    let mut insert = connection.prepare_cached(
        "INSERT INTO batch (source, received_at, packing, verified, unverified, quarantined, \
         quarantined_bytes, bytes, key_ids, verdicts, body) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
    )?;
    let bytes = (written.len() + batch.body.len()) as u64;
    insert.execute(params![
        batch.source,
        batch.received_at,
        batch.packing,
        count(Stream::Verified),
        count(Stream::Unverified),
        count(Stream::Quarantine),
        quarantine_bytes,
        bytes,
        key_ids,
        written,
        batch.body,
    ])?;
    Ok((connection.last_insert_rowid(), Weight { bytes, quarantine_bytes }))
}

/// Notes how far a sink has come.
pub(super) fn record(
    connection: &Connection,
    sink: &str,
    position: Position,
    mark: &[u8],
) -> rusqlite::Result<()> {
    let mut update =
        connection.prepare_cached("UPDATE sink SET batch = ?2, line = ?3, mark = ?4 WHERE name = ?1")?;
    update.execute(params![sink, position.batch, position.line, mark])?;
    Ok(())
}

/// Deletes the batches that every sink has passed; returns what they weighed and the first position left.
pub(super) fn forget(connection: &Connection) -> rusqlite::Result<(Weight, i64)> {
    let mut reached = connection.prepare_cached("SELECT coalesce(min(batch), 0) FROM sink")?;
    let reached: i64 = reached.query_row([], |row| row.get(0))?;
    let mut delete = connection.prepare_cached(
        "DELETE FROM batch WHERE position < ?1 \
         RETURNING bytes, quarantined_bytes",
    )?;
    let mut weight = Weight::default();
    let mut rows = delete.query([reached])?;
    while let Some(row) = rows.next()? {
        weight.bytes += row.get::<_, u64>(0)?;
        weight.quarantine_bytes += row.get::<_, u64>(1)?;
    }
    Ok((weight, reached))
}

/// What all batches in the table weigh, and what waits for each sink behind its position, in one pass. Reads the
/// summaries alone: of a large backlog that is a hundredth.
pub(super) fn tally(
    connection: &Connection,
    sinks: &[(&Subscription, Position)],
) -> rusqlite::Result<(Weight, Vec<Pending>)> {
    let mut weight = Weight::default();
    let mut tally = vec![Pending::default(); sinks.len()];
    let mut find = connection.prepare_cached(
        "SELECT position, source, received_at, bytes, quarantined_bytes, verified, unverified, quarantined \
         FROM batch INDEXED BY batch_summary ORDER BY position",
    )?;
    let mut rows = find.query([])?;
    while let Some(row) = rows.next()? {
        let position: i64 = row.get(0)?;
        let source = row.get_ref(1)?.as_str()?;
        let received_at: i64 = row.get(2)?;
        weight.bytes += row.get::<_, u64>(3)?;
        weight.quarantine_bytes += row.get::<_, u64>(4)?;
        for ((subscription, reached), pending) in sinks.iter().zip(&mut tally) {
            if position < reached.batch {
                continue;
            }
            let events = if position == reached.batch && reached.line > 0 {
                // Of a batch that is partly delivered, the lines have to be looked at.
                let batch = read_one(connection, position)?;
                batch.map_or(0, |batch| batch.wanted(subscription, reached.line).count() as u64)
            } else {
                let mut events = 0;
                for (column, stream) in Stream::ALL.into_iter().enumerate() {
                    if subscription.wants(source, stream) {
                        events += row.get::<_, u64>(5 + column)?;
                    }
                }
                events
            };
            if events > 0 {
                pending.events += events;
                pending.oldest = Some(pending.oldest.map_or(received_at, |oldest| oldest.min(received_at)));
            }
        }
    }
    Ok((weight, tally))
}

/// Brings the table of sinks in line with the configuration, and tells where each one goes on.
pub(super) fn register(
    connection: &Connection,
    subscriptions: &[Subscription],
    path: &Path,
) -> Result<std::collections::BTreeMap<String, Resume>, OpenError> {
    let database = |cause| OpenError::Database { path: path.to_owned(), cause };
    let known = known_sinks(connection).map_err(database)?;
    for (sink, kind, resume) in &known {
        match subscriptions.iter().find(|subscription| subscription.sink == *sink) {
            Some(subscription) if subscription.kind != kind => {
                return Err(OpenError::KindChanged {
                    sink: sink.clone(),
                    was: kind.clone(),
                    is: subscription.kind,
                });
            }
            Some(_) => {}
            None => {
                let pending = pending_of_unknown(connection, resume.position).map_err(database)?;
                if pending > 0 {
                    return Err(OpenError::Orphaned { sink: sink.clone(), pending });
                }
            }
        }
    }
    let mut resumed = std::collections::BTreeMap::new();
    for (sink, _, resume) in known {
        if subscriptions.iter().any(|subscription| subscription.sink == sink) {
            resumed.insert(sink, resume);
        } else {
            forget_sink(connection, &sink).map_err(database)?;
        }
    }
    let present = schema::last_position(connection).map_err(database)? + 1;
    for subscription in subscriptions {
        if !resumed.contains_key(&subscription.sink) {
            connection
                .execute(
                    "INSERT INTO sink VALUES (?1, ?2, ?3, 0, x'')",
                    params![subscription.sink, subscription.kind, present],
                )
                .map_err(database)?;
            let position = Position { batch: present, line: 0 };
            resumed.insert(subscription.sink.clone(), Resume { position, mark: Vec::new() });
        }
    }
    Ok(resumed)
}

/// Takes a sink out of the table; tells how many events waited for it, or none when it is not known.
pub(super) fn forget_sink(connection: &Connection, sink: &str) -> rusqlite::Result<Option<u64>> {
    let known = known_sinks(connection)?;
    let Some((_, _, resume)) = known.iter().find(|(name, _, _)| name == sink) else {
        return Ok(None);
    };
    let pending = pending_of_unknown(connection, resume.position)?;
    connection.execute("DELETE FROM sink WHERE name = ?1", [sink])?;
    Ok(Some(pending))
}

fn known_sinks(connection: &Connection) -> rusqlite::Result<Vec<(String, String, Resume)>> {
    let mut find = connection.prepare("SELECT name, kind, batch, line, mark FROM sink")?;
    let found = find.query_map([], |row| {
        let position = Position { batch: row.get(2)?, line: row.get(3)? };
        Ok((row.get(0)?, row.get(1)?, Resume { position, mark: row.get(4)? }))
    })?;
    found.collect()
}

/// Lines behind a position, whatever their stream: what a sink wanted is no longer known.
fn pending_of_unknown(connection: &Connection, position: Position) -> rusqlite::Result<u64> {
    connection.query_row(
        "SELECT coalesce(sum(verified + unverified + quarantined), 0) \
         FROM batch INDEXED BY batch_summary WHERE position >= ?1",
        [position.batch],
        |row| row.get(0),
    )
}

/// One byte a line: duplicate, unverified, verified (and a second byte for the key), or a reason (and its
/// detail, with two bytes of length).
fn write_verdicts(verdicts: &[Option<Verdict>]) -> Vec<u8> {
    let mut out = Vec::with_capacity(verdicts.len() * 2);
    for verdict in verdicts {
        match verdict {
            None => out.push(DUPLICATE),
            Some(Verdict::Unverified) => out.push(UNVERIFIED),
            Some(Verdict::Verified { key }) => {
                out.push(VERIFIED);
                out.push(u8::try_from(*key).unwrap_or(u8::MAX));
            }
            Some(Verdict::Rejected { reason, detail }) => {
                out.push(FIRST_REASON + *reason as u8);
                let mut end = detail.len().min(MAX_DETAIL);
                while !detail.is_char_boundary(end) {
                    end -= 1;
                }
                out.extend_from_slice(&u16::try_from(end).unwrap_or(0).to_le_bytes());
                out.extend_from_slice(&detail.as_bytes()[..end]);
            }
        }
    }
    out
}

/// Reads what [`write_verdicts`] wrote. SQLite's pages are trusted: a damaged database fails as a whole.
fn read_verdicts(mut bytes: &[u8]) -> Vec<Option<Verdict>> {
    let mut verdicts = Vec::with_capacity(bytes.len() / 2);
    while let [tag, rest @ ..] = bytes {
        bytes = rest;
        verdicts.push(match *tag {
            DUPLICATE => None,
            UNVERIFIED => Some(Verdict::Unverified),
            VERIFIED => {
                let Some((key, rest)) = bytes.split_first() else { break };
                bytes = rest;
                Some(Verdict::Verified { key: usize::from(*key) })
            }
            tag => {
                let Some((length, rest)) = bytes.split_first_chunk::<2>() else { break };
                let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
                let (detail, rest) = rest.split_at(length);
                bytes = rest;
                let reason = Reason::ALL.get(usize::from(tag.wrapping_sub(FIRST_REASON)));
                let detail = Cow::Owned(String::from_utf8_lossy(detail).into_owned());
                Some(Verdict::Rejected { reason: *reason.unwrap_or(&Reason::Malformed), detail })
            }
        });
    }
    verdicts
}

const DUPLICATE: u8 = 0;
const UNVERIFIED: u8 = 1;
const VERIFIED: u8 = 2;
const FIRST_REASON: u8 = 16;
const MAX_DETAIL: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_read_back() {
        let rejected =
            |reason, detail: &str| Some(Verdict::Rejected { reason, detail: Cow::Owned(detail.to_owned()) });
        let mut verdicts = vec![
            None,
            Some(Verdict::Unverified),
            Some(Verdict::Verified { key: 7 }),
            rejected(Reason::Malformed, ""),
        ];
        verdicts.extend(Reason::ALL.map(|reason| rejected(reason, "über")));
        assert_eq!(read_verdicts(&write_verdicts(&verdicts)), verdicts);
        let long = write_verdicts(&[rejected(Reason::Unsigned, &"ü".repeat(400)), None]);
        assert_eq!(read_verdicts(&long).len(), 2);
    }
}
