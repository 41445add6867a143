//! The cache of a key ring on disk: with any content the listed key stays in use, and the file is
//! valid afterwards.

#![no_main]

use std::cell::LazyCell;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use auditgate::trust::jwks::{MAX_KEPT_KEYS, document};
use auditgate::trust::keyring::{Fetcher, JwksOptions, KeyRing};
use auditgate_fuzz::{directory, key_set};
use libfuzzer_sys::fuzz_target;
use tokio::runtime::Runtime;

thread_local! {
    static STAGE: LazyCell<Stage> = LazyCell::new(Stage::new);
}

struct Stage {
    runtime: Runtime,
    directory: PathBuf,
    jwks: PathBuf,
    memory: PathBuf,
}

impl Stage {
    fn new() -> Self {
        let directory = directory();
        // One path for every run, since the corpus names it as the origin.
        let jwks = PathBuf::from("/dev/shm/auditgate-fuzz-jwks.json");
        let keys = key_set();
        let named: Vec<_> = keys.keys().iter().map(|key| (None, *key.bytes())).collect();
        std::fs::write(&jwks, document(&named)).expect("a key file");
        std::fs::create_dir_all(directory.join("jwks")).expect("a directory");
        let memory = directory.join("jwks/us.json");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        Self { runtime, directory, jwks, memory }
    }

    fn ring(&self) -> (Arc<KeyRing>, Fetcher) {
        let options = JwksOptions { file: Some(self.jwks.clone()), ..JwksOptions::default() };
        KeyRing::new("us", options, &self.directory, |_| ()).expect("a ring")
    }
}

fuzz_target!(|bytes: &[u8]| {
    STAGE.with(|stage| {
        std::fs::write(&stage.memory, bytes).expect("the memory");
        let load = |(ring, mut fetcher): (Arc<KeyRing>, Fetcher)| {
            stage
                .runtime
                .block_on(fetcher.load_at_start(Duration::from_secs(60)))
                .expect("the key file is good");
            ring.current().expect("keys")
        };
        let first = load(stage.ring());
        let listed = key_set();
        assert!(
            first.keys().iter().any(|key| key.bytes() == listed.keys()[0].bytes()),
            "the listed key is in use"
        );
        assert!(first.keys().len() <= MAX_KEPT_KEYS, "{}", first.keys().len());
        // The cache that was written has the same keys.
        let second = load(stage.ring());
        assert_eq!(
            first.keys().iter().map(|key| key.bytes()).collect::<Vec<_>>(),
            second.keys().iter().map(|key| key.bytes()).collect::<Vec<_>>()
        );
    });
});
