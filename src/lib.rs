//! skeleton
pub mod cli;
pub mod wire;
