//! Eviction: a sink with `when_full = "skip"` loses its oldest deliveries, so that it never makes
//! the backlog full.
//!
//! A batch is evicted when each sink that must get it skips, and none of their workers may have
//! begun it. For a sink that holds, it is kept until that sink has it. So a sink that skips loses
//! no batch which is kept for another one anyhow, and no verified event because of quarantined
//! lines in other batches.

use std::collections::BTreeMap;

use rusqlite::Connection;

use super::delivery::{self, Backlog, Deleted};
use super::subscription::{Skipped, Subscription};

/// Maximum number of batches that a pass examines in one transaction, and maximum number of bytes
/// that it evicts below the mark.
const MAX_EXAMINED: usize = 4096;
const STEP: u64 = 16 << 20;

/// Limits from which on batches are evicted, and the batches that were examined.
pub(super) struct Eviction {
    /// One for all bytes, and one for the quarantined ones.
    passes: [Pass; 2],
    /// Maximum number of bytes that a worker has in hand.
    budget: u64,
    has_skipping_sinks: bool,
}

/// A pass through the table, from the oldest batch to the newest and, after a sink has advanced,
/// again.
struct Pass {
    measure: fn(Backlog) -> u64,
    /// Weight from which on batches are evicted, until `low` is reached.
    high: u64,
    low: u64,
    /// Batches up to this one could not be evicted when they were examined.
    looked_at: i64,
    is_at_end: bool,
    /// A sink has advanced since the oldest batch was examined.
    moved: bool,
}

/// Batches that were evicted in a transaction.
#[derive(Default)]
pub(super) struct Evicted {
    pub(super) deleted: Deleted,
    /// Losses of each sink.
    pub(super) lost: BTreeMap<String, Skipped>,
}

impl Eviction {
    /// Creates the eviction. `limit` is the backlog at which batches are refused.
    pub(super) fn new(limit: Backlog, budget: u64, subscriptions: &[Subscription]) -> Self {
        let measures: [fn(Backlog) -> u64; 2] = [|weight| weight.bytes, |weight| weight.quarantine_bytes];
        let passes = measures.map(|measure| {
            let limit = measure(limit);
            let high = (limit - limit / 16).max(1);
            let low = high.saturating_sub((limit / 16).min(STEP));
            Pass { measure, high, low, looked_at: 0, is_at_end: false, moved: true }
        });
        Self {
            passes,
            budget,
            has_skipping_sinks: subscriptions.iter().any(|subscription| subscription.skips),
        }
    }

    /// Returns whether there may be something to evict.
    pub(super) fn is_due(&self, weight: Backlog) -> bool {
        self.has_skipping_sinks && self.passes.iter().any(|pass| pass.is_due(weight))
    }

    /// Records that there are new batches.
    pub(super) fn appended(&mut self) {
        self.passes.iter_mut().for_each(|pass| pass.is_at_end = false);
    }

    /// Records that a sink has advanced.
    pub(super) fn moved(&mut self) {
        self.passes.iter_mut().for_each(|pass| pass.moved = true);
    }

    /// Starts again after a failed transaction, whose evictions were rolled back.
    pub(super) fn start_again(&mut self) {
        self.passes.iter_mut().for_each(|pass| pass.looked_at = 0);
    }

    /// Evicts, oldest first, within the caller's transaction.
    pub(super) fn evict(
        &mut self,
        connection: &Connection,
        mut weight: Backlog,
        subscriptions: &[Subscription],
    ) -> rusqlite::Result<Evicted> {
        let mut evicted = Evicted::default();
        let mut begun = BTreeMap::new();
        for Subscription { sink, .. } in subscriptions.iter().filter(|subscription| subscription.skips) {
            begun.insert(sink.as_str(), delivery::last_begun(connection, sink, self.budget)?);
        }
        for pass in &mut self.passes {
            let before = evicted.deleted.weight;
            pass.run(connection, weight, &begun, &mut evicted)?;
            weight = weight - (evicted.deleted.weight - before);
        }
        Ok(evicted)
    }
}

impl Pass {
    fn is_due(&self, weight: Backlog) -> bool {
        (self.measure)(weight) >= self.high && (self.moved || !self.is_at_end)
    }

    fn run(
        &mut self,
        connection: &Connection,
        weight: Backlog,
        begun: &BTreeMap<&str, i64>,
        evicted: &mut Evicted,
    ) -> rusqlite::Result<()> {
        if !self.is_due(weight) {
            return Ok(());
        }
        if std::mem::take(&mut self.is_at_end) {
            (self.looked_at, self.moved) = (0, false);
        }
        let mut find = connection.prepare_cached(
            "SELECT position, received_at, bytes, quarantined_bytes FROM batch INDEXED BY batch_summary \
             WHERE position > ?1 ORDER BY position",
        )?;
        let mut waiting = connection
            .prepare_cached("SELECT sink, sum(events) FROM delivery WHERE batch = ?1 GROUP BY sink")?;
        let mut rows = find.query([self.looked_at])?;
        let (mut batches, mut left) = (Vec::new(), (self.measure)(weight));
        for _ in 0..MAX_EXAMINED {
            if left <= self.low {
                break;
            }
            let Some(row) = rows.next()? else {
                self.is_at_end = true;
                break;
            };
            let (batch, received_at): (i64, i64) = (row.get(0)?, row.get(1)?);
            let helps = (self.measure)(delivery::weight(row, 2)?);
            self.looked_at = batch;
            if helps == 0 {
                continue;
            }
            let losers: Vec<(String, u64)> = waiting
                .query_map([batch], |row| Ok((row.get(0)?, row.get(1)?)))?
                .collect::<Result<_, _>>()?;
            if losers.iter().all(|(sink, _)| begun.get(sink.as_str()).is_some_and(|last| batch > *last)) {
                left -= helps.min(left);
                batches.push(batch);
                for (sink, events) in losers {
                    let lost = Skipped { events, oldest: received_at, newest: received_at };
                    evicted.lost.entry(sink).or_default().add(lost);
                }
            }
        }
        drop(rows);
        let mut delete = connection.prepare_cached("DELETE FROM delivery WHERE batch = ?1")?;
        for batch in &batches {
            delete.execute([batch])?;
        }
        evicted.deleted.add(delivery::delete_unwanted(connection, batches)?);
        Ok(())
    }
}
