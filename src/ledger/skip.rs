//! Giving batches up, oldest first, so that a sink that may lose events never makes the backlog full.
//!
//! What may go: a batch whose lines are wanted only by sinks that skip, none of which has it in flight (see
//! [`claims`](super::claims)). It stays for a sink that holds until that has it. Each batch is looked at on its own,
//! so that a sink that skips loses no batch which is kept for somebody else anyhow, and no verified event because
//! of quarantined lines beside it.

use std::collections::BTreeMap;
use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::claims::{Claims, State};
use super::interest::Interest;
use super::outbox::{self, Weight};
use super::{Position, Skipped};
use crate::wire::event::Stream;

/// When batches are given up, and what is known about the others.
pub(super) struct Skipping {
    /// From here on batches are given up.
    high: Weight,
    /// Until this is reached.
    low: Weight,
    anybody_skips: bool,
    /// How far batches were looked at.
    looked_at: LookedAt,
    /// A sink came forward since all batches were looked at: some of them may go now.
    moved: bool,
    /// When all batches may be looked at again.
    rested: Option<Instant>,
}

/// Every batch up to these could not be given up when it was last looked at.
#[derive(Clone, Copy, Debug, Default)]
struct LookedAt {
    /// For the sake of all bytes.
    bytes: i64,
    /// For the sake of the quarantined ones: those that have some.
    quarantine_bytes: i64,
}

/// At most this many bytes below the mark are given up at once, so that a transaction stays short.
const STEP: u64 = 16 << 20;

/// Looking at all batches again takes at most one part in so many of the writer's time.
const REST: u32 = 20;

/// What was given up in a transaction. While it lives, no sink that skips claims anything.
pub(super) struct GivenUp<'a> {
    pub(super) batches: Vec<i64>,
    pub(super) weight: Weight,
    /// What each sink lost.
    pub(super) lost: BTreeMap<String, Skipped>,
    looked_at: LookedAt,
    /// It was begun with the oldest batch; so long did it take.
    from_the_start: Option<Duration>,
    /// The newest batch was looked at.
    to_the_end: bool,
    guards: Vec<MutexGuard<'a, State>>,
}

/// A sink as far as batches are concerned that it has not passed.
struct Want<'s> {
    interest: &'s Interest,
    /// The first batch that is not wholly delivered.
    reached: i64,
    /// Everything up to this batch is in flight or delivered; none for a sink that holds.
    claimed: Option<i64>,
}

/// A batch as the decision sees it.
struct Row {
    batch: i64,
    received_at: i64,
    source: String,
    /// Lines of each stream.
    lines: [u64; Stream::ALL.len()],
    weight: Weight,
}

impl Skipping {
    /// `limit` is where batches are refused.
    pub(super) fn new(limit: Weight, interests: &[Interest]) -> Self {
        let high = |limit: u64| limit - limit / 16;
        let low = |limit: u64| high(limit) - (limit / 16).min(STEP);
        Self {
            high: Weight {
                bytes: high(limit.bytes).max(1),
                quarantine_bytes: high(limit.quarantine_bytes).max(1),
            },
            low: Weight { bytes: low(limit.bytes), quarantine_bytes: low(limit.quarantine_bytes) },
            anybody_skips: interests.iter().any(|interest| interest.subscription.skips),
            looked_at: LookedAt::default(),
            moved: true,
            rested: None,
        }
    }

    /// Whether batches of that weight are too many and looking at all of them again is worth while, soon.
    pub(super) fn is_due(&self, weight: Weight) -> bool {
        self.anybody_skips && self.moved && self.is_too_much(weight)
    }

    fn is_too_much(&self, weight: Weight) -> bool {
        weight.bytes >= self.high.bytes || weight.quarantine_bytes >= self.high.quarantine_bytes
    }

    /// A sink came forward.
    pub(super) fn moved(&mut self) {
        self.moved = true;
    }

    /// Deletes what may go, within the caller's transaction, when `weight` is too much; `positions` is where each
    /// sink is. None when nothing was to be done. The caller says with [`Skipping::settle`] that it was committed.
    pub(super) fn give_up<'a>(
        &self,
        connection: &Connection,
        weight: Weight,
        interests: &[Interest],
        positions: impl Fn(&str) -> Option<Position>,
        claims: &'a BTreeMap<String, Claims>,
    ) -> rusqlite::Result<Option<GivenUp<'a>>> {
        if !self.anybody_skips || !self.is_too_much(weight) {
            return Ok(None);
        }
        let start = Instant::now();
        let from_the_start = self.moved && self.rested.is_none_or(|rested| start >= rested);
        let mut given_up = GivenUp {
            batches: Vec::new(),
            weight: Weight::default(),
            lost: BTreeMap::new(),
            looked_at: if from_the_start { LookedAt::default() } else { self.looked_at },
            from_the_start: None,
            to_the_end: false,
            guards: Vec::new(),
        };
        let mut wants = Vec::with_capacity(interests.len());
        for interest in interests {
            let subscription = &interest.subscription;
            let Some(position) = positions(&subscription.sink) else { continue };
            let claims = claims.get(&subscription.sink).filter(|_| subscription.skips);
            let claimed = claims.map(|claims| {
                let guard = claims.lock();
                let claimed = guard.claimed();
                given_up.guards.push(guard);
                claimed
            });
            wants.push(Want { interest, reached: position.batch, claimed });
        }

        let mut find = connection.prepare_cached(
            "SELECT position, received_at, source, verified, unverified, quarantined, bytes, quarantined_bytes \
             FROM batch INDEXED BY batch_summary WHERE position > ?1 ORDER BY position",
        )?;
        let too_large = weight.bytes >= self.high.bytes;
        let too_bad = weight.quarantine_bytes >= self.high.quarantine_bytes;
        let begin = match (too_large, too_bad) {
            (true, false) => given_up.looked_at.bytes,
            (false, true) => given_up.looked_at.quarantine_bytes,
            _ => given_up.looked_at.bytes.min(given_up.looked_at.quarantine_bytes),
        };
        let mut rows = find.query([begin])?;
        loop {
            let for_bytes = too_large && weight.bytes > self.low.bytes + given_up.weight.bytes;
            let for_quarantine = too_bad
                && weight.quarantine_bytes > self.low.quarantine_bytes + given_up.weight.quarantine_bytes;
            if !for_bytes && !for_quarantine {
                break;
            }
            let Some(row) = rows.next()? else {
                given_up.to_the_end = true;
                break;
            };
            let row = Row {
                batch: row.get(0)?,
                received_at: row.get(1)?,
                source: row.get(2)?,
                lines: [row.get(3)?, row.get(4)?, row.get(5)?],
                weight: Weight { bytes: row.get(6)?, quarantine_bytes: row.get(7)? },
            };
            let looked_at = &mut given_up.looked_at;
            let helps = (for_bytes && row.batch > looked_at.bytes)
                || (for_quarantine
                    && row.weight.quarantine_bytes > 0
                    && row.batch > looked_at.quarantine_bytes);
            if for_bytes {
                looked_at.bytes = looked_at.bytes.max(row.batch);
            }
            if for_quarantine {
                looked_at.quarantine_bytes = looked_at.quarantine_bytes.max(row.batch);
            }
            if helps {
                given_up.take(&row, &wants);
            }
        }
        given_up.from_the_start = from_the_start.then(|| start.elapsed());
        drop(rows);
        let mut delete = connection.prepare_cached("DELETE FROM batch WHERE position = ?1")?;
        for batch in &given_up.batches {
            delete.execute([batch])?;
        }
        Ok(Some(given_up))
    }

    /// What was given up is committed.
    pub(super) fn settle(&mut self, given_up: &mut GivenUp<'_>) {
        self.looked_at = given_up.looked_at;
        if let Some(took) = given_up.from_the_start {
            self.moved = !given_up.to_the_end;
            self.rested = Some(Instant::now() + took * REST);
        }
        if !given_up.batches.is_empty() {
            for state in &mut given_up.guards {
                state.gave_up();
            }
        }
    }
}

impl GivenUp<'_> {
    /// Takes a batch, if it may go.
    fn take(&mut self, row: &Row, wants: &[Want<'_>]) {
        let mut losers = Vec::new();
        for want in wants.iter().filter(|want| want.reached <= row.batch) {
            let wants = |stream| want.interest.wants(row.batch, &row.source, stream);
            let events = outbox::count(row.lines, wants);
            if events == 0 {
                continue;
            }
            if want.claimed.is_none_or(|claimed| row.batch <= claimed) {
                return;
            }
            losers.push((&want.interest.subscription.sink, events));
        }
        for (sink, events) in losers {
            let lost = Skipped { events, oldest: row.received_at, newest: row.received_at };
            self.lost.entry(sink.clone()).or_default().add(lost);
        }
        self.batches.push(row.batch);
        self.weight += row.weight;
    }
}
