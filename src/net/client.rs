//! An HTTP client: one request, one bounded response.

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::{self, connect::HttpConnector};
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::{TokioExecutor, TokioTimer};

use super::proxy::Connector;
use super::{ClientOptions, Endpoint, TlsError, tls};

#[cfg(feature = "daemon")]
mod plain;
#[cfg(feature = "daemon")]
pub use plain::PlainAddress;

/// Timeout of a TCP connection attempt of [`Client::for_endpoint`].
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
const USER_AGENT: HeaderValue = HeaderValue::from_static(concat!("auditgate/", env!("CARGO_PKG_VERSION")));

/// An HTTP/1.1 client for HTTPS and, on loopback, HTTP. Connections are kept for a minute and
/// reused. Redirects are not followed; the proxies of the environment (`HTTPS_PROXY`, `ALL_PROXY`,
/// `NO_PROXY`) are used, for HTTPS to other machines. Clones share the connections.
///
/// Its futures need a tokio runtime with time and I/O enabled, and may be dropped at any point.
#[derive(Clone, Debug)]
pub struct Client {
    inner: legacy::Client<HttpsConnector<Connector>, Full<Bytes>>,
}

/// A response, whatever its status.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// The status code: 101, or 200 to 999; a redirect is just its 3xx.
    pub status: u16,
    /// The response's headers.
    pub headers: HeaderMap,
    /// The body, no longer than the limit given with the request; of a post maybe a part of it, see
    /// [`Client::post`].
    pub body: Bytes,
}

/// Reason why there is no whole response. The caller decides whether to retry.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// No connection: name resolution, TCP or the TLS handshake failed, or took too long. Nothing
    /// of the request was sent.
    #[error("cannot connect to {host}: {}", chain(.source.as_ref()))]
    Connect {
        /// Host and port of the URL.
        host: String,
        /// The failure; the message has its whole chain of causes already.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The server's certificate is not trusted for this host. A retry will not help before the
    /// certificate or the list of authorities is fixed. Nothing of the request was sent.
    #[error("the certificate of {host} is not trusted: {cause}")]
    Certificate {
        /// Host and port of the URL.
        host: String,
        /// Result of the verification.
        cause: String,
    },
    /// The response was not complete in time. The server may have acted on the request.
    #[error("{host} did not answer within {limit:?}")]
    Timeout {
        /// Host and port of the URL.
        host: String,
        /// The time that was allowed for the whole exchange.
        limit: Duration,
    },
    /// The response's body is longer than allowed; its rest was not read.
    #[error("the answer of {host} (status {status}) is longer than {limit_bytes} bytes")]
    TooLarge {
        /// Host and port of the URL.
        host: String,
        /// The response's status code.
        status: u16,
        /// The limit for the body.
        limit_bytes: usize,
    },
    /// The connection broke before the response was complete. The server may have acted on the
    /// request.
    #[error("the exchange with {host} was interrupted: {cause}")]
    Interrupted {
        /// Host and port of the URL.
        host: String,
        /// The flattened chain of causes.
        cause: String,
    },
    /// The response is not HTTP, or the request could not be expressed in it.
    #[error("the exchange with {host} failed: {cause}")]
    Other {
        /// Host and port of the URL.
        host: String,
        /// The flattened chain of causes.
        cause: String,
    },
}

/// A token that cannot be sent in a header.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the token is empty or holds a control character: an HTTP header cannot carry it")]
pub struct InvalidToken;

/// Returns the `Authorization` header's value for `secret`: `Bearer SECRET` (RFC 6750), or the
/// secret as it is when it contains a space and so names its own scheme. Marked sensitive: no log
/// shows it.
///
/// # Errors
/// [`InvalidToken`] when it is empty or not legal in a header (RFC 9110, section 5.5).
pub fn bearer(secret: &[u8]) -> Result<HeaderValue, InvalidToken> {
    if secret.is_empty() {
        return Err(InvalidToken);
    }
    let mut value = if secret.contains(&b' ') {
        HeaderValue::from_bytes(secret)
    } else {
        HeaderValue::from_bytes(&zeroize::Zeroizing::new([b"Bearer ", secret].concat()))
    }
    .map_err(|_| InvalidToken)?;
    value.set_sensitive(true);
    Ok(value)
}

impl Client {
    /// Creates a client with this TLS configuration. `connect_timeout` bounds the TCP connection
    /// (all addresses of the host together); the handshake counts against the request's own
    /// timeout.
    pub fn new(tls: rustls::ClientConfig, connect_timeout: Duration) -> Client {
        Client::with_proxies(tls, connect_timeout, Matcher::from_env())
    }

    fn with_proxies(mut tls: rustls::ClientConfig, connect_timeout: Duration, proxies: Matcher) -> Client {
        // The connector sets it from the HTTP versions it speaks, and insists on finding none.
        tls.alpn_protocols.clear();
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(connect_timeout));
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(Connector::new(tcp, proxies));
        let inner = legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .build(connector);
        Client { inner }
    }

    /// Creates a client for `endpoint`: for `https` it trusts the authorities of [`client_tls`]
    /// with `ca`; for `http` no authorities are loaded, so that a system without any can still use
    /// it.
    ///
    /// # Errors
    /// See [`TlsError`]; never for `http` because of missing authorities.
    pub fn for_endpoint(endpoint: &Endpoint, ca: Option<&Path>) -> Result<Client, TlsError> {
        Client::with_options(
            endpoint,
            &ClientOptions { ca: ca.map(Path::to_owned), ..ClientOptions::default() },
        )
    }

    /// Creates a client for `endpoint` as [`Client::for_endpoint`] does, with every option.
    ///
    /// # Errors
    /// See [`TlsError`].
    pub fn with_options(endpoint: &Endpoint, options: &ClientOptions) -> Result<Client, TlsError> {
        let is_https = endpoint.is_https();
        let tls = if is_https { tls::client_tls_with(options)? } else { tls::trusting_no_authority()? };
        let proxies = match &options.proxy {
            Some(proxy) => Matcher::builder().all(proxy.clone()).build(),
            None => Matcher::from_env(),
        };
        Ok(Client::with_proxies(tls, CONNECT_TIMEOUT, proxies))
    }

    /// Fetches `endpoint`. At most `limit_bytes` of body are accepted, and the whole exchange,
    /// from name resolution to the body's end, may take `timeout`.
    ///
    /// # Errors
    /// See [`ClientError`]; a status is never an error.
    pub async fn get(
        &self,
        endpoint: &Endpoint,
        headers: &[(HeaderName, HeaderValue)],
        limit_bytes: usize,
        timeout: Duration,
    ) -> Result<Fetched, ClientError> {
        let host = endpoint.authority();
        let response = self.request(Method::GET, endpoint, headers, Bytes::new());
        let whole = async {
            let response = response.await.map_err(|error| failure(host, error))?;
            read(host, response, limit_bytes).await
        };
        match tokio::time::timeout(timeout, whole).await {
            Ok(result) => result,
            Err(_) => Err(ClientError::Timeout { host: host.to_owned(), limit: timeout }),
        }
    }

    /// Posts `body` to `endpoint`. The whole exchange may take `timeout`.
    ///
    /// The status and the headers are the receiver's decision about what was posted, so they are
    /// returned even if the response's body is not complete: its part within `answer_limit_bytes`
    /// that arrived in time.
    ///
    /// # Errors
    /// See [`ClientError`]; a status is never an error, and [`ClientError::TooLarge`] does not occur.
    pub async fn post(
        &self,
        endpoint: &Endpoint,
        headers: &[(HeaderName, HeaderValue)],
        body: Bytes,
        answer_limit_bytes: usize,
        timeout: Duration,
    ) -> Result<Fetched, ClientError> {
        let host = endpoint.authority();
        let response = self.request(Method::POST, endpoint, headers, body);
        let (mut head, mut answer) = (None, Vec::new());
        let whole = async {
            let (received, mut body) = response.await?.into_parts();
            head = Some(received);
            while answer.len() < answer_limit_bytes
                && let Some(Ok(frame)) = body.frame().await
            {
                if let Some(data) = frame.data_ref() {
                    answer.extend_from_slice(&data[..data.len().min(answer_limit_bytes - answer.len())]);
                }
            }
            Ok(())
        };
        let ended = tokio::time::timeout(timeout, whole).await;
        match (head, ended) {
            (Some(head), _) => {
                Ok(Fetched { status: head.status.as_u16(), headers: head.headers, body: answer.into() })
            }
            (None, Ok(Err(error))) => Err(failure(host, error)),
            (None, _) => Err(ClientError::Timeout { host: host.to_owned(), limit: timeout }),
        }
    }

    fn request(
        &self,
        method: Method,
        endpoint: &Endpoint,
        headers: &[(HeaderName, HeaderValue)],
        body: Bytes,
    ) -> legacy::ResponseFuture {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = endpoint.uri().clone();
        request.headers_mut().extend(headers.iter().cloned());
        request.headers_mut().entry(header::USER_AGENT).or_insert(USER_AGENT);
        self.inner.request(request)
    }
}

async fn read(host: &str, response: Response<Incoming>, limit_bytes: usize) -> Result<Fetched, ClientError> {
    let (head, body) = response.into_parts();
    let status = head.status.as_u16();
    match Limited::new(body, limit_bytes).collect().await {
        Ok(body) => Ok(Fetched { status, headers: head.headers, body: body.to_bytes() }),
        Err(error) if error.is::<LengthLimitError>() => {
            Err(ClientError::TooLarge { host: host.to_owned(), status, limit_bytes })
        }
        Err(error) => Err(broken(host, error.as_ref())),
    }
}

fn failure(host: &str, error: legacy::Error) -> ClientError {
    if let Some(cause @ rustls::Error::InvalidCertificate(_)) = find::<rustls::Error>(&error) {
        return ClientError::Certificate { host: host.to_owned(), cause: tls::describe(cause) };
    }
    if error.is_connect() {
        return ClientError::Connect { host: host.to_owned(), source: error.into() };
    }
    broken(host, &error)
}

fn broken(host: &str, error: &(dyn Error + 'static)) -> ClientError {
    let (host, cause) = (host.to_owned(), chain(error));
    match find::<hyper::Error>(error) {
        Some(error) if error.is_parse() || error.is_user() => ClientError::Other { host, cause },
        _ => ClientError::Interrupted { host, cause },
    }
}

/// Returns the first `E` in the chain of causes. An `io::Error` hides the error that it wraps from
/// [`Error::source`], so it is opened by hand.
fn find<'e, E: Error + 'static>(error: &'e (dyn Error + 'static)) -> Option<&'e E> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<E>() {
            return Some(found);
        }
        next = match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            Some(wrapped) => Some(wrapped),
            None => error.source(),
        };
    }
    None
}

/// Returns the chain of causes in one line, without the client library's own heading and without
/// saying twice what an outer error already says.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut next = if error.is::<legacy::Error>() { error.source().or(Some(error)) } else { Some(error) };
    let mut text = String::new();
    while let Some(error) = next {
        let part = error.to_string();
        if text.is_empty() {
            text = part;
        } else if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
