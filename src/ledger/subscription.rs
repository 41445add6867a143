//! A sink as the ledger knows it: what it takes, how far it has come, and what waits for it.

use crate::wire::event::Stream;

/// The lines that a sink takes. Sinks are known by name, under which their position is kept.
#[derive(Clone, Debug)]
pub struct Subscription {
    /// The configured name.
    pub sink: String,
    /// Type of the sink, since a position means something to one type only.
    pub kind: &'static str,
    /// The streams it takes.
    pub streams: Vec<Stream>,
    /// The sources it takes; all when none are named.
    pub sources: Option<Vec<String>>,
    /// Whether it loses its oldest lines rather than letting the backlog become full.
    pub skips: bool,
}

/// The streams of a batch that a sink gets, in the order of [`Stream::ALL`].
pub type Streams = [bool; Stream::ALL.len()];

impl Subscription {
    /// Returns whether it takes lines of that source and stream.
    pub fn wants(&self, source: &str, stream: Stream) -> bool {
        self.streams.contains(&stream)
            && self.sources.as_ref().is_none_or(|sources| sources.iter().any(|known| known == source))
    }
}

/// Position of a sink: every line before this one is safe in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// The first batch that is not wholly delivered.
    pub batch: i64,
    /// Number of lines of that batch that are.
    pub line: u32,
}

/// Position that a sink had recorded last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resume {
    /// Position at which to continue.
    pub position: Position,
    /// The sink's own mark of that position; empty for a new sink.
    pub mark: Vec<u8>,
}

/// Lines that wait for one sink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// Number of lines of the batches that the sink does not have wholly.
    pub events: u64,
    /// Time at which the oldest of these batches arrived, in milliseconds since the Unix epoch.
    pub oldest: Option<i64>,
}

/// Lines that a sink lost because it did not keep up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Number of lines that it would have got.
    pub events: u64,
    /// Time at which the oldest of them arrived, in milliseconds since the Unix epoch; 0 without
    /// any.
    pub oldest: i64,
    /// Time at which the newest of them arrived; 0 without any.
    pub newest: i64,
}

impl Skipped {
    /// Adds further losses.
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

/// Result of a request to forget a sink, in events that it takes and does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgetting {
    /// The ledger knows no sink of that name.
    Unknown,
    /// Nothing was given up: the sink is configured and does not keep the daemon from starting.
    Refused {
        /// Number of events that wait for it.
        pending: u64,
    },
    /// It is configured to take less than before. What it no longer takes was given up, the rest
    /// still waits.
    NoLongerWanted {
        /// Number of events that were given up.
        given_up: u64,
    },
    /// Everything was given up, and the sink is unknown from now on.
    All {
        /// Number of events that were given up.
        given_up: u64,
    },
}
