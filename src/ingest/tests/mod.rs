//! Whether a line is judged as documented: the accept rule on known edge cases, and agreement with
//! an independent implementation on many generated lines.

mod accept_rule;
mod agreement;
mod generated_lines;
mod reference_verifier;

use crate::wire::event::{Reason, Verdict};

/// A verdict without its explanation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Verified { key: usize },
    Bad,
    Unsigned,
    Malformed,
}

impl From<&Verdict> for Class {
    fn from(verdict: &Verdict) -> Self {
        match verdict {
            Verdict::Verified { key } => Self::Verified { key: *key },
            Verdict::Rejected { reason: Reason::BadSignature, .. } => Self::Bad,
            Verdict::Rejected { reason: Reason::Unsigned, .. } => Self::Unsigned,
            Verdict::Rejected { reason: Reason::Malformed, .. } => Self::Malformed,
            other => panic!("{other:?}"),
        }
    }
}
