//! Times as arguments: `--since`, `--until`, `--before`.

use std::time::{SystemTime, UNIX_EPOCH};

use time::format_description::well_known::Rfc3339;
use time::macros::format_description;
use time::{Date, OffsetDateTime};

use super::exit::Failure;
use crate::verify::judge::Window;

/// Returns the span of time that `--since` and `--until` ask for.
///
/// # Errors
/// 2 for what is not a time, and for a span without any.
pub(super) fn window(since: Option<&str>, until: Option<&str>) -> Result<Window, Failure> {
    let time = |name: &str, text: Option<&str>| text.map(|text| argument(name, text)).transpose();
    let window = Window { since: time("since", since)?, until: time("until", until)? };
    match (window.since, window.until) {
        (Some(since), Some(until)) if since >= until => {
            Err(Failure::usage("--since is not before --until, so that nothing would be looked at"))
        }
        _ => Ok(window),
    }
}

/// Returns the time that the argument of that name gives, in milliseconds since the Unix epoch.
///
/// # Errors
/// 2 for what is not a time.
pub(super) fn argument(name: &str, text: &str) -> Result<i64, Failure> {
    parse(text, now()).map_err(|error| Failure::usage(format!("--{name}: {error}")))
}

/// Returns the time, in milliseconds since the Unix epoch.
pub(super) fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}

/// Parses a time: RFC 3339, a date (its first moment in UTC), or an age before `now`, such as `2d`
/// or `90m`. Returns milliseconds since the Unix epoch.
///
/// # Errors
/// What to write instead.
fn parse(text: &str, now: i64) -> Result<i64, String> {
    let milliseconds =
        |moment: OffsetDateTime| i64::try_from(moment.unix_timestamp_nanos().div_euclid(1_000_000));
    let moment = if let Ok(moment) = OffsetDateTime::parse(text, &Rfc3339) {
        milliseconds(moment).ok()
    } else if let Ok(date) = Date::parse(text, format_description!("[year]-[month]-[day]")) {
        milliseconds(date.midnight().assume_utc()).ok()
    } else {
        let age = humantime::parse_duration(text).ok();
        age.and_then(|age| now.checked_sub(i64::try_from(age.as_millis()).ok()?))
    };
    moment.ok_or_else(|| {
        format!(
            "`{text}` is not a time; write one as 2026-01-02T03:04:05Z or 2026-01-02, or an age such as 2d or 90m"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_dates_and_ages_are_parsed() {
        let day = 86_400_000;
        assert_eq!(parse("1970-01-02T00:00:01.5Z", 0), Ok(day + 1500));
        assert_eq!(parse("1970-01-02T01:00:00+01:00", 0), Ok(day));
        assert_eq!(parse("1970-01-02", 0), Ok(day));
        assert_eq!(parse("1d 1h", 2 * day), Ok(day - 3_600_000));
        for wrong in ["", "yesterday", "1970-01-32", "5", "1970-01-02 00:00"] {
            assert!(parse(wrong, 0).is_err(), "{wrong}");
        }
    }
}
