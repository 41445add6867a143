//! Retries of a post, by the rules that Konnect documents for its own webhook.

use std::time::{Duration, SystemTime};

/// Number of retries and the pauses before them. The defaults are Konnect's: at most 4 retries,
/// after 1, 2, 4 and 8 seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Number of retries after the first post.
    pub retries: u32,
    /// The first pause; each further one is twice as long.
    pub minimum: Duration,
    /// Maximum pause of our own; one that the receiver asks for may be longer, up to 10 minutes.
    pub maximum: Duration,
}

/// Maximum pause that a receiver can ask for; beyond it, it is asked again all the same.
pub(crate) const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(600);

impl Default for Retry {
    fn default() -> Self {
        Self { retries: 4, minimum: Duration::from_secs(1), maximum: Duration::from_secs(30) }
    }
}

/// Result of one post.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The receiver answered with this status (RFC 9110, section 15).
    Status(u16),
    /// No whole response: no connection, interrupted, too late, not HTTP.
    NoAnswer,
    /// The receiver's certificate is not trusted; a retry would find the same certificate.
    Untrusted,
}

/// Decision after a post.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// The batch is delivered.
    Done,
    /// Post the batch again after this pause.
    Wait(Duration),
    /// The batch cannot be delivered.
    GiveUp,
}

impl Retry {
    /// Decides what follows the post number `attempt` (from 1). `retry_after` is the pause that the
    /// response asked for: it replaces our own, even where it is longer than `maximum`, but not
    /// beyond [`LONGEST_RETRY_AFTER`].
    ///
    /// Any 2xx is a delivery. 429, 500 and a missing response are retried; everything else is not,
    /// because the same batch would meet the same refusal.
    pub(super) fn next(&self, attempt: u32, outcome: Outcome, retry_after: Option<Duration>) -> Decision {
        match outcome {
            Outcome::Status(200..=299) => Decision::Done,
            Outcome::Status(429 | 500) | Outcome::NoAnswer if attempt <= self.retries => {
                let asked = retry_after.map(|pause| pause.min(LONGEST_RETRY_AFTER));
                Decision::Wait(asked.unwrap_or_else(|| self.pause(attempt)))
            }
            _ => Decision::GiveUp,
        }
    }

    fn pause(&self, attempt: u32) -> Duration {
        let factor = 1u32.checked_shl(attempt.saturating_sub(1)).unwrap_or(u32::MAX);
        self.minimum.saturating_mul(factor).min(self.maximum)
    }
}

/// Parses a `Retry-After` header (RFC 9110, section 10.2.3): seconds, or a date (section 5.6.7), of
/// which one in the past is no pause. Returns none for anything else.
pub(super) fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        return Some(Duration::from_secs(value.parse().unwrap_or(u64::MAX)));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or(Duration::ZERO))
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_rules_are_those_of_konnect() {
        use Decision::{Done, GiveUp, Wait};
        use Outcome::{NoAnswer, Status, Untrusted};
        let cases = [
            (1, Status(200), None, Done),
            (1, Status(202), None, Done),
            (9, Status(200), Some(seconds(9)), Done),
            (1, Status(429), Some(seconds(u64::MAX)), Wait(LONGEST_RETRY_AFTER)),
            (1, Status(500), None, Wait(seconds(1))),
            (2, Status(500), None, Wait(seconds(2))),
            (3, NoAnswer, None, Wait(seconds(4))),
            (4, Status(429), None, Wait(seconds(8))),
            (5, Status(429), None, GiveUp),
            (5, Status(500), Some(seconds(1)), GiveUp),
            (5, NoAnswer, None, GiveUp),
            (1, Status(429), Some(seconds(600)), Wait(seconds(600))),
            (4, Status(500), Some(seconds(0)), Wait(seconds(0))),
            (1, Untrusted, None, GiveUp),
            (1, Status(301), None, GiveUp),
            (1, Status(400), None, GiveUp),
            (1, Status(401), Some(seconds(1)), GiveUp),
            (1, Status(408), None, GiveUp),
            (1, Status(413), None, GiveUp),
            (1, Status(503), Some(seconds(1)), GiveUp),
        ];
        for (attempt, outcome, retry_after, decision) in cases {
            assert_eq!(
                Retry::default().next(attempt, outcome, retry_after),
                decision,
                "{attempt} {outcome:?} {retry_after:?}"
            );
        }
    }

    #[test]
    fn our_own_pause_is_bounded_with_any_number_of_retries() {
        let retry = Retry { retries: u32::MAX, ..Retry::default() };
        for attempt in [6, 7, 32, 33, 64, u32::MAX] {
            let decision = retry.next(attempt, Outcome::NoAnswer, None);
            assert_eq!(decision, Decision::Wait(seconds(30)), "{attempt}");
        }
        let none = Retry { retries: 0, ..Retry::default() };
        assert_eq!(none.next(1, Outcome::Status(500), None), Decision::GiveUp);
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = datetime!(2015-10-21 07:28:00 UTC).into();
        let cases = [
            ("120", Some(seconds(120))),
            (" 0 ", Some(seconds(0))),
            ("99999999999999999999999", Some(seconds(u64::MAX))),
            ("Wed, 21 Oct 2015 07:28:30 GMT", Some(seconds(30))),
            ("Wed, 21 Oct 2015 07:27:00 GMT", Some(seconds(0))),
            ("", None),
            ("-1", None),
            ("1.5", None),
            ("soon", None),
            ("Wed, 21 Oct 2015", None),
        ];
        for (value, pause) in cases {
            assert_eq!(retry_after(value, now), pause, "{value}");
        }
    }
}
