//! skeleton
pub mod cli;
pub mod ledger;
pub mod trust;
pub mod wire;
