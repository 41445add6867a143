//! Batches of lines, bounded in events, bytes and time.

use std::time::Duration;

use crate::wire::batch::lines;

/// Limits of a batch, which is sent at the first of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Maximum number of events. 500 by default; 0 counts as 1.
    pub events: usize,
    /// Maximum number of bytes before compression, line terminators included. 1 MiB by default. No
    /// body that is posted is longer.
    pub bytes: usize,
    /// Maximum time that the first event waits. 1 s by default.
    pub linger: Duration,
}

impl Default for BatchLimits {
    fn default() -> Self {
        Self { events: 500, bytes: 1 << 20, linger: Duration::from_secs(1) }
    }
}

/// Reason why bytes cannot be sent as one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LineError {
    /// A line feed would make it two lines.
    #[error("it holds a line feed, so that it cannot travel as one line")]
    LineFeed,
    /// A receiver skips blank lines.
    #[error("it is blank, so that the receiver would skip it")]
    Blank,
    /// It does not fit into any batch.
    #[error("its {bytes} bytes do not fit into a batch of at most {limit}")]
    TooLong {
        /// Its length in bytes, with its terminator.
        bytes: usize,
        /// [`BatchLimits::bytes`].
        limit: usize,
    },
}

impl BatchLimits {
    /// Checks whether `line` can be sent.
    ///
    /// # Errors
    /// See [`LineError`].
    pub fn admit(&self, line: &[u8]) -> Result<(), LineError> {
        if line.contains(&b'\n') {
            return Err(LineError::LineFeed);
        }
        if lines(line).next().is_none() {
            return Err(LineError::Blank);
        }
        let bytes = line.len() + terminator(line).len();
        if bytes > self.bytes { Err(LineError::TooLong { bytes, limit: self.bytes }) } else { Ok(()) }
    }
}

/// The batch that is being filled.
#[derive(Debug, Default)]
pub(crate) struct Collector {
    body: Vec<u8>,
    events: usize,
}

/// A batch that is ready to be sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Batch {
    /// The lines, each with its terminator.
    pub(crate) body: Vec<u8>,
    /// Number of lines.
    pub(crate) events: usize,
}

impl Collector {
    /// Returns whether the batch would keep its limit with this line too. An empty batch takes
    /// every admitted line.
    pub(crate) fn fits(&self, line: &[u8], limits: &BatchLimits) -> bool {
        self.events == 0 || self.body.len() + line.len() + terminator(line).len() <= limits.bytes
    }

    /// Adds an admitted line that fits.
    pub(crate) fn push(&mut self, line: &[u8]) {
        self.body.extend_from_slice(line);
        self.body.extend_from_slice(terminator(line));
        self.events += 1;
    }

    /// Returns whether the batch is to be sent without waiting for more.
    pub(crate) fn is_full(&self, limits: &BatchLimits) -> bool {
        self.events >= limits.events || self.body.len() >= limits.bytes
    }

    /// Returns the batch, and leaves an empty one in its place; none when no line is in it.
    pub(crate) fn take(&mut self) -> Option<Batch> {
        let Self { body, events } = std::mem::take(self);
        (events > 0).then_some(Batch { body, events })
    }
}

/// Returns the terminator of a line. A carriage return at the end of a line is its own only when
/// another one belongs to the terminator.
fn terminator(line: &[u8]) -> &'static [u8] {
    if line.ends_with(b"\r") { b"\r\n" } else { b"\n" }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::batch::{Caps, Coding, decode, encode};

    fn limits(events: usize, bytes: usize) -> BatchLimits {
        BatchLimits { events, bytes, linger: Duration::ZERO }
    }

    #[test]
    fn a_batch_ends_at_its_maximum_number_of_events() {
        let limits = limits(2, 100);
        let mut collector = Collector::default();
        assert_eq!(collector.take(), None);
        collector.push(b"a");
        assert!(!collector.is_full(&limits));
        collector.push(b"b");
        assert!(collector.is_full(&limits));
        assert_eq!(collector.take(), Some(Batch { body: b"a\nb\n".to_vec(), events: 2 }));
        assert_eq!(collector.take(), None);
    }

    #[test]
    fn a_batch_never_exceeds_its_maximum_of_bytes() {
        let limits = limits(100, 6);
        let mut collector = Collector::default();
        collector.push(b"ab");
        assert!(collector.fits(b"cd", &limits));
        assert!(!collector.fits(b"cde", &limits));
        assert!(!collector.fits(b"c\r\r", &limits));
        collector.push(b"cd");
        assert!(collector.is_full(&limits));
        assert!(limits.admit(b"abcde").is_ok());
        assert_eq!(limits.admit(b"abcdef"), Err(LineError::TooLong { bytes: 7, limit: 6 }));
        assert_eq!(limits.admit(b"abcd\r"), Err(LineError::TooLong { bytes: 7, limit: 6 }));
    }

    #[test]
    fn invalid_lines_are_refused() {
        let limits = BatchLimits::default();
        assert_eq!(limits.admit(b"a\nb"), Err(LineError::LineFeed));
        for blank in [&b""[..], b" \t", b"\r"] {
            assert_eq!(limits.admit(blank), Err(LineError::Blank));
        }
    }

    #[test]
    fn lines_keep_their_bytes() {
        let sent = [&b"a"[..], b"b\r", b"\xff c ", b"d\r\r"];
        let mut collector = Collector::default();
        for line in sent {
            BatchLimits::default().admit(line).unwrap();
            collector.push(line);
        }
        let batch = collector.take().unwrap();
        assert_eq!(lines(&batch.body).collect::<Vec<_>>(), sent);
    }

    proptest! {
        /// With any split into gzip members and any line terminators.
        #[test]
        fn a_collected_body_decodes_to_its_lines(
            sent in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..30),
            mut cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let mut collector = Collector::default();
            let admitted: Vec<&[u8]> = sent
                .iter()
                .map(Vec::as_slice)
                .filter(|line| BatchLimits::default().admit(line).is_ok())
                .inspect(|line| collector.push(line))
                .collect();
            let body = collector.take().map_or_else(Vec::new, |batch| batch.body);
            cuts.sort_by_key(|cut| cut.index(body.len() + 1));
            let mut members = Vec::new();
            let mut start = 0;
            for end in cuts.iter().map(|cut| cut.index(body.len() + 1)).chain([body.len()]) {
                members.extend(encode(&body[start..end]).unwrap());
                start = end;
            }
            let coding = Coding::of(Some("application/gzip"), &members).unwrap();
            let caps = Caps { decoded: body.len(), lines: admitted.len() };
            let decoded = decode(&members, coding, caps, &mut |_| true).unwrap();
            prop_assert_eq!(decoded.lines().collect::<Vec<_>>(), admitted);
            prop_assert_eq!(decoded.into_bytes(), body);
        }
    }
}
