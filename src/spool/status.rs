//! What a spool is doing, for the log, the metrics and the status report.

use parking_lot::Mutex;

use crate::send::Receipt;

/// What is known about the deliveries. Shared behind an `Arc`.
#[derive(Debug, Default)]
pub struct SpoolStatus {
    state: Mutex<Deliveries>,
}

/// The deliveries so far. Times are in milliseconds since the Unix epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Deliveries {
    /// Number of batches that the receiver has taken.
    pub batches: u64,
    /// Number of events in them.
    pub events: u64,
    /// The sum of the receipts.
    pub receipts: Receipt,
    /// Number of lines that were set aside because the receiver refused them.
    pub refused: u64,
    /// Time of the last post; none before the first.
    pub last_attempt_at: Option<i64>,
    /// Status of the last response; none when there was none.
    pub last_response_code: Option<u16>,
    /// Error of the last post; none when it succeeded.
    pub last_error: Option<String>,
    /// No repetition will change the error: an operator has to act.
    pub is_paused: bool,
    /// Inputs that wait for room in the spool.
    #[doc(hidden)]
    pub held_inputs: u64,
}

impl SpoolStatus {
    /// Returns the present state.
    pub fn read(&self) -> Deliveries {
        self.state.lock().clone()
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut Deliveries)) {
        change(&mut self.state.lock());
    }
}
