//! JSON strings in which everything hazardous is escaped, written in runs: nearly all text is
//! printable ASCII.

use crate::escape::is_hazardous;

/// Number of bytes that are escaped together.
const PIECE: usize = 16;

/// Appends a JSON string.
pub(super) fn write_text(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    let mut rest = text;
    loop {
        let (plain, behind) = rest.split_at(plain_length(rest.as_bytes()));
        out.extend_from_slice(plain.as_bytes());
        rest = match behind.as_bytes().first_chunk::<PIECE>() {
            _ if behind.is_empty() => break,
            Some(piece) if is_printable(piece) => {
                write_with_backslashes(out, piece);
                &behind[PIECE..]
            }
            _ => {
                let (odd, behind) = behind.split_at(end_of_character(behind, PIECE));
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
    if is_printable(json.as_bytes()) {
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
    let (words, tail) = bytes.as_chunks::<WORD>();
    if let Some(at) = words.iter().position(|word| !is_plain(*word)) {
        return at * WORD;
    }
    let is_tail_plain = match bytes.last_chunk() {
        Some(last) => is_plain(*last),
        None => tail.iter().all(|byte| matches!(byte, b' ' | b'!' | b'#'..=b'[' | b']'..=b'~')),
    };
    if is_tail_plain { bytes.len() } else { bytes.len() - tail.len() }
}

/// Number of bytes that are looked at together.
const WORD: usize = 8;

/// Returns whether no byte needs an escape in a JSON string.
fn is_plain(bytes: [u8; WORD]) -> bool {
    let word = u64::from_ne_bytes(bytes);
    let each = |byte| u64::from_ne_bytes([byte; WORD]);
    // The highest bit of a byte of these is set if it, or one below it, is zero.
    let zero = |word: u64| word.wrapping_sub(each(1)) & !word;
    let is_control = word.wrapping_sub(each(b' ')) | word.wrapping_add(each(1)) | word;
    let needs_backslash = zero(word ^ each(b'"')) | zero(word ^ each(b'\\'));
    (is_control | needs_backslash) & each(0x80) == 0
}

/// Returns whether bytes are ASCII without controls.
fn is_printable(bytes: &[u8]) -> bool {
    // Without a branch for each byte, so that many are compared at a time.
    !bytes.iter().fold(false, |found, byte| found | !(0x20..0x7f).contains(byte))
}

/// Appends printable ASCII, a backslash before each `"` and each `\`.
fn write_with_backslashes(out: &mut Vec<u8>, piece: &[u8; PIECE]) {
    const MOST: usize = 2 * PIECE;
    let start = out.len();
    out.extend_from_slice(&[0; MOST]);
    let mut length = 0;
    if let Some(escaped) = out.last_chunk_mut::<MOST>() {
        // Without a branch for each byte: the processor could not predict where the quotes are.
        for byte in piece {
            escaped[length % MOST] = b'\\';
            length += usize::from(matches!(byte, b'"' | b'\\'));
            escaped[length % MOST] = *byte;
            length += 1;
        }
    }
    out.truncate(start + length);
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
