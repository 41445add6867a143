//! Posts one batch to the receiver: compressed once, posted until it is delivered or given up.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Deserialize;

use super::batch::Batch;
use super::retry::{self, Decision, Outcome, Retry};
use crate::escape::escape;
use crate::net::{Bytes, Client, ClientError, Endpoint, Fetched, HeaderName, HeaderValue, header};
use crate::wire::batch::encode;

/// Maximum length of a response that is read: a receipt or a problem document is far shorter.
const MAX_ANSWER_BYTES: usize = 64 * 1024;
/// Maximum length of a refusal's text in a message.
const MAX_SHOWN_CHARS: usize = 200;

/// auditgate's response to a batch: the counts of its lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Receipt {
    /// Number of lines that are new and will reach every sink.
    pub accepted: u64,
    /// Number of lines that had been accepted before.
    pub duplicates: u64,
    /// Number of quarantined lines: not an event, or not signed by a trusted key.
    pub quarantined: u64,
}

/// A batch that the receiver took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Delivered {
    /// The response's status, a 2xx.
    pub status: u16,
    /// None when the response's body is not a receipt, as from a receiver of another make, or was
    /// interrupted.
    pub receipt: Option<Receipt>,
}

/// Reason why a batch was given up: the error of the last post.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Undelivered {
    /// The receiver refused it, or was still overloaded or failing at the last attempt.
    #[error("{host} answered {status}{}{}", said(.detail), advice(*.status))]
    Refused {
        /// Host and port of the URL.
        host: String,
        /// The response's status.
        status: u16,
        /// Text of the response, escaped and at most 200 characters long; may be empty.
        detail: String,
    },
    /// There was no response.
    #[error(transparent)]
    NoAnswer(#[from] ClientError),
    /// It could not be compressed, and was not posted.
    #[error("cannot compress the batch: {0}")]
    Encode(io::Error),
}

impl Undelivered {
    /// Returns the status of the response; none without one.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            Self::NoAnswer(_) | Self::Encode(_) => None,
        }
    }

    /// Returns whether every other batch would be refused for the same reason, until the receiver
    /// or the options of this sender change: the certificate is not trusted, or the response was
    /// 401, 403, 404 or 405.
    pub fn concerns_every_batch(&self) -> bool {
        matches!(
            self,
            Self::Refused { status: 401 | 403 | 404 | 405, .. }
                | Self::NoAnswer(ClientError::Certificate { .. })
        )
    }
}

/// A batch that will be posted again.
#[derive(Debug)]
#[non_exhaustive]
pub struct Retrying<'a> {
    /// Its number, from 1, in the order of sending.
    pub number: u64,
    /// Number of the next post, from 2.
    pub attempt: u32,
    /// Maximum number of posts.
    pub attempts: u32,
    /// Time until the next post.
    pub pause: Duration,
    /// Error of the last post.
    pub error: &'a Undelivered,
}

/// Called before each pause. It runs on the runtime of the sender, so it must not block.
pub type RetryObserver = Arc<dyn Fn(&Retrying<'_>) + Send + Sync>;

/// Destination and settings of posts.
#[derive(Clone)]
pub(crate) struct Poster {
    client: Client,
    endpoint: Endpoint,
    headers: Vec<(HeaderName, HeaderValue)>,
    timeout: Duration,
    retry: Retry,
    observer: Option<RetryObserver>,
}

impl Poster {
    /// Creates a poster. `authorization` is sent verbatim; `observer` is told of every retry.
    pub(crate) fn new(
        client: Client,
        endpoint: Endpoint,
        authorization: Option<HeaderValue>,
        timeout: Duration,
        retry: Retry,
        observer: Option<RetryObserver>,
    ) -> Self {
        let mut headers = vec![
            (header::CONTENT_TYPE, HeaderValue::from_static("text/plain")),
            (header::CONTENT_ENCODING, HeaderValue::from_static("application/gzip")),
        ];
        if let Some(mut authorization) = authorization {
            authorization.set_sensitive(true);
            headers.push((header::AUTHORIZATION, authorization));
        }
        Self { client, endpoint, headers, timeout, retry, observer }
    }

    /// Delivers the batch of that number. Also returns the number of posts, and the lines as they
    /// were before compression.
    pub(crate) async fn deliver(
        &self,
        number: u64,
        batch: Batch,
    ) -> (u32, Vec<u8>, Result<Delivered, Undelivered>) {
        let lines = Bytes::from(batch.body);
        let plain = lines.clone();
        // A megabyte takes some 20 ms, too long for a thread that serves other tasks.
        let encoded = tokio::task::spawn_blocking(move || encode(&plain)).await.map_err(io::Error::other);
        let body = match encoded.flatten() {
            Ok(body) => Bytes::from(body),
            Err(error) => return (0, lines.into(), Err(Undelivered::Encode(error))),
        };
        let attempts = self.retry.retries.saturating_add(1);
        let retrying = |attempt, pause, error: &Undelivered| {
            if let Some(observer) = &self.observer {
                observer(&Retrying { number, attempt, attempts, pause, error });
            }
        };
        let (attempts, result) = persist(&self.retry, || self.attempt(body.clone()), retrying).await;
        (attempts, lines.into(), result)
    }

    /// Posts a compressed batch once.
    pub(crate) async fn attempt(&self, body: Bytes) -> Attempt {
        let answer =
            self.client.post(&self.endpoint, &self.headers, body, MAX_ANSWER_BYTES, self.timeout).await;
        match answer {
            Ok(answer) => read(self.endpoint.authority(), &answer, SystemTime::now()),
            Err(error) => Attempt { result: Err(Undelivered::NoAnswer(error)), retry_after: None },
        }
    }
}

/// Result of one post, and the pause that the receiver asked for.
#[derive(Debug)]
pub(crate) struct Attempt {
    pub(crate) result: Result<Delivered, Undelivered>,
    /// Unbounded, as the receiver sent it.
    pub(crate) retry_after: Option<Duration>,
}

impl Attempt {
    fn outcome(&self) -> Outcome {
        match &self.result {
            Ok(delivered) => Outcome::Status(delivered.status),
            Err(Undelivered::Refused { status, .. }) => Outcome::Status(*status),
            Err(Undelivered::NoAnswer(ClientError::Certificate { .. })) => Outcome::Untrusted,
            Err(Undelivered::NoAnswer(_) | Undelivered::Encode(_)) => Outcome::NoAnswer,
        }
    }
}

/// Repeats `attempt` as `retry` decides; tells `retrying` before each pause the number of the next
/// attempt. Also returns the number of attempts.
async fn persist<F>(
    retry: &Retry,
    mut attempt: impl FnMut() -> F,
    retrying: impl Fn(u32, Duration, &Undelivered),
) -> (u32, Result<Delivered, Undelivered>)
where
    F: Future<Output = Attempt>,
{
    let mut attempts = 0u32;
    loop {
        attempts = attempts.saturating_add(1);
        let met = attempt().await;
        match retry.next(attempts, met.outcome(), met.retry_after) {
            Decision::Wait(pause) => {
                if let Err(error) = &met.result {
                    retrying(attempts.saturating_add(1), pause, error);
                }
                tokio::time::sleep(pause).await;
            }
            Decision::Done | Decision::GiveUp => return (attempts, met.result),
        }
    }
}

/// Reads a response. Its status decides, even where its body is not complete.
fn read(host: &str, answer: &Fetched, now: SystemTime) -> Attempt {
    let Fetched { status, headers, body } = answer;
    let retry_after = headers
        .get(header::RETRY_AFTER)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| retry::retry_after(value, now));
    let result = match status {
        200..=299 => Ok(Delivered { status: *status, receipt: serde_json::from_slice(body).ok() }),
        _ => Err(Undelivered::Refused { host: host.to_owned(), status: *status, detail: detail(body) }),
    };
    Attempt { result, retry_after }
}

/// Returns the text of a refusal: a problem document's `detail` or `title` (RFC 9457), or the
/// beginning of its text.
fn detail(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Problem {
        title: Option<String>,
        detail: Option<String>,
    }
    let text = match serde_json::from_slice::<Problem>(body) {
        Ok(Problem { title, detail }) => detail.or(title).unwrap_or_default(),
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    let text = text.trim();
    let shown = text.char_indices().nth(MAX_SHOWN_CHARS).map_or(text, |(at, _)| &text[..at]);
    escape(shown).into_owned()
}

fn said(detail: &str) -> String {
    if detail.is_empty() { String::new() } else { format!(" ({detail})") }
}

fn advice(status: u16) -> &'static str {
    match status {
        401 | 403 => ": check the authorization",
        404 | 405 => ": check the path of the URL",
        413 => ": send smaller batches",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::time::Instant;

    use super::super::receiver::{Answer, Receiver};
    use super::*;
    use crate::net::HeaderMap;

    /// Retries without a pause of our own.
    const AT_ONCE: Retry = Retry { retries: 4, minimum: Duration::ZERO, maximum: Duration::ZERO };
    /// Retries after a pause of our own that never ends.
    const NEVER: Retry = Retry { retries: 4, minimum: Duration::MAX, maximum: Duration::MAX };

    fn poster(endpoint: Endpoint, retry: Retry) -> Poster {
        let client = Client::for_endpoint(&endpoint, None).unwrap();
        let authorization = Some(HeaderValue::from_static("Splunk a b"));
        Poster::new(client, endpoint, authorization, Duration::from_secs(20), retry, None)
    }

    async fn deliver(receiver: &Receiver, retry: Retry) -> (u32, Result<Delivered, Undelivered>) {
        let batch = Batch { body: b"one\ntwo\n".to_vec(), events: 2 };
        let (attempts, lines, result) = poster(receiver.endpoint(), retry).deliver(1, batch).await;
        assert_eq!(lines, b"one\ntwo\n");
        (attempts, result)
    }

    fn refusal(status: u16, retry_after: Option<u64>) -> Attempt {
        Attempt {
            result: Err(Undelivered::Refused { host: "h".to_owned(), status, detail: String::new() }),
            retry_after: retry_after.map(Duration::from_secs),
        }
    }

    #[tokio::test]
    async fn a_post_looks_like_one_of_konnect() {
        let body = r#"{"accepted":1,"duplicates":0,"quarantined":1}"#;
        let receiver = Receiver::start([Answer::new(200, "", body)]);
        let (attempts, result) = deliver(&receiver, NEVER).await;
        let receipt = Some(Receipt { accepted: 1, duplicates: 0, quarantined: 1 });
        assert_eq!((attempts, result.unwrap()), (1, Delivered { status: 200, receipt }));
        let request = &receiver.requests()[0];
        assert!(request.head.starts_with("POST /konnect HTTP/1.1\r\n"), "{}", request.head);
        for line in
            ["content-type: text/plain", "content-encoding: application/gzip", "authorization: Splunk a b"]
        {
            assert!(request.head.contains(&format!("{line}\r\n")), "{}", request.head);
        }
        assert_eq!(request.lines(), ["one", "two"]);
    }

    #[tokio::test]
    async fn an_answer_without_a_receipt_is_still_a_delivery() {
        for (status, body) in [(200, ""), (200, "{\"text\":\"Success\"}"), (202, "{\"accepted\":-1}")] {
            let receiver = Receiver::start([Answer::new(status, "", body)]);
            let (_, result) = deliver(&receiver, NEVER).await;
            assert_eq!(result.unwrap(), Delivered { status, receipt: None });
        }
        let receiver = Receiver::start([Answer::new(200, "", &" ".repeat(MAX_ANSWER_BYTES + 1))]);
        assert_eq!(deliver(&receiver, NEVER).await.1.unwrap(), Delivered { status: 200, receipt: None });
    }

    #[tokio::test]
    async fn temporary_failures_are_retried_with_the_same_bytes() {
        let script = [
            Answer::new(500, "", ""),
            Answer::new(429, "", ""),
            Answer::HangUp,
            Answer::new(500, "", &"x".repeat(MAX_ANSWER_BYTES + 1)),
            Answer::new(200, "", "{}"),
        ];
        let receiver = Receiver::start(script);
        let (attempts, result) = deliver(&receiver, AT_ONCE).await;
        assert_eq!((attempts, result.unwrap().status), (5, 200));
        let requests = receiver.requests();
        assert_eq!(requests.len(), 5);
        assert!(requests.iter().all(|request| request.body == requests[0].body));
    }

    #[tokio::test]
    async fn the_receivers_pause_replaces_ours() {
        let script = [Answer::new(429, "retry-after: 0\r\n", ""), Answer::new(200, "", "")];
        let receiver = Receiver::start(script);
        let (attempts, result) = deliver(&receiver, NEVER).await;
        assert_eq!((attempts, result.unwrap().status), (2, 200));
    }

    #[tokio::test]
    async fn four_retries_are_enough() {
        let receiver = Receiver::start([Answer::new(500, "", "")]);
        let (attempts, result) = deliver(&receiver, AT_ONCE).await;
        assert!(matches!(result, Err(Undelivered::Refused { status: 500, .. })), "{result:?}");
        assert_eq!((attempts, receiver.requests().len()), (5, 5));
    }

    #[tokio::test]
    async fn a_refused_connection_is_retried_and_then_reported() {
        let endpoint = crate::net::loopback::Server::refusing();
        let batch = Batch { body: b"x\n".to_vec(), events: 1 };
        let (attempts, _, result) = poster(endpoint, AT_ONCE).deliver(1, batch).await;
        assert_eq!(attempts, 5);
        assert!(matches!(result, Err(Undelivered::NoAnswer(ClientError::Connect { .. }))), "{result:?}");
    }

    #[tokio::test]
    async fn a_refusal_is_final_and_reported_with_its_reason() {
        let problem = r#"{"title":"Unauthorized","status":401,"detail":"unknown\u001b token"}"#;
        for (status, body, message, concerns_every_batch) in [
            (401, problem, "answered 401 (unknown\\u{1b} token): check the authorization", true),
            (413, "", "answered 413: send smaller batches", false),
            (404, "not here\n", "answered 404 (not here): check the path of the URL", true),
            (503, "", "answered 503", false),
            (308, "", "answered 308", false),
        ] {
            let receiver = Receiver::start([Answer::new(status, "retry-after: 0\r\n", body)]);
            let (attempts, result) = deliver(&receiver, AT_ONCE).await;
            let error = result.unwrap_err();
            assert_eq!(error.to_string(), format!("{} {message}", receiver.endpoint().authority()));
            assert_eq!(error.concerns_every_batch(), concerns_every_batch);
            assert_eq!(attempts, 1);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_pauses_are_those_of_konnect() {
        let start = Instant::now();
        let told = std::cell::RefCell::new(Vec::new());
        let retrying = |attempt, pause: Duration, error: &Undelivered| {
            told.borrow_mut().push((attempt, pause.as_secs(), error.to_string()));
        };
        let (attempts, result) = persist(&Retry::default(), async || refusal(500, None), retrying).await;
        assert_eq!((attempts, start.elapsed()), (5, Duration::from_secs(1 + 2 + 4 + 8)));
        let error = || "h answered 500".to_owned();
        assert_eq!(*told.borrow(), [(2, 1, error()), (3, 2, error()), (4, 4, error()), (5, 8, error())]);
        assert!(result.is_err());

        let start = Instant::now();
        let left = Cell::new(2);
        let attempt = async || {
            if left.replace(left.get() - 1) > 0 {
                return refusal(429, Some(600));
            }
            Attempt { result: Ok(Delivered { status: 200, receipt: None }), retry_after: None }
        };
        let (attempts, result) = persist(&Retry::default(), attempt, |_, _, _| {}).await;
        assert_eq!((attempts, start.elapsed()), (3, Duration::from_secs(1200)));
        assert!(result.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn an_untrusted_certificate_is_final() {
        let start = Instant::now();
        let attempt = async || {
            let cause = "unknown issuer".to_owned();
            let error = ClientError::Certificate { host: "h".to_owned(), cause };
            Attempt { result: Err(Undelivered::NoAnswer(error)), retry_after: None }
        };
        let (attempts, result) = persist(&Retry::default(), attempt, |_, _, _| {}).await;
        assert_eq!((attempts, start.elapsed()), (1, Duration::ZERO));
        assert!(result.unwrap_err().concerns_every_batch());
    }

    #[test]
    fn a_date_in_retry_after_counts_from_now() {
        let mut headers = HeaderMap::new();
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static("Wed, 21 Oct 2015 07:28:30 GMT"));
        let answer = Fetched { status: 429, headers, body: Bytes::from(vec![b'x'; 1000]) };
        let attempt = read("h", &answer, time::macros::datetime!(2015-10-21 07:28:00 UTC).into());
        assert_eq!(attempt.retry_after, Some(Duration::from_secs(30)));
        assert!(matches!(attempt.result, Err(Undelivered::Refused { detail, .. }) if detail.len() == 200));
    }
}
