//! The tables `batch` and `delivery`: what is committed, and which sinks do not have it yet.
//!
//! A row of `delivery` says that a sink must get some events of one stream of a batch. It is
//! inserted in the transaction of the commit, by what the sink takes then, and deleted when the
//! sink has the whole batch, when its events are evicted, or when the operator gives them up. A
//! batch is deleted with its last row. So a sink that is added, or changed to take more, starts at
//! the present with it. Rows are in the order of batches, and a sink has none before its position,
//! so that its rows are found without an index of their own.

use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::batch::{Batch, Checkpoint};
use super::lines::Counts;
use super::subscription::{Pending, Position, Resume, Streams, Subscription};
use super::verdicts::Verdicts;
use crate::wire::event::Stream;

/// Bytes that wait for sinks, or a limit of them. Before a commit the caller checks
/// [`Ledger::backlog`](super::Ledger::backlog); the ledger itself refuses nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Bytes of all batches, as received, with their verdicts.
    pub bytes: u64,
    /// Bytes of quarantined lines.
    pub quarantine_bytes: u64,
}

impl std::ops::AddAssign for Backlog {
    fn add_assign(&mut self, more: Self) {
        self.bytes += more.bytes;
        self.quarantine_bytes += more.quarantine_bytes;
    }
}

impl std::ops::Sub for Backlog {
    type Output = Self;

    fn sub(self, less: Self) -> Self {
        Self {
            bytes: self.bytes.saturating_sub(less.bytes),
            quarantine_bytes: self.quarantine_bytes.saturating_sub(less.quarantine_bytes),
        }
    }
}

/// A batch that was inserted.
pub(super) struct Appended {
    pub(super) position: i64,
    pub(super) weight: Backlog,
    /// The streams that it has lines of.
    pub(super) streams: Streams,
}

/// Batches that were deleted.
#[derive(Default)]
pub(super) struct Deleted {
    pub(super) batches: Vec<i64>,
    pub(super) weight: Backlog,
}

impl Deleted {
    pub(super) fn add(&mut self, more: Self) {
        self.batches.extend(more.batches);
        self.weight += more.weight;
    }
}

/// Appends a batch and its deliveries. Returns none when no sink takes anything of it.
pub(super) fn append(
    connection: &Connection,
    batch: &Batch,
    verdicts: &Verdicts,
    counts: &Counts,
    subscriptions: &[Subscription],
) -> rusqlite::Result<Option<Appended>> {
    let lines = counts.streams;
    let mut wanted = Vec::new();
    for subscription in subscriptions {
        for (stream, lines) in Stream::ALL.into_iter().zip(lines) {
            if lines > 0 && subscription.wants(&batch.source, stream) {
                wanted.push((&subscription.sink, stream, lines));
            }
        }
    }
    if wanted.is_empty() {
        return Ok(None);
    }
    let bytes = (verdicts.as_bytes().len() + batch.body.len()) as u64;
    // The quarantined lines' share of the body, and their details.
    let share =
        batch.body.len() as u64 * lines[Stream::Quarantine as usize] / batch.lines.len().max(1) as u64;
    let quarantine_bytes = share + counts.rejected_bytes;
    let mut insert = connection.prepare_cached(
        "INSERT INTO batch (source, received_at, packing, verified, unverified, quarantined, \
         quarantined_bytes, bytes, key_ids, verdicts, body) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
    )?;
    insert.execute(params![
        batch.source,
        batch.received_at,
        batch.packing.code(),
        lines[Stream::Verified as usize],
        lines[Stream::Unverified as usize],
        lines[Stream::Quarantine as usize],
        quarantine_bytes,
        bytes,
        serde_json::to_string(&*batch.key_ids).unwrap_or_default(),
        verdicts.as_bytes(),
        *batch.body,
    ])?;
    let position = connection.last_insert_rowid();
    let mut insert = connection.prepare_cached("INSERT INTO delivery VALUES (?1, ?2, ?3, ?4)")?;
    for (sink, stream, lines) in wanted {
        insert.execute(params![position, sink, stream as u8, lines])?;
    }
    let weight = Backlog { bytes, quarantine_bytes };
    Ok(Some(Appended { position, weight, streams: lines.map(|lines| lines > 0) }))
}

/// Keeps the state of an input, in the transaction of the batch that it belongs to.
pub(super) fn keep_checkpoint(connection: &Connection, checkpoint: &Checkpoint) -> rusqlite::Result<()> {
    let mut keep = connection.prepare_cached("INSERT OR REPLACE INTO meta VALUES ('input ' || ?1, ?2)")?;
    keep.execute(params![checkpoint.input, checkpoint.state])?;
    Ok(())
}

/// Returns the state of an input that was kept last.
pub(super) fn checkpoint(connection: &Connection, input: &str) -> rusqlite::Result<Option<Vec<u8>>> {
    let mut find = connection.prepare("SELECT value FROM meta WHERE name = 'input ' || ?1")?;
    find.query_row([input], |row| row.get(0)).optional()
}

/// Records a sink's position.
pub(super) fn advance(
    connection: &Connection,
    sink: &str,
    position: Position,
    mark: &[u8],
) -> rusqlite::Result<Deleted> {
    let mut delete = connection.prepare_cached(
        "DELETE FROM delivery WHERE batch >= (SELECT batch FROM sink WHERE name = ?1) AND batch < ?2 \
         AND sink = ?1 RETURNING batch",
    )?;
    let mut batches: Vec<i64> =
        delete.query_map(params![sink, position.batch], |row| row.get(0))?.collect::<Result<_, _>>()?;
    batches.sort_unstable();
    batches.dedup();
    let mut update =
        connection.prepare_cached("UPDATE sink SET batch = ?2, line = ?3, mark = ?4 WHERE name = ?1")?;
    update.execute(params![sink, position.batch, position.line, mark])?;
    delete_unwanted(connection, batches)
}

/// Deletes those of the batches that no sink must get any more.
pub(super) fn delete_unwanted(
    connection: &Connection,
    batches: impl IntoIterator<Item = i64>,
) -> rusqlite::Result<Deleted> {
    let mut delete = connection.prepare_cached(
        "DELETE FROM batch WHERE position = ?1 AND NOT EXISTS (SELECT 1 FROM delivery WHERE batch = ?1) \
         RETURNING bytes, quarantined_bytes",
    )?;
    let mut deleted = Deleted::default();
    for batch in batches {
        if let Some(weight) = delete.query_row([batch], |row| weight(row, 0)).optional()? {
            deleted.batches.push(batch);
            deleted.weight += weight;
        }
    }
    Ok(deleted)
}

/// Reads a weight from two columns.
pub(super) fn weight(row: &Row<'_>, first: usize) -> rusqlite::Result<Backlog> {
    Ok(Backlog { bytes: row.get(first)?, quarantine_bytes: row.get(first + 1)? })
}

/// Returns the weight of all batches in the table.
pub(super) fn weigh(connection: &Connection) -> rusqlite::Result<Backlog> {
    connection.query_row(
        "SELECT coalesce(sum(bytes), 0), coalesce(sum(quarantined_bytes), 0) FROM batch INDEXED BY batch_summary",
        [],
        |row| weight(row, 0),
    )
}

/// Returns where a sink continues; none when it is not registered.
pub(super) fn resume(connection: &Connection, sink: &str) -> rusqlite::Result<Option<Resume>> {
    let mut find = connection.prepare_cached("SELECT batch, line, mark FROM sink WHERE name = ?1")?;
    let resume = find.query_row([sink], |row| {
        Ok(Resume { position: Position { batch: row.get(0)?, line: row.get(1)? }, mark: row.get(2)? })
    });
    resume.optional()
}

/// Returns what waits for a sink.
pub(super) fn pending(connection: &Connection, sink: &str) -> rusqlite::Result<Pending> {
    let mut find = connection.prepare_cached(
        "WITH mine AS (SELECT batch, events FROM delivery \
                       WHERE batch >= (SELECT batch FROM sink WHERE name = ?1) AND sink = ?1) \
         SELECT coalesce((SELECT sum(events) FROM mine), 0), \
         (SELECT received_at FROM batch WHERE position = (SELECT batch FROM mine ORDER BY batch LIMIT 1))",
    )?;
    find.query_row([sink], |row| Ok(Pending { events: row.get(0)?, oldest: row.get(1)? }))
}

/// Returns the sources and streams of events that wait for a sink although its subscription does
/// not take them, with the number of these events.
pub(super) fn unwanted(
    connection: &Connection,
    subscription: &Subscription,
) -> rusqlite::Result<Vec<(String, usize, u64)>> {
    let mut find = connection.prepare(
        "SELECT source, stream, sum(events) FROM delivery JOIN batch INDEXED BY batch_summary \
         ON position = delivery.batch WHERE sink = ?1 GROUP BY source, stream",
    )?;
    let waiting = find.query_map([&subscription.sink], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    let mut waiting: Vec<(String, usize, u64)> = waiting.collect::<Result<_, _>>()?;
    waiting.retain(|(source, stream, _)| {
        !Stream::ALL.get(*stream).is_some_and(|stream| subscription.wants(source, *stream))
    });
    Ok(waiting)
}

/// Returns the last batch that the worker of a sink may have begun to deliver: of those from its
/// position on, as many as weigh no more than `budget` together, and at least one; 0 when none
/// waits. An [`Outbox`](super::Outbox) hands out no more before it knows that the ledger has
/// recorded a later position.
pub(super) fn last_begun(connection: &Connection, sink: &str, budget: u64) -> rusqlite::Result<i64> {
    let mut find = connection.prepare_cached(
        "SELECT DISTINCT delivery.batch, bytes FROM delivery JOIN batch INDEXED BY batch_summary \
         ON position = delivery.batch WHERE delivery.batch >= (SELECT batch FROM sink WHERE name = ?1) \
         AND sink = ?1 ORDER BY delivery.batch",
    )?;
    let mut rows = find.query([sink])?;
    let (mut last, mut all) = (0, 0);
    while let Some(row) = rows.next()? {
        all += row.get::<_, u64>(1)?;
        if last > 0 && all > budget {
            break;
        }
        last = row.get(0)?;
    }
    Ok(last)
}
