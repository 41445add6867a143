//! A client of another make, hashicorp's go-retryablehttp with its defaults, which retries as Kong
//! documents of Konnect: no batch is lost while the daemon restarts or is overloaded.

use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::harness::daemon::Daemon;
use crate::harness::machine::{Need, ReservedPort, are_there};
use crate::harness::site::{PATH, Site, TOKEN};
use crate::harness::{body, gzip, programs, wait_until};

/// Root of Debian's packages of Go libraries.
const GO_PATH: &str = "/usr/share/gocode";

const GO: Need = (
    "go or its library go-retryablehttp is not installed (Debian: golang-go and \
     golang-github-hashicorp-go-retryablehttp-dev)",
    &["sh", "-c", "go version && test -d /usr/share/gocode/src/github.com/hashicorp/go-retryablehttp"],
);

/// Events of a batch.
const EVENTS: u64 = 20;

/// A running client. It is killed when this is dropped.
struct GoClient {
    child: Child,
    batches: Option<ChildStdin>,
    printed: Printed,
    log: Printed,
}

/// Lines of a child's output so far.
struct Printed {
    lines: Arc<Mutex<Vec<String>>>,
    reader: Option<JoinHandle<()>>,
}

impl Printed {
    fn of(output: impl Read + Send + 'static) -> Self {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let read = Arc::clone(&lines);
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                read.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        Self { lines, reader: Some(reader) }
    }

    fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the lines when the output has ended.
    fn all(&mut self) -> Vec<String> {
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        self.lines()
    }
}

impl GoClient {
    /// Builds and starts the client of a site's daemon on that port.
    fn start(site: &Site, port: u16) -> Self {
        let program = site.path("go_client");
        let built = concat!(env!("CARGO_TARGET_TMPDIR"), "/go-build");
        programs::run(
            Command::new("go")
                .args(["build", "-o"])
                .arg(&program)
                .arg(programs::beside("go_client.go"))
                .envs([("GO111MODULE", "off"), ("GOPATH", GO_PATH), ("GOFLAGS", ""), ("CGO_ENABLED", "0")])
                .env("GOCACHE", built),
        );
        let mut child = Command::new(program)
            .arg(format!("https://localhost:{port}{PATH}"))
            .arg(site.path("ca.pem"))
            .arg(TOKEN)
            .current_dir(site.path(""))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let batches = child.stdin.take();
        let printed = Printed::of(child.stdout.take().unwrap());
        let log = Printed::of(child.stderr.take().unwrap());
        Self { child, batches, printed, log }
    }

    /// Writes the file of a batch, and lets it be posted.
    fn post(&mut self, site: &Site, number: u64, events: std::ops::Range<u64>) {
        let name = format!("batch-{number}.gz");
        site.write(&name, gzip(&body(&site.producer.events(events))));
        writeln!(self.batches.as_mut().unwrap(), "{name}").unwrap();
    }

    /// Returns how many batches have ended, delivered or not.
    fn ended(&self) -> usize {
        self.printed.lines().len()
    }

    /// Waits until every batch has ended, each of which must have been delivered; returns the log.
    fn finish(mut self, batches: usize) -> Vec<String> {
        drop(self.batches.take());
        let status = wait_until("the client exits", || {
            self.child.try_wait().unwrap().ok_or_else(|| self.log.lines().join("\n"))
        });
        let log = self.log.all();
        assert_eq!(status.code(), Some(0), "{}", log.join("\n"));
        let printed = self.printed.all();
        assert_eq!(printed.len(), batches);
        assert!(printed.iter().all(|line| line.contains(".gz 200 {\"accepted\":")), "{printed:?}");
        log
    }
}

impl Drop for GoClient {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Checks that a site's file holds these events, each once.
fn assert_verified(site: &Site, events: u64) {
    let (mut found, mut sent) = (site.verified(), site.producer.events(0..events));
    found.sort();
    sent.sort();
    assert!(found == sent, "{} events were sent, and {} are in the file", sent.len(), found.len());
    assert_eq!(site.read("quarantine.jsonl"), b"");
}

const RESTARTS: u64 = 6;
const BATCHES_A_RESTART: u64 = 40;

#[test]
fn a_retrying_client_loses_no_batch_while_the_daemon_is_killed_and_restarted() {
    if !are_there(&[GO]) {
        return;
    }
    // The port must stay the same.
    let port = ReservedPort::new();
    let site = Site::new().edit("127.0.0.1:0", &format!("127.0.0.1:{}", port.number()));
    let mut client = GoClient::start(&site, port.number());
    let mut daemon = Daemon::start(&site);
    let mut batch = 0;
    for restart in 0..RESTARTS {
        let before = client.ended();
        for _ in 0..BATCHES_A_RESTART {
            client.post(&site, batch, batch * EVENTS..(batch + 1) * EVENTS);
            batch += 1;
        }
        wait_until("some batches are delivered", || {
            let ended = client.ended() - before;
            if ended >= 10 { Ok(()) } else { Err(format!("{ended}: {}", client.log.lines().join("\n"))) }
        });
        if restart % 2 == 0 {
            daemon.kill9();
        } else {
            daemon.terminate();
        }
        daemon = Daemon::start(&site);
    }
    let log = client.finish(usize::try_from(batch).unwrap());
    let retries = log.iter().filter(|line| line.contains(": retrying in ")).count();
    assert!(retries > 0, "the restarts were noticed: {log:?}");
    daemon.settle();
    assert_verified(&site, batch * EVENTS);
}

#[test]
fn a_retrying_client_waits_as_told_while_the_daemon_is_overloaded() {
    if !are_there(&[GO]) {
        return;
    }
    let limits = "body = \"1MiB\"\ndecoded = \"1MiB\"\nlines = 2000\nin_flight = \"3100KiB\"";
    let site = Site::new().limits(limits);
    let daemon = Daemon::start(&site);
    let mut client = GoClient::start(&site, daemon.address.port());
    // Bodies that end only when the client has been refused. There is memory for them, and not for
    // another one that must be inflated.
    let slow = [0..2000, 2000..3000].map(|events| {
        let body = body(&site.producer.events(events));
        let mut connection = daemon.connect();
        connection.begin_post(body.len());
        connection.send(&body[..body.len() - 10]);
        connection
    });
    client.post(&site, 0, 0..2000);
    let retry = wait_until("the daemon is overloaded", || {
        let log = client.log.lines();
        let retry = log.iter().find_map(|line| line.split_once("(status: 429): retrying in "));
        retry.map(|(_, retry)| retry.to_owned()).ok_or_else(|| log.join("\n"))
    });
    let seconds: u32 = retry.split_once('s').unwrap().0.parse().unwrap();
    assert!((5..=10).contains(&seconds), "{retry}");
    drop(slow);
    client.finish(1);
    daemon.settle();
    assert_verified(&site, 2000);
}
