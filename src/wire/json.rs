//! A JSON or CPS line, both directions (RFC 8259).
//!
//! The line is checked as JSON in one pass that records where each member of the top object is;
//! values are parsed only on demand, and numbers keep their spelling.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::event::{Event, Format, Malformed, Value};
use super::line::{Field, Line, Notation, take_repeated};
use super::signature::{Reading, Signed, cut_member};

/// Parses a JSON or CPS line.
pub(super) fn parse(text: &str) -> Result<Line<'_>, Malformed> {
    let outer = members(text)?;
    match wrapped(&outer) {
        Some(inner) => parse_wrapped(text, &outer, inner),
        None => {
            let signed = signature(text, &outer)?;
            Ok(line(text, Format::Json, signed, outer))
        }
    }
}

/// Writes an event as one JSON object without spaces, members in the order of their names.
///
/// It parses back to the same event, with three exceptions: ambiguous keys are left out; a `sig`
/// that is not text makes the line malformed; and an event whose only field, apart from `sig`, is
/// `event` with an object cannot be distinguished from CPS. Numbers and raw JSON are not checked.
pub fn write(event: &Event) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    out.push(b'{');
    for (index, (name, value)) in event.fields().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        write_string(&mut out, name);
        out.push(b':');
        match value {
            Value::Text(text) => write_string(&mut out, text),
            Value::Number(text) | Value::Json(text) => out.extend_from_slice(text.as_bytes()),
            Value::Boolean(true) => out.extend_from_slice(b"true"),
            Value::Boolean(false) => out.extend_from_slice(b"false"),
            Value::Null => out.extend_from_slice(b"null"),
        }
    }
    out.push(b'}');
    out
}

/// Writes an event as CPS: the JSON object wrapped once.
pub fn write_wrapped(event: &Event) -> Vec<u8> {
    [WRAPPER.as_bytes(), &write(event), b"}"].concat()
}

const WRAPPER: &str = r#"{"event":"#;

/// Returns CPS's inner object, when the only member besides a signature is `event` and holds an
/// object.
fn wrapped<'a>(outer: &[Field<'a>]) -> Option<&'a str> {
    let mut inner = None;
    for member in outer {
        match (member.key.as_ref(), &member.value) {
            ("event", Cow::Borrowed(value)) if inner.is_none() && value.starts_with('{') => {
                inner = Some(*value);
            }
            ("sig", _) => {}
            _ => return None,
        }
    }
    inner
}

fn parse_wrapped<'a>(text: &'a str, outer: &[Field<'a>], inner: &'a str) -> Result<Line<'a>, Malformed> {
    let members = members(inner)?;
    // A wrapper in a wrapper: if the inner one were a reading of its own, any client that has seen
    // an event could have it accepted again by wrapping it once more.
    let is_nested = wrapped(&members).is_some();
    let outside = signature(text, outer)?;
    let inside = signature(inner, &members)?;
    let signed = match (outside, inside) {
        (Some(_), Some(_)) => return Err(TWO_SIGNATURES),
        (None, Some(inside)) => {
            let start = offset(text, inner);
            let end = start + inner.len();
            // The reading of the inner object leaves the wrapper unsigned, so the wrapper must have
            // the one spelling that Kong documents, with or without its space.
            let plain =
                !is_nested && matches!(&text[..start], WRAPPER | r#"{"event": "#) && &text[end..] == "}";
            let cut = start + inside.first.before.len()..end - inside.first.after.len();
            let whole = Reading { before: &text.as_bytes()[..cut.start], after: &text.as_bytes()[cut.end..] };
            Some(Signed { value: inside.value, first: whole, second: plain.then_some(inside.first) })
        }
        (outside, None) => outside,
    };
    Ok(line(text, Format::Cps, signed, members))
}

const TWO_SIGNATURES: Malformed = Malformed(Cow::Borrowed("two members `sig`"));
const NO_STRING: Malformed = Malformed(Cow::Borrowed("the member `sig` is not a string"));

/// Finds the signature among an object's members.
fn signature<'a>(text: &'a str, members: &[Field<'a>]) -> Result<Option<Signed<'a>>, Malformed> {
    let mut found = None;
    for (index, member) in members.iter().enumerate().filter(|(_, member)| member.key == "sig") {
        let Cow::Borrowed(key) = member.key else {
            return Err("an escaped spelling of the key `sig`".into());
        };
        if found.is_some() {
            return Err(TWO_SIGNATURES);
        }
        let Cow::Borrowed(spelled) = member.value else { return Err(NO_STRING) };
        let Some(value) = spelled.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) else {
            return Err(NO_STRING);
        };
        let key = offset(text, key) - 1..offset(text, key) + key.len() + 1;
        let start = offset(text, spelled);
        let cut = cut_member(text, key, start..start + spelled.len(), index == 0)?;
        let bytes = text.as_bytes();
        let first = Reading { before: &bytes[..cut.start], after: &bytes[cut.end..] };
        found = Some(Signed { value: value.as_bytes(), first, second: None });
    }
    Ok(found)
}

fn line<'a>(
    text: &'a str,
    format: Format,
    signed: Option<Signed<'a>>,
    mut fields: Vec<Field<'a>>,
) -> Line<'a> {
    let ambiguous = take_repeated(&mut fields, 0, 0);
    Line { bytes: text.as_bytes(), format, signed, fields, ambiguous }
}

/// Returns the offset of a part of `text`.
fn offset(text: &str, part: &str) -> usize {
    part.as_ptr() as usize - text.as_ptr() as usize
}

fn write_string(out: &mut Vec<u8>, text: &str) {
    // Writing a string into memory cannot fail.
    let _ = serde_json::to_writer(out, text);
}

/// Returns the members of an object, in the order of the line, repeated keys included.
fn members(text: &str) -> Result<Vec<Field<'_>>, Malformed> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let members = deserializer.deserialize_map(Members).map_err(|error| no_json(&error))?;
    deserializer.end().map_err(|error| no_json(&error))?;
    Ok(members)
}

/// Converts an error. serde_json names a line, which is always 1 here.
fn no_json(error: &serde_json::Error) -> Malformed {
    let text = error.to_string();
    let what = text.split(" at line ").next().unwrap_or(&text);
    Malformed(Cow::Owned(format!("not a JSON object: {what} at byte {}", error.column())))
}

struct Members;

impl<'de> Visitor<'de> for Members {
    type Value = Vec<Field<'de>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::with_capacity(24);
        while let Some(key) = map.next_key_seed(Key)? {
            members.push(Field::new(key, map.next_value::<&RawValue>()?.get(), Notation::Json));
        }
        Ok(members)
    }
}

/// A key, borrowed unless it is spelled with escapes.
struct Key;

impl<'de> DeserializeSeed<'de> for Key {
    type Value = Cow<'de, str>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for Key {
    type Value = Cow<'de, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Cow::Borrowed(text))
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Cow::Owned(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::cef::tests::{
        any_event, assert_every_byte_counts, byte, documented_event, is_verified, key, signed, text,
        with_changed_byte,
    };
    use super::*;

    fn message(line: &str) -> String {
        let parsed = parse(line).unwrap();
        String::from_utf8(parsed.signed().unwrap().first.message().into_owned()).unwrap()
    }

    #[test]
    fn the_signature_is_cut_out_wherever_it_is() {
        assert_eq!(message(r#"{"sig":"x","a":1,"b":2}"#), r#"{"a":1,"b":2}"#);
        assert_eq!(message(r#"{"a":1,"sig":"x","b":2}"#), r#"{"a":1,"b":2}"#);
        assert_eq!(message(r#"{"a":1,"b":2,"sig":"x"}"#), r#"{"a":1,"b":2}"#);
        assert_eq!(message(r#"{"sig":"x"}"#), "{}");
        assert_eq!(message(r#"{"a": 1, "sig": "x", "b": 2}"#), r#"{"a": 1, "b": 2}"#);
        assert_eq!(message(r#"{"a": 1, "b": 2, "sig": "x"}"#), r#"{"a": 1, "b": 2}"#);
        assert_eq!(message(r#"{"a":"\"sig\":\"y\"","sig":"x"}"#), r#"{"a":"\"sig\":\"y\""}"#);
    }

    #[test]
    fn white_space_that_no_signature_covers_is_refused() {
        for line in [
            "{\"a\":1,\"sig\":\t\"x\"}",
            "{\"a\":1,\"sig\" :\"x\"}",
            "{\"a\":1,\t\"sig\":\"x\"}",
            "{\"a\":1,  \"sig\":\"x\"}",
            "{\"sig\":\"x\" ,\"a\":1}",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn two_signatures_or_an_escaped_one_are_malformed() {
        for line in [
            r#"{"sig":"x","sig":"y"}"#,
            r#"{"s\u0069g":"x"}"#,
            r#"{"sig":5}"#,
            r#"{"event":{"sig":"x","sig":"y"}}"#,
            r#"{"event":{"sig":"x"},"sig":"y"}"#,
            r#"{"event":{"\u0073ig":"x"}}"#,
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn cps_has_two_readings_and_only_a_plain_wrapper_has_the_second() {
        let line = parse(r#"{"event":{"a":1,"sig":"x"}}"#).unwrap();
        assert_eq!(line.format(), Format::Cps);
        let signed = line.signed().unwrap();
        assert_eq!(signed.first.message().as_ref(), br#"{"event":{"a":1}}"#);
        assert_eq!(signed.second.unwrap().message().as_ref(), br#"{"a":1}"#);
        assert!(parse(r#"{"event": {"a":1,"sig":"x"}}"#).unwrap().signed().unwrap().second.is_some());
        for line in [
            "{\"event\":\t{\"sig\":\"x\"}}",
            "{\"event\":{\"sig\":\"x\"} }",
            "{\"\\u0065vent\":{\"sig\":\"x\"}}",
        ] {
            assert!(parse(line).unwrap().signed().unwrap().second.is_none(), "{line}");
        }
        let outside = parse(r#"{"event":{"a":1},"sig":"x"}"#).unwrap();
        assert_eq!(outside.format(), Format::Cps);
        assert_eq!(outside.signed().unwrap().first.message().as_ref(), br#"{"event":{"a":1}}"#);
        assert_eq!(parse(r#"{"event":{"a":1},"b":2}"#).unwrap().format(), Format::Json);
        assert_eq!(parse(r#"{"event":"x"}"#).unwrap().format(), Format::Json);
    }

    #[test]
    fn a_repeated_member_is_ambiguous_even_with_escapes() {
        let event = parse(r#"{"a":1,"\u0061":2,"trace_id":18446744073709551616,"rt":"12"}"#).unwrap().event();
        assert_eq!(event.ambiguous(), ["a"]);
        assert_eq!(event.field("a"), None);
        assert_eq!(event.field("trace_id"), Some(&Value::Text("18446744073709551616".into())));
        assert_eq!(event.field("rt"), Some(&Value::Number("12".into())));
    }

    #[test]
    fn a_line_that_is_not_an_object_is_malformed() {
        for line in
            ["{", "{}x", r#"{"a":1,}"#, r#"{"a":01}"#, r#"{"a":"\x"}"#, "{\"a\":\"\u{1}\"}", r#"{"a" 1}"#]
        {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_lone_surrogate_keeps_its_spelling() {
        let event = parse(r#"{"user_agent":"x\ud800y"}"#).unwrap().event();
        assert_eq!(event.text("user_agent").unwrap(), r"x\ud800y");
    }

    #[test]
    fn many_repeated_members_are_one_ambiguous_key() {
        let mut line = String::from("{");
        for _ in 0..40_000 {
            line.push_str("\"a\":1,");
        }
        line.push_str("\"b\":1}");
        let event = parse(&line).unwrap().event();
        assert_eq!(event.ambiguous(), ["a"]);
    }

    /// Returns whether an event, written by [`write`], is read as a CPS wrapper.
    fn looks_wrapped(event: &Event) -> bool {
        let others = event.fields().filter(|(name, _)| !matches!(*name, "event" | "sig")).count();
        others == 0 && matches!(event.field("event"), Some(Value::Json(json)) if json.starts_with('{'))
    }

    proptest! {
        #[test]
        fn an_event_is_read_back(mut event in any_event(), signature in prop::option::of(text())) {
            if let Some(signature) = signature {
                event.set("sig", Value::Text(signature));
            }
            let wrapped = write_wrapped(&event);
            let line = Line::parse(&wrapped).unwrap();
            prop_assert_eq!(line.format(), Format::Cps);
            prop_assert_eq!(line.event(), event.clone());
            let plain = write(&event);
            let line = Line::parse(&plain).unwrap();
            prop_assert_eq!(line.format() == Format::Cps, looks_wrapped(&event));
            if !looks_wrapped(&event) {
                prop_assert_eq!(line.event(), event);
            }
            prop_assert!(!plain.contains(&b'\n') && !wrapped.contains(&b'\n'));
        }

        #[test]
        fn a_changed_byte_breaks_the_signature(
            event in prop_oneof![any_event(), documented_event()],
            changes in prop::collection::vec((any::<prop::sample::Index>(), byte()), 12),
        ) {
            let mut event = event;
            event.remove("sig");
            let inner = signed(Format::Json, write(&event));
            let lines = [
                signed(Format::Cps, write_wrapped(&event)),
                [WRAPPER.as_bytes(), &inner, b"}"].concat(),
                inner,
            ];
            // A wrapper in a wrapper must be signed as a whole: a signature over the inner object
            // alone does not verify.
            prop_assert_eq!(is_verified(&lines[1]), !looks_wrapped(&event));
            for line in lines.into_iter().filter(|line| is_verified(line)) {
                for (at, other) in &changes {
                    if let Some(changed) = with_changed_byte(&line, *at, *other) {
                        prop_assert!(!is_verified(&changed), "{}", String::from_utf8_lossy(&changed));
                    }
                }
            }
        }
    }

    #[test]
    fn every_byte_of_a_json_or_cps_line_counts() {
        use ed25519_dalek::Signer;

        let plain = br#"{"name":"Ingress","rt":1,"user_agent":"a \" b","x":[1, {"sig":"y"}]}"#;
        let value = super::super::signature::encode(&key().sign(plain).to_bytes());
        let text = std::str::from_utf8(plain).unwrap();
        for line in [
            text.replacen('{', &format!("{{\"sig\":\"{value}\","), 1),
            text.replacen(",\"rt\"", &format!(",\"sig\":\"{value}\",\"rt\""), 1),
            text.replacen(",\"rt\"", &format!(", \"sig\": \"{value}\",\"rt\""), 1),
            text.replacen("]}", &format!("],\"sig\":\"{value}\"}}"), 1),
        ] {
            assert_every_byte_counts(line.as_bytes());
            assert_every_byte_counts(format!("{{\"event\":{line}}}").as_bytes());
            assert_every_byte_counts(format!("{{\"event\": {line}}}").as_bytes());
        }
        assert_every_byte_counts(&signed(Format::Json, b"{}".to_vec()));
        assert_every_byte_counts(&signed(Format::Cps, format!("{{\"event\":{text}}}").into_bytes()));
    }
}
