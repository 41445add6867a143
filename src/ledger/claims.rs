//! What each sink has in flight: the batches that its worker has taken and that are not noted as delivered.
//!
//! A batch in flight must still be there after a crash: its lines may already stand in the sink, the last of them
//! torn, and the sink finds that out by comparing them with what it is given again. So no batch in flight is ever
//! given up for a sink that skips. That has to hold across a restart too, when nobody remembers what was
//! taken. Therefore the batches in flight, from the sink's noted position on, weigh no more than a budget that
//! the ledger has noted (or they are a single batch): after a restart, everything within that budget counts as
//! in flight.
//!
//! Who owns what: the worker claims a batch before it looks into it; the writer tells what was noted, and holds the
//! lock while it gives batches up, from the decision to the end of the transaction. A worker that had read a batch
//! before and claims it afterwards learns that it has to read again.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Position;

/// The claims of one sink.
pub(super) struct Claims {
    state: Mutex<State>,
    /// Something was noted as delivered.
    noted: Condvar,
    /// Bytes in flight at most.
    budget: u64,
}

pub(super) struct State {
    /// Everything up to this batch is in flight or delivered.
    claimed: i64,
    /// The batches in flight with their bytes, oldest first.
    in_flight: VecDeque<(i64, u64)>,
    bytes: u64,
    /// How often batches were given up.
    generation: u64,
}

/// What became of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// The batch is the worker's.
    Granted,
    /// Batches were given up since it was read, perhaps this one: read again.
    Outdated,
    /// Too much is in flight: what was taken has to be delivered first.
    Full,
}

impl Claims {
    /// `in_flight` is what may be in flight at the start, with its bytes, oldest first.
    pub(super) fn new(budget: u64, position: Position, in_flight: Vec<(i64, u64)>) -> Self {
        let state = State {
            claimed: in_flight.last().map_or(position.batch - 1, |(last, _)| *last),
            bytes: in_flight.iter().map(|(_, bytes)| bytes).sum(),
            in_flight: in_flight.into(),
            generation: 0,
        };
        Self { state: Mutex::new(state), noted: Condvar::new(), budget }
    }

    /// To be asked before a batch is read.
    pub(super) fn generation(&self) -> u64 {
        self.lock().generation
    }

    /// Takes a batch that was read in a generation. When too much is in flight, waits at most `patience` until some
    /// of it is noted as delivered.
    pub(super) fn claim(&self, batch: i64, bytes: u64, generation: u64, patience: Duration) -> Claim {
        let is_full = |state: &mut State| {
            batch > state.claimed && !state.in_flight.is_empty() && state.bytes + bytes > self.budget
        };
        let waited = self.noted.wait_timeout_while(self.lock(), patience, is_full);
        let (mut guard, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let state = &mut *guard;
        // Whoever starts over gets what he had.
        if batch <= state.claimed {
            return Claim::Granted;
        }
        if state.generation != generation {
            return Claim::Outdated;
        }
        if is_full(state) {
            return Claim::Full;
        }
        state.in_flight.push_back((batch, bytes));
        state.bytes += bytes;
        state.claimed = batch;
        Claim::Granted
    }

    /// Everything before a position is delivered, durably noted.
    pub(super) fn deliver(&self, position: Position) {
        let mut guard = self.lock();
        let state = &mut *guard;
        while let Some((oldest, bytes)) = state.in_flight.front()
            && *oldest < position.batch
        {
            state.bytes -= bytes;
            state.in_flight.pop_front();
        }
        state.claimed = state.claimed.max(position.batch - 1);
        self.noted.notify_all();
    }

    /// As long as the lock is held, nothing is claimed.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent between any two statements above.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Everything up to this batch is in flight or delivered.
    pub(super) fn claimed(&self) -> i64 {
        self.claimed
    }

    /// Batches behind [`State::claimed`] are gone.
    pub(super) fn gave_up(&mut self) {
        self.generation += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims(budget: u64, in_flight: &[(i64, u64)]) -> Claims {
        Claims::new(budget, Position { batch: 5, line: 0 }, in_flight.to_vec())
    }

    impl Claims {
        fn claim_now(&self, batch: i64, bytes: u64) -> Claim {
            self.claim(batch, bytes, self.generation(), Duration::ZERO)
        }
    }

    #[test]
    fn what_is_in_flight_fits_the_budget_or_is_alone() {
        let claims = claims(10, &[]);
        assert_eq!(claims.claim_now(5, 100), Claim::Granted);
        assert_eq!(claims.claim_now(6, 1), Claim::Full);
        claims.deliver(Position { batch: 5, line: 99 });
        assert_eq!(claims.claim_now(6, 1), Claim::Full);
        claims.deliver(Position { batch: 6, line: 0 });
        for batch in [6, 8] {
            assert_eq!(claims.claim_now(batch, 5), Claim::Granted);
        }
        assert_eq!(claims.claim_now(9, 1), Claim::Full);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| claims.claim(9, 5, 0, Duration::from_secs(3600)));
            claims.deliver(Position { batch: 7, line: 0 });
            assert_eq!(waiting.join().unwrap(), Claim::Granted);
        });
        assert_eq!(claims.lock().claimed(), 9);
    }

    #[test]
    fn what_was_taken_is_taken_again_and_what_is_new_is_read_again() {
        let claims = claims(10, &[(5, 4), (6, 4)]);
        claims.lock().gave_up();
        for (batch, expected) in [(5, Claim::Granted), (6, Claim::Granted), (7, Claim::Outdated)] {
            assert_eq!(claims.claim(batch, 1, 0, Duration::ZERO), expected);
        }
        assert_eq!(claims.claim_now(7, 3), Claim::Full);
        assert_eq!(claims.claim_now(7, 2), Claim::Granted);
    }

    #[test]
    fn a_sink_that_is_ahead_has_nothing_in_flight() {
        let claims = claims(10, &[(5, 4), (6, 4)]);
        claims.deliver(Position { batch: 20, line: 3 });
        assert_eq!(claims.lock().claimed(), 19);
        assert_eq!(claims.claim_now(20, 100), Claim::Granted);
    }
}
