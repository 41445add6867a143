//! Load: how fast lines are handed to the sender, and how fast they were answered.

use std::collections::VecDeque;
use std::time::Duration;

/// Time from the post of a batch to its answer, for the newest batches.
#[derive(Default)]
pub(super) struct Latencies {
    newest: VecDeque<Duration>,
}

/// Maximum number of batches that are remembered.
const MAX_REMEMBERED: usize = 100_000;

impl Latencies {
    pub(super) fn add(&mut self, latency: Duration) {
        if self.newest.len() == MAX_REMEMBERED {
            self.newest.pop_front();
        }
        self.newest.push_back(latency);
    }

    /// Describes them, and the rate of so many events in a time; none before the first answer.
    pub(super) fn report(&self, events: u64, time: Duration) -> Option<String> {
        let mut sorted: Vec<_> = self.newest.iter().copied().collect();
        sorted.sort_unstable();
        let longest = *sorted.last()?;
        let percentile =
            |percent: usize| milliseconds(sorted[(sorted.len() * percent).div_ceil(100).max(1) - 1]);
        #[expect(clippy::cast_precision_loss, reason = "a rate needs no more than 53 bits")]
        let rate = events as f64 / time.as_secs_f64().max(1e-9);
        Some(format!(
            "{rate:.0} events/s over {:.1} s; answers after p50 {}, p90 {}, p99 {}, at most {}",
            time.as_secs_f64(),
            percentile(50),
            percentile(90),
            percentile(99),
            milliseconds(longest),
        ))
    }
}

fn milliseconds(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_times_that_occurred() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.report(0, Duration::ZERO), None);
        (1..=200).rev().for_each(|number| latencies.add(Duration::from_millis(number)));
        assert_eq!(
            latencies.report(100_000, Duration::from_secs(8)).unwrap(),
            "12500 events/s over 8.0 s; answers after p50 100.0 ms, p90 180.0 ms, p99 198.0 ms, at most 200.0 ms"
        );
        let mut one = Latencies::default();
        one.add(Duration::from_micros(1500));
        assert!(one.report(1, Duration::from_secs(1)).unwrap().contains("p50 1.5 ms, p90 1.5 ms"));
    }
}
