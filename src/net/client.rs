//! One request, one bounded answer.

use std::error::Error;
use std::future::Future;
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
use super::{Endpoint, TlsError, client_tls, tls};

/// How long [`Client::for_endpoint`] lets one TCP connection attempt take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
const USER_AGENT: HeaderValue = HeaderValue::from_static(concat!("auditgate/", env!("CARGO_PKG_VERSION")));

/// An HTTP/1.1 client for HTTPS and, on loopback, HTTP. Connections are kept for a minute and used
/// again. Redirects are not followed; of proxies those of the environment (`HTTPS_PROXY`, `ALL_PROXY`,
/// `NO_PROXY`) are used, for HTTPS to other machines. Clones share the connections.
///
/// Its futures need a tokio runtime with time and I/O enabled, and may be dropped at any point.
#[derive(Clone, Debug)]
pub struct Client {
    inner: legacy::Client<HttpsConnector<Connector>, Full<Bytes>>,
}

/// A whole answer, whatever its status.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// The status code, 200 to 599; a redirect is just its 3xx.
    pub status: u16,
    /// The answer's headers.
    pub headers: HeaderMap,
    /// The body, no longer than the limit given with the request.
    pub body: Bytes,
}

/// Why there is no whole answer. Whether to try again is for the caller to decide.
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
    /// The server's certificate is not one that we trust for this host. Another try will not help
    /// before someone has mended the certificate or our list of authorities. Nothing of the
    /// request was sent.
    #[error("the certificate of {host} is not trusted: {cause}")]
    Certificate {
        /// Host and port of the URL.
        host: String,
        /// What the verification found.
        cause: String,
    },
    /// The answer was not there in time. The server may have acted on the request.
    #[error("{host} did not answer within {limit:?}")]
    Timeout {
        /// Host and port of the URL.
        host: String,
        /// The time that was allowed for the whole exchange.
        limit: Duration,
    },
    /// The answer's body is longer than allowed; its rest was not read.
    #[error("the answer of {host} (status {status}) is longer than {limit_bytes} bytes")]
    TooLarge {
        /// Host and port of the URL.
        host: String,
        /// The answer's status code.
        status: u16,
        /// The limit for the body.
        limit_bytes: usize,
    },
    /// The connection broke before the answer was complete. The server may have acted on the
    /// request.
    #[error("the exchange with {host} was cut off: {cause}")]
    Interrupted {
        /// Host and port of the URL.
        host: String,
        /// The flattened chain of causes.
        cause: String,
    },
    /// What came back is not HTTP, or the request could not be expressed in it.
    #[error("the exchange with {host} failed: {cause}")]
    Other {
        /// Host and port of the URL.
        host: String,
        /// The flattened chain of causes.
        cause: String,
    },
}

/// A token that cannot stand in a header.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the token is empty or holds a control character: an HTTP header cannot carry it")]
pub struct InvalidToken;

/// The `Authorization` header's value for `secret`: `Bearer SECRET` (RFC 6750), or the secret as it
/// is when it contains a space and so names its own scheme. Marked sensitive: no log shows it.
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
    /// A client with this TLS configuration. `connect_timeout` bounds the TCP connection (all
    /// addresses of the host together); the handshake counts against the request's own timeout.
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

    /// A client that is good for `endpoint`: for `https` it trusts what [`client_tls`] makes of
    /// `ca`; for `http` no authorities are loaded, so that a system without any can still use it.
    ///
    /// # Errors
    /// See [`TlsError`]; never for `http` because of missing authorities.
    pub fn for_endpoint(endpoint: &Endpoint, ca: Option<&Path>) -> Result<Client, TlsError> {
        let tls = if endpoint.is_https() { client_tls(ca)? } else { tls::trusting_nobody()? };
        Ok(Client::new(tls, CONNECT_TIMEOUT))
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
        self.exchange(Method::GET, endpoint, headers, Bytes::new(), limit_bytes, timeout).await
    }

    /// Posts `body` to `endpoint`. At most `answer_limit_bytes` of the answer's body are accepted,
    /// and the whole exchange may take `timeout`.
    ///
    /// # Errors
    /// See [`ClientError`]; a status is never an error.
    pub async fn post(
        &self,
        endpoint: &Endpoint,
        headers: &[(HeaderName, HeaderValue)],
        body: Bytes,
        answer_limit_bytes: usize,
        timeout: Duration,
    ) -> Result<Fetched, ClientError> {
        self.exchange(Method::POST, endpoint, headers, body, answer_limit_bytes, timeout).await
    }

    fn exchange(
        &self,
        method: Method,
        endpoint: &Endpoint,
        headers: &[(HeaderName, HeaderValue)],
        body: Bytes,
        limit_bytes: usize,
        timeout: Duration,
    ) -> impl Future<Output = Result<Fetched, ClientError>> + Send + 'static {
        let host = endpoint.authority().to_owned();
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = endpoint.uri().clone();
        request.headers_mut().extend(headers.iter().cloned());
        request.headers_mut().entry(header::USER_AGENT).or_insert(USER_AGENT);
        let response = self.inner.request(request);
        async move {
            let whole = async {
                let response = response.await.map_err(|error| failure(&host, error))?;
                read(&host, response, limit_bytes).await
            };
            match tokio::time::timeout(timeout, whole).await {
                Ok(result) => result,
                Err(_) => Err(ClientError::Timeout { host, limit: timeout }),
            }
        }
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
        return ClientError::Certificate { host: host.to_owned(), cause: cause.to_string() };
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

/// The first `E` in the chain of causes. An `io::Error` hides the error that it wraps from
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

/// The chain of causes in one line, without the client library's own heading and without saying
/// twice what an outer error already says.
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
mod tests {
    use std::sync::{Arc, Mutex};

    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};
    use tokio_rustls::TlsAcceptor;

    use super::super::loopback::{Answer, Server};
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(20);

    fn plain_client(server: &Server) -> Client {
        Client::for_endpoint(&server.endpoint(), None).unwrap()
    }

    async fn fetch(server: &Server, limit_bytes: usize) -> Result<Fetched, ClientError> {
        plain_client(server).get(&server.endpoint(), &[], limit_bytes, TIMEOUT).await
    }

    #[tokio::test]
    async fn an_answer_comes_back_whole_and_the_connection_is_used_again() {
        let server = Server::start(Answer::ok("hello")).await;
        let client = plain_client(&server);
        let name = HeaderName::from_static("x-test");
        for _ in 0..3 {
            let fetched = client
                .get(&server.endpoint(), &[(name.clone(), HeaderValue::from_static("1"))], 5, TIMEOUT)
                .await
                .unwrap();
            assert_eq!((fetched.status, fetched.body.as_ref()), (200, &b"hello"[..]));
            assert_eq!(fetched.headers[header::CONTENT_LENGTH], "5");
        }
        assert_eq!(server.connections(), 1);
        let head = server.last_request();
        assert!(head.starts_with("GET /jwks.json HTTP/1.1\r\n"), "{head}");
        assert!(head.contains("user-agent: auditgate/"), "{head}");
        assert!(head.contains("x-test: 1\r\n"), "{head}");
    }

    #[tokio::test]
    async fn a_post_carries_its_body_and_the_callers_user_agent() {
        let server = Server::start(Answer::status(429)).await;
        let headers = [(header::USER_AGENT, HeaderValue::from_static("other"))];
        let fetched = plain_client(&server)
            .post(&server.endpoint(), &headers, Bytes::from_static(b"batch"), 10, TIMEOUT)
            .await
            .unwrap();
        assert_eq!(fetched.status, 429);
        let request = server.last_request();
        assert!(request.starts_with("POST "), "{request}");
        assert!(request.contains("content-length: 5\r\n"), "{request}");
        assert!(request.contains("user-agent: other\r\n") && !request.contains("auditgate"), "{request}");
        assert!(request.ends_with("\r\n\r\nbatch"), "{request}");
    }

    #[tokio::test]
    async fn a_redirect_is_just_its_status() {
        let server = Server::start(Answer::redirect("http://127.0.0.1:1/elsewhere")).await;
        assert_eq!(fetch(&server, 10).await.unwrap().status, 302);
        assert_eq!(server.requests(), 1);
    }

    #[tokio::test]
    async fn the_body_is_capped_whether_its_length_is_declared_or_not() {
        let server = Server::start(Answer::ok("hello")).await;
        let error = fetch(&server, 4).await.unwrap_err();
        assert!(matches!(error, ClientError::TooLarge { limit_bytes: 4, status: 200, .. }), "{error}");
        server.answer(Answer::Endless);
        let error = fetch(&server, 100_000).await.unwrap_err();
        assert!(matches!(error, ClientError::TooLarge { .. }), "{error}");
        assert!(error.to_string().contains(server.endpoint().authority()), "{error}");
    }

    #[tokio::test]
    async fn silence_times_out() {
        let server = Server::start(Answer::Silence).await;
        let error = plain_client(&server)
            .get(&server.endpoint(), &[], 10, Duration::from_millis(30))
            .await
            .unwrap_err();
        assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
        assert!(error.to_string().ends_with("within 30ms"), "{error}");
    }

    #[tokio::test]
    async fn a_stalled_body_times_out_too() {
        let server = Server::start(Answer::Stalled).await;
        let error = plain_client(&server)
            .get(&server.endpoint(), &[], 10, Duration::from_millis(30))
            .await
            .unwrap_err();
        assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_cut_off_answer_is_told_from_one_that_is_not_http() {
        let server = Server::start(Answer::raw("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")).await;
        let error = fetch(&server, 10).await.unwrap_err();
        assert!(matches!(error, ClientError::Interrupted { .. }), "{error:?}");
        server.answer(Answer::raw(""));
        let error = fetch(&server, 10).await.unwrap_err();
        assert!(matches!(error, ClientError::Interrupted { .. }), "{error:?}");
        server.answer(Answer::raw("220 mail.example.com ESMTP\r\n\r\n"));
        let error = fetch(&server, 10).await.unwrap_err();
        assert!(matches!(error, ClientError::Other { .. }), "{error:?}");
    }

    #[tokio::test]
    async fn a_refused_connection_says_so_in_one_line() {
        let endpoint = Server::nobody_listens().await;
        let client = Client::for_endpoint(&endpoint, None).unwrap();
        let error = client.get(&endpoint, &[], 10, TIMEOUT).await.unwrap_err();
        assert!(matches!(error, ClientError::Connect { .. }), "{error}");
        let message = error.to_string();
        assert!(message.starts_with(&format!("cannot connect to {}: ", endpoint.authority())), "{message}");
        assert_eq!(message.to_lowercase().matches("connection refused").count(), 1, "{message}");
    }

    /// An authority and a TLS server certificate for `name` that it issued.
    fn issue(name: &str) -> (String, TlsAcceptor) {
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(vec![name.to_owned()])
            .unwrap()
            .signed_by(&key, &Issuer::new(ca, ca_key))
            .unwrap();
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(
            rustls::crypto::aws_lc_rs::default_provider(),
        ))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![leaf.der().clone()],
            PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        )
        .unwrap();
        (ca_pem, TlsAcceptor::from(Arc::new(config)))
    }

    #[tokio::test]
    async fn tls_works_with_the_right_authority_only() {
        let (ca_pem, acceptor) = issue("127.0.0.1");
        let (other_pem, _) = issue("127.0.0.1");
        let server = Server::start_tls(Answer::ok("hello"), acceptor).await;
        let dir = tempfile::tempdir().unwrap();
        let (right, wrong) = (dir.path().join("ca.pem"), dir.path().join("other.pem"));
        std::fs::write(&right, ca_pem).unwrap();
        std::fs::write(&wrong, other_pem).unwrap();

        let client = Client::for_endpoint(&server.endpoint(), Some(&right)).unwrap();
        let fetched = client.get(&server.endpoint(), &[], 10, TIMEOUT).await.unwrap();
        assert_eq!(fetched.body.as_ref(), b"hello");

        let client = Client::for_endpoint(&server.endpoint(), Some(&wrong)).unwrap();
        let error = client.get(&server.endpoint(), &[], 10, TIMEOUT).await.unwrap_err();
        assert!(matches!(error, ClientError::Certificate { .. }), "{error:?}");
        assert!(error.to_string().contains("invalid peer certificate"), "{error}");
        assert_eq!(server.requests(), 1);
    }

    #[tokio::test]
    async fn a_certificate_for_another_name_is_told_from_a_failed_connection() {
        let (ca_pem, acceptor) = issue("example.com");
        let server = Server::start_tls(Answer::ok("hello"), acceptor).await;
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca.pem");
        std::fs::write(&ca, ca_pem).unwrap();
        let client = Client::for_endpoint(&server.endpoint(), Some(&ca)).unwrap();
        let error = client.get(&server.endpoint(), &[], 10, TIMEOUT).await.unwrap_err();
        assert!(matches!(error, ClientError::Certificate { .. }), "{error:?}");

        let plain = Server::start(Answer::ok("no TLS here")).await;
        let https = Endpoint::parse(&format!("https://{}/", plain.endpoint().authority())).unwrap();
        let error = client.get(&https, &[], 10, TIMEOUT).await.unwrap_err();
        assert!(matches!(error, ClientError::Connect { .. }), "{error:?}");
    }

    /// A proxy that leads every tunnel to one server; it gives its own address and what it was asked.
    async fn proxy_to(server: std::net::SocketAddr, answer: &'static str) -> (String, Arc<Mutex<String>>) {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://user:pass@{}", socket.local_addr().unwrap());
        let asked = Arc::<Mutex<String>>::default();
        let noted = Arc::clone(&asked);
        tokio::spawn(async move {
            while let Ok((mut client, _)) = socket.accept().await {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(client.read_u8().await.unwrap());
                }
                *noted.lock().unwrap() = String::from_utf8(head).unwrap();
                client.write_all(format!("HTTP/1.1 {answer}\r\n\r\n").as_bytes()).await.unwrap();
                let mut server = TcpStream::connect(server).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            }
        });
        (url, asked)
    }

    #[tokio::test]
    async fn https_goes_through_the_proxy_of_the_environment() {
        let (ca_pem, acceptor) = issue("keys.example");
        let server = Server::start_tls(Answer::ok("hello"), acceptor).await;
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca.pem");
        std::fs::write(&ca, ca_pem).unwrap();
        let client = |proxies| Client::with_proxies(client_tls(Some(&ca)).unwrap(), TIMEOUT, proxies);
        let endpoint = Endpoint::parse("https://keys.example/jwks").unwrap();
        let address = server.endpoint().authority().parse().unwrap();

        let (url, asked) = proxy_to(address, "200 OK").await;
        let proxies = || Matcher::builder().https(url.clone());
        let fetched = client(proxies().build()).get(&endpoint, &[], 10, TIMEOUT).await.unwrap();
        assert_eq!(fetched.body.as_ref(), b"hello");
        let head = asked.lock().unwrap().to_ascii_lowercase();
        assert!(head.starts_with("connect keys.example:443 http/1.1\r\n"), "{head}");
        assert!(head.contains("proxy-authorization: basic dxnlcjpwyxnz\r\n"), "{head}");

        // Of this machine, and of what NO_PROXY names, it is not asked.
        asked.lock().unwrap().clear();
        let error = client(proxies().build()).get(&server.endpoint(), &[], 10, TIMEOUT).await.unwrap_err();
        assert!(matches!(error, ClientError::Certificate { .. }), "{error:?}");
        let away = Endpoint::parse("https://keys.invalid/").unwrap();
        let direct = client(proxies().no("keys.invalid").build());
        assert!(direct.get(&away, &[], 10, TIMEOUT).await.is_err());
        assert_eq!(*asked.lock().unwrap(), "");

        let (refusing, _) = proxy_to(address, "407 Proxy Authentication Required").await;
        for (url, why) in [
            (refusing.as_str(), "proxy authorization required"),
            ("https://proxy.example:3128", "only proxies with an http:// URL can be used"),
            ("socks5://proxy.example:1080", "only proxies with an http:// URL can be used"),
        ] {
            let client = client(Matcher::builder().https(url.to_owned()).build());
            let error = client.get(&endpoint, &[], 10, TIMEOUT).await.unwrap_err().to_string();
            assert!(error.contains("through the proxy ") && error.contains(why), "{error}");
            assert!(!error.contains("pass"), "{error}");
        }
    }

    #[test]
    fn a_token_is_a_bearer_token_unless_it_names_its_scheme() {
        assert_eq!(bearer(b"abc").unwrap(), "Bearer abc");
        assert_eq!(bearer(b"Splunk abc").unwrap(), "Splunk abc");
        assert!(!format!("{:?}", bearer(b"abc").unwrap()).contains("abc"));
        assert_eq!(bearer(b""), Err(InvalidToken));
        assert_eq!(bearer(b"a\nb"), Err(InvalidToken));
    }
}
