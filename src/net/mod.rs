//! skeleton
use std::fmt;

/// Stand-in for the checked outgoing URL, only to compile this part alone.
#[derive(Clone, Debug)]
pub struct Endpoint(hyper::Uri);

impl Endpoint {
    /// https anywhere, http to a loopback host only.
    ///
    /// # Errors
    /// One sentence.
    pub fn parse(text: &str) -> Result<Self, String> {
        let uri: hyper::Uri = text.parse().map_err(|error| format!("`{text}` is not a URL: {error}"))?;
        let host = uri.host().unwrap_or_default();
        match uri.scheme_str() {
            Some("https") => Ok(Self(uri)),
            Some("http") if host == "localhost" || host == "127.0.0.1" || host == "[::1]" => Ok(Self(uri)),
            Some("http") => Err(format!("`{text}` is plain http to another machine")),
            _ => Err(format!("`{text}` does not begin with https://")),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
