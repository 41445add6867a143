//! Which keys we believe: a JWKS document becomes a [`jwks::KeySet`], and a
//! [`keyring::KeyRing`] per source loads it, keeps it fresh and remembers it across restarts.

pub mod jwks;
pub mod keyring;
