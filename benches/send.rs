//! Cost of the sender, compared with bare signing and compression of the same lines in the same
//! run.
//!
//! `cargo bench --bench send [-- ROUNDS]`. Prints CPU an event (`/proc/self/stat`, all threads of the
//! real program) of `auditgate send` and of `auditgate send --spool`, each posting to a receiver that
//! only answers, and how many times the bare cost that is.

#![expect(clippy::unwrap_used, reason = "a bench stops at the first surprise")]

mod common;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};

use auditgate::wire::batch;
use ed25519_dalek::pkcs8::EncodePrivateKey as _;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::{Signer as _, SigningKey};

use crate::common::{cpu, event, median, ticks};

const EVENTS: usize = 50_000;
const EVENTS_A_BATCH: usize = 500;

fn main() {
    let rounds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(5);
    let key = SigningKey::from_bytes(&[7; 32]);
    let url = receiver();
    let dir = tempfile::tempdir().unwrap();
    let (key_file, input) = (dir.path().join("key.pem"), dir.path().join("events.log"));
    std::fs::write(&key_file, key.to_pkcs8_pem(LineEnding::LF).unwrap().as_bytes()).unwrap();
    let lines: Vec<String> = (0..EVENTS as u64).map(event).collect();
    std::fs::write(&input, lines.join("\n") + "\n").unwrap();
    let (mut bares, mut once, mut spooled) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        let bare = bare(&key, &lines);
        let send = || {
            let mut command = Command::new(env!("CARGO_BIN_EXE_auditgate"));
            command.args(["send", "--quiet", "--to", &url, "--key"]).arg(&key_file).arg(&input);
            command.stdout(Stdio::null());
            command
        };
        let without = children(&mut send());
        let spool = dir.path().join(format!("spool-{round}"));
        let with = children(send().arg("--spool").arg(&spool));
        std::fs::remove_dir_all(spool).unwrap();
        bares.push(bare);
        once.push((without, without / bare));
        spooled.push((with, with / bare));
    }
    println!("{EVENTS} CEF events, {EVENTS_A_BATCH} a batch, {rounds} rounds; medians");
    println!("bare signing and gzip: {:.2} µs an event", median(bares));
    for (name, costs) in [("auditgate send", once), ("auditgate send --spool", spooled)] {
        let cost = median(costs.iter().map(|cost| cost.0).collect());
        let ratio = median(costs.iter().map(|cost| cost.1).collect());
        println!("{name:<24} {cost:5.2} µs an event, {ratio:.2} of that");
    }
}

/// CPU microseconds an event for signing and compressing, and nothing else.
fn bare(key: &SigningKey, lines: &[String]) -> f64 {
    let before = cpu("self");
    for batch in lines.chunks(EVENTS_A_BATCH) {
        let mut body = Vec::new();
        for line in batch {
            let signature = key.sign(line.as_bytes()).to_bytes();
            let start = body.len();
            body.extend_from_slice(line.as_bytes());
            let mut signed = body.split_off(start);
            auditgate::wire::signature::insert(auditgate::wire::event::Format::Cef, &mut signed, &signature);
            body.append(&mut signed);
            body.push(b'\n');
        }
        assert!(!batch::encode(&body).unwrap().is_empty());
    }
    (cpu("self") - before).as_secs_f64() * 1e6 / lines.len() as f64
}

/// CPU microseconds an event of a command.
fn children(command: &mut Command) -> f64 {
    // Fields 16 and 17: children that have ended.
    let before = ticks("self", 13);
    assert!(command.status().unwrap().success());
    (ticks("self", 13) - before).as_secs_f64() * 1e6 / EVENTS as f64
}

/// Starts a receiver that takes every batch, and returns its URL.
fn receiver() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/bench", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || answer(stream.unwrap()));
        }
    });
    url
}

fn answer(stream: TcpStream) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    let mut stream = BufReader::new(stream);
    loop {
        let (mut length, mut line) = (0, String::new());
        while line != "\r\n" {
            line.clear();
            if stream.read_line(&mut line).ok()? == 0 {
                return None;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().ok()?;
            }
        }
        stream.read_exact(&mut vec![0; length]).ok()?;
        let body = "{\"accepted\":500,\"duplicates\":0,\"quarantined\":0}";
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.get_mut().write_all((head + body).as_bytes()).ok()?;
    }
}
