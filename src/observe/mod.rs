//! Observation of a running daemon: metrics, readiness, the log, and systemd's notifications.
//!
//! Nothing here decides anything. The stages return what happened, and their callers count it here.

pub mod admin;
pub mod health;
pub mod history;
#[cfg(test)]
mod log_messages;
pub mod logging;
pub mod metrics;
pub mod status;
pub mod systemd;
