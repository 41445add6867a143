//! A message that strangers can cause is logged once in a while, with how often it was not.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// When such a message was logged last.
#[derive(Debug)]
pub(super) struct Seldom {
    last: AtomicI64,
    unlogged: AtomicU64,
}

impl Seldom {
    /// Milliseconds between two messages.
    const PAUSE: i64 = 10_000;

    /// Never logged yet.
    pub(super) const fn new() -> Self {
        Self { last: AtomicI64::new(i64::MIN), unlogged: AtomicU64::new(0) }
    }

    /// Whether it is time, in milliseconds, for a message; then how many there were since the last.
    pub(super) fn at(&self, now: i64) -> Option<u64> {
        let last = self.last.load(Ordering::Relaxed);
        let is_time = now.saturating_sub(last) >= Self::PAUSE || now < last;
        if is_time && self.last.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            return Some(self.unlogged.swap(0, Ordering::Relaxed));
        }
        self.unlogged.fetch_add(1, Ordering::Relaxed);
        None
    }
}

impl Default for Seldom {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_logged_seldom_and_counted() {
        let seldom = Seldom::new();
        assert_eq!(seldom.at(1_000), Some(0));
        assert_eq!([2_000, 3_000, 10_999].map(|now| seldom.at(now)), [None; 3]);
        assert_eq!(seldom.at(11_000), Some(3));
        assert_eq!(seldom.at(0), Some(0), "the clock was set back");
    }
}
