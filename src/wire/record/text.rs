//! JSON strings in which everything hazardous is escaped, written in runs: nearly all text is
//! printable ASCII.

use crate::escape::is_hazardous;

/// Number of bytes that are looked at together.
const WORD: usize = 8;

/// Appends a JSON string.
pub(super) fn write_text(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    let mut rest = text;
    loop {
        let (plain, behind) = rest.split_at(plain_length(rest.as_bytes()));
        out.extend_from_slice(plain.as_bytes());
        rest = match behind.as_bytes().first_chunk() {
            _ if behind.is_empty() => break,
            Some(word) if is_printable(*word) => {
                write_with_backslashes(out, *word);
                &behind[WORD..]
            }
            _ => {
                let (odd, behind) = behind.split_at(end_of_character(behind, WORD));
                write_odd(out, odd);
                behind
            }
        };
    }
    out.push(b'"');
}

/// Appends JSON as it was received. Outside strings only white space can be hazardous, and becomes
/// a space.
pub(super) fn write_json(out: &mut Vec<u8>, json: &str) {
    if json.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
        out.extend_from_slice(json.as_bytes());
        return;
    }
    for character in json.chars() {
        match character {
            '\t' | '\n' | '\r' => out.push(b' '),
            _ => write_harmless(out, character),
        }
    }
}

/// Returns a length up to which text needs no escape: all of it, or less than a word short of the
/// first byte that does.
fn plain_length(bytes: &[u8]) -> usize {
    let (words, tail) = bytes.as_chunks();
    if let Some(at) = words.iter().position(|word| !is_plain(*word)) {
        return at * WORD;
    }
    let is_tail_plain = match bytes.last_chunk() {
        Some(last) => is_plain(*last),
        None => tail.iter().all(|byte| matches!(byte, b' ' | b'!' | b'#'..=b'[' | b']'..=b'~')),
    };
    if is_tail_plain { bytes.len() } else { bytes.len() - tail.len() }
}

/// Returns whether no byte needs an escape.
fn is_plain(bytes: [u8; WORD]) -> bool {
    // Without a branch: both are nearly always so.
    is_printable(bytes) & (backslashes(bytes) == 0)
}

/// Returns whether all bytes are ASCII without controls.
fn is_printable(bytes: [u8; WORD]) -> bool {
    let word = u64::from_le_bytes(bytes);
    // The subtraction borrows, and the addition carries, only where the answer is no anyway.
    let odd = word.wrapping_sub(each(b' ')) | word.wrapping_add(each(1)) | word;
    odd & each(0x80) == 0
}

/// Returns a word with a byte 1 for each `"` and each `\`, and 0 for other bytes. Only right if all
/// bytes are ASCII.
fn backslashes(bytes: [u8; WORD]) -> u64 {
    let word = u64::from_le_bytes(bytes);
    let other = |byte| (word ^ each(byte)).wrapping_add(each(0x7f));
    (!(other(b'"') & other(b'\\')) & each(0x80)) >> 7
}

fn each(byte: u8) -> u64 {
    u64::from_le_bytes([byte; WORD])
}

/// Appends printable ASCII, a backslash before each `"` and each `\`.
fn write_with_backslashes(out: &mut Vec<u8>, bytes: [u8; WORD]) {
    const MOST: usize = 2 * WORD;
    // Each byte of the product is the sum of the bytes up to it: how far its character moves.
    let moved = backslashes(bytes).wrapping_mul(each(1)).to_le_bytes();
    let start = out.len();
    out.extend_from_slice(&[b'\\'; MOST]);
    if let Some(room) = out.last_chunk_mut::<MOST>() {
        // Without a branch: the processor could not predict where the quotes are.
        for at in 0..WORD {
            room[(at + usize::from(moved[at])) % MOST] = bytes[at];
        }
    }
    out.truncate(start + WORD + usize::from(moved[WORD - 1]));
}

/// Appends any text of a JSON string.
fn write_odd(out: &mut Vec<u8>, text: &str) {
    for character in text.chars() {
        match character {
            '"' => out.extend_from_slice(b"\\\""),
            '\\' => out.extend_from_slice(b"\\\\"),
            '\u{8}' => out.extend_from_slice(b"\\b"),
            '\t' => out.extend_from_slice(b"\\t"),
            '\n' => out.extend_from_slice(b"\\n"),
            '\u{c}' => out.extend_from_slice(b"\\f"),
            '\r' => out.extend_from_slice(b"\\r"),
            _ => write_harmless(out, character),
        }
    }
}

/// Appends a character, with its number where it is hazardous. All hazardous ones have four digits
/// at most.
fn write_harmless(out: &mut Vec<u8>, character: char) {
    if is_hazardous(character) {
        out.extend_from_slice(format!("\\u{:04x}", u32::from(character)).as_bytes());
    } else {
        out.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
    }
}

/// Returns the end of the character that reaches `at` or begins before it.
fn end_of_character(text: &str, at: usize) -> usize {
    (at..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len())
}
