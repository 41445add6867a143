//! The file sink: whole lines, exactly once across kills, restarts, failed writes and rotation.
//!
//! The mark says up to which byte of which file everything is safe. What we left behind that byte is the
//! beginning of what will be pushed next (rendering is deterministic), cut off anywhere: so it is compared
//! with what is pushed, and only the rest is written, a torn line finished. Recovery after a crash and the
//! retry after a failed write are the same code.
//!
//! Lines move to another place, because of our own [`rotation`] or because of what others did, only when all that
//! was written is safe, and only after the mark of the new place is durable: so at most one file at a time has
//! anything of ours behind its safe byte.
//!
//! # Which file it is
//!
//! An inode's number is given to another file as soon as its own is removed, and a device's number changes when the
//! machine starts. So the mark holds a digest of the last bytes before the safe one. The file at the path is the
//! file of the mark when these bytes are in it, whatever its inode; another file only when its name can be one that
//! the file was given when it was rotated, its inode is the same and these bytes are in it. Nothing is written
//! to a file before that is known, and nothing behind its safe byte is written over, or cut off as empty pages
//! of a power loss, before it was compared with what is pushed.
//!
//! # What others do to the file
//!
//! [`Sink::prepare`] finds out before each attempt at a flush; whatever it decides is durable before anything is
//! written, so that a kill in between loses and doubles nothing. With nothing of ours unfinished:
//! - renamed, removed or replaced: on to the file at the path;
//! - cut, or with somebody else's bytes at its end: on at the end that it has now.
//!
//! With a write of ours unfinished, because it failed or a crash interrupted it:
//! - at the path: it is finished there;
//! - renamed: it is finished there. If that fails, what is unfinished is cut off there, and all of it goes to
//!   the file at the path. A kill after the cut finds nothing unfinished in the renamed file, and does the same;
//! - without a name: nobody will find it there, so everything since the last safe position is pushed again, into
//!   the file at the path;
//! - with somebody else's bytes in it: they are kept. Our lines before them that are whole count, and the mark
//!   says how many bytes of what will be pushed they are; the one that was interrupted is written again, behind
//!   them or, where the file was renamed, in the file at the path.
//!
//! Where we go on at an end that is no line's end, the next write begins with `\n`. Whether it does can be seen from
//! the byte before, so that it is the same after a crash.

mod rotation;

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, fallocate};

use rotation::Tending;
pub use rotation::{Compression, Period, Rotation, rotated_at};

use super::sink::{Item, Sink, SinkError};
use crate::ledger::{Position, Resume};
use crate::log_throttle::log_seldom;

/// How lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rendering {
    /// Each line as it came.
    Raw,
    /// One record a line.
    Json,
}

/// When what was written is synced to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syncing {
    /// With each flush.
    EachFlush,
    /// At most that long after it was written. A position moves only after the sync.
    Every(Duration),
}

/// Where a file is and how it is kept.
#[derive(Clone)]
pub struct Options {
    /// The file, or a symbolic link to it, which is followed; its directory must exist.
    pub path: PathBuf,
    /// How lines are written.
    pub rendering: Rendering,
    /// When it is rotated.
    pub rotation: Rotation,
    /// When it is synced.
    pub syncing: Syncing,
    /// The permission bits of files that we make, whatever the umask says.
    pub mode: u32,
    /// The user and the group of files that we make. Nothing is written to one that they cannot be set of.
    pub owner: (Option<u32>, Option<u32>),
    /// The wall clock, in milliseconds since the Unix epoch.
    pub now: Arc<dyn Fn() -> i64 + Send + Sync>,
}

/// A file that lines are appended to.
pub struct FileSink {
    options: Options,
    open: Option<Open>,
    collected: Vec<u8>,
    /// So many of the next bytes are in a file already: lines of ours in front of somebody else's.
    skip: usize,
    /// Everything before it is written.
    flushed: Position,
    /// A sync failed: what can be read back proves nothing about the disk.
    distrusted: bool,
    /// Rotated files are waiting to be tended.
    untended: bool,
    tending: Arc<Tending>,
}

struct Open {
    file: File,
    /// Where it was when it was opened, which is where the configured path led to: rotation leaves a symbolic
    /// link alone and works where it points to.
    path: PathBuf,
    device: u64,
    inode: u64,
    /// Everything before this byte is safe.
    safe: u64,
    /// Everything before this byte is written.
    written: u64,
    /// The period of the first line in the file, where files have one; an empty file belongs to none.
    period: Option<i64>,
    /// When something was written that is not safe yet.
    unsafe_since: Option<Instant>,
    /// What stands behind `written` may be the beginning of our next write.
    unfinished: bool,
    /// To finish it was tried after the file had left the path.
    tried_elsewhere: bool,
    /// The byte before `written` ends a line, or there is none.
    at_line_start: bool,
}

impl FileSink {
    /// A sink at a path. Opens nothing yet.
    pub fn new(options: Options) -> Self {
        Self {
            options,
            open: None,
            collected: Vec::new(),
            skip: 0,
            flushed: Position::default(),
            distrusted: false,
            untended: true,
            tending: Arc::default(),
        }
    }

    fn error(&self, what: &str) -> impl Fn(io::Error) -> SinkError + use<> {
        let what = format!("cannot {what} {}", self.options.path.display());
        move |cause| SinkError::new(what.clone(), cause)
    }

    /// The file at the path, made when it is missing; lines go to its end.
    fn at_path(&self) -> io::Result<(Open, bool)> {
        let path = rotation::linked(&self.options.path)?;
        let (file, is_new) = open(&path, &self.options)?;
        lock(&file)?;
        let mut open = Open::at_end(file, path)?;
        let metadata = open.file.metadata()?;
        if metadata.len() > 0 {
            open.period = self.options.rotation.every.map(|every| every.of(metadata.mtime() * 1000));
            // The mark will call it safe.
            open.file.sync_data()?;
        }
        Ok((open, is_new))
    }

    /// The file of a mark under another name, where something stands behind the safe byte.
    fn moved(&self, place: &Path, known: &Mark) -> io::Result<Option<Open>> {
        for path in moved_to(place, known.inode)? {
            let file = File::options().read(true).write(true).open(&path)?;
            let length = file.metadata()?.len();
            if length <= known.safe || known.fits(&file, length)? == Some(false) {
                continue;
            }
            lock(&file)?;
            let mut open = Open::at_end(file, place.to_owned())?;
            open.go_back(&path, known.safe)?;
            return Ok(Some(open));
        }
        Ok(None)
    }

    /// Whether the next lines should go to another file: because this one is full or of another time, or because
    /// it is no longer at the path.
    fn must_leave(&self, open: &Open, coming: u64) -> io::Result<Option<Leave>> {
        let length = match fs::metadata(&self.options.path) {
            Ok(found) if (found.dev(), found.ino()) == (open.device, open.inode) => found.len(),
            Ok(_) => return Ok(Some(Leave::Moved)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some(Leave::Moved)),
            Err(error) => return Err(error),
        };
        let rotation = &self.options.rotation;
        let is_full = rotation.size.is_some_and(|size| open.written + coming > size);
        let now = rotation.every.map(|every| every.of((self.options.now)()));
        let is_over = open.period.is_some() && open.period != now;
        // Somebody else may have cut it.
        Ok((open.written > 0 && length >= open.written && (is_full || is_over)).then_some(Leave::Rotate))
    }

    /// What stands behind the end of what we have written, as far as that can be told from what is coming.
    fn unfinished(&self, open: &Open, coming: &[u8], leave: Option<Leave>) -> io::Result<Unfinished> {
        let metadata = open.file.metadata()?;
        if !open.unfinished || metadata.len() <= open.written {
            return Ok(Unfinished::Nothing);
        }
        if metadata.nlink() == 0 {
            return Ok(Unfinished::Nameless);
        }
        if coming.is_empty() {
            return Ok(Unfinished::Unknown);
        }
        let bytes = open.with_line_end(coming);
        let compared = open.compare(&bytes, metadata.len())?;
        // Zeros alone prove nothing about a file that has another name; and what could not be finished there is cut
        // off, which must be no more than was compared.
        let is_proven = leave != Some(Leave::Moved)
            || (compared.same > 0
                && !(open.tried_elsewhere && metadata.len() > open.written + bytes.len() as u64));
        if compared.fits && is_proven {
            return Ok(Unfinished::Ours);
        }
        let whole = bytes[..compared.same].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let lines = whole.saturating_sub(bytes.len() - coming.len());
        Ok(Unfinished::Theirs { ours: bytes[..whole].to_vec(), lines })
    }

    fn length(&self) -> io::Result<u64> {
        self.open.as_ref().map_or(Ok(0), |open| Ok(open.file.metadata()?.len()))
    }

    /// Makes safe what is written.
    fn sync(&mut self) -> Result<(), SinkError> {
        let syncing = self.error("sync");
        let Some(open) = self.open.as_mut().filter(|open| open.unsafe_since.is_some()) else {
            return Ok(());
        };
        if let Err(cause) = open.file.sync_data() {
            // The kernel may have dropped the pages, and will not say so twice.
            self.distrusted = true;
            return Err(SinkError { start_over: true, ..syncing(cause) });
        }
        open.safe = open.written;
        open.unsafe_since = None;
        self.distrusted = false;
        Ok(())
    }

    /// Compresses and removes rotated files, on a thread of its own; a failure is tried again after the next
    /// rotation.
    fn tend(&mut self) {
        let rotation = &self.options.rotation;
        if !self.untended || (rotation.keep.is_none() && rotation.compress.is_none()) {
            return;
        }
        let busy = self.open.as_ref().map_or(0, |open| open.inode);
        let path = self.open.as_ref().map_or(&self.options.path, |open| &open.path);
        self.untended = !self.tending.start(path.clone(), rotation.clone(), busy);
    }
}

/// Why the next lines go to another file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leave {
    /// By our own rule.
    Rotate,
    /// Somebody renamed, removed or replaced the file.
    Moved,
}

/// What stands behind the end of what we have written.
enum Unfinished {
    /// Nothing of ours.
    Nothing,
    /// Nothing is coming that it could be compared with.
    Unknown,
    /// A write of ours, in a file that has no name any more.
    Nameless,
    /// The beginning of our next write.
    Ours,
    /// Somebody else's bytes, behind the beginning of our next write.
    Theirs {
        /// What there is of that beginning, up to the end of its last whole line.
        ours: Vec<u8>,
        /// How many bytes of what is coming that is.
        lines: usize,
    },
}

/// How far a file and a write agree.
struct Compared {
    /// How many bytes are the same.
    same: usize,
    /// Whether what differs is only what a power loss left empty.
    fits: bool,
}

impl Sink for FileSink {
    fn resume(&mut self, last: &Resume) -> Result<Resume, SinkError> {
        self.collected.clear();
        self.skip = 0;
        self.open = None;
        let opening = self.error("open");
        let (mut open, is_new) = self.at_path().map_err(&opening)?;
        if let Some(known) = Mark::read(&last.mark) {
            let length = open.written;
            // Where there is no proof, and where the file was cut, the inode's number has to do.
            let is_known = match known.fits(&open.file, length).map_err(&opening)? {
                Some(fits) => fits,
                None => !is_new && known.inode == open.inode,
            };
            if is_known {
                open.go_back(&self.options.path, known.safe).map_err(&opening)?;
            } else if let Some(moved) = self.moved(&open.path, &known).map_err(&opening)? {
                // The last write to it was cut off; it is finished there first.
                open = moved;
            } else if !is_new {
                log_seldom!(
                    warn,
                    &self.options.path.to_string_lossy(),
                    path = %self.options.path.display(),
                    "another file is at the path than before; going on at its end"
                );
            }
            self.skip = known.skip;
        }
        let mark = open.mark(self.skip).map_err(&opening)?;
        self.open = Some(open);
        self.flushed = last.position;
        Ok(Resume { position: last.position, mark })
    }

    fn prepare(&mut self) -> Result<Option<Resume>, SinkError> {
        let (looking, rotating, opening) = (self.error("look at"), self.error("rotate"), self.error("open"));
        let (writing, cutting) = (self.error("write"), self.error("cut what is unfinished off"));
        let going_on = self.error("go on with");
        let coming = &self.collected[self.skip.min(self.collected.len())..];
        let Some(open) = &self.open else { return Ok(None) };
        let leave = self.must_leave(open, coming.len() as u64).map_err(&looking)?;
        let unfinished = self.unfinished(open, coming, leave).map_err(&looking)?;
        let Some(open) = &mut self.open else { return Ok(None) };
        let place = open.path.clone();
        match unfinished {
            Unfinished::Nothing => {}
            Unfinished::Unknown => return Ok(None),
            Unfinished::Nameless => {
                let gone = io::Error::other("the file was removed in the middle of a write");
                return Err(SinkError { start_over: true, ..going_on(gone) });
            }
            Unfinished::Ours => {
                cut_trailing_zeros(&open.file, open.written).map_err(&looking)?;
                if leave != Some(Leave::Moved) || !open.tried_elsewhere {
                    open.tried_elsewhere = leave == Some(Leave::Moved);
                    return Ok(None);
                }
                open.file.set_len(open.written).map_err(cutting)?;
                open.unsafe_since.get_or_insert_with(Instant::now);
            }
            Unfinished::Theirs { ours, lines } => {
                if self.distrusted {
                    open.file.write_all_at(&ours, open.written).map_err(writing)?;
                    open.unsafe_since.get_or_insert_with(Instant::now);
                }
                self.skip += lines;
            }
        }
        let length = self.length().map_err(&looking)?;
        let written = self.open.as_ref().map_or(length, |open| open.written);
        let path = self.options.path.display();
        match leave {
            None if length == written => {
                self.tend();
                return Ok(None);
            }
            None if length < written => warn_cut(&self.options.path, written - length),
            None => {
                log_seldom!(
                    warn,
                    &path.to_string(),
                    %path,
                    at_byte = written,
                    "somebody else wrote into the file; going on behind it"
                );
            }
            Some(Leave::Moved) => tracing::info!(%path, "the file was moved; going on in a new one"),
            Some(Leave::Rotate) => {}
        }
        self.sync()?;
        if leave == Some(Leave::Rotate) {
            let name = rotation::rotated_name(&place, (self.options.now)()).map_err(&rotating)?;
            fs::rename(&place, &name).map_err(&rotating)?;
            rotation::sync_directory(&place).map_err(&rotating)?;
            tracing::info!(path = %self.options.path.display(), rotated = %name.display(), "rotated");
        }
        if leave.is_some() {
            self.open = Some(self.at_path().map_err(&opening)?.0);
            self.untended = true;
        }
        let Some(open) = &mut self.open else { return Ok(None) };
        if leave.is_none() {
            open.go_to_end().map_err(&looking)?;
        }
        let mark = open.mark(self.skip).map_err(&looking)?;
        Ok(Some(Resume { position: self.flushed, mark }))
    }

    fn push(&mut self, item: &Item<'_>) {
        match self.options.rendering {
            Rendering::Raw => {
                self.collected.extend_from_slice(item.raw);
                self.collected.push(b'\n');
            }
            Rendering::Json => item.write_record(&mut self.collected),
        }
    }

    fn collected(&self) -> usize {
        self.collected.len()
    }

    fn chunk(&self) -> usize {
        const MOST: u64 = 1 << 20;
        let size = self.options.rotation.size.map_or(MOST, |size| (size / 4).clamp(1, MOST));
        usize::try_from(size).unwrap_or(usize::MAX)
    }

    fn flush(&mut self, behind: Position, at_once: bool) -> Result<Option<Vec<u8>>, SinkError> {
        let writing = self.error("write");
        let Some(open) = &mut self.open else {
            return Err(writing(io::Error::other("the file is not open")));
        };
        let skipped = self.skip.min(self.collected.len());
        if skipped < self.collected.len() {
            open.put(&self.collected[skipped..], self.distrusted).map_err(&writing)?;
            if let Some(every) = self.options.rotation.every {
                open.period.get_or_insert_with(|| every.of((self.options.now)()));
            }
            open.unsafe_since.get_or_insert_with(Instant::now);
        }
        self.skip -= skipped;
        self.collected.clear();
        self.flushed = behind;
        let is_due = match (self.options.syncing, open.unsafe_since) {
            (_, None) => false,
            (Syncing::EachFlush, _) => true,
            (Syncing::Every(interval), Some(since)) => at_once || since.elapsed() >= interval,
        };
        if is_due {
            self.sync()?;
        }
        let open = self.open.as_ref().filter(|open| open.safe == open.written);
        open.map(|open| open.mark(self.skip)).transpose().map_err(self.error("read"))
    }
}

impl Open {
    /// A file whose next write goes to its end.
    fn at_end(file: File, path: PathBuf) -> io::Result<Self> {
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
            unfinished: false,
            tried_elsewhere: false,
            at_line_start: true,
        };
        open.go_to(metadata.len())?;
        Ok(open)
    }

    fn mark(&self, skip: usize) -> io::Result<Vec<u8>> {
        let digest = Some(digest(&self.file, self.safe)?);
        Ok(Mark { inode: self.inode, safe: self.safe, skip, digest }.write())
    }

    /// Goes on at an earlier byte: what stands behind it is to be compared.
    fn go_back(&mut self, path: &Path, safe: u64) -> io::Result<()> {
        let length = self.file.metadata()?.len();
        if length < safe {
            warn_cut(path, safe - length);
        }
        self.go_to(safe.min(length))?;
        self.unfinished = length > self.written;
        Ok(())
    }

    /// Goes on at the end, and makes safe what others have put there.
    fn go_to_end(&mut self) -> io::Result<()> {
        self.file.sync_data()?;
        self.go_to(self.file.metadata()?.len())
    }

    fn go_to(&mut self, at: u64) -> io::Result<()> {
        let mut last = *b"\n";
        if let Some(before) = at.checked_sub(1) {
            self.file.read_exact_at(&mut last, before)?;
        }
        if at == 0 {
            // An empty file belongs to the time of its first line.
            self.period = None;
        }
        self.at_line_start = last == *b"\n";
        (self.safe, self.written) = (at, at);
        (self.unfinished, self.tried_elsewhere) = (false, false);
        Ok(())
    }

    /// What will be written for these lines.
    fn with_line_end<'b>(&self, lines: &'b [u8]) -> Cow<'b, [u8]> {
        if self.at_line_start { Cow::Borrowed(lines) } else { Cow::Owned([b"\n", lines].concat()) }
    }

    /// Compares what stands behind `written` with the beginning of what would be written there.
    fn compare(&self, bytes: &[u8], length: u64) -> io::Result<Compared> {
        let there = usize::try_from(length.saturating_sub(self.written)).unwrap_or(usize::MAX);
        let mut found = vec![0; bytes.len().min(there)];
        self.file.read_exact_at(&mut found, self.written)?;
        let same = found.iter().zip(bytes).take_while(|(found, byte)| found == byte).count();
        // After a power loss, pages that never reached the disk read as zeros.
        let fits = found.iter().zip(bytes).skip(same).all(|(found, byte)| found == byte || *found == 0);
        Ok(Compared { same, fits })
    }

    /// Brings lines into the file behind what is written.
    ///
    /// What stands there already is the beginning of these bytes, when a write was interrupted; then only
    /// the rest is written, or all of it where the disk is not to be believed.
    fn put(&mut self, lines: &[u8], distrusted: bool) -> io::Result<()> {
        let bytes = self.with_line_end(lines);
        let length = self.file.metadata()?.len();
        let compared = self.compare(&bytes, length)?;
        if length < self.written || (length > self.written && !(self.unfinished && compared.fits)) {
            // The next attempt decides anew, and its decision is durable before it writes.
            return Err(io::Error::other("somebody else changed the file just now"));
        }
        let from = if distrusted { 0 } else { compared.same };
        self.unfinished = true;
        self.write(&bytes[from..], self.written + from as u64)?;
        self.written += bytes.len() as u64;
        self.unfinished = length > self.written;
        self.tried_elsewhere = false;
        self.at_line_start = true;
        Ok(())
    }

    /// Writes at a place. Space is reserved before, where the file system can do that, so that a full disk leaves
    /// no half line behind.
    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let reserved = fallocate(&self.file, FallocateFlags::KEEP_SIZE, at, bytes.len() as u64);
        // Not every file system can, and whatever else is wrong the write will say.
        if let Err(rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT) = reserved {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.file.write_all_at(bytes, at)
    }
}

fn warn_cut(path: &Path, missing_bytes: u64) {
    log_seldom!(
        warn,
        &path.to_string_lossy(),
        path = %path.display(),
        missing_bytes,
        "somebody else cut the file; what was cut is gone from it"
    );
}

/// Opens the file, or makes it; tells whether it was made.
///
/// A file that is made can be used by nobody until it has its owner, and its mode last of all. So an empty file
/// without any permission is one that was never finished, because an attempt failed or was cut off: it is made anew.
fn open(path: &Path, options: &Options) -> io::Result<(File, bool)> {
    if fs::metadata(path)
        .is_ok_and(|found| found.is_file() && found.len() == 0 && found.permissions().mode() & 0o777 == 0)
    {
        fs::remove_file(path)?;
    }
    let mut opening = File::options();
    opening.read(true).write(true);
    match opening.clone().create_new(true).mode(0o000).open(path) {
        Ok(file) => {
            set_access(&file, options.mode, options.owner)?;
            // The name must survive as well.
            rotation::sync_directory(path)?;
            Ok((file, true))
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let file = opening.open(path)?;
            if file.metadata()?.len() == 0 {
                // It may have been made by an attempt whose sync of the name failed.
                rotation::sync_directory(path)?;
            }
            Ok((file, false))
        }
        Err(error) => Err(error),
    }
}

/// Gives a file its owner, where one is wanted, and then its permission bits.
fn set_access(file: &File, mode: u32, owner: (Option<u32>, Option<u32>)) -> io::Result<()> {
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

/// Takes the file for this process and this sink alone, until it is closed. It keeps out whoever asks for the lock,
/// another daemon or another sink, and nobody who reads, renames or compresses.
fn lock(file: &File) -> io::Result<()> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(io::Error::other(
            "another process or another sink has locked it and may be writing to it; stop that one, or give each its \
             own file",
        )),
        // Not every file system can.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
    }
}

/// The files with an inode's number that have a name which a file may be given when it is rotated: with something
/// behind its name (`a.log.1`, `a.log-20260102`), or between that and its extension (`a-20260102.log`).
fn moved_to(path: &Path, inode: u64) -> io::Result<Vec<PathBuf>> {
    let bytes = |part: Option<&OsStr>| part.unwrap_or_default().as_encoded_bytes().to_vec();
    let (name, stem) = (bytes(path.file_name()), bytes(path.file_stem()));
    let extension = &name[stem.len()..];
    let mut found = Vec::new();
    for entry in fs::read_dir(rotation::directory(path))? {
        let entry = entry?;
        let other = entry.file_name();
        let other = other.as_encoded_bytes();
        let is_behind = |rest: &[u8]| rest.first().is_some_and(u8::is_ascii_punctuation);
        let can_be = other.strip_prefix(name.as_slice()).is_some_and(is_behind)
            || (!extension.is_empty()
                && other != name
                && other.ends_with(extension)
                && other.strip_prefix(stem.as_slice()).is_some_and(is_behind));
        if !can_be {
            continue;
        }
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_file() && metadata.ino() == inode {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// What we write ends with a line end, so zeros at the end are pages that a power loss left empty.
fn cut_trailing_zeros(file: &File, safe: u64) -> io::Result<()> {
    const STEP: u64 = 64 * 1024;
    let length = file.metadata()?.len();
    let mut end = length;
    while end > safe {
        let start = end.saturating_sub(STEP).max(safe);
        let mut piece = vec![0; usize::try_from(end - start).map_err(io::Error::other)?];
        file.read_exact_at(&mut piece, start)?;
        match piece.iter().rposition(|byte| *byte != 0) {
            Some(last) => {
                end = start + last as u64 + 1;
                break;
            }
            None => end = start,
        }
    }
    if end < length { file.set_len(end) } else { Ok(()) }
}

/// Which file, and up to which byte of it everything is safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    inode: u64,
    safe: u64,
    /// So many of the bytes that will be pushed next are in a file already.
    skip: usize,
    /// The digest of the last bytes before the safe one; marks of version 1 have none.
    digest: Option<[u8; 32]>,
}

impl Mark {
    const VERSION: u8 = 2;

    /// Version 2 is its number, the inode, the safe byte, how much to skip (little-endian, 8 bytes each) and the
    /// digest. Version 1 was the device, the inode and the safe byte, without a number.
    fn read(mark: &[u8]) -> Option<Self> {
        let number = u64::from_le_bytes;
        if let (&[_device, inode, safe], []) = mark.as_chunks::<8>() {
            return Some(Self { inode: number(inode), safe: number(safe), skip: 0, digest: None });
        }
        let (&Self::VERSION, rest) = mark.split_first()? else { return None };
        let (numbers, digest) = rest.split_at_checked(24)?;
        let (&[inode, safe, skip], []) = numbers.as_chunks::<8>() else { return None };
        let skip = usize::try_from(number(skip)).ok()?;
        Some(Self { inode: number(inode), safe: number(safe), skip, digest: Some(digest.try_into().ok()?) })
    }

    fn write(self) -> Vec<u8> {
        let numbers = [self.inode, self.safe, self.skip as u64].map(u64::to_le_bytes).concat();
        [&[Self::VERSION], numbers.as_slice(), &self.digest.unwrap_or_default()].concat()
    }

    /// Whether the file has the bytes of which the mark has a digest; none where there is nothing to compare: in a
    /// mark of version 1, in front of the first byte, and in a file that ends before the safe byte.
    fn fits(&self, file: &File, length: u64) -> io::Result<Option<bool>> {
        match self.digest {
            Some(known) if (1..=length).contains(&self.safe) => Ok(Some(digest(file, self.safe)? == known)),
            _ => Ok(None),
        }
    }
}

/// The digest of the last bytes of a file before a place.
fn digest(file: &File, before: u64) -> io::Result<[u8; 32]> {
    const MOST: u64 = 4096;
    let length = before.min(MOST);
    let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, before - length)?;
    Ok(*blake3::hash(&bytes).as_bytes())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::wire::event::Verdict;

    struct Bench {
        _dir: tempfile::TempDir,
        path: PathBuf,
        mark: Vec<u8>,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("out.log");
            Self { _dir: dir, path, mark: Vec::new() }
        }

        fn options(&self) -> Options {
            Options {
                path: self.path.clone(),
                rendering: Rendering::Raw,
                rotation: Rotation::default(),
                syncing: Syncing::EachFlush,
                mode: 0o640,
                owner: (None, None),
                now: Arc::new(|| 1_000_000),
            }
        }

        fn sink(&mut self) -> FileSink {
            self.sink_with(self.options())
        }

        fn sink_with(&mut self, options: Options) -> FileSink {
            let mut sink = FileSink::new(options);
            let last = Resume { position: Position::default(), mark: self.mark.clone() };
            self.mark = sink.resume(&last).unwrap().mark;
            sink
        }

        fn text(&self) -> String {
            std::fs::read_to_string(&self.path).unwrap()
        }
    }

    fn push(sink: &mut FileSink, lines: &[&str]) {
        for line in lines {
            sink.push(&Item {
                behind: Position::default(),
                received_at: 0,
                source: "us",
                verdict: &Verdict::Unverified,
                key_id: None,
                raw: line.as_bytes(),
            });
        }
    }

    /// Flushes as the worker does; returns the mark.
    fn flush(sink: &mut FileSink) -> Vec<u8> {
        sink.prepare().unwrap();
        sink.flush(Position::default(), false).unwrap().unwrap()
    }

    const LINES: [&str; 4] = ["one", "two two", "three", "four"];
    const TEXT: &str = "one\ntwo two\nthree\nfour\n";

    #[test]
    fn an_interrupted_write_is_finished_wherever_it_was_cut() {
        for cut in 0..=TEXT.len() {
            let mut bench = Bench::new();
            let mut sink = bench.sink();
            push(&mut sink, &["before"]);
            bench.mark = flush(&mut sink);
            drop(sink);
            let torn = format!("before\n{}", &TEXT[..cut]);
            std::fs::write(&bench.path, &torn).unwrap();
            let mut sink = bench.sink();
            // In smaller pieces than before the crash.
            for pair in LINES.chunks(3) {
                push(&mut sink, pair);
                bench.mark = flush(&mut sink);
            }
            push(&mut sink, &["after"]);
            flush(&mut sink);
            assert_eq!(bench.text(), format!("before\n{TEXT}after\n"), "cut at {cut}");
        }
    }

    #[test]
    fn pages_that_a_power_loss_left_empty_are_filled() {
        for (start, end, longer) in [(0, 5, 0), (3, 8, 0), (0, TEXT.len(), 9), (TEXT.len(), TEXT.len(), 4096)]
        {
            let mut bench = Bench::new();
            bench.sink();
            let mut bytes = TEXT.as_bytes().to_vec();
            bytes[start..end].fill(0);
            bytes.resize(bytes.len() + longer, 0);
            std::fs::write(&bench.path, &bytes).unwrap();
            let mut sink = bench.sink();
            push(&mut sink, &LINES);
            flush(&mut sink);
            assert_eq!(bench.text(), TEXT, "{start}..{end}");
        }
    }

    #[test]
    fn somebody_else_s_lines_are_kept_and_ours_are_whole() {
        let mut bench = Bench::new();
        let mut sink = bench.sink();
        push(&mut sink, &LINES[..2]);
        bench.mark = flush(&mut sink);
        std::fs::write(&bench.path, format!("{}tea", bench.text())).unwrap();
        push(&mut sink, &LINES[2..]);
        bench.mark = flush(&mut sink);
        assert_eq!(bench.text(), "one\ntwo two\ntea\nthree\nfour\n");
        push(&mut sink, &["five"]);
        flush(&mut sink);
        assert_eq!(bench.text(), "one\ntwo two\ntea\nthree\nfour\nfive\n");
    }

    #[test]
    fn a_file_that_was_cut_goes_on_from_its_end() {
        let mut bench = Bench::new();
        let mut sink = bench.sink();
        push(&mut sink, &LINES);
        flush(&mut sink);
        std::fs::write(&bench.path, "").unwrap();
        push(&mut sink, &["five"]);
        bench.mark = flush(&mut sink);
        drop(sink);
        assert_eq!(bench.text(), "five\n");
        std::fs::write(&bench.path, "fi\n").unwrap();
        let mut sink = bench.sink();
        push(&mut sink, &["six"]);
        flush(&mut sink);
        assert_eq!(bench.text(), "fi\nsix\n");
    }

    #[test]
    fn a_new_sink_keeps_what_is_at_its_path() {
        let mut bench = Bench::new();
        std::fs::write(&bench.path, "older\n").unwrap();
        let mut sink = bench.sink();
        push(&mut sink, &["newer"]);
        flush(&mut sink);
        assert_eq!(bench.text(), "older\nnewer\n");
    }

    #[test]
    fn after_a_failed_sync_everything_is_written_again() {
        let mut bench = Bench::new();
        let mut sink = bench.sink();
        push(&mut sink, &LINES);
        flush(&mut sink);
        drop(sink);
        // Starting over, with pages that the kernel still shows.
        let mut sink = bench.sink();
        sink.distrusted = true;
        push(&mut sink, &LINES);
        flush(&mut sink);
        assert_eq!(bench.text(), TEXT);
        assert!(!sink.distrusted);
    }

    /// All rotated files and the file, in order.
    fn everything(bench: &Bench) -> (usize, String) {
        let rotated = rotation::rotated(&bench.path).unwrap();
        let mut text = String::new();
        for file in rotated.iter().chain([&bench.path]) {
            text += &std::fs::read_to_string(file).unwrap();
        }
        (rotated.len(), text)
    }

    #[test]
    fn a_file_is_rotated_before_it_is_too_large() {
        let mut bench = Bench::new();
        let rotation = Rotation { size: Some(11), ..Rotation::default() };
        let mut sink = bench.sink_with(Options { rotation, ..bench.options() });
        for line in LINES {
            push(&mut sink, &[line]);
            bench.mark = sink.prepare().unwrap().map_or(bench.mark, |at| at.mark);
            bench.mark = sink.flush(Position::default(), false).unwrap().unwrap();
        }
        assert_eq!(everything(&bench), (2, TEXT.to_owned()));
    }

    #[test]
    fn a_file_is_rotated_when_its_day_is_over() {
        let mut bench = Bench::new();
        let now = Arc::new(std::sync::atomic::AtomicI64::new(86_399_000));
        let clock = Arc::clone(&now);
        let rotation = Rotation { every: Some(Period::Daily), ..Rotation::default() };
        let now_of = Arc::new(move || clock.load(Ordering::SeqCst));
        let mut sink = bench.sink_with(Options { rotation, now: now_of, ..bench.options() });
        push(&mut sink, &LINES[..2]);
        flush(&mut sink);
        assert_eq!(sink.prepare().unwrap(), None);
        now.store(86_400_000, Ordering::SeqCst);
        assert!(sink.prepare().unwrap().is_some(), "while nothing comes, too");
        assert_eq!(sink.prepare().unwrap(), None, "an empty file has no day");
        push(&mut sink, &LINES[2..]);
        flush(&mut sink);
        assert_eq!(everything(&bench), (1, TEXT.to_owned()));
    }

    #[test]
    fn a_kill_around_a_rotation_loses_and_doubles_nothing() {
        // The process dies after the rename, after the new file was made, or after its mark was noted.
        for step in 0..3 {
            let mut bench = Bench::new();
            let mut sink = bench.sink();
            push(&mut sink, &LINES[..2]);
            bench.mark = flush(&mut sink);
            std::fs::rename(&bench.path, bench.path.with_extension("log.19700101T000000Z-0001")).unwrap();
            if step > 0 {
                std::fs::write(&bench.path, "").unwrap();
            }
            if step > 1 {
                bench.mark = sink.prepare().unwrap().unwrap().mark;
            }
            drop(sink);
            let mut sink = bench.sink();
            push(&mut sink, &LINES[2..]);
            flush(&mut sink);
            assert_eq!(everything(&bench), (1, TEXT.to_owned()), "step {step}");
        }
    }

    #[test]
    fn a_torn_line_is_finished_in_the_file_that_was_renamed() {
        for cut in 0..=TEXT.len() {
            let mut bench = Bench::new();
            bench.sink();
            std::fs::write(&bench.path, &TEXT[..cut]).unwrap();
            let moved = bench.path.with_extension("log.1");
            std::fs::rename(&bench.path, &moved).unwrap();
            let mut sink = bench.sink();
            for line in LINES {
                push(&mut sink, &[line]);
                flush(&mut sink);
            }
            let (_, rest) = everything(&bench);
            let old = std::fs::read_to_string(&moved).unwrap();
            assert!(old.is_empty() || old.ends_with('\n'), "{old:?}");
            assert_eq!(old + &rest, TEXT, "cut at {cut}");
        }
    }

    #[test]
    fn a_file_that_is_moved_or_removed_is_made_anew() {
        let mut bench = Bench::new();
        let mut sink = bench.sink();
        push(&mut sink, &LINES[..1]);
        flush(&mut sink);
        let moved = bench.path.with_extension("moved");
        std::fs::rename(&bench.path, &moved).unwrap();
        push(&mut sink, &LINES[1..2]);
        flush(&mut sink);
        assert_eq!(std::fs::read_to_string(&moved).unwrap(), "one\n");
        assert_eq!(bench.text(), "two two\n");
        std::fs::remove_file(&bench.path).unwrap();
        assert!(sink.prepare().unwrap().is_some(), "while nothing comes, too");
        push(&mut sink, &LINES[2..]);
        flush(&mut sink);
        assert_eq!(bench.text(), "three\nfour\n");
    }

    #[test]
    fn a_position_moves_only_after_the_sync() {
        let mut bench = Bench::new();
        let syncing = Syncing::Every(Duration::from_secs(3600));
        let mut sink = bench.sink_with(Options { syncing, ..bench.options() });
        push(&mut sink, &LINES[..2]);
        assert_eq!(sink.flush(Position::default(), false).unwrap(), None);
        assert_eq!(bench.text(), "one\ntwo two\n");
        // A kill now: everything is pushed again, and is there once.
        drop(sink);
        let mut sink = bench.sink();
        push(&mut sink, &LINES);
        flush(&mut sink);
        assert_eq!(bench.text(), TEXT);
        drop(sink);
        let syncing = Syncing::Every(Duration::from_secs(3600));
        let mut sink = bench.sink_with(Options { syncing, ..bench.options() });
        push(&mut sink, &LINES);
        assert_eq!(sink.flush(Position::default(), false).unwrap(), None);
        assert!(sink.flush(Position::default(), true).unwrap().is_some());
    }

    #[test]
    fn a_new_file_has_the_mode_that_was_asked_for() {
        let mut bench = Bench::new();
        bench.sink_with(Options { mode: 0o604, ..bench.options() });
        assert_eq!(std::fs::metadata(&bench.path).unwrap().permissions().mode() & 0o777, 0o604);
    }

    /// A sink with a clock that the test moves.
    fn sink_by(bench: &mut Bench, rotation: Rotation) -> (FileSink, Arc<std::sync::atomic::AtomicI64>) {
        let hand = Arc::new(std::sync::atomic::AtomicI64::new(1_000_000));
        let clock = Arc::clone(&hand);
        let now = Arc::new(move || clock.load(Ordering::SeqCst));
        (bench.sink_with(Options { rotation, now, ..bench.options() }), hand)
    }

    #[test]
    fn a_file_belongs_to_the_day_of_its_first_line() {
        const DAY: i64 = 86_400_000;
        let mut bench = Bench::new();
        let rotation = Rotation { every: Some(Period::Daily), ..Rotation::default() };
        let (mut sink, hand) = sink_by(&mut bench, rotation);
        // Made on the first day, written to on the third.
        hand.store(2 * DAY, Ordering::SeqCst);
        push(&mut sink, &["one"]);
        flush(&mut sink);
        assert_eq!(sink.prepare().unwrap(), None);
        // Emptied by somebody else, and written to two days later: a new file in all but name.
        hand.store(3 * DAY - 1, Ordering::SeqCst);
        File::options().write(true).truncate(true).open(&bench.path).unwrap();
        hand.store(5 * DAY, Ordering::SeqCst);
        sink.prepare().unwrap();
        assert_eq!(everything(&bench), (0, String::new()), "an empty file has no day");
        push(&mut sink, &["two"]);
        flush(&mut sink);
        assert_eq!(sink.prepare().unwrap(), None);
        assert_eq!(everything(&bench), (0, "two\n".to_owned()));
        hand.store(6 * DAY, Ordering::SeqCst);
        assert!(sink.prepare().unwrap().is_some());
        assert_eq!(everything(&bench), (1, "two\n".to_owned()));
    }

    #[test]
    fn a_symbolic_link_stays_and_its_target_is_rotated() {
        let mut bench = Bench::new();
        let other = tempfile::tempdir().unwrap();
        std::fs::create_dir(other.path().join("logs")).unwrap();
        // A link to a link to a file that is not there yet.
        std::os::unix::fs::symlink(other.path().join("link"), &bench.path).unwrap();
        std::os::unix::fs::symlink("logs/real.log", other.path().join("link")).unwrap();
        let real = other.path().join("logs/real.log");
        let rotation = Rotation { size: Some(5), ..Rotation::default() };
        let (mut sink, _) = sink_by(&mut bench, rotation);
        for line in LINES {
            push(&mut sink, &[line]);
            bench.mark = flush(&mut sink);
        }
        assert!(bench.path.is_symlink());
        assert!(rotation::rotated(&bench.path).unwrap().is_empty());
        let rotated = rotation::rotated(&real).unwrap();
        let text = |file: &PathBuf| std::fs::read_to_string(file).unwrap();
        assert_eq!(rotated.iter().chain([&real]).map(text).collect::<String>(), TEXT);
        assert_eq!(rotated.len(), 3);

        // A write that was cut off before somebody renamed the target is finished where it is.
        let torn = std::fs::read_to_string(&real).unwrap() + "fi";
        std::fs::write(&real, torn).unwrap();
        let moved = real.with_extension("log.1");
        std::fs::rename(&real, &moved).unwrap();
        drop(sink);
        let mut sink = bench.sink();
        push(&mut sink, &["five"]);
        flush(&mut sink);
        assert_eq!(text(&moved), "four\nfive\n");

        // The link is turned elsewhere.
        let elsewhere = other.path().join("elsewhere.log");
        std::fs::remove_file(&bench.path).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &bench.path).unwrap();
        push(&mut sink, &["six"]);
        flush(&mut sink);
        assert_eq!(text(&elsewhere), "six\n");
    }

    #[test]
    fn what_is_no_regular_file_is_said_to_be_none() {
        let bench = Bench::new();
        let refusal = || {
            let last = Resume { position: Position::default(), mark: Vec::new() };
            FileSink::new(bench.options()).resume(&last).unwrap_err().to_string()
        };
        std::os::unix::fs::symlink("/dev/null", &bench.path).unwrap();
        assert!(refusal().ends_with("it is no regular file"), "{}", refusal());
        std::fs::remove_file(&bench.path).unwrap();
        std::os::unix::fs::symlink(&bench.path, &bench.path).unwrap();
        assert!(refusal().contains("symbolic links"), "{}", refusal());
        std::fs::remove_file(&bench.path).unwrap();
        std::fs::create_dir(&bench.path).unwrap();
        assert!(refusal().contains("Is a directory"), "{}", refusal());
    }

    #[test]
    fn a_file_that_was_never_finished_is_made_anew() {
        let mut bench = Bench::new();
        File::options().create_new(true).write(true).mode(0o000).open(&bench.path).unwrap();
        bench.sink();
        assert_eq!(std::fs::metadata(&bench.path).unwrap().permissions().mode() & 0o777, 0o640);
        // An empty file that somebody else prepared stays as it is.
        std::fs::remove_file(&bench.path).unwrap();
        File::options().create_new(true).write(true).mode(0o600).open(&bench.path).unwrap();
        let inode = std::fs::metadata(&bench.path).unwrap().ino();
        bench.sink();
        let found = std::fs::metadata(&bench.path).unwrap();
        assert_eq!((found.ino(), found.permissions().mode() & 0o777), (inode, 0o600));
    }

    #[test]
    fn an_owner_that_cannot_be_set_is_no_detail() {
        let bench = Bench::new();
        let options = Options { owner: (Some(1), Some(2)), ..bench.options() };
        let last = Resume { position: Position::default(), mark: Vec::new() };
        for _ in 0..2 {
            match FileSink::new(options.clone()).resume(&last) {
                // Root may.
                Ok(_) => {
                    let found = std::fs::metadata(&bench.path).unwrap();
                    assert_eq!((found.uid(), found.gid()), (1, 2));
                }
                Err(error) => {
                    assert!(error.to_string().contains("its owner cannot be set"), "{error}");
                    let found = std::fs::metadata(&bench.path).unwrap();
                    assert_eq!(found.permissions().mode() & 0o777, 0, "readable by nobody");
                }
            }
        }
    }

    /// Dies after the mark was noted: what is prepared is kept, what is flushed comes back or not.
    fn prepare(sink: &mut FileSink, bench: &mut Bench) {
        if let Some(at) = sink.prepare().unwrap() {
            bench.mark = at.mark;
        }
    }

    #[test]
    fn an_inode_s_number_alone_does_not_make_a_file_ours() {
        // Somebody else's file has our inode's number by now, under a name of our own or another.
        for name in ["out.log.gz", "out.log-20260102", "out.old.log", "ledger.db-wal", "out.log"] {
            for kept in [0, 3, 40, 5000] {
                let mut bench = Bench::new();
                let mut sink = bench.sink();
                push(&mut sink, &LINES);
                bench.mark = flush(&mut sink);
                drop(sink);
                let mut precious = vec![b'x'; kept];
                precious.resize(kept + 300, 0);
                let other = bench.path.with_file_name(name);
                std::fs::rename(&bench.path, &other).unwrap();
                std::fs::write(&other, &precious).unwrap();
                let mut sink = bench.sink();
                for line in ["five", "six"] {
                    push(&mut sink, &[line]);
                    bench.mark = flush(&mut sink);
                }
                let found = std::fs::read(&other).unwrap();
                if name == "out.log" {
                    precious.extend_from_slice(b"\nfive\nsix\n");
                } else {
                    assert_eq!(bench.text(), "five\nsix\n", "{name}");
                }
                assert!(found == precious, "{name} with {kept} was written to");
            }
        }
    }

    #[test]
    fn a_number_without_a_digest_proves_nothing_about_another_name() {
        // Nothing was safe yet, or the mark is of version 1: what is there is compared.
        for content in [&b"\0\0\0\0\0\0\0\0"[..], b"one or two", b"\x1f\x8b\x08"] {
            for old in [false, true] {
                let mut bench = Bench::new();
                bench.sink();
                if old {
                    let mark = Mark::read(&bench.mark).unwrap();
                    bench.mark = [7, mark.inode, mark.safe].map(u64::to_le_bytes).concat();
                }
                let other = bench.path.with_extension("log.1");
                std::fs::rename(&bench.path, &other).unwrap();
                std::fs::write(&other, content).unwrap();
                let mut sink = bench.sink();
                push(&mut sink, &LINES);
                flush(&mut sink);
                assert_eq!(std::fs::read(&other).unwrap(), content);
                assert_eq!(bench.text(), TEXT);
            }
        }
    }

    #[test]
    fn a_mark_of_version_1_is_still_understood() {
        for device in [0, 7] {
            for cut in 0..=TEXT.len() {
                let mut bench = Bench::new();
                let mut sink = bench.sink();
                push(&mut sink, &["before"]);
                let mark = Mark::read(&flush(&mut sink)).unwrap();
                bench.mark = [device, mark.inode, mark.safe].map(u64::to_le_bytes).concat();
                drop(sink);
                std::fs::write(&bench.path, format!("before\n{}", &TEXT[..cut])).unwrap();
                let mut sink = bench.sink();
                push(&mut sink, &LINES);
                flush(&mut sink);
                assert_eq!(bench.text(), format!("before\n{TEXT}"), "cut at {cut}");
            }
        }
    }

    #[test]
    fn a_copy_at_the_path_is_the_same_file() {
        let mut bench = Bench::new();
        let mut sink = bench.sink();
        push(&mut sink, &["before"]);
        bench.mark = flush(&mut sink);
        drop(sink);
        let copy = bench.path.with_extension("copy");
        std::fs::write(&copy, "before\none\ntw").unwrap();
        std::fs::rename(&copy, &bench.path).unwrap();
        let mut sink = bench.sink();
        push(&mut sink, &LINES);
        flush(&mut sink);
        assert_eq!(bench.text(), format!("before\n{TEXT}"));
    }

    #[test]
    fn a_new_line_never_sticks_to_an_unfinished_one() {
        // Whatever the process was doing when it died: the end was noted, and so much was written behind it.
        let written = format!("\n{TEXT}");
        for cut in 0..=written.len() {
            let mut bench = Bench::new();
            std::fs::write(&bench.path, "half").unwrap();
            bench.sink();
            std::fs::write(&bench.path, format!("half{}", &written[..cut])).unwrap();
            let mut sink = bench.sink();
            for line in LINES {
                push(&mut sink, &[line]);
                prepare(&mut sink, &mut bench);
                bench.mark = sink.flush(Position::default(), false).unwrap().unwrap();
            }
            assert_eq!(bench.text(), format!("half{written}"), "cut at {cut}");
        }
    }

    #[test]
    fn a_file_that_is_cut_or_replaced_inside_a_line_gets_a_line_end_first() {
        let mut bench = Bench::new();
        let mut sink = bench.sink();
        push(&mut sink, &LINES[..2]);
        flush(&mut sink);
        File::options().write(true).open(&bench.path).unwrap().set_len(6).unwrap();
        push(&mut sink, &["three"]);
        bench.mark = flush(&mut sink);
        assert_eq!(bench.text(), "one\ntw\nthree\n");
        let copy = bench.path.with_extension("copy");
        std::fs::write(&copy, "one\ntw").unwrap();
        std::fs::rename(&copy, &bench.path).unwrap();
        push(&mut sink, &["four"]);
        bench.mark = flush(&mut sink);
        drop(sink);
        assert_eq!(bench.text(), "one\ntw\nfour\n");
        File::options().write(true).open(&bench.path).unwrap().set_len(9).unwrap();
        let mut sink = bench.sink();
        push(&mut sink, &["five"]);
        flush(&mut sink);
        assert_eq!(bench.text(), "one\ntw\nfo\nfive\n");
    }

    #[test]
    fn a_kill_after_somebody_else_wrote_doubles_nothing() {
        // Our lines before theirs, theirs, and what we write again behind it, cut off anywhere.
        for ours in [0, 2, 4, 9, 17] {
            let theirs = format!("{}#tea", &TEXT[..ours]);
            let whole = TEXT[..ours].rfind('\n').map_or(0, |at| at + 1);
            let again = format!("\n{}", &TEXT[whole..]);
            for cut in 0..=again.len() {
                let mut bench = Bench::new();
                bench.sink();
                std::fs::write(&bench.path, &theirs).unwrap();
                let mut sink = bench.sink();
                push(&mut sink, &LINES);
                prepare(&mut sink, &mut bench);
                drop(sink);
                std::fs::write(&bench.path, format!("{theirs}{}", &again[..cut])).unwrap();
                let mut sink = bench.sink();
                for line in LINES {
                    push(&mut sink, &[line]);
                    bench.mark = flush(&mut sink);
                }
                assert_eq!(bench.text(), format!("{theirs}{again}"), "{ours}, cut at {cut}");
            }
        }
    }

    #[test]
    fn somebody_else_s_line_does_not_hold_us_in_a_file_that_was_moved() {
        for is_removed in [false, true] {
            let mut bench = Bench::new();
            let mut sink = bench.sink();
            push(&mut sink, &LINES[..2]);
            flush(&mut sink);
            let noted = format!("{}# a note\n", bench.text());
            std::fs::write(&bench.path, &noted).unwrap();
            let moved = bench.path.with_extension("log.1");
            std::fs::rename(&bench.path, &moved).unwrap();
            if is_removed {
                std::fs::remove_file(&moved).unwrap();
            }
            assert!(sink.prepare().unwrap().is_some(), "while nothing comes, too");
            push(&mut sink, &LINES[2..]);
            flush(&mut sink);
            assert_eq!(bench.text(), "three\nfour\n");
            assert!(is_removed || std::fs::read_to_string(&moved).unwrap() == noted);
        }
    }

    /// A sink in whose file a write was interrupted, by its failure.
    fn torn(bench: &mut Bench, cut: usize) -> FileSink {
        let mut sink = bench.sink();
        push(&mut sink, &["before"]);
        bench.mark = flush(&mut sink);
        push(&mut sink, &LINES);
        let open = sink.open.as_mut().unwrap();
        open.file.write_all_at(&TEXT.as_bytes()[..cut], open.written).unwrap();
        open.unfinished = true;
        sink
    }

    #[test]
    fn what_cannot_be_finished_in_a_renamed_file_is_cut_off_there() {
        for cut in 0..=TEXT.len() {
            let mut bench = Bench::new();
            let mut sink = torn(&mut bench, cut);
            let moved = bench.path.with_extension("log.1");
            std::fs::rename(&bench.path, &moved).unwrap();
            if cut > 0 {
                assert_eq!(sink.prepare().unwrap(), None, "it may be finished there");
            }
            // The flush failed.
            assert!(sink.prepare().unwrap().is_some());
            bench.mark = flush(&mut sink);
            assert_eq!(std::fs::read_to_string(&moved).unwrap(), "before\n", "cut at {cut}");
            assert_eq!(bench.text(), TEXT, "cut at {cut}");
        }
    }

    #[test]
    fn what_was_unfinished_in_a_removed_file_is_pushed_again() {
        for cut in 1..=TEXT.len() {
            let mut bench = Bench::new();
            let mut sink = torn(&mut bench, cut);
            std::fs::remove_file(&bench.path).unwrap();
            assert!(sink.prepare().unwrap_err().start_over);
            let last = Resume { position: Position::default(), mark: bench.mark.clone() };
            sink.resume(&last).unwrap();
            push(&mut sink, &LINES);
            flush(&mut sink);
            assert_eq!(bench.text(), TEXT, "cut at {cut}");
        }
    }

    #[test]
    fn a_failed_write_goes_to_the_new_file_when_the_old_one_is_removed() {
        let mut bench = Bench::new();
        let mut sink = bench.sink();
        push(&mut sink, &LINES);
        // It failed before anything was written.
        sink.open.as_mut().unwrap().unfinished = true;
        std::fs::remove_file(&bench.path).unwrap();
        flush(&mut sink);
        assert_eq!(bench.text(), TEXT);
    }

    #[test]
    fn a_file_that_another_sink_writes_to_is_left_alone() {
        let mut bench = Bench::new();
        let mut first = bench.sink();
        let mut second = FileSink::new(bench.options());
        let last = Resume { position: Position::default(), mark: Vec::new() };
        let error = second.resume(&last).unwrap_err().to_string();
        assert!(error.contains("another process or another sink"), "{error}");
        push(&mut first, &LINES);
        flush(&mut first);
        drop(first);
        second.resume(&last).unwrap();
        push(&mut second, &["five"]);
        flush(&mut second);
        assert_eq!(bench.text(), format!("{TEXT}five\n"));
    }
}
