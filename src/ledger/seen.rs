//! The dedup index: which lines were accepted within their window.
//!
//! An event is recognised by a keyed hash of its signed bytes, so that without the key it is
//! impossible to construct two lines that collide or learn from the database which events it has
//! seen. The hash covers the source (one producer cannot suppress another's events) and whether the
//! line was verified (an unsigned or damaged copy cannot suppress the genuine one).
//!
//! The index is partitioned by the event's own day, and ordered by its time within a day: events
//! that arrive together are stored together, and a replay of a time window touches few pages. Lines
//! without a usable time, and those whose day is further from now than the window and a day, are
//! partitioned by the time of their arrival: into generations of an eighth of the window, all of
//! which are looked up. So the number of partitions is bounded, whatever times events claim. A
//! partition is deleted when its last insert is older than the window.
//!
//! A day that was in reach when an event came may be out of reach when it is sent again, and the
//! other way round. Therefore an event is looked up in its day's partition, while there is one, and
//! in the generations.
//!
//! Of rejected lines, a source's newest are remembered: at most [`REJECTS`] of each of 8,192
//! groups, into which their hashes divide them. When a line is forgotten early, the only effect is
//! that it is not a duplicate when it comes again.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension as _, params};

use super::batch::Entry;
use super::identity::{Identity, Kind};
use crate::clock::Clock;

/// Times for which lines of a source are remembered.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Time for accepted events.
    pub events: Duration,
    /// Time for quarantined lines.
    pub rejects: Duration,
}

/// The index, inside the writer's connection. Everything here happens within the caller's
/// transaction; after a rollback the caller must call [`Seen::forget_cached`].
pub(super) struct Seen {
    windows: BTreeMap<String, Window>,
    clock: Clock,
    partitions: HashMap<String, Partitions>,
    last_look: (i64, Duration),
    /// Time of the wall clock's last jump, by its new time, in seconds: nothing expires for one
    /// window from then on.
    jumped_at: Option<i64>,
    noted_jump: Option<i64>,
}

/// The partitions of a source, by kind, and by day or start.
type Partitions = BTreeMap<(Kind, i64), Partition>;

#[derive(Clone, Copy, Debug)]
struct Partition {
    id: u32,
    last_insert: i64,
}

/// Maximum number of rejected lines of a source in each group of hashes. A line takes about 50
/// bytes of the database.
const REJECTS: u32 = 32;

/// Maximum number of expired lines that are deleted in one step.
const STEP: usize = 4096;

/// Difference between the wall clock and the steady one that counts as a jump, in seconds.
const CLOCK_JUMP: i64 = 5 * 60;

/// Unit to which `last_insert` is rounded up, in seconds, so that it is not written with every
/// batch.
const HOUR: i64 = 3600;

impl Seen {
    pub(super) fn new(
        connection: &Connection,
        windows: BTreeMap<String, Window>,
        clock: Clock,
    ) -> rusqlite::Result<Self> {
        let jumped_at = connection
            .query_row("SELECT value FROM meta WHERE name = 'clock_jumped_at'", [], |row| row.get(0))
            .optional()?;
        let last_look = ((clock.wall)() / 1000, (clock.steady)());
        Ok(Self { windows, clock, partitions: HashMap::new(), last_look, jumped_at, noted_jump: jumped_at })
    }

    /// Sets the windows, from the next transaction on.
    pub(super) fn adjust(&mut self, windows: BTreeMap<String, Window>) {
        self.windows = windows;
        self.forget_cached();
    }

    /// Reads the clocks: once per transaction, before the first [`Seen::insert`]. Returns the wall
    /// clock in seconds.
    pub(super) fn check_clock(&mut self, connection: &Connection) -> rusqlite::Result<i64> {
        let (wall, steady) = ((self.clock.wall)() / 1000, (self.clock.steady)());
        let (last_wall, last_steady) = self.last_look;
        let passed = i64::try_from(steady.saturating_sub(last_steady).as_secs()).unwrap_or(0);
        if (wall - last_wall - passed).abs() > CLOCK_JUMP {
            let seconds = wall - last_wall - passed;
            tracing::warn!(
                code = "clock-jumped",
                seconds,
                "clock jumped by {seconds} s; expiry of the dedup index is suspended for one window"
            );
            self.jumped_at = Some(wall);
        }
        self.last_look = (wall, steady);
        if self.noted_jump != self.jumped_at {
            connection.execute(
                "INSERT INTO meta VALUES ('clock_jumped_at', ?1) \
                 ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                [self.jumped_at],
            )?;
            self.noted_jump = self.jumped_at;
        }
        Ok(wall)
    }

    /// Records the identities of a batch. Returns for each entry whether it is new: not recorded
    /// before within its window. Increments `progress` for each entry.
    pub(super) fn insert_all(
        &mut self,
        connection: &Connection,
        source: &str,
        entries: &[Option<Entry>],
        now: i64,
        progress: &AtomicU64,
    ) -> rusqlite::Result<Vec<bool>> {
        let mut is_new = Vec::with_capacity(entries.len());
        for entry in entries {
            is_new.push(match entry {
                Some(entry) => self.insert(connection, source, &entry.identity, now)?,
                None => false,
            });
            progress.fetch_add(1, Ordering::Relaxed);
        }
        Ok(is_new)
    }

    /// Records an identity; returns false when it was recorded before within its window.
    fn insert(
        &mut self,
        connection: &Connection,
        source: &str,
        identity: &Identity,
        now: i64,
    ) -> rusqlite::Result<bool> {
        let window = self.window(source, identity.kind);
        let expired = self.expired_before(now, window);
        let known = match self.partitions.get_mut(source) {
            Some(known) => known,
            None => self.partitions.entry(source.to_owned()).or_insert(read_partitions(connection, source)?),
        };
        let (kind, bucket) = match identity.kind {
            Kind::Reject => (Kind::Reject, 0),
            Kind::Dated
                if is_near(identity.day, now, window) || known.contains_key(&(Kind::Dated, identity.day)) =>
            {
                (Kind::Dated, identity.day)
            }
            Kind::Dated | Kind::Undated => (Kind::Undated, generation(known, Kind::Undated, now, window)),
            Kind::Trace => (Kind::Trace, generation(known, Kind::Trace, now, window)),
        };
        // Rejected lines have one partition only, and no generations.
        let others = if kind == Kind::Dated { Kind::Undated } else { kind };
        for (at, partition) in known.range((others, i64::MIN)..=(others, i64::MAX)) {
            if *at == (kind, bucket) {
                continue;
            }
            let mut find = connection.prepare_cached("SELECT accepted_at FROM seen WHERE key = ?1")?;
            let found: Option<i64> =
                find.query_row([key(partition.id, identity)], |row| row.get(0)).optional()?;
            if found.is_some_and(|accepted_at| accepted_at >= expired) {
                return Ok(false);
            }
        }
        let partition = match known.get(&(kind, bucket)) {
            Some(partition) if partition.last_insert >= now => *partition,
            _ => {
                let partition = touch(connection, source, kind, bucket, now, window)?;
                known.insert((kind, bucket), partition);
                partition
            }
        };
        let mut insert = connection.prepare_cached(
            "INSERT INTO seen VALUES (?1, ?2) \
             ON CONFLICT (key) DO UPDATE SET accepted_at = excluded.accepted_at WHERE accepted_at < ?3",
        )?;
        let is_new = insert.execute(params![key(partition.id, identity), now, expired])? > 0;
        if is_new && kind == Kind::Reject {
            let mut trim = connection.prepare_cached(
                "DELETE FROM seen WHERE key IN (SELECT key FROM seen WHERE key >= ?1 AND key < ?2 \
                 ORDER BY accepted_at DESC LIMIT -1 OFFSET ?3)",
            )?;
            let (first, end) =
                (group(partition.id, identity.moment), group(partition.id, identity.moment + 1));
            trim.execute(params![first, end, REJECTS])?;
        }
        Ok(is_new)
    }

    /// Deletes some of what has expired; returns true when there is more to do.
    pub(super) fn expire_some(&mut self, connection: &Connection) -> rusqlite::Result<bool> {
        let now = self.check_clock(connection)?;
        let settled = self.jumped_at.map_or(i64::MAX, |jumped_at| now - jumped_at);
        let mut find = connection.prepare_cached(
            "SELECT id FROM seen_partition WHERE last_insert + window < ?1 AND window <= ?2 LIMIT 1",
        )?;
        let Some(id) = find.query_row([now, settled], |row| row.get::<_, u32>(0)).optional()? else {
            return Ok(false);
        };
        if delete_some(connection, id, STEP)? {
            self.forget_cached();
        }
        Ok(true)
    }

    /// Drops cached rows of the tables.
    pub(super) fn forget_cached(&mut self) {
        self.partitions.clear();
        self.noted_jump = None;
    }

    fn window(&self, source: &str, kind: Kind) -> i64 {
        const FALLBACK: Window =
            Window { events: Duration::from_secs(8 * 86_400), rejects: Duration::from_secs(86_400) };
        let window = self.windows.get(source).unwrap_or(&FALLBACK);
        let window = if kind == Kind::Reject { window.rejects } else { window.events };
        i64::try_from(window.as_secs()).unwrap_or(i64::MAX / 4)
    }

    /// Returns the second before which acceptances no longer count.
    fn expired_before(&self, now: i64, window: i64) -> i64 {
        match self.jumped_at {
            Some(jumped_at) if now < jumped_at + window => i64::MIN,
            _ => now - window,
        }
    }
}

/// Returns whether a day is within the window and a day of now, which is in seconds.
fn is_near(day: i64, now: i64, window: i64) -> bool {
    const DAY: i64 = 86_400;
    let today = now.div_euclid(DAY);
    (today - window / DAY - 2..=today + 1).contains(&day)
}

/// Returns the start of the generation that takes what comes now.
fn generation(known: &Partitions, kind: Kind, now: i64, window: i64) -> i64 {
    let last = known.range((kind, i64::MIN)..=(kind, now)).next_back().map(|((_, started), _)| *started);
    last.filter(|started| now - started <= (window / 8).max(1)).unwrap_or(now)
}

fn read_partitions(connection: &Connection, source: &str) -> rusqlite::Result<Partitions> {
    let mut find = connection
        .prepare_cached("SELECT kind, bucket, id, last_insert FROM seen_partition WHERE source = ?1")?;
    let found = find.query_map([source], |row| {
        let kind = match row.get(0)? {
            0 => Kind::Dated,
            1 => Kind::Undated,
            2 => Kind::Trace,
            _ => Kind::Reject,
        };
        Ok(((kind, row.get(1)?), Partition { id: row.get(2)?, last_insert: row.get(3)? }))
    })?;
    found.collect()
}

/// Deletes at most `step` lines of a partition, and in the end the partition itself; returns true
/// then.
fn delete_some(connection: &Connection, id: u32, step: usize) -> rusqlite::Result<bool> {
    let mut delete = connection.prepare_cached(
        "DELETE FROM seen WHERE key IN (SELECT key FROM seen WHERE key >= ?1 AND key < ?2 LIMIT ?3)",
    )?;
    let (first, end) = keys(id);
    let is_gone = delete.execute(params![first, end, step])? < step;
    if is_gone {
        connection.execute("DELETE FROM seen_partition WHERE id = ?1", [id])?;
    }
    Ok(is_gone)
}

/// Returns the first key of a partition, and the first one behind it.
fn keys(partition: u32) -> ([u8; 4], [u8; 4]) {
    (partition.to_be_bytes(), (partition + 1).to_be_bytes())
}

fn touch(
    connection: &Connection,
    source: &str,
    kind: Kind,
    bucket: i64,
    now: i64,
    window: i64,
) -> rusqlite::Result<Partition> {
    let last_insert = (now / HOUR + 1) * HOUR;
    let mut upsert = connection.prepare_cached(
        "INSERT INTO seen_partition (source, kind, bucket, last_insert, window) VALUES (?1, ?2, ?3, ?4, ?5) \
         ON CONFLICT (source, kind, bucket) \
         DO UPDATE SET last_insert = max(last_insert, excluded.last_insert), window = excluded.window \
         RETURNING id",
    )?;
    let id = upsert.query_row(params![source, kind as u8, bucket, last_insert, window], |row| row.get(0))?;
    Ok(Partition { id, last_insert })
}

fn key(partition: u32, identity: &Identity) -> [u8; 24] {
    let mut key = [0; 24];
    key[..8].copy_from_slice(&group(partition, identity.moment));
    key[8..].copy_from_slice(&identity.hash);
    key
}

/// Returns the prefix of the keys of a partition that have this moment.
fn group(partition: u32, moment: u32) -> [u8; 8] {
    ((u64::from(partition) << 32) | u64::from(moment)).to_be_bytes()
}
