//! The file sink: whole lines, exactly once across kills, restarts, failed writes and rotation.
//!
//! 1. The mark says up to which byte of which file everything is safe; it is durable before
//!    anything is written behind it.
//! 2. The bytes behind the safe one are compared with the next lines, since rendering is
//!    deterministic. A beginning of these lines is completed in the file at the path, wherever it
//!    was torn.
//! 3. A renamed file is truncated to its last whole line; the lines are written to the file at the
//!    path.
//! 4. Bytes of another process stay: lines are appended behind them. Whole lines of ours in front
//!    of them count.
//! 5. After a failed sync everything since the safe byte is written again.
//! 6. Lines move to another file, by our [`rotation`] or because the path leads elsewhere, when
//!    everything written is safe: so at most one file has anything unfinished.
//! 7. Where the file does not end with a line end, the next write begins with `\n`.

mod mark;
mod options;
mod recovery;
mod rotation;

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;

use mark::Mark;
pub use options::{FileOptions, Rendering, Syncing};
use recovery::{Open, Tail};
use rotation::RotationTask;
pub use rotation::{Compression, Period, Rotation, rotated_at};

use super::rendered::Rendered;
use super::sink::{Item, Sink, SinkError};
use crate::ledger::{Position, Resume};
use crate::log_throttle::log_throttled;

/// Numbers of the user and the group that files get; `None` leaves the daemon's own.
pub type OwnerIds = (Option<u32>, Option<u32>);

/// The wall clock, in milliseconds since the Unix epoch.
pub type WallClock = Arc<dyn Fn() -> i64 + Send + Sync>;

/// A file that lines are appended to.
pub struct FileSink {
    options: FileOptions,
    rotation: Rotation,
    owner: OwnerIds,
    now: WallClock,
    open: Option<Open>,
    collected: Rendered,
    /// The position behind each collected line.
    behind: Vec<Position>,
    /// Everything before it is written.
    flushed: Position,
    /// There may be rotated files to compress or to remove.
    has_rotated: bool,
    rotation_task: Arc<RotationTask>,
}

/// Reason why the next lines go to another file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SwitchReason {
    /// The configured rotation.
    Rotation,
    /// Another process renamed, removed or replaced the file.
    Renamed,
}

impl FileSink {
    /// Creates a sink for a path. Opens nothing yet. Files that we create get this owner; where it
    /// cannot be set, nothing is written.
    pub fn new(options: FileOptions, owner: OwnerIds, now: WallClock) -> Self {
        Self {
            rotation: options.rotate.clone().unwrap_or_default(),
            options,
            owner,
            now,
            open: None,
            collected: Rendered::default(),
            behind: Vec::new(),
            flushed: Position::default(),
            has_rotated: true,
            rotation_task: Arc::default(),
        }
    }

    fn error(&self, what: &str) -> impl Fn(io::Error) -> SinkError + use<> {
        let what = format!("cannot {what} {}", self.options.path.display());
        move |cause| SinkError::new(what.clone(), cause)
    }

    /// Opens the file at the path, creates it when it is missing, and seeks to its end.
    fn at_path(&self) -> io::Result<Open> {
        let path = rotation::linked(&self.options.path)?;
        let file = open(&path, self.options.mode, self.owner)?;
        lock(&file)?;
        let mut open = Open::at_end(file, path)?;
        if open.written > 0 {
            let modified = open.file.metadata()?.mtime() * 1000;
            open.period = self.rotation.every.map(|every| every.of(modified));
            // The mark will call it safe.
            open.file.sync_data()?;
        }
        Ok(open)
    }

    /// Opens the file that a mark describes, with the next write behind its safe byte; otherwise
    /// the file at the path.
    fn at_mark(&self, known: &Mark) -> io::Result<Open> {
        let is_new = !self.options.path.exists();
        let mut open = self.at_path()?;
        // Where there is no proof, and where the file was truncated, the inode's number decides.
        let fits = known.fits(&open.file, open.written)?;
        let is_known = fits.unwrap_or(!is_new && known.inode == open.inode);
        if is_known {
            open.go_back(known.safe)?;
        } else if let Some(renamed) = recovery::renamed(&open.path, known)? {
            return Ok(renamed);
        } else if open.written > 0 {
            let path = self.options.path.display();
            log_throttled!(
                warn,
                &path.to_string(),
                code = "file-replaced",
                %path,
                "{path} is another file than before; writing continues at its end"
            );
        }
        Ok(open)
    }

    /// Returns why the next lines should go to another file: this one is full or its period is
    /// over, or it is no longer at the path.
    fn switch_reason(&self, open: &Open) -> io::Result<Option<SwitchReason>> {
        let length = match fs::metadata(&self.options.path) {
            Ok(found) if (found.dev(), found.ino()) == (open.device, open.inode) => found.len(),
            Ok(_) => return Ok(Some(SwitchReason::Renamed)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some(SwitchReason::Renamed)),
            Err(error) => return Err(error),
        };
        let rotation = &self.rotation;
        let is_full =
            rotation.size.is_some_and(|size| open.written + self.collected.bytes().len() as u64 > size);
        let now = rotation.every.map(|every| every.of((self.now)()));
        let is_over = open.period.is_some() && open.period != now;
        // Another process may have truncated it.
        let is_due = open.written > 0 && length >= open.written && (is_full || is_over);
        Ok(is_due.then_some(SwitchReason::Rotation))
    }

    /// Syncs what is written.
    fn sync(&mut self) -> Result<(), SinkError> {
        let syncing = self.error("sync");
        let Some(open) = self.open.as_mut().filter(|open| open.unsafe_since.is_some()) else {
            return Ok(());
        };
        // The kernel may have dropped the pages, and will not report it twice.
        let failed = |cause| SinkError { must_resume: true, ..syncing(cause) };
        open.file.sync_data().map_err(failed)?;
        (open.safe, open.unsafe_since) = (open.written, None);
        Ok(())
    }

    /// Compresses and removes rotated files; a failure is retried after the next rotation.
    fn tend(&mut self, open_file: &Path, inode: u64) {
        let rotation = &self.rotation;
        if self.has_rotated && (rotation.keep.is_some() || rotation.compress.is_some()) {
            self.has_rotated = !self.rotation_task.start(open_file.to_owned(), rotation.clone(), inode);
        }
    }
}

impl Sink for FileSink {
    fn resume(&mut self, last: &Resume) -> Result<Resume, SinkError> {
        self.collected.clear();
        self.behind.clear();
        self.open = None;
        let known = Mark::read(&last.mark);
        let open = known.map_or_else(|| self.at_path(), |known| self.at_mark(&known));
        let open = open.map_err(self.error("open"))?;
        let mark = open.mark().map_err(self.error("read"))?;
        self.open = Some(open);
        self.flushed = last.position;
        Ok(Resume { position: last.position, mark })
    }

    fn prepare(&mut self) -> Result<Option<Resume>, SinkError> {
        let (looking, rotating, opening) = (self.error("inspect"), self.error("rotate"), self.error("open"));
        let Some(mut open) = self.open.take() else { return Ok(None) };
        let reason = self.switch_reason(&open);
        let prepared = reason.and_then(|reason| Ok((reason, self.look_behind(&mut open, reason)?)));
        let (path, inode, written) = (open.path.clone(), open.inode, open.written);
        let length = open.length();
        self.open = Some(open);
        let (reason, can_go_on) = prepared.map_err(&looking)?;
        let length = length.map_err(&looking)?;
        if !can_go_on {
            return Ok(None);
        }
        let file = self.options.path.display();
        match reason {
            None if length == written => {
                self.tend(&path, inode);
                return Ok(None);
            }
            None if length < written => recovery::warn_truncated(&self.options.path, written - length),
            None => {
                log_throttled!(
                    warn,
                    &file.to_string(),
                    code = "file-foreign-bytes",
                    path = %file,
                    at_byte = written,
                    "another process wrote into {file} at byte {written}; writing continues behind that"
                );
            }
            Some(SwitchReason::Renamed) => {
                tracing::info!(
                    code = "file-renamed",
                    path = %file,
                    "{file} was renamed, removed or replaced by another process; writing continues in the file at \
                     the path"
                );
            }
            Some(SwitchReason::Rotation) => {}
        }
        self.sync()?;
        if reason == Some(SwitchReason::Rotation) {
            let name = rotation::rotated_name(&path, (self.now)()).map_err(&rotating)?;
            fs::rename(&path, &name).map_err(&rotating)?;
            rotation::sync_directory(&path).map_err(&rotating)?;
            let (path, rotated) = (self.options.path.display(), name.display());
            tracing::info!(code = "file-rotated", %path, %rotated, "{path} was rotated to {rotated}");
        }
        if reason.is_some() {
            self.open = Some(self.at_path().map_err(&opening)?);
            self.has_rotated = true;
        }
        let Some(open) = &mut self.open else { return Ok(None) };
        if reason.is_none() {
            open.go_to_end().map_err(&looking)?;
        }
        let mark = open.mark().map_err(&looking)?;
        Ok(Some(Resume { position: self.flushed, mark }))
    }

    fn push(&mut self, item: &Item<'_>) {
        self.push_all(&[*item]);
    }

    fn push_all(&mut self, items: &[Item<'_>]) {
        match self.options.format {
            // Copying is not worth a thread.
            Rendering::Raw => {
                for item in items {
                    self.collected.add(|bytes| {
                        bytes.extend_from_slice(item.raw);
                        bytes.push(b'\n');
                    });
                }
            }
            Rendering::Json => self.collected.add_all(items, |bytes, item| item.write_record(bytes)),
        }
        self.behind.extend(items.iter().map(|item| item.behind));
    }

    fn collected(&self) -> usize {
        self.collected.bytes().len()
    }

    fn chunk(&self) -> usize {
        const MOST: u64 = 1 << 20;
        let size = self.rotation.size.map_or(MOST, |size| (size / 4).clamp(1, MOST));
        usize::try_from(size).unwrap_or(usize::MAX)
    }

    fn flush(&mut self, behind: Position, at_once: bool) -> Result<Option<Resume>, SinkError> {
        let writing = self.error("write");
        let Some(open) = &mut self.open else {
            return Err(writing(io::Error::other("the file is not open")));
        };
        if !self.collected.is_empty() {
            open.append(self.collected.bytes()).map_err(&writing)?;
            if let Some(every) = self.rotation.every {
                open.period.get_or_insert_with(|| every.of((self.now)()));
            }
        }
        self.collected.clear();
        self.behind.clear();
        self.flushed = behind;
        let is_due = match (self.options.fsync, open.unsafe_since) {
            (_, None) => false,
            (Syncing::Batch, _) => true,
            (Syncing::Interval, Some(since)) => at_once || since.elapsed() >= self.options.interval(),
        };
        if is_due {
            self.sync()?;
        }
        let open = self.open.as_ref().filter(|open| open.safe == open.written);
        let mark = open.map(Open::mark).transpose().map_err(self.error("read"))?;
        Ok(mark.map(|mark| Resume { position: behind, mark }))
    }
}

impl FileSink {
    /// Handles the bytes behind the end of what we have written. Returns false where the next flush
    /// will, or where there are no lines yet to compare them with.
    fn look_behind(&mut self, open: &mut Open, reason: Option<SwitchReason>) -> io::Result<bool> {
        let is_renamed = reason == Some(SwitchReason::Renamed);
        match open.tail(self.collected.bytes(), is_renamed)? {
            Tail::None => {}
            Tail::Unknown => return Ok(false),
            Tail::Ours if is_renamed => open.cut_back()?,
            Tail::Ours => {
                open.cut_trailing_zeros()?;
                return Ok(false);
            }
            Tail::Foreign { ours } if ours > 0 => {
                // Whole lines of ours are there already; written again, since they may not be on
                // the disk.
                open.rewrite(&self.collected.bytes()[..ours])?;
                let lines = self.collected.remove(ours);
                self.flushed = self.behind.drain(..lines).next_back().unwrap_or(self.flushed);
            }
            Tail::Foreign { .. } => {}
        }
        Ok(true)
    }
}

/// Opens the file, or creates it.
///
/// A new file has no permission until it has its owner, and its mode last of all. So an empty file
/// without any permission is one that was never finished, because an attempt failed or was
/// interrupted: it is made anew.
fn open(path: &Path, mode: u32, owner: OwnerIds) -> io::Result<File> {
    if fs::metadata(path)
        .is_ok_and(|found| found.is_file() && found.len() == 0 && found.permissions().mode() & 0o777 == 0)
    {
        fs::remove_file(path)?;
    }
    let mut opening = File::options();
    opening.read(true).write(true);
    let file = match opening.clone().create_new(true).mode(0o000).open(path) {
        Ok(file) => {
            rotation::set_access(&file, mode, owner)?;
            file
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => opening.open(path)?,
        Err(error) => return Err(error),
    };
    if file.metadata()?.len() == 0 {
        // The mode and the name must survive a power loss as well. An earlier attempt may have
        // failed at that.
        file.sync_all()?;
        rotation::sync_directory(path)?;
    }
    Ok(file)
}

/// Locks the file for this process and this sink, until it is closed. The lock keeps out what asks
/// for it, another daemon or another sink, and nothing that reads, renames or compresses.
fn lock(file: &File) -> io::Result<()> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(io::Error::other(
            "another process or another sink has locked it and may be writing to it; stop that one, or give each its \
             own file",
        )),
        // Not every file system supports locks.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
    }
}

#[cfg(test)]
mod tests;
