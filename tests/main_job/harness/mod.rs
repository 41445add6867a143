//! What every test needs: a directory, a daemon, a client that can misbehave, and a signer.

pub(crate) mod client;
pub(crate) mod daemon;
pub(crate) mod database;
pub(crate) mod fault;
pub(crate) mod key_server;
pub(crate) mod machine;
pub(crate) mod programs;
pub(crate) mod records;
pub(crate) mod rsyslog;
pub(crate) mod sign;
pub(crate) mod site;
pub(crate) mod syslog;
pub(crate) mod verify;

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Maximum time for anything that a test waits for. Long enough for a loaded machine; only a
/// failing test takes it.
pub(crate) const TEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Waits until a condition returns a value. The only function of a test that polls.
pub(crate) fn wait_until<T>(what: &str, mut condition: impl FnMut() -> Result<T, String>) -> T {
    let start = Instant::now();
    loop {
        match condition() {
            Ok(value) => return value,
            Err(last) if start.elapsed() > TEST_TIMEOUT => panic!("timed out waiting until {what}: {last}"),
            // The longer it takes, the less often: each attempt may be a connection, which the
            // system remembers for a minute.
            Err(_) => std::thread::sleep(
                (start.elapsed() / 10).clamp(Duration::from_millis(2), Duration::from_millis(50)),
            ),
        }
    }
}

/// Sets a flag when it is dropped, so that threads which poll it end even if the test fails.
pub(crate) struct SetOnDrop<'a>(pub(crate) &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Compresses bytes into one gzip member.
pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Compresses bytes into one zstd frame.
pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 1).unwrap()
}

/// Joins lines into a body, each with its `\n`.
pub(crate) fn body<L: AsRef<[u8]>>(lines: &[L]) -> Vec<u8> {
    let mut body = Vec::new();
    for line in lines {
        body.extend_from_slice(line.as_ref());
        body.push(b'\n');
    }
    body
}

/// Removes repeated lines and keeps the first of each.
pub(crate) fn without_repeats(lines: Vec<String>) -> Vec<String> {
    let mut seen = HashSet::new();
    lines.into_iter().filter(|line| seen.insert(line.clone())).collect()
}

/// Checks that a text contains every one of these words.
#[track_caller]
pub(crate) fn assert_contains(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
}
