//! Reasons why connections end, for the metrics.

/// Reason why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// Closed in order: by the peer between two requests, after the last response, or by our
    /// shutdown.
    Done,
    /// The TLS handshake failed.
    HandshakeFailed,
    /// The TLS handshake was too slow.
    HandshakeTimeout,
    /// A request's head was too slow, or the connection was idle too long.
    HeaderTimeout,
    /// A body was too slow.
    BodyTooSlow,
    /// The peer or the network ended it in the middle of a request or a response.
    CutOff,
    /// The peer did not read its response in time.
    AnswerTimeout,
    /// A request was malformed or its head too large.
    Malformed,
    /// It was evicted for a newer connection.
    Evicted,
    /// It was evicted for a newer connection from the same address.
    PerPeerLimit,
}

impl CloseReason {
    /// Every reason, in the order of declaration.
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

    /// Returns its name in the metrics.
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
