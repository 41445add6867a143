//! Which files are to be checked, and in which order.
//!
//! What is named is checked, whatever it is. Of a directory, everything is that auditgate could have written: in
//! doubt a file is taken, for one that was tampered with must not escape by looking foreign. What is left out is
//! said.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use time::OffsetDateTime;
use time::macros::format_description;

use super::read::{GZIP_MAGIC, ZSTD_MAGIC};
use crate::deliver::file::rotated_at;
use crate::deliver::sqlite::stored;
use crate::trust::jwks::MAX_KEPT_KEYS;
use crate::trust::keyring;

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// What is to be checked, in this order; `-` is standard input.
    pub files: Vec<PathBuf>,
    /// What in the directories is not, and why.
    pub left_out: Vec<(PathBuf, &'static str)>,
    /// What could not even be looked at.
    pub unreadable: Vec<(PathBuf, io::Error)>,
}

/// Looks up what was named. Directories are searched to the bottom, and their files come in the order of their
/// time: when a rotated file was rotated, as its name says, and when another one was last written to.
pub fn find(named: &[PathBuf]) -> Found {
    let mut found = Found::default();
    for path in named {
        if path != Path::new("-") && path.is_dir() {
            let mut dated = Vec::new();
            search(path, &mut dated, &mut found);
            dated.sort();
            found.files.extend(dated.into_iter().map(|(.., path)| path));
        } else {
            found.files.push(path.clone());
        }
    }
    found
}

/// The time as rotated names have it, the sequence number, the path.
type Dated = (String, String, PathBuf);

fn search(directory: &Path, dated: &mut Vec<Dated>, found: &mut Found) {
    let entries = fs::read_dir(directory).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let mut entries = match entries {
        Ok(entries) => entries,
        Err(error) => {
            found.unreadable.push((directory.to_owned(), error));
            return;
        }
    };
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        match entry.metadata() {
            Err(error) => found.unreadable.push((path, error)),
            Ok(metadata) if metadata.is_dir() => search(&path, dated, found),
            Ok(metadata) if metadata.is_symlink() => found.left_out.push((path, "a symbolic link")),
            Ok(metadata) if !metadata.is_file() => found.left_out.push((path, "no regular file")),
            Ok(metadata) => match foreign(&path) {
                Err(error) => found.unreadable.push((path, error)),
                Ok(Some(why)) => found.left_out.push((path, why)),
                Ok(None) => {
                    let name = entry.file_name();
                    let (moment, sequence) = match name.to_str().and_then(rotated_at) {
                        Some((moment, sequence)) => (moment.to_owned(), sequence.to_owned()),
                        // Behind every file that was rotated within the same second.
                        None => (written_at(&metadata), "~".to_owned()),
                    };
                    dated.push((moment, sequence, path));
                }
            },
        }
    }
}

/// When a file was last written to, as rotated names have it.
fn written_at(metadata: &fs::Metadata) -> String {
    let shape = format_description!("[year][month][day]T[hour][minute][second]Z");
    let seconds = metadata.modified().ok().and_then(|moment| moment.duration_since(UNIX_EPOCH).ok());
    seconds
        .and_then(|since| i64::try_from(since.as_secs()).ok())
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .and_then(|moment| moment.format(&shape).ok())
        .unwrap_or_default()
}

/// What shows that a file in a directory is none that lines or rows are written to.
fn foreign(path: &Path) -> io::Result<Option<&'static str>> {
    const NAMES: [(&str, &str); 7] = [
        (".unfinished", "a compression that was cut off; the file itself is still there"),
        ("-wal", "part of a database"),
        ("-shm", "part of a database"),
        ("-journal", "part of a database"),
        (".pem", "a key or a certificate"),
        (".toml", "a configuration"),
        (".lock", "a lock"),
    ];
    const PACKED: [&[u8]; 5] = [b"\xfd7zXZ\0", b"BZh", b"\x04\x22\x4d\x18", b"PK\x03\x04", b"7z\xbc\xaf"];
    // What any of the beginnings below needs.
    const START: usize = 16;
    let name = path.to_string_lossy();
    if let Some((_, why)) = NAMES.iter().find(|(end, _)| name.ends_with(end)) {
        return Ok(Some(why));
    }
    let mut start = Vec::with_capacity(START);
    File::open(path)?.take(START as u64).read_to_end(&mut start)?;
    if start.starts_with(&GZIP_MAGIC) || start.starts_with(&ZSTD_MAGIC) {
        return Ok(None);
    }
    if start.starts_with(stored::MAGIC) {
        // One that cannot be opened is taken, so that reading it says why.
        return Ok((!stored::is_ours(path).unwrap_or(true)).then_some("a database that no SQLite sink made"));
    }
    if PACKED.iter().any(|magic| start.starts_with(magic)) {
        return Ok(Some("compressed in a way that auditgate does not write"));
    }
    if start.starts_with(b"\x7fELF") {
        return Ok(Some("a program"));
    }
    if start.starts_with(b"{") && keyring::read_file(path, MAX_KEPT_KEYS).is_ok() {
        return Ok(Some("a key set"));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    #[test]
    fn a_directory_is_searched_in_the_order_of_time() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8], seconds: u64| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, bytes).unwrap();
            let moment = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            File::options().write(true).open(&path).unwrap().set_modified(moment).unwrap();
        };
        // 2026-01-02T03:04:05Z.
        let moment = 1_767_323_045;
        write("a/x.log", b"line", moment + 100);
        write("a/x.log.20260102T030405Z-0002", b"line", 5);
        write("a/x.log.20260102T030405Z-0001.zst", b"\x28\xb5\x2f\xfd", moment + 500);
        write("b/c/y.log.1.gz", b"\x1f\x8b", moment - 1);
        write("b/same", b"", moment);
        write("b/torn.log", b"\0\0\0", moment + 101);
        write(
            "jwks.json",
            crate::trust::jwks::document(&[(
                None,
                crate::prove::judge::tests::key(1).verifying_key().to_bytes(),
            )])
            .as_bytes(),
            1,
        );
        let other = rusqlite::Connection::open(dir.path().join("other.db")).unwrap();
        other.execute_batch("CREATE TABLE events (raw)").unwrap();
        write("key.pem", b"", 1);
        write("x.xz", b"\xfd7zXZ\0", 1);
        std::os::unix::fs::symlink("a", dir.path().join("link")).unwrap();

        let relative = |path: &Path| path.strip_prefix(dir.path()).unwrap().to_str().unwrap().to_owned();
        let found = find(&[PathBuf::from("-"), dir.path().to_owned(), PathBuf::from("gone")]);
        assert_eq!(found.files.first().unwrap(), Path::new("-"));
        assert_eq!(found.files.last().unwrap(), Path::new("gone"));
        let files: Vec<_> = found.files[1..found.files.len() - 1].iter().map(|path| relative(path)).collect();
        assert_eq!(
            files,
            [
                "b/c/y.log.1.gz",
                "a/x.log.20260102T030405Z-0001.zst",
                "a/x.log.20260102T030405Z-0002",
                "b/same",
                "a/x.log",
                "b/torn.log"
            ]
        );
        let left_out: Vec<_> = found.left_out.iter().map(|(path, _)| relative(path)).collect();
        assert_eq!(left_out, ["jwks.json", "key.pem", "link", "other.db", "x.xz"]);
        assert!(found.unreadable.is_empty());
    }
}
