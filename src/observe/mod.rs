//! What an operator sees of a running daemon: metrics, readiness, the log, and what systemd is told.
//!
//! Nothing here decides anything. The stages return what happened, the edge that called them counts it
//! here, and the names are those of the contract.

pub mod admin;
pub mod health;
#[cfg(test)]
mod log_messages;
pub mod logging;
pub mod metrics;
pub mod systemd;
