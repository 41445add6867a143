//! Scheduling of the work on bodies: it is cut into steps of bounded cost, and after each step the
//! core goes to another waiting body.
//!
//! A core alternates between the body with the least work so far, its next step included, and the
//! body that came first. So a short body waits for no more than the steps in progress, whatever
//! else there is, and long ones finish, and release their memory, one after the other.
//!
//! The work runs on blocking threads, which wait for a core. There are fewer threads than bodies in
//! progress only when hundreds are.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// The cores. Costs are in signature checks, which take about 50 µs each.
#[derive(Debug)]
pub(super) struct Cores {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Number of cores without work; none while a body waits.
    free: usize,
    waiting: Vec<Waiting>,
    /// Number of bodies so far.
    next: u64,
    /// The last core went to the body with the least work.
    went_to_least: bool,
}

#[derive(Debug)]
struct Waiting {
    cost: u64,
    number: u64,
    give: oneshot::Sender<()>,
}

/// A body's use of a core, which is given back when it is dropped.
#[derive(Debug)]
pub(super) struct CoreGuard {
    cores: Arc<Cores>,
    cost: u64,
    /// An older body has a smaller one.
    number: u64,
    waited: Duration,
}

impl Cores {
    pub(super) fn new(count: usize) -> Self {
        Self { state: Mutex::new(State { free: count, waiting: Vec::new(), next: 0, went_to_least: false }) }
    }

    /// Waits, on a blocking thread, for a core for a body whose first step has this cost.
    pub(super) fn begin(self: &Arc<Self>, cost: u64) -> CoreGuard {
        let number = {
            let mut state = self.state.lock();
            state.next += 1;
            state.next
        };
        let asked = Instant::now();
        self.take(cost, number);
        CoreGuard { cores: Arc::clone(self), cost, number, waited: asked.elapsed() }
    }

    fn take(&self, cost: u64, number: u64) {
        let mut state = self.state.lock();
        if state.free > 0 {
            state.free -= 1;
            return;
        }
        let (give, given) = oneshot::channel();
        state.waiting.push(Waiting { cost, number, give });
        drop(state);
        // The sender is dropped only with everything else.
        let _ = given.blocking_recv();
    }

    fn give_back(&self) {
        let mut state = self.state.lock();
        while !state.waiting.is_empty() {
            state.went_to_least = !state.went_to_least;
            let rank =
                |waiting: &Waiting| (if state.went_to_least { waiting.cost } else { 0 }, waiting.number);
            let next = state.waiting.iter().enumerate().min_by_key(|(_, waiting)| rank(waiting));
            let next = next.map_or(0, |(at, _)| at);
            if state.waiting.swap_remove(next).give.send(()).is_ok() {
                return;
            }
        }
        state.free += 1;
    }
}

impl CoreGuard {
    /// Ends a step, before another one that costs this.
    pub(super) fn step(&mut self, cost: u64) {
        self.cost += cost;
        if !self.cores.state.lock().waiting.is_empty() {
            self.release_while(|| ());
        }
    }

    /// Releases the core while the body waits for something else.
    pub(super) fn release_while<T>(&mut self, wait: impl FnOnce() -> T) -> T {
        let asked = Instant::now();
        // In this order, so that the others come first.
        self.cores.give_back();
        let result = wait();
        self.cores.take(self.cost, self.number);
        self.waited += asked.elapsed();
        result
    }

    /// Returns how long the body has waited, for a core and for something else.
    pub(super) fn waited(&self) -> Duration {
        self.waited
    }
}

impl Drop for CoreGuard {
    fn drop(&mut self) {
        self.cores.give_back();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Waits until that many bodies wait.
    fn wait_for_waiting(cores: &Cores, count: usize) {
        while cores.state.lock().waiting.len() < count {
            std::thread::yield_now();
        }
    }

    #[test]
    fn the_core_goes_alternately_to_the_shortest_and_the_oldest_body() {
        let cores = Arc::new(Cores::new(1));
        let busy = cores.begin(0);
        let (say, said) = mpsc::channel();
        let threads: Vec<_> = [900, 800, 700, 1, 2]
            .into_iter()
            .enumerate()
            .map(|(at, cost)| {
                let (cores, say) = (Arc::clone(&cores), say.clone());
                let waiting = Arc::clone(&cores);
                let thread = std::thread::spawn(move || {
                    let _turn = cores.begin(cost);
                    say.send(cost).unwrap();
                });
                wait_for_waiting(&waiting, at + 1);
                thread
            })
            .collect();
        drop(busy);
        assert_eq!(said.iter().take(5).collect::<Vec<_>>(), [1, 900, 2, 800, 700]);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(cores.state.lock().free, 1);
    }

    #[test]
    fn a_long_body_yields_the_core_between_its_steps() {
        let cores = Arc::new(Cores::new(1));
        let mut long = cores.begin(1000);
        long.step(1000);
        let (say, said) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _turn = cores.begin(1);
                say.send("short").unwrap();
            });
            wait_for_waiting(&cores, 1);
            long.step(1000);
            say.send("long").unwrap();
        });
        assert_eq!(said.try_iter().collect::<Vec<_>>(), ["short", "long"]);
        assert_eq!(long.cost, 3000);
    }

    #[test]
    fn a_body_that_waits_for_something_else_holds_no_core() {
        let cores = Arc::new(Cores::new(1));
        let mut waiting = cores.begin(1);
        waiting.release_while(|| drop(cores.begin(1)));
        drop(waiting);
        assert_eq!(cores.state.lock().free, 1);
    }
}
