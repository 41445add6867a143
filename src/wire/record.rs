//! The JSON lines that we write ourselves, and read back.
//!
//! A record must not be able to control the reader's terminal: C0 and C1 controls, DEL, the line
//! separators U+2028 and U+2029 and the bidirectional controls are escaped wherever they occur in a
//! string.

#[cfg(test)]
mod reference;
mod text;

use std::borrow::Cow;
use std::fmt;
use std::io::Write as _;

use base64::Engine as _;
use base64::display::Base64Display;
use base64::engine::general_purpose::STANDARD;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use text::{write_json, write_text};
use time::OffsetDateTime;

use super::event::{Event, Reason, Value, truth};
use super::line::Line;

/// An accepted line, with what is known about its arrival.
#[derive(Debug)]
pub struct Accepted<'a> {
    /// Time at which its batch arrived, in milliseconds since the Unix epoch.
    pub received_at: i64,
    /// The configured name of its source.
    pub source: &'a str,
    /// ID of the key that verified it; none for a line that a policy accepted.
    pub key_id: Option<&'a str>,
    /// The line as it was received, without its terminator.
    pub raw: &'a [u8],
}

/// A rejected line.
#[derive(Debug)]
pub struct Quarantined<'a> {
    /// Time at which its batch arrived, in milliseconds since the Unix epoch.
    pub received_at: i64,
    /// The configured name of its source.
    pub source: &'a str,
    /// Reason of the rejection.
    pub reason: Reason,
    /// Description of the error.
    pub detail: &'a str,
    /// The line (or the whole body) as it was received.
    pub raw: &'a [u8],
}

/// Appends the record of an accepted line, with its `\n`.
pub fn write_accepted(out: &mut Vec<u8>, record: &Accepted<'_>) {
    // The record holds the line twice.
    out.reserve(3 * record.raw.len() + 256);
    begin(out, record.received_at, record.source);
    let text = std::str::from_utf8(record.raw).ok();
    // Only what parsed is accepted, so the record is complete.
    if let Ok(line) = text.map_or_else(|| Line::parse(record.raw), Line::parse_text) {
        member_text(out, ",\"format\":", line.format().as_str());
        if let Some(key_id) = record.key_id {
            member_text(out, ",\"key_id\":", key_id);
        }
        let verified: &[u8] =
            if record.key_id.is_some() { b",\"verified\":true" } else { b",\"verified\":false" };
        out.extend_from_slice(verified);
        let ambiguous = line.ambiguous();
        if !ambiguous.is_empty() {
            out.extend_from_slice(b",\"ambiguous\":");
            write_keys(out, &ambiguous);
        }
        out.extend_from_slice(b",\"event\":");
        write_line(out, &line);
    }
    end_with_raw(out, record.raw, text);
}

/// Appends the record of a quarantined line, with its `\n`.
pub fn write_quarantined(out: &mut Vec<u8>, record: &Quarantined<'_>) {
    begin(out, record.received_at, record.source);
    member_text(out, ",\"reason\":", record.reason.as_str());
    member_text(out, ",\"detail\":", record.detail);
    end_with_raw(out, record.raw, std::str::from_utf8(record.raw).ok());
}

/// Appends the members that every record begins with.
fn begin(out: &mut Vec<u8>, received_at: i64, source: &str) {
    out.extend_from_slice(b"{\"received_at\":\"");
    write_time_stamp(out, received_at);
    member_text(out, "\",\"source\":", source);
}

/// Appends the line itself, and the end of its record. `text` is the line, if it is UTF-8.
fn end_with_raw(out: &mut Vec<u8>, raw: &[u8], text: Option<&str>) {
    match text {
        Some(text) => member_text(out, ",\"raw\":", text),
        None => {
            // Piece by piece: a body that cannot be decoded is a line, too.
            let _ = write!(out, ",\"raw_base64\":\"{}\"", Base64Display::new(raw, &STANDARD));
        }
    }
    out.extend_from_slice(b"}\n");
}

/// Maximum depth of a value that is written as JSON. `jq` 1.6 reads no more than 256 levels, other
/// programs even less, and one deeper record would keep them from reading the rest of the file.
const DEEPEST: usize = 100;

/// Appends an event as a JSON object, fields in the order of their names. A value nested more than
/// 100 deep is written as a string that holds its JSON text.
pub fn write_event(out: &mut Vec<u8>, event: &Event) {
    out.push(b'{');
    for (index, (name, value)) in event.fields().enumerate() {
        write_member(out, index, name, value);
    }
    out.push(b'}');
}

/// Appends what [`write_event`] does for the event of a line.
fn write_line(out: &mut Vec<u8>, line: &Line<'_>) {
    out.push(b'{');
    for (index, field) in line.fields().enumerate() {
        write_member(out, index, &field.key, &field.value());
    }
    out.push(b'}');
}

fn write_member(out: &mut Vec<u8>, index: usize, name: &str, value: &Value<impl AsRef<str>>) {
    if index > 0 {
        out.push(b',');
    }
    write_text(out, name);
    out.push(b':');
    match value {
        Value::Text(text) => write_text(out, text.as_ref()),
        Value::Number(digits) => out.extend_from_slice(digits.as_ref().as_bytes()),
        Value::Boolean(value) => out.extend_from_slice(truth(*value).as_bytes()),
        Value::Null => out.extend_from_slice(b"null"),
        Value::Json(json) if is_deep(json.as_ref()) => write_text(out, json.as_ref()),
        Value::Json(json) => write_json(out, json.as_ref()),
    }
}

/// Appends keys as a JSON array of strings.
pub fn write_keys(out: &mut Vec<u8>, keys: &[impl AsRef<str>]) {
    out.push(b'[');
    for (index, key) in keys.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        write_text(out, key.as_ref());
    }
    out.push(b']');
}

/// A line of one of our own files.
#[derive(Debug)]
pub struct Saved<'a> {
    /// The line as it was received; of a misshapen record, the record.
    pub raw: Cow<'a, [u8]>,
    /// Kind of the record.
    pub kind: Kind<'a>,
}

/// The kinds of records, which have no member in common but `received_at`, `source` and `raw`.
#[derive(Debug)]
pub enum Kind<'a> {
    /// A record of an accepted line.
    Accepted(Claims<'a>),
    /// A record of a rejected line.
    Quarantined(Rejection<'a>),
    /// A record that we do not write: members of both kinds, or one that is missing, foreign, of
    /// another type or there twice. What readers of the file take from it follows from nothing.
    Misshapen,
}

/// What a record says of a rejected line; nothing proves it.
#[derive(Clone, Debug)]
pub struct Rejection<'a> {
    /// Time at which the batch arrived, as [`time_stamp`] writes it.
    pub received_at: Cow<'a, str>,
    /// The configured name of the source.
    pub source: Cow<'a, str>,
    /// The name of a [`Reason`].
    pub reason: Cow<'a, str>,
    /// Description of the error; empty where there is none.
    pub detail: Cow<'a, str>,
}

/// The part of a record of an accepted line that follows from its raw line and must still do so.
#[derive(Debug)]
pub struct Claims<'a> {
    /// ID of the key that verified it, according to the record.
    pub key_id: Option<Cow<'a, str>>,
    /// Whether the record says that a key verified it. False is a line that a policy accepted.
    pub verified: bool,
    format: Cow<'a, str>,
    ambiguous: Vec<Cow<'a, str>>,
    event: &'a str,
}

impl Claims<'_> {
    /// Returns whether a raw line matches what the record says of its event.
    pub fn hold_for(&self, line: &Line<'_>) -> bool {
        let mut written = Vec::with_capacity(self.event.len());
        write_line(&mut written, line);
        self.format == line.format().as_str()
            && self.ambiguous.iter().eq(line.ambiguous())
            && self.event.as_bytes() == written
    }
}

/// The members that any of our records has.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Members<'a> {
    #[serde(borrow)]
    received_at: Cow<'a, str>,
    #[serde(borrow)]
    source: Cow<'a, str>,
    #[serde(borrow, default, deserialize_with = "not_null")]
    reason: Option<Text<'a>>,
    #[serde(borrow, default, deserialize_with = "not_null")]
    detail: Option<Text<'a>>,
    #[serde(borrow, default, deserialize_with = "not_null")]
    key_id: Option<Text<'a>>,
    #[serde(borrow, default, deserialize_with = "not_null")]
    format: Option<Text<'a>>,
    #[serde(default, deserialize_with = "not_null")]
    verified: Option<bool>,
    #[serde(borrow, default, deserialize_with = "not_null")]
    ambiguous: Option<Vec<Text<'a>>>,
    #[serde(borrow, default, deserialize_with = "not_null")]
    event: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "not_null")]
    raw: Option<Text<'a>>,
    #[serde(borrow, default, deserialize_with = "not_null")]
    raw_base64: Option<Text<'a>>,
}

/// Text that is borrowed where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// Deserializes a member. We write no `null`: what is not there has no member.
fn not_null<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// Reads a line of a file as one of our records; none when it is something else, such as a raw
/// line.
pub fn read(line: &[u8]) -> Option<Saved<'_>> {
    if let Some(saved) = serde_json::from_slice::<Members<'_>>(line).ok().and_then(well_shaped) {
        return Some(saved);
    }
    passes_for_a_record(line).then_some(Saved { raw: Cow::Borrowed(line), kind: Kind::Misshapen })
}

fn well_shaped(members: Members<'_>) -> Option<Saved<'_>> {
    let Members {
        received_at,
        source,
        reason,
        detail,
        key_id,
        format,
        verified,
        ambiguous,
        event,
        raw,
        raw_base64,
    } = members;
    let raw = match (raw, raw_base64) {
        (Some(Text(Cow::Borrowed(text))), None) => Cow::Borrowed(text.as_bytes()),
        (Some(Text(Cow::Owned(text))), None) => Cow::Owned(text.into_bytes()),
        // What is UTF-8 is written as `raw`.
        (None, Some(Text(text))) => {
            let bytes =
                STANDARD.decode(text.as_bytes()).ok().filter(|bytes| std::str::from_utf8(bytes).is_err());
            Cow::Owned(bytes?)
        }
        _ => return None,
    };
    let kind = match (reason, detail, format, verified, event, key_id, ambiguous) {
        (Some(Text(reason)), detail, None, None, None, None, None)
            if Reason::ALL.iter().any(|known| known.as_str() == reason) =>
        {
            let detail = detail.map(|Text(detail)| detail).unwrap_or_default();
            Kind::Quarantined(Rejection { received_at, source, reason, detail })
        }
        (None, None, Some(Text(format)), Some(verified), Some(event), key_id, ambiguous)
            if event.get().starts_with('{') =>
        {
            let ambiguous = ambiguous.into_iter().flatten().map(|Text(key)| key).collect();
            let key_id = key_id.map(|Text(id)| id);
            Kind::Accepted(Claims { key_id, verified, format, ambiguous, event: event.get() })
        }
        _ => return None,
    };
    Some(Saved { raw, kind })
}

/// Returns whether a reader would take a line for a record of ours that has our raw line in it. A
/// line with a signature of its own is an event that happens to have such members, which is proved
/// or not as a whole.
fn passes_for_a_record(line: &[u8]) -> bool {
    #[derive(Default)]
    struct Names {
        received_at: bool,
        source: bool,
        raw: bool,
        sig: bool,
    }

    impl<'de> Visitor<'de> for Names {
        type Value = Self;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        // Keeps no name: a line may have millions of them.
        fn visit_map<A: MapAccess<'de>>(mut self, mut members: A) -> Result<Self, A::Error> {
            while let Some(name) = members.next_key::<Cow<'_, str>>()? {
                match &*name {
                    "received_at" => self.received_at = true,
                    "source" => self.source = true,
                    "raw" | "raw_base64" => self.raw = true,
                    "sig" => self.sig = true,
                    _ => {}
                }
                members.next_value::<IgnoredAny>()?;
            }
            Ok(self)
        }
    }

    let mut deserializer = serde_json::Deserializer::from_slice(line);
    let names = deserializer.deserialize_map(Names::default());
    names.is_ok_and(|names| names.received_at && names.source && names.raw && !names.sig)
}

/// Formats a time as RFC 3339 in UTC with milliseconds: `2026-01-02T03:04:05.678Z`.
pub fn time_stamp(milliseconds: i64) -> String {
    let mut stamp = Vec::with_capacity(24);
    write_time_stamp(&mut stamp, milliseconds);
    String::from_utf8(stamp).unwrap_or_default()
}

/// Appends what [`time_stamp`] returns. A time that has no such form is its milliseconds.
pub fn write_time_stamp(out: &mut Vec<u8>, milliseconds: i64) {
    let Ok(moment) = OffsetDateTime::from_unix_timestamp(milliseconds.div_euclid(1000)) else {
        out.extend_from_slice(milliseconds.to_string().as_bytes());
        return;
    };
    let ((year, month, day), (hour, minute, second)) = (moment.to_calendar_date(), moment.to_hms());
    let mut stamp = *b"0000-00-00T00:00:00.000Z";
    for (digits, mut number) in [
        (0..4, u64::from(year.unsigned_abs())),
        (5..7, u8::from(month).into()),
        (8..10, day.into()),
        (11..13, hour.into()),
        (14..16, minute.into()),
        (17..19, second.into()),
        (20..23, milliseconds.rem_euclid(1000).unsigned_abs()),
    ] {
        for digit in stamp[digits].iter_mut().rev() {
            *digit = b'0' + (number % 10) as u8;
            number /= 10;
        }
    }
    if year < 0 {
        out.push(b'-');
    }
    out.extend_from_slice(&stamp);
}

/// Appends `lead` and a JSON string.
fn member_text(out: &mut Vec<u8>, lead: &str, text: &str) {
    out.extend_from_slice(lead.as_bytes());
    write_text(out, text);
}

/// Returns whether JSON is nested more than [`DEEPEST`] levels.
fn is_deep(json: &str) -> bool {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    json.bytes().any(|byte| {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => depth += 1,
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth > DEEPEST
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::escape::is_hazardous;

    fn accepted(raw: &str) -> String {
        let mut out = Vec::new();
        let record =
            Accepted { received_at: 1_767_323_045_678, source: "us", key_id: Some("k"), raw: raw.as_bytes() };
        write_accepted(&mut out, &record);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn an_accepted_line_is_one_object() {
        assert_eq!(
            accepted(r#"{"trace_id":18446744073709551616,"rt":"12","x":1e3,"success":"true"}"#),
            concat!(
                r#"{"received_at":"2026-01-02T03:04:05.678Z","source":"us","format":"json","key_id":"k","#,
                r#""verified":true,"event":{"rt":12,"success":true,"trace_id":"18446744073709551616","x":1e3},"#,
                r#""raw":"{\"trace_id\":18446744073709551616,\"rt\":\"12\",\"x\":1e3,\"success\":\"true\"}"}"#,
                "\n"
            )
        );
        assert!(accepted(r#"{"a":1,"a":2}"#).contains(r#","ambiguous":["a"],"event":{},"#));
    }

    #[test]
    fn hazardous_characters_are_escaped() {
        let hazard = "\u{7f}\u{9b}31m\u{2028}\u{202e}\u{2066}\u{200e}";
        let record = accepted(&format!("{{\"a\":\"\\u001b[31m{hazard}\",\"b{hazard}\":[\"{hazard}\",\t1]}}"));
        assert!(!record.trim_end_matches('\n').contains(is_hazardous), "{record:?}");
        let read: serde_json::Value = serde_json::from_str(&record).unwrap();
        assert_eq!(read["event"]["a"], format!("\u{1b}[31m{hazard}"));
        assert_eq!(read["event"][format!("b{hazard}")][0], hazard);
    }

    #[test]
    fn a_record_is_read_back_and_must_match_its_line() {
        let raw = r#"{"a":"x y","rt":"1"}"#;
        let record = accepted(raw);
        let saved = read(record.trim_end().as_bytes()).unwrap();
        assert_eq!(saved.raw.as_ref(), raw.as_bytes());
        let line = Line::parse(raw.as_bytes()).unwrap();
        let Kind::Accepted(claims) = saved.kind else { panic!("{saved:?}") };
        assert_eq!((claims.key_id.as_deref(), claims.verified), (Some("k"), true));
        assert!(claims.hold_for(&line));
        let altered = record.replacen("x y", "x z", 1);
        let Kind::Accepted(claims) = read(altered.trim_end().as_bytes()).unwrap().kind else {
            panic!("{altered}")
        };
        assert!(!claims.hold_for(&line));
        assert!(read(raw.as_bytes()).is_none());
    }

    #[test]
    fn a_record_of_both_kinds_or_of_neither_is_misshapen() {
        let accepted = accepted(r#"{"a":"x","rt":"1","b":1,"b":2}"#);
        let mut quarantined = Vec::new();
        let record = Quarantined {
            received_at: 0,
            source: "us",
            reason: Reason::BadSignature,
            detail: "no key",
            raw: b"x",
        };
        write_quarantined(&mut quarantined, &record);
        let quarantined = String::from_utf8(quarantined).unwrap();
        let object = |text: &str| -> serde_json::Map<String, serde_json::Value> {
            serde_json::from_str(text).unwrap()
        };
        let is_misshapen = |text: &str| {
            read(text.trim_end().as_bytes()).is_some_and(|saved| matches!(saved.kind, Kind::Misshapen))
        };
        for whole in [&accepted, &quarantined] {
            assert!(!is_misshapen(whole));
            let (own, other) =
                (object(whole), object(if whole == &accepted { &quarantined } else { &accepted }));
            // Any member that only the other kind has, one that no kind has, and a `null`.
            let of_other_kind = other.iter().filter(|(name, _)| !own.contains_key(*name));
            let more = of_other_kind.map(|(name, value)| (name.clone(), value.clone()));
            for (name, value) in
                more.chain([("granted".to_owned(), false.into()), ("Event".into(), 1.into())])
            {
                let mut altered = own.clone();
                altered.insert(name.clone(), value);
                assert!(is_misshapen(&serde_json::to_string(&altered).unwrap()), "{name} was added");
            }
            for name in own.keys() {
                for value in [serde_json::Value::Null, serde_json::json!({})] {
                    let mut altered = own.clone();
                    altered.insert(name.clone(), value.clone());
                    // Another event is found when it is compared with its line.
                    let is_found = is_misshapen(&serde_json::to_string(&altered).unwrap());
                    assert_eq!(is_found, name != "event" || value.is_null(), "{name} became {value}");
                }
                let twice = whole.replacen('{', &format!("{{\"{name}\":{},", own[name]), 1);
                assert!(is_misshapen(&twice), "{name} was repeated");
            }
            for name in
                ["format", "verified", "event", "reason"].iter().filter(|name| own.contains_key(**name))
            {
                let mut altered = own.clone();
                altered.remove(*name);
                assert!(is_misshapen(&serde_json::to_string(&altered).unwrap()), "{name} was removed");
            }
        }
        // A reported attack: a verified event as an unverified one.
        let forged = accepted.replacen("\"format\":\"json\",", "\"reason\":\"\",", 1);
        assert!(is_misshapen(&forged));
        assert!(is_misshapen(&accepted.replacen("\"raw\"", "\"raw_base64\"", 1)));
        // An object with a signature of its own is an event, whatever its fields are called.
        assert!(read(forged.replacen('{', "{\"sig\":\"x\",", 1).trim_end().as_bytes()).is_none());
    }

    #[test]
    fn a_quarantined_line_keeps_its_bytes() {
        for raw in [&b"plain"[..], b"\xff\x00bin", b"a\x1b[0m\"\\"] {
            let mut out = Vec::new();
            let record = Quarantined {
                received_at: 0,
                source: "us",
                reason: Reason::Malformed,
                detail: "not UTF-8",
                raw,
            };
            write_quarantined(&mut out, &record);
            let text = String::from_utf8(out).unwrap();
            assert!(!text.trim_end_matches('\n').contains(is_hazardous));
            let saved = read(text.trim_end().as_bytes()).unwrap();
            assert_eq!(saved.raw.as_ref(), raw);
            assert!(matches!(saved.kind, Kind::Quarantined(about) if about.reason == "malformed"));
        }
    }
}
