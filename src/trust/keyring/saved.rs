//! The keys of a source that are on this machine, to check old lines with: no server is asked.

use std::path::Path;

use super::super::jwks::{Key, KeySet, MAX_KEPT_KEYS};
use super::{JwksOptions, read_file, store};

/// Returns the keys of a source that are in its configuration, in its key file, and in the cache
/// that the daemon keeps in `data_dir`, without those that its policy (`pin`, `revoked`) excludes.
/// Of the cache, retired keys are included however long ago they were retired, since they made the
/// signatures of that time. Returns none where there is no key yet. Blocks.
///
/// # Errors
/// What cannot be read or used, and why.
pub fn saved(source: &str, options: &JwksOptions, data_dir: &Path) -> Result<Option<KeySet>, String> {
    let mut keys: Vec<Key> = options.keys.iter().flat_map(KeySet::keys).cloned().collect();
    if let Some(file) = &options.file {
        let parsed = read_file(file, MAX_KEPT_KEYS).map_err(|error| error.to_string())?;
        keys.extend_from_slice(parsed.keys.keys());
    }
    // What the configuration lists itself is all that is ever trusted.
    if options.keys.is_none() {
        let path = store::path(data_dir, source);
        let cached = store::read(&path, &options.origin())
            .map_err(|cause| format!("cannot use the key cache {}: {cause}", path.display()))?;
        keys.extend(cached.into_iter().flatten().map(|known| known.key));
    }
    Ok(KeySet::of(keys.into_iter().filter(|key| options.pins(key) && !options.revokes(&key.thumbprint()))))
}

#[cfg(test)]
mod tests {
    use super::super::history::Known;
    use super::*;
    use crate::trust::jwks;
    use crate::trust::jwks::tests::document_of;

    fn keys(seeds: &[u8]) -> Vec<Key> {
        jwks::parse(document_of(seeds).as_bytes(), MAX_KEPT_KEYS).unwrap().keys.keys().to_vec()
    }

    fn ids(set: Option<KeySet>) -> Vec<String> {
        set.into_iter().flat_map(|set| set.keys().to_vec()).map(|key| key.id().to_owned()).collect()
    }

    #[test]
    fn keys_come_from_file_and_cache_and_policy_excludes_some() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("jwks.json");
        let mut options = JwksOptions { file: Some(file.clone()), ..JwksOptions::default() };
        let saved = |options: &JwksOptions| saved("us", options, dir.path());
        assert!(saved(&options).unwrap_err().contains("jwks.json"));
        std::fs::write(&file, document_of(&[1])).unwrap();
        assert_eq!(ids(saved(&options).unwrap()), ["k1"]);

        let known = |key: Key, retired_at| Known { key, first_seen: 1, last_seen: 1, retired_at };
        let cache = store::path(dir.path(), "us");
        let cached: Vec<Known> = keys(&[1, 2, 3]).into_iter().map(|key| known(key, Some(2))).collect();
        store::write(&cache, &options.origin(), &cached).unwrap();
        assert_eq!(ids(saved(&options).unwrap()), ["k1", "k2", "k3"]);
        options.revoked = vec![keys(&[3])[0].thumbprint()];
        assert_eq!(ids(saved(&options).unwrap()), ["k1", "k2"]);
        options.pin = vec![keys(&[2])[0].thumbprint()];
        assert_eq!(ids(saved(&options).unwrap()), ["k2"]);

        // The cache of another origin is not used, and that is said.
        store::write(&cache, "https://old.example.com/", &cached).unwrap();
        let error = saved(&options).unwrap_err();
        assert!(error.contains("us.json: its keys came from https://old.example.com/"), "{error}");
        let fixed = JwksOptions { keys: KeySet::of(keys(&[4])), ..JwksOptions::default() };
        assert_eq!(ids(saved(&fixed).unwrap()), ["k4"]);
        std::fs::remove_file(&cache).unwrap();
        let url = Some("https://us.example.com/jwks.json".parse().unwrap());
        assert_eq!(saved(&JwksOptions { url, ..JwksOptions::default() }), Ok(None));
    }
}
