//! The extension of a CEF line: which of its `key=value` pairs the producer wrote.
//!
//! Konnect is not known to escape `=`, so a value that a caller chose (free text) may hold `
//! key=value`. The rule, which `docs/fields.md` explains:
//!
//! 1. Everything before the first free text is the producer's and keeps its value, whatever
//!    follows.
//! 2. Free text ends only at a key that every event of that type and outcome has and that occurs
//!    once in the extension: the producer wrote it once, so a caller did not. From there the pairs
//!    are the producer's again, until the next free text.
//! 3. Anything else that looks like a key in free text is a part of it, and ambiguous; so is the
//!    key of that free text.
//!
//! Of the pairs that are the producer's, one with the name of a header field, or one that occurs
//! twice, is ambiguous and not a field.

use std::borrow::Cow;
use std::ops::Range;

use super::super::event::schema::{FREE_TEXT, HEADER, MOST_PRESENT};
use super::super::line::{Field, Notation, take_repeated};

/// Appends the fields of an extension to `fields` and returns the ambiguous keys. `always_present`
/// are the keys that every such event has: at most [`MOST_PRESENT`].
pub(super) fn read<'a>(
    text: &'a str,
    always_present: &[&str],
    fields: &mut Vec<Field<'a>>,
) -> Vec<Cow<'a, str>> {
    let tokens = tokens(text);
    let mut occurs_once = [None; MOST_PRESENT];
    let mut ends_free_text = |key: &str| {
        let Some(at) = always_present.iter().position(|present| *present == key) else { return false };
        let occurs_once = occurs_once.get_mut(at);
        occurs_once.is_some_and(|known| {
            *known.get_or_insert_with(|| {
                tokens.iter().filter(|token| text[token.key.clone()] == *key).nth(1).is_none()
            })
        })
    };
    let first = fields.len();
    let mut ambiguous = Vec::new();
    // Number of fields up to the first free text.
    let mut before_free_text = None;
    // Where the unfinished free text begins, and whether it holds a key.
    let mut free_text: Option<(usize, bool)> = None;
    for token in &tokens {
        let key = &text[token.key.clone()];
        if let Some((start, holds_key)) = &mut free_text
            && !ends_free_text(key)
            && let Some(field) = fields.last_mut()
        {
            field.value = Cow::Borrowed(&text[*start..token.end]);
            if !std::mem::replace(holds_key, true) {
                ambiguous.push(field.key.clone());
            }
            ambiguous.push(Cow::Borrowed(key));
            continue;
        }
        free_text = None;
        if HEADER.contains(&key) || key == "sig" {
            ambiguous.push(Cow::Borrowed(key));
            continue;
        }
        let value = Cow::Borrowed(&text[token.value()]);
        fields.push(Field { key: Cow::Borrowed(key), value, notation: Notation::Extension });
        if FREE_TEXT.contains(&key) {
            free_text = Some((token.value().start, false));
            before_free_text.get_or_insert(fields.len());
        }
    }
    let kept_before = before_free_text.unwrap_or(fields.len());
    ambiguous.extend(take_repeated(fields, first, kept_before));
    ambiguous
}

/// Returns whether a text begins with `key=`.
pub(super) fn begins_with_key(text: &str) -> bool {
    next_key(text, 0).is_some_and(|key| key.start == 0)
}

/// A `key=value` pair of an extension, by its offsets.
struct Token {
    key: Range<usize>,
    /// End of the value, which begins behind the `=`.
    end: usize,
}

impl Token {
    fn value(&self) -> Range<usize> {
        self.key.end + 1..self.end
    }
}

/// Returns the pairs of an extension. A key is at the start or behind a space and consists of
/// letters, digits and `_ . , - [ ]`; its value extends to the space before the next key.
fn tokens(text: &str) -> Vec<Token> {
    let mut tokens: Vec<Token> = Vec::with_capacity(24);
    let mut from = 0;
    while let Some(key) = next_key(text, from) {
        if let Some(last) = tokens.last_mut() {
            last.end = from.max(key.start - 1);
        }
        from = key.end + 1;
        tokens.push(Token { key, end: text.len() });
    }
    tokens
}

/// Returns the first key at or behind `from`.
fn next_key(text: &str, mut from: usize) -> Option<Range<usize>> {
    let bytes = text.as_bytes();
    while let Some(found) = memchr::memchr(b'=', &bytes[from..]) {
        let equals = from + found;
        let start =
            bytes[from..equals].iter().rposition(|byte| !is_key_byte(*byte)).map_or(from, |at| from + at + 1);
        let behind_space = start == 0 || bytes[start - 1] == b' ';
        from = equals + 1;
        if start < equals && behind_space {
            return Some(start..equals);
        }
    }
    None
}

fn is_key_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b',' | b'-' | b'[' | b']')
}
