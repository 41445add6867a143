//! Options of a source's keys in the configuration: their origin, and which of them are trusted.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::super::jwks::{Key, KeySet, MAX_KEPT_KEYS, MAX_KEYS, is_thumbprint, pinned};
use super::read_file;
use crate::net::Endpoint;
use crate::quantity::time;
use crate::secret::Secret;

/// Origin of a source's keys, and policy that decides which are trusted, and for how long. There is
/// exactly one of `url`, `file` and `keys`; `refresh`, `ca` and `token` belong to `url`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    expecting = "a table such as { url = \"https://…\" } or { file = \"PATH\" }"
)]
pub struct JwksOptions {
    /// URL of a JWKS document: https, or http on loopback.
    pub url: Option<Endpoint>,
    /// Time between two fetches: 1 ms to 3650 d, bounded to between one second and a year. Default
    /// 1 h.
    #[serde(with = "time")]
    pub refresh: Option<Duration>,
    /// PEM file with the only authorities to trust; without it, the system's.
    pub ca: Option<PathBuf>,
    /// Bearer token (RFC 6750), without the word `Bearer`.
    pub token: Option<Secret>,
    /// JWKS document on this machine, read again every minute.
    pub file: Option<PathBuf>,
    /// The keys themselves, and no others: the member `x` of each JWK.
    #[serde(with = "public_keys", skip_serializing_if = "Option::is_none")]
    pub keys: Option<KeySet>,
    /// Thumbprints (RFC 7638) of the only keys to trust; all when empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pin: Vec<String>,
    /// Thumbprints of keys that are never trusted, even when they are listed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub revoked: Vec<String>,
    /// Time for which a key is trusted after it was found to be no longer listed: 1 ms to 3650 d.
    /// Default 8 d: what Konnect sends again is at most a week old.
    #[serde(with = "time")]
    pub retired_for: Duration,
}

impl Default for JwksOptions {
    fn default() -> Self {
        Self {
            url: None,
            refresh: None,
            ca: None,
            token: None,
            file: None,
            keys: None,
            pin: Vec::new(),
            revoked: Vec::new(),
            retired_for: Duration::from_secs(8 * 86_400),
        }
    }
}

impl JwksOptions {
    /// Fills in the defaults that depend on other options.
    pub fn fill_in(&mut self) {
        if self.url.is_some() {
            self.refresh = Some(self.refresh());
        }
    }

    /// Reports options that exclude each other to `problem`, with the reason.
    pub fn check(&self, problem: &mut dyn FnMut(&[&str], String)) {
        const FORMS: &str =
            "write { url = \"https://…\" }, { file = \"PATH\" } or { keys = [\"BASE64URL\"] }";

        let Self { url, refresh, ca, token, file, keys, pin, revoked, .. } = self;
        match [url.is_some(), file.is_some(), keys.is_some()].iter().filter(|is_there| **is_there).count() {
            0 => problem(&[], format!("`jwks` has neither `url` nor `file` nor `keys`; {FORMS}")),
            1 => {}
            _ => problem(&[], format!("`jwks` has more than one of `url`, `file` and `keys`; {FORMS}")),
        }
        for (key, is_there) in
            [("refresh", refresh.is_some()), ("ca", ca.is_some()), ("token", token.is_some())]
        {
            if is_there && url.is_none() && (file.is_some() || keys.is_some()) {
                problem(&[key], format!("`{key}` with a `jwks` that has no url; remove `{key}`, or use url"));
            }
        }
        if keys.is_some() && !pin.is_empty() {
            let hint = "remove `pin`: `keys` are the only ones anyhow";
            problem(&["pin"], format!("`pin` with a `jwks` that has `keys`; {hint}"));
        } else {
            self.check_thumbprints("pin", pin, problem);
        }
        self.check_thumbprints("revoked", revoked, problem);
    }

    fn check_thumbprints(&self, key: &str, texts: &[String], problem: &mut dyn FnMut(&[&str], String)) {
        for (index, text) in texts.iter().enumerate().filter(|(_, text)| !is_thumbprint(text)) {
            let document = self.file.as_ref().and_then(|file| read_file(file, MAX_KEPT_KEYS).ok());
            let listed = document.map_or_else(String::new, |document| {
                let thumbprints: Vec<String> = document.keys.keys().iter().map(Key::thumbprint).collect();
                format!("; the document lists {}", thumbprints.join(", "))
            });
            let text = format!(
                "`{key}` of `jwks`: `{text}` is not a thumbprint; write the key's thumbprint (RFC 7638), 43 characters, as \
                 the log shows it when keys are loaded{listed}"
            );
            problem(&[&format!("{key}.{index}"), key], text);
        }
    }

    /// Returns the name of the origin in the cache on disk.
    pub fn origin(&self) -> String {
        match (&self.url, &self.file) {
            (Some(endpoint), _) => endpoint.to_string(),
            (None, Some(path)) => path.display().to_string(),
            (None, None) => "the configuration".to_owned(),
        }
    }

    pub(super) fn refresh(&self) -> Duration {
        self.refresh.unwrap_or(Duration::from_secs(3600))
    }

    pub(super) fn revokes(&self, thumbprint: &str) -> bool {
        self.revoked.iter().any(|revoked| revoked == thumbprint)
    }

    pub(super) fn pins(&self, key: &Key) -> bool {
        // Never by its ID, which the author of the document chooses.
        self.pin.is_empty() || self.pin.contains(&key.thumbprint())
    }
}

/// Public keys, each as the member `x` of its JWK.
mod public_keys {
    use super::*;

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(written: D) -> Result<Option<KeySet>, D::Error> {
        let texts = Vec::<String>::deserialize(written)?;
        let hint = "write the member `x` of the public JWK: 43 characters of base64url";
        let key = |text: &String| {
            pinned(text).map_err(|refusal| de::Error::custom(format!("a key of `jwks` {refusal}; {hint}")))
        };
        let keys = KeySet::of(texts.iter().map(key).collect::<Result<Vec<Key>, _>>()?);
        let too_many =
            || de::Error::custom(format!("no key, or more than {MAX_KEYS}; list those of your events"));
        keys.filter(|set| set.keys().len() <= MAX_KEYS).map(Some).ok_or_else(too_many)
    }

    pub(super) fn serialize<S: Serializer>(keys: &Option<KeySet>, out: S) -> Result<S::Ok, S::Error> {
        out.collect_seq(keys.iter().flat_map(KeySet::keys).map(Key::x))
    }
}
