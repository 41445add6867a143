//! Files that grow and are rotated.
//!
//! A file is known by its content: by digests of its first bytes and of the last ones that were
//! read. So it is found again under whatever name, also as the copy that `copytruncate` makes, also
//! compressed, and an inode that was given to another file misleads nobody. Every file that
//! continues something known is read from there, and every new one from its beginning; one that was
//! rotated before the newer ones.
//!
//! The checkpoint has a place for each file that is still there. What was appended to a file and
//! removed with it before it was read is lost, which is logged.

mod files;

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use self::files::{FileId, Found, find};
use super::content::{Content, Place};
use super::lines::{Position, split};
use super::{Chunk, ChunkLimits, Input};
use crate::escape::escape;

/// Time between two looks at the files.
const INTERVAL: Duration = Duration::from_millis(200);

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

    /// Finds the files, and which of them are known.
    fn look(&mut self) -> io::Result<()> {
        let files = find(&self.options.path)?;
        // Nothing is known of what was neither read nor opened, and its inode may be another file's.
        self.tracks.retain(|track| track.known.place.offset > 0 || track.content.is_some());
        let mut owners: Vec<Option<usize>> = vec![None; files.len()];
        let mut claimed = vec![false; self.tracks.len()];
        // By the hint first, which is right nearly always.
        for (file, owner) in files.iter().zip(&mut owners) {
            let hinted =
                self.tracks.iter_mut().position(|track| track.known.id == file.id && track.stays(file));
            if let Some(at) = hinted.filter(|at| !claimed[*at]) {
                claimed[at] = true;
                *owner = Some(at);
            }
        }
        // Then by the content.
        for (at, (track, claimed)) in self.tracks.iter_mut().zip(&mut claimed).enumerate() {
            if *claimed {
                continue;
            }
            for (file, owner) in files.iter().zip(&mut owners).filter(|(_, owner)| owner.is_none()) {
                // What cannot be read now may be readable later.
                if track.continues_in(file)? {
                    *claimed = true;
                    *owner = Some(at);
                    break;
                }
            }
        }
        self.drop_gone(&claimed, &mut owners);
        for (file, owner) in files.iter().zip(&owners) {
            if let Some(at) = owner {
                self.tracks[*at].found(file);
            }
        }
        for (file, _) in files.iter().zip(&owners).filter(|(_, owner)| owner.is_none()) {
            self.add(file)?;
        }
        if self.state.since.is_none() {
            let rotated = files.iter().filter(|file| !file.is_active).map(|file| file.modified);
            // File systems round times, so what is written from now on can seem to be a little older.
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let now = i64::try_from(now.saturating_sub(Duration::from_secs(1)).as_nanos()).unwrap_or(0);
            self.state.since = Some(rotated.max().map_or(now, |rotated| rotated.max(now)));
        }
        Ok(())
    }

    /// Drops the files that are no longer found, unless they are open and have more to read.
    fn drop_gone(&mut self, claimed: &[bool], owners: &mut [Option<usize>]) {
        let mut moved = vec![None; self.tracks.len()];
        let mut kept = Vec::new();
        for (at, mut track) in std::mem::take(&mut self.tracks).into_iter().enumerate() {
            if !claimed[at] {
                track.found = None;
                if !track.has_rest() {
                    track.report_loss();
                    continue;
                }
            }
            moved[at] = Some(kept.len());
            kept.push(track);
        }
        self.tracks = kept;
        owners.iter_mut().for_each(|owner| *owner = owner.and_then(|at| moved[at]));
    }

    /// Begins with a file that is not known.
    fn add(&mut self, file: &Found) -> io::Result<()> {
        let is_first_look = self.state.since.is_none();
        if !file.is_active {
            let known = (file.id, file.version());
            if is_first_look
                || self.state.since.is_some_and(|since| file.modified <= since)
                || self.ignored.contains(&known)
            {
                return Ok(());
            }
            let mut others = self.tracks.iter().filter_map(|track| track.found.as_ref());
            // One that is made just now, before the original is truncated.
            let is_copy = others.any(|other| file.length <= other.length && is_copy(file, other));
            if is_copy || self.is_of_many() {
                self.ignored.retain(|(id, _)| *id != file.id);
                self.ignored.push(known);
                return Ok(());
            }
        }
        let (path, place) = (file.path.clone(), Place::default());
        let known = Known { path, id: file.id, place, is_skipping: false, is_done: false };
        let mut track = Track::new(known);
        track.found = Some(file.clone());
        if is_first_look && self.options.from_end {
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
            self.look()?;
            let mut chunk = Chunk::default();
            self.read_into(&mut chunk)?;
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
    fn stays(&mut self, file: &Found) -> bool {
        let is_unchanged = self.found.as_ref().is_some_and(|found| found.version() == file.version());
        if is_unchanged {
            return true;
        }
        if self.content.is_none() {
            match Content::continuing(&file.path, &self.known.place) {
                Ok(Some((content, recent))) => {
                    (self.content, self.recent) = (Some(content), recent);
                    return true;
                }
                // One that cannot be read now stays what it was.
                Ok(None) => return false,
                Err(_) => return true,
            }
        }
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
            _ if place.offset > 0 => Content::continuing(&file.path, place)?,
            // Nothing was read of it, but it is open.
            Some(content) => {
                let length = content.file().metadata()?.len();
                let is_same =
                    length > 0 && Content::continuing(&file.path, &Place::at(content, length)?)?.is_some();
                if is_same { Some((Content::open(&file.path)?, Vec::new())) } else { None }
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
            Some(content) => content.file().metadata().is_ok_and(|metadata| metadata.len() < *offset),
            None => !is_done && *offset > 0,
        };
        if is_lost {
            let path = escape(&path.display().to_string()).into_owned();
            tracing::warn!(
                code = "input-lost",
                path,
                offset,
                "{path} is gone or was truncated, and no other file continues it: what stood behind byte {offset} and \
                 was not read yet is lost"
            );
        }
    }

    /// Begins behind what is there.
    fn skip_to(&mut self, file: &Found) -> io::Result<()> {
        let mut content = Content::open(&file.path)?;
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
            // Also the last bytes before the place, when it is not at the beginning.
            let (content, recent) = if self.known.place.offset == 0 {
                (Content::open(&self.known.path)?, Vec::new())
            } else {
                match Content::continuing(&self.known.path, &self.known.place)? {
                    Some(opened) => opened,
                    None => return Ok(false),
                }
            };
            (self.content, self.recent) = (Some(content), recent);
        }
        let Some(content) = &mut self.content else { return Ok(false) };
        let mut block = vec![0; (options.limits.line + 2).max(room.bytes.min(256 << 10))];
        let read = content.read_at(&mut block, self.known.place.offset)?;
        let is_end = read < block.len();
        block.truncate(read);
        let is_over = is_end && self.is_over(options);
        let file = self.known.path.display().to_string();
        let position = Position { file: file.into(), line: self.known.place.line };
        let (used, lines) =
            split(&block, is_over, &position, &mut self.known.is_skipping, chunk, room, options.limits.line);
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

/// Returns whether a file has the same bytes as another, as far as it goes. One that cannot be read
/// is looked at again.
fn is_copy(file: &Found, other: &Found) -> bool {
    file.id != other.id && Content::is_copy(&file.path, &other.path).unwrap_or(true)
}

#[cfg(test)]
mod tests;
