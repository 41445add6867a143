//! Sample events as Konnect writes them, for trying things out.

use std::collections::VecDeque;
use std::fmt::Write as _;

use rand::{Rng, RngExt};

use super::complete::complete;
use crate::wire::event::{Event, Value};

/// An endless series of events of Konnect's three types: authentication, authorization and access.
/// The events of one request follow each other and share its `trace_id`, its organisation and its
/// caller.
///
/// No value is real: addresses are of the blocks reserved for documentation (RFC 5737, RFC 3849),
/// names of `example.com` (RFC 2606). The same generator state and the same clock give the same
/// events.
pub struct Samples<R, C> {
    rng: R,
    clock: C,
    org_id: String,
    callers: Vec<Caller>,
    /// The remaining events of the current request.
    pending: VecDeque<Event>,
}

impl<R: Rng, C: FnMut() -> i64> Samples<R, C> {
    /// Creates the series. `clock` returns the milliseconds since the Unix epoch and is called once
    /// a request.
    pub fn new(mut rng: R, clock: C) -> Self {
        let org_id = uuid(&mut rng);
        let callers = (0..8).map(|_| Caller::new(&mut rng)).collect();
        Self { rng, clock, org_id, callers, pending: VecDeque::new() }
    }

    fn request(&mut self) {
        let now = (self.clock)();
        let rng = &mut self.rng;
        let caller = &self.callers[rng.random_range(0..self.callers.len())];
        let operation = pick(rng, &OPERATIONS);
        let path = operation.path.replace("{id}", &uuid(rng));
        // Above 2^53, as many of the real ones are.
        let trace_id = rng.random_range(1u64 << 53..=u64::MAX).to_string();
        let succeeded = rng.random_ratio(19, 20);
        let granted = rng.random_ratio(9, 10);
        let event = |class: &str, name: &str| {
            let mut event = Event::new();
            for (field, value) in [
                ("event_class_id", class),
                ("name", name),
                ("src", &caller.address),
                ("org_id", &self.org_id),
                ("principal_id", &caller.id),
                ("principal_name", &caller.name),
                ("trace_id", &trace_id),
                ("user_agent", caller.user_agent),
            ] {
                event.set(field, Value::Text(value.to_owned()));
            }
            event.set("rt", Value::Number(now.to_string()));
            complete(&mut event, now);
            event
        };

        let outcome = if succeeded {
            "AUTHENTICATION_OUTCOME_SUCCESS"
        } else {
            pick(rng, &["AUTHENTICATION_OUTCOME_NOT_FOUND", "AUTHENTICATION_OUTCOME_LOCKED"])
        };
        let mut authentication = event(caller.authentication, outcome);
        authentication.set("request", Value::Text(path.clone()));
        authentication.set("success", Value::Boolean(succeeded));
        self.pending.push_back(authentication);

        if succeeded {
            let mut authorization = event("konnect", operation.authorization);
            authorization.set("action", Value::Text(operation.action.to_owned()));
            authorization.set("granted", Value::Boolean(granted));
            authorization.set("actor_id", Value::Text(String::new()));
            self.pending.push_back(authorization);
        }

        let status = match (succeeded, granted) {
            (false, _) => 401,
            (true, false) => 403,
            (true, true) => operation.status,
        };
        let mut access = event("KongGateway", "Ingress");
        access.set("request", Value::Text(path));
        access.set("act", Value::Text(operation.method.to_owned()));
        access.set("status", Value::Number(status.to_string()));
        access.set("query", Value::Text(operation.query.to_owned()));
        if rng.random_ratio(1, 50) {
            access.set("kong_initiated", Value::Boolean(true));
        }
        self.pending.push_back(access);
    }
}

impl<R: Rng, C: FnMut() -> i64> Iterator for Samples<R, C> {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        if self.pending.is_empty() {
            self.request();
        }
        self.pending.pop_front()
    }
}

/// A caller: a person or a machine.
struct Caller {
    id: String,
    name: String,
    address: String,
    user_agent: &'static str,
    authentication: &'static str,
}

impl Caller {
    fn new(rng: &mut impl Rng) -> Self {
        let (authentication, agents) = pick(rng, &CALLERS);
        let address = if rng.random_ratio(1, 4) {
            format!("2001:db8::{:x}", rng.random::<u16>())
        } else {
            let block = pick(rng, &["192.0.2", "198.51.100", "203.0.113"]);
            format!("{block}.{}", rng.random_range(1..255u8))
        };
        Self {
            id: uuid(rng),
            name: format!("{}@example.com", pick(rng, &NAMES)),
            address,
            user_agent: pick(rng, agents),
            authentication,
        }
    }
}

const NAMES: [&str; 8] = ["ada", "barbara", "edsger", "frances", "grace", "ken", "margaret", "radia"];

/// Methods of authentication, with the programs that use them.
const CALLERS: [(&str, &[&str]); 3] = [
    ("AUTHENTICATION_TYPE_SSO", &BROWSERS),
    ("AUTHENTICATION_TYPE_BASIC", &BROWSERS),
    (
        "AUTHENTICATION_TYPE_PAT",
        &[
            "curl/8.7.1",
            "terraform-provider-konnect/2.4.1",
            "decK/1.40.2",
            "grpc-node/1.24.11 grpc-c/8.0.0 (linux; chttp2; ganges)",
        ],
    ),
];

const BROWSERS: [&str; 2] = [
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0 Safari/537.36",
    "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
];

/// Content of a request.
#[derive(Clone, Copy)]
struct Operation {
    method: &'static str,
    path: &'static str,
    query: &'static str,
    authorization: &'static str,
    action: &'static str,
    status: u16,
}

const OPERATIONS: [Operation; 6] = [
    Operation {
        method: "GET",
        path: "/v2/control-planes",
        query: r#"{"page[number]":"1","page[size]":"100"}"#,
        authorization: "Authz.control-planes",
        action: "list",
        status: 200,
    },
    Operation {
        method: "GET",
        path: "/v2/control-planes/{id}/core-entities/services",
        query: "",
        authorization: "Authz.services",
        action: "retrieve",
        status: 200,
    },
    Operation {
        method: "POST",
        path: "/v2/control-planes/{id}/core-entities/routes",
        query: "",
        authorization: "Authz.routes",
        action: "create",
        status: 201,
    },
    Operation {
        method: "PATCH",
        path: "/v3/teams/{id}",
        query: "",
        authorization: "Authz.teams",
        action: "edit",
        status: 200,
    },
    Operation {
        method: "DELETE",
        path: "/v3/system-accounts/{id}/access-tokens",
        query: "",
        authorization: "Authz.system-accounts",
        action: "delete",
        status: 204,
    },
    Operation {
        method: "POST",
        path: "/konnect-api/api/vitals/v1/explore",
        query: r#"{"end":"1684270800","start":"1684098000"}"#,
        authorization: "Authz.usage",
        action: "retrieve",
        status: 200,
    },
];

fn pick<T: Copy>(rng: &mut impl Rng, from: &[T]) -> T {
    from[rng.random_range(0..from.len())]
}

/// Returns a random UUID (RFC 9562, version 4).
pub(crate) fn uuid(rng: &mut impl Rng) -> String {
    let mut bytes: [u8; 16] = rng.random();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut text = String::with_capacity(36);
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;
    use crate::send::line;
    use crate::wire::event::Format;
    use crate::wire::event::schema::Type;
    use crate::wire::event::schema::always_present;
    use crate::wire::line::Line;

    fn samples(seed: u64) -> impl Iterator<Item = Event> {
        let mut now = 1_767_323_045_678;
        Samples::new(StdRng::seed_from_u64(seed), move || {
            now += 1500;
            now
        })
    }

    #[test]
    fn the_same_seed_gives_the_same_events() {
        assert!(samples(1).take(100).eq(samples(1).take(100)));
        assert!(!samples(1).take(100).eq(samples(2).take(100)));
    }

    #[test]
    fn every_event_has_the_fields_of_its_type_in_every_format() {
        for event in samples(3).take(500) {
            let name = event.text("name").unwrap();
            assert_ne!(Type::of(&name), Type::Other);
            let present = always_present(&name, &event.text("severity").unwrap());
            for field in ["rt", "src", "request", "act", "status", "query", "action", "granted", "success"] {
                assert_eq!(event.field(field).is_some(), present.contains(&field), "{field} {event:?}");
            }
            for format in Format::ALL {
                let line = line(format, &event, None).unwrap();
                assert_eq!(Line::parse(&line).unwrap().time(), event.text("rt").unwrap().parse().ok());
            }
        }
    }

    #[test]
    fn the_events_of_a_request_share_its_trace() {
        let mut traces: BTreeMap<String, Vec<Event>> = BTreeMap::new();
        for event in samples(4).take(600) {
            traces.entry(event.text("trace_id").unwrap().into_owned()).or_default().push(event);
        }
        assert!(traces.values().all(|events| events.len() <= 3));
        assert!(traces.values().filter(|events| events.len() == 3).count() > 100);
        for events in traces.values() {
            for field in ["org_id", "principal_id", "src", "rt", "user_agent"] {
                assert!(events.iter().all(|event| event.field(field) == events[0].field(field)), "{field}");
            }
        }
    }

    #[test]
    fn uuids_are_of_version_4() {
        let mut rng = StdRng::seed_from_u64(5);
        for _ in 0..100 {
            let text = uuid(&mut rng);
            let bytes = text.as_bytes();
            assert_eq!((text.len(), bytes[14]), (36, b'4'), "{text}");
            assert!(b"89ab".contains(&bytes[19]), "{text}");
        }
    }
}
