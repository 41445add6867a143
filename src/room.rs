//! The memory that all batches in work may take together (of `limits.in_flight`).
//!
//! A batch reserves as its bytes arrive and as they inflate, never what a peer claims, and gives everything back
//! when it is done.
//!
//! When it becomes full: from the high water mark on no new batch comes in, until the low one is reached again, so
//! that what is left is for those that are in. Who finds no space waits, a short time only. When all that hold a
//! part wait for more, none could go on: the youngest is refused at once, until the oldest has what it needs. So of
//! those that are in at least one comes through.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

/// The whole room. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Room {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    patience: Duration,
    state: Mutex<State>,
}

/// Sizes are in grains. Batches go by a number that counts up, so that an older one has a smaller number.
#[derive(Debug)]
struct State {
    capacity: usize,
    next: u64,
    used: usize,
    /// Whether the high water mark was reached, and the low one not yet again.
    is_shut: bool,
    /// What each batch holds; none that holds nothing.
    held: BTreeMap<u64, usize>,
    /// What each waits for, and how it is told whether it got it.
    waiting: BTreeMap<u64, (usize, oneshot::Sender<bool>)>,
}

/// What one batch holds of it.
#[derive(Debug)]
pub struct Reservation {
    room: Room,
    number: u64,
    /// Bytes that were asked for.
    wanted: usize,
}

/// What each line of a batch takes besides its bytes while the batch is in work, in bytes: what it is recognised by,
/// its verdict, and a short text about what is wrong with it.
pub const LINE: usize = 256;

/// What inflating takes at a time beyond what has been inflated, and what is lost to the accounting, in bytes.
const STEP: usize = 128 << 10;

/// The grain of the accounting, in bytes.
const GRAIN: usize = 4096;

/// What all batches in work may take of `limits.in_flight`, in bytes: an eighth is left for the batch that the ledger
/// writes and for those that sinks read.
pub fn share(in_flight: usize) -> usize {
    in_flight - in_flight / 8
}

/// What a batch of so many received bytes, inflated bytes and lines may take, in bytes: all three are held
/// together. In a room that is smaller, such a batch could never be taken.
pub fn needed(body: usize, decoded: usize, lines: usize) -> usize {
    body.saturating_add(decoded).saturating_add(lines.saturating_mul(LINE)).saturating_add(STEP)
}

/// How many times its patience a batch waits for one step, if younger ones give way meanwhile.
const ROUNDS: u32 = 4;

impl Room {
    /// A room of so many bytes, in which a batch that finds no space waits for each step about as long as
    /// `patience`.
    pub fn new(bytes: usize, patience: Duration) -> Self {
        let state = State {
            capacity: grains(bytes),
            next: 0,
            used: 0,
            is_shut: false,
            held: BTreeMap::new(),
            waiting: BTreeMap::new(),
        };
        Self { shared: Arc::new(Shared { patience, state: Mutex::new(state) }) }
    }

    /// So many bytes from now on. What is held stays so, even where it is more.
    pub fn resize(&self, bytes: usize) {
        let mut state = self.shared.state();
        state.capacity = grains(bytes);
        state.settle();
    }

    /// A reservation that holds nothing yet.
    pub fn reservation(&self) -> Reservation {
        let mut state = self.shared.state();
        state.next += 1;
        Reservation { room: self.clone(), number: state.next, wanted: 0 }
    }

    /// Bytes that are taken.
    pub fn used(&self) -> usize {
        self.shared.state().used * GRAIN
    }
}

impl Reservation {
    /// Takes more bytes; false when there was no space in time. What it held before it keeps.
    pub async fn grow(&mut self, bytes: usize) -> bool {
        let wanted = self.wanted.saturating_add(bytes);
        let is_given = match self.ask(wanted) {
            Ok(is_given) => is_given,
            Err(told) => self.wait(told).await,
        };
        if is_given {
            self.wanted = wanted;
        }
        is_given
    }

    /// Whether there would be space for so many more bytes if the batch were alone. Otherwise waiting is of no use.
    pub fn could_grow(&self, bytes: usize) -> bool {
        let capacity = self.room.shared.state().capacity;
        self.wanted.saturating_add(bytes).div_ceil(GRAIN) <= capacity
    }

    /// Asks for what is missing: the answer, or how it will be told.
    fn ask(&self, wanted: usize) -> Result<bool, oneshot::Receiver<bool>> {
        let shared = &self.room.shared;
        let mut state = shared.state();
        // Of a wait that was broken off.
        state.waiting.remove(&self.number);
        let held = state.holds(self.number);
        let more = wanted.div_ceil(GRAIN).saturating_sub(held);
        if more == 0 || more > state.capacity.saturating_sub(held) {
            return Ok(more == 0);
        }
        let (tell, mut told) = oneshot::channel();
        state.waiting.insert(self.number, (more, tell));
        state.settle();
        told.try_recv().map_err(|_| told)
    }

    async fn wait(&self, mut told: oneshot::Receiver<bool>) -> bool {
        let shared = &self.room.shared;
        for round in 1..=ROUNDS {
            if let Ok(answer) = timeout(shared.patience, &mut told).await {
                return answer.unwrap_or(false);
            }
            let mut state = shared.state();
            if round == ROUNDS || !state.refuse_younger_than(self.number) {
                let is_waiting = state.waiting.remove(&self.number).is_some();
                state.settle();
                drop(state);
                return !is_waiting && told.try_recv().unwrap_or(false);
            }
        }
        false
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let shared = &self.room.shared;
        let mut state = shared.state();
        state.waiting.remove(&self.number);
        let held = state.held.remove(&self.number).unwrap_or(0);
        state.used -= held;
        state.settle();
    }
}

/// So many fit into `bytes`; there is always one.
fn grains(bytes: usize) -> usize {
    (bytes / GRAIN).max(1)
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing below panics between two changes that belong together.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn holds(&self, number: u64) -> usize {
        self.held.get(&number).copied().unwrap_or(0)
    }

    /// Gives what can be given, the oldest first, and refuses the youngest when nobody could go on.
    fn settle(&mut self) {
        let capacity = self.capacity;
        // The marks: seven eighths, three quarters.
        let (high, low) = (capacity - capacity / 8, capacity - capacity / 4);
        self.is_shut = if self.is_shut { self.used > low } else { self.used >= high };
        let numbers: Vec<u64> = self.waiting.keys().copied().collect();
        let mut is_door_free = true;
        for number in numbers {
            let Some((more, _)) = self.waiting.get(&number) else { continue };
            let (more, is_new) = (*more, self.holds(number) == 0);
            let may_enter = !is_new || (is_door_free && !self.is_shut);
            if may_enter && self.used + more <= capacity {
                self.used += more;
                *self.held.entry(number).or_default() += more;
                self.is_shut |= self.used >= high;
                self.answer(number, true);
            } else if is_new {
                // New ones come in one after the other.
                is_door_free = false;
            }
        }
        let is_stuck = self.held.keys().all(|number| self.waiting.contains_key(number));
        if is_stuck && let Some((&youngest, _)) = self.held.last_key_value() {
            self.answer(youngest, false);
        }
    }

    /// Refuses the youngest that holds something and waits, if it is younger.
    fn refuse_younger_than(&mut self, number: u64) -> bool {
        if self.holds(number) == 0 {
            return false;
        }
        let youngest = self.waiting.keys().rev().find(|number| self.held.contains_key(number)).copied();
        match youngest {
            Some(youngest) if youngest > number => {
                self.answer(youngest, false);
                true
            }
            _ => false,
        }
    }

    fn answer(&mut self, number: u64, is_given: bool) {
        if let Some((_, tell)) = self.waiting.remove(&number) {
            // Who does not listen any more gives it back when its reservation is dropped.
            let _ = tell.send(is_given);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const SOON: Duration = Duration::from_millis(1);

    #[tokio::test(start_paused = true)]
    async fn what_is_held_is_given_back() {
        let room = Room::new(10 * GRAIN, SECOND);
        let mut first = room.reservation();
        assert!(first.grow(1).await && first.grow(GRAIN - 1).await && first.grow(7 * GRAIN).await);
        let mut second = room.reservation();
        assert!(second.grow(GRAIN).await);
        assert_eq!(room.used(), 9 * GRAIN);
        assert!(second.grow(GRAIN).await, "who is in may take the rest");
        assert!(!second.grow(1).await, "the room is full");
        assert!(!room.reservation().grow(usize::MAX).await);
        assert!(second.could_grow(8 * GRAIN) && !second.could_grow(8 * GRAIN + 1));
        drop(first);
        assert!(second.grow(8 * GRAIN).await);
        drop(second);
        assert_eq!(room.used(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_room_opens_at_the_low_mark_only() {
        let room = Room::new(16 * GRAIN, SECOND);
        let mut parts = Vec::new();
        for _ in 0..7 {
            let mut part = room.reservation();
            assert!(part.grow(2 * GRAIN).await);
            parts.push(part);
        }
        // 14 of 16: the high mark.
        let (mut first, mut second) = (room.reservation(), room.reservation());
        assert!(!first.grow(1).await);
        assert!(parts[0].grow(GRAIN).await, "who is in may grow");
        parts.pop();
        // 13 of 16.
        assert!(!first.grow(1).await, "above the low mark");
        let waiting = async { (first.grow(GRAIN).await, second.grow(GRAIN).await) };
        tokio::pin!(waiting);
        assert!(timeout(SOON, &mut waiting).await.is_err());
        parts.pop();
        assert_eq!(waiting.await, (true, true));
    }

    #[tokio::test(start_paused = true)]
    async fn when_all_wait_the_youngest_gives_way_at_once() {
        let room = Room::new(16 * GRAIN, SECOND);
        let (mut first, mut second, mut third) = (room.reservation(), room.reservation(), room.reservation());
        assert!(first.grow(4 * GRAIN).await && second.grow(4 * GRAIN).await && third.grow(4 * GRAIN).await);
        let begun = tokio::time::Instant::now();
        let (first, second, third) = tokio::join!(
            async {
                let grown = first.grow(8 * GRAIN).await;
                drop(first);
                grown
            },
            async {
                let grown = second.grow(8 * GRAIN).await;
                drop(second);
                grown
            },
            async {
                let grown = third.grow(8 * GRAIN).await;
                drop(third);
                grown
            }
        );
        assert!(first && second && !third);
        assert!(begun.elapsed() < SOON);
        assert_eq!(room.used(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_in_vain_is_refused_and_older_ones_wait_for_the_younger() {
        let room = Room::new(16 * GRAIN, SECOND);
        let (mut busy, mut older, mut younger) = (room.reservation(), room.reservation(), room.reservation());
        assert!(busy.grow(4 * GRAIN).await && older.grow(4 * GRAIN).await && younger.grow(4 * GRAIN).await);
        let (older, younger) = tokio::join!(async { (older.grow(8 * GRAIN).await, older) }, async {
            let grown = younger.grow(8 * GRAIN).await;
            drop(younger);
            grown
        });
        assert!(older.0 && !younger);
        let begun = tokio::time::Instant::now();
        assert!(!busy.grow(8 * GRAIN).await);
        assert!(begun.elapsed() >= SECOND && begun.elapsed() < 2 * SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_that_is_broken_off_leaves_nothing_behind() {
        let room = Room::new(8 * GRAIN, SECOND);
        let (mut first, mut second) = (room.reservation(), room.reservation());
        assert!(first.grow(6 * GRAIN).await && second.grow(GRAIN).await);
        assert!(timeout(SOON, second.grow(4 * GRAIN)).await.is_err());
        drop(first);
        assert!(second.grow(GRAIN).await);
        drop(second);
        assert_eq!(room.used(), 0);
        assert!(room.shared.state().waiting.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_room_can_become_larger_and_smaller() {
        let room = Room::new(8 * GRAIN, SECOND);
        let (mut first, mut second) = (room.reservation(), room.reservation());
        assert!(first.grow(6 * GRAIN).await && !second.grow(4 * GRAIN).await);
        {
            let waiting = second.grow(4 * GRAIN);
            tokio::pin!(waiting);
            assert!(timeout(SOON, &mut waiting).await.is_err());
            room.resize(16 * GRAIN);
            assert!(timeout(SOON, waiting).await.expect("at once"));
        }

        // Less than is held.
        room.resize(4 * GRAIN);
        assert_eq!(room.used(), 10 * GRAIN);
        assert!(!second.grow(1).await && !room.reservation().grow(1).await);
        drop(first);
        assert!(!room.reservation().grow(1).await);
        drop(second);
        assert!(!room.reservation().grow(5 * GRAIN).await && room.reservation().grow(4 * GRAIN).await);
        assert_eq!(room.used(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn of_many_that_do_not_fit_together_some_come_through() {
        let room = Room::new(64 * GRAIN, SECOND);
        let through = Arc::new(AtomicUsize::new(0));
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..64 {
            let (room, through) = (room.clone(), Arc::clone(&through));
            tasks.spawn(async move {
                let mut reservation = room.reservation();
                for _ in 0..40 {
                    if !reservation.grow(GRAIN).await {
                        return;
                    }
                    assert!(room.used() <= 64 * GRAIN);
                    tokio::time::sleep(SOON).await;
                }
                through.fetch_add(1, Ordering::Relaxed);
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended.unwrap();
        }
        assert!(through.load(Ordering::Relaxed) >= 1);
        assert_eq!(room.used(), 0);
    }
}
