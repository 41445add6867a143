//! A listening socket that outlives the daemon: another process opens it, as systemd does
//! (sd_listen_fds(3)), and no sender notices a restart of the daemon.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crate::harness::client::Client;
use crate::harness::daemon::{Daemon, Receipt, serve};
use crate::harness::site::{PATH, Site};
use crate::harness::{SetOnDrop, assert_contains, body, gzip, wait_until};

/// Returns a site whose daemon is to listen on the test's socket.
fn site_at(socket: &TcpListener) -> Site {
    let address = socket.local_addr().unwrap();
    Site::new().edit("127.0.0.1:0", &address.to_string())
}

fn start<'s>(site: &'s Site, socket: &TcpListener) -> Daemon<'s> {
    let mut daemon = Daemon::spawn_on(site, socket.try_clone().unwrap(), "listen");
    daemon.listens().unwrap_or_else(|status| panic!("the daemon ended with {status}"));
    daemon
}

/// Starts a daemon that must refuse the socket, and returns its message.
fn refused(site: &Site, socket: impl Into<OwnedFd>, name: &str) -> String {
    let mut daemon = Daemon::spawn_on(site, socket, name);
    assert_eq!(daemon.wait_for_exit().code(), Some(78));
    wait_until("the reason is logged", || {
        let is_reason =
            |line: &String| line.starts_with("auditgate: ") || line.contains("code=\"daemon-failed\"");
        daemon.log().into_iter().find(is_reason).ok_or("not yet".to_owned())
    })
}

/// State shared by the senders of a test.
struct Load<'s> {
    site: &'s Site,
    address: SocketAddr,
    next: AtomicU64,
    acknowledged: AtomicUsize,
    reconnected: AtomicUsize,
    is_over: AtomicBool,
}

impl Load<'_> {
    /// Sends batches of two events until the test is over, without a retry: each must get a 200.
    /// Each batch has a connection of its own, or they share one until the daemon announces that it
    /// closes it.
    fn send(&self, is_kept: bool) {
        let mut connection: Option<Client> = None;
        while !self.is_over.load(Ordering::Relaxed) {
            let number = self.next.fetch_add(2, Ordering::Relaxed);
            let lines = self.site.producer.events(number..number + 2);
            let mut client = connection.take().unwrap_or_else(|| {
                Client::connect(self.address, Some(Arc::clone(&self.site.client))).expect("a connection")
            });
            let answer = client
                .try_post(PATH, Some("gzip"), &gzip(&body(&lines)))
                .unwrap_or_else(|error| panic!("batch {number}, kept: {is_kept}: {error}"));
            assert_eq!(Receipt::of(&answer), Receipt { accepted: 2, ..Receipt::default() }, "batch {number}");
            self.acknowledged.fetch_add(1, Ordering::Relaxed);
            if answer.header("connection") == Some("close") {
                assert_eq!(client.rest(), b"");
                self.reconnected.fetch_add(1, Ordering::Relaxed);
            } else if is_kept {
                connection = Some(client);
            }
        }
    }

    /// Waits until that many more batches have been acknowledged.
    fn wait_for_more(&self, batches: usize) {
        let before = self.acknowledged.load(Ordering::Relaxed);
        wait_until("batches are acknowledged", || {
            let now = self.acknowledged.load(Ordering::Relaxed);
            if now >= before + batches { Ok(()) } else { Err(format!("{now}")) }
        });
    }
}

const RESTARTS: usize = 4;

#[test]
fn a_restart_under_load_fails_no_request() {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let site = site_at(&socket);
    let load = Load {
        site: &site,
        address: socket.local_addr().unwrap(),
        next: AtomicU64::new(0),
        acknowledged: AtomicUsize::new(0),
        reconnected: AtomicUsize::new(0),
        is_over: AtomicBool::new(false),
    };
    let mut daemon = start(&site, &socket);
    let last = std::thread::scope(|scope| {
        let end = SetOnDrop(&load.is_over);
        for is_kept in [true, true, false, false] {
            let load = &load;
            scope.spawn(move || load.send(is_kept));
        }
        for _ in 0..RESTARTS {
            load.wait_for_more(20);
            daemon.signal("TERM");
            let log = daemon.log_at_end();
            assert!(!log.iter().any(|line| line.contains("code=\"requests-unfinished\"")), "{log:?}");
            daemon = start(&site, &socket);
        }
        load.wait_for_more(20);
        drop(end);
        daemon
    });
    last.terminate();
    assert!(
        load.reconnected.load(Ordering::Relaxed) >= 2 * RESTARTS,
        "the close of open connections is announced"
    );
    let mut found = site.verified();
    found.sort();
    let mut sent = site.producer.events(0..load.next.load(Ordering::Relaxed));
    sent.sort();
    assert!(found == sent, "{} events were sent, and {} are in the file", sent.len(), found.len());
}

#[test]
fn a_connection_opened_while_no_daemon_runs_is_served_by_the_next_one() {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let site = Site::new().plain().edit("127.0.0.1:0", &socket.local_addr().unwrap().to_string());
    let lines = site.producer.events(0..2);
    let body = body(&lines);
    let mut early = Client::connect(socket.local_addr().unwrap(), None).unwrap();
    early.send_post(&body);

    let daemon = Daemon::spawn_on(&site, socket.try_clone().unwrap(), "listen");
    assert_eq!(Receipt::of(&early.answer()).accepted, 2);
    daemon.wait_for_log("code=\"socket-inherited\"");
    daemon.terminate();

    let mut late = Client::connect(socket.local_addr().unwrap(), None).expect("the socket is still open");
    late.send_post(&body);
    let daemon = Daemon::spawn_on(&site, socket.try_clone().unwrap(), "auditgate.socket");
    assert_eq!(Receipt::of(&late.answer()).duplicates, 2);
    daemon.terminate();
    assert!(site.verified() == lines);
}

#[test]
fn a_request_on_an_idle_connection_during_shutdown_is_answered() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    // One with an answered request, one after its TLS handshake, one before it.
    let mut answered = daemon.connect();
    assert_eq!(Receipt::of(&answered.post(None, &body(&site.producer.events(0..1)))).accepted, 1);
    let mut greeted = daemon.connect();
    greeted.send(b"");
    let silent = daemon.connect();
    daemon.wait_for_count("auditgate_http_connections", 3);
    let mut clients = [answered, greeted, silent];
    let events = site.producer.events(1..4);
    daemon.signal("TERM");
    daemon.wait_for_log("code=\"stopping\"");
    // The daemon waits only a short time for these.
    for (client, event) in clients.iter_mut().zip(&events) {
        client.send_post(event.as_bytes());
    }
    for client in &mut clients {
        let answer = client.answer();
        assert_eq!(Receipt::of(&answer).accepted, 1);
        assert_eq!(answer.header("connection"), Some("close"));
        assert_eq!(client.rest(), b"");
    }
    assert_eq!(daemon.ended().code(), Some(0));
    let (mut found, mut sent) = (site.verified(), site.producer.events(0..4));
    found.sort();
    sent.sort();
    assert_eq!(found, sent);
}

/// Returns how many connections wait in the queue of a listening socket (proc(5), `/proc/net/tcp`).
fn queued(socket: SocketAddr) -> Option<u32> {
    let port = format!(":{:04X}", socket.port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).find_map(|fields| {
        let [_, local, _, state, queues, ..] = fields[..] else { return None };
        // LISTEN.
        (local.ends_with(&port) && state == "0A").then(|| {
            let (_, waiting) = queues.split_once(':').unwrap();
            u32::from_str_radix(waiting, 16).unwrap()
        })
    })
}

#[test]
fn a_connection_that_waits_at_the_limit_is_answered_during_shutdown() {
    let site = Site::new().limits("connections = 1");
    let daemon = Daemon::start(&site);
    let [first, second] = [0, 1].map(|number| body(&site.producer.events(number..number + 1)));
    // The one allowed connection is busy.
    let mut busy = daemon.connect();
    busy.begin_post(first.len());
    let mut waiting = daemon.connect();
    wait_until("it is accepted from the queue", || match queued(daemon.address) {
        Some(0) => Ok(()),
        other => Err(format!("{other:?}")),
    });
    daemon.signal("TERM");
    daemon.wait_for_log("code=\"stopping\"");
    busy.send(&first);
    assert_eq!(Receipt::of(&busy.answer()).accepted, 1);
    let answer = waiting.post(None, &second);
    assert_eq!(Receipt::of(&answer).accepted, 1);
    assert_eq!(answer.header("connection"), Some("close"));
    assert_eq!(daemon.ended().code(), Some(0));
    assert_eq!(site.verified(), site.producer.events(0..2));
}

#[test]
fn a_socket_that_does_not_fit_the_configuration_is_refused() {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let site = site_at(&socket);
    let (wanted, is) = (socket.local_addr().unwrap().to_string(), other.local_addr().unwrap().to_string());
    let said = refused(&site, other, "listen");
    assert_contains(&said, &[&wanted, &is, "listen.address", "ListenStream="]);

    let said = refused(&site, socket.try_clone().unwrap(), "metrics");
    assert_contains(&said, &["`metrics`", "FileDescriptorName="]);

    let said = refused(&site, socket.try_clone().unwrap(), "listen:listen");
    assert_contains(&said, &["two sockets were passed for [listen]"]);

    let unix = UnixListener::bind(site.path("listen.sock")).unwrap();
    let said = refused(&site, unix.try_clone().unwrap(), "listen");
    assert_contains(&said, &["`listen` cannot be used"]);
    let said = refused(&Site::new(), unix, "admin");
    assert_contains(&said, &["admin.address", "listen.sock"]);

    let datagrams = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let said = refused(&site, datagrams, "listen");
    assert_contains(&said, &["`listen` cannot be used"]);
    let connection = std::net::TcpStream::connect(socket.local_addr().unwrap()).unwrap();
    let said = refused(&site, connection, "listen");
    assert_contains(&said, &["it does not listen"]);
}

#[test]
fn sockets_for_another_process_are_not_used() {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let site = Site::new();
    let mut command = serve(&site);
    command.env("LISTEN_FDS", "1").env("LISTEN_PID", "1");
    let daemon = Daemon::start_by(&site, command);
    assert_ne!(daemon.address, socket.local_addr().unwrap());
    assert_eq!(daemon.deliver(&site.producer.events(0..1)).accepted, 1);
    daemon.terminate();
}
