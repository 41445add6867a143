//! skeleton
pub mod cli;
