//! skeleton
pub mod exit;
