//! A verifier of lines that shares no code with the daemon, written from the format's description
//! alone.

use std::ops::Range;

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};

use super::Class;

/// Splits, reads and cuts lines in its own way; aws-lc-rs checks the signatures.
pub(super) struct ReferenceVerifier {
    keys: Vec<UnparsedPublicKey<Vec<u8>>>,
}

impl ReferenceVerifier {
    /// A verifier that trusts the public halves of these seeds.
    pub(super) fn new(seeds: impl Iterator<Item = [u8; 32]>) -> Self {
        let public = |seed: [u8; 32]| {
            let pair = Ed25519KeyPair::from_seed_unchecked(&seed).unwrap();
            UnparsedPublicKey::new(&ED25519, pair.public_key().as_ref().to_vec())
        };
        Self { keys: seeds.map(public).collect() }
    }

    /// Returns the lines of a body: separated by `\n` or `\r\n`, without blank ones.
    pub(super) fn lines(body: &[u8]) -> Vec<&[u8]> {
        let split = body.split(|byte| *byte == b'\n');
        let stripped = split.map(|line| if line.ends_with(b"\r") { &line[..line.len() - 1] } else { line });
        stripped.filter(|line| line.iter().any(|byte| !b" \t\r".contains(byte))).collect()
    }

    pub(super) fn judge(&self, line: &[u8]) -> Class {
        // All structure is ASCII, so each byte can be a character.
        let text: &str = &line.iter().map(|byte| char::from(*byte)).collect::<String>();
        let first = text.chars().find(|character| !matches!(character, ' ' | '\t'));
        let cut = if first == Some('{') { cut_object(text) } else { cut_cef(text) };
        match cut {
            Err(NotAnEvent) => Class::Malformed,
            Ok(None) => Class::Unsigned,
            Ok(Some((sig, messages))) => self.check(sig, &messages),
        }
    }

    fn check(&self, sig: &str, messages: &[String]) -> Class {
        let Some(raw) = bytes_of(sig) else { return Class::Bad };
        for message in messages {
            let message: Vec<u8> = message.chars().map(|byte| u8::try_from(byte).unwrap()).collect();
            let key = self.keys.iter().position(|key| key.verify(&message, &raw).is_ok());
            if let Some(key) = key {
                return Class::Verified { key };
            }
        }
        Class::Bad
    }
}

/// The line is not an event.
#[derive(Debug)]
struct NotAnEvent;

/// Text of a signature, and the messages that it may be a signature of.
type Cut<'a> = Result<Option<(&'a str, Vec<String>)>, NotAnEvent>;

/// Decodes base64url of 64 bytes, with or without padding; the four bits behind the last byte must
/// be zero.
fn bytes_of(sig: &str) -> Option<[u8; 64]> {
    let digits = match sig.len() {
        86 => sig,
        88 => sig.strip_suffix("==")?,
        _ => return None,
    };
    let mut out = Vec::new();
    let (mut bits, mut held) = (0_u32, 0);
    for digit in digits.bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'-' => 62,
            b'_' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        held += 6;
        if held >= 8 {
            held -= 8;
            out.push((bits >> held).to_le_bytes()[0]);
            bits &= (1 << held) - 1;
        }
    }
    if bits != 0 {
        return None;
    }
    out.try_into().ok()
}

/// `{timestamp} konghq.com CEF:0|vendor|product|version|class id|name|severity|extension`, or
/// without the class id. The signed message is what precedes the last ` sig=` of the extension.
fn cut_cef(text: &str) -> Cut<'_> {
    let start = if text.starts_with("CEF:") { 0 } else { text.find(" CEF:").ok_or(NotAnEvent)? + 1 };
    let bytes = text.as_bytes();
    let mut fields = Vec::new();
    let mut from = start + 4;
    let mut at = from;
    while at < bytes.len() && fields.len() < 7 {
        match bytes[at] {
            b'\\' => at += 1,
            b'|' => {
                fields.push(from..at);
                from = at + 1;
            }
            _ => {}
        }
        at += 1;
    }
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if fields.len() < 6 || !digits(&text[fields[0].clone()]) {
        return Err(NotAnEvent);
    }
    let sixth = &text[fields[5].clone()];
    let sixth_is_severity =
        digits(sixth) || ["Unknown", "Low", "Medium", "High", "Very-High"].contains(&sixth);
    let seventh_begins_the_extension = fields.get(6).is_some_and(|seventh| {
        let word = |byte: u8| byte.is_ascii_alphanumeric() || b"_.,-[]".contains(&byte);
        let seventh = &bytes[seventh.clone()];
        let length = seventh.iter().take_while(|byte| word(**byte)).count();
        length > 0 && seventh.get(length) == Some(&b'=')
    });
    let extension = match fields.get(6) {
        Some(seventh) if !(sixth_is_severity && seventh_begins_the_extension) => seventh.end + 1,
        _ if sixth_is_severity => fields[5].end + 1,
        _ => return Err(NotAnEvent),
    };
    let cut = text.rfind(" sig=").filter(|at| *at >= extension);
    Ok(cut.map(|at| (&text[at + 5..], vec![text[..at].to_owned()])))
}

/// A member of an object.
struct Member {
    key: String,
    /// The key is written without escapes.
    is_literal: bool,
    /// Position of the key's opening quote.
    start: usize,
    colon: usize,
    value: Range<usize>,
}

/// JSON is signed without its member `sig` and one comma; CPS likewise, or its inner object alone.
fn cut_object(text: &str) -> Cut<'_> {
    let outer = Scanner::members(text, 0..text.len())?;
    let outside = find_sig(text, &outer)?;
    let Some(inner) = wrapped(text, &outer) else {
        return Ok(outside.map(|(sig, cut)| (sig, vec![without(text, &cut)])));
    };
    let members = Scanner::members(text, inner.clone())?;
    let inside = find_sig(text, &members)?;
    match (outside, inside) {
        (Some(_), Some(_)) => Err(NotAnEvent),
        (Some((sig, cut)), None) => Ok(Some((sig, vec![without(text, &cut)]))),
        (None, None) => Ok(None),
        (None, Some((sig, cut))) => {
            let mut messages = vec![without(text, &cut)];
            // The wrapper is not signed then, so it must be exactly as documented, and the only
            // one.
            let (before, after) = (&text[..inner.start], &text[inner.end..]);
            let is_plain = (before == "{\"event\":" || before == "{\"event\": ") && after == "}";
            if is_plain && wrapped(text, &members).is_none() {
                messages.push(text[inner.start..cut.start].to_owned() + &text[cut.end..inner.end]);
            }
            Ok(Some((sig, messages)))
        }
    }
}

/// Returns the inner object of an object with one member `event` and nothing else but a signature.
fn wrapped(text: &str, members: &[Member]) -> Option<Range<usize>> {
    let events = members.iter().filter(|member| member.key == "event").collect::<Vec<_>>();
    let is_wrapper = events.len() == 1
        && text[events[0].value.clone()].starts_with('{')
        && members.iter().all(|member| member.key == "event" || member.key == "sig");
    is_wrapper.then(|| events[0].value.clone())
}

fn without(text: &str, cut: &Range<usize>) -> String {
    text[..cut.start].to_owned() + &text[cut.end..]
}

/// Value of the member `sig`, and the range that is cut out with it.
type Found<'a> = (&'a str, Range<usize>);

/// Finds the value of the member `sig` and the range that is cut out with it. Every byte of that
/// range has one spelling: `,"sig":"..."` or `, "sig": "..."`; the first member has its comma
/// behind it.
fn find_sig<'a>(text: &'a str, members: &[Member]) -> Result<Option<Found<'a>>, NotAnEvent> {
    let sigs: Vec<(usize, &Member)> =
        members.iter().enumerate().filter(|(_, member)| member.key == "sig").collect();
    let [(index, member)] = sigs[..] else {
        return if sigs.is_empty() { Ok(None) } else { Err(NotAnEvent) };
    };
    let value = &text[member.value.clone()];
    let between = &text[member.start + 5..member.value.start];
    if !member.is_literal
        || !value.starts_with('"')
        || member.colon != member.start + 5
        || ![":", ": "].contains(&between)
    {
        return Err(NotAnEvent);
    }
    let (before, after) = (&text[..member.start], &text[member.value.end..]);
    let cut = match index {
        0 if after.starts_with(',') => member.start..member.value.end + 1,
        0 if after.starts_with('}') => member.start..member.value.end,
        0 => return Err(NotAnEvent),
        _ if before.ends_with(',') => member.start - 1..member.value.end,
        _ if before.ends_with(", ") => member.start - 2..member.value.end,
        _ => return Err(NotAnEvent),
    };
    Ok(Some((&value[1..value.len() - 1], cut)))
}

/// Parses as much of RFC 8259 as it takes to say whether a text is an object, and where its members
/// are.
struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Scanner<'a> {
    fn members(text: &'a str, range: Range<usize>) -> Result<Vec<Member>, NotAnEvent> {
        let mut scanner = Self { bytes: &text.as_bytes()[..range.end], at: range.start };
        let mut members = Vec::new();
        scanner.space();
        scanner.object(&mut |member| members.push(member))?;
        scanner.space();
        if scanner.at == range.end { Ok(members) } else { Err(NotAnEvent) }
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn eat(&mut self, byte: u8) -> Result<(), NotAnEvent> {
        if self.peek() != Some(byte) {
            return Err(NotAnEvent);
        }
        self.at += 1;
        Ok(())
    }

    fn space(&mut self) {
        while self.peek().is_some_and(|byte| b" \t\r\n".contains(&byte)) {
            self.at += 1;
        }
    }

    fn object(&mut self, found: &mut dyn FnMut(Member)) -> Result<(), NotAnEvent> {
        self.eat(b'{')?;
        self.space();
        if self.peek() == Some(b'}') {
            return self.eat(b'}');
        }
        loop {
            self.space();
            let start = self.at;
            let key = self.string()?;
            let is_literal = self.bytes[start + 1..self.at - 1] == *key.as_bytes();
            self.space();
            let colon = self.at;
            self.eat(b':')?;
            self.space();
            let from = self.at;
            self.value()?;
            found(Member { key, is_literal, start, colon, value: from..self.at });
            self.space();
            if self.peek() == Some(b'}') {
                return self.eat(b'}');
            }
            self.eat(b',')?;
        }
    }

    fn value(&mut self) -> Result<(), NotAnEvent> {
        match self.peek().ok_or(NotAnEvent)? {
            b'{' => self.object(&mut |_| {}),
            b'[' => {
                self.at += 1;
                self.space();
                if self.peek() == Some(b']') {
                    return self.eat(b']');
                }
                loop {
                    self.space();
                    self.value()?;
                    self.space();
                    if self.peek() == Some(b']') {
                        return self.eat(b']');
                    }
                    self.eat(b',')?;
                }
            }
            b'"' => self.string().map(drop),
            b't' => b"true".iter().try_for_each(|byte| self.eat(*byte)),
            b'f' => b"false".iter().try_for_each(|byte| self.eat(*byte)),
            b'n' => b"null".iter().try_for_each(|byte| self.eat(*byte)),
            _ => self.number(),
        }
    }

    fn number(&mut self) -> Result<(), NotAnEvent> {
        let _ = self.eat(b'-');
        if self.eat(b'0').is_err() {
            self.digits()?;
        }
        if self.eat(b'.').is_ok() {
            self.digits()?;
        }
        if self.eat(b'e').is_ok() || self.eat(b'E').is_ok() {
            if self.eat(b'-').is_err() {
                let _ = self.eat(b'+');
            }
            self.digits()?;
        }
        Ok(())
    }

    fn digits(&mut self) -> Result<(), NotAnEvent> {
        let start = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        if self.at == start { Err(NotAnEvent) } else { Ok(()) }
    }

    /// Reads a string and undoes its escapes; a lone surrogate becomes U+FFFD.
    fn string(&mut self) -> Result<String, NotAnEvent> {
        self.eat(b'"')?;
        let mut meant = Vec::new();
        loop {
            let byte = self.peek().ok_or(NotAnEvent)?;
            self.at += 1;
            match byte {
                b'"' => return String::from_utf8(meant).map_err(|_| NotAnEvent),
                b'\\' => {
                    let escaped = self.peek().ok_or(NotAnEvent)?;
                    self.at += 1;
                    let character = match escaped {
                        b'"' | b'\\' | b'/' => char::from(escaped),
                        b'b' => '\u{8}',
                        b'f' => '\u{c}',
                        b'n' => '\n',
                        b'r' => '\r',
                        b't' => '\t',
                        b'u' => {
                            let four = self.bytes.get(self.at..self.at + 4).ok_or(NotAnEvent)?;
                            if !four.iter().all(u8::is_ascii_hexdigit) {
                                return Err(NotAnEvent);
                            }
                            self.at += 4;
                            let code = std::str::from_utf8(four)
                                .ok()
                                .and_then(|hex| u32::from_str_radix(hex, 16).ok());
                            code.and_then(char::from_u32).unwrap_or('\u{fffd}')
                        }
                        _ => return Err(NotAnEvent),
                    };
                    meant.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
                }
                0..0x20 => return Err(NotAnEvent),
                _ => meant.push(byte),
            }
        }
    }
}
