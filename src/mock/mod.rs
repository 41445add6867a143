//! A stand-in for Konnect's audit-log API on loopback, for tests and training: destinations,
//! webhooks, status, replay jobs and the key set, with generated events behind them.
//!
//! [`api`] answers what Konnect documents, [`control`] the requests under `/mock/`; both only change
//! the [`State`]. The tasks of [`delivery`] post what is in its [`log`]s. It keeps everything in
//! memory, and uses neither the ledger nor the sinks.

mod api;
mod control;
mod delivery;
mod log;
mod reply;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response};
use parking_lot::Mutex;
use rand::RngExt as _;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, watch};

use crate::clock::Clock;
use crate::net::{Client, Endpoint, HeaderValue as Authorization};
use crate::observe::admin;
use crate::send::{Retry, SigningKey};
use crate::trust::jwks;
use crate::wire::event::Format;
use log::AuditLog;
use reply::Reply;

/// Maximum length of a request's body.
const MAX_BODY_BYTES: usize = 64 * 1024;

/// Settings of a stand-in.
pub struct Options {
    /// The bearer token that a request needs.
    pub token: String,
    /// IDs of the Dev Portals, each with its own audit log beside that of the organisation.
    pub portals: Vec<String>,
    /// The first signing key.
    pub key: SigningKey,
    /// The PEM file of the authorities that destinations' certificates are verified with; by default
    /// those of the system.
    pub ca: Option<PathBuf>,
    /// Number of events that are generated a second and audit log; with 0 there are only those asked for.
    pub rate: u32,
    /// Retries of a batch.
    pub retry: Retry,
    /// Timeout of one post.
    pub timeout: Duration,
    /// Whether a webhook whose batch was lost stays inactive until it is enabled again.
    pub stays_inactive: bool,
    /// The clock, from which events have their times.
    pub clock: Clock,
    /// Receives a line for people about each batch.
    pub messages: mpsc::UnboundedSender<String>,
}

/// A running stand-in.
struct Mock {
    options: Options,
    state: Mutex<State>,
    /// One for each audit log: told of new events and of a changed webhook.
    deliveries: Vec<Notify>,
    /// One for each audit log: told of a new replay job.
    replays: Vec<Notify>,
}

/// What the API shows and changes.
struct State {
    destinations: Vec<Destination>,
    /// That of the organisation, then those of the portals.
    logs: Vec<AuditLog>,
    keys: Keys,
    faults: Option<Faults>,
}

/// Where a webhook posts to.
#[derive(Clone)]
struct Destination {
    id: String,
    name: String,
    endpoint: Endpoint,
    authorization: Option<Authorization>,
    format: Format,
    client: Client,
    /// In milliseconds since the Unix epoch.
    created_at: i64,
    updated_at: i64,
}

/// The signing keys.
struct Keys {
    signing: Arc<SigningKey>,
    /// Published, and not used yet.
    next: Option<Arc<SigningKey>>,
}

/// A fault of the next responses of the API.
#[derive(Clone)]
struct Faults {
    remaining: u64,
    delay: Duration,
    reply: Option<Reply>,
}

/// A request, read.
struct Call<'a> {
    method: &'a Method,
    path: &'a str,
    query: &'a str,
    token: Option<&'a [u8]>,
    body: &'a [u8],
}

/// Serves the API on a socket until `shutdown` holds `true` or its sender is dropped, and delivers
/// events meanwhile.
pub async fn serve(socket: TcpListener, options: Options, shutdown: watch::Receiver<bool>) {
    let mock = Arc::new(Mock::new(options));
    let tasks = delivery::start(&mock);
    let answering = Arc::clone(&mock);
    let answer: admin::Answer = Arc::new(move |_, request| {
        let mock = Arc::clone(&answering);
        Box::pin(async move { Ok(mock.respond(request).await) })
    });
    admin::serve_answers(admin::Socket::Tcp(socket), answer, shutdown).await;
    drop(tasks);
}

impl Mock {
    fn new(options: Options) -> Self {
        let portals = options.portals.iter().cloned().map(Some);
        let logs: Vec<_> =
            [None].into_iter().chain(portals).map(|portal| AuditLog::new(portal, &options.clock)).collect();
        let notifies = || logs.iter().map(|_| Notify::new()).collect();
        let (deliveries, replays) = (notifies(), notifies());
        let keys = Keys { signing: Arc::new(options.key.clone()), next: None };
        let state = Mutex::new(State { destinations: Vec::new(), logs, keys, faults: None });
        Self { options, state, deliveries, replays }
    }

    /// Reads a request, and answers it, late or wrongly where that was asked for.
    async fn respond(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (head, body) = request.into_parts();
        let reply = match Limited::new(body, MAX_BODY_BYTES).collect().await {
            Err(_) => {
                Reply::invalid_body(&format!("cannot be read, or is longer than {MAX_BODY_BYTES} bytes"))
            }
            Ok(body) => {
                let call = Call {
                    method: &head.method,
                    path: head.uri.path(),
                    query: head.uri.query().unwrap_or_default(),
                    token: admin::bearer(&head.headers),
                    body: &body.to_bytes(),
                };
                let fault = self.take_fault(call.path);
                if let Some(Faults { delay, .. }) = &fault {
                    tokio::time::sleep(*delay).await;
                }
                fault.and_then(|fault| fault.reply).unwrap_or_else(|| self.answer(&call))
            }
        };
        let mut response = Response::new(Full::new(Bytes::from(reply.body)));
        *response.status_mut() = reply.status;
        if let Some(content_type) = reply.content_type {
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        }
        if let Some(allowed) = reply.allow {
            response.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
        }
        response
    }

    fn take_fault(&self, path: &str) -> Option<Faults> {
        let mut state = self.state.lock();
        let faults = state.faults.as_mut().filter(|_| !path.starts_with("/mock/"))?;
        let fault = faults.clone();
        faults.remaining -= 1;
        if faults.remaining == 0 {
            state.faults = None;
        }
        Some(fault)
    }

    fn answer(&self, call: &Call<'_>) -> Reply {
        let segments: Vec<&str> = call.path.split('/').skip(1).collect();
        // As in Kong's example, keys are fetched without a token.
        if segments != api::KEY_SET && call.token != Some(self.options.token.as_bytes()) {
            return Reply::problem(401, "Authorization must be Bearer and the token of this server");
        }
        let reply = match segments.as_slice() {
            ["mock", control] => self.control(control, call),
            segments => self.api(segments, call),
        };
        reply.unwrap_or_else(|refusal| refusal)
    }

    fn now(&self) -> i64 {
        (self.options.clock.wall)()
    }
}

impl State {
    /// Returns the destination to which a log is posted now.
    fn destination(&self, log: usize) -> Option<&Destination> {
        let webhook = &self.logs[log].webhook;
        let id = webhook.destination.as_ref().filter(|_| webhook.is_enabled)?;
        self.destinations.iter().find(|destination| destination.id == *id)
    }
}

impl Keys {
    /// Creates a key and publishes it, unless one waits already.
    fn publish(&mut self) {
        self.next.get_or_insert_with(|| Arc::new(new_key()));
    }

    /// Signs with the published key from now on, and no longer publishes the former one. Returns
    /// whether there was one.
    fn take_up(&mut self) -> bool {
        let Some(next) = self.next.take() else { return false };
        self.signing = next;
        true
    }

    /// Returns the IDs of the published keys, the signing one first.
    fn ids(&self) -> Vec<String> {
        self.published().map(|key| jwks::thumbprint(&key.public_key())).collect()
    }

    /// Returns the key set (RFC 7517).
    fn document(&self) -> String {
        let key = |key: &Arc<SigningKey>| {
            let public = key.public_key();
            (Some(jwks::thumbprint(&public)), public)
        };
        jwks::document(&self.published().map(key).collect::<Vec<_>>())
    }

    fn published(&self) -> impl Iterator<Item = &Arc<SigningKey>> {
        [&self.signing].into_iter().chain(&self.next)
    }
}

/// Creates a signing key.
pub fn new_key() -> SigningKey {
    SigningKey::from_seed(&rand::rng().random())
}
