//! The tasks behind the API: they generate events, post them by Konnect's rules, and run replay
//! jobs.

use std::sync::Arc;
use std::time::Instant;

use tokio::task::JoinSet;

use super::log::{Attempt, Events, ReplayStatus};
use super::{Destination, Mock};
use crate::send::{self, Collector, Delivered, Poster, RateLimiter, RetryObserver, SigningKey, Undelivered};
use crate::wire::line::Line;

/// Starts the tasks. They end when the set is dropped.
pub(super) fn start(mock: &Arc<Mock>) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    for log in 0..mock.deliveries.len() {
        tasks.spawn(deliver(Arc::clone(mock), log));
        tasks.spawn(replay(Arc::clone(mock), log));
    }
    if mock.options.rate > 0 {
        tasks.spawn(generate(Arc::clone(mock)));
    }
    tasks
}

async fn generate(mock: Arc<Mock>) {
    let mut limiter = RateLimiter::new(f64::from(mock.options.rate));
    loop {
        tokio::time::sleep(limiter.wait(1, Instant::now())).await;
        for log in 0..mock.deliveries.len() {
            mock.generate(log, 1);
        }
    }
}

/// Posts the events of a log while its webhook delivers.
async fn deliver(mock: Arc<Mock>, log: usize) {
    loop {
        let next = {
            let mut state = mock.state.lock();
            let events = state.logs[log].next_events();
            events.and_then(|events| Some((events, state.destination(log)?.clone())))
        };
        let Some((events, destination)) = next else {
            mock.deliveries[log].notified().await;
            continue;
        };
        let result = mock.post(log, &events, &destination).await;
        mock.tell(&events, &destination, "", &result);
        let mut state = mock.state.lock();
        let log = &mut state.logs[log];
        log.settle(&events, result.is_ok());
        log.webhook.is_stopped |= result.is_err() && mock.options.stays_inactive;
    }
}

/// Runs the replay jobs of a log.
async fn replay(mock: Arc<Mock>, log: usize) {
    loop {
        mock.replays[log].notified().await;
        let until = mock.state.lock().logs[log].counts.generated;
        mock.advance_replay(log, ReplayStatus::Running);
        let mut from = 0;
        let status = loop {
            let next = {
                let state = mock.state.lock();
                let Some(events) = state.logs[log].replay_events(from, until) else {
                    break ReplayStatus::Completed;
                };
                state.destination(log).map(|destination| (events, destination.clone()))
            };
            // Without a webhook there is nowhere to send them.
            let Some((events, destination)) = next else { break ReplayStatus::Failed };
            let result = mock.post(log, &events, &destination).await;
            mock.tell(&events, &destination, "replay: ", &result);
            if result.is_err() {
                break ReplayStatus::Failed;
            }
            from = events.end;
            mock.state.lock().logs[log].counts.replayed += events.lines.len() as u64;
        };
        mock.advance_replay(log, status);
    }
}

impl Mock {
    /// Generates events of a log and lets them be delivered.
    pub(super) fn generate(&self, log: usize, count: usize) {
        let now = self.now();
        self.state.lock().logs[log].generate(count, now);
        self.deliveries[log].notify_one();
    }

    fn advance_replay(&self, log: usize, status: ReplayStatus) {
        let now = self.now();
        if let Some(replay) = &mut self.state.lock().logs[log].replay {
            (replay.status, replay.updated_at) = (status, now);
        }
    }

    /// Posts events as one batch, signed with the key of this moment, until they are delivered or
    /// given up. The webhook's status shows each post.
    async fn post(
        self: &Arc<Self>,
        log: usize,
        events: &Events,
        destination: &Destination,
    ) -> Result<Delivered, Undelivered> {
        let key = Arc::clone(&self.state.lock().keys.signing);
        let mut batch = Collector::default();
        for line in &events.lines {
            if let Some(line) = signed(line, destination, &key) {
                batch.push(&line);
            }
        }
        let mock = Arc::clone(self);
        let observer: RetryObserver = Arc::new(move |retrying| {
            mock.attempted(log, retrying.error.status(), Some(retrying.error.to_string()));
            mock.state.lock().logs[log].counts.retried += 1;
            let (attempt, attempts, pause) = (retrying.attempt, retrying.attempts, retrying.pause);
            mock.say(format!("{}; attempt {attempt} of {attempts} in {pause:?}", retrying.error));
        });
        let poster = Poster::new(
            destination.client.clone(),
            destination.endpoint.clone(),
            destination.authorization.clone(),
            self.options.timeout,
            self.options.retry,
            Some(observer),
        );
        let Some(batch) = batch.take() else {
            return Err(Undelivered::Encode(std::io::Error::other("empty")));
        };
        let (_, _, result) = poster.deliver(events.end, batch).await;
        match &result {
            Ok(delivered) => self.attempted(log, Some(delivered.status), None),
            Err(error) => self.attempted(log, error.status(), Some(error.to_string())),
        }
        result
    }

    fn attempted(&self, log: usize, code: Option<u16>, error: Option<String>) {
        let at = self.now();
        self.state.lock().logs[log].webhook.attempted(Attempt { at, code, error });
    }

    fn tell(&self, events: &Events, to: &Destination, what: &str, result: &Result<Delivered, Undelivered>) {
        let (count, name) = (events.lines.len(), &to.name);
        self.say(match result {
            Ok(delivered) => format!("{what}{count} events to `{name}`: {}", delivered.status),
            Err(error) => format!("{what}{count} events to `{name}` lost: {error}"),
        });
    }

    /// Hands over a line to print, which is lost when nothing prints any more.
    fn say(&self, line: String) {
        let _ = self.options.messages.send(line);
    }
}

/// Writes an event in the destination's format, and signs it.
fn signed(line: &[u8], destination: &Destination, key: &SigningKey) -> Option<Vec<u8>> {
    let event = Line::parse(line).ok()?.event();
    send::line(destination.format, &event, Some(key)).ok()
}
