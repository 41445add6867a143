//! The content of a file, by which it is known again, and its lines.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::compression::{Compression, unpacked};

/// Number of bytes of which a digest is made.
const SAMPLE: u64 = 1024;

/// A place in a content: how much of it has been read, and digests of its first bytes and of the
/// last ones that were read. They tell whether another file continues the same content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub(super) struct Place {
    /// Number of bytes that have been read.
    pub(super) offset: u64,
    /// Number of lines in them.
    pub(super) line: u64,
    /// Digest of the first bytes.
    head: String,
    /// Digest of the last bytes before the offset.
    tail: String,
}

/// An open file, inflated where its first bytes say so.
pub(super) struct Content {
    file: Arc<File>,
    /// A compressed file is read from its beginning on: the stream, and how far it was read.
    packed: Option<(Box<dyn BufRead + Send>, u64)>,
}

/// Reads a file from its beginning, at a position of its own.
struct FromStart {
    file: Arc<File>,
    offset: u64,
}

impl Read for FromStart {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}

impl Content {
    /// Reads a file by its descriptor, so that it does not matter what its name leads to meanwhile.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn of(file: &Arc<File>) -> io::Result<Self> {
        let from_start = FromStart { file: Arc::clone(file), offset: 0 };
        let (compression, stream) = unpacked(BufReader::new(from_start))?;
        let is_packed = compression != Compression::None;
        let stream: Box<dyn BufRead + Send> = Box::new(BufReader::with_capacity(64 << 10, stream));
        Ok(Self { file: Arc::clone(file), packed: is_packed.then_some((stream, 0)) })
    }

    /// Returns the present length of the file.
    pub(super) fn length(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Returns whether it is compressed: it does not grow then.
    pub(super) fn is_packed(&self) -> bool {
        self.packed.is_some()
    }

    /// Reads at an offset until `buffer` is full or the content ends. Offsets of a compressed file
    /// must not go back.
    pub(super) fn read_at(&mut self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut filled = 0;
        if let Some((stream, position)) = &mut self.packed {
            let skip = offset.checked_sub(*position).ok_or(io::ErrorKind::InvalidInput)?;
            *position += io::copy(&mut stream.by_ref().take(skip), &mut io::sink())?;
            while filled < buffer.len() && *position >= offset {
                match stream.read(&mut buffer[filled..])? {
                    0 => break,
                    read => filled += read,
                }
            }
            *position += filled as u64;
            return Ok(filled);
        }
        while filled < buffer.len() {
            match self.file.read_at(&mut buffer[filled..], offset + filled as u64)? {
                0 => break,
                read => filled += read,
            }
        }
        Ok(filled)
    }

    /// Returns the content of a file, and the last bytes before a place, if it begins with what was
    /// read up to there.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn continuing(file: &Arc<File>, place: &Place) -> io::Result<Option<(Self, Vec<u8>)>> {
        let mut content = Self::of(file)?;
        if content.digest(0, place.offset.min(SAMPLE))?.as_deref() != Some(&*place.head) {
            return Ok(None);
        }
        if content.is_packed() {
            content = Self::of(file)?;
        }
        let recent = content.before(place.offset)?;
        let continues = recent.as_ref().is_some_and(|recent| digest(recent) == place.tail);
        Ok(recent.filter(|_| continues).map(|recent| (content, recent)))
    }

    /// Returns the last bytes before an offset, of which a place has the digest; none when it ends
    /// before.
    pub(super) fn before(&mut self, offset: u64) -> io::Result<Option<Vec<u8>>> {
        let length = offset.min(SAMPLE);
        self.bytes(offset - length, length)
    }

    /// Returns whether a file is the beginning of another one, or all of it. Both are uncompressed
    /// then.
    ///
    /// # Errors
    /// When one of them cannot be read.
    pub(super) fn is_copy(file: &Arc<File>, other: &Arc<File>) -> io::Result<bool> {
        let (mut one, mut other) = (Self::of(file)?, Self::of(other)?);
        let length = one.length()?;
        if one.is_packed() || other.is_packed() || length > other.length()? {
            return Ok(false);
        }
        for from in [0, length.saturating_sub(SAMPLE)] {
            let length = length.min(SAMPLE);
            if one.digest(from, length)? != other.digest(from, length)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn bytes(&mut self, from: u64, length: u64) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        let is_whole = self.read_at(&mut bytes, from)? == bytes.len();
        Ok(is_whole.then_some(bytes))
    }

    fn digest(&mut self, from: u64, length: u64) -> io::Result<Option<String>> {
        Ok(self.bytes(from, length)?.map(|bytes| digest(&bytes)))
    }
}

fn digest(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..32].to_owned()
}

impl Place {
    /// Returns the place behind the first bytes of a file, whose lines are not counted.
    pub(super) fn at(content: &mut Content, offset: u64) -> io::Result<Self> {
        let gone = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let head = content.digest(0, offset.min(SAMPLE))?.ok_or_else(gone)?;
        let tail = content.before(offset)?.map(|recent| digest(&recent)).ok_or_else(gone)?;
        Ok(Self { offset, line: 0, head, tail })
    }

    /// Returns whether an uncompressed file still has the bytes before this place.
    pub(super) fn is_in(&self, content: &mut Content) -> io::Result<bool> {
        let head = content.digest(0, self.offset.min(SAMPLE))?;
        let tail = content.before(self.offset)?.map(|recent| digest(&recent));
        Ok(self.offset == 0 || (head.as_ref(), tail.as_ref()) == (Some(&self.head), Some(&self.tail)))
    }

    /// Moves behind further bytes, which hold that many lines. `recent` are the last bytes before
    /// it, and become those before the new place.
    pub(super) fn advance(&mut self, bytes: &[u8], lines: u64, recent: &mut Vec<u8>) {
        let sample = usize::try_from(SAMPLE).unwrap_or(usize::MAX);
        recent.extend_from_slice(&bytes[bytes.len().saturating_sub(sample)..]);
        if self.offset < SAMPLE {
            let missing = sample - usize::try_from(self.offset).unwrap_or(sample);
            let kept = recent.len() - bytes.len().min(sample);
            let first = [&recent[..kept], &bytes[..bytes.len().min(missing)]].concat();
            self.head = digest(&first);
        }
        recent.drain(..recent.len().saturating_sub(sample));
        self.tail = digest(recent);
        self.offset += bytes.len() as u64;
        self.line += lines;
    }
}
