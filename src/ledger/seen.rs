//! The dedup index: which lines were accepted within their window.
//!
//! An event is recognised by a keyed hash of its signed bytes, so that nobody without the key can construct
//! two lines that collide or learn from the database which events it has seen. The hash covers the source (one
//! producer cannot suppress another's events) and whether the line was verified (an unsigned or damaged copy
//! cannot suppress the genuine one).
//!
//! The index is partitioned by the event's own day, and within a day ordered by its time: what arrives
//! together lies together, and a replay of a time window touches few pages. Lines without a usable time of
//! their own go by the time of their arrival, into generations of an eighth of the window, all of which are
//! asked. A partition goes when its last insert is older than the window.
//!
//! Of the lines in quarantine a source's newest [`REJECTS`] are remembered, or a quarter less: whoever has a token can
//! send as many different ones as he likes. When there are more, the oldest generation is dropped: from then on it
//! is not asked, and each transaction deletes as much of it as it adds. What is lost is only that the same bad line
//! is a duplicate when it comes again.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension as _, params};

use super::{Clock, Entry, Window};

/// What a line is recognised by when it comes again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    kind: Kind,
    /// The day for [`Kind::Dated`], otherwise 0.
    day: i64,
    /// Milliseconds within that day, otherwise 0.
    moment: u32,
    hash: [u8; 16],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    /// An event whose own time can be read.
    Dated = 0,
    /// An event whose time cannot be read.
    Undated = 1,
    /// A trace ID, where the source dedups by that.
    Trace = 2,
    /// A line in quarantine.
    Reject = 3,
}

/// Makes identities. The key is the ledger's, 32 random bytes.
#[derive(Clone)]
pub struct Identifier {
    key: [u8; 32],
}

const DAY: i64 = 86_400_000;

impl Identifier {
    pub(crate) fn new(key: [u8; 32]) -> Self {
        Self { key }
    }

    /// An accepted event: its source, its signed bytes in two parts and its own time in milliseconds since
    /// the Unix epoch.
    pub fn event(
        &self,
        source: &str,
        verified: bool,
        content: (&[u8], &[u8]),
        time: Option<i64>,
    ) -> Identity {
        let hash = self.hash(b'e', source, &[&[u8::from(verified)], content.0, content.1]);
        match time {
            Some(time) => Identity {
                kind: Kind::Dated,
                day: time.div_euclid(DAY),
                moment: u32::try_from(time.rem_euclid(DAY)).unwrap_or(0),
                hash,
            },
            None => Identity { kind: Kind::Undated, day: 0, moment: 0, hash },
        }
    }

    /// Everything that shares a trace ID within an organisation.
    pub fn trace(&self, source: &str, organisation: &str, trace: &str) -> Identity {
        let length = (organisation.len() as u64).to_le_bytes();
        let hash = self.hash(b't', source, &[&length, organisation.as_bytes(), trace.as_bytes()]);
        Identity { kind: Kind::Trace, day: 0, moment: 0, hash }
    }

    /// A line in quarantine, by its bytes.
    pub fn reject(&self, source: &str, line: &[u8]) -> Identity {
        Identity { kind: Kind::Reject, day: 0, moment: 0, hash: self.hash(b'r', source, &[line]) }
    }

    fn hash(&self, domain: u8, source: &str, parts: &[&[u8]]) -> [u8; 16] {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(&[domain]);
        hasher.update(&(source.len() as u64).to_le_bytes());
        hasher.update(source.as_bytes());
        for part in parts {
            hasher.update(part);
        }
        let mut hash = [0; 16];
        hasher.finalize_xof().fill(&mut hash);
        hash
    }
}

/// The index, inside the writer's connection. Everything here happens within the caller's transaction; after a
/// rollback the caller must call [`Seen::forget_cached`].
pub(super) struct Seen {
    windows: BTreeMap<String, Window>,
    clock: Clock,
    partitions: HashMap<(String, i64), Partition>,
    /// The partition of the last event: most follow each other within a day.
    recent: Option<(String, i64, Partition)>,
    /// The partitions of kinds without a day, newest last.
    generations: HashMap<(String, Kind), Vec<Generation>>,
    /// There are partitions that were dropped, as far as is known.
    has_dropped: bool,
    /// Rejected lines that were added since some of what was dropped was deleted.
    added: usize,
    last_look: (i64, Duration),
    /// When the wall clock last jumped, by its new time, in seconds: nothing expires for a window from then.
    jumped_at: Option<i64>,
    noted_jump: Option<i64>,
}

#[derive(Clone, Copy, Debug)]
struct Partition {
    id: u32,
    /// 0 when it was dropped.
    last_insert: i64,
}

#[derive(Clone, Copy, Debug)]
struct Generation {
    /// Its bucket: about when it was begun.
    started: i64,
    partition: Partition,
    /// Lines in it; counted for [`Kind::Reject`] only.
    lines: usize,
}

/// So many lines in quarantine are remembered of one source. Each takes about 50 bytes of the database.
const REJECTS: usize = 400_000;

/// A generation of these; so many are dropped at once.
const REJECTS_IN_GENERATION: usize = REJECTS / 4;

/// So many are deleted at least when some are.
const STEP: usize = 4096;

/// The wall clock may be this much off what the steady one says before that is called a jump.
const JUMP: i64 = 5 * 60;

/// `last_insert` is kept to the hour, rounded up, so that it is not written with every batch.
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
        Ok(Self {
            windows,
            clock,
            partitions: HashMap::new(),
            recent: None,
            generations: HashMap::new(),
            has_dropped: true,
            added: 0,
            last_look,
            jumped_at,
            noted_jump: jumped_at,
        })
    }

    /// From the next transaction on, these windows count.
    pub(super) fn adjust(&mut self, windows: BTreeMap<String, Window>) {
        self.windows = windows;
        self.forget_cached();
    }

    /// Looks at the clocks: once per transaction, before the first [`Seen::insert`]. Returns the wall clock in
    /// seconds.
    pub(super) fn look_at_the_clock(&mut self, connection: &Connection) -> rusqlite::Result<i64> {
        let (wall, steady) = ((self.clock.wall)() / 1000, (self.clock.steady)());
        let (last_wall, last_steady) = self.last_look;
        let passed = i64::try_from(steady.saturating_sub(last_steady).as_secs()).unwrap_or(0);
        if (wall - last_wall - passed).abs() > JUMP {
            tracing::warn!(
                seconds = wall - last_wall - passed,
                "the clock jumped; no event is taken for new again until a whole dedup window has passed"
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

    /// Notes the identities of a batch; tells of each whether it is new, which it is not when it was noted within its
    /// window before. Counts `progress` up on the way.
    pub(super) fn insert_all(
        &mut self,
        connection: &Connection,
        source: &str,
        entries: &[Entry],
        now: i64,
        progress: &AtomicU64,
    ) -> rusqlite::Result<Vec<bool>> {
        let mut is_new = vec![false; entries.len()];
        let identity = |index: usize| &entries[index].identity;
        let (mut rejects, events): (Vec<usize>, Vec<usize>) =
            (0..entries.len()).partition(|index| identity(*index).kind == Kind::Reject);
        // They have no time by which they would lie together: in this order neighbours do. Of equals the first one is
        // new.
        rejects.sort_unstable_by_key(|index| (identity(*index).hash, *index));
        for index in events.into_iter().chain(rejects) {
            is_new[index] = self.insert(connection, source, identity(index), now)?;
            progress.fetch_add(1, Ordering::Relaxed);
        }
        Ok(is_new)
    }

    /// Notes an identity; false when it was noted within its window before.
    fn insert(
        &mut self,
        connection: &Connection,
        source: &str,
        identity: &Identity,
        now: i64,
    ) -> rusqlite::Result<bool> {
        let window = self.window(source, identity.kind);
        let expired = self.expired_before(now, window);
        let partition = if identity.kind == Kind::Dated {
            self.partition(connection, source, identity.day, now, window)?
        } else {
            let live = self.generations(connection, source, identity.kind, now, window)?;
            let (current, earlier) = live.split_last().unwrap_or((&0, &[]));
            for generation in earlier {
                let mut find = connection.prepare_cached("SELECT accepted_at FROM seen WHERE key = ?1")?;
                let found: Option<i64> =
                    find.query_row([key(*generation, identity)], |row| row.get(0)).optional()?;
                if found.is_some_and(|accepted_at| accepted_at >= expired) {
                    return Ok(false);
                }
            }
            *current
        };
        let mut insert = connection.prepare_cached(
            "INSERT INTO seen VALUES (?1, ?2) \
             ON CONFLICT (key) DO UPDATE SET accepted_at = excluded.accepted_at WHERE accepted_at < ?3",
        )?;
        let is_new = insert.execute(params![key(partition, identity), now, expired])? > 0;
        if is_new && identity.kind == Kind::Reject {
            self.added += 1;
            let known = self.generations.get_mut(&(source.to_owned(), identity.kind));
            if let Some(current) = known.and_then(|known| known.last_mut()) {
                current.lines += 1;
            }
        }
        Ok(is_new)
    }

    /// Deletes some of what was dropped: as much as was added since, so that there is never much of it.
    pub(super) fn delete_some_dropped(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        let added = std::mem::take(&mut self.added);
        if added == 0 || !self.has_dropped {
            return Ok(());
        }
        let mut find =
            connection.prepare_cached("SELECT id FROM seen_partition WHERE last_insert = 0 LIMIT 1")?;
        let dropped = find.query_row([], |row| row.get(0)).optional()?;
        self.has_dropped = dropped.is_some();
        match dropped {
            Some(id) => delete_some(connection, id, added + STEP).map(|_| ()),
            None => Ok(()),
        }
    }

    /// Deletes a little of what has expired; true when there is more to do.
    pub(super) fn expire_some(&mut self, connection: &Connection) -> rusqlite::Result<bool> {
        let now = self.look_at_the_clock(connection)?;
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

    /// Drops what is remembered of the tables outside of them.
    pub(super) fn forget_cached(&mut self) {
        self.partitions.clear();
        self.recent = None;
        self.generations.clear();
        self.has_dropped = true;
        self.added = 0;
        self.noted_jump = None;
    }

    fn window(&self, source: &str, kind: Kind) -> i64 {
        const FALLBACK: Window =
            Window { events: Duration::from_secs(8 * 86_400), rejects: Duration::from_secs(86_400) };
        let window = self.windows.get(source).unwrap_or(&FALLBACK);
        let window = if kind == Kind::Reject { window.rejects } else { window.events };
        i64::try_from(window.as_secs()).unwrap_or(i64::MAX / 4)
    }

    /// What was accepted before that second no longer counts.
    fn expired_before(&self, now: i64, window: i64) -> i64 {
        match self.jumped_at {
            Some(jumped_at) if now < jumped_at + window => i64::MIN,
            _ => now - window,
        }
    }

    /// The partition of a day, made when it is missing, with its last insert brought up to date.
    fn partition(
        &mut self,
        connection: &Connection,
        source: &str,
        day: i64,
        now: i64,
        window: i64,
    ) -> rusqlite::Result<u32> {
        if let Some((recent_source, recent_day, partition)) = &self.recent
            && recent_source == source
            && *recent_day == day
            && partition.last_insert >= now
        {
            return Ok(partition.id);
        }
        let name = (source.to_owned(), day);
        let partition = match self.partitions.get(&name) {
            Some(partition) if partition.last_insert >= now => *partition,
            _ => touch(connection, source, Kind::Dated, day, now, window)?,
        };
        self.recent = Some((source.to_owned(), day, partition));
        self.partitions.insert(name, partition);
        Ok(partition.id)
    }

    /// The live generations, the current one last and brought up to date.
    fn generations(
        &mut self,
        connection: &Connection,
        source: &str,
        kind: Kind,
        now: i64,
        window: i64,
    ) -> rusqlite::Result<Vec<u32>> {
        let name = (source.to_owned(), kind);
        if !self.generations.contains_key(&name) {
            self.generations.insert(name.clone(), read_generations(connection, source, kind)?);
        }
        let known = self.generations.entry(name).or_default();
        // Of rejects more than one may be begun in a second: then the newest is ahead of the clock.
        let is_bounded = kind == Kind::Reject;
        let is_current = |generation: &Generation| {
            (is_bounded || generation.started <= now)
                && now - generation.started <= (window / 8).max(1)
                && generation.lines < REJECTS_IN_GENERATION
        };
        match known.last_mut() {
            Some(current) if is_current(current) => {
                if current.partition.last_insert < now {
                    current.partition = touch(connection, source, kind, current.started, now, window)?;
                }
            }
            last => {
                let started = match last {
                    Some(last) if is_bounded => now.max(last.started + 1),
                    _ => now,
                };
                let partition = touch(connection, source, kind, started, now, window)?;
                known.push(Generation { started, partition, lines: 0 });
                let mut lines: usize = known.iter().map(|generation| generation.lines).sum();
                while lines > REJECTS - REJECTS_IN_GENERATION {
                    let oldest = known.remove(0);
                    lines -= oldest.lines;
                    let mut drop = connection.prepare_cached(
                        "UPDATE seen_partition SET last_insert = 0, window = 0 WHERE id = ?1",
                    )?;
                    drop.execute([oldest.partition.id])?;
                    self.has_dropped = true;
                }
            }
        }
        Ok(known.iter().map(|generation| generation.partition.id).collect())
    }
}

/// The generations of a kind that were not dropped, the newest last.
fn read_generations(connection: &Connection, source: &str, kind: Kind) -> rusqlite::Result<Vec<Generation>> {
    let mut find = connection.prepare_cached(
        "SELECT bucket, id, last_insert FROM seen_partition \
         WHERE source = ?1 AND kind = ?2 AND last_insert > 0 ORDER BY bucket",
    )?;
    let found = find.query_map(params![source, kind as u8], |row| {
        let partition = Partition { id: row.get(1)?, last_insert: row.get(2)? };
        Ok(Generation { started: row.get(0)?, partition, lines: 0 })
    })?;
    let mut found = found.collect::<rusqlite::Result<Vec<_>>>()?;
    if kind == Kind::Reject {
        // More need not be counted: such a one goes anyhow.
        let mut count = connection.prepare_cached(
            "SELECT count(*) FROM (SELECT 1 FROM seen WHERE key >= ?1 AND key < ?2 LIMIT ?3)",
        )?;
        for generation in &mut found {
            let (first, end) = keys(generation.partition.id);
            generation.lines = count.query_row(params![first, end, REJECTS + 1], |row| row.get(0))?;
        }
    }
    Ok(found)
}

/// Deletes at most `step` lines of a partition, and in the end the partition itself: then true.
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

/// The first key of a partition, and the first one behind it.
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
    key[..4].copy_from_slice(&partition.to_be_bytes());
    key[4..8].copy_from_slice(&identity.moment.to_be_bytes());
    key[8..].copy_from_slice(&identity.hash);
    key
}
