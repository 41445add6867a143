//! Variants: what a line may have been before a program rewrote it. Pure.
//!
//! None of these is a claim: [`super::explain`] checks each, and reports only what then verifies.

use std::collections::HashSet;
use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};

use base64::Engine as _;
use base64::alphabet;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};

use crate::wire::signature;

/// A possible original of a line, and what happened to it if that verifies: a whole sentence
/// without its full stop.
pub(super) struct Variant {
    pub(super) line: Vec<u8>,
    pub(super) what: String,
}

fn variant(line: impl Into<Vec<u8>>, what: impl Into<String>) -> Variant {
    Variant { line: line.into(), what: what.into() }
}

/// Variants that are generated on demand: together they take thousands of times the memory of the
/// line.
pub(super) type Variants<'a> = Box<dyn Iterator<Item = Variant> + 'a>;

/// Maximum length of a line that has variants, in bytes: four times the daemon's default limit.
pub(super) const LONGEST_VARIED: usize = 1 << 20;

/// Returns a line without what programs and people add before and behind it, and with other
/// spellings of the signature.
pub(super) fn wrapped(line: &[u8]) -> Variants<'_> {
    const BOM: &[u8] = "\u{feff}".as_bytes();
    let trimmed = line.trim_ascii_end();
    let behind = (trimmed.len() < line.len()).then(|| {
        let what = match line[trimmed.len()..].iter().all(|byte| *byte == b'\r') {
            true => "a carriage return of its line end was kept in the line",
            false => "white space stands behind it",
        };
        variant(trimmed, what)
    });
    let before = trimmed.strip_prefix(BOM).map(|rest| variant(rest, "a byte order mark stands before it"));
    // A syslog header, a container's time stamp: whatever it is, it ends before a word.
    let starts = (1..trimmed.len().min(512)).filter(|at| {
        let before = trimmed[at - 1];
        (before.is_ascii_whitespace() || matches!(before, b'>' | b':' | b',' | b'|'))
            && !trimmed[*at].is_ascii_whitespace()
            || trimmed[*at] == b'{'
    });
    let started = starts.map(|start| {
        let what = format!("{start} bytes were put before it: `{}`", lossy(&trimmed[..start]));
        variant(&trimmed[start..], what)
    });
    let tab = memchr::memmem::find(trimmed, b"\tsig=").map(|_| {
        let line = replaced(trimmed, b"\tsig=", b" sig=");
        variant(line, "a tab replaced the space before `sig`")
    });
    Box::new(behind.into_iter().chain(before).chain(started).chain(other_signatures(trimmed)).chain(tab))
}

/// Returns lines with the signature in its canonical spelling, where it can be read in another one.
fn other_signatures(line: &[u8]) -> impl Iterator<Item = Variant> {
    const LENIENT: GeneralPurposeConfig = GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true);
    signature_texts(line).into_iter().flat_map(|start| other_signatures_at(line, start, &LENIENT))
}

fn other_signatures_at(line: &[u8], start: usize, lenient: &GeneralPurposeConfig) -> Vec<Variant> {
    const DIGITS: usize = 86;
    let is_digit = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'-' | b'_');
    let digits = line[start..].iter().take_while(|byte| is_digit(byte)).count();
    let padded = digits
        + line[start + digits..].iter().take_while(|byte| matches!(byte, b'=' | b'%' | b'3' | b'D')).count();
    let mut all = Vec::new();
    if digits >= DIGITS {
        let spelled = &line[start..start + DIGITS];
        let url: Vec<u8> = spelled
            .iter()
            .map(|byte| match byte {
                b'+' => b'-',
                b'/' => b'_',
                other => *other,
            })
            .collect();
        let decoded = GeneralPurpose::new(&alphabet::URL_SAFE, *lenient).decode(&url);
        if let Some(bytes) = decoded.ok().and_then(|bytes| <[u8; 64]>::try_from(bytes).ok()) {
            let canonical = signature::encode(&bytes);
            let with = |end: usize| [&line[..start], canonical.as_bytes(), &line[end..]].concat();
            if canonical.as_bytes() != spelled {
                let what = if url != spelled {
                    "the signature is spelled in the other base64 alphabet, with `+` and `/` instead of `-` and `_`"
                } else {
                    "the signature's last character is another than the only canonical one for its bytes"
                };
                all.push(variant(with(start + DIGITS), what));
                all.push(variant(with(start + padded), format!("{what}, and it is padded")));
            }
            if padded > DIGITS {
                let what = "the padding of the signature is neither left out nor `==`";
                all.push(variant(with(start + padded), what));
            }
            if !line.starts_with(b"{") && line.len() > start + DIGITS {
                let behind = &line[start + DIGITS..];
                let what = format!("{} bytes stand behind its signature: `{}`", behind.len(), lossy(behind));
                all.push(variant([&line[..start], canonical.as_bytes()].concat(), what));
            }
        }
    }
    all
}

/// Returns where the text of a signature may begin: in a CEF line behind each ` sig=`, since
/// another line may follow the first.
fn signature_texts(line: &[u8]) -> Vec<usize> {
    const MOST: usize = 8;
    let marks: &[&[u8]] = if line.starts_with(b"{") { &[b"\"sig\":\"", b"\"sig\": \""] } else { &[b" sig="] };
    let of = |mark: &&'static [u8]| {
        let mark = *mark;
        memchr::memmem::find_iter(line, mark).map(|at| at + mark.len())
    };
    marks.iter().flat_map(of).take(MOST).collect()
}

/// Returns a JSON line as other programs write it: white space, escapes, numbers. The line itself
/// comes first.
pub(super) fn reserialised(line: &str) -> Variants<'_> {
    let itself = std::iter::once_with(move || variant(line, ""));
    if !line.starts_with('{') {
        return Box::new(itself);
    }
    let spacings = [
        (None, ""),
        (Some(("", "")), "white space was added between its tokens"),
        (Some((", ", ": ")), "white space was taken from between its tokens"),
    ];
    let kinds = spacings.into_iter().flat_map(|spacing| ESCAPES.map(|escape| (spacing, escape)));
    let mut known = HashSet::from([fingerprint(line)]);
    let others = kinds.flat_map(move |((spacing, said_spacing), (escape, said_escape))| {
        let tokens: Vec<Token<'_>> = spaced(tokens(line), spacing)
            .into_iter()
            .map(|token| match token {
                Token::Text(text) => Token::Written(escape(text)),
                other => other,
            })
            .collect();
        numbers(&tokens).into_iter().map(move |changes| {
            let said = [said_spacing, said_escape].map(str::to_owned).into_iter();
            let said = said.filter(|said| !said.is_empty()).chain(changes.iter().map(Change::said));
            variant(changed(&tokens, &changes), said.collect::<Vec<_>>().join(", and "))
        })
    });
    let others = others.filter(move |other| known.insert(fingerprint(&other.line)));
    Box::new(itself.chain(others))
}

/// Returns a hash that distinguishes variants without keeping them. Two with the same hash cost no
/// more than one attempt.
fn fingerprint(line: impl AsRef<[u8]>) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(line.as_ref())
}

/// A number of a line in another spelling.
#[derive(Clone)]
struct Change {
    /// Index of the token.
    at: usize,
    now: String,
    before: String,
}

impl Change {
    fn said(&self) -> String {
        format!("`{}` was written as `{}`", self.before, self.now)
    }
}

/// Returns the line of these tokens with the changes, which are in their order.
fn changed(tokens: &[Token<'_>], changes: &[Change]) -> String {
    let mut line = String::new();
    let mut changes = changes.iter().peekable();
    for (at, token) in tokens.iter().enumerate() {
        line += changes.next_if(|change| change.at == at).map_or(token.as_str(), |change| &change.before);
    }
    line
}

/// A piece of JSON as it is spelled.
#[derive(Clone, Debug, PartialEq)]
enum Token<'a> {
    /// A string with its quotes.
    Text(&'a str),
    /// A string in another spelling.
    Written(String),
    Number(&'a str),
    /// White space.
    Space(&'a str),
    /// Anything else: a bracket, a comma, `true`.
    Other(&'a str),
}

impl Token<'_> {
    fn as_str(&self) -> &str {
        match self {
            Self::Text(text) | Self::Number(text) | Self::Space(text) | Self::Other(text) => text,
            Self::Written(text) => text,
        }
    }
}

/// Splits a line into tokens that together are the line. What is not JSON is split anyhow.
fn tokens<'a>(line: &'a str) -> Vec<Token<'a>> {
    let bytes = line.as_bytes();
    let mut all = Vec::new();
    let mut start = 0;
    while start < bytes.len() {
        let run = |is_part: fn(u8) -> bool| {
            start + bytes[start..].iter().take_while(|byte| is_part(**byte)).count()
        };
        let (end, make): (usize, fn(&'a str) -> Token<'a>) = match bytes[start] {
            b'"' => {
                let mut end = start + 1;
                while end < bytes.len() && bytes[end] != b'"' {
                    end += if bytes[end] == b'\\' { 2 } else { 1 };
                }
                (floor(line, (end + 1).min(bytes.len())), Token::Text)
            }
            b' ' | b'\t' => (run(|byte| matches!(byte, b' ' | b'\t')), Token::Space),
            b'-' | b'0'..=b'9' => {
                (run(|byte| matches!(byte, b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9')), Token::Number)
            }
            byte if byte.is_ascii_alphabetic() => (run(|byte| byte.is_ascii_alphabetic()), Token::Other),
            _ => (floor(line, start + 1), Token::Other),
        };
        all.push(make(&line[start..end]));
        start = end;
    }
    all
}

/// Returns the next offset at which text may be split.
fn floor(line: &str, at: usize) -> usize {
    (at..=line.len()).find(|at| line.is_char_boundary(*at)).unwrap_or(line.len())
}

/// Returns the tokens with that white space behind commas and colons, and none elsewhere; without
/// an argument unchanged.
fn spaced<'a>(tokens: Vec<Token<'a>>, behind: Option<(&'a str, &'a str)>) -> Vec<Token<'a>> {
    let Some((comma, colon)) = behind else { return tokens };
    let mut all = Vec::with_capacity(tokens.len());
    for token in tokens {
        let space = match &token {
            Token::Space(_) => continue,
            Token::Other(",") => comma,
            Token::Other(":") => colon,
            _ => "",
        };
        all.push(token);
        if !space.is_empty() {
            all.push(Token::Space(space));
        }
    }
    all
}

type Escape = fn(&str) -> String;

const ESCAPES: [(Escape, &str); 9] = [
    (str::to_owned, ""),
    (|text| text.replace("\\/", "/"), "`/` was written as `\\/`"),
    (|text| text.replace("\\/", "/").replace('/', "\\/"), "`\\/` was written as `/`"),
    (literal, "characters were written as `\\u` escapes"),
    (|text| escaped(text, |c| !c.is_ascii(), false), "`\\u` escapes were written as characters"),
    (
        |text| escaped(text, |c| !c.is_ascii(), true),
        "`\\u` escapes with capital digits were written as characters",
    ),
    (
        |text| escaped(text, |c| matches!(c, '<' | '>' | '&'), false),
        "`\\u` escapes of `<`, `>` or `&` were written as characters",
    ),
    (
        |text| escaped(&text.replace("\\/", "/"), |c| !c.is_ascii(), false),
        "`/` was written as `\\/` and `\\u` escapes as characters",
    ),
    (
        |text| escaped(&text.replace("\\/", "/").replace('/', "\\/"), |c| !c.is_ascii(), false),
        "`\\/` was written as `/` and `\\u` escapes as characters",
    ),
];

/// Undoes `\u` escapes, except those that JSON requires.
fn literal(text: &str) -> String {
    let read = |part: &str| u16::from_str_radix(part.get(2..6)?, 16).ok();
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let escape = &rest[at..];
        let low = escape.get(6..12).filter(|low| low.starts_with("\\u")).and_then(read);
        let units: Vec<u16> =
            read(escape).filter(|_| escape.starts_with("\\u")).into_iter().chain(low).collect();
        let character = char::decode_utf16(units).next().and_then(Result::ok);
        match character.filter(|c| !c.is_control() && !matches!(c, '"' | '\\')) {
            Some(character) => {
                out.push(character);
                rest = &escape[if u32::from(character) > 0xffff { 12 } else { 6 }..];
            }
            None => {
                let end = floor(escape, 2.min(escape.len()));
                out.push_str(&escape[..end]);
                rest = &escape[end..];
            }
        }
    }
    out + rest
}

fn escaped(text: &str, which: impl Fn(char) -> bool, capitals: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if which(character) {
            for unit in character.encode_utf16(&mut [0; 2]) {
                out += &if capitals { format!("\\u{unit:04X}") } else { format!("\\u{unit:04x}") };
            }
        } else {
            out.push(character);
        }
    }
    out
}

/// Maximum number of spellings of the numbers of one line.
const MOST_NUMBERS: usize = 64;

/// Returns no change, and then other spellings of the numbers that have a fraction or an exponent,
/// or else of one that ends in zeros.
fn numbers(tokens: &[Token<'_>]) -> Vec<Vec<Change>> {
    let mut all = vec![Vec::new()];
    let texts = || {
        tokens.iter().enumerate().filter_map(|(at, token)| match token {
            Token::Number(text) => Some((at, *text)),
            _ => None,
        })
    };
    let has_point = |text: &str| text.contains(['.', 'e', 'E']);
    let is_pointed = texts().any(|(_, text)| has_point(text));
    let is_one = |text: &str| if is_pointed { has_point(text) } else { text.ends_with('0') };
    for (at, now) in texts().filter(|(_, text)| is_one(text)) {
        let spellings = same_number(now);
        // All combinations of fractions; of the plain numbers one at a time.
        let with = if is_pointed { all.len() } else { 1 };
        for index in 0..with {
            for before in &spellings {
                if all.len() >= MOST_NUMBERS {
                    return all;
                }
                let change = Change { at, now: now.to_owned(), before: before.clone() };
                all.push([&all[index][..], &[change]].concat());
            }
        }
    }
    all
}

/// Returns other spellings of a number that has no fraction and is below 2^53.
fn same_number(text: &str) -> Vec<String> {
    let Some(value) = text.parse::<f64>().ok().filter(|value| value.fract() == 0.0 && value.abs() < EXACT)
    else {
        return Vec::new();
    };
    let whole = format!("{value:.0}");
    let mut all = vec![whole.clone(), format!("{whole}.0")];
    let digits = whole.trim_end_matches('0');
    let zeros = whole.len() - digits.len();
    if zeros > 0 && !digits.is_empty() && digits != "-" {
        for e in ["e", "E", "e+", "E+"] {
            all.push(format!("{digits}{e}{zeros}"));
            all.push(format!("{digits}.0{e}{zeros}"));
        }
        // Scientific: one digit before the point.
        let sign = usize::from(digits.starts_with('-'));
        if digits.len() > sign + 1 {
            let (head, tail) = digits.split_at(sign + 1);
            let exponent = zeros + tail.len();
            all.extend(["e", "E", "e+", "E+"].map(|e| format!("{head}.{tail}{e}{exponent}")));
        }
    }
    all.retain(|spelled| spelled != text);
    all
}

/// The first float from which on not every integer is a 64-bit float.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// Maximum number of long numbers of one line that are examined.
const MOST_LONG_NUMBERS: usize = 64;

/// Maximum number of integers that one rounded number may have been: enough for 64 bits.
const MOST_NEIGHBOURS: u128 = 2_050;

/// Returns a line with each integer that a program may have rounded to a 64-bit float (IEEE 754)
/// replaced by those that round to the same: JSON numbers, and a `trace_id` of digits.
pub(super) fn rounded(line: &Variant) -> Variants<'_> {
    let Ok(text) = std::str::from_utf8(&line.line) else { return Box::new(std::iter::empty()) };
    let numbers = long_numbers(text).take(MOST_LONG_NUMBERS).filter_map(|long| {
        let value = text[long.start..long.end].parse::<f64>().ok()?;
        (EXACT..1e30).contains(&value).then_some((long, value))
    });
    Box::new(numbers.flat_map(move |(LongNumber { name, start, end }, value)| {
        let spelled = &text[start..end];
        let others = neighbours(value).map(|number| number.to_string()).filter(move |other| other != spelled);
        others.map(move |other| {
            let mut what = format!(
                "`{name}` is {spelled}, and with {other} the signature fits: a program read the number as a 64-bit \
                 float and lost digits"
            );
            if !line.what.is_empty() {
                what = format!("{}, and {what}", line.what);
            }
            variant([&text[..start], &other, &text[end..]].concat(), what)
        })
    }))
}

/// Returns the integers that become this float, the nearest first.
fn neighbours(value: f64) -> impl Iterator<Item = u128> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the caller keeps it between 2^53 and 10^30, where a float is an integer"
    )]
    let middle = value as u128;
    #[expect(clippy::cast_precision_loss, clippy::float_cmp, reason = "this very rounding is looked for")]
    let is_same = move |number: &u128| *number as f64 == value;
    let up = (middle..).take_while(is_same).take(1 + MOST_NEIGHBOURS as usize / 2);
    let down = (0..middle).rev().take_while(is_same).take(MOST_NEIGHBOURS as usize / 2);
    up.chain(down)
}

/// A long number, and its range in the line.
struct LongNumber<'a> {
    name: &'a str,
    start: usize,
    end: usize,
}

/// Returns the long numbers of a line.
fn long_numbers(text: &str) -> Box<dyn Iterator<Item = LongNumber<'_>> + '_> {
    const SHORTEST: usize = 16;
    if !text.starts_with('{') {
        return Box::new(text.rfind(" trace_id=").into_iter().map(|at| {
            let start = at + " trace_id=".len();
            let end = text[start..].find(' ').map_or(text.len(), |length| start + length);
            LongNumber { name: "trace_id", start, end }
        }));
    }
    let is_number =
        |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit() || b".eE+".contains(&b));
    let (mut at, mut key) = (0, "");
    Box::new(tokens(text).into_iter().filter_map(move |token| {
        let (name, length) = (key, token.as_str().len());
        let spelled = &text[at..at + length];
        let inner = spelled.trim_matches('"');
        let quote = usize::from(matches!(token, Token::Text(_)));
        let is_candidate = match token {
            Token::Number(_) => true,
            Token::Text(_) => key == "trace_id" && is_number(inner),
            _ => false,
        };
        let start = at + quote;
        if quote == 1 {
            key = inner;
        }
        at += length;
        let is_long = inner.len() >= SHORTEST || inner.contains(['e', 'E']);
        (is_candidate && is_long).then_some(LongNumber { name, start, end: start + inner.len() })
    }))
}

/// Returns lines with small changes undone that storage, transport or people make: one bit, one
/// digit, one truth value, one added byte. A line longer than [`LONGEST_ALTERED`] has none.
pub(super) fn altered(line: &[u8]) -> Variants<'_> {
    const TRUTHS: [(&str, &str); 6] = [
        ("true", "false"),
        ("false", "true"),
        ("TRUE", "true"),
        ("FALSE", "false"),
        ("True", "true"),
        ("False", "false"),
    ];
    if line.len() > LONGEST_ALTERED {
        return Box::new(std::iter::empty());
    }
    let truths = TRUTHS.into_iter().flat_map(move |(now, was)| {
        memchr::memmem::find_iter(line, now).map(move |at| {
            let before = [&line[..at], was.as_bytes(), &line[at + now.len()..]].concat();
            variant(before, format!("`{was}` was changed into `{now}` at byte {}", at + 1))
        })
    });
    let bytes = || line.iter().copied().enumerate();
    let digits = bytes().filter(|(_, byte)| byte.is_ascii_digit()).flat_map(move |(at, byte)| {
        (b'0'..=b'9').filter(move |digit| *digit != byte).map(move |digit| {
            let (was, is) = (char::from(digit), char::from(byte));
            let what = format!("the digit {was} at byte {} was changed into {is}", at + 1);
            variant(with_byte(line, at, digit), what)
        })
    });
    let bits = bytes().flat_map(move |(at, byte)| {
        (0..8).map(move |bit| {
            let other = byte ^ (1 << bit);
            let what = format!("one bit of byte {} changed: {} became {}", at + 1, shown(other), shown(byte));
            variant(with_byte(line, at, other), what)
        })
    });
    let added = bytes().map(|(at, byte)| {
        let what = format!("byte {} ({}) was added", at + 1, shown(byte));
        variant([&line[..at], &line[at + 1..]].concat(), what)
    });
    Box::new(truths.chain(digits).chain(bits).chain(added))
}

/// Maximum length of a line for [`altered`], in bytes.
pub(super) const LONGEST_ALTERED: usize = 2_048;

fn with_byte(line: &[u8], at: usize, byte: u8) -> Vec<u8> {
    let mut line = line.to_vec();
    line[at] = byte;
    line
}

fn shown(byte: u8) -> String {
    if byte.is_ascii_graphic() { format!("`{}`", char::from(byte)) } else { format!("0x{byte:02x}") }
}

fn lossy(bytes: &[u8]) -> String {
    const LONGEST: usize = 80;
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(LONGEST)]).into_owned();
    if bytes.len() > LONGEST { text + "..." } else { text }
}

fn replaced(line: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    match memchr::memmem::rfind(line, from) {
        Some(at) => [&line[..at], to, &line[at + from.len()..]].concat(),
        None => line.to_vec(),
    }
}

#[cfg(test)]
mod tests;
