//! Escapes for text that must not control the reader's terminal, break a line or change the text
//! direction: for everything that we print, log or write as JSON.

use std::borrow::Cow;
use std::fmt;

/// Returns whether a character is a C0 or C1 control, DEL, a line or paragraph separator, or a
/// bidirectional control (Unicode UAX #9).
pub fn is_hazardous(character: char) -> bool {
    character.is_control()
        || matches!(character,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Notation of an escaped character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notation {
    /// `\u{202e}`.
    Human,
    /// `\u202e`, for text that already is JSON. A line feed stays: JSON strings contain none, so it
    /// ends the line.
    Json,
}

/// Writes text with its hazardous characters escaped.
///
/// # Errors
/// Those of `out`.
pub fn write_escaped(text: &str, notation: Notation, out: &mut dyn fmt::Write) -> fmt::Result {
    let mut written = 0;
    for (at, character) in text.char_indices().filter(|&(_, character)| is_hazardous(character)) {
        let code = u32::from(character);
        let escaped = match notation {
            Notation::Json if character == '\n' => continue,
            Notation::Json => format_args!("\\u{code:04x}"),
            Notation::Human => format_args!("\\u{{{code:x}}}"),
        };
        out.write_str(&text[written..at])?;
        out.write_fmt(escaped)?;
        written = at + character.len_utf8();
    }
    out.write_str(&text[written..])
}

/// Escapes text for a terminal or a log.
pub fn escape(text: &str) -> Cow<'_, str> {
    if !text.contains(is_hazardous) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    // Writing into memory cannot fail.
    let _ = write_escaped(text, Notation::Human, &mut out);
    Cow::Owned(out)
}

/// Escapes text that already is JSON: only its strings can hold something hazardous, and they keep
/// their values.
pub fn escape_json(json: &str) -> Cow<'_, str> {
    if !json.contains(is_hazardous) {
        return Cow::Borrowed(json);
    }
    let mut out = String::with_capacity(json.len() + 16);
    // Writing into memory cannot fail.
    let _ = write_escaped(json, Notation::Json, &mut out);
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escaped_json_keeps_its_value() {
        let hazard = "\u{7f}\u{9b}31m\u{202e}\u{2028}\n";
        let json = serde_json::to_string(hazard).unwrap();
        let harmless = escape_json(&json);
        assert!(json.contains(is_hazardous) && !harmless.contains(is_hazardous), "{harmless}");
        assert_eq!(serde_json::from_str::<String>(&harmless).unwrap(), hazard);
        assert_eq!(escape_json("{\"plain\": 1}"), "{\"plain\": 1}");
    }

    #[test]
    fn only_hazardous_characters_are_escaped() {
        assert_eq!(escape("plain Zürich 日本"), "plain Zürich 日本");
        assert_eq!(escape("a\u{1b}b\n\u{202e}"), "a\\u{1b}b\\u{a}\\u{202e}");
    }
}
