//! A sender for programs without a runtime.

use tokio::runtime::Handle;

use super::own_runtime::OwnRuntime;
use super::{Builder, Delivered, SendError, Summary};
use crate::wire::event::Event;

/// A sender with a runtime of its own, on a thread of its own. Many threads can share it by
/// reference.
///
/// ```no_run
/// # fn produce() -> Result<(), Box<dyn std::error::Error>> {
/// use auditgate::send::{Sender, blocking};
/// use auditgate::wire::event::{Event, Value};
///
/// let endpoint = "https://audit.example.com:8443/konnect/us".parse()?;
/// let sender = blocking::Sender::start(Sender::builder(endpoint).authorization("Bearer abc"))?;
/// let mut event = Event::new();
/// event.set("name", Value::Text("Ingress".to_owned()));
/// auditgate::send::complete(&mut event, 1_767_323_045_678);
/// sender.send(&event)?;
/// sender.close()?;
/// # Ok(())
/// # }
/// ```
///
/// Its methods must not be called on a thread of another runtime, which they would block.
pub struct Sender {
    inner: super::Sender,
    runtime: OwnRuntime,
}

/// An event that was queued.
#[derive(Debug)]
#[must_use = "only its result says whether the receiver has the event"]
pub struct Delivery<'s> {
    inner: super::Delivery,
    runtime: &'s Handle,
}

impl Sender {
    /// Starts the thread and the sender.
    ///
    /// # Errors
    /// As [`Builder::build`]; [`SendError::Thread`] when the system gives no thread.
    pub fn start(builder: Builder) -> Result<Self, SendError> {
        let runtime = OwnRuntime::start().map_err(SendError::Thread)?;
        let inner = {
            let _inside = runtime.handle().enter();
            builder.build()?
        };
        Ok(Self { inner, runtime })
    }

    /// Sends an event, and returns when the receiver has it: see [`super::Sender::send`].
    ///
    /// # Errors
    /// As there.
    pub fn send(&self, event: &Event) -> Result<Delivered, SendError> {
        self.runtime.handle().block_on(self.inner.send(event))
    }

    /// Queues an event: see [`super::Sender::enqueue`].
    ///
    /// # Errors
    /// As there.
    pub fn enqueue(&self, event: &Event) -> Result<Delivery<'_>, SendError> {
        let inner = self.runtime.handle().block_on(self.inner.enqueue(event))?;
        Ok(Delivery { inner, runtime: self.runtime.handle() })
    }

    /// Sends what is left, and returns when every batch is delivered or given up.
    ///
    /// # Errors
    /// [`SendError::Stopped`].
    pub fn close(self) -> Result<Summary, SendError> {
        self.runtime.handle().block_on(self.inner.close())
    }
}

impl Delivery<'_> {
    /// Waits until the receiver has the event, or its batch is given up.
    ///
    /// # Errors
    /// [`SendError::Undelivered`] and [`SendError::Stopped`].
    pub fn wait(self) -> Result<Delivered, SendError> {
        self.runtime.block_on(self.inner)
    }
}

#[cfg(test)]
mod tests {
    use super::super::receiver::{Answer, Receiver};
    use super::*;
    use crate::send::complete;
    use crate::wire::event::Value;

    #[test]
    fn events_of_several_threads_are_sent_without_a_runtime() {
        let receiver = Receiver::start([Answer::receipt(1, 0, 0)]);
        let sender = Sender::start(super::super::Sender::builder(receiver.endpoint())).unwrap();
        let mut event = Event::new();
        event.set("name", Value::Text("Ingress".to_owned()));
        complete(&mut event, 0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| assert_eq!(sender.send(&event).unwrap().status, 200));
            }
        });
        let queued = sender.enqueue(&event).unwrap();
        queued.wait().unwrap();
        let summary = sender.close().unwrap();
        assert_eq!((summary.events, summary.delivered), (4, 4));
    }
}
