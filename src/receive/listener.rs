//! Connections: accept, handshake, serve, linger, drain.
//!
//! Each connection has one task and one permit; a drain is done when all permits are back. Transient errors of
//! accept are survived.

use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::request::Service;
use super::tls::Certificates;

/// What the listener is made of.
pub struct Listener {
    /// `https` or `http`, for the log.
    pub scheme: &'static str,
    /// None for plain HTTP, which the configuration allows on loopback only.
    pub tls: Option<Arc<Certificates>>,
    /// Connections at a time; more wait in the kernel's queue.
    pub connections: usize,
    /// For the TLS handshake, and for each request's header; an idle connection is closed after it.
    pub header_deadline: Duration,
    /// Requests go here.
    pub service: Arc<Service>,
    /// Called for each connection; what it returns is kept as long as the connection.
    pub connected: Box<dyn Fn() -> Box<dyn Send> + Send + Sync>,
}

/// A header block that does not fit is answered 431 by hyper.
const HEADER_BYTES: usize = 16 * 1024;
const HEADERS: usize = 64;

/// How long, and for how many bytes, a peer that got an early answer may go on sending before it is cut off.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 16 << 20;

impl Listener {
    /// Serves until `shutdown` says so, then lets every request that has begun come to its end, for at most
    /// `drain`. Returns whether all did.
    pub async fn serve(
        self,
        socket: TcpListener,
        mut shutdown: watch::Receiver<bool>,
        drain: Duration,
    ) -> bool {
        let all = u32::try_from(self.connections).unwrap_or(u32::MAX);
        let permits = Arc::new(Semaphore::new(all as usize));
        if let Ok(address) = socket.local_addr() {
            tracing::info!("listening on {}://{address}", self.scheme);
        }
        let (this, stop) = (Arc::new(self), shutdown.clone());
        loop {
            let next = async {
                // The semaphore is never closed.
                let permit = Arc::clone(&permits).acquire_owned().await.ok()?;
                Some((permit, accept(&socket).await))
            };
            tokio::select! {
                next = next => {
                    let Some((permit, (stream, peer))) = next else { break };
                    let (this, shutdown) = (Arc::clone(&this), stop.clone());
                    tokio::spawn(async move { this.connection(stream, peer, permit, shutdown).await });
                }
                _ = shutdown.wait_for(|stop| *stop) => break,
            }
        }
        // Whoever connects from now on is refused at once, and comes back later.
        drop(socket);
        let in_work = &this.service.in_work;
        let idle = async {
            let _ = permits.acquire_many(all).await;
            let _ = in_work.acquire_many(u32::try_from(super::request::IN_WORK).unwrap_or(u32::MAX)).await;
        };
        timeout(drain, idle).await.is_ok()
    }

    async fn connection(
        &self,
        stream: TcpStream,
        peer: IpAddr,
        _permit: OwnedSemaphorePermit,
        shutdown: watch::Receiver<bool>,
    ) {
        let _connected = (self.connected)();
        let _ = stream.set_nodelay(true);
        match &self.tls {
            None => {
                if let Some(stream) = self.requests(stream, peer, shutdown).await {
                    linger(stream).await;
                }
            }
            Some(tls) => {
                let handshake = TlsAcceptor::from(tls.config()).accept(stream);
                let mut stop = shutdown.clone();
                let ended = tokio::select! {
                    ended = timeout(self.header_deadline, handshake) => ended,
                    // Nothing has been asked yet, so nobody is owed an answer.
                    _ = stop.wait_for(|stop| *stop) => return,
                };
                match ended {
                    Ok(Ok(stream)) => {
                        if let Some(mut stream) = self.requests(stream, peer, shutdown).await {
                            // Says goodbye in TLS; what still comes is thrown away undecrypted.
                            let _ = timeout(LINGER, stream.shutdown()).await;
                            linger(stream.into_inner().0).await;
                        }
                    }
                    Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
                    Err(_) => tracing::debug!("a TLS handshake was too slow"),
                }
            }
        }
    }

    /// Serves a connection's requests. Gives the stream back when the last one was answered.
    async fn requests<S>(&self, stream: S, peer: IpAddr, mut shutdown: watch::Receiver<bool>) -> Option<S>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let service = service_fn(|request| {
            let service = Arc::clone(&self.service);
            Box::pin(async move { service.answer(request, peer).await })
        });
        let mut connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.header_deadline)
            .max_headers(HEADERS)
            .max_buf_size(HEADER_BYTES)
            .serve_connection(TokioIo::new(stream), service);
        let mut draining = false;
        let ended = loop {
            tokio::select! {
                ended = poll_fn(|context| connection.poll_without_shutdown(context)) => break ended,
                _ = shutdown.wait_for(|stop| *stop), if !draining => {
                    draining = true;
                    Pin::new(&mut connection).graceful_shutdown();
                }
            }
        };
        match ended {
            Ok(()) => Some(connection.into_parts().io.into_inner()),
            Err(error) => {
                tracing::debug!(%error, "a connection ended early");
                // hyper has answered 431 or 400, and the peer may still be sending what nobody reads.
                error.is_parse().then(|| connection.into_parts().io.into_inner())
            }
        }
    }
}

/// The next connection. Errors that concern one peer are passed over; when descriptors or memory are short, it
/// waits until some come back.
async fn accept(socket: &TcpListener) -> (TcpStream, IpAddr) {
    let mut wait = Duration::from_millis(10);
    loop {
        match socket.accept().await {
            Ok((stream, peer)) => return (stream, peer.ip().to_canonical()),
            Err(error) => match error.kind() {
                io::ErrorKind::ConnectionAborted
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::ConnectionRefused
                | io::ErrorKind::Interrupted => {}
                _ => {
                    tracing::error!(%error, "cannot accept connections; trying again");
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(Duration::from_secs(1));
                }
            },
        }
    }
}

/// Closes our side and reads on for a moment: closing with unread bytes would send a reset, which can destroy
/// the answer before the peer has read it.
async fn linger(mut stream: TcpStream) {
    if stream.shutdown().await.is_err() {
        return;
    }
    let drained = async {
        let mut left = LINGER_BYTES;
        let mut scratch = vec![0; 16 * 1024];
        while let Ok(read) = stream.read(&mut scratch).await {
            if read == 0 || read > left {
                break;
            }
            left -= read;
        }
    };
    let _ = timeout(LINGER, drained).await;
}
