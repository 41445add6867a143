//! Identities, by which lines are recognised when they come again: a keyed hash (BLAKE3) of 128
//! bits, and where the dedup index keeps it.

use super::leaf::PLACE_BITS;

/// Identity of a line, by which it is recognised when it comes again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub(super) kind: Kind,
    /// The day for [`Kind::Dated`], otherwise 0.
    pub(super) day: i64,
    /// Milliseconds within that day; otherwise 0.
    pub(super) moment: u32,
    pub(super) hash: [u8; 16],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// An event whose own time can be read.
    Dated = 0,
    /// An event whose time cannot be read.
    Undated = 1,
    /// A trace ID, where the source dedups by that.
    Trace = 2,
    /// A line in quarantine.
    Reject = 3,
}

impl Identity {
    /// Returns its place within a partition, a number of [`PLACE_BITS`] bits. Events of neighbouring
    /// moments are neighbours, and those of one moment are ordered by their hash; so is what has no
    /// moment, or the first of a day.
    pub(super) fn place(&self) -> u64 {
        let [a, b, c, d, e, ..] = self.hash;
        let hash = u64::from_be_bytes([0, 0, 0, a, b, c, d, e]);
        match self.moment {
            0 => hash >> (40 - PLACE_BITS),
            moment => u64::from(moment) << MOMENT_SHIFT | hash >> (40 - MOMENT_SHIFT),
        }
    }
}

/// Number of bits of the hash in the place of an event with a moment. The moment takes 27.
const MOMENT_SHIFT: u32 = PLACE_BITS - 27;

impl Kind {
    /// Returns the kind of a code in the table of partitions.
    pub(super) fn from_code(code: u8) -> Self {
        match code {
            0 => Self::Dated,
            1 => Self::Undated,
            2 => Self::Trace,
            _ => Self::Reject,
        }
    }
}

/// Computes identities. The key is the ledger's, 32 random bytes.
#[derive(Clone)]
pub struct Identifier {
    key: [u8; 32],
}

const DAY: i64 = 86_400_000;

impl Identifier {
    pub(crate) fn new(key: [u8; 32]) -> Self {
        Self { key }
    }

    /// Returns the identity of an accepted event: its source, its signed bytes in two parts and its
    /// own time in milliseconds since the Unix epoch.
    pub fn event(
        &self,
        source: &str,
        verified: bool,
        content: (&[u8], &[u8]),
        time: Option<i64>,
    ) -> Identity {
        let hash = self.hash(b'e', source, &[&[u8::from(verified)], content.0, content.1]);
        match time {
            Some(time) => Identity {
                kind: Kind::Dated,
                day: time.div_euclid(DAY),
                moment: u32::try_from(time.rem_euclid(DAY)).unwrap_or(0),
                hash,
            },
            None => Identity { kind: Kind::Undated, day: 0, moment: 0, hash },
        }
    }

    /// Returns the identity of everything that shares a trace ID within an organisation.
    pub fn trace(&self, source: &str, organisation: &str, trace: &str) -> Identity {
        let length = (organisation.len() as u64).to_le_bytes();
        let hash = self.hash(b't', source, &[&length, organisation.as_bytes(), trace.as_bytes()]);
        Identity { kind: Kind::Trace, day: 0, moment: 0, hash }
    }

    /// Returns the identity of a quarantined line, by its bytes.
    pub fn reject(&self, source: &str, line: &[u8]) -> Identity {
        let hash = self.hash(b'r', source, &[line]);
        Identity { kind: Kind::Reject, day: 0, moment: 0, hash }
    }

    fn hash(&self, domain: u8, source: &str, parts: &[&[u8]]) -> [u8; 16] {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(&[domain]);
        hasher.update(&(source.len() as u64).to_le_bytes());
        hasher.update(source.as_bytes());
        for part in parts {
            hasher.update(part);
        }
        let mut hash = [0; 16];
        hasher.finalize_xof().fill(&mut hash);
        hash
    }
}
