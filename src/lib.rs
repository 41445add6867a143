//! skeleton
pub mod cli;
pub mod net;
pub mod send;
pub mod trust;
pub mod wire;
