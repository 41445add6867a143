//! When a signature that fits no known key may make us ask the origin. Pure: the time is an argument.
//!
//! A genuine event by a new key must find that key, so nothing is judged by an answer to a question from before the
//! event had arrived. Rubbish must not make us hammer the key server, so that a burst waits for one fetch
//! together, and while fetches bring nothing new they become rarer: but only so rare that every batch can wait for
//! the next one.

use std::time::{Duration, Instant};

/// A burst may gather for so long before its fetch.
pub(super) const GATHERING: Duration = Duration::from_millis(200);

/// Between two fetches, at first and while the origin fails.
const SHORTEST_GAP: Duration = Duration::from_secs(2);

/// Between two fetches that brought nothing new, at most; also the longest that a batch waits for its turn. So long
/// does rubbish that keeps coming delay a genuine event by a new key.
pub(super) const LONGEST_GAP: Duration = Duration::from_secs(5);

/// After so long without a question, all is forgotten.
const QUIET: Duration = Duration::from_secs(60);

/// What was asked for by unknown signatures.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Demand {
    last: Option<Asked>,
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    at: Instant,
    /// Until the next.
    gap: Duration,
    /// The origin answered.
    was_answered: bool,
}

/// What a batch with unknown signatures should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Ask now.
    Ask,
    /// Come back after this time, of [`LONGEST_GAP`] at most.
    Wait(Duration),
    /// Take what is known: the origin was asked after the batch had arrived, and answered.
    Confirmed,
    /// The origin was asked after the batch had arrived, and gave nothing usable.
    Unavailable,
}

/// How a fetch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// There was something new.
    News,
    /// There was not.
    NoNews,
    /// The origin gave nothing usable.
    Failed,
}

impl Demand {
    /// Whose turn it is: for a batch that had arrived at `since`.
    pub(super) fn turn(&self, since: Instant, now: Instant) -> Turn {
        let Some(last) = &self.last else { return Turn::Ask };
        if last.at >= since {
            return if last.was_answered { Turn::Confirmed } else { Turn::Unavailable };
        }
        match (last.at + last.gap).saturating_duration_since(now) {
            Duration::ZERO => Turn::Ask,
            wait => Turn::Wait(wait),
        }
    }

    /// Notes a fetch that began at a moment and has ended.
    pub(super) fn asked(&mut self, at: Instant, outcome: Outcome) {
        let before = self.last.filter(|last| at.saturating_duration_since(last.at) < QUIET);
        let gap = match (outcome, before) {
            (Outcome::News, _) => Duration::ZERO,
            (Outcome::NoNews, Some(last)) if last.was_answered && last.gap > Duration::ZERO => {
                (last.gap * 2).min(LONGEST_GAP)
            }
            (Outcome::NoNews | Outcome::Failed, _) => SHORTEST_GAP,
        };
        self.last = Some(Asked { at, gap, was_answered: outcome != Outcome::Failed });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_burst_shares_one_fetch() {
        let start = Instant::now();
        let mut demand = Demand::default();
        assert_eq!(demand.turn(start, start), Turn::Ask);
        demand.asked(start + GATHERING, Outcome::NoNews);
        for arrival in [Duration::ZERO, GATHERING / 2, GATHERING] {
            assert_eq!(demand.turn(start + arrival, start + SECOND), Turn::Confirmed);
        }
        demand.asked(start + GATHERING, Outcome::Failed);
        assert_eq!(demand.turn(start, start + SECOND), Turn::Unavailable);
    }

    #[test]
    fn who_arrives_after_a_fetch_gets_another() {
        let start = Instant::now();
        let mut demand = Demand::default();
        demand.asked(start, Outcome::News);
        assert_eq!(demand.turn(start + SECOND, start + SECOND), Turn::Ask);
        demand.asked(start, Outcome::NoNews);
        assert_eq!(demand.turn(start + SECOND, start + SECOND), Turn::Wait(SECOND));
        assert_eq!(demand.turn(start + SECOND, start + 2 * SECOND), Turn::Ask);
        demand.asked(start, Outcome::Failed);
        assert_eq!(demand.turn(start + SECOND, start + 2 * SECOND), Turn::Ask);
    }

    #[test]
    fn rubbish_is_asked_for_less_and_less() {
        let start = Instant::now();
        let mut demand = Demand::default();
        let (mut now, mut gaps) = (start, Vec::new());
        for _ in 0..6 {
            demand.asked(now, Outcome::NoNews);
            let asked = now;
            // Whoever comes from now on waits for the same fetch.
            let arrivals = (1..=3).map(|number| asked + number * SECOND / 2);
            let turns = arrivals.map(|arrival| match demand.turn(arrival, arrival) {
                Turn::Wait(wait) => arrival + wait,
                other => panic!("{other:?}"),
            });
            let turns: Vec<_> = turns.collect();
            assert_eq!(turns, [turns[0]; 3]);
            now = turns[0];
            assert_eq!(demand.turn(asked + SECOND, now), Turn::Ask);
            gaps.push((now - asked).as_secs());
        }
        assert_eq!(gaps, [2, 4, 5, 5, 5, 5]);
        demand.asked(now, Outcome::News);
        demand.asked(now + SECOND, Outcome::NoNews);
        assert_eq!(demand.turn(now + 2 * SECOND, now + 2 * SECOND), Turn::Wait(SECOND));
        demand.asked(now + 2 * QUIET, Outcome::NoNews);
        assert_eq!(
            demand.turn(now + 2 * QUIET + SECOND, now + 2 * QUIET + SECOND),
            Turn::Wait(SECOND),
            "after a quiet time it begins anew"
        );
    }

    #[test]
    fn no_answer_from_before_a_batch_counts_for_it() {
        let arrival = Instant::now() + QUIET;
        for gaps in 1..=8 {
            for outcome in [Outcome::News, Outcome::NoNews, Outcome::Failed] {
                let mut demand = Demand::default();
                for gap in (0..gaps).rev() {
                    demand.asked(arrival - Duration::from_millis(1) - gap * LONGEST_GAP, outcome);
                }
                let turn = demand.turn(arrival, arrival);
                assert!(
                    matches!(turn, Turn::Ask) || matches!(turn, Turn::Wait(wait) if wait <= LONGEST_GAP),
                    "{outcome:?} {gaps} times: {turn:?}"
                );
            }
        }
    }
}
