//! The JSON lines that we write ourselves, and read back.
//!
//! A record must not be able to steer the terminal of whoever reads it: C0 and C1 controls, DEL, the line
//! separators U+2028 and U+2029 and the bidirectional controls are escaped wherever they occur in a string.

use std::borrow::Cow;
use std::io;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize as _};
use serde_json::value::RawValue;
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

use super::event::{Event, Reason, Value};
use super::line::Line;
use crate::printable::is_hazardous;

/// A line that came through, with what is known about its arrival.
#[derive(Debug)]
pub struct Accepted<'a> {
    /// When its batch arrived, in milliseconds since the Unix epoch.
    pub received_at: i64,
    /// The configured name of its source.
    pub source: &'a str,
    /// The key that verified it; none for a line that a policy let through.
    pub key_id: Option<&'a str>,
    /// The line as it came, without its terminator.
    pub raw: &'a [u8],
}

/// A line that did not.
#[derive(Debug)]
pub struct Quarantined<'a> {
    /// When its batch arrived, in milliseconds since the Unix epoch.
    pub received_at: i64,
    /// The configured name of its source.
    pub source: &'a str,
    /// Why it is here.
    pub reason: Reason,
    /// What exactly is wrong.
    pub detail: &'a str,
    /// The line (or the whole body) as it came.
    pub raw: &'a [u8],
}

/// Appends the record of an accepted line, with its `\n`.
pub fn write_accepted(out: &mut Vec<u8>, record: &Accepted<'_>) {
    out.extend_from_slice(b"{\"received_at\":\"");
    out.extend_from_slice(time_stamp(record.received_at).as_bytes());
    member_text(out, "\",\"source\":", record.source);
    // Only what parsed is accepted, so that the record is complete.
    if let Ok(line) = Line::parse(record.raw) {
        let event = line.event();
        member_text(out, ",\"format\":", line.format().as_str());
        if let Some(key_id) = record.key_id {
            member_text(out, ",\"key_id\":", key_id);
        }
        let verified: &[u8] =
            if record.key_id.is_some() { b",\"verified\":true" } else { b",\"verified\":false" };
        out.extend_from_slice(verified);
        if !event.ambiguous().is_empty() {
            out.extend_from_slice(b",\"ambiguous\":");
            write_keys(out, event.ambiguous());
        }
        out.extend_from_slice(b",\"event\":");
        write_event(out, &event);
    }
    member_text(out, ",\"raw\":", &String::from_utf8_lossy(record.raw));
    out.extend_from_slice(b"}\n");
}

/// Appends the record of a quarantined line, with its `\n`.
pub fn write_quarantined(out: &mut Vec<u8>, record: &Quarantined<'_>) {
    out.extend_from_slice(b"{\"received_at\":\"");
    out.extend_from_slice(time_stamp(record.received_at).as_bytes());
    member_text(out, "\",\"source\":", record.source);
    member_text(out, ",\"reason\":", record.reason.as_str());
    member_text(out, ",\"detail\":", record.detail);
    match std::str::from_utf8(record.raw) {
        Ok(text) => member_text(out, ",\"raw\":", text),
        Err(_) => member_text(out, ",\"raw_base64\":", &STANDARD.encode(record.raw)),
    }
    out.extend_from_slice(b"}\n");
}

/// Appends an event as a JSON object, fields in the order of their names.
pub fn write_event(out: &mut Vec<u8>, event: &Event) {
    out.push(b'{');
    for (index, (name, value)) in event.fields().enumerate() {
        member_text(out, if index == 0 { "" } else { "," }, name);
        out.push(b':');
        match value {
            Value::Text(text) => write_text(out, text),
            Value::Number(digits) => out.extend_from_slice(digits.as_bytes()),
            Value::Boolean(true) => out.extend_from_slice(b"true"),
            Value::Boolean(false) => out.extend_from_slice(b"false"),
            Value::Null => out.extend_from_slice(b"null"),
            Value::Json(json) => write_json(out, json),
        }
    }
    out.push(b'}');
}

/// Appends keys as a JSON array of strings.
pub fn write_keys(out: &mut Vec<u8>, keys: &[String]) {
    out.push(b'[');
    for (index, key) in keys.iter().enumerate() {
        member_text(out, if index == 0 { "" } else { "," }, key);
    }
    out.push(b']');
}

/// A line of one of our own files.
#[derive(Debug)]
pub struct Saved<'a> {
    /// The line as it was received.
    pub raw: Cow<'a, [u8]>,
    /// Why it was quarantined, when it was.
    pub reason: Option<Cow<'a, str>>,
    /// The key that the record says verified it.
    pub key_id: Option<Cow<'a, str>>,
    /// What the record says the line says: none in a quarantine record.
    pub claims: Option<Claims<'a>>,
}

/// The part of a record that follows from its raw line and must still do so.
#[derive(Debug)]
pub struct Claims<'a> {
    format: Cow<'a, str>,
    verified: bool,
    ambiguous: Vec<Cow<'a, str>>,
    event: &'a str,
}

impl Claims<'_> {
    /// Whether a raw line that is verified says what the record says.
    pub fn hold_for(&self, line: &Line<'_>) -> bool {
        let event = line.event();
        let mut written = Vec::with_capacity(self.event.len());
        write_event(&mut written, &event);
        self.verified
            && self.format == line.format().as_str()
            && self.ambiguous.iter().eq(event.ambiguous())
            && self.event.as_bytes() == written
    }
}

/// Reads a line of a file as one of our records; none when it is something else, such as a raw line.
pub fn read(line: &[u8]) -> Option<Saved<'_>> {
    #[derive(Deserialize)]
    struct Members<'a> {
        #[serde(borrow, rename = "received_at")]
        _received_at: Cow<'a, str>,
        #[serde(borrow, rename = "source")]
        _source: Cow<'a, str>,
        #[serde(borrow)]
        reason: Option<Cow<'a, str>>,
        #[serde(borrow)]
        key_id: Option<Cow<'a, str>>,
        #[serde(borrow)]
        format: Option<Cow<'a, str>>,
        verified: Option<bool>,
        #[serde(borrow, default)]
        ambiguous: Vec<Cow<'a, str>>,
        #[serde(borrow)]
        event: Option<&'a RawValue>,
        #[serde(borrow)]
        raw: Option<Cow<'a, str>>,
        #[serde(borrow)]
        raw_base64: Option<Cow<'a, str>>,
    }
    let members: Members<'_> = serde_json::from_slice(line).ok()?;
    let raw = match (members.raw, members.raw_base64) {
        (Some(Cow::Borrowed(text)), None) => Cow::Borrowed(text.as_bytes()),
        (Some(Cow::Owned(text)), None) => Cow::Owned(text.into_bytes()),
        (None, Some(text)) => Cow::Owned(STANDARD.decode(text.as_bytes()).ok()?),
        _ => return None,
    };
    let claims = match (members.format, members.verified, members.event) {
        (Some(format), Some(verified), Some(event)) => {
            Some(Claims { format, verified, ambiguous: members.ambiguous, event: event.get() })
        }
        _ => None,
    };
    if claims.is_none() && members.reason.is_none() {
        return None;
    }
    Some(Saved { raw, reason: members.reason, key_id: members.key_id, claims })
}

/// A moment as RFC 3339 in UTC with milliseconds: `2026-01-02T03:04:05.678Z`.
pub fn time_stamp(milliseconds: i64) -> String {
    const SHAPE: &[BorrowedFormatItem<'_>] =
        format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(milliseconds) * 1_000_000)
        .ok()
        .and_then(|moment| moment.format(SHAPE).ok())
        .unwrap_or_else(|| milliseconds.to_string())
}

/// Appends `lead` and a JSON string.
fn member_text(out: &mut Vec<u8>, lead: &str, text: &str) {
    out.extend_from_slice(lead.as_bytes());
    write_text(out, text);
}

fn write_text(out: &mut Vec<u8>, text: &str) {
    let mut serializer = serde_json::Serializer::with_formatter(out, Harmless);
    // Writing a string into memory cannot fail.
    let _ = text.serialize(&mut serializer);
}

/// Appends JSON as it came. Outside strings only white space can be hazardous, and becomes a space.
fn write_json(out: &mut Vec<u8>, json: &str) {
    for (index, piece) in json.split(['\t', '\n', '\r']).enumerate() {
        if index > 0 {
            out.push(b' ');
        }
        // Writing into memory cannot fail.
        let _ = write_harmless(out, piece);
    }
}

/// serde_json's compact form, with more escapes.
struct Harmless;

impl serde_json::ser::Formatter for Harmless {
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, text: &str) -> io::Result<()> {
        write_harmless(writer, text)
    }
}

fn write_harmless<W: ?Sized + io::Write>(writer: &mut W, text: &str) -> io::Result<()> {
    // Everything hazardous that JSON leaves alone is DEL or not ASCII.
    if text.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
        return writer.write_all(text.as_bytes());
    }
    let mut start = 0;
    for (at, character) in text.char_indices().filter(|(_, character)| is_hazardous(*character)) {
        writer.write_all(&text.as_bytes()[start..at])?;
        write!(writer, "\\u{:04x}", u32::from(character))?;
        start = at + character.len_utf8();
    }
    writer.write_all(&text.as_bytes()[start..])
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn controls_never_reach_the_reader() {
        let hazard = "\u{7f}\u{9b}31m\u{2028}\u{202e}\u{2066}\u{200e}";
        let record = accepted(&format!("{{\"a\":\"\\u001b[31m{hazard}\",\"b{hazard}\":[\"{hazard}\",\t1]}}"));
        assert!(!record.trim_end_matches('\n').contains(is_hazardous), "{record:?}");
        let read: serde_json::Value = serde_json::from_str(&record).unwrap();
        assert_eq!(read["event"]["a"], format!("\u{1b}[31m{hazard}"));
        assert_eq!(read["event"][format!("b{hazard}")][0], hazard);
    }

    #[test]
    fn a_record_is_read_back_and_proves_itself() {
        let raw = r#"{"a":"x y","rt":"1"}"#;
        let record = accepted(raw);
        let saved = read(record.trim_end().as_bytes()).unwrap();
        assert_eq!(saved.raw.as_ref(), raw.as_bytes());
        assert_eq!(saved.key_id.as_deref(), Some("k"));
        let line = Line::parse(&saved.raw).unwrap();
        assert!(saved.claims.as_ref().unwrap().hold_for(&line));
        let altered = record.replacen("x y", "x z", 1);
        let saved = read(altered.trim_end().as_bytes()).unwrap();
        assert!(!saved.claims.unwrap().hold_for(&Line::parse(&saved.raw).unwrap()));
        assert!(read(raw.as_bytes()).is_none());
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
            assert_eq!(saved.reason.as_deref(), Some("malformed"));
        }
    }
}
