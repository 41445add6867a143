//! The wire format, both directions. Pure: no I/O, clock, async, metrics or configuration.
//!
//! A body is split into lines in [`batch`]; a line is recognised and taken apart in [`mod@line`]
//! with the help of [`cef`], [`json`] and [`signature`]; its content, in whichever format it came,
//! is an [`event::Event`]. [`record`] holds what we write ourselves and read back later.

#[doc(hidden)]
pub mod batch;
#[doc(hidden)]
pub mod cef;
pub mod event;
#[doc(hidden)]
pub mod json;
#[doc(hidden)]
pub mod line;
#[doc(hidden)]
pub mod record;
#[doc(hidden)]
pub mod signature;

use event::Malformed;
use line::{Field, Line, begins_like_json};
use signature::Signed;

impl<'a> Line<'a> {
    /// Recognises the format of a line without its terminator and takes it apart. A line that
    /// begins with `{` is JSON or CPS, every other one CEF. A line need not be UTF-8: its signed
    /// bytes are its own, and in its fields U+FFFD replaces what is not a character.
    ///
    /// # Errors
    /// The reason why it is not an event. Nothing that [`Line::event`] parses later can fail.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        match std::str::from_utf8(bytes) {
            Ok(text) => Self::parse_text(text),
            Err(_) => parse_lossy(bytes),
        }
    }

    /// Does what [`Line::parse`] does, for a line that is known to be UTF-8.
    fn parse_text(text: &'a str) -> Result<Self, Malformed> {
        if begins_like_json(text) { json::parse(text) } else { cef::parse(text) }
    }
}

/// Takes a line apart that is not UTF-8. All structure is ASCII, so it is the same whatever
/// replaces the invalid bytes: the fields come from a text with U+FFFD in their place, the signed
/// bytes from their positions in a text of the same length.
fn parse_lossy(bytes: &[u8]) -> Result<Line<'_>, Malformed> {
    let text = String::from_utf8_lossy(bytes);
    let read = Line::parse_text(&text)?;
    let mut aligned = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        aligned.push_str(chunk.valid());
        aligned.extend(chunk.invalid().iter().map(|_| '?'));
    }
    let signed = Line::parse_text(&aligned)?.signed.map(|signed| Signed {
        value: same_place(signed.value, &aligned, bytes),
        first: signed.first.map(|part| same_place(part, &aligned, bytes)),
        second: signed.second.map(|reading| reading.map(|part| same_place(part, &aligned, bytes))),
    });
    let fields = read.fields.into_iter().map(Field::into_owned).collect();
    let ambiguous = read.ambiguous.into_iter().map(|key| key.into_owned().into()).collect();
    Ok(Line { bytes, format: read.format, signed, fields, ambiguous })
}

/// Returns the part of `line` at the position of `part` in `text`, which has the same length.
fn same_place<'a>(part: &[u8], text: &str, line: &'a [u8]) -> &'a [u8] {
    if part.is_empty() {
        return &[];
    }
    let start = part.as_ptr() as usize - text.as_ptr() as usize;
    &line[start..start + part.len()]
}
