//! Committed batches for the sinks. The newest are handed to the workers from memory, the [`Feed`];
//! the table is read only after a restart and by a worker that lags.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use rusqlite::{Connection, OptionalExtension as _, params};

use super::schema;
use super::subscription::{Position, Streams, Subscription};
use super::verdicts::Verdicts;
use crate::wire::batch::Packing;
use crate::wire::event::{Stream, Verdict};

/// A committed batch as sinks get it.
#[derive(Clone, Debug)]
pub struct StoredBatch {
    /// Its position in the order of commits.
    pub position: i64,
    /// The configured name of its source.
    pub source: Arc<str>,
    /// Time at which it arrived, in milliseconds since the Unix epoch.
    pub received_at: i64,
    /// The key IDs that verdicts refer to.
    pub key_ids: Arc<[String]>,
    /// The verdict of each line.
    pub verdicts: Verdicts,
    /// The body.
    pub body: Body,
    /// Its weight in the backlog, in bytes.
    pub(super) bytes: u64,
}

/// A committed body.
#[derive(Clone, Debug)]
pub enum Body {
    /// Inflated, from memory.
    Decoded {
        /// Packing by which it is taken apart.
        packing: Packing,
        /// The bytes.
        bytes: Arc<Vec<u8>>,
    },
    /// As received, from the table.
    Packed {
        /// Packing by which it is taken apart.
        packing: Packing,
        /// The bytes.
        bytes: Vec<u8>,
    },
}

impl StoredBatch {
    /// Returns the lines of some streams from a line on: their index and verdict.
    pub fn lines(&self, streams: Streams, from_line: u32) -> impl Iterator<Item = (usize, Verdict)> {
        self.verdicts
            .iter()
            .enumerate()
            .skip(from_line as usize)
            .filter_map(|(index, verdict)| Some((index, verdict?)))
            .filter(move |(_, verdict)| streams[verdict.stream() as usize])
    }

    fn memory(&self) -> usize {
        let body = match &self.body {
            Body::Decoded { bytes, .. } => bytes.len(),
            Body::Packed { bytes, .. } => bytes.len(),
        };
        body + self.verdicts.as_bytes().len()
    }
}

/// The newest batches in memory, and the notification of new ones.
pub(super) struct Feed {
    state: Mutex<FeedState>,
    news: Condvar,
}

struct FeedState {
    /// Each with the streams that it has lines of.
    recent: VecDeque<(Arc<StoredBatch>, Streams)>,
    bytes: usize,
    /// Every batch up to this one is no longer (or never was) in `recent`.
    gone: i64,
    /// The newest committed batch.
    newest: i64,
    /// The first batch that each sink does not have, as durably recorded.
    recorded: BTreeMap<String, i64>,
    closed: bool,
}

/// Maximum number of bytes that [`Feed`] keeps. What a sink does not find here is read from the
/// table and inflated again, on the thread of the sink.
const FEED_BYTES: usize = 8 << 20;

impl Feed {
    pub(super) fn new(newest: i64) -> Self {
        let state = FeedState {
            recent: VecDeque::new(),
            bytes: 0,
            gone: newest,
            newest,
            recorded: BTreeMap::new(),
            closed: false,
        };
        Self { state: Mutex::new(state), news: Condvar::new() }
    }

    /// Adds a batch. Called by the writer after each commit, in the order of positions.
    pub(super) fn publish(&self, batch: StoredBatch, streams: Streams) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        state.newest = batch.position;
        state.bytes += batch.memory();
        state.recent.push_back((Arc::new(batch), streams));
        while state.bytes > FEED_BYTES
            && let Some((oldest, _)) = state.recent.pop_front()
        {
            state.bytes -= oldest.memory();
            state.gone = oldest.position;
        }
        self.news.notify_all();
    }

    /// Adds recorded positions. Called by the writer.
    pub(super) fn record(&self, sinks: impl Iterator<Item = (String, Position)>) {
        self.state.lock().recorded.extend(sinks.map(|(sink, position)| (sink, position.batch)));
        self.news.notify_all();
    }

    /// Removes deleted batches. Called by the writer.
    pub(super) fn remove(&self, batches: &[i64]) {
        if batches.is_empty() {
            return;
        }
        let mut guard = self.state.lock();
        let state = &mut *guard;
        state.recent.retain(|(batch, _)| !batches.contains(&batch.position));
        state.bytes = state.recent.iter().map(|(batch, _)| batch.memory()).sum();
    }

    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.news.notify_all();
    }

    /// Waits until `deadline` while a condition holds.
    fn wait_while(
        &self,
        deadline: Instant,
        condition: impl FnMut(&mut FeedState) -> bool,
    ) -> MutexGuard<'_, FeedState> {
        let mut state = self.state.lock();
        self.news.wait_while_until(&mut state, condition, deadline);
        state
    }
}

/// A sink's reader of batches, in their order.
///
/// What it hands out beyond the position that the ledger has recorded for the sink weighs no more
/// than a budget, or is a single batch: a batch in hand still exists after a crash, since nothing
/// within that budget is ever evicted (see [`last_begun`](super::delivery::last_begun)).
pub struct Outbox {
    subscription: Subscription,
    feed: Arc<Feed>,
    connection: Connection,
    /// Batches that were handed out and may not be recorded as delivered, with their bytes.
    in_hand: Vec<(i64, u64)>,
    budget: u64,
}

/// Result of waiting for the next batch.
pub enum Next {
    /// The first batch at or behind the position, and the streams of it that the sink gets.
    Batch(Arc<StoredBatch>, Streams),
    /// There is one, but too much is in hand: it has to be made safe first.
    Full,
    /// None within the timeout.
    Nothing,
    /// None, and none will follow.
    Closed,
}

impl Outbox {
    pub(super) fn open(
        database: &Path,
        subscription: Subscription,
        feed: Arc<Feed>,
        budget: u64,
    ) -> rusqlite::Result<Self> {
        let connection = schema::open_reader(database)?;
        Ok(Self { subscription, feed, connection, in_hand: Vec::new(), budget })
    }

    /// Takes the first batch at or behind a position, waiting at most `timeout` for it. Positions
    /// must not go back.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn next(&mut self, position: i64, timeout: Duration) -> rusqlite::Result<Next> {
        let deadline = Instant::now() + timeout;
        loop {
            let (batch, streams) = match self.read(position, deadline)? {
                Next::Batch(batch, streams) => (batch, streams),
                other => return Ok(other),
            };
            let recorded = self.recorded(deadline, |_| false);
            self.in_hand.retain(|(batch, _)| *batch >= recorded);
            if self.fits(&batch) {
                self.in_hand.push((batch.position, batch.bytes));
                return Ok(Next::Batch(batch, streams));
            }
            // It may be evicted meanwhile, so it is read again.
            if self.recorded(deadline, |now| now == recorded) == recorded {
                return Ok(Next::Full);
            }
        }
    }

    fn recorded(&self, deadline: Instant, mut waits: impl FnMut(i64) -> bool) -> i64 {
        let sink = &self.subscription.sink;
        let of = |state: &FeedState| state.recorded.get(sink).copied().unwrap_or(0);
        of(&self.feed.wait_while(deadline, |state| waits(of(state))))
    }

    fn fits(&self, batch: &StoredBatch) -> bool {
        let in_hand: u64 = self.in_hand.iter().map(|(_, bytes)| bytes).sum();
        self.in_hand.is_empty() || in_hand + batch.bytes <= self.budget
    }

    /// Returns the first batch at or behind a position, from memory or from the table.
    fn read(&self, mut position: i64, deadline: Instant) -> rusqlite::Result<Next> {
        loop {
            let state = self.feed.wait_while(deadline, |state| state.newest < position && !state.closed);
            let newest = state.newest;
            if newest < position {
                return Ok(if state.closed { Next::Closed } else { Next::Nothing });
            }
            let found = if position > state.gone {
                let recent = state.recent.iter().filter(|(batch, _)| batch.position >= position);
                recent
                    .map(|(batch, streams)| (batch, self.wanted(batch, *streams)))
                    .find_map(|(batch, wanted)| wanted.contains(&true).then(|| (Arc::clone(batch), wanted)))
            } else {
                drop(state);
                read_one(&self.connection, &self.subscription.sink, position)?
            };
            match found {
                Some((batch, streams)) => return Ok(Next::Batch(batch, streams)),
                // The sink takes nothing of what is there: newer batches are waited for.
                None => position = newest + 1,
            }
        }
    }

    /// Returns which streams of a batch that was committed since the start the sink gets.
    fn wanted(&self, batch: &StoredBatch, mut streams: Streams) -> Streams {
        for (stream, is_there) in Stream::ALL.into_iter().zip(&mut streams) {
            *is_there &= self.subscription.wants(&batch.source, stream);
        }
        streams
    }
}

/// Reads the first batch at or behind a position that the sink must get, and the streams of it.
fn read_one(
    connection: &Connection,
    sink: &str,
    position: i64,
) -> rusqlite::Result<Option<(Arc<StoredBatch>, Streams)>> {
    let mut find = connection.prepare_cached(
        "SELECT position, source, received_at, packing, key_ids, verdicts, body, bytes, first, second, third \
         FROM (SELECT batch, max(stream = 0) AS first, max(stream = 1) AS second, max(stream = 2) AS third \
               FROM delivery WHERE sink = ?1 AND batch >= ?2 GROUP BY batch ORDER BY batch LIMIT 1) \
         JOIN batch ON position = batch",
    )?;
    find.query_row(params![sink, position], |row| {
        let code: u8 = row.get(3)?;
        let packing =
            Packing::from_code(code).ok_or(rusqlite::Error::IntegralValueOutOfRange(3, i64::from(code)))?;
        let key_ids: String = row.get(4)?;
        let stored = StoredBatch {
            position: row.get(0)?,
            source: row.get::<_, String>(1)?.into(),
            received_at: row.get(2)?,
            key_ids: serde_json::from_str::<Vec<String>>(&key_ids).unwrap_or_default().into(),
            verdicts: Verdicts::stored(row.get_ref(5)?.as_blob()?),
            body: Body::Packed { packing, bytes: row.get(6)? },
            bytes: row.get(7)?,
        };
        Ok((Arc::new(stored), [row.get(8)?, row.get(9)?, row.get(10)?]))
    })
    .optional()
}
