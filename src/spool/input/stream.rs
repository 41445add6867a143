//! Standard input, or any other stream: it is read once, and has no checkpoint.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::lines::split;
use super::{Chunk, ChunkLimits, Input, Origin};

/// Number of bytes that are read at a time.
const STEP: usize = 64 << 10;

/// A stream of lines.
pub struct Stream<R> {
    reader: R,
    limits: ChunkLimits,
    /// The last line that was read.
    last: Origin,
    is_skipping: bool,
    /// Bytes of lines that were not handed over.
    rest: Vec<u8>,
    has_ended: bool,
}

impl<R> Stream<R> {
    /// Creates the input of a stream with a name for people. Its reader must not buffer.
    pub fn new(reader: R, name: &str, limits: ChunkLimits) -> Self {
        let last = Origin { file: name.into(), line: 0 };
        Self { reader, limits, last, is_skipping: false, rest: Vec::new(), has_ended: false }
    }
}

impl<R: Read + AsFd + Send> Input for Stream<R> {
    fn resume(&mut self, _checkpoint: Option<&[u8]>) -> io::Result<()> {
        Ok(())
    }

    fn read(&mut self, timeout: Duration) -> io::Result<Chunk> {
        let mut chunk = Chunk::default();
        let mut room = self.limits;
        let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
        // A terminal or a pipe may stay silent for a long time.
        let is_readable = poll(&mut [PollFd::new(&self.reader, PollFlags::IN)], Some(&timeout))? > 0;
        if is_readable && !self.has_ended && self.rest.len() <= self.limits.line + 1 {
            let start = self.rest.len();
            self.rest.resize(start + STEP, 0);
            let read = self.reader.read(&mut self.rest[start..]);
            self.rest.truncate(start + *read.as_ref().unwrap_or(&0));
            self.has_ended = read? == 0;
        }
        let (used, lines) = split(
            &self.rest,
            self.has_ended,
            &self.last,
            &mut self.is_skipping,
            &mut chunk,
            &mut room,
            self.limits.line,
        );
        self.rest.drain(..used);
        self.last.line += lines;
        Ok(chunk)
    }

    fn is_at_end(&self) -> bool {
        self.has_ended && self.rest.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn lines_are_handed_over_as_they_come_and_the_last_one_at_the_end() {
        let (mut writer, reader) = UnixStream::pair().unwrap();
        let limits = ChunkLimits { line: 10, lines: 2, bytes: 1000 };
        let mut input = Stream::new(reader, "standard input", limits);
        let mut read = |timeout| {
            let chunk = input.read(Duration::from_millis(timeout)).unwrap();
            let shown = |line: &super::super::InputLine| {
                format!(
                    "{} {}{}",
                    line.origin.line,
                    String::from_utf8_lossy(&line.bytes),
                    if line.is_truncated { "…" } else { "" }
                )
            };
            (chunk.lines.iter().map(shown).collect::<Vec<_>>(), input.is_at_end())
        };
        assert_eq!(read(0), (vec![], false));
        writer.write_all(b"a\nb\nc\nhal").unwrap();
        assert_eq!(read(1000).0, ["1 a", "2 b"]);
        assert_eq!(read(0).0, ["3 c"]);
        writer.write_all(b"f a line is long\nd").unwrap();
        assert_eq!(read(1000), (vec!["4 half a lin…".to_owned()], false));
        drop(writer);
        assert_eq!(read(1000), (vec!["5 d".to_owned()], true));
    }
}
