//! Two ways of ours and a third party must say the same of every line.
//!
//! A million generated lines (20 000 unless `AUDITGATE_TESTS_LINES` says how many), one in a hundred damaged, are
//! judged three times:
//! - as the daemon judges a batch of 1000, through [`Judge::judge_all`];
//! - one by one, each as a batch of one, through the same;
//! - by a [`Witness`] that shares nothing with them: it splits, reads and cuts lines in its own way, by the format's
//!   description, and has signatures checked by aws-lc-rs, whose curve arithmetic and accept rule (RFC 8032 without
//!   the cofactor) are others. Half of the genuine lines were signed by aws-lc-rs, half by `send`.
//!
//! What is compared is the whole class: verified *and by which key*, bad, unsigned, malformed. Random damage makes no
//! signature that only the cofactor makes good; where the rules differ is shown in `accept_rule`.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;
use crate::send::{self, SigningKey, sample::Samples};

use crate::trust::jwks;
use crate::wire::batch;
use crate::wire::event::Format;
use crate::wire::signature;

/// What can be said of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Verified { key: usize },
    Bad,
    Unsigned,
    Malformed,
}

impl From<&Verdict> for Class {
    fn from(verdict: &Verdict) -> Self {
        match verdict {
            Verdict::Verified { key } => Self::Verified { key: *key },
            Verdict::Rejected { reason: Reason::BadSignature, .. } => Self::Bad,
            Verdict::Rejected { reason: Reason::Unsigned, .. } => Self::Unsigned,
            Verdict::Rejected { reason: Reason::Malformed, .. } => Self::Malformed,
            other => panic!("{other:?}"),
        }
    }
}

/// Lines in one body.
const BATCH: u64 = 1000;
/// The trusted keys are the first ones; the last is a stranger's.
const KEYS: usize = 4;

fn secret(number: usize) -> [u8; 32] {
    [u8::try_from(number).unwrap() + 1; 32]
}

#[test]
#[expect(clippy::print_stderr, reason = "the numbers are the test's report")]
fn batch_single_and_an_independent_implementation_agree() {
    let lines = std::env::var("AUDITGATE_TESTS_LINES").map_or(20_000, |lines| lines.parse().unwrap());
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut tally = Tally::default();
    std::thread::scope(|scope| {
        let work = || {
            let mut tally = Tally::default();
            loop {
                let first = next.fetch_add(BATCH, Ordering::Relaxed);
                if first >= lines {
                    return tally;
                }
                tally.compare(first, BATCH.min(lines - first));
            }
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            tally.add(worker.join().unwrap());
        }
    });
    eprintln!("{tally}");
    assert_eq!(tally.generated, lines);
    for kind in Style::ALL.map(|style| format!("{style:?}")) {
        assert!(tally.styles.contains_key(&kind), "no line is a {kind}");
    }
    for damage in Damage::ALL {
        assert!(
            tally.damaged.keys().any(|(kind, _)| kind == &format!("{damage:?}")),
            "{damage:?} never happened"
        );
    }
    for class in [Class::Bad, Class::Unsigned, Class::Malformed] {
        assert!(tally.classes.contains_key(&class), "nothing is {class:?}");
    }
    assert!((0..KEYS - 1).all(|key| tally.classes.contains_key(&Class::Verified { key })));
}

/// What came out, by kind.
#[derive(Default)]
struct Tally {
    generated: u64,
    judged: u64,
    classes: BTreeMap<Class, u64>,
    styles: BTreeMap<String, u64>,
    damaged: BTreeMap<(String, Class), u64>,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} lines generated, {} judged: {:?}", self.generated, self.judged, self.classes)?;
        writeln!(f, "made as {:?}", self.styles)?;
        self.damaged
            .iter()
            .try_for_each(|((damage, class), count)| writeln!(f, "{damage}: {class:?}: {count}"))
    }
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.generated += other.generated;
        self.judged += other.judged;
        other.classes.into_iter().for_each(|(class, count)| *self.classes.entry(class).or_default() += count);
        other.styles.into_iter().for_each(|(style, count)| *self.styles.entry(style).or_default() += count);
        other.damaged.into_iter().for_each(|(kind, count)| *self.damaged.entry(kind).or_default() += count);
    }

    /// Makes a body, has it judged three times and compares. The number of its first line is its seed.
    fn compare(&mut self, first: u64, count: u64) {
        let mut random = StdRng::seed_from_u64(first);
        let made = Made::new(count, &mut random);
        let body = made.lines.join(&b'\n');
        let witness = Witness::new();

        let source =
            Source { name: "us".into(), policy: Policy::Require, dedup_by: DedupKey::Event, keys: None };
        let keys = made.keys();
        let identifier = Identifier::new([7; 32]);
        let judge = Judge::new(&source, Some(&keys), &identifier, usize::MAX);
        let classes = |lines: &mut dyn Iterator<Item = &[u8]>| -> Vec<Class> {
            let entries = judge.judge_all(lines, 0, &mut |_| ()).entries;
            entries.into_iter().flatten().map(|entry| Class::from(&entry.verdict)).collect()
        };
        let together = classes(&mut batch::lines(&body));
        let alone: Vec<Class> =
            batch::lines(&body).flat_map(|line| classes(&mut std::iter::once(line))).collect();
        let lines = Witness::lines(&body);
        let independent: Vec<Class> = lines.iter().map(|line| witness.judge(line)).collect();
        assert_eq!((together.len(), alone.len()), (lines.len(), lines.len()));
        for (at, line) in lines.iter().enumerate() {
            assert!(
                together[at] == alone[at] && alone[at] == independent[at],
                "line {at} of batch {first}: {:?} in a batch, {:?} alone, {:?} independently: {}",
                together[at],
                alone[at],
                independent[at],
                String::from_utf8_lossy(line)
            );
            *self.classes.entry(together[at]).or_default() += 1;
        }
        self.generated += count;
        self.judged += lines.len() as u64;
        for (line, (style, key, damage)) in made.lines.iter().zip(&made.histories) {
            *self.styles.entry(format!("{style:?}")).or_default() += 1;
            // A damaged line may have become two, or none: the first one counts.
            let class = Witness::lines(line).first().map(|line| witness.judge(line));
            match (damage, class) {
                (None, class) => assert_eq!(class, Some(Class::Verified { key: *key })),
                (Some(damage), Some(class)) => {
                    *self.damaged.entry((format!("{damage:?}"), class)).or_default() += 1;
                }
                (Some(_), None) => {}
            }
        }
    }
}

/// How a genuine line is signed and spelled.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Style {
    Cef,
    JsonLast,
    JsonFirst,
    JsonMiddle,
    JsonSpaced,
    CpsWhole,
    CpsInner,
    CpsOutside,
}

impl Style {
    const ALL: [Self; 8] = [
        Self::Cef,
        Self::JsonLast,
        Self::JsonFirst,
        Self::JsonMiddle,
        Self::JsonSpaced,
        Self::CpsWhole,
        Self::CpsInner,
        Self::CpsOutside,
    ];

    fn format(self) -> Format {
        match self {
            Self::Cef => Format::Cef,
            Self::JsonLast | Self::JsonFirst | Self::JsonMiddle | Self::JsonSpaced | Self::CpsInner => {
                Format::Json
            }
            Self::CpsWhole | Self::CpsOutside => Format::Cps,
        }
    }

    /// Puts a signature where this style has it.
    fn place(self, line: &str, sig: &str) -> String {
        let inside = |end: usize| {
            let (before, after) = line.split_at(line.len() - end);
            format!("{before},\"sig\":\"{sig}\"{after}")
        };
        match self {
            Self::Cef => format!("{line} sig={sig}"),
            Self::JsonLast | Self::CpsOutside => inside(1),
            Self::CpsWhole => inside(2),
            Self::CpsInner => format!("{{\"event\":{}}}", inside(1)),
            Self::JsonFirst => line.replacen('{', &format!("{{\"sig\":\"{sig}\","), 1),
            Self::JsonMiddle => line.replacen(",\"rt\":", &format!(",\"sig\":\"{sig}\",\"rt\":"), 1),
            Self::JsonSpaced => line.replacen(",\"rt\":", &format!(", \"sig\": \"{sig}\",\"rt\":"), 1),
        }
    }
}

/// What happens to a line. Some of it is harmless, and then the line must still verify.
#[derive(Clone, Copy, Debug)]
enum Damage {
    FlippedBit,
    FlippedBitOfSignature,
    InsertedByte,
    RemovedByte,
    Truncated,
    SwappedSignatures,
    StrangersKey,
    OtherTrustedKey,
    DoubledSignature,
    NoSignature,
    EmptySignature,
    PaddedSignature,
    HalfPaddedSignature,
    LooseBits,
    StandardAlphabet,
    ShortSignature,
    WhiteSpace,
    EscapedKey,
    CarriageReturn,
    LineBreak,
    SwappedWords,
    Rubbish,
}

impl Damage {
    const ALL: [Self; 22] = [
        Self::FlippedBit,
        Self::FlippedBitOfSignature,
        Self::InsertedByte,
        Self::RemovedByte,
        Self::Truncated,
        Self::SwappedSignatures,
        Self::StrangersKey,
        Self::OtherTrustedKey,
        Self::DoubledSignature,
        Self::NoSignature,
        Self::EmptySignature,
        Self::PaddedSignature,
        Self::HalfPaddedSignature,
        Self::LooseBits,
        Self::StandardAlphabet,
        Self::ShortSignature,
        Self::WhiteSpace,
        Self::EscapedKey,
        Self::CarriageReturn,
        Self::LineBreak,
        Self::SwappedWords,
        Self::Rubbish,
    ];
}

/// Lines with what became of them: how they were made, by which key, and what was damaged.
struct Made {
    lines: Vec<Vec<u8>>,
    histories: Vec<(Style, usize, Option<Damage>)>,
}

impl Made {
    fn new(count: u64, random: &mut StdRng) -> Self {
        let secrets: [[u8; 32]; KEYS] = std::array::from_fn(secret);
        let ours = secrets.map(|secret| SigningKey::from_seed(&secret));
        let theirs = secrets.map(|secret| Ed25519KeyPair::from_seed_unchecked(&secret).unwrap());
        let mut now = 1_767_323_045_678;
        let clock = || {
            now += 1;
            now
        };
        let events: Vec<_> = Samples::new(StdRng::seed_from_u64(random.random()), clock)
            .take(usize::try_from(count).unwrap())
            .collect();
        let mut made = Self { lines: Vec::new(), histories: Vec::new() };
        let mut signed = Vec::new();
        for event in &events {
            let style = Style::ALL[random.random_range(0..Style::ALL.len())];
            // Mostly one key, as it is.
            let key = random.random_range(0..12_usize).saturating_sub(9);
            let plain = String::from_utf8(send::line(style.format(), event, None).unwrap()).unwrap();
            let by = |key: usize| {
                signature::encode(&theirs[key].sign(plain.as_bytes()).as_ref().try_into().unwrap())
            };
            let line = match style {
                Style::Cef | Style::JsonLast | Style::CpsWhole if random.random() => {
                    String::from_utf8(send::line(style.format(), event, Some(&ours[key])).unwrap()).unwrap()
                }
                _ => style.place(&plain, &by(key)),
            };
            made.lines.push(line.into_bytes());
            made.histories.push((style, key, None));
            let (strangers, others, own) = (by(KEYS - 1), by((key + 1) % (KEYS - 1)), by(key));
            signed.push((plain, strangers, others, own));
        }
        for at in 0..made.lines.len() {
            if random.random_ratio(1, 100) {
                let damage = Damage::ALL[random.random_range(0..Damage::ALL.len())];
                let (plain, strangers, others, own) = &signed[at];
                let neighbour = &signed[(at + 1) % signed.len()].3;
                let style = made.histories[at].0;
                let signatures = Signatures { strangers, others, own, neighbour };
                made.lines[at] = damage.done(&made.lines[at], plain, style, &signatures, random);
                made.histories[at].2 = Some(damage);
            }
        }
        made
    }

    fn keys(&self) -> KeySet {
        let named: Vec<_> = (0..KEYS - 1)
            .map(|number| {
                let public = SigningKey::from_seed(&secret(number)).public_key();
                (Some(format!("k{number}")), public)
            })
            .collect();
        jwks::parse(jwks::document(&named).as_bytes(), KEYS).unwrap().keys
    }
}

/// The signatures that may come into a line's place.
struct Signatures<'a> {
    /// By a key that nobody trusts.
    strangers: &'a str,
    /// By another trusted key: as good as its own.
    others: &'a str,
    own: &'a str,
    /// Of the next line.
    neighbour: &'a str,
}

impl Damage {
    fn done(
        self,
        line: &[u8],
        plain: &str,
        style: Style,
        signatures: &Signatures<'_>,
        random: &mut StdRng,
    ) -> Vec<u8> {
        const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let mut bytes = line.to_vec();
        let at = random.random_range(0..bytes.len());
        let own = signatures.own;
        let placed = |sig: &str| style.place(plain, sig).into_bytes();
        match self {
            Self::FlippedBit => bytes[at] ^= 1 << random.random_range(0..8),
            Self::FlippedBitOfSignature => {
                let mut raw = signature::decode(own).unwrap();
                raw[random.random_range(0..64)] ^= 1 << random.random_range(0..8);
                return placed(&signature::encode(&raw));
            }
            Self::InsertedByte => bytes.insert(at, random.random()),
            Self::RemovedByte => drop(bytes.remove(at)),
            Self::Truncated => bytes.truncate(at),
            Self::SwappedSignatures => return placed(signatures.neighbour),
            Self::StrangersKey => return placed(signatures.strangers),
            Self::OtherTrustedKey => return placed(signatures.others),
            Self::DoubledSignature => {
                return style.place(&style.place(plain, own), own).into_bytes();
            }
            Self::NoSignature if style == Style::CpsInner => {
                return format!("{{\"event\":{plain}}}").into_bytes();
            }
            Self::NoSignature => return plain.as_bytes().to_vec(),
            Self::EmptySignature => return placed(""),
            Self::PaddedSignature => return placed(&format!("{own}==")),
            Self::HalfPaddedSignature => return placed(&format!("{own}=")),
            Self::LooseBits => {
                // The last digit's four low bits belong to no byte.
                let last = DIGITS.iter().position(|digit| own.as_bytes()[85] == *digit).unwrap();
                let other = char::from(DIGITS[last | random.random_range(1..16_usize)]);
                return placed(&format!("{}{other}", &own[..85]));
            }
            Self::StandardAlphabet => return placed(&own.replace('-', "+").replace('_', "/")),
            Self::ShortSignature => return placed(&own[..random.random_range(0..86)]),
            Self::WhiteSpace => {
                let marks: Vec<usize> = bytes
                    .iter()
                    .enumerate()
                    .filter(|(_, byte)| b"{}:,= |\"".contains(byte))
                    .map(|(at, _)| at + random.random_range(0..2_usize))
                    .collect();
                let space = b" \t\r"[random.random_range(0..3_usize)];
                bytes.insert(marks[random.random_range(0..marks.len())], space);
            }
            Self::EscapedKey => {
                let text = String::from_utf8(bytes).unwrap();
                return text.replace("\"sig\"", "\"s\\u0069g\"").replace(" sig=", " si\\g=").into_bytes();
            }
            Self::CarriageReturn => bytes.push(b'\r'),
            Self::LineBreak => bytes.insert(at, b'\n'),
            Self::SwappedWords => {
                let text = String::from_utf8(bytes).unwrap();
                let swapped = text.replace("true", "\0").replace("false", "true").replace('\0', "false");
                return swapped.replace("Konnect", "Dev-Portal").into_bytes();
            }
            Self::Rubbish => bytes = (0..random.random_range(1..300)).map(|_| random.random()).collect(),
        }
        bytes
    }
}

/// Judges lines by the description of the format alone, and signatures with aws-lc-rs.
struct Witness {
    keys: Vec<UnparsedPublicKey<Vec<u8>>>,
}

impl Witness {
    fn new() -> Self {
        let public = |number: usize| {
            let pair = Ed25519KeyPair::from_seed_unchecked(&secret(number)).unwrap();
            UnparsedPublicKey::new(&ED25519, pair.public_key().as_ref().to_vec())
        };
        Self { keys: (0..KEYS - 1).map(public).collect() }
    }

    /// The lines of a body: `\n` or `\r\n` between them, blank ones do not count.
    fn lines(body: &[u8]) -> Vec<&[u8]> {
        let split = body.split(|byte| *byte == b'\n');
        let stripped = split.map(|line| if line.ends_with(b"\r") { &line[..line.len() - 1] } else { line });
        stripped.filter(|line| line.iter().any(|byte| !b" \t\r".contains(byte))).collect()
    }

    fn judge(&self, line: &[u8]) -> Class {
        // All structure is ASCII, so that each byte can be a character of its own.
        let text: &str = &line.iter().map(|byte| char::from(*byte)).collect::<String>();
        let first = text.chars().find(|character| !matches!(character, ' ' | '\t'));
        let cut = if first == Some('{') { cut_object(text) } else { cut_cef(text) };
        match cut {
            Err(Broken) => Class::Malformed,
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

/// The line is no event.
#[derive(Debug)]
struct Broken;

/// A signature's text and the messages that it may be of.
type Cut<'a> = Result<Option<(&'a str, Vec<String>)>, Broken>;

/// base64url of 64 bytes, with padding or without, the four bits behind the last byte zero.
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

/// `{timestamp} konghq.com CEF:0|vendor|product|version|class id|name|severity|extension`, or without the class id.
/// What is signed is what stands before the last ` sig=` of the extension.
fn cut_cef(text: &str) -> Cut<'_> {
    let start = if text.starts_with("CEF:") { 0 } else { text.find(" CEF:").ok_or(Broken)? + 1 };
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
        return Err(Broken);
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
        _ => return Err(Broken),
    };
    let cut = text.rfind(" sig=").filter(|at| *at >= extension);
    Ok(cut.map(|at| (&text[at + 5..], vec![text[..at].to_owned()])))
}

/// A member of an object: its key as it is meant and as it is spelled, and where it and its value stand.
struct Spot {
    key: String,
    spelled: bool,
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
        (Some(_), Some(_)) => Err(Broken),
        (Some((sig, cut)), None) => Ok(Some((sig, vec![without(text, &cut)]))),
        (None, None) => Ok(None),
        (None, Some((sig, cut))) => {
            let mut messages = vec![without(text, &cut)];
            // Nothing signs the wrapper then, so it is as it is documented, and the only one.
            let (before, after) = (&text[..inner.start], &text[inner.end..]);
            let is_plain = (before == "{\"event\":" || before == "{\"event\": ") && after == "}";
            if is_plain && wrapped(text, &members).is_none() {
                messages.push(text[inner.start..cut.start].to_owned() + &text[cut.end..inner.end]);
            }
            Ok(Some((sig, messages)))
        }
    }
}

/// The object in an object that has nothing but one member `event` and, maybe, a signature.
fn wrapped(text: &str, members: &[Spot]) -> Option<Range<usize>> {
    let events = members.iter().filter(|spot| spot.key == "event").collect::<Vec<_>>();
    let is_wrapper = events.len() == 1
        && text[events[0].value.clone()].starts_with('{')
        && members.iter().all(|spot| spot.key == "event" || spot.key == "sig");
    is_wrapper.then(|| events[0].value.clone())
}

fn without(text: &str, cut: &Range<usize>) -> String {
    text[..cut.start].to_owned() + &text[cut.end..]
}

/// The value of the member `sig` and what is cut out with it.
type Found<'a> = (&'a str, Range<usize>);

/// Finds the value of the member `sig` and what is cut out with it. No byte of that may be loose: only `,"sig":"..."` and
/// `, "sig": "..."` are known, at the beginning with the comma behind it.
fn find_sig<'a>(text: &'a str, spots: &[Spot]) -> Result<Option<Found<'a>>, Broken> {
    let sigs: Vec<(usize, &Spot)> = spots.iter().enumerate().filter(|(_, spot)| spot.key == "sig").collect();
    let [(index, spot)] = sigs[..] else {
        return if sigs.is_empty() { Ok(None) } else { Err(Broken) };
    };
    let value = &text[spot.value.clone()];
    let between = &text[spot.start + 5..spot.value.start];
    if !spot.spelled
        || !value.starts_with('"')
        || spot.colon != spot.start + 5
        || ![":", ": "].contains(&between)
    {
        return Err(Broken);
    }
    let (before, after) = (&text[..spot.start], &text[spot.value.end..]);
    let cut = match index {
        0 if after.starts_with(',') => spot.start..spot.value.end + 1,
        0 if after.starts_with('}') => spot.start..spot.value.end,
        0 => return Err(Broken),
        _ if before.ends_with(',') => spot.start - 1..spot.value.end,
        _ if before.ends_with(", ") => spot.start - 2..spot.value.end,
        _ => return Err(Broken),
    };
    Ok(Some((&value[1..value.len() - 1], cut)))
}

/// RFC 8259, just enough of it to say whether a text is an object and where its members stand.
struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Scanner<'a> {
    fn members(text: &'a str, range: Range<usize>) -> Result<Vec<Spot>, Broken> {
        let mut scanner = Self { bytes: &text.as_bytes()[..range.end], at: range.start };
        let mut spots = Vec::new();
        scanner.space();
        scanner.object(&mut |spot| spots.push(spot))?;
        scanner.space();
        if scanner.at == range.end { Ok(spots) } else { Err(Broken) }
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn eat(&mut self, byte: u8) -> Result<(), Broken> {
        if self.peek() != Some(byte) {
            return Err(Broken);
        }
        self.at += 1;
        Ok(())
    }

    fn space(&mut self) {
        while self.peek().is_some_and(|byte| b" \t\r\n".contains(&byte)) {
            self.at += 1;
        }
    }

    fn object(&mut self, found: &mut dyn FnMut(Spot)) -> Result<(), Broken> {
        self.eat(b'{')?;
        self.space();
        if self.peek() == Some(b'}') {
            return self.eat(b'}');
        }
        loop {
            self.space();
            let start = self.at;
            let key = self.string()?;
            let spelled = self.bytes[start + 1..self.at - 1] == *key.as_bytes();
            self.space();
            let colon = self.at;
            self.eat(b':')?;
            self.space();
            let from = self.at;
            self.value()?;
            found(Spot { key, spelled, start, colon, value: from..self.at });
            self.space();
            if self.peek() == Some(b'}') {
                return self.eat(b'}');
            }
            self.eat(b',')?;
        }
    }

    fn value(&mut self) -> Result<(), Broken> {
        match self.peek().ok_or(Broken)? {
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

    fn number(&mut self) -> Result<(), Broken> {
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

    fn digits(&mut self) -> Result<(), Broken> {
        let start = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        if self.at == start { Err(Broken) } else { Ok(()) }
    }

    /// A string and what it means; a lone surrogate means nothing in particular.
    fn string(&mut self) -> Result<String, Broken> {
        self.eat(b'"')?;
        let mut meant = Vec::new();
        loop {
            let byte = self.peek().ok_or(Broken)?;
            self.at += 1;
            match byte {
                b'"' => return String::from_utf8(meant).map_err(|_| Broken),
                b'\\' => {
                    let escaped = self.peek().ok_or(Broken)?;
                    self.at += 1;
                    let character = match escaped {
                        b'"' | b'\\' | b'/' => char::from(escaped),
                        b'b' => '\u{8}',
                        b'f' => '\u{c}',
                        b'n' => '\n',
                        b'r' => '\r',
                        b't' => '\t',
                        b'u' => {
                            let four = self.bytes.get(self.at..self.at + 4).ok_or(Broken)?;
                            if !four.iter().all(u8::is_ascii_hexdigit) {
                                return Err(Broken);
                            }
                            self.at += 4;
                            let code = std::str::from_utf8(four)
                                .ok()
                                .and_then(|hex| u32::from_str_radix(hex, 16).ok());
                            code.and_then(char::from_u32).unwrap_or('\u{fffd}')
                        }
                        _ => return Err(Broken),
                    };
                    meant.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
                }
                0..0x20 => return Err(Broken),
                _ => meant.push(byte),
            }
        }
    }
}
