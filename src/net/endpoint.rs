//! Checked URLs for outgoing requests.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use hyper::Uri;
use rustls::pki_types::ServerName;

/// An outgoing URL that has been checked: `https`, or `http` to the loopback interface only.
///
/// There is always a host, never a user name, password or fragment. [`fmt::Display`] prints the
/// URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    uri: Uri,
}

/// Reason why a URL is refused. Each can be fixed in the configuration.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum EndpointError {
    /// Not an absolute URL (RFC 3986).
    #[error("{url:?} is not a URL ({cause}); write it like https://host/path")]
    NotAUrl {
        /// The given text.
        url: String,
        /// The parser's error.
        cause: String,
    },
    /// A user name or password before the host. The URL is not repeated, so that no log shows it.
    #[error("a URL must not hold a user name or password; remove everything up to the @ before the host")]
    UserInfo,
    /// `#...` at the end, which is never sent to a server.
    #[error("{url:?} has a fragment, which is never sent; remove the # and what follows")]
    Fragment {
        /// The given text.
        url: String,
    },
    /// Neither `https` nor `http`.
    #[error("{url:?} is neither https nor http; write it like https://host/path")]
    Scheme {
        /// The given text.
        url: String,
    },
    /// The host is missing, or neither a DNS name nor an IP address.
    #[error("{url:?} has no valid host; a DNS name or an IP address is needed")]
    Host {
        /// The given text.
        url: String,
    },
    /// The port is not a number from 1 to 65535.
    #[error("{url:?} has no valid port; a number from 1 to 65535 is needed after the colon")]
    Port {
        /// The given text.
        url: String,
    },
    /// Plain `http` to a host that is not loopback.
    #[error("{url:?} is plain http, which is accepted for a loopback host only; use https")]
    PlainHttp {
        /// The given text.
        url: String,
    },
}

impl Endpoint {
    /// Checks `url`. Loopback, where `http` is accepted, is 127.0.0.0/8, `::1` and the name
    /// `localhost` (RFC 6761, section 6.3).
    ///
    /// # Errors
    /// See [`EndpointError`].
    pub fn parse(url: &str) -> Result<Endpoint, EndpointError> {
        let owned = || url.to_owned();
        if names_a_user(url) {
            return Err(EndpointError::UserInfo);
        }
        // `Uri` drops a fragment silently.
        if url.contains('#') {
            return Err(EndpointError::Fragment { url: owned() });
        }
        let uri: Uri = url.parse().map_err(|e: hyper::http::uri::InvalidUri| EndpointError::NotAUrl {
            url: owned(),
            cause: e.to_string(),
        })?;
        let plain = match uri.scheme_str() {
            Some("https") => false,
            Some("http") => true,
            _ => return Err(EndpointError::Scheme { url: owned() }),
        };
        let (Some(host), Some(authority)) = (uri.host(), uri.authority()) else {
            return Err(EndpointError::Host { url: owned() });
        };
        if ServerName::try_from(without_brackets(host)).is_err() {
            return Err(EndpointError::Host { url: owned() });
        }
        // `Uri` accepts an invalid port, and connecting would fall back to the default one.
        if !is_port(authority.as_str().strip_prefix(host).unwrap_or_default()) {
            return Err(EndpointError::Port { url: owned() });
        }
        if plain && !is_loopback(host) {
            return Err(EndpointError::PlainHttp { url: owned() });
        }
        Ok(Endpoint { uri })
    }

    /// Returns the whole URL.
    pub(crate) fn uri(&self) -> &Uri {
        &self.uri
    }

    /// Returns whether calls to it need TLS and therefore certificate authorities.
    pub fn is_https(&self) -> bool {
        self.uri.scheme_str() == Some("https")
    }

    /// Returns the host and, where given, `:` and the port: the peer's name in messages.
    pub fn authority(&self) -> &str {
        self.uri.authority().map_or("", hyper::http::uri::Authority::as_str)
    }
}

impl std::str::FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(url: &str) -> Result<Self, Self::Err> {
        Self::parse(url)
    }
}

#[cfg(feature = "spool")]
crate::quantity::by_text!(Endpoint, Endpoint::parse);

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.uri.fmt(f)
    }
}

/// Returns whether the URL names a user. Examines the text itself, before anything could repeat it
/// in a message.
fn names_a_user(url: &str) -> bool {
    let after_scheme = url.split_once("://").map_or(url, |(_, rest)| rest);
    after_scheme.split(['/', '?', '#']).next().is_some_and(|authority| authority.contains('@'))
}

/// Returns whether `rest`, which follows the host in an authority, is nothing, or a colon and a
/// valid port.
fn is_port(rest: &str) -> bool {
    match rest.strip_prefix(':') {
        None => rest.is_empty(),
        Some(digits) => {
            digits.bytes().all(|b| b.is_ascii_digit()) && digits.parse::<u16>().is_ok_and(|port| port != 0)
        }
    }
}

fn is_loopback(host: &str) -> bool {
    let host = without_brackets(host);
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<Ipv4Addr>().is_ok_and(|ip| ip.is_loopback())
        || host.parse::<Ipv6Addr>().is_ok_and(|ip| ip.is_loopback())
}

fn without_brackets(host: &str) -> &str {
    host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn https_is_accepted_anywhere_and_printed_as_written() {
        for url in [
            "https://us.api.konghq.com/v2/audit-log-webhook/jwks.json",
            "https://10.0.0.1:8443/a?b=c",
            "https://[2001:db8::1]:8443/",
        ] {
            assert_eq!(Endpoint::parse(url).unwrap().to_string(), url);
        }
        assert_eq!(Endpoint::parse("HTTPS://host").unwrap().to_string(), "https://host/");
        assert_eq!(Endpoint::parse("https://host:8443/x").unwrap().authority(), "host:8443");
    }

    #[test]
    fn http_is_accepted_on_loopback_only() {
        for url in ["http://127.0.0.1:8080/x", "http://127.9.9.9/", "http://[::1]:1/", "http://LocalHost/"] {
            let endpoint = Endpoint::parse(url).unwrap();
            assert!(!endpoint.is_https());
        }
        for url in [
            "http://example.com/",
            "http://128.0.0.1/",
            "http://localhost.example.com/",
            "http://127.0.0.1.example.com/",
            "http://[::2]/",
            "http://0.0.0.0/",
        ] {
            assert_eq!(Endpoint::parse(url), Err(EndpointError::PlainHttp { url: url.to_owned() }));
        }
    }

    #[test]
    fn everything_else_is_refused() {
        let url = |s: &str| s.to_owned();
        let cases = [
            ("https://h/#f", EndpointError::Fragment { url: url("https://h/#f") }),
            ("ftp://h/", EndpointError::Scheme { url: url("ftp://h/") }),
            ("host", EndpointError::Scheme { url: url("host") }),
            ("/path", EndpointError::Scheme { url: url("/path") }),
            ("https://:443/", EndpointError::Host { url: url("https://:443/") }),
            ("https://a_b!/", EndpointError::Host { url: url("https://a_b!/") }),
            ("https://h:0/", EndpointError::Port { url: url("https://h:0/") }),
            ("https://h:/", EndpointError::Port { url: url("https://h:/") }),
            ("https://h:99999/", EndpointError::Port { url: url("https://h:99999/") }),
            ("https://[::1]:99999/", EndpointError::Port { url: url("https://[::1]:99999/") }),
        ];
        for (text, error) in cases {
            assert_eq!(Endpoint::parse(text), Err(error), "{text}");
        }
        for text in ["", "https://", "https:///path", "https://h h/", "https://[::1/"] {
            assert!(matches!(Endpoint::parse(text), Err(EndpointError::NotAUrl { .. })), "{text}");
        }
    }

    #[test]
    fn a_password_is_never_printed() {
        for text in
            ["https://user:secret@h/", "https://user:sec ret@h/", "user:secret@h", "http://secret@h:x/"]
        {
            let error = Endpoint::parse(text).unwrap_err();
            assert_eq!(error, EndpointError::UserInfo);
            assert!(!error.to_string().contains("sec"));
        }
        assert!(Endpoint::parse("https://h/@path?a@b").is_ok());
    }
}
