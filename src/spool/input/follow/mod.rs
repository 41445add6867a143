//! Files that grow and are rotated.
//!
//! A file is known by its content: by digests of its first bytes and of the last ones that were
//! read. So it is found again under whatever name, also as the copy that `copytruncate` makes, also
//! compressed, and an inode that was given to another file does not mislead. Every file that
//! continues something known is read from there, and every new one from its beginning; one that was
//! rotated before the newer ones.
//!
//! The checkpoint has a place for each file that is still there, and for the last ones that are not.
//! What was appended to a file and
//! removed with it before it was read is lost, which is logged.

mod files;

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use self::files::{FileId, Files, Found, find};
use super::content::{Content, Place};
use super::lines::split;
use super::{Chunk, ChunkLimits, Input, Origin};
use crate::escape::escape;

/// Time between two looks at the files.
const INTERVAL: Duration = Duration::from_millis(200);

/// Maximum number of times that the files are looked at again, since they change all the time.
const MAX_LOOKS: u32 = 10;

/// Maximum number of files that are no longer found and are kept in the checkpoint.
const MAX_GONE: usize = 100;

/// Settings of an input.
#[derive(Clone, Debug)]
pub struct FollowOptions {
    /// A file, a directory, or a pattern with `*` and `?` in its last part.
    pub path: PathBuf,
    /// Files that are there at the first start begin with what is appended from then on.
    pub from_end: bool,
    /// The input ends when everything that is there has been read.
    pub until_end: bool,
    /// Limits of a chunk.
    pub limits: ChunkLimits,
    /// Time after which the last line of a rotated file counts although it has no terminator.
    pub quiet: Duration,
}

impl FollowOptions {
    /// Returns the defaults for a path.
    pub fn new(path: PathBuf) -> Self {
        let (from_end, until_end) = (false, false);
        Self { path, from_end, until_end, limits: ChunkLimits::default(), quiet: Duration::from_secs(5) }
    }
}

/// The input.
pub struct Follow {
    options: FollowOptions,
    state: State,
    tracks: Vec<Track>,
    /// Files that are not read, as they were when that was decided.
    ignored: Vec<(FileId, (u64, i64))>,
    is_at_end: bool,
}

/// The checkpoint.
#[derive(Debug, Default, Deserialize, Serialize)]
struct State {
    /// Rotated files that were last changed up to this time had been there before the first start:
    /// in nanoseconds since the Unix epoch.
    since: Option<i64>,
    files: Vec<Known>,
    /// Files that are no longer found, the newest last: a disk that is mounted later brings them
    /// back.
    #[serde(default)]
    gone: Vec<Known>,
}

/// A file in the checkpoint.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Known {
    path: PathBuf,
    id: FileId,
    #[serde(flatten)]
    place: Place,
    /// The place is within a line that is too long.
    is_skipping: bool,
    /// It was rotated, and then read to its end.
    is_done: bool,
}

/// A file that is being read.
struct Track {
    known: Known,
    content: Option<Content>,
    /// The last bytes before the place.
    recent: Vec<u8>,
    /// The file as it was found last.
    found: Option<Found>,
    /// Everything has been read of it as it was found last.
    is_read: bool,
}

impl Track {
    fn new(known: Known) -> Self {
        Self { known, content: None, recent: Vec::new(), found: None, is_read: false }
    }
}

impl Follow {
    /// Creates the input; nothing is opened yet.
    pub fn new(options: FollowOptions) -> Self {
        let (state, tracks, ignored) = (State::default(), Vec::new(), Vec::new());
        Self { options, state, tracks, ignored, is_at_end: false }
    }

    /// Finds the files, and which of them are known. Returns why one cannot be read.
    ///
    /// Files are renamed, and copied and truncated, while they are looked at. So what contradicts
    /// what is known is looked at again.
    fn look(&mut self) -> io::Result<io::Result<()>> {
        for attempt in 0.. {
            let files = find(&self.options.path)?;
            if self.match_files(&files, attempt > 0)? {
                return Ok(files.error());
            }
            if attempt == MAX_LOOKS {
                break;
            }
        }
        Ok(Ok(()))
    }

    /// Finds out which files are known, and begins with the others. Returns false when something
    /// changed meanwhile; a file that is not found is believed to be gone at the second look only.
    fn match_files(&mut self, files: &Files, is_second: bool) -> io::Result<bool> {
        let Files { found: files, unreadable } = files;
        // Nothing is known of what was neither read nor opened, and its inode may be another file's.
        self.tracks.retain(|track| track.known.place.offset > 0 || track.content.is_some());
        let mut owners: Vec<Option<usize>> = vec![None; files.len()];
        // What cannot be opened now is not gone.
        let is_unreadable = |track: &Track| unreadable.iter().any(|(path, _)| *path == track.known.path);
        let mut claimed: Vec<bool> = self.tracks.iter().map(is_unreadable).collect();
        // By the hint first, which is right nearly always.
        for (at, (file, owner)) in files.iter().zip(&mut owners).enumerate() {
            if files[..at].iter().any(|other| other.id == file.id) {
                return Ok(false);
            }
            for (at, track) in self.tracks.iter_mut().enumerate() {
                if track.known.id == file.id && !claimed[at] && track.stays(file)? {
                    claimed[at] = true;
                    *owner = Some(at);
                    break;
                }
            }
        }
        // Then by the content.
        for (at, (track, claimed)) in self.tracks.iter_mut().zip(&mut claimed).enumerate() {
            for (file, owner) in files.iter().zip(&mut owners).filter(|(_, owner)| owner.is_none()) {
                if !*claimed && track.continues_in(file)? {
                    *claimed = true;
                    *owner = Some(at);
                }
            }
        }
        if claimed.contains(&false) && !is_second {
            return Ok(false);
        }
        let unknown: Vec<&Found> =
            files.iter().zip(&owners).filter(|(_, owner)| owner.is_none()).map(|(file, _)| file).collect();
        for (file, owner) in files.iter().zip(&owners) {
            if let Some(at) = owner {
                self.tracks[*at].found(file);
            }
        }
        let mut new = Vec::new();
        for file in &unknown {
            if file.is_active || self.is_unread(file, &unknown) {
                new.push(*file);
            }
        }
        // A file that was truncated since it was looked at may have been copied before.
        if new.iter().any(|file| !file.is_active) && !self.tracks.iter_mut().all(Track::is_intact) {
            return Ok(false);
        }
        self.drop_gone(&claimed);
        for file in new {
            if !self.recall(file)? {
                self.add(file)?;
            }
        }
        if self.state.since.is_none() {
            let rotated = files.iter().filter(|file| !file.is_active).map(|file| file.modified);
            // File systems round times, so what is written from now on can seem to be a little older.
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let now = i64::try_from(now.saturating_sub(Duration::from_secs(1)).as_nanos()).unwrap_or(0);
            self.state.since = Some(rotated.max().map_or(now, |rotated| rotated.max(now)));
        }
        Ok(true)
    }

    /// Drops the files that are no longer found, unless they are open and have more to read.
    fn drop_gone(&mut self, claimed: &[bool]) {
        let mut claimed = claimed.iter();
        let gone = &mut self.state.gone;
        self.tracks.retain_mut(|track| {
            if claimed.next() == Some(&true) {
                return true;
            }
            track.found = None;
            let has_rest = track.has_rest();
            if !has_rest {
                track.report_loss();
                gone.push(track.known.clone());
            }
            has_rest
        });
        gone.drain(..gone.len().saturating_sub(MAX_GONE));
    }

    /// Goes on with a file that was gone, if that is it.
    fn recall(&mut self, file: &Found) -> io::Result<bool> {
        for (at, known) in self.state.gone.iter().enumerate().filter(|(_, known)| known.place.offset > 0) {
            if let Some((content, recent)) = Content::continuing(&file.file, &known.place)? {
                let mut track = Track::new(self.state.gone.remove(at));
                (track.content, track.recent, track.known.id) = (Some(content), recent, file.id);
                track.found(file);
                self.tracks.push(track);
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns whether a rotated file that is not known has lines that were never read.
    fn is_unread(&mut self, file: &Found, unknown: &[&Found]) -> bool {
        let version = (file.id, file.version());
        let is_old = self.state.since.is_none_or(|since| file.modified <= since);
        if is_old || self.is_of_many() || self.ignored.contains(&version) || file.length == 0 {
            return false;
        }
        // A copy that is made just now, before the original is truncated. One that cannot be read is
        // looked at again.
        let is_copy =
            |other: &Found| other.id != file.id && Content::is_copy(&file.file, &other.file).unwrap_or(true);
        let known = self.tracks.iter().find(|track| track.found.as_ref().is_some_and(is_copy));
        if known.is_some_and(|track| track.known.place.offset >= file.length) {
            self.ignored.retain(|(id, _)| *id != file.id);
            self.ignored.push(version);
        }
        known.is_none() && !unknown.iter().any(|other| other.is_active && is_copy(other))
    }

    /// Begins with a file.
    fn add(&mut self, file: &Found) -> io::Result<()> {
        let (path, place) = (file.path.clone(), Place::default());
        let known = Known { path, id: file.id, place, is_skipping: false, is_done: false };
        let mut track = Track::new(known);
        track.found = Some(file.clone());
        if self.state.since.is_none() && self.options.from_end {
            track.skip_to(file)?;
        }
        self.tracks.push(track);
        Ok(())
    }

    /// Returns whether the path stands for several files, so that a rotated one belongs to none of
    /// them for its name alone.
    fn is_of_many(&self) -> bool {
        let name = self.options.path.file_name().unwrap_or_default().to_string_lossy();
        name.contains(['*', '?']) || self.options.path.is_dir()
    }

    /// Adds what can be read now to a chunk.
    fn read_into(&mut self, chunk: &mut Chunk) -> io::Result<()> {
        let mut order: Vec<usize> = (0..self.tracks.len()).collect();
        order.sort_by_key(|at| self.tracks[*at].rank());
        let (mut room, mut failed) = (self.options.limits, Ok(()));
        for at in order {
            let track = &mut self.tracks[at];
            while room.lines > 0 && room.bytes > 0 {
                match track.read_into(chunk, &mut room, &self.options) {
                    Ok(true) => {}
                    Ok(false) => break,
                    // The other files are read all the same.
                    Err(error) => {
                        failed = Err(error);
                        break;
                    }
                }
            }
        }
        if chunk.lines.is_empty() { failed } else { Ok(()) }
    }

    fn checkpoint(&mut self) -> io::Result<Vec<u8>> {
        self.state.files = self.tracks.iter().map(|track| track.known.clone()).collect();
        serde_json::to_vec(&self.state).map_err(io::Error::other)
    }
}

impl Input for Follow {
    fn resume(&mut self, checkpoint: Option<&[u8]>) -> io::Result<()> {
        if let Some(checkpoint) = checkpoint {
            self.state = serde_json::from_slice(checkpoint).map_err(io::Error::other)?;
            self.tracks = std::mem::take(&mut self.state.files).into_iter().map(Track::new).collect();
        }
        Ok(())
    }

    fn read(&mut self, timeout: Duration) -> io::Result<Chunk> {
        let deadline = Instant::now() + timeout;
        loop {
            let before = self.checkpoint()?;
            let looked = self.look()?;
            let mut chunk = Chunk::default();
            self.read_into(&mut chunk)?;
            if chunk.lines.is_empty() {
                looked?;
            }
            let after = self.checkpoint()?;
            if after != before {
                chunk.checkpoint = Some(after);
                return Ok(chunk);
            }
            if self.options.until_end {
                self.is_at_end = true;
                return Ok(chunk);
            }
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Ok(chunk);
            }
            std::thread::sleep(rest.min(INTERVAL));
        }
    }

    fn is_at_end(&self) -> bool {
        self.is_at_end
    }
}

impl Track {
    /// Returns whether a file, which has the inode of this one, still has what was read of it.
    fn stays(&mut self, file: &Found) -> io::Result<bool> {
        if self.found.as_ref().is_some_and(|found| found.version() == file.version()) {
            return Ok(true);
        }
        if self.content.is_none() {
            let Some((content, recent)) = Content::continuing(&file.file, &self.known.place)? else {
                return Ok(false);
            };
            (self.content, self.recent) = (Some(content), recent);
        }
        Ok(self.is_intact())
    }

    /// Returns whether what was read is still in the open file.
    fn is_intact(&mut self) -> bool {
        match &mut self.content {
            Some(content) if !content.is_packed() => self.known.place.is_in(content).unwrap_or(true),
            _ => true,
        }
    }

    /// Returns whether a file with another inode has the content of this one, and goes on with it
    /// then.
    fn continues_in(&mut self, file: &Found) -> io::Result<bool> {
        let place = &self.known.place;
        let continuing = match &mut self.content {
            _ if place.offset > 0 => Content::continuing(&file.file, place)?,
            // Nothing was read of it, but it is open.
            Some(content) => {
                let length = content.length()?;
                let is_same =
                    length > 0 && Content::continuing(&file.file, &Place::at(content, length)?)?.is_some();
                if is_same { Some((Content::of(&file.file)?, Vec::new())) } else { None }
            }
            None => None,
        };
        let Some((content, recent)) = continuing else { return Ok(false) };
        (self.content, self.recent, self.known.id) = (Some(content), recent, file.id);
        Ok(true)
    }

    /// Records how the file was found.
    fn found(&mut self, file: &Found) {
        let version = self.found.as_ref().map(Found::version);
        self.is_read &= version == Some(file.version());
        self.known.is_done = self.is_read && !file.is_active;
        if self.known.path != file.path {
            self.known.path.clone_from(&file.path);
        }
        self.found = Some(file.clone());
    }

    /// Files that are no longer found come first, then rotated ones, in the order of their last
    /// change.
    fn rank(&self) -> (bool, bool, i64) {
        match &self.found {
            None => (false, false, 0),
            Some(found) => (true, found.is_active, found.modified),
        }
    }

    /// Returns whether a file that is no longer found can be read further.
    fn has_rest(&mut self) -> bool {
        let Some(content) = &mut self.content else { return false };
        let is_intact = content.is_packed() || self.known.place.is_in(content).unwrap_or(false);
        is_intact && matches!(content.read_at(&mut [0], self.known.place.offset), Ok(1))
    }

    /// Reports bytes that may have been there and cannot be read any more.
    fn report_loss(&self) {
        let Known { path, place: Place { offset, .. }, is_done, .. } = &self.known;
        let is_lost = match &self.content {
            // What is open was read to its end, unless it was truncated.
            Some(content) => content.length().is_ok_and(|length| length < *offset),
            None => !is_done && *offset > 0,
        };
        if is_lost {
            let path = escape(&path.display().to_string()).into_owned();
            tracing::warn!(
                code = "input-lost",
                path,
                offset,
                "{path} is gone or was truncated, and no other file continues it: unless it comes back, \
                 what stood behind byte {offset} and was not read yet is lost"
            );
        }
    }

    /// Begins behind what is there.
    fn skip_to(&mut self, file: &Found) -> io::Result<()> {
        let mut content = Content::of(&file.file)?;
        let last = content.before(file.length)?.unwrap_or_default();
        self.known.is_skipping = last.last().is_some_and(|last| *last != b'\n');
        self.known.place = Place::at(&mut content, file.length)?;
        (self.content, self.recent) = (Some(content), last);
        Ok(())
    }

    /// Reads a block of lines into a chunk. Returns false when there is nothing to read now.
    fn read_into(
        &mut self,
        chunk: &mut Chunk,
        room: &mut ChunkLimits,
        options: &FollowOptions,
    ) -> io::Result<bool> {
        let length = self.found.as_ref().map_or(u64::MAX, |found| found.length);
        let is_packed = self.content.as_ref().is_some_and(Content::is_packed);
        if self.is_read || (self.content.is_some() && !is_packed && length <= self.known.place.offset) {
            return Ok(false);
        }
        if self.content.is_none() {
            let Some(found) = &self.found else { return Ok(false) };
            let opened = match self.known.place.offset {
                0 => Some((Content::of(&found.file)?, Vec::new())),
                _ => Content::continuing(&found.file, &self.known.place)?,
            };
            let Some((content, recent)) = opened else { return Ok(false) };
            (self.content, self.recent) = (Some(content), recent);
        }
        let Some(content) = &mut self.content else { return Ok(false) };
        let mut block = vec![0; (options.limits.line + 2).max(room.bytes.min(256 << 10))];
        let read = content.read_at(&mut block, self.known.place.offset)?;
        let is_end = read < block.len();
        block.truncate(read);
        let is_over = is_end && self.is_over(options);
        let file = self.known.path.display().to_string();
        let last = Origin { file: file.into(), line: self.known.place.line };
        let (used, lines) =
            split(&block, is_over, &last, &mut self.known.is_skipping, chunk, room, options.limits.line);
        if used == 0 {
            self.is_read = is_end;
            return Ok(false);
        }
        let Self { known, recent, .. } = self;
        known.place.advance(&block[..used], lines, recent);
        // A stream cannot go back to what was read and not used.
        if let Some(content) = &mut self.content
            && content.is_packed()
            && used < read
        {
            self.content = None;
        }
        Ok(true)
    }

    /// Returns whether nothing will be appended any more, so that the last line is whole.
    fn is_over(&self, options: &FollowOptions) -> bool {
        if options.until_end {
            return true;
        }
        match &self.found {
            None => true,
            Some(found) if found.is_active => false,
            Some(found) => {
                let modified = u64::try_from(found.modified).unwrap_or(0);
                let modified = SystemTime::UNIX_EPOCH + Duration::from_nanos(modified);
                modified.elapsed().is_ok_and(|quiet| quiet >= options.quiet)
            }
        }
    }
}

#[cfg(test)]
mod tests;
