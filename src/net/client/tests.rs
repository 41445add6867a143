use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::super::authority::{Authority, server_config};
use super::super::loopback::{Answer, Server};
use super::super::tls::{ClientOptions, Pin};
use super::*;

const TIMEOUT: Duration = Duration::from_secs(20);

fn plain_client(server: &Server) -> Client {
    Client::for_endpoint(&server.endpoint(), None).unwrap()
}

async fn fetch(server: &Server, limit_bytes: usize) -> Result<Fetched, ClientError> {
    plain_client(server).get(&server.endpoint(), &[], limit_bytes, TIMEOUT).await
}

#[tokio::test]
async fn an_answer_is_returned_whole_and_the_connection_is_reused() {
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
async fn a_redirect_is_not_followed() {
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
    let error =
        plain_client(&server).get(&server.endpoint(), &[], 10, Duration::from_millis(30)).await.unwrap_err();
    assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
    assert!(error.to_string().ends_with("within 30ms"), "{error}");
}

#[tokio::test]
async fn a_stalled_body_times_out_too() {
    let server = Server::start(Answer::Stalled).await;
    let error =
        plain_client(&server).get(&server.endpoint(), &[], 10, Duration::from_millis(30)).await.unwrap_err();
    assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
}

#[tokio::test]
async fn a_truncated_answer_and_one_that_is_not_http_are_different_errors() {
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
async fn a_refused_connection_is_reported_in_one_line() {
    let endpoint = Server::refusing();
    let client = Client::for_endpoint(&endpoint, None).unwrap();
    let error = client.get(&endpoint, &[], 10, TIMEOUT).await.unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }), "{error}");
    let message = error.to_string();
    assert!(message.starts_with(&format!("cannot connect to {}: ", endpoint.authority())), "{message}");
    assert_eq!(message.to_lowercase().matches("connection refused").count(), 1, "{message}");
}

/// Returns a TLS acceptor with a certificate for `name`.
fn acceptor(authority: &Authority, name: &str) -> TlsAcceptor {
    let config = server_config(&authority.identity(name), None, rustls::DEFAULT_VERSIONS);
    TlsAcceptor::from(Arc::new(config))
}

#[tokio::test]
async fn tls_works_with_the_right_authority_only() {
    let (right, wrong) = (Authority::new(), Authority::new());
    let server = Server::start_tls(Answer::ok("hello"), acceptor(&right, "127.0.0.1")).await;

    let client = Client::for_endpoint(&server.endpoint(), Some(&right.ca())).unwrap();
    let fetched = client.get(&server.endpoint(), &[], 10, TIMEOUT).await.unwrap();
    assert_eq!(fetched.body.as_ref(), b"hello");

    let client = Client::for_endpoint(&server.endpoint(), Some(&wrong.ca())).unwrap();
    let error = client.get(&server.endpoint(), &[], 10, TIMEOUT).await.unwrap_err();
    assert!(matches!(error, ClientError::Certificate { .. }), "{error:?}");
    assert!(error.to_string().ends_with("no trusted authority signed it"), "{error}");
    assert_eq!(server.requests(), 1);
}

#[tokio::test]
async fn a_certificate_for_another_name_is_another_error_than_a_failed_connection() {
    let authority = Authority::new();
    let server = Server::start_tls(Answer::ok("hello"), acceptor(&authority, "example.com")).await;
    let client = Client::for_endpoint(&server.endpoint(), Some(&authority.ca())).unwrap();
    let error = client.get(&server.endpoint(), &[], 10, TIMEOUT).await.unwrap_err();
    assert!(matches!(error, ClientError::Certificate { .. }), "{error:?}");

    let plain = Server::start(Answer::ok("no TLS here")).await;
    let https = Endpoint::parse(&format!("https://{}/", plain.endpoint().authority())).unwrap();
    let error = client.get(&https, &[], 10, TIMEOUT).await.unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }), "{error:?}");
}

#[tokio::test]
async fn a_pinned_key_must_be_that_of_the_server() {
    let authority = Authority::new();
    let server = Server::start_tls(Answer::ok("hello"), acceptor(&authority, "127.0.0.1")).await;
    let fetch = async |pins: Vec<Pin>| {
        let options = ClientOptions { ca: Some(authority.ca()), pins, ..ClientOptions::default() };
        let client = Client::with_options(&server.endpoint(), &options).unwrap();
        client.get(&server.endpoint(), &[], 10, TIMEOUT).await
    };
    let other: Pin = "sha256//47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=".parse().unwrap();
    let message = fetch(vec![other]).await.unwrap_err().to_string();
    assert!(message.contains("is not trusted: its public key sha256//"), "{message}");
    let shown = message.split_once("key ").unwrap().1.split(' ').next().unwrap();
    assert_eq!(fetch(vec![other, shown.parse().unwrap()]).await.unwrap().status, 200);
    for wrong in ["", "sha256//", "sha256//abc=", "md5//47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="] {
        assert!(wrong.parse::<Pin>().is_err(), "{wrong}");
    }
}

/// Starts a proxy that connects every tunnel to one server. Returns its URL and the head of its
/// last request.
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
    let authority = Authority::new();
    let server = Server::start_tls(Answer::ok("hello"), acceptor(&authority, "keys.example")).await;
    let tls = || crate::net::client_tls(Some(&authority.ca())).unwrap();
    let client = |proxies| Client::with_proxies(tls(), TIMEOUT, proxies);
    let endpoint = Endpoint::parse("https://keys.example/jwks").unwrap();
    let address = server.endpoint().authority().parse().unwrap();

    let (url, asked) = proxy_to(address, "200 OK").await;
    let proxies = || Matcher::builder().https(url.clone());
    let fetched = client(proxies().build()).get(&endpoint, &[], 10, TIMEOUT).await.unwrap();
    assert_eq!(fetched.body.as_ref(), b"hello");
    let head = asked.lock().unwrap().to_ascii_lowercase();
    assert!(head.starts_with("connect keys.example:443 http/1.1\r\n"), "{head}");
    assert!(head.contains("proxy-authorization: basic dxnlcjpwyxnz\r\n"), "{head}");

    // Loopback addresses and hosts in NO_PROXY bypass the proxy.
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
