//! Which keys we believe, and what they say about lines.
//!
//! [`jwks`] reads a published key set, [`keyring`] keeps one source's set fresh and on disk, [`verify`] judges
//! many lines at once.

pub mod jwks;
pub mod keyring;
pub mod verify;
