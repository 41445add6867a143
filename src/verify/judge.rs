//! Verdicts on the lines of a block. Pure.

use std::borrow::Cow;
use std::ops::AddAssign;

use rand::CryptoRng;
use serde::Serialize;

use crate::deliver::sqlite::stored::{EventRow, QuarantineRow};
use crate::ingest::{Judgeable, UNSIGNED, open};
use crate::trust::jwks::{KeySet, undistinguished};
use crate::trust::verify::{Claim, verify_in_batches};
use crate::wire::batch;
use crate::wire::event::Malformed;
use crate::wire::line::Line;
use crate::wire::record::{self, Kind, Saved};

/// Verification batch size: saved lines are nearly all good, so bad ones need not be cheap. Larger
/// batches gain nothing (`cargo bench --bench verify` measures it).
pub const BATCH_SIZE: usize = 4096;

/// The trusted keys, each once.
#[derive(Clone, Debug, Default)]
pub struct Keys {
    keys: Vec<TrustedKey>,
    bytes: Vec<[u8; 32]>,
}

/// A key and every name that it was given.
#[derive(Clone, Debug)]
pub struct TrustedKey {
    /// Its IDs in the documents that list it; never empty.
    pub ids: Vec<String>,
    /// Its thumbprint (RFC 7638).
    pub thumbprint: String,
}

impl Keys {
    /// Returns the keys of all sets together.
    pub fn new(sets: &[KeySet]) -> Self {
        let mut all = Self::default();
        for key in sets.iter().flat_map(KeySet::keys) {
            match all.bytes.iter().position(|bytes| bytes == key.bytes()) {
                Some(at) => all.keys[at].ids.push(key.id().to_owned()),
                None => {
                    all.bytes.push(*key.bytes());
                    all.keys
                        .push(TrustedKey { ids: vec![key.id().to_owned()], thumbprint: key.thumbprint() });
                }
            }
        }
        all
    }

    /// Returns the keys, in the order of the counts by key.
    pub fn keys(&self) -> &[TrustedKey] {
        &self.keys
    }

    /// Returns their bytes, in the same order.
    pub fn bytes(&self) -> &[[u8; 32]] {
        &self.bytes
    }

    /// Returns whether an ID that the daemon stored means another of the keys than this one. An ID
    /// that means none of them may be from a document that was not given.
    fn means_another(&self, id: &str, key: usize) -> bool {
        let is_it = self.keys.get(key).is_some_and(|key| key.may_be_called(id));
        !is_it && self.keys.iter().any(|other| other.may_be_called(id))
    }
}

impl TrustedKey {
    /// Returns whether the daemon may have used that ID for the key, whichever documents it had:
    /// the name in a given document, with or without a suffix that distinguishes it from other keys
    /// of that name, or its thumbprint.
    fn may_be_called(&self, id: &str) -> bool {
        let name = |id| undistinguished(id, &self.thumbprint);
        name(id) == self.thumbprint || self.ids.iter().any(|known| name(known) == name(id))
    }
}

/// Consecutive lines, as a file holds them.
#[derive(Debug)]
pub enum Block {
    /// Bytes between two line ends.
    Lines {
        /// The number of the first line, from 1.
        first: u64,
        /// The lines, blank ones included.
        bytes: Vec<u8>,
    },
    /// Rows of a database, whose `id` is their number.
    Rows(Vec<EventRow>),
    /// Rows of a database's table `quarantine`. That they prove nothing is why they are there, and
    /// not a finding.
    Refused(Vec<QuarantineRow>),
}

/// A span of time, by the events' own clock, in milliseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Window {
    /// The first time that counts.
    pub since: Option<i64>,
    /// The first time that no longer counts.
    pub until: Option<i64>,
}

impl Window {
    /// Returns whether an event of that time is to be checked. One without a usable time always is.
    pub fn has(&self, time: Option<i64>) -> bool {
        time.is_none_or(|time| {
            self.since.is_none_or(|since| since <= time) && self.until.is_none_or(|until| time < until)
        })
    }
}

/// Lines that are to be checked.
#[derive(Clone, Copy, Debug, Default)]
pub struct Selection {
    /// Time of the events.
    pub window: Window,
    /// Quarantined lines are not checked, but counted.
    pub skip_quarantine: bool,
}

/// Error of a line, or of a file from a line on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// No given key made its signature, or its metadata does not follow from it.
    Bad,
    /// It carries no signature.
    Unsigned,
    /// It is not an event.
    Malformed,
    /// It is the last one, has no line end, and fails.
    Torn,
    /// The rest cannot be read: the file is damaged or truncated.
    Damaged,
}

impl Verdict {
    /// Returns its name in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bad => "bad",
            Self::Unsigned => "unsigned",
            Self::Malformed => "malformed",
            Self::Torn => "torn",
            Self::Damaged => "damaged",
        }
    }
}

/// A line that is not proved by its signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Its number, from 1; of a row, its `id`.
    pub line: u64,
    /// Kind of the error.
    pub verdict: Verdict,
    /// Description of the error; foreign text in it is not escaped.
    pub reason: Cow<'static, str>,
}

/// Number of lines by result. Blank lines are not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// A given key made the signature.
    pub good: u64,
    /// The same, but the line is in a quarantine record: it was rejected.
    pub good_in_quarantine: u64,
    /// The same, but its record or row says that no key was tried on it.
    pub good_unverified: u64,
    /// See [`Verdict::Bad`].
    pub bad: u64,
    /// See [`Verdict::Unsigned`].
    pub unsigned: u64,
    /// See [`Verdict::Malformed`].
    pub malformed: u64,
    /// See [`Verdict::Torn`].
    pub torn: u64,
    /// See [`Verdict::Damaged`]: places, not lines.
    pub damaged: u64,
    /// Not checked, because their time is outside the window.
    pub outside: u64,
    /// Not checked, because they are quarantined and these were to be skipped.
    pub skipped: u64,
}

impl Counts {
    /// Counts a finding.
    pub fn count(&mut self, verdict: Verdict) {
        match verdict {
            Verdict::Bad => self.bad += 1,
            Verdict::Unsigned => self.unsigned += 1,
            Verdict::Malformed => self.malformed += 1,
            Verdict::Torn => self.torn += 1,
            Verdict::Damaged => self.damaged += 1,
        }
    }

    /// Returns the number of findings.
    pub fn findings(&self) -> u64 {
        self.bad + self.unsigned + self.malformed + self.torn + self.damaged
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.good += other.good;
        self.good_in_quarantine += other.good_in_quarantine;
        self.good_unverified += other.good_unverified;
        self.bad += other.bad;
        self.unsigned += other.unsigned;
        self.malformed += other.malformed;
        self.torn += other.torn;
        self.damaged += other.damaged;
        self.outside += other.outside;
        self.skipped += other.skipped;
    }
}

/// Results of a block, or of several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JudgedBlock {
    /// Number of lines by result.
    pub counts: Counts,
    /// Number of good lines by key.
    pub by_key: Vec<u64>,
    /// The other lines, in their order.
    pub findings: Vec<Finding>,
    /// The times of the earliest and the latest good line, in milliseconds since the Unix epoch.
    pub times: Option<(i64, i64)>,
}

impl JudgedBlock {
    /// Counts a good line by its metadata.
    fn good(&mut self, metadata: &Metadata<'_>, key: usize, time: Option<i64>) {
        match metadata {
            Metadata::Record(Kind::Quarantined(_)) | Metadata::Refused(_) => {
                self.counts.good_in_quarantine += 1;
            }
            metadata if was_not_verified(metadata) => self.counts.good_unverified += 1,
            _ => self.counts.good += 1,
        }
        if let Some(count) = self.by_key.get_mut(key) {
            *count += 1;
        }
        self.times = joined(self.times, time.map(|time| (time, time)));
    }

    fn finding(&mut self, finding: Finding) {
        self.counts.count(finding.verdict);
        self.findings.push(finding);
    }
}

/// Returns the span that holds both.
pub fn joined(left: Option<(i64, i64)>, right: Option<(i64, i64)>) -> Option<(i64, i64)> {
    match (left, right) {
        (Some((first, last)), Some((earlier, later))) => Some((first.min(earlier), last.max(later))),
        (one, other) => one.or(other),
    }
}

/// A line with its metadata.
#[derive(Debug)]
pub struct Entry<'a> {
    /// Its number.
    pub number: u64,
    /// The line as it was received.
    pub raw: Cow<'a, [u8]>,
    /// Metadata of the line.
    pub metadata: Metadata<'a>,
    /// It has no line end.
    pub unterminated: bool,
}

/// Metadata that a file has of a line, in addition to the line itself.
#[derive(Debug)]
pub enum Metadata<'a> {
    /// Nothing: it is a raw line.
    Nothing,
    /// The rest of a JSON line of ours.
    Record(Kind<'a>),
    /// The columns of a row.
    Row(&'a EventRow),
    /// The columns of a row of the table `quarantine`.
    Refused(&'a QuarantineRow),
}

impl Entry<'_> {
    /// Returns whether the file says that the line was quarantined.
    pub fn is_quarantined(&self) -> bool {
        matches!(self.metadata, Metadata::Record(Kind::Quarantined(_)) | Metadata::Refused(_))
    }
}

impl Block {
    /// Returns its lines, as the daemon splits a body, without blank ones.
    pub fn entries(&self) -> Vec<Entry<'_>> {
        match self {
            Self::Lines { first, bytes } => {
                let mut entries = Vec::with_capacity(bytes.len() / 512 + 1);
                let mut start = 0;
                for (number, end) in (*first..).zip(memchr::memchr_iter(b'\n', bytes).chain([bytes.len()])) {
                    // A line without its terminator is split by the same rule as one with it.
                    entries.extend(batch::lines(&bytes[start..end]).map(|line| Entry {
                        number,
                        unterminated: end == bytes.len(),
                        ..entry(line)
                    }));
                    start = end + 1;
                    if start >= bytes.len() {
                        break;
                    }
                }
                entries
            }
            Self::Rows(rows) => rows
                .iter()
                .map(|row| Entry {
                    number: row.id.unsigned_abs(),
                    raw: Cow::Borrowed(&row.raw),
                    metadata: Metadata::Row(row),
                    unterminated: false,
                })
                .collect(),
            Self::Refused(rows) => rows
                .iter()
                .map(|row| Entry {
                    number: row.id.unsigned_abs(),
                    raw: Cow::Borrowed(&row.raw),
                    metadata: Metadata::Refused(row),
                    unterminated: false,
                })
                .collect(),
        }
    }
}

fn entry(line: &[u8]) -> Entry<'_> {
    // Reading a line as a record costs as much as parsing its event; few lines need it.
    let may_be_a_record = line.starts_with(b"{") && memchr::memmem::find(line, b"\"received_at\"").is_some();
    match may_be_a_record.then(|| record::read(line)).flatten() {
        Some(Saved { raw, kind }) => {
            Entry { number: 0, raw, metadata: Metadata::Record(kind), unterminated: false }
        }
        None => {
            Entry { number: 0, raw: Cow::Borrowed(line), metadata: Metadata::Nothing, unterminated: false }
        }
    }
}

/// A line before its signature was checked.
enum Opened<'a> {
    Decided(Verdict, Cow<'static, str>),
    Outside,
    /// The next claim decides. The line is kept where there is metadata to compare.
    Claimed(Option<Line<'a>>, Option<i64>),
}

/// Judges lines. `random` is what [`verify_in_batches`] needs.
pub fn judge(entries: &[Entry<'_>], keys: &Keys, window: Window, random: &mut impl CryptoRng) -> JudgedBlock {
    let mut claims = Vec::with_capacity(entries.len());
    let opened: Vec<Opened<'_>> =
        entries.iter().map(|entry| open_entry(entry, window, &mut claims)).collect();
    let mut fits = verify_in_batches(&claims, keys.bytes(), BATCH_SIZE, random).into_iter();
    let mut judged = JudgedBlock { by_key: vec![0; keys.keys().len()], ..JudgedBlock::default() };
    for (entry, opened) in entries.iter().zip(opened) {
        let (verdict, reason) = match opened {
            Opened::Outside => {
                judged.counts.outside += 1;
                continue;
            }
            Opened::Decided(verdict, reason) => (verdict, reason),
            Opened::Claimed(line, time) => match fits.next().flatten() {
                None => (Verdict::Bad, "no given key made this signature".into()),
                Some(fit) => match line.and_then(|line| contradiction(&entry.metadata, &line, fit.key, keys))
                {
                    Some(reason) => (Verdict::Bad, reason),
                    None => {
                        judged.good(&entry.metadata, fit.key, time);
                        continue;
                    }
                },
            },
        };
        if matches!(entry.metadata, Metadata::Refused(row) if row.has_known_reason) {
            continue;
        }
        judged.finding(match entry.unterminated {
            true => Finding {
                line: entry.number,
                verdict: Verdict::Torn,
                reason: format!("the last line has no line end, and it is {}: {reason}", verdict.as_str())
                    .into(),
            },
            false => Finding { line: entry.number, verdict, reason },
        });
    }
    judged
}

fn open_entry<'a>(entry: &'a Entry<'_>, window: Window, claims: &mut Vec<Claim<'a>>) -> Opened<'a> {
    let is_outside = |line: &Line<'_>| !window.has(line.time());
    if let Metadata::Record(Kind::Misshapen) = entry.metadata {
        return Opened::Decided(Verdict::Bad, MISSHAPEN.into());
    }
    if matches!(entry.metadata, Metadata::Refused(row) if !row.has_known_reason) {
        let reason = "the row of the table `quarantine` has a reason that auditgate does not give";
        return Opened::Decided(Verdict::Bad, reason.into());
    }
    if has_too_many_fields(&entry.raw) {
        return Opened::Decided(Verdict::Malformed, "it may have more than a million fields".into());
    }
    match open(&entry.raw) {
        Judgeable::Malformed(Malformed(detail)) => Opened::Decided(Verdict::Malformed, detail),
        Judgeable::Unsigned(line) | Judgeable::BadlySigned(line, _) | Judgeable::Signed(line, _)
            if is_outside(&line) =>
        {
            Opened::Outside
        }
        Judgeable::Unsigned(_) => Opened::Decided(Verdict::Unsigned, UNSIGNED.into()),
        Judgeable::BadlySigned(_, error) => Opened::Decided(Verdict::Bad, error.to_string().into()),
        Judgeable::Signed(line, claim) => {
            claims.push(claim);
            let time = line.time();
            // Its fields take more memory than the line itself.
            Opened::Claimed((!matches!(entry.metadata, Metadata::Nothing)).then_some(line), time)
        }
    }
}

/// Returns whether a line may have so many fields that parsing it would need gigabytes: counted are
/// commas between members, or equals signs of a CEF line. Only a line of more than about a mebibyte
/// can.
pub(super) fn has_too_many_fields(raw: &[u8]) -> bool {
    const MOST: usize = 1_000_000;
    raw.len() > MOST && memchr::memchr2_iter(b',', b'=', raw).nth(MOST).is_some()
}

/// Reason for a record that the daemon does not write.
pub(super) const MISSHAPEN: &str =
    "the record does not have the members that auditgate gives a record: it was changed";

/// Returns what of a verified line's metadata does not follow from it. `received_at` and `source`
/// are added by auditgate, and no signature covers them.
pub(super) fn contradiction(
    metadata: &Metadata<'_>,
    line: &Line<'_>,
    key: usize,
    keys: &Keys,
) -> Option<Cow<'static, str>> {
    let (difference, verified, key_id, whole) = match metadata {
        // A record of a quarantined line says nothing of its event.
        Metadata::Nothing | Metadata::Record(Kind::Quarantined(_)) | Metadata::Refused(_) => return None,
        Metadata::Record(Kind::Misshapen) => return Some(MISSHAPEN.into()),
        Metadata::Record(Kind::Accepted(claims)) => {
            let difference =
                (!claims.hold_for(line)).then(|| "the record says something else than its raw line".into());
            (difference, claims.verified, claims.key_id.as_deref(), "record")
        }
        Metadata::Row(row) => {
            let difference = row.difference(line).map(|column| match column {
                "raw" => "the column `raw` is a blob where text holds the line, or text where only a blob does: no \
                          search finds it"
                    .into(),
                _ => format!("the column `{column}` says something else than the row's raw line").into(),
            });
            (difference, row.says_verified(), row.key_id.as_deref(), "row")
        }
    };
    difference.or_else(|| match (verified, key_id) {
        (true, None) => Some(format!("the {whole} names no key").into()),
        (true, Some(id)) => keys
            .means_another(id, key)
            .then(|| format!("the {whole} names another key than the one that made the signature").into()),
        (false, Some(_)) => Some(format!("the {whole} names a key and says that none was tried").into()),
        // A source that checks no signatures (`signatures = "off"`) accepts signed lines like any
        // others.
        (false, None) => None,
    })
}

/// Returns whether the daemon tried no key on the line, according to its metadata.
pub(super) fn was_not_verified(metadata: &Metadata<'_>) -> bool {
    match metadata {
        Metadata::Record(Kind::Accepted(claims)) => !claims.verified,
        Metadata::Row(row) => !row.says_verified(),
        Metadata::Nothing | Metadata::Record(_) | Metadata::Refused(_) => false,
    }
}

#[cfg(test)]
pub(super) mod tests;
