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

use event::Malformed;
use line::{Line, begins_like_json};

impl<'a> Line<'a> {
    /// Recognises the format of a line without its terminator and takes it apart. A line that begins with
    /// `{` is JSON or CPS, every other one CEF.
    ///
    /// # Errors
    /// What makes it no event. Nothing that [`Line::event`] reads later can fail.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let text = std::str::from_utf8(bytes).map_err(|_| Malformed::from("not UTF-8"))?;
        if begins_like_json(text) { json::parse(text) } else { cef::parse(text) }
    }
}
