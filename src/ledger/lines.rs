//! The lines of a batch as the writer takes them. What can be done for each line without the
//! database is done here, before the writer's thread gets them: when no line is a duplicate, that
//! thread only looks at the fingerprints.

use std::collections::BTreeMap;

use super::identity::{Identity, Kind};
use super::leaf::Key;
use super::verdicts::Verdicts;
use crate::wire::event::class::{EventClass, EventKind, EventSeverity};
use crate::wire::event::{Reason, Stream, Verdict};

/// One line and its verdict.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The verdict.
    pub verdict: Verdict,
    /// Class by which an accepted line is counted; none for a rejected one.
    pub class: Option<EventClass>,
    /// Identity by which the line is recognised when it comes again.
    pub identity: Identity,
}

/// The lines of a batch, sorted for the dedup index, counted and packed.
#[derive(Debug, Default)]
pub struct Lines {
    fingerprints: Vec<LineFingerprint>,
    verdicts: Verdicts,
    classes: Vec<Option<EventClass>>,
    counts: Counts,
}

/// Fingerprint of a line, and where the index keeps it.
#[derive(Clone, Copy, Debug)]
pub(super) struct LineFingerprint {
    pub(super) hash: [u8; 16],
    pub(super) place: u64,
    /// The day for [`Kind::Dated`], otherwise 0.
    pub(super) day: i64,
    pub(super) kind: Kind,
    /// Index of the line.
    pub(super) line: u32,
}

/// Numbers of a batch's lines.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// New lines of each stream.
    pub(super) streams: [u64; Stream::ALL.len()],
    /// New accepted lines, by class.
    pub(super) classes: BTreeMap<EventClass, u64>,
    /// Lines that had been committed before.
    pub(super) duplicates: u64,
    /// New rejected lines, by reason.
    pub(super) rejected: [u64; Reason::ALL.len()],
    /// What the verdicts of new rejected lines take, in bytes.
    pub(super) rejected_bytes: u64,
}

impl Lines {
    /// Maximum number of bytes that a line takes here and in the writer, without a detail: its
    /// fingerprint, which is copied where it is sorted, its class, and its verdict.
    pub const LINE_BYTES: usize = size_of::<LineFingerprint>()
        + 2 * size_of::<Key>()
        + size_of::<Option<EventClass>>()
        + 2 * size_of::<u8>();

    /// Prepares the lines of a batch: one entry a line, in the order of the lines; none for a line
    /// that another batch has.
    pub fn new(entries: Vec<Option<Entry>>) -> Self {
        let mut fingerprints = Vec::with_capacity(entries.len());
        let mut classes = Vec::with_capacity(entries.len());
        let mut verdicts = Verdicts::with_capacity(entries.len());
        for (line, entry) in (0..).zip(entries) {
            verdicts.push(entry.as_ref().map(|entry| &entry.verdict));
            classes.push(entry.as_ref().and_then(|entry| entry.class));
            if let Some(Entry { identity, .. }) = entry {
                fingerprints.push(LineFingerprint {
                    hash: identity.hash,
                    place: identity.place(),
                    day: identity.day,
                    kind: identity.kind,
                    line,
                });
            }
        }
        // Stable, so that of equal lines the first one comes first.
        fingerprints
            .sort_by_key(|found| (found.kind, found.day, found.place, u128::from_be_bytes(found.hash)));
        let counts = Counts::of(&verdicts, &classes);
        Self { fingerprints, verdicts, classes, counts }
    }

    /// Returns the number of lines.
    pub fn len(&self) -> usize {
        self.classes.len()
    }

    /// Returns whether there is no line.
    pub fn is_empty(&self) -> bool {
        self.classes.is_empty()
    }

    /// Returns the fingerprints, sorted by kind, day, place and hash.
    pub(super) fn fingerprints(&self) -> &[LineFingerprint] {
        &self.fingerprints
    }

    /// Takes the verdicts and counts, given which lines are duplicates; empty when none is.
    pub(super) fn take(&mut self, duplicates: &[bool]) -> (Verdicts, Counts) {
        let (verdicts, counts) = (std::mem::take(&mut self.verdicts), std::mem::take(&mut self.counts));
        if duplicates.is_empty() {
            return (verdicts, counts);
        }
        let verdicts = verdicts.without(duplicates);
        let mut counts = Counts::of(&verdicts, &self.classes);
        counts.duplicates = duplicates.iter().filter(|is_duplicate| **is_duplicate).count() as u64;
        (verdicts, counts)
    }
}

impl Counts {
    fn of(verdicts: &Verdicts, classes: &[Option<EventClass>]) -> Self {
        let mut counts = Self::default();
        let mut by_class = [[0; EventSeverity::ALL.len()]; EventKind::ALL.len()];
        for (verdict, class) in verdicts.as_stored().zip(classes) {
            let Some(stream) = verdict.stream() else { continue };
            counts.streams[stream as usize] += 1;
            if let Some(reason) = verdict.reason() {
                counts.rejected[reason as usize] += 1;
                counts.rejected_bytes += verdict.size() as u64;
            } else if let Some(EventClass { kind, severity }) = class {
                by_class[*kind as usize][*severity as usize] += 1;
            }
        }
        for (kind, by_severity) in EventKind::ALL.into_iter().zip(by_class) {
            for (severity, lines) in EventSeverity::ALL.into_iter().zip(by_severity) {
                if lines > 0 {
                    counts.classes.insert(EventClass { kind, severity }, lines);
                }
            }
        }
        counts
    }

    /// Returns the number of new accepted lines.
    pub(super) fn accepted(&self) -> u64 {
        self.streams[Stream::Verified as usize] + self.streams[Stream::Unverified as usize]
    }
}
