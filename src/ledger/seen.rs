//! The dedup index: which lines were accepted within their window.
//!
//! An event is recognised by a keyed hash of its signed bytes, so that without the key it is
//! impossible to construct two lines that collide or learn from the database which events it has
//! seen. The hash covers the source (one producer cannot suppress another's events) and whether the
//! line was verified (an unsigned or damaged copy cannot suppress the genuine one).
//!
//! The index is partitioned by the event's own day, and ordered by its time within a day: events
//! that arrive together are stored together, a few hundred to a row ([`leaf`]), so that a batch or
//! its replay touches few rows. Lines without a usable time, and those whose day is further from now
//! than the window and a day, are partitioned by the time of their arrival: into generations of an
//! eighth of the window, all of which are looked up. So the number of partitions is bounded,
//! whatever times events claim. A partition is deleted when its last insert is older than the
//! window.
//!
//! A day that was in reach when an event came may be out of reach when it is sent again, and the
//! other way round. Therefore an event is looked up in its day's partition, while there is one, and
//! in the generations.
//!
//! Of rejected lines, a source's newest are remembered: at most [`REJECTS`] of each of 8,192
//! groups, into which their hashes divide them. When a line is forgotten early, the only effect is
//! that it is not a duplicate when it comes again.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension as _, params};

use super::identity::{Identity, Kind};
use super::leaf::{self, Fingerprint, Key, Rules};
use super::lines::{LineFingerprint, Lines};
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

/// Maximum number of rejected lines of a source in each group of hashes. A line takes about 22 bytes
/// of the database.
pub(super) const REJECTS: usize = 32;

/// Number of bits of a rejected line's place within its group: there are 8,192 groups.
pub(super) const GROUP_BITS: u32 = leaf::PLACE_BITS - 13;

/// Maximum number of leaves of a partition that are deleted in one step: 1 MiB.
const STEP: usize = 256;

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

    /// Reads the clocks: once per transaction, before [`Seen::insert_all`]. Returns the wall
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

    /// Records the lines of batches, which are those of one transaction in their order. Returns for
    /// each batch which of its lines are duplicates: recorded before within their window, or equal
    /// to an earlier line; empty when none is. Increments `progress` for each leaf.
    pub(super) fn insert_all(
        &mut self,
        connection: &Connection,
        batches: &[(&str, &Lines)],
        now: i64,
        progress: &AtomicU64,
    ) -> rusqlite::Result<Vec<Vec<bool>>> {
        let mut duplicates = vec![Vec::new(); batches.len()];
        let mut by_source = BTreeMap::<_, Vec<_>>::new();
        for (index, (source, lines)) in (0..).zip(batches) {
            by_source.entry(*source).or_default().push((index, *lines));
        }
        for (source, of_source) in by_source {
            self.insert(connection, source, &of_source, now, progress, &mut |key| {
                let batch = key.batch as usize;
                duplicates[batch].resize(batches[batch].1.len(), false);
                duplicates[batch][key.line as usize] = true;
            })?;
        }
        Ok(duplicates)
    }

    /// Records the lines of a source's batches, and calls `duplicate` for each duplicate.
    fn insert(
        &mut self,
        connection: &Connection,
        source: &str,
        batches: &[(u32, &Lines)],
        now: i64,
        progress: &AtomicU64,
        duplicate: &mut dyn FnMut(&Key),
    ) -> rusqlite::Result<()> {
        let mut keys = Vec::with_capacity(batches.iter().map(|(_, lines)| lines.len()).sum());
        let mut targets = BTreeMap::new();
        for (batch, lines) in batches {
            for lines in lines.fingerprints().chunk_by(|a, b| (a.kind, a.day) == (b.kind, b.day)) {
                let (at, id) = self.target(connection, source, (lines[0].kind, lines[0].day), now)?;
                targets.insert(id, at);
                let key = |line: &LineFingerprint| Key {
                    fingerprint: Fingerprint {
                        place: leaf::first(id) + line.place,
                        hash: line.hash,
                        accepted_at: now,
                    },
                    batch: *batch,
                    line: line.line,
                };
                keys.extend(lines.iter().map(key));
            }
        }
        // Stable, so that of equal lines the first one is new.
        keys.sort_by_key(|key| key.fingerprint.order());
        keys.dedup_by(|key, first| {
            let is_equal = key.fingerprint.order() == first.fingerprint.order();
            if is_equal {
                duplicate(key);
            }
            is_equal
        });
        let mut rest = keys.as_slice();
        for (id, (kind, bucket)) in targets {
            let end = leaf::first(id + 1);
            let (keys, others) = rest.split_at(rest.partition_point(|key| key.fingerprint.place < end));
            rest = others;
            let rules = self.rules(source, kind, now);
            // Rejected lines have one partition only, and no generations.
            let others = if kind == Kind::Dated { Kind::Undated } else { kind };
            let mut keys = Cow::Borrowed(keys);
            let known = self.partitions.get(source).into_iter();
            for (at, other) in known.flat_map(|known| known.range((others, i64::MIN)..=(others, i64::MAX))) {
                if *at == (kind, bucket) {
                    continue;
                }
                let mut found = BTreeSet::new();
                leaf::find(connection, other.id, &keys, rules, progress, &mut |key| {
                    found.insert((key.batch, key.line));
                    duplicate(key);
                })?;
                if !found.is_empty() {
                    keys.to_mut().retain(|key| !found.contains(&(key.batch, key.line)));
                }
            }
            leaf::insert(connection, &keys, rules, progress, duplicate)?;
        }
        Ok(())
    }

    /// Returns the partition that takes what comes now of a kind and day, and its ID.
    fn target(
        &mut self,
        connection: &Connection,
        source: &str,
        (kind, day): (Kind, i64),
        now: i64,
    ) -> rusqlite::Result<((Kind, i64), u32)> {
        let window = self.window(source, kind);
        let known = match self.partitions.get_mut(source) {
            Some(known) => known,
            None => self.partitions.entry(source.to_owned()).or_insert(read_partitions(connection, source)?),
        };
        let at = match kind {
            Kind::Reject => (Kind::Reject, 0),
            Kind::Dated if is_near(day, now, window) || known.contains_key(&(Kind::Dated, day)) => {
                (Kind::Dated, day)
            }
            Kind::Dated | Kind::Undated => (Kind::Undated, generation(known, Kind::Undated, now, window)),
            Kind::Trace => (Kind::Trace, generation(known, Kind::Trace, now, window)),
        };
        let partition = match known.get(&at) {
            Some(partition) if partition.last_insert >= now => *partition,
            _ => {
                let partition = touch(connection, source, at, now, window)?;
                known.insert(at, partition);
                partition
            }
        };
        Ok((at, partition.id))
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
        if leaf::delete(connection, id, STEP)? < STEP {
            connection.execute("DELETE FROM seen_partition WHERE id = ?1", [id])?;
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

    /// Returns what holds now for a partition.
    fn rules(&self, source: &str, kind: Kind, now: i64) -> Rules {
        let window = self.window(source, kind);
        let expired = match self.jumped_at {
            Some(jumped_at) if now < jumped_at + window => i64::MIN,
            _ => now - window,
        };
        Rules { expired, ..Rules::of(kind) }
    }
}

impl Rules {
    /// Returns what holds for a partition in which nothing expires.
    fn of(kind: Kind) -> Self {
        let (range_bits, most) = match kind {
            Kind::Reject => (GROUP_BITS, REJECTS),
            _ => (leaf::PLACE_BITS, usize::MAX),
        };
        Self { range_bits, most, expired: i64::MIN }
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
        let kind = Kind::from_code(row.get(0)?);
        Ok(((kind, row.get(1)?), Partition { id: row.get(2)?, last_insert: row.get(3)? }))
    })?;
    found.collect()
}

/// Records that a partition takes something now, and creates it if there is none.
fn touch(
    connection: &Connection,
    source: &str,
    (kind, bucket): (Kind, i64),
    now: i64,
    window: i64,
) -> rusqlite::Result<Partition> {
    let last_insert = (now / HOUR + 1) * HOUR;
    let mut update = connection.prepare_cached(
        "UPDATE seen_partition SET last_insert = max(last_insert, ?4), window = ?5 \
         WHERE source = ?1 AND kind = ?2 AND bucket = ?3 RETURNING id",
    )?;
    let params = params![source, kind as u8, bucket, last_insert, window];
    let known = update.query_row(params, |row| row.get(0)).optional()?;
    let id = match known {
        Some(id) => id,
        // The smallest free ID: an ID has few bits in the index.
        None => connection.query_row(
            "WITH known (id) AS (SELECT 0 UNION ALL SELECT id FROM seen_partition) \
             INSERT INTO seen_partition (id, source, kind, bucket, last_insert, window) \
             SELECT min(id) + 1, ?1, ?2, ?3, ?4, ?5 FROM known \
             WHERE NOT EXISTS (SELECT 1 FROM seen_partition WHERE id = known.id + 1) RETURNING id",
            params,
            |row| row.get(0),
        )?,
    };
    Ok(Partition { id, last_insert })
}

/// Turns the rows of the index before version 4, one a fingerprint, into leaves. Partitions get the
/// smallest IDs, since an ID has few bits in the index and was counted up with each hour before.
pub(super) fn migrate(connection: &Connection) -> rusqlite::Result<()> {
    /// Number of rows that are in memory at a time.
    const ROWS: usize = 1 << 16;
    let mut partitions = connection.prepare("SELECT id, kind FROM seen_partition ORDER BY id")?;
    let partitions = partitions.query_map([], |row| Ok((row.get(0)?, Kind::from_code(row.get(1)?))))?;
    let partitions: Vec<(u32, Kind)> = partitions.collect::<rusqlite::Result<_>>()?;
    let mut find = connection.prepare(
        "SELECT substr(key, 5, 4), substr(key, 9), accepted_at FROM seen WHERE key >= ?1 AND key < ?2",
    )?;
    for (id, (old, kind)) in (1..).zip(partitions) {
        connection.execute("UPDATE seen_partition SET id = ?1 WHERE id = ?2", [id, old])?;
        let mut rows = find.query([old.to_be_bytes(), (old + 1).to_be_bytes()])?;
        loop {
            let mut keys = Vec::new();
            while keys.len() < ROWS
                && let Some(row) = rows.next()?
            {
                // The group of a rejected line was in the place of a moment.
                let moment = if kind == Kind::Reject { 0 } else { u32::from_be_bytes(row.get(0)?) };
                let identity = Identity { kind, day: 0, moment, hash: row.get(1)? };
                let (place, accepted_at) = (leaf::first(id) + identity.place(), row.get(2)?);
                let fingerprint = Fingerprint { place, hash: identity.hash, accepted_at };
                keys.push(Key { fingerprint, batch: 0, line: 0 });
            }
            if keys.is_empty() {
                break;
            }
            keys.sort_by_key(|key| key.fingerprint.order());
            leaf::insert(connection, &keys, Rules::of(kind), &AtomicU64::new(0), &mut |_| ())?;
        }
    }
    Ok(())
}
