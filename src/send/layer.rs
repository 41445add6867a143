//! Audit events of a Rust service, as `tracing` events.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::field::{Field, Visit};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use super::{SendError, Sender, Summary, complete};
use crate::wire::event::{Event, Value};

/// Target of the `tracing` events that are sent.
pub const TARGET: &str = "audit";

/// Number of events that wait for the sender.
const QUEUED_EVENTS: usize = 1024;

/// A layer that sends each `tracing` event of the target `audit`, signed, to a receiver. Its fields
/// are those of the audit event; the message is the event's `name` where no field says it; the rest
/// is filled in as by [`complete`].
///
/// It never blocks the thread that logs. [`AuditHandle::dropped`] counts the events that no longer
/// fit into the queue of 1024, as after a while without a receiver; a sender with a spool goes on
/// then. For an event that must not be lost, await [`Sender::send`] or the spool's `enqueue`
/// instead.
///
/// ```no_run
/// use auditgate::send::{Sender, layer};
/// use tracing_subscriber::layer::SubscriberExt as _;
/// use tracing_subscriber::util::SubscriberInitExt as _;
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let endpoint = "https://audit.example.com:8443/konnect/us".parse()?;
/// let (audit, handle) = layer::audit(Sender::builder(endpoint).authorization("Bearer abc").build()?);
/// tracing_subscriber::registry().with(audit).init();
///
/// tracing::info!(target: "audit", principal_id = "p-1", action = "delete", granted = true, "Authz.teams");
///
/// assert_eq!(handle.dropped(), 0);
/// let summary = handle.close().await?;
/// assert_eq!(summary.delivered, 1);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct AuditLayer {
    queue: mpsc::Sender<Event>,
    dropped: Arc<AtomicU64>,
}

/// The other end of an [`AuditLayer`].
#[derive(Debug)]
pub struct AuditHandle<D: Destination = Sender> {
    stop: mpsc::Sender<()>,
    task: JoinHandle<Result<D::Summary, D::Error>>,
    dropped: Arc<AtomicU64>,
}

/// Where the events of an [`AuditLayer`] go: a [`Sender`], or a sender with a spool.
pub trait Destination: Send + Sync + 'static {
    /// What is known at the end.
    type Summary: Send + 'static;
    /// Reason why it cannot be closed.
    type Error: From<SendError> + Send + 'static;

    /// Takes events in their order; waits while it has no room. Returns the number of those that it
    /// cannot take.
    fn take(&self, events: &[Event]) -> impl Future<Output = u64> + Send;

    /// Ends it gracefully.
    fn close(self) -> impl Future<Output = Result<Self::Summary, Self::Error>> + Send;
}

impl Destination for Sender {
    type Summary = Summary;
    type Error = SendError;

    async fn take(&self, events: &[Event]) -> u64 {
        let mut dropped = 0;
        for event in events {
            dropped += u64::from(self.enqueue(event).await.is_err());
        }
        dropped
    }

    async fn close(self) -> Result<Summary, SendError> {
        Self::close(self).await
    }
}

/// Returns a layer that sends with this sender, and the handle to end it.
///
/// # Panics
/// Outside a tokio runtime.
pub fn audit<D: Destination>(sender: D) -> (AuditLayer, AuditHandle<D>) {
    let (queue, mut queued) = mpsc::channel::<Event>(QUEUED_EVENTS);
    let (stop, mut stopped) = mpsc::channel::<()>(1);
    let dropped = Arc::<AtomicU64>::default();
    let unsendable = Arc::clone(&dropped);
    let task = tokio::spawn(async move {
        let mut events = Vec::new();
        loop {
            events.clear();
            tokio::select! {
                biased;
                _ = queued.recv_many(&mut events, QUEUED_EVENTS) => {}
                // The layer stays in the subscriber, so that its queue does not end.
                _ = stopped.recv() => {}
            }
            if events.is_empty() {
                break;
            }
            unsendable.fetch_add(sender.take(&events).await, Ordering::Relaxed);
        }
        sender.close().await
    });
    (AuditLayer { queue, dropped: Arc::clone(&dropped) }, AuditHandle { stop, task, dropped })
}

impl<D: Destination> AuditHandle<D> {
    /// Returns the number of events that the sender did not take: the queue was full, or they have
    /// no form in its format, or its spool could not be written.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Gives the sender what is queued, and closes it. Later events are dropped.
    ///
    /// # Errors
    /// [`SendError::Stopped`], and the errors of the sender's `close`.
    pub async fn close(self) -> Result<D::Summary, D::Error> {
        let _ = self.stop.send(()).await;
        self.task.await.map_err(|_| SendError::Stopped)?
    }
}

impl<S: tracing::Subscriber> Layer<S> for AuditLayer {
    fn on_event(&self, event: &tracing::Event<'_>, _context: Context<'_, S>) {
        if event.metadata().target() != TARGET {
            return;
        }
        let mut fields = Fields { event: Event::new(), message: None };
        event.record(&mut fields);
        let Fields { event: mut audit, message } = fields;
        if let Some(message) = message.filter(|_| audit.field("name").is_none()) {
            audit.set("name", Value::Text(message));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        complete(&mut audit, i64::try_from(now).unwrap_or(i64::MAX));
        if self.queue.try_send(audit).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The fields of a `tracing` event.
struct Fields {
    event: Event,
    message: Option<String>,
}

impl Fields {
    fn set(&mut self, field: &Field, value: Value) {
        self.event.set(field.name(), value);
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.message = Some(format!("{value:?}")),
            _ => self.set(field, Value::Text(format!("{value:?}"))),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, Value::Text(value.to_owned()));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, Value::Boolean(value));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, Value::Number(value.to_string()));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, Value::Number(value.to_string()));
    }

    fn record_i128(&mut self, field: &Field, value: i128) {
        self.set(field, Value::Number(value.to_string()));
    }

    fn record_u128(&mut self, field: &Field, value: u128) {
        self.set(field, Value::Number(value.to_string()));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no number for infinity.
        let text = value.to_string();
        self.set(field, if value.is_finite() { Value::Number(text) } else { Value::Text(text) });
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::super::receiver::{Answer, Receiver};
    use super::*;
    use crate::wire::event::Format;
    use crate::wire::line::Line;

    #[tokio::test]
    async fn events_of_the_target_are_sent_with_their_fields_and_types() {
        let receiver = Receiver::start([Answer::receipt(1, 0, 0)]);
        let sender = Sender::builder(receiver.endpoint()).format(Format::Json).build().unwrap();
        let (audit, handle) = audit(sender);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(audit), || {
            tracing::info!("not for the audit log");
            let big = 18_446_744_073_709_551_615_u64;
            tracing::info!(target: "audit", big, granted = true, action = "delete", what = ?Some(1), "Authz.teams");
            tracing::warn!(target: "audit", name = "Ingress", "other text");
        });
        assert_eq!(handle.dropped(), 0);
        assert_eq!(handle.close().await.unwrap().delivered, 2);
        let lines: Vec<String> =
            receiver.requests().iter().flat_map(super::super::receiver::Request::lines).collect();
        let first = Line::parse(lines[0].as_bytes()).unwrap().event();
        assert_eq!(first.field("big"), Some(&Value::Number("18446744073709551615".to_owned())));
        assert_eq!(first.field("granted"), Some(&Value::Boolean(true)));
        assert_eq!(first.text("name").unwrap(), "Authz.teams");
        assert_eq!(first.text("what").unwrap(), "Some(1)");
        assert!(first.field("trace_id").is_some() && first.field("rt").is_some());
        assert_eq!(Line::parse(lines[1].as_bytes()).unwrap().event().text("name").unwrap(), "Ingress");
    }
}
