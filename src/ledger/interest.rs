//! What a sink wants, also of batches that were committed while it was configured otherwise.
//!
//! A sink that is made to take more starts at the present with what is new to it, as a sink that is added does:
//! of the batches that wait it gets exactly what it wanted of them when they were committed. So the ledger keeps
//! with each sink what it wants, and what it wanted before for as long as batches from before wait.

use rusqlite::types::Type;
use serde::{Deserialize, Serialize};

use super::{Position, Subscription};
use crate::wire::event::Stream;

/// A configured sink, and what the ledger remembers of it.
#[derive(Clone, Debug)]
pub(super) struct Interest {
    pub(super) subscription: Subscription,
    pub(super) remembered: Remembered,
}

/// What a sink wants and wanted, as the table has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Remembered {
    #[serde(flatten)]
    wants: Wants,
    /// Of batches before a position only what was wanted then, too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    earlier: Vec<Earlier>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Wants {
    /// By name.
    streams: Vec<String>,
    /// All when none are named.
    sources: Option<Vec<String>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Earlier {
    before: i64,
    #[serde(flatten)]
    wants: Wants,
}

impl Interest {
    /// A sink that has no past, or one of which nothing is known.
    pub(super) fn new(subscription: Subscription) -> Self {
        let remembered = Remembered { wants: Wants::of(&subscription), earlier: Vec::new() };
        Self { subscription, remembered }
    }

    /// A sink with a past. It is at `position`; `present` is the position of the next batch that is committed.
    pub(super) fn going_on(
        subscription: Subscription,
        before: Remembered,
        position: Position,
        present: i64,
    ) -> Self {
        let Remembered { wants, mut earlier } = before;
        let mut interest = Self::new(subscription);
        if wants != interest.remembered.wants {
            earlier.push(Earlier { before: present, wants });
        }
        earlier.retain(|earlier| earlier.before > position.batch);
        interest.remembered.earlier = earlier;
        interest
    }

    /// Whether it wants lines of that source and stream in a batch.
    pub(super) fn wants(&self, batch: i64, source: &str, stream: Stream) -> bool {
        self.remembered.wants(batch, source, stream)
    }

    /// Whether it wants such lines now and did not when a batch was committed.
    pub(super) fn came_too_late(&self, batch: i64, source: &str, stream: Stream) -> bool {
        self.subscription.wants(source, stream) && !self.wants(batch, source, stream)
    }
}

impl Remembered {
    /// Whether the sink wants, or wanted, lines of that source and stream in a batch.
    pub(super) fn wants(&self, batch: i64, source: &str, stream: Stream) -> bool {
        let earlier = self.earlier.iter().filter(|earlier| batch < earlier.before);
        earlier.map(|earlier| &earlier.wants).chain([&self.wants]).all(|wants| wants.include(source, stream))
    }

    pub(super) fn write(&self) -> rusqlite::Result<String> {
        serde_json::to_string(self).map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))
    }

    pub(super) fn read(column: usize, text: &str) -> rusqlite::Result<Self> {
        serde_json::from_str(text)
            .map_err(|error| rusqlite::Error::FromSqlConversionFailure(column, Type::Text, error.into()))
    }
}

impl Wants {
    /// Sorted: the same in another order is no change.
    fn of(subscription: &Subscription) -> Self {
        let mut streams: Vec<_> =
            subscription.streams.iter().map(|stream| stream.as_str().to_owned()).collect();
        streams.sort();
        let mut sources = subscription.sources.clone();
        if let Some(sources) = &mut sources {
            sources.sort();
        }
        Self { streams, sources }
    }

    fn include(&self, source: &str, stream: Stream) -> bool {
        self.streams.iter().any(|known| known == stream.as_str())
            && self.sources.as_ref().is_none_or(|sources| sources.iter().any(|known| known == source))
    }
}
