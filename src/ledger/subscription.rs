//! A sink as the ledger knows it: what it takes, how far it has come, and what waits for it.

use crate::wire::event::Stream;

/// Which lines a sink takes. Sinks are known by name; the name is what their position is kept under.
#[derive(Clone, Debug)]
pub struct Subscription {
    /// The configured name.
    pub sink: String,
    /// The type of the sink, since a position means something to one type only.
    pub kind: &'static str,
    /// The streams it takes.
    pub streams: Vec<Stream>,
    /// The sources it takes; all when none are named.
    pub sources: Option<Vec<String>>,
    /// Whether it loses its oldest lines rather than letting the backlog become full.
    pub skips: bool,
}

/// Which streams of a batch a sink gets, in the order of [`Stream::ALL`].
pub type Streams = [bool; Stream::ALL.len()];

impl Subscription {
    /// Whether it takes lines of that source and stream.
    pub fn wants(&self, source: &str, stream: Stream) -> bool {
        self.streams.contains(&stream)
            && self.sources.as_ref().is_none_or(|sources| sources.iter().any(|known| known == source))
    }
}

/// How far a sink has come: every line before this one is safe in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// The first batch that is not wholly delivered.
    pub batch: i64,
    /// Number of lines of that batch that are.
    pub line: u32,
}

/// What a sink had recorded last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resume {
    /// Where to go on.
    pub position: Position,
    /// What the sink itself noted about that place; empty for a new sink.
    pub mark: Vec<u8>,
}

/// What waits for one sink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// Lines of the batches that the sink does not have wholly.
    pub events: u64,
    /// When the oldest of these batches arrived, in milliseconds since the Unix epoch.
    pub oldest: Option<i64>,
}

/// What a sink lost because it did not keep up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Lines that it wanted.
    pub events: u64,
    /// When the oldest of them arrived, in milliseconds since the Unix epoch; 0 without any.
    pub oldest: i64,
    /// When the newest of them arrived; 0 without any.
    pub newest: i64,
}

impl Skipped {
    /// Adds what it lost besides.
    pub fn add(&mut self, more: Self) {
        if self.events == 0 {
            *self = more;
        } else if more.events > 0 {
            self.events += more.events;
            self.oldest = self.oldest.min(more.oldest);
            self.newest = self.newest.max(more.newest);
        }
    }
}

/// What became of the wish to forget a sink, in events that it wanted and has not had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgetting {
    /// The ledger knows no sink of that name.
    Unknown,
    /// Nothing was given up: it is configured, and nothing is in the way of a start.
    Refused {
        /// What waits for it.
        pending: u64,
    },
    /// It is configured to take less than before. What it no longer takes was given up, the rest waits on.
    NoLongerWanted {
        /// What was given up.
        given_up: u64,
    },
    /// Everything was given up, and the sink is unknown from now on.
    All {
        /// What was given up.
        given_up: u64,
    },
}
