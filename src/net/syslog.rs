//! Address and framing of a syslog server: types that the configuration and the syslog sink share.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

use rustls::pki_types::ServerName;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::quantity::by_text;

/// The address of a syslog server. [`fmt::Display`] prints it as it is written in the
/// configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SyslogAddress {
    /// `udp://HOST[:514]`: one datagram a message (RFC 5426).
    Udp(HostPort),
    /// `tcp://HOST:PORT`: a plain stream (RFC 6587).
    Tcp(HostPort),
    /// `tls://HOST[:6514]`: a stream inside TLS (RFC 5425).
    Tls(HostPort),
    /// `unix:///PATH`: the socket of a daemon on this machine, for datagrams or a stream.
    Unix(PathBuf),
}

/// A host, by name or by address, and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// A DNS name, an IPv4 address, or an IPv6 address without brackets.
    pub host: String,
    /// 1 to 65535.
    pub port: u16,
}

/// Reason why a text is not the address of a syslog server. Each can be fixed in the configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SyslogAddressError {
    /// Another scheme, or none.
    #[error(
        "`{0}` does not begin with udp://, tcp://, tls:// or unix://; write one such as \
         tls://siem.example.com:6514 or unix:///dev/log"
    )]
    Scheme(String),
    /// The host is missing, or neither a DNS name nor an IP address.
    #[error("`{0}` has no valid host; write one such as tls://siem.example.com:6514")]
    Host(String),
    /// The port is not a number from 1 to 65535.
    #[error("`{0}` has no valid port; write one such as tls://siem.example.com:6514")]
    Port(String),
    /// No RFC assigns syslog over plain TCP a port: RFC 6587 only reports that 514 is common, and
    /// 601 is another protocol's (RFC 3195).
    #[error("`{0}` has no port, and plain TCP has no usual one; add the server's, such as :514 or :601")]
    NoPort(String),
    /// A `unix://` address whose path is not absolute.
    #[error("`{0}` has no absolute path; write it with three slashes, as in unix:///dev/log")]
    Path(String),
}

/// RFC 5426, section 3.3.
const UDP_PORT: u16 = 514;
/// RFC 5425, section 4.1.
const TLS_PORT: u16 = 6514;

impl SyslogAddress {
    /// Parses an address.
    ///
    /// # Errors
    /// See [`SyslogAddressError`].
    pub fn parse(text: &str) -> Result<Self, SyslogAddressError> {
        let (scheme, rest) =
            text.split_once("://").ok_or_else(|| SyslogAddressError::Scheme(text.to_owned()))?;
        match scheme {
            "udp" => HostPort::parse(text, rest, Some(UDP_PORT)).map(Self::Udp),
            "tcp" => HostPort::parse(text, rest, None).map(Self::Tcp),
            "tls" => HostPort::parse(text, rest, Some(TLS_PORT)).map(Self::Tls),
            "unix" if Path::new(rest).is_absolute() && !rest.ends_with('/') && !rest.contains('\0') => {
                Ok(Self::Unix(PathBuf::from(rest)))
            }
            "unix" => Err(SyslogAddressError::Path(text.to_owned())),
            _ => Err(SyslogAddressError::Scheme(text.to_owned())),
        }
    }
}

by_text!(SyslogAddress, SyslogAddress::parse);

impl HostPort {
    fn parse(whole: &str, text: &str, default: Option<u16>) -> Result<Self, SyslogAddressError> {
        let bad_host = || SyslogAddressError::Host(whole.to_owned());
        let (host, rest) = match text.strip_prefix('[') {
            Some(inside) => {
                let (host, rest) = inside.split_once(']').ok_or_else(bad_host)?;
                host.parse::<Ipv6Addr>().map_err(|_| bad_host())?;
                (host, rest)
            }
            None => text.find(':').map_or((text, ""), |at| text.split_at(at)),
        };
        ServerName::try_from(host).map_err(|_| bad_host())?;
        let port = match rest.strip_prefix(':') {
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                digits.parse().ok().filter(|port| *port != 0)
            }
            None if rest.is_empty() => {
                Some(default.ok_or_else(|| SyslogAddressError::NoPort(whole.to_owned()))?)
            }
            _ => None,
        };
        let port = port.ok_or_else(|| SyslogAddressError::Port(whole.to_owned()))?;
        Ok(Self { host: host.to_owned(), port })
    }
}

impl fmt::Display for SyslogAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Udp(peer) => write!(f, "udp://{peer}"),
            Self::Tcp(peer) => write!(f, "tcp://{peer}"),
            Self::Tls(peer) => write!(f, "tls://{peer}"),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

/// Framing of messages in a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Framing {
    /// `octet-counting`: the length before each message (RFC 6587, section 3.4.1; RFC 5425, section
    /// 4.3).
    OctetCounting,
    /// `newline`: a line feed behind each message (RFC 6587, section 3.4.2). No message of ours
    /// holds one.
    Newline,
}

/// Facility of a message (RFC 5424, table 1): 0 to 23.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facility(u8);

/// The words in the configuration: as in syslog(3) and rsyslog, and for 12 to 15 short for RFC
/// 5424's.
const FACILITIES: [&str; 24] = [
    "kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp",
    "ntp", "audit", "alert", "clock", "local0", "local1", "local2", "local3", "local4", "local5", "local6",
    "local7",
];

impl Facility {
    /// `local0`, 16.
    pub const LOCAL0: Self = Self(16);

    /// Returns the number.
    pub fn code(self) -> u8 {
        self.0
    }
}

impl<'de> Deserialize<'de> for Facility {
    fn deserialize<D: Deserializer<'de>>(written: D) -> Result<Self, D::Error> {
        let name = String::deserialize(written)?;
        let facility = (0..).zip(FACILITIES).find(|(_, known)| *known == name);
        facility.map(|(code, _)| Self(code)).ok_or_else(|| D::Error::unknown_variant(&name, &FACILITIES))
    }
}

impl Serialize for Facility {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        out.serialize_str(FACILITIES[usize::from(self.0)])
    }
}

/// Minimum for the limit of a message's length, in bytes: every receiver must accept it (RFC 5424,
/// section 6.1; RFC 5426, section 3.2). Every header of ours fits into it.
pub const SMALLEST_MAX_SIZE: usize = 480;

/// Maximum length of APP-NAME, in bytes (RFC 5424, section 6).
pub const LONGEST_APP_NAME: usize = 48;

/// Returns whether a text can be an APP-NAME: 1 to 48 printable ASCII characters, no space.
pub fn is_app_name(text: &str) -> bool {
    (1..=LONGEST_APP_NAME).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_printed_with_its_port() {
        for (text, shown) in [
            ("udp://siem", "udp://siem:514"),
            ("udp://192.0.2.1:1514", "udp://192.0.2.1:1514"),
            ("tcp://siem.example.com:601", "tcp://siem.example.com:601"),
            ("tls://siem.example.com", "tls://siem.example.com:6514"),
            ("tls://[2001:db8::1]", "tls://[2001:db8::1]:6514"),
            ("tls://[2001:db8::1]:7", "tls://[2001:db8::1]:7"),
            ("unix:///dev/log", "unix:///dev/log"),
        ] {
            let address = SyslogAddress::parse(text).unwrap();
            assert_eq!(address.to_string(), shown);
            assert_eq!(SyslogAddress::parse(shown), Ok(address));
        }
    }

    #[test]
    fn an_invalid_address_is_refused_with_the_reason() {
        use SyslogAddressError as Error;
        type Make = fn(String) -> Error;
        let cases: [(&str, Make); 17] = [
            ("", Error::Scheme),
            ("siem:514", Error::Scheme),
            ("http://siem:514", Error::Scheme),
            ("TLS://siem", Error::Scheme),
            ("tcp://", Error::Host),
            ("tcp://:514", Error::Host),
            ("tcp://a b:514", Error::Host),
            ("tls://user@siem:6514", Error::Host),
            ("tls://[siem]:6514", Error::Host),
            ("tls://[::1", Error::Host),
            ("tcp://siem", Error::NoPort),
            ("tcp://siem:", Error::Port),
            ("tcp://siem:0", Error::Port),
            ("tcp://siem:+1", Error::Port),
            ("tcp://siem:65536", Error::Port),
            ("tls://[::1]x", Error::Port),
            ("unix://dev/log", Error::Path),
        ];
        for (text, error) in cases {
            assert_eq!(SyslogAddress::parse(text), Err(error(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn an_app_name_fits_into_a_header() {
        for (name, is_one) in [("auditgate", true), ("", false), ("a b", false), ("ü", false)] {
            assert_eq!(is_app_name(name), is_one);
        }
        assert!(is_app_name(&"x".repeat(48)) && !is_app_name(&"x".repeat(49)));
    }

    #[test]
    fn facilities_have_the_numbers_of_the_rfc() {
        for (name, code) in [("\"authpriv\"", 10), ("\"local0\"", 16), ("\"local7\"", 23)] {
            let facility: Facility = serde_json::from_str(name).unwrap();
            assert_eq!((facility.code(), &*serde_json::to_string(&facility).unwrap()), (code, name));
        }
        assert_eq!(Facility::LOCAL0.code(), 16);
    }
}
