//! Plain HTTP to the admin endpoint of a daemon: over TCP, or over a Unix socket. One request on a
//! connection of its own, without proxies.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use http_body_util::Empty;
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{self, HeaderValue};
use hyper::http::uri::Authority;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use super::{ClientError, Fetched, USER_AGENT, broken, read};

/// Address of an HTTP server without TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlainAddress {
    /// `http://HOST:PORT`.
    Tcp(Authority),
    /// `unix:///PATH`.
    Unix(PathBuf),
}

impl PlainAddress {
    /// Parses `http://HOST:PORT` (80 without a port) or `unix:///PATH`.
    ///
    /// # Errors
    /// What is wrong, with the forms that are right. The text is not repeated if it may hold a
    /// password.
    pub fn parse(text: &str) -> Result<Self, String> {
        const FORMS: &str = "write http://HOST:PORT or unix:///PATH";
        if let Some(path) = text.strip_prefix("unix://") {
            let is_absolute = path.starts_with('/') && !path.contains('\0');
            return match is_absolute {
                true => Ok(Self::Unix(path.into())),
                false => Err(format!("`{text}` has no absolute path; {FORMS}")),
            };
        }
        if text.contains('@') {
            return Err(format!("an address must not hold a user name or password; {FORMS}"));
        }
        let rest =
            text.strip_prefix("http://").ok_or_else(|| format!("`{text}` is of another kind; {FORMS}"))?;
        let authority = rest.strip_suffix('/').unwrap_or(rest).parse::<Authority>();
        let is_port = |authority: &Authority| {
            authority.as_str() == authority.host() || authority.port_u16().is_some_and(|port| port != 0)
        };
        match authority {
            Ok(authority) if !authority.host().is_empty() && is_port(&authority) => Ok(Self::Tcp(authority)),
            _ => Err(format!("`{text}` is not a host and a port; {FORMS}")),
        }
    }

    /// Fetches a path, with a bearer token (RFC 6750) where one is given. At most `limit_bytes` of body
    /// are accepted, and the whole exchange may take `timeout`. Needs a tokio runtime with time and
    /// I/O enabled.
    ///
    /// # Errors
    /// See [`ClientError`]; a status is never an error.
    pub async fn get(
        &self,
        path: &str,
        token: Option<&[u8]>,
        limit_bytes: usize,
        timeout: Duration,
    ) -> Result<Fetched, ClientError> {
        let exchange = async {
            let refused = |source: std::io::Error| ClientError::Connect {
                host: self.to_string(),
                source: source.into(),
            };
            match self {
                Self::Tcp(authority) => {
                    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
                    let port = authority.port_u16().unwrap_or(80);
                    let stream = TcpStream::connect((host, port)).await.map_err(refused)?;
                    self.get_on(stream, authority.as_str(), path, token, limit_bytes).await
                }
                Self::Unix(socket) => {
                    let stream = UnixStream::connect(socket).await.map_err(refused)?;
                    self.get_on(stream, "localhost", path, token, limit_bytes).await
                }
            }
        };
        match tokio::time::timeout(timeout, exchange).await {
            Ok(result) => result,
            Err(_) => Err(ClientError::Timeout { host: self.to_string(), limit: timeout }),
        }
    }

    async fn get_on(
        &self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        host: &str,
        path: &str,
        token: Option<&[u8]>,
        limit_bytes: usize,
    ) -> Result<Fetched, ClientError> {
        let name = self.to_string();
        let other = |cause: String| ClientError::Other { host: name.clone(), cause };
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(&name, &error))?;
        let mut request = Request::get(path)
            .header(header::HOST, host)
            .header(header::USER_AGENT, USER_AGENT)
            .body(Empty::<Bytes>::new())
            .map_err(|error| other(error.to_string()))?;
        if let Some(token) = token {
            let value = zeroize::Zeroizing::new([b"Bearer ", token].concat());
            let mut value =
                HeaderValue::from_bytes(&value).map_err(|_| other(super::InvalidToken.to_string()))?;
            value.set_sensitive(true);
            request.headers_mut().insert(header::AUTHORIZATION, value);
        }
        // The sender ends with the response, and the connection with the sender.
        let response = async move {
            let response = sender.send_request(request).await.map_err(|error| broken(&name, &error))?;
            read(&name, response, limit_bytes).await
        };
        // The connection makes no progress unless it is polled, and its errors are the response's.
        let (response, _) = tokio::join!(response, connection);
        response
    }
}

impl fmt::Display for PlainAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(authority) => write!(f, "http://{authority}"),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_printed_as_it_is_written() {
        for text in
            ["http://127.0.0.1:9464", "http://[::1]:9464", "http://log-host:80", "unix:///run/a/admin.sock"]
        {
            assert_eq!(PlainAddress::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(PlainAddress::parse("http://log-host/").unwrap().to_string(), "http://log-host");
    }

    #[test]
    fn anything_else_is_refused_with_the_forms_and_without_a_password() {
        for text in [
            "",
            "127.0.0.1:9464",
            "https://127.0.0.1:9464",
            "http://",
            "http://:9464",
            "http://h:0",
            "http://h:x",
            "http://h:99999",
            "http://h/metrics",
            "http://user:secret@h:1",
            "unix://run/admin.sock",
            "unix://",
        ] {
            let refusal = PlainAddress::parse(text).unwrap_err();
            assert!(refusal.ends_with("write http://HOST:PORT or unix:///PATH"), "{text}: {refusal}");
            assert!(!refusal.contains("secret"), "{refusal}");
        }
    }
}
