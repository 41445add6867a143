//! An open file: what is safe in it, what may be behind that, and how the next write gets there.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{FallocateFlags, fallocate};

use super::mark::Mark;
use super::rotation;
use crate::log_throttle::log_throttled;

pub(super) struct Open {
    pub(super) file: File,
    /// Its path when it was opened. Rotation keeps a symbolic link and renames the file that it
    /// points to.
    pub(super) path: PathBuf,
    pub(super) device: u64,
    pub(super) inode: u64,
    /// Everything before this byte is safe.
    pub(super) safe: u64,
    /// Everything before this byte is written.
    pub(super) written: u64,
    /// Period of the first line in the file, where files have one; none for an empty file.
    pub(super) period: Option<i64>,
    /// Time of the first write that is not safe yet.
    pub(super) unsafe_since: Option<Instant>,
    /// The byte before `written` ends a line, or there is none.
    at_line_start: bool,
}

/// Bytes behind the end of what we have written.
pub(super) enum Tail {
    /// None.
    None,
    /// There are no lines yet to compare them with.
    Unknown,
    /// A beginning of our next write.
    Ours,
    /// Bytes of another process, behind `ours` bytes of whole lines of our next write.
    Foreign { ours: usize },
}

impl Open {
    /// Opens a file at its end.
    pub(super) fn at_end(file: File, path: PathBuf) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let mut open = Self {
            file,
            path,
            device: metadata.dev(),
            inode: metadata.ino(),
            safe: 0,
            written: 0,
            period: None,
            unsafe_since: None,
            at_line_start: true,
        };
        open.go_to(metadata.len())?;
        Ok(open)
    }

    pub(super) fn mark(&self) -> io::Result<Vec<u8>> {
        Ok(Mark::of(&self.file, self.inode, self.safe)?.write())
    }

    pub(super) fn length(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Continues at an earlier byte: what is behind it will be compared.
    pub(super) fn go_back(&mut self, safe: u64) -> io::Result<()> {
        let length = self.length()?;
        if length < safe {
            warn_truncated(&self.path, safe - length);
        }
        self.go_to(safe.min(length))
    }

    /// Continues at the end, and syncs what other processes have written.
    pub(super) fn go_to_end(&mut self) -> io::Result<()> {
        self.file.sync_data()?;
        self.go_to(self.length()?)
    }

    fn go_to(&mut self, at: u64) -> io::Result<()> {
        let mut last = *b"\n";
        if let Some(before) = at.checked_sub(1) {
            self.file.read_exact_at(&mut last, before)?;
        }
        if at == 0 {
            // The period of an empty file is that of its first line.
            self.period = None;
        }
        self.at_line_start = last == *b"\n";
        (self.safe, self.written) = (at, at);
        Ok(())
    }

    /// Returns what will be written for these lines. Whether it begins with a line end depends on
    /// the byte before, so that it is the same after a crash.
    fn with_line_end<'b>(&self, lines: &'b [u8]) -> Cow<'b, [u8]> {
        if self.at_line_start { Cow::Borrowed(lines) } else { Cow::Owned([b"\n", lines].concat()) }
    }

    /// Returns how many bytes behind `written` are those that would be written there, and whether
    /// what differs is only what a power loss left empty: pages that never reached the disk read as
    /// zeros.
    fn compare(&self, bytes: &[u8], length: u64) -> io::Result<(usize, bool)> {
        let there = usize::try_from(length.saturating_sub(self.written)).unwrap_or(usize::MAX);
        let mut found = vec![0; bytes.len().min(there)];
        self.file.read_exact_at(&mut found, self.written)?;
        let same = found.iter().zip(bytes).take_while(|(found, byte)| found == byte).count();
        let fits = found.iter().zip(bytes).skip(same).all(|(found, byte)| found == byte || *found == 0);
        Ok((same, fits))
    }

    /// Classifies the bytes behind what is written. In a renamed file zeros alone prove nothing.
    pub(super) fn tail(&self, coming: &[u8], is_renamed: bool) -> io::Result<Tail> {
        let length = self.length()?;
        if length <= self.written {
            return Ok(Tail::None);
        }
        if coming.is_empty() {
            return Ok(Tail::Unknown);
        }
        let bytes = self.with_line_end(coming);
        let (same, fits) = self.compare(&bytes, length)?;
        if fits && (same > 0 || !is_renamed) {
            return Ok(Tail::Ours);
        }
        let whole = bytes[..same].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        Ok(Tail::Foreign { ours: whole.saturating_sub(bytes.len() - coming.len()) })
    }

    /// Appends lines. Where the beginning of them is there already, because a write was
    /// interrupted, it is written again: after a sync that failed, what can be read back proves
    /// nothing about the disk.
    pub(super) fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        let bytes = self.with_line_end(lines);
        let length = self.length()?;
        if length < self.written || !self.compare(&bytes, length)?.1 {
            // The next attempt decides again, and its decision is durable before it writes.
            return Err(io::Error::other("another process changed the file just now"));
        }
        self.write(&bytes)?;
        self.written += bytes.len() as u64;
        self.at_line_start = true;
        self.unsafe_since.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// Writes behind what is written. Space is reserved before, where the file system supports it,
    /// so that a full disk leaves no partial line behind.
    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let reserved = fallocate(&self.file, FallocateFlags::KEEP_SIZE, self.written, bytes.len() as u64);
        // Not every file system supports it, and the write will report any other error.
        if let Err(rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT) = reserved {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.file.write_all_at(bytes, self.written)
    }

    /// Writes the beginning of what is behind `written` again, line end included.
    pub(super) fn rewrite(&mut self, lines: &[u8]) -> io::Result<()> {
        self.file.write_all_at(&self.with_line_end(lines), self.written)?;
        self.unsafe_since.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// Truncates the unfinished write of a renamed file; its lines are written to the file at the
    /// path.
    pub(super) fn cut_back(&mut self) -> io::Result<()> {
        let bytes = self.length()?.saturating_sub(self.written);
        match self.file.set_len(self.written) {
            Ok(()) => {
                self.unsafe_since.get_or_insert_with(Instant::now);
            }
            Err(error) => {
                let file = self.path.display();
                tracing::warn!(
                    code = "file-unfinished-bytes",
                    %file,
                    bytes,
                    "a write to {file} was interrupted before it was renamed, and the {bytes} unfinished bytes at \
                     its end cannot be removed: {error}; their lines are in the file at the path"
                );
            }
        }
        Ok(())
    }

    /// Truncates zeros at the end. Our writes end with a line end, so such zeros are pages that a
    /// power loss left empty.
    pub(super) fn cut_trailing_zeros(&self) -> io::Result<()> {
        const STEP: u64 = 64 * 1024;
        let length = self.length()?;
        let mut end = length;
        while end > self.written {
            let start = end.saturating_sub(STEP).max(self.written);
            let mut piece = vec![0; usize::try_from(end - start).map_err(io::Error::other)?];
            self.file.read_exact_at(&mut piece, start)?;
            match piece.iter().rposition(|byte| *byte != 0) {
                Some(last) => {
                    end = start + last as u64 + 1;
                    break;
                }
                None => end = start,
            }
        }
        if end < length { self.file.set_len(end) } else { Ok(()) }
    }
}

pub(super) fn warn_truncated(path: &Path, missing_bytes: u64) {
    let path = path.display();
    log_throttled!(
        warn,
        &path.to_string(),
        code = "file-truncated",
        %path,
        missing_bytes,
        "{path} was truncated by another process; {missing_bytes} delivered bytes are lost"
    );
}

/// Finds the file of a mark under another name, if there are bytes behind its safe byte. Checks
/// before it opens for writing, and finds a file that cannot be written all the same.
///
/// # Errors
/// When the directory cannot be read.
pub(super) fn renamed(place: &Path, known: &Mark) -> io::Result<Option<Open>> {
    for path in renamed_to(place, known.inode)? {
        let found = File::open(&path).and_then(|file| {
            let length = file.metadata()?.len();
            let is_it = length > known.safe && known.fits(&file, length)? != Some(false);
            Ok(is_it.then_some(file))
        });
        let file = match found {
            Ok(Some(file)) => file,
            Ok(None) => continue,
            Err(error) => {
                let file = path.display();
                tracing::warn!(
                    code = "file-renamed-unreadable",
                    %file,
                    "cannot read {file}, which was renamed: {error}; a write to it may be unfinished, and writing \
                     continues in the file at the path"
                );
                continue;
            }
        };
        let file = File::options().read(true).write(true).open(&path).unwrap_or(file);
        let mut open = Open::at_end(file, path)?;
        open.go_back(known.safe)?;
        return Ok(Some(open));
    }
    Ok(None)
}

/// Returns the files with an inode's number whose name may come from a rotation by another program:
/// with a suffix (`a.log.1`, `a.log-20260102`), or with something before the extension
/// (`a-20260102.log`).
fn renamed_to(path: &Path, inode: u64) -> io::Result<Vec<PathBuf>> {
    let bytes = |part: Option<&OsStr>| part.unwrap_or_default().as_encoded_bytes().to_vec();
    let (name, stem) = (bytes(path.file_name()), bytes(path.file_stem()));
    let extension = &name[stem.len()..];
    let is_behind = |rest: &[u8]| rest.first().is_some_and(u8::is_ascii_punctuation);
    let can_be = |other: &[u8]| {
        other.strip_prefix(name.as_slice()).is_some_and(is_behind)
            || (!extension.is_empty()
                && other != name
                && other.ends_with(extension)
                && other.strip_prefix(stem.as_slice()).is_some_and(is_behind))
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(rotation::directory(path))? {
        let entry = entry?;
        if can_be(entry.file_name().as_encoded_bytes())
            && entry.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.ino() == inode)
        {
            found.push(entry.path());
        }
    }
    Ok(found)
}
