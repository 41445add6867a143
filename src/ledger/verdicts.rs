//! The verdicts of a batch's lines as the table `batch` keeps them: one byte a line (duplicate,
//! unverified, verified, or a reason), with a second byte for the key of a verified line, and two
//! bytes of length and the detail for a rejected one.

use std::borrow::Cow;

use crate::wire::event::{Reason, Stream, Verdict};

const DUPLICATE: u8 = 0;
const UNVERIFIED: u8 = 1;
const VERIFIED: u8 = 2;
const FIRST_REASON: u8 = 16;

/// Maximum length of a detail, in bytes.
const MAX_DETAIL: usize = 512;

/// The verdict of each line of a batch, in their order; none for one that is not delivered with it:
/// a duplicate, or a line that another batch has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdicts(Vec<u8>);

/// The verdict of one line as it is stored.
#[derive(Clone, Copy)]
pub(super) struct StoredVerdict<'a>(&'a [u8]);

impl Verdicts {
    /// Takes over what is stored.
    pub(super) fn stored(bytes: &[u8]) -> Self {
        Self(bytes.to_owned())
    }

    pub(super) fn with_capacity(lines: usize) -> Self {
        Self(Vec::with_capacity(lines * 2))
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub(super) fn push(&mut self, verdict: Option<&Verdict>) {
        let out = &mut self.0;
        match verdict {
            None => out.push(DUPLICATE),
            Some(Verdict::Unverified) => out.push(UNVERIFIED),
            Some(Verdict::Verified { key }) => {
                out.push(VERIFIED);
                out.push(u8::try_from(*key).unwrap_or(u8::MAX));
            }
            Some(Verdict::Rejected { reason, detail }) => {
                out.push(FIRST_REASON + *reason as u8);
                let mut end = detail.len().min(MAX_DETAIL);
                while !detail.is_char_boundary(end) {
                    end -= 1;
                }
                out.extend_from_slice(&u16::try_from(end).unwrap_or(0).to_le_bytes());
                out.extend_from_slice(&detail.as_bytes()[..end]);
            }
        }
    }

    /// Returns the verdicts without those of duplicates, which are lines of this batch.
    pub(super) fn without(&self, duplicates: &[bool]) -> Self {
        let mut left = Self(Vec::with_capacity(self.0.len()));
        for (verdict, is_duplicate) in self.as_stored().zip(duplicates) {
            left.0.extend_from_slice(if *is_duplicate { &[DUPLICATE] } else { verdict.0 });
        }
        left
    }

    /// Returns the verdicts as they are stored. SQLite's pages are trusted: a damaged database
    /// fails as a whole.
    pub(super) fn as_stored(&self) -> impl Iterator<Item = StoredVerdict<'_>> {
        let mut rest = self.0.as_slice();
        std::iter::from_fn(move || {
            let length = match rest {
                [] => return None,
                [DUPLICATE | UNVERIFIED, ..] => 1,
                [VERIFIED, ..] => 2,
                [_, low, high, ..] => 3 + usize::from(u16::from_le_bytes([*low, *high])),
                [_, ..] => rest.len(),
            };
            let verdict;
            (verdict, rest) = rest.split_at(length.min(rest.len()));
            Some(StoredVerdict(verdict))
        })
    }

    /// Returns the verdicts.
    pub fn iter(&self) -> impl Iterator<Item = Option<Verdict>> {
        self.as_stored().map(StoredVerdict::decode)
    }
}

impl StoredVerdict<'_> {
    fn decode(self) -> Option<Verdict> {
        match self.0 {
            [] | [DUPLICATE, ..] => None,
            [UNVERIFIED, ..] => Some(Verdict::Unverified),
            [VERIFIED, rest @ ..] => {
                Some(Verdict::Verified { key: rest.first().copied().map_or(0, usize::from) })
            }
            [_, rest @ ..] => {
                let detail = rest.get(2..).unwrap_or_default();
                let detail = Cow::Owned(String::from_utf8_lossy(detail).into_owned());
                Some(Verdict::Rejected { reason: self.reason().unwrap_or(Reason::Malformed), detail })
            }
        }
    }

    /// Returns the stream that the line belongs to; none for one that is not delivered.
    pub(super) fn stream(self) -> Option<Stream> {
        match self.0 {
            [] | [DUPLICATE, ..] => None,
            [UNVERIFIED, ..] => Some(Stream::Unverified),
            [VERIFIED, ..] => Some(Stream::Verified),
            _ => Some(Stream::Quarantine),
        }
    }

    /// Returns the reason why the line is rejected.
    pub(super) fn reason(self) -> Option<Reason> {
        Reason::ALL.get(usize::from(self.0.first()?.checked_sub(FIRST_REASON)?)).copied()
    }

    /// Returns its size in bytes.
    pub(super) fn size(self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdicts(verdicts: &[Option<Verdict>]) -> Verdicts {
        let mut packed = Verdicts::default();
        verdicts.iter().for_each(|verdict| packed.push(verdict.as_ref()));
        packed
    }

    fn rejected(reason: Reason, detail: &str) -> Option<Verdict> {
        Some(Verdict::Rejected { reason, detail: Cow::Owned(detail.to_owned()) })
    }

    #[test]
    fn verdicts_are_read_back() {
        let mut each = vec![
            None,
            Some(Verdict::Unverified),
            Some(Verdict::Verified { key: 7 }),
            rejected(Reason::Malformed, ""),
        ];
        each.extend(Reason::ALL.map(|reason| rejected(reason, "über")));
        let packed = verdicts(&each);
        assert_eq!(packed.iter().collect::<Vec<_>>(), each);
        for (stored, verdict) in packed.as_stored().zip(&each) {
            assert_eq!(stored.stream(), verdict.as_ref().map(Verdict::stream));
        }
        assert_eq!(Verdicts::stored(packed.as_bytes()), packed);
        let long = verdicts(&[rejected(Reason::Unsigned, &"ü".repeat(400)), None]);
        assert_eq!(long.iter().count(), 2);
    }

    #[test]
    fn duplicates_lose_their_verdict_and_the_others_keep_theirs() {
        let mut each = vec![
            Some(Verdict::Verified { key: 1 }),
            rejected(Reason::Unsigned, "a"),
            None,
            Some(Verdict::Unverified),
            rejected(Reason::LineTooLong, "b"),
        ];
        let packed = verdicts(&each);
        assert_eq!(packed.without(&[false; 5]), packed);
        let left = packed.without(&[true, true, false, false, false]);
        (each[0], each[1]) = (None, None);
        assert_eq!(left.iter().collect::<Vec<_>>(), each);
    }
}
