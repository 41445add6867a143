//! Generated lines, genuine and damaged.

use aws_lc_rs::signature::Ed25519KeyPair;
use ed25519_dalek::{Signer as _, SigningKey};
use rand::RngExt as _;
use rand::rngs::StdRng;

use crate::wire::event::{Event, Format, Value};
use crate::wire::{cef, json, signature};

/// Number of keys. All but the last are trusted.
pub(super) const KEYS: usize = 4;

/// Secret half of a key by its number.
pub(super) fn secret(number: usize) -> [u8; 32] {
    [u8::try_from(number).unwrap() + 1; 32]
}

/// How a genuine line is signed and where its signature is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Style {
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
    pub(super) const ALL: [Self; 8] = [
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

/// A change to a line. Some changes are harmless, and then the line must still verify.
#[derive(Clone, Copy, Debug)]
pub(super) enum Damage {
    FlippedBit,
    FlippedBitOfSignature,
    InsertedByte,
    RemovedByte,
    Truncated,
    SwappedSignatures,
    UntrustedKey,
    OtherTrustedKey,
    DoubledSignature,
    NoSignature,
    EmptySignature,
    PaddedSignature,
    HalfPaddedSignature,
    NonZeroTrailingBits,
    StandardAlphabet,
    ShortSignature,
    WhiteSpace,
    EscapedKey,
    CarriageReturn,
    LineBreak,
    SwappedWords,
    RandomBytes,
}

impl Damage {
    pub(super) const ALL: [Self; 22] = [
        Self::FlippedBit,
        Self::FlippedBitOfSignature,
        Self::InsertedByte,
        Self::RemovedByte,
        Self::Truncated,
        Self::SwappedSignatures,
        Self::UntrustedKey,
        Self::OtherTrustedKey,
        Self::DoubledSignature,
        Self::NoSignature,
        Self::EmptySignature,
        Self::PaddedSignature,
        Self::HalfPaddedSignature,
        Self::NonZeroTrailingBits,
        Self::StandardAlphabet,
        Self::ShortSignature,
        Self::WhiteSpace,
        Self::EscapedKey,
        Self::CarriageReturn,
        Self::LineBreak,
        Self::SwappedWords,
        Self::RandomBytes,
    ];
}

/// Generated lines, and how each was made.
pub(super) struct GeneratedLines {
    pub(super) lines: Vec<Vec<u8>>,
    pub(super) origins: Vec<Origin>,
}

/// How a line was made.
pub(super) struct Origin {
    pub(super) style: Style,
    /// Number of the trusted key that signed it.
    pub(super) key: usize,
    pub(super) damage: Option<Damage>,
}

impl GeneratedLines {
    pub(super) fn new(count: u64, random: &mut StdRng) -> Self {
        let secrets: [[u8; 32]; KEYS] = std::array::from_fn(secret);
        let dalek = secrets.map(|secret| SigningKey::from_bytes(&secret));
        let aws = secrets.map(|secret| Ed25519KeyPair::from_seed_unchecked(&secret).unwrap());
        let mut generated = Self { lines: Vec::new(), origins: Vec::new() };
        let mut signed = Vec::new();
        for number in 0..count {
            let style = Style::ALL[random.random_range(0..Style::ALL.len())];
            // Most lines have the same key, as in practice.
            let key = random.random_range(0..12_usize).saturating_sub(9);
            let plain = unsigned_line(style.format(), &event(number, random));
            let by =
                |key: usize| signature::encode(&aws[key].sign(plain.as_bytes()).as_ref().try_into().unwrap());
            let line = match style {
                Style::Cef | Style::JsonLast | Style::CpsWhole if random.random() => {
                    let mut line = plain.clone().into_bytes();
                    let signature = dalek[key].sign(&line).to_bytes();
                    signature::insert(style.format(), &mut line, &signature);
                    line
                }
                _ => style.place(&plain, &by(key)).into_bytes(),
            };
            generated.lines.push(line);
            generated.origins.push(Origin { style, key, damage: None });
            let (untrusted, other, own) = (by(KEYS - 1), by((key + 1) % (KEYS - 1)), by(key));
            signed.push((plain, untrusted, other, own));
        }
        for at in 0..generated.lines.len() {
            if random.random_ratio(1, 100) {
                let damage = Damage::ALL[random.random_range(0..Damage::ALL.len())];
                let (plain, untrusted, other, own) = &signed[at];
                let neighbour = &signed[(at + 1) % signed.len()].3;
                let style = generated.origins[at].style;
                let signatures = Signatures { untrusted, other, own, neighbour };
                generated.lines[at] = damage.apply(&generated.lines[at], plain, style, &signatures, random);
                generated.origins[at].damage = Some(damage);
            }
        }
        generated
    }
}

/// An event of one of Konnect's three types: authentication, authorization or access.
fn event(number: u64, random: &mut StdRng) -> Event {
    const AGENTS: [&str; 4] = [
        "curl/8.7.1",
        "grpc-node/1.24.11 grpc-c/8.0.0 (linux; chttp2; ganges)",
        "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
        "Grüße/1.0",
    ];
    let text = |value: &str| Value::Text(value.to_owned());
    let id = |random: &mut StdRng| Value::Text(format!("{:032x}", random.random::<u128>()));
    let mut fields = vec![
        ("cef_version", Value::Number("0".to_owned())),
        ("event_ts", text("2026-01-02T03:04:05Z")),
        ("event_vendor", text("KongInc")),
        ("event_product", text("Konnect")),
        ("event_version", text("1.0")),
        ("rt", Value::Number((1_767_323_045_678 + number).to_string())),
        ("src", Value::Text(format!("192.0.2.{}", random.random_range(1..255_u8)))),
        ("org_id", id(random)),
        ("principal_id", id(random)),
        // Above 2^53, as a good part of the real ones is.
        ("trace_id", Value::Text(random.random_range(1_u64 << 53..=u64::MAX).to_string())),
        ("user_agent", text(AGENTS[random.random_range(0..AGENTS.len())])),
    ];
    let request = Value::Text(format!("/v2/control-planes/{number}/services"));
    fields.extend(match random.random_range(0..3_usize) {
        0 => vec![
            ("event_class_id", text("AUTHENTICATION_TYPE_PAT")),
            ("name", text("AUTHENTICATION_OUTCOME_SUCCESS")),
            ("severity", Value::Number("0".to_owned())),
            ("request", request),
            ("success", Value::Boolean(random.random())),
        ],
        1 => vec![
            ("event_class_id", text("konnect")),
            ("name", text("Authz.services")),
            ("severity", Value::Number("1".to_owned())),
            ("action", text("retrieve")),
            ("granted", Value::Boolean(random.random())),
            ("actor_id", text("")),
        ],
        _ => vec![
            ("event_class_id", text("KongGateway")),
            ("name", text("Ingress")),
            ("severity", Value::Number("1".to_owned())),
            ("request", request),
            ("act", text("POST")),
            ("status", Value::Number("200".to_owned())),
            ("query", Value::Text(format!(r#"{{"end":"{number}","page[size]":"100"}}"#))),
        ],
    });
    let mut event = Event::new();
    for (name, value) in fields {
        event.set(name, value);
    }
    event
}

fn unsigned_line(format: Format, event: &Event) -> String {
    let line = match format {
        Format::Cef => cef::write(event).unwrap(),
        Format::Json => json::write(event),
        Format::Cps => json::write_wrapped(event),
    };
    String::from_utf8(line).unwrap()
}

/// Signatures that may replace a line's own.
struct Signatures<'a> {
    /// By a key that is not trusted.
    untrusted: &'a str,
    /// By another trusted key: as good as its own.
    other: &'a str,
    own: &'a str,
    /// The next line's.
    neighbour: &'a str,
}

impl Damage {
    fn apply(
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
            Self::UntrustedKey => return placed(signatures.untrusted),
            Self::OtherTrustedKey => return placed(signatures.other),
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
            Self::NonZeroTrailingBits => {
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
            Self::RandomBytes => bytes = (0..random.random_range(1..300)).map(|_| random.random()).collect(),
        }
        bytes
    }
}
