//! A throttle for log messages that a peer or a failing sink can cause: each is logged at once,
//! then at most every 10 s, with the number that were suppressed.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Time at which a message was last logged, for each subject.
#[derive(Debug)]
pub struct LogThrottle {
    written: Mutex<BTreeMap<Box<str>, (Instant, u64)>>,
}

/// Minimum time between two messages about a subject.
const INTERVAL: Duration = Duration::from_secs(10);

impl LogThrottle {
    /// Creates the throttle of a message that was never logged.
    pub const fn new() -> Self {
        Self { written: Mutex::new(BTreeMap::new()) }
    }

    /// Returns the number of suppressed messages since the last one, if the message about `subject`
    /// (a source, a sink) may be logged now. Subjects are names from the configuration, so that
    /// there are few.
    pub fn admit(&self, subject: &str) -> Option<u64> {
        self.admit_at(subject, Instant::now())
    }

    fn admit_at(&self, subject: &str, now: Instant) -> Option<u64> {
        let mut written = self.written.lock();
        let Some((last, unlogged)) = written.get_mut(subject) else {
            written.insert(subject.into(), (now, 0));
            return Some(0);
        };
        if now.duration_since(*last) < INTERVAL {
            *unlogged += 1;
            return None;
        }
        *last = now;
        Some(std::mem::take(unlogged))
    }
}

impl Default for LogThrottle {
    fn default() -> Self {
        Self::new()
    }
}

/// Logs a message as [`tracing`] does, through a [`LogThrottle`] of its own:
/// `log_throttled!(level, subject, code = "name", fields, message)`. The field `unlogged` is the
/// number of messages about the subject that were suppressed since the last one.
macro_rules! log_throttled {
    ($level:ident, $subject:expr, code = $code:literal, $($message:tt)+) => {{
        static THROTTLE: $crate::log_throttle::LogThrottle = $crate::log_throttle::LogThrottle::new();
        if let Some(unlogged) = THROTTLE.admit($subject) {
            tracing::$level!(code = $code, unlogged, $($message)+);
        }
    }};
}
pub(crate) use log_throttled;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_logged_at_most_every_10_s_and_counted() {
        let throttle = LogThrottle::new();
        let start = Instant::now();
        let admit =
            |subject, milliseconds| throttle.admit_at(subject, start + Duration::from_millis(milliseconds));
        assert_eq!(admit("us", 1_000), Some(0));
        assert_eq!([2_000, 3_000, 10_999].map(|now| admit("us", now)), [None; 3]);
        assert_eq!([admit("eu", 3_000), admit("eu", 4_000)], [Some(0), None]);
        assert_eq!([admit("us", 11_000), admit("eu", 11_000)], [Some(3), None]);
    }
}
