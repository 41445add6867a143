//! One request: route, authorise, bound, and read until it is a [`Delivery`].
//!
//! The order is part of the contract: path, method, the peer's address, authorisation, then the headers, then whether we could take
//! a batch at all, and only then the first byte of the body.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap};
use hyper::{Method, Request, Response};
use ipnet::IpNet;

use super::response::{self, Refusal};
use crate::ingest::{Delivery, Ingest, Ingested, Rejection, Source};
use crate::ledger::Receipt;
use crate::room::{Reservation, Room};

/// A source and who may send to it.
pub struct Route {
    /// Where its lines come from.
    pub source: Arc<Source>,
    /// Who they are known by.
    pub authorises: Authorise,
    /// The networks that they may send from; any when there is none.
    pub allow: Vec<IpNet>,
}

/// Tells whether an `Authorization` header is one of those configured, in a time that does not depend on where
/// they differ.
pub type Authorise = Box<dyn Fn(&[u8]) -> bool + Send + Sync>;

/// What the edge hears about each request.
pub trait Observer: Send + Sync {
    /// A request was answered. `source` is none when it was for no source's path.
    fn answered(&self, source: Option<&str>, status: u16, elapsed: Duration);
    /// A batch is durably committed.
    fn committed(&self, source: &str, batch: &Ingested, received_at: i64);
    /// A body that cannot be decoded is durably in quarantine.
    fn undecodable(&self, source: &str, receipt: &Receipt);
}

/// What the operator can change while requests are answered. A request is answered by what was in force when it
/// began.
pub struct Rules {
    /// Sources by path.
    pub routes: HashMap<String, Route>,
    /// The recipe.
    pub ingest: Ingest,
    /// Bytes of one body, as received.
    pub body_limit: usize,
    /// How long a body may take to arrive.
    pub body_deadline: Duration,
}

impl Rules {
    /// Everything that is decided before the body.
    fn admit<'a>(
        &self,
        route: Option<&'a Route>,
        request: &Request<Incoming>,
        peer: IpAddr,
    ) -> Result<&'a Route, Refusal> {
        let route = route.ok_or(Refusal::NotFound)?;
        if request.method() != Method::POST {
            return Err(Refusal::MethodNotAllowed);
        }
        if !route.allow.is_empty() && !route.allow.iter().any(|network| network.contains(&peer)) {
            return Err(Refusal::Forbidden);
        }
        let mut presented = request.headers().get_all(AUTHORIZATION).iter();
        let authorised = match (presented.next(), presented.next()) {
            (Some(value), None) => (route.authorises)(value.as_bytes()),
            _ => false,
        };
        if !authorised {
            return Err(Refusal::Unauthorized);
        }
        if !is_plain_text(request.headers()) {
            return Err(Refusal::UnsupportedMediaType);
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

/// Everything that a request needs.
pub struct Service {
    /// What is in force.
    pub rules: RwLock<Arc<Rules>>,
    /// The memory of all bodies in work.
    pub room: Room,
    /// The wall clock, in milliseconds since the Unix epoch.
    pub now: Arc<dyn Fn() -> i64 + Send + Sync>,
    /// Who hears about it.
    pub observer: Box<dyn Observer>,
    /// One permit for each batch that is being taken in, so that a drain can wait for them: a hang-up of the
    /// sender does not end them.
    pub in_work: Arc<tokio::sync::Semaphore>,
}

/// The body did not arrive: the connection is closed without an answer, which senders retry.
#[derive(Debug, thiserror::Error)]
#[error("the body did not arrive")]
pub struct Aborted;

/// The size of [`Service::in_work`].
pub const IN_WORK: usize = 1 << 20;

impl Service {
    /// Answers one request of a peer, whose address is in its canonical form.
    ///
    /// # Errors
    /// [`Aborted`] when there is nobody to answer.
    pub async fn answer(
        &self,
        request: Request<Incoming>,
        peer: IpAddr,
    ) -> Result<Response<Full<Bytes>>, Aborted> {
        let start = Instant::now();
        let rules = Arc::clone(&self.rules.read().unwrap_or_else(PoisonError::into_inner));
        let route = rules.routes.get(request.uri().path());
        let source = route.map(|route| Arc::clone(&route.source.name));
        let mut body_was_read = false;
        let response = match self.take(&rules, route, request, peer, &mut body_was_read).await? {
            Ok(receipt) => response::receipt(&receipt),
            Err(refusal) => {
                if let Some(source) = &source {
                    log(source, &refusal, (self.now)());
                }
                response::refusal(&refusal, !body_was_read)
            }
        };
        self.observer.answered(source.as_deref(), response.status().as_u16(), start.elapsed());
        Ok(response)
    }

    /// From the next request on.
    pub fn replace(&self, rules: Rules) {
        *self.rules.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(rules);
    }

    async fn take(
        &self,
        rules: &Rules,
        route: Option<&Route>,
        request: Request<Incoming>,
        peer: IpAddr,
        body_was_read: &mut bool,
    ) -> Result<Result<Receipt, Refusal>, Aborted> {
        let route = match rules.admit(route, &request, peer) {
            Ok(route) => route,
            Err(refusal) => {
                *body_was_read = is_bodiless(request.headers());
                return Ok(Err(refusal));
            }
        };
        let declared_coding = coding(request.headers());
        let reading = self.read(request.into_body(), rules.body_limit);
        let Ok(read) = tokio::time::timeout(rules.body_deadline, reading).await else {
            tracing::info!(source = %route.source.name, "a body was too slow; the connection is closed");
            return Err(Aborted);
        };
        let (body, reservation) = match read? {
            Ok(read) => read,
            Err(refusal) => return Ok(Err(refusal)),
        };
        *body_was_read = true;
        let delivery = Delivery {
            source: Arc::clone(&route.source),
            received_at: (self.now)(),
            declared_coding,
            body,
            reservation,
        };
        Ok(self.ingest(&rules.ingest, delivery).await)
    }

    /// Reads a body within its limit, reserving room for what has arrived.
    async fn read(
        &self,
        mut body: Incoming,
        limit: usize,
    ) -> Result<Result<(Vec<u8>, Reservation), Refusal>, Aborted> {
        let mut reservation = self.room.reservation();
        let mut bytes = Vec::new();
        while let Some(frame) = body.frame().await {
            let Ok(frame) = frame.map_err(|_| Aborted)?.into_data() else {
                continue;
            };
            if bytes.len() + frame.len() > limit {
                return Ok(Err(Refusal::BodyTooLarge(limit)));
            }
            if !reservation.grow(frame.len()).await {
                return Ok(Err(Refusal::Rejected(Rejection::NoRoom)));
            }
            bytes.extend_from_slice(&frame);
        }
        Ok(Ok((bytes, reservation)))
    }

    /// Runs the recipe apart from the connection: when the sender hangs up, the commit goes on.
    async fn ingest(&self, ingest: &Ingest, delivery: Delivery) -> Result<Receipt, Refusal> {
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

/// `text/plain` with any parameters, or no type at all.
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

/// The declared codings, joined where there are several headers (RFC 9110, section 5.3).
fn coding(headers: &HeaderMap) -> Option<String> {
    let named: Vec<_> = headers
        .get_all(CONTENT_ENCODING)
        .iter()
        .map(|value| String::from_utf8_lossy(value.as_bytes()))
        .collect();
    (!named.is_empty()).then(|| named.join(","))
}

/// Whether there is no body that an early answer could leave unread.
fn is_bodiless(headers: &HeaderMap) -> bool {
    !headers.contains_key(hyper::header::TRANSFER_ENCODING)
        && headers.get(CONTENT_LENGTH).is_none_or(|length| length == "0")
}

/// What the operator should know about a refused batch.
fn log(source: &str, refusal: &Refusal, now: i64) {
    let (status, reason) = (refusal.status().as_u16(), refusal.detail());
    match refusal {
        // Anybody can cause these, as often as he likes; the metrics count them.
        Refusal::NotFound | Refusal::MethodNotAllowed => tracing::debug!(source, status, reason, "refused"),
        Refusal::Unauthorized => {
            static LOGGED: Seldom = Seldom::new();
            if let Some(unlogged) = LOGGED.at(now) {
                tracing::warn!(source, status, unlogged, "no or wrong Authorization");
            }
        }
        Refusal::Forbidden => {
            static LOGGED: Seldom = Seldom::new();
            if let Some(unlogged) = LOGGED.at(now) {
                tracing::warn!(
                    source,
                    status,
                    unlogged,
                    "a request from an address that `allow` does not list"
                );
            }
        }
        Refusal::Rejected(Rejection::Undecodable { .. }) => {
            tracing::error!(source, status, reason, "a body could not be decoded; it is kept in quarantine");
        }
        refusal if refusal.loses_the_batch() => tracing::error!(
            source,
            status,
            reason,
            received_at = crate::wire::record::time_stamp(now),
            "a batch was refused for good, and Konnect will not send it again; raise the limit if it was \
             genuine, and start a replay job for the minutes before this time"
        ),
        _ => tracing::warn!(source, status, reason, "a batch was refused; it may be sent again"),
    }
}

/// A message that strangers can cause is logged once in a while, with how often it was not.
struct Seldom {
    last: AtomicI64,
    unlogged: AtomicU64,
}

impl Seldom {
    /// Milliseconds between two messages.
    const PAUSE: i64 = 10_000;

    const fn new() -> Self {
        Self { last: AtomicI64::new(i64::MIN), unlogged: AtomicU64::new(0) }
    }

    /// Whether it is time, in milliseconds, for a message; then how many there were since the last.
    fn at(&self, now: i64) -> Option<u64> {
        let last = self.last.load(Ordering::Relaxed);
        let is_time = now.saturating_sub(last) >= Self::PAUSE || now < last;
        if is_time && self.last.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            return Some(self.unlogged.swap(0, Ordering::Relaxed));
        }
        self.unlogged.fetch_add(1, Ordering::Relaxed);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_logged_seldom_and_counted() {
        let seldom = Seldom::new();
        assert_eq!(seldom.at(1_000), Some(0));
        assert_eq!([2_000, 3_000, 10_999].map(|now| seldom.at(now)), [None; 3]);
        assert_eq!(seldom.at(11_000), Some(3));
        assert_eq!(seldom.at(0), Some(0), "the clock was set back");
    }
}
