//! The signing keys of a sender: which of them signs now, and the key set with all of them.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use time::OffsetDateTime;

use crate::cli::exit::Failure;
use crate::config::sender::{Signing, SigningKeyOptions};
use crate::secret::credential_path;
use crate::send::SigningKey;
use crate::spool::CurrentKey;
use crate::trust::jwks;

/// The keys, in the order in which they begin to sign.
pub(super) struct SigningKeys {
    keys: Vec<(Option<OffsetDateTime>, Arc<SigningKey>)>,
}

impl SigningKeys {
    /// Reads every key.
    ///
    /// # Errors
    /// 78 when one cannot be read or is not a key.
    pub(super) fn read(signing: &Signing) -> Result<Self, Failure> {
        let read = |options: &SigningKeyOptions| {
            let key = SigningKey::read(&path(options)?).map_err(Failure::config)?;
            Ok((options.from.map(|from| from.0), Arc::new(key)))
        };
        let mut keys = signing.keys.iter().map(read).collect::<Result<Vec<_>, Failure>>()?;
        keys.sort_by_key(|(from, _)| *from);
        Ok(Self { keys })
    }

    /// Returns the key that signs at a time: the one that began last.
    pub(super) fn at(&self, now: OffsetDateTime) -> Option<&Arc<SigningKey>> {
        let begun = self.keys.iter().rev().find(|(from, _)| from.is_none_or(|from| from <= now));
        begun.map(|(_, key)| key)
    }

    /// Lets the key of a time sign from now on, and says so when it is another one.
    pub(super) fn take_up(&self, current: &CurrentKey, now: OffsetDateTime) {
        let Some(key) = self.at(now) else { return };
        if current.read().as_ref().is_some_and(|current| current.public_key() == key.public_key()) {
            return;
        }
        tracing::info!(
            code = "signing-key",
            key_id = jwks::thumbprint(&key.public_key()),
            "events are signed with the key {key_id} from now on",
            key_id = jwks::thumbprint(&key.public_key())
        );
        *current.write() = Some(Arc::clone(key));
    }

    /// Returns the key set with every key, each under its thumbprint (RFC 7638).
    pub(super) fn key_set(&self) -> String {
        let keys: Vec<_> = self
            .keys
            .iter()
            .map(|(_, key)| (Some(jwks::thumbprint(&key.public_key())), key.public_key()))
            .collect();
        jwks::document(&keys)
    }
}

fn path(options: &SigningKeyOptions) -> Result<PathBuf, Failure> {
    match (&options.file, &options.credential) {
        (Some(file), _) => Ok(file.clone()),
        (None, credential) => {
            let name = credential.as_deref().unwrap_or_default();
            credential_path(name, &|name| std::env::var_os(name)).map_err(Failure::config)
        }
    }
}

/// Writes the key set, as a whole or not at all.
///
/// # Errors
/// 74 when it cannot be written.
pub(super) fn publish(path: &Path, key_set: &str) -> Result<(), Failure> {
    if std::fs::read(path).is_ok_and(|written| written == key_set.as_bytes()) {
        return Ok(());
    }
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    std::fs::File::create(&new)
        .and_then(|mut file| {
            file.write_all(key_set.as_bytes())?;
            file.sync_all()
        })
        .and_then(|()| std::fs::rename(&new, path))
        .map_err(|error| Failure::io(format!("cannot write the key set {}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn the_key_that_began_last_signs_and_all_are_published() {
        let key = |seed| Arc::new(SigningKey::from_seed(&[seed; 32]));
        let keys = SigningKeys {
            keys: vec![
                (None, key(1)),
                (Some(datetime!(2026-12-01 0:00 UTC)), key(2)),
                (Some(datetime!(2027-01-01 0:00 UTC)), key(3)),
            ],
        };
        for (now, seed) in [
            (datetime!(2026-11-30 23:59 UTC), 1),
            (datetime!(2026-12-01 0:00 UTC), 2),
            (datetime!(2030-01-01 0:00 UTC), 3),
        ] {
            assert_eq!(keys.at(now).unwrap().public_key(), key(seed).public_key(), "{now}");
        }
        let (current, dir) = (CurrentKey::default(), tempfile::tempdir().unwrap());
        keys.take_up(&current, datetime!(2026-12-02 0:00 UTC));
        assert_eq!(current.read().as_ref().unwrap().public_key(), key(2).public_key());
        let path = dir.path().join("jwks.json");
        publish(&path, &keys.key_set()).unwrap();
        let written = std::fs::read_to_string(&path).unwrap();
        assert_eq!(written.matches("\"kid\"").count(), 3, "{written}");
        assert!(written.contains(&jwks::thumbprint(&key(3).public_key())), "{written}");
    }
}
