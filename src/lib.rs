//! skeleton
pub mod cli;
pub mod observe;
