//! The last hour of the counters, for the rates and charts of `/status`.
//!
//! Memory: 361 samples, in a buffer that grows to 512, of 88 bytes for a source and 40 for a sink:
//! 45 KB for each source and 21 KB for each sink. It depends on the configuration alone and not on
//! what is received.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::metrics::LineOutcome;
use super::metrics::values::{SinkValues, SourceValues};
use super::status::{SinkChart, SourceChart};

/// Time between two samples.
pub const INTERVAL: Duration = Duration::from_secs(10);

/// Longest time that a rate can be counted over.
pub const HOUR: Duration = Duration::from_secs(3600);

/// Shorter window for rates.
pub const MINUTE: Duration = Duration::from_secs(60);

/// Number of samples: the ends of an hour's intervals, and its beginning.
const SAMPLES: usize = 361;

/// Tolerance of a ticker: a sample that is due comes so much too early.
const JITTER: Duration = Duration::from_millis(500);

/// Samples of the sources' and the sinks' counters in the last hour.
///
/// Times are those of a steady clock, since a fixed moment.
#[derive(Debug, Default)]
pub struct History {
    last: Option<Duration>,
    sources: BTreeMap<String, SourceHistory>,
    sinks: BTreeMap<String, Ring<SinkSample>>,
}

/// Counters of a source at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct SourceSample {
    lines: [u64; LineOutcome::ALL.len()],
    delays: u64,
    delay_sum: f64,
}

impl From<&SourceValues> for SourceSample {
    fn from(values: &SourceValues) -> Self {
        Self { lines: values.lines, delays: values.delays, delay_sum: values.delay_sum }
    }
}

impl SourceSample {
    fn total(&self) -> u64 {
        self.lines.iter().sum()
    }
}

/// Counters of a sink at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct SinkSample {
    delivered: u64,
    pending: i64,
    oldest_pending: f64,
}

impl From<&SinkValues> for SinkSample {
    fn from(values: &SinkValues) -> Self {
        Self { delivered: values.delivered, pending: values.pending, oldest_pending: values.oldest_pending }
    }
}

#[derive(Debug, Default)]
struct SourceHistory {
    ring: Ring<SourceSample>,
    /// Wall-clock time of the sample with the last increase of each outcome.
    increased: [Option<i64>; LineOutcome::ALL.len()],
}

/// Samples, oldest first.
#[derive(Debug)]
struct Ring<T>(VecDeque<(Duration, T)>);

impl<T> Default for Ring<T> {
    fn default() -> Self {
        Self(VecDeque::new())
    }
}

impl<T: Copy> Ring<T> {
    fn push(&mut self, at: Duration, sample: T) {
        if self.0.len() == SAMPLES {
            self.0.pop_front();
        }
        self.0.push_back((at, sample));
    }

    /// Returns the newest sample that is at least `window` old, else the oldest one.
    fn before(&self, now: Duration, window: Duration) -> Option<&(Duration, T)> {
        let is_old = |(at, _): &&(Duration, T)| now.saturating_sub(*at) + JITTER >= window;
        self.0.iter().rev().find(is_old).or(self.0.front())
    }

    /// Returns each sample with the time since the one before, and that one.
    fn steps(&self) -> impl Iterator<Item = (Duration, &T, &T)> {
        let next = self.0.iter().skip(1);
        self.0.iter().zip(next).map(|((from, before), (to, after))| (to.saturating_sub(*from), before, after))
    }
}

/// Activity of a source in the last hour.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SourceActivity {
    /// Lines a second in the last minute, whatever became of them.
    pub minute_rate: f64,
    /// Lines a second in the last hour, whatever became of them.
    pub hour_rate: f64,
    /// Mean delay of the last hour's events in seconds; none without an event.
    pub mean_delay: Option<f64>,
    /// Number of lines in the last hour, in the order of [`LineOutcome::ALL`].
    pub hour_lines: [u64; LineOutcome::ALL.len()],
    /// Time of the last increase of each outcome, in the clock that [`History::record`] was given,
    /// to within [`INTERVAL`]. It may be older than an hour.
    pub last: [Option<i64>; LineOutcome::ALL.len()],
}

impl History {
    /// Returns whether it is time for a sample.
    pub fn is_due(&self, now: Duration) -> bool {
        self.last.is_none_or(|last| now.saturating_sub(last) + JITTER >= INTERVAL)
    }

    /// Takes a sample of every configured source and sink. What is not among them is forgotten.
    /// `wall` is the time for [`SourceActivity::last`].
    pub fn record(
        &mut self,
        now: Duration,
        wall: i64,
        sources: &BTreeMap<String, SourceValues>,
        sinks: &BTreeMap<String, SinkValues>,
    ) {
        self.last = Some(now);
        self.sources.retain(|name, _| sources.contains_key(name));
        self.sinks.retain(|name, _| sinks.contains_key(name));
        for (name, values) in sources {
            let history = self.sources.entry(name.clone()).or_default();
            let before = history.ring.0.back().map(|(_, sample)| sample.lines);
            for (at, increased) in history.increased.iter_mut().enumerate() {
                if before.is_some_and(|before| values.lines[at] > before[at]) {
                    *increased = Some(wall);
                }
            }
            history.ring.push(now, values.into());
        }
        for (name, values) in sinks {
            self.sinks.entry(name.clone()).or_default().push(now, values.into());
        }
    }

    /// Returns the activity of a source whose counters are now `values`, at the time `now`, which
    /// is `wall`.
    pub fn source(&self, name: &str, now: Duration, wall: i64, values: &SourceValues) -> SourceActivity {
        let Some(history) = self.sources.get(name) else { return SourceActivity::default() };
        let current = SourceSample::from(values);
        let lines_rate = |window| {
            let before = history.ring.before(now, window);
            before.map_or(0.0, |(at, before)| {
                rate(current.total().saturating_sub(before.total()), now.saturating_sub(*at))
            })
        };
        let mut last = history.increased;
        if let Some((_, newest)) = history.ring.0.back() {
            for (at, last) in last.iter_mut().enumerate() {
                if current.lines[at] > newest.lines[at] {
                    *last = Some(wall);
                }
            }
        }
        let hour_ago = history.ring.before(now, HOUR).map(|(_, sample)| *sample).unwrap_or_default();
        SourceActivity {
            minute_rate: lines_rate(MINUTE),
            hour_rate: lines_rate(HOUR),
            mean_delay: mean_delay(&hour_ago, &current),
            hour_lines: std::array::from_fn(|at| current.lines[at].saturating_sub(hour_ago.lines[at])),
            last,
        }
    }

    /// Returns the lines a second that a sink whose counters are now `values` has taken in the last
    /// minute.
    pub fn sink_rate(&self, name: &str, now: Duration, values: &SinkValues) -> f64 {
        let before = self.sinks.get(name).and_then(|ring| ring.before(now, MINUTE));
        before.map_or(0.0, |(at, before)| {
            rate(values.delivered.saturating_sub(before.delivered), now.saturating_sub(*at))
        })
    }

    /// Returns the charts of a source, with a point for each [`INTERVAL`].
    pub fn source_chart(&self, name: &str) -> SourceChart {
        let Some(SourceHistory { ring, .. }) = self.sources.get(name) else {
            return SourceChart::default();
        };
        SourceChart {
            rates: ring
                .steps()
                .map(|(time, before, after)| rate(after.total().saturating_sub(before.total()), time))
                .collect(),
            delays: ring.steps().map(|(_, before, after)| mean_delay(before, after)).collect(),
        }
    }

    /// Returns the charts of a sink, with a point for each [`INTERVAL`].
    pub fn sink_chart(&self, name: &str) -> SinkChart {
        let samples = self.sinks.get(name).into_iter().flat_map(|ring| &ring.0);
        let (pending, oldest) =
            samples.skip(1).map(|(_, sample)| (sample.pending, rounded(sample.oldest_pending))).unzip();
        SinkChart { pending, oldest }
    }
}

/// Returns a number a second; 0 before there is any time to count over.
#[expect(clippy::cast_precision_loss, reason = "a rate needs no more than 53 bits")]
fn rate(count: u64, time: Duration) -> f64 {
    if time < JITTER { 0.0 } else { rounded(count as f64 / time.as_secs_f64()) }
}

#[expect(clippy::cast_precision_loss, reason = "a mean needs no more than 53 bits")]
fn mean_delay(before: &SourceSample, after: &SourceSample) -> Option<f64> {
    let count = after.delays.checked_sub(before.delays).filter(|count| *count > 0)?;
    Some(rounded(((after.delay_sum - before.delay_sum) / count as f64).max(0.0)))
}

/// Rounds to thousandths.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACCEPTED: usize = LineOutcome::Accepted as usize;
    const BAD: usize = LineOutcome::BadSignature as usize;

    fn source(accepted: u64, bad: u64) -> SourceValues {
        let mut values = SourceValues::default();
        values.lines[ACCEPTED] = accepted;
        values.lines[BAD] = bad;
        values
    }

    fn record(history: &mut History, seconds: u64, values: SourceValues) {
        let sources = BTreeMap::from([("us".to_owned(), values)]);
        let sink =
            SinkValues { delivered: seconds, pending: 3, oldest_pending: 1.5, ..SinkValues::default() };
        let now = Duration::from_secs(seconds);
        history.record(now, wall(seconds), &sources, &BTreeMap::from([("siem".to_owned(), sink)]));
    }

    fn wall(seconds: u64) -> i64 {
        1_000_000 + i64::try_from(seconds).unwrap()
    }

    fn activity(history: &History, seconds: u64, values: &SourceValues) -> SourceActivity {
        history.source("us", Duration::from_secs(seconds), wall(seconds), values)
    }

    #[test]
    fn a_sample_is_due_every_ten_seconds() {
        let mut history = History::default();
        assert!(history.is_due(Duration::ZERO));
        record(&mut history, 0, source(0, 0));
        assert!(!history.is_due(Duration::from_millis(9_400)));
        // A tick that comes a little early must not wait for the next one.
        assert!(history.is_due(Duration::from_millis(9_990)));
    }

    #[test]
    fn rates_are_over_the_window_or_over_what_there_is() {
        let mut history = History::default();
        record(&mut history, 0, source(0, 0));
        let early = activity(&history, 4, &source(8, 0));
        assert_eq!((early.minute_rate, early.hour_rate), (2.0, 2.0));
        // 10 a second for an hour and a half, then nothing for the last 30 s.
        for sample in 1..=540 {
            record(&mut history, 10 * sample, source(100 * sample.min(537), 0));
        }
        let late = activity(&history, 5_400, &source(53_700, 0));
        assert_eq!(late.minute_rate, 5.0);
        assert_eq!(late.hour_rate, 9.917);
        assert_eq!(late.hour_lines[ACCEPTED], 35_700);
        assert_eq!(
            history.sink_rate(
                "siem",
                Duration::from_secs(5_400),
                &SinkValues { delivered: 5_460, ..SinkValues::default() }
            ),
            2.0
        );
    }

    #[test]
    fn an_hour_is_kept_and_no_more() {
        let mut history = History::default();
        for sample in 0..1_000 {
            record(&mut history, 10 * sample, source(10 * sample, 0));
        }
        let points = history.source_chart("us");
        assert_eq!((points.rates.len(), points.delays.len()), (SAMPLES - 1, SAMPLES - 1));
        assert!(points.rates.iter().all(|rate| *rate == 1.0), "{points:?}");
        let points = history.sink_chart("siem");
        assert_eq!(points.pending, vec![3; SAMPLES - 1]);
        assert_eq!(points.oldest, vec![1.5; SAMPLES - 1]);
        assert!(size_of::<(Duration, SourceSample)>() <= 88 && size_of::<(Duration, SinkSample)>() <= 40);
    }

    #[test]
    fn the_last_time_of_an_outcome_outlives_the_hour() {
        let mut history = History::default();
        record(&mut history, 0, source(0, 0));
        record(&mut history, 10, source(0, 4));
        for sample in 2..=500 {
            record(&mut history, 10 * sample, source(0, 4));
        }
        let quiet = activity(&history, 5_005, &source(0, 4));
        assert_eq!((quiet.hour_lines[BAD], quiet.last[BAD]), (0, Some(wall(10))));
        assert_eq!(quiet.last[ACCEPTED], None);
        let again = activity(&history, 5_005, &source(0, 5));
        assert_eq!((again.hour_lines[BAD], again.last[BAD]), (1, Some(wall(5_005))));
    }

    #[test]
    fn delays_are_means_of_their_interval() {
        let mut history = History::default();
        let values = |delays, delay_sum| SourceValues { delays, delay_sum, ..SourceValues::default() };
        record(&mut history, 0, values(0, 0.0));
        record(&mut history, 10, values(2, 3.0));
        record(&mut history, 20, values(2, 3.0));
        assert_eq!(history.source_chart("us").delays, [Some(1.5), None]);
        assert_eq!(activity(&history, 25, &values(4, 4.0)).mean_delay, Some(1.0));
        assert_eq!(activity(&history, 25, &values(0, 0.0)).mean_delay, None);
    }

    #[test]
    fn what_is_no_longer_configured_is_forgotten() {
        let mut history = History::default();
        record(&mut history, 0, source(0, 0));
        history.record(Duration::from_secs(10), wall(10), &BTreeMap::new(), &BTreeMap::new());
        assert_eq!(activity(&history, 10, &source(5, 0)), SourceActivity::default());
        assert_eq!(history.source_chart("us"), SourceChart::default());
        assert_eq!(history.sink_chart("siem"), SinkChart::default());
    }
}
