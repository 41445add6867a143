//! Undelivered batches: one row a batch, read by each sink from its own position, forgotten when every sink
//! has passed.
//!
//! What was just committed is handed to the workers from memory, the [`Feed`]; the table is read only after a
//! restart and by a worker that lags.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::{Connection, OptionalExtension as _, params};

use super::claims::{Claim, Claims};
use super::interest::{Interest, Remembered};
use super::{Backlog, Batch, Forgetting, OpenError, Pending, Position, Resume, Subscription, schema};
use crate::wire::batch::Packing;
use crate::wire::event::{Reason, Stream, Verdict};

/// A committed batch as sinks get it.
#[derive(Clone, Debug)]
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
    /// What it adds to the backlog.
    pub(super) weight: Weight,
}

impl Stored {
    /// Without the lines that a sink wants only since; none when there are no such lines.
    fn restricted(&self, interest: &Interest) -> Option<Self> {
        let too_late = Stream::ALL.map(|stream| interest.came_too_late(self.position, &self.source, stream));
        if !too_late.contains(&true) {
            return None;
        }
        let mut restricted = self.clone();
        for verdict in &mut restricted.verdicts {
            verdict.take_if(|verdict| too_late[verdict.stream() as usize]);
        }
        Some(restricted)
    }
}

/// A committed body.
#[derive(Clone, Debug)]
pub enum Body {
    /// Inflated, from memory.
    Decoded {
        /// How to take it apart.
        packing: Packing,
        /// The bytes.
        bytes: Arc<Vec<u8>>,
    },
    /// As it came, from the table.
    Packed {
        /// How to take it apart.
        packing: Packing,
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
        self.lines(Stream::ALL.map(|stream| subscription.wants(&self.source, stream)), from_line)
    }

    /// The lines of some streams, in the order of [`Stream::ALL`].
    fn lines(
        &self,
        wants: [bool; Stream::ALL.len()],
        from_line: u32,
    ) -> impl Iterator<Item = (usize, &Verdict)> {
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

    /// Called by the writer when batches were given up.
    pub(super) fn remove(&self, batches: &[i64]) {
        let mut guard = self.state();
        let state = &mut *guard;
        state.recent.retain(|batch| batches.binary_search(&batch.position).is_err());
        state.bytes = state.recent.iter().map(|batch| batch.memory()).sum();
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
    sink: String,
    interest: Option<Interest>,
    feed: Arc<Feed>,
    claims: Arc<BTreeMap<String, Claims>>,
    connection: Connection,
}

/// What a wait for the next batch gave.
pub enum Next {
    /// The first batch at or behind the position.
    Batch(Arc<Stored>),
    /// There is one, but too much is in flight: what was taken before has to be made safe first.
    Full,
    /// Nothing yet.
    Nothing,
    /// Nothing, and nothing will follow.
    Closed,
}

impl Outbox {
    pub(super) fn open(
        database: &Path,
        sink: &str,
        interest: Option<Interest>,
        feed: Arc<Feed>,
        claims: Arc<BTreeMap<String, Claims>>,
    ) -> rusqlite::Result<Self> {
        Ok(Self { sink: sink.to_owned(), interest, feed, claims, connection: schema::open_reader(database)? })
    }

    /// Takes the first batch at or behind a position, waiting at most `patience` for it. What was taken stays until
    /// the sink has it, and is found here again after a restart. Of a batch that was committed before the sink was
    /// made to take more, what it did not take then counts as a duplicate.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn next(&self, position: i64, patience: Duration) -> rusqlite::Result<Next> {
        let deadline = Instant::now() + patience;
        let claims = self.claims.get(&self.sink);
        loop {
            let generation = claims.map_or(0, Claims::generation);
            let left = deadline.saturating_duration_since(Instant::now());
            let batch = match self.read(position, left)? {
                Next::Batch(batch) => batch,
                other => return Ok(other),
            };
            let left = deadline.saturating_duration_since(Instant::now());
            let claim =
                claims.map(|claims| claims.claim(batch.position, batch.weight.bytes, generation, left));
            match claim {
                None | Some(Claim::Granted) => {
                    let restricted =
                        self.interest.as_ref().and_then(|interest| batch.restricted(interest)).map(Arc::new);
                    return Ok(Next::Batch(restricted.unwrap_or(batch)));
                }
                Some(Claim::Outdated) => {}
                Some(Claim::Full) => return Ok(Next::Full),
            }
        }
    }

    /// The first batch at or behind a position, from memory or from the table.
    fn read(&self, position: i64, patience: Duration) -> rusqlite::Result<Next> {
        let deadline = Instant::now() + patience;
        // What is behind it may have been given up: then a newer batch is waited for.
        let mut position = position;
        loop {
            let state = self.feed.state();
            let left = deadline.saturating_duration_since(Instant::now());
            let (state, _) = self
                .feed
                .news
                .wait_timeout_while(state, left, |state| state.newest < position && !state.closed)
                .unwrap_or_else(PoisonError::into_inner);
            let newest = state.newest;
            if newest < position {
                return Ok(if state.closed { Next::Closed } else { Next::Nothing });
            }
            let found = if position > state.gone {
                state.recent.iter().find(|batch| batch.position >= position).map(Arc::clone)
            } else {
                drop(state);
                read_one(&self.connection, position)?.map(Arc::new)
            };
            match found {
                Some(batch) => return Ok(Next::Batch(batch)),
                None => position = newest + 1,
            }
        }
    }
}

/// The first batch at or behind a position, as the table has it.
fn read_one(connection: &Connection, position: i64) -> rusqlite::Result<Option<Stored>> {
    let mut find = connection.prepare_cached(
        "SELECT position, source, received_at, packing, key_ids, verdicts, body, quarantined_bytes \
         FROM batch WHERE position >= ?1 ORDER BY position LIMIT 1",
    )?;
    find.query_row([position], |row| {
        let source: String = row.get(1)?;
        let key_ids: String = row.get(4)?;
        let verdicts = row.get_ref(5)?.as_blob()?;
        let body: Vec<u8> = row.get(6)?;
        let code: u8 = row.get(3)?;
        let packing =
            Packing::from_code(code).ok_or(rusqlite::Error::IntegralValueOutOfRange(3, i64::from(code)))?;
        let weight = Weight { bytes: (body.len() + verdicts.len()) as u64, quarantine_bytes: row.get(7)? };
        Ok(Stored {
            position: row.get(0)?,
            source: source.into(),
            received_at: row.get(2)?,
            key_ids: serde_json::from_str::<Vec<String>>(&key_ids).unwrap_or_default().into(),
            verdicts: read_verdicts(verdicts),
            body: Body::Packed { packing, bytes: body },
            weight,
        })
    })
    .optional()
}

/// What batches add to the backlog, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Weight {
    pub(super) bytes: u64,
    pub(super) quarantine_bytes: u64,
}

impl std::ops::AddAssign for Weight {
    fn add_assign(&mut self, more: Self) {
        self.bytes += more.bytes;
        self.quarantine_bytes += more.quarantine_bytes;
    }
}

impl std::ops::SubAssign for Weight {
    fn sub_assign(&mut self, less: Self) {
        self.bytes -= less.bytes;
        self.quarantine_bytes -= less.quarantine_bytes;
    }
}

impl From<Backlog> for Weight {
    fn from(Backlog { bytes, quarantine_bytes }: Backlog) -> Self {
        Self { bytes, quarantine_bytes }
    }
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
        batch.packing.code(),
        count(Stream::Verified),
        count(Stream::Unverified),
        count(Stream::Quarantine),
        quarantine_bytes,
        bytes,
        key_ids,
        written,
        *batch.body,
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

/// What [`forget`] did.
#[derive(Default)]
pub(super) struct Forgotten {
    pub(super) weight: Weight,
    /// The first batch that some sink has not passed.
    pub(super) reached: i64,
    /// There is more to forget.
    pub(super) more: bool,
}

/// Batches of so many bytes are forgotten at once: deleting takes time for each page, and requests wait.
const FORGET_BYTES: u64 = 8 << 20;

/// Deletes batches that every sink has passed, the oldest first.
pub(super) fn forget(connection: &Connection) -> rusqlite::Result<Forgotten> {
    let mut reached = connection.prepare_cached("SELECT coalesce(min(batch), 0) FROM sink")?;
    let mut forgotten =
        Forgotten { reached: reached.query_row([], |row| row.get(0))?, ..Forgotten::default() };
    let mut find = connection.prepare_cached(
        "SELECT position, bytes, quarantined_bytes FROM batch INDEXED BY batch_summary \
         WHERE position < ?1 ORDER BY position",
    )?;
    let mut rows = find.query([forgotten.reached])?;
    let mut last = None;
    while let Some(row) = rows.next()? {
        if forgotten.weight.bytes >= FORGET_BYTES {
            forgotten.more = true;
            break;
        }
        last = Some(row.get::<_, i64>(0)?);
        forgotten.weight.bytes += row.get::<_, u64>(1)?;
        forgotten.weight.quarantine_bytes += row.get::<_, u64>(2)?;
    }
    drop(rows);
    if let Some(last) = last {
        connection.prepare_cached("DELETE FROM batch WHERE position <= ?1")?.execute([last])?;
    }
    Ok(forgotten)
}

/// Where a sink goes on.
pub(super) fn position(connection: &Connection, sink: &str) -> rusqlite::Result<Position> {
    connection.query_row("SELECT batch, line FROM sink WHERE name = ?1", [sink], |row| {
        Ok(Position { batch: row.get(0)?, line: row.get(1)? })
    })
}

/// What all batches in the table weigh.
pub(super) fn weigh(connection: &Connection) -> rusqlite::Result<Weight> {
    connection.query_row(
        "SELECT coalesce(sum(bytes), 0), coalesce(sum(quarantined_bytes), 0) FROM batch INDEXED BY batch_summary",
        [],
        |row| Ok(Weight { bytes: row.get(0)?, quarantine_bytes: row.get(1)? }),
    )
}

/// What each sink may have in flight, and how much of it there may be from now on.
///
/// All that is in flight takes at most a quarter of what quarantined lines may take, however many sinks there
/// are: it cannot be given up. What an earlier start allowed counts for as long as anything is undelivered.
pub(super) fn claims(
    connection: &Connection,
    sinks: &BTreeMap<String, Resume>,
    limit: Backlog,
) -> rusqlite::Result<BTreeMap<String, Claims>> {
    let budget =
        (limit.quarantine_bytes.min(limit.bytes) / 4 / sinks.len().max(1) as u64).min(MOST_IN_FLIGHT);
    let before: Option<u64> = connection
        .query_row("SELECT value FROM meta WHERE name = 'in_flight_bytes'", [], |row| row.get(0))
        .optional()?;
    let mut claims = BTreeMap::new();
    let mut is_anything_in_flight = false;
    for (sink, Resume { position, .. }) in sinks {
        let in_flight = in_flight(connection, *position, before)?;
        is_anything_in_flight |= !in_flight.is_empty();
        claims.insert(sink.clone(), Claims::new(budget, *position, in_flight));
    }
    // Nobody knew a budget before: then anything may be in flight, and this stays so until nothing is.
    let after = match before {
        None if is_anything_in_flight => return Ok(claims),
        Some(before) if is_anything_in_flight => before.max(budget),
        _ => budget,
    };
    if before != Some(after) {
        connection.execute(
            "INSERT INTO meta VALUES ('in_flight_bytes', ?1) \
             ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            [after],
        )?;
    }
    Ok(claims)
}

/// No sink has more than that in flight, in bytes.
const MOST_IN_FLIGHT: u64 = 16 << 20;

/// The batches from a position on that may be in flight, with their bytes: as many as weigh no more than `budget`
/// together, and at least one; all of them when there was no budget.
pub(super) fn in_flight(
    connection: &Connection,
    position: Position,
    budget: Option<u64>,
) -> rusqlite::Result<Vec<(i64, u64)>> {
    let mut find = connection.prepare_cached(
        "SELECT position, bytes FROM batch INDEXED BY batch_summary WHERE position >= ?1 ORDER BY position",
    )?;
    let mut rows = find.query([position.batch])?;
    let mut found: Vec<(i64, u64)> = Vec::new();
    let mut all = 0;
    while let Some(row) = rows.next()? {
        let bytes: u64 = row.get(1)?;
        all += bytes;
        if !found.is_empty() && budget.is_some_and(|budget| all > budget) {
            break;
        }
        found.push((row.get(0)?, bytes));
    }
    Ok(found)
}

/// Which lines count: those of a source and a stream, in a batch.
type Counts<'a> = &'a dyn Fn(i64, &str, Stream) -> bool;

/// What waits for a sink behind its recorded position. Reads the summaries alone, no body: of a large backlog a
/// hundredth.
pub(super) fn pending(
    connection: &Connection,
    counts: Counts<'_>,
    position: Position,
) -> rusqlite::Result<Pending> {
    let mut pending = Pending::default();
    walk(connection, counts, position, |events, received_at| {
        pending.events += events;
        pending.oldest = Some(pending.oldest.map_or(received_at, |oldest| oldest.min(received_at)));
        true
    })?;
    Ok(pending)
}

/// When the first batch arrived of which a sink wants something that it has not got, in milliseconds since the
/// Unix epoch.
pub(super) fn oldest(
    connection: &Connection,
    counts: Counts<'_>,
    position: Position,
) -> rusqlite::Result<Option<i64>> {
    let mut oldest = None;
    walk(connection, counts, position, |_, received_at| {
        oldest = Some(received_at);
        false
    })?;
    Ok(oldest)
}

/// Looks at each batch of which a sink wants something that it has not got: how many lines, and when it arrived.
/// Goes on for as long as it is told to.
fn walk(
    connection: &Connection,
    counts: Counts<'_>,
    position: Position,
    mut look: impl FnMut(u64, i64) -> bool,
) -> rusqlite::Result<()> {
    // Of a batch that is partly delivered, the lines have to be looked at.
    let from = if position.line == 0 {
        position.batch
    } else {
        let partly = read_one(connection, position.batch)?.filter(|batch| batch.position == position.batch);
        if let Some(batch) = partly {
            let wants = Stream::ALL.map(|stream| counts(batch.position, &batch.source, stream));
            let events = batch.lines(wants, position.line).count() as u64;
            if events > 0 && !look(events, batch.received_at) {
                return Ok(());
            }
        }
        position.batch + 1
    };
    let mut find = connection.prepare_cached(
        "SELECT position, source, verified, unverified, quarantined, received_at \
         FROM batch INDEXED BY batch_summary \
         WHERE position >= ?1 ORDER BY position",
    )?;
    let mut rows = find.query([from])?;
    while let Some(row) = rows.next()? {
        let (batch, source): (i64, String) = (row.get(0)?, row.get(1)?);
        let lines = [row.get(2)?, row.get(3)?, row.get(4)?];
        let events = count(lines, |stream| counts(batch, &source, stream));
        if events > 0 && !look(events, row.get(5)?) {
            break;
        }
    }
    Ok(())
}

/// How many lines of a batch count, which has so many of each stream in the order of [`Stream::ALL`].
pub(super) fn count(lines: [u64; Stream::ALL.len()], counts: impl Fn(Stream) -> bool) -> u64 {
    let streams = Stream::ALL.into_iter().zip(lines);
    streams.filter(|(stream, _)| counts(*stream)).map(|(_, lines)| lines).sum()
}

/// Brings the table of sinks in line with the configuration, all of it or, on an error, nothing. Tells what each
/// one wants and where it goes on.
pub(super) fn register(
    connection: &Connection,
    subscriptions: &[Subscription],
    path: &Path,
) -> Result<(Vec<Interest>, BTreeMap<String, Resume>), OpenError> {
    let database = |cause| OpenError::Database { path: path.to_owned(), cause };
    let transaction = connection.unchecked_transaction().map_err(database)?;
    let mut known = known_sinks(connection).map_err(database)?;
    for (name, sink) in &known {
        match subscriptions.iter().find(|subscription| subscription.sink == *name) {
            Some(subscription) if subscription.kind != sink.kind => {
                return Err(OpenError::KindChanged {
                    sink: name.clone(),
                    was: sink.kind.clone(),
                    is: subscription.kind,
                });
            }
            Some(subscription) => {
                let pending = sink.no_longer_wanted(connection, subscription).map_err(database)?;
                if pending > 0 {
                    return Err(OpenError::Narrowed { sink: name.clone(), pending });
                }
            }
            None => {
                let pending = sink.wanted(connection).map_err(database)?;
                if pending > 0 {
                    return Err(OpenError::Orphaned { sink: name.clone(), pending });
                }
                remove(connection, name).map_err(database)?;
            }
        }
    }
    let present = schema::last_position(connection).map_err(database)? + 1;
    let (mut interests, mut resumed) = (Vec::with_capacity(subscriptions.len()), BTreeMap::new());
    for subscription in subscriptions {
        let name = &subscription.sink;
        let (interest, resume) = match known.remove(name) {
            Some(sink) => {
                let interest = sink.going_on(subscription, present);
                if sink.remembered.as_ref() != Some(&interest.remembered) {
                    remember(connection, &interest).map_err(database)?;
                }
                (interest, sink.resume)
            }
            None => {
                let interest = Interest::new(subscription.clone());
                insert(connection, &interest, present).map_err(database)?;
                let position = Position { batch: present, line: 0 };
                (interest, Resume { position, mark: Vec::new() })
            }
        };
        resumed.insert(name.clone(), resume);
        interests.push(interest);
    }
    transaction.commit().map_err(database)?;
    Ok((interests, resumed))
}

/// Gives up what keeps the daemon from starting with a sink, or, by force, whatever waits for it.
pub(super) fn forget_sink(
    connection: &Connection,
    sink: &str,
    configured: Option<&Subscription>,
    by_force: bool,
) -> rusqlite::Result<Forgetting> {
    let transaction = connection.unchecked_transaction()?;
    let Some(known) = known_sinks(connection)?.remove(sink) else {
        return Ok(Forgetting::Unknown);
    };
    let forgetting = match configured.filter(|subscription| !by_force && subscription.kind == known.kind) {
        Some(subscription) => match known.no_longer_wanted(connection, subscription)? {
            0 => Forgetting::Refused { pending: known.wanted(connection)? },
            given_up => {
                let present = schema::last_position(connection)? + 1;
                remember(connection, &known.going_on(subscription, present))?;
                Forgetting::NoLongerWanted { given_up }
            }
        },
        None => {
            let given_up = known.wanted(connection)?;
            remove(connection, sink)?;
            Forgetting::All { given_up }
        }
    };
    transaction.commit()?;
    Ok(forgetting)
}

/// A sink as the table has it.
struct Known {
    kind: String,
    resume: Resume,
    /// What it wants; not known of one from version 1.
    remembered: Option<Remembered>,
}

impl Known {
    /// How many lines wait for it. When it is not known what it wants, all may.
    fn wanted(&self, connection: &Connection) -> rusqlite::Result<u64> {
        let counts = |batch, source: &str, stream| {
            self.remembered.as_ref().is_none_or(|remembered| remembered.wants(batch, source, stream))
        };
        pending(connection, &counts, self.resume.position).map(|pending| pending.events)
    }

    /// How many lines wait for it which it does not want any more by its present configuration.
    fn no_longer_wanted(
        &self,
        connection: &Connection,
        subscription: &Subscription,
    ) -> rusqlite::Result<u64> {
        let Some(remembered) = &self.remembered else { return Ok(0) };
        let counts = |batch, source: &str, stream| {
            remembered.wants(batch, source, stream) && !subscription.wants(source, stream)
        };
        pending(connection, &counts, self.resume.position).map(|pending| pending.events)
    }

    /// What it wants by its present configuration.
    fn going_on(&self, subscription: &Subscription, present: i64) -> Interest {
        match &self.remembered {
            None => Interest::new(subscription.clone()),
            Some(before) => {
                Interest::going_on(subscription.clone(), before.clone(), self.resume.position, present)
            }
        }
    }
}

fn known_sinks(connection: &Connection) -> rusqlite::Result<BTreeMap<String, Known>> {
    let mut find = connection.prepare("SELECT name, kind, batch, line, mark, wants FROM sink")?;
    let found = find.query_map([], |row| {
        let position = Position { batch: row.get(2)?, line: row.get(3)? };
        let wants: Option<String> = row.get(5)?;
        let known = Known {
            kind: row.get(1)?,
            resume: Resume { position, mark: row.get(4)? },
            remembered: wants.map(|wants| Remembered::read(5, &wants)).transpose()?,
        };
        Ok((row.get(0)?, known))
    })?;
    found.collect()
}

fn insert(connection: &Connection, interest: &Interest, batch: i64) -> rusqlite::Result<()> {
    let Subscription { sink, kind, .. } = &interest.subscription;
    connection.execute(
        "INSERT INTO sink (name, kind, batch, line, mark, wants) VALUES (?1, ?2, ?3, 0, x'', ?4)",
        params![sink, kind, batch, interest.remembered.write()?],
    )?;
    Ok(())
}

fn remember(connection: &Connection, interest: &Interest) -> rusqlite::Result<()> {
    let parameters = params![interest.subscription.sink, interest.remembered.write()?];
    connection.execute("UPDATE sink SET wants = ?2 WHERE name = ?1", parameters)?;
    Ok(())
}

fn remove(connection: &Connection, sink: &str) -> rusqlite::Result<()> {
    connection.execute("DELETE FROM sink WHERE name = ?1", [sink])?;
    Ok(())
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

/// What the rejections take of what [`write_verdicts`] writes, in bytes.
pub(super) fn rejections_bytes(verdicts: &[Option<Verdict>]) -> u64 {
    let bytes = |verdict: &Verdict| match verdict {
        Verdict::Rejected { detail, .. } => 3 + detail.len().min(MAX_DETAIL) as u64,
        _ => 0,
    };
    verdicts.iter().flatten().map(bytes).sum()
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
    fn a_large_backlog_is_forgotten_in_steps() {
        let dir = tempfile::tempdir().unwrap();
        let connection = schema::open(&dir.path().join("ledger.db")).unwrap().connection;
        for _ in 0..4 {
            connection
                .execute(
                    "INSERT INTO batch (source, received_at, packing, verified, unverified, quarantined, \
                     quarantined_bytes, bytes, key_ids, verdicts, body) \
                     VALUES ('us', 0, 0, 1, 0, 0, 1, ?1, '[]', x'02', x'')",
                    [FORGET_BYTES - 1],
                )
                .unwrap();
        }
        connection.execute("INSERT INTO sink VALUES ('all', 'file', 4, 0, x'', NULL)", []).unwrap();
        let mut steps = Vec::new();
        loop {
            let forgotten = forget(&connection).unwrap();
            assert_eq!(forgotten.reached, 4);
            steps.push(forgotten.weight.quarantine_bytes);
            if !forgotten.more {
                break;
            }
        }
        assert_eq!(steps, [2, 1]);
        let left: Vec<_> = in_flight(&connection, Position::default(), None).unwrap();
        assert_eq!(left, [(4, FORGET_BYTES - 1)]);
    }

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
