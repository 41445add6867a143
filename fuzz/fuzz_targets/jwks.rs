//! A key set: which keys are accepted, and why the others are refused.

#![no_main]

use std::collections::BTreeSet;

use auditgate::escape::is_hazardous;
use auditgate::trust::jwks::{MAX_KEPT_KEYS, MAX_KEYS, document, parse, pinned};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ed25519_dalek::VerifyingKey;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let parsed = match parse(bytes, MAX_KEYS) {
        Ok(parsed) => parsed,
        Err(error) => {
            assert!(!error.to_string().contains(is_hazardous), "{error}");
            return;
        }
    };
    for refused in &parsed.refused {
        assert!(!refused.to_string().contains(is_hazardous), "{refused}");
        assert!(refused.to_string().len() < 1024, "{refused}");
    }
    let keys = parsed.keys.keys();
    assert!((1..=MAX_KEYS).contains(&keys.len()));
    let different =
        |of: fn(&auditgate::trust::jwks::Key) -> String| keys.iter().map(of).collect::<BTreeSet<_>>().len();
    assert_eq!(different(|key| key.id().to_owned()), keys.len());
    assert_eq!(different(auditgate::trust::jwks::Key::x), keys.len());

    let listed = candidates(bytes);
    for key in keys {
        assert!(listed.contains(key.bytes()), "a key that is not listed");
        let point = VerifyingKey::from_bytes(key.bytes()).expect("a point");
        assert!(!point.is_weak());
        assert_eq!(pinned(&key.x()).expect("a good key").bytes(), key.bytes());
    }

    // A written key set is read as the same.
    let named: Vec<_> = keys.iter().map(|key| (Some(key.id().to_owned()), *key.bytes())).collect();
    let again = parse(document(&named).as_bytes(), MAX_KEPT_KEYS).expect("our own document");
    assert_eq!(again.keys, parsed.keys);
    assert!(again.refused.is_empty());
});

/// Returns every value that could be an Ed25519 key by its members.
fn candidates(bytes: &[u8]) -> BTreeSet<[u8; 32]> {
    let document: serde_json::Value = match serde_json::from_slice(bytes) {
        Ok(document) => document,
        // More than serde_json's tree can represent; no reason to refuse a key beside it.
        Err(_) => return every_x(bytes),
    };
    document["keys"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|key| {
            key["kty"] == "OKP" && key["crv"] == "Ed25519" && key.get("d").is_none_or(|d| d.is_null())
        })
        .filter(|key| key["alg"].is_null() || key["alg"] == "EdDSA" || key["alg"] == "Ed25519")
        .filter(|key| key["use"].is_null() || key["use"] == "sig")
        .filter_map(|key| x(key["x"].as_str()?))
        .collect()
}

fn every_x(bytes: &[u8]) -> BTreeSet<[u8; 32]> {
    String::from_utf8_lossy(bytes).split('"').filter_map(x).collect()
}

fn x(text: &str) -> Option<[u8; 32]> {
    URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).ok()?.try_into().ok()
}
