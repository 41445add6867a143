//! The API that Konnect documents. The global and the regional host are one here.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::log::{AuditLog, RETENTION, Replay, ReplayStatus, timestamp};
use super::reply::{Fields, Invalid, Reply};
use super::{Authorization, Call, Destination, Mock};
use crate::net::{Client, Endpoint};
use crate::send::sample::uuid;
use crate::wire::event::Format;

/// Path of the key set, the only one without a token.
pub(super) const KEY_SET: [&str; 3] = ["v2", "audit-log-webhook", "jwks.json"];

/// Time by which a window may begin before the retention, in milliseconds: the request takes a while.
const WINDOW_SLACK: i64 = 60_000;

const DEFAULT_PAGE: usize = 10;
const MAX_PAGE: usize = 100;

/// A response, or a refusal.
type Answered = Result<Reply, Reply>;

impl Mock {
    pub(super) fn api(&self, segments: &[&str], call: &Call<'_>) -> Answered {
        match segments {
            ["v3", "audit-log-destinations"] => match call.method.as_str() {
                "GET" => self.list(call.query),
                "POST" => self.create(call.body),
                _ => Err(Reply::method("GET, POST")),
            },
            ["v3", "audit-log-destinations", id] => match call.method.as_str() {
                "PATCH" => self.change(id, call.body),
                _ => Err(Reply::method("PATCH")),
            },
            ["v2", "audit-log-destinations", id] => match call.method.as_str() {
                "DELETE" => self.delete(id),
                _ => Err(Reply::method("DELETE")),
            },
            ["v2", "audit-log-webhook"] => only_get(call, || self.webhook_of_v2()),
            segments if *segments == KEY_SET => {
                only_get(call, || Reply::text(200, "application/json", self.state.lock().keys.document()))
            }
            ["v3", "audit-logs"] => Err(Reply::problem(
                501,
                "this stand-in has no pull API, whose events have other fields; use a replay job",
            )),
            ["v3", "portals", portal, rest @ ..] => {
                let log = self.portal(portal).ok_or_else(|| not_found("portal"))?;
                self.log_api(log, rest, call)
            }
            ["v3", rest @ ..] => self.log_api(0, rest, call),
            _ => Err(not_found("path")),
        }
    }

    /// Answers what is the same for the organisation and for a portal.
    fn log_api(&self, log: usize, segments: &[&str], call: &Call<'_>) -> Answered {
        match segments {
            ["audit-log-webhook"] => match call.method.as_str() {
                "GET" => Ok(Reply::json(200, &binding(&self.state.lock().logs[log]))),
                "PATCH" => self.bind(log, call.body),
                "DELETE" => self.unbind(log),
                _ => Err(Reply::method("GET, PATCH, DELETE")),
            },
            ["audit-log-webhook", "status"] => {
                only_get(call, || Reply::json(200, &status(&self.state.lock().logs[log])))
            }
            ["audit-log-replay-job"] => match call.method.as_str() {
                "GET" => {
                    let state = self.state.lock();
                    Ok(Reply::json(200, &job(state.logs[log].replay.as_ref())))
                }
                "PUT" => self.begin_replay(log, call.body),
                _ => Err(Reply::method("GET, PUT")),
            },
            _ => Err(not_found("path")),
        }
    }

    /// Returns the number of a portal's log.
    pub(super) fn portal(&self, id: &str) -> Option<usize> {
        self.state.lock().logs.iter().position(|log| log.portal.as_deref() == Some(id))
    }

    fn list(&self, query: &str) -> Answered {
        let (mut name, mut size, mut after) = (None, DEFAULT_PAGE, None);
        let mut fields = Fields::parse(b"")?;
        for (key, value) in parameters(query) {
            match &*key {
                "filter[name][eq]" => name = Some(value),
                "page[after]" => after = Some(value),
                "page[size]" => match value.parse() {
                    Ok(asked @ 1..=MAX_PAGE) => size = asked,
                    _ => fields.refuse(&key, format!("must be a number from 1 to {MAX_PAGE}")),
                },
                _ => fields.refuse(&key, "is not a parameter of this request"),
            }
        }
        fields.finish()?;
        let state = self.state.lock();
        let begin = match &after {
            None => 0,
            Some(after) => {
                let at = state.destinations.iter().position(|destination| destination.id == **after);
                at.ok_or_else(|| {
                    Reply::invalid(vec![Invalid::new("page[after]", "is not a cursor of this list")])
                })? + 1
            }
        };
        let mut matching = state.destinations[begin..]
            .iter()
            .filter(|destination| name.as_ref().is_none_or(|name| destination.name == **name));
        let page: Vec<_> = matching.by_ref().take(size).collect();
        let next = matching.next().and(page.last()).map(|last| {
            let filter = name.as_ref().map_or(String::new(), |name| {
                let name = percent_encoding::utf8_percent_encode(name, percent_encoding::NON_ALPHANUMERIC);
                format!("&filter[name][eq]={name}")
            });
            format!("/v3/audit-log-destinations?page[size]={size}&page[after]={}{filter}", last.id)
        });
        let data: Vec<_> = page.into_iter().map(destination).collect();
        Ok(Reply::json(200, &json!({"data": data, "meta": {"page": {"next": next, "size": size}}})))
    }

    fn create(&self, body: &[u8]) -> Answered {
        let mut fields = Fields::parse(body)?;
        for field in ["name", "endpoint", "log_format"] {
            fields.require(field);
        }
        let asked = Asked::parse(fields)?;
        let (Some(name), Some(endpoint), Some(format)) = (asked.name, asked.endpoint, asked.format) else {
            return Err(Reply::invalid_body("name, endpoint and log_format must not be null"));
        };
        let (id, now) = (uuid(&mut rand::rng()), self.now());
        let client = self.client(&endpoint)?;
        let authorization = asked.authorization;
        let created = Destination {
            id,
            name,
            endpoint,
            authorization,
            format,
            client,
            created_at: now,
            updated_at: now,
        };
        let reply = Reply::json(201, &destination(&created));
        self.state.lock().destinations.push(created);
        Ok(reply)
    }

    fn change(&self, id: &str, body: &[u8]) -> Answered {
        let asked = Asked::parse(Fields::parse(body)?)?;
        let client = asked.endpoint.as_ref().map(|endpoint| self.client(endpoint)).transpose()?;
        let now = self.now();
        let mut state = self.state.lock();
        let found = state.destinations.iter_mut().find(|destination| destination.id == id);
        let found = found.ok_or_else(|| not_found("destination"))?;
        found.name = asked.name.unwrap_or_else(|| found.name.clone());
        found.endpoint = asked.endpoint.unwrap_or_else(|| found.endpoint.clone());
        found.authorization = asked.authorization.or_else(|| found.authorization.clone());
        found.format = asked.format.unwrap_or(found.format);
        found.client = client.unwrap_or_else(|| found.client.clone());
        found.updated_at = now;
        Ok(Reply::json(200, &destination(found)))
    }

    fn delete(&self, id: &str) -> Answered {
        let mut state = self.state.lock();
        let at = state.destinations.iter().position(|destination| destination.id == id);
        let at = at.ok_or_else(|| not_found("destination"))?;
        if state.logs.iter().any(|log| log.webhook.destination.as_deref() == Some(id)) {
            return Err(Reply::problem(409, "destination is in use"));
        }
        state.destinations.remove(at);
        Ok(Reply::nothing())
    }

    fn client(&self, endpoint: &Endpoint) -> Result<Client, Reply> {
        Client::for_endpoint(endpoint, self.options.ca.as_deref())
            .map_err(|error| Reply::problem(500, &error.to_string()))
    }

    fn bind(&self, log: usize, body: &[u8]) -> Answered {
        let mut fields = Fields::parse(body)?;
        let id = fields.text("audit_log_destination_id");
        let is_enabled = fields.boolean("enabled").unwrap_or(false);
        let mut state = self.state.lock();
        if let Some(id) = &id
            && !state.destinations.iter().any(|destination| destination.id == *id)
        {
            fields.refuse("audit_log_destination_id", "is not the ID of a destination");
        }
        let bound = id.or_else(|| state.logs[log].webhook.destination.clone());
        if is_enabled && bound.is_none() {
            fields.refuse("enabled", "needs a destination: audit_log_destination_id is missing");
        }
        fields.finish()?;
        state.logs[log].bind(bound, is_enabled);
        self.deliveries[log].notify_one();
        Ok(Reply::json(200, &binding(&state.logs[log])))
    }

    fn unbind(&self, log: usize) -> Answered {
        let mut state = self.state.lock();
        let log = &mut state.logs[log];
        if log.portal.is_some() && log.webhook.is_enabled {
            return Err(Reply::problem(409, "the webhook is enabled: disable it first"));
        }
        log.bind(None, false);
        Ok(Reply::nothing())
    }

    /// The older form, which has unconfigured values instead of none.
    fn webhook_of_v2(&self) -> Reply {
        const UNCONFIGURED: &str = "unconfigured";
        let state = self.state.lock();
        let webhook = &state.logs[0].webhook;
        let bound = state.destinations.iter().find(|one| Some(&one.id) == webhook.destination.as_ref());
        Reply::json(
            200,
            &json!({
                "endpoint": bound.map_or(UNCONFIGURED.to_owned(), |bound| bound.endpoint.to_string()),
                "log_format": bound.map_or(UNCONFIGURED, |bound| bound.format.as_str()),
                "skip_ssl_verification": false,
                "enabled": webhook.is_enabled,
                "updated_at": bound.map(|bound| timestamp(bound.updated_at)),
            }),
        )
    }

    fn begin_replay(&self, log: usize, body: &[u8]) -> Answered {
        let time = |text: &str| {
            let time = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| "must be a time of RFC 3339")?;
            i64::try_from(time.unix_timestamp_nanos() / 1_000_000).map_err(|_| "is out of range")
        };
        let now = self.now();
        let mut fields = Fields::parse(body)?;
        fields.require("start_at");
        fields.require("end_at");
        let (start_at, end_at) = (fields.parsed("start_at", time), fields.parsed("end_at", time));
        if start_at.is_some_and(|start| start < now - RETENTION - WINDOW_SLACK) {
            fields.refuse("start_at", "must be within the last 7 days");
        }
        if start_at.zip(end_at).is_some_and(|(start, end)| start >= end) {
            fields.refuse("end_at", "must be after start_at");
        }
        fields.finish()?;
        let (Some(start_at), Some(end_at)) = (start_at, end_at) else {
            return Err(Reply::invalid_body("start_at and end_at must not be null"));
        };
        let mut state = self.state.lock();
        let replay = &mut state.logs[log].replay;
        if replay.as_ref().is_some_and(|replay| !replay.is_over()) {
            return Err(Reply::problem(409, "a replay job is in progress"));
        }
        let begun = Replay { start_at, end_at, updated_at: now, status: ReplayStatus::Accepted };
        let reply = Reply::json(202, &job(Some(&begun)));
        *replay = Some(begun);
        self.replays[log].notify_one();
        Ok(reply)
    }
}

/// The settings of a destination that a request has.
struct Asked {
    name: Option<String>,
    endpoint: Option<Endpoint>,
    authorization: Option<Authorization>,
    format: Option<Format>,
}

impl Asked {
    fn parse(mut fields: Fields) -> Result<Self, Reply> {
        let name = fields.parsed("name", |name| match name.trim() {
            "" => Err("must not be empty"),
            _ => Ok(name.to_owned()),
        });
        let endpoint = fields.parsed("endpoint", Endpoint::parse);
        let authorization = fields.parsed("authorization", |value| {
            Authorization::from_str(value).map_err(|_| "cannot be the value of a header")
        });
        let format = fields.parsed("log_format", str::parse::<Format>);
        if fields.boolean("skip_ssl_verification") == Some(true) {
            fields.refuse(
                "skip_ssl_verification",
                "is not supported: this stand-in verifies certificates, with its --ca FILE an own authority's",
            );
        }
        fields.finish()?;
        Ok(Self { name, endpoint, authorization, format })
    }
}

fn only_get(call: &Call<'_>, reply: impl FnOnce() -> Reply) -> Answered {
    if call.method.as_str() == "GET" { Ok(reply()) } else { Err(Reply::method("GET")) }
}

fn not_found(what: &str) -> Reply {
    Reply::problem(404, &format!("there is no such {what}"))
}

/// Splits a query into decoded names and values.
fn parameters(query: &str) -> impl Iterator<Item = (Cow<'_, str>, Cow<'_, str>)> {
    let decoded = |text| percent_decode_str(text).decode_utf8_lossy();
    query.split('&').filter(|pair| !pair.is_empty()).map(move |pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(name), decoded(value))
    })
}

/// A destination, without its authorization.
fn destination(destination: &Destination) -> Value {
    json!({
        "id": destination.id,
        "name": destination.name,
        "endpoint": destination.endpoint.to_string(),
        "log_format": destination.format.as_str(),
        "skip_ssl_verification": false,
        "created_at": timestamp(destination.created_at),
        "updated_at": timestamp(destination.updated_at),
    })
}

fn binding(log: &AuditLog) -> Value {
    let mut binding = json!({"enabled": log.webhook.is_enabled});
    if let Some(id) = &log.webhook.destination {
        binding["audit_log_destination_id"] = json!(id);
    }
    binding
}

fn status(log: &AuditLog) -> Value {
    let webhook = &log.webhook;
    let mut status = json!({"webhook_enabled": webhook.is_enabled, "webhook_status": webhook.status()});
    if let Some(last) = &webhook.last {
        status["last_attempt_at"] = json!(timestamp(last.at));
        if let Some(code) = last.code {
            status["last_response_code"] = json!(code);
        }
        status["last_response_message"] = json!(last.error.as_deref().unwrap_or("OK"));
    }
    status
}

fn job(replay: Option<&Replay>) -> Value {
    // Konnect's times before the first job: those of Go's zero value.
    const NEVER: &str = "0001-01-01T00:00:00Z";
    match replay {
        None => json!({"start_at": NEVER, "end_at": NEVER, "status": "unconfigured", "updated_at": NEVER}),
        Some(replay) => json!({
            "start_at": timestamp(replay.start_at),
            "end_at": timestamp(replay.end_at),
            "status": replay.status,
            "updated_at": timestamp(replay.updated_at),
        }),
    }
}
