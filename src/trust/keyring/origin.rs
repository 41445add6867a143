//! Origins of a source's keys, and how they are asked: a URL, a file, or the configuration itself.

use std::error::Error;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::super::jwks::{self, JwksError, KeySet, MAX_KEYS, Parsed};
use super::JwksOptions;
use crate::net::{self, Client, ClientError, Endpoint, HeaderMap, HeaderName, HeaderValue, TlsError, header};

/// Maximum length of a document, fetched or from a file, in bytes.
pub const DOCUMENT_LIMIT_BYTES: usize = 1 << 20;

const ACCEPT: HeaderValue = HeaderValue::from_static("application/jwk-set+json, application/json");

/// Error of loading keys; it names the file or URL.
#[derive(Debug, thiserror::Error)]
pub enum KeyRingError {
    /// The TLS client cannot be set up; the operator can fix that.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The file cannot be read, is not a regular file, or is longer than [`DOCUMENT_LIMIT_BYTES`].
    #[error("cannot read the key file {path}: {cause}")]
    File {
        /// The file.
        path: PathBuf,
        /// The underlying error.
        cause: io::Error,
    },
    /// The file has no usable key.
    #[error("cannot use the key file {path}: {cause}")]
    FileDocument {
        /// The file.
        path: PathBuf,
        /// The underlying error.
        cause: JwksError,
    },
    /// No whole response came.
    #[error("cannot fetch keys from {url}: {cause}")]
    Fetch {
        /// The URL.
        url: String,
        /// The underlying error.
        cause: ClientError,
    },
    /// The response's status is not 200.
    #[error("cannot fetch keys from {url}: the answer is status {status}{}", advice(*.status))]
    Status {
        /// The URL.
        url: String,
        /// The status.
        status: u16,
    },
    /// The response has no usable key.
    #[error("cannot use the keys from {url}: {cause}")]
    Document {
        /// The URL.
        url: String,
        /// The underlying error.
        cause: JwksError,
    },
    /// None of the document's keys is one that the operator pinned.
    #[error("none of the keys from {from} is pinned; it lists {listed}")]
    NotPinned {
        /// The URL or file.
        from: String,
        /// The thumbprints of its keys.
        listed: String,
    },
}

/// An origin that is ready to be asked.
pub(super) enum Ready {
    Pinned(KeySet),
    File(PathBuf),
    Url { endpoint: Endpoint, refresh: Duration, client: Box<Client>, token: Option<HeaderValue> },
}

/// Response of an origin.
#[derive(Default)]
pub(super) struct Loaded {
    /// A whole document, unless the known version is still current.
    pub(super) document: Option<Parsed>,
    /// Version of the document.
    pub(super) etag: Option<String>,
    pub(super) max_age: Option<Duration>,
    /// Time of the server, in seconds since the Unix epoch (RFC 9110, section 6.6.1).
    pub(super) date: Option<u64>,
}

impl Loaded {
    fn local(parsed: Parsed) -> Self {
        Self { document: Some(parsed), ..Self::default() }
    }
}

impl Ready {
    pub(super) fn new(options: &JwksOptions) -> Result<Self, Box<dyn Error>> {
        Ok(match (&options.url, &options.file, &options.keys) {
            (Some(endpoint), ..) => {
                let token = options.token.as_ref().map(|token| net::bearer(token.expose())).transpose()?;
                let client = Box::new(Client::for_endpoint(endpoint, options.ca.as_deref())?);
                Self::Url { endpoint: endpoint.clone(), refresh: options.refresh(), client, token }
            }
            (None, Some(file), _) => Self::File(file.clone()),
            (None, None, keys) => Self::Pinned(keys.clone().ok_or("the options name no origin of keys")?),
        })
    }

    /// Asks, within `timeout`, for another version than the one called `etag`.
    pub(super) async fn load(&self, etag: Option<&str>, timeout: Duration) -> Result<Loaded, KeyRingError> {
        match self {
            Self::Pinned(keys) => Ok(Loaded::local(Parsed { keys: keys.clone(), refused: Vec::new() })),
            Self::File(path) => Ok(Loaded::local(read_file_within(path, timeout).await?)),
            Self::Url { endpoint, client, token, .. } => {
                ask(client, endpoint, token.as_ref(), etag, timeout).await
            }
        }
    }
}

/// Reads a JWKS document with at most `limit` keys from a regular file of at most
/// [`DOCUMENT_LIMIT_BYTES`]. Blocks.
///
/// # Errors
/// [`KeyRingError::File`] or [`KeyRingError::FileDocument`].
pub fn read_file(path: &Path, limit: usize) -> Result<Parsed, KeyRingError> {
    let document = read_bounded(path).map_err(|cause| KeyRingError::File { path: path.to_owned(), cause })?;
    jwks::parse(&document, limit).map_err(|cause| KeyRingError::FileDocument { path: path.to_owned(), cause })
}

/// Fetches a JWKS document of at most [`DOCUMENT_LIMIT_BYTES`] within `timeout`. Any status but 200
/// is an error; redirects are not followed, because the URL is what the operator trusts.
///
/// # Errors
/// [`KeyRingError::Fetch`], [`KeyRingError::Status`] or [`KeyRingError::Document`].
pub async fn fetch(
    client: &Client,
    endpoint: &Endpoint,
    token: Option<&HeaderValue>,
    timeout: Duration,
) -> Result<Parsed, KeyRingError> {
    // 304 was not asked for.
    let unasked = || KeyRingError::Status { url: endpoint.to_string(), status: 304 };
    ask(client, endpoint, token, None, timeout).await?.document.ok_or_else(unasked)
}

async fn ask(
    client: &Client,
    endpoint: &Endpoint,
    token: Option<&HeaderValue>,
    etag: Option<&str>,
    timeout: Duration,
) -> Result<Loaded, KeyRingError> {
    let url = || endpoint.to_string();
    let mut headers: Vec<(HeaderName, HeaderValue)> = vec![(header::ACCEPT, ACCEPT)];
    headers.extend(token.map(|token| (header::AUTHORIZATION, token.clone())));
    let known = etag.and_then(|etag| HeaderValue::from_str(etag).ok());
    headers.extend(known.map(|known| (header::IF_NONE_MATCH, known)));
    let fetched = client
        .get(endpoint, &headers, DOCUMENT_LIMIT_BYTES, timeout)
        .await
        .map_err(|cause| KeyRingError::Fetch { url: url(), cause })?;
    let max_age = max_age(&fetched.headers);
    let date = date(&fetched.headers);
    match fetched.status {
        200 => {
            let parsed = jwks::parse(&fetched.body, MAX_KEYS)
                .map_err(|cause| KeyRingError::Document { url: url(), cause })?;
            let etag =
                fetched.headers.get(header::ETAG).and_then(|etag| etag.to_str().ok()).map(str::to_owned);
            Ok(Loaded { document: Some(parsed), etag, max_age, date })
        }
        304 if etag.is_some() => Ok(Loaded { document: None, etag: None, max_age, date }),
        status => Err(KeyRingError::Status { url: url(), status }),
    }
}

/// Returns when the server made the response; none when a cache has kept it since.
fn date(headers: &HeaderMap) -> Option<u64> {
    let date = headers.get(header::DATE).filter(|_| !headers.contains_key(header::AGE))?;
    let date = httpdate::parse_http_date(date.to_str().ok()?).ok()?;
    date.duration_since(std::time::UNIX_EPOCH).ok().map(|time| time.as_secs())
}

/// Returns how long the response is fresh (RFC 9111, section 4.2); none when it does not say, or
/// says that it must be revalidated each time.
fn max_age(headers: &HeaderMap) -> Option<Duration> {
    let seconds = |value: &str| value.trim().trim_matches('"').parse::<u64>().ok();
    let directives = headers.get_all(header::CACHE_CONTROL).iter().filter_map(|value| value.to_str().ok());
    let max_age = directives.flat_map(|value| value.split(',')).find_map(|directive| {
        let (name, value) = directive.split_once('=')?;
        name.trim().eq_ignore_ascii_case("max-age").then(|| seconds(value))?
    })?;
    let age = headers.get(header::AGE).and_then(|value| seconds(value.to_str().ok()?)).unwrap_or(0);
    Some(Duration::from_secs(max_age.saturating_sub(age))).filter(|fresh| !fresh.is_zero())
}

/// Reads a file. The wait ends even where the file system does not answer.
async fn read_file_within(path: &Path, timeout: Duration) -> Result<Parsed, KeyRingError> {
    let owned = path.to_owned();
    let reading = tokio::task::spawn_blocking(move || read_file(&owned, MAX_KEYS));
    let failed = |cause| KeyRingError::File { path: path.to_owned(), cause };
    match tokio::time::timeout(timeout, reading).await {
        Ok(Ok(result)) => result,
        Ok(Err(join)) => Err(failed(io::Error::other(join))),
        Err(_) => Err(failed(io::ErrorKind::TimedOut.into())),
    }
}

pub(super) fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    // Opening a named pipe would wait for its writer.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut document = Vec::new();
    fs::File::open(path)?.take(DOCUMENT_LIMIT_BYTES as u64 + 1).read_to_end(&mut document)?;
    if document.len() > DOCUMENT_LIMIT_BYTES {
        return Err(io::Error::other(format!("it is longer than {DOCUMENT_LIMIT_BYTES} bytes")));
    }
    Ok(document)
}

fn advice(status: u16) -> &'static str {
    match status {
        304 => {
            ", which says that the document has not changed, although it was not asked that; check the server, or \
             a cache before it"
        }
        300..=399 => "; redirects are not followed, so name the final url",
        401 | 403 => "; a token may be needed, or is not the right one",
        404 => "; is the url right?",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freshness_is_read_from_cache_control_and_age() {
        let read = |headers: &[(HeaderName, &'static str)]| {
            let headers: HeaderMap =
                headers.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value))).collect();
            max_age(&headers).map(|fresh| fresh.as_secs())
        };
        let control = header::CACHE_CONTROL;
        assert_eq!(read(&[]), None);
        assert_eq!(read(&[(control.clone(), "no-cache")]), None);
        assert_eq!(read(&[(control.clone(), "public, Max-Age=600")]), Some(600));
        assert_eq!(read(&[(control.clone(), "max-age=\"600\""), (header::AGE, "100")]), Some(500));
        assert_eq!(read(&[(control.clone(), "max-age=600"), (header::AGE, "700")]), None);
        for odd in ["max-age=0", "max-age=-1", "max-age=", "max-age", "s-maxage=5", "max-age=1e9"] {
            assert_eq!(read(&[(control.clone(), odd)]), None, "{odd}");
        }
    }
}
