//! The wire format, both directions. Pure: no I/O, clock, async, metrics or configuration.
//!
//! A body becomes lines in [`batch`]; a line is recognised and taken apart in [`mod@line`] with the help of
//! [`cef`], [`json`] and [`signature`]; what it says, in whichever format it came, is an [`event::Event`].
//! [`record`] holds what we write ourselves and read back later.

pub mod batch;
pub mod cef;
pub mod event;
pub mod json;
pub mod line;
pub mod record;
pub mod signature;
