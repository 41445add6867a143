//! A log message that a peer or a failing sink can cause is written at once, then at most every 10 s, with how often
//! it was left out: a leaf.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Instant;

/// When one such message was written last.
#[derive(Debug)]
pub struct LogThrottle {
    last: AtomicI64,
    unlogged: AtomicU64,
}

/// Milliseconds between two messages.
const INTERVAL: i64 = 10_000;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

impl LogThrottle {
    /// Of a message that was never written yet.
    pub const fn new() -> Self {
        Self { last: AtomicI64::new(i64::MIN), unlogged: AtomicU64::new(0) }
    }

    /// Returns, when the message may be written now, how often it was left out since the last time.
    pub fn admit(&self) -> Option<u64> {
        self.admit_at(i64::try_from(START.elapsed().as_millis()).unwrap_or(i64::MAX))
    }

    /// `now` is in milliseconds of a clock that is never set back.
    fn admit_at(&self, now: i64) -> Option<u64> {
        let last = self.last.load(Ordering::Relaxed);
        let is_due = now.saturating_sub(last) >= INTERVAL;
        if is_due && self.last.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            return Some(self.unlogged.swap(0, Ordering::Relaxed));
        }
        self.unlogged.fetch_add(1, Ordering::Relaxed);
        None
    }
}

impl Default for LogThrottle {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_logged_seldom_and_counted() {
        let throttle = LogThrottle::new();
        assert_eq!(throttle.admit_at(1_000), Some(0));
        assert_eq!([2_000, 3_000, 10_999].map(|now| throttle.admit_at(now)), [None; 3]);
        assert_eq!(throttle.admit_at(11_000), Some(3));
        assert_eq!(throttle.admit(), None, "the process has not run for so long");
    }
}
