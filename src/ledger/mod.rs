//! What we have promised: which events were accepted, which batches are not delivered yet, and how
//! far each sink has come. One SQLite database in `data_dir`, and all state that matters is in it.
//!
//! Ownership: one thread, the [`writer`], holds the only connection that writes; everything else
//! sends it messages through the [`Ledger`]. What can be done for a line without the database is
//! done before it gets a batch ([`lines`]). A commit puts the new fingerprints ([`seen`]) and the
//! batch ([`outbox`]) into one transaction; commits that wait at the same time share it and its
//! fsync. Only then is a [`CommitReceipt`] created, and without one there is no 200.
//!
//! Durability: WAL with `synchronous=FULL`, so a committed transaction survives power loss. What a
//! sink has delivered may be recorded a little late (a sink finds out by itself what it has, see
//! `deliver::sink::Sink`), but a batch is never forgotten before every sink's own fsync.

mod batch;
mod delivery;
mod error;
mod evict;
mod file_identity;
mod handle;
mod identity;
mod leaf;
mod lines;
mod outbox;
mod queue;
mod registry;
mod schema;
mod seen;
mod spare_space;
mod subscription;
mod verdicts;
mod writer;

pub use batch::{Batch, Checkpoint, CommitReceipt, Committed};
pub use delivery::Backlog;
pub use error::{CommitError, Failed, OpenError};
pub use handle::{Ledger, LedgerOptions, Running};
pub use identity::{Identifier, Identity};
pub use lines::{Entry, Lines};
pub use outbox::{Body, Next, Outbox, StoredBatch};
pub use seen::Window;
pub use subscription::{Forgetting, Pending, Position, Resume, Skipped, Streams, Subscription};
pub use verdicts::Verdicts;

#[cfg(test)]
mod tests;
