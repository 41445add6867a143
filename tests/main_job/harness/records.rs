//! The daemon's JSON lines, read with serde_json alone.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

/// A record of the quarantine.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Quarantined {
    pub(crate) reason: String,
    pub(crate) raw: Vec<u8>,
}

/// Reads a quarantine file that holds whole lines only.
pub(crate) fn quarantine(bytes: &[u8]) -> Vec<Quarantined> {
    objects(bytes)
        .into_iter()
        .map(|object| {
            for text in ["received_at", "source", "detail"] {
                assert!(object[text].as_str().is_some_and(|text| !text.is_empty()), "{text}: {object}");
            }
            let raw = match (&object["raw"], &object["raw_base64"]) {
                (Value::String(raw), Value::Null) => raw.clone().into_bytes(),
                (Value::Null, Value::String(raw)) => STANDARD.decode(raw).unwrap(),
                _ => panic!("neither raw nor raw_base64, or both: {object}"),
            };
            Quarantined { reason: object["reason"].as_str().unwrap().to_owned(), raw }
        })
        .collect()
}

/// Reads a file with one object in each line.
pub(crate) fn objects(bytes: &[u8]) -> Vec<Value> {
    assert!(bytes.is_empty() || bytes.ends_with(b"\n"), "the last record is torn");
    bytes
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| {
            serde_json::from_slice(line)
                .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(line)))
        })
        .collect()
}
