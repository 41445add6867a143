//! An audit log: its events of the last 7 days, its webhook and its replay job.

use std::collections::VecDeque;
use std::sync::Arc;

use rand::rngs::StdRng;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::clock::Clock;
use crate::send::sample::Samples;
use crate::wire::event::Value;
use crate::wire::json;

/// Time for which Konnect keeps events, in milliseconds.
pub(super) const RETENTION: i64 = 7 * 24 * 3600 * 1000;

/// Maximum number of events that are kept: 7 days at one a second, some 400 MB. Then the oldest are
/// forgotten.
const MAX_EVENTS: usize = 700_000;

/// Maximum number of events in a batch of the webhook. A replay has others, as Konnect's may.
const BATCH_EVENTS: usize = 500;
const REPLAY_BATCH_EVENTS: usize = 200;

/// An audit log: the organisation's, or that of a portal.
pub(super) struct AuditLog {
    pub(super) portal: Option<String>,
    pub(super) webhook: Webhook,
    pub(super) replay: Option<Replay>,
    pub(super) counts: Counts,
    samples: Samples<StdRng, Box<dyn FnMut() -> i64 + Send>>,
    events: VecDeque<Kept>,
}

/// An event that can be sent again.
struct Kept {
    /// In milliseconds since the Unix epoch.
    at: i64,
    /// JSON, not signed.
    line: Arc<[u8]>,
}

/// A webhook.
#[derive(Default)]
pub(super) struct Webhook {
    pub(super) destination: Option<String>,
    pub(super) is_enabled: bool,
    /// Whether it delivers nothing until it is enabled again.
    pub(super) is_stopped: bool,
    pub(super) last: Option<Attempt>,
    /// Whether the last post since the webhook was set up failed.
    has_failed: bool,
    /// Number of the first event that is not settled.
    next: u64,
}

/// Result of the last post.
pub(super) struct Attempt {
    /// In milliseconds since the Unix epoch.
    pub(super) at: i64,
    /// Status of the response; none without one.
    pub(super) code: Option<u16>,
    /// Why it failed; none if it did not.
    pub(super) error: Option<String>,
}

/// A replay job. Times are in milliseconds since the Unix epoch.
#[derive(Clone)]
pub(super) struct Replay {
    pub(super) start_at: i64,
    pub(super) end_at: i64,
    pub(super) updated_at: i64,
    pub(super) status: ReplayStatus,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum ReplayStatus {
    Accepted,
    Running,
    Completed,
    Failed,
}

/// Numbers of events, since the start.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Counts {
    pub(super) generated: u64,
    /// By the webhook, without replays.
    pub(super) delivered: u64,
    /// In batches that were given up.
    pub(super) lost: u64,
    /// By replay jobs.
    pub(super) replayed: u64,
    /// Number of posts that were repeated.
    pub(super) retried: u64,
}

/// Events to post: as JSON, not signed.
pub(super) struct Events {
    pub(super) lines: Vec<Arc<[u8]>>,
    /// Number of the event behind the last.
    pub(super) end: u64,
}

impl AuditLog {
    pub(super) fn new(portal: Option<String>, clock: &Clock) -> Self {
        let wall = Arc::clone(&clock.wall);
        let samples = Samples::new(rand::make_rng(), Box::new(move || wall()) as Box<_>);
        let (webhook, counts) = (Webhook::default(), Counts::default());
        Self { portal, webhook, replay: None, counts, samples, events: VecDeque::new() }
    }

    /// Generates events, and forgets those that are too old or too many.
    pub(super) fn generate(&mut self, count: usize, now: i64) {
        for mut event in self.samples.by_ref().take(count) {
            if let Some(portal) = &self.portal {
                event.set("event_product", Value::Text("Dev-Portal".to_owned()));
                event.set("portal_id", Value::Text(portal.clone()));
            }
            let at = event.text("rt").and_then(|rt| rt.parse().ok()).unwrap_or(now);
            self.events.push_back(Kept { at, line: json::write(&event).into() });
            self.counts.generated += 1;
            while self.events.len() > MAX_EVENTS
                || self.events.front().is_some_and(|event| event.at < now - RETENTION)
            {
                self.events.pop_front();
            }
        }
    }

    /// Returns the number of events that can be replayed.
    pub(super) fn kept(&self) -> usize {
        self.events.len()
    }

    /// Returns the number of events that the webhook has still to deliver.
    pub(super) fn waiting(&self) -> u64 {
        if self.webhook.delivers() { self.counts.generated - self.webhook.next } else { 0 }
    }

    /// Returns the next events for the webhook. Events that were forgotten before it came to them
    /// are lost.
    pub(super) fn next_events(&mut self) -> Option<Events> {
        if !self.webhook.delivers() {
            return None;
        }
        let oldest = self.oldest();
        self.counts.lost += oldest.saturating_sub(self.webhook.next);
        self.webhook.next = self.webhook.next.max(oldest);
        let events = self.from(self.webhook.next).take(BATCH_EVENTS);
        let lines: Vec<_> = events.map(|event| Arc::clone(&event.line)).collect();
        let end = self.webhook.next + lines.len() as u64;
        (!lines.is_empty()).then_some(Events { lines, end })
    }

    /// Records what became of events of [`Self::next_events`].
    pub(super) fn settle(&mut self, events: &Events, is_delivered: bool) {
        let count = events.lines.len() as u64;
        if is_delivered {
            self.counts.delivered += count;
        } else {
            self.counts.lost += count;
        }
        // It may have been enabled again meanwhile, and be further on.
        self.webhook.next = self.webhook.next.max(events.end);
    }

    /// Returns the events of the replay job's window from a number on, up to `until`.
    pub(super) fn replay_events(&self, from: u64, until: u64) -> Option<Events> {
        let window = self.replay.as_ref()?;
        let from = from.max(self.oldest());
        let in_window = (from..until)
            .zip(self.from(from))
            .filter(|(_, event)| (window.start_at..=window.end_at).contains(&event.at))
            .take(REPLAY_BATCH_EVENTS);
        let (mut lines, mut end) = (Vec::new(), from);
        for (number, event) in in_window {
            lines.push(Arc::clone(&event.line));
            end = number + 1;
        }
        (!lines.is_empty()).then_some(Events { lines, end })
    }

    /// Sets the binding. A webhook that begins to deliver does so with the next event: what was
    /// generated before is for a replay job.
    pub(super) fn bind(&mut self, destination: Option<String>, is_enabled: bool) {
        if !self.webhook.delivers() {
            self.webhook.next = self.counts.generated;
        }
        let webhook = &mut self.webhook;
        (webhook.destination, webhook.is_enabled, webhook.is_stopped) = (destination, is_enabled, false);
        webhook.has_failed = false;
    }

    /// Returns the number of the oldest event that is kept.
    fn oldest(&self) -> u64 {
        self.counts.generated - self.events.len() as u64
    }

    /// Returns the events from a number on.
    fn from(&self, number: u64) -> impl Iterator<Item = &Kept> {
        let skipped = usize::try_from(number.saturating_sub(self.oldest())).unwrap_or(usize::MAX);
        self.events.iter().skip(skipped)
    }
}

impl Webhook {
    fn delivers(&self) -> bool {
        self.is_enabled && !self.is_stopped && self.destination.is_some()
    }

    /// Records the result of a post.
    pub(super) fn attempted(&mut self, attempt: Attempt) {
        self.has_failed = attempt.error.is_some();
        self.last = Some(attempt);
    }

    /// Returns its status in Konnect's words.
    pub(super) fn status(&self) -> &'static str {
        match self.destination {
            None => "unconfigured",
            Some(_) if self.delivers() && !self.has_failed => "active",
            Some(_) => "inactive",
        }
    }
}

impl Replay {
    pub(super) fn is_over(&self) -> bool {
        matches!(self.status, ReplayStatus::Completed | ReplayStatus::Failed)
    }
}

/// Formats milliseconds since the Unix epoch (RFC 3339).
pub(super) fn timestamp(milliseconds: i64) -> String {
    let time = OffsetDateTime::from_unix_timestamp_nanos(i128::from(milliseconds) * 1_000_000);
    time.ok().and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_default()
}
