//! The settings of a sender.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{
    BatchLimits, Dispatch, Observer, Poster, QUEUED_LINES, Retry, RetryObserver, SendError, Sender,
    SigningKey, Summary, run,
};
use crate::net::{Client, ClientOptions, Endpoint, HeaderValue, Identity, Pin};
use crate::wire::event::Format;

/// Destination and settings of a sender.
#[must_use = "nothing is sent before it is built"]
pub struct Builder {
    endpoint: Endpoint,
    authorization: Option<Result<HeaderValue, SendError>>,
    connection: ClientOptions,
    pub(crate) format: Format,
    pub(crate) batch: BatchLimits,
    retry: Retry,
    pub(crate) connections: NonZeroUsize,
    timeout: Duration,
    pub(crate) signing_key: Option<SigningKey>,
    observer: Option<Observer>,
    retry_observer: Option<RetryObserver>,
}

impl Builder {
    pub(super) fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            authorization: None,
            connection: ClientOptions::default(),
            format: Format::Cef,
            batch: BatchLimits::default(),
            retry: Retry::default(),
            connections: NonZeroUsize::MIN,
            timeout: Duration::from_secs(30),
            signing_key: None,
            observer: None,
            retry_observer: None,
        }
    }

    /// Sets the value of the `Authorization` header (RFC 9110, section 11.6.2), scheme included.
    /// None by default.
    pub fn authorization(mut self, value: impl Into<String>) -> Self {
        let value = HeaderValue::try_from(value.into()).map_err(|_| SendError::Authorization);
        self.authorization = Some(value);
        self
    }

    /// Sets the PEM file of the only certificate authorities to trust; by default those of the
    /// system.
    pub fn ca(mut self, path: impl Into<PathBuf>) -> Self {
        self.connection.ca = Some(path.into());
        self
    }

    /// Sets the client certificate for a receiver that asks for one; none by default.
    pub fn client_certificate(mut self, identity: Identity) -> Self {
        self.connection.identity = Some(identity);
        self
    }

    /// Adds a key that the receiver's certificate may have, besides being trusted; any by default.
    pub fn pin(mut self, pin: Pin) -> Self {
        self.connection.pins.push(pin);
        self
    }

    /// Sets the URL of the HTTP proxy; by default that of the environment (`HTTPS_PROXY`,
    /// `ALL_PROXY`, `NO_PROXY`).
    pub fn proxy(mut self, url: impl Into<String>) -> Self {
        self.connection.proxy = Some(url.into());
        self
    }

    /// Sets everything about the connection at once.
    #[doc(hidden)]
    pub fn connection(mut self, options: ClientOptions) -> Self {
        self.connection = options;
        self
    }

    /// Sets the format in which events are written. CEF by default.
    pub fn format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }

    /// Sets the limits of a batch.
    pub fn batch(mut self, limits: BatchLimits) -> Self {
        self.batch = limits;
        self
    }

    /// Sets whether and when a batch is posted again.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }

    /// Sets the number of batches in flight at the same time. The order of batches is kept with 1
    /// only, which is the default; within a batch it always is.
    pub fn connections(mut self, connections: NonZeroUsize) -> Self {
        self.connections = connections;
        self
    }

    /// Sets the timeout of one post, from name resolution to the response's end. 30 s by default.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets the key that signs. Without one, the default, events are not signed.
    pub fn signing_key(mut self, key: SigningKey) -> Self {
        self.signing_key = Some(key);
        self
    }

    /// Sets what receives the report of each batch.
    pub fn observer(mut self, observer: Observer) -> Self {
        self.observer = Some(observer);
        self
    }

    /// Sets what is told before each pause that a batch will be posted again, and why.
    pub fn retry_observer(mut self, observer: RetryObserver) -> Self {
        self.retry_observer = Some(observer);
        self
    }

    /// Starts the background task on the current tokio runtime. Reads the certificate authorities,
    /// and so blocks on the file system for a moment; connects only when the first batch is ready.
    ///
    /// # Errors
    /// [`SendError::Tls`], [`SendError::Authorization`] and [`SendError::NoRuntime`].
    pub fn build(mut self) -> Result<Sender, SendError> {
        let runtime = Handle::try_current().map_err(|_| SendError::NoRuntime)?;
        let (format, limits, connections) = (self.format, self.batch, self.connections.get());
        let (signing_key, observer) = (self.signing_key.take(), self.observer.take());
        let (lines, queue) = mpsc::channel(QUEUED_LINES);
        let dispatch = Dispatch {
            poster: self.into_poster()?,
            connections,
            under_way: JoinSet::new(),
            waiters: Vec::new(),
            observer,
            summary: Summary::default(),
        };
        let task = runtime.spawn(run(queue, limits, dispatch));
        Ok(Sender { lines, task, format, signing_key, limits })
    }

    /// Returns what posts to the receiver.
    pub(crate) fn into_poster(self) -> Result<Poster, SendError> {
        let client = Client::with_options(&self.endpoint, &self.connection)?;
        let authorization = self.authorization.transpose()?;
        let Self { endpoint, timeout, retry, retry_observer, .. } = self;
        Ok(Poster::new(client, endpoint, authorization, timeout, retry, retry_observer))
    }
}
