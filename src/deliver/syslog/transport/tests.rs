use std::io::Read as _;
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::UnixListener;

use super::*;

const BEHIND: Position = Position { batch: 7, line: 0 };

fn transport(address: &str, timeout: Duration) -> Transport {
    let address = SyslogAddress::parse(address).unwrap();
    Transport::new(address, None, None, Framing::OctetCounting, timeout).unwrap()
}

fn plain(listener: &TcpListener) -> Transport {
    transport(&format!("tcp://{}", listener.local_addr().unwrap()), Duration::from_secs(10))
}

fn messages(texts: &[&str]) -> Rendered {
    let mut messages = Rendered::default();
    for text in texts {
        messages.add(|bytes| bytes.extend_from_slice(text.as_bytes()));
    }
    messages
}

fn deliver(transport: &mut Transport, messages: &Rendered) -> io::Result<()> {
    transport.write(messages, Position::default())?;
    assert_eq!(transport.confirm(BEHIND, true)?, Some(BEHIND));
    Ok(())
}

#[test]
fn nothing_counts_as_delivered_to_a_server_that_does_not_read() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp://{}", listener.local_addr().unwrap());
    let mut transport = transport(&address, Duration::from_secs(1));
    let mut messages = Rendered::default();
    messages.add(|bytes| bytes.resize(64 << 20, b'x'));
    let error = transport.write(&messages, BEHIND).unwrap_err();
    assert_eq!(error.to_string(), "the server did not respond within 1s");
    assert!(transport.connection.is_none());
}

#[test]
fn each_write_counts_as_delivered_after_its_own_grace_period() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut transport = plain(&listener);
    assert_eq!(transport.confirm(BEHIND, false).unwrap(), Some(BEHIND), "nothing waits");
    let first = Position { batch: 1, line: 0 };
    let start = Instant::now();
    transport.write(&messages(&["one"]), first).unwrap();
    assert_eq!(transport.confirm(first, false).unwrap(), None);
    std::thread::sleep(GRACE / 2);
    transport.write(&messages(&["two"]), BEHIND).unwrap();
    let confirmed = loop {
        match transport.confirm(BEHIND, false).unwrap() {
            None => std::thread::sleep(Duration::from_millis(1)),
            Some(position) => break position,
        }
    };
    assert_eq!(confirmed, first);
    assert!(start.elapsed() >= GRACE);
    assert_eq!(transport.confirm(BEHIND, true).unwrap(), Some(BEHIND));
}

#[test]
fn after_a_half_close_written_messages_count_and_later_ones_use_another_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut transport = plain(&listener);
    let server = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        for _ in 0..2 {
            let (mut socket, _) = listener.accept().unwrap();
            socket.shutdown(Shutdown::Write).unwrap();
            socket.read_to_end(&mut bytes).unwrap();
        }
        bytes
    });
    deliver(&mut transport, &messages(&["one", "two"])).unwrap();
    deliver(&mut transport, &messages(&["later"])).unwrap();
    assert_eq!(server.join().unwrap(), b"3 one3 two5 later");
}

#[test]
fn nothing_counts_as_delivered_if_the_server_closes_with_unread_bytes() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut transport = plain(&listener);
    let server = std::thread::spawn(move || {
        // It reads a part of the first connection, and all of the next.
        listener.accept().unwrap().0.read_exact(&mut [0; 4]).unwrap();
        let mut bytes = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let messages = messages(&["one", "two"]);
    assert!(deliver(&mut transport, &messages).is_err());
    deliver(&mut transport, &messages).unwrap();
    drop(transport);
    assert_eq!(server.join().unwrap(), b"3 one3 two");
}

#[test]
fn a_socket_with_a_full_queue_does_not_block() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stream");
    let listener = UnixListener::bind(&path).unwrap();
    // Fills the queue of connections, which are never accepted.
    let mut waiting = Vec::new();
    loop {
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
        if connect(&socket, &SocketAddrUnix::new(&path).unwrap()).is_err() {
            break;
        }
        waiting.push(socket);
    }
    let mut transport = transport(&format!("unix://{}", path.display()), Duration::from_millis(100));
    let error = transport.write(&messages(&["one"]), BEHIND).unwrap_err();
    assert_eq!(error.to_string(), "the server did not respond within 100ms");
    drop(listener);
}

#[test]
fn each_framing_separates_the_messages() {
    let messages = messages(&["one", "", "drei ü"]);
    let framed = |framing| {
        let mut out = Vec::new();
        write(&mut out, messages.iter(), framing).unwrap();
        String::from_utf8(out).unwrap()
    };
    assert_eq!(framed(Framing::OctetCounting), "3 one0 7 drei ü");
    assert_eq!(framed(Framing::Newline), "one\n\ndrei ü\n");
}
