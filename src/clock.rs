//! The clocks of the machine, which tests replace. A leaf.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The wall clock in milliseconds since the Unix epoch, and one that only goes forward. Where they disagree, the wall
/// clock has jumped.
#[derive(Clone)]
pub struct Clock {
    /// Milliseconds since the Unix epoch.
    pub wall: Arc<dyn Fn() -> i64 + Send + Sync>,
    /// Time since any fixed moment.
    pub steady: Arc<dyn Fn() -> Duration + Send + Sync>,
}

impl Clock {
    /// The machine's clocks.
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
