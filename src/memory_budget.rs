//! The memory that all batches in progress may take together (of `limits.in_flight`).
//!
//! A batch acquires memory as its bytes arrive and as they inflate, never what a peer claims, and
//! releases everything when it is done. A request that finds no memory waits briefly, then is
//! refused. Of requests that wait for each other's memory, the one that has waited longest is
//! refused first, and the others get what it held.
//!
//! A batch that takes more than a [`SMALL`]th of the budget, or whose body may, needs a permit of a
//! second semaphore, which leaves some memory to small batches: large ones cannot keep them out,
//! however many there are and however long they take.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError};
use tokio::time::{Instant, timeout};

/// The whole budget. Cheap to clone.
#[derive(Clone, Debug)]
pub struct MemoryBudget {
    shared: Arc<Shared>,
}

/// Semaphores that count KiB.
#[derive(Debug)]
struct Shared {
    all: Arc<Semaphore>,
    large: Arc<Semaphore>,
    /// Capacities of `all` and of `large`, in bytes.
    capacity: (usize, usize),
    /// Maximum size of a small batch, in bytes.
    small: usize,
    wait: Duration,
}

/// Memory that one batch holds of the budget.
#[derive(Debug)]
pub struct MemoryPermit {
    budget: MemoryBudget,
    /// Number of acquired bytes.
    bytes: usize,
    /// The body may be large.
    may_be_large: bool,
    /// Time for which it has waited.
    waited: Duration,
    all: Option<OwnedSemaphorePermit>,
    large: Option<OwnedSemaphorePermit>,
}

/// Memory of each line of a batch in addition to its bytes, in bytes: its identity, its verdict,
/// and a short text about what is wrong with it.
pub const LINE: usize = 256;

/// Memory that inflating takes at a time beyond what has been inflated, and what is lost to
/// rounding, in bytes.
const STEP: usize = 128 << 10;

/// Number of small batches that fit into `limits.in_flight`.
const SMALL: usize = 256;

/// Returns how much of `limits.in_flight` all large batches may take, and a single one, in bytes: a
/// sixteenth is left for small batches, and another for the batch that the ledger writes and for
/// those that sinks read.
pub fn largest(in_flight: usize) -> usize {
    in_flight - in_flight / 8
}

/// Returns the memory of a batch, in bytes, given its received bytes, inflated bytes and lines: all
/// three are held together. A batch that needs more than [`largest`] can never be taken.
pub fn needed(body: usize, decoded: usize, lines: usize) -> usize {
    body.saturating_add(decoded).saturating_add(lines.saturating_mul(LINE)).saturating_add(STEP)
}

impl MemoryBudget {
    /// Creates the budget for a `limits.in_flight` in bytes. A batch waits for memory for at most
    /// `wait` altogether.
    pub fn new(in_flight: usize, wait: Duration) -> Self {
        let capacity = (in_flight - in_flight / 16, largest(in_flight));
        let semaphore = |bytes| Arc::new(Semaphore::new(kib(bytes).min(Semaphore::MAX_PERMITS)));
        let (all, large) = (semaphore(capacity.0), semaphore(capacity.1));
        let small = in_flight / SMALL;
        Self { shared: Arc::new(Shared { all, large, capacity, small, wait }) }
    }

    /// Creates a permit that holds nothing yet, for a body of that many bytes, if that is known.
    /// While it waits for memory of large batches it holds none of the small ones'.
    pub fn permit(&self, body: Option<u64>) -> MemoryPermit {
        let may_be_large = body.is_none_or(|bytes| bytes > self.shared.small as u64);
        MemoryPermit {
            budget: self.clone(),
            bytes: 0,
            may_be_large,
            waited: Duration::ZERO,
            all: None,
            large: None,
        }
    }

    /// Returns the number of acquired bytes.
    pub fn used(&self) -> usize {
        self.shared.capacity.0.saturating_sub(self.shared.all.available_permits() * 1024)
    }
}

impl MemoryPermit {
    /// Acquires more bytes; returns false when there were none in time. It keeps what it held
    /// before.
    pub async fn grow(&mut self, bytes: usize) -> bool {
        if self.try_grow(bytes) {
            return true;
        }
        let (all, large) = self.missing(bytes);
        let budget = Arc::clone(&self.budget.shared);
        let asked = Instant::now();
        let acquired = timeout(budget.wait.saturating_sub(self.waited), async {
            merge(&mut self.large, Arc::clone(&budget.large).acquire_many_owned(large).await.ok());
            merge(&mut self.all, Arc::clone(&budget.all).acquire_many_owned(all).await.ok());
        });
        let is_acquired = acquired.await.is_ok();
        self.waited += asked.elapsed();
        if is_acquired {
            self.bytes += bytes;
        }
        is_acquired
    }

    /// Acquires more bytes without waiting.
    pub fn try_grow(&mut self, bytes: usize) -> bool {
        let (all, large) = self.missing(bytes);
        let budget = &self.budget.shared;
        let permits = Arc::clone(&budget.large).try_acquire_many_owned(large).and_then(|large| {
            Ok::<_, TryAcquireError>((Arc::clone(&budget.all).try_acquire_many_owned(all)?, large))
        });
        let Ok((all, large)) = permits else { return false };
        merge(&mut self.all, Some(all));
        merge(&mut self.large, Some(large));
        self.bytes += bytes;
        true
    }

    /// Returns for how long the batch has waited for memory.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Returns whether the batch would no longer be small with that many more bytes.
    pub fn would_be_large(&self, bytes: usize) -> bool {
        self.bytes.saturating_add(bytes) > self.budget.shared.small
    }

    /// Returns whether there would be memory for that many more bytes if the batch were alone.
    /// Otherwise waiting is useless.
    pub fn could_grow(&self, bytes: usize) -> bool {
        self.bytes.saturating_add(bytes) <= self.budget.shared.capacity.1
    }

    /// Returns the KiB that are missing of each semaphore for that many more bytes.
    fn missing(&self, bytes: usize) -> (u32, u32) {
        let wanted = self.bytes.saturating_add(bytes);
        let missing = |permit: &Option<OwnedSemaphorePermit>| {
            let held = permit.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
            u32::try_from(kib(wanted).saturating_sub(held)).unwrap_or(u32::MAX)
        };
        let is_small = !self.may_be_large && !self.would_be_large(bytes);
        (missing(&self.all), if is_small { 0 } else { missing(&self.large) })
    }
}

fn kib(bytes: usize) -> usize {
    bytes.div_ceil(1024)
}

fn merge(held: &mut Option<OwnedSemaphorePermit>, more: Option<OwnedSemaphorePermit>) {
    match (held.as_mut(), more) {
        (Some(held), Some(more)) => held.merge(more),
        (None, more) => *held = more,
        (Some(_), None) => {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    /// 16 parts, of which all batches may have 15 and large ones 14.
    const IN_FLIGHT: usize = 16 * PART;
    const PART: usize = 1 << 20;

    fn budget() -> MemoryBudget {
        MemoryBudget::new(IN_FLIGHT, SECOND)
    }

    #[tokio::test(start_paused = true)]
    async fn a_dropped_permit_releases_its_memory() {
        let budget = budget();
        let mut first = budget.permit(Some(0));
        assert!(first.grow(1).await && first.grow(PART - 1).await && first.grow(9 * PART).await);
        assert_eq!(budget.used(), 10 * PART);
        let mut second = budget.permit(Some(0));
        let begun = Instant::now();
        assert!(second.grow(4 * PART).await && !second.grow(1024).await);
        assert_eq!(begun.elapsed(), SECOND);
        assert!(second.could_grow(10 * PART) && !second.could_grow(10 * PART + 1));
        assert!(!budget.permit(Some(0)).grow(usize::MAX).await);
        drop(first);
        assert!(second.grow(10 * PART).await);
        drop(second);
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn large_batches_leave_memory_to_small_ones() {
        let budget = budget();
        let mut large = budget.permit(Some(0));
        assert!(large.grow(14 * PART).await);
        let mut small: Vec<_> = (0..4).map(|_| budget.permit(Some(0))).collect();
        for permit in &mut small {
            assert!(permit.try_grow(IN_FLIGHT / SMALL));
        }
        assert!(!small[0].grow(1).await, "it is no longer small");
        drop(large);
        assert!(small[0].grow(1).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_may_become_large_takes_no_memory_of_small_ones() {
        let budget = budget();
        let mut large: Vec<_> =
            [Some(PART as u64), None].into_iter().map(|body| budget.permit(body)).collect();
        assert!(large[0].grow(14 * PART).await && !large[1].grow(1).await);
        assert!(budget.permit(Some(1024)).grow(1024).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiting_request_gets_released_memory() {
        let budget = budget();
        let (mut first, mut second) = (budget.permit(Some(0)), budget.permit(Some(0)));
        assert!(first.grow(10 * PART).await);
        let (grown, ()) = tokio::join!(second.grow(10 * PART), async {
            tokio::time::sleep(SECOND / 2).await;
            drop(first);
        });
        assert!(grown);
        assert_eq!(budget.used(), 10 * PART);
    }

    #[tokio::test(start_paused = true)]
    async fn of_many_requests_that_do_not_fit_together_some_are_granted() {
        let budget = budget();
        let begun = Instant::now();
        let granted = Arc::new(AtomicUsize::new(0));
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..64 {
            let (budget, granted) = (budget.clone(), Arc::clone(&granted));
            tasks.spawn(async move {
                let mut permit = budget.permit(Some(0));
                for _ in 0..40 {
                    if !permit.grow(PART / 4).await {
                        return;
                    }
                    assert!(budget.used() <= 14 * PART);
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                granted.fetch_add(1, Ordering::Relaxed);
            });
        }
        while tasks.join_next().await.is_some() {}
        assert!(granted.load(Ordering::Relaxed) > 0);
        assert!(begun.elapsed() < 2 * SECOND, "{:?}", begun.elapsed());
        assert_eq!(budget.used(), 0);
    }
}
