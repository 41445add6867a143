//! How connections end, for who counts them.

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// In order: by the peer between two requests, after the last answer, or by our shutdown.
    Done,
    /// The TLS handshake failed.
    HandshakeFailed,
    /// The TLS handshake was too slow.
    HandshakeTimeout,
    /// A head was too slow, or nothing was asked for a long time.
    HeaderTimeout,
    /// A body was too slow.
    BodyTooSlow,
    /// The peer ended it, or the network did, in the middle of a request or an answer.
    CutOff,
    /// The peer did not take its answer.
    AnswerTimeout,
    /// A request was malformed or its head too large.
    Malformed,
    /// It made room for a newer one.
    Evicted,
    /// It made room for a newer one of the same address.
    PerPeerLimit,
}

impl CloseReason {
    /// Every ending, in the order of declaration.
    pub const ALL: [Self; 10] = [
        Self::Done,
        Self::HandshakeFailed,
        Self::HandshakeTimeout,
        Self::HeaderTimeout,
        Self::BodyTooSlow,
        Self::CutOff,
        Self::AnswerTimeout,
        Self::Malformed,
        Self::Evicted,
        Self::PerPeerLimit,
    ];

    /// Its name in the metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::HandshakeFailed => "handshake_failed",
            Self::HandshakeTimeout => "handshake_timeout",
            Self::HeaderTimeout => "header_timeout",
            Self::BodyTooSlow => "body_too_slow",
            Self::CutOff => "cut_off",
            Self::AnswerTimeout => "answer_timeout",
            Self::Malformed => "malformed",
            Self::Evicted => "evicted",
            Self::PerPeerLimit => "per_peer_limit",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_have_distinct_names() {
        let mut names: Vec<_> = CloseReason::ALL.iter().map(|reason| reason.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), CloseReason::ALL.len());
        for (index, reason) in CloseReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index);
        }
    }
}
