//! When a signature that fits no known key may make us ask the origin. Pure: the time is an argument.
//!
//! A genuine event by a new key must find that key, so nothing is judged by a key set that was fetched before the
//! event had arrived. Rubbish must not make us hammer the key server, so that a burst waits for one fetch
//! together, and while fetches bring nothing new they become rarer. When the next one is too far away to wait
//! for, the last one counts.

use std::time::{Duration, Instant};

/// A burst may gather for so long before its fetch.
pub(super) const GATHERING: Duration = Duration::from_millis(200);

/// Between two fetches, at first and while the origin fails.
const SHORTEST_GAP: Duration = Duration::from_secs(2);

/// Between two fetches that brought nothing new, at most.
const LONGEST_GAP: Duration = Duration::from_secs(30);

/// Longer than that no batch waits for its turn.
const PATIENCE: Duration = Duration::from_secs(5);

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
    /// Come back after this time.
    Wait(Duration),
    /// Take what is known: the origin confirmed it a moment ago.
    Confirmed,
    /// The origin could not be asked a moment ago.
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
        let wait = (last.at + last.gap).saturating_duration_since(now);
        match wait {
            Duration::ZERO => Turn::Ask,
            wait if wait <= PATIENCE => Turn::Wait(wait),
            _ if last.was_answered => Turn::Confirmed,
            _ => Turn::Unavailable,
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
        for _ in 0..7 {
            demand.asked(now, Outcome::NoNews);
            let asked = now;
            now += SECOND;
            // Everybody who cannot wait for it takes what is known.
            while demand.turn(now, now) == Turn::Confirmed {
                now += SECOND;
            }
            if let Turn::Wait(wait) = demand.turn(now, now) {
                now += wait;
            }
            gaps.push((now - asked).as_secs());
        }
        assert_eq!(gaps, [2, 4, 8, 16, 30, 30, 30]);
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
}
