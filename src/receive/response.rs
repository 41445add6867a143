//! The only place where a [`CommitReceipt`] or a refusal becomes a status. A 200 needs a receipt;
//! everything else is `application/problem+json` (RFC 9457).
//!
//! Konnect retries 500, 429 and connection errors, and nothing else: any condition that may pass by
//! itself is one of these.

use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{
    ALLOW, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Response, StatusCode};
use rand::RngExt as _;

use crate::ingest::Rejection;
use crate::ledger::{CommitError, CommitReceipt};

/// Makes a browser interpret a response by its declared type only.
const NOT_GUESSED: HeaderValue = HeaderValue::from_static("nosniff");

/// Reason why a request got no receipt.
#[derive(Debug)]
pub enum Refusal {
    /// Not a request, an ambiguous one, or one whose head is too large: 400 or 431.
    Head(StatusCode),
    /// Plain HTTP to a TLS port.
    NoTls,
    /// Not a source's path.
    NotFound,
    /// Not `POST`.
    MethodNotAllowed,
    /// A request from an address that may not send to this source.
    Forbidden,
    /// No or wrong `Authorization`.
    Unauthorized,
    /// A body of unknown length, without chunking: only in HTTP/1.0.
    LengthRequired,
    /// Another type than `text/plain`.
    UnsupportedMediaType,
    /// More bytes than `limits.body`.
    BodyTooLarge(usize),
    /// A rejection by the recipe.
    Rejected(Rejection),
}

impl Refusal {
    /// Returns its status.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Head(status) => *status,
            Self::NoTls => StatusCode::BAD_REQUEST,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            // RFC 1945, section 7.2.2.
            Self::LengthRequired => StatusCode::BAD_REQUEST,
            Self::UnsupportedMediaType | Self::Rejected(Rejection::UnknownCoding) => {
                StatusCode::UNSUPPORTED_MEDIA_TYPE
            }
            Self::BodyTooLarge(_) | Self::Rejected(Rejection::TooLarge(_) | Rejection::NeverEnoughMemory) => {
                StatusCode::PAYLOAD_TOO_LARGE
            }
            Self::Rejected(Rejection::Undecodable { .. }) => StatusCode::BAD_REQUEST,
            Self::Rejected(
                Rejection::NoMemory | Rejection::BacklogFull | Rejection::NoKeys | Rejection::UnknownKeys,
            ) => StatusCode::TOO_MANY_REQUESTS,
            Self::Rejected(Rejection::Unwritable) => StatusCode::TOO_MANY_REQUESTS,
            Self::Rejected(Rejection::Commit(CommitError::Storage(_) | CommitError::Closed))
            | Self::Rejected(Rejection::Bug) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// Returns whether Konnect loses the batch, until a replay job is started.
    pub fn loses_the_batch(&self) -> bool {
        matches!(self, Self::LengthRequired)
            || matches!(self.status(), StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNSUPPORTED_MEDIA_TYPE)
    }

    /// Returns how long the sender should wait. Konnect waits as told, so a longer time keeps the
    /// batch alive longer.
    fn retry_after(&self) -> Option<Duration> {
        match self {
            // Jittered, so that the senders of a busy moment do not all retry at once.
            Self::Rejected(Rejection::NoMemory) => {
                Some(Duration::from_secs(rand::rng().random_range(5..=10)))
            }
            Self::Rejected(
                Rejection::BacklogFull | Rejection::NoKeys | Rejection::UnknownKeys | Rejection::Unwritable,
            ) => Some(Duration::from_secs(30)),
            _ => None,
        }
    }

    /// Returns the text for the sender. The log says more.
    pub fn detail(&self) -> String {
        match self {
            Self::Head(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE) => {
                "the header has too many bytes or lines".to_owned()
            }
            Self::Head(_) => "this is not an HTTP/1.1 request".to_owned(),
            Self::LengthRequired => "a body over HTTP/1.0 needs a Content-Length".to_owned(),
            Self::NoTls => "this port speaks HTTPS; begin the URL with https://".to_owned(),
            Self::NotFound => "no source has this path".to_owned(),
            Self::MethodNotAllowed => "batches are posted".to_owned(),
            Self::Forbidden => "this address may not send here".to_owned(),
            Self::Unauthorized => "the Authorization header is missing or wrong".to_owned(),
            Self::UnsupportedMediaType => "batches are text/plain".to_owned(),
            Self::BodyTooLarge(limit) => format!("the body has more than {limit} bytes"),
            Self::Rejected(Rejection::UnknownCoding) => "the body is neither gzip nor uncoded".to_owned(),
            Self::Rejected(Rejection::TooLarge(error)) => error.to_string(),
            Self::Rejected(Rejection::NeverEnoughMemory) => {
                "the batch needs more memory than there is".to_owned()
            }
            Self::Rejected(Rejection::Undecodable { detail, .. }) => detail.clone(),
            Self::Rejected(Rejection::NoMemory) => "too much at once; send it again later".to_owned(),
            Self::Rejected(Rejection::BacklogFull) => {
                "undelivered events fill the backlog; send it again later".to_owned()
            }
            Self::Rejected(Rejection::NoKeys) => {
                "no verification key has been loaded yet; send it again later".to_owned()
            }
            Self::Rejected(Rejection::UnknownKeys) => {
                "the signatures fit no known key, and the key server cannot be asked; send it again later"
                    .to_owned()
            }
            Self::Rejected(Rejection::Unwritable | Rejection::Commit(_)) => {
                "the batch could not be stored; send it again later".to_owned()
            }
            Self::Rejected(Rejection::Bug) => "an internal error; send it again later".to_owned(),
        }
    }
}

/// Returns the response to a batch that is durably committed.
pub fn receipt(receipt: &CommitReceipt) -> Response<Full<Bytes>> {
    let body = format!(
        r#"{{"accepted":{},"duplicates":{},"quarantined":{}}}"#,
        receipt.accepted(),
        receipt.duplicates(),
        receipt.quarantined()
    );
    let mut response = Response::new(Full::new(Bytes::from(body)));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, NOT_GUESSED);
    response
}

/// Returns an early refusal as bytes, for a connection without hyper.
pub fn to_bytes(refusal: &Refusal) -> Vec<u8> {
    let (head, body) = self::refusal(refusal, true).into_parts();
    let body = body.into_inner().unwrap_or_default();
    let mut bytes = format!("HTTP/1.1 {}\r\n", head.status).into_bytes();
    for (name, value) in &head.headers {
        bytes.extend_from_slice(name.as_str().as_bytes());
        bytes.extend_from_slice(b": ");
        bytes.extend_from_slice(value.as_bytes());
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(format!("content-length: {}\r\n\r\n", body.len()).as_bytes());
    bytes.extend_from_slice(&body);
    bytes
}

/// Returns the response to any other request. `is_early` says that the body was not read to its
/// end, so that the connection cannot be used again.
pub fn refusal(refusal: &Refusal, is_early: bool) -> Response<Full<Bytes>> {
    let status = refusal.status();
    let body = serde_json::json!({
        "title": status.canonical_reason().unwrap_or_default(),
        "status": status.as_u16(),
        "detail": refusal.detail(),
    });
    let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, NOT_GUESSED);
    match refusal {
        Refusal::MethodNotAllowed => {
            headers.insert(ALLOW, HeaderValue::from_static("POST"));
        }
        Refusal::Unauthorized => {
            // RFC 9110, section 15.5.2, wants a challenge; the real scheme is the operator's
            // secret.
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"auditgate\""));
        }
        _ => {}
    }
    if let Some(wait) = refusal.retry_after() {
        headers.insert(RETRY_AFTER, HeaderValue::from(wait.as_secs()));
    }
    if is_early {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}
