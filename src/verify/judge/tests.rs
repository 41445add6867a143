use ed25519_dalek::{Signer as _, SigningKey};
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::*;
use crate::trust::jwks;
use crate::trust::jwks::tests::{document_of, public_key};
use crate::wire::event::Format;
use crate::wire::signature;

/// Returns the key of a seed.
fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

/// Returns the keys of these seeds, named `k1` and so on after them.
pub(in crate::verify) fn keys(seeds: &[u8]) -> Keys {
    Keys::new(&[jwks::parse(document_of(seeds).as_bytes(), seeds.len()).unwrap().keys])
}

/// Signs a line with the key of a seed.
pub(in crate::verify) fn signed(seed: u8, line: &str) -> String {
    let format = if line.starts_with('{') { Format::Json } else { Format::Cef };
    let mut bytes = line.as_bytes().to_vec();
    let made = key(seed).sign(&bytes).to_bytes();
    signature::insert(format, &mut bytes, &made);
    String::from_utf8(bytes).unwrap()
}

pub(in crate::verify) fn cef(rt: &str, trace: u64) -> String {
    format!(
        "2023-05-19T00:03:39Z konghq.com CEF:0|KongInc|Konnect|1.0|konnect|Authz.usage|1|rt={rt} trace_id={trace}"
    )
}

fn judged(text: &str, window: Window) -> JudgedBlock {
    let block = Block::Lines { first: 10, bytes: text.as_bytes().to_vec() };
    judge(&block.entries(), &keys(&[1, 2]), window, &mut StdRng::seed_from_u64(7))
}

#[test]
fn each_line_has_its_number_and_its_verdict() {
    let good = signed(1, &cef("1000", 1));
    let text = format!(
        "{good}\n\n \t\r\n{}\r\n{}\n{}\nnot an event\n{}\n{good} x",
        signed(2, r#"{"rt":2000,"trace_id":"2"}"#),
        signed(3, &cef("3000", 3)),
        cef("4000", 4),
        good.replace("trace_id=1", "trace_id=2"),
    );
    let judged = judged(&text, Window::default());
    let wanted = Counts { good: 2, bad: 2, unsigned: 1, malformed: 1, torn: 1, ..Counts::default() };
    assert_eq!(judged.counts, wanted);
    assert_eq!(judged.by_key, [1, 1]);
    assert_eq!(judged.times, Some((1000, 2000)));
    let found: Vec<_> = judged.findings.iter().map(|finding| (finding.line, finding.verdict)).collect();
    assert_eq!(
        found,
        [
            (14, Verdict::Bad),
            (15, Verdict::Unsigned),
            (16, Verdict::Malformed),
            (17, Verdict::Bad),
            (18, Verdict::Torn)
        ]
    );
}

#[test]
fn a_whole_last_line_needs_no_line_end() {
    let good = signed(1, &cef("1000", 1));
    for text in [good.clone(), format!("{good}\n{good}"), format!("{good}\r\n{good}\r")] {
        assert_eq!(judged(&text, Window::default()).findings, [], "{text:?}");
    }
    assert_eq!(judged("", Window::default()), judged("\n", Window::default()));
}

#[test]
fn a_line_without_a_valid_time_is_always_checked() {
    let window = Window { since: Some(1000), until: Some(2000) };
    let line = |rt: &str| signed(1, &format!(r#"{{"rt":"{rt}"}}"#));
    let text = ["999", "1000", "1999", "2000", "3958q3097698"].map(line).join("\n") + "\nnot an event\n";
    let judged = judged(&text, window);
    assert_eq!((judged.counts.good, judged.counts.outside, judged.counts.malformed), (3, 2, 1));
    assert_eq!(judged.times, Some((1000, 1999)));
}

#[test]
fn a_genuine_line_in_quarantine_is_counted_separately_and_an_unknown_reason_is_bad() {
    let line = signed(1, r#"{"a":"x","rt":1000}"#);
    let mut bytes = Vec::new();
    let record = record::Quarantined {
        received_at: 0,
        source: "us",
        reason: crate::wire::event::Reason::BadSignature,
        detail: "no key",
        raw: line.as_bytes(),
    };
    record::write_quarantined(&mut bytes, &record);
    let text = String::from_utf8(bytes).unwrap();
    let counts = judged(&text, Window::default()).counts;
    assert_eq!((counts.good, counts.good_in_quarantine, counts.findings()), (0, 1, 0));
    let altered = judged(&text.replace("bad_signature", "whatever"), Window::default());
    assert_eq!((altered.counts.bad, altered.counts.good_in_quarantine), (1, 0));
}

#[test]
fn a_record_must_follow_from_its_line() {
    let raw = signed(1, r#"{"a":"x","rt":1000}"#);
    let text = recorded(&raw, Some("k1"));
    assert_eq!(judged(&text, Window::default()).counts.good, 1);
    for (from, to, reason) in [
        (r#""a":"x""#, r#""a":"y""#, "the record says something else than its raw line"),
        (r#""k1""#, r#""k2""#, "the record names another key than the one that made the signature"),
        (r#"\"a\":\"x\""#, r#"\"a\":\"y\""#, "no given key made this signature"),
    ] {
        assert!(text.contains(from));
        let judged = judged(&text.replacen(from, to, 1), Window::default());
        assert_eq!(judged.findings[0].reason, reason);
    }
}

/// Returns the record of a line, as the daemon writes it.
pub(in crate::verify) fn recorded(raw: &str, key_id: Option<&str>) -> String {
    let mut bytes = Vec::new();
    let accepted = record::Accepted { received_at: 0, source: "us", key_id, raw: raw.as_bytes() };
    record::write_accepted(&mut bytes, &accepted);
    String::from_utf8(bytes).unwrap()
}

#[test]
fn a_record_with_members_of_another_kind_is_bad() {
    let text = recorded(&signed(1, r#"{"a":"x","rt":1000}"#), Some("k1"));
    let forged = text.replacen(r#""a":"x""#, r#""a":"y""#, 1);
    let forged = forged.replacen(r#""format":"json","#, r#""reason":"","#, 1);
    let without = |name: &str| {
        let mut members: serde_json::Map<_, _> = serde_json::from_str(&text).unwrap();
        members.insert("reason".to_owned(), "".into());
        members.remove(name).unwrap();
        serde_json::to_string(&members).unwrap() + "\n"
    };
    for altered in [
        forged.clone(),
        without("verified"),
        without("event"),
        text.replacen("\"verified\":true", "\"verified\":null,\"reason\":\"\"", 1),
        text.replacen("{", "{\"granted\":false,", 1),
    ] {
        // Its time cannot be trusted either.
        for window in [Window::default(), Window { since: Some(5000), until: None }] {
            let judged = judged(&altered, window);
            assert_eq!((judged.counts.bad, judged.counts.good), (1, 0), "{altered}");
            assert_eq!(judged.findings[0].reason, MISSHAPEN);
        }
    }
}

#[test]
fn a_line_of_a_source_that_checks_no_signatures_counts_by_its_own_signature() {
    let line = r#"{"a":"x","rt":1000}"#;
    let text = |raw: &str| recorded(raw, None);
    let counts = judged(&text(&signed(1, line)), Window::default()).counts;
    assert_eq!((counts.good, counts.good_unverified), (0, 1));
    assert_eq!(judged(&text(&signed(3, line)), Window::default()).counts.bad, 1);
    assert_eq!(judged(&text(line), Window::default()).counts.unsigned, 1);
    let good = text(&signed(1, line));
    for (from, to, reason) in [
        ("\"verified\":false", "\"verified\":true", "the record names no key"),
        (
            "\"verified\":false",
            "\"key_id\":\"k1\",\"verified\":false",
            "the record names a key and says that none was tried",
        ),
        (r#""a":"x""#, r#""a":"y""#, "the record says something else than its raw line"),
    ] {
        let judged = judged(&good.replacen(from, to, 1), Window::default());
        assert_eq!(judged.findings[0].reason, reason);
    }
}

#[test]
fn a_line_of_millions_of_fields_is_not_parsed() {
    let json = |count: usize| signed(1, &format!("{{{}\"b\":1}}", "\"a\":1,".repeat(count)));
    let of = |line: &str| judged(&format!("{line}\n"), Window::default()).counts;
    assert_eq!(of(&json(10_000)).good, 1);
    assert_eq!(of(&json(1_000_001)).malformed, 1);
    assert_eq!(of(&recorded(&json(1_000_001), Some("k1"))).malformed, 1);
    assert_eq!(of(&signed(1, &(cef("1", 1) + &" a=1".repeat(1_000_001)))).malformed, 1);
}

/// Returns key sets with the keys of these seeds, under these names.
fn documents(documents: &[&[(Option<&str>, u8)]]) -> Vec<KeySet> {
    let entry = |(kid, seed): &(Option<&str>, u8)| (kid.map(str::to_owned), public_key(*seed));
    let documents = documents.iter().map(|keys| keys.iter().map(entry).collect::<Vec<_>>());
    documents.map(|keys| jwks::parse(jwks::document(&keys).as_bytes(), 9).unwrap().keys).collect()
}

/// Returns the findings on the record of a line signed by key 1, when the record names `id` as the
/// key.
fn found(id: &str, keys: &[KeySet]) -> Vec<Finding> {
    let bytes = recorded(&signed(1, &cef("1000", 1)), Some(id)).into_bytes();
    let block = Block::Lines { first: 1, bytes };
    let random = &mut StdRng::seed_from_u64(7);
    judge(&block.entries(), &Keys::new(keys), Window::default(), random).findings
}

fn thumbprint(seed: u8) -> String {
    jwks::thumbprint(&public_key(seed))
}

#[test]
fn a_key_is_the_same_under_another_name_in_another_document() {
    let suffixed = format!("k#{}", &thumbprint(1)[..8]);
    let all: Vec<Vec<KeySet>> = [
        &[&[(Some("k"), 1)][..]][..],
        // Key 1 gets a distinct name beside key 2, in the same document and as a retired key.
        &[&[(Some("k"), 2), (Some("k"), 1)]],
        &[&[(Some("k"), 2)], &[(Some("k"), 1)]],
        // The distinct name is taken already.
        &[&[(Some("k"), 2), (Some(&suffixed), 3), (Some("k"), 1)]],
        // The daemon's own cache keeps the distinct name.
        &[&[(Some("k"), 2), (Some(&suffixed), 1)]],
        &[&[(None, 1)]],
        &[&[(Some(&thumbprint(1)), 2), (None, 1)]],
        &[&[(Some("renamed"), 1)], &[(Some("k"), 1), (Some("k"), 4)]],
    ]
    .map(documents)
    .into();
    for written in &all {
        let known = KeySet::of(written.iter().flat_map(KeySet::keys).cloned()).unwrap();
        let public = public_key(1);
        let id = known.keys().iter().find(|key| *key.bytes() == public).unwrap().id();
        for given in &all {
            assert_eq!(found(id, given), [], "written as {id} by {written:?}, checked with {given:?}");
        }
    }
}

#[test]
fn a_record_that_names_another_given_key_is_bad() {
    let given = documents(&[&[(Some("k"), 1), (Some("k"), 2), (Some("m"), 3)]]);
    let suffixed = |seed| format!("k#{}", &thumbprint(seed)[..8]);
    for other in ["m".to_owned(), suffixed(2), thumbprint(2), thumbprint(3)] {
        let reasons: Vec<_> = found(&other, &given).into_iter().map(|finding| finding.reason).collect();
        assert_eq!(reasons, ["the record names another key than the one that made the signature"], "{other}");
    }
    // Without a document that has this name, the key cannot be known.
    assert_eq!(found("forgotten", &given), []);
}
