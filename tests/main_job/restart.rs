//! A socket that outlives the daemon: it is opened by somebody else, as systemd does (sd_listen_fds(3)), and
//! nobody who sends meanwhile notices that the daemon is replaced.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crate::harness::client::{Client, request};
use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::programs::auditgate;
use crate::harness::site::{PATH, Site, TOKEN};
use crate::harness::{PATIENCE, SetOnDrop, body, gzip, wait_until};

/// A site that is to listen on a socket of ours.
fn site_at(socket: &TcpListener) -> Site {
    let address = socket.local_addr().unwrap();
    Site::new().edit("127.0.0.1:0", &address.to_string())
}

fn start<'s>(site: &'s Site, socket: &TcpListener) -> Daemon<'s> {
    let mut daemon = Daemon::spawn_on(site, socket.try_clone().unwrap(), "listen");
    daemon.listens().unwrap_or_else(|status| panic!("the daemon ended with {status}"));
    daemon
}

/// Starts a daemon that must refuse the socket; what it said.
fn refused(site: &Site, socket: impl Into<OwnedFd>, name: &str) -> String {
    let mut daemon = Daemon::spawn_on(site, socket, name);
    let status =
        wait_until(PATIENCE, "the daemon refuses it", || daemon.exit_status().ok_or("it runs".to_owned()));
    assert_eq!(status.code(), Some(78));
    wait_until(PATIENCE, "it says why", || {
        daemon.log().into_iter().find(|line| line.starts_with("auditgate: ")).ok_or("nothing yet".to_owned())
    })
}

/// What the senders of a test share.
struct Load<'s> {
    site: &'s Site,
    address: SocketAddr,
    next: AtomicU64,
    acknowledged: AtomicUsize,
    reconnected: AtomicUsize,
    is_over: AtomicBool,
}

impl Load<'_> {
    /// Sends batches of two events until it is over, without a single retry: each must get its 200. On a connection
    /// for each batch, or on one that is kept until the daemon says that it closes it.
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

    /// Waits until so many more batches have been acknowledged.
    fn goes_on(&self, batches: usize) {
        let before = self.acknowledged.load(Ordering::Relaxed);
        wait_until(PATIENCE, "batches are acknowledged", || {
            let now = self.acknowledged.load(Ordering::Relaxed);
            if now >= before + batches { Ok(()) } else { Err(format!("{now}")) }
        });
    }
}

const RESTARTS: usize = 4;

#[test]
fn a_restart_under_load_costs_no_sender_anything() {
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
            load.goes_on(20);
            daemon.signal("TERM");
            let log = daemon.log_at_end();
            assert!(!log.iter().any(|line| line.contains("did not end in time")), "{log:?}");
            daemon = start(&site, &socket);
        }
        load.goes_on(20);
        drop(end);
        daemon
    });
    last.terminate();
    assert!(
        load.reconnected.load(Ordering::Relaxed) >= 2 * RESTARTS,
        "kept connections are said to be closed"
    );
    let mut found = site.verified();
    found.sort();
    let mut sent = site.producer.events(0..load.next.load(Ordering::Relaxed));
    sent.sort();
    assert!(found == sent, "{} events were sent, and {} are in the file", sent.len(), found.len());
}

#[test]
fn who_connects_while_no_daemon_runs_is_served_by_the_next() {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let site = Site::new().plain().edit("127.0.0.1:0", &socket.local_addr().unwrap().to_string());
    let lines = site.producer.events(0..2);
    let body = body(&lines);
    let length = body.len().to_string();
    let mut early = Client::connect(socket.local_addr().unwrap(), None).unwrap();
    early.send(&request("POST", PATH, &[("Authorization", TOKEN), ("Content-Length", &length)], &body));

    let daemon = Daemon::spawn_on(&site, socket.try_clone().unwrap(), "listen");
    assert_eq!(Receipt::of(&early.answer()).accepted, 2);
    daemon.says("was inherited");
    daemon.terminate();

    let mut late = Client::connect(socket.local_addr().unwrap(), None).expect("the socket is still open");
    late.send(&request("POST", PATH, &[("Authorization", TOKEN), ("Content-Length", &length)], &body));
    let daemon = Daemon::spawn_on(&site, socket.try_clone().unwrap(), "auditgate.socket");
    assert_eq!(Receipt::of(&late.answer()).duplicates, 2);
    daemon.terminate();
    assert!(site.verified() == lines);
}

#[test]
fn a_connection_on_which_nothing_is_asked_yet_gets_a_last_answer() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    // One that was answered before, one that has only shaken hands, one that has not even done that.
    let mut answered = daemon.connect();
    assert_eq!(Receipt::of(&answered.post(None, &body(&site.producer.events(0..1)))).accepted, 1);
    let mut greeted = daemon.connect();
    greeted.send(b"");
    let silent = daemon.connect();
    wait_until(PATIENCE, "all of them are accepted", || {
        let count = daemon.metrics()["auditgate_http_connections"].clone();
        if count == "3" { Ok(()) } else { Err(count) }
    });
    let mut clients = [answered, greeted, silent];
    let requests: Vec<_> = (1..4)
        .map(|number| {
            let event = site.producer.event(number);
            let length = event.len().to_string();
            request("POST", PATH, &[("Authorization", TOKEN), ("Content-Length", &length)], event.as_bytes())
        })
        .collect();
    daemon.signal("TERM");
    daemon.says("stopping: ");
    // They have not much time left for it.
    for (client, request) in clients.iter_mut().zip(&requests) {
        client.send(request);
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

/// How many connections wait in the queue of a socket that listens (proc(5), `/proc/net/tcp`).
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
fn a_connection_that_waits_for_a_place_gets_a_last_answer() {
    let site = Site::new().limits("connections = 1");
    let daemon = Daemon::start(&site);
    let [first, second] = [0, 1].map(|number| body(&site.producer.events(number..number + 1)));
    // Who is at work has the only place.
    let mut busy = daemon.connect();
    let length = first.len().to_string();
    busy.send(&request(
        "POST",
        PATH,
        &[("Authorization", TOKEN), ("Content-Length", &length), ("Expect", "100-continue")],
        b"",
    ));
    assert_eq!(busy.answer().status, 100);
    let mut waiting = daemon.connect();
    wait_until(PATIENCE, "it is taken from the queue", || match queued(daemon.address) {
        Some(0) => Ok(()),
        other => Err(format!("{other:?}")),
    });
    daemon.signal("TERM");
    daemon.says("stopping: ");
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
    for word in [&*wanted, &is, "listen.address", "ListenStream="] {
        assert!(said.contains(word), "`{word}` is not in: {said}");
    }

    let said = refused(&site, socket.try_clone().unwrap(), "metrics");
    assert!(said.contains("`metrics`") && said.contains("FileDescriptorName="), "{said}");

    let said = refused(&site, socket.try_clone().unwrap(), "listen:listen");
    assert!(said.contains("two sockets were passed for [listen]"), "{said}");

    let unix = UnixListener::bind(site.path("listen.sock")).unwrap();
    let said = refused(&site, unix.try_clone().unwrap(), "listen");
    assert!(said.contains("`listen` cannot be used"), "{said}");
    let said = refused(&Site::new(), unix, "admin");
    assert!(said.contains("admin.address") && said.contains("listen.sock"), "{said}");

    let datagrams = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let said = refused(&site, datagrams, "listen");
    assert!(said.contains("`listen` cannot be used"), "{said}");
    let connection = std::net::TcpStream::connect(socket.local_addr().unwrap()).unwrap();
    let said = refused(&site, connection, "listen");
    assert!(said.contains("it does not listen"), "{said}");
}

#[test]
fn sockets_for_another_process_are_left_alone() {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let site = Site::new();
    let mut command = auditgate();
    command.arg("serve").arg("--config").arg(site.path("config.toml"));
    command.env("LISTEN_FDS", "1").env("LISTEN_PID", "1");
    let daemon = Daemon::start_by(&site, command);
    assert_ne!(daemon.address, socket.local_addr().unwrap());
    assert_eq!(daemon.deliver(&site.producer.events(0..1)).accepted, 1);
    daemon.terminate();
}
