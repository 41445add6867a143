//! What the fuzz targets share: [`naive`] readers of the format, written from its description and
//! without a look at the program's own, and the [`oracle`] that compares the two.
//!
//! The naive readers copy everything, look at every character and know nothing of speed, so that
//! they are easy to believe.

pub mod naive;
pub mod oracle;

use std::path::PathBuf;
use std::sync::LazyLock;

use auditgate::trust::jwks::{KeySet, pinned};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ed25519_dalek::SigningKey;

/// The key that signed the lines of the seed corpora.
pub static SIGNING_KEY: LazyLock<SigningKey> = LazyLock::new(|| SigningKey::from_bytes(&[7; 32]));

/// The public half of [`SIGNING_KEY`].
pub fn key_set() -> KeySet {
    let x = URL_SAFE_NO_PAD.encode(SIGNING_KEY.verifying_key().to_bytes());
    KeySet::of([pinned(&x).expect("a good key")]).expect("one key")
}

/// A directory in memory, where a sync costs nothing; it lives as long as the process and is named
/// after it, so that `fuzz/run` can clear it away.
pub fn directory() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    let parent = if memory.is_dir() { memory } else { std::env::temp_dir() };
    let directory = parent.join(format!("auditgate-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory for the target's files");
    directory
}
