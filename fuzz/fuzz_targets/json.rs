//! A JSON or CPS line: members, repeated keys, numbers kept as text, and writing it again.

#![no_main]

use auditgate::wire::event::{Format, Value};
use auditgate::wire::json;
use auditgate::wire::line::Line;
use auditgate_fuzz::oracle::check_line;
use libfuzzer_sys::{Corpus, fuzz_target};

fuzz_target!(|line: &[u8]| -> Corpus {
    if !line.trim_ascii_start().starts_with(b"{") || line.contains(&b'\n') {
        return Corpus::Reject;
    }
    if check_line(line) {
        let read = Line::parse(line).expect("an event");
        against_serde_json(line, &read);
        rewritten(&read);
    }
    Corpus::Keep
});

/// Compares with serde_json's own tree, which keeps the last of several equal keys and converts
/// numbers.
fn against_serde_json(line: &[u8], read: &Line<'_>) {
    // It refuses lone surrogates, numbers beyond a double and great depth; we keep their spelling.
    let Ok(tree) = serde_json::from_slice::<serde_json::Value>(line) else { return };
    let object = match read.format() {
        Format::Cps => &tree["event"],
        _ => &tree,
    };
    let object = object.as_object().expect("an object");
    let event = read.event();
    assert_eq!(event.fields().count() + event.ambiguous().len(), object.len());
    for (name, value) in event.fields() {
        match (&object[name], value) {
            (serde_json::Value::String(theirs), ours) => assert_eq!(theirs.as_str(), ours.text()),
            (serde_json::Value::Bool(theirs), ours) => assert_eq!(theirs.to_string(), ours.text()),
            (serde_json::Value::Number(theirs), ours) => {
                let ours: serde_json::Number = ours.text().parse().expect("a number");
                assert_eq!(*theirs, ours, "{name}");
            }
            (serde_json::Value::Null, ours) => assert_eq!(*ours, Value::Null),
            (theirs, Value::Json(ours)) => {
                assert_eq!(*theirs, serde_json::from_str::<serde_json::Value>(ours).expect("JSON"));
            }
            (theirs, ours) => panic!("{name}: {theirs} and {ours:?}"),
        }
    }
}

/// Checks that writing and reading again changes nothing but what [`json::write`] documents.
fn rewritten(read: &Line<'_>) {
    let event = read.event();
    if !event.ambiguous().is_empty() || event.field("sig").is_some_and(|sig| !matches!(sig, Value::Text(_))) {
        return;
    }
    let written = json::write(&event);
    if let Ok(again) = Line::parse(&written) {
        if again.format() == Format::Json {
            assert_eq!(again.event(), event);
        }
    } else {
        panic!("our own line is malformed: {}", String::from_utf8_lossy(&written));
    }
}
