//! Writes an event as a line in its format, and signs it.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use ed25519_dalek::Signer as _;
use ed25519_dalek::pkcs8::DecodePrivateKey;
use zeroize::Zeroizing;

use super::complete::{complete, fill_in};
use crate::wire::event::{Event, Format, Malformed};
use crate::wire::line::Line;
use crate::wire::{cef, json, signature};

/// Maximum length of a key file. A PKCS#8 Ed25519 key in PEM has some 120 bytes; a longer file is
/// something else.
const MAX_KEY_FILE_BYTES: u64 = 64 * 1024;

/// Reason why an event cannot be written as a line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SignError {
    /// It has no CEF form.
    #[error(transparent)]
    Cef(#[from] cef::WriteError),
    /// A key of the line that it was read from may have been forged, so that its value is not in
    /// the event. A new line would leave it out, under a signature that says nothing was left out.
    #[error("the keys {} are ambiguous and would be lost: send the line as it is instead", .0.join(", "))]
    Ambiguous(Vec<String>),
    /// The line would not be parsed as the same event.
    #[error("the event would not be read back from {0} as it is")]
    Unrepresentable(Format),
}

/// Writes `event` as a line without its terminator. With a key it is signed as Konnect does:
/// Ed25519 over the line without `sig` (for CPS the whole line, wrapper included). A `sig` that the
/// event already has is left out.
///
/// # Errors
/// [`SignError`]; the returned line always parses to the same event, plus its `sig`.
pub fn line(format: Format, event: &Event, key: Option<&SigningKey>) -> Result<Vec<u8>, SignError> {
    if !event.ambiguous().is_empty() {
        return Err(SignError::Ambiguous(event.ambiguous().to_vec()));
    }
    let mut event = Cow::Borrowed(event);
    if event.field("sig").is_some() {
        event.to_mut().remove("sig");
    }
    let mut line = match format {
        Format::Cef => cef::write(&event)?,
        Format::Json => json::write(&event),
        Format::Cps => json::write_wrapped(&event),
    };
    // Values are the caller's: a number that is not a JSON number would break the line. CEF has been
    // read back already.
    let is_readable = format == Format::Cef
        || !line.contains(&b'\n')
            && Line::parse(&line).is_ok_and(|read| read.format() == format && read.is_of(&event));
    if !is_readable {
        return Err(SignError::Unrepresentable(format));
    }
    if let Some(key) = key {
        let signature = key.0.sign(&line).to_bytes();
        signature::insert(format, &mut line, &signature);
    }
    Ok(line)
}

/// Writes an input line (CEF, JSON, CPS or a JSON object of fields) as the line to send, up to its
/// signature: in `format`, or as it came, with what is missing filled in ([`complete`], without the
/// header for JSON), and without the signature that it had.
///
/// # Errors
/// What is wrong with it, for people.
#[doc(hidden)]
pub fn prepare(text: &[u8], format: Option<Format>, now: i64) -> Result<(Format, Event), String> {
    let parsed = Line::parse(text).map_err(|malformed| malformed.to_string())?;
    let mut event = parsed.event();
    let format = format.unwrap_or(parsed.format());
    // A CEF line shows whether it has a class; the other formats may lack the whole header.
    if format == Format::Cef {
        complete(&mut event, now);
    } else {
        fill_in(&mut event, now);
    }
    Ok((format, event))
}

/// Signs a line that [`line`] has written without a key; one that carries a signature stays as it
/// is.
///
/// # Errors
/// When it is not a line of an event.
#[doc(hidden)]
pub fn sign_line(line: &mut Vec<u8>, key: &SigningKey) -> Result<(), Malformed> {
    let parsed = Line::parse(line)?;
    let (format, is_signed) = (parsed.format(), parsed.signed().is_some());
    if !is_signed {
        let signature = key.0.sign(line).to_bytes();
        signature::insert(format, line, &signature);
    }
    Ok(())
}

/// Reason why there is no signing key. Each can be fixed by the operator; none repeats anything of
/// the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The file cannot be read.
    #[error("cannot read the signing key {}: {cause}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The underlying error.
        cause: io::Error,
    },
    /// The file was read, but holds no key that can be used for signing.
    #[error("{} {problem}: an unencrypted Ed25519 key in PKCS#8 PEM is needed, as `auditgate keygen` writes it", .path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Its actual content; completes a sentence that begins with the path.
        problem: &'static str,
    },
}

/// An Ed25519 private key (RFC 8032). Zeroed when it is dropped; `Debug` shows its public half
/// only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SigningKey(pub(crate) ed25519_dalek::SigningKey);

impl SigningKey {
    /// Creates the key of a seed: 32 bytes that must be random and secret.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(ed25519_dalek::SigningKey::from_bytes(seed))
    }

    /// Reads a key from a PKCS#8 PEM file (RFC 5958, RFC 7468, RFC 8410). Blocks.
    ///
    /// # Errors
    /// See [`KeyError`].
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let unreadable = |cause| KeyError::Unreadable { path: path.to_owned(), cause };
        // The whole capacity at once, so that no copy of the key is left behind by growing.
        let mut bytes =
            Zeroizing::new(Vec::with_capacity(usize::try_from(MAX_KEY_FILE_BYTES).unwrap_or(0) + 1));
        let file = File::open(path).map_err(unreadable)?;
        file.take(MAX_KEY_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
        let unusable = |problem| KeyError::Unusable { path: path.to_owned(), problem };
        let text = std::str::from_utf8(&bytes).map_err(|_| unusable("is not text"))?;
        let key = ed25519_dalek::SigningKey::from_pkcs8_pem(text.trim_start());
        key.map(Self).map_err(|_| unusable(problem(text)))
    }

    /// Returns the public half, as a key set publishes it (RFC 8032, section 5.1.5).
    pub fn public_key(&self) -> [u8; 32] {
        self.0.verifying_key().to_bytes()
    }
}

/// Returns the content of a file that is not a signing key.
fn problem(text: &str) -> &'static str {
    if u64::try_from(text.len()).is_ok_and(|length| length > MAX_KEY_FILE_BYTES) {
        "is too long for a key"
    } else if text.contains("-----BEGIN ENCRYPTED PRIVATE KEY-----") {
        "holds an encrypted key"
    } else if text.contains("-----BEGIN OPENSSH PRIVATE KEY-----") {
        "holds an OpenSSH key"
    } else if text.contains("-----BEGIN PUBLIC KEY-----") {
        "holds a public key"
    } else if text.contains("-----BEGIN CERTIFICATE-----") {
        "holds a certificate"
    } else if text.contains("-----BEGIN PRIVATE KEY-----") {
        "holds a key of another kind, or a damaged one"
    } else {
        "holds no private key"
    }
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::pkcs8::EncodePrivateKey;
    use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;

    use super::*;
    use crate::wire::event::Value;

    fn key() -> SigningKey {
        SigningKey::from_seed(&[7; 32])
    }

    fn event() -> Event {
        let line = r#"{"cef_version":"0","event_ts":"2023-05-19T00:03:39Z","event_vendor":"KongInc","event_product":"Konnect","event_version":"1.0","event_class_id":"konnect","name":"Authz.usage","severity":1,"rt":1681450748406,"src":"127.0.0.6","action":"retrieve","granted":true,"org_id":"o","principal_id":"p","actor_id":"","trace_id":3895213347334635099,"user_agent":"curl sig=x","sig":"old"}"#;
        Line::parse(line.as_bytes()).unwrap().event()
    }

    #[test]
    fn a_line_is_signed_over_its_own_bytes_and_reads_back_as_the_event() {
        for format in Format::ALL {
            let line = line(format, &event(), Some(&key())).unwrap();
            let read = Line::parse(&line).unwrap();
            assert_eq!(read.format(), format);
            let signed = read.signed().unwrap();
            let signature = ed25519_dalek::Signature::from_bytes(&signature::decode(signed.value).unwrap());
            key().0.verifying_key().verify_strict(&signed.first.message(), &signature).unwrap();
            let mut said = read.event();
            let mut wanted = event();
            assert_eq!(said.remove("sig").unwrap().text().as_bytes(), signed.value);
            wanted.remove("sig");
            assert_eq!(said, wanted);
        }
    }

    #[test]
    fn a_prepared_line_is_signed_later_as_if_at_once() {
        for format in Format::ALL {
            let (format, event) = prepare(&line(format, &event(), None).unwrap(), None, 0).unwrap();
            let mut later = line(format, &event, None).unwrap();
            sign_line(&mut later, &key()).unwrap();
            assert_eq!(later, line(format, &event, Some(&key())).unwrap());
            let signed = later.clone();
            sign_line(&mut later, &SigningKey::from_seed(&[8; 32])).unwrap();
            assert_eq!(later, signed);
        }
        let (format, event) = prepare(br#"{"user":"x","n":12345678901234567890}"#, None, 1).unwrap();
        assert_eq!(format, Format::Json);
        assert_eq!(event.text("rt").unwrap(), "1");
        assert_eq!(event.text("event_ts").unwrap(), "1970-01-01T00:00:00Z");
        assert_eq!(event.text("n").unwrap(), "12345678901234567890");
        assert!(event.field("trace_id").is_some() && event.field("cef_version").is_none());
        assert!(prepare(b"no event", None, 1).is_err());
    }

    #[test]
    fn without_a_key_the_line_has_no_signature() {
        for format in Format::ALL {
            let line = line(format, &event(), None).unwrap();
            assert!(Line::parse(&line).unwrap().signed().is_none(), "{format}");
        }
    }

    #[test]
    fn an_event_that_would_be_lost_or_misread_is_refused() {
        let repeated = Line::parse(br#"{"a":1,"a":2}"#).unwrap().event();
        assert_eq!(line(Format::Json, &repeated, None), Err(SignError::Ambiguous(vec!["a".to_owned()])));
        let mut wrapper = Event::new();
        wrapper.set("event", Value::Json("{}".to_owned()));
        assert_eq!(line(Format::Json, &wrapper, None), Err(SignError::Unrepresentable(Format::Json)));
        assert!(line(Format::Cps, &wrapper, None).is_ok());
        for number in ["x", "1\n", "1,\"b\":2"] {
            let mut broken = Event::new();
            broken.set("a", Value::Number(number.to_owned()));
            assert_eq!(line(Format::Json, &broken, None), Err(SignError::Unrepresentable(Format::Json)));
        }
        assert!(matches!(line(Format::Cef, &Event::new(), None), Err(SignError::Cef(_))));
    }

    #[test]
    fn a_key_is_read_from_its_file_and_a_wrong_file_is_reported_with_its_problem() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("signing-key.pem");
        assert!(matches!(SigningKey::read(&path), Err(KeyError::Unreadable { .. })));
        let pem = key().0.to_pkcs8_pem(LineEnding::LF).unwrap();
        std::fs::write(&path, pem.as_bytes()).unwrap();
        assert_eq!(SigningKey::read(&path).unwrap(), key());
        let damaged = pem.replacen("MF", "MG", 1);
        let long = "x".repeat(70_000);
        for (text, problem) in [
            ("", "holds no private key"),
            ("-----BEGIN PUBLIC KEY-----\n", "holds a public key"),
            ("-----BEGIN ENCRYPTED PRIVATE KEY-----\n", "holds an encrypted key"),
            ("-----BEGIN OPENSSH PRIVATE KEY-----\n", "holds an OpenSSH key"),
            ("-----BEGIN CERTIFICATE-----\n", "holds a certificate"),
            (&damaged, "holds a key of another kind, or a damaged one"),
            (&long, "is too long for a key"),
        ] {
            std::fs::write(&path, text).unwrap();
            let message = SigningKey::read(&path).unwrap_err().to_string();
            assert!(message.contains("signing-key.pem") && message.contains(problem), "{message}");
        }
    }
}
