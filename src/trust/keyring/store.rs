//! The cache of a key ring on disk: a JWKS document (RFC 7517) with members of our own, so that it
//! can also be used to check old lines.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::super::jwks;
use super::history::Known;
use super::origin::read_bounded;
use crate::escape::escape;

#[derive(Deserialize)]
struct Document<'a> {
    /// Keys of an origin that the operator has since replaced by another must not come back.
    origin: String,
    #[serde(borrow)]
    keys: Vec<&'a RawValue>,
}

/// Times in seconds since the Unix epoch.
#[derive(Deserialize)]
struct Times {
    first_seen: u64,
    last_seen: u64,
    retired_at: Option<u64>,
}

/// Returns the path of a source's cache. A source's name is any text, a file's name is not: bytes
/// that are not plain are written as `%XX`.
pub(super) fn path(data_dir: &Path, source: &str) -> PathBuf {
    let mut name = String::new();
    for byte in source.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => name.push(byte.into()),
            _ => name.push_str(&format!("%{byte:02X}")),
        }
    }
    data_dir.join("jwks").join(format!("{name}.json"))
}

/// Reads the cache of that origin, in the order of [`super::history::History`]; none when there is
/// none. Blocks.
///
/// # Errors
/// The reason why the file cannot be used.
pub(super) fn read(path: &Path, origin: &str) -> Result<Option<Vec<Known>>, String> {
    let document = match read_bounded(path) {
        Ok(document) => document,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let document: Document<'_> = serde_json::from_slice(&document).map_err(|error| error.to_string())?;
    if document.origin != origin {
        return Err(format!("its keys came from {}", escape(&document.origin)));
    }
    let mut keys = Vec::with_capacity(document.keys.len());
    for entry in document.keys {
        let key = jwks::entry(entry.get()).map_err(|refusal| format!("a key in it {refusal}"))?;
        let times: Times = serde_json::from_str(entry.get()).map_err(|error| error.to_string())?;
        let Times { first_seen, last_seen, retired_at } = times;
        keys.push(Known { key, first_seen, last_seen, retired_at });
    }
    Ok(Some(keys))
}

/// Writes the cache. The keys are written rather than the document as it was received: anything
/// else in there, such as a private key by mistake, stays off the disk. Blocks.
///
/// # Errors
/// Then the file is as it was.
pub(super) fn write(path: &Path, origin: &str, keys: &[Known]) -> io::Result<()> {
    let named: Vec<_> =
        keys.iter().map(|known| (Some(known.key.id().to_owned()), *known.key.bytes())).collect();
    let mut document: serde_json::Value = serde_json::from_str(&jwks::document(&named))?;
    document["origin"] = origin.into();
    for (known, entry) in keys.iter().zip(document["keys"].as_array_mut().into_iter().flatten()) {
        entry["first_seen"] = known.first_seen.into();
        entry["last_seen"] = known.last_seen.into();
        if let Some(at) = known.retired_at {
            entry["retired_at"] = at.into();
        }
    }
    replace_file(path, format!("{document:#}\n").as_bytes())
}

/// Replaces the file as a whole or not at all, power loss included. Leaves it alone when it has
/// that content already.
fn replace_file(path: &Path, content: &[u8]) -> io::Result<()> {
    if read_bounded(path).is_ok_and(|present| present == content) {
        return Ok(());
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    if !folder.is_dir() {
        // Recursive, so that it is no error when another source makes it at the same time.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        // Its name must survive a power loss as well.
        fs::File::open(folder.parent().unwrap_or(Path::new(".")))?.sync_all()?;
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    // One left by a crash may have any mode.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    fs::File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_that_write_at_the_same_time_share_the_folder() {
        for _ in 0..100 {
            let dir = tempfile::tempdir().unwrap();
            let ready = std::sync::Barrier::new(4);
            std::thread::scope(|scope| {
                for source in ["us", "eu", "au", "in"] {
                    let (path, ready) = (path(dir.path(), source), &ready);
                    scope.spawn(move || {
                        ready.wait();
                        replace_file(&path, b"keys").unwrap();
                    });
                }
            });
        }
    }

    #[test]
    fn a_sources_name_cannot_leave_the_folder() {
        let path = |source| path(Path::new("/d"), source);
        assert_eq!(path("konnect-us"), Path::new("/d/jwks/konnect-us.json"));
        assert_eq!(path("../a b"), Path::new("/d/jwks/..%2Fa%20b.json"));
        assert_ne!(path("a%2F"), path("a/"));
    }
}
