//! Delivery of the ledger's batches, each sink at its own speed.
//!
//! A [`worker`] reads batches in commit order and passes the lines that its sink takes to a
//! [`sink::Sink`]; what the sink reports as safe is recorded in the ledger. A failing sink delays
//! no other.

pub mod file;
mod rendered;
pub mod sink;
#[cfg(feature = "daemon")]
pub mod sqlite;
#[cfg(feature = "daemon")]
pub mod syslog;
pub mod worker;
pub mod workers;
