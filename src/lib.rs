//! skeleton
pub mod cli;
pub mod net;
pub mod trust;
