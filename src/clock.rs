//! The clocks of the machine, which tests replace.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The wall clock, and a steady clock that only goes forward. Where they disagree, the wall clock
/// has jumped.
#[derive(Clone)]
pub struct Clock {
    /// Returns milliseconds since the Unix epoch.
    pub wall: Arc<dyn Fn() -> i64 + Send + Sync>,
    /// Returns the time since a fixed moment.
    pub steady: Arc<dyn Fn() -> Duration + Send + Sync>,
}

impl Clock {
    /// Returns the machine's clocks.
    pub fn system() -> Self {
        let start = Instant::now();
        Self {
            wall: Arc::new(|| {
                let since = SystemTime::now().duration_since(UNIX_EPOCH);
                since.map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
            }),
            steady: Arc::new(move || start.elapsed()),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::{AtomicI64, Ordering};

    use super::*;

    /// The times that a [`Clock`] shows in a test, in milliseconds.
    pub(crate) struct Times {
        pub(crate) wall: Arc<AtomicI64>,
        pub(crate) steady: Arc<AtomicI64>,
    }

    impl Times {
        /// The wall clock shows `wall`, and the steady clock 0.
        pub(crate) fn new(wall: i64) -> Self {
            Self { wall: Arc::new(AtomicI64::new(wall)), steady: Arc::default() }
        }

        /// Returns a clock that shows these times.
        pub(crate) fn clock(&self) -> Clock {
            let (wall, steady) = (Arc::clone(&self.wall), Arc::clone(&self.steady));
            Clock {
                wall: Arc::new(move || wall.load(Ordering::SeqCst)),
                steady: Arc::new(move || {
                    Duration::from_millis(steady.load(Ordering::SeqCst).try_into().unwrap())
                }),
            }
        }

        /// Advances both clocks.
        pub(crate) fn advance(&self, milliseconds: i64) {
            self.wall.fetch_add(milliseconds, Ordering::SeqCst);
            self.steady.fetch_add(milliseconds, Ordering::SeqCst);
        }
    }
}
