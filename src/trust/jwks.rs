//! Parses a JWKS document (RFC 7517) into a set of Ed25519 public keys (RFC 8037). Pure: the same
//! bytes always give the same keys, ids and refusals.

use std::fmt;

use base64::alphabet;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, URL_SAFE_NO_PAD};
use base64::engine::{DecodePaddingMode, Engine};
use ed25519_dalek::{PUBLIC_KEY_LENGTH, VerifyingKey};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

/// Maximum number of keys of one document. Every one of them may have to be tried for an event, so
/// a longer list would let its publisher slow us down.
pub const MAX_KEYS: usize = 64;

/// Maximum number of keys where speed does not matter: in what was kept over the years.
pub const MAX_KEPT_KEYS: usize = 256;

/// Maximum number of entries that are examined, usable or not; a longer list is not a list of
/// signing keys.
const MAX_ENTRIES: usize = 1024;
/// Maximum length of a `kid` in bytes. It is stored with every event that its key signed, so a
/// longer one is not used.
const MAX_ID_BYTES: usize = 256;
/// Maximum number of refusals in one message.
const MAX_LISTED: usize = 8;
/// Maximum length of a foreign text in a message.
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
    /// Returns its `kid`, or its [thumbprint](Key::thumbprint) when it has none (or an empty one,
    /// or one of more than 256 bytes). Unique within its [`KeySet`], at most a few hundred bytes,
    /// otherwise any text that the document's author chose: escape it before printing it.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Returns its [`thumbprint`].
    pub fn thumbprint(&self) -> String {
        thumbprint(&self.bytes)
    }

    /// Returns the public key in base64url: the member `x` of a JWK (RFC 8037, section 2).
    pub fn x(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.bytes)
    }

    /// Returns the public key as RFC 8032 encodes it.
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
    /// Creates a set of the keys in this order, equal ones once. A key whose id an earlier,
    /// different key has gets `#` and the beginning of its thumbprint as a suffix. Returns none
    /// without a key.
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

    /// Returns the keys; never empty.
    pub fn keys(&self) -> &[Key] {
        &self.keys
    }
}

/// Result of parsing a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// The usable keys.
    pub keys: KeySet,
    /// The entries that were ignored, in the document's order. Each deserves a warning.
    pub refused: Vec<RefusedKey>,
}

/// An entry of the document that is not used. Its text is safe to print: foreign parts are escaped
/// and truncated, and key material is never repeated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedKey {
    /// Number of the entry in `keys`, from 1.
    pub position: usize,
    /// Its `kid`, if it has one.
    pub kid: Option<String>,
    /// Reason of the refusal.
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

/// Reason why an entry is not used; completes a sentence that begins with the key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not an object, or a member of it has the wrong type or occurs twice (RFC 7517, section 4).
    #[error("is not a well-formed JWK")]
    Malformed,
    /// The private member `d` is in a public document (RFC 8037, section 2).
    #[error(
        "has the member d: its PRIVATE key was published, so anyone can sign with it; replace this key pair now"
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
    #[error("has an x that is not a point of the curve")]
    NotAPoint,
    /// `x` is a second encoding of a point; implementations disagree about those.
    #[error("has an x that is not the canonical encoding of its point")]
    NotCanonical,
    /// The point is of small order: one signature fits almost any message.
    #[error("is weak: its point has a small order, so that signatures under it prove nothing")]
    Weak,
}

/// Reason why a document gives no keys at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JwksError {
    /// Not JSON (RFC 8259).
    #[error("the JWKS document is not JSON: {0}")]
    NotJson(String),
    /// JSON, but not a JWK set.
    #[error("the JWKS document is not an object with one keys array (RFC 7517, section 5)")]
    NotAKeySet,
    /// The list has far too many entries.
    #[error("the JWKS document lists {0} keys, but at most {MAX_ENTRIES} are read")]
    TooManyEntries(usize),
    /// More usable keys than would be tried for an event.
    #[error("the JWKS document has more than {0} Ed25519 keys, which is more than are used at once")]
    TooManyKeys(usize),
    /// It has no usable key.
    #[error("the JWKS document has no usable Ed25519 key: {}", listed(.0))]
    NoUsableKey(Vec<RefusedKey>),
}

/// Parses a JWKS document. The caller bounds its length; time and memory are linear in it.
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

/// Parses a public key as an operator writes it: base64url of its 32 bytes. Its id is its
/// thumbprint.
///
/// # Errors
/// See [`Refusal`].
pub fn pinned(x: &str) -> Result<Key, Refusal> {
    let bytes = point(x)?;
    Ok(Key { id: thumbprint(&bytes), bytes })
}

/// Returns whether a text can be a [`thumbprint`].
pub fn is_thumbprint(text: &str) -> bool {
    URL_SAFE_NO_PAD.decode(text).is_ok_and(|digest| digest.len() == 32)
}

/// Parses one entry of a document.
pub(super) fn entry(json: &str) -> Result<Key, Refusal> {
    examine(json).1
}

/// Writes a JWKS document with these keys, as [`parse`] reads it; ends in a line feed. A key
/// without a `kid` is known by its thumbprint.
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

/// Returns the key's JWK thumbprint (RFC 7638; for this key type RFC 8037, appendix A.3): SHA-256
/// over the required members, in base64url without padding. 43 characters.
pub fn thumbprint(bytes: &[u8; PUBLIC_KEY_LENGTH]) -> String {
    let x = URL_SAFE_NO_PAD.encode(bytes);
    let canonical = format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{x}"}}"#);
    URL_SAFE_NO_PAD.encode(Sha256::digest(canonical))
}

/// Returns the id of a key before [`KeySet::of`] distinguished it from another one: without the
/// beginning of its own thumbprint as a suffix. Other ids are returned as they are.
pub fn undistinguished<'a>(mut id: &'a str, thumbprint: &str) -> &'a str {
    while let Some((name, suffix)) = id.rsplit_once('#')
        && (suffix == distinction(thumbprint) || suffix == thumbprint)
    {
        id = name;
    }
    id
}

/// Returns the suffix that distinguishes a key from others of the same id.
fn distinction(thumbprint: &str) -> &str {
    thumbprint.get(..8).unwrap_or(thumbprint)
}

#[derive(Deserialize)]
struct Document<'a> {
    #[serde(borrow)]
    keys: Vec<&'a RawValue>,
}

/// The relevant members; RFC 7517 requires that others be ignored.
#[derive(Deserialize)]
struct Jwk {
    kty: Option<String>,
    crv: Option<String>,
    alg: Option<String>,
    r#use: Option<String>,
    key_ops: Option<Vec<String>>,
    /// A label, whatever it is: one that is not text does not affect the key.
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
        // Serde would also read a struct from an array of its members.
        Ok(_) if document.trim_ascii_start().first() != Some(&b'{') => Err(JwksError::NotAKeySet),
        Ok(Document { keys }) if keys.len() > MAX_ENTRIES => Err(JwksError::TooManyEntries(keys.len())),
        Ok(Document { keys }) => Ok(keys),
    }
}

/// Recognises what servers and proxies send in place of JSON.
fn looks_like(document: &[u8]) -> Option<&'static str> {
    let start = document.trim_ascii_start();
    if document.starts_with(b"\x1f\x8b") {
        Some("gzip, which was not asked for")
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

/// Returns the entry's `kid`, and its key or what is wrong with it.
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

/// Returns the point that is encoded in base64url, if it can be used for verification.
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

/// Returns a foreign text for a message: quoted, escaped, truncated.
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
pub(crate) mod tests;
