//! skeleton
pub mod check_config;
pub mod exit;
