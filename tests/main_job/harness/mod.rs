//! What every test needs: a place to work in, a daemon, a client that can misbehave, and a signer.

pub(crate) mod client;
pub(crate) mod daemon;
pub(crate) mod key_server;
pub(crate) mod machine;
pub(crate) mod programs;
pub(crate) mod records;
pub(crate) mod rsyslog;
pub(crate) mod sign;
pub(crate) mod site;
pub(crate) mod syslog;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Long enough for a loaded machine; nobody waits for it unless the test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until a condition gives a value. The only place where a test waits by looking again.
pub(crate) fn wait_until<T>(
    patience: Duration,
    what: &str,
    mut condition: impl FnMut() -> Result<T, String>,
) -> T {
    let start = Instant::now();
    loop {
        match condition() {
            Ok(value) => return value,
            Err(last) if start.elapsed() > patience => panic!("waited in vain until {what}: {last}"),
            // The longer it takes, the less often: each look may be a connection, which the system remembers for
            // a minute.
            Err(_) => std::thread::sleep(
                (start.elapsed() / 10).clamp(Duration::from_millis(2), Duration::from_millis(50)),
            ),
        }
    }
}

/// Sets a flag when it is dropped, so that the threads which look at it end also where the test fails.
pub(crate) struct SetOnDrop<'a>(pub(crate) &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The bytes as one gzip member.
pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// The lines as a body, each with its `\n`.
pub(crate) fn body<L: AsRef<[u8]>>(lines: &[L]) -> Vec<u8> {
    let mut body = Vec::new();
    for line in lines {
        body.extend_from_slice(line.as_ref());
        body.push(b'\n');
    }
    body
}
