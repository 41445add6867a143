//! The contract of an input, and what it reads.

mod content;
pub mod follow;
mod lines;
pub mod socket;
pub mod stream;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Position of an input line, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The file or socket.
    pub file: Arc<str>,
    /// Number of the line in it, from 1; of the message for a socket.
    pub line: u64,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, line {}", self.file, self.line)
    }
}

/// One line as it was read, without its terminator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputLine {
    /// Where it was read.
    pub origin: Origin,
    /// Its bytes; of a line that is longer than allowed, the first ones.
    pub bytes: Vec<u8>,
    /// The line is longer than allowed, and `bytes` is only its beginning.
    pub is_truncated: bool,
}

/// Lines that were read together, and the state of the input behind them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// The lines, in their order.
    pub lines: Vec<InputLine>,
    /// State from which the input continues when the lines are safe, for [`Input::resume`]; none
    /// for an input that cannot be read again.
    pub checkpoint: Option<Vec<u8>>,
}

/// Limits of what is read at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkLimits {
    /// Maximum length of a line in bytes; of a longer one only its beginning is kept.
    pub line: usize,
    /// Maximum number of lines in a chunk.
    pub lines: usize,
    /// Number of bytes from which on a chunk takes no further line.
    pub bytes: usize,
}

impl Default for ChunkLimits {
    fn default() -> Self {
        Self { line: 256 << 10, lines: 2000, bytes: 1 << 20 }
    }
}

/// A source of lines, read by a thread of its own.
///
/// The caller makes a chunk safe, with its checkpoint in the same transaction, before it asks
/// for the next one. While it does not ask, nothing is read: that is how a full spool holds the
/// input back.
pub trait Input: Send {
    /// Continues at a checkpoint: the last one that was made safe, none at the first start. Called
    /// once, before anything is read.
    ///
    /// # Errors
    /// When the checkpoint cannot be read, or the input cannot be opened.
    fn resume(&mut self, checkpoint: Option<&[u8]>) -> io::Result<()>;

    /// Returns what can be read now, or waits at most `timeout` for the first line. An empty chunk
    /// with a checkpoint records progress without lines; one without is nothing new.
    ///
    /// # Errors
    /// When reading failed. The next call tries again.
    fn read(&mut self, timeout: Duration) -> io::Result<Chunk>;

    /// Returns whether nothing will ever follow, as at the end of standard input.
    fn is_at_end(&self) -> bool {
        false
    }
}
