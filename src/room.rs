//! The memory that all batches in work may take together (`limits.in_flight`).
//!
//! A batch reserves as its bytes arrive and as they inflate, never what a peer claims, and gives everything back
//! when it is done.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The whole room. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Room {
    free: Arc<Semaphore>,
    patience: Duration,
}

/// What one batch holds of it.
#[derive(Debug)]
pub struct Reservation {
    room: Room,
    held: Option<OwnedSemaphorePermit>,
    /// Bytes that were asked for.
    wanted: usize,
}

/// The grain of the accounting, in bytes.
const GRAIN: usize = 4096;

impl Room {
    /// A room of so many bytes, in which a batch that finds no space waits at most `patience` for each step.
    pub fn new(bytes: usize, patience: Duration) -> Self {
        let grains = (bytes / GRAIN).clamp(1, Semaphore::MAX_PERMITS);
        Self { free: Arc::new(Semaphore::new(grains)), patience }
    }

    /// A reservation that holds nothing yet.
    pub fn reservation(&self) -> Reservation {
        Reservation { room: self.clone(), held: None, wanted: 0 }
    }
}

impl Reservation {
    /// Takes more bytes; false when there was no space in time. What it held before it keeps.
    pub async fn grow(&mut self, bytes: usize) -> bool {
        let wanted = self.wanted.saturating_add(bytes);
        let held = self.held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let Ok(more) = u32::try_from(wanted.div_ceil(GRAIN).saturating_sub(held)) else {
            return false;
        };
        if more > 0 {
            let acquired = Arc::clone(&self.room.free).acquire_many_owned(more);
            let Ok(Ok(permit)) = tokio::time::timeout(self.room.patience, acquired).await else {
                return false;
            };
            match &mut self.held {
                Some(held) => held.merge(permit),
                none => *none = Some(permit),
            }
        }
        self.wanted = wanted;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_held_is_given_back() {
        let room = Room::new(10 * GRAIN, Duration::from_secs(1));
        let mut first = room.reservation();
        assert!(first.grow(1).await && first.grow(GRAIN - 1).await && first.grow(8 * GRAIN).await);
        let mut second = room.reservation();
        assert!(second.grow(GRAIN).await);
        assert!(!second.grow(1).await, "the room is full");
        assert!(!room.reservation().grow(usize::MAX).await);
        drop(first);
        assert!(second.grow(9 * GRAIN).await);
    }
}
