//! One request: route, authorise, bound, and read until it is a [`Delivery`].
//!
//! The order is part of the contract: path, method, the peer's address, authorisation, then the
//! headers, then whether a batch could be taken at all, and only then the first byte of the body.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::header::{
    AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap, TRANSFER_ENCODING,
};
use hyper::{Method, Request, Response, StatusCode, Version};
use ipnet::IpNet;
use parking_lot::RwLock;
use tokio::time::timeout_at;

use super::connection_limit::ConnectionPermit;
use super::response::{self, Refusal};
use crate::ingest::{Delivery, Ingest, Ingested, Rejection, Source};
use crate::ledger::CommitReceipt;
use crate::log_throttle::log_throttled;
use crate::memory_budget::{MemoryBudget, MemoryPermit};

/// A source and the clients that may send to it.
pub struct Route {
    /// Source of its lines.
    pub source: Arc<Source>,
    /// Check of a client's `Authorization`.
    pub authorises: Authorise,
    /// Networks from which requests are accepted; any when empty.
    pub allow: Vec<IpNet>,
}

/// Returns whether an `Authorization` header is one of those configured, in a time that does not
/// depend on where they differ.
pub type Authorise = Box<dyn Fn(&[u8]) -> bool + Send + Sync>;

/// Observer of requests.
pub trait Observer: Send + Sync {
    /// Reports an answered request. `source` is none when no source has its path.
    fn answered(&self, source: Option<&str>, status: u16, elapsed: Duration);
    /// Reports a body that has arrived whole: its size as sent, in bytes, and how long it took,
    /// without what it waited for memory.
    fn arrived(&self, source: &str, bytes: u64, elapsed: Duration);
    /// Reports a batch that is durably committed.
    fn committed(&self, source: &str, batch: &Ingested, received_at: i64);
    /// Reports a body that cannot be decoded and is durably in quarantine.
    fn undecodable(&self, source: &str, receipt: &CommitReceipt);
}

/// Settings that the operator can change while requests are answered. A request is answered by the
/// settings in force when it began.
pub struct Rules {
    /// Sources by path, without a slash at its end.
    pub routes: HashMap<String, Route>,
    /// The recipe.
    pub ingest: Ingest,
    /// The memory of all bodies in work.
    pub memory: MemoryBudget,
    /// Maximum size of one body, in bytes, as received.
    pub body_limit: usize,
    /// Deadline of a body.
    pub body_deadline: BodyDeadline,
    /// Deadline of a PROXY header, of the TLS handshake, of the head of a connection's first
    /// request, and of reading a response.
    pub deadline: Duration,
    /// Maximum time that a connection may wait for the head of its next request.
    pub idle_timeout: Duration,
    /// Networks of the proxies whose connections begin with a PROXY header.
    pub proxies: Vec<IpNet>,
}

/// Maximum size of a request's head, in bytes of its fields, and their maximum number. hyper reads
/// twice that, so that the sender of a refused head can be recognised by its token.
pub const HEAD_BYTES: usize = 16 * 1024;
/// See [`HEAD_BYTES`].
pub const HEAD_FIELDS: usize = 64;

impl Route {
    /// Returns whether the request has exactly one `Authorization`, and it is one of those
    /// configured.
    fn authorises(&self, headers: &HeaderMap) -> bool {
        let mut presented = headers.get_all(AUTHORIZATION).iter();
        match (presented.next(), presented.next()) {
            (Some(value), None) => (self.authorises)(value.as_bytes()),
            _ => false,
        }
    }
}

impl Rules {
    /// Returns the source of a path. A slash at its end is ignored.
    fn route(&self, path: &str) -> Option<&Route> {
        self.routes.get(path.strip_suffix('/').unwrap_or(path))
    }

    /// Decides everything that comes before the body.
    fn admit<'a>(
        &self,
        route: Option<&'a Route>,
        request: &Request<Incoming>,
        permit: &ConnectionPermit,
    ) -> Result<&'a Route, Refusal> {
        let fields = request.headers();
        let size: usize = fields.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
        if size > HEAD_BYTES || fields.len() > HEAD_FIELDS {
            return Err(Refusal::Head(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE));
        }
        // RFC 9112, section 3.2. A request without a host is harmless here, where no host has a
        // meaning.
        if request.headers().get_all(HOST).iter().nth(1).is_some() {
            return Err(Refusal::Head(StatusCode::BAD_REQUEST));
        }
        let route = route.ok_or(Refusal::NotFound)?;
        if request.method() != Method::POST {
            return Err(Refusal::MethodNotAllowed);
        }
        if !route.allow.is_empty() && !route.allow.iter().any(|network| network.contains(&permit.peer())) {
            return Err(Refusal::Forbidden);
        }
        if !route.authorises(request.headers()) {
            return Err(Refusal::Unauthorized);
        }
        permit.authenticated();
        if !is_plain_text(request.headers()) {
            return Err(Refusal::UnsupportedMediaType);
        }
        // The end of such a body is that of the connection (RFC 1945, section 7.2), which is also
        // what a truncated body looks like.
        if request.version() == Version::HTTP_10 && !request.headers().contains_key(CONTENT_LENGTH) {
            return Err(Refusal::LengthRequired);
        }
        let announced = request.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok());
        if announced
            .and_then(|length| length.parse().ok())
            .is_some_and(|length: u64| length > self.body_limit as u64)
        {
            return Err(Refusal::BodyTooLarge(self.body_limit));
        }
        self.ingest.may_take(&route.source).map_err(Refusal::Rejected)?;
        Ok(route)
    }
}

/// Everything that requests need.
pub struct Service {
    /// Settings in force.
    pub rules: RwLock<Arc<Rules>>,
    /// The wall clock, in milliseconds since the Unix epoch.
    pub now: Arc<dyn Fn() -> i64 + Send + Sync>,
    /// Observer of requests.
    pub observer: Box<dyn Observer>,
    /// One permit for each batch in progress, so that a drain can wait for them: a hang-up of the
    /// sender does not end them.
    pub in_work: Arc<tokio::sync::Semaphore>,
}

/// The body did not arrive: the connection is closed without a response, which senders retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Aborted {
    /// It was slower than [`Rules::body_deadline`].
    #[error("the body was too slow")]
    TooSlow,
    /// The connection ended before it did.
    #[error("the body was truncated")]
    CutOff,
}

/// Deadline of a body: after a grace period the body must have come at a minimum average rate, and
/// it must be complete by a fixed time.
#[derive(Clone, Copy, Debug)]
pub struct BodyDeadline {
    /// Time before the rate applies.
    pub grace: Duration,
    /// Minimum average rate, in bytes per second.
    pub min_rate: u64,
    /// Maximum time for the whole body.
    pub total: Duration,
}

impl BodyDeadline {
    /// Returns the time by which more bytes must have come of a body that began at `begun` and of
    /// which `received` bytes have arrived.
    pub fn deadline(&self, begun: Instant, received: usize) -> Instant {
        let earned = Duration::from_millis((received as u64).saturating_mul(1000) / self.min_rate.max(1));
        begun + self.grace.saturating_add(earned).min(self.total)
    }
}

/// Number of permits of [`Service::in_work`].
pub const IN_WORK: usize = 1 << 20;

impl Service {
    /// Answers one request.
    ///
    /// # Errors
    /// [`Aborted`] when the connection is to be closed without a response.
    pub async fn answer(
        &self,
        request: Request<Incoming>,
        permit: &ConnectionPermit,
    ) -> Result<Response<Full<Bytes>>, Aborted> {
        let start = Instant::now();
        let rules = self.in_force();
        let route = rules.route(request.uri().path());
        if route.is_none() && request.method() == Method::GET && request.uri().path() == "/healthz" {
            return Ok(Response::new(Full::new(Bytes::from_static(b"ok"))));
        }
        let (source, response) = match rules.admit(route, &request, permit) {
            Ok(route) => {
                let mut body_was_read = false;
                let response = match self.take(&rules, route, request, &mut body_was_read).await? {
                    Ok(receipt) => response::receipt(&receipt),
                    Err(refusal) => {
                        log(&route.source.name, None, &refusal, (self.now)());
                        response::refusal(&refusal, !body_was_read)
                    }
                };
                (Some(Arc::clone(&route.source.name)), response)
            }
            Err(refusal) => {
                // A sender that has a token but a wrong path, method or header size loses
                // everything it sends.
                let sender = rules.routes.values().find(|route| route.authorises(request.headers()));
                let source = route.or(sender).map(|route| Arc::clone(&route.source.name));
                if let Some(source) = &source {
                    log(source, sender.map(|_| request.uri().path()), &refusal, (self.now)());
                }
                (source, response::refusal(&refusal, !is_bodiless(&request)))
            }
        };
        self.observer.answered(source.as_deref(), response.status().as_u16(), start.elapsed());
        Ok(response)
    }

    /// Returns the whole response, head and body, to what is not a request, or one with too large a
    /// head; the connection ends.
    pub fn refuse(&self, refusal: &Refusal) -> Vec<u8> {
        self.observer.answered(None, refusal.status().as_u16(), Duration::ZERO);
        response::to_bytes(refusal)
    }

    /// Returns the settings for a request or connection that begins now.
    pub fn in_force(&self) -> Arc<Rules> {
        Arc::clone(&self.rules.read())
    }

    /// Replaces the settings, from the next request on.
    pub fn replace(&self, rules: Rules) {
        *self.rules.write() = Arc::new(rules);
    }

    async fn take(
        &self,
        rules: &Rules,
        route: &Route,
        request: Request<Incoming>,
        body_was_read: &mut bool,
    ) -> Result<Result<CommitReceipt, Refusal>, Aborted> {
        let declared_coding = coding(request.headers());
        let read = read(request.into_body(), rules).await;
        let ReadBody { body, memory, elapsed } = match read.inspect_err(|aborted| {
            let source: &str = &route.source.name;
            log_throttled!(
                info,
                source,
                code = "body-incomplete",
                source,
                "source \"{source}\": {aborted}; the connection is closed without an answer, and the sender retries"
            );
        })? {
            Ok(read) => read,
            Err(refusal) => return Ok(Err(refusal)),
        };
        *body_was_read = true;
        self.observer.arrived(&route.source.name, body.len() as u64, elapsed);
        let delivery = Delivery {
            source: Arc::clone(&route.source),
            received_at: (self.now)(),
            declared_coding,
            body,
            memory,
        };
        Ok(self.ingest(&rules.ingest, delivery).await)
    }

    /// Runs the recipe apart from the connection: when the sender hangs up, the commit goes on.
    async fn ingest(&self, ingest: &Ingest, delivery: Delivery) -> Result<CommitReceipt, Refusal> {
        let (source, received_at) = (Arc::clone(&delivery.source), delivery.received_at);
        let ingest = ingest.clone();
        let in_work = Arc::clone(&self.in_work).acquire_owned().await;
        let work = tokio::spawn(async move {
            let _in_work = in_work;
            ingest.take(delivery).await
        });
        let result = work.await.unwrap_or(Err(Rejection::Bug));
        match result {
            Ok(ingested) => {
                self.observer.committed(&source.name, &ingested, received_at);
                Ok(ingested.receipt)
            }
            Err(rejection) => {
                if let Rejection::Undecodable { receipt, .. } = &rejection {
                    self.observer.undecodable(&source.name, receipt);
                }
                Err(Refusal::Rejected(rejection))
            }
        }
    }
}

/// A body that has arrived whole.
struct ReadBody {
    body: Vec<u8>,
    memory: MemoryPermit,
    /// Time that it took to arrive.
    elapsed: Duration,
}

/// Reads a body within its limit, acquiring memory for what has arrived.
async fn read(mut body: Incoming, rules: &Rules) -> Result<Result<ReadBody, Refusal>, Aborted> {
    let (limit, body_deadline) = (rules.body_limit, rules.body_deadline);
    let declared = body.size_hint().exact();
    let mut memory = rules.memory.permit(declared);
    // A large body begins where it stays: grown from small blocks, it would leave gaps among them.
    let mut bytes = Vec::with_capacity(declared.map_or(0, |bytes| bytes.min(1 << 20) as usize));
    let start = Instant::now();
    loop {
        // Time spent waiting for memory does not count against the sender.
        let begun = start + memory.waited();
        let deadline = body_deadline.deadline(begun, bytes.len());
        let Ok(frame) = timeout_at(deadline.into(), body.frame()).await else {
            return Err(Aborted::TooSlow);
        };
        let Some(frame) = frame else {
            return Ok(Ok(ReadBody { body: bytes, memory, elapsed: begun.elapsed() }));
        };
        let Ok(frame) = frame.map_err(|_| Aborted::CutOff)?.into_data() else {
            continue;
        };
        if bytes.len() + frame.len() > limit {
            return Ok(Err(Refusal::BodyTooLarge(limit)));
        }
        if !memory.grow(frame.len()).await {
            return Ok(Err(Refusal::Rejected(Rejection::NoMemory)));
        }
        bytes.extend_from_slice(&frame);
    }
}

/// Returns whether the type is `text/plain` with any parameters, or missing.
fn is_plain_text(headers: &HeaderMap) -> bool {
    let mut types = headers.get_all(CONTENT_TYPE).iter();
    match (types.next(), types.next()) {
        (None, _) => true,
        (Some(value), None) => value.to_str().is_ok_and(|value| {
            value.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("text/plain")
        }),
        _ => false,
    }
}

/// Returns the declared codings, joined where there are several headers (RFC 9110, section 5.3).
fn coding(headers: &HeaderMap) -> Option<String> {
    let named: Vec<_> = headers
        .get_all(CONTENT_ENCODING)
        .iter()
        .map(|value| String::from_utf8_lossy(value.as_bytes()))
        .collect();
    (!named.is_empty()).then(|| named.join(","))
}

/// Returns whether there is no body that an early response could leave unread.
fn is_bodiless<B>(request: &Request<B>) -> bool {
    let headers = request.headers();
    match headers.get(CONTENT_LENGTH) {
        Some(length) => length == "0",
        None => !headers.contains_key(TRANSFER_ENCODING) && request.version() != Version::HTTP_10,
    }
}

/// Logs what the operator should know about a refused batch. Peers can cause each of these as often
/// as they like, so each message is throttled.
fn log(source: &str, path_of_a_sender: Option<&str>, refusal: &Refusal, now: i64) {
    let (status, reason) = (refusal.status().as_u16(), refusal.detail());
    let is_lost_silently = matches!(
        refusal,
        Refusal::NotFound
            | Refusal::MethodNotAllowed
            | Refusal::Head(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE)
    );
    match refusal {
        _ if is_lost_silently && let Some(path) = path_of_a_sender => {
            log_throttled!(
                error,
                source,
                code = "request-lost",
                source,
                status,
                reason,
                path,
                "source \"{source}\": a request with a valid token was refused with {status}, and Konnect will not \
                 retry it; fix the sender's endpoint, and start a replay job"
            );
        }
        // The metrics count them.
        Refusal::NotFound | Refusal::MethodNotAllowed => tracing::debug!(source, status, reason, "refused"),
        Refusal::Unauthorized => {
            log_throttled!(
                warn,
                source,
                code = "request-unauthorized",
                source,
                status,
                "source \"{source}\": a request without a valid Authorization was refused with {status}"
            );
        }
        Refusal::Forbidden => {
            log_throttled!(
                warn,
                source,
                code = "request-forbidden",
                source,
                status,
                "source \"{source}\": a request from an address that `allow` does not list was refused with {status}"
            );
        }
        Refusal::Head(_) => {
            log_throttled!(
                warn,
                source,
                code = "request-malformed",
                source,
                status,
                reason,
                "source \"{source}\": a malformed request was refused with {status}, its body unread"
            );
        }
        Refusal::Rejected(Rejection::Undecodable { .. }) => {
            log_throttled!(
                error,
                source,
                code = "body-undecodable",
                source,
                status,
                reason,
                "source \"{source}\": a body is not a batch of events and was refused with {status}; it is kept \
                 whole in quarantine"
            );
        }
        refusal if refusal.loses_the_batch() => {
            let received_at = crate::wire::record::time_stamp(now);
            let advice = if refusal.status() == StatusCode::PAYLOAD_TOO_LARGE {
                "raise the limit"
            } else {
                "fix the sender"
            };
            log_throttled!(
                error,
                source,
                code = "batch-lost",
                source,
                status,
                reason,
                received_at,
                "source \"{source}\": a batch was refused with {status}, and Konnect will not retry it; if it was \
                 genuine, {advice} and start a replay job for the minutes before {received_at}"
            );
        }
        _ => {
            log_throttled!(
                warn,
                source,
                code = "batch-refused",
                source,
                status,
                reason,
                "source \"{source}\": a batch was refused with {status}; the sender may retry it"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deadline_of_a_body_grows_with_its_bytes() {
        let body_deadline =
            BodyDeadline { grace: Duration::from_secs(5), min_rate: 1000, total: Duration::from_secs(30) };
        let begun = Instant::now();
        for (received, seconds) in [(0, 5), (1000, 6), (20_000, 25), (25_000, 30), (usize::MAX, 30)] {
            assert_eq!(
                body_deadline.deadline(begun, received),
                begun + Duration::from_secs(seconds),
                "{received}"
            );
        }
    }
}
