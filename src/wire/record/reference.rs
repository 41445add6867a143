//! Records written the long way, to compare with: a line becomes an event with values of its own,
//! serde_json writes the strings, character by character, and `time` the time.

use std::io;

use proptest::prelude::*;
use serde::Serialize as _;
use time::OffsetDateTime;
use time::macros::format_description;

use super::super::cef::tests::{any_event, byte, documented_event, text};
use super::super::event::{Event, Format, Value};
use super::super::{cef, json, signature};
use super::*;
use crate::escape::is_hazardous;

/// serde_json's compact form, with more escapes.
struct Harmless;

impl serde_json::ser::Formatter for Harmless {
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, text: &str) -> io::Result<()> {
        writer.write_all(harmless(text).as_bytes())
    }
}

fn harmless(text: &str) -> String {
    let escape = |character: char| match is_hazardous(character) {
        true => format!("\\u{:04x}", u32::from(character)),
        false => character.to_string(),
    };
    text.chars().map(escape).collect()
}

fn string(text: &str) -> String {
    let mut out = Vec::new();
    text.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Harmless)).unwrap();
    String::from_utf8(out).unwrap()
}

fn value(value: &Value) -> String {
    match value {
        Value::Text(text) => string(text),
        Value::Number(digits) => digits.clone(),
        Value::Boolean(value) => value.to_string(),
        Value::Null => "null".to_owned(),
        Value::Json(json) if is_deep(json) => string(json),
        Value::Json(json) => harmless(&json.replace(['\t', '\n', '\r'], " ")),
    }
}

fn stamp(milliseconds: i64) -> String {
    let shape = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(milliseconds) * 1_000_000)
        .map_or_else(|_| milliseconds.to_string(), |moment| moment.format(shape).unwrap())
}

fn record(record: &Accepted<'_>) -> String {
    let mut out =
        format!("{{\"received_at\":\"{}\",\"source\":{}", stamp(record.received_at), string(record.source));
    if let Ok(line) = Line::parse(record.raw) {
        let event = line.event();
        if line.format() == Format::Cef {
            let signature = line.signed().map(|signed| String::from_utf8_lossy(signed.value));
            assert_eq!(event.text("sig"), signature);
        }
        out += &format!(",\"format\":{}", string(line.format().as_str()));
        if let Some(key_id) = record.key_id {
            out += &format!(",\"key_id\":{}", string(key_id));
        }
        out += &format!(",\"verified\":{}", record.key_id.is_some());
        if !event.ambiguous().is_empty() {
            let keys: Vec<String> = event.ambiguous().iter().map(|key| string(key)).collect();
            out += &format!(",\"ambiguous\":[{}]", keys.join(","));
        }
        let members: Vec<String> =
            event.fields().map(|(name, member)| format!("{}:{}", string(name), value(member))).collect();
        out += &format!(",\"event\":{{{}}}", members.join(","));
        let mut of_event = Vec::new();
        write_event(&mut of_event, &event);
        assert!(out.as_bytes().ends_with(&of_event));
    }
    match std::str::from_utf8(record.raw) {
        Ok(text) => out + &format!(",\"raw\":{}}}\n", string(text)),
        Err(_) => out + &format!(",\"raw_base64\":{}}}\n", string(&STANDARD.encode(record.raw))),
    }
}

fn assert_same(received_at: i64, source: &str, key_id: Option<&str>, raw: &[u8]) {
    let accepted = Accepted { received_at, source, key_id, raw };
    let mut written = b"before".to_vec();
    write_accepted(&mut written, &accepted);
    let expected = format!("before{}", record(&accepted));
    assert_eq!(String::from_utf8(written).unwrap(), expected, "{}", String::from_utf8_lossy(raw));
}

/// An object as others write it: white space, escapes, keys twice and in any order.
fn object() -> impl Strategy<Value = String> {
    let key = prop_oneof![
        prop::sample::select(vec![
            "rt",
            "status",
            "severity",
            "success",
            "granted",
            "trace_id",
            "org_id",
            "name",
            "",
            "a",
            "zz",
            "\\u0061",
            "principal_id",
            "principal_name",
            "principal_na",
            "event",
            "ev\u{202e}",
            "\u{e9}",
        ])
        .prop_map(|key| format!("\"{key}\"")),
        text()
            .prop_map(|key| serde_json::to_string(&key).unwrap())
            .prop_filter("a signature", |key| key != "\"sig\""),
    ];
    let value = prop_oneof![
        4 => text().prop_map(|text| serde_json::to_string(&text).unwrap()),
        4 => prop::sample::select(vec![
            "18446744073709551616", "-9007199254740993", "1e400", "0.10", "-0", "\"12\"", "\"-1\"", "\"007\"", "true",
            "\"false\"", "null", "{}", "[1, {\"a\":\t\"\\u001b\u{7f}\"}]", "\"\\ud800\"", "\"\\u202e\\/\\\"\"",
            "\"\u{1f980}\u{2066}\"",
        ])
        .prop_map(str::to_owned),
        1 => (90..110_usize).prop_map(|depth| "[".repeat(depth) + &"]".repeat(depth)),
    ];
    let space = prop::sample::select(vec!["", "", " ", "\t"]);
    prop::collection::vec((key, space, value), 0..24).prop_map(|members| {
        let members: Vec<String> = members
            .into_iter()
            .map(|(key, space, value)| format!("{space}{key}{space}:{space}{value}"))
            .collect();
        format!("{{{}}}", members.join(","))
    })
}

/// A line of any format, as the producer writes it or nearly so.
fn line() -> impl Strategy<Value = Vec<u8>> {
    let event = prop_oneof![any_event(), documented_event()];
    let written = (event, prop::sample::select(Format::ALL.to_vec()), any::<bool>()).prop_map(
        |(event, format, is_signed): (Event, _, _)| {
            let mut line = match format {
                Format::Cef => cef::write(&event).unwrap_or_default(),
                Format::Json => json::write(&event),
                Format::Cps => json::write_wrapped(&event),
            };
            if is_signed {
                signature::insert(format, &mut line, &[7; 64]);
            }
            line
        },
    );
    let extension = prop::collection::vec(text(), 0..6).prop_map(|texts| {
        let pairs: Vec<String> =
            texts.iter().map(|text| format!("user_agent={text} rt=1 request={text}")).collect();
        format!("2026-01-02T03:04:05Z h CEF:0|a|b\\||c|d|Ingress|1|{}", pairs.join(" src="))
    });
    let line = prop_oneof![
        2 => written,
        1 => extension.prop_map(String::into_bytes),
        2 => object().prop_map(String::into_bytes),
        1 => object().prop_map(|object| format!("{{\"event\":{object}}}").into_bytes()),
    ];
    let changes = prop::collection::vec((any::<prop::sample::Index>(), byte()), 0..3);
    (line, changes).prop_map(|(mut line, changes)| {
        for (at, byte) in changes {
            line.insert(at.index(line.len() + 1), byte);
        }
        line
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_record_is_that_of_the_reference(
        line in line(),
        source in text(),
        key_id in prop::option::of(text()),
        received_at in any::<i64>(),
    ) {
        assert_same(received_at, &source, key_id.as_deref(), &line);
    }

    #[test]
    fn a_string_is_that_of_the_reference(pieces in prop::collection::vec(prop_oneof!["[ -~]{0,20}", text()], 0..6)) {
        let (text, mut written) = (pieces.concat(), Vec::new());
        write_text(&mut written, &text);
        prop_assert_eq!(String::from_utf8(written).unwrap(), string(&text));
    }

    #[test]
    fn a_time_is_that_of_the_reference(milliseconds in prop_oneof![any::<i64>(), -400_000_000_000_000..400_000_000_000_000_i64]) {
        prop_assert_eq!(time_stamp(milliseconds), stamp(milliseconds));
    }
}

#[test]
fn every_character_is_escaped_as_by_the_reference_wherever_it_is() {
    for character in ('\0'..='\u{3000}').chain(['\u{feff}', '\u{ffff}', '\u{1f980}', char::MAX]) {
        let before = if character < '\u{100}' { 0..20 } else { 6..10 };
        for before in before {
            let text = format!("{}{character}{}", "x".repeat(before), "\"y".repeat(4));
            let mut written = Vec::new();
            write_text(&mut written, &text);
            assert_eq!(String::from_utf8(written).unwrap(), string(&text));
        }
    }
}

#[test]
fn extreme_times_are_those_of_the_reference() {
    const YEAR_0: i64 = -62_167_219_200_000;
    for time in [i64::MIN, i64::MAX, 0, -1, YEAR_0, YEAR_0 - 1, 253_402_300_799_999, 253_402_300_800_000] {
        assert_eq!(time_stamp(time), stamp(time));
    }
}
