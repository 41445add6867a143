//! The verdicts of a batch's lines as the table `batch` keeps them: one byte a line (duplicate,
//! unverified, verified, or a reason), with a second byte for the key of a verified line, and two
//! bytes of length and the detail for a rejected one.

use std::borrow::Cow;

use crate::wire::event::{Reason, Verdict};

const DUPLICATE: u8 = 0;
const UNVERIFIED: u8 = 1;
const VERIFIED: u8 = 2;
const FIRST_REASON: u8 = 16;

/// Maximum length of a detail, in bytes.
const MAX_DETAIL: usize = 512;

/// Encodes the verdicts; none for a duplicate.
pub(super) fn encode(verdicts: &[Option<Verdict>]) -> Vec<u8> {
    let mut out = Vec::with_capacity(verdicts.len() * 2);
    for verdict in verdicts {
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
    out
}

/// Returns what rejected lines take of what [`encode`] returns, in bytes.
pub(super) fn rejections_bytes(verdicts: &[Option<Verdict>]) -> u64 {
    let bytes = |verdict: &Verdict| match verdict {
        Verdict::Rejected { detail, .. } => 3 + detail.len().min(MAX_DETAIL) as u64,
        _ => 0,
    };
    verdicts.iter().flatten().map(bytes).sum()
}

/// Decodes what [`encode`] returned. SQLite's pages are trusted: a damaged database fails as a
/// whole.
pub(super) fn decode(mut bytes: &[u8]) -> Vec<Option<Verdict>> {
    let mut verdicts = Vec::with_capacity(bytes.len() / 2);
    while let [tag, rest @ ..] = bytes {
        bytes = rest;
        verdicts.push(match *tag {
            DUPLICATE => None,
            UNVERIFIED => Some(Verdict::Unverified),
            VERIFIED => {
                let Some((key, rest)) = bytes.split_first() else { break };
                bytes = rest;
                Some(Verdict::Verified { key: usize::from(*key) })
            }
            tag => {
                let Some((length, rest)) = bytes.split_first_chunk::<2>() else { break };
                let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
                let (detail, rest) = rest.split_at(length);
                bytes = rest;
                let reason = Reason::ALL.get(usize::from(tag.wrapping_sub(FIRST_REASON)));
                let detail = Cow::Owned(String::from_utf8_lossy(detail).into_owned());
                Some(Verdict::Rejected { reason: *reason.unwrap_or(&Reason::Malformed), detail })
            }
        });
    }
    verdicts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_read_back() {
        let rejected =
            |reason, detail: &str| Some(Verdict::Rejected { reason, detail: Cow::Owned(detail.to_owned()) });
        let mut verdicts = vec![
            None,
            Some(Verdict::Unverified),
            Some(Verdict::Verified { key: 7 }),
            rejected(Reason::Malformed, ""),
        ];
        verdicts.extend(Reason::ALL.map(|reason| rejected(reason, "über")));
        assert_eq!(decode(&encode(&verdicts)), verdicts);
        let long = encode(&[rejected(Reason::Unsigned, &"ü".repeat(400)), None]);
        assert_eq!(decode(&long).len(), 2);
    }
}
