//! What an event needs and does not have.

use time::OffsetDateTime;
use time::macros::format_description;

use crate::wire::event::schema::Type;
use crate::wire::event::{Event, Value};

/// Fills in what a CEF header needs and the event does not have: `cef_version` 0, `event_vendor`
/// KongInc, `event_product` Konnect, `event_version` 1.0, `severity` 0 for an authentication and 1
/// for the rest; and what every event needs: `rt` from `now` (milliseconds since the Unix epoch),
/// `event_ts` from `rt`, or from `now` where `rt` is not a time, and a random `trace_id` of 128
/// bits. There is no default for `name`, without which it is unknown what happened.
pub fn complete(event: &mut Event, now: i64) {
    let kind = Type::of(&event.text("name").unwrap_or_default());
    let severity = if kind == Type::Authentication { "0" } else { "1" };
    for (name, value) in [
        ("cef_version", "0"),
        ("event_vendor", "KongInc"),
        ("event_product", "Konnect"),
        ("event_version", "1.0"),
        ("severity", severity),
    ] {
        if event.field(name).is_none() {
            event.set(name, Value::Text(value.to_owned()));
        }
    }
    fill_in(event, now);
}

/// Fills in `rt`, `event_ts` and `trace_id`, as [`complete`] does. An event without a trace ID that
/// is filled in twice is two events.
pub(crate) fn fill_in(event: &mut Event, now: i64) {
    if event.field("rt").is_none() {
        event.set("rt", Value::Number(now.to_string()));
    }
    if event.field("trace_id").is_none() && !event.ambiguous().iter().any(|key| key == "trace_id") {
        event.set("trace_id", Value::Text(format!("{:032x}", rand::random::<u128>())));
    }
    if event.field("event_ts").is_none() {
        let stamp = event.text("rt").and_then(|rt| time_stamp(rt.parse().ok()?)).or_else(|| time_stamp(now));
        if let Some(stamp) = stamp {
            event.set("event_ts", Value::Text(stamp));
        }
    }
}

/// Formats a time as RFC 3339 in UTC, whole seconds, as Kong's examples have it; none outside the
/// years 0 to 9999.
fn time_stamp(milliseconds: i64) -> Option<String> {
    let shape = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z");
    let moment = OffsetDateTime::from_unix_timestamp(milliseconds.div_euclid(1000)).ok()?;
    if moment.year() < 0 {
        return None;
    }
    moment.format(shape).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_header_fields_are_filled_in_and_none_is_overwritten() {
        let mut event = Event::new();
        event.set("name", Value::Text("AUTHENTICATION_OUTCOME_SUCCESS".to_owned()));
        event.set("event_vendor", Value::Text("ExampleOrg".to_owned()));
        event.set("rt", Value::Number("1684454619999".to_owned()));
        complete(&mut event, 0);
        for (name, value) in [
            ("cef_version", "0"),
            ("event_vendor", "ExampleOrg"),
            ("event_product", "Konnect"),
            ("event_version", "1.0"),
            ("severity", "0"),
            ("event_ts", "2023-05-19T00:03:39Z"),
        ] {
            assert_eq!(event.text(name).unwrap(), value, "{name}");
        }
        for rt in ["3958q3097698", "9223372036854775807", "-99999999999999"] {
            let mut event = Event::new();
            event.set("name", Value::Text("Ingress".to_owned()));
            event.set("rt", Value::Text(rt.to_owned()));
            complete(&mut event, 1_684_454_619_000);
            assert_eq!(event.text("event_ts").unwrap(), "2023-05-19T00:03:39Z", "{rt}");
            assert_eq!(event.text("severity").unwrap(), "1");
        }
        let mut nameless = Event::new();
        complete(&mut nameless, 0);
        assert_eq!(nameless.field("name"), None);
        assert_eq!(nameless.field("rt"), Some(&Value::Number("0".to_owned())));
    }

    #[test]
    fn a_missing_trace_id_is_filled_in_with_a_new_one_each_time() {
        let trace_id = || {
            let mut event = Event::new();
            fill_in(&mut event, 0);
            event.text("trace_id").unwrap().into_owned()
        };
        assert_eq!(trace_id().len(), 32);
        assert_ne!(trace_id(), trace_id());
        let mut event = Event::new();
        event.set("trace_id", Value::Text("7".to_owned()));
        fill_in(&mut event, 0);
        assert_eq!(event.text("trace_id").unwrap(), "7");
    }
}
