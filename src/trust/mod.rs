//! Which keys we believe.
pub mod verify;
