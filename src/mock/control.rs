//! Requests under `/mock/`, which Konnect does not have: what tests and trainers ask for.

use std::time::Duration;

use serde_json::{Value, json};

use super::log::AuditLog;
use super::reply::{Fields, Reply};
use super::{Call, Faults, Mock};

/// Maximum number of events of one request.
const MAX_EVENTS: u64 = 100_000;

/// Maximum delay of a response, in milliseconds: a connection lives for a minute.
const MAX_DELAY: u64 = 50_000;

impl Mock {
    pub(super) fn control(&self, name: &str, call: &Call<'_>) -> Result<Reply, Reply> {
        let allowed = match name {
            "events" | "rotate-key" | "webhook" | "answers" => "POST",
            "state" => "GET",
            _ => return Err(Reply::problem(404, "there is no such path under /mock/")),
        };
        if call.method.as_str() != allowed {
            return Err(Reply::method(allowed));
        }
        let mut fields = Fields::parse(call.body)?;
        match name {
            "events" => {
                let log = self.log(&mut fields);
                let count = fields.number("count", MAX_EVENTS).unwrap_or(1);
                fields.finish()?;
                self.generate(log, usize::try_from(count).unwrap_or(usize::MAX));
            }
            "rotate-key" => self.rotate(fields)?,
            "webhook" => {
                let log = self.log(&mut fields);
                let is_stopped = fields.parsed("status", |status| match status {
                    "inactive" => Ok(true),
                    _ => Err("must be inactive; PATCH of the webhook with enabled makes it active"),
                });
                fields.finish()?;
                self.state.lock().logs[log].webhook.is_stopped = is_stopped.unwrap_or(true);
            }
            "answers" => self.break_answers(fields)?,
            _ => fields.finish()?,
        }
        Ok(Reply::json(200, &self.counts()))
    }

    /// Returns the number of the log whose portal a request names, by default the organisation's.
    fn log(&self, fields: &mut Fields) -> usize {
        let log = fields.parsed("portal", |id| self.portal(id).ok_or("is not the ID of a portal"));
        log.unwrap_or(0)
    }

    fn rotate(&self, mut fields: Fields) -> Result<(), Reply> {
        let steps = fields.parsed("step", |step| match step {
            "publish" => Ok((true, false)),
            "use" => Ok((false, true)),
            _ => Err("must be publish or use; without it, both are done"),
        });
        fields.finish()?;
        let (publishes, uses) = steps.unwrap_or((true, true));
        let keys = &mut self.state.lock().keys;
        if publishes {
            keys.publish();
        }
        if uses && !keys.take_up() {
            return Err(Reply::problem(409, "no key is published that is not used yet"));
        }
        Ok(())
    }

    fn break_answers(&self, mut fields: Fields) -> Result<(), Reply> {
        let delay = Duration::from_millis(fields.number("delay_ms", MAX_DELAY).unwrap_or(0));
        let status = fields.number("status", 599).and_then(|status| u16::try_from(status).ok());
        if status.is_some_and(|status| status < 200) {
            fields.refuse("status", "must be from 200 to 599");
        }
        let body = fields.text("body");
        let remaining = fields.number("times", u64::MAX).unwrap_or(1);
        fields.finish()?;
        let reply = match (status, body) {
            (None, None) => None,
            (status, Some(body)) => Some(Reply::text(status.unwrap_or(200), "application/json", body)),
            (Some(status), None) => Some(Reply::problem(status, "as POST /mock/answers asked for")),
        };
        self.state.lock().faults = (remaining > 0).then_some(Faults { remaining, delay, reply });
        Ok(())
    }

    fn counts(&self) -> Value {
        let state = self.state.lock();
        let (organisation, portals) = state.logs.split_at(1);
        let portals: serde_json::Map<String, Value> =
            portals.iter().filter_map(|log| Some((log.portal.clone()?, counts(log)))).collect();
        let keys = state.keys.ids();
        json!({
            "organization": organisation.first().map(counts),
            "portals": portals,
            "signing_key": keys.first(),
            "published_keys": keys,
        })
    }
}

fn counts(log: &AuditLog) -> Value {
    let mut counts = json!(log.counts);
    counts["kept"] = json!(log.kept());
    counts["waiting"] = json!(log.waiting());
    counts
}
