//! The files to check, and their order.
//!
//! A file that is named is checked, whatever it is. Of a directory, every file is checked that
//! auditgate could have written: in doubt a file is taken, since one that was tampered with must
//! not escape by looking foreign. What is skipped is reported.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use time::OffsetDateTime;
use time::macros::format_description;

use crate::deliver::file::rotated_at;
use crate::deliver::sqlite::stored::{self, DatabaseKind};
use crate::trust::jwks::MAX_KEPT_KEYS;
use crate::trust::keyring::{self, DOCUMENT_LIMIT_BYTES};
use crate::wire::line::Line;

/// Result of the search.
#[derive(Debug, Default)]
pub struct Found {
    /// The files to check, in this order; `-` is standard input.
    pub files: Vec<PathBuf>,
    /// Files in the directories that are skipped, and why.
    pub left_out: Vec<(PathBuf, &'static str)>,
    /// Paths that could not be read.
    pub unreadable: Vec<(PathBuf, io::Error)>,
}

/// Finds the files. Directories are searched recursively, and their files are sorted by time: when
/// a rotated file was rotated, as its name says, and when another one was last written to.
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

/// The files of a file sink.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct SinkFiles {
    /// Those that were rotated, by auditgate or by another program, in the order of their time.
    pub rotated: Vec<PathBuf>,
    /// The file at the path, which the daemon writes to; none while there is none.
    pub current: Option<PathBuf>,
}

/// Finds the files of the sink with that path. Where the path is a symbolic link, they are beside
/// the file that it leads to.
///
/// # Errors
/// When the directory cannot be read.
pub fn of_sink(path: &Path) -> io::Result<SinkFiles> {
    let path = match fs::canonicalize(path) {
        Ok(path) => path,
        Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_owned(),
        Err(error) => return Err(error),
    };
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(OsStr::to_str)) else {
        return Ok(SinkFiles::default());
    };
    let mut dated: Vec<Dated> = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let other = entry.file_name();
        if let Some(other) = other.to_str()
            && is_rotated_from(other, name)
            && entry.metadata()?.is_file()
        {
            dated.push(dated_file(other, &entry.metadata()?, entry.path()));
        }
    }
    dated.sort();
    let mut rotated: Vec<PathBuf> = dated.into_iter().map(|(.., path)| path).collect();
    // A file that was compressed is there twice for a moment, and after an interruption.
    let compressed: Vec<PathBuf> =
        rotated.iter().filter(|file| is_compressed(file)).map(|file| file.with_extension("")).collect();
    rotated.retain(|file| !compressed.contains(file));
    Ok(SinkFiles { rotated, current: path.is_file().then_some(path) })
}

/// Returns whether a file was rotated from the file called `name`: by us, or by another program
/// (`x.log.1`, `x.log-20260102.gz`).
fn is_rotated_from(other: &str, name: &str) -> bool {
    let Some(suffix) = other.strip_prefix(name) else { return false };
    if rotated_at(other).is_some_and(|(time, sequence)| {
        suffix.strip_prefix('.').is_some_and(|suffix| uncompressed(suffix) == format!("{time}-{sequence}"))
    }) {
        return true;
    }
    uncompressed(suffix).strip_prefix(['.', '-']).is_some_and(is_number)
}

fn is_compressed(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension == "zst" || extension == "gz")
}

fn uncompressed(name: &str) -> &str {
    name.strip_suffix(".zst").or_else(|| name.strip_suffix(".gz")).unwrap_or(name)
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-')
}

/// The time in the notation of rotated names, the sequence number, the path.
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
            Ok(metadata) if !metadata.is_file() => found.left_out.push((path, "not a regular file")),
            Ok(metadata) => match foreign(&path) {
                Err(error) => found.unreadable.push((path, error)),
                Ok(Some(why)) => found.left_out.push((path, why)),
                Ok(None) => {
                    let name = entry.file_name();
                    dated.push(dated_file(name.to_str().unwrap_or_default(), &metadata, path));
                }
            },
        }
    }
}

fn dated_file(name: &str, metadata: &fs::Metadata, path: PathBuf) -> Dated {
    match rotated_at(name) {
        Some((time, sequence)) => (time.to_owned(), sequence.to_owned(), path),
        // Behind every file that was rotated within the same second.
        None => (written_at(metadata), "~".to_owned(), path),
    }
}

/// Returns when a file was last written to, in the notation of rotated names.
fn written_at(metadata: &fs::Metadata) -> String {
    let shape = format_description!("[year][month][day]T[hour][minute][second]Z");
    let seconds = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    seconds
        .and_then(|since| i64::try_from(since.as_secs()).ok())
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .and_then(|time| time.format(&shape).ok())
        .unwrap_or_default()
}

/// Returns why a file in a directory is not one that lines or rows are written to. Neither a name
/// alone nor the first bytes alone are enough: both must say so, since otherwise changing one of
/// them would hide a file.
fn foreign(path: &Path) -> io::Result<Option<&'static str>> {
    /// Extensions, and the file's first bytes.
    const PACKED: [(&[&str], &[u8]); 5] = [
        (&["xz", "txz"], b"\xfd7zXZ\0"),
        (&["bz2", "tbz2", "tbz"], b"BZh"),
        (&["lz4"], b"\x04\x22\x4d\x18"),
        (&["zip", "jar"], b"PK\x03\x04"),
        (&["7z"], b"7z\xbc\xaf"),
    ];
    // The log, its index and the rollback journal (<https://www.sqlite.org/fileformat2.html>,
    // sections 4.1 and 3, and <https://www.sqlite.org/walformat.html>, section 2.1). The last byte
    // of the first is one of two.
    const PARTS: [(&str, &[u8]); 3] = [
        ("-wal", b"\x37\x7f\x06"),
        ("-shm", &3_007_000_u32.to_ne_bytes()),
        ("-journal", b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"),
    ];
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let start = beginning(path)?;
    if start.starts_with(stored::MAGIC) {
        // One that cannot be opened is taken, so that reading it reports why.
        let is_other = stored::database_kind(path).is_ok_and(|made| made == DatabaseKind::Other);
        return Ok(is_other.then_some("a database without a table `events`"));
    }
    if is_ours_by_name(&name) {
        return Ok(None);
    }
    let sibling = |end: &str| name.strip_suffix(end).map(|stem| path.with_file_name(stem));
    if let Some((database, magic)) = PARTS.iter().find_map(|(end, magic)| Some((sibling(end)?, *magic))) {
        if beginning(&database).is_ok_and(|start| start.starts_with(stored::MAGIC)) {
            return Ok(Some("part of a database"));
        }
        return Ok(start.starts_with(magic).then_some("part of a database that is missing"));
    }
    if let Some(whole) = [".zst.unfinished", ".gz.unfinished"].iter().find_map(|end| sibling(end)) {
        let why = "an interrupted compression; the file itself is still there";
        return Ok(whole.is_file().then_some(why));
    }
    // Files of the daemon in `data_dir`, and the tokens next to its configuration.
    match name.as_ref() {
        "lock" if start.is_empty() => return Ok(Some("a lock")),
        "reserve" | "reserve.probe" if is_zeros(path)? => return Ok(Some("spare space for a full disk")),
        _ => {}
    }
    let folder = path.parent().and_then(Path::file_name);
    if (folder == Some(OsStr::new("tokens")) || name == "token") && is_token(path, &start)? {
        return Ok(Some("a token"));
    }
    if folder == Some(OsStr::new("jwks")) && name.ends_with(".json.tmp") && is_cut_key_set(path)? {
        return Ok(Some("a key set that was not written to its end"));
    }
    let extension = path.extension().and_then(OsStr::to_str).unwrap_or_default();
    let is_packed =
        |(names, magic): &(&[&str], &[u8])| names.contains(&extension) && start.starts_with(magic);
    Ok(match extension {
        "pem" if is_text_with(&start, "-----BEGIN ") => Some("a key or a certificate"),
        "toml" if is_configuration(path) => Some("a configuration"),
        "lock" if start.is_empty() => Some("a lock"),
        "json" | "jwks" if keyring::read_file(path, MAX_KEPT_KEYS).is_ok() => Some("a key set"),
        _ if PACKED.iter().any(is_packed) => Some("compressed in a way that auditgate does not write"),
        _ => None,
    })
}

/// Returns whether a name is one that file sinks have in our examples, or a rotated one: by us, or
/// by another program (`x.log.1`, `x.log-20260102.gz`).
fn is_ours_by_name(name: &str) -> bool {
    if rotated_at(name).is_some() {
        return true;
    }
    let plain = uncompressed(name);
    let stem =
        match (plain.rsplit_once('.'), plain.split_once(".log-").or_else(|| plain.split_once(".jsonl-"))) {
            (Some((stem, number)), _) if is_number(number) => stem,
            (_, Some((_, date))) if is_number(date) => return true,
            _ => plain,
        };
    [".log", ".jsonl", ".db"].iter().any(|end| stem.ends_with(end))
}

/// Returns the first bytes of a file: as many as are needed to recognise it.
fn beginning(path: &Path) -> io::Result<Vec<u8>> {
    const MOST: u64 = 4096;
    let mut start = Vec::new();
    File::open(path)?.take(MOST).read_to_end(&mut start)?;
    Ok(start)
}

/// Maximum length of the daemon's spare space, in bytes; it keeps less.
const MOST_SPARE: u64 = 1 << 20;

/// Returns whether a file holds nothing but zeros, and is not empty.
fn is_zeros(path: &Path) -> io::Result<bool> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MOST_SPARE + 1).read_to_end(&mut bytes)?;
    Ok(bytes.len() as u64 <= MOST_SPARE && !bytes.is_empty() && bytes.iter().all(|byte| *byte == 0))
}

/// Returns whether a file is one short line that is not an event of any format.
fn is_token(path: &Path, start: &[u8]) -> io::Result<bool> {
    let is_whole = path.metadata()?.len() == start.len() as u64;
    let line = start.trim_ascii();
    Ok(is_whole && !line.is_empty() && !line.contains(&b'\n') && Line::parse(line).is_err())
}

/// Returns whether a file is a beginning, perhaps an empty one, of the JSON in which the daemon
/// caches keys: in lines of which none is an event.
fn is_cut_key_set(path: &Path) -> io::Result<bool> {
    let mut bytes = Vec::new();
    File::open(path)?.take(DOCUMENT_LIMIT_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    let is_json = bytes.is_empty() || bytes.starts_with(b"{\n");
    let has_event = || bytes.split(|byte| *byte == b'\n').any(|line| Line::parse(line).is_ok());
    Ok(bytes.len() <= DOCUMENT_LIMIT_BYTES && is_json && !has_event())
}

fn is_text_with(start: &[u8], words: &str) -> bool {
    start.starts_with(words.as_bytes())
        || memchr::memmem::find(start, format!("\n{words}").as_bytes()).is_some()
}

/// Returns whether a file is TOML, which no line of ours is.
fn is_configuration(path: &Path) -> bool {
    const LONGEST: u64 = 1 << 20;
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(LONGEST + 1).read_to_string(&mut text));
    read.is_ok() && text.len() as u64 <= LONGEST && text.parse::<toml::Table>().is_ok()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::trust::jwks::tests::document_of;

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
        write("jwks.json", document_of(&[1]).as_bytes(), 1);
        let other = rusqlite::Connection::open(dir.path().join("other.db")).unwrap();
        other.execute_batch("CREATE TABLE others (raw)").unwrap();
        write("key.pem", b"-----BEGIN PRIVATE KEY-----\n", 1);
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

    #[test]
    fn a_sinks_files_are_those_at_its_path_and_those_rotated_from_it() {
        let dir = tempfile::tempdir().unwrap();
        let moment = SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_323_045);
        for name in [
            "v.log",
            "v.log.20270102T030405Z-0001.zst",
            "v.log.20260102T030405Z-0002",
            "v.log.20260102T030405Z-0001",
            "v.log.20260102T030405Z-0001.gz",
            "v.log.20260102T030405Z-0003.zst.unfinished",
            "v.log.1",
            "v.log-20260101.gz",
            "v.log.bak",
            "v.log.1.bak",
            "v.log.a.20260102T030405Z-0001",
            "other.log",
            "v.lo",
        ] {
            let file = File::create(dir.path().join(name)).unwrap();
            file.set_modified(moment - Duration::from_secs(if name.ends_with(".1") { 60 } else { 120 }))
                .unwrap();
        }
        fs::create_dir(dir.path().join("v.log.2")).unwrap();
        let at = |name: &str| dir.path().canonicalize().unwrap().join(name);
        let rotated = [
            "v.log-20260101.gz",
            "v.log.1",
            "v.log.20260102T030405Z-0001.gz",
            "v.log.20260102T030405Z-0002",
            "v.log.20270102T030405Z-0001.zst",
        ];
        let wanted = SinkFiles { rotated: rotated.map(at).to_vec(), current: Some(at("v.log")) };
        assert_eq!(of_sink(&at("v.log")).unwrap(), wanted);
        std::os::unix::fs::symlink("v.log", dir.path().join("link")).unwrap();
        assert_eq!(of_sink(&dir.path().join("link")).unwrap(), wanted);
        fs::remove_file(at("v.log")).unwrap();
        assert_eq!(of_sink(&at("v.log")).unwrap(), SinkFiles { current: None, ..wanted });
        assert!(of_sink(&at("missing/v.log")).is_err());
    }

    #[test]
    fn a_file_is_skipped_only_if_both_its_name_and_its_first_bytes_say_so() {
        let dir = tempfile::tempdir().unwrap();
        let line = "2023-05-19T00:03:39Z konghq.com CEF:0|KongInc|Konnect";
        let key_set = document_of(&[1]);
        let sqlite = format!("SQLite format 3\0{}", "x".repeat(4096));
        for (name, text, wanted) in [
            ("forged.log", format!("BZh\n{line}"), true),
            ("forged.log.1", format!("PK\x03\x04\n{line}"), true),
            ("forged.jsonl-20260102.gz", format!("\x7fELF\n{line}"), true),
            ("v.log.20260102T030405Z-0001.zst", format!("BZh\n{line}"), true),
            ("forged.jsonl", key_set.clone(), true),
            ("forged.db", line.to_owned(), true),
            ("forged", format!("BZh\n{line}"), true),
            ("program", "\x7fELF".to_owned(), true),
            ("forged.20260102T030405Z-0001", format!("BZh\n{line}"), true),
            ("forged.bz2", line.to_owned(), true),
            ("forged.xz", format!("BZh\n{line}"), true),
            ("forged.pem", line.to_owned(), true),
            ("forged.toml", line.to_owned(), true),
            ("forged.lock", line.to_owned(), true),
            ("forged-wal", line.to_owned(), true),
            ("lone.zst.unfinished", line.to_owned(), true),
            ("damaged.db", sqlite.clone(), true),
            ("damaged.db-wal", "x".to_owned(), false),
            ("gone.db-wal", "\x37\x7f\x06".to_owned(), false),
            ("v.log.bz2", "BZh91AY".to_owned(), false),
            ("x.toml", "a = 1".to_owned(), false),
            ("x.lock", String::new(), false),
            ("lock", String::new(), false),
            ("lock", line.to_owned(), true),
            ("reserve", "\0".repeat(256 << 10), false),
            ("reserve", format!("{}{line}", "\0".repeat(4096)), true),
            ("tokens/us", "Bearer abc\n".to_owned(), false),
            ("tokens/us", format!("{line}|1.0|c|n|1|rt=1\n"), true),
            ("token", "Bearer abc\n".to_owned(), false),
            ("token", format!("{line}|1.0|c|n|1|rt=1\n"), true),
            ("jwks/us.json.tmp", "{\n  \"keys\": [\n    {".to_owned(), false),
            ("jwks/us.json.tmp", String::new(), false),
            ("jwks/us.json.tmp", format!("{{\n{line}|1.0|c|n|1|rt=1\n"), true),
            ("jwks/us.json.tmp", "{\"rt\":1}\n".to_owned(), true),
            ("us.json.tmp", "{\n".to_owned(), true),
            ("jwks.json", key_set, false),
            ("cert.pem", "subject=x\n-----BEGIN CERTIFICATE-----\n".to_owned(), false),
            ("v.log", line.to_owned(), true),
            ("v.log.zst.unfinished", "x".to_owned(), false),
        ] {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            assert_eq!(foreign(&path).unwrap().is_none(), wanted, "{name}");
        }
    }
}
