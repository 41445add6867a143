//! A JWKS document (RFC 7517) becomes a set of Ed25519 public keys (RFC 8037). Pure: the same bytes
//! always give the same keys, ids and refusals.

use std::fmt;

use base64::alphabet;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, URL_SAFE_NO_PAD};
use base64::engine::{DecodePaddingMode, Engine};
use ed25519_dalek::{PUBLIC_KEY_LENGTH, VerifyingKey};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

/// How many keys one document may give us. Every one of them may have to be tried for an event, so
/// that a longer list would let its publisher slow us down.
pub const MAX_KEYS: usize = 64;

/// How many keys are looked for where nobody waits: in what was kept over the years.
pub const MAX_KEPT_KEYS: usize = 256;

/// How many entries are looked at, usable or not; a longer list is no list of signing keys.
const MAX_ENTRIES: usize = 1024;
/// A `kid` is written beside every event that its key signed, so a longer one is not used.
const MAX_ID_BYTES: usize = 256;
/// How many refusals one message lists.
const MAX_LISTED: usize = 8;
/// How much of a foreign text a message repeats.
const MAX_SHOWN_CHARS: usize = 40;

/// base64url, padded or not; the bits after the last byte must be zero.
const BASE64URL: GeneralPurpose = GeneralPurpose::new(
    &alphabet::URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// An Ed25519 public key that is canonical and not weak, with the name it goes by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    id: String,
    bytes: [u8; PUBLIC_KEY_LENGTH],
}

impl Key {
    /// Its `kid`, or its [thumbprint](Key::thumbprint) when it has none (or an empty one, or one of
    /// more than 256 bytes). Unique within its [`KeySet`], at most a few hundred bytes, otherwise
    /// any text that the document's author chose: escape it before showing it to anybody.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// See [`thumbprint`].
    pub fn thumbprint(&self) -> String {
        thumbprint(&self.bytes)
    }

    /// The public key in base64url: the member `x` of a JWK (RFC 8037, section 2).
    pub fn x(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.bytes)
    }

    /// The public key as RFC 8032 encodes it.
    pub fn bytes(&self) -> &[u8; PUBLIC_KEY_LENGTH] {
        &self.bytes
    }
}

/// At least one key, no two of them equal, and each with an id of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySet {
    keys: Vec<Key>,
}

impl KeySet {
    /// The keys in this order, equal ones once. A key whose id an earlier, different key has gets `#` and the
    /// beginning of its thumbprint behind it. None without a key.
    pub fn of(keys: impl IntoIterator<Item = Key>) -> Option<Self> {
        let mut set: Vec<Key> = Vec::new();
        for Key { id, bytes } in keys {
            if !set.iter().any(|key| key.bytes == bytes) {
                let id = distinct_id(id, &bytes, &set);
                set.push(Key { id, bytes });
            }
        }
        (!set.is_empty()).then_some(Self { keys: set })
    }

    /// The keys; never empty.
    pub fn keys(&self) -> &[Key] {
        &self.keys
    }
}

/// What a document gave: keys, and what in it was no key for us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// The usable keys.
    pub keys: KeySet,
    /// The entries that were passed over, in the document's order. Worth a warning each.
    pub refused: Vec<RefusedKey>,
}

/// An entry of the document that we do not use. Its text is safe to print: foreign parts are
/// escaped and cut short, and key material is never repeated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedKey {
    /// Which entry of `keys`, from 1.
    pub position: usize,
    /// Its `kid`, as far as it has one.
    pub kid: Option<String>,
    /// Why.
    pub reason: Refusal,
}

impl fmt::Display for RefusedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "key {}", self.position)?;
        if let Some(kid) = &self.kid {
            write!(f, " (kid {})", shown(kid))?;
        }
        write!(f, " {}", self.reason)
    }
}

/// Why an entry is not used; completes a sentence that begins with the key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not an object, or a member of it has the wrong type or occurs twice (RFC 7517, section 4).
    #[error("is not a well-formed JWK")]
    Malformed,
    /// The private member `d` is in a public document (RFC 8037, section 2).
    #[error(
        "has the member d: its PRIVATE key was published, so anybody can sign with it; replace this key pair now"
    )]
    PrivateKeyPublished,
    /// `kty` is not `OKP`.
    #[error("has kty {}, not OKP", shown(.0))]
    KeyType(String),
    /// `crv` is not `Ed25519`.
    #[error("has crv {}, not Ed25519", shown(.0))]
    Curve(String),
    /// `alg` is neither `EdDSA` nor `Ed25519` (RFC 8037, RFC 9864).
    #[error("has alg {}, neither EdDSA nor Ed25519", shown(.0))]
    Algorithm(String),
    /// `use` is not `sig`.
    #[error("has use {}, not sig", shown(.0))]
    Use(String),
    /// `key_ops` does not include `verify` (RFC 7517, section 4.3).
    #[error("has key_ops without verify")]
    Operations,
    /// `x` is missing.
    #[error("has no x, the public key")]
    NoPublicKey,
    /// `x` is not base64url, or has bits set after its last byte (RFC 4648, section 3.5).
    #[error("has an x that is not base64url ({0})")]
    Base64(base64::DecodeError),
    /// `x` is of another length.
    #[error("has an x of {0} bytes, but an Ed25519 public key has {PUBLIC_KEY_LENGTH}")]
    Length(usize),
    /// `x` is not the encoding of a point (RFC 8032, section 5.1.3).
    #[error("has an x that is no point of the curve")]
    NotAPoint,
    /// `x` is a second encoding of a point; implementations disagree about those.
    #[error("has an x that is not the canonical encoding of its point")]
    NotCanonical,
    /// The point is of small order: one signature fits almost any message.
    #[error("is weak: its point has a small order, so that signatures under it prove nothing")]
    Weak,
}

/// Why a document gives no keys at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JwksError {
    /// Not JSON (RFC 8259).
    #[error("the JWKS document is not JSON: {0}")]
    NotJson(String),
    /// JSON, but no JWK set.
    #[error("the JWKS document is not an object with one keys array (RFC 7517, section 5)")]
    NotAKeySet,
    /// The list itself is beyond any reason.
    #[error("the JWKS document lists {0} keys, but at most {MAX_ENTRIES} are looked at")]
    TooManyEntries(usize),
    /// More usable keys than we would try for an event.
    #[error("the JWKS document has more than {0} Ed25519 keys, which is more than are used at once")]
    TooManyKeys(usize),
    /// Nothing in it is a key for us.
    #[error("the JWKS document has no usable Ed25519 key: {}", listed(.0))]
    NoUsableKey(Vec<RefusedKey>),
}

/// Reads a JWKS document. The caller bounds its length; time and memory are linear in it.
///
/// Only keys of `kty` `OKP`, `crv` `Ed25519`, with `alg` absent, `EdDSA` or `Ed25519` and `use`
/// absent or `sig`, are taken; the others are listed as refused and do not spoil the rest. Equal
/// keys count once, under the first one's id; more than `limit` different ones are an error.
///
/// # Errors
/// See [`JwksError`].
pub fn parse(document: &[u8], limit: usize) -> Result<Parsed, JwksError> {
    let (mut keys, mut refused) = (Vec::new(), Vec::new());
    for (index, entry) in entries(document)?.iter().enumerate() {
        match examine(entry.get()) {
            (_, Ok(key)) => keys.push(key),
            (kid, Err(reason)) => refused.push(RefusedKey { position: index + 1, kid, reason }),
        }
    }
    match KeySet::of(keys) {
        Some(keys) if keys.keys.len() > limit => Err(JwksError::TooManyKeys(limit)),
        Some(keys) => Ok(Parsed { keys, refused }),
        None => Err(JwksError::NoUsableKey(refused)),
    }
}

/// One public key as an operator writes it down: base64url of its 32 bytes. Its id is its thumbprint.
///
/// # Errors
/// See [`Refusal`].
pub fn pinned(x: &str) -> Result<Key, Refusal> {
    let bytes = point(x)?;
    Ok(Key { id: thumbprint(&bytes), bytes })
}

/// Whether a text can be a [`thumbprint`].
pub fn is_thumbprint(text: &str) -> bool {
    URL_SAFE_NO_PAD.decode(text).is_ok_and(|digest| digest.len() == 32)
}

/// One entry of a document.
pub(super) fn entry(json: &str) -> Result<Key, Refusal> {
    examine(json).1
}

/// Writes a JWKS document with these keys, as [`parse`] reads it; ends in a line feed. A key
/// without a `kid` goes by its thumbprint.
pub fn document(keys: &[(Option<String>, [u8; PUBLIC_KEY_LENGTH])]) -> String {
    let keys: Vec<serde_json::Value> = keys
        .iter()
        .map(|(kid, bytes)| {
            let mut key = serde_json::json!({
                "kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig",
                "x": URL_SAFE_NO_PAD.encode(bytes),
            });
            if let Some(kid) = kid {
                key["kid"] = kid.as_str().into();
            }
            key
        })
        .collect();
    format!("{:#}\n", serde_json::json!({ "keys": keys }))
}

/// The key's JWK thumbprint (RFC 7638; for this key type RFC 8037, appendix A.3): SHA-256 over the
/// required members, in base64url without padding. 43 characters.
pub fn thumbprint(bytes: &[u8; PUBLIC_KEY_LENGTH]) -> String {
    let x = URL_SAFE_NO_PAD.encode(bytes);
    let canonical = format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{x}"}}"#);
    URL_SAFE_NO_PAD.encode(Sha256::digest(canonical))
}

/// The name that a key went by before [`KeySet::of`] told it apart from another one: its id without the beginning of
/// its own thumbprint behind it. Other ids are returned as they are.
pub fn undistinguished<'a>(mut id: &'a str, thumbprint: &str) -> &'a str {
    while let Some((name, suffix)) = id.rsplit_once('#')
        && (suffix == distinction(thumbprint) || suffix == thumbprint)
    {
        id = name;
    }
    id
}

/// What tells a key apart from others of the same name.
fn distinction(thumbprint: &str) -> &str {
    thumbprint.get(..8).unwrap_or(thumbprint)
}

#[derive(Deserialize)]
struct Document<'a> {
    #[serde(borrow)]
    keys: Vec<&'a RawValue>,
}

/// The members that matter; RFC 7517 tells us to ignore the others.
#[derive(Deserialize)]
struct Jwk {
    kty: Option<String>,
    crv: Option<String>,
    alg: Option<String>,
    r#use: Option<String>,
    key_ops: Option<Vec<String>>,
    /// A label, whatever it is: one that is no text costs the key nothing.
    kid: Option<Kid>,
    x: Option<String>,
    d: Option<IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Kid {
    Text(String),
    Other(IgnoredAny),
}

fn entries(document: &[u8]) -> Result<Vec<&RawValue>, JwksError> {
    // A byte order mark, which some editors and servers write (RFC 8259, section 8.1).
    let document = document.strip_prefix(b"\xef\xbb\xbf").unwrap_or(document);
    let parsed: Result<Document<'_>, _> = serde_json::from_slice(document);
    match parsed {
        // Only these errors repeat nothing of the document.
        Err(error) if error.is_syntax() || error.is_eof() => {
            Err(JwksError::NotJson(match looks_like(document) {
                Some(what) => format!("it looks like {what}"),
                None => error.to_string(),
            }))
        }
        Err(_) => Err(JwksError::NotAKeySet),
        // A struct would be read from an array of its members too.
        Ok(_) if document.trim_ascii_start().first() != Some(&b'{') => Err(JwksError::NotAKeySet),
        Ok(Document { keys }) if keys.len() > MAX_ENTRIES => Err(JwksError::TooManyEntries(keys.len())),
        Ok(Document { keys }) => Ok(keys),
    }
}

/// What servers and proxies send in place of JSON.
fn looks_like(document: &[u8]) -> Option<&'static str> {
    let start = document.trim_ascii_start();
    if document.starts_with(b"\x1f\x8b") {
        Some("gzip, which nobody asked for")
    } else if start.starts_with(b"<") {
        Some("an HTML or XML page; is this the address of the key set?")
    } else if start.starts_with(b"-----BEGIN ") {
        Some("PEM; give the key set as JSON (RFC 7517)")
    } else if document.is_empty() {
        Some("nothing: it is empty")
    } else {
        None
    }
}

/// The entry's `kid`, and its key or what is wrong with it.
fn examine(entry: &str) -> (Option<String>, Result<Key, Refusal>) {
    match serde_json::from_str::<Jwk>(entry) {
        Ok(mut jwk) if entry.starts_with('{') => {
            let kid = match jwk.kid.take() {
                Some(Kid::Text(kid)) => Some(kid),
                Some(Kid::Other(_)) | None => None,
            };
            let usable = kid.clone().filter(|kid| !kid.is_empty() && kid.len() <= MAX_ID_BYTES);
            let key =
                public_key(jwk).map(|bytes| Key { id: usable.unwrap_or_else(|| thumbprint(&bytes)), bytes });
            (kid, key)
        }
        _ => (None, Err(Refusal::Malformed)),
    }
}

fn public_key(jwk: Jwk) -> Result<[u8; PUBLIC_KEY_LENGTH], Refusal> {
    if jwk.d.is_some() {
        return Err(Refusal::PrivateKeyPublished);
    }
    let only = |value: Option<String>, wanted: &[&str], refusal: fn(String) -> Refusal| match value {
        Some(value) if !wanted.contains(&value.as_str()) => Err(refusal(value)),
        _ => Ok(()),
    };
    only(Some(jwk.kty.unwrap_or_default()), &["OKP"], Refusal::KeyType)?;
    only(Some(jwk.crv.unwrap_or_default()), &["Ed25519"], Refusal::Curve)?;
    only(jwk.alg, &["EdDSA", "Ed25519"], Refusal::Algorithm)?;
    only(jwk.r#use, &["sig"], Refusal::Use)?;
    if jwk.key_ops.is_some_and(|operations| !operations.iter().any(|operation| operation == "verify")) {
        return Err(Refusal::Operations);
    }
    point(&jwk.x.ok_or(Refusal::NoPublicKey)?)
}

/// The point that is encoded in base64url, if it is one to verify with.
fn point(x: &str) -> Result<[u8; PUBLIC_KEY_LENGTH], Refusal> {
    let decoded = BASE64URL.decode(x).map_err(Refusal::Base64)?;
    let bytes = <[u8; PUBLIC_KEY_LENGTH]>::try_from(decoded).map_err(|other| Refusal::Length(other.len()))?;
    let point = VerifyingKey::from_bytes(&bytes).map_err(|_| Refusal::NotAPoint)?;
    if point.is_weak() {
        return Err(Refusal::Weak);
    }
    if point.to_edwards().compress().to_bytes() != bytes {
        return Err(Refusal::NotCanonical);
    }
    Ok(bytes)
}

fn distinct_id(mut id: String, bytes: &[u8; PUBLIC_KEY_LENGTH], earlier: &[Key]) -> String {
    let thumbprint = thumbprint(bytes);
    let mut suffix = distinction(&thumbprint);
    // More than one round only for a document that imitates such ids.
    while earlier.iter().any(|key| key.id == id) {
        id = format!("{id}#{suffix}");
        suffix = thumbprint.as_str();
    }
    id
}

/// A foreign text as messages repeat it: quoted, escaped, short.
fn shown(text: &str) -> String {
    let short: String = text.chars().take(MAX_SHOWN_CHARS).collect();
    let more = if short.len() < text.len() { "..." } else { "" };
    format!("{short:?}{more}")
}

fn listed(refused: &[RefusedKey]) -> String {
    if refused.is_empty() {
        return "its keys array is empty".to_owned();
    }
    let mut parts: Vec<String> = refused.iter().take(MAX_LISTED).map(ToString::to_string).collect();
    if refused.len() > MAX_LISTED {
        parts.push(format!("and {} more", refused.len() - MAX_LISTED));
    }
    parts.join("; ")
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;
    use proptest::prelude::*;

    use super::*;

    /// RFC 8037, appendix A.2 and A.3.
    const RFC_X: &str = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
    const RFC_THUMBPRINT: &str = "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k";

    fn key(seed: u8) -> [u8; 32] {
        SigningKey::from_bytes(&[seed; 32]).verifying_key().to_bytes()
    }

    fn jwk(members: &str, bytes: &[u8]) -> String {
        format!(r#"{{"kty":"OKP","crv":"Ed25519","x":"{}"{members}}}"#, URL_SAFE_NO_PAD.encode(bytes))
    }

    fn set(entries: &[String]) -> Result<Parsed, JwksError> {
        parse(format!(r#"{{"keys":[{}]}}"#, entries.join(",")).as_bytes(), MAX_KEYS)
    }

    /// Why `entry` alone gives no key.
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
    fn a_label_costs_no_key_and_what_is_no_key_set_is_named() {
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
        assert_eq!(refusal(&jwk(r#","key_ops":["sign"]"#, &key(1))), Refusal::Operations);
        assert_eq!(refusal(&jwk(r#","key_ops":[]"#, &key(1))), Refusal::Operations);
        assert!(set(&[jwk(r#","key_ops":["sign","verify"]"#, &key(1))]).is_ok());
    }

    #[test]
    fn konnects_form_is_read() {
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
    fn accepted_variants() {
        for members in [r#","alg":"Ed25519""#, r#","use":"sig""#, r#","x5c":[1],"nbf":{}"#, r#","d":null"#] {
            assert!(set(&[jwk(members, &key(1))]).is_ok(), "{members}");
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
            (jwk(r#","alg":"ES256""#, &key(1)), Refusal::Algorithm("ES256".to_owned())),
            (jwk(r#","use":"enc""#, &key(1)), Refusal::Use("enc".to_owned())),
            (r#"{"kty":"OKP","crv":"Ed25519"}"#.to_owned(), Refusal::NoPublicKey),
            (jwk("", &[7; 31]), Refusal::Length(31)),
            (jwk("", &[7; 33]), Refusal::Length(33)),
            (jwk("", &[]), Refusal::Length(0)),
            (jwk(r#","d":"AAAA""#, &key(1)), Refusal::PrivateKeyPublished),
            (jwk(r#","d":7"#, &key(1)), Refusal::PrivateKeyPublished),
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
        // The last character of RFC_X carries four bits of the key and two of nothing.
        for x in [RFC_X.replace("URo", "URp"), RFC_X.replace('_', "/"), "a".to_owned(), format!("{RFC_X} ")] {
            assert!(matches!(refusal(&with_x(&x)), Refusal::Base64(_)), "{x}");
        }
    }

    #[test]
    fn the_length_is_said_as_for_kongs_own_sample() {
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
    fn a_bad_key_does_not_spoil_a_good_one() {
        let entries = [jwk(r#","kid":"a""#, &[1; 5]), jwk(r#","kid":"b""#, &key(2)), "7".to_owned()];
        let parsed = set(&entries).unwrap();
        assert_eq!(ids(&parsed), ["b"]);
        let refused: Vec<_> = parsed.refused.iter().map(|r| (r.position, r.kid.as_deref())).collect();
        assert_eq!(refused, [(1, Some("a")), (3, None)]);
    }

    #[test]
    fn equal_keys_are_merged_and_equal_ids_told_apart() {
        let entries = [
            jwk(r#","kid":"a""#, &key(1)),
            jwk(r#","kid":"a""#, &key(2)),
            jwk(r#","kid":"z""#, &key(1)),
            jwk(r#","kid":"b""#, &key(3)),
        ];
        let parsed = set(&entries).unwrap();
        assert_eq!(ids(&parsed), ["a", &format!("a#{}", &thumbprint(&key(2))[..8]), "b"]);
        assert_eq!(parsed.keys.keys()[1].bytes(), &key(2));
    }

    #[test]
    fn an_imitated_distinct_id_is_still_told_apart() {
        let third = thumbprint(&key(3));
        let entries = [
            jwk(r#","kid":"a""#, &key(1)),
            jwk(&format!(r#","kid":"a#{}""#, &third[..8]), &key(2)),
            jwk(r#","kid":"a""#, &key(3)),
        ];
        let parsed = set(&entries).unwrap();
        assert_eq!(ids(&parsed)[2], format!("a#{}#{third}", &third[..8]));
        assert_eq!(undistinguished(ids(&parsed)[2], &third), "a");
        assert_eq!(undistinguished(ids(&parsed)[2], &thumbprint(&key(2))), ids(&parsed)[2]);
    }

    #[test]
    fn documents_that_are_no_key_set() {
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
        let keys = |n: u8| (0..n).map(|seed| jwk("", &key(seed))).collect::<Vec<_>>();
        assert_eq!(set(&keys(64)).unwrap().keys.keys().len(), MAX_KEYS);
        assert_eq!(set(&keys(65)), Err(JwksError::TooManyKeys(MAX_KEYS)));
        // Repeats of one key are one key.
        assert_eq!(set(&vec![jwk("", &key(1)); 200]).unwrap().keys.keys().len(), 1);
        assert_eq!(set(&vec!["0".to_owned(); 1025]), Err(JwksError::TooManyEntries(1025)));
        let message = set(&vec!["0".to_owned(); 1024]).unwrap_err().to_string();
        assert!(message.ends_with("and 1016 more") && message.len() < 1000, "{message}");
    }

    #[test]
    fn messages_escape_and_shorten_what_the_document_says() {
        let entry = format!(r#"{{"kid":"\u001b[31m\u202e","kty":"{}"}}"#, "x".repeat(5000));
        let message = set(&[entry]).unwrap_err().to_string();
        assert!(!message.contains(['\u{1b}', '\u{202e}']) && message.len() < 300, "{message}");
    }

    #[test]
    fn a_written_document_reads_back() {
        let text = document(&[(Some("one \"1\"".to_owned()), key(1)), (None, key(2))]);
        let parsed = parse(text.as_bytes(), MAX_KEYS).unwrap();
        assert_eq!(ids(&parsed), ["one \"1\"", &thumbprint(&key(2))]);
        assert_eq!(parsed.keys.keys()[0].bytes(), &key(1));
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
        fn whatever_is_accepted_is_canonical_and_reads_back(bytes in any::<[u8; 32]>(), kid in ".{1,40}") {
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
}
