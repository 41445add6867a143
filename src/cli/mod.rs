//! skeleton
pub mod exit;
pub mod keygen;
pub mod send;
