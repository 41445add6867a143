//! When a file is rotated, how rotated files are named, and when they are compressed and removed.
//!
//! A rotated file has the name of the file with the time and a sequence number as a suffix
//! (`verified.log.20260102T030405Z-0001`), and keeps that name: names never shift. It may be
//! compressed later, which adds `.zst` or `.gz`; the oldest files are removed. Their age is decided
//! by their names alone, so no new name ever sorts before one that is there, whatever the clock
//! says.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use time::{OffsetDateTime, PrimitiveDateTime};

use crate::quantity::{count, size};

/// Rule by which a file is rotated.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, expecting = "a table such as { size = \"256MiB\", keep = 14 }")]
pub struct Rotation {
    /// Maximum size in bytes. A single chunk may be larger, and after a crash the chunk that was
    /// interrupted is finished in the file where it was begun.
    #[serde(with = "size")]
    pub size: Option<u64>,
    /// Rotation at the beginning of each hour or day, in UTC.
    pub every: Option<Period>,
    /// Number of rotated files to keep; none keeps all.
    #[serde(with = "count")]
    pub keep: Option<usize>,
    /// Compression of rotated files.
    pub compress: Option<Compression>,
}

impl Rotation {
    /// Returns the default of a file of quarantined lines: 16 rotated files of 64 MiB.
    pub fn of_quarantine() -> Self {
        Self { size: Some(64 << 20), keep: Some(16), ..Self::default() }
    }
}

/// Calendar period, in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Period {
    /// One full hour.
    Hourly,
    /// One day, from midnight to midnight.
    Daily,
}

/// Compression of rotated files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// RFC 8878, `.zst`.
    Zstd,
    /// RFC 1952, `.gz`.
    Gzip,
}

impl Period {
    /// Returns the number of the period that a time (milliseconds since the Unix epoch) is in.
    pub(super) fn of(self, time: i64) -> i64 {
        time.div_euclid(match self {
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

/// Format of the time in a rotated file's name, in UTC.
const STAMP: &[BorrowedFormatItem<'_>] = format_description!("[year][month][day]T[hour][minute][second]Z");

/// The last time that [`STAMP`] can hold, in seconds since the Unix epoch: the end of the year
/// 9999.
const LAST_SECOND: i64 = 253_402_300_799;

/// Returns an unused name for the file that is rotated now, which sorts behind all existing ones:
/// where the clock is behind the newest of them, the name has that one's time and the next sequence
/// number.
///
/// # Errors
/// When the directory cannot be read, or when no such name is left, because the last one is in use.
pub(super) fn rotated_name(path: &Path, now: i64) -> io::Result<PathBuf> {
    const MOST: u32 = 9999;
    let newest = rotated(path)?.pop().as_deref().and_then(time_and_sequence);
    let now = now.div_euclid(1000).min(LAST_SECOND);
    let (mut second, mut sequence) = match newest {
        Some((second, sequence)) if second >= now => (second, sequence + 1),
        _ => (now, 1),
    };
    loop {
        if sequence > MOST {
            (second, sequence) = (second + 1, 1);
        }
        let stamp = OffsetDateTime::from_unix_timestamp(second).map_err(io::Error::other)?;
        let stamp = stamp.format(STAMP).map_err(io::Error::other)?;
        let name = with_suffix(path, &format!(".{stamp}-{sequence:04}"));
        // A directory of that name is not among the rotated files.
        match fs::symlink_metadata(&name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(name),
            Err(error) => return Err(error),
            Ok(_) => sequence += 1,
        }
    }
}

/// Returns the time, in seconds since the Unix epoch, and the sequence number in a rotated file's
/// name; none where the time is not a valid date.
fn time_and_sequence(file: &Path) -> Option<(i64, u32)> {
    let (stamp, sequence) = rotated_at(file.file_name()?.to_str()?)?;
    let time = PrimitiveDateTime::parse(stamp, STAMP).ok()?;
    Some((time.assume_utc().unix_timestamp(), sequence.parse().ok()?))
}

/// Returns the rotated files of a path, oldest first, compressed or not. Directories are ignored,
/// whatever their names.
pub(super) fn rotated(path: &Path) -> io::Result<Vec<PathBuf>> {
    named(path, is_rotated_suffix)
}

/// Returns the files that are named like a path with a suffix, in the order of their names.
fn named(path: &Path, is_suffix: impl Fn(&[u8]) -> bool) -> io::Result<Vec<PathBuf>> {
    let directory = directory(path);
    let mut prefix = path.file_name().unwrap_or(OsStr::new("")).to_owned();
    prefix.push(".");
    let mut found: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let is_named =
            name.as_encoded_bytes().strip_prefix(prefix.as_encoded_bytes()).is_some_and(&is_suffix);
        if is_named && !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.push(directory.join(name));
        }
    }
    found.sort();
    Ok(found)
}

/// Returns whether a suffix is `20260102T030405Z-0001`, with or without a compression's extension.
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

/// Returns when a file with that name was rotated (`20260102T030405Z`, which sorts like the times
/// themselves) and the sequence number behind it; none for a name that rotation does not give.
pub fn rotated_at(name: &str) -> Option<(&str, &str)> {
    let stem = name.strip_suffix(".zst").or_else(|| name.strip_suffix(".gz")).unwrap_or(name);
    let suffix = stem.rsplit_once('.')?.1;
    is_rotated_suffix(suffix.as_bytes()).then(|| suffix.split_once('-'))?
}

/// Compresses and removes the rotated files of one sink on a thread of its own, one run at a time.
#[derive(Default)]
pub(super) struct RotationTask {
    is_running: AtomicBool,
    warned: Mutex<Option<Instant>>,
}

/// Minimum time between two messages that rotated files cannot be compressed or removed.
const WARNING_INTERVAL: Duration = Duration::from_secs(3600);

impl RotationTask {
    /// Starts a run on the rotated files of a path; false when the previous run is still in
    /// progress. Failures are logged, and retried by the next run.
    pub(super) fn start(self: &Arc<Self>, path: PathBuf, rotation: Rotation, busy: u64) -> bool {
        if self.is_running.swap(true, Ordering::AcqRel) {
            return false;
        }
        let task = Arc::clone(self);
        let spawned = std::thread::Builder::new().name("rotated files".to_owned()).spawn(move || {
            match maintain(&path, &rotation, busy) {
                Ok(failures) => task.warn(&path, &failures),
                Err(error) => task.warn(&path, &[(path.clone(), error)]),
            }
            task.is_running.store(false, Ordering::Release);
        });
        if let Err(error) = spawned {
            self.is_running.store(false, Ordering::Release);
            tracing::warn!(
                code = "rotation-thread-failed",
                "cannot start a thread for rotated files: {error}; retrying after the next rotation"
            );
        }
        true
    }

    fn warn(&self, path: &Path, failures: &[(PathBuf, io::Error)]) {
        let Some((file, error)) = failures.first() else { return };
        let mut warned = self.warned.lock();
        if warned.is_none_or(|warned| warned.elapsed() >= WARNING_INTERVAL) {
            *warned = Some(Instant::now());
            let (path, file, files) = (path.display(), file.display(), failures.len());
            tracing::warn!(
                code = "rotated-files-failed",
                %path,
                %file,
                files,
                "cannot compress or remove {files} rotated files of {path}, first {file}: {error}; retrying after \
                 the next rotation, logged at most once an hour"
            );
        }
    }
}

/// Compresses files, and removes the oldest ones. `busy` is the inode that is still written to.
/// Safe to be interrupted anywhere: a compressed file gets its name when it is whole and durable,
/// and the next run finishes what is left. A file that fails stops no other; returns those that
/// failed.
fn maintain(path: &Path, rotation: &Rotation, busy: u64) -> io::Result<Vec<(PathBuf, io::Error)>> {
    let mut failures = Vec::new();
    let mut note = |file: PathBuf, outcome: io::Result<()>| match outcome {
        // Another process removed or compressed it.
        Err(error) if error.kind() != io::ErrorKind::NotFound => failures.push((file, error)),
        _ => {}
    };
    let remove = |file: &Path| match fs::symlink_metadata(file)? {
        metadata if metadata.ino() == busy => Ok(()),
        _ => fs::remove_file(file),
    };
    // Left by an interrupted run: an incomplete compressed file, or a plain file whose compressed
    // one is complete.
    let unfinished = |suffix: &[u8]| suffix.strip_suffix(b".unfinished").is_some_and(is_rotated_suffix);
    for file in named(path, unfinished)? {
        let removed = remove(&file);
        note(file, removed);
    }
    for file in rotated(path)?.iter().filter(|file| is_compressed(file)) {
        let plain = file.with_extension("");
        let removed = remove(&plain);
        note(plain, removed);
    }
    let mut files = rotated(path)?;
    let surplus = rotation.keep.map_or(0, |keep| files.len().saturating_sub(keep));
    let kept = files.split_off(surplus);
    for old in files {
        let removed = remove(&old);
        note(old, removed);
    }
    if let Some(compression) = rotation.compress {
        for file in kept.into_iter().filter(|file| !is_compressed(file)) {
            let compressed = match fs::metadata(&file) {
                // Anything else, such as a pipe, might never be read to its end.
                Ok(metadata) if metadata.is_file() && metadata.ino() != busy => compress(&file, compression),
                Ok(_) => Ok(()),
                Err(error) => Err(error),
            };
            note(file, compressed);
        }
    }
    sync_directory(path)?;
    Ok(failures)
}

fn is_compressed(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension == "zst" || extension == "gz")
}

/// Compresses a file. The compressed file gets the mode and the owner of the plain one before
/// anything is written to it.
fn compress(path: &Path, compression: Compression) -> io::Result<()> {
    let target = with_suffix(path, &format!(".{}", compression.extension()));
    let unfinished = with_suffix(path, &format!(".{}.unfinished", compression.extension()));
    let mut source = File::open(path)?;
    let wanted = source.metadata()?;
    let out = File::options().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
    let found = out.metadata()?;
    // Only what differs is set, since it may not be permitted.
    let owner = (found.uid() != wanted.uid()).then_some(wanted.uid());
    let group = (found.gid() != wanted.gid()).then_some(wanted.gid());
    if let Err(error) = set_access(&out, wanted.permissions().mode() & 0o7777, (owner, group)) {
        // The plain file stays as it is.
        fs::remove_file(&unfinished)?;
        return Err(error);
    }
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

/// Sets a file's owner, where one is wanted, and then its permission bits.
pub(super) fn set_access(file: &File, mode: u32, owner: (Option<u32>, Option<u32>)) -> io::Result<()> {
    if owner != (None, None) {
        std::os::unix::fs::fchown(file, owner.0, owner.1).map_err(|error| {
            let why = format!(
                "its owner cannot be set ({error}); only root can give files away, and others only to groups of \
                 their own"
            );
            io::Error::new(error.kind(), why)
        })?;
    }
    file.set_permissions(fs::Permissions::from_mode(mode))
}

/// Makes the names in a file's directory durable.
pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(directory(path))?.sync_all()
}

/// Returns the file that a path leads to through symbolic links, even if it does not exist yet.
///
/// # Errors
/// When the links cannot be read, form a loop, or lead to something other than a regular file.
pub(super) fn linked(path: &Path) -> io::Result<PathBuf> {
    if fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        // For example a pipe, in which nothing can be compared or found again.
        return Err(io::Error::other("not a regular file"));
    }
    let mut path = path.to_owned();
    // The number that Linux follows (path_resolution(7)).
    for _ in 0..40 {
        match fs::read_link(&path) {
            Ok(target) => path = directory(&path).join(target),
            // Not a link, or nothing at the path.
            Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::NotFound) => {
                return Ok(path);
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("too many symbolic links lead to one another"))
}

/// Returns the directory that a file is in.
pub(super) fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    PathBuf::from(name)
}

#[cfg(test)]
mod tests;
