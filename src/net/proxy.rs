//! Connections through the HTTP proxy of `HTTPS_PROXY`, except for the hosts of `NO_PROXY`, by the
//! same rules as curl.

use std::error::Error;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use hyper::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tower_service::Service;

/// Connects to a server, directly or through a proxy (CONNECT, RFC 9110, section 9.3.6). A proxy is
/// never used for this machine, nor for anything but HTTPS.
#[derive(Clone, Debug)]
pub(super) struct Connector {
    tcp: HttpConnector,
    proxies: Arc<Matcher>,
}

/// The proxy cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("through the proxy {proxy}, of the options, HTTPS_PROXY or ALL_PROXY: {cause}")]
struct ProxyError {
    proxy: String,
    cause: Box<dyn Error + Send + Sync>,
}

impl Connector {
    pub(super) fn new(tcp: HttpConnector, proxies: Matcher) -> Self {
        Self { tcp, proxies: Arc::new(proxies) }
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = Box<dyn Error + Send + Sync>;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.tcp.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let is_away = uri.scheme_str() == Some("https") && !uri.host().is_some_and(is_this_machine);
        let Some(through) = self.proxies.intercept(&uri).filter(|_| is_away) else {
            let connecting = self.tcp.call(uri);
            return Box::pin(async move { connecting.await.map_err(Into::into) });
        };
        let proxy = through.uri().authority().map(ToString::to_string).unwrap_or_default();
        let failed = move |cause| ProxyError { proxy, cause }.into();
        if through.uri().scheme_str() != Some("http") {
            return Box::pin(async { Err(failed("only proxies with an http:// URL can be used".into())) });
        }
        let mut tunnel = Tunnel::new(through.uri().clone(), self.tcp.clone());
        if let Some(authorization) = through.basic_auth() {
            tunnel = tunnel.with_auth(authorization.clone());
        }
        let tunnelling = tunnel.call(uri);
        Box::pin(async move { tunnelling.await.map_err(|error| failed(error.into())) })
    }
}

fn is_this_machine(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}
