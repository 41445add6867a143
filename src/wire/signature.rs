//! Which bytes of a line are signed, and where its signature is.
//!
//! The signature is Ed25519 (RFC 8032) over the received bytes with the signature taken out;
//! nothing is re-serialised. A cut takes only bytes that have exactly one allowed spelling, so that
//! no byte of a line can change without either breaking the signature or making the line malformed.

use std::borrow::Cow;
use std::ops::Range;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::event::{Format, Malformed};

/// The bytes of one signed message: those before the signature and those after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading<'a> {
    /// The bytes before the cut.
    pub before: &'a [u8],
    /// The bytes after the cut.
    pub after: &'a [u8],
}

impl<'a> Reading<'a> {
    /// Returns a message without a cut, for lines that carry no signature.
    pub fn whole(line: &'a [u8]) -> Self {
        Self { before: line, after: &[] }
    }

    /// Returns the same cut in other bytes.
    pub(super) fn map<'b>(self, part: impl Fn(&'a [u8]) -> &'b [u8]) -> Reading<'b> {
        Reading { before: part(self.before), after: part(self.after) }
    }

    /// Returns the message in one piece; borrowed where the cut is at its end.
    pub fn message(&self) -> Cow<'a, [u8]> {
        if self.after.is_empty() {
            Cow::Borrowed(self.before)
        } else {
            Cow::Owned([self.before, self.after].concat())
        }
    }
}

/// A line's signature as it is spelled, and the messages over which it may have been made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signed<'a> {
    /// The signature's text: base64url, unchecked.
    pub value: &'a [u8],
    /// The reading that is tried first.
    pub first: Reading<'a>,
    /// CPS only: it is not documented whether the whole line or the inner object is signed.
    pub second: Option<Reading<'a>>,
}

/// Reason why a signature's text is not a signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// Not base64url, or not the one spelling of its bytes.
    #[error("the signature is not base64url (RFC 4648, section 5)")]
    Encoding,
    /// Ed25519 signatures have 64 bytes.
    #[error("the signature has {0} bytes instead of 64")]
    Length(usize),
}

/// Decodes a signature: 86 characters of base64url, or 88 with padding. Non-zero trailing bits are
/// refused, since they would be a second spelling of the same signature.
pub fn decode(value: &(impl AsRef<[u8]> + ?Sized)) -> Result<[u8; 64], SignatureError> {
    let value = value.as_ref();
    let digits = value.strip_suffix(b"==").filter(|digits| digits.len() == 86).unwrap_or(value);
    let bytes = URL_SAFE_NO_PAD.decode(digits).map_err(|_| SignatureError::Encoding)?;
    let length = bytes.len();
    bytes.try_into().map_err(|_| SignatureError::Length(length))
}

/// Encodes a signature as Konnect does: base64url without padding.
pub fn encode(signature: &[u8; 64]) -> String {
    URL_SAFE_NO_PAD.encode(signature)
}

/// Adds a signature to a line that has none: at the end of a CEF line, as the last member of a JSON
/// object, as the last member of the inner object of a CPS line. The message that must have been
/// signed is the given line, whole.
pub fn insert(format: Format, line: &mut Vec<u8>, signature: &[u8; 64]) {
    let value = encode(signature);
    let closing = match format {
        Format::Cef => {
            line.extend_from_slice(b" sig=");
            line.extend_from_slice(value.as_bytes());
            return;
        }
        Format::Json => 1,
        Format::Cps => 2,
    };
    let end = line.split_off(line.len().saturating_sub(closing));
    if line.last() != Some(&b'{') {
        line.push(b',');
    }
    line.extend_from_slice(b"\"sig\":\"");
    line.extend_from_slice(value.as_bytes());
    line.push(b'"');
    line.extend_from_slice(&end);
}

/// Cuts a CEF line: the signature is the last ` sig=` and extends to the line's end; the one space
/// before it belongs to the cut.
pub(super) fn cut_cef(line: &str) -> Option<Signed<'_>> {
    let bytes = line.as_bytes();
    memchr::memrchr_iter(b'=', bytes).find_map(|at| {
        let before = bytes[..at].strip_suffix(b" sig")?;
        Some(Signed { value: &bytes[at + 1..], first: Reading::whole(before), second: None })
    })
}

/// Cuts the member `sig` out of a JSON text: with the comma before it, or, when it is the first
/// member, with the comma after it. `key` is the range of its key, quotes included, and `value`
/// that of its value.
///
/// The white space inside the cut is not signed, so only the spellings `,"sig":` and `, "sig": `
/// are allowed.
pub(super) fn cut_member(
    text: &str,
    key: Range<usize>,
    value: Range<usize>,
    is_first: bool,
) -> Result<Range<usize>, Malformed> {
    const SPACE: Malformed =
        Malformed(Cow::Borrowed("white space around the member `sig` which no signature covers"));
    let bytes = text.as_bytes();
    if !matches!(&bytes[key.end..value.start], b":" | b": ") {
        return Err(SPACE);
    }
    if is_first {
        return match bytes.get(value.end) {
            Some(b',') => Ok(key.start..value.end + 1),
            Some(b'}') => Ok(key.start..value.end),
            _ => Err(SPACE),
        };
    }
    let before = &bytes[..key.start];
    if before.ends_with(b",") {
        Ok(key.start - 1..value.end)
    } else if before.ends_with(b", ") {
        Ok(key.start - 2..value.end)
    } else {
        Err(SPACE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_has_one_encoding_apart_from_padding() {
        let bytes = [0xA5; 64];
        let text = encode(&bytes);
        assert_eq!(text.len(), 86);
        assert_eq!(decode(&text), Ok(bytes));
        assert_eq!(decode(&format!("{text}==")), Ok(bytes));
        assert_eq!(decode(&format!("{text}=")), Err(SignatureError::Encoding));
        // Four bits of the last digit belong to no byte.
        let last = text.chars().last().unwrap();
        for other in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_".chars() {
            let changed = format!("{}{other}", &text[..85]);
            assert_eq!(decode(&changed).is_ok_and(|read| read == bytes), other == last, "{changed}");
        }
    }

    #[test]
    fn the_documentations_short_signature_is_reported_by_its_length() {
        let short = "JxJaQG3Bozrb5WdHE_Y0HaOsim2F1Xsq_bCfk71VgsfldkLAD_SF234cnKNS";
        assert_eq!(decode(short), Err(SignatureError::Length(45)));
        assert_eq!(decode(&"A".repeat(88)), Err(SignatureError::Length(66)));
        assert_eq!(decode(&format!("{}==", "A".repeat(90))), Err(SignatureError::Encoding));
        assert_eq!(decode("not base64!"), Err(SignatureError::Encoding));
        assert_eq!(decode(""), Err(SignatureError::Length(0)));
    }

    #[test]
    fn the_signature_of_a_cef_line_is_the_last_one() {
        let signed = cut_cef("a user_agent=x sig=forged y sig=real").unwrap();
        assert_eq!(signed.value, b"real");
        assert_eq!(signed.first.before, b"a user_agent=x sig=forged y");
        assert!(cut_cef("a\tsig=real").is_none());
    }
}
