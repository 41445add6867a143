//! Tests of the syslog sink against servers of this file, on loopback.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use rustls::{ServerConfig, ServerConnection, StreamOwned, SupportedProtocolVersion};

use super::machine::ReservedPort;
use super::*;
use crate::net::authority::{Authority, server_config};
use crate::wire::event::{Reason, Verdict};

fn options(address: &str) -> SyslogOptions {
    SyslogOptions {
        address: SyslogAddress::parse(address).unwrap(),
        ca: None,
        cert: None,
        key: None,
        framing: Some(Framing::OctetCounting),
        facility: Facility::LOCAL0,
        app_name: "auditgate".to_owned(),
        structured_data: false,
        max_size: Some(1 << 20),
    }
}

impl SyslogOptions {
    pub(super) fn with_identity(self, identity: Option<Identity>) -> Self {
        let (cert, key) = identity.map(|identity| (identity.cert, identity.key)).unzip();
        Self { cert, key, ..self }
    }
}

fn sink(address: &str) -> SyslogSink {
    SyslogSink::new(options(address)).unwrap()
}

fn push(sink: &mut SyslogSink, lines: &[&str]) {
    for line in lines {
        sink.push(&Item {
            behind: Position::default(),
            received_at: 0,
            source: "us",
            verdict: &Verdict::Verified { key: 0 },
            key_id: Some("key-1"),
            raw: line.as_bytes(),
        });
    }
}

/// Flushes until everything counts as delivered.
fn flush(sink: &mut SyslogSink) -> Result<Option<Resume>, SinkError> {
    sink.flush(Position::default(), true)
}

/// Splits frames: the number of octets, a space and the octets.
fn octet_counted(mut bytes: &[u8]) -> Vec<String> {
    let mut messages = Vec::new();
    while let Some(space) = bytes.iter().position(|byte| *byte == b' ') {
        let length: usize = std::str::from_utf8(&bytes[..space]).unwrap().parse().unwrap();
        let Some(message) = bytes[space + 1..].get(..length) else { break };
        messages.push(String::from_utf8(message.to_vec()).unwrap());
        bytes = &bytes[space + 1 + length..];
    }
    messages
}

/// Returns the text of messages without structured data.
fn bodies(messages: &[String]) -> Vec<&str> {
    messages
        .iter()
        .map(|message| {
            assert!(message.starts_with("<134>1 1970-01-01T00:00:00.000Z "), "{message}");
            message.splitn(8, ' ').nth(7).unwrap()
        })
        .collect()
}

/// Accepts one connection and reads it to its end.
fn read_one(listener: &TcpListener) -> JoinHandle<Vec<u8>> {
    let listener = listener.try_clone().unwrap();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp://{}", listener.local_addr().unwrap());
    (listener, address)
}

const LINES: [&str; 3] = [r#"{"a":1}"#, r#"{"name":"Zürich 日本 🦀"}"#, r#"{"b":"12 <1>1"}"#];

#[test]
fn octet_counting_frames_a_stream() {
    let (listener, address) = listen();
    let server = read_one(&listener);
    let mut sink = sink(&address);
    let last = Resume { position: Position { batch: 7, line: 3 }, mark: Vec::new() };
    assert_eq!(sink.resume(&last).unwrap(), last);
    push(&mut sink, &LINES);
    assert!(sink.collected() > 0);
    assert_eq!(flush(&mut sink).unwrap(), Some(Resume { position: Position::default(), mark: Vec::new() }));
    assert_eq!((sink.collected(), sink.take_truncated()), (0, 0));
    flush(&mut sink).unwrap();
    drop(sink);
    let messages = octet_counted(&server.join().unwrap());
    assert_eq!(bodies(&messages), LINES);
    let process = format!(" auditgate {} verified - ", std::process::id());
    assert!(messages[0].contains(&process), "{}", messages[0]);
}

#[test]
fn newlines_can_frame_a_stream() {
    let (listener, address) = listen();
    let server = read_one(&listener);
    let mut sink = SyslogSink::new(SyslogOptions {
        framing: Some(Framing::Newline),
        structured_data: true,
        ..options(&address)
    })
    .unwrap();
    let hostile = r#"{"trace_id":"a\nb]"}"#;
    push(&mut sink, &[hostile, "{}"]);
    sink.push(&Item {
        behind: Position::default(),
        received_at: 0,
        source: "us",
        verdict: &Verdict::Rejected { reason: Reason::UndecodableBody, detail: "no gzip".into() },
        key_id: None,
        raw: b"one\ntwo\n",
    });
    flush(&mut sink).unwrap();
    drop(sink);
    let text = String::from_utf8(server.join().unwrap()).unwrap();
    let lines: Vec<&str> = text.strip_suffix('\n').unwrap().split('\n').collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert!(lines[0].ends_with(&format!(r#" trace_id="a\\u{{a}}b\]"] {hostile}"#)), "{text}");
    assert!(lines[1].ends_with(r#" verified [auditgate@32473 source="us" key_id="key-1"] {}"#), "{text}");
    assert!(lines[2].starts_with("<132>1 ") && lines[2].ends_with(r#""raw":"one\ntwo\n"}"#), "{text}");
}

#[test]
fn a_connection_that_was_closed_since_is_noticed_before_a_write() {
    let (listener, address) = listen();
    let mut sink = sink(&address);
    for line in LINES {
        let server = {
            let listener = listener.try_clone().unwrap();
            thread::spawn(move || {
                let mut connection = listener.accept().unwrap().0;
                let mut bytes = vec![0; 4096];
                let length = connection.read(&mut bytes).unwrap();
                // The connection stays open until the sink has flushed, or the message would not
                // count as delivered.
                bytes.truncate(length);
                (connection, bytes)
            })
        };
        push(&mut sink, &[line]);
        flush(&mut sink).unwrap();
        let (connection, bytes) = server.join().unwrap();
        assert_eq!(bodies(&octet_counted(&bytes)), [line]);
        drop(connection);
    }
}

#[test]
fn an_interrupted_chunk_is_sent_again_completely() {
    let (listener, address) = listen();
    let mut sink = sink(&address);
    // More than the buffers of both sides can hold.
    let lines: Vec<String> = (0..80).map(|at| format!("{at}{}", "x".repeat(900_000))).collect();
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    let restarting = {
        let listener = listener.try_clone().unwrap();
        thread::spawn(move || {
            let mut some = vec![0; 2_000_000];
            listener.accept().unwrap().0.read_exact(&mut some).unwrap();
            some
        })
    };
    push(&mut sink, &lines);
    let error = flush(&mut sink).unwrap_err();
    assert!(error.to_string().starts_with(&format!("cannot deliver to {address}: ")), "{error}");
    assert_eq!(bodies(&octet_counted(&restarting.join().unwrap())), lines[..2]);

    let server = read_one(&listener);
    flush(&mut sink).unwrap();
    push(&mut sink, &LINES);
    flush(&mut sink).unwrap();
    drop(sink);
    let messages = octet_counted(&server.join().unwrap());
    assert!(bodies(&messages) == [lines.as_slice(), LINES.as_slice()].concat());
}

#[test]
fn collected_messages_wait_while_the_server_is_down() {
    let port = ReservedPort::new();
    let address = format!("tcp://127.0.0.1:{}", port.number());
    let mut sink = sink(&address);
    push(&mut sink, &LINES[..1]);
    for _ in 0..3 {
        assert_eq!(flush(&mut sink).unwrap_err().cause.kind(), std::io::ErrorKind::ConnectionRefused);
    }
    push(&mut sink, &LINES[1..]);
    let listener = TcpListener::bind(("127.0.0.1", port.number())).unwrap();
    let server = read_one(&listener);
    flush(&mut sink).unwrap();
    drop(sink);
    assert_eq!(bodies(&octet_counted(&server.join().unwrap())), LINES);
}

#[test]
fn resuming_discards_collected_messages() {
    let (listener, address) = listen();
    let server = read_one(&listener);
    let mut sink = sink(&address);
    push(&mut sink, &LINES);
    sink.resume(&Resume { position: Position::default(), mark: Vec::new() }).unwrap();
    assert_eq!(sink.collected(), 0);
    push(&mut sink, &LINES[2..]);
    flush(&mut sink).unwrap();
    drop(sink);
    assert_eq!(bodies(&octet_counted(&server.join().unwrap())), LINES[2..]);
}

#[test]
fn a_datagram_is_one_message_truncated_to_fit() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = format!("udp://{}", server.local_addr().unwrap());
    let mut sink = SyslogSink::new(SyslogOptions { max_size: Some(480), ..options(&address) }).unwrap();
    let long = "日".repeat(300);
    push(&mut sink, &[LINES[1], &long, LINES[0], &long]);
    flush(&mut sink).unwrap();
    assert_eq!((sink.take_truncated(), sink.take_truncated()), (2, 0));
    let mut messages = Vec::new();
    for _ in 0..4 {
        let mut bytes = vec![0; 65_536];
        let length = server.recv(&mut bytes).unwrap();
        messages.push(String::from_utf8(bytes[..length].to_vec()).unwrap());
    }
    let found = bodies(&messages);
    assert_eq!((found[0], found[2]), (LINES[1], LINES[0]));
    for at in [1, 3] {
        assert!((478..=480).contains(&messages[at].len()) && long.starts_with(found[at]), "{messages:?}");
    }
    drop(server);
    // Repeats until the system has received the refusal.
    let deadline = Instant::now() + Duration::from_secs(60);
    push(&mut sink, &LINES);
    while flush(&mut sink).is_ok() {
        assert!(Instant::now() < deadline, "the refusal is not noticed");
        push(&mut sink, &LINES);
    }
}

#[test]
fn a_unix_socket_can_be_for_datagrams_or_a_stream() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let address = format!("unix://{}", path.display());
    let mut sink =
        SyslogSink::new(SyslogOptions { framing: Some(Framing::Newline), ..options(&address) }).unwrap();
    push(&mut sink, &LINES);
    assert!(flush(&mut sink).is_err());

    let datagrams = UnixDatagram::bind(&path).unwrap();
    flush(&mut sink).unwrap();
    for line in LINES {
        let mut bytes = [0; 4096];
        let length = datagrams.recv(&mut bytes).unwrap();
        assert_eq!(bodies(&[String::from_utf8(bytes[..length].to_vec()).unwrap()]), [line]);
    }

    drop(datagrams);
    std::fs::remove_file(&path).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        let mut text = String::new();
        listener.accept().unwrap().0.read_to_string(&mut text).unwrap();
        text
    });
    push(&mut sink, &LINES);
    assert!(flush(&mut sink).is_err(), "the old daemon is gone");
    flush(&mut sink).unwrap();
    drop(sink);
    let messages: Vec<String> = server.join().unwrap().lines().map(str::to_owned).collect();
    assert_eq!(bodies(&messages), LINES);
}

/// A TLS server for one connection. The thread returns the bytes, and whether the connection ended
/// with close_notify (RFC 5425).
struct TlsServer {
    address: String,
    thread: JoinHandle<(Vec<u8>, bool)>,
}

impl TlsServer {
    fn start(
        identity: &Identity,
        client_ca: Option<&Path>,
        versions: &[&'static SupportedProtocolVersion],
    ) -> Self {
        Self::start_with(server_config(identity, client_ca, versions))
    }

    fn start_with(config: ServerConfig) -> Self {
        let config = Arc::new(config);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tls://localhost:{}", listener.local_addr().unwrap().port());
        let thread = thread::spawn(move || {
            let socket = listener.accept().unwrap().0;
            let mut stream = StreamOwned::new(ServerConnection::new(config).unwrap(), socket);
            let mut bytes = Vec::new();
            let is_ended = stream.read_to_end(&mut bytes).is_ok();
            let _ = stream.flush();
            (bytes, is_ended)
        });
        Self { address, thread }
    }
}

const BOTH: [&SupportedProtocolVersion; 2] = [&rustls::version::TLS13, &rustls::version::TLS12];

#[test]
fn tls_delivers_to_the_server_with_the_right_certificate() {
    let authority = Authority::new();
    for versions in [&BOTH[..], &BOTH[..1], &BOTH[1..]] {
        let server = TlsServer::start(&authority.identity("localhost"), None, versions);
        let mut sink =
            SyslogSink::new(SyslogOptions { ca: Some(authority.ca()), ..options(&server.address) }).unwrap();
        push(&mut sink, &LINES);
        flush(&mut sink).unwrap();
        push(&mut sink, &LINES);
        flush(&mut sink).unwrap();
        drop(sink);
        let (bytes, is_ended) = server.thread.join().unwrap();
        assert_eq!(bodies(&octet_counted(&bytes)), [LINES, LINES].concat());
        assert!(is_ended, "without close_notify");
    }
}

#[test]
fn a_server_with_a_wrong_certificate_gets_nothing() {
    let (authority, other) = (Authority::new(), Authority::new());
    for (identity, because) in [
        (
            other.identity("localhost"),
            "the server's certificate is not trusted: no trusted authority signed it",
        ),
        (authority.identity("elsewhere.test"), "not valid for"),
    ] {
        let server = TlsServer::start(&identity, None, &BOTH);
        let mut sink =
            SyslogSink::new(SyslogOptions { ca: Some(authority.ca()), ..options(&server.address) }).unwrap();
        push(&mut sink, &LINES);
        let error = flush(&mut sink).unwrap_err().to_string();
        assert!(error.contains(because), "{error}");
        assert_eq!(server.thread.join().unwrap().0, b"");
        assert!(sink.collected() > 0);
    }
}

#[test]
fn a_server_can_require_a_client_certificate() {
    let (authority, other) = (Authority::new(), Authority::new());
    let identity = authority.identity("localhost");
    for versions in [&BOTH[..1], &BOTH[1..]] {
        for (client, is_accepted) in [
            (Some(authority.identity("client.test")), true),
            (Some(other.identity("client.test")), false),
            (None, false),
        ] {
            let server = TlsServer::start(&identity, Some(&authority.ca()), versions);
            let options =
                SyslogOptions { ca: Some(authority.ca()), ..options(&server.address) }.with_identity(client);
            let mut sink = SyslogSink::new(options).unwrap();
            push(&mut sink, &LINES);
            let result = flush(&mut sink);
            assert_eq!(result.is_ok(), is_accepted, "{result:?}");
            drop(sink);
            let (bytes, _) = server.thread.join().unwrap();
            let expected = if is_accepted { &LINES[..] } else { &[] };
            assert_eq!(bodies(&octet_counted(&bytes)), expected);
        }
    }
}

/// A TLS 1.3 server that reads its first connection but, after the ClientHello, processes nothing
/// until the client counts everything as delivered, or for a while.
fn start_late_verifier(config: ServerConfig) -> (String, mpsc::Sender<()>, JoinHandle<Vec<u8>>) {
    /// More bytes than a client's part of the handshake, and fewer than the test's messages.
    const HANDSHAKE: usize = 50_000;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tls://localhost:{}", listener.local_addr().unwrap().port());
    let (delivered, is_delivered) = mpsc::channel();
    let server = thread::spawn(move || {
        let mut socket = listener.accept().unwrap().0;
        let mut connection = ServerConnection::new(Arc::new(config)).unwrap();
        while !connection.wants_write() {
            connection.read_tls(&mut socket).unwrap();
            connection.process_new_packets().unwrap();
        }
        while connection.wants_write() {
            connection.write_tls(&mut socket).unwrap();
        }
        let mut unread = vec![0; HANDSHAKE];
        socket.read_exact(&mut unread).unwrap();
        let _ = is_delivered.recv_timeout(Duration::from_millis(500));
        let mut unread = unread.as_slice();
        let mut result = Ok(());
        let mut bytes = Vec::new();
        while result.is_ok() && !unread.is_empty() {
            connection.read_tls(&mut unread).unwrap();
            result = connection.process_new_packets().map(drop);
            let _ = connection.write_tls(&mut socket);
            let _ = connection.reader().read_to_end(&mut bytes);
        }
        if result.is_ok() {
            StreamOwned::new(connection, socket).read_to_end(&mut bytes).unwrap();
        }
        bytes
    });
    (address, delivered, server)
}

#[test]
fn nothing_counts_as_delivered_before_the_clients_certificate_is_verified() {
    let (authority, other) = (Authority::new(), Authority::new());
    let identity = authority.identity("localhost");
    let long = "x".repeat(100_000);
    for (client, refusal) in [
        (Some(authority.identity("client.test")), None),
        (Some(other.identity("client.test")), Some("another one (`cert` and `key`)")),
        (None, Some("does it want a client certificate")),
    ] {
        let mut config = server_config(&identity, Some(&authority.ca()), &BOTH[..1]);
        config.send_tls13_tickets = 1;
        let (address, delivered, server) = start_late_verifier(config);
        let options = SyslogOptions { ca: Some(authority.ca()), ..options(&address) }.with_identity(client);
        let mut sink = SyslogSink::new(options).unwrap();
        push(&mut sink, &[&long]);
        let result = flush(&mut sink);
        let _ = delivered.send(());
        let error = result.err().map(|error| error.to_string());
        assert_eq!(error.is_some(), refusal.is_some(), "{error:?}");
        assert_eq!(sink.collected() > 0, refusal.is_some());
        if let (Some(error), Some(refusal)) = (error, refusal) {
            assert!(error.contains("fatal alert") && error.contains(refusal), "{error}");
        }
        drop(sink);
        let bytes = server.join().unwrap();
        let expected: &[&str] = if refusal.is_some() { &[] } else { &[&long] };
        assert!(bodies(&octet_counted(&bytes)) == expected);
    }
}

#[test]
fn wrong_certificate_files_are_reported_at_the_start() {
    let (authority, other) = (Authority::new(), Authority::new());
    let start = |ca: PathBuf, identity: Identity| {
        let options =
            SyslogOptions { ca: Some(ca), ..options("tls://localhost") }.with_identity(Some(identity));
        SyslogSink::new(options).err().map(|error| error.to_string())
    };
    let good = authority.identity("client.test");
    let mixed = Identity { key: other.identity("client.test").key, ..good.clone() };
    assert_eq!(start(authority.ca(), good.clone()), None);
    assert!(start(authority.ca(), mixed).unwrap().contains("cannot be used with the key"));
    let swapped = Identity { cert: good.key.clone(), key: good.cert.clone() };
    assert!(start(authority.ca(), swapped).unwrap().contains("the client's private key"));
    let missing = Identity { cert: PathBuf::from("/nonexistent"), ..good.clone() };
    assert!(start(authority.ca(), missing).unwrap().contains("client's certificate from /nonexistent"));
    assert!(start(PathBuf::from("/nonexistent"), good).unwrap().contains("authorities from /nonexistent"));
}
