//! The ledger's batches go out into the world, each sink at its own pace.
//!
//! A [`worker`] reads batches in commit order and hands the lines that its sink wants to a [`sink::Sink`];
//! what the sink says is safe, the ledger notes. A sink that fails delays no other.

pub mod file;
pub mod sink;
pub mod sqlite;
pub mod syslog;
pub mod worker;
