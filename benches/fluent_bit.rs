//! Fluent Bit as a peer: the same events as JSON over TLS into a file, without verification, dedup or
//! fsync, which it has not.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use auditgate::wire::batch;
use auditgate::wire::event::Format;

use crate::{Connection, Line, exchange};

pub(super) const PROGRAM: &str = "fluent-bit";

const CONFIG: &str = "
[SERVICE]
    flush 1
    log_level error
[INPUT]
    name http
    listen 127.0.0.1
    port PORT
    buffer_max_size 16M
    tls on
    tls.crt_file DIR/cert.pem
    tls.key_file DIR/key.pem
[OUTPUT]
    name file
    match *
    path DIR
    file out.log
    format plain
";

pub(super) fn is_installed() -> bool {
    Command::new(PROGRAM).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// Starts it with the certificate of a directory, and returns its port.
pub(super) fn start(mut command: Command, dir: &Path) -> (Child, u16) {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let config = CONFIG.replace("DIR", &dir.display().to_string()).replace("PORT", &port.to_string());
    std::fs::write(dir.join("fluent-bit.conf"), config).unwrap();
    std::fs::write(dir.join("out.log"), "").unwrap();
    command.arg("--config").arg(dir.join("fluent-bit.conf"));
    let child = command.stdout(Stdio::null()).stderr(Stdio::inherit()).spawn().unwrap();
    let since = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(since.elapsed() < Duration::from_secs(20), "{PROGRAM} did not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    (child, port)
}

/// A compressed array of the events of some lines.
pub(super) fn body(lines: &[Line]) -> Vec<u8> {
    let mut text = b"[".to_vec();
    for line in lines {
        let event = auditgate::wire::line::Line::parse(&line.bytes).unwrap().event();
        text.extend(auditgate::send::line(Format::Json, &event, None).unwrap());
        text.push(b',');
    }
    text.pop();
    text.push(b']');
    batch::encode(&text).unwrap()
}

/// Posts a body. It says only that it has it.
pub(super) fn post(connection: &mut Connection, body: &[u8], _receipt: [usize; 3]) {
    let head = format!(
        "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    exchange(connection, &head, body, "\r\n\r\n");
}
