//! The trusted keys, and the verification of lines.
//!
//! [`jwks`] parses a published key set, [`keyring`] keeps one source's set up to date and on disk,
//! [`verify`] verifies many lines at once.

pub mod jwks;
pub mod keyring;
pub mod verify;
