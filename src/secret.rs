//! Secrets: their origin, and bytes that are masked when printed and zeroed when dropped.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use subtle::ConstantTimeEq;
use thiserror::Error;
use zeroize::Zeroizing;

/// Maximum length of a secret, in bytes: half of what is accepted of a request's head. A longer one
/// means that the wrong file was named.
pub const MAX_SECRET: usize = 8 * 1024;

/// Text that is printed instead of a secret.
const MASK: &str = "***";
/// Variable with the directory of a unit's credentials: systemd.exec(5), `LoadCredential=`.
const CREDENTIALS_DIRECTORY: &str = "CREDENTIALS_DIRECTORY";

/// Lookup of an environment variable, `std::env::var_os` in the daemon.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// A secret that is a legal HTTP field value (RFC 9110, section 5.5): 1 to [`MAX_SECRET`] bytes, no
/// control character but the tab, no white space at either end.
///
/// In the configuration it is a table with its origin, from which [`Secret::read`] takes the bytes.
/// Until then it matches nothing. Its bytes are zeroed when it is dropped; `Debug` and `Display`
/// give `***`, `Serialize` a table with that.
#[derive(Clone, Deserialize)]
#[serde(from = "Origin")]
pub struct Secret {
    origin: Origin,
    bytes: Zeroizing<Vec<u8>>,
}

impl Secret {
    /// Creates a secret from its bytes.
    ///
    /// # Errors
    /// When the bytes could never be the value of a header: empty, too long, a control character,
    /// white space at an end (which HTTP strips).
    pub fn new(bytes: Vec<u8>) -> Result<Self, SecretError> {
        let bytes = Zeroizing::new(bytes);
        const HEADER_NAME: &[u8] = b"authorization:";
        if bytes.is_empty() {
            Err(SecretError::Empty)
        } else if bytes.get(..HEADER_NAME.len()).is_some_and(|start| start.eq_ignore_ascii_case(HEADER_NAME))
        {
            Err(SecretError::HeaderName)
        } else if bytes.len() > MAX_SECRET {
            Err(SecretError::TooLong)
        } else if bytes.trim_ascii().len() != bytes.len() {
            Err(SecretError::Padded)
        } else if bytes.iter().any(|byte| byte.is_ascii_control() && *byte != b'\t') {
            Err(SecretError::ControlCharacter)
        } else {
            Ok(Self { origin: Origin::default(), bytes })
        }
    }

    /// Reads a secret from a file, without the white space around it.
    ///
    /// # Errors
    /// See [`SecretError`].
    pub fn from_file(path: &Path) -> Result<Self, SecretError> {
        read_file(path)
    }

    /// Returns whether `presented` is this secret, in a time that does not depend on where they
    /// differ. The time does reveal whether the lengths differ.
    pub fn matches(&self, presented: &[u8]) -> bool {
        !self.bytes.is_empty() && bool::from(self.bytes.as_slice().ct_eq(presented))
    }

    /// Returns the bytes, for the header of an outgoing request. Never log them.
    pub fn expose(&self) -> &[u8] {
        &self.bytes
    }

    /// Reads the bytes from where the configuration says.
    ///
    /// # Errors
    /// See [`SecretError`]; the secret stays unread.
    pub fn read(&mut self, environment: Environment<'_>) -> Result<(), SecretError> {
        *self = self.origin.read(environment)?;
        Ok(())
    }
}

/// Compares in a time that does not depend on where they differ.
impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        bool::from(self.bytes.ct_eq(&other.bytes))
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASK)
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASK)
    }
}

/// Writes `{ value = "***" }`, so that the output is a valid configuration.
impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map([("value", MASK)])
    }
}

/// Error of a secret, with a hint. No variant contains a byte of it.
#[derive(Debug, Error)]
pub enum SecretError {
    /// The table is empty.
    #[error("the secret has no origin; {FORMS}")]
    NoOrigin,
    /// The table has several keys.
    #[error("the secret has more than one origin; {FORMS}")]
    Origins,
    /// It is empty.
    #[error("the secret is empty; put the exact value of the sender's Authorization header into it")]
    Empty,
    /// It is a whole header field instead of the field's value.
    #[error(
        "the secret begins with `Authorization:`, the name of the header; leave that out and keep what follows it"
    )]
    HeaderName,
    /// It is longer than [`MAX_SECRET`].
    #[error("the secret is longer than 8KiB; it must be one line, fit for an HTTP header")]
    TooLong,
    /// It has white space around it, which HTTP strips, so it could never be presented.
    #[error("the secret begins or ends with white space, which HTTP strips; remove the white space")]
    Padded,
    /// It is not legal in an HTTP field value: mostly because of a line break.
    #[error(
        "the secret contains a control character or line break; it must be one line, fit for an HTTP header"
    )]
    ControlCharacter,
    /// The file is missing or may not be read.
    #[error(
        "cannot read the secret file `{path}`: {source}; it must exist, and the daemon's user must be able to read it"
    )]
    File {
        /// The file as resolved.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// The variable's name is not one. It may be the secret itself, so it is not repeated.
    #[error(
        "what `env` names cannot be an environment variable; write its name, of letters, digits and `_`; a secret \
         itself is written as {{ value = \"SECRET\" }}"
    )]
    VariableName,
    /// The environment variable is not set.
    #[error(
        "the environment variable `{name}` is not set; set `{name}` for the daemon, by the unit's EnvironmentFile="
    )]
    Variable {
        /// The variable's name.
        name: String,
    },
    /// systemd has not passed any credential.
    #[error(
        "the credential `{name}` was not passed, because $CREDENTIALS_DIRECTORY is not set; add \
         LoadCredential={name}:FILE to the systemd unit"
    )]
    NoCredentials {
        /// The credential's name.
        name: String,
    },
    /// The credential's name would leave the directory.
    #[error(
        "the credential name `{name}` is not a plain file name; use the name given in the unit's LoadCredential="
    )]
    CredentialName {
        /// The credential's name as written.
        name: String,
    },
}

const FORMS: &str =
    "write { file = \"PATH\" }, { env = \"NAME\" }, { credential = \"NAME\" } or { value = \"SECRET\" }";

impl SecretError {
    /// Returns whether the secret is only missing on this machine, as opposed to wrong.
    pub fn is_absence(&self) -> bool {
        matches!(self, Self::File { .. } | Self::Variable { .. } | Self::NoCredentials { .. })
    }
}

/// Origin of a secret; exactly one of the keys is given. Not an enum: its errors would repeat a
/// secret that is written in place of the table.
#[derive(Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table such as { file = \"PATH\" }")]
struct Origin {
    /// Surrounding white space is dropped.
    file: Option<PathBuf>,
    /// The name of an environment variable.
    env: Option<String>,
    /// The name of a systemd credential: a file in `$CREDENTIALS_DIRECTORY`.
    credential: Option<String>,
    /// The secret itself.
    #[serde(default, deserialize_with = "zeroizing")]
    value: Option<Zeroizing<String>>,
}

fn zeroizing<'de, D: Deserializer<'de>>(written: D) -> Result<Option<Zeroizing<String>>, D::Error> {
    String::deserialize(written).map(Zeroizing::new).map(Some)
}

impl From<Origin> for Secret {
    fn from(origin: Origin) -> Self {
        Self { origin, bytes: Zeroizing::default() }
    }
}

impl Origin {
    fn read(&self, environment: Environment<'_>) -> Result<Secret, SecretError> {
        match (&self.file, &self.env, &self.credential, &self.value) {
            (Some(path), None, None, None) => read_file(path),
            (None, Some(name), None, None) => {
                if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
                    return Err(SecretError::VariableName);
                }
                let value = environment(name).ok_or_else(|| SecretError::Variable { name: name.clone() })?;
                Secret::new(value.into_encoded_bytes())
            }
            (None, None, Some(name), None) => read_file(&credential_path(name, environment)?),
            (None, None, None, Some(value)) => Secret::new(value.as_bytes().to_vec()),
            (None, None, None, None) => Err(SecretError::NoOrigin),
            _ => Err(SecretError::Origins),
        }
    }
}

/// Returns the file of a systemd credential.
///
/// # Errors
/// [`SecretError::CredentialName`] and [`SecretError::NoCredentials`].
pub fn credential_path(name: &str, environment: Environment<'_>) -> Result<PathBuf, SecretError> {
    if name.is_empty() || name.contains(['/', '\0']) || name == "." || name == ".." {
        return Err(SecretError::CredentialName { name: name.to_owned() });
    }
    let directory = environment(CREDENTIALS_DIRECTORY)
        .ok_or_else(|| SecretError::NoCredentials { name: name.to_owned() })?;
    Ok(Path::new(&directory).join(name))
}

fn read_file(path: &Path) -> Result<Secret, SecretError> {
    // Capacity for the longest secret, its white space and one byte more, so that the buffer never
    // moves and leaves a copy behind.
    const ROOM: usize = MAX_SECRET + 1024;

    let mut bytes = Zeroizing::new(Vec::with_capacity(ROOM));
    let limit = u64::try_from(ROOM).unwrap_or(u64::MAX);
    File::open(path)
        .and_then(|file| file.take(limit).read_to_end(&mut bytes))
        .map_err(|source| SecretError::File { path: path.to_owned(), source })?;
    if bytes.len() == ROOM {
        return Err(SecretError::TooLong);
    }
    // Some editors write a byte order mark in front of text.
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    Secret::new(text.trim_ascii().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(text: &str) -> Secret {
        Secret::new(text.as_bytes().to_vec()).unwrap()
    }

    fn credential(name: &str) -> Origin {
        Origin { credential: Some(name.to_owned()), ..Origin::default() }
    }

    #[test]
    fn only_the_same_bytes_match() {
        let secret = secret("Bearer abc");
        assert!(secret.matches(b"Bearer abc"));
        for wrong in ["Bearer abd", "bearer abc", "Bearer ab", "Bearer abcd", ""] {
            assert!(!secret.matches(wrong.as_bytes()), "{wrong}");
        }
        assert_eq!(secret.expose(), b"Bearer abc");
    }

    #[test]
    fn an_unread_secret_matches_nothing() {
        let unread: Secret = serde_json::from_str(r#"{"file": "/nonexistent/token"}"#).unwrap();
        assert!(!unread.matches(b"") && !unread.matches(b"***"));
    }

    #[test]
    fn it_is_masked_however_it_is_printed() {
        let secret = secret("hush");
        assert_eq!(format!("{secret} {secret:?} {:?}", Some(&secret)), "*** *** Some(***)");
        assert_eq!(serde_json::to_string(&secret).unwrap(), "{\"value\":\"***\"}");
    }

    #[test]
    fn what_no_header_can_carry_is_refused() {
        let refused = |bytes: &[u8]| Secret::new(bytes.to_vec()).unwrap_err();
        assert!(matches!(refused(b""), SecretError::Empty));
        assert!(matches!(refused(b" a"), SecretError::Padded));
        assert!(matches!(refused(b"a\n"), SecretError::Padded));
        assert!(matches!(refused(b"a\nb"), SecretError::ControlCharacter));
        assert!(matches!(refused(b"a\x7f"), SecretError::ControlCharacter));
        assert!(matches!(refused(b"\0"), SecretError::ControlCharacter));
        assert!(matches!(refused(&vec![b'a'; MAX_SECRET + 1]), SecretError::TooLong));
        assert!(Secret::new(vec![b'a'; MAX_SECRET]).is_ok());
        // A tab inside and obs-text are legal (RFC 9110, section 5.5).
        assert!(Secret::new(b"a\tb\xff".to_vec()).is_ok());
    }

    #[test]
    fn a_file_loses_its_surrounding_white_space() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        std::fs::write(&path, "\n  Bearer abc \r\n").unwrap();
        let unset = |_: &str| None;
        assert!(
            Origin { file: Some(path.clone()), ..Origin::default() }
                .read(&unset)
                .unwrap()
                .matches(b"Bearer abc")
        );

        let credentials = |name: &str| (name == "CREDENTIALS_DIRECTORY").then(|| directory.path().into());
        assert!(credential("token").read(&credentials).unwrap().matches(b"Bearer abc"));
        assert!(matches!(credential("token").read(&unset), Err(SecretError::NoCredentials { .. })));
        for name in ["", "..", "../token", "/etc/shadow"] {
            let read = credential(name).read(&credentials);
            assert!(matches!(read, Err(SecretError::CredentialName { .. })), "{name}");
        }

        std::fs::write(&path, " \n").unwrap();
        assert!(matches!(
            Origin { file: Some(path.clone()), ..Origin::default() }.read(&unset),
            Err(SecretError::Empty)
        ));
        std::fs::write(&path, vec![b'a'; 2 * MAX_SECRET]).unwrap();
        assert!(matches!(
            Origin { file: Some(path), ..Origin::default() }.read(&unset),
            Err(SecretError::TooLong)
        ));
    }

    #[test]
    fn a_secret_that_is_not_here_is_told_from_a_wrong_one() {
        let unset = |_: &str| None;
        let missing =
            Origin { file: Some("/nonexistent/token".into()), ..Origin::default() }.read(&unset).unwrap_err();
        assert!(missing.is_absence());
        assert!(missing.to_string().starts_with("cannot read the secret file `/nonexistent/token`: "));
        assert!(missing.to_string().contains("`/nonexistent/token`"));
        let variable = || Origin { env: Some("TOKEN".to_owned()), ..Origin::default() };
        assert!(variable().read(&unset).unwrap_err().is_absence());
        assert!(!SecretError::Empty.is_absence());
        let set = |name: &str| (name == "TOKEN").then(|| "abc".into());
        assert!(variable().read(&set).unwrap().matches(b"abc"));
    }
}
