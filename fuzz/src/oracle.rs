//! Checks that must hold for every line.

use std::collections::BTreeMap;

use auditgate::escape::is_hazardous;
use auditgate::ingest::{Judgeable, open};
use auditgate::trust::verify;
use auditgate::wire::event::Value;
use auditgate::wire::line::Line;
use auditgate::wire::record::{self, Accepted, Kind};
use base64::Engine as _;
use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};
use ed25519_dalek::Signature;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use serde_json::value::RawValue;

use crate::SIGNING_KEY;
use crate::naive::{self, Read};

/// Compares what the program reads in a line with what the naive reader does, and looks at the
/// record that would be written of it. Returns whether it is an event.
pub fn check_line(bytes: &[u8]) -> bool {
    let naive = naive::read(bytes);
    let line = match (Line::parse(bytes), naive) {
        (Ok(line), Some(naive)) => {
            compare(&line, &naive);
            line
        }
        (Err(_), None) => return false,
        (line, naive) => panic!("one of the two reads no event: {line:?}, {naive:?}"),
    };
    check_record(bytes, &line);
    true
}

fn compare(line: &Line<'_>, naive: &Read) {
    assert_eq!(line.format().as_str(), naive.format);
    assert_eq!(line.signed().map(|signed| signed.value), naive.signature.as_deref());
    let messages: Vec<Vec<u8>> = line
        .signed()
        .into_iter()
        .flat_map(|signed| [Some(signed.first), signed.second])
        .flatten()
        .map(|reading| reading.message().into_owned())
        .collect();
    assert_eq!(messages, naive.messages, "the signed bytes");

    let event = line.event();
    assert!(event.ambiguous().iter().eq(&naive.ambiguous), "the ambiguous keys: {event:?}, {naive:?}");
    let fields: BTreeMap<String, Option<String>> =
        event.fields().map(|(name, value)| (name.to_owned(), text(value))).collect();
    assert_eq!(fields, naive.fields, "the fields");
    for (name, value) in event.fields() {
        check_type(name, value);
    }
    let is_clear = !["trace_id", "org_id"].iter().any(|key| naive.ambiguous.contains(*key));
    assert!(line.trace().is_none() || is_clear, "an ambiguous trace identifies nothing");
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::Json(_) | Value::Null => None,
        scalar => Some(scalar.text().into_owned()),
    }
}

/// Checks that a field has its documented type.
fn check_type(name: &str, value: &Value) {
    match (name, value) {
        (_, Value::Number(digits)) => {
            assert!(!matches!(name, "trace_id" | "user_agent" | "org_id" | "sig"), "{name} is text");
            assert!(digits.bytes().all(|byte| byte.is_ascii_digit() || b"-+.eE".contains(&byte)), "{digits}");
        }
        ("success" | "granted" | "kong_initiated", Value::Text(text)) => {
            assert!(text != "true" && text != "false")
        }
        _ => {}
    }
}

/// The record of an accepted line: one line of JSON without a control, from which the line comes
/// back.
fn check_record(raw: &[u8], line: &Line<'_>) {
    let mut written = Vec::new();
    record::write_accepted(&mut written, &Accepted { received_at: 0, source: "us", key_id: Some("k"), raw });
    let record = one_harmless_line(&written);
    let saved = record::read(record.as_bytes()).expect("our own record");
    assert_eq!(saved.raw.as_ref(), raw);
    let Kind::Accepted(claims) = saved.kind else { panic!("an accepted record: {record}") };
    assert!(claims.verified && claims.hold_for(line), "a record proves itself: {record}");
    let record: BTreeMap<String, &RawValue> = serde_json::from_str(record).expect("JSON");
    assert_eq!(record["source"].get(), "\"us\"");
    let fields: BTreeMap<String, &RawValue> = serde_json::from_str(record["event"].get()).expect("an object");
    assert!(fields.keys().eq(line.event().fields().map(|(name, _)| name)), "{record:?}");
}

/// A record without its terminator, which must be its only line feed.
pub fn one_harmless_line(written: &[u8]) -> &str {
    let text = std::str::from_utf8(written).expect("text");
    let line = text.strip_suffix('\n').expect("a whole line");
    assert!(!line.contains(is_hazardous), "{line:?}");
    line
}

/// Whether the program takes a line for one that [`SIGNING_KEY`] signed. The naive reader and
/// another implementation of Ed25519 must agree.
pub fn is_verified(bytes: &[u8]) -> bool {
    let fit = match open(bytes) {
        Judgeable::Signed(_, claim) => {
            let key = SIGNING_KEY.verifying_key().to_bytes();
            verify::verify(&[claim], &[key], &mut StdRng::seed_from_u64(7))[0]
        }
        _ => None,
    };
    let naive = naive::read(bytes);
    let fits = naive.is_some_and(|naive| {
        let Some(signature) = naive.signature.as_deref().and_then(decoded) else { return false };
        naive.messages.iter().any(|message| SIGNING_KEY.verify(message, &signature).is_ok())
    });
    assert_eq!(fit.is_some(), fits, "two ways to verify");
    fits
}

/// base64url in its one spelling, padded or not.
fn decoded(text: &[u8]) -> Option<Signature> {
    let bytes = if text.ends_with(b"=") { URL_SAFE.decode(text) } else { URL_SAFE_NO_PAD.decode(text) };
    Signature::from_slice(&bytes.ok()?).ok()
}
