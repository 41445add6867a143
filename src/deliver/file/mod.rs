//! The file sink: whole lines, exactly once across kills, restarts, failed writes and rotation.
//!
//! The mark says up to which byte of which file everything is safe. Whatever stands behind that byte is the
//! beginning of what will be pushed next (rendering is deterministic), cut off anywhere: so it is compared
//! with what is pushed, and only the rest is written, a torn line finished. Recovery after a crash and the
//! retry after a failed write are the same code.
//!
//! Lines move to another file, because of our own [`rotation`] or because somebody renamed or removed the file,
//! only when all that was written is safe, and only after the mark of the new file is durable: so at most one
//! file at a time has anything behind its safe byte, and it is found again by its inode.

mod rotation;

use std::fs::{self, File};
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
}

impl FileSink {
    /// A sink at a path. Opens nothing yet.
    pub fn new(options: Options) -> Self {
        Self {
            options,
            open: None,
            collected: Vec::new(),
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
        let metadata = file.metadata()?;
        let mut open = Open {
            file,
            path,
            device: metadata.dev(),
            inode: metadata.ino(),
            safe: metadata.len(),
            written: metadata.len(),
            period: None,
            unsafe_since: None,
        };
        if metadata.len() > 0 {
            open.period = self.options.rotation.every.map(|every| every.of(metadata.mtime() * 1000));
        }
        Ok((open, is_new))
    }

    /// Whether the next lines should go to another file: because this one is full or of another time, or because
    /// it is no longer at the path.
    fn must_leave(&self, open: &Open, coming: u64) -> io::Result<Option<Leave>> {
        let is_empty = match fs::metadata(&self.options.path) {
            Ok(found) if (found.dev(), found.ino()) == (open.device, open.inode) => found.len() == 0,
            Ok(_) => return Ok(Some(Leave::Moved)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some(Leave::Moved)),
            Err(error) => return Err(error),
        };
        let rotation = &self.options.rotation;
        let is_full = rotation.size.is_some_and(|size| open.written + coming > size);
        let now = rotation.every.map(|every| every.of((self.options.now)()));
        let is_over = open.period.is_some() && open.period != now;
        Ok((!is_empty && open.written > 0 && (is_full || is_over)).then_some(Leave::Rotate))
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

impl Sink for FileSink {
    fn resume(&mut self, last: &Resume) -> Result<Resume, SinkError> {
        self.collected.clear();
        self.open = None;
        let opening = self.error("open");
        let (mut open, is_new) = self.at_path().map_err(&opening)?;
        match Mark::read(&last.mark) {
            Some(known) if (known.device, known.inode) == (open.device, open.inode) => {
                open.go_back(&self.options.path, known.safe).map_err(&opening)?;
            }
            // The file was renamed. If the last write to it was cut off, it is finished there first.
            Some(known) => {
                let moved = rotation::by_inode(&open.path, known.device, known.inode);
                if let Some(path) = moved.map_err(&opening)? {
                    let file = File::options().read(true).write(true).open(&path).map_err(&opening)?;
                    let mut old = Open { file, device: known.device, inode: known.inode, ..open };
                    old.go_back(&path, known.safe).map_err(&opening)?;
                    let length = old.file.metadata().map_err(&opening)?.len();
                    open = if length > old.safe { old } else { self.at_path().map_err(&opening)?.0 };
                } else if !is_new {
                    tracing::warn!(
                        path = %self.options.path.display(),
                        "another file is at the path than before; going on at its end"
                    );
                }
            }
            None => {}
        }
        let mark = open.mark();
        self.open = Some(open);
        self.flushed = last.position;
        Ok(Resume { position: last.position, mark })
    }

    fn prepare(&mut self) -> Result<Option<Resume>, SinkError> {
        let (looking, rotating) = (self.error("look at"), self.error("rotate"));
        let Some(open) = &self.open else { return Ok(None) };
        let Some(leave) = self.must_leave(open, self.collected.len() as u64).map_err(&looking)? else {
            self.tend();
            return Ok(None);
        };
        // What an interrupted write left is finished first, where it is.
        if open.file.metadata().map_err(&looking)?.len() > open.written {
            return Ok(None);
        }
        let path = open.path.clone();
        self.sync()?;
        if leave == Leave::Rotate {
            let name = rotation::rotated_name(&path, (self.options.now)()).map_err(&rotating)?;
            fs::rename(&path, &name).map_err(&rotating)?;
            rotation::sync_directory(&path).map_err(&rotating)?;
            tracing::info!(path = %self.options.path.display(), rotated = %name.display(), "rotated");
        } else {
            tracing::info!(path = %self.options.path.display(), "the file was moved; going on in a new one");
        }
        let (open, _) = self.at_path().map_err(&rotating)?;
        let mark = open.mark();
        self.open = Some(open);
        self.untended = true;
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
        if !self.collected.is_empty() {
            open.put(&self.options.path, &self.collected, self.distrusted).map_err(writing)?;
            if let Some(every) = self.options.rotation.every {
                open.period.get_or_insert_with(|| every.of((self.options.now)()));
            }
            self.collected.clear();
            open.unsafe_since.get_or_insert_with(Instant::now);
        }
        self.flushed = behind;
        let is_due = match (self.options.syncing, open.unsafe_since) {
            (_, None) => false,
            (Syncing::EachFlush, _) => true,
            (Syncing::Every(interval), Some(since)) => at_once || since.elapsed() >= interval,
        };
        if is_due {
            self.sync()?;
        }
        Ok(self.open.as_ref().filter(|open| open.safe == open.written).map(Open::mark))
    }
}

impl Open {
    fn mark(&self) -> Vec<u8> {
        Mark { device: self.device, inode: self.inode, safe: self.safe }.write()
    }

    /// Goes on at an earlier byte: what stands behind it is to be compared.
    fn go_back(&mut self, path: &Path, safe: u64) -> io::Result<()> {
        let length = self.file.metadata()?.len();
        if length < safe {
            warn_cut(path, safe - length);
        }
        self.safe = safe.min(length);
        self.written = self.safe;
        cut_trailing_zeros(&self.file, self.safe, length)
    }

    /// Brings the bytes into the file behind what is written.
    ///
    /// What stands there already is the beginning of these bytes, when a write was interrupted; then only
    /// the rest is written, or all of it where the disk is not to be believed.
    fn put(&mut self, path: &Path, bytes: &[u8], distrusted: bool) -> io::Result<()> {
        let length = self.file.metadata()?.len();
        if length < self.written {
            warn_cut(path, self.written - length);
            self.written = length;
            self.safe = self.safe.min(length);
        }
        if length == 0 {
            self.period = None;
        }
        let there = usize::try_from(length - self.written).unwrap_or(usize::MAX);
        let mut found = vec![0; bytes.len().min(there)];
        self.file.read_exact_at(&mut found, self.written)?;
        let same = found.iter().zip(bytes).take_while(|(found, byte)| found == byte).count();
        // After a power loss, pages that never reached the disk read as zeros.
        if !found.iter().zip(bytes).skip(same).all(|(found, byte)| found == byte || *found == 0) {
            return self.step_over(path, bytes, same, length, distrusted);
        }
        let from = if distrusted { 0 } else { same };
        self.write(&bytes[from..], self.written + from as u64)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Somebody else wrote into the file. That is kept; we go on behind it, on a line of our own. Our lines
    /// that are there in full count, the one that was interrupted is written again.
    fn step_over(
        &mut self,
        path: &Path,
        bytes: &[u8],
        same: usize,
        length: u64,
        distrusted: bool,
    ) -> io::Result<()> {
        tracing::warn!(
            path = %path.display(),
            at_byte = self.written + same as u64,
            "somebody else wrote into the file; going on behind it"
        );
        let kept = bytes[..same].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        if distrusted {
            self.file.write_all_at(&bytes[..kept], self.written)?;
        }
        let mut last = [0];
        self.file.read_exact_at(&mut last, length - 1)?;
        let line_end: &[u8] = if last == *b"\n" { b"" } else { b"\n" };
        let ours = [line_end, &bytes[kept..]].concat();
        self.write(&ours, length)?;
        self.written = length + ours.len() as u64;
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
    tracing::warn!(
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

/// What we write ends with a line end, so zeros at the end are pages that a power loss left empty.
fn cut_trailing_zeros(file: &File, safe: u64, length: u64) -> io::Result<()> {
    const STEP: u64 = 64 * 1024;
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
    device: u64,
    inode: u64,
    safe: u64,
}

impl Mark {
    fn read(mark: &[u8]) -> Option<Self> {
        let (numbers, []) = mark.as_chunks::<8>() else { return None };
        let [device, inode, safe] = *numbers else { return None };
        let number = u64::from_le_bytes;
        Some(Self { device: number(device), inode: number(inode), safe: number(safe) })
    }

    fn write(self) -> Vec<u8> {
        [self.device, self.inode, self.safe].map(u64::to_le_bytes).concat()
    }
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
        let mut sink = bench.sink();
        push(&mut sink, &LINES);
        flush(&mut sink);
        assert_eq!(bench.text(), TEXT);
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
        assert_eq!(sink.prepare().unwrap(), None, "an empty file has no day");
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
}
