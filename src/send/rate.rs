//! A limit of the rate at which lines are sent.

use std::time::{Duration, Instant};

/// Keeps a rate. What is late by less than [`SLACK`] is caught up; after a longer pause there is no
/// burst.
pub(crate) struct RateLimiter {
    interval: Duration,
    next: Option<Instant>,
}

impl RateLimiter {
    /// Creates the limiter for a number of lines a second.
    pub(crate) fn new(rate: f64) -> Self {
        Self { interval: Duration::from_secs_f64(1.0 / rate), next: None }
    }

    /// Returns how long the next lines must wait at `now`, and counts them.
    pub(crate) fn wait(&mut self, lines: usize, now: Instant) -> Duration {
        let due = self.next.filter(|due| *due + SLACK > now).unwrap_or(now);
        self.next = Some(due + self.interval.saturating_mul(u32::try_from(lines).unwrap_or(u32::MAX)));
        due.saturating_duration_since(now)
    }
}

/// Time by which lines may be late and still be caught up: a sleep ends a little late each time.
const SLACK: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_due_at_the_rate() {
        let mut limiter = RateLimiter::new(4.0);
        let start = Instant::now();
        let waits: Vec<_> = (0..4).map(|_| limiter.wait(1, start).as_millis()).collect();
        assert_eq!(waits, [0, 250, 500, 750]);
        // 300 ms late: caught up. After a pause of seconds: no burst.
        assert_eq!(limiter.wait(1, start + Duration::from_millis(1300)), Duration::ZERO);
        assert_eq!(limiter.wait(1, start + Duration::from_millis(1300)), Duration::ZERO);
        let late = start + Duration::from_secs(60);
        assert_eq!(limiter.wait(2, late), Duration::ZERO);
        assert_eq!(limiter.wait(1, late), Duration::from_millis(500));
    }
}
