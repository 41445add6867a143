//! Load balancers in front of the daemon: the address of the sender, and how long connections stay
//! open.

use std::io::{Read as _, Write as _};

use crate::harness::client::{Client, request};
use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::site::{PATH, Site, TOKEN, source};
use crate::harness::wait_until;

/// Returns a site whose daemon accepts PROXY headers from one loopback address, and events from one
/// client behind it.
fn site() -> Site {
    Site::new()
        .sources(&source("us", PATH, "allow = [\"192.0.2.7\"]"))
        .edit("[listen]\n", "[listen]\nproxy_protocol = [\"127.0.0.2\"]\n")
}

/// Opens a connection from an address, and sends a header before the TLS handshake.
fn connect(daemon: &Daemon<'_>, from: [u8; 4], header: &[u8]) -> Client {
    let mut socket = daemon.socket_from(from);
    socket.write_all(header).unwrap();
    Client::over(socket, Some(std::sync::Arc::clone(&daemon.site.client))).unwrap()
}

/// Returns a PROXY header of version 2 for a client with an IPv4 address.
fn version_2(client: [u8; 4]) -> Vec<u8> {
    let fixed = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c";
    [&fixed[..], &client, &[10, 0, 0, 1], &[1, 2, 3, 4]].concat()
}

#[test]
fn the_address_behind_a_proxy_is_the_senders_address() {
    let site = site();
    let daemon = Daemon::start(&site);
    let mut number = 0;
    let mut post = |client: &mut Client| {
        number += 1;
        client.try_post(PATH, None, site.producer.event(number).as_bytes()).map(|answer| answer.status)
    };
    let proxy = [127, 0, 0, 2];
    let version_1 = |client| format!("PROXY TCP4 {client} 10.0.0.1 56324 8443\r\n").into_bytes();
    for (header, status) in [
        (version_1("192.0.2.7"), 200),
        (version_1("192.0.2.8"), 403),
        (version_2([192, 0, 2, 7]), 200),
        (version_2([192, 0, 2, 8]), 403),
        // The proxy's own connection.
        (b"PROXY UNKNOWN\r\n".to_vec(), 403),
    ] {
        assert_eq!(post(&mut connect(&daemon, proxy, &header)).unwrap(), status);
    }
    // A missing header from the proxy, and a header from another address.
    assert!(post(&mut connect(&daemon, proxy, b"")).is_err());
    assert!(post(&mut connect(&daemon, [127, 0, 0, 3], &version_1("192.0.2.7"))).is_err());
    daemon.wait_for_log("code=\"proxy-header-invalid\"");
    daemon.settle();
    assert_eq!(site.verified().len(), 2);
}

#[test]
fn each_client_of_a_proxy_has_its_own_share_of_the_connections() {
    let site = Site::new().limits("connections_per_peer = 2");
    site.reconfigure("[listen]\n", "[listen]\nproxy_protocol = [\"127.0.0.2\"]\n");
    let daemon = Daemon::start(&site);
    let mut open: Vec<_> =
        (0..6).map(|client| connect(&daemon, [127, 0, 0, 2], &version_2([192, 0, 2, client / 2]))).collect();
    daemon.wait_for_count("auditgate_http_connections", 6);
    let _third = connect(&daemon, [127, 0, 0, 2], &version_2([192, 0, 2, 0]));
    daemon.wait_for_count("auditgate_http_connections_closed_total{reason=\"per_peer_limit\"}", 1);
    assert!(!open.remove(0).is_open() && open.iter_mut().all(Client::is_open));
}

#[test]
fn a_connection_may_be_idle_for_longer_than_the_request_timeout() {
    let site = Site::new().limits("request_timeout = \"500ms\"\nidle_timeout = \"1h\"");
    let daemon = Daemon::start(&site);
    let mut idle = daemon.connect();
    assert_eq!(Receipt::of(&idle.post(None, site.producer.event(0).as_bytes())).accepted, 1);
    // A connection without a whole request is closed.
    let mut silent = daemon.connect();
    silent.send(b"POST");
    daemon.wait_for_count("auditgate_http_connections_closed_total{reason=\"header_timeout\"}", 1);
    assert!(!silent.is_open());
    assert_eq!(Receipt::of(&idle.post(None, site.producer.event(1).as_bytes())).accepted, 1);
    drop(daemon);

    let site = Site::new().limits("idle_timeout = \"100ms\"");
    let daemon = Daemon::start(&site);
    let mut idle = daemon.connect();
    assert_eq!(Receipt::of(&idle.post(None, site.producer.event(2).as_bytes())).accepted, 1);
    wait_until("it is closed", || if idle.is_open() { Err("open".to_owned()) } else { Ok(()) });
}

#[test]
fn plain_http_on_the_https_port_gets_a_400_that_says_so() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let mut plain = daemon.socket_from([127, 0, 0, 1]);
    plain.write_all(&request("POST", PATH, &[("Authorization", TOKEN)], b"")).unwrap();
    let mut answer = String::new();
    plain.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{answer}");
    assert!(answer.contains("this port speaks HTTPS; begin the URL with https://"), "{answer}");
    daemon.wait_for_count("auditgate_http_requests_total{code=\"400\",source=\"\"}", 1);
    // A load balancer may check the daemon's health.
    let mut client = daemon.connect();
    client.send(&request("GET", "/healthz", &[], b""));
    let answer = client.answer();
    assert_eq!((answer.status, answer.body.as_slice()), (200, &b"ok"[..]));
}
