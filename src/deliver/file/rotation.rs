//! When a file is rotated, what the rotated ones are called, and what becomes of them.
//!
//! A rotated file is called like the file, with the moment and a sequence number behind it
//! (`verified.log.20260102T030405Z-0001`), and keeps that name: nothing is ever shifted. It may be compressed later,
//! which adds `.zst` or `.gz`; the oldest ones go.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use time::OffsetDateTime;
use time::macros::format_description;

/// When and how a file is rotated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rotation {
    /// Before it would become larger, in bytes. A single chunk may be larger than that, and after a crash the chunk
    /// that was interrupted is finished in the file where it was begun.
    pub size: Option<u64>,
    /// When a new hour or day begins, in UTC.
    pub every: Option<Period>,
    /// How many rotated files are kept; all when nothing is said.
    pub keep: Option<usize>,
    /// How rotated files are compressed.
    pub compress: Option<Compression>,
}

/// A stretch of the calendar, in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Period {
    /// From one full hour to the next.
    Hourly,
    /// From midnight to midnight.
    Daily,
}

/// How a rotated file is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// RFC 8878, `.zst`.
    Zstd,
    /// RFC 1952, `.gz`.
    Gzip,
}

impl Period {
    /// The number of the period that a moment (milliseconds since the Unix epoch) lies in.
    pub(super) fn of(self, moment: i64) -> i64 {
        moment.div_euclid(match self {
            Self::Hourly => 3_600_000,
            Self::Daily => 86_400_000,
        })
    }
}

impl Compression {
    fn extension(self) -> &'static str {
        match self {
            Self::Zstd => "zst",
            Self::Gzip => "gz",
        }
    }
}

/// A name for the file that is rotated now, which nothing has yet.
pub(super) fn rotated_name(path: &Path, now: i64) -> PathBuf {
    let shape = format_description!("[year][month][day]T[hour][minute][second]Z");
    let stamp = OffsetDateTime::from_unix_timestamp(now.div_euclid(1000))
        .ok()
        .and_then(|moment| moment.format(&shape).ok())
        .unwrap_or_else(|| now.to_string());
    let taken = rotated(path).unwrap_or_default();
    (1_u32..)
        .map(|sequence| with_suffix(path, &format!(".{stamp}-{sequence:04}")))
        .find(|name| !taken.iter().any(|taken| is_or_was(taken, name)) && !name.exists())
        .unwrap_or_else(|| with_suffix(path, &format!(".{stamp}")))
}

/// The rotated files of a path, oldest first, compressed or not.
pub(super) fn rotated(path: &Path) -> io::Result<Vec<PathBuf>> {
    let directory = directory(path);
    let mut prefix = path.file_name().unwrap_or(OsStr::new("")).to_owned();
    prefix.push(".");
    let prefix = prefix.as_encoded_bytes().to_vec();
    let mut found: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        let name_bytes = name.as_encoded_bytes();
        if name_bytes.strip_prefix(prefix.as_slice()).is_some_and(is_rotated_suffix) {
            found.push(directory.join(name));
        }
    }
    found.sort();
    Ok(found)
}

/// `20260102T030405Z-0001`, with or without a compression's extension.
fn is_rotated_suffix(suffix: &[u8]) -> bool {
    let shape = b"00000000T000000Z-0000";
    let (stem, extension) = suffix.split_at(suffix.len().min(shape.len()));
    stem.len() == shape.len()
        && stem.iter().zip(shape).all(|(byte, wanted)| match wanted {
            b'0' => byte.is_ascii_digit(),
            other => byte == other,
        })
        && matches!(extension, b"" | b".zst" | b".gz")
}

/// When a file with that name was rotated (`20260102T030405Z`, which sorts like the moments themselves) and the
/// sequence number behind it; none for a name that rotation does not give.
pub fn rotated_at(name: &str) -> Option<(&str, &str)> {
    let stem = name.strip_suffix(".zst").or_else(|| name.strip_suffix(".gz")).unwrap_or(name);
    let suffix = stem.rsplit_once('.')?.1;
    is_rotated_suffix(suffix.as_bytes()).then(|| suffix.split_once('-'))?
}

/// Compresses what is to be compressed, and removes the oldest files. `busy` is the inode that is still written
/// to. Safe to be cut off anywhere: a compressed file gets its name when it is whole and durable.
pub(super) fn tend(path: &Path, rotation: &Rotation, busy: u64) -> io::Result<()> {
    let mut files = rotated(path)?;
    if let Some(keep) = rotation.keep {
        let surplus = files.len().saturating_sub(keep);
        for old in files.drain(..surplus) {
            if fs::metadata(&old)?.ino() != busy {
                fs::remove_file(&old)?;
            }
        }
    }
    let Some(compression) = rotation.compress else { return Ok(()) };
    for file in files {
        let is_plain = file.extension().is_none_or(|extension| extension != "zst" && extension != "gz");
        if is_plain && fs::metadata(&file)?.ino() != busy {
            compress(&file, compression)?;
        }
    }
    Ok(())
}

fn compress(path: &Path, compression: Compression) -> io::Result<()> {
    let target = with_suffix(path, &format!(".{}", compression.extension()));
    let unfinished = with_suffix(path, &format!(".{}.unfinished", compression.extension()));
    let mut source = File::open(path)?;
    let mode = source.metadata()?.permissions().mode();
    let mut options = File::options();
    let out = options.write(true).create(true).truncate(true).mode(mode).open(&unfinished)?;
    let out = match compression {
        Compression::Zstd => {
            let mut encoder = zstd::Encoder::new(out, 0)?;
            io::copy(&mut source, &mut encoder)?;
            encoder.finish()?
        }
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(out, flate2::Compression::default());
            io::copy(&mut source, &mut encoder)?;
            encoder.finish()?
        }
    };
    let mut out = out;
    out.flush()?;
    out.sync_all()?;
    fs::rename(&unfinished, &target)?;
    sync_directory(path)?;
    fs::remove_file(path)
}

/// Makes the names in a file's directory durable.
pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(directory(path))?.sync_all()
}

/// The directory that a file is in.
pub(super) fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    PathBuf::from(name)
}

/// Whether a file has that name, or had it before it was compressed.
fn is_or_was(file: &Path, name: &Path) -> bool {
    file == name || file.with_extension("") == name
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(path: &Path) -> Vec<String> {
        let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
        rotated(path).unwrap().iter().map(name).collect()
    }

    #[test]
    fn names_go_on_and_never_shift() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.log");
        for moment in [1000, 1999, 1000, 5000] {
            let name = rotated_name(&path, moment);
            fs::write(&name, "x").unwrap();
        }
        for other in
            ["a.log", "a.log.1", "a.log.19700101T000001Z-0001.zst.unfinished", "ab.log.19700101T000001Z-0001"]
        {
            fs::write(dir.path().join(other), "x").unwrap();
        }
        let wanted = ["0001Z-0001", "0001Z-0002", "0001Z-0003", "0005Z-0001"];
        assert_eq!(names(&path), wanted.map(|end| format!("a.log.19700101T00{end}")));
        tend(&path, &Rotation { compress: Some(Compression::Zstd), ..Rotation::default() }, 0).unwrap();
        assert_eq!(rotated_name(&path, 1000).extension().unwrap(), "19700101T000001Z-0004");
    }

    #[test]
    fn a_name_tells_when_it_was_rotated() {
        let wanted = Some(("20260102T030405Z", "0017"));
        for name in
            ["a.log.20260102T030405Z-0017", "a.20260102T030405Z-0017.zst", "b.c.20260102T030405Z-0017.gz"]
        {
            assert_eq!(rotated_at(name), wanted, "{name}");
        }
        for name in ["a.log", "a.log.1.gz", "a.log.20260102T030405Z-0017.xz", "a.log.20260102T030405-0017"] {
            assert_eq!(rotated_at(name), None, "{name}");
        }
    }

    #[test]
    fn the_oldest_go_and_the_rest_is_compressed() {
        for (compression, magic) in
            [(Compression::Zstd, &[0x28, 0xb5][..]), (Compression::Gzip, &[0x1f, 0x8b])]
        {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.log");
            let files: Vec<_> = (0..5)
                .map(|n| {
                    let name = rotated_name(&path, n * 1000);
                    fs::write(&name, format!("file {n}\n")).unwrap();
                    name
                })
                .collect();
            let busy = fs::metadata(&files[4]).unwrap().ino();
            let rotation = Rotation { keep: Some(3), compress: Some(compression), ..Rotation::default() };
            tend(&path, &rotation, busy).unwrap();
            tend(&path, &rotation, busy).unwrap();
            let found = rotated(&path).unwrap();
            assert_eq!(found.len(), 3);
            assert!(fs::read(&found[0]).unwrap().starts_with(magic));
            assert_eq!(fs::read_to_string(&found[2]).unwrap(), "file 4\n", "still written to");
            tend(&path, &rotation, 0).unwrap();
            assert!(fs::read(&rotated(&path).unwrap()[2]).unwrap().starts_with(magic));
        }
    }
}
