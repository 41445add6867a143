use ed25519_dalek::SigningKey;
use proptest::prelude::*;

use super::*;

/// RFC 8037, appendix A.2 and A.3.
const RFC_X: &str = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
const RFC_THUMBPRINT: &str = "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k";

/// Returns the public key of a seed.
pub(crate) fn public_key(seed: u8) -> [u8; 32] {
    SigningKey::from_bytes(&[seed; 32]).verifying_key().to_bytes()
}

/// Returns a key set with the public keys of these seeds, named `k1` and so on after them.
pub(crate) fn document_of(seeds: &[u8]) -> String {
    let keys: Vec<_> = seeds.iter().map(|seed| (Some(format!("k{seed}")), public_key(*seed))).collect();
    document(&keys)
}

fn jwk(members: &str, bytes: &[u8]) -> String {
    format!(r#"{{"kty":"OKP","crv":"Ed25519","x":"{}"{members}}}"#, URL_SAFE_NO_PAD.encode(bytes))
}

fn set(entries: &[String]) -> Result<Parsed, JwksError> {
    parse(format!(r#"{{"keys":[{}]}}"#, entries.join(",")).as_bytes(), MAX_KEYS)
}

/// Returns why an entry is refused.
fn refusal(entry: &str) -> Refusal {
    match set(&[entry.to_owned()]) {
        Err(JwksError::NoUsableKey(mut refused)) => refused.remove(0).reason,
        other => panic!("{entry}: {other:?}"),
    }
}

fn ids(parsed: &Parsed) -> Vec<&str> {
    parsed.keys.keys().iter().map(Key::id).collect()
}

#[test]
fn a_byte_order_mark_or_numeric_kid_is_accepted_and_other_formats_are_named() {
    for name in ["jwks-bom.json", "jwks-numeric-kid.json"] {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases").join(name);
        let parsed = parse(&std::fs::read(path).unwrap(), MAX_KEYS).unwrap();
        assert_eq!(parsed.keys.keys()[0].thumbprint(), RFC_THUMBPRINT, "{name}");
        assert!(parsed.refused.is_empty());
    }
    for (document, what) in [
        (&b"<!DOCTYPE html><html>"[..], "HTML"),
        (b"\n <?xml version='1.0'?>", "XML"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"-----BEGIN PUBLIC KEY-----", "PEM"),
        (b"", "empty"),
    ] {
        let error = parse(document, MAX_KEYS).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn a_key_that_is_not_for_verifying_is_refused() {
    assert_eq!(refusal(&jwk(r#","key_ops":["sign"]"#, &public_key(1))), Refusal::Operations);
    assert_eq!(refusal(&jwk(r#","key_ops":[]"#, &public_key(1))), Refusal::Operations);
    assert!(set(&[jwk(r#","key_ops":["sign","verify"]"#, &public_key(1))]).is_ok());
}

#[test]
fn the_form_that_konnect_publishes_is_read() {
    let text = format!(
        r#"{{"keys":[{{"alg":"EdDSA","crv":"Ed25519","kid":"k1","kty":"OKP","x":"{RFC_X}"}}],"more":[]}}"#
    );
    let parsed = parse(text.as_bytes(), MAX_KEYS).unwrap();
    assert_eq!(ids(&parsed), ["k1"]);
    assert_eq!(URL_SAFE_NO_PAD.encode(parsed.keys.keys()[0].bytes()), RFC_X);
    assert_eq!(parsed.keys.keys()[0].thumbprint(), RFC_THUMBPRINT);
    assert!(parsed.refused.is_empty());
}

#[test]
fn without_a_usable_kid_the_thumbprint_is_the_id() {
    for kid in ["", r#","kid":null"#, r#","kid":"""#, &format!(r#","kid":"{}""#, "k".repeat(257))] {
        let entry = format!(r#"{{"kty":"OKP","crv":"Ed25519","x":"{RFC_X}"{kid}}}"#);
        assert_eq!(ids(&set(&[entry]).unwrap()), [RFC_THUMBPRINT]);
    }
}

#[test]
fn variants_of_the_form_are_accepted() {
    for members in [r#","alg":"Ed25519""#, r#","use":"sig""#, r#","x5c":[1],"nbf":{}"#, r#","d":null"#] {
        assert!(set(&[jwk(members, &public_key(1))]).is_ok(), "{members}");
    }
    let padded = format!(r#"{{"kty":"OKP","crv":"Ed25519","x":"{RFC_X}="}}"#);
    assert_eq!(ids(&set(&[padded]).unwrap()), [RFC_THUMBPRINT]);
}

#[test]
fn other_keys_are_refused_with_a_reason() {
    let with_x = |x: &str| format!(r#"{{"kty":"OKP","crv":"Ed25519","x":"{x}"}}"#);
    let cases = [
        (r#"{"kty":"RSA","n":"AQAB","e":"AQAB"}"#.to_owned(), Refusal::KeyType("RSA".to_owned())),
        ("{}".to_owned(), Refusal::KeyType(String::new())),
        (r#"{"kty":"OKP","crv":"X25519","x":"AA"}"#.to_owned(), Refusal::Curve("X25519".to_owned())),
        (jwk(r#","alg":"ES256""#, &public_key(1)), Refusal::Algorithm("ES256".to_owned())),
        (jwk(r#","use":"enc""#, &public_key(1)), Refusal::Use("enc".to_owned())),
        (r#"{"kty":"OKP","crv":"Ed25519"}"#.to_owned(), Refusal::NoPublicKey),
        (jwk("", &[7; 31]), Refusal::Length(31)),
        (jwk("", &[7; 33]), Refusal::Length(33)),
        (jwk("", &[]), Refusal::Length(0)),
        (jwk(r#","d":"AAAA""#, &public_key(1)), Refusal::PrivateKeyPublished),
        (jwk(r#","d":7"#, &public_key(1)), Refusal::PrivateKeyPublished),
        (r#"{"kty":"RSA","d":"AAAA"}"#.to_owned(), Refusal::PrivateKeyPublished),
        (r#"{"kty":7}"#.to_owned(), Refusal::Malformed),
        (r#"{"kty":"OKP","kty":"OKP"}"#.to_owned(), Refusal::Malformed),
        (r#"["OKP","Ed25519",null,null,null,null,null]"#.to_owned(), Refusal::Malformed),
        (r#""secret text""#.to_owned(), Refusal::Malformed),
        ("null".to_owned(), Refusal::Malformed),
    ];
    for (entry, reason) in cases {
        assert_eq!(refusal(&entry), reason, "{entry}");
    }
    // Of the bits of RFC_X's last character, four belong to the key, and two must be zero.
    for x in [RFC_X.replace("URo", "URp"), RFC_X.replace('_', "/"), "a".to_owned(), format!("{RFC_X} ")] {
        assert!(matches!(refusal(&with_x(&x)), Refusal::Base64(_)), "{x}");
    }
}

#[test]
fn a_wrong_length_is_reported_as_for_kongs_own_sample() {
    let message = set(&[jwk(r#","kid":"sample""#, &[0; 33])]).unwrap_err().to_string();
    assert!(message.contains(r#"key 1 (kid "sample") has an x of 33 bytes"#), "{message}");
    assert!(message.contains("an Ed25519 public key has 32"), "{message}");
}

#[test]
fn weak_and_non_canonical_points_are_refused() {
    let little_endian = |low: u8, high: u8| {
        let mut bytes = [0xff; 32];
        bytes[0] = low;
        bytes[31] = high;
        bytes
    };
    let mut identity = [0; 32];
    identity[0] = 1;
    let mut order_eight = [0; 32];
    order_eight.copy_from_slice(
        &(0..64)
            .step_by(2)
            .map(|i| {
                let hex = "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05";
                u8::from_str_radix(&hex[i..i + 2], 16).unwrap()
            })
            .collect::<Vec<_>>(),
    );
    // p - 1 has order 2, 0 order 4; p + 1 is a second encoding of the identity.
    for bytes in [identity, [0; 32], order_eight, little_endian(0xec, 0x7f), little_endian(0xee, 0x7f)] {
        assert_eq!(refusal(&jwk("", &bytes)), Refusal::Weak, "{bytes:?}");
    }
    // Of the encodings with y in p..2^255, some are points of large order: none is accepted.
    let reasons: Vec<_> = (0xed..=0xff)
        .flat_map(|low| [0x7f, 0xff].map(|high| refusal(&jwk("", &little_endian(low, high)))))
        .collect();
    assert!(reasons.contains(&Refusal::NotCanonical));
    assert!(reasons.contains(&Refusal::NotAPoint));
}

#[test]
fn an_unusable_key_does_not_affect_the_others() {
    let entries = [jwk(r#","kid":"a""#, &[1; 5]), jwk(r#","kid":"b""#, &public_key(2)), "7".to_owned()];
    let parsed = set(&entries).unwrap();
    assert_eq!(ids(&parsed), ["b"]);
    let refused: Vec<_> = parsed.refused.iter().map(|r| (r.position, r.kid.as_deref())).collect();
    assert_eq!(refused, [(1, Some("a")), (3, None)]);
}

#[test]
fn equal_keys_are_merged_and_equal_ids_made_distinct() {
    let entries = [
        jwk(r#","kid":"a""#, &public_key(1)),
        jwk(r#","kid":"a""#, &public_key(2)),
        jwk(r#","kid":"z""#, &public_key(1)),
        jwk(r#","kid":"b""#, &public_key(3)),
    ];
    let parsed = set(&entries).unwrap();
    assert_eq!(ids(&parsed), ["a", &format!("a#{}", &thumbprint(&public_key(2))[..8]), "b"]);
    assert_eq!(parsed.keys.keys()[1].bytes(), &public_key(2));
}

#[test]
fn ids_are_distinct_even_if_one_imitates_a_suffix() {
    let third = thumbprint(&public_key(3));
    let entries = [
        jwk(r#","kid":"a""#, &public_key(1)),
        jwk(&format!(r#","kid":"a#{}""#, &third[..8]), &public_key(2)),
        jwk(r#","kid":"a""#, &public_key(3)),
    ];
    let parsed = set(&entries).unwrap();
    assert_eq!(ids(&parsed)[2], format!("a#{}#{third}", &third[..8]));
    assert_eq!(undistinguished(ids(&parsed)[2], &third), "a");
    assert_eq!(undistinguished(ids(&parsed)[2], &thumbprint(&public_key(2))), ids(&parsed)[2]);
}

#[test]
fn documents_that_are_not_key_sets_are_refused() {
    for text in ["", "{", "nonsense", "{\"keys\":[]} x", "\u{feff}\u{feff}{}", "<html>"] {
        assert!(matches!(parse(text.as_bytes(), MAX_KEYS), Err(JwksError::NotJson(_))), "{text}");
    }
    for text in [
        "{}",
        "\u{feff}{}",
        "[]",
        "[[]]",
        "7",
        "null",
        r#"{"keys":{}}"#,
        r#"{"keys":null}"#,
        r#"{"keys":[],"keys":[]}"#,
    ] {
        assert_eq!(parse(text.as_bytes(), MAX_KEYS), Err(JwksError::NotAKeySet), "{text}");
    }
    let empty = parse(br#"{"keys":[]}"#, MAX_KEYS).unwrap_err();
    assert!(empty.to_string().ends_with("its keys array is empty"));
    let deep = format!("{{\"keys\":[{}]}}", "[".repeat(100_000));
    assert!(parse(deep.as_bytes(), MAX_KEYS).is_err());
}

#[test]
fn the_number_of_keys_is_bounded() {
    let keys = |n: u8| (0..n).map(|seed| jwk("", &public_key(seed))).collect::<Vec<_>>();
    assert_eq!(set(&keys(64)).unwrap().keys.keys().len(), MAX_KEYS);
    assert_eq!(set(&keys(65)), Err(JwksError::TooManyKeys(MAX_KEYS)));
    // A repeated key counts once.
    assert_eq!(set(&vec![jwk("", &public_key(1)); 200]).unwrap().keys.keys().len(), 1);
    assert_eq!(set(&vec!["0".to_owned(); 1025]), Err(JwksError::TooManyEntries(1025)));
    let message = set(&vec!["0".to_owned(); 1024]).unwrap_err().to_string();
    assert!(message.ends_with("and 1016 more") && message.len() < 1000, "{message}");
}

#[test]
fn messages_escape_and_shorten_text_of_the_document() {
    let entry = format!(r#"{{"kid":"\u001b[31m\u202e","kty":"{}"}}"#, "x".repeat(5000));
    let message = set(&[entry]).unwrap_err().to_string();
    assert!(!message.contains(['\u{1b}', '\u{202e}']) && message.len() < 300, "{message}");
}

#[test]
fn a_written_document_reads_back() {
    let text = document(&[(Some("one \"1\"".to_owned()), public_key(1)), (None, public_key(2))]);
    let parsed = parse(text.as_bytes(), MAX_KEYS).unwrap();
    assert_eq!(ids(&parsed), ["one \"1\"", &thumbprint(&public_key(2))]);
    assert_eq!(parsed.keys.keys()[0].bytes(), &public_key(1));
    assert!(text.ends_with("}\n"));
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = parse(&bytes, MAX_KEYS).map_err(|error| error.to_string());
    }

    #[test]
    fn no_key_text_makes_it_panic(x in ".{0,60}", kid in ".{0,20}", entry in "[\\[\\]{}\",:a-z0-9 ]{0,40}") {
        let key = serde_json::json!({"kty": "OKP", "crv": "Ed25519", "x": x, "kid": kid});
        let _ = parse(format!("{{\"keys\":[{key},{entry}]}}").as_bytes(), MAX_KEYS).map_err(|e| e.to_string());
    }

    #[test]
    fn an_accepted_key_is_canonical_and_reads_back(bytes in any::<[u8; 32]>(), kid in ".{1,40}") {
        if let Ok(parsed) = parse(document(&[(Some(kid.clone()), bytes)]).as_bytes(), MAX_KEYS) {
            let key = &parsed.keys.keys()[0];
            prop_assert_eq!(key.bytes(), &bytes);
            prop_assert_eq!(key.id(), kid.as_str());
            prop_assert!(bytes[31] & 0x7f < 0x7f || bytes[1..31].iter().any(|b| *b != 0xff) || bytes[0] < 0xed);
        }
    }

    #[test]
    fn every_signing_keys_document_reads_back(seeds in prop::collection::btree_set(any::<[u8; 32]>(), 1..8)) {
        let keys: Vec<_> = seeds
            .iter()
            .enumerate()
            .map(|(i, seed)| {
                let kid = (i % 2 == 0).then(|| format!("k{i}"));
                (kid, SigningKey::from_bytes(seed).verifying_key().to_bytes())
            })
            .collect();
        let parsed = parse(document(&keys).as_bytes(), MAX_KEYS).unwrap();
        let again: Vec<_> =
            parsed.keys.keys().iter().map(|key| (Some(key.id().to_owned()), *key.bytes())).collect();
        prop_assert_eq!(again.len(), keys.len());
        prop_assert_eq!(parse(document(&again).as_bytes(), MAX_KEYS).unwrap().keys, parsed.keys);
    }
}
